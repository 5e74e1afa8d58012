//! Loads a page, and the pages that come with it.
//!
//! ```text
//! load(page):
//!   fill: install the fills around it (while a recording runs: only the page, here and below)
//!   stored: claim the frame; if another claim blocks this, wait (a fault) and look up again
//!           read, check, decode up to the page, and install it
//!           decode the rest; install the page's run, the other runs, and the fills between them
//!   unavailable: an error
//! ```

use std::ops::Range;

use snapshot_format::Reason;
use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use crate::fail_point::{FailPoint, fail_point};
use crate::session::Session;
use crate::session::failure::{Failure, FailureKind};
use crate::session::fault::context::{FILL_PAGES, Purpose, ThreadContext};
use crate::session::fault::install::{MAX_HOLD_PAGES, Source};
use crate::session::fault::outcome::{InstallError, LoadError};
use crate::session::platform::{Content, Image, PageNumber, Platform, Run};
use crate::session::state::Status;
use crate::session::stats::{ContentSource, FaultKind};

/// Maximum number of pages of a frame for which a fault waits as a whole: decoding and copying this
/// many takes as long as one more system call for the wanted page. (The frames of the model have
/// two pages.)
const MAX_PAGES_AT_ONCE: u16 = if cfg!(test) { 1 } else { 4 };
/// Description of the failure of a quarantined frame.
const QUARANTINED: &str = "quarantined: two workers crashed or hung while reading it";

impl<P: Platform, I: Image> Session<P, I> {
    /// Loads `page`, which is absent, and the pages that come with it; if `large`, the whole large
    /// page. If `alone`, nothing else is installed. Returns `true` if this thread installed it.
    /// Otherwise its state may have changed: look it up again.
    pub(crate) fn load(
        &self,
        context: &mut ThreadContext<I>,
        page: PageNumber,
        large: bool,
        reason: Reason,
        alone: bool,
    ) -> Result<bool, LoadError> {
        if large {
            return self.load_large(context, page, reason);
        }
        match self.image.content(page, reason)? {
            Content::Fill(word) => {
                context.trace.meet(FaultKind::Fill);
                context.trace.from = ContentSource::Fill;
                let purpose = Purpose::wanted(page, reason);
                Ok(self.load_fill(context, page, word, purpose, alone)?)
            }
            Content::Stored(frame, slot) => {
                context.trace.meet(FaultKind::Stored);
                if reason == Reason::Prefetch
                    && let Some(failure) = context.known_bad(&frame)
                {
                    let failure = failure.clone();
                    return Err(LoadError::Content(Failure { page, ..failure }));
                }
                let id = self.image.id(&frame);
                self.check_quarantine(page, &frame)?;
                let Some(claim) = self.in_flight.claim(id, reason) else {
                    context.trace.from = ContentSource::Another;
                    if reason == Reason::Demand {
                        let wait = || self.in_flight.wait(id);
                        self.platform.wait_in_flight(id, wait);
                    }
                    return Ok(false);
                };
                // The previous holder of the claim may have loaded it.
                if self.state.status(page) != Status::Absent {
                    context.trace.from = ContentSource::Another;
                    return Ok(false);
                }
                let installed = self.load_frame(context, page, &frame, slot, reason, alone)?;
                drop(claim);
                Ok(installed)
            }
            Content::Unavailable => Err(LoadError::Content(self.unavailable(page))),
        }
    }

    /// Installs the fill at `page` and, unless `alone`, those around it.
    fn load_fill(
        &self,
        context: &mut ThreadContext<I>,
        page: PageNumber,
        word: u64,
        purpose: Purpose,
        alone: bool,
    ) -> Result<bool, InstallError> {
        let reason = purpose.reason;
        let most = if alone {
            1
        } else if word == 0 {
            MAX_HOLD_PAGES
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
            Source::Filled(context.filled(word))
        };
        self.install(start..end, source, purpose)
    }

    /// Decodes `frame` and installs its content: `page`, then the pages around it that its own
    /// index block lists, then, when nobody waits any more, the pages that the frame lists (a frame
    /// of an ancestor: that the index block lists) and some of those that repeat it elsewhere. If
    /// `alone`, decodes all of it, but installs only `page`.
    fn load_frame(
        &self,
        context: &mut ThreadContext<I>,
        page: PageNumber,
        frame: &I::Frame,
        slot: u16,
        reason: Reason,
        alone: bool,
    ) -> Result<bool, LoadError> {
        let slots = self.image.slots(frame);
        let purpose = Purpose::wanted(page, reason);
        let single = Run {
            page,
            slot,
            count: 1,
        };
        let mut done = false;
        if reason == Reason::Demand && slots > MAX_PAGES_AT_ONCE {
            self.decode(context, page, frame, slot + 1, reason)?;
            let source = Source::Frame(self.image.bytes(&context.decoder), single);
            done = self.install(single.pages(), source, purpose)?;
        }
        match self.decode(context, page, frame, slots, reason) {
            Ok(()) => {}
            Err(failure) if done => {
                // A fault for another of its pages will hit the same failure.
                tracing::debug!(%failure, "the rest of a frame is left");
                return Ok(true);
            }
            Err(failure) => return Err(failure.into()),
        }
        if alone && done {
            return Ok(true);
        }
        let near = if alone {
            single
        } else {
            self.run_around(page, frame, slot, reason)
        };
        let bytes = self.image.bytes(&context.decoder);
        let purpose = if done {
            Purpose::along(reason)
        } else {
            purpose
        };
        match self.install(near.pages(), Source::Frame(bytes, near), purpose) {
            Ok(now) => done |= now,
            // The pages around the wanted one were only installed along with it.
            Err(InstallError::NoMemory { .. } | InstallError::Changing) if done => return Ok(true),
            Err(error) => return Err(error.into()),
        }
        if alone {
            return Ok(done);
        }
        let own = self
            .image
            .runs(&mut context.decoder, page, reason, &mut context.runs);
        let bytes = self.image.bytes(&context.decoder);
        let purpose = Purpose::along(reason);
        for run in &context.runs {
            if self.is_ending() {
                return Ok(done);
            }
            match self.install(run.pages(), Source::Frame(bytes, *run), purpose) {
                Ok(_) => {}
                Err(InstallError::NoMemory { .. } | InstallError::Changing) if done => {
                    return Ok(true);
                }
                Err(error) => return Err(error.into()),
            }
        }
        if reason == Reason::Demand {
            context.runs.truncate(own);
            self.load_fills_between(context, page);
        }
        Ok(done)
    }

    /// Decodes the first `slots` pages of `frame` to load `page`.
    pub(crate) fn decode(
        &self,
        context: &mut ThreadContext<I>,
        page: PageNumber,
        frame: &I::Frame,
        slots: u16,
        reason: Reason,
    ) -> Result<(), Failure> {
        self.state
            .set_decoding(context.number, Some(self.image.id(frame)));
        fail_point(FailPoint::Decoding);
        let decoded = self
            .image
            .decode(&mut context.decoder, frame, slots, reason);
        self.state.set_decoding(context.number, None);
        context
            .trace
            .decoded(self.image.was_cached(&context.decoder));
        decoded.map_err(|failure| {
            let failure = Failure { page, ..failure };
            // A fault reads the frame anew: the file may have been repaired.
            if reason == Reason::Prefetch {
                context.remember_bad(frame, &failure);
            }
            failure
        })
    }

    /// Installs the fills that lie between the pages in `context.runs`, near `page`: they take
    /// microseconds, whereas a separate fault for each takes many.
    fn load_fills_between(&self, context: &mut ThreadContext<I>, page: PageNumber) {
        let block = window(page, PAGES_PER_BLOCK_U64);
        let near = context.runs.iter().map(Run::pages);
        let near = near.filter(|pages| block.contains(&pages.start));
        let Some(between) = near.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)) else {
            return;
        };
        let purpose = Purpose::along(Reason::Demand);
        let mut next = between.start;
        while let Some(page) = self.state.first_absent(next..between.end.min(block.end)) {
            next = page + 1;
            if let Ok(Content::Fill(word)) = self.image.content(page, Reason::Demand)
                && self.load_fill(context, page, word, purpose, false).is_err()
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
        let window = window(page, MAX_HOLD_PAGES);
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
            kind: FailureKind::Damaged,
            ..self.image.frame_failure(frame, QUARANTINED.to_owned())
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

/// Returns the aligned window of `pages` pages around `page`.
fn window(page: PageNumber, pages: u64) -> Range<PageNumber> {
    let start = page / pages * pages;
    start..start + pages
}
