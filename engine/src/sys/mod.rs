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
//! | `pagemap` | which pages of a process exist |
//! | `thread` | signals, checked reads, freed memory |
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
pub mod confine;
pub mod event;
pub mod features;
mod follower;
mod foreign;
mod grants;
mod inherited;
pub mod install;
mod ioctls;
pub mod message;
pub mod open;
pub mod pagemap;
pub mod probe;
pub mod process;
pub mod socket;
pub mod thread;
pub mod uffd;

pub use event::{Ready, Waiting};
pub use features::{Features, Ioctls, KernelVersion, Mask};
pub use follower::Follower;
pub use foreign::{Closing, Untrusted, is_userfaultfd, may_report_forks};
pub use inherited::take_inherited;
pub use install::{InstallError, Installed, MoveHoles, Op, Protected, Wake};
pub use message::{FaultFlags, Forked, Message, Raw, ReadError, ReadOutcome};
pub use open::{Access, AccessFailure, OpenError, OpenOptions, UserModeOnly};
pub use probe::Probe;
pub(crate) use process::PageMap;
pub use process::{kill_by_pidfd, may_kill, open_page_map, open_pidfd, pid_of};
pub use socket::{Peer, Received, credentials_of, peer_of, receive};
pub(crate) use thread::trim_heap;
pub use thread::{ReadFault, SignalsBlocked, read_checked};
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

/// A length or address of this process as `usize`. Lossless: the crate compiles for 64-bit targets
/// only.
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits, see compile_error above"
)]
pub(crate) const fn to_usize(n: u64) -> usize {
    n as usize
}
