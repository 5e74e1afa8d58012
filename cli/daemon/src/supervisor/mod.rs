//! The supervisor: one thread that holds everything irreplaceable, and watches the worker.
//!
//! ```text
//!   loop: wait for any of
//!     a connection          identify the peer, and check whether the service admits it
//!     a handshake           complete: it becomes a VM, and the worker gets it
//!     a worker's message    tables to keep, a VM that ended
//!     the worker's exit     read its last messages, start another, brief it
//!     a client              the worker gets its connection
//!     an upgrade's message  kill the old worker; the new one serves
//!     an event of the store the guardian exited: start another, store everything again
//!     an owner's exit       close its descriptors
//!     a signal              no more VMs; the worker completes those that are there; after a second
//!                           one they are killed
//!     a second has passed   is the worker stuck, is a handshake overdue?
//! ```
//!
//! The loop is here. `services` has the services, their sockets and handshakes; `vms` the VMs that
//! were handed over; `workers` the worker and its messages; `stuck` the handling of stuck workers;
//! and `upgrade` a worker of another program that takes over.

mod handshake;
mod listener;
mod refusal_log;
mod services;
mod stuck;
mod upgrade;
mod vm;
mod vms;
mod worker_process;
mod workers;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt::Display;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use self::services::{ClosingConnection, OpeningService, ServiceRecord};
use self::stuck::UnkillableWorker;
use self::upgrade::Upgrade;
use self::workers::{FailedStarts, Outgoing};
use crate::api::summary::{Ending, RunSummary, VmLabel, VmSummary};
use crate::api::types::{self, MAX_RECENT_VMS};
use crate::fd_store::FdStore;
use crate::fd_store::systemd::{self, Manager};
use crate::ipc::{Endings, Endpoint};
use crate::log::LogFormat;
use crate::supervisor::handshake::PendingHandshake;
use crate::supervisor::listener::BoundSocket;
use crate::supervisor::refusal_log::RefusalLog;
use crate::supervisor::vm::{ExitingVm, VmRecord};
use crate::supervisor::worker_process::WorkerProcess;
use crate::worker::sandbox::Account;

/// Interval at which the loop checks conditions that no descriptor reports.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of summaries of VMs to keep; further ones are only counted.
const MAX_SUMMARIES: usize = 10_000;
/// Time limit for the guardian to read its last messages.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of clients that wait for a worker.
const MAX_WAITING_CLIENTS: usize = 64;

/// The options of a daemon.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time for which a VM may wait for an inactive worker.
    pub stuck_after: Duration,
    /// Size of the cache of decoded frames that VMs of one snapshot share, in MiB.
    pub frame_cache: u64,
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
            frame_cache: 64,
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

/// The supervisor.
pub struct Supervisor {
    options: Options,
    /// Output for messages; without it, they are logged.
    console: Option<Box<dyn Console>>,
    stop_requests: Box<dyn StopRequests>,
    program: OsString,
    worker: WorkerProcess,
    unkillable: Vec<UnkillableWorker>,
    /// Number of workers started, and of those in a row that failed at once.
    workers: u64,
    failed_starts: FailedStarts,
    restarts: u64,
    upgrade: Option<Upgrade>,
    fd_store: FdStore,
    outgoing: VecDeque<Outgoing>,
    services: BTreeMap<u64, ServiceRecord>,
    opening: Vec<OpeningService>,
    endpoints: Vec<(Endpoint, BoundSocket)>,
    vms: BTreeMap<u64, VmRecord>,
    /// The numbers of the next service and the next VM.
    next: (u64, u64),
    handshakes: Vec<PendingHandshake>,
    closing: Vec<ClosingConnection>,
    /// Sockets of a dead supervisor, by path, with the ids that they are stored under.
    inherited: BTreeMap<PathBuf, (String, BoundSocket)>,
    /// VMs that are no longer served, and whose processes have not exited yet.
    exiting: BTreeMap<u64, ExitingVm>,
    endings: Vec<VmSummary>,
    /// Counts of ended VMs of all services, including those that were removed.
    ended: Endings,
    incomplete: u64,
    /// The VMs that ended last, for operators.
    recent: VecDeque<types::VmStatus>,
    refusal_log: RefusalLog,
    stopping: Stopping,
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

/// Meaning of a descriptor that the loop waits for.
#[derive(Clone, Copy)]
enum Token {
    Signal,
    Channel,
    WorkerExit,
    Upgrade,
    FdStore,
    Endpoint(usize),
    Listener(u64),
    Handshake(usize),
    Exiting,
}

impl Supervisor {
    /// Starts the worker and the guardian, and recovers the VMs that systemd has stored.
    pub fn new(
        options: Options,
        console: Option<Box<dyn Console>>,
        stop_requests: Box<dyn StopRequests>,
    ) -> Result<Self> {
        // The worker would fail as well, but only after the sockets are open.
        if let Some(user) = options.user.as_ref().filter(|_| options.confine) {
            Account::find(user)?;
        }
        raise_descriptor_limit();
        let program = OsString::from("/proc/self/exe");
        let inherited = systemd::take_inherited_fds();
        let fd_store = FdStore::find(Path::new(&program), &inherited);
        let worker = WorkerProcess::start(&program, 0, &options)?;
        let mut supervisor = Self {
            options,
            console,
            stop_requests,
            program,
            worker,
            unkillable: Vec::new(),
            workers: 1,
            failed_starts: FailedStarts::default(),
            restarts: 0,
            upgrade: None,
            fd_store,
            outgoing: VecDeque::new(),
            services: BTreeMap::new(),
            opening: Vec::new(),
            endpoints: Vec::new(),
            vms: BTreeMap::new(),
            next: (1, 1),
            handshakes: Vec::new(),
            closing: Vec::new(),
            inherited: BTreeMap::new(),
            exiting: BTreeMap::new(),
            endings: Vec::new(),
            ended: Endings::new(),
            incomplete: 0,
            recent: VecDeque::new(),
            refusal_log: RefusalLog::new(),
            stopping: Stopping::No,
        };
        if let Some(warning) = supervisor.fd_store.warning() {
            supervisor.log_error(warning);
        }
        supervisor.recover_stored(inherited.stored);
        Ok(supervisor)
    }

    /// Serves until asked to stop, and every VM has ended or was released.
    pub fn run(mut self) -> Result<RunSummary> {
        notify_manager("READY=1");
        self.kill_inherited_backlogs();
        let mut outcome = Ok(());
        loop {
            let result = self.run_once();
            let fails_again = result.is_err() && self.stopping == Stopping::Killing;
            if let Err(error) = &result {
                // Without a supervisor, the VMs would wait for ever.
                self.kill_all(&format!("the daemon failed: {error:#}"));
                self.stopping = Stopping::Killing;
            }
            outcome = outcome.and(result);
            let is_empty = self.vms.is_empty() && self.handshakes.is_empty();
            if fails_again || self.stopping != Stopping::No && is_empty {
                break;
            }
        }
        while !self.exiting.is_empty() {
            self.wait_for_one(&[Token::Exiting])?;
            self.reap();
        }
        self.shut_down_worker();
        if !self.fd_store.flush(FLUSH_TIMEOUT) {
            self.log_error(format_args!(
                "{} is not reading and still counts released VMs as served: kill it (SIGKILL), or it kills those VMs \
                 when it resumes",
                self.fd_store
            ));
        }
        let refused = self.ended.get(&Ending::Refused).copied().unwrap_or(0);
        outcome.map(|()| RunSummary {
            served: self.ended.values().sum::<u64>() - refused,
            refused,
            incomplete: self.incomplete,
            worker_restarts: self.restarts,
            vms: self.endings,
        })
    }

    /// Waits for events and handles them: one pass of the loop.
    fn run_once(&mut self) -> Result<()> {
        self.send()?;
        let tokens = self.tokens();
        let ready = self.wait_for_one(&tokens)?;
        // Handled from the back, so that indices into lists stay valid.
        for token in ready.into_iter().rev() {
            match token {
                // Checked below, whenever it arrives.
                Token::Signal => {}
                Token::Channel => self.read_worker()?,
                Token::WorkerExit => self.replace_worker()?,
                Token::Upgrade => self.read_upgrade(),
                Token::Endpoint(at) => self.accept_client(at),
                Token::Listener(key) => {
                    self.accept(key);
                }
                Token::Handshake(at) => self.read_handshake(at),
                Token::Exiting => self.reap(),
                Token::FdStore => self.handle_store_events(),
            }
        }
        if self.stop_requests.count() > 0 {
            self.stop();
        }
        for at in (0..self.handshakes.len()).rev() {
            if let Some(error) = self.handshakes[at].overdue() {
                self.refuse(at, &error);
            }
        }
        if self.stopping == Stopping::Draining && self.stop_requests.count() > 1 {
            self.kill_all("asked twice to stop");
            self.stopping = Stopping::Killing;
        }
        self.flush_fd_store();
        self.check_closing();
        self.check_opening();
        if let Some(suppressed) = self.refusal_log.take_suppressed(Instant::now()) {
            self.log_error(format_args!("{suppressed} more connections were refused"));
        }
        self.check_upgrade();
        self.check_worker()
    }

    fn tokens(&self) -> Vec<Token> {
        let mut tokens = vec![Token::WorkerExit, Token::Channel, Token::FdStore];
        if self.stop_requests.count() == 0 {
            tokens.push(Token::Signal);
        }
        if self.upgrade.is_some() {
            tokens.push(Token::Upgrade);
        }
        if self.outgoing.len() < MAX_WAITING_CLIENTS {
            tokens.extend((0..self.endpoints.len()).map(Token::Endpoint));
        }
        if self.has_capacity() {
            let listening = self
                .services
                .iter()
                .filter(|(_, record)| record.listener.is_some());
            tokens.extend(listening.map(|(key, _)| Token::Listener(*key)));
        }
        tokens.extend((0..self.handshakes.len()).map(Token::Handshake));
        if !self.exiting.is_empty() {
            tokens.push(Token::Exiting);
        }
        tokens
    }

    /// Waits until one of `tokens` is ready, at most for [`POLL_INTERVAL`]. Returns the ready ones.
    fn wait_for_one(&self, tokens: &[Token]) -> Result<Vec<Token>> {
        let mut fds = Vec::with_capacity(tokens.len() + self.exiting.len());
        let mut owners = Vec::with_capacity(fds.capacity());
        let mut add = |fd, token| {
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
            owners.push(token);
        };
        for token in tokens {
            match *token {
                Token::Signal => add(self.stop_requests.as_fd(), *token),
                Token::Channel => add(self.worker.channel.as_fd(), *token),
                Token::WorkerExit => add(self.worker.pidfd(), *token),
                Token::Upgrade => {
                    if let Some(upgrade) = &self.upgrade {
                        add(upgrade.worker.channel.as_fd(), *token);
                    }
                }
                Token::FdStore => {
                    if let Some(fd_store) = self.fd_store.poll_fd() {
                        add(fd_store, *token);
                    }
                }
                Token::Endpoint(at) => add(self.endpoints[at].1.as_fd(), *token),
                Token::Listener(key) => {
                    let listener = self
                        .services
                        .get(&key)
                        .and_then(|record| record.listener.as_ref());
                    if let Some(listener) = listener {
                        add(listener.as_fd(), *token);
                    }
                }
                Token::Handshake(at) => add(self.handshakes[at].as_fd(), *token),
                Token::Exiting => {
                    for vm in self.exiting.values() {
                        add(vm.owner(), *token);
                    }
                }
            }
        }
        // If the worker doesn't read, its channel is retried soon; a file being opened is checked
        // again as well.
        let millis = if self.outgoing.is_empty() && self.opening.is_empty() {
            POLL_INTERVAL.as_millis()
        } else {
            10
        };
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("waiting"),
        }
        let ready = fds.iter().zip(owners);
        let ready = ready.filter(|(fd, _)| fd.any().unwrap_or(true));
        Ok(ready.map(|(_, token)| token).collect())
    }

    /// Passes a client to the worker.
    fn accept_client(&mut self, at: usize) {
        let (endpoint, listener) = &self.endpoints[at];
        match listener.accept() {
            Ok(Some(stream)) => self.outgoing.push_back(Outgoing::Client(*endpoint, stream)),
            Ok(None) => {}
            Err(error) => self.accept_failed(&error),
        }
    }

    /// Logs that a connection could not be accepted, and pauses, since descriptors may be short.
    fn accept_failed(&self, error: &io::Error) {
        self.log_error(format_args!("cannot accept a connection: {error}"));
        std::thread::sleep(Duration::from_millis(100));
    }

    /// Stops accepting VMs, and makes the worker complete the current ones.
    fn stop(&mut self) {
        if self.stopping != Stopping::No {
            return;
        }
        let keys: Vec<u64> = self.services.keys().copied().collect();
        for key in keys {
            self.close(key);
        }
        notify_manager("STOPPING=1");
        self.stopping = Stopping::Draining;
        self.outgoing.push_back(Outgoing::Drain);
    }

    /// Logs how a VM of a service ended, and keeps it for the summary and for operators. Returns
    /// its status for them.
    fn record_end(
        &mut self,
        service: u64,
        connected: Instant,
        report: VmSummary,
    ) -> types::VmStatus {
        match report.reason {
            Some(_) => self.log_vm_error(&report.label, &report),
            None => self.log_vm(&report.label, &report),
        }
        self.count_ended(service, report.ending);
        let age = u64::try_from(connected.elapsed().as_millis());
        let told = types::VmStatus {
            id: report.label.id,
            service: report.label.service.clone(),
            pid: report.label.pid,
            state: report.ending.into(),
            reason: report.reason.clone(),
            age_ms: age.unwrap_or(u64::MAX),
        };
        if self.recent.len() == MAX_RECENT_VMS {
            self.recent.pop_front();
        }
        self.recent.push_back(told.clone());
        if self.endings.len() < MAX_SUMMARIES {
            self.endings.push(report);
        }
        told
    }

    /// Logs a refused connection, unless there are too many.
    fn log_refusal(&mut self, label: &VmLabel, what: impl Display) {
        if !self.refusal_log.admit_line() {
            return;
        }
        match &self.console {
            Some(console) => console.error(&format_args!("{label}: {what}")),
            // Logged at a place of its own, so that these events don't suppress others.
            None => label.span().in_scope(|| tracing::error!("{what}")),
        }
    }

    /// Logs a refused handshake, and keeps it for the summary.
    fn record_refusal(&mut self, report: VmSummary) {
        self.log_refusal(&report.label, &report);
        if self.refusal_log.admit_to_summaries() && self.endings.len() < MAX_SUMMARIES {
            self.endings.push(report);
        }
    }

    /// Logs an event.
    fn log(&self, what: impl Display) {
        if let Some(console) = &self.console {
            console.info(&what);
        } else {
            tracing::info!("{what}");
        }
    }

    /// Logs `what` happens to a VM.
    fn log_vm(&self, label: &VmLabel, what: impl Display) {
        match &self.console {
            Some(console) => console.info(&format_args!("{label}: {what}")),
            None => label.span().in_scope(|| tracing::info!("{what}")),
        }
    }

    /// Logs an error of a VM.
    fn log_vm_error(&self, label: &VmLabel, what: impl Display) {
        match &self.console {
            Some(console) => console.error(&format_args!("{label}: {what}")),
            None => label.span().in_scope(|| tracing::error!("{what}")),
        }
    }

    /// Logs an error.
    fn log_error(&self, what: impl Display) {
        if let Some(console) = &self.console {
            console.error(&what);
        } else {
            tracing::error!("{what}");
        }
    }
}

/// Notifies systemd, if it has started this process.
fn notify_manager(state: &str) {
    if let Some(Ok(manager)) = Manager::from_env() {
        // systemd notices by itself if this fails.
        let _ = manager.notify(state);
    }
}

/// Raises the limit of descriptors, since every VM takes some.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // With a lower limit, fewer VMs can be served.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
