//! Serving faults.
//!
//! ```text
//! answer(fault):
//!   loop:
//!     hold the lock shared: look up the page's state
//!       no page of ours, removed, present: ZEROPAGE, or WAKE if something is there; done
//!       poisoned: POISON, or WAKE; done
//!     absent: bring it
//!       can't be had: the failure policy
//! ```

use snapshot_format::Reason;

use super::bring::{Brought, Lost, Worker};
use super::install::Stop;
use super::platform::{Image, Installed, PAGE, PageNumber, Platform};
use super::state::Status;
use super::stats::{Met, Trace, add};
use super::{Decision, Failure, FailureKind, Fault, Session};
use crate::sys::Wake;

/// How often a frame that could not be read is read again, with some milliseconds in between.
const READ_TRIES: u32 = 4;
/// What the state of the faulting page asks for.
pub(super) enum Step {
    /// It was answered: nothing had to be brought for what was met.
    Answered(Met),
    /// Read events, then look again.
    Again,
    /// Bring this page.
    Bring(PageNumber),
    /// It can't go on.
    Stop(Stop),
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It was answered.
    Given,
    /// The guard has it, and will have it served again or poisoned.
    Left,
    /// Nobody answers it, or who answers another one does.
    Nobody,
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Serves faults until the session ends.
    pub(crate) fn serve(&self, worker: &mut Worker<I>) {
        let mut follower = P::Follower::default();
        while let Some(fault) = self.next_fault() {
            add(&self.stats.faults, 1);
            worker.shares_core = self.platform.follow(&mut follower, fault.thread);
            worker.trace = Trace::default();
            self.state.turn(worker.number);
            let answer = self.answer(worker, fault);
            self.state.turn(worker.number);
            self.stats.met(worker.trace);
            match answer {
                Answer::Given => {
                    self.stats.took(worker.trace, fault.at.elapsed());
                    self.inbox.answered();
                }
                Answer::Nobody => self.inbox.answered(),
                Answer::Left => self.inbox.left(),
            }
            self.look_if_settled();
        }
    }

    /// Has a thread that waits for messages look whether the session is complete: there may be no
    /// more.
    pub(super) fn look_if_settled(&self) {
        if self.state.may_be_settled() {
            self.platform.kick();
        }
    }

    /// Answers one fault.
    pub(super) fn answer(&self, worker: &mut Worker<I>, fault: Fault) -> Answer {
        let address = fault.address & !(PAGE - 1);
        let (mut tries, mut reads) = (0, 0);
        loop {
            let page = match self.look(address) {
                Step::Answered(met) => {
                    worker.trace.meet(met);
                    return Answer::Given;
                }
                Step::Bring(page) => page,
                Step::Again => {
                    if let Err(stop) = self.after_again(&mut tries, address) {
                        return self.stopped(fault, stop);
                    }
                    continue;
                }
                Step::Stop(stop) => return self.stopped(fault, stop),
            };
            if let Some(decision) = self.guard.undecided(fault, page) {
                return self.decided(fault, decision);
            }
            match self.bring(worker, page, Reason::Demand) {
                Ok(Brought::Yes) => {
                    if let Some(observe) = &self.observer {
                        observe(page);
                    }
                    return Answer::Given;
                }
                Ok(Brought::Look) => {}
                // Somebody else has decided about it meanwhile.
                Err(Lost::Failed(_)) if self.state.status(page) != Status::Absent => {}
                Err(Lost::Failed(failure))
                    if failure.kind == FailureKind::Io && reads < READ_TRIES =>
                {
                    reads += 1;
                    self.platform.back_off(reads * 100);
                }
                Err(Lost::Failed(mut failure)) => {
                    failure.address = Some(address);
                    return self.fail(fault, &failure);
                }
                Err(Lost::Stopped(stop)) => return self.stopped(fault, stop),
            }
        }
    }

    /// Looks up the page at `address` and answers what needs no content.
    pub(super) fn look(&self, address: u64) -> Step {
        let _hold = self.platform.shared(address);
        let page = self.state.map().page_at(address);
        let met = match page.map(|page| (page, self.state.status(page))) {
            Some((page, Status::Absent)) => return Step::Bring(page),
            Some((_, Status::Poisoned)) => Met::Poisoned,
            Some((_, Status::Present)) => Met::Present,
            Some((_, Status::Removed)) => Met::Removed,
            None => Met::Outside,
        };
        let installed = match met {
            Met::Poisoned => self.platform.poison(address, PAGE),
            _ => self.platform.zeropage(address, PAGE, Wake::Now),
        };
        match installed {
            Installed::Done | Installed::Partial(_) => Step::Answered(met),
            Installed::Exists | Installed::Gone => {
                self.platform.wake(address, PAGE);
                Step::Answered(met)
            }
            Installed::Again | Installed::NoMemory => Step::Again,
            Installed::OwnerGone => Step::Stop(Stop::OwnerGone),
            Installed::Refused(errno) => Step::Stop(Stop::Refused(errno)),
        }
    }

    /// A page that a fault wants can't be restored.
    fn fail(&self, fault: Fault, failure: &Failure) -> Answer {
        self.report(failure);
        self.decided(fault, self.guard.decide(fault, failure))
    }

    fn decided(&self, fault: Fault, decision: Decision) -> Answer {
        match decision {
            Decision::Poison => self.poison(fault),
            Decision::Leave => Answer::Left,
            Decision::Forget => Answer::Nobody,
        }
    }

    /// Poisons the page of a fault.
    pub(super) fn poison(&self, fault: Fault) -> Answer {
        let address = fault.address & !(PAGE - 1);
        let mut tries = 0;
        loop {
            let again = {
                let _hold = self.platform.shared(address);
                let page = self.state.map().page_at(address);
                match page.filter(|page| self.state.status(*page) == Status::Absent) {
                    None => {
                        self.platform.wake(address, PAGE);
                        return Answer::Given;
                    }
                    Some(page) => match self.platform.poison(address, PAGE) {
                        Installed::Done | Installed::Partial(_) => {
                            self.state.mark_poisoned(page..page + 1);
                            add(&self.stats.poisoned, 1);
                            self.look_if_settled();
                            return Answer::Given;
                        }
                        Installed::Exists | Installed::Gone => {
                            self.platform.wake(address, PAGE);
                            return Answer::Given;
                        }
                        Installed::Again | Installed::NoMemory => Ok(()),
                        Installed::OwnerGone => Err(Stop::OwnerGone),
                        Installed::Refused(errno) => Err(Stop::Refused(errno)),
                    },
                }
            };
            if let Err(stop) = again.and_then(|()| self.after_again(&mut tries, address)) {
                return self.stopped(fault, stop);
            }
        }
    }

    /// An install for a fault could not go on: the owner is gone, or must not go on.
    fn stopped(&self, fault: Fault, stop: Stop) -> Answer {
        if stop == Stop::OwnerGone {
            self.owner_is_gone();
            return Answer::Nobody;
        }
        let page = {
            let _hold = self.platform.shared(fault.address);
            self.state.map().page_at(fault.address).unwrap_or_default()
        };
        let failure = Failure {
            address: Some(fault.address),
            ..self.install_failure(page, stop)
        };
        self.report(&failure);
        self.guard.end_owner(&failure.detail);
        Answer::Nobody
    }

    /// The failure of a page that the kernel would not install.
    pub(super) fn install_failure(&self, page: PageNumber, stop: Stop) -> Failure {
        let why = match stop {
            Stop::OwnerGone => "the owner of the memory is gone".to_owned(),
            Stop::Stuck => "the owner's mappings kept changing without an event".to_owned(),
            Stop::NoMemory => "the kernel had no memory for it, many times".to_owned(),
            Stop::Refused(errno) => {
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
