//! The daemon behind `snaprestore serve`, as a library: it serves the memory of VMs in other
//! processes from snapshots. It may be killed at any instant, and no VM gets a wrong byte or waits
//! for ever.
//!
//! ```text
//!   VMM ──connects──▶ supervisor ──descriptors, regions──▶ worker
//!        handshake        │  ◀──tables, VMs that ended──    │  faults, events, prefetch
//!                         │ descriptors                     │ died, or stuck
//!                         ▼                                 ▼
//!                     fd store: systemd, or the guardian  next worker: resumes
//! ```
//!
//! The supervisor owns everything that can't be created again: listening sockets, the connection on
//! which a userfaultfd arrives, pidfds, the open files of snapshots, and the tables of each session
//! (a memfd that the worker creates and hands over before its first read). The supervisor is one
//! thread that moves descriptors and watches; the worker decodes, parses snapshots and serves
//! operators. After a worker has died, its successor resumes from the tables by
//! [`Pager::resume`](snaprestore_engine::pager::Pager::resume). An upgrade works the same way: the
//! supervisor kills the old worker.
//!
//! | dies | then |
//! | --- | --- |
//! | worker | the supervisor starts another |
//! | worker, twice on one frame | that frame counts as damaged: a VM that wants it is killed |
//! | worker stops, hangs in a lock or on a disk while faults wait | the supervisor kills it |
//! | worker, for getting stuck three times in a row while one VM waits | that VM is killed |
//! | worker can't be killed: its disk never answers | its VMs are killed; another serves new ones |
//! | 20 workers in a row before they are ready, for 30 s | the VMs are killed; the daemon exits |
//! | supervisor | systemd restarts it with what was stored; or the guardian kills the VMs |
//! | supervisor, during a handshake | that VM is killed |
//! | supervisor, before it accepts a VM | systemd's next one serves it; or the guardian kills it |
//!
//! # Embedding
//!
//! The daemon runs its own program again for its other processes. So the program first asks whether
//! it was started for such a [`Role`], before it starts a thread.
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use snaprestore_daemon::{Options, Role, StopRequests, Supervisor, api::config::Config};
//!
//! fn serve(config: &str, stop: Box<dyn StopRequests>) -> anyhow::Result<ExitCode> {
//!     if let Some(role) = Role::of_this_process() {
//!         return role.run();
//!     }
//!     let config = Config::load(config.as_ref())?;
//!     let mut supervisor = Supervisor::new(Options::default(), None, stop)?;
//!     for service in config.services {
//!         supervisor.add(service)?;
//!     }
//!     let summary = supervisor.run()?;
//!     println!("served {} VMs", summary.served);
//!     Ok(ExitCode::SUCCESS)
//! }
//! ```
//!
//! # Where to start
//!
//! - [`Supervisor`]: starts the daemon, adds services, and runs it.
//! - [`api::config`]: services and the configuration file; [`api::control`]: the control socket;
//!   [`api::types`]: statistics and states.
//! - In the source: `supervisor/mod.rs` has the event loop, `worker/mod.rs` serves VMs,
//!   `fd_store/mod.rs` says who holds descriptors besides the supervisor, `ipc.rs` has the
//!   messages.

#![forbid(unsafe_code)]

pub mod api;
mod fd_store;
mod ipc;
pub mod log;
mod role;
mod supervisor;
mod worker;

pub use ipc::Endpoint;
pub use role::Role;
pub use supervisor::{Console, Options, StopRequests, Supervisor};

/// Parts that the project's own tests run in isolation; not part of the interface.
#[doc(hidden)]
pub mod parts {
    pub use crate::fd_store::systemd::{Inherited, take_inherited_fds};
    pub use crate::fd_store::{FdStore, OWNER, StoreEvent, UFFD};
    pub use crate::worker::sandbox::{Account, Confined, Confinement, confine_worker};
}
