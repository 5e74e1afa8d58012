//! What one session has fetched ahead, task by task.
//!
//! ```text
//!   look up the working sets ─▶ heal, if the restore is being completed
//!     ─▶ rounds: block by block, what is absent of the working sets, then of everything
//!          │ ▲
//!          ▼ │ a page was left: another thread was bringing it, it could not be read, or there was no memory
//!        pause
//!     ─▶ nothing is left, or nothing came for the retry timeout: a last round, which reports what it leaves
//! ```
//!
//! After a read that fails, or an install that finds no memory, the whole session pauses: the next
//! page would fare no better. A task is at most one index block, so that the pool's threads can turn to
//! other sessions.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use crate::session::{
    Kernel, Left, LendContext as _, PAGE, PrefetchStop, Retries, Session, SnapshotImage,
};

use super::contexts;
use super::prefetcher::{MAX_FEED_THREADS, Pool};
use super::{Prefetch, Runtime};

/// How long a round waits for what another thread was bringing.
const NEXT_ROUND: Duration = Duration::from_millis(1);
/// How long the last round may bring nothing, at least, before it ends.
const LAST_ROUND_TIMEOUT: Duration = Duration::from_secs(1);
/// Rounds in which a session is to be completed although another thread was always bringing something.
const MAX_ROUNDS: u32 = 10_000;
/// Index blocks that one task looks through for duplicates.
const NOTED_BLOCKS: u64 = 64;

/// What is to be fetched for a session.
pub(super) struct Plan {
    pub(super) prefetch: Prefetch,
    /// Whether the session is to be completed: poisoned pages are healed before anything else.
    pub(super) completes: bool,
    /// Threads of the pool at once, at most.
    pub(super) threads: usize,
    /// The number of the first of them among the session's threads.
    pub(super) first_number: usize,
    /// Bytes a second.
    pub(super) bandwidth: Option<u64>,
}

/// The prefetch of one session.
pub(super) struct Feed {
    running: Weak<Runtime>,
    /// Where the thread was that made it: what is logged belongs there.
    span: tracing::Span,
    plan: Plan,
    begun: Instant,
    progress: Mutex<Progress>,
}

/// How far it is.
#[derive(Default)]
struct Progress {
    /// Tasks that were given out and aren't done.
    out: usize,
    stage: Stage,
    /// What is to be fetched, in this order, and where in it the round is.
    ranges: Vec<Range<u64>>,
    range: usize,
    next: u64,
    /// The rest of blocks in which a page could not be read.
    rests: Vec<Range<u64>>,
    /// Tasks that left nothing but pages that can't be restored, which were reported.
    failed: HashSet<Range<u64>>,
    /// The next index block to be looked through for duplicates.
    noting: Option<u64>,
    /// What this round left.
    left: Left,
    rounds: u32,
    retries: Retries,
    pause_until: Option<Instant>,
    /// Whether the retry timeout is over.
    timed_out: bool,
    /// Whether this is the last round.
    last: bool,
    /// Whether there is nothing more to do, and if so, whether all of it was done.
    over: Option<bool>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// The working sets are not known yet.
    #[default]
    Plan,
    /// Poisoned pages are to be healed.
    Heal,
    Rounds,
}

/// What became of a thread's turn at a feed.
pub(super) enum Step {
    /// It did a task.
    Did,
    /// There is no task before then.
    Until(Instant),
    /// There is no task before those that were given out are done.
    Drained,
    /// There is no task any more.
    Over,
}

/// A task, or why there is none.
enum Next {
    Task(Task),
    None(Step),
}

enum Task {
    Plan,
    Heal { last: bool },
    Note(Range<u64>),
    Fetch { pages: Range<u64>, last: bool },
}

impl Feed {
    pub(super) fn new(running: &Arc<Runtime>, plan: Plan) -> Arc<Self> {
        Arc::new(Self {
            running: Arc::downgrade(running),
            span: tracing::Span::current(),
            plan,
            begun: Instant::now(),
            progress: Mutex::default(),
        })
    }

    pub(super) fn threads(&self) -> usize {
        self.plan.threads.clamp(1, MAX_FEED_THREADS)
    }

    /// Whether everything was fetched, once it is over.
    pub(super) fn is_done(&self) -> bool {
        self.progress().over == Some(true)
    }

    /// Does one task in this thread, which has place number `slot` at this feed.
    pub(super) fn step(&self, pool: &Pool, slot: usize) -> Step {
        let Some(running) = self.running.upgrade() else {
            return Step::Over;
        };
        let session = &running.session;
        // A thread of the pool is one of the session's while it works for it.
        let _of = self.span.enter();
        let place = session
            .threads
            .place(std::thread::current().name().unwrap_or("prefetch"));
        place.begin();
        let task = match self.progress().next(&self.plan, self.begun, session) {
            Next::Task(task) => task,
            Next::None(step) => return step,
        };
        let stand_back = || pool.stand_back(|| session.is_ending());
        let workers = contexts::For {
            workers: pool.workers(),
            image: &session.image,
        };
        let number = self.plan.first_number + slot;
        match task {
            Task::Plan => {
                let ranges = self.ranges(session);
                self.progress().planned(ranges, &self.plan);
            }
            Task::Heal { last } => {
                let left = workers.with(|worker| {
                    worker.number = number;
                    session.heal(worker, last)
                });
                self.progress().healed(&left, session.retry_timeout, last);
            }
            Task::Note(blocks) => {
                let noted = session.image.note_duplicates(blocks, || {
                    stand_back();
                    !session.is_ending()
                });
                self.progress().noted(noted);
            }
            Task::Fetch { pages, last } => {
                let left = workers.with(|worker| {
                    worker.number = number;
                    session.prefetch(worker, pages.clone(), last, stand_back)
                });
                self.progress()
                    .fetched(&pages, left, session.retry_timeout, last);
            }
        }
        Step::Did
    }

    /// The feed is at its end: whoever waits for that looks.
    pub(super) fn ended(&self) {
        if let Some(running) = self.running.upgrade() {
            running.session.kick();
            if !self.plan.completes {
                running.prefetch_ended();
            }
        }
    }

    /// What is fetched, in this order.
    fn ranges(&self, session: &Session<Kernel, SnapshotImage>) -> Vec<Range<u64>> {
        let slots = session.image.snapshot().page_slots();
        let mut ranges = match &self.plan.prefetch {
            Prefetch::Pages(runs) => runs.clone(),
            Prefetch::Off => Vec::new(),
            Prefetch::WorkingSet | Prefetch::All => working_sets(session),
        };
        for range in &mut ranges {
            range.end = range.end.min(slots);
        }
        if self.plan.prefetch == Prefetch::All || self.plan.completes {
            ranges.push(0..slots);
        }
        ranges
    }

    /// It is whole after every statement.
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plan {
    /// Whether all of the snapshot is to be fetched.
    fn fetches_all(&self) -> bool {
        self.completes || self.prefetch == Prefetch::All
    }
}

impl Progress {
    fn next(
        &mut self,
        plan: &Plan,
        begun: Instant,
        session: &Session<Kernel, SnapshotImage>,
    ) -> Next {
        if session.is_ending() {
            self.over.get_or_insert(true);
        }
        if self.over.is_some() {
            return Next::None(Step::Over);
        }
        let paced = plan.bandwidth.map(|bandwidth| {
            let brought = session.stats.prefetch.total() * PAGE;
            begun + Duration::from_nanos(nanos(brought, bandwidth))
        });
        if let Some(until) = self.pause_until.max(paced)
            && until > Instant::now()
        {
            return Next::None(Step::Until(until));
        }
        match self.stage {
            Stage::Plan | Stage::Heal if self.out > 0 => return Next::None(Step::Drained),
            Stage::Plan => return self.give(Task::Plan),
            Stage::Heal => return self.give(Task::Heal { last: self.last }),
            Stage::Rounds => {}
        }
        if self.range + 1 == self.ranges.len()
            && let Some(blocks) = self.next_noted(session)
        {
            return self.give(Task::Note(blocks));
        }
        while let Some(pages) = self.next_pages() {
            if session.state.any_absent(pages.clone()) && !self.failed.contains(&pages) {
                let last = self.last;
                return self.give(Task::Fetch { pages, last });
            }
        }
        if self.out > 0 {
            return Next::None(Step::Drained);
        }
        self.round_ends(plan, session)
    }

    fn give(&mut self, task: Task) -> Next {
        self.out += 1;
        Next::Task(task)
    }

    /// Index blocks for one thread to look through for the pages that repeat earlier ones, ahead of
    /// another that fetches.
    fn next_noted(&mut self, session: &Session<Kernel, SnapshotImage>) -> Option<Range<u64>> {
        let first = self.noting.take()?;
        let end = session.image.snapshot().block_count();
        (first < end).then(|| first..end.min(first + NOTED_BLOCKS))
    }

    /// The next pages of the round: no more than one index block.
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

    /// All tasks of a round are done: decides whether there is another.
    fn round_ends(&mut self, plan: &Plan, session: &Session<Kernel, SnapshotImage>) -> Next {
        let left = std::mem::take(&mut self.left);
        self.rounds += 1;
        if left.unread + left.short > 0 && !self.last {
            self.last = self.timed_out;
        } else if left.busy > 0
            && plan.fetches_all()
            && !(plan.completes && self.rounds >= MAX_ROUNDS)
        {
            self.pause_until = Some(Instant::now() + NEXT_ROUND);
        } else {
            let absent = |pages: &Range<u64>| session.state.any_absent(pages.clone());
            let missing = left.busy + left.unread + left.short + left.failed > 0;
            self.over = Some(!missing && !self.failed.iter().any(absent));
            return Next::None(Step::Over);
        }
        (self.range, self.next) = (0, 0);
        Next::None(Step::Until(self.pause_until.unwrap_or_else(Instant::now)))
    }

    fn planned(&mut self, ranges: Vec<Range<u64>>, plan: &Plan) {
        self.out -= 1;
        self.ranges = ranges;
        // A single thread notes them as it comes to them.
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

    fn healed(&mut self, left: &Result<Left, PrefetchStop>, timeout: Duration, was_last: bool) {
        self.out -= 1;
        match left {
            Ok(left) if left.unread > 0 && !was_last => self.retry(timeout),
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
        left: Result<Left, PrefetchStop>,
        timeout: Duration,
        was_last: bool,
    ) {
        self.out -= 1;
        let left = match left {
            Ok(left) => left,
            Err(PrefetchStop::Ending) => return,
            Err(PrefetchStop::Kernel) => {
                self.over = Some(false);
                return;
            }
        };
        self.left.add(left);
        if left.brought > 0 {
            self.retries = Retries::default();
        }
        if left.unread + left.short > 0 && !was_last {
            self.retry(timeout);
            let rest = left.rest.map(|rest| rest..pages.end);
            self.rests.extend(rest.filter(|_| !self.timed_out));
        } else if left.short > 0 {
            // There is none for the others either.
            self.over = Some(false);
        } else if left.failed > 0 && left.busy == 0 {
            self.failed.insert(pages.clone());
            if was_last && left.brought == 0 {
                let patience = timeout.max(LAST_ROUND_TIMEOUT);
                let goes_on = self.retries.failed(Instant::now(), patience).is_some();
                self.over = (!goes_on).then_some(false);
            }
        }
    }

    /// A task has met what may pass: pauses, or cuts the round short once the time for that is over.
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

/// The runs of all working sets that can be read.
fn working_sets(session: &Session<Kernel, SnapshotImage>) -> Vec<Range<u64>> {
    let snapshot = session.image.snapshot();
    let sets = snapshot.working_sets().unwrap_or_else(|error| {
        tracing::warn!(%error, "the working sets can't be read");
        Vec::new()
    });
    let runs = |name: &str| -> Vec<Range<u64>> {
        match snapshot.working_set(name) {
            Ok(runs) => runs
                .iter()
                .map(|run| run.first_page..run.first_page + run.pages)
                .collect(),
            Err(error) => {
                tracing::warn!(%error, name, "a working set can't be read");
                Vec::new()
            }
        }
    };
    sets.iter().flat_map(|set| runs(&set.name)).collect()
}

/// How long `bytes` take at so many a second.
fn nanos(bytes: u64, per_second: u64) -> u64 {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(per_second);
    u64::try_from(nanos).unwrap_or(u64::MAX)
}
