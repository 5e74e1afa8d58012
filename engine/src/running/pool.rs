//! The threads that fetch ahead, for all sessions that share them.
//!
//! ```text
//!   session ─▶ feed ─┐            ┌─ snap-fetch-0 ─┐
//!   session ─▶ feed ─┼─▶ a ring ─▶┼─ snap-fetch-1 ─┼─▶ a small task of one feed, then one of the next
//!   session ─▶ feed ─┘            └─ ...          ─┘
//! ```
//!
//! The threads are started with the first feed, by the thread that adds it, and end with the last. No
//! more than [`Pool::limit`] are at work, and none of them while a fault of any session wants its core.
//!
//! An install can block for reasons that lie with the owner: its memory is limited, or it changes its
//! mappings all the time. So with more than one feed there are twice as many threads, and whenever no
//! task has begun or ended for [`STUCK_AFTER`] one more of them goes to work.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::feed::{Feed, Step};
use super::threads::{Hook, run};
use super::workers::Workers;

/// How long all threads may be at the same tasks until one more goes to work.
const STUCK_AFTER: Duration = Duration::from_millis(20);
/// The longest that prefetch waits for demand before a frame: an owner that faults all the time
/// must not stop it.
const MAX_STAND_BACK: Duration = Duration::from_micros(500);
/// How long it waits before it looks again.
const LOOK_AGAIN: Duration = Duration::from_micros(50);
/// Threads that may be at one feed at once: each has a bit of a word.
pub(super) const MAX_FEED_THREADS: usize = 64;

/// A pool of threads for prefetch, and what they decode with.
pub(crate) struct Pool {
    /// Faults that wait or are being served, in all sessions.
    demand: Arc<AtomicUsize>,
    /// Threads at a task, but for those that stand back.
    fetching: AtomicUsize,
    /// Threads that may be at a task at once.
    limit: AtomicUsize,
    cores: usize,
    hook: Option<Hook>,
    ring: Mutex<Ring>,
    /// A task may be had that could not before.
    changed: Condvar,
    /// A task has ended.
    done: Condvar,
    workers: Workers,
}

struct Ring {
    feeds: VecDeque<Entry>,
    /// Threads at a task.
    busy: usize,
    /// When a task last began or ended.
    moved: Instant,
    /// Threads of older generations end when they have nothing to do.
    generation: u64,
    threads: Vec<JoinHandle<()>>,
    /// Threads of older generations.
    retired: Vec<JoinHandle<()>>,
}

/// A feed in the ring.
struct Entry {
    feed: Arc<Feed>,
    /// One bit for each thread that is at a task of it.
    slots: u64,
    rest: Rest,
}

/// When the next task of a feed can be had.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rest {
    Ready,
    /// Not before then.
    Until(Instant),
    /// When those that were given out are done.
    Drained,
    /// Never.
    Over,
}

impl Entry {
    /// Whether all of its threads are at a task, so that one has to end first.
    fn is_full(&self) -> bool {
        crate::sys::to_usize(self.slots.count_ones().into()) >= self.feed.threads()
    }
}

impl Ring {
    /// The first entry that has a task now, or else the time when one will. With `only`, of no other
    /// feed.
    fn next(&self, only: Option<&Arc<Feed>>) -> Result<usize, Option<Instant>> {
        let now = Instant::now();
        let mut earliest: Option<Instant> = None;
        for (at, entry) in self.feeds.iter().enumerate() {
            if only.is_some_and(|only| !Arc::ptr_eq(only, &entry.feed)) {
                continue;
            }
            match entry.rest {
                _ if entry.is_full() => {}
                Rest::Until(due) if due > now => {
                    earliest = Some(earliest.map_or(due, |earliest| earliest.min(due)));
                }
                Rest::Ready | Rest::Until(_) => return Ok(at),
                Rest::Drained | Rest::Over => {}
            }
        }
        Err(earliest)
    }

    fn entry(&mut self, feed: &Arc<Feed>) -> Option<&mut Entry> {
        let mut entries = self.feeds.iter_mut();
        entries.find(|entry| Arc::ptr_eq(&entry.feed, feed))
    }

    /// Has the threads end if there is no feed left.
    fn retire_if_idle(&mut self) {
        if self.feeds.is_empty() && !self.threads.is_empty() {
            self.generation += 1;
            self.retired.append(&mut self.threads);
        }
    }
}

/// A thread's place at a task, which [`Pool::take`] gave.
pub(super) struct Task {
    feed: Arc<Feed>,
    slot: usize,
}

impl Pool {
    pub(super) fn new(hook: Option<Hook>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            demand: Arc::default(),
            fetching: AtomicUsize::new(0),
            limit: AtomicUsize::new(cores),
            cores,
            hook,
            ring: Mutex::new(Ring {
                feeds: VecDeque::new(),
                busy: 0,
                moved: Instant::now(),
                generation: 0,
                threads: Vec::new(),
                retired: Vec::new(),
            }),
            changed: Condvar::new(),
            done: Condvar::new(),
            workers: Workers::new(2 * cores + 2),
        }
    }

    /// Where sessions count the faults that wait.
    pub(super) fn demand(&self) -> &Arc<AtomicUsize> {
        &self.demand
    }

    /// What threads decode with.
    pub(super) fn workers(&self) -> &Workers {
        &self.workers
    }

    /// Adds a feed, and starts threads for it. The threads inherit the caller's signal mask.
    pub(super) fn add(self: &Arc<Self>, feed: &Arc<Feed>) -> io::Result<()> {
        let mut ring = self.ring();
        self.push(&mut ring, feed);
        let wanted: usize = ring.feeds.iter().map(|entry| entry.feed.threads()).sum();
        let limit = self.limit.load(Relaxed);
        let spare = if ring.feeds.len() > 1 { limit } else { 0 };
        while ring.threads.len() < wanted.min(limit) + spare {
            match self.start_thread(&ring) {
                Ok(thread) => ring.threads.push(thread),
                Err(error) if ring.threads.is_empty() => {
                    self.remove(&mut ring, feed);
                    return Err(error);
                }
                Err(error) => {
                    tracing::warn!(%error, "prefetch has fewer threads than it was told to");
                    break;
                }
            }
        }
        Ok(())
    }

    fn start_thread(self: &Arc<Self>, ring: &Ring) -> io::Result<JoinHandle<()>> {
        let name = format!("snap-fetch-{}", ring.threads.len());
        let (pool, generation) = (Arc::clone(self), ring.generation);
        Builder::new().name(name.clone()).spawn(move || {
            run(&name, None, pool.hook.as_ref(), || {
                while let Some(task) = pool.take(|ring| ring.generation == generation, None) {
                    pool.work(task);
                }
            });
        })
    }

    /// Works at `feed` in this thread, with those of the pool if there are any, until it is at its
    /// end. Threads that are not needed any more have ended then.
    pub(super) fn finish(&self, feed: &Arc<Feed>) {
        self.push(&mut self.ring(), feed);
        let is_there = |ring: &Ring| {
            ring.feeds
                .iter()
                .any(|entry| Arc::ptr_eq(&entry.feed, feed))
        };
        while let Some(task) = self.take(is_there, Some(feed)) {
            self.work(task);
        }
        join_retired(self.ring());
    }

    /// Takes a feed out whose session has ended. No thread is at it any more when this returns, and
    /// threads that are not needed any more have ended.
    pub(super) fn leave(&self, feed: &Arc<Feed>) {
        let mut ring = self.ring();
        while let Some(entry) = ring.entry(feed) {
            entry.rest = Rest::Over;
            if entry.slots == 0 {
                self.remove(&mut ring, feed);
                break;
            }
            ring = wait(&self.done, ring, None);
        }
        join_retired(ring);
    }

    fn push(&self, ring: &mut Ring, feed: &Arc<Feed>) {
        if ring.feeds.is_empty() {
            ring.moved = Instant::now();
        }
        ring.feeds.push_back(Entry {
            feed: Arc::clone(feed),
            slots: 0,
            rest: Rest::Ready,
        });
        self.update_limit(ring);
        self.changed.notify_all();
    }

    fn remove(&self, ring: &mut Ring, feed: &Arc<Feed>) {
        ring.feeds.retain(|entry| !Arc::ptr_eq(&entry.feed, feed));
        self.update_limit(ring);
        ring.retire_if_idle();
        self.changed.notify_all();
        self.done.notify_all();
    }

    fn update_limit(&self, ring: &Ring) {
        let most = ring.feeds.iter().map(|entry| entry.feed.threads()).max();
        self.limit.store(most.unwrap_or(0).max(self.cores), Relaxed);
    }

    /// Takes a task, in turn with the other feeds; waits for one while `goes_on`.
    fn take(&self, goes_on: impl Fn(&Ring) -> bool, only: Option<&Arc<Feed>>) -> Option<Task> {
        let mut ring = self.ring();
        while goes_on(&ring) {
            let until = match ring.next(only) {
                Ok(at) => {
                    let stuck = ring.moved + STUCK_AFTER;
                    let is_free = ring.busy < self.limit.load(Relaxed);
                    if is_free || Instant::now() >= stuck {
                        return self.begin(&mut ring, at);
                    }
                    Some(stuck)
                }
                Err(earliest) => earliest,
            };
            // Who works at one feed alone waits for those that are at it as well.
            let signal = if only.is_some() {
                &self.done
            } else {
                &self.changed
            };
            ring = wait(signal, ring, until);
        }
        None
    }

    /// Begins a task of the entry at a place, which goes to the end of the ring.
    fn begin(&self, ring: &mut Ring, at: usize) -> Option<Task> {
        let mut entry = ring.feeds.remove(at)?;
        let slot = entry.slots.trailing_ones();
        entry.slots |= 1 << slot;
        let feed = Arc::clone(&entry.feed);
        ring.feeds.push_back(entry);
        ring.busy += 1;
        ring.moved = Instant::now();
        self.fetching.fetch_add(1, Relaxed);
        Some(Task {
            feed,
            slot: crate::sys::to_usize(slot.into()),
        })
    }

    fn work(&self, task: Task) {
        let Task { feed, slot } = task;
        let step = feed.step(self, slot);
        self.fetching.fetch_sub(1, Relaxed);
        let mut ring = self.ring();
        ring.busy -= 1;
        ring.moved = Instant::now();
        let bit = 1 << slot;
        let Some(entry) = ring.entry(&feed) else {
            return;
        };
        let was_drained = entry.rest == Rest::Drained;
        // What a feed that is over says has no meaning.
        if entry.rest != Rest::Over {
            entry.rest = match step {
                Step::Did => Rest::Ready,
                Step::Until(due) => Rest::Until(due),
                Step::Drained => Rest::Drained,
                Step::Over => Rest::Over,
            };
        }
        let is_last = entry.slots == bit;
        let is_over = entry.rest == Rest::Over;
        if is_last && is_over {
            // The thread keeps its place, and so the session is there until it was told.
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
        } else if is_last && entry.rest == Rest::Drained {
            entry.rest = Rest::Ready;
        }
        // This thread takes the next task itself: others are woken if there may be more than one.
        if was_drained {
            self.changed.notify_all();
        } else if let Step::Until(_) = step {
            self.changed.notify_one();
        }
        self.done.notify_all();
    }

    /// Waits while demand wants this thread's core, but not for ever: faults being answered and
    /// frames being fetched are together no more than there may be fetched.
    pub(super) fn stand_back(&self, is_over: impl Fn() -> bool) {
        let demand = || self.demand.load(Relaxed);
        let limit = self.limit.load(Relaxed);
        if demand() + self.fetching.load(Relaxed) <= limit {
            return;
        }
        self.fetching.fetch_sub(1, Relaxed);
        let begun = Instant::now();
        while demand() > 0
            && demand() + self.fetching.load(Relaxed) >= limit
            && !is_over()
            && begun.elapsed() < MAX_STAND_BACK
        {
            std::thread::sleep(LOOK_AGAIN);
        }
        self.fetching.fetch_add(1, Relaxed);
    }

    /// The ring is whole after every statement.
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the threads that were told to end.
fn join_retired(mut ring: MutexGuard<'_, Ring>) {
    let retired = std::mem::take(&mut ring.retired);
    drop(ring);
    let current = std::thread::current().id();
    for thread in retired {
        // One that calls from a callback can't wait for itself. A thread that panics ends the process.
        if thread.thread().id() != current {
            let _ = thread.join();
        }
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
    fn prefetch_stands_back_for_the_faults_of_any_session() {
        let pool = Pool::new(None);
        pool.fetching.store(1, Relaxed);
        // It would go on after some time in any case, so what is looked at is whether it asks.
        let asks = || {
            let asked = Cell::new(false);
            pool.stand_back(|| asked.replace(true) || asked.get());
            asked.get()
        };
        pool.demand().store(pool.cores, Relaxed);
        assert!(asks());
        pool.demand().store(0, Relaxed);
        assert!(!asks());
        assert_eq!(pool.fetching.load(Relaxed), 1);
    }
}
