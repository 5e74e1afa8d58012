//! Faults whose page can't be loaded or installed.
//!
//! ```text
//!   can't be read ──▶ pause, then served again, until the retry timeout
//!                                 │
//!   damaged, unavailable ─────────┴──▶ the guard decides: poison, defer to its callback, drop
//!   can't be installed ──▶ kill the owner
//! ```

use std::time::Instant;

use crate::session::Session;
use crate::session::failure::{Failure, FailureKind};
use crate::session::fault::outcome::{FaultOutcome, InstallError};
use crate::session::fault::queue::Fault;
use crate::session::platform::{Image, Installed, PAGE, PageNumber, Platform};
use crate::session::state::Status;
use crate::session::stats::add;

impl<P: Platform, I: Image> Session<P, I> {
    /// Pauses a fault whose page could not be read, unless its retry timeout is over. Damage is
    /// permanent, so nothing is read again because of it.
    pub(super) fn pause_after(
        &self,
        fault: &mut Fault,
        page: PageNumber,
        failure: &Failure,
    ) -> bool {
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
    pub(super) fn fail(&self, fault: Fault, failure: &Failure) -> FaultOutcome {
        self.report_of_fault(failure);
        if self.is_ending() {
            // The session is being given up, or was while this thread read: this thread must not
            // decide about any of its pages.
            return FaultOutcome::Dropped;
        }
        let decided = self.guard.decide(fault, failure);
        decided.unwrap_or_else(|| self.poison(fault))
    }

    /// Schedules a deferred fault to be served again after a pause; its content may be available by
    /// then.
    pub(crate) fn retry_deferred(&self, mut fault: Fault, page: PageNumber) {
        let pause = fault.retries.pause();
        self.queue.pause(fault, page, Instant::now() + pause);
        self.platform.kick();
    }

    /// Poisons the page of a deferred fault.
    pub(crate) fn poison_deferred(&self, fault: Fault) {
        self.poison(fault);
        self.queue.resolve();
        self.wake_if_settled();
    }

    /// Poisons the page of a fault.
    fn poison(&self, fault: Fault) -> FaultOutcome {
        let address = fault.address & !(PAGE - 1);
        let mut tries = 0;
        loop {
            let retried = match self.poison_once(address) {
                Ok(()) => return FaultOutcome::Resolved,
                Err(InstallError::Changing) => self.after_changing(&mut tries, address),
                Err(error) => Err(error),
            };
            if let Err(error) = retried {
                return self.fail_install(fault, error);
            }
        }
    }

    /// Looks up the page at `address`, and poisons it if it is absent, in one hold of the lock.
    fn poison_once(&self, address: u64) -> Result<(), InstallError> {
        let _hold = self.platform.shared(address);
        let unit = self.state.map().unit_at(address);
        let Some(unit) = unit.filter(|unit| self.state.status_of(unit) == Status::Absent) else {
            self.platform.wake(address, PAGE);
            return Ok(());
        };
        match self.platform.poison(unit.address, unit.len()) {
            Installed::Done | Installed::Partial(_) => {
                self.state.mark_poisoned(unit.pages);
                add(&self.stats.poisoned, 1);
                self.wake_if_settled();
                Ok(())
            }
            Installed::Exists | Installed::Gone => {
                self.platform.wake(address, PAGE);
                Ok(())
            }
            Installed::Again | Installed::NoMemory => Err(InstallError::Changing),
            Installed::OwnerGone => Err(InstallError::OwnerGone),
            Installed::Refused(errno) => Err(InstallError::Refused(errno)),
        }
    }

    /// Handles an install for a fault that failed for good: the owner is gone, or must be killed.
    pub(super) fn fail_install(&self, fault: Fault, error: InstallError) -> FaultOutcome {
        if error == InstallError::OwnerGone {
            self.mark_owner_gone();
            return FaultOutcome::Dropped;
        }
        let page = {
            let _hold = self.platform.shared(fault.address);
            self.state.map().page_at(fault.address).unwrap_or_default()
        };
        let failure = Failure {
            address: Some(fault.address),
            ..self.install_failure(page, error)
        };
        self.report_of_fault(&failure);
        self.guard.kill_owner(&failure.to_string());
        FaultOutcome::Dropped
    }

    /// Reports a failure that the guard is about to decide on.
    fn report_of_fault(&self, failure: &Failure) {
        if self.guard.logs_kills() {
            self.keep_failure(failure);
        } else {
            self.report(failure);
        }
    }

    /// Returns the failure of a page that could not be installed.
    pub(crate) fn install_failure(&self, page: PageNumber, error: InstallError) -> Failure {
        Failure {
            page,
            kind: FailureKind::Install,
            ..self.image.failure(error.to_string())
        }
    }
}
