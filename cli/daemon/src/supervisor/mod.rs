//! The supervisor: one thread that holds everything irreplaceable, and watches the worker.
//!
//! ```text
//!   event_loop ──┬── Vms         each a VmRecord: its state and its descriptors
//!                ├── Services    snapshots, the sockets to which VMs connect, admission
//!                ├── Workers     the worker, its queue of messages, its successors
//!                ├── Endpoints   the sockets for operators and for readers of metrics
//!                ├── Recordings  VMs that are being recorded
//!                ├── VmFiles     traces and statistics that are being written
//!                ├── FdStore     copies of the descriptors in another process
//!                └── Journal     log lines and summaries
//! ```
//!
//! A part changes only itself. What concerns several parts is a method of [`Supervisor`]:
//! `event_loop` waits and dispatches, `connections` leads from a connection to a VM and to its end,
//! `worker_events` handles the worker's messages and its death, and `recovery` continues with what
//! is stored. [`policy`](crate::policy) has the limits.

mod connections;
mod endpoints;
mod event_loop;
mod handshake;
mod journal;
mod listener;
mod recordings;
mod recovery;
mod services;
mod snapshot_files;
mod upgrade;
mod vm;
mod vm_files;
mod vms;
mod worker_events;
mod worker_process;
mod workers;

use std::fmt::Display;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;

use self::endpoints::Endpoints;
use self::journal::Journal;
pub use self::listener::ListenError;
use self::recordings::Recordings;
pub use self::services::AddServiceError;
use self::services::Services;
use self::vm_files::VmFiles;
use self::vms::Vms;
pub use self::worker_process::StartError;
use self::workers::{Outgoing, Workers};
use crate::api::config::{MetricsAddress, Service};
use crate::api::summary::RunSummary;
use crate::error::Chain;
use crate::fd_store::FdStore;
use crate::fd_store::systemd;
use crate::ipc::Endpoint;
use crate::log::LogFormat;
use crate::policy;
use crate::signals::block_file_size_signal;
use crate::worker::sandbox::Account;

/// Interval at which the loop checks conditions that no descriptor reports.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The options of a daemon.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time for which a VM may wait for an inactive worker.
    pub stuck_after: Duration,
    /// Folders in which the ancestors of layered snapshots are looked for, after the folder of the
    /// snapshot.
    pub layers: Vec<PathBuf>,
    /// Size of the cache of decoded frames that VMs share, in MiB.
    pub frame_cache: u64,
    /// Folder in which the statistics of each VM are written when it has ended.
    pub run_json: Option<PathBuf>,
    /// The format of log lines.
    pub log_format: LogFormat,
    /// Whether the worker is confined.
    pub confine: bool,
    /// The user that the confined worker runs as, by name or number.
    pub user: Option<String>,
}

impl Default for Options {
    /// Returns the defaults of `snaprestore serve`.
    fn default() -> Self {
        Self {
            stuck_after: Duration::from_secs(30),
            layers: Vec::new(),
            frame_cache: 64,
            run_json: None,
            log_format: LogFormat::Text,
            confine: true,
            user: None,
        }
    }
}

/// An output for messages to people.
pub trait Console {
    /// Shows an event.
    fn info(&self, message: &dyn Display);
    /// Shows an error.
    fn error(&self, message: &dyn Display);
}

/// Requests to stop, which a process gets as signals. The descriptor is readable once there is one.
pub trait StopRequests: AsFd {
    /// Returns the number of requests: after the first the VMs are completed, after the second
    /// killed.
    fn count(&self) -> u32;
}

/// Why a daemon can't continue. All its VMs were killed, since nobody would serve them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The supervisor can't wait for events.
    #[error("cannot wait for events")]
    Wait(#[source] Errno),
    /// A message can't be sent to the worker.
    #[error("cannot send to the worker")]
    Send(#[source] io::Error),
    /// A message of the worker can't be received.
    #[error("cannot receive from the worker")]
    Receive(#[source] io::Error),
    /// The first worker can't confine itself.
    #[error("{why}")]
    Confine {
        /// The reason, and the remedy.
        why: String,
    },
    /// The exit status of the worker can't be collected.
    #[error("cannot get the exit status of the worker")]
    Reap(#[source] io::Error),
    /// A worker can't be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// No worker became ready.
    #[error(
        "no worker became ready for {time:?}: {failed} of them exited at once, and the last {last}"
    )]
    NoWorker {
        /// The time for which workers failed.
        time: Duration,
        /// Number of workers in a row.
        failed: u32,
        /// How the last worker exited.
        last: String,
    },
}

/// The supervisor of a daemon, in this process.
///
/// It starts its own program again as worker and as guardian: see [`Role`](crate::Role).
///
/// If it is dropped, or its process exits, its VMs are killed by the guardian, or continue with the
/// next supervisor that systemd starts.
pub struct Supervisor {
    options: Options,
    stop_requests: Box<dyn StopRequests>,
    stopping: Stopping,
    vms: Vms,
    services: Services,
    workers: Workers,
    endpoints: Endpoints,
    fd_store: FdStore,
    recordings: Recordings,
    journal: Journal,
    vm_files: VmFiles,
}

/// Stage of stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopping {
    No,
    /// The worker completes the VMs.
    Draining,
    /// The VMs are being killed.
    Killing,
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor")
            .field("options", &self.options)
            .field("stopping", &self.stopping)
            .finish_non_exhaustive()
    }
}

impl Supervisor {
    /// Starts the worker and the guardian, and recovers the VMs that systemd has stored.
    ///
    /// Messages go to `console`; without it, they are logged through `tracing`. The daemon stops
    /// when `stop_requests` asks it to.
    ///
    /// The process's limit of descriptors is raised to the hard one. `SIGXFSZ` is blocked in this
    /// thread, so that a limit of the size of files costs a VM, and not the supervisor.
    ///
    /// # Errors
    ///
    /// Returns an error if no worker can be started. A missing guardian is only logged.
    pub fn new(
        options: Options,
        console: Option<Box<dyn Console>>,
        stop_requests: Box<dyn StopRequests>,
    ) -> Result<Self, StartError> {
        // The worker would fail as well, but only after the sockets are open.
        if let Some(user) = options.user.as_ref().filter(|_| options.confine) {
            Account::find(user)?;
        }
        // Every VM takes some.
        snaprestore_uffd::os::limits::raise_descriptor_limit();
        // Without it, a limit of the size of files kills the supervisor instead of a VM.
        let _ = block_file_size_signal();
        let inherited = systemd::take_inherited_fds();
        let program = std::path::Path::new(workers::OWN_PROGRAM);
        let fd_store = FdStore::find(program, &inherited);
        let mut supervisor = Self {
            workers: Workers::start(options.clone())?,
            options,
            stop_requests,
            stopping: Stopping::No,
            vms: Vms::new(),
            services: Services::new(),
            endpoints: Endpoints::default(),
            fd_store,
            recordings: Recordings::default(),
            journal: Journal::new(console),
            vm_files: VmFiles::default(),
        };
        if let Some(warning) = supervisor.fd_store.warning() {
            supervisor.journal.error(warning);
        }
        supervisor.recover_stored(inherited.stored);
        Ok(supervisor)
    }

    /// Accepts clients at `address`.
    ///
    /// # Errors
    ///
    /// Returns an error if the address can't be listened on; see [`ListenError`].
    pub fn open(
        &mut self,
        endpoint: Endpoint,
        address: &MetricsAddress,
    ) -> Result<(), ListenError> {
        self.endpoints.open(endpoint, address)
    }

    /// Starts listening for the VMs of a service. They are served once [`run`](Self::run) is
    /// called.
    ///
    /// # Errors
    ///
    /// Returns an error if the snapshot can't be opened within [`Options::stuck_after`], the socket
    /// can't be created, or another service has the name or the socket.
    pub fn add(&mut self, service: Service) -> Result<(), AddServiceError> {
        self.services.check_addable(&service)?;
        let (folders, timeout) = (&self.options.layers, self.options.stuck_after);
        let files = services::open(&service, folders, timeout)?;
        self.add_opened(service, files)
    }

    /// Serves until asked to stop, and every VM has ended or was released.
    ///
    /// # Errors
    ///
    /// Returns an error if the daemon can't continue, such as when no worker becomes ready. All VMs
    /// were killed then, since nobody would serve them.
    pub fn run(mut self) -> Result<RunSummary, RunError> {
        systemd::notify("READY=1");
        for socket in self.services.take_all_inherited() {
            self.kill_backlog(&socket, "?", &[]);
        }
        let mut outcome = Ok(());
        loop {
            let result = self.run_once();
            let fails_again = result.is_err() && self.stopping == Stopping::Killing;
            if let Err(error) = &result {
                // Without a supervisor, the VMs would wait forever.
                self.kill_all(&format!("the daemon failed: {}", Chain(error)));
                self.stopping = Stopping::Killing;
            }
            outcome = outcome.and(result);
            if fails_again || self.stopping != Stopping::No && self.vms.is_idle() {
                break;
            }
        }
        self.wait_for_exits()?;
        self.shut_down_worker();
        self.finish_vm_files();
        if !self.fd_store.flush(policy::FLUSH_TIMEOUT) {
            self.journal.error(format_args!(
                "{} is not reading and still counts released VMs as served: kill it (SIGKILL), or it kills those VMs \
                 when it resumes",
                self.fd_store
            ));
        }
        outcome?;
        Ok(self.journal.into_summary(self.workers.restarts()))
    }
}
