//! The worker: messages to and from it, and its replacement.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use super::{Stopping, Supervisor, Token};
use crate::api::summary::Ending;
use crate::api::types::{self, ApiResult, RequestError, Upgraded};
use crate::ipc::{Endpoint, Facts, FromWorker, SupervisorRequest, ToWorker};
use crate::log::count;
use crate::supervisor::worker_process::{ExitCause, WorkerProcess};

/// Minimum number of workers in a row that exit before they are ready, or soon afterwards, for the
/// daemon to give up;
const MAX_FAILED_STARTS: u32 = 20;
/// and minimum time for which that lasts. On an overloaded machine workers are slow, and may be
/// killed early many times.
const FAILED_STARTS_TIMEOUT: Duration = Duration::from_secs(30);
/// Minimum uptime of a worker that did not fail to start.
const MIN_UPTIME: Duration = Duration::from_secs(10);
/// Delay of the next start for each failed one in a row, and its maximum.
const RESTART_DELAY: Duration = Duration::from_millis(10);
const MAX_RESTART_DELAY: Duration = Duration::from_secs(1);
/// Time limit for a worker that is replaced, or has nothing left to do, to finish its replies to
/// operators.
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// A message queued for the worker. Its descriptors are looked up when it is sent.
#[derive(Debug)]
pub(super) enum Outgoing {
    Service(u64),
    RemoveService(u64),
    Vm(u64),
    Client(Endpoint, OwnedFd),
    Reply(u64, ApiResult<Option<Upgraded>>),
    VmEnded(types::VmStatus),
    Drain,
    Shutdown,
}

/// Counter of workers in a row that exited before they could serve.
#[derive(Debug, Default)]
pub(super) struct FailedStarts {
    count: u32,
    since: Option<Instant>,
}

impl FailedStarts {
    /// Records a worker that exited at `now`.
    fn record(&mut self, lived: bool, now: Instant) {
        if lived {
            *self = Self::default();
        } else {
            self.count += 1;
            self.since.get_or_insert(now);
        }
    }

    /// Whether the daemon should give up.
    fn is_hopeless(&self, now: Instant) -> bool {
        let lasts = |since| now.saturating_duration_since(since) >= FAILED_STARTS_TIMEOUT;
        self.count >= MAX_FAILED_STARTS && self.since.is_some_and(lasts)
    }

    /// Returns the delay before the next start.
    fn pause(&self) -> Duration {
        // The first one of a row is replaced at once, because VMs wait.
        (RESTART_DELAY * self.count.saturating_sub(1)).min(MAX_RESTART_DELAY)
    }
}

impl Supervisor {
    /// Sends queued messages until the worker's socket is full.
    pub(super) fn send(&mut self) -> Result<()> {
        while let Some(next) = self.outgoing.pop_front() {
            match self.send_one(&next) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.outgoing.push_front(next);
                    return Ok(());
                }
                // The worker has died; its successor is sent everything, including waiting clients.
                Err(error) if is_gone(&error) => {
                    self.outgoing.push_front(next);
                    return Ok(());
                }
                Err(error) => return Err(error).context("cannot send to the worker"),
            }
        }
        Ok(())
    }

    fn send_one(&self, what: &Outgoing) -> io::Result<()> {
        let channel = &self.worker.channel;
        match what {
            Outgoing::Service(key) => {
                let Some(record) = self.services.get(key) else {
                    return Ok(());
                };
                let (key, service) = (*key, record.service.clone());
                let message = ToWorker::Service { key, service };
                channel.send(&message, &[record.file.as_fd()])
            }
            Outgoing::Vm(id) => {
                let Some(vm) = self.vms.get(id) else {
                    return Ok(());
                };
                let age = vm.connected.elapsed().as_millis();
                let message = ToWorker::Vm {
                    id: *id,
                    service: vm.service,
                    pid: vm.peer.pid,
                    age_ms: u64::try_from(age).unwrap_or(u64::MAX),
                    regions: vm.regions.clone(),
                    page_map: vm.has_page_map(),
                    quarantined: vm.quarantined(),
                };
                channel.send(&message, &vm.descriptors())
            }
            Outgoing::Client(endpoint, stream) => {
                let (endpoint, facts) = (*endpoint, self.facts());
                channel.send(&ToWorker::Client { endpoint, facts }, &[stream.as_fd()])
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

    fn facts(&self) -> Facts {
        let ended = self.services.iter();
        let ended = ended.map(|(key, record)| (*key, record.ended.clone()));
        Facts {
            supervisor: std::process::id(),
            worker_restarts: self.restarts,
            draining: self.stopping != Stopping::No,
            ended: ended.collect(),
        }
    }

    /// Reads and handles the messages of the worker.
    pub(super) fn read_worker(&mut self) -> Result<()> {
        loop {
            match self.worker.channel.receive() {
                Ok(Some((message, descriptors))) => self.handle_message(message, descriptors)?,
                // The worker's death is noticed separately.
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot receive from the worker"),
            }
        }
    }

    fn handle_message(&mut self, message: FromWorker, descriptors: Vec<OwnedFd>) -> Result<()> {
        match message {
            FromWorker::Ready { version } => self.worker.version = Some(version),
            // If the first worker fails, another one would fail as well. A later one may fail
            // because memory is short.
            FromWorker::ConfineFailed { why } if self.workers == 1 => bail!("{why}"),
            FromWorker::ConfineFailed { why } => self.log_error(why),
            FromWorker::Request { number, request } => self.handle_request(number, request),
            // The operator has been told, so the old worker may exit.
            FromWorker::Replied => {
                if self
                    .upgrade
                    .as_ref()
                    .is_some_and(|next| next.ready.is_some())
                {
                    self.worker.kill();
                }
            }
            FromWorker::Tables { id } => {
                let memfd = descriptors
                    .into_iter()
                    .next()
                    .context("tables without a memfd")?;
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.set_tables(memfd)?;
                    let record = self.services.get(&vm.service);
                    let service = record.map_or("", |record| &record.service.name);
                    if let Err(error) = vm.store_tables(id, service, &mut self.fd_store) {
                        self.store_owner_only(id, &error);
                    }
                }
            }
            FromWorker::Served { id } => {
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.mark_served();
                    let (service, pid) = (vm.service, vm.peer.pid);
                    self.log_vm(&self.label(id, service, pid), "served");
                }
            }
            FromWorker::VmEnded {
                id,
                vm: report,
                incomplete,
            } => {
                let Some(vm) = self.vms.remove(&id) else {
                    return Ok(());
                };
                let (service, connected) = (vm.service, vm.connected);
                match report.ending {
                    Ending::Complete => self.remove_stored_vm(id),
                    Ending::Refused => {
                        self.kill_vm(id, vm);
                    }
                    _ => {
                        self.await_exit(id, vm);
                    }
                }
                self.incomplete += u64::from(incomplete);
                let _ = self.record_end(service, connected, report);
                self.drop_service_if_unused(service);
            }
        }
        Ok(())
    }

    /// Handles an operator's request that the worker can't serve alone.
    fn handle_request(&mut self, number: u64, request: SupervisorRequest) {
        let result = match request {
            SupervisorRequest::Add(_) if self.stopping != Stopping::No => {
                Err(anyhow!("the daemon is shutting down"))
            }
            SupervisorRequest::Add(service) => match self.start_adding(number, service) {
                // The reply follows when the snapshot is open.
                Ok(()) => return,
                Err(error) => Err(error),
            },
            SupervisorRequest::Remove(name) => self.remove(&name).map_err(anyhow::Error::msg),
            SupervisorRequest::Drain => {
                self.stop();
                Ok(())
            }
            SupervisorRequest::Upgrade(program) => match self.start_upgrade(number, program) {
                // The reply follows when the new worker is ready.
                Ok(()) => return,
                Err(error) => Err(error),
            },
        };
        self.reply(number, result);
    }

    pub(super) fn reply(&mut self, number: u64, result: Result<()>) {
        let result = result.map(|()| None).map_err(RequestError::from);
        self.outgoing.push_back(Outgoing::Reply(number, result));
    }

    /// Shuts the worker down, with time to finish its replies to operators.
    pub(super) fn shut_down_worker(&mut self) {
        self.outgoing.push_back(Outgoing::Shutdown);
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        while self.send().is_ok() && Instant::now() < until {
            let ready = self.wait_for_one(&[Token::WorkerExit, Token::Channel]);
            if ready.is_err() || self.read_worker().is_err() || self.worker.is_gone() {
                return;
            }
        }
    }

    /// Replaces a worker that has exited.
    pub(super) fn replace_worker(&mut self) -> Result<()> {
        // Its last messages count, and it sends no more.
        self.read_worker()?;
        let death = self.worker.reap()?;
        if self.stopping == Stopping::Killing {
            return Ok(());
        }
        if death.is_own_fault {
            for vm in self.vms.values_mut() {
                vm.blame_frames();
            }
        }
        self.worker = self.next_worker(&death)?;
        self.kill_vms_without_workers();
        self.brief_worker();
        Ok(())
    }

    /// Returns the next worker: that of a ready upgrade, else a new one of the same program.
    pub(super) fn next_worker(&mut self, death: &ExitCause) -> Result<WorkerProcess> {
        let upgrade = self.upgrade.take_if(|upgrade| upgrade.ready.is_some());
        let Some(upgrade) = upgrade else {
            return self.restart_worker(death);
        };
        let version = upgrade.worker.version.clone().unwrap_or_default();
        self.log(format_args!("upgraded to a worker of version {version}"));
        self.program = upgrade.program;
        Ok(upgrade.worker)
    }

    /// Queues everything that a new worker needs to know.
    pub(super) fn brief_worker(&mut self) {
        for vm in self.vms.values_mut() {
            vm.restart_heartbeat();
        }
        let services = self.services.keys().map(|key| Outgoing::Service(*key));
        let ended = self.recent.iter().cloned().map(Outgoing::VmEnded);
        let vms = self.vms.keys().map(|id| Outgoing::Vm(*id));
        // The operators who wait for these can no longer be answered.
        self.opening.clear();
        // Clients of the dead worker are lost, but not those still queued for it.
        let waiting = std::mem::take(&mut self.outgoing).into_iter();
        let waiting = waiting.filter(|outgoing| matches!(outgoing, Outgoing::Client(..)));
        self.outgoing = services.chain(ended).chain(vms).chain(waiting).collect();
        if self.stopping == Stopping::Draining {
            self.outgoing.push_back(Outgoing::Drain);
        }
    }

    fn restart_worker(&mut self, death: &ExitCause) -> Result<WorkerProcess> {
        let ExitCause {
            description,
            is_own_fault,
            stuck,
        } = death;
        let ready = self.worker.version.is_some();
        let lived =
            ready && (!is_own_fault || *stuck || self.worker.started.elapsed() >= MIN_UPTIME);
        self.failed_starts.record(lived, Instant::now());
        let vms = count(self.vms.len() as u64, "VM");
        self.log_error(format_args!(
            "the worker {description}; started a new one, which takes over {vms}"
        ));
        if self.failed_starts.is_hopeless(Instant::now()) {
            bail!(
                "no worker became ready for {FAILED_STARTS_TIMEOUT:?}: {} of them exited at once, and the last {description}",
                self.failed_starts.count
            );
        }
        std::thread::sleep(self.failed_starts.pause());
        let worker = WorkerProcess::start(&self.program, self.workers, &self.options)?;
        self.workers += 1;
        self.restarts += 1;
        Ok(worker)
    }
}

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_starts_end_the_daemon_after_a_time_and_not_after_a_number() {
        let begun = Instant::now();
        let mut failed_starts = FailedStarts::default();
        for _ in 0..1000 {
            failed_starts.record(false, begun);
        }
        assert!(!failed_starts.is_hopeless(begun + FAILED_STARTS_TIMEOUT / 2));
        assert!(failed_starts.is_hopeless(begun + FAILED_STARTS_TIMEOUT));
        assert_eq!(failed_starts.pause(), MAX_RESTART_DELAY);
    }

    #[test]
    fn worker_that_lived_begins_another_row() {
        let begun = Instant::now();
        let mut failed_starts = FailedStarts::default();
        assert_eq!(failed_starts.pause(), Duration::ZERO);
        for lived in [false, true, false] {
            failed_starts.record(lived, begun);
        }
        assert_eq!(
            (failed_starts.count, failed_starts.pause()),
            (1, Duration::ZERO)
        );
        // A few workers that each take long are no reason to give up either.
        assert!(!failed_starts.is_hopeless(begun + 10 * FAILED_STARTS_TIMEOUT));
    }
}
