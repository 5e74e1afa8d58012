//! Loads a page, and the pages that come with it.
//!
//! ```text
//! bring(page):
//!   fill: install the fills around it
//!   stored: claim the frame; if another claim blocks this, wait (a fault) and look again
//!           read, check, decode up to the page, and install it
//!           decode the rest; install the page's run, the other runs, and the fills between them
//!   unavailable: an error
//! ```

use std::collections::VecDeque;
use std::ops::Range;

use snapshot_format::Reason;
use snapshot_format::layout::{PAGE_SIZE, PAGES_PER_BLOCK_U64};

use crate::fail_point::{FailPoint, fail_point};
use crate::session::fault::huge::Assembly;
use crate::session::fault::install::{HOLD_PAGES, InstallError, Purpose, Source};
use crate::session::platform::{Content, Image, PageNumber, Platform, Run};
use crate::session::state::Status;
use crate::session::stats::{ContentSource, FaultKind, FaultTrace};
use crate::session::{Failure, FailureKind, Session, SnapshotImage};
use snaprestore_uffd::uffd::Wake;

/// Number of pages in the buffer from which fills other than zero are installed. (The model has no
/// fills and makes many buffers.)
const FILL_PAGES: usize = if cfg!(test) { 1 } else { 64 };
/// Maximum number of pages of a frame for which a fault waits as a whole: decoding and copying this
/// many takes as long as one more system call for the wanted page. (The frames of the model have
/// two pages.)
const PAGES_WORTH_WAITING: u16 = if cfg!(test) { 1 } else { 4 };
/// Description of the failure of a quarantined frame.
const DEADLY: &str = "quarantined: two workers crashed or hung while reading it";
/// Number of damaged frames that a thread remembers.
const BAD_FRAMES: usize = 64;
/// Maximum number of runs in a frame: each slot four times.
const MAX_RUNS: usize =
    snapshot_format::layout::MAX_FRAME_SLOTS * snapshot_format::layout::MAX_LISTED_PAGES_PER_SLOT;

/// Resources that a thread needs to serve a fault or to prefetch.
pub(crate) struct ThreadContext<I: Image> {
    pub(crate) decoder: I::Decoder,
    pub(crate) runs: Vec<Run>,
    fill: Vec<u8>,
    fill_word: u64,
    /// The number of the session's thread that uses this context.
    pub(crate) number: usize,
    /// Whether this thread runs on the core of the thread that it serves.
    pub(crate) shares_core: bool,
    /// Facts gathered about the fault that this thread is serving.
    pub(crate) trace: FaultTrace,
    /// Buffer in which a large page is assembled, in a session with large pages.
    pub(crate) assembly: Option<Assembly<I::Frame>>,
    /// Frames that prefetch could not use, the latest last; they are not read again for each page.
    bad: VecDeque<(I::Frame, Failure)>,
}

/// A source of contexts for threads that have something to do.
pub(crate) trait LendContext<I: Image> {
    /// Calls `work` with a context that no other thread uses meanwhile.
    fn with<T>(&self, work: impl FnOnce(&mut ThreadContext<I>) -> T) -> T;
}

impl ThreadContext<SnapshotImage> {
    /// Whether the context was lent to this session before.
    pub(crate) fn knows(&self, image: &SnapshotImage) -> bool {
        image.is_known_to(&self.decoder)
    }

    /// Whether the context was lent to a session of this snapshot before.
    pub(crate) fn is_prepared(&self, image: &SnapshotImage) -> bool {
        image.is_prepared(&self.decoder)
    }

    /// Prepares the context for new work in this session.
    pub(crate) fn adopt(&mut self, image: &SnapshotImage) {
        image.adopt(&mut self.decoder);
        self.bad.clear();
    }
}

impl<I: Image> ThreadContext<I> {
    pub(crate) fn new(decoder: I::Decoder) -> Self {
        Self {
            decoder,
            number: usize::MAX,
            runs: Vec::with_capacity(MAX_RUNS),
            fill: vec![0; FILL_PAGES * PAGE_SIZE],
            fill_word: 0,
            shares_core: false,
            trace: FaultTrace::default(),
            assembly: None,
            bad: VecDeque::new(),
        }
    }

    pub(crate) fn known_bad(&self, frame: &I::Frame) -> Option<&Failure> {
        let known = self.bad.iter().find(|(bad, _)| bad == frame);
        known.map(|(_, failure)| failure)
    }

    fn remember_bad(&mut self, frame: &I::Frame, failure: &Failure) {
        if self.bad.len() == BAD_FRAMES {
            self.bad.pop_front();
        }
        self.bad.push_back((*frame, failure.clone()));
    }

    /// Returns the purpose of installing `page` and the pages installed with it.
    pub(crate) fn purpose(&self, page: PageNumber, reason: Reason) -> Purpose {
        let later = reason == Reason::Demand && self.shares_core;
        Purpose {
            reason,
            wanted: Some(page),
            wake: if later { Wake::Later } else { Wake::Now },
        }
    }

    /// Returns a buffer of pages that repeat `word`.
    pub(crate) fn filled(&mut self, word: u64) -> &[u8] {
        if self.fill_word != word {
            for chunk in self.fill.chunks_exact_mut(8) {
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            self.fill_word = word;
        }
        &self.fill
    }
}

/// The outcome of an attempt to load a page.
pub(crate) enum Loaded {
    /// This thread installed it.
    Yes,
    /// The page's state may have changed: look it up again.
    Look,
}

/// The reason why a page was not loaded.
pub(crate) enum LoadError {
    /// Its content is unavailable.
    Failed(Failure),
    /// The page could not be installed.
    Stopped(InstallError),
}

impl From<Failure> for LoadError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<InstallError> for LoadError {
    fn from(stop: InstallError) -> Self {
        Self::Stopped(stop)
    }
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Loads `page`, which is absent, and the pages that come with it.
    pub(crate) fn bring(
        &self,
        worker: &mut ThreadContext<I>,
        page: PageNumber,
        reason: Reason,
    ) -> Result<Loaded, LoadError> {
        let done = match self.image.content(page, reason)? {
            Content::Fill(word) => {
                worker.trace.meet(FaultKind::Fill);
                worker.trace.from = ContentSource::Fill;
                let purpose = worker.purpose(page, reason);
                self.bring_fill(worker, page, word, purpose)?
            }
            Content::Stored(frame, slot) => {
                worker.trace.meet(FaultKind::Stored);
                if reason == Reason::Prefetch
                    && let Some(failure) = worker.known_bad(&frame)
                {
                    let failure = failure.clone();
                    return Err(LoadError::Failed(Failure { page, ..failure }));
                }
                let id = self.image.id(&frame);
                self.check_quarantine(page, &frame)?;
                let Some(claim) = self.claims.claim(id, reason) else {
                    worker.trace.from = ContentSource::Another;
                    if reason == Reason::Demand {
                        self.platform.wait_unclaimed(&self.claims, id);
                    }
                    return Ok(Loaded::Look);
                };
                // The previous holder of the claim may have loaded it.
                if self.state.status(page) != Status::Absent {
                    worker.trace.from = ContentSource::Another;
                    return Ok(Loaded::Look);
                }
                let done = self.bring_frame(worker, page, &frame, slot, reason)?;
                drop(claim);
                done
            }
            Content::Unavailable => return Err(LoadError::Failed(self.unavailable(page))),
        };
        Ok(if done { Loaded::Yes } else { Loaded::Look })
    }

    /// Installs the fills around `page`.
    fn bring_fill(
        &self,
        worker: &mut ThreadContext<I>,
        page: PageNumber,
        word: u64,
        purpose: Purpose,
    ) -> Result<bool, LoadError> {
        let reason = purpose.reason;
        let most = if word == 0 {
            HOLD_PAGES
        } else {
            FILL_PAGES as u64
        };
        let same = |p: &PageNumber| matches!(self.image.content(*p, reason), Ok(Content::Fill(w)) if w == word);
        let window = window(page, most);
        let start = (window.start..page)
            .rev()
            .take_while(same)
            .last()
            .unwrap_or(page);
        let end = (page + 1..window.end)
            .take_while(same)
            .last()
            .map_or(page + 1, |p| p + 1);
        let source = if word == 0 {
            Source::Zeros
        } else {
            Source::Filled(worker.filled(word))
        };
        Ok(self.install(start..end, source, purpose)?)
    }

    /// Decodes `frame` and installs its content: `page`, then the pages around it that its own
    /// index block lists, then, when nobody waits any more, the pages that the frame lists and some
    /// of those that repeat it elsewhere.
    fn bring_frame(
        &self,
        worker: &mut ThreadContext<I>,
        page: PageNumber,
        frame: &I::Frame,
        slot: u16,
        reason: Reason,
    ) -> Result<bool, LoadError> {
        let slots = self.image.slots(frame);
        let purpose = worker.purpose(page, reason);
        let mut done = false;
        if reason == Reason::Demand && slots > PAGES_WORTH_WAITING {
            self.decode(worker, page, frame, slot + 1, reason)?;
            let alone = Run {
                page,
                slot,
                count: 1,
            };
            let source = Source::Frame(self.image.bytes(&worker.decoder), alone);
            done = self.install(alone.pages(), source, purpose)?;
        }
        match self.decode(worker, page, frame, slots, reason) {
            Ok(()) => {}
            Err(failure) if done => {
                // A fault for another of its pages will hit the same failure.
                tracing::debug!(%failure, "the rest of a frame is left");
                return Ok(true);
            }
            Err(failure) => return Err(failure.into()),
        }
        let near = self.run_around(page, frame, slot, reason);
        let bytes = self.image.bytes(&worker.decoder);
        let purpose = if done {
            Purpose::along(reason)
        } else {
            purpose
        };
        match self.install(near.pages(), Source::Frame(bytes, near), purpose) {
            Ok(now) => done |= now,
            // The pages around the wanted one were only installed along with it.
            Err(InstallError::NoMemory | InstallError::Stuck) if done => return Ok(true),
            Err(stop) => return Err(stop.into()),
        }
        let own = self
            .image
            .runs(&mut worker.decoder, reason, &mut worker.runs);
        let bytes = self.image.bytes(&worker.decoder);
        let purpose = Purpose::along(reason);
        for run in &worker.runs {
            if self.is_ending() {
                return Ok(done);
            }
            match self.install(run.pages(), Source::Frame(bytes, *run), purpose) {
                Ok(_) => {}
                Err(InstallError::NoMemory | InstallError::Stuck) if done => return Ok(true),
                Err(stop) => return Err(stop.into()),
            }
        }
        if reason == Reason::Demand {
            worker.runs.truncate(own);
            self.bring_fills_between(worker, page);
        }
        Ok(done)
    }

    /// Decodes the first `slots` pages of `frame` to load `page`.
    pub(crate) fn decode(
        &self,
        worker: &mut ThreadContext<I>,
        page: PageNumber,
        frame: &I::Frame,
        slots: u16,
        reason: Reason,
    ) -> Result<(), Failure> {
        self.state
            .decoding(worker.number, Some(self.image.id(frame).0));
        fail_point(FailPoint::Decoding);
        let decoded = self.image.decode(&mut worker.decoder, frame, slots, reason);
        self.state.decoding(worker.number, None);
        worker.trace.decoded(self.image.was_cached(&worker.decoder));
        decoded.map_err(|failure| {
            let failure = Failure { page, ..failure };
            // A fault reads the frame anew: the file may have been repaired.
            if reason == Reason::Prefetch {
                worker.remember_bad(frame, &failure);
            }
            failure
        })
    }

    /// Installs the fills that lie between the pages in `worker.runs`, near `page`: they take
    /// microseconds, whereas a separate fault for each takes many.
    fn bring_fills_between(&self, worker: &mut ThreadContext<I>, page: PageNumber) {
        let block = window(page, PAGES_PER_BLOCK_U64);
        let near = worker.runs.iter().map(Run::pages);
        let near = near.filter(|pages| block.contains(&pages.start));
        let Some(between) = near.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)) else {
            return;
        };
        let purpose = Purpose::along(Reason::Demand);
        let mut next = between.start;
        while let Some(page) = self.state.first_absent(next..between.end.min(block.end)) {
            next = page + 1;
            if let Ok(Content::Fill(word)) = self.image.content(page, Reason::Demand)
                && self.bring_fill(worker, page, word, purpose).is_err()
            {
                // The next fault for the page will hit the same failure.
                return;
            }
        }
    }

    /// Returns the pages around `page`, within its hold-sized window, that are as consecutive in
    /// `frame` as they are here. The window lies in one index block, which was read to find `page`.
    fn run_around(&self, page: PageNumber, frame: &I::Frame, slot: u16, reason: Reason) -> Run {
        let is_at = |other: PageNumber, slot: u16| matches!(self.image.content(other, reason), Ok(Content::Stored(f, s)) if f == *frame && s == slot);
        let window = window(page, HOLD_PAGES);
        let mut run = Run {
            page,
            slot,
            count: 1,
        };
        while run.page > window.start && run.slot > 0 && is_at(run.page - 1, run.slot - 1) {
            run.page -= 1;
            run.slot -= 1;
            run.count += 1;
        }
        while run.pages().end < window.end && is_at(run.pages().end, run.slot + run.count) {
            run.count += 1;
        }
        run
    }

    /// Fails `page` if its frame is quarantined because a worker died on it.
    pub(crate) fn check_quarantine(
        &self,
        page: PageNumber,
        frame: &I::Frame,
    ) -> Result<(), Failure> {
        let id = self.image.id(frame);
        if !self.quarantined.contains(&id) {
            return Ok(());
        }
        Err(Failure {
            page,
            offset: Some(id.0),
            kind: FailureKind::Damaged,
            ..self.image.failure(DEADLY.to_owned())
        })
    }

    /// Returns the failure of a page whose content is not in the snapshot.
    pub(crate) fn unavailable(&self, page: PageNumber) -> Failure {
        Failure {
            page,
            kind: FailureKind::Unavailable,
            ..self
                .image
                .failure("it could not be read when the snapshot was taken".to_owned())
        }
    }
}

impl Run {
    /// Returns the page numbers of this run.
    pub(crate) fn pages(&self) -> Range<PageNumber> {
        self.page..self.page + u64::from(self.count)
    }
}

/// Returns the aligned window of `pages` pages around `page`.
fn window(page: PageNumber, pages: u64) -> Range<PageNumber> {
    let start = page / pages * pages;
    start..start + pages
}
