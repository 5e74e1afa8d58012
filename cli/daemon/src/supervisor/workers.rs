//! The worker: what it is told, what it says, and who comes after it.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use super::{Keeper, Stopping, Token};
use crate::api::summary::Ending;
use crate::api::types::{self, Upgraded};
use crate::ipc::{Door, Facts, FromWorker, Request, ToWorker};
use crate::log::count;
use crate::supervisor::worker_process::{Death, Worker};

/// The daemon gives up when at least so many workers in a row have ended before they were ready, or at once afterwards,
const MOST_STILLBORN: u32 = 20;
/// and that for so long: on a machine with too much to do workers are slow, and may be killed early many times.
const STILLBORN_FOR: Duration = Duration::from_secs(30);
/// A worker that has lived so long was not stillborn.
const LIVED: Duration = Duration::from_secs(10);
/// The pause before another is started, for each that was stillborn in a row, and the longest.
const RESTART_PAUSE: Duration = Duration::from_millis(10);
const MAX_RESTART_PAUSE: Duration = Duration::from_secs(1);
/// How long a worker may go on that has a successor, for its last words to an operator, and one that has
/// nothing left to do.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(3);

/// What waits to be sent to the worker. Descriptors that are kept are looked up when it is sent.
#[derive(Debug)]
pub(super) enum Outgoing {
    Service(u64),
    Forget(u64),
    Vm(u64),
    Visitor(Door, OwnedFd),
    Answer(u64, Result<Option<Upgraded>, String>),
    Ended(types::Vm),
    Drain,
    Leave,
}

/// Workers in a row that ended before they could serve.
#[derive(Debug, Default)]
pub(super) struct Stillborn {
    count: u32,
    since: Option<Instant>,
}

impl Stillborn {
    /// Takes note of a worker that has ended at `now`.
    fn note(&mut self, lived: bool, now: Instant) {
        if lived {
            *self = Self::default();
        } else {
            self.count += 1;
            self.since.get_or_insert(now);
        }
    }

    /// Whether there is no sense in starting another.
    fn is_hopeless(&self, now: Instant) -> bool {
        let lasts = |since| now.saturating_duration_since(since) >= STILLBORN_FOR;
        self.count >= MOST_STILLBORN && self.since.is_some_and(lasts)
    }

    /// How long to wait before the next is started.
    fn pause(&self) -> Duration {
        // The first of a row is replaced at once: VMs wait.
        (RESTART_PAUSE * self.count.saturating_sub(1)).min(MAX_RESTART_PAUSE)
    }
}

impl Keeper {
    /// Sends the worker what it is to know, until it has no room for more.
    pub(super) fn send(&mut self) -> Result<()> {
        while let Some(next) = self.outgoing.pop_front() {
            match self.send_one(&next) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.outgoing.push_front(next);
                    return Ok(());
                }
                // It has died; its successor is told everything, and meets who waits.
                Err(error) if is_gone(&error) => {
                    self.outgoing.push_front(next);
                    return Ok(());
                }
                Err(error) => return Err(error).context("telling the worker"),
            }
        }
        Ok(())
    }

    fn send_one(&self, what: &Outgoing) -> io::Result<()> {
        let wire = &self.worker.wire;
        match what {
            Outgoing::Service(key) => {
                let Some(open) = self.services.get(key) else {
                    return Ok(());
                };
                let (key, service) = (*key, open.service.clone());
                let message = ToWorker::Service { key, service };
                wire.send(&message, &[open.file.as_fd()])
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
                    deadly: vm.deadly(),
                };
                wire.send(&message, &vm.descriptors())
            }
            Outgoing::Visitor(door, stream) => {
                let (door, facts) = (*door, self.facts());
                wire.send(&ToWorker::Visitor { door, facts }, &[stream.as_fd()])
            }
            Outgoing::Answer(number, result) => {
                let (number, result) = (*number, result.clone());
                wire.send(&ToWorker::Answer { number, result }, &[])
            }
            Outgoing::Ended(vm) => wire.send(&ToWorker::Ended { vm: vm.clone() }, &[]),
            Outgoing::Forget(key) => wire.send(&ToWorker::Forget { key: *key }, &[]),
            Outgoing::Drain => wire.send(&ToWorker::Drain, &[]),
            Outgoing::Leave => wire.send(&ToWorker::Leave, &[]),
        }
    }

    fn facts(&self) -> Facts {
        let ended = self.services.iter();
        let ended = ended.map(|(key, open)| (*key, open.ended.clone()));
        Facts {
            keeper: std::process::id(),
            worker_restarts: self.restarts,
            draining: self.stopping != Stopping::No,
            ended: ended.collect(),
        }
    }

    /// Takes what the worker has said.
    pub(super) fn listen_to_worker(&mut self) -> Result<()> {
        loop {
            match self.worker.wire.receive() {
                Ok(Some((message, descriptors))) => self.heard(message, descriptors)?,
                // Its death is noticed by itself.
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("listening to the worker"),
            }
        }
    }

    fn heard(&mut self, message: FromWorker, descriptors: Vec<OwnedFd>) -> Result<()> {
        match message {
            FromWorker::Ready { version } => self.worker.version = Some(version),
            // The first of all: another would fare no better. Of a later one it may be for want of memory.
            FromWorker::Unfit { why } if self.workers == 1 => bail!("{why}"),
            FromWorker::Unfit { why } => self.complain(why),
            FromWorker::Ask { number, request } => self.asked(number, request),
            // The operator knows: now it may go.
            FromWorker::Told => {
                if self
                    .successor
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
                    vm.keep_tables(memfd)?;
                    let open = self.services.get(&vm.service);
                    let service = open.map_or("", |open| &open.service.name);
                    if let Err(error) = vm.hold_tables(id, service, &mut self.outside) {
                        self.hold_in_part(id, &error);
                    }
                }
            }
            FromWorker::Served { id } => {
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.is_served();
                    let (service, pid) = (vm.service, vm.peer.pid);
                    self.say_of(&self.label(id, service, pid), "served");
                }
            }
            FromWorker::Ended {
                id,
                vm: report,
                incomplete,
            } => {
                let Some(vm) = self.vms.remove(&id) else {
                    return Ok(());
                };
                let (service, connected) = (vm.service, vm.connected);
                match report.ending {
                    Ending::Complete => self.release(id),
                    Ending::Refused => {
                        self.kill(id, vm);
                    }
                    _ => {
                        self.let_die(id, vm);
                    }
                }
                self.incomplete += u64::from(incomplete);
                let _ = self.note(service, connected, report);
                self.forget_if_unused(service);
            }
        }
        Ok(())
    }

    /// Does what an operator wants and the worker can't do.
    fn asked(&mut self, number: u64, request: Request) {
        let result = match request {
            Request::Add(_) if self.stopping != Stopping::No => {
                Err(anyhow!("the daemon is about to end"))
            }
            Request::Add(service) => match self.begin_to_add(number, service) {
                // The answer comes when its snapshot is open.
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Request::Remove(name) => self.remove(&name).map_err(anyhow::Error::msg),
            Request::Drain => {
                self.stop();
                Ok(())
            }
            Request::Upgrade(program) => match self.prepare_upgrade(number, program) {
                // The answer comes when it is ready.
                Ok(()) => return,
                Err(error) => Err(error),
            },
        };
        self.answer(number, result);
    }

    pub(super) fn answer(&mut self, number: u64, result: Result<()>) {
        let result = result.map(|()| None).map_err(|error| format!("{error:#}"));
        self.outgoing.push_back(Outgoing::Answer(number, result));
    }

    /// Gives the worker time for its last words to an operator.
    pub(super) fn let_worker_leave(&mut self) {
        self.outgoing.push_back(Outgoing::Leave);
        let until = Instant::now() + LAST_WORDS;
        while self.send().is_ok() && Instant::now() < until {
            let ready = self.wait_for_one(&[Token::Death, Token::Wire]);
            if ready.is_err() || self.listen_to_worker().is_err() || self.worker.is_gone() {
                return;
            }
        }
    }

    /// The worker is gone: another goes on.
    pub(super) fn replace_worker(&mut self) -> Result<()> {
        // Its last words count, and it says no more.
        self.listen_to_worker()?;
        let death = self.worker.bury()?;
        if self.stopping == Stopping::Kills {
            return Ok(());
        }
        if death.of_itself {
            for vm in self.vms.values_mut() {
                vm.blame_frames();
            }
        }
        self.worker = self.next_worker(&death)?;
        self.end_hopeless();
        self.introduce_worker();
        Ok(())
    }

    /// Who goes on: the program that is to take over, or another of the same.
    pub(super) fn next_worker(&mut self, death: &Death) -> Result<Worker> {
        let successor = self
            .successor
            .take_if(|successor| successor.ready.is_some());
        let Some(successor) = successor else {
            return self.start_another(death);
        };
        let version = successor.worker.version.clone().unwrap_or_default();
        self.say(format_args!("a worker of version {version} takes over"));
        self.program = successor.program;
        Ok(successor.worker)
    }

    /// Has a new worker told everything.
    pub(super) fn introduce_worker(&mut self) {
        for vm in self.vms.values_mut() {
            vm.handed_over();
        }
        let services = self.services.keys().map(|key| Outgoing::Service(*key));
        let ended = self.recent.iter().cloned().map(Outgoing::Ended);
        let vms = self.vms.keys().map(|id| Outgoing::Vm(*id));
        // Nobody could be told what became of it.
        self.opening.clear();
        // Visitors of the dead one are lost, those who were not with it yet are not.
        let waiting = std::mem::take(&mut self.outgoing).into_iter();
        let waiting = waiting.filter(|outgoing| matches!(outgoing, Outgoing::Visitor(..)));
        self.outgoing = services.chain(ended).chain(vms).chain(waiting).collect();
        if self.stopping == Stopping::Drains {
            self.outgoing.push_back(Outgoing::Drain);
        }
    }

    fn start_another(&mut self, death: &Death) -> Result<Worker> {
        let Death {
            how,
            of_itself,
            stuck,
        } = death;
        let ready = self.worker.version.is_some();
        let lived = ready && (!of_itself || *stuck || self.worker.started.elapsed() >= LIVED);
        self.stillborn.note(lived, Instant::now());
        let vms = count(self.vms.len() as u64, "VM");
        self.complain(format_args!("the worker {how}; another goes on with {vms}"));
        if self.stillborn.is_hopeless(Instant::now()) {
            bail!(
                "for {STILLBORN_FOR:?} no worker has become ready: {} of them have ended at once, and the last {how}",
                self.stillborn.count
            );
        }
        std::thread::sleep(self.stillborn.pause());
        let worker = Worker::start(&self.program, self.workers, &self.options)?;
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
    fn stillborn_workers_end_the_daemon_after_a_time_and_not_after_a_number() {
        let begun = Instant::now();
        let mut stillborn = Stillborn::default();
        for _ in 0..1000 {
            stillborn.note(false, begun);
        }
        assert!(!stillborn.is_hopeless(begun + STILLBORN_FOR / 2));
        assert!(stillborn.is_hopeless(begun + STILLBORN_FOR));
        assert_eq!(stillborn.pause(), MAX_RESTART_PAUSE);
    }

    #[test]
    fn worker_that_lived_begins_another_row() {
        let begun = Instant::now();
        let mut stillborn = Stillborn::default();
        assert_eq!(stillborn.pause(), Duration::ZERO);
        for lived in [false, true, false] {
            stillborn.note(lived, begun);
        }
        assert_eq!((stillborn.count, stillborn.pause()), (1, Duration::ZERO));
        // Few that take long each are no reason either.
        assert!(!stillborn.is_hopeless(begun + 10 * STILLBORN_FOR));
    }
}
