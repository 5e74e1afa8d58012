//! The daemon behind `snaprestore serve`, as a library: it serves the memory of VMs in other
//! processes from snapshots. It may be killed at any instant, and no VM gets a wrong byte or waits
//! forever.
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
//! thread that passes descriptors on and watches the worker. It opens each snapshot only to check
//! it. The worker reads and decodes snapshots, and serves operators. After a worker has died, its
//! successor resumes from the tables by
//! [`Pager::resume`](snaprestore_engine::pager::Pager::resume). An upgrade works the same way: the
//! supervisor kills the old worker.
//!
//! | event | consequence |
//! | --- | --- |
//! | a worker dies | the supervisor starts another |
//! | two workers die on one frame | it counts as damaged: the service's `on_error` applies |
//! | a worker stops or hangs while faults wait | the supervisor kills it |
//! | three workers in a row hang while one VM waits | that VM is killed |
//! | a worker can't be killed: its disk hangs | its VMs are killed; another serves new ones |
//! | workers die before they are ready, 20 in a row, for 30 s | VMs are killed; the daemon exits |
//! | the supervisor dies | systemd restarts it with its descriptors; or the guardian kills VMs |
//! | the supervisor dies during a handshake | that VM is killed |
//! | the supervisor dies before it accepts a VM | the next one does, or the guardian kills the VM |
//!
//! # Embedding
//!
//! A launcher that starts VMs can have the supervisor inside. It supplies three things:
//!
//! - [`Role`]: the daemon runs its own program again as worker and as guardian. So the program asks
//!   first, before it starts a thread, whether it was started for such a role.
//! - [`StopRequests`]: a descriptor and a count by which the daemon is asked to stop, such as a
//!   pipe that a thread for signals writes to.
//! - [`Console`]: where messages go. Without one they are logged through `tracing`.
//!
//! ```no_run
//! use std::fmt::Display;
//! use std::io::PipeReader;
//! use std::os::fd::{AsFd, BorrowedFd};
//! use std::process::ExitCode;
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicU32, Ordering};
//!
//! use snaprestore_daemon::api::config::{MetricsAddress, Service};
//! use snaprestore_daemon::{Console, Endpoint, Options, Role, StopRequests, Supervisor};
//!
//! /// A pipe that another thread closes in order to stop the daemon, and the number of requests.
//! struct Stop(PipeReader, Arc<AtomicU32>);
//!
//! impl AsFd for Stop {
//!     fn as_fd(&self) -> BorrowedFd<'_> {
//!         self.0.as_fd()
//!     }
//! }
//!
//! impl StopRequests for Stop {
//!     fn count(&self) -> u32 {
//!         self.1.load(Ordering::SeqCst)
//!     }
//! }
//!
//! struct Terminal;
//!
//! impl Console for Terminal {
//!     fn info(&self, message: &dyn Display) {
//!         eprintln!("{message}");
//!     }
//!
//!     fn error(&self, message: &dyn Display) {
//!         eprintln!("error: {message}");
//!     }
//! }
//!
//! fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
//!     if let Some(role) = Role::of_this_process() {
//!         return Ok(role.run()?);
//!     }
//!     let (reader, writer) = std::io::pipe()?;
//!     let requests = Arc::new(AtomicU32::new(0));
//!     let stop = Stop(reader, Arc::clone(&requests));
//!     // Elsewhere: `requests.fetch_add(1, Ordering::SeqCst); drop(writer);`
//!
//!     let options = Options::default();
//!     let mut supervisor = Supervisor::new(options, Some(Box::new(Terminal)), Box::new(stop))?;
//!     supervisor.add(Service::new("web", "/srv/web.snap", "/run/web.socket"))?;
//!     let metrics = MetricsAddress::Loopback(([127, 0, 0, 1], 9100).into());
//!     supervisor.open(Endpoint::Metrics, &metrics)?;
//!     let summary = supervisor.run()?;
//! #   drop(writer);
//!     println!("served {} VMs", summary.served);
//!     Ok(ExitCode::SUCCESS)
//! }
//! ```
//!
//! `examples/launcher.rs` is a whole program, which the project's tests run. The supervisor
//! occupies its thread until it has stopped. It also starts a short-lived thread for each snapshot
//! that it opens, raises the process's limit of open files, and has child processes: workers, and
//! one that starts the guardian and exits.
//!
//! # Features
//!
//! - `fail-points`: places at which the project's own tests kill the process. Off by default.
//!
//! # Where to start
//!
//! - [`Supervisor`]: starts the daemon, adds services, and runs it.
//! - [`api::config`]: services and the configuration file; [`api::control`]: the control socket;
//!   [`api::types`]: statistics and states; [`api::summary`]: how VMs ended.
//! - In the source: `supervisor/vm.rs` draws the states of a VM, `supervisor/event_loop.rs` has the
//!   event loop, `policy.rs` the limits, `worker/mod.rs` serves VMs, `fd_store/mod.rs` stores
//!   descriptors in another process, `ipc.rs` has the messages.

#![forbid(unsafe_code)]

pub mod api;
mod error;
mod fd_store;
mod ipc;
pub mod log;
mod policy;
mod role;
mod signals;
mod supervisor;
mod worker;

pub use ipc::Endpoint;
pub use role::{Role, RoleError};
pub use supervisor::{
    AddServiceError, Console, ListenError, Options, RunError, StartError, StopRequests, Supervisor,
};
pub use worker::WorkerError;

/// Parts that the project's own tests run in isolation; not part of the interface.
#[doc(hidden)]
pub mod parts {
    pub use crate::fd_store::systemd::{Inherited, take_inherited_fds};
    pub use crate::fd_store::{FdStore, OWNER, StoreError, StoreEvent, UFFD};
    pub use crate::worker::sandbox::{Account, Confined, Confinement, confine_worker};
}
