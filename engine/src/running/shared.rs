//! What the sessions of one process share.
//!
//! ```text
//!   session ─┐                        ┌─ frames that one has decoded are there for all
//!   session ─┼─ Shared ───────────────┼─ who fetches ahead: as many threads at once as there are cores, in turn
//!   session ─┘                        └─ and none of them while a fault of any session wants its core
//! ```
//!
//! Each session has threads of its own all the same. An install can take long for reasons that lie with the owner:
//! its memory is limited, or it changes its mappings all the time. In a pool for all that would hold up the others.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use snapshot_format::Snapshot;

use crate::session::{FrameCache, FrameCacheStats, SharedFrames};

/// How long a thread waits for its turn, at most: those whose turn it is may be waiting for their owners.
const LONGEST_WAIT: Duration = Duration::from_millis(20);
/// The longest that prefetch waits for demand before a frame: an owner that faults all the time
/// must not stop it.
const LONGEST_STAND_BACK: Duration = Duration::from_micros(500);
/// How long it waits before it looks again.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// What the sessions of one process share: decoded frames, and the processor's time for fetching ahead.
#[derive(Clone)]
pub struct Shared {
    frames: Option<Arc<FrameCache>>,
    turns: Arc<Turns>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("frame_cache", &self.frame_cache())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Keeps decoded frames of `frame_cache` bytes together; 0 keeps none. A frame larger than a quarter of it
    /// is not kept. Each thread of a session may hold 2 MiB beyond that.
    pub fn new(frame_cache: u64) -> Self {
        let frames = (frame_cache > 0).then(|| Arc::new(FrameCache::new(frame_cache)));
        let most = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            frames,
            turns: Arc::new(Turns::new(most)),
        }
    }

    /// For a session that shares nothing.
    pub(crate) fn alone(prefetch_threads: usize) -> Self {
        Self {
            frames: None,
            turns: Arc::new(Turns::new(prefetch_threads)),
        }
    }

    /// What the cache of frames holds, and what it was good for. All zero if there is none.
    pub fn frame_cache(&self) -> FrameCacheStats {
        let frames = self.frames.as_ref();
        frames.map(|frames| frames.stats()).unwrap_or_default()
    }

    /// Drops the frames of snapshots that nobody has open any more; a new session does the same.
    pub fn forget_closed(&self) {
        if let Some(frames) = &self.frames {
            frames.forget_closed();
        }
    }

    pub(crate) fn frames(&self, snapshot: &Arc<Snapshot>) -> Option<SharedFrames> {
        let frames = self.frames.as_ref()?;
        Some(SharedFrames::new(frames, snapshot))
    }

    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }
}

/// Whose turn it is to fetch ahead.
#[derive(Debug)]
pub(crate) struct Turns {
    /// Threads whose turn it may be at once.
    most: usize,
    /// Faults that wait or are being served, in all sessions.
    demand: Arc<AtomicUsize>,
    /// Threads whose turn it is, but for those that stand back.
    fetching: AtomicUsize,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    taken: usize,
    next: u64,
    waiting: VecDeque<u64>,
}

impl Turns {
    fn new(most: usize) -> Self {
        Self {
            most,
            demand: Arc::default(),
            fetching: AtomicUsize::new(0),
            queue: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Where sessions count the faults that wait.
    pub(crate) fn demand(&self) -> &Arc<AtomicUsize> {
        &self.demand
    }

    /// Waits for a turn: who came first has it first.
    pub(crate) fn wait(&self) -> Turn<'_> {
        let mut queue = self.queue();
        if queue.taken >= self.most || !queue.waiting.is_empty() {
            let ticket = queue.next;
            queue.next += 1;
            queue.waiting.push_back(ticket);
            let until = Instant::now() + LONGEST_WAIT;
            loop {
                let left = until.saturating_duration_since(Instant::now());
                let is_next = queue.waiting.front() == Some(&ticket);
                if left.is_zero() || is_next && queue.taken < self.most {
                    break;
                }
                let waited = self.changed.wait_timeout(queue, left);
                queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            queue.waiting.retain(|other| *other != ticket);
            // The one behind may have its turn as well.
            self.changed.notify_all();
        }
        queue.taken += 1;
        drop(queue);
        self.fetching.fetch_add(1, Relaxed);
        Turn(self)
    }

    /// The queue is whole after every statement.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn, until dropped.
pub(crate) struct Turn<'a>(&'a Turns);

impl Turn<'_> {
    /// Waits while demand wants this thread's core, but not for ever: faults being answered and frames being
    /// fetched are together no more than there may be fetched.
    pub(crate) fn stand_back(&self, is_over: impl Fn() -> bool) {
        let turns = self.0;
        let demand = || turns.demand.load(Relaxed);
        if demand() + turns.fetching.load(Relaxed) <= turns.most {
            return;
        }
        turns.fetching.fetch_sub(1, Relaxed);
        let begun = Instant::now();
        while demand() > 0
            && demand() + turns.fetching.load(Relaxed) >= turns.most
            && !is_over()
            && begun.elapsed() < LONGEST_STAND_BACK
        {
            std::thread::sleep(LOOK_AGAIN);
        }
        turns.fetching.fetch_add(1, Relaxed);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.fetching.fetch_sub(1, Relaxed);
        let mut queue = self.0.queue();
        queue.taken -= 1;
        if !queue.waiting.is_empty() {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn turns_are_had_in_the_order_of_coming_and_no_more_at_once_than_may_be() {
        let turns = Turns::new(2);
        let (one, other) = (turns.wait(), turns.wait());
        let (tell, arrived) = channel();
        std::thread::scope(|scope| {
            for number in 0..3 {
                let (turns, tell) = (&turns, tell.clone());
                scope.spawn(move || {
                    let turn = turns.wait();
                    assert!(turns.queue().taken <= 2, "{number}");
                    tell.send(number).unwrap();
                    drop(turn);
                });
                while turns.queue().waiting.len() <= number {
                    std::thread::yield_now();
                }
            }
            assert!(arrived.try_recv().is_err());
            drop(one);
            let order: Vec<usize> = (0..3).map(|_| arrived.recv().unwrap()).collect();
            assert_eq!(order, [0, 1, 2]);
            drop(other);
        });
        assert_eq!(turns.queue().taken, 0);
        assert_eq!(turns.fetching.load(Relaxed), 0);
    }

    #[test]
    fn nobody_waits_for_ever_for_a_turn_that_is_not_given_back() {
        let turns = Turns::new(1);
        let _kept = turns.wait();
        let _another = turns.wait();
        assert_eq!(turns.queue().taken, 2);
        assert!(turns.queue().waiting.is_empty());
    }

    #[test]
    fn who_fetches_stands_back_for_the_faults_of_any_session() {
        let turns = Turns::new(2);
        let turn = turns.wait();
        turns.demand().store(2, Relaxed);
        // It would go on after some time in any case, so what is looked at is whether it asks.
        let asked = std::cell::Cell::new(false);
        turn.stand_back(|| {
            asked.set(true);
            true
        });
        assert!(asked.get());
        turns.demand().store(0, Relaxed);
        asked.set(false);
        turn.stand_back(|| {
            asked.set(true);
            true
        });
        assert!(!asked.get());
    }
}
