//! The prefetcher: one rayon pool, which fetches ahead for all sessions that share it.
//!
//! ```text
//!   session ─▶ feed ─┐            ┌─ snap-fetch-0 ─┐
//!   session ─▶ feed ─┼─▶ a ring ─▶┼─ snap-fetch-1 ─┼─▶ a small task of one feed, then one of the next
//!   session ─▶ feed ─┘            └─ ...          ─┘
//! ```
//!
//! A job of the rayon pool is a turn: it does tasks, whichever feed's they are, until there is none.
//! Sessions take turns because of the ring: rayon prefers what its own threads have spawned to what
//! comes from outside, so with a job for each feed the first would keep the others waiting.
//!
//! An install can block for reasons that lie with the owner: its memory is limited, or it changes its
//! mappings all the time. So a feed gets at most half of the threads of a pool that others may share.
//! The threads start with the first feed, in the thread that adds it, and end with the last.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::contexts::Workers;
use super::session_prefetch::{Feed, Step};
use super::threads::{Hook, aborting_on_panic, run};

/// The longest that prefetch waits for demand before a frame: an owner that faults all the time
/// must not stop it.
const MAX_STAND_BACK: Duration = Duration::from_micros(500);
/// How long it waits before it looks again.
const POLL_INTERVAL: Duration = Duration::from_micros(50);
/// Threads that may be at one feed at once: each has a bit of a word.
pub(super) const MAX_FEED_THREADS: usize = 64;

/// The prefetch of all sessions that share it, and what they decode with.
pub(crate) struct Pool {
    /// Faults that wait or are being served, in all sessions.
    demand: Arc<AtomicUsize>,
    /// Threads at a task, but for those that stand back.
    fetching: AtomicUsize,
    cores: usize,
    /// Whether several sessions may have it.
    is_shared: bool,
    hook: Option<Hook>,
    ring: Mutex<Ring>,
    /// A task may be had that could not before, a task has ended, or the threads have.
    changed: Condvar,
    workers: Workers,
}

#[derive(Default)]
struct Ring {
    feeds: VecDeque<Entry>,
    threads: Option<Threads>,
    /// Jobs of the rayon pool.
    turns: usize,
    /// Whether one of them waits for a feed that rests.
    has_waiter: bool,
    /// Threads that end.
    retired: Vec<JoinHandle<()>>,
}

struct Threads {
    rayon: ThreadPool,
    handles: Vec<JoinHandle<()>>,
}

/// A feed in the ring.
struct Entry {
    feed: Arc<Feed>,
    /// Threads that may be at a task of it.
    threads: usize,
    /// One bit for each thread that is.
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

/// When there is a task.
enum Next {
    /// Now, of the entry at this place.
    Now(usize),
    /// Not before then.
    Until(Instant),
    /// When a task ends or a feed is added, if ever.
    Unknown,
}

impl Ring {
    /// When there is a task. With `only`, one of that feed.
    fn next(&self, only: Option<&Arc<Feed>>) -> Next {
        let now = Instant::now();
        let mut earliest: Option<Instant> = None;
        for (at, entry) in self.feeds.iter().enumerate() {
            if only.is_some_and(|only| !Arc::ptr_eq(only, &entry.feed)) {
                continue;
            }
            // With all of its threads at a task, one has to end first.
            let is_full =
                snaprestore_uffd::to_usize(entry.slots.count_ones().into()) >= entry.threads;
            match entry.rest {
                _ if is_full => {}
                Rest::Until(due) if due > now => {
                    earliest = Some(earliest.map_or(due, |earliest| earliest.min(due)));
                }
                Rest::Ready | Rest::Until(_) => return Next::Now(at),
                Rest::Drained | Rest::Over => {}
            }
        }
        earliest.map_or(Next::Unknown, Next::Until)
    }

    fn entry(&mut self, feed: &Arc<Feed>) -> Option<&mut Entry> {
        let mut entries = self.feeds.iter_mut();
        entries.find(|entry| Arc::ptr_eq(&entry.feed, feed))
    }

    /// Has the threads end if there is no feed left and no turn.
    fn retire_if_idle(&mut self) {
        if self.feeds.is_empty()
            && self.turns == 0
            && let Some(threads) = self.threads.take()
        {
            self.retired.extend(threads.handles);
        }
    }
}

/// A thread's place at a task, which [`Pool::begin`] gave.
struct Task {
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

    /// Adds a feed, and starts the threads if there are none. They inherit the caller's signal mask.
    pub(super) fn add(self: &Arc<Self>, feed: &Arc<Feed>) -> io::Result<()> {
        let mut ring = self.ring();
        if ring.threads.is_none() {
            ring.threads = Some(self.start_threads(feed)?);
        }
        self.push(&mut ring, feed);
        Ok(())
    }

    /// The threads that a first feed starts that may have so many at work.
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

    /// Works at `feed` in this thread, with those of the pool if there are any, until it is at its
    /// end. Threads that are not needed any more have ended then.
    pub(super) fn finish(self: &Arc<Self>, feed: &Arc<Feed>) {
        let mut ring = self.ring();
        self.push(&mut ring, feed);
        while ring.entry(feed).is_some() {
            match ring.next(Some(feed)) {
                Next::Now(at) => {
                    if let Some(task) = self.begin(&mut ring, at) {
                        drop(ring);
                        self.work(task);
                        ring = self.ring();
                    }
                }
                Next::Until(due) => ring = wait(&self.changed, ring, Some(due)),
                Next::Unknown => ring = wait(&self.changed, ring, None),
            }
        }
        self.join_retired(ring);
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
            ring = wait(&self.changed, ring, None);
        }
        self.join_retired(ring);
    }

    fn push(self: &Arc<Self>, ring: &mut Ring, feed: &Arc<Feed>) {
        let rayon = ring.threads.as_ref().map(|threads| &threads.rayon);
        let all = rayon.map_or(MAX_FEED_THREADS, ThreadPool::current_num_threads);
        let share = if self.is_shared { all / 2 } else { all };
        ring.feeds.push_back(Entry {
            feed: Arc::clone(feed),
            threads: feed.threads().min(share),
            slots: 0,
            rest: Rest::Ready,
        });
        self.spawn_turn(ring);
        self.changed.notify_all();
    }

    fn remove(&self, ring: &mut Ring, feed: &Arc<Feed>) {
        ring.feeds.retain(|entry| !Arc::ptr_eq(&entry.feed, feed));
        ring.retire_if_idle();
        self.changed.notify_all();
    }

    /// One more turn, if there is a thread for it.
    fn spawn_turn(self: &Arc<Self>, ring: &mut Ring) {
        let Some(threads) = &ring.threads else {
            return;
        };
        if ring.turns < threads.rayon.current_num_threads() {
            ring.turns += 1;
            let pool = Arc::clone(self);
            threads
                .rayon
                .spawn_fifo(move || aborting_on_panic(|| pool.turn()));
        }
    }

    fn turn(self: &Arc<Self>) {
        let mut ring = self.ring();
        loop {
            match ring.next(None) {
                Next::Now(at) => {
                    if let Some(task) = self.begin(&mut ring, at) {
                        drop(ring);
                        self.work(task);
                        ring = self.ring();
                    }
                }
                Next::Until(due) if !ring.has_waiter => {
                    ring.has_waiter = true;
                    ring = wait(&self.changed, ring, Some(due));
                    ring.has_waiter = false;
                }
                Next::Until(_) | Next::Unknown => break,
            }
        }
        ring.turns -= 1;
        ring.retire_if_idle();
        self.changed.notify_all();
    }

    /// Begins a task of the entry at a place, which goes to the end of the ring.
    fn begin(self: &Arc<Self>, ring: &mut Ring, at: usize) -> Option<Task> {
        let mut entry = ring.feeds.remove(at)?;
        let slot = entry.slots.trailing_ones();
        entry.slots |= 1 << slot;
        let feed = Arc::clone(&entry.feed);
        ring.feeds.push_back(entry);
        self.fetching.fetch_add(1, Relaxed);
        // While this thread is at it, another has to see to what else there is.
        match ring.next(None) {
            Next::Now(_) => self.spawn_turn(ring),
            Next::Until(_) if !ring.has_waiter => self.spawn_turn(ring),
            Next::Until(_) | Next::Unknown => {}
        }
        Some(Task {
            feed,
            slot: snaprestore_uffd::to_usize(slot.into()),
        })
    }

    fn work(&self, task: Task) {
        let Task { feed, slot } = task;
        let step = feed.step(self, slot);
        self.fetching.fetch_sub(1, Relaxed);
        let mut ring = self.ring();
        let bit = 1 << slot;
        let Some(entry) = ring.entry(&feed) else {
            return;
        };
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
        self.changed.notify_all();
    }

    /// Waits while demand wants this thread's core, but not for ever: faults being answered and
    /// frames being fetched are together no more than there are cores.
    pub(super) fn stand_back(&self, is_over: impl Fn() -> bool) {
        let demand = || self.demand.load(Relaxed);
        if demand() + self.fetching.load(Relaxed) <= self.cores {
            return;
        }
        self.fetching.fetch_sub(1, Relaxed);
        let begun = Instant::now();
        while demand() > 0
            && demand() + self.fetching.load(Relaxed) >= self.cores
            && !is_over()
            && begun.elapsed() < MAX_STAND_BACK
        {
            std::thread::sleep(POLL_INTERVAL);
        }
        self.fetching.fetch_add(1, Relaxed);
    }

    /// Waits until the threads have ended, if there is no feed left.
    fn join_retired(&self, mut ring: MutexGuard<'_, Ring>) {
        while ring.feeds.is_empty() && ring.threads.is_some() {
            ring = wait(&self.changed, ring, None);
        }
        let retired = std::mem::take(&mut ring.retired);
        drop(ring);
        for thread in retired {
            // A thread that panics ends the process.
            let _ = thread.join();
        }
    }

    /// The ring is whole after every statement.
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
    fn prefetch_stands_back_for_the_faults_of_any_session() {
        let pool = Pool::new(None, true);
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
