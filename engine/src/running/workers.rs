//! What threads serve and fetch with, lent to whichever thread has something to do.
//!
//! A worker has buffers of some MiB. Threads that wait need none, and most threads of many sessions
//! wait: so a fault thread borrows one for each fault, and a thread that fetches for each task. A few
//! that were used last are kept, with the frames that they decoded, as long as there is a session.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::session::{Lend, SnapshotImage, Worker};

/// Workers that nobody uses now.
pub(super) struct Workers {
    /// The one that was used last is at the end.
    idle: Mutex<Idle>,
    most: usize,
}

#[derive(Default)]
struct Idle {
    workers: Vec<Worker<SnapshotImage>>,
    /// Sessions that may want one.
    sessions: usize,
}

/// A session, until dropped.
pub(super) struct User(pub(super) std::sync::Arc<super::pool::Pool>);

/// The workers for a session.
pub(super) struct For<'a> {
    pub(super) workers: &'a Workers,
    pub(super) image: &'a SnapshotImage,
}

impl Workers {
    /// Keeps `most` that nobody uses.
    pub(super) fn new(most: usize) -> Self {
        Self {
            idle: Mutex::default(),
            most,
        }
    }

    fn lend(&self, image: &SnapshotImage) -> Worker<SnapshotImage> {
        let mut idle = self.idle();
        let known = idle.workers.iter().rposition(|worker| worker.knows(image));
        let found = match known {
            Some(at) => Some(idle.workers.remove(at)),
            // The others may be wanted again by those who used them last.
            None if idle.workers.len() == self.most => Some(idle.workers.remove(0)),
            None => None,
        };
        drop(idle);
        let mut worker = found.unwrap_or_else(|| Worker::new(SnapshotImage::decoder()));
        worker.adopt(image);
        worker
    }

    fn give_back(&self, worker: Worker<SnapshotImage>) {
        let mut idle = self.idle();
        let oldest = (idle.workers.len() == self.most).then(|| idle.workers.remove(0));
        idle.workers.push(worker);
        drop(idle);
        drop(oldest);
    }

    /// The list is whole after every statement.
    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl For<'_> {
    /// Makes the first worker before it is wanted.
    pub(super) fn prepare(&self) {
        let has_any = !self.workers.idle().workers.is_empty();
        if !has_any {
            self.workers.give_back(self.workers.lend(self.image));
        }
    }
}

impl Lend<SnapshotImage> for For<'_> {
    fn with<T>(&self, work: impl FnOnce(&mut Worker<SnapshotImage>) -> T) -> T {
        let mut worker = self.workers.lend(self.image);
        let done = work(&mut worker);
        self.workers.give_back(worker);
        done
    }
}

impl User {
    pub(super) fn new(pool: &std::sync::Arc<super::pool::Pool>) -> Self {
        pool.workers().idle().sessions += 1;
        Self(std::sync::Arc::clone(pool))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut idle = self.0.workers().idle();
        idle.sessions -= 1;
        let unwanted = (idle.sessions == 0).then(|| std::mem::take(&mut idle.workers));
        drop(idle);
        drop(unwanted);
    }
}
