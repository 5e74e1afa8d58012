//! The questions that the asking thread has to put: one for each page, however many faults wait for
//! it.
//!
//! ```text
//!            ask                 callback                     close
//!   fault ──▶ waiting to be asked ──▶ Poison: poisoned ───────▶ gone
//!                                 ──▶ Retry: pausing ── due ──▶ gone, its faults are served again
//! ```
//!
//! A toucher that a signal interrupts faults anew on the same page. Such a fault joins the question
//! about its page, without the page being read again, until the question is gone.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::session::{Decision, Failure, Fault};

/// The pause before a page is tried again for the first time; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(512);
/// Pages of which is known how often they were tried again. Of more than so many in turn each
/// begins anew.
const TRIED_PAGES: usize = 64;

/// The open questions.
#[derive(Debug, Default)]
pub(super) struct Questions {
    /// How many there are: looked at for each fault, without the lock.
    count: AtomicUsize,
    open: Mutex<Open>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Open {
    questions: Vec<Question>,
    /// How often in a row pages were tried again, the latest last.
    tried: VecDeque<(u64, u32)>,
}

/// A page about which is being decided.
#[derive(Debug)]
struct Question {
    failure: Failure,
    /// One fault for each address at which the page was touched: it may have moved.
    faults: Vec<Fault>,
    step: Step,
}

#[derive(Debug)]
enum Step {
    Waiting,
    BeingAsked,
    /// It is tried again then.
    Pausing(Instant),
}

/// What the asking thread does next.
#[derive(Debug)]
pub(super) enum Next {
    /// Ask about this failure.
    Ask(Failure),
    /// Have these faults served again.
    TryAgain(Vec<Fault>),
    /// Nothing for now.
    Nothing,
}

impl Questions {
    /// Puts a question, unless there is one about the same page.
    pub(super) fn ask(&self, fault: Fault, failure: &Failure) -> Decision {
        let mut open = self.lock();
        if let Some(question) = open.about(failure.page) {
            return question.join(fault);
        }
        open.questions.push(Question {
            failure: failure.clone(),
            faults: vec![fault],
            step: Step::Waiting,
        });
        self.count.store(open.questions.len(), Relaxed);
        drop(open);
        self.changed.notify_one();
        Decision::Leave
    }

    /// Adds a fault to the question about its page, if there is one.
    pub(super) fn join(&self, fault: Fault, page: u64) -> Option<Decision> {
        if self.count.load(Relaxed) == 0 {
            return None;
        }
        Some(self.lock().about(page)?.join(fault))
    }

    /// What is to be done now; waits for it at most `patience`.
    pub(super) fn next(&self, patience: Duration) -> Next {
        let deadline = Instant::now() + patience;
        let mut open = self.lock();
        loop {
            let now = Instant::now();
            if let Some(page) = open.due(now) {
                return Next::TryAgain(self.close(&mut open, page));
            }
            let waiting = |question: &&mut Question| matches!(question.step, Step::Waiting);
            if let Some(question) = open.questions.iter_mut().find(waiting) {
                question.step = Step::BeingAsked;
                return Next::Ask(question.failure.clone());
            }
            let until = open.next_due().map_or(deadline, |due| due.min(deadline));
            let left = until.saturating_duration_since(now);
            if now >= deadline {
                return Next::Nothing;
            }
            let waited = self.changed.wait_timeout(open, left);
            open = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The page is to be tried again, after a pause that is longer each time.
    pub(super) fn pause(&self, page: u64) {
        let mut open = self.lock();
        let tried = open.tried.iter().position(|(tried, _)| *tried == page);
        let before = tried.and_then(|i| open.tried.remove(i));
        let times = before.map_or(0, |(_, times)| times);
        if open.tried.len() == TRIED_PAGES {
            open.tried.pop_front();
        }
        open.tried.push_back((page, times.saturating_add(1)));
        if let Some(question) = open.about(page) {
            question.step = Step::Pausing(Instant::now() + pause(times));
        }
    }

    /// The faults to be poisoned for the question about `page`. None: all were, and it is gone.
    ///
    /// The question stays while they are poisoned, so that no fault asks again meanwhile.
    pub(super) fn take(&self, page: u64) -> Vec<Fault> {
        let mut open = self.lock();
        let faults = open.about(page).map(|it| std::mem::take(&mut it.faults));
        let faults = faults.unwrap_or_default();
        if faults.is_empty() {
            self.close(&mut open, page);
        }
        faults
    }

    fn close(&self, open: &mut Open, page: u64) -> Vec<Fault> {
        let at = open.questions.iter().position(|it| it.failure.page == page);
        let closed = at.map(|at| open.questions.remove(at));
        self.count.store(open.questions.len(), Relaxed);
        closed.map(|closed| closed.faults).unwrap_or_default()
    }

    /// The list is whole after every statement, so a panic elsewhere leaves nothing to repair.
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn about(&mut self, page: u64) -> Option<&mut Question> {
        self.questions.iter_mut().find(|it| it.failure.page == page)
    }

    /// A page that is to be tried again now.
    fn due(&self, now: Instant) -> Option<u64> {
        let due = |it: &&Question| matches!(it.step, Step::Pausing(due) if due <= now);
        self.questions.iter().find(due).map(|it| it.failure.page)
    }

    fn next_due(&self) -> Option<Instant> {
        let due = |it: &Question| match it.step {
            Step::Pausing(due) => Some(due),
            Step::Waiting | Step::BeingAsked => None,
        };
        self.questions.iter().filter_map(due).min()
    }
}

impl Question {
    fn join(&mut self, fault: Fault) -> Decision {
        if self.faults.iter().any(|it| it.address == fault.address) {
            return Decision::Forget;
        }
        self.faults.push(fault);
        Decision::Leave
    }
}

/// The pause before a page that was tried again `times` times is tried once more.
fn pause(times: u32) -> Duration {
    let factor = 1_u32.checked_shl(times).unwrap_or(u32::MAX);
    FIRST_PAUSE.saturating_mul(factor).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::FailureKind;

    const NOW: Duration = Duration::ZERO;

    fn fault(address: u64) -> Fault {
        Fault {
            address,
            thread: 0,
            at: Instant::now(),
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
        match questions.next(NOW) {
            Next::Ask(failure) => Some(failure.page),
            _ => None,
        }
    }

    #[test]
    fn one_question_a_page_and_one_fault_an_address() {
        let questions = Questions::default();
        assert_eq!(questions.join(fault(1), 7), None);
        assert_eq!(questions.ask(fault(1), &failure(7)), Decision::Leave);
        assert_eq!(questions.ask(fault(1), &failure(7)), Decision::Forget);
        assert_eq!(questions.join(fault(2), 7), Some(Decision::Leave));
        assert_eq!(questions.join(fault(2), 8), None);
        assert_eq!(questions.ask(fault(3), &failure(8)), Decision::Leave);
        assert_eq!((asked(&questions), asked(&questions)), (Some(7), Some(8)));
        assert_eq!(asked(&questions), None);
        // Faults join while it is asked, and while those before them are poisoned.
        assert_eq!(questions.join(fault(1), 7), Some(Decision::Forget));
        let addresses = |faults: Vec<Fault>| faults.iter().map(|f| f.address).collect::<Vec<_>>();
        assert_eq!(addresses(questions.take(7)), [1, 2]);
        assert_eq!(questions.join(fault(1), 7), Some(Decision::Leave));
        assert_eq!(addresses(questions.take(7)), [1]);
        assert!(questions.take(7).is_empty());
        assert_eq!(questions.join(fault(1), 7), None);
        assert_eq!(questions.join(fault(4), 8), Some(Decision::Leave));
    }

    #[test]
    fn pauses_between_tries_grow() {
        let questions = Questions::default();
        for _ in 0..4 {
            questions.ask(fault(1), &failure(7));
            assert_eq!(asked(&questions), Some(7));
            questions.pause(7);
            assert!(questions.join(fault(1), 7).is_some(), "it is still open");
            let Next::TryAgain(faults) = questions.next(Duration::from_secs(60)) else {
                panic!("it is tried again when the pause is over");
            };
            assert_eq!(faults.len(), 1);
            assert_eq!(questions.join(fault(1), 7), None);
        }
        assert_eq!(questions.lock().tried, [(7, 4)]);
        assert_eq!([0, 1, 2, 40].map(|n| pause(n).as_millis()), [1, 2, 4, 512]);
    }
}
