//! Faults that were read and wait for a thread to serve them.

use std::collections::VecDeque;
use std::sync::atomic::{
    AtomicUsize,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Faults for which room is made beforehand; more threads than this fault at once only rarely.
const ROOM: usize = 1024;

/// A thread of the owner that waits for a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// The page's address.
    pub(crate) address: u64,
    /// Its id, 0 if that isn't known.
    pub(crate) thread: u32,
    /// When its message was read.
    pub(crate) at: Instant,
}

/// The faults that wait.
///
/// ```text
///   arrived ──▶ waits here, is served ──▶ answered
///                    │         ▲
///                  left      again
///                    ▼         │
///               somebody else decides ──▶ settled
/// ```
#[derive(Debug)]
pub(crate) struct Inbox {
    faults: Mutex<VecDeque<Fault>>,
    /// Faults that wait here or are being served, in all sessions that share the number.
    waiting: Arc<AtomicUsize>,
    /// Those, and the ones that were left: what they come to is not recorded yet. One number for
    /// both, so that no fault is out of sight on its way from one to the other.
    open: AtomicUsize,
    /// Threads that wait for an answer here, and not in the kernel.
    readers: AtomicUsize,
    /// Answers given while somebody waited here.
    answers: Mutex<u64>,
    answered: Condvar,
}

/// A thread that waits for answers, until dropped.
pub(crate) struct Reader<'a>(&'a Inbox);

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Relaxed);
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            faults: Mutex::new(VecDeque::with_capacity(ROOM)),
            waiting: Arc::default(),
            open: AtomicUsize::new(0),
            readers: AtomicUsize::new(0),
            answers: Mutex::new(0),
            answered: Condvar::new(),
        }
    }

    /// Counts faults that wait together with those of others. None has arrived yet.
    pub(crate) fn count_in(&mut self, waiting: &Arc<AtomicUsize>) {
        self.waiting = Arc::clone(waiting);
    }

    /// Takes in a fault that was just read.
    pub(crate) fn arrived(&self, address: u64, thread: u32) {
        self.begin();
        self.push(address, thread);
    }

    /// Takes in a fault that was left: it can be served now.
    pub(crate) fn again(&self, address: u64) {
        self.waiting.fetch_add(1, Relaxed);
        self.push(address, 0);
    }

    /// Somebody waits for a page and is served without having been in the queue.
    pub(crate) fn begin(&self) {
        self.open.fetch_add(1, Relaxed);
        self.waiting.fetch_add(1, Relaxed);
    }

    fn push(&self, address: u64, thread: u32) {
        self.lock().push_back(Fault {
            address,
            thread,
            at: Instant::now(),
        });
    }

    /// Nobody answers those that wait here.
    pub(crate) fn abandon(&self) {
        let mut faults = self.lock();
        self.waiting.fetch_sub(faults.len(), Relaxed);
        faults.clear();
    }

    /// The fault that has waited longest.
    pub(crate) fn pop(&self) -> Option<Fault> {
        self.lock().pop_front()
    }

    /// A fault that was being served has been answered, and what it came to is recorded.
    pub(crate) fn answered(&self) {
        self.left();
        self.settled();
    }

    /// A fault that was being served is left to somebody else.
    pub(crate) fn left(&self) {
        self.waiting.fetch_sub(1, Relaxed);
    }

    /// A fault that was left has been answered, and what it came to is recorded.
    pub(crate) fn settled(&self) {
        // Who sees the number fall sees the record.
        self.open.fetch_sub(1, Release);
        fence(SeqCst);
        if self.readers.load(Relaxed) > 0 {
            *self.answers() += 1;
            self.answered.notify_all();
        }
    }

    /// Has answers announced to [`Inbox::wait_for_answer`].
    pub(crate) fn reader(&self) -> Reader<'_> {
        self.readers.fetch_add(1, Relaxed);
        // Either the answer sees this reader, or this reader what the answer recorded.
        fence(SeqCst);
        Reader(self)
    }

    /// The number of answers so far.
    pub(crate) fn answers(&self) -> MutexGuard<'_, u64> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there are more answers than `seen`, but not longer than `patience`.
    pub(crate) fn wait_for_answer(&self, seen: u64, patience: Duration) {
        let answers = self.answers();
        let none = |answers: &mut u64| *answers == seen;
        let _ = self
            .answered
            .wait_timeout_while(answers, patience, none)
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Whether a fault waits to be popped.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Whether what some fault comes to is not recorded yet.
    pub(crate) fn has_open(&self) -> bool {
        self.open.load(Acquire) > 0
    }

    /// The addresses that wait, for telling two states apart.
    #[cfg(test)]
    pub(crate) fn addresses(&self) -> Vec<u64> {
        self.lock().iter().map(|fault| fault.address).collect()
    }

    /// The queue is whole after every statement, so a panic elsewhere leaves nothing to repair.
    fn lock(&self) -> MutexGuard<'_, VecDeque<Fault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_ends_with_faults_leaves_none_in_the_number_of_all() {
        let waiting = Arc::default();
        let (mut one, mut other) = (Inbox::new(), Inbox::new());
        one.count_in(&waiting);
        other.count_in(&waiting);
        for address in 0..3 {
            one.arrived(address << 12, 0);
            other.arrived(address << 12, 0);
        }
        let served = one.pop();
        one.abandon();
        assert_eq!(waiting.load(Relaxed), 4);
        assert!(served.is_some() && one.pop().is_none());
        one.answered();
        drop(one);
        assert_eq!(waiting.load(Relaxed), 3);
        drop(other);
        assert_eq!(waiting.load(Relaxed), 0);
    }
}
