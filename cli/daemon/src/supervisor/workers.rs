//! The worker, its predecessors that can't be killed, and its successor.
//!
//! ```text
//!   a VM waits for --stuck-after          the worker is killed
//!     it exits                            another serves all VMs; a frame on which two got stuck
//!                                         is quarantined; a VM for which three got stuck in a row
//!                                         is killed
//!     it doesn't, for --stuck-after more  every VM is killed, since no other worker may read its
//!                                         messages; another worker serves new VMs, but not from
//!                                         the snapshots that this one waits for
//!       it exits at last                  those snapshots are served again
//! ```
//!
//! A process killed in an uninterruptible wait, such as for a network file system, exits when that
//! wait ends. Until then the kernel may be reading a message for it.
//!
//! Invariant: at most one worker reads the messages of a VM. A successor is started only after the
//! current worker has exited, or after all its VMs were killed.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::mem;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use snapshot_format::names::escape_path;

use super::services::Services;
use super::upgrade::{Upgrade, UpgradeError, own_path};
use super::vms::Vms;
use super::worker_process::{ExitCause, StartError, WorkerProcess};
use super::{Options, RunError};
use crate::api::types::{ApiResult, Upgraded, VmStatus};
use crate::ipc::{Endpoint, Facts, FromWorker, ToWorker};
use crate::policy::{self, Counter};

/// Time limit for a worker that is replaced, or has nothing left to do, to finish its replies to
/// operators.
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// The program of this process.
pub(super) const OWN_PROGRAM: &str = "/proc/self/exe";

/// The workers of a daemon.
#[derive(Debug)]
pub(super) struct Workers {
    options: Options,
    program: OsString,
    current: WorkerProcess,
    unkillable: Vec<UnkillableWorker>,
    upgrade: Option<Upgrade>,
    /// Messages for the current worker.
    outgoing: VecDeque<Outgoing>,
    /// Number of workers started.
    started: u64,
    /// Number of workers that replaced a dead one.
    restarts: u64,
    /// Workers in a row that exited before they could serve.
    failed_starts: Counter,
    /// Whether the connection of an operator was passed to the worker.
    had_operator: bool,
}

/// A worker that was killed and doesn't exit.
#[derive(Debug)]
struct UnkillableWorker {
    worker: WorkerProcess,
    /// Services whose snapshots the worker waits for.
    hung: BTreeSet<u64>,
}

/// A message queued for the worker. Its descriptors are looked up when it is sent.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// An ancestor of a service's snapshot, by its number.
    Layer(u64, usize),
    Service(u64),
    RemoveService(u64),
    Vm(u64),
    Client(Endpoint, OwnedFd),
    Reply(u64, ApiResult<Option<Upgraded>>),
    VmEnded(VmStatus),
    Drain,
    Shutdown,
}

/// Everything that messages to a worker are made from.
pub(super) struct Briefing<'a> {
    pub(super) services: &'a Services,
    pub(super) vms: &'a Vms,
    pub(super) draining: bool,
}

/// The state of a worker, as far as the supervisor has to act.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WorkerState {
    /// The worker is to be watched.
    Running,
    /// The worker was killed, and its exit is awaited.
    Dying,
    /// The worker was killed, and doesn't exit.
    Unkillable,
}

impl Workers {
    /// Starts the first worker, from the program of this process.
    pub(super) fn start(options: Options) -> Result<Self, StartError> {
        let program = OsString::from(OWN_PROGRAM);
        Ok(Self {
            current: WorkerProcess::start(&program, 0, &options)?,
            options,
            program,
            unkillable: Vec::new(),
            upgrade: None,
            outgoing: VecDeque::new(),
            started: 1,
            restarts: 0,
            failed_starts: Counter::default(),
            had_operator: false,
        })
    }

    /// Returns the program of the workers.
    pub(super) fn program(&self) -> &Path {
        Path::new(&self.program)
    }

    /// Returns the number of workers that replaced a dead one.
    pub(super) fn restarts(&self) -> u64 {
        self.restarts
    }

    /// Returns the descriptor that is readable when the worker has sent a message.
    pub(super) fn channel(&self) -> BorrowedFd<'_> {
        self.current.channel.as_fd()
    }

    /// Returns the pidfd of the worker, which is readable when all its threads are gone.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.current.pidfd()
    }

    /// Returns the descriptor that is readable when the worker that takes over has sent a message.
    pub(super) fn upgrade_channel(&self) -> Option<BorrowedFd<'_>> {
        let upgrade = self.upgrade.as_ref()?;
        Some(upgrade.worker.channel.as_fd())
    }

    /// Returns whether messages wait for the worker to read.
    pub(super) fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Returns whether another client may wait for the worker.
    pub(super) fn admits_clients(&self) -> bool {
        !policy::CLIENTS.is_reached_by(self.outgoing.len())
    }

    /// Queues a message for the worker.
    pub(super) fn queue(&mut self, message: Outgoing) {
        self.had_operator |= matches!(message, Outgoing::Client(Endpoint::Control, _));
        self.outgoing.push_back(message);
    }

    /// Queues the messages that pass a service to the worker.
    pub(super) fn queue_service(&mut self, key: u64, services: &Services) {
        self.outgoing.extend(service_messages(key, services));
    }

    /// Returns whether the worker has had, or is about to get, the connection of an operator.
    /// Without one, no operator has made the request that it passes on.
    pub(super) fn had_operator(&self) -> bool {
        self.had_operator
    }

    /// Queues the reply to an operator's request.
    pub(super) fn reply(&mut self, number: u64, result: ApiResult<()>) {
        self.queue(Outgoing::Reply(number, result.map(|()| None)));
    }

    /// Sends queued messages until the worker's socket is full.
    pub(super) fn send(&mut self, briefing: &Briefing<'_>) -> Result<(), RunError> {
        while let Some(next) = self.outgoing.pop_front() {
            match self.send_one(&next, briefing) {
                Ok(()) => {}
                // If the worker has died, its successor is sent everything, including waiting
                // clients.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_gone(&error) => {
                    self.outgoing.push_front(next);
                    return Ok(());
                }
                Err(error) => return Err(RunError::Send(error)),
            }
        }
        Ok(())
    }

    fn send_one(&self, what: &Outgoing, briefing: &Briefing<'_>) -> io::Result<()> {
        let channel = &self.current.channel;
        let run_records = self.options.run_json.is_some();
        match what {
            Outgoing::Layer(key, number) => match briefing.services.layer_message(*key, *number) {
                Some((message, file)) => channel.send(&message, &[file]),
                None => Ok(()),
            },
            Outgoing::Service(key) => match briefing.services.message(*key, run_records) {
                Some((message, file)) => channel.send(&message, &[file]),
                None => Ok(()),
            },
            Outgoing::Vm(id) => {
                match briefing.vms.get(*id).and_then(super::vm::VmRecord::message) {
                    Some((message, descriptors)) => channel.send(&message, &descriptors),
                    None => Ok(()),
                }
            }
            Outgoing::Client(endpoint, stream) => {
                let message = ToWorker::Client {
                    endpoint: *endpoint,
                    facts: self.facts(briefing),
                };
                channel.send(&message, &[stream.as_fd()])
            }
            Outgoing::Reply(number, result) => {
                let message = ToWorker::Reply {
                    number: *number,
                    result: result.clone().map_err(|error| error.text),
                    bad_snapshot: matches!(result, Err(error) if error.bad_snapshot),
                };
                channel.send(&message, &[])
            }
            Outgoing::VmEnded(vm) => channel.send(&ToWorker::VmEnded { vm: vm.clone() }, &[]),
            Outgoing::RemoveService(key) => {
                channel.send(&ToWorker::RemoveService { key: *key }, &[])
            }
            Outgoing::Drain => channel.send(&ToWorker::Drain, &[]),
            Outgoing::Shutdown => channel.send(&ToWorker::Shutdown, &[]),
        }
    }

    fn facts(&self, briefing: &Briefing<'_>) -> Facts {
        Facts {
            supervisor: std::process::id(),
            worker_restarts: self.restarts,
            draining: briefing.draining,
            knows_recordings: true,
            ended: briefing.services.ended(),
        }
    }

    /// Receives the next message of the worker. Returns `None` if there is none; the worker's death
    /// is noticed separately.
    pub(super) fn receive(&self) -> Result<Option<(FromWorker, Vec<OwnedFd>)>, RunError> {
        match self.current.channel.receive() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            received => received.map_err(RunError::Receive),
        }
    }

    /// Notes that the worker reads messages.
    pub(super) fn mark_ready(&mut self, version: String) {
        self.current.version = Some(version);
    }

    /// Returns whether no worker has been replaced yet.
    pub(super) fn is_first(&self) -> bool {
        self.started == 1
    }

    /// Queues everything that a new worker needs to know.
    pub(super) fn brief<'a>(
        &mut self,
        briefing: &Briefing<'_>,
        recent: impl Iterator<Item = &'a VmStatus>,
    ) {
        let services = briefing.services.keys().into_iter();
        let services = services.flat_map(|key| service_messages(key, briefing.services));
        let ended = recent.cloned().map(Outgoing::VmEnded);
        let vms = briefing.vms.active().into_iter().map(Outgoing::Vm);
        // Clients of the dead worker are lost, but not those still queued for it.
        let waiting = mem::take(&mut self.outgoing).into_iter();
        let waiting = waiting.filter(|outgoing| matches!(outgoing, Outgoing::Client(..)));
        self.outgoing = services.chain(ended).chain(vms).chain(waiting).collect();
        let is_operator = |it: &Outgoing| matches!(it, Outgoing::Client(Endpoint::Control, _));
        self.had_operator = self.outgoing.iter().any(is_operator);
        if briefing.draining {
            self.outgoing.push_back(Outgoing::Drain);
        }
    }

    /// Returns whether the worker is to be watched.
    pub(super) fn state(&self) -> WorkerState {
        match self.current.killed() {
            None => WorkerState::Running,
            Some(killed) if killed.elapsed() < self.options.stuck_after => WorkerState::Dying,
            Some(_) => WorkerState::Unkillable,
        }
    }

    /// Returns whether the worker takes too long to start.
    pub(super) fn is_start_overdue(&self) -> bool {
        let started = self.current.started.elapsed();
        self.current.version.is_none() && started >= self.options.stuck_after
    }

    /// Kills the worker because it is stuck.
    pub(super) fn kill_stuck(&mut self) {
        self.current.kill_stuck();
    }

    /// Reaps the worker if it has exited, and returns whether it has.
    pub(super) fn reap_if_exited(&mut self) -> bool {
        self.current.reap_if_exited()
    }

    /// Reaps a worker that has exited.
    pub(super) fn reap(&mut self) -> Result<ExitCause, RunError> {
        self.current.reap().map_err(RunError::Reap)
    }

    /// Returns where in the kernel an unkillable worker is blocked.
    pub(super) fn blocked_in(&self) -> String {
        self.current.blocked_in()
    }

    /// Replaces a worker that has exited.
    pub(super) fn replace(&mut self, cause: &ExitCause) -> Result<(), RunError> {
        self.current = self.next(cause)?;
        Ok(())
    }

    /// Replaces a worker that can't be killed. It waits for the snapshots of the services `hung`.
    pub(super) fn abandon(
        &mut self,
        cause: &ExitCause,
        hung: BTreeSet<u64>,
    ) -> Result<(), RunError> {
        let next = self.next(cause)?;
        let worker = mem::replace(&mut self.current, next);
        self.unkillable.push(UnkillableWorker { worker, hung });
        Ok(())
    }

    /// Returns the version of the worker that takes over, if it is ready.
    pub(super) fn upgrade_version(&self) -> Option<&str> {
        let upgrade = self.upgrade.as_ref()?;
        upgrade.ready?;
        upgrade.worker.version.as_deref()
    }

    /// Returns the names of the settings in use that the next worker does not know.
    pub(super) fn upgrade_ignores(&self, services: &Services) -> Vec<&'static str> {
        let upgrade = self.upgrade.as_ref();
        if upgrade.is_none_or(|upgrade| upgrade.knows_newer) {
            return Vec::new();
        }
        services.newer_settings(self.options.run_json.is_some())
    }

    /// Returns the next worker: that of a ready upgrade, else a new one of the same program.
    fn next(&mut self, cause: &ExitCause) -> Result<WorkerProcess, RunError> {
        if let Some(upgrade) = self.upgrade.take_if(|upgrade| upgrade.ready.is_some()) {
            self.program = upgrade.program;
            return Ok(upgrade.worker);
        }
        let now = Instant::now();
        let is_ready = self.current.version.is_some();
        let lived = self.current.started.elapsed() >= policy::MIN_UPTIME;
        if is_ready && (!cause.is_own_fault || cause.stuck || lived) {
            self.failed_starts.reset();
        } else {
            self.failed_starts.count(&policy::FAILED_STARTS, now);
        }
        if self.failed_starts.is_reached(&policy::FAILED_STARTS, now) {
            return Err(RunError::NoWorker {
                time: policy::FAILED_STARTS.lasting(),
                failed: self.failed_starts.number(),
                last: cause.description.clone(),
            });
        }
        std::thread::sleep(policy::restart_delay(self.failed_starts.number()));
        let worker = WorkerProcess::start(&self.program, self.started, &self.options)?;
        self.started += 1;
        self.restarts += 1;
        Ok(worker)
    }

    /// Takes the services whose snapshots were waited for by abandoned workers that have exited by
    /// now, one set for each worker.
    pub(super) fn take_readable_again(&mut self) -> Vec<BTreeSet<u64>> {
        let exited = |unkillable: &mut UnkillableWorker| unkillable.worker.reap_if_exited();
        let exited = self.unkillable.extract_if(.., exited);
        exited.map(|unkillable| unkillable.hung).collect()
    }

    /// Returns whether an unkillable worker waits for the snapshot of a service; no new VM must be
    /// served from it.
    pub(super) fn is_hung(&self, service: u64) -> bool {
        let mut unkillable = self.unkillable.iter();
        unkillable.any(|unkillable| unkillable.hung.contains(&service))
    }

    /// Starts the program that takes over; the reply to request `number` follows when it is ready.
    pub(super) fn start_upgrade(
        &mut self,
        number: u64,
        program: Option<PathBuf>,
    ) -> Result<(), UpgradeError> {
        if self.upgrade.is_some() {
            return Err(UpgradeError::InProgress);
        }
        let program = program.map_or_else(own_path, Ok)?.into_os_string();
        let worker = WorkerProcess::start(&program, self.started, &self.options)?;
        self.started += 1;
        self.upgrade = Some(Upgrade {
            worker,
            program,
            number,
            ready: None,
            knows_newer: false,
        });
        Ok(())
    }

    /// Reads the first message of the worker that takes over.
    pub(super) fn read_upgrade(&mut self) {
        let Some(upgrade) = &mut self.upgrade else {
            return;
        };
        match upgrade.worker.channel.receive() {
            Ok(Some((
                FromWorker::Ready {
                    version,
                    knows_newer,
                },
                _,
            ))) => {
                let upgraded = Upgraded {
                    from: self.current.version.clone().unwrap_or_default(),
                    to: version.clone(),
                };
                upgrade.worker.version = Some(version);
                upgrade.knows_newer = knows_newer;
                upgrade.ready = Some(Instant::now());
                let reply = Outgoing::Reply(upgrade.number, Ok(Some(upgraded)));
                self.outgoing.push_back(reply);
            }
            Ok(Some((FromWorker::ConfineFailed { why }, _))) => self.abort_upgrade(&why),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.abort_upgrade("it exited, or is not a snaprestore worker"),
        }
    }

    fn abort_upgrade(&mut self, why: &str) {
        if let Some(upgrade) = self.upgrade.take() {
            let program = escape_path(upgrade.program.as_ref());
            let why = format!("cannot upgrade to {program}: {why}; the old worker keeps serving");
            self.reply(upgrade.number, Err(why.into()));
        }
    }

    /// Lets the worker that takes over do so: the operator has been told.
    pub(super) fn finish_upgrade(&mut self) {
        let upgrade = self.upgrade.as_ref();
        if upgrade.is_some_and(|upgrade| upgrade.ready.is_some()) {
            self.current.kill();
        }
    }

    /// Checks the time limits of an upgrade.
    pub(super) fn check_upgrade(&mut self) {
        let Some(upgrade) = &self.upgrade else {
            return;
        };
        match upgrade.ready {
            None if upgrade.worker.started.elapsed() >= policy::UPGRADE_TIMEOUT => {
                self.abort_upgrade("it did not start in time");
            }
            Some(since) if since.elapsed() >= SHUTDOWN_TIMEOUT => self.current.kill(),
            _ => {}
        }
    }
}

/// Returns the messages that pass a service to a worker: its snapshot is complete with the last.
fn service_messages(key: u64, services: &Services) -> impl Iterator<Item = Outgoing> + use<> {
    let layers = 0..services.ancestors(key);
    let layers = layers.map(move |number| Outgoing::Layer(key, number));
    layers.chain([Outgoing::Service(key)])
}

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_may_pass_on_requests_of_a_connected_operator_only() {
        // The process is this test program, which exits at once: it doesn't know the options.
        let mut workers = Workers::start(Options::default()).unwrap();
        let client = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        workers.queue(Outgoing::Client(Endpoint::Metrics, client()));
        assert!(!workers.had_operator());
        workers.queue(Outgoing::Client(Endpoint::Control, client()));
        assert!(workers.had_operator());

        let briefing = Briefing {
            services: &Services::new(),
            vms: &Vms::new(),
            draining: false,
        };
        workers.brief(&briefing, std::iter::empty());
        assert!(
            workers.had_operator(),
            "the next worker gets a client that waits"
        );
        workers.outgoing.clear();
        workers.brief(&briefing, std::iter::empty());
        assert!(
            !workers.had_operator(),
            "the operator was connected to the dead worker"
        );
    }
}
