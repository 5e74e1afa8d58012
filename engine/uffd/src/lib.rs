//! Safe userfaultfd: opens it, registers memory, installs pages and reads events, and owns the
//! memory below it. The caller needs no `unsafe` code.
//!
//! Userfaultfd lets a program fill memory when it is first touched. A thread that touches a missing
//! page stops; the program reads a message, installs the page, and the thread continues:
//!
//! ```text
//!  thread            kernel                        this crate                       caller
//!    │ touch           │                               │                               │
//!    ├────────────────▶│  PAGEFAULT, REMOVE, UNMAP, .. │                               │
//!    ┆ waits           ├──────────────────────────────▶│ Userfaultfd::read: Message    │
//!    ┆                 │                               ├──────────────────────────────▶│
//!    ┆                 │ UFFDIO_COPY, ZEROPAGE, ..     │ Userfaultfd::copy, zeropage   │
//!    ┆                 │◀──────────────────────────────┤◀──────────────────────────────┤
//!    │◀────────────────┤ page present                  │ Installed::Done, Again, ..    │
//! ```
//!
//! The kernel's error numbers become outcomes ([`Installed`](uffd::Installed)) that say what to do
//! next, for every kernel version since 5.7.
//!
//! # Example
//!
//! ```
//! use std::sync::Arc;
//! use snaprestore_uffd::memory::{Mapping, RawRegion};
//! use snaprestore_uffd::uffd::{Installed, Modes, OpenOptions, UserModeOnly, Wake};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let region = RawRegion::owned(Arc::new(Mapping::new(4096)?));
//! let uffd = OpenOptions::new().user_mode_only(UserModeOnly::IfNeeded).open()?;
//! uffd.register(&region, 0, region.len(), Modes::MISSING)?;
//! let installed = uffd.copy(region.address(), &[7; 4096], Wake::Now)?;
//! assert_eq!(installed, Installed::Done);
//! # Ok(())
//! # }
//! ```
//!
//! # Where to start
//!
//! | module | contents |
//! | --- | --- |
//! | [`uffd`] | userfaultfd: opening, registering, installing, reading messages, capabilities |
//! | [`memory`] | mappings and their owners, blocks shared between processes, checked loads |
//! | [`os`] | waiting, signals, other processes and their descriptors, limits, sandboxes |
//!
//! To open a userfaultfd, or to find out why it is not permitted, start at
//! [`OpenOptions`](uffd::OpenOptions) and [`Probe`](uffd::Probe).
//!
//! # Safety
//!
//! A userfaultfd can fill memory that it does not own. Therefore every function that installs a
//! page checks that the page lies in memory that was registered under the contract of
//! [`RawRegion::new`](memory::RawRegion::new), which is the one `unsafe` step.
//!
//! # Features
//!
//! - `rust-vmm`: presents regions as guest memory of the crate `vm-memory`.
//!
//! # Minimum kernel: 5.7
//!
//! The events REMOVE, REMAP and UNMAP (4.11) keep discarded pages from coming back. 5.7 is the
//! first kernel in which a fault may be retried any number of times. Before 5.7, a thread that is
//! woken and finds its page still missing gets SIGBUS, but a restore relies on waking to recover
//! from every doubtful state. Everything newer is optional and has a fallback.

#![allow(unsafe_code, reason = "the one package that talks to the kernel")]

pub mod memory;
pub mod os;
pub mod uffd;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("userfaultfd needs Linux, and addresses are 64 bits wide here");

/// Size of a snapshot's page in bytes.
const PAGE_SIZE: u64 = 4096;

/// Returns the base page size of this machine, 4 KiB on x86-64. The kernel requires addresses and
/// lengths to be multiples of it.
pub fn page_size() -> u64 {
    static SIZE: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: sysconf reads a constant of the process and touches none of our memory.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(size).unwrap_or(4096)
    })
}

/// The error for a kernel whose pages are not 4 KiB like those of a snapshot, so that they can't be
/// restored one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this kernel has pages of {size} bytes, and a snapshot's have 4096: run a kernel with 4 KiB pages"
)]
pub struct PageSizeError {
    /// The kernel's page size in bytes.
    pub size: u64,
}

/// Checks that the kernel's page size is that of a snapshot.
pub fn check_page_size() -> Result<(), PageSizeError> {
    can_be_restored(page_size())
}

fn can_be_restored(size: u64) -> Result<(), PageSizeError> {
    if size == PAGE_SIZE {
        Ok(())
    } else {
        Err(PageSizeError { size })
    }
}

/// Converts a length or address of this process to `usize`. Lossless, because the crate compiles
/// only for 64-bit targets.
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits, see compile_error above"
)]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_with_larger_pages_is_refused() {
        assert_eq!(can_be_restored(4096), Ok(()));
        let refused = can_be_restored(65536).unwrap_err();
        assert!(refused.to_string().contains("65536 bytes"), "{refused}");
    }
}
