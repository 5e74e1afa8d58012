//! A pool of thread contexts, lent to whichever thread has something to do.
//!
//! A context has buffers of some MiB. Waiting threads need none, and with many sessions most
//! threads wait. Therefore a fault thread borrows a context for each fault, and a prefetch thread
//! for each task. There are as many contexts as are in use at once, and a few idle ones, which keep
//! the frames that they decoded last for the session that used them. They are dropped with the last
//! session, and their memory is returned to the system.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::session::{LendContext, SnapshotImage, ThreadContext};
use snaprestore_uffd::os::trim_heap;

use super::prefetcher::Pool;

/// The contexts of a pool.
pub(super) struct ContextPool {
    state: Mutex<State>,
    /// Maximum number of idle contexts. With this many in all, idle ones of other sessions are
    /// taken before another is created. Those in use are not limited: threads that are preempted
    /// hold theirs, and creating one takes longer than serving a fault.
    enough: usize,
}

#[derive(Default)]
struct State {
    /// Idle contexts; the one that was used last is at the end.
    idle: Vec<ThreadContext<SnapshotImage>>,
    /// Number of contexts, idle or lent.
    total: usize,
    /// Number of sessions that may want one.
    sessions: usize,
}

/// A session that uses the pool, until dropped.
pub(super) struct PoolUser(Arc<Pool>);

/// The contexts as a source for one session.
pub(super) struct SessionContexts<'a> {
    pub(super) contexts: &'a ContextPool,
    pub(super) image: &'a SnapshotImage,
}

impl ContextPool {
    pub(super) fn new(enough: usize) -> Self {
        Self {
            state: Mutex::default(),
            enough,
        }
    }

    fn lend(&self, image: &SnapshotImage) -> ThreadContext<SnapshotImage> {
        let mut state = self.state();
        let idle = &state.idle;
        let known = idle.iter().rposition(|context| context.was_lent_to(image));
        // Otherwise leave them: another session may want its contexts again, most likely the
        // latest.
        let may_take = state.total >= self.enough && !idle.is_empty();
        let prepared = || idle.iter().position(|context| context.is_prepared(image));
        let at = known.or_else(|| may_take.then(|| prepared().unwrap_or(0)));
        let found = at.map(|at| state.idle.remove(at));
        state.total += usize::from(found.is_none());
        drop(state);
        let mut context = found.unwrap_or_else(|| ThreadContext::new(SnapshotImage::decoder()));
        context.adopt(image);
        context
    }

    fn give_back(&self, context: ThreadContext<SnapshotImage>) {
        let mut state = self.state();
        state.idle.push(context);
        let is_one_too_many = state.idle.len() > self.enough || state.sessions == 0;
        let unwanted = is_one_too_many.then(|| state.idle.remove(0));
        state.total -= usize::from(is_one_too_many);
        drop(state);
        drop(unwanted);
    }

    /// Locks the state, which is consistent after every statement.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SessionContexts<'_> {
    /// Creates the first context before it is needed.
    pub(super) fn prepare(&self) {
        let total = self.contexts.state().total;
        if total == 0 {
            self.contexts.give_back(self.contexts.lend(self.image));
        }
    }
}

impl LendContext<SnapshotImage> for SessionContexts<'_> {
    fn with<T>(&self, work: impl FnOnce(&mut ThreadContext<SnapshotImage>) -> T) -> T {
        let mut context = self.contexts.lend(self.image);
        let done = work(&mut context);
        self.contexts.give_back(context);
        done
    }
}

impl PoolUser {
    pub(super) fn new(pool: &Arc<Pool>) -> Self {
        pool.contexts().state().sessions += 1;
        Self(Arc::clone(pool))
    }
}

impl Drop for PoolUser {
    fn drop(&mut self) {
        let mut state = self.0.contexts().state();
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

#[cfg(test)]
mod tests {
    use snapshot_format::{MemoryStore, RegionSpec, Snapshot, Writer, WriterOptions};

    use super::*;

    fn image() -> SnapshotImage {
        let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
        writer.begin_region(&RegionSpec::default()).unwrap();
        writer.write_pages(&[7; 4096]).unwrap();
        let (bytes, _) = writer.finish().unwrap();
        let snapshot = Snapshot::open(Arc::new(MemoryStore::new(bytes))).unwrap();
        SnapshotImage::new(Arc::new(snapshot), None).unwrap()
    }

    #[test]
    fn contexts_in_use_do_not_take_the_places_of_idle_ones() {
        let (pool, image) = (ContextPool::new(2), image());
        pool.state().sessions = 1;
        let mut lent: Vec<_> = (0..5).map(|_| pool.lend(&image)).collect();
        // The next thread gets the context that was returned last, however many are in use.
        pool.give_back(lent.pop().unwrap());
        let count = |pool: &ContextPool| {
            let state = pool.state();
            (state.total, state.idle.len())
        };
        assert_eq!(count(&pool), (5, 1));
        lent.push(pool.lend(&image));
        assert_eq!(count(&pool), (5, 0));
        for context in lent {
            pool.give_back(context);
        }
        assert_eq!(count(&pool), (2, 2));
    }
}
