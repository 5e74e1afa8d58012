//! Prefetch: loads pages before they are touched, on the same path as faults.

use std::ops::Range;

use snapshot_format::Reason;

use crate::session::fault::install::InstallError;
use crate::session::fault::load::{LoadError, Loaded};
use crate::session::platform::{Content, Image, PageNumber, Platform};
use crate::session::state::address_map::block_of;
use crate::session::{FailureKind, Session, ThreadContext};

/// The reason why prefetch stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrefetchStop {
    /// The session ends.
    Ending,
    /// The kernel refused to continue. The failure was reported.
    Kernel,
}

/// The outcome of a prefetch, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Pages that this thread loaded, including those that came with them.
    pub(crate) brought: u64,
    /// Pages left absent because another thread was loading them. Try them again.
    pub(crate) busy: u64,
    /// Pages left absent because there was no memory for the first of them.
    pub(crate) short: u64,
    /// Pages left absent because the first of them could not be read, although it may be later.
    pub(crate) unread: u64,
    /// After `unread`: the first of the untried pages that may be in another frame.
    pub(crate) rest: Option<PageNumber>,
    /// Pages left absent because they can't be restored, which was reported.
    pub(crate) failed: u64,
}

impl Left {
    /// Adds the outcome of another call.
    pub(crate) fn add(&mut self, other: Self) {
        self.brought += other.brought;
        self.busy += other.busy;
        self.short += other.short;
        self.unread += other.unread;
        self.failed += other.failed;
    }
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Loads the absent pages of `pages`, which must lie in one index block. `pause` is called
    /// before each frame or fill, with no claim held, and returns when prefetch may compete with
    /// demand again.
    ///
    /// Stops at the first page that can't be read now or for which there is no memory. Such a page
    /// is reported only if this is the `last` attempt.
    pub(crate) fn prefetch(
        &self,
        worker: &mut ThreadContext<I>,
        pages: Range<PageNumber>,
        last: bool,
        mut pause: impl FnMut(),
    ) -> Result<Left, PrefetchStop> {
        // The thread may work for several sessions.
        let _of = self.span.enter();
        worker.prepare(&self.state);
        let mut left = Left::default();
        let mut next = pages.start;
        while let Some(page) = self.state.first_absent(next..pages.end) {
            if self.is_ending() {
                return Err(PrefetchStop::Ending);
            }
            let known = self.image.unavailable_until(page).min(pages.end);
            if known > page {
                self.report(&self.unavailable(page));
                left.failed += known - page;
                next = known;
                continue;
            }
            pause();
            let large = self.is_large(page);
            next = if large { block_of(page).end } else { page + 1 };
            match self.load_unit(worker, page, large, Reason::Prefetch) {
                Ok(Loaded::Yes) => left.brought += 1,
                Ok(Loaded::Look) => left.busy += 1,
                Err(LoadError::Stopped(stop @ InstallError::NoMemory)) => {
                    if last {
                        self.report(&self.install_failure(page, stop));
                    }
                    left.short += self.state.count_absent(page..pages.end);
                    break;
                }
                Err(LoadError::Failed(failure)) if failure.kind == FailureKind::Io && !last => {
                    tracing::debug!(%failure, "prefetch reads a page again");
                    left.unread += 1;
                    left.rest = self.behind_frame(page, pages.end).filter(|_| !large);
                    break;
                }
                Err(LoadError::Failed(failure)) => {
                    self.report(&failure);
                    left.failed += 1;
                }
                Err(LoadError::Stopped(InstallError::OwnerGone)) => {
                    self.owner_is_gone();
                    return Err(PrefetchStop::Ending);
                }
                Err(LoadError::Stopped(
                    stop @ (InstallError::Stuck | InstallError::Refused(_)),
                )) => {
                    self.report(&self.install_failure(page, stop));
                    return Err(PrefetchStop::Kernel);
                }
            }
        }
        self.look_if_settled();
        Ok(left)
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
