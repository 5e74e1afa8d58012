//! Threads that run a session, whether it restores into this process or pages another.
//!
//! ```text
//!   ThreadOptions::start ──▶ snap-fault-N ──▶ serve faults until the session ends
//!                        └─▶ feed ──────────▶ tasks for the pool of all sessions, until all pages
//!                                             are present
//!   the last fault thread of a complete session closes it
//! ```

mod contexts;
mod prefetcher;
mod recording;
mod session_prefetch;
mod shared;
mod threads;
mod throttle;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::AcqRel, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use snapshot_format::trace::TraceEnd;

use crate::session::{Image as _, Kernel, PAGE, Session, SnapshotImage};
use crate::stats::{Durations, RunRecord, Stats};
use snaprestore_uffd::memory::{Advice, advise_at};
use snaprestore_uffd::os::trim_heap;
use snaprestore_uffd::to_usize;

use prefetcher::Pool;
pub use recording::{RecordError, Recording};
use session_prefetch::{Feed, Plan};
pub use shared::Shared;
pub use threads::SYSTEM_CALLS;
pub(crate) use threads::{Body, ThreadError, ThreadOptions, Threads};
pub(crate) use throttle::PausedBy;
use throttle::Throttle;

/// Pages that are loaded before they are touched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefetch {
    /// No pages: they are loaded when they are touched.
    Off,
    /// The snapshot's working sets, in their order, or the one that was selected. No pages if it
    /// has none.
    WorkingSet,
    /// These page numbers, in this order.
    Pages(Vec<Range<u64>>),
    /// The working sets, then everything else in address order. When the restore is complete, long
    /// zero runs that were left to the kernel are mapped as well, which takes page tables only.
    All,
}

/// Thread number of threads that have no entry in the session's tables.
const UNNUMBERED: usize = usize::MAX / 2;

/// Time after which threads that must exit are left behind, because a callback or a read does not
/// return.
const LEAVING_TIMEOUT: Duration = Duration::from_secs(2);

/// Interval at which a waiter checks for what no notification announces.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Number of bytes of zeros that are mapped at once, which takes less than a millisecond.
const MAP_BYTES: u64 = 8 << 20;

/// A callback for a session that is complete, after the kernel has its memory back.
pub(crate) type OnComplete = Box<dyn Fn(&Session<Kernel, SnapshotImage>) + Send + Sync>;

/// A session, and the state that its threads and their waiters share.
pub(crate) struct Runtime {
    pub(crate) session: Session<Kernel, SnapshotImage>,
    begun: Instant,
    /// Addresses of zeros that were left to the kernel, to map once the session is complete. They
    /// are the engine's own memory, which stays mapped as long as threads are not left behind.
    zeros: Vec<Range<u64>>,
    /// Set when the threads must end.
    stopping: AtomicBool,
    on_complete: OnComplete,
    pool: Arc<Pool>,
    /// The prefetch of this session, if there is one.
    feed: OnceLock<Arc<Feed>>,
    prefetch_threads: usize,
    /// The throttle of that prefetch.
    throttle: Throttle,
    /// The session's use of the pool, until nobody serves faults any more.
    user: Mutex<Option<contexts::PoolUser>>,
    fault_threads: AtomicUsize,
    /// The process that started the session.
    pid: u32,
    complete_nanos: AtomicU64,
    progress: Mutex<Milestones>,
    changed: Condvar,
    /// Dropped after everything else.
    _count: SessionCount,
}

/// A session of this process. When the last one is dropped, the memory that sessions took is
/// returned to the system.
struct SessionCount;

/// Number of sessions in this process.
static SESSIONS: AtomicUsize = AtomicUsize::new(0);

impl SessionCount {
    fn new() -> Self {
        SESSIONS.fetch_add(1, Relaxed);
        Self
    }
}

impl Drop for SessionCount {
    fn drop(&mut self) {
        if SESSIONS.fetch_sub(1, AcqRel) == 1 {
            trim_heap();
        }
    }
}

/// The events of a session that callers wait for.
#[derive(Debug, Default)]
struct Milestones {
    served_out: bool,
    prefetched: bool,
    /// Whether some threads were left behind; the memory may then belong to somebody else.
    left_behind: bool,
}

impl Runtime {
    pub(crate) fn new(
        mut session: Session<Kernel, SnapshotImage>,
        begun: Instant,
        options: &ThreadOptions,
        zeros: Vec<Range<u64>>,
        on_complete: OnComplete,
    ) -> Self {
        let pool = Arc::clone(options.shared().pool());
        session.queue.count_in(pool.demand());
        session.retry_timeout = options.retry_timeout;
        session.begun = begun;
        Self {
            session,
            begun,
            zeros,
            stopping: AtomicBool::new(false),
            on_complete,
            user: Mutex::new(Some(contexts::PoolUser::new(&pool))),
            pool,
            feed: OnceLock::new(),
            prefetch_threads: options.prefetch_threads,
            throttle: Throttle::new(options.prefetch_bandwidth),
            fault_threads: AtomicUsize::new(options.fault_threads),
            pid: std::process::id(),
            complete_nanos: AtomicU64::new(0),
            progress: Mutex::default(),
            changed: Condvar::new(),
            _count: SessionCount::new(),
        }
    }

    /// Counts an exiting fault thread. The last one closes a complete session.
    fn fault_thread_ends(&self) {
        if self.fault_threads.fetch_sub(1, AcqRel) > 1 {
            return;
        }
        self.session.queue.abandon();
        if self.session.is_complete() {
            self.session.platform.close();
            let nanos = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            // Locked meanwhile, so that a call that leaves this thread behind can't return before.
            let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            if !progress.left_behind {
                (self.on_complete)(&self.session);
                self.complete_nanos.store(nanos.max(1), Relaxed);
            }
        }
        self.update(|progress| progress.served_out = true);
        if let Some(feed) = self.feed.get() {
            self.pool.leave(feed);
        }
        drop(
            self.user
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        if self.is_complete() {
            self.map_zeros();
        }
    }

    /// Maps the zeros that were left to the kernel, in bulk, so that a touch of one costs no fault.
    fn map_zeros(&self) {
        let is_over = || self.stopping.load(Relaxed);
        let pieces = self.zeros.iter().flat_map(|run| {
            let starts = (run.start..run.end).step_by(to_usize(MAP_BYTES));
            starts.map(|start| start..run.end.min(start + MAP_BYTES))
        });
        for Range { start, end } in pieces {
            self.pool.yield_briefly(is_over);
            // The lock is held during the system call: a stop that leaves this thread behind waits
            // for it.
            let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            if progress.left_behind || is_over() {
                return;
            }
            if let Err(error) = advise_at(Advice::PopulateRead, start, end - start) {
                tracing::debug!(%error, "mapping zeros");
                return;
            }
        }
    }

    /// Starts the prefetch of `plan` on the pool.
    fn prefetch(self: &Arc<Self>, plan: Plan) -> io::Result<()> {
        let feed = Feed::new(self, plan);
        // Set once, before the feed is added: the session may already be over when `add` returns.
        let _ = self.feed.set(Arc::clone(&feed));
        self.pool.add(&feed)
    }

    /// Pauses prefetch on behalf of `by`. Each thread that prefetches finishes its current frame.
    pub(crate) fn pause_prefetch(&self, by: PausedBy) {
        self.change_throttle(|throttle, loaded| throttle.set_paused(by, true, loaded));
    }

    /// Continues prefetch, unless another party pauses it.
    pub(crate) fn resume_prefetch(&self, by: PausedBy) {
        self.change_throttle(|throttle, loaded| throttle.set_paused(by, false, loaded));
    }

    /// Limits prefetch to this many bytes of memory per second from now on.
    pub(crate) fn set_prefetch_bandwidth(&self, bandwidth: Option<u64>) {
        self.change_throttle(|throttle, loaded| throttle.set_bandwidth(bandwidth, loaded));
    }

    fn change_throttle(&self, change: impl FnOnce(&Throttle, u64)) {
        // In a forked child, a lock may be held by a thread that does not exist there.
        if self.is_of_parent() {
            return;
        }
        change(&self.throttle, self.prefetched_bytes());
        if let Some(feed) = self.feed.get() {
            self.pool.recheck(feed);
        }
    }

    /// Returns the number of bytes of memory that were prefetched so far.
    fn prefetched_bytes(&self) -> u64 {
        self.session.stats.prefetch.load().total() * PAGE
    }

    /// Returns whether this is the copy in a forked child. Threads, memory and userfaultfd belong
    /// to the parent.
    pub(crate) fn is_of_parent(&self) -> bool {
        self.pid != std::process::id()
    }

    /// Waits for the threads of a session that is ending.
    ///
    /// A thread whose callback or store does not return is left behind. All threads are left behind
    /// if the calling thread is one of them. That is sound: what they still do goes through the
    /// session, which lives as long as they do, and reaches memory only through its userfaultfd.
    /// The caller closes the userfaultfd before the memory can be unmapped, and from then on every
    /// install is refused. The only other action on the memory, which happens when a session
    /// completes, is skipped from then on.
    pub(crate) fn end_threads(&self, threads: &mut Threads) {
        let engine = &self.session.threads;
        self.stopping.store(true, Relaxed);
        let begun = Instant::now();
        while !engine.is_current() && begun.elapsed() < LEAVING_TIMEOUT {
            if engine.wait_gone(POLL_INTERVAL) {
                for thread in threads.drain(..) {
                    // Never an error: a thread that panics aborts the process.
                    let _ = thread.join();
                }
                return;
            }
            // For a thread that waits for a page of its own session: perhaps no other thread is
            // left to read its fault.
            self.session.read_events(0);
        }
        if !engine.is_current() {
            let threads = engine.names();
            tracing::warn!(
                ?threads,
                "a callback or the store did not return: leaving its threads behind"
            );
        }
        self.update(|progress| progress.left_behind = true);
        threads.clear();
    }

    fn prefetch_ended(&self) {
        self.update(|progress| progress.prefetched = true);
    }

    fn update(&self, change: impl FnOnce(&mut Milestones)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Returns whether every page is present, removed or poisoned, and the memory is unregistered.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete_nanos.load(Relaxed) != 0
    }

    /// Waits until nobody serves faults any more.
    pub(crate) fn wait_served_out(&self) {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let serves = |progress: &mut Milestones| !progress.served_out;
        drop(self.changed.wait_while(progress, serves));
    }

    /// Waits until the session is complete, or until its prefetch has finished without completing
    /// it. While a touch waits for its page, or for a failure decision about it, the outcome is
    /// open, and the call keeps waiting. Returns `true` if the session is complete.
    pub(crate) fn wait_complete(&self) -> bool {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        // No notification announces that all pages may be settled, so this is polled.
        while !progress.served_out && (!progress.prefetched || self.may_complete_yet()) {
            let waited = self.changed.wait_timeout(progress, POLL_INTERVAL);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(progress);
        self.is_complete()
    }

    /// Returns whether the last pages may be present or on their way. A page is marked only after
    /// its waiter was woken, and its fault is closed only after that, so the faults are checked
    /// first.
    fn may_complete_yet(&self) -> bool {
        self.session.queue.has_open() || self.session.state.may_be_settled()
    }

    /// Heals the poisoned pages and installs the missing ones, in this thread and those of the
    /// pool. Returns `false` if some page can't be installed, or if the owner keeps changing its
    /// memory. Otherwise the session is ending, complete or not.
    pub(crate) fn install_rest(self: &Arc<Self>) -> bool {
        self.session.end_recording(TraceEnd::Stopped);
        let feed = Feed::new(
            self,
            Plan {
                prefetch: Prefetch::Off,
                working_set: None,
                completes: true,
                threads: self.prefetch_threads,
                // These threads need no entry in the session's tables.
                first_number: UNNUMBERED,
            },
        );
        self.pool.finish(&feed);
        let done = feed.is_done();
        if done {
            self.session.kick();
        }
        done
    }

    /// Returns the record of the session so far.
    pub(crate) fn run_record(&self, what: String, statistics: Stats) -> RunRecord {
        let (counters, image) = (&self.session.stats, &self.session.image);
        let now = counters.for_timeline(image.bytes_read());
        RunRecord::new(
            what,
            image.snapshot(),
            statistics,
            counters.timeline.load(now),
        )
    }

    /// Returns the statistics so far, except those that only the restore or pager knows.
    pub(crate) fn stats(&self) -> Stats {
        let counters = &self.session.stats;
        let sources = counters.sources.load();
        let mut fault_time = Durations::default();
        for times in sources.values() {
            fault_time += times;
        }
        let complete = self.complete_nanos.load(Relaxed);
        Stats {
            mapped: Duration::ZERO,
            complete: (complete != 0).then(|| Duration::from_nanos(complete)),
            left_to_kernel: 0,
            pages: self.session.image.snapshot().summary().pages,
            missing: self.session.state.unsettled(),
            faults: counters.faults.load(Relaxed),
            fault_kinds: counters.fault_kinds.load(),
            fault_time,
            sources,
            demand: counters.demand.load(),
            prefetch: counters.prefetch.load(),
            poisoned: counters.poisoned.load(Relaxed),
            discards: counters.discards.load(Relaxed),
            retries: counters.retries.load(Relaxed),
            shortages: counters.shortages.load(),
            bytes_read: self.session.image.bytes_read(),
            bytes_decoded: self.session.image.bytes_decoded(),
            failures: self.session.failures().1,
        }
    }
}
