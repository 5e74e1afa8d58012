//! Faults that were read and wait for a thread to serve them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Faults for which room is made beforehand; more threads than this fault at once only rarely.
const ROOM: usize = 1024;

/// A thread of the owner that waits for a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// The page's address.
    pub(crate) address: u64,
    /// When its message was read.
    pub(crate) at: Instant,
}

/// The faults that wait.
#[derive(Debug)]
pub(crate) struct Inbox {
    faults: Mutex<VecDeque<Fault>>,
    /// Faults that were read and not yet answered, those being served included.
    unanswered: AtomicUsize,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            faults: Mutex::new(VecDeque::with_capacity(ROOM)),
            unanswered: AtomicUsize::new(0),
        }
    }

    /// Takes in a fault that was just read.
    pub(crate) fn arrived(&self, address: u64) {
        self.unanswered.fetch_add(1, Relaxed);
        self.lock().push_back(Fault {
            address,
            at: Instant::now(),
        });
    }

    /// The fault that has waited longest.
    pub(crate) fn pop(&self) -> Option<Fault> {
        self.lock().pop_front()
    }

    /// A popped fault has been answered.
    pub(crate) fn answered(&self) {
        self.unanswered.fetch_sub(1, Relaxed);
    }

    /// Whether a fault waits to be popped.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Whether a thread of the owner is known to wait.
    pub(crate) fn demand_waits(&self) -> bool {
        self.unanswered.load(Relaxed) > 0
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
