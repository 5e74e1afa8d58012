//! A single restore: one address space, one userfaultfd and one table of page states.
//!
//! ```text
//!   owner's threads          kernel             session
//!   ---------------          ------             -------
//!   touch absent page  -->   PAGEFAULT   -->    look up, claim frame, read, check, decode up to
//!                      <--   woken       <--    the page, COPY it; then the rest of the frame
//!   madvise(DONTNEED)  -->   REMOVE      -->    removed
//!   munmap, mremap     -->   UNMAP,REMAP -->    address map, WAKE of the old range
//!                                               prefetch: the same path, without a fault
//! ```
//!
//! Page states, and the effect of each event on them:
//!
//! | state | fault | frame arrives good | frame is bad | REMOVE |
//! | --- | --- | --- | --- | --- |
//! | absent | decode, COPY, -> present | COPY, -> present | failure policy (1) | -> removed |
//! | present (2) | ZEROPAGE; if EEXIST, WAKE | skip | skip | -> removed |
//! | removed (3) | ZEROPAGE; if EEXIST, WAKE | skip | skip | stays |
//! | poisoned | POISON again; if EEXIST, WAKE | skip (4) | skip | -> removed |
//!
//! 1. For demand; a page that prefetch fails to load stays absent.
//! 2. Advisory: the kernel has reported the page as present. A fault doesn't rely on that (rule 4).
//! 3. Final: no later event changes it.
//! 4. When the caller completes the restore, a good frame is copied over the poison, and the page
//!    becomes present ([`healing`]).
//!
//! A frame that is being loaded is *claimed*. Another fault that wants the frame waits for the
//! claim to be released and then looks the page up again, unless a prefetcher holds the claim:
//! demand never waits for a prefetch read ([`fault::in_flight`]).
//!
//! Rules that keep it correct:
//!
//! 1. One thread at a time reads messages. It holds the install lock exclusively until it has
//!    recorded every message in the order read, and has woken the old range of each UNMAP and REMAP
//!    ([`events`]). One read returns faults before events, even if the events are older. So no
//!    fault of a batch is served before the events of that batch are recorded.
//! 2. An install holds the lock shared while it looks up state and address and issues one ioctl of
//!    at most 256 KiB, or of one 2 MiB page ([`fault::huge`], [`fault::install`]). The owner's
//!    discard proceeds only after its event has been read, that is, when no install that was
//!    decided earlier can still follow it.
//! 3. EAGAIN means that a change of the mappings has begun: its event must be read first. The
//!    thread releases the lock, reads events, and looks everything up again.
//! 4. A page is marked present after the ioctl succeeded or returned EEXIST. A fault on a present
//!    page is answered with ZEROPAGE, never with WAKE alone: if the mark were wrong, WAKE alone
//!    would repeat the fault forever.
//! 5. A fault at an address outside every region gets a zero page or, if nothing is mapped there, a
//!    WAKE.

#[cfg(feature = "bench-internals")]
mod bench;
mod completion;
mod content;
mod events;
mod failure;
mod fault;
mod give_up;
mod guard;
mod healing;
mod platform;
mod recording;
mod state;
mod stats;
mod threads;

#[cfg(test)]
mod model;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use snapshot_format::trace::TraceEnd;

use fault::in_flight::InFlight;
use fault::outcome::InstallError;
use recording::TouchRecorder;
use state::address_map::{LARGE_BYTES, block_of};
use stats::add;

#[cfg(feature = "bench-internals")]
pub use bench::PageStates;
pub use failure::{Failure, FailureDecision, FailureKind, FailurePolicy};
pub use platform::FrameId;
pub use recording::RecordingOptions;
pub use state::{Pulse, Vitals};

pub(crate) use content::frame_cache::{FrameCache, SharedFrames};
pub(crate) use content::snapshot::{SnapshotImage, zero_runs};
pub(crate) use fault::context::{LendContext, ThreadContext};
pub(crate) use fault::outcome::{FaultOutcome, Prefetched};
pub(crate) use fault::queue::{Fault, FaultQueue};
pub(crate) use fault::retries::{RETRY_TIMEOUT, Retries};
pub(crate) use give_up::NoPoison;
pub(crate) use guard::Guard;
pub(crate) use platform::kernel::Kernel;
pub(crate) use platform::{Image, PAGE, PageNumber, Platform};
pub(crate) use recording::TouchLog;
pub(crate) use state::State;
pub(crate) use state::address_map::{Extent, LARGE_PAGES};
pub(crate) use stats::Counters;
pub(crate) use threads::{EngineThreads, Place};

/// Maximum number of failures that are kept verbatim; further ones are only counted.
const MAX_KEPT_FAILURES: usize = 1000;

/// A callback that receives the number of each page that a fault loaded.
pub(crate) type TouchObserver = Box<dyn Fn(PageNumber) + Send + Sync>;

/// A single restore. Any number of threads serve faults ([`Session::serve`]) and prefetch.
pub(crate) struct Session<P, I> {
    pub(crate) platform: P,
    pub(crate) image: I,
    pub(crate) state: State,
    pub(crate) queue: FaultQueue,
    pub(crate) stats: Counters,
    /// The time at which the timeline begins.
    pub(crate) begun: Instant,
    /// Threads that currently work for the session.
    pub(crate) threads: Arc<EngineThreads>,
    /// Frames that are being loaded.
    in_flight: InFlight,
    /// Zeros that fill a discarded large page; empty if the session has no large pages.
    zeros: Vec<u8>,
    guard: Box<dyn Guard>,
    observer: Option<TouchObserver>,
    pub(crate) recorder: TouchRecorder,
    /// Frames that must not be decoded, because a worker died decoding them.
    quarantined: Vec<FrameId>,
    /// How long an unreadable page is retried before it counts as failed.
    pub(crate) retry_timeout: Duration,
    failures: Mutex<Failures>,
    phase: Phase,
    shortage: Shortage,
    /// The tracing span of the session's creator, in which everything about the session is logged.
    span: tracing::Span,
}

/// Whether memory is currently short, for small and for large pages.
#[derive(Debug, Default)]
struct Shortage {
    small: AtomicBool,
    large: AtomicBool,
}

/// The progress of a session.
#[derive(Debug, Default)]
struct Phase {
    /// Set when the threads that serve faults must return.
    ending: AtomicBool,
    /// Set while a thread checks whether every page is settled.
    finishing: AtomicBool,
    /// Set once every page is settled.
    complete: AtomicBool,
    /// Set once the owner's memory is gone.
    owner_gone: AtomicBool,
}

/// Failures seen so far.
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
            zeros: vec![0; if state.has_large() { LARGE_BYTES } else { 0 }],
            platform,
            image,
            state,
            queue: FaultQueue::new(),
            stats: Counters::default(),
            begun: Instant::now(),
            threads: Arc::default(),
            in_flight: InFlight::new(threads),
            guard,
            observer,
            recorder: TouchRecorder::default(),
            quarantined: Vec::new(),
            retry_timeout: RETRY_TIMEOUT,
            failures: Mutex::default(),
            phase: Phase::default(),
            shortage: Shortage::default(),
            span: tracing::Span::current(),
        }
    }

    /// Quarantines these frames: they fail as damaged frames do, without being decoded.
    pub(crate) fn quarantine(&mut self, frames: &[FrameId]) {
        self.quarantined.extend(frames);
    }

    /// Makes every thread return from [`Session::serve`]. Pending faults are not answered.
    pub(crate) fn end(&self) {
        self.end_recording(TraceEnd::Stopped);
        self.phase.ending.store(true, Relaxed);
        self.platform.kick();
    }

    /// Advances the timeline: everything counted from now on belongs to the bucket of `now`.
    pub(crate) fn advance_timeline(&self, now: Instant) {
        let since_start = now.saturating_duration_since(self.begun);
        let timeline = &self.stats.timeline;
        timeline.at(since_start, || {
            self.stats.for_timeline(self.image.bytes_read())
        });
    }

    /// Wakes a fault thread so that it checks whether anything has changed.
    pub(crate) fn kick(&self) {
        self.platform.kick();
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.phase.ending.load(Relaxed)
    }

    /// Returns the progress of the session, to tell two states of the model apart.
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

    /// Returns the ranges in which the owner has absent pages, each as address and number of pages.
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

    /// Returns whether the owner's memory is gone: the owner has exited or executed another
    /// program.
    pub(crate) fn is_owner_gone(&self) -> bool {
        self.phase.owner_gone.load(Relaxed)
    }

    fn mark_owner_gone(&self) {
        self.phase.owner_gone.store(true, Relaxed);
        tracing::debug!("the owner of the memory is gone");
        self.end_recording(TraceEnd::OwnerEnded);
        self.end();
    }

    /// Records an install that found no memory, and logs the first of a series.
    fn record_shortage(&self, large: bool) {
        add(self.stats.shortages_of(large), 1);
        if !self.shortage_of(large).swap(true, Relaxed) {
            let _of = self.span.enter();
            tracing::warn!("cannot install pages: {}", InstallError::NoMemory { large });
        }
    }

    /// Records an install that found memory.
    fn record_memory(&self, large: bool) {
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

    /// Keeps a failure for the report and logs it, once per page however often the page is tried.
    pub(crate) fn report(&self, failure: &Failure) {
        if self.keep_failure(failure) {
            let _of = self.span.enter();
            tracing::warn!(%failure, "cannot restore a page");
        }
    }

    /// Keeps a failure for the report. Returns `true` if it is new and is to be logged.
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
        let is_kept = failures.kept.len() < MAX_KEPT_FAILURES;
        if is_kept {
            failures.kept.push(failure.clone());
        }
        is_kept
    }

    /// Returns the failures kept, and how many there were in total.
    pub(crate) fn failures(&self) -> (Vec<Failure>, u64) {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        (failures.kept.clone(), failures.count)
    }
}
