//! Prefetch: loads pages before they are touched, on the same path as faults.

use std::ops::Range;
use std::time::Instant;

use snapshot_format::Reason;

use crate::session::Session;
use crate::session::failure::FailureKind;
use crate::session::fault::context::ThreadContext;
use crate::session::fault::outcome::{InstallError, LoadError, Prefetched};
use crate::session::platform::{Content, Image, PageNumber, Platform};
use crate::session::state::Status;
use crate::session::state::address_map::block_of;

impl<P: Platform, I: Image> Session<P, I> {
    /// Loads the absent pages of `pages`, which must lie in one index block. `may_continue` is
    /// called before each frame or fill, with no claim held. When prefetch may compete with demand
    /// again, it returns whether to continue; if not, the rest is left untried. `then` are the
    /// pages that follow in the next calls: their frames are read together with those of `pages`
    /// if they lie together. That read holds no claim, so demand does not wait for it.
    ///
    /// Stops at the first page that can't be read now or for which there is no memory. Such a page
    /// is reported only if this is the `last` attempt. Returns `None` if the session ends.
    pub(crate) fn prefetch(
        &self,
        context: &mut ThreadContext<I>,
        pages: Range<PageNumber>,
        then: &[Range<PageNumber>],
        last: bool,
        mut may_continue: impl FnMut() -> bool,
    ) -> Option<Prefetched> {
        // The thread may work for several sessions.
        let _of = self.span.enter();
        context.prepare(&self.state);
        let mut done = Prefetched::default();
        let mut next = pages.start;
        while let Some(page) = self.state.first_absent(next..pages.end) {
            if self.is_ending() {
                return None;
            }
            let known = self.image.unavailable_until(page).min(pages.end);
            if known > page {
                self.report(&self.unavailable(page));
                done.failed += known - page;
                next = known;
                continue;
            }
            if !may_continue() {
                done.rest = Some(page);
                break;
            }
            self.advance_timeline(Instant::now());
            let large = self.is_large(page);
            next = if large { block_of(page).end } else { page + 1 };
            if !large {
                self.read_ahead(context, page..pages.end, then);
            }
            match self.load(context, page, large, Reason::Prefetch, false) {
                Ok(true) => done.loaded += 1,
                Ok(false) => done.busy += 1,
                Err(LoadError::Install(error @ InstallError::NoMemory { .. })) => {
                    if last {
                        self.report(&self.install_failure(page, error));
                    }
                    done.no_memory += self.state.count_absent(page..pages.end);
                    break;
                }
                Err(LoadError::Content(failure)) if failure.kind == FailureKind::Io && !last => {
                    tracing::debug!(%failure, "prefetch reads a page again");
                    done.unread += 1;
                    done.rest = self.behind_frame(page, pages.end).filter(|_| !large);
                    break;
                }
                Err(LoadError::Content(failure)) => {
                    self.report(&failure);
                    done.failed += 1;
                }
                Err(LoadError::Install(InstallError::OwnerGone)) => {
                    self.mark_owner_gone();
                    return None;
                }
                Err(LoadError::Install(
                    error @ (InstallError::Changing | InstallError::Refused(_)),
                )) => {
                    self.report(&self.install_failure(page, error));
                    done.refused = true;
                    return Some(done);
                }
            }
        }
        self.wake_if_settled();
        Some(done)
    }

    /// Reads the frames of the absent pages of `pages` and `then` ahead, as far as they lie
    /// together. Only some of the pages are looked up: two in each frame, if all of its pages are
    /// wanted.
    fn read_ahead(
        &self,
        context: &mut ThreadContext<I>,
        pages: Range<PageNumber>,
        then: &[Range<PageNumber>],
    ) {
        let frame = |page| match self.image.content(page, Reason::Prefetch) {
            Ok(Content::Stored(frame, _)) => Some(frame),
            _ => None,
        };
        let pages = std::iter::once(pages).chain(then.iter().cloned());
        let mut absent = pages
            .flatten()
            .filter(|page| self.state.status(*page) == Status::Absent);
        let Some(first) = absent.next().and_then(frame) else {
            return;
        };
        let step = usize::from(self.image.slots(&first) / 2).max(1);
        let others = absent.skip(step - 1).step_by(step).map_while(frame);
        let frames = std::iter::once(first).chain(others);
        self.image.read_ahead(&mut context.decoder, frames);
    }

    /// Returns whether `page` is part of a large page.
    pub(crate) fn is_large(&self, page: PageNumber) -> bool {
        self.state.has_large() && {
            let _hold = self.platform.shared(page);
            let unit = self.state.map().unit_of(page);
            unit.is_some_and(|unit| unit.large)
        }
    }

    /// Returns the first page after `page`, and before `end`, that lies in another frame, or `None`
    /// if it is not known.
    fn behind_frame(&self, page: PageNumber, end: PageNumber) -> Option<PageNumber> {
        let frame = |page| match self.image.content(page, Reason::Prefetch) {
            Ok(Content::Stored(frame, _)) => Some(frame),
            _ => None,
        };
        let bad = frame(page)?;
        (page + 1..end).find(|page| frame(*page) != Some(bad))
    }
}
