//! The daemon behind `snaprestore serve`: it may be killed at any instant, and no VM gets a wrong byte or waits for
//! ever.
//!
//! ```text
//!   VMM ──connects──▶ keeper ──descriptors, regions──▶ worker
//!        handshake      │  ◀──tables, endings───────      │  faults, events, prefetch: everything else
//!                       │ died, or stuck: another         │
//!                       └────────────────────────▶  worker
//! ```
//!
//! What can't be made again is in the keeper first: listening sockets, the read that brings a
//! userfaultfd, pidfds, the open files of snapshots, the tables of each session (a memfd that the
//! worker makes and hands over before its first read). The keeper is one thread that moves descriptors and
//! watches; all that decodes, parses a snapshot or answers requests is in the worker. A worker that dies
//! is replaced once it is wholly gone, and its successor goes on from the tables, by
//! [`Pager::resume`](snaprestore_engine::pager::Pager::resume). A new program takes over the same way: the
//! old worker is killed.
//!
//! | dies | then |
//! | --- | --- |
//! | worker | the keeper starts another |
//! | worker, twice on one frame | that frame counts as damaged: its VM is killed when it wants it |
//! | worker stops, hangs in a lock or on a disk while faults wait | the keeper kills it |
//! | worker, for getting stuck three times in a row while one VM waits | that VM is killed |
//! | worker can't be killed: its disk never answers | its VMs are killed, and another serves those that come |
//! | worker, before it is ready, at least 20 times in a row and for 30 s | the VMs are killed, and the daemon ends |
//! | keeper | systemd starts it again and gives it back what it held; or a guardian kills the VMs ([`fd_store`]) |
//! | keeper, while a VM hands its memory over | that VM is killed; one that was not accepted yet is served by systemd's next keeper |

#![forbid(unsafe_code)]

pub mod api;
mod fd_store;
mod ipc;
pub mod log;
mod role;
mod supervisor;
mod worker;

pub use ipc::Door;
pub use role::Role;
pub use supervisor::{Console, Ended, Keeper, Options, StopRequests};

/// Parts that the project's own tests run by themselves; no part of the interface.
#[doc(hidden)]
pub mod parts {
    pub use crate::fd_store::systemd::{Given, given};
    pub use crate::fd_store::{News, OWNER, Outside, UFFD};
    pub use crate::worker::sandbox::{Account, Confined, Confinement, confine_worker};
}
