//! What threads serve and fetch with, lent to whichever thread has something to do.
//!
//! A worker has buffers of some MiB. Threads that wait need none, and most threads of many sessions
//! wait: so a fault thread borrows one for each fault, and a thread that fetches for each task. There
//! are as many as are in use at once, or a few more, which keep the frames that they decoded last for
//! the session that had them. With the last session they go, and their memory is returned to the
//! system.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::session::{LendContext, SnapshotImage, ThreadContext};
use snaprestore_uffd::os::trim_heap;

use super::prefetcher::Pool;

/// The workers of a pool.
pub(super) struct Workers {
    state: Mutex<State>,
    /// So many there may be although nobody uses them.
    most: usize,
}

#[derive(Default)]
struct State {
    /// Those that nobody uses now. The one that was used last is at the end.
    idle: Vec<ThreadContext<SnapshotImage>>,
    /// Those, and the ones that are lent.
    total: usize,
    /// Sessions that may want one.
    sessions: usize,
}

/// A session, until dropped.
pub(super) struct User(Arc<Pool>);

/// The workers for a session.
pub(super) struct For<'a> {
    pub(super) workers: &'a Workers,
    pub(super) image: &'a SnapshotImage,
}

impl Workers {
    pub(super) fn new(most: usize) -> Self {
        Self {
            state: Mutex::default(),
            most,
        }
    }

    fn lend(&self, image: &SnapshotImage) -> ThreadContext<SnapshotImage> {
        let mut state = self.state();
        let idle = &state.idle;
        let known = idle.iter().rposition(|worker| worker.knows(image));
        // Another session may want the others again, the latest most likely.
        let may_take = state.total >= self.most && !idle.is_empty();
        let prepared = || idle.iter().position(|worker| worker.is_prepared(image));
        let at = known.or_else(|| may_take.then(|| prepared().unwrap_or(0)));
        let found = at.map(|at| state.idle.remove(at));
        state.total += usize::from(found.is_none());
        drop(state);
        let mut worker = found.unwrap_or_else(|| ThreadContext::new(SnapshotImage::decoder()));
        worker.adopt(image);
        worker
    }

    fn give_back(&self, worker: ThreadContext<SnapshotImage>) {
        let mut state = self.state();
        state.idle.push(worker);
        let is_one_too_many = state.total > self.most || state.sessions == 0;
        let unwanted = is_one_too_many.then(|| state.idle.remove(0));
        state.total -= usize::from(is_one_too_many);
        drop(state);
        drop(unwanted);
    }

    /// It is whole after every statement.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl For<'_> {
    /// Makes the first worker before it is wanted.
    pub(super) fn prepare(&self) {
        let total = self.workers.state().total;
        if total == 0 {
            self.workers.give_back(self.workers.lend(self.image));
        }
    }
}

impl LendContext<SnapshotImage> for For<'_> {
    fn with<T>(&self, work: impl FnOnce(&mut ThreadContext<SnapshotImage>) -> T) -> T {
        let mut worker = self.workers.lend(self.image);
        let done = work(&mut worker);
        self.workers.give_back(worker);
        done
    }
}

impl User {
    pub(super) fn new(pool: &Arc<Pool>) -> Self {
        pool.workers().state().sessions += 1;
        Self(Arc::clone(pool))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut state = self.0.workers().state();
        state.sessions -= 1;
        if state.sessions > 0 {
            return;
        }
        let unwanted = std::mem::take(&mut state.idle);
        state.total -= unwanted.len();
        drop(state);
        if !unwanted.is_empty() {
            drop(unwanted);
            trim_heap();
        }
    }
}
