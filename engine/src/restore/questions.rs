//! Questions for the asking thread: one per page, however many faults wait for the page.
//!
//! ```text
//!            ask                 callback                        close
//!   fault ──▶ waiting to be asked ──▶ Poison: poisoned ──────────▶ gone
//!                                 ──▶ Retry: served after a pause ─▶ gone
//! ```
//!
//! A signal that interrupts a waiting thread makes it fault again on the same page. Such a fault
//! joins the question about its page, without another read of the page, until the question is gone.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::session::{Failure, Fault, FaultOutcome};

/// Open questions.
#[derive(Debug, Default)]
pub(super) struct Questions {
    /// Number of open questions; checked for each fault without taking the lock.
    count: AtomicUsize,
    open: Mutex<Open>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Open {
    questions: Vec<Question>,
}

/// A page whose failure is being decided.
#[derive(Debug)]
struct Question {
    failure: Failure,
    /// One fault for each address at which the page was touched; the page may have moved.
    faults: Vec<Fault>,
    /// Whether the callback is deciding about the page.
    asked: bool,
}

impl Questions {
    /// Asks a question, unless there is already one about the same page.
    pub(super) fn ask(&self, fault: Fault, failure: &Failure) -> FaultOutcome {
        let mut open = self.lock();
        if let Some(question) = open.about(failure.page) {
            return question.join(fault);
        }
        open.questions.push(Question {
            failure: failure.clone(),
            faults: vec![fault],
            asked: false,
        });
        self.count.store(open.questions.len(), Relaxed);
        drop(open);
        self.changed.notify_one();
        FaultOutcome::Deferred
    }

    /// Adds a fault to the question about its page, if there is one.
    pub(super) fn join(&self, fault: Fault, page: u64) -> Option<FaultOutcome> {
        if self.count.load(Relaxed) == 0 {
            return None;
        }
        Some(self.lock().about(page)?.join(fault))
    }

    /// Returns the next failure to ask about; waits for one for at most `timeout`.
    pub(super) fn next(&self, timeout: Duration) -> Option<Failure> {
        let deadline = Instant::now() + timeout;
        let mut open = self.lock();
        loop {
            if let Some(question) = open.questions.iter_mut().find(|it| !it.asked) {
                question.asked = true;
                return Some(question.failure.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.changed.wait_timeout(open, left);
            open = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes the faults to which the decision about `page` applies. An empty list means that all
    /// were handled and the question is gone.
    ///
    /// The question stays open until then, so that no further fault asks again.
    pub(super) fn take(&self, page: u64) -> Vec<Fault> {
        let mut open = self.lock();
        let faults = open.about(page).map(|it| std::mem::take(&mut it.faults));
        let faults = faults.unwrap_or_default();
        if faults.is_empty() {
            open.questions.retain(|it| it.failure.page != page);
            self.count.store(open.questions.len(), Relaxed);
        }
        faults
    }

    /// Locks the list. It is consistent after every statement, so a panic elsewhere leaves nothing
    /// to repair.
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn about(&mut self, page: u64) -> Option<&mut Question> {
        self.questions.iter_mut().find(|it| it.failure.page == page)
    }
}

impl Question {
    fn join(&mut self, fault: Fault) -> FaultOutcome {
        if self.faults.iter().any(|it| it.address == fault.address) {
            return FaultOutcome::Dropped;
        }
        self.faults.push(fault);
        FaultOutcome::Deferred
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{FailureKind, Retries};

    const NOW: Duration = Duration::ZERO;

    fn fault(address: u64) -> Fault {
        Fault {
            address,
            at: Instant::now(),
            retries: Retries::default(),
        }
    }

    fn failure(page: u64) -> Failure {
        Failure {
            file: "x".to_owned(),
            offset: None,
            page,
            address: None,
            kind: FailureKind::Io,
            detail: String::new(),
        }
    }

    fn asked(questions: &Questions) -> Option<u64> {
        questions.next(NOW).map(|failure| failure.page)
    }

    #[test]
    fn page_is_asked_once_address_is_kept_once() {
        let questions = Questions::default();
        assert_eq!(questions.join(fault(1), 7), None);
        assert_eq!(questions.ask(fault(1), &failure(7)), FaultOutcome::Deferred);
        assert_eq!(questions.ask(fault(1), &failure(7)), FaultOutcome::Dropped);
        assert_eq!(questions.join(fault(2), 7), Some(FaultOutcome::Deferred));
        assert_eq!(questions.join(fault(2), 8), None);
        assert_eq!(questions.ask(fault(3), &failure(8)), FaultOutcome::Deferred);
        assert_eq!((asked(&questions), asked(&questions)), (Some(7), Some(8)));
        assert_eq!(asked(&questions), None);
        // Faults join while the question is being asked, and while earlier faults are poisoned.
        assert_eq!(questions.join(fault(1), 7), Some(FaultOutcome::Dropped));
        let addresses = |faults: Vec<Fault>| faults.iter().map(|f| f.address).collect::<Vec<_>>();
        assert_eq!(addresses(questions.take(7)), [1, 2]);
        assert_eq!(questions.join(fault(1), 7), Some(FaultOutcome::Deferred));
        assert_eq!(addresses(questions.take(7)), [1]);
        assert!(questions.take(7).is_empty());
        assert_eq!(questions.join(fault(1), 7), None);
        assert_eq!(questions.join(fault(4), 8), Some(FaultOutcome::Deferred));
    }
}
