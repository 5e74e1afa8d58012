//! Memory: ownership of mappings, and the permitted operations on them.
//!
//! | type | ownership and use |
//! | --- | --- |
//! | [`Mapping`] | ours: created here, unmapped on drop |
//! | [`RawRegion`] | ours or the caller's, lent to a restore; its constructor is `unsafe` |
//! | [`Block`] | a session's state, shareable with another process |
//! | [`Ring`] | the head of a block, into which the kernel writes messages |
//!
//! Memory that somebody else can change at any moment, like all memory here, is never a `&[u8]`,
//! but raw pointers, addresses and lengths, and atomics.

mod advice;
mod brake;
#[cfg(feature = "rust-vmm")]
mod guest_memory;
mod load;
mod mapping;
mod region;
mod residency;
mod shared_block;

use std::io;
use std::sync::OnceLock;

use nix::errno::Errno;

use crate::os::limits::Hint;

pub use advice::{Advice, advise_at};
pub use brake::Brake;
#[cfg(feature = "rust-vmm")]
pub use guest_memory::{GuestMemoryError, guest_memory};
pub use load::{Loads, ReadFault, read_checked};
pub use mapping::{Mapping, MappingOptions};
pub use region::RawRegion;
pub use residency::{
    Pagemap, SMAPS, Unsuitable, dont_fork_of, first_populated, first_populated_by_pagemap,
    first_resident,
};
pub use shared_block::{Block, Ring};

/// The huge page size of x86-64 and of ARM with 4 KiB pages.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The error for an operation on memory that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {len:#x} bytes of memory at {address:#x} failed{hint}")]
pub struct MemError {
    doing: &'static str,
    address: u64,
    len: u64,
    /// The limit that was reached, if known.
    hint: Hint,
    source: io::Error,
}

impl MemError {
    pub(crate) fn last(doing: &'static str, address: u64, len: u64) -> Self {
        let source = io::Error::last_os_error();
        Self {
            doing,
            address,
            len,
            hint: Hint::for_memory(&source, len),
            source,
        }
    }

    pub(crate) fn invalid(doing: &'static str, address: u64, len: u64) -> Self {
        Self {
            doing,
            address,
            len,
            hint: Hint::default(),
            source: Errno::EINVAL.into(),
        }
    }
}

/// Returns the address of a page without access rights that exists as long as the process, for use
/// as an unreadable source.
pub(crate) fn unreadable_page() -> io::Result<u64> {
    static PAGE: OnceLock<Mapping> = OnceLock::new();
    if let Some(page) = PAGE.get() {
        return Ok(page.address());
    }
    let page = Mapping::inaccessible(crate::page_size()).map_err(|error| error.source)?;
    // Another thread may have been first; then its page stays and ours is unmapped.
    Ok(PAGE.get_or_init(|| page).address())
}

/// Changes the access rights of memory. Callers own the memory or have a contract for it.
///
/// # Safety
///
/// Nobody may rely on access to `[address, address + len)` that `protection` doesn't permit.
pub(crate) unsafe fn protect(address: u64, len: u64, protection: i32) -> Result<(), MemError> {
    let pointer = std::ptr::with_exposed_provenance_mut(crate::to_usize(address));
    // SAFETY: mprotect changes only access rights, never content; the caller guarantees that the
    // rights suffice.
    let result = unsafe { libc::mprotect(pointer, crate::to_usize(len), protection) };
    if result == 0 {
        Ok(())
    } else {
        Err(MemError::last("changing the protection of", address, len))
    }
}
