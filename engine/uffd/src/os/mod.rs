//! Linux functions that a program needs to restore memory, besides memory and userfaultfd.
//!
//! | file | contents |
//! | --- | --- |
//! | `thread` | signals, scheduling, freed memory |
//! | `process`, `socket`, `inherited` | other processes, and descriptors that come from them |
//! | `pagemap` | which pages of a process exist |
//! | `secret` | memory that only its owner can read |
//! | `sandbox` | giving up rights |
//! | `limits` | which limit is behind an ENOMEM or EAGAIN |
//! | `abort` | aborting this process, with the reason on standard error |

mod abort;
mod inherited;
pub mod limits;
pub mod pagemap;
mod process;
pub mod sandbox;
mod secret;
mod socket;
mod thread;

pub use abort::abort;
pub use inherited::take_inherited;
pub use process::{PageMap, kill_by_pidfd, may_kill, open_page_map, open_pidfd, pid_of};
pub use secret::create_secret_memory;
pub use socket::{Peer, Received, credentials_of, peer_of, receive};
pub(crate) use thread::SignalMask;
pub use thread::{SignalsBlocked, leave_creator, trim_heap};
