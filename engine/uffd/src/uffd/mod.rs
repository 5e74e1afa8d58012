//! userfaultfd: the kernel's interface, behind types that need no `unsafe` code.
//!
//! | file | contents |
//! | --- | --- |
//! | `abi`, `ioctls` | numbers and structures, checked against C |
//! | `features` | feature and ioctl sets with their first kernel, masks, kernel versions |
//! | `open` | the ways to a userfaultfd, negotiation, errors that name the remedy |
//! | `userfaultfd` | [`Userfaultfd`]: register, unregister, wake, probe |
//! | `install` | copy, zero, write-protect, continue, poison, and their outcomes |
//! | `message`, `wait_queue` | reading messages, and waiting for them or to be woken |
//! | `grants` | which memory of this process a userfaultfd may fill |
//! | `foreign` | descriptors from another process: whether one is a userfaultfd, closing it |
//! | `probe` | what this machine offers and permits |

pub mod abi;
mod features;
mod foreign;
mod grants;
mod install;
mod ioctls;
mod message;
mod open;
mod probe;
mod userfaultfd;
mod wait_queue;

pub use features::{BadRelease, Features, Ioctls, KernelVersion, Mask};
pub use foreign::{PendingClose, Untrusted, is_userfaultfd, may_report_forks};
pub use install::{InstallError, Installed, Op, Protected, Wake};
pub use message::{FaultFlags, Forked, Message, Raw, ReadError, ReadOutcome};
pub use open::{Access, AccessFailure, OpenError, OpenOptions, UserModeOnly};
pub use probe::{AccessProbe, HugePool, Limit, Probe};
pub use userfaultfd::{AdoptError, Modes, Presence, RegisterError, Unregistered, Userfaultfd};
pub use wait_queue::{Readiness, WaitQueue};
