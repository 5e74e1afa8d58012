//! Threads over a session, whichever door it came through.
//!
//! ```text
//!   Crew::start ──▶ snap-fault-N ──▶ serve faults until the session ends
//!               └─▶ snap-feed ─────▶ hands blocks to snap-fetch-N, until all is there
//!   the last fault thread of a complete session closes it
//! ```

mod feeder;
mod shared;
mod stats;
mod threads;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::AcqRel, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use snapshot_format::Reason;

use crate::session::{Durations, Kernel, Left, PrefetchStop, Session, SnapshotImage, Worker};

use feeder::in_blocks;
pub use shared::Shared;
use shared::Turns;
pub use stats::{FaultKinds, FaultTimes, PageCounts, Stats};
pub use threads::SYSTEM_CALLS;
pub(crate) use threads::{Body, Crew, ThreadError, Threads, crew_options};

/// What is fetched before it is touched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefetch {
    /// Nothing: pages come when they are touched.
    Off,
    /// The snapshot's working sets, in their order. Nothing if it has none.
    WorkingSet,
    /// These page numbers, in this order.
    Pages(Vec<Range<u64>>),
    /// The working sets, then everything else in address order.
    All,
}

/// How often [`Running::install_rest`] looks for pages that are left without a failure.
const MOST_TRIES: u32 = 10_000;

/// How long [`Running::install_rest`] goes on when there is no memory for any page.
const SHORTAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a waiter looks at what no notification tells.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What is done with a session that is complete, after the kernel has it no more.
pub(crate) type OnComplete = Box<dyn Fn(&Session<Kernel, SnapshotImage>) + Send + Sync>;

/// A session, and what its threads and those who wait for them share.
pub(crate) struct Running {
    pub(crate) session: Session<Kernel, SnapshotImage>,
    begun: Instant,
    on_complete: OnComplete,
    turns: Arc<Turns>,
    fault_threads: AtomicUsize,
    complete_nanos: AtomicU64,
    progress: Mutex<Progress>,
    changed: Condvar,
}

/// What a waiter waits for.
#[derive(Debug, Default)]
struct Progress {
    served_out: bool,
    prefetched: bool,
}

impl Running {
    pub(crate) fn new(
        mut session: Session<Kernel, SnapshotImage>,
        begun: Instant,
        crew: &Crew,
        on_complete: OnComplete,
    ) -> Self {
        let turns = Arc::clone(crew.shared().turns());
        session.inbox.count_in(turns.demand());
        Self {
            session,
            begun,
            on_complete,
            turns,
            fault_threads: AtomicUsize::new(crew.fault_threads),
            complete_nanos: AtomicU64::new(0),
            progress: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The last fault thread closes a complete session.
    fn fault_thread_ends(&self) {
        if self.fault_threads.fetch_sub(1, AcqRel) > 1 {
            return;
        }
        self.session.inbox.abandon();
        if self.session.is_complete() {
            self.session.platform.close();
            let nanos = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            (self.on_complete)(&self.session);
            self.complete_nanos.store(nanos.max(1), Relaxed);
        }
        self.update(|progress| progress.served_out = true);
    }

    fn prefetch_ended(&self) {
        self.update(|progress| progress.prefetched = true);
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Whether every page is there (or was discarded, or poisoned) and the memory is unregistered.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete_nanos.load(Relaxed) != 0
    }

    /// Waits until nobody serves faults any more.
    pub(crate) fn wait_served_out(&self) {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let serves = |progress: &mut Progress| !progress.served_out;
        drop(self.changed.wait_while(progress, serves));
    }

    /// Waits until the session is complete, or its prefetch is at its end without that. While a touch
    /// waits for its page, or for a verdict about it, it isn't known which, and is waited for. True if
    /// it is complete.
    pub(crate) fn wait_complete(&self) -> bool {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        // Whether all pages may be settled is not told by a notification, so it is looked at now
        // and then.
        while !progress.served_out && (!progress.prefetched || self.may_complete_yet()) {
            let waited = self.changed.wait_timeout(progress, LOOK_AGAIN);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(progress);
        self.is_complete()
    }

    /// Whether the last pages may be there, or be on their way: a page is marked only after its
    /// toucher was woken, and only then is its fault no longer open. So faults are looked at first.
    fn may_complete_yet(&self) -> bool {
        self.session.inbox.has_open() || self.session.state.may_be_settled()
    }

    /// Installs what is missing, in this thread. False if some of it can't be, or the owner keeps
    /// changing its memory; otherwise the session is ending, complete or not.
    pub(crate) fn install_rest(&self) -> bool {
        let session = &self.session;
        // A thread of the caller's, of which nobody keeps note.
        let mut worker = Worker::new(session.image.decoder(Reason::Prefetch), usize::MAX);
        let mut short_since = (u64::MAX, Instant::now());
        for _ in 0..MOST_TRIES {
            match self.install_once(&mut worker) {
                Ok(left) if left.short > 0 => {
                    let missing = session.state.unsettled();
                    if missing < short_since.0 {
                        short_since = (missing, Instant::now());
                    } else if short_since.1.elapsed() >= SHORTAGE_TIMEOUT {
                        return false;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                // What somebody else is bringing, prefetch or a fault thread, is there soon.
                Ok(left) if left.busy > 0 => std::thread::sleep(Duration::from_millis(1)),
                Ok(left) if left.failed == 0 => {
                    session.kick();
                    return true;
                }
                Err(PrefetchStop::Ending) => return true,
                Ok(_) | Err(PrefetchStop::Kernel) => return false,
            }
        }
        false
    }

    /// Tries to install each page that is missing, block by block, by turns with others. Ends where there is no memory.
    fn install_once(&self, worker: &mut Worker<SnapshotImage>) -> Result<Left, PrefetchStop> {
        let session = &self.session;
        let mut all = Left::default();
        for pages in in_blocks(0..session.image.snapshot().page_slots()) {
            if !session.state.any_absent(pages.clone()) {
                continue;
            }
            let Some(turn) = self.turns.wait(|| session.is_ending()) else {
                return Err(PrefetchStop::Ending);
            };
            let pause = || turn.stand_back(|| session.is_ending());
            all.add(session.prefetch(worker, pages, pause)?);
            if all.short > 0 {
                break;
            }
        }
        Ok(all)
    }

    /// What was done so far, but for what only the door knows.
    pub(crate) fn stats(&self) -> Stats {
        let stats = &self.session.stats;
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        let pages = |pages: &crate::session::Pages| PageCounts {
            copied: read(&pages.copied),
            filled: read(&pages.filled),
            zeroed: read(&pages.zeroed),
        };
        let complete = read(&self.complete_nanos);
        Stats {
            mapped: Duration::ZERO,
            complete: (complete != 0).then(|| Duration::from_nanos(complete)),
            faults: read(&stats.faults),
            fault_time: Durations::of(&stats.fault_times.all()).percentiles(),
            fault_kinds: FaultKinds {
                stored: read(&stats.kinds.stored),
                fill: read(&stats.kinds.fill),
                removed: read(&stats.kinds.removed),
                present: read(&stats.kinds.present),
                poisoned: read(&stats.kinds.poisoned),
                outside: read(&stats.kinds.outside),
            },
            fault_times: FaultTimes {
                all: Durations::of(&stats.fault_times.all()),
                nowhere: stats.fault_times.nowhere.durations(),
                fill: stats.fault_times.fill.durations(),
                read: stats.fault_times.read.durations(),
                cached: stats.fault_times.cached.durations(),
                another: stats.fault_times.another.durations(),
            },
            pages: self.session.image.snapshot().summary().pages,
            missing: self.session.state.unsettled(),
            demand: pages(&stats.demand),
            prefetch: pages(&stats.prefetch),
            left_to_kernel: 0,
            poisoned: read(&stats.poisoned),
            events: read(&stats.events),
            retries: read(&stats.retries),
            shortages: read(&stats.shortages),
            huge_shortages: read(&stats.large_shortages),
            bytes_read: self.session.image.bytes_read(),
            bytes_decoded: self.session.image.bytes_decoded(),
            failures: self.session.failures().1,
        }
    }
}
