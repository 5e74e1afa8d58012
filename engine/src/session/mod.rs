//! One restore: one address space, one userfaultfd, one table of page states.
//!
//! ```text
//!   owner's threads          kernel             session
//!   ---------------          ------             -------
//!   touch absent page  -->   PAGEFAULT   -->    look up, claim frame, read, check, decode up to
//!                      <--   woken       <--    the page, COPY it; then the rest of the frame
//!   madvise(DONTNEED)  -->   REMOVE      -->    removed
//!   munmap, mremap     -->   UNMAP,REMAP -->    address map, WAKE of the old range
//!                                               prefetch: the same path, from the other side
//! ```
//!
//! What can happen to a page, and what follows:
//!
//! | state | fault | frame arrives good | frame is bad | REMOVE |
//! | --- | --- | --- | --- | --- |
//! | absent | decode, COPY, -> present | COPY, -> present | demand: failure policy; prefetch: stays absent | -> removed |
//! | present (advice) | ZEROPAGE; if EEXIST, WAKE | skip | skip | -> removed |
//! | removed (sticky) | ZEROPAGE; if EEXIST, WAKE | skip | skip | stays |
//! | poisoned | POISON again; if EEXIST, WAKE | skip; when the restore is completed COPY, -> present ([`completion`]) | skip | -> removed |
//!
//! A frame that is being brought is *claimed*. Another fault that wants it waits for the claimer and
//! looks again, unless that is a prefetcher: demand never waits for a read of prefetch ([`claims`]).
//!
//! The rules that make it right:
//!
//! 1. One thread at a time reads messages, holding the install lock exclusively until it has
//!    recorded them all, in the order read, and has woken the old range of each UNMAP and REMAP
//!    ([`events`]). The kernel gives faults before events, so no fault of a batch is served before
//!    its events are recorded.
//! 2. Installing holds the lock shared over {look up state and address; one ioctl of at most 256
//!    KiB, or for one page of 2 MiB ([`large`])} ([`install`]). The owner's discard goes on only when its event was read, that is, when
//!    no install that was decided before it can still come after it.
//! 3. EAGAIN means that an event waits to be read: the lock is let go, events are read, and
//!    everything is looked up again.
//! 4. A page is marked present after the ioctl succeeded or said EEXIST, and a fault on a present
//!    page is answered by ZEROPAGE, never by WAKE alone: where the mark was wrong, WAKE alone would
//!    fault for ever.
//! 5. A fault at an address of no region gets a zero page or, if nothing is mapped there, a WAKE.

#[cfg(feature = "bench-internals")]
mod bench;
mod completion;
mod content;
mod events;
mod failure;
mod fault;
mod give_up;
mod platform;
mod state;
mod stats;
mod threads;

#[cfg(test)]
mod model;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::fail_point::{FailPoint, fail_point};
use state::address_map::block_of;
use stats::add;

#[cfg(feature = "bench-internals")]
pub use bench::PageStates;
pub use content::frame_cache::FrameCacheStats;
pub use failure::{Failure, FailureDecision, FailureKind, FailurePolicy};
pub use state::{Pulse, Vitals};
pub use stats::{Durations, Histogram, Percentiles};

pub(crate) use content::frame_cache::{FrameCache, SharedFrames};
pub(crate) use content::snapshot::{SnapshotImage, zero_runs};
pub(crate) use fault::in_flight::{FrameId, InFlight};
pub(crate) use fault::load::{LendContext, ThreadContext};
pub(crate) use fault::prefetch::{Left, PrefetchStop};
pub(crate) use fault::queue::{Fault, FaultQueue};
pub(crate) use fault::retries::{RETRY_TIMEOUT, Retries};
pub(crate) use give_up::NoPoison;
pub(crate) use platform::kernel::Kernel;
pub(crate) use platform::{Image, PAGE, PageNumber, Platform};
pub(crate) use state::State;
pub(crate) use state::address_map::{Extent, LARGE_PAGES};
pub(crate) use stats::{Pages, Stats};
pub(crate) use threads::{EngineThreads, Place};

/// Failures that are kept word for word; more are only counted.
const KEPT_FAILURES: usize = 1000;

/// What a failed page comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Poison it.
    Poison,
    /// Leave the fault: whoever decided keeps it, and has it served again or poisoned later.
    Leave,
    /// Forget the fault: another one for the same address is kept, whose answer is this one's too.
    Forget,
}

/// Who answers for the owner of the memory when it can't be restored.
pub(crate) trait Guard: Send + Sync {
    /// Decides about a page that a fault wants and that can't be restored.
    fn decide(&self, fault: Fault, failure: &Failure) -> Decision;
    /// What becomes of a fault on a page about which a decision is being made. `None`: there is
    /// none.
    fn undecided(&self, fault: Fault, page: PageNumber) -> Option<Decision>;
    /// The session can't go on, and the owner must not: ends the owner.
    fn end_owner(&self, why: &str);
    /// Whether the end of the owner, and why it came, is logged by whoever has this guard: a failure that ends the owner is
    /// not logged twice.
    fn tells_of_end(&self) -> bool {
        false
    }
}

/// Called with the number of each page that a fault brought in.
pub(crate) type TouchObserver = Box<dyn Fn(PageNumber) + Send + Sync>;

/// One restore. Any number of threads serve faults ([`Session::serve`]) and prefetch.
pub(crate) struct Session<P, I> {
    pub(crate) platform: P,
    pub(crate) image: I,
    pub(crate) state: State,
    pub(crate) queue: FaultQueue,
    pub(crate) stats: Stats,
    /// The threads that work for it now.
    pub(crate) threads: Arc<EngineThreads>,
    claims: InFlight,
    /// What a discarded large page is filled with; empty if there are none.
    zeros: Vec<u8>,
    guard: Box<dyn Guard>,
    observer: Option<TouchObserver>,
    /// Frames that are not to be decoded: who tried has died.
    quarantined: Vec<FrameId>,
    /// How long a page that can't be read is read again before it counts as failed.
    pub(crate) retry_timeout: Duration,
    failures: Mutex<Failures>,
    phase: Phase,
    shortage: Shortage,
    /// The span that everything belongs to that is logged about the session: that of who made it.
    span: tracing::Span,
}

/// Whether memory is short just now, for small pages and for large ones.
#[derive(Debug, Default)]
struct Shortage {
    small: AtomicBool,
    large: AtomicBool,
}

/// How far a session is.
#[derive(Debug, Default)]
struct Phase {
    /// Threads that serve faults shall return.
    ending: AtomicBool,
    /// A thread looks whether every page is settled.
    finishing: AtomicBool,
    /// Every page is settled.
    complete: AtomicBool,
    /// The owner's memory is gone.
    owner_gone: AtomicBool,
}

/// The failures seen so far.
#[derive(Debug, Default)]
struct Failures {
    kept: Vec<Failure>,
    count: u64,
}

impl<P: Platform, I: Image> Session<P, I> {
    pub(crate) fn new(
        platform: P,
        image: I,
        state: State,
        guard: Box<dyn Guard>,
        observer: Option<TouchObserver>,
        threads: usize,
    ) -> Self {
        Self {
            zeros: fault::huge::zeros(&state),
            platform,
            image,
            state,
            queue: FaultQueue::new(),
            stats: Stats::default(),
            threads: Arc::default(),
            claims: InFlight::new(threads),
            guard,
            observer,
            quarantined: Vec::new(),
            retry_timeout: RETRY_TIMEOUT,
            failures: Mutex::default(),
            phase: Phase::default(),
            shortage: Shortage::default(),
            span: tracing::Span::current(),
        }
    }

    /// Has these frames refused like damaged ones, before anything is decoded.
    pub(crate) fn refuse(&mut self, frames: impl IntoIterator<Item = u64>) {
        self.quarantined.extend(frames.into_iter().map(FrameId));
    }

    /// Makes every thread return from [`Session::serve`]. Faults that still wait are not answered.
    pub(crate) fn end(&self) {
        self.phase.ending.store(true, Relaxed);
        self.platform.kick();
    }

    /// Lets a fault thread look whether anything has changed.
    pub(crate) fn kick(&self) {
        self.platform.kick();
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.phase.ending.load(Relaxed)
    }

    /// How far it is, for telling two states apart.
    #[cfg(test)]
    pub(crate) fn phase_digest(&self) -> [bool; 3] {
        let Phase {
            ending,
            finishing,
            complete,
            owner_gone: _,
        } = &self.phase;
        [ending, finishing, complete].map(|flag| flag.load(Relaxed))
    }

    /// Whether every page is present, removed or poisoned.
    pub(crate) fn is_complete(&self) -> bool {
        self.phase.complete.load(Relaxed)
    }

    /// Where the owner has pages that are absent, piece by piece, and how many.
    pub(crate) fn missing(&self) -> Vec<(u64, u64)> {
        let mut missing = Vec::new();
        for extent in self.state.map().extents() {
            let mut next = extent.first_page;
            let end = next + extent.pages;
            while let Some(mut absent) = self.state.absent_in(next..end) {
                if extent.large {
                    absent = block_of(absent.start).start.max(extent.first_page)
                        ..block_of(absent.end - 1).end.min(end);
                }
                let address = extent.address + (absent.start - extent.first_page) * PAGE;
                missing.push((address, absent.end - absent.start));
                next = absent.end;
            }
        }
        missing
    }

    /// Serves a fault that was left once more, after a pause: its content may be had then.
    pub(crate) fn serve_again(&self, mut fault: Fault, page: PageNumber) {
        let pause = fault.retries.pause();
        self.queue.pause(fault, page, Instant::now() + pause);
        self.platform.kick();
    }

    /// Poisons the page of a fault that was left.
    pub(crate) fn poison_left(&self, fault: Fault) {
        self.poison(fault);
        self.queue.resolve();
        self.look_if_settled();
    }

    /// Finishes if every page is settled. True if so.
    ///
    /// The kernel may answer now: a page that is missing all the same was discarded. Whose discard
    /// waits for its event to be read must not wait for ever, so events are read until none can be
    /// left.
    fn finish_if_settled(&self) -> bool {
        if !self.state.may_be_settled() || self.phase.finishing.swap(true, Relaxed) {
            return false;
        }
        let hold = self.platform.exclusive(0);
        if self.state.recount() > 0 {
            self.phase.finishing.store(false, Relaxed);
            return false;
        }
        drop(hold);
        fail_point(FailPoint::Settled);
        self.let_go();
        fail_point(FailPoint::Complete);
        self.phase.complete.store(true, Relaxed);
        self.end();
        true
    }

    /// Gives the memory back to the kernel: unregisters it, wakes who waits, and reads events until
    /// none can be left.
    pub(crate) fn let_go(&self) {
        let extents = self.state.mapped();
        // From the last on: what knows of each of many is shortened at its end.
        for extent in extents.iter().rev() {
            let (address, len) = (extent.address, extent.pages * PAGE);
            if !self.platform.unregister(address, len) {
                // It would wait for ever at the first page that it discards.
                self.guard
                    .end_owner("its memory can't be given back to the kernel");
            }
            fail_point(FailPoint::Unregistered);
        }
        // The kernel wakes who waits in a range before it gives the range up (seen with 6.18): who
        // faults again, or for the first time, in between waits where nobody reads any more. Closing
        // would end that too, but not while the owner has a descriptor of its own.
        for extent in &extents {
            self.platform.wake(extent.address, extent.pages * PAGE);
        }
        let mut tries = 0;
        while let Some(extent) = extents.first() {
            self.read_events(0);
            if !self.platform.is_changing(extent.address) || !self.platform.back_off(tries) {
                break;
            }
            tries += 1;
        }
    }

    /// Whether the owner's memory is gone: it has ended, or runs another program.
    pub(crate) fn is_owner_gone(&self) -> bool {
        self.phase.owner_gone.load(Relaxed)
    }

    fn owner_is_gone(&self) {
        self.phase.owner_gone.store(true, Relaxed);
        tracing::debug!("the owner of the memory is gone");
        self.end();
    }

    /// Takes note of an install that found no memory, and logs the first of a row.
    fn is_short(&self, large: bool) {
        add(self.stats.shortages_of(large), 1);
        if !self.shortage_of(large).swap(true, Relaxed) {
            let _of = self.span.enter();
            tracing::warn!(
                "pages can't be installed: {}",
                fault::install::no_memory(large)
            );
        }
    }

    /// Takes note of an install that found memory.
    fn has_memory(&self, large: bool) {
        let shortage = self.shortage_of(large);
        if shortage.load(Relaxed) {
            shortage.store(false, Relaxed);
        }
    }

    fn shortage_of(&self, large: bool) -> &AtomicBool {
        if large {
            &self.shortage.large
        } else {
            &self.shortage.small
        }
    }

    /// Keeps a failure for the report, and logs it: one for each page, as often as it may be tried.
    pub(crate) fn report(&self, failure: &Failure) {
        if self.keep_failure(failure) {
            let _of = self.span.enter();
            tracing::warn!(%failure, "a page can't be restored");
        }
    }

    /// Keeps a failure for the report. True if it is new, and one of those that are told.
    fn keep_failure(&self, failure: &Failure) -> bool {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let known = failures
            .kept
            .iter()
            .any(|kept| kept.page == failure.page && kept.offset == failure.offset);
        if known {
            return false;
        }
        failures.count += 1;
        let is_told = failures.kept.len() < KEPT_FAILURES;
        if is_told {
            failures.kept.push(failure.clone());
        }
        is_told
    }

    /// The failures kept, and how many there were.
    pub(crate) fn failures(&self) -> (Vec<Failure>, u64) {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        (failures.kept.clone(), failures.count)
    }
}
