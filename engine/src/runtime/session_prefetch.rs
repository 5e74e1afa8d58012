//! The prefetch of one session, task by task.
//!
//! ```text
//!   look up the working sets ─▶ heal, if the restore is being completed
//!     ─▶ rounds: block by block, the absent pages of the working sets, then of everything
//!          │ ▲
//!          ▼ │ a page was left: another thread was loading it, it was unreadable, or no memory
//!        pause
//!     ─▶ no page is left, or the retry timeout has passed without progress: a last round,
//!        which reports the pages that it leaves
//! ```
//!
//! After a read that fails, or an install that finds no memory, the whole session pauses, because
//! the next page would fare no better.
//!
//! A task covers at most some 2 MiB, so that the pool's threads can turn to other sessions: one
//! index block, or many runs of a working set. A working set of an optimized file lists its pages
//! frame by frame, in ascending order within a frame. Tasks begin where the page numbers descend,
//! so that no two threads want the same frame, and a task can read its frames at once. Any other
//! order only takes longer.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use crate::session::{Kernel, LendContext as _, Prefetched, Retries, Session, SnapshotImage};

use super::contexts;
use super::prefetcher::{MAX_FEED_THREADS, Pool};
use super::{Prefetch, Runtime};

/// Pause before the next round if pages were left because another thread was loading them.
const ROUND_INTERVAL: Duration = Duration::from_millis(1);
/// Minimum time without progress after which the last round ends.
const LAST_ROUND_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of rounds to complete a session while another thread is always loading some page.
const MAX_ROUNDS: u32 = 10_000;
/// Number of pages after which a task ends where page numbers descend.
const MIN_TASK_PAGES: u64 = PAGES_PER_BLOCK_U64 / 2;
/// Number of pages after which a task ends in any case.
const MAX_TASK_PAGES: u64 = PAGES_PER_BLOCK_U64;
/// Number of index blocks that one task searches for duplicates.
const MAX_NOTED_BLOCKS: u64 = 64;

/// The prefetch requested for a session.
pub(super) struct Plan {
    pub(super) prefetch: Prefetch,
    /// The working set to prefetch; all of them if `None`.
    pub(super) working_set: Option<String>,
    /// Set if the session is to be completed: poisoned pages are healed before anything else, and
    /// the throttle of the prefetch is ignored.
    pub(super) completes: bool,
    /// Maximum number of pool threads at once.
    pub(super) threads: usize,
    /// The number of the first of these threads among the session's threads.
    pub(super) first_number: usize,
}

/// The prefetch of one session.
pub(super) struct Feed {
    runtime: Weak<Runtime>,
    /// The tracing span of the creating thread, in which messages are logged.
    span: tracing::Span,
    plan: Plan,
    progress: Mutex<Progress>,
}

/// The progress of a prefetch.
#[derive(Default)]
struct Progress {
    /// Number of tasks that were handed out and aren't done.
    out: usize,
    stage: Stage,
    /// Pages to prefetch, in this order, and the position of the current round.
    ranges: Vec<Range<u64>>,
    range: usize,
    next: u64,
    /// Remaining parts of blocks in which a page could not be read, or the throttle stopped a task.
    rests: Vec<Range<u64>>,
    /// Tasks that left only pages that can't be restored, which were reported.
    failed: HashSet<Range<u64>>,
    /// The next index block to search for duplicates.
    noting: Option<u64>,
    /// Pages that this round left.
    left: Prefetched,
    rounds: u32,
    retries: Retries,
    pause_until: Option<Instant>,
    /// Whether the retry timeout has passed.
    timed_out: bool,
    /// Whether this is the last round.
    last: bool,
    /// The result once there is nothing more to do: whether everything was done.
    over: Option<bool>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// The working sets are not known yet.
    #[default]
    Plan,
    /// Poisoned pages must be healed.
    Heal,
    Rounds,
}

/// When the next task of a feed becomes available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Availability {
    Now,
    /// Not before this time.
    Until(Instant),
    /// When all tasks handed out so far are done.
    Drained,
    /// When the throttle changes.
    Paused,
    /// Never.
    Over,
}

enum Task {
    Plan,
    Heal { last: bool },
    Note(Range<u64>),
    Fetch { batch: Vec<Range<u64>>, last: bool },
}

impl Feed {
    pub(super) fn new(runtime: &Arc<Runtime>, plan: Plan) -> Arc<Self> {
        Arc::new(Self {
            runtime: Arc::downgrade(runtime),
            span: tracing::Span::current(),
            plan,
            progress: Mutex::default(),
        })
    }

    pub(super) fn threads(&self) -> usize {
        self.plan.threads.clamp(1, MAX_FEED_THREADS)
    }

    /// Returns whether all pages were prefetched, once the feed is over.
    pub(super) fn is_done(&self) -> bool {
        self.progress().over == Some(true)
    }

    /// Runs one task in this thread, which has slot `slot` at this feed, if there is one. Returns
    /// when the next one becomes available.
    pub(super) fn run_task(&self, pool: &Pool, slot: usize) -> Availability {
        let Some(runtime) = self.runtime.upgrade() else {
            return Availability::Over;
        };
        let session = &runtime.session;
        // A pool thread counts as one of the session's threads while it works for it.
        let _of = self.span.enter();
        let place = session
            .threads
            .place(std::thread::current().name().unwrap_or("prefetch"));
        place.begin();
        let throttled = || self.throttled(&runtime);
        let next = self.progress().next_task(&self.plan, throttled, session);
        let task = match next {
            Ok(task) => task,
            Err(availability) => return availability,
        };
        let yield_to_demand = || pool.yield_to_demand(|| session.is_ending());
        let may_continue = || {
            yield_to_demand();
            throttled().is_none()
        };
        let contexts = contexts::SessionContexts {
            contexts: pool.contexts(),
            image: &session.image,
        };
        let number = self.plan.first_number + slot;
        match task {
            Task::Plan => {
                let ranges = self.ranges(session);
                self.progress().planned(ranges, &self.plan);
            }
            Task::Heal { last } => {
                let left = contexts.with(|context| {
                    context.number = number;
                    session.heal(context, last)
                });
                self.progress().healed(left, session.retry_timeout, last);
            }
            Task::Note(blocks) => {
                let noted = session.image.note_duplicates(blocks, || {
                    yield_to_demand();
                    !session.is_ending()
                });
                self.progress().noted(noted);
            }
            Task::Fetch { batch, last } => {
                contexts.with(|context| {
                    context.number = number;
                    let mut rest = &batch[..];
                    while let Some((pages, then)) = rest.split_first() {
                        let left =
                            session.prefetch(context, pages.clone(), then, last, may_continue);
                        let mut progress = self.progress();
                        rest = then;
                        if left.is_none_or(|left| left.is_stopped()) {
                            progress.rests.extend(then.iter().rev().cloned());
                            rest = &[];
                        }
                        progress.fetched(pages, left, session.retry_timeout, last);
                    }
                });
                self.progress().out -= 1;
            }
        }
        Availability::Now
    }

    /// Returns when the throttle lets this feed continue: `None` means now.
    fn throttled(&self, runtime: &Runtime) -> Option<Availability> {
        if self.plan.completes {
            return None;
        }
        // Ends a recording that is due, which lets prefetch continue.
        let recording = runtime.session.check_recording();
        let availability = runtime.throttle.availability(|| runtime.prefetched_bytes());
        match (availability, recording) {
            // No thread may call again before the recording is due.
            (Some(Availability::Paused), Some(due)) => Some(Availability::Until(due)),
            (availability, _) => availability,
        }
    }

    /// Returns the number of changes of the throttle so far. If it has changed, so may have what
    /// [`Feed::run_task`] returned.
    pub(super) fn throttle_changes(&self) -> u64 {
        let runtime = self.runtime.upgrade();
        runtime.map_or(0, |runtime| runtime.throttle.changes())
    }

    /// Notifies the waiters that the feed is finished.
    pub(super) fn ended(&self) {
        if let Some(runtime) = self.runtime.upgrade() {
            runtime.session.image.snapshot().forget_index_ahead();
            runtime.session.kick();
            if !self.plan.completes {
                runtime.prefetch_ended();
            }
        }
    }

    /// Returns the pages to prefetch, in this order.
    fn ranges(&self, session: &Session<Kernel, SnapshotImage>) -> Vec<Range<u64>> {
        let slots = session.image.snapshot().page_slots();
        let mut ranges = match &self.plan.prefetch {
            Prefetch::Pages(runs) => runs.clone(),
            Prefetch::Off => Vec::new(),
            Prefetch::WorkingSet | Prefetch::All => {
                let runs = working_sets(session, self.plan.working_set.as_deref());
                session.image.leave_out_of_notes(&runs);
                runs
            }
        };
        for range in &mut ranges {
            range.end = range.end.min(slots);
        }
        let blocks = ranges.iter().filter(|range| !range.is_empty());
        let blocks = blocks.flat_map(|range| {
            range.start / PAGES_PER_BLOCK_U64..range.end.div_ceil(PAGES_PER_BLOCK_U64)
        });
        session.image.snapshot().read_index_ahead(blocks);
        if self.plan.prefetch == Prefetch::All || self.plan.completes {
            ranges.push(0..slots);
        }
        ranges
    }

    /// Locks the progress, which is consistent after every statement.
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plan {
    /// Returns whether the whole snapshot is to be prefetched.
    fn fetches_all(&self) -> bool {
        self.completes || self.prefetch == Prefetch::All
    }
}

impl Progress {
    /// Returns the next task, or when there will be one.
    fn next_task(
        &mut self,
        plan: &Plan,
        throttled: impl FnOnce() -> Option<Availability>,
        session: &Session<Kernel, SnapshotImage>,
    ) -> Result<Task, Availability> {
        if session.is_ending() {
            self.over.get_or_insert(true);
        }
        if self.over.is_some() {
            return Err(Availability::Over);
        }
        if let Some(availability) = throttled() {
            return Err(availability);
        }
        if let Some(until) = self.pause_until
            && until > Instant::now()
        {
            return Err(Availability::Until(until));
        }
        match self.stage {
            Stage::Plan | Stage::Heal if self.out > 0 => return Err(Availability::Drained),
            Stage::Plan => return Ok(self.give(Task::Plan)),
            Stage::Heal => {
                let last = self.last;
                return Ok(self.give(Task::Heal { last }));
            }
            Stage::Rounds => {}
        }
        if self.range + 1 == self.ranges.len()
            && let Some(blocks) = self.next_noted(session)
        {
            return Ok(self.give(Task::Note(blocks)));
        }
        let batch = self.next_batch(session);
        if !batch.is_empty() {
            let last = self.last;
            return Ok(self.give(Task::Fetch { batch, last }));
        }
        if self.out > 0 {
            return Err(Availability::Drained);
        }
        Err(self.round_ends(plan, session))
    }

    fn give(&mut self, task: Task) -> Task {
        self.out += 1;
        task
    }

    /// Returns index blocks in which one thread searches for pages that repeat earlier ones, ahead
    /// of another thread that prefetches.
    fn next_noted(&mut self, session: &Session<Kernel, SnapshotImage>) -> Option<Range<u64>> {
        let first = self.noting.take()?;
        let end = session.image.snapshot().block_count();
        (first < end).then(|| first..end.min(first + MAX_NOTED_BLOCKS))
    }

    /// Returns the next absent pages of the round, as parts of index blocks.
    fn next_batch(&mut self, session: &Session<Kernel, SnapshotImage>) -> Vec<Range<u64>> {
        let mut batch = Vec::new();
        let mut count = 0;
        while let Some(pages) = self.next_pages() {
            if !session.state.any_absent(pages.clone()) || self.failed.contains(&pages) {
                continue;
            }
            count += pages.end - pages.start;
            let ends = count >= MIN_TASK_PAGES && self.descends_after(&pages);
            batch.push(pages);
            if ends || count >= MAX_TASK_PAGES {
                break;
            }
        }
        batch
    }

    /// Returns whether the pages that follow `pages` in the order of the round are lower.
    fn descends_after(&self, pages: &Range<u64>) -> bool {
        let current = self.ranges.get(self.range);
        let is_done = current.is_none_or(|range| self.next >= range.end);
        let following = self.ranges.get(self.range + usize::from(is_done));
        is_done && following.is_some_and(|following| following.start < pages.start)
    }

    /// Returns the next pages of the round: at most one index block.
    fn next_pages(&mut self) -> Option<Range<u64>> {
        if let Some(rest) = self.rests.pop() {
            return Some(rest);
        }
        loop {
            let range = self.ranges.get(self.range)?;
            let start = self.next.max(range.start);
            if start < range.end {
                let block_end = (start / PAGES_PER_BLOCK_U64 + 1) * PAGES_PER_BLOCK_U64;
                let end = block_end.min(range.end);
                self.next = end;
                return Some(start..end);
            }
            self.range += 1;
            self.next = 0;
        }
    }

    /// Returns when the next round starts, if there is one. All tasks of the current one must be
    /// done.
    fn round_ends(
        &mut self,
        plan: &Plan,
        session: &Session<Kernel, SnapshotImage>,
    ) -> Availability {
        let left = std::mem::take(&mut self.left);
        self.rounds += 1;
        if left.unread + left.no_memory > 0 && !self.last {
            self.last = self.timed_out;
        } else if left.busy > 0
            && plan.fetches_all()
            && !(plan.completes && self.rounds >= MAX_ROUNDS)
        {
            self.pause_until = Some(Instant::now() + ROUND_INTERVAL);
        } else {
            let absent = |pages: &Range<u64>| session.state.any_absent(pages.clone());
            let missing = left.busy + left.unread + left.no_memory + left.failed > 0;
            self.over = Some(!missing && !self.failed.iter().any(absent));
            return Availability::Over;
        }
        (self.range, self.next) = (0, 0);
        Availability::Until(self.pause_until.unwrap_or_else(Instant::now))
    }

    fn planned(&mut self, ranges: Vec<Range<u64>>, plan: &Plan) {
        self.out -= 1;
        self.ranges = ranges;
        // A single thread notes duplicates as it reaches them.
        self.noting = (plan.prefetch == Prefetch::All && plan.threads > 1).then_some(0);
        self.stage = if plan.completes {
            Stage::Heal
        } else {
            Stage::Rounds
        };
    }

    fn noted(&mut self, next: Option<u64>) {
        self.out -= 1;
        self.noting = next;
    }

    fn healed(&mut self, left: Option<Prefetched>, timeout: Duration, was_last: bool) {
        self.out -= 1;
        match left {
            Some(left) if left.unread > 0 && !was_last => self.retry(timeout),
            _ => {
                self.stage = Stage::Rounds;
                (self.range, self.next) = (0, 0);
                (self.retries, self.timed_out) = (Retries::default(), false);
            }
        }
        self.last = self.stage == Stage::Heal && self.timed_out;
    }

    fn fetched(
        &mut self,
        pages: &Range<u64>,
        left: Option<Prefetched>,
        timeout: Duration,
        was_last: bool,
    ) {
        let Some(left) = left else { return };
        if left.refused {
            self.over = Some(false);
            return;
        }
        self.left.add(left);
        if left.loaded > 0 {
            self.retries = Retries::default();
        }
        let rest = left.rest.map(|rest| rest..pages.end);
        if left.unread + left.no_memory > 0 && !was_last {
            self.retry(timeout);
            self.rests.extend(rest.filter(|_| !self.timed_out));
        } else if rest.is_some() {
            // The throttle stopped it.
            self.rests.extend(rest);
        } else if left.no_memory > 0 {
            // There is none for the other tasks either.
            self.over = Some(false);
        } else if left.failed > 0 && left.busy == 0 {
            self.failed.insert(pages.clone());
            if was_last && left.loaded == 0 {
                let timeout = timeout.max(LAST_ROUND_TIMEOUT);
                let goes_on = self.retries.failed(Instant::now(), timeout).is_some();
                self.over = (!goes_on).then_some(false);
            }
        }
    }

    /// Handles a failure that may be temporary: pauses, or cuts the round short once the retry
    /// timeout has passed.
    fn retry(&mut self, timeout: Duration) {
        let now = Instant::now();
        if let Some(pause) = self.retries.failed(now, timeout) {
            self.pause_until = Some(now + pause);
            return;
        }
        self.timed_out = true;
        self.retries = Retries::default();
        self.range = self.ranges.len();
        self.rests.clear();
    }
}

/// Returns the runs of the working set called `only`, or of all readable ones.
fn working_sets(session: &Session<Kernel, SnapshotImage>, only: Option<&str>) -> Vec<Range<u64>> {
    let snapshot = session.image.snapshot();
    let names = match only {
        Some(name) => Ok(vec![name.to_owned()]),
        None => snapshot
            .working_sets()
            .map(|sets| sets.into_iter().map(|set| set.name).collect()),
    };
    let names = names.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read the working sets");
        Vec::new()
    });
    let runs = |name: &String| -> Vec<Range<u64>> {
        match snapshot.working_set(name) {
            Ok(runs) => runs
                .iter()
                .map(|run| run.first_page..run.first_page + run.pages)
                .collect(),
            Err(error) => {
                tracing::warn!(%error, name, "cannot read a working set");
                Vec::new()
            }
        }
    };
    names.iter().flat_map(runs).collect()
}
