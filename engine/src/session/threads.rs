//! Engine threads that currently work for a session.
//!
//! A thread that touches the memory it restores waits for a page that perhaps no thread is left to
//! load, and a thread that ends the session can't wait for itself. Both cases are recognized by the
//! identity of the thread, so each thread has an entry here from before it is started until after
//! it has exited.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Duration;

use nix::unistd::gettid;

/// The engine threads that work for one session.
#[derive(Debug, Default)]
pub(crate) struct EngineThreads {
    places: Mutex<Vec<Entry>>,
    left: Condvar,
    next: AtomicU64,
    /// Whether thread numbers in fault messages are those of this process.
    own_memory: AtomicBool,
}

#[derive(Debug)]
struct Entry {
    place: u64,
    name: String,
    /// The thread, once it runs, and its kernel thread ID.
    thread: Option<(ThreadId, u32)>,
}

/// The registration of one thread, removed when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    threads: Arc<EngineThreads>,
    place: u64,
}

impl EngineThreads {
    /// Registers thread `name`, which is about to be started.
    pub(crate) fn place(self: &Arc<Self>, name: &str) -> Place {
        let place = self.next.fetch_add(1, Relaxed);
        self.lock().push(Entry {
            place,
            name: name.to_owned(),
            thread: None,
        });
        Place {
            threads: Arc::clone(self),
            place,
        }
    }

    /// Looks for these threads in the session's faults from now on, because its memory belongs to
    /// this process.
    pub(crate) fn watch_faults(&self) {
        self.own_memory.store(true, Relaxed);
    }

    /// Returns the name of the engine thread that has faulted, if `thread` is one.
    pub(crate) fn faulting(&self, thread: u32) -> Option<String> {
        if !self.own_memory.load(Relaxed) {
            return None;
        }
        let places = self.lock();
        let is_it = |entry: &&Entry| entry.thread.is_some_and(|(_, number)| number == thread);
        places.iter().find(is_it).map(|entry| entry.name.clone())
    }

    /// Returns whether the calling thread is an engine thread of this session.
    pub(crate) fn is_current(&self) -> bool {
        let current = std::thread::current().id();
        let is_it = |entry: &Entry| entry.thread.is_some_and(|(id, _)| id == current);
        self.lock().iter().any(is_it)
    }

    /// Waits until no thread is left, for at most `timeout`. Returns `true` if none is left.
    pub(crate) fn wait_gone(&self, timeout: Duration) -> bool {
        let some = |places: &mut Vec<Entry>| !places.is_empty();
        let waited = self.left.wait_timeout_while(self.lock(), timeout, some);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }

    /// Returns the names of the threads that are left.
    pub(crate) fn names(&self) -> Vec<String> {
        self.lock().iter().map(|it| it.name.clone()).collect()
    }

    /// Locks the list. It is consistent after every statement, so a panic elsewhere leaves nothing
    /// to repair.
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Records the calling thread as the one that this entry was made for.
    pub(crate) fn begin(&self) {
        let number = u32::try_from(gettid().as_raw()).unwrap_or(0);
        let mut places = self.threads.lock();
        if let Some(entry) = places.iter_mut().find(|entry| entry.place == self.place) {
            entry.thread = Some((std::thread::current().id(), number));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.threads
            .lock()
            .retain(|entry| entry.place != self.place);
        self.threads.left.notify_all();
    }
}
