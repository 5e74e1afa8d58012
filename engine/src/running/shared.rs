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
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use snapshot_format::Snapshot;

use crate::session::{FrameCache, FrameCacheStats, SharedFrames};

/// How long nobody may be handed a turn until somebody has one more than may be.
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
            turns: Arc::new(Turns::new(most, LONGEST_WAIT)),
        }
    }

    /// For a session that shares nothing.
    pub(crate) fn alone(prefetch_threads: usize) -> Self {
        Self {
            frames: None,
            turns: Arc::new(Turns::new(prefetch_threads, LONGEST_WAIT)),
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
///
/// ```text
///   wait ──▶ fewer than may be: a turn ──────────────────────▶ dropped: the first who waits has it
///     └────▶ the end of the queue ──▶ first, and handed it ──┘
///                                └──▶ first, and nobody was handed one for some time: one more than may be
/// ```
#[derive(Debug)]
pub(crate) struct Turns {
    /// Threads whose turn it may be at once.
    most: usize,
    /// How long nobody may be handed a turn: those whose turn it is may be waiting for their owners.
    longest_wait: Duration,
    /// Faults that wait or are being served, in all sessions.
    demand: Arc<AtomicUsize>,
    /// Threads whose turn it is, but for those that stand back.
    fetching: AtomicUsize,
    queue: Mutex<Queue>,
}

#[derive(Debug)]
struct Queue {
    taken: usize,
    waiting: VecDeque<Arc<Waiter>>,
    /// When somebody was handed a turn last.
    moved: Instant,
}

/// A thread that waits.
#[derive(Debug)]
struct Waiter {
    thread: Thread,
    has_turn: AtomicBool,
}

impl Turns {
    fn new(most: usize, longest_wait: Duration) -> Self {
        Self {
            most,
            longest_wait,
            demand: Arc::default(),
            fetching: AtomicUsize::new(0),
            queue: Mutex::new(Queue {
                taken: 0,
                waiting: VecDeque::new(),
                moved: Instant::now(),
            }),
        }
    }

    /// Where sessions count the faults that wait.
    pub(crate) fn demand(&self) -> &Arc<AtomicUsize> {
        &self.demand
    }

    /// Waits for a turn: who came first has it first. None if it is over before.
    pub(crate) fn wait(&self, is_over: impl Fn() -> bool) -> Option<Turn<'_>> {
        let mut queue = self.queue();
        if queue.taken < self.most && queue.waiting.is_empty() {
            queue.taken += 1;
            return Some(self.begin());
        }
        let waiter = Arc::new(Waiter {
            thread: std::thread::current(),
            has_turn: AtomicBool::new(false),
        });
        if queue.waiting.is_empty() {
            queue.moved = Instant::now();
        }
        queue.waiting.push_back(Arc::clone(&waiter));
        drop(queue);
        loop {
            std::thread::park_timeout(self.longest_wait);
            let mut queue = self.queue();
            if waiter.has_turn.load(Relaxed) {
                return Some(self.begin());
            }
            let is_first = queue
                .waiting
                .front()
                .is_some_and(|first| Arc::ptr_eq(first, &waiter));
            if is_over() {
                queue.waiting.retain(|other| !Arc::ptr_eq(other, &waiter));
                return None;
            }
            if is_first && queue.moved.elapsed() >= self.longest_wait {
                queue.hand_on();
            }
        }
    }

    fn begin(&self) -> Turn<'_> {
        self.fetching.fetch_add(1, Relaxed);
        Turn(self)
    }

    /// The queue is whole after every statement.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Gives a turn to the first who waits.
    fn hand_on(&mut self) {
        if let Some(first) = self.waiting.pop_front() {
            self.taken += 1;
            self.moved = Instant::now();
            // Read under the same lock.
            first.has_turn.store(true, Relaxed);
            first.thread.unpark();
        }
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
        if queue.taken < self.0.most {
            queue.hand_on();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::mpsc::channel;

    use super::*;

    const NEVER: Duration = Duration::from_secs(3600);

    #[test]
    fn turns_are_had_in_the_order_of_coming_and_no_more_at_once_than_may_be() {
        let turns = Turns::new(2, NEVER);
        let wait = || turns.wait(|| false).unwrap();
        let (one, other) = (wait(), wait());
        let (tell, told) = channel();
        std::thread::scope(|scope| {
            for number in 0..3 {
                let (turns, tell) = (&turns, tell.clone());
                scope.spawn(move || {
                    let turn = turns.wait(|| false);
                    tell.send((number, turns.queue().taken)).unwrap();
                    drop(turn);
                });
                while turns.queue().waiting.len() <= number {
                    std::thread::yield_now();
                }
            }
            assert!(told.try_recv().is_err());
            drop(one);
            for number in 0..3 {
                assert_eq!(told.recv().unwrap(), (number, 2));
            }
            drop(other);
        });
        assert_eq!(turns.queue().taken, 0);
        assert_eq!(turns.fetching.load(Relaxed), 0);
    }

    #[test]
    fn nobody_waits_for_ever_for_a_turn_that_is_not_given_back() {
        let turns = Turns::new(1, Duration::from_millis(1));
        let _kept = turns.wait(|| false);
        let _another = turns.wait(|| false).unwrap();
        assert_eq!(turns.queue().taken, 2);
        assert!(turns.wait(|| true).is_none());
        assert!(turns.queue().waiting.is_empty());
    }

    #[test]
    fn who_fetches_stands_back_for_the_faults_of_any_session() {
        let turns = Turns::new(2, NEVER);
        let turn = turns.wait(|| false).unwrap();
        // It would go on after some time in any case, so what is looked at is whether it asks.
        let asks = || {
            let asked = Cell::new(false);
            turn.stand_back(|| asked.replace(true) || asked.get());
            asked.get()
        };
        turns.demand().store(2, Relaxed);
        assert!(asks());
        turns.demand().store(0, Relaxed);
        assert!(!asks());
    }
}
