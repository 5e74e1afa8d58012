//! Memory: who owns which mapping, and what may be done to it.
//!
//! | type | whose memory |
//! | --- | --- |
//! | [`Mapping`] | ours: made here, unmapped on drop |
//! | [`RawRegion`] | a mapping, ours or the caller's, on loan to a restore; the `unsafe` contract is its constructor's |
//! | [`Scratch`] | ours, and nobody else's ever: where pages are assembled |
//! | [`Block`] | a session's state, shareable with another process |
//! | [`Ring`] | the head of a block, where the kernel writes messages |
//!
//! Memory that somebody else can change at any moment, which is all memory here, is never a
//! `&[u8]`: there are raw pointers, addresses and lengths, and atomics.

mod advice;
mod brake;
#[cfg(feature = "rust-vmm")]
mod guest_memory;
mod load;
mod mapping;
mod region;
mod residency;
mod scratch;
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
pub use scratch::Scratch;
pub use shared_block::{Block, Ring};

/// The huge page size of x86-64 and of ARM with 4 KiB pages.
pub const HUGE_PAGE: u64 = 2 << 20;

/// An operation on memory that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {len:#x} bytes of memory at {address:#x} failed{hint}")]
pub struct MemError {
    doing: &'static str,
    address: u64,
    len: u64,
    /// The limit that was met, if one is known.
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

    /// What the kernel said.
    pub fn os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// A page without access rights that exists as long as the process, as a source that can't be read.
pub(crate) fn unreadable_page() -> io::Result<u64> {
    static PAGE: OnceLock<Mapping> = OnceLock::new();
    if let Some(page) = PAGE.get() {
        return Ok(page.address());
    }
    let page = Mapping::inaccessible(crate::page_size()).map_err(|error| error.source)?;
    // Another thread may have been first; then its page stays and ours is unmapped.
    Ok(PAGE.get_or_init(|| page).address())
}

/// Calls that change how memory may be accessed. The callers own the memory or hold a contract for
/// it.
///
/// # Safety
///
/// Nobody may rely on access to `[address, address + len)` that `protection` doesn't give.
pub(crate) unsafe fn protect(address: u64, len: u64, protection: i32) -> Result<(), MemError> {
    let pointer = std::ptr::with_exposed_provenance_mut(crate::to_usize(address));
    // SAFETY: mprotect changes access rights only, never content; the rights are the caller's
    // promise.
    let result = unsafe { libc::mprotect(pointer, crate::to_usize(len), protection) };
    if result == 0 {
        Ok(())
    } else {
        Err(MemError::last("changing the protection of", address, len))
    }
}
