//! A queue of faults that were read and wait for a thread to serve them.

use std::collections::VecDeque;
use std::sync::atomic::{
    AtomicUsize,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::session::fault::outcome::FaultOutcome;
use crate::session::fault::retries::Retries;
use crate::session::platform::PageNumber;

/// Number of faults for which room is reserved; rarely do more threads fault at once.
const INITIAL_CAPACITY: usize = 1024;

/// A fault of an owner's thread that waits for a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// The page's address.
    pub(crate) address: u64,
    /// The time at which its message was read.
    pub(crate) at: Instant,
    /// Failed reads of its page.
    pub(crate) retries: Retries,
}

/// A fault whose page will be read again after a pause.
#[derive(Debug)]
struct Paused {
    fault: Fault,
    page: PageNumber,
    due: Instant,
}

/// A queue of pending faults.
///
/// ```text
///   push ──▶ waits here, is served ──▶ answered
///                    │         ▲
///                 detach     resume
///                    ▼         │
///      the guard decides ──▶ pause
///                    │
///                    └──▶ resolve
/// ```
///
/// A signal that interrupts a waiting thread makes it fault anew. Such a fault joins the paused
/// one, without another read of the page.
#[derive(Debug)]
pub(crate) struct FaultQueue {
    faults: Mutex<VecDeque<Fault>>,
    paused: Mutex<Vec<Paused>>,
    /// Number of paused faults; checked for each fault without taking the lock.
    paused_count: AtomicUsize,
    /// Number of faults that are pending or being served, in all sessions that share the counter.
    waiting: Arc<AtomicUsize>,
    /// Number of those faults of this session, plus the ones that were left: faults whose outcome
    /// is not recorded yet. A single counter covers both, so that no fault is invisible on its way
    /// from one to the other.
    open: AtomicUsize,
    /// Threads that wait for an answer here rather than in the kernel.
    readers: AtomicUsize,
    /// Number of answers given while a thread waited here.
    answers: Mutex<u64>,
    answered: Condvar,
}

/// A thread that waits for answers until this is dropped.
pub(crate) struct Reader<'a>(&'a FaultQueue);

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Relaxed);
    }
}

impl Drop for FaultQueue {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl FaultQueue {
    pub(crate) fn new() -> Self {
        Self {
            faults: Mutex::new(VecDeque::with_capacity(INITIAL_CAPACITY)),
            paused: Mutex::default(),
            paused_count: AtomicUsize::new(0),
            waiting: Arc::default(),
            open: AtomicUsize::new(0),
            readers: AtomicUsize::new(0),
            answers: Mutex::new(0),
            answered: Condvar::new(),
        }
    }

    /// Shares the counter of pending faults with other sessions. No fault may have arrived yet.
    pub(crate) fn count_in(&mut self, waiting: &Arc<AtomicUsize>) {
        self.waiting = Arc::clone(waiting);
    }

    /// Adds a fault that was just read.
    pub(crate) fn push(&self, address: u64) {
        self.track();
        self.lock().push_back(Fault {
            address,
            at: Instant::now(),
            retries: Retries::default(),
        });
    }

    /// Keeps a fault for `page` that was left, until it is served again at `due`.
    pub(crate) fn pause(&self, fault: Fault, page: PageNumber, due: Instant) {
        let mut paused = self.paused();
        paused.push(Paused { fault, page, due });
        self.paused_count.store(paused.len(), Relaxed);
    }

    /// Merges a fault into a paused one for the same page, if there is one.
    pub(crate) fn join(&self, fault: Fault, page: PageNumber) -> Option<FaultOutcome> {
        if self.paused_count.load(Relaxed) == 0 {
            return None;
        }
        let mut paused = self.paused();
        let about = |it: &&Paused| it.page == page;
        let Paused {
            due, fault: first, ..
        } = paused.iter().find(about)?;
        let (due, retries) = (*due, first.retries);
        let address = |it: &Paused| it.page == page && it.fault.address == fault.address;
        if paused.iter().any(address) {
            return Some(FaultOutcome::Dropped);
        }
        let fault = Fault { retries, ..fault };
        paused.push(Paused { fault, page, due });
        self.paused_count.store(paused.len(), Relaxed);
        Some(FaultOutcome::Deferred)
    }

    /// Queues the paused faults whose pause is over. Returns when the next pause ends.
    pub(crate) fn resume(&self) -> Option<Instant> {
        if self.paused_count.load(Relaxed) == 0 {
            return None;
        }
        let mut paused = self.paused();
        let now = Instant::now();
        for Paused { fault, .. } in paused.extract_if(.., |it| it.due <= now) {
            self.waiting.fetch_add(1, Relaxed);
            self.lock().push_back(fault);
        }
        self.paused_count.store(paused.len(), Relaxed);
        paused.iter().map(|it| it.due).min()
    }

    /// Counts a waiter for a page that is served without having been in the queue.
    pub(crate) fn track(&self) {
        self.open.fetch_add(1, Relaxed);
        self.waiting.fetch_add(1, Relaxed);
    }

    /// Drops all pending faults; nobody answers them.
    pub(crate) fn abandon(&self) {
        let mut faults = self.lock();
        self.waiting.fetch_sub(faults.len(), Relaxed);
        faults.clear();
        // Paused faults are not counted.
        self.paused().clear();
        self.paused_count.store(0, Relaxed);
    }

    /// Removes and returns the fault that has waited longest.
    pub(crate) fn pop(&self) -> Option<Fault> {
        self.lock().pop_front()
    }

    /// Records that a served fault was answered and its outcome is recorded.
    pub(crate) fn answered(&self) {
        self.detach();
        self.resolve();
    }

    /// Records that a fault being served is left to another party.
    pub(crate) fn detach(&self) {
        self.waiting.fetch_sub(1, Relaxed);
    }

    /// Records that a fault that was left is answered and its outcome is recorded.
    pub(crate) fn resolve(&self) {
        // Whoever sees the lower count also sees the record.
        self.open.fetch_sub(1, Release);
        fence(SeqCst);
        if self.readers.load(Relaxed) > 0 {
            *self.answers() += 1;
            self.answered.notify_all();
        }
    }

    /// Announces answers to [`FaultQueue::wait_for_answer`] while the returned value lives.
    pub(crate) fn reader(&self) -> Reader<'_> {
        self.readers.fetch_add(1, Relaxed);
        // Either the answer sees this reader, or this reader sees what the answer recorded.
        fence(SeqCst);
        Reader(self)
    }

    /// Locks and returns the number of answers so far.
    pub(crate) fn answers(&self) -> MutexGuard<'_, u64> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there are more answers than `seen`, for at most `timeout`.
    pub(crate) fn wait_for_answer(&self, seen: u64, timeout: Duration) {
        let answers = self.answers();
        let none = |answers: &mut u64| *answers == seen;
        let _ = self
            .answered
            .wait_timeout_while(answers, timeout, none)
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Returns whether a fault waits to be popped.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Returns whether the outcome of some fault is not recorded yet.
    pub(crate) fn has_open(&self) -> bool {
        self.open.load(Acquire) > 0
    }

    /// Returns the addresses of the pending faults, to tell two states of the model apart.
    #[cfg(test)]
    pub(crate) fn addresses(&self) -> Vec<u64> {
        self.lock().iter().map(|fault| fault.address).collect()
    }

    /// Locks the list, which is consistent after every statement.
    fn paused(&self) -> MutexGuard<'_, Vec<Paused>> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the queue. It is consistent after every statement, so a panic elsewhere leaves nothing
    /// to repair.
    fn lock(&self) -> MutexGuard<'_, VecDeque<Fault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ended_queue_leaves_shared_counter_at_zero() {
        let waiting = Arc::default();
        let (mut one, mut other) = (FaultQueue::new(), FaultQueue::new());
        one.count_in(&waiting);
        other.count_in(&waiting);
        for address in 0..3 {
            one.push(address << 12);
            other.push(address << 12);
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

    #[test]
    fn paused_fault_is_joined_by_faults_of_its_page() {
        let queue = FaultQueue::new();
        let fault = |address| Fault {
            address,
            at: Instant::now(),
            retries: Retries::default(),
        };
        let mut failed = fault(0x1000);
        failed.retries.pause();
        assert_eq!(queue.join(fault(0x1000), 1), None);
        assert_eq!(queue.resume(), None);
        let due = Instant::now() + Duration::from_secs(3600);
        queue.pause(failed, 1, due);
        assert_eq!(queue.join(fault(0x1000), 1), Some(FaultOutcome::Dropped));
        assert_eq!(queue.join(fault(0x9000), 1), Some(FaultOutcome::Deferred));
        assert_eq!(queue.join(fault(0x9000), 1), Some(FaultOutcome::Dropped));
        assert_eq!(queue.join(fault(0x2000), 2), None);
        assert_eq!(queue.resume(), Some(due));
        assert!(queue.is_empty());
        queue.pause(fault(0x2000), 2, Instant::now());
        assert_eq!(queue.resume(), Some(due));
        assert_eq!(queue.addresses(), [0x2000]);
        assert_eq!(queue.waiting.load(Relaxed), 1);
        queue.abandon();
        assert_eq!(queue.resume(), None);
        assert_eq!(queue.waiting.load(Relaxed), 0);
    }

    #[test]
    fn resumed_fault_keeps_age_and_retries() {
        let queue = FaultQueue::new();
        queue.push(0x1000);
        let mut fault = queue.pop().unwrap();
        queue.detach();
        fault.retries.pause();
        queue.pause(fault, 1, Instant::now());
        queue.resume();
        let again = queue.pop().unwrap();
        assert_eq!((again.at, again.retries), (fault.at, fault.retries));
        queue.answered();
        assert!(!queue.has_open());
    }
}
