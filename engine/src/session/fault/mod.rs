//! The fault path: from the message of a fault to the thread that runs again.
//!
//! ```text
//! serve(), in each fault thread until the session ends ("the lock" is the install lock):
//!   wait     take a fault from the queue; if it is empty, wait for messages and record them
//!   look up  hold the lock shared; by the state of the page at the address:
//!              outside the session, removed, present: ZEROPAGE (for a large page, COPY of zeros),
//!                or WAKE if a page is there; the fault is resolved
//!              poisoned: POISON, or WAKE; the fault is resolved
//!              absent: load it
//!   load     look up its content; claim its frame (if another fault has claimed it, wait and look
//!            the page up again); read, check and decode the frame up to the page  [`load`]
//!   install  hold the lock shared, look up state and address again, one COPY, mark  [`install`]
//!            (the thread that waits runs now; the rest of the frame is loaded and installed)
//!   resolve  count the fault; if it was the last page, wake a thread to complete the session
//! ```
//!
//! A page that can't be loaded leaves the path for [`failing`]: its read is retried after a pause
//! while others are served, and then the failure policy decides.
//!
//! Prefetch ([`prefetch`]) takes the same path from "load" on. Pages of 2 MiB leave it in "load",
//! and have their own load and install ([`huge`]).

pub(crate) mod context;
pub(crate) mod failing;
pub(crate) mod huge;
pub(crate) mod in_flight;
pub(crate) mod install;
pub(crate) mod load;
pub(crate) mod outcome;
pub(crate) mod prefetch;
pub(crate) mod queue;
pub(crate) mod read;
pub(crate) mod retries;

use std::time::{Duration, Instant};

use snapshot_format::Reason;

use crate::session::Session;
use crate::session::fault::context::{LendContext, ThreadContext};
use crate::session::fault::install::InstallRetries;
use crate::session::fault::outcome::{FaultOutcome, InstallError, LoadError, Lookup};
use crate::session::fault::queue::Fault;
use crate::session::platform::{Image, Installed, PAGE, Platform, Waited};
use crate::session::state::Status;
use crate::session::stats::{FaultKind, FaultTrace, add};

/// Time for which a thread polls for the next fault before it sleeps, while a recording runs:
/// waking a thread on an idle core takes longer than installing one page.
const POLL_TIME: Duration = Duration::from_micros(20);

impl<P: Platform, I: Image> Session<P, I> {
    /// Serves faults until the session ends, as thread `number` of the session.
    pub(crate) fn serve(&self, number: usize, contexts: &impl LendContext<I>) {
        while let Some(fault) = self.wait_for_fault() {
            self.advance_timeline(fault.at);
            add(&self.stats.faults, 1);
            self.state.beat(number);
            let (outcome, trace) = contexts.with(|context| {
                context.prepare(&self.state);
                context.number = number;
                context.trace = FaultTrace::default();
                (self.serve_fault(context, fault), context.trace)
            });
            self.state.beat(number);
            self.resolve(fault, outcome, trace);
        }
    }

    /// Waits for the next fault to serve and returns it, or `None` if the session ends.
    ///
    /// An incoming message wakes up to two threads. The first one that runs reads all messages. If
    /// they contain more than one fault, it wakes others.
    fn wait_for_fault(&self) -> Option<Fault> {
        loop {
            if self.is_ending() {
                // The end of the session wakes a few threads only, so each wakes the next.
                self.platform.kick();
                return None;
            }
            let next_due = self.queue.resume();
            if let Some(fault) = self.queue.pop() {
                // Another thread serves the remaining faults, and those that are paused.
                if !self.queue.is_empty() || next_due.is_some() {
                    self.platform.kick();
                }
                return Some(fault);
            }
            if self.complete_if_settled() {
                return None;
            }
            // Each touch faults, so the next fault is near.
            if self.recorder.is_running() && self.poll_for_fault() {
                continue;
            }
            let timeout = next_due.map(|due| due.saturating_duration_since(Instant::now()));
            match self.platform.wait_readable(timeout) {
                Waited::Ready => {
                    self.read_events(0);
                }
                Waited::OwnerGone => self.mark_owner_gone(),
                Waited::Failed => {
                    self.guard.kill_owner("waiting for faults failed");
                    self.end();
                }
            }
        }
    }

    /// Polls for a message for [`POLL_TIME`]. Returns `true` as soon as there may be a fault to
    /// serve, or the session ends.
    fn poll_for_fault(&self) -> bool {
        let until = Instant::now() + POLL_TIME;
        while Instant::now() < until {
            if self.read_events(0) > 0 || !self.queue.is_empty() || self.is_ending() {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    /// Looks up the page of one fault, and loads it if it is absent.
    fn serve_fault(&self, context: &mut ThreadContext<I>, mut fault: Fault) -> FaultOutcome {
        let address = fault.address & !(PAGE - 1);
        let mut retries = InstallRetries::of_fault();
        loop {
            let (pages, large) = match self.look_up(address) {
                Ok(Lookup::Absent { pages, large }) => (pages, large),
                Ok(Lookup::Answered { kind, present }) => {
                    context.trace.meet(kind);
                    if let Some(page) = present {
                        self.record_present(page, fault.at);
                    }
                    return FaultOutcome::Resolved;
                }
                Err(error) => match self.before_retry(&mut retries, error, address) {
                    Ok(()) => continue,
                    Err(error) => return self.fail_install(fault, error),
                },
            };
            let page = pages.start;
            let pending = self.guard.pending_decision(fault, page);
            if let Some(outcome) = pending.or_else(|| self.queue.join(fault, page)) {
                return outcome;
            }
            let alone = self.record_fault(pages, fault.at);
            match self.load(context, page, large, Reason::Demand, alone) {
                Ok(true) => {
                    if let Some(observe) = &self.observer {
                        observe(page);
                    }
                    return FaultOutcome::Resolved;
                }
                Ok(false) => {}
                // Another thread has settled the page meanwhile.
                Err(LoadError::Content(failure))
                    if self.state.status(failure.page) != Status::Absent => {}
                Err(LoadError::Content(mut failure)) => {
                    // A fault in a large page reports its start, but another page may have failed.
                    failure.address = Some(address + (failure.page - page) * PAGE);
                    if self.pause_after(&mut fault, page, &failure) {
                        return FaultOutcome::Deferred;
                    }
                    return self.fail(fault, &failure);
                }
                Err(LoadError::Install(error)) => return self.fail_install(fault, error),
            }
        }
    }

    /// Looks up the page at `address`, and answers the fault if no content is needed.
    pub(crate) fn look_up(&self, address: u64) -> Result<Lookup, InstallError> {
        let _hold = self.platform.shared(address);
        let unit = self.state.map().unit_at(address);
        let large = unit.as_ref().is_some_and(|unit| unit.large);
        let (mut address, mut len) = (address, PAGE);
        let mut kind = FaultKind::Outside;
        if let Some(unit) = &unit {
            (address, len) = (unit.address, unit.len());
            kind = match self.state.status_of(unit) {
                Status::Absent => {
                    let pages = unit.pages.clone();
                    return Ok(Lookup::Absent { pages, large });
                }
                Status::Poisoned => FaultKind::Poisoned,
                Status::Present => FaultKind::Present,
                Status::Removed => FaultKind::Removed,
            };
        }
        let poisoned = matches!(kind, FaultKind::Poisoned);
        // A large page that is present was discarded as a whole ([`huge`]).
        let present = unit.filter(|_| kind == FaultKind::Present && !large);
        let answered = Ok(Lookup::Answered {
            kind,
            present: present.map(|unit| unit.pages.start),
        });
        let installed = match poisoned {
            true => self.platform.poison(address, len),
            false if large => self.platform.copy(address, self.zeros_of(len)),
            false => self.platform.zeropage(address, len),
        };
        match installed {
            Installed::NoMemory if !poisoned => Err(InstallError::NoMemory { large }),
            Installed::Exists if large && !poisoned && !self.platform.is_there(address) => {
                Err(InstallError::NoMemory { large })
            }
            Installed::Done => answered,
            Installed::Partial(_) if !large => answered,
            Installed::Exists | Installed::Gone | Installed::Partial(_) => {
                self.platform.wake(address, len);
                answered
            }
            Installed::Again | Installed::NoMemory => Err(InstallError::Changing),
            Installed::OwnerGone => Err(InstallError::OwnerGone),
            Installed::Refused(errno) => Err(InstallError::Refused(errno)),
        }
    }

    /// Records the outcome of a fault that was served.
    fn resolve(&self, fault: Fault, outcome: FaultOutcome, trace: FaultTrace) {
        self.stats.met(trace);
        match outcome {
            FaultOutcome::Resolved => {
                self.stats.took(trace, fault.at.elapsed());
                self.queue.answered();
            }
            FaultOutcome::Dropped => self.queue.answered(),
            FaultOutcome::Deferred => self.queue.detach(),
        }
        self.wake_if_settled();
    }
}
