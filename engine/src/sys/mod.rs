//! The kernel: every system call of the engine that needs `unsafe`, behind types that don't.
//!
//! | file | what |
//! | --- | --- |
//! | `abi`, `ioctls` | the numbers and structures of userfaultfd, checked against C |
//! | `features` | feature and ioctl sets with the kernel that brought them, masks, kernel versions |
//! | `open` | the ways to a userfaultfd, negotiation, errors that name the remedy |
//! | `uffd` | [`Userfaultfd`]: register, unregister, wake, probe |
//! | `install` | copy, zero, write-protect, continue, poison, move, and their outcomes |
//! | `message` | reading messages |
//! | `grants` | which memory of this process a userfaultfd may fill |
//! | `event` | waking a thread that waits, and waiting |
//! | `process`, `socket`, `inherited` | other processes, and descriptors that come from them |
//! | `confine` | giving up rights |
//! | `limits` | which limit is behind an ENOMEM or EAGAIN |
//! | `pagemap` | which pages of a process exist |
//! | `thread` | signals, scheduling, checked reads, freed memory |
//! | `load` | loads that come back with an error from a page that can't be had |
//! | `abort` | aborting this process, with the reason on standard error |
//! | `probe` | what this machine offers and permits |
//!
//! # Minimum kernel: 5.7
//!
//! The events REMOVE, REMAP and UNMAP (4.11) are what keeps discarded pages from coming back. 5.7
//! is the first kernel in which a fault may be retried any number of times: before it a thread that
//! is woken and finds its page still missing gets SIGBUS, and waking is how this engine recovers
//! from every doubt. Everything newer is optional and has a fallback.

#![allow(unsafe_code, reason = "one of the two modules that talk to the kernel")]

pub mod abi;
mod abort;
pub mod confine;
pub mod event;
pub mod features;
mod follower;
mod foreign;
mod grants;
mod inherited;
pub mod install;
mod ioctls;
pub mod limits;
mod load;
pub mod message;
pub mod open;
pub mod pagemap;
pub mod probe;
pub mod process;
pub mod socket;
pub mod thread;
pub mod uffd;

pub(crate) use abort::abort;
pub use event::{Ready, Waiting};
pub use features::{Features, Ioctls, KernelVersion, Mask};
pub use follower::Follower;
pub use foreign::{Closing, Untrusted, is_userfaultfd, may_report_forks};
pub use inherited::take_inherited;
pub use install::{InstallError, Installed, MoveHoles, Op, Protected, Wake};
pub use load::Loads;
pub use message::{FaultFlags, Forked, Message, Raw, ReadError, ReadOutcome};
pub use open::{Access, AccessFailure, OpenError, OpenOptions, UserModeOnly};
pub use probe::Probe;
pub(crate) use process::PageMap;
pub use process::{kill_by_pidfd, may_kill, open_page_map, open_pidfd, pid_of};
pub use socket::{Peer, Received, credentials_of, peer_of, receive};
pub use thread::{ReadFault, SignalsBlocked, read_checked};
pub(crate) use thread::{leave_creator, trim_heap};
pub use uffd::{AdoptError, Modes, Presence, RegisterError, Unregistered, Userfaultfd};

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("userfaultfd needs Linux, and addresses are 64 bits wide here");

/// The base page of this machine, 4 KiB on x86-64; the kernel wants addresses and lengths in
/// multiples of it.
pub fn page_size() -> u64 {
    static SIZE: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: sysconf reads a constant of the process and touches no memory of ours.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(size).unwrap_or(4096)
    })
}

/// Pages of this kernel are not of 4 KiB, as those of a snapshot are, so that they can't be restored one
/// by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this kernel has pages of {size} bytes, and a snapshot's have 4096: run a kernel with 4 KiB pages"
)]
pub struct PageSizeError {
    /// The kernel's.
    pub size: u64,
}

/// Makes sure that a page of a snapshot is one of the kernel's.
pub(crate) fn check_page_size() -> Result<(), PageSizeError> {
    can_be_restored(page_size())
}

fn can_be_restored(size: u64) -> Result<(), PageSizeError> {
    if size == snapshot_format::layout::PAGE_SIZE_U64 {
        Ok(())
    } else {
        Err(PageSizeError { size })
    }
}

/// A length or address of this process as `usize`. Lossless: the crate compiles for 64-bit targets
/// only.
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits, see compile_error above"
)]
pub(crate) const fn to_usize(n: u64) -> usize {
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
