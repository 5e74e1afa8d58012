//! The part of a front end that decides when a page can't be restored.

use crate::session::failure::Failure;
use crate::session::fault::outcome::FaultOutcome;
use crate::session::fault::queue::Fault;
use crate::session::platform::PageNumber;

/// A handler that decides what happens to the owner when its memory can't be restored.
pub(crate) trait Guard: Send + Sync {
    /// Decides about a faulting page that can't be restored. Returns `None` if the page is to be
    /// poisoned.
    fn decide(&self, fault: Fault, failure: &Failure) -> Option<FaultOutcome>;
    /// Adds a fault on a page whose failure is still being decided. Returns `None` if no decision
    /// is pending for that page.
    fn pending_decision(&self, fault: Fault, page: PageNumber) -> Option<FaultOutcome>;
    /// Kills the owner, because the session can't continue and the owner must not run without it.
    fn kill_owner(&self, why: &str);
    /// Returns whether the guard itself logs that it killed the owner and why, so that such a
    /// failure is not logged twice.
    fn logs_kills(&self) -> bool {
        false
    }
}
