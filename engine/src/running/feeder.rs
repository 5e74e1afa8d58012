//! Prefetch: what is fetched next, and by whom.
//!
//! A feeder gives one index block at a time to a rayon pool of its own and never more blocks than
//! there are threads: rayon has no priorities, so what may have to wait is not queued in it. It
//! keeps to a budget.
//!
//! A thread waits for its turn among those of all sessions, and stands back while demand wants its core
//! ([`Shared`](super::Shared)).

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use snapshot_format::Reason;
use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use crate::session::{Kernel, PAGE, Session, SnapshotImage, Worker};

use super::threads::{Hook, run};
use super::{Prefetch, Running};

/// How long prefetch waits for what somebody else was bringing.
const NEXT_PASS: Duration = Duration::from_millis(1);

/// What the feeder shall do.
pub(super) struct Plan {
    pub(super) prefetch: Prefetch,
    pub(super) threads: usize,
    /// The number of the first of them among the session's threads.
    pub(super) first_number: usize,
    pub(super) bandwidth: Option<u64>,
    pub(super) hook: Option<Hook>,
}

/// A rayon pool whose threads are joined when it is dropped: rayon only tells its own to end.
struct Pool {
    rayon: Option<rayon::ThreadPool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    fn new(running: &Running, threads: usize, hook: Option<&Hook>) -> io::Result<Self> {
        let mut pool = Self {
            rayon: None,
            threads: Vec::with_capacity(threads),
        };
        let built = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .spawn_handler(|thread| {
                let name = format!("snap-fetch-{}", thread.index());
                let hook = hook.cloned();
                let place = running.session.threads.place(&name);
                let spawned = Builder::new()
                    .name(name.clone())
                    .spawn(move || run(place, &name, hook.as_ref(), || thread.run()))?;
                pool.threads.push(spawned);
                Ok(())
            })
            .build();
        // If it fails, rayon has told those that were started to end.
        pool.rayon = Some(built.map_err(io::Error::other)?);
        Ok(pool)
    }

    fn rayon(&self) -> &rayon::ThreadPool {
        self.rayon.as_ref().unwrap_or_else(|| unreachable!())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.rayon.take());
        for thread in self.threads.drain(..) {
            // A thread that panics ends the process.
            let _ = thread.join();
        }
    }
}

/// The thread that decides what is fetched next.
pub(super) struct Feeder {
    running: Arc<Running>,
    plan: Plan,
    pool: Pool,
    idle: Receiver<Worker<SnapshotImage>>,
    done: Sender<Worker<SnapshotImage>>,
    /// Pages that the pass left to somebody else.
    busy: Arc<AtomicU64>,
}

impl Feeder {
    pub(super) fn new(running: &Arc<Running>, plan: Plan) -> io::Result<Self> {
        let pool = Pool::new(running, plan.threads, plan.hook.as_ref())?;
        let (done, idle) = channel();
        Ok(Self {
            running: Arc::clone(running),
            plan,
            pool,
            idle,
            done,
            busy: Arc::default(),
        })
    }

    /// Fetches all that the plan names, and returns when it is there, can't be had, or the session
    /// ends.
    pub(super) fn run(self) {
        let begun = Instant::now();
        for thread in 0..self.plan.threads {
            let decoder = self.running.session.image.decoder(Reason::Prefetch);
            let number = self.plan.first_number + thread;
            // The receiver is in our hands.
            let _ = self.done.send(Worker::new(decoder, number));
        }
        let first = match &self.plan.prefetch {
            Prefetch::Pages(runs) => runs.clone(),
            Prefetch::Off | Prefetch::WorkingSet | Prefetch::All => self.working_sets(),
        };
        let slots = self.running.session.image.snapshot().page_slots();
        for pages in first {
            if self.running.session.is_ending() {
                break;
            }
            self.hand_out(pages.start..pages.end.min(slots), begun);
        }
        if self.plan.prefetch == Prefetch::All {
            if self.plan.threads > 1 {
                self.note_duplicates();
            }
            // A pass leaves pages that somebody else was bringing; the next finds them there.
            loop {
                self.busy.store(0, Relaxed);
                self.hand_out(0..slots, begun);
                self.wait_idle();
                if self.busy.load(Relaxed) == 0 || self.running.session.is_ending() {
                    break;
                }
                std::thread::sleep(NEXT_PASS);
            }
        }
        self.wait_idle();
        self.running.session.kick();
        self.running.prefetch_ended();
        // The feeder goes, and with it the pool: who joins this thread has joined those of the
        // pool.
    }

    /// The runs of all working sets that can be read.
    fn working_sets(&self) -> Vec<Range<u64>> {
        let snapshot = self.running.session.image.snapshot();
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

    /// Gives `pages` to the pool, block by block, when a thread is idle and the budget allows.
    fn hand_out(&self, pages: Range<u64>, begun: Instant) {
        for pages in in_blocks(pages) {
            if self.running.session.is_ending() {
                return;
            }
            if self.running.session.state.any_absent(pages.clone()) {
                self.hand_out_block(pages, begun);
            }
        }
    }

    /// Has one thread look ahead for the pages that repeat earlier ones, while another begins. A
    /// single thread notes them as it comes to them.
    fn note_duplicates(&self) {
        self.give(|session, _, stand_back| {
            session.image.note_duplicates(|| {
                stand_back();
                !session.is_ending()
            });
        });
    }

    fn hand_out_block(&self, pages: Range<u64>, begun: Instant) {
        if let Some(bandwidth) = self.plan.bandwidth {
            let brought = self.running.session.stats.prefetch.total() * PAGE;
            self.sleep_until(begun + Duration::from_nanos(nanos(brought, bandwidth)));
        }
        let busy = Arc::clone(&self.busy);
        self.give(move |session, worker, stand_back| {
            match session.prefetch(worker, pages, stand_back) {
                Ok(left) => {
                    busy.fetch_add(left.busy, Relaxed);
                }
                Err(stop) => tracing::debug!(?stop, "prefetch stopped"),
            }
        });
    }

    /// Gives `work` to the pool when a thread is idle. It gets a function to stand back with.
    fn give(
        &self,
        work: impl FnOnce(&Session<Kernel, SnapshotImage>, &mut Worker<SnapshotImage>, &mut dyn FnMut())
        + Send
        + 'static,
    ) {
        let Ok(mut worker) = self.idle.recv() else {
            return;
        };
        let (running, done) = (Arc::clone(&self.running), self.done.clone());
        self.pool.rayon().spawn(move || {
            let is_over = || running.session.is_ending();
            if let Some(turn) = running.turns.wait(is_over) {
                work(&running.session, &mut worker, &mut || {
                    turn.stand_back(is_over);
                });
            }
            // The memory must not be this thread's to unmap, after everybody else has let go.
            drop(running);
            // The feeder may have gone.
            let _ = done.send(worker);
        });
    }

    /// Waits until no block is being fetched.
    fn wait_idle(&self) {
        let workers: Vec<_> = (0..self.plan.threads)
            .filter_map(|_| self.idle.recv().ok())
            .collect();
        for worker in workers {
            let _ = self.done.send(worker);
        }
    }

    /// Sleeps in short steps, so that the session's end is noticed.
    fn sleep_until(&self, until: Instant) {
        while !self.running.session.is_ending() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
    }
}

/// Pages cut at the ends of index blocks: no more is handed out at once.
pub(super) fn in_blocks(pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let blocks = pages.start / PAGES_PER_BLOCK_U64..pages.end.div_ceil(PAGES_PER_BLOCK_U64);
    blocks.map(move |block| {
        let first = block * PAGES_PER_BLOCK_U64;
        first.max(pages.start)..(first + PAGES_PER_BLOCK_U64).min(pages.end)
    })
}

/// How long `bytes` take at so many a second.
fn nanos(bytes: u64, per_second: u64) -> u64 {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(per_second);
    u64::try_from(nanos).unwrap_or(u64::MAX)
}
