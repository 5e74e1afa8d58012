//! The prefetcher: one rayon pool that prefetches for all sessions that share it.
//!
//! ```text
//!   session ─▶ feed ─┐            ┌─ snap-fetch-0 ─┐
//!   session ─▶ feed ─┼─▶ a ring ─▶┼─ snap-fetch-1 ─┼─▶ small tasks, one of each feed in turn
//!   session ─▶ feed ─┘            └─ ...          ─┘
//! ```
//!
//! A [`Feed`] is the prefetch of one session, which hands out small tasks. A job of the rayon pool
//! runs tasks of any feed until there are none left. The ring serves the feeds round-robin. With
//! one rayon job per feed, the first feed would block the others, because rayon prefers jobs that
//! its own threads spawned over jobs from outside.
//!
//! An install can block for reasons that lie with the owner: its memory is limited, or it changes
//! its mappings all the time. Therefore a feed gets at most half of the threads of a pool that
//! others may share. The thread that adds the first feed starts the pool's threads. They exit with
//! the last feed.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::contexts::ContextPool;
use super::session_prefetch::{Availability, Feed};
use super::threads::{Hook, aborting_on_panic, run};

/// Maximum time for which prefetch yields to demand before each frame: an owner that faults all the
/// time must not stop prefetch.
const MAX_YIELD: Duration = Duration::from_micros(500);
/// Interval at which a yielding thread checks again.
const POLL_INTERVAL: Duration = Duration::from_micros(50);
/// Maximum number of threads that work on one feed at once: each has a bit in [`Entry::slots`].
pub(super) const MAX_FEED_THREADS: usize = 64;

/// The prefetcher of all sessions that share it, with their decoding contexts.
pub(crate) struct Pool {
    /// Number of faults that are pending or being served, in all sessions.
    demand: Arc<AtomicUsize>,
    /// Number of threads that run a task and are not yielding.
    fetching: AtomicUsize,
    cores: usize,
    /// Whether several sessions may share it.
    is_shared: bool,
    hook: Option<Hook>,
    ring: Mutex<Ring>,
    /// Signals that a task has become available or has ended, or that the threads have exited.
    changed: Condvar,
    contexts: ContextPool,
}

#[derive(Default)]
struct Ring {
    feeds: VecDeque<Entry>,
    threads: Option<Threads>,
    /// Number of jobs of the rayon pool.
    jobs: usize,
    /// Whether one of them waits for a feed that is pausing.
    has_waiter: bool,
    /// Threads that are exiting.
    retired: Vec<JoinHandle<()>>,
}

struct Threads {
    rayon: ThreadPool,
    handles: Vec<JoinHandle<()>>,
}

/// A feed in the ring.
struct Entry {
    feed: Arc<Feed>,
    /// Maximum number of threads that run its tasks at once.
    threads: usize,
    /// One bit for each thread that runs a task of it.
    slots: u64,
    availability: Availability,
}

/// When the next task of any feed becomes available.
enum NextTask {
    /// Now, from the entry at this index.
    Now(usize),
    /// Not before this time.
    Until(Instant),
    /// When a task ends or a feed is added, if ever.
    Unknown,
}

impl Ring {
    /// Returns when the next task becomes available; with `only`, the next task of that feed.
    fn next(&self, only: Option<&Arc<Feed>>) -> NextTask {
        let now = Instant::now();
        let mut earliest: Option<Instant> = None;
        for (at, entry) in self.feeds.iter().enumerate() {
            if only.is_some_and(|only| !Arc::ptr_eq(only, &entry.feed)) {
                continue;
            }
            // If all its threads are running a task, one task must end first.
            let is_full =
                snaprestore_uffd::to_usize(entry.slots.count_ones().into()) >= entry.threads;
            match entry.availability {
                _ if is_full => {}
                Availability::Until(due) if due > now => {
                    earliest = Some(earliest.map_or(due, |earliest| earliest.min(due)));
                }
                Availability::Now | Availability::Until(_) => return NextTask::Now(at),
                Availability::Drained | Availability::Paused | Availability::Over => {}
            }
        }
        earliest.map_or(NextTask::Unknown, NextTask::Until)
    }

    fn entry(&mut self, feed: &Arc<Feed>) -> Option<&mut Entry> {
        let mut entries = self.feeds.iter_mut();
        entries.find(|entry| Arc::ptr_eq(&entry.feed, feed))
    }

    /// Lets the threads exit if no feed and no job is left.
    fn retire_if_idle(&mut self) {
        if self.feeds.is_empty()
            && self.jobs == 0
            && let Some(threads) = self.threads.take()
        {
            self.retired.extend(threads.handles);
        }
    }
}

/// A thread's slot at a feed, assigned by [`Pool::begin`].
struct Assignment {
    feed: Arc<Feed>,
    slot: usize,
}

impl Pool {
    pub(super) fn new(hook: Option<Hook>, is_shared: bool) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            demand: Arc::default(),
            fetching: AtomicUsize::new(0),
            cores,
            is_shared,
            hook,
            ring: Mutex::default(),
            changed: Condvar::new(),
            contexts: ContextPool::new(2 * cores + 2),
        }
    }

    /// Returns the counter in which sessions count their pending faults.
    pub(super) fn demand(&self) -> &Arc<AtomicUsize> {
        &self.demand
    }

    /// Returns the contexts with which threads decode.
    pub(super) fn contexts(&self) -> &ContextPool {
        &self.contexts
    }

    /// Adds a feed, and starts the threads if there are none. They inherit the caller's signal
    /// mask.
    pub(super) fn add(self: &Arc<Self>, feed: &Arc<Feed>) -> io::Result<()> {
        let mut ring = self.ring();
        if ring.threads.is_none() {
            ring.threads = Some(self.start_threads(feed)?);
        }
        self.push(&mut ring, feed);
        Ok(())
    }

    /// Returns the number of threads that a first feed starts if it may use `of_feed` at once.
    pub(super) fn thread_count(&self, of_feed: usize) -> usize {
        if self.is_shared {
            2 * of_feed.max(self.cores)
        } else {
            of_feed
        }
    }

    fn start_threads(&self, first: &Feed) -> io::Result<Threads> {
        let count = self.thread_count(first.threads());
        let mut handles = Vec::with_capacity(count);
        let rayon = ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|index| format!("snap-fetch-{index}"))
            .spawn_handler(|thread| {
                let name = thread.name().unwrap_or_default().to_owned();
                let hook = self.hook.clone();
                let builder = Builder::new().name(name.clone());
                handles.push(builder.spawn(move || {
                    run(&name, None, hook.as_ref(), || thread.run());
                })?);
                Ok(())
            })
            .build()
            .map_err(io::Error::other)?;
        Ok(Threads { rayon, handles })
    }

    /// Runs tasks of `feed` in this thread, together with the pool's threads if there are any,
    /// until it is finished. Threads that are no longer needed have exited when this returns.
    pub(super) fn finish(self: &Arc<Self>, feed: &Arc<Feed>) {
        let mut ring = self.ring();
        self.push(&mut ring, feed);
        while ring.entry(feed).is_some() {
            match ring.next(Some(feed)) {
                NextTask::Now(at) => {
                    if let Some(assignment) = self.begin(&mut ring, at) {
                        drop(ring);
                        self.work(assignment);
                        ring = self.ring();
                    }
                }
                NextTask::Until(due) => ring = wait(&self.changed, ring, Some(due)),
                NextTask::Unknown => ring = wait(&self.changed, ring, None),
            }
        }
        self.join_retired(ring);
    }

    /// Removes a feed whose session has ended. When this returns, no thread works on it any more,
    /// and threads that are no longer needed have exited.
    pub(super) fn leave(&self, feed: &Arc<Feed>) {
        let mut ring = self.ring();
        while let Some(entry) = ring.entry(feed) {
            entry.availability = Availability::Over;
            if entry.slots == 0 {
                self.remove(&mut ring, feed);
                break;
            }
            ring = wait(&self.changed, ring, None);
        }
        self.join_retired(ring);
    }

    /// Makes a feed check again whether it has a task, because its throttle has changed.
    pub(super) fn recheck(self: &Arc<Self>, feed: &Arc<Feed>) {
        let mut ring = self.ring();
        let Some(entry) = ring.entry(feed) else {
            return;
        };
        if entry.availability != Availability::Over {
            entry.availability = Availability::Now;
            self.spawn_job(&mut ring);
            self.changed.notify_all();
        }
    }

    fn push(self: &Arc<Self>, ring: &mut Ring, feed: &Arc<Feed>) {
        let rayon = ring.threads.as_ref().map(|threads| &threads.rayon);
        let all = rayon.map_or(MAX_FEED_THREADS, ThreadPool::current_num_threads);
        let share = if self.is_shared { all / 2 } else { all };
        ring.feeds.push_back(Entry {
            feed: Arc::clone(feed),
            threads: feed.threads().min(share),
            slots: 0,
            availability: Availability::Now,
        });
        self.spawn_job(ring);
        self.changed.notify_all();
    }

    fn remove(&self, ring: &mut Ring, feed: &Arc<Feed>) {
        ring.feeds.retain(|entry| !Arc::ptr_eq(&entry.feed, feed));
        ring.retire_if_idle();
        self.changed.notify_all();
    }

    /// Spawns one more job, if there is a thread for it.
    fn spawn_job(self: &Arc<Self>, ring: &mut Ring) {
        let Some(threads) = &ring.threads else {
            return;
        };
        if ring.jobs < threads.rayon.current_num_threads() {
            ring.jobs += 1;
            let pool = Arc::clone(self);
            threads
                .rayon
                .spawn_fifo(move || aborting_on_panic(|| pool.run_job()));
        }
    }

    fn run_job(self: &Arc<Self>) {
        let mut ring = self.ring();
        loop {
            match ring.next(None) {
                NextTask::Now(at) => {
                    if let Some(assignment) = self.begin(&mut ring, at) {
                        drop(ring);
                        self.work(assignment);
                        ring = self.ring();
                    }
                }
                NextTask::Until(due) if !ring.has_waiter => {
                    ring.has_waiter = true;
                    ring = wait(&self.changed, ring, Some(due));
                    ring.has_waiter = false;
                }
                NextTask::Until(_) | NextTask::Unknown => break,
            }
        }
        ring.jobs -= 1;
        ring.retire_if_idle();
        self.changed.notify_all();
    }

    /// Starts a task of the entry at an index, and moves the entry to the end of the ring.
    fn begin(self: &Arc<Self>, ring: &mut Ring, at: usize) -> Option<Assignment> {
        let mut entry = ring.feeds.remove(at)?;
        let slot = entry.slots.trailing_ones();
        entry.slots |= 1 << slot;
        let feed = Arc::clone(&entry.feed);
        ring.feeds.push_back(entry);
        self.fetching.fetch_add(1, Relaxed);
        // While this thread runs the task, another must take care of the other feeds.
        match ring.next(None) {
            NextTask::Now(_) => self.spawn_job(ring),
            NextTask::Until(_) if !ring.has_waiter => self.spawn_job(ring),
            NextTask::Until(_) | NextTask::Unknown => {}
        }
        Some(Assignment {
            feed,
            slot: snaprestore_uffd::to_usize(slot.into()),
        })
    }

    fn work(&self, assignment: Assignment) {
        let Assignment { feed, slot } = assignment;
        let changes = feed.throttle_changes();
        let mut availability = feed.run_task(self, slot);
        self.fetching.fetch_sub(1, Relaxed);
        let mut ring = self.ring();
        // A change after this check calls `recheck`, which waits for the lock.
        if feed.throttle_changes() != changes && availability != Availability::Over {
            availability = Availability::Now;
        }
        let bit = 1 << slot;
        let Some(entry) = ring.entry(&feed) else {
            return;
        };
        // `leave` may have ended the feed meanwhile.
        if entry.availability != Availability::Over {
            entry.availability = availability;
        }
        let is_last = entry.slots == bit;
        let is_over = entry.availability == Availability::Over;
        if is_last && is_over {
            // The thread keeps its slot meanwhile: `leave` waits for it, so the session still
            // exists.
            drop(ring);
            feed.ended();
            ring = self.ring();
        }
        let Some(entry) = ring.entry(&feed) else {
            return;
        };
        entry.slots &= !bit;
        if is_last && is_over {
            self.remove(&mut ring, &feed);
        } else if is_last && entry.availability == Availability::Drained {
            entry.availability = Availability::Now;
        }
        self.changed.notify_all();
    }

    /// Waits, at most for [`MAX_YIELD`], while demand needs this thread's core: while faults being
    /// served and frames being prefetched are together more than there are cores.
    pub(super) fn yield_to_demand(&self, is_over: impl Fn() -> bool) {
        let demand = || self.demand.load(Relaxed);
        if demand() + self.fetching.load(Relaxed) <= self.cores {
            return;
        }
        self.fetching.fetch_sub(1, Relaxed);
        let begun = Instant::now();
        while demand() > 0
            && demand() + self.fetching.load(Relaxed) >= self.cores
            && !is_over()
            && begun.elapsed() < MAX_YIELD
        {
            std::thread::sleep(POLL_INTERVAL);
        }
        self.fetching.fetch_add(1, Relaxed);
    }

    /// Yields to demand like [`Pool::yield_to_demand`], in a thread that runs no task.
    pub(super) fn yield_briefly(&self, is_over: impl Fn() -> bool) {
        self.fetching.fetch_add(1, Relaxed);
        self.yield_to_demand(is_over);
        self.fetching.fetch_sub(1, Relaxed);
    }

    /// Waits until the threads have exited, if no feed is left.
    fn join_retired(&self, mut ring: MutexGuard<'_, Ring>) {
        while ring.feeds.is_empty() && ring.threads.is_some() {
            ring = wait(&self.changed, ring, None);
        }
        let retired = std::mem::take(&mut ring.retired);
        drop(ring);
        for thread in retired {
            // Never an error: a thread that panics aborts the process.
            let _ = thread.join();
        }
    }

    /// Locks the ring, which is consistent after every statement.
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait<'a>(
    signal: &Condvar,
    ring: MutexGuard<'a, Ring>,
    until: Option<Instant>,
) -> MutexGuard<'a, Ring> {
    let Some(until) = until else {
        return signal.wait(ring).unwrap_or_else(PoisonError::into_inner);
    };
    let left = until.saturating_duration_since(Instant::now());
    let waited = signal.wait_timeout(ring, left);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn prefetch_yields_to_faults_of_any_session() {
        let pool = Pool::new(None, true);
        pool.fetching.store(1, Relaxed);
        // It would continue after some time in any case, so the test checks whether it asks.
        let asks = || {
            let asked = Cell::new(false);
            pool.yield_to_demand(|| asked.replace(true) || asked.get());
            asked.get()
        };
        pool.demand().store(pool.cores, Relaxed);
        assert!(asks());
        pool.demand().store(0, Relaxed);
        assert!(!asks());
        assert_eq!(pool.fetching.load(Relaxed), 1);
    }
}
