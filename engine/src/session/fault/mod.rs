//! Serves faults.
//!
//! ```text
//! answer(fault):
//!   loop:
//!     hold the lock shared: look up the page's state
//!       page outside the session, removed, present: ZEROPAGE (2 MiB of zeros for a large page), or
//!         WAKE if a page is there; done
//!       poisoned: POISON, or WAKE; done
//!     absent: load it
//!       can't be read: pause and retry the read until the retry timeout, and serve
//!         others meanwhile
//!       unavailable: apply the failure policy
//! ```

pub(crate) mod huge;
pub(crate) mod in_flight;
pub(crate) mod install;
pub(crate) mod load;
pub(crate) mod prefetch;
pub(crate) mod queue;
pub(crate) mod read;
pub(crate) mod retries;

use std::time::Instant;

use snapshot_format::Reason;

use crate::session::fault::install::InstallError;
use crate::session::fault::load::{LendContext, LoadError, Loaded, ThreadContext};
use crate::session::platform::{Image, Installed, PAGE, PageNumber, Platform};
use crate::session::state::Status;
use crate::session::stats::{FaultKind, FaultTrace, add};
use crate::session::{Decision, Failure, FailureKind, Fault, Session};
use snaprestore_uffd::uffd::Wake;

/// The action that the state of the faulting page requires.
pub(crate) enum Lookup {
    /// The fault was answered: the state of the page required no load.
    Answered(FaultKind),
    /// Read events, then look again.
    Again,
    /// Load this page.
    Bring {
        page: PageNumber,
        /// Whether to load the whole large page that contains it.
        large: bool,
    },
    /// Wait for memory, then look again.
    NoMemory {
        /// Whether the memory is needed for a large page.
        large: bool,
    },
    /// The fault can't be answered.
    Failed(InstallError),
}

/// The outcome of serving a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultOutcome {
    /// The fault was answered.
    Given,
    /// The fault is served again after a pause, or the guard keeps it and later has it served again
    /// or poisoned.
    Left,
    /// The fault is not answered, or the answer to another fault covers it.
    Nobody,
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Serves faults until the session ends, as thread `number` of the session.
    pub(crate) fn serve(&self, number: usize, workers: &impl LendContext<I>) {
        let mut follower = P::CoreFollower::default();
        while let Some(fault) = self.next_fault() {
            add(&self.stats.faults, 1);
            let shares_core = self.platform.follow(&mut follower, fault.thread);
            self.state.beat(number);
            let (answer, trace) = workers.with(|worker| {
                worker.prepare(&self.state);
                worker.number = number;
                worker.shares_core = shares_core;
                worker.trace = FaultTrace::default();
                (self.answer(worker, fault), worker.trace)
            });
            self.state.beat(number);
            self.stats.met(trace);
            match answer {
                FaultOutcome::Given => {
                    self.stats.took(trace, fault.at.elapsed());
                    self.queue.answered();
                }
                FaultOutcome::Nobody => self.queue.answered(),
                FaultOutcome::Left => self.queue.detach(),
            }
            self.look_if_settled();
        }
    }

    /// Makes a thread that waits for messages check whether the session is complete, because no
    /// further message may arrive.
    pub(crate) fn look_if_settled(&self) {
        if self.state.may_be_settled() {
            self.platform.kick();
        }
    }

    /// Answers one fault.
    pub(crate) fn answer(&self, worker: &mut ThreadContext<I>, mut fault: Fault) -> FaultOutcome {
        let address = fault.address & !(PAGE - 1);
        let (mut tries, mut shortages) = (0, 0);
        loop {
            let (page, large) = match self.look(address) {
                Lookup::Answered(met) => {
                    worker.trace.meet(met);
                    return FaultOutcome::Given;
                }
                Lookup::Bring { page, large } => (page, large),
                Lookup::NoMemory { large } => {
                    let reason = Reason::Demand;
                    let waited = self.after_no_memory(&mut shortages, address, large, reason);
                    if let Err(stop) = waited {
                        return self.stopped(fault, stop);
                    }
                    continue;
                }
                Lookup::Again => {
                    if let Err(stop) = self.after_again(&mut tries, address) {
                        return self.stopped(fault, stop);
                    }
                    continue;
                }
                Lookup::Failed(stop) => return self.stopped(fault, stop),
            };
            let undecided = self.guard.undecided(fault, page);
            if let Some(decision) = undecided.or_else(|| self.queue.join(fault, page)) {
                return self.decided(fault, decision);
            }
            match self.load_unit(worker, page, large, Reason::Demand) {
                Ok(Loaded::Yes) => {
                    if let Some(observe) = &self.observer {
                        observe(page);
                    }
                    return FaultOutcome::Given;
                }
                Ok(Loaded::Look) => {}
                // Another thread has settled the page meanwhile.
                Err(LoadError::Failed(failure))
                    if self.state.status(failure.page) != Status::Absent => {}
                Err(LoadError::Failed(mut failure)) => {
                    // A fault in a large page reports its start, but another page may have failed.
                    failure.address = Some(address + (failure.page - page) * PAGE);
                    if self.pause_after(&mut fault, page, &failure) {
                        return FaultOutcome::Left;
                    }
                    return self.fail(fault, &failure);
                }
                Err(LoadError::Stopped(stop)) => return self.stopped(fault, stop),
            }
        }
    }

    /// Looks up the page at `address`, and answers the fault if no content is needed.
    pub(crate) fn look(&self, address: u64) -> Lookup {
        let _hold = self.platform.shared(address);
        let unit = self.state.map().unit_at(address);
        let large = unit.as_ref().is_some_and(|unit| unit.large);
        let (mut address, mut len) = (address, PAGE);
        let mut met = FaultKind::Outside;
        if let Some(unit) = &unit {
            (address, len) = (unit.address, unit.len());
            met = match self.state.status_of(unit) {
                Status::Absent => {
                    let page = unit.pages.start;
                    return Lookup::Bring { page, large };
                }
                Status::Poisoned => FaultKind::Poisoned,
                Status::Present => FaultKind::Present,
                Status::Removed => FaultKind::Removed,
            };
        }
        let poisoned = matches!(met, FaultKind::Poisoned);
        let installed = match poisoned {
            true => self.platform.poison(address, len),
            false if large => self.platform.copy(address, self.zeros_of(len), Wake::Now),
            false => self.platform.zeropage(address, len, Wake::Now),
        };
        match installed {
            Installed::NoMemory if !poisoned => Lookup::NoMemory { large },
            Installed::Exists if large && !poisoned && !self.platform.is_there(address) => {
                Lookup::NoMemory { large }
            }
            Installed::Done => Lookup::Answered(met),
            Installed::Partial(_) if !large => Lookup::Answered(met),
            Installed::Exists | Installed::Gone | Installed::Partial(_) => {
                self.platform.wake(address, len);
                Lookup::Answered(met)
            }
            Installed::Again | Installed::NoMemory => Lookup::Again,
            Installed::OwnerGone => Lookup::Failed(InstallError::OwnerGone),
            Installed::Refused(errno) => Lookup::Failed(InstallError::Refused(errno)),
        }
    }

    /// Pauses a fault whose page could not be read, unless its retry timeout is over. Damage is
    /// permanent, so nothing is read again because of it.
    fn pause_after(&self, fault: &mut Fault, page: PageNumber, failure: &Failure) -> bool {
        let now = Instant::now();
        let is_io = failure.kind == FailureKind::Io;
        let pause = is_io.then(|| fault.retries.failed(now, self.retry_timeout));
        let Some(pause) = pause.flatten() else {
            return false;
        };
        tracing::debug!(%failure, ?pause, "a page is read again");
        self.queue.pause(*fault, page, now + pause);
        true
    }

    /// Handles the failure of a page that a fault wants.
    fn fail(&self, fault: Fault, failure: &Failure) -> FaultOutcome {
        self.report_of_fault(failure);
        if self.is_ending() {
            // The session is being given up, or was while this thread read: this thread must not
            // decide about any of its pages.
            return FaultOutcome::Nobody;
        }
        self.decided(fault, self.guard.decide(fault, failure))
    }

    fn decided(&self, fault: Fault, decision: Decision) -> FaultOutcome {
        match decision {
            Decision::Poison => self.poison(fault),
            Decision::Leave => FaultOutcome::Left,
            Decision::Forget => FaultOutcome::Nobody,
        }
    }

    /// Poisons the page of a fault.
    pub(crate) fn poison(&self, fault: Fault) -> FaultOutcome {
        let address = fault.address & !(PAGE - 1);
        let mut tries = 0;
        loop {
            let again = {
                let _hold = self.platform.shared(address);
                let unit = self.state.map().unit_at(address);
                match unit.filter(|unit| self.state.status_of(unit) == Status::Absent) {
                    None => {
                        self.platform.wake(address, PAGE);
                        return FaultOutcome::Given;
                    }
                    Some(unit) => match self.platform.poison(unit.address, unit.len()) {
                        Installed::Done | Installed::Partial(_) => {
                            self.state.mark_poisoned(unit.pages);
                            add(&self.stats.poisoned, 1);
                            self.look_if_settled();
                            return FaultOutcome::Given;
                        }
                        Installed::Exists | Installed::Gone => {
                            self.platform.wake(address, PAGE);
                            return FaultOutcome::Given;
                        }
                        Installed::Again | Installed::NoMemory => Ok(()),
                        Installed::OwnerGone => Err(InstallError::OwnerGone),
                        Installed::Refused(errno) => Err(InstallError::Refused(errno)),
                    },
                }
            };
            if let Err(stop) = again.and_then(|()| self.after_again(&mut tries, address)) {
                return self.stopped(fault, stop);
            }
        }
    }

    /// Handles an install for a fault that failed for good: the owner is gone, or must be killed.
    fn stopped(&self, fault: Fault, stop: InstallError) -> FaultOutcome {
        if stop == InstallError::OwnerGone {
            self.owner_is_gone();
            return FaultOutcome::Nobody;
        }
        let page = {
            let _hold = self.platform.shared(fault.address);
            self.state.map().page_at(fault.address).unwrap_or_default()
        };
        let failure = Failure {
            address: Some(fault.address),
            ..self.install_failure(page, stop)
        };
        self.report_of_fault(&failure);
        self.guard.end_owner(&failure.to_string());
        FaultOutcome::Nobody
    }

    /// Reports a failure that the guard is about to decide on.
    fn report_of_fault(&self, failure: &Failure) {
        if self.guard.tells_of_end() {
            self.keep_failure(failure);
        } else {
            self.report(failure);
        }
    }

    /// Returns the failure of a page that the kernel refused to install.
    pub(crate) fn install_failure(&self, page: PageNumber, stop: InstallError) -> Failure {
        let why = match stop {
            InstallError::OwnerGone => "the owner of the memory has exited".to_owned(),
            InstallError::Stuck => "the owner's mappings kept changing without an event".to_owned(),
            InstallError::NoMemory => {
                crate::session::fault::install::no_memory(self.is_large(page)).to_owned()
            }
            InstallError::Refused(errno) => {
                let error = std::io::Error::from_raw_os_error(errno);
                format!("the kernel refused to install it: {error}")
            }
        };
        Failure {
            page,
            kind: FailureKind::Install,
            ..self.image.failure(why)
        }
    }
}
