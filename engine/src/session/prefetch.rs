//! Bringing pages before they are touched: the same path as for faults, from the other side.

use std::ops::Range;

use snapshot_format::Reason;

use super::bring::{Brought, Lost};
use super::install::Stop;
use super::map::block_of;
use super::platform::{Image, PageNumber, Platform};
use super::{Session, Worker};

/// Why prefetch stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrefetchStop {
    /// The session ends.
    Ending,
    /// The kernel would not go on. It was reported.
    Kernel,
}

/// Pages that a prefetch left absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Somebody else was bringing them, or there was no memory just then: look again.
    pub(crate) busy: u64,
    /// Those of them for which there was no memory.
    pub(crate) short: u64,
    /// They can't be restored; it was reported.
    pub(crate) failed: u64,
}

impl Left {
    /// Adds what another call left.
    pub(crate) fn add(&mut self, other: Self) {
        self.busy += other.busy;
        self.short += other.short;
        self.failed += other.failed;
    }
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Brings what is absent of `pages`. `pause` is called before each frame or fill, with no claim
    /// held, and returns when demand may be overtaken. Returns how many pages were left absent.
    pub(crate) fn prefetch(
        &self,
        worker: &mut Worker<I>,
        pages: Range<PageNumber>,
        mut pause: impl FnMut(),
    ) -> Result<Left, PrefetchStop> {
        // The thread may work for many sessions.
        let _of = self.span.enter();
        worker.prepare(&self.state);
        let mut left = Left::default();
        let mut next = pages.start;
        while let Some(page) = self.state.first_absent(next..pages.end) {
            if self.is_ending() {
                return Err(PrefetchStop::Ending);
            }
            pause();
            let large = self.is_large(page);
            next = if large { block_of(page).end } else { page + 1 };
            match self.bring_unit(worker, page, large, Reason::Prefetch) {
                Ok(Brought::Yes) => {}
                Ok(Brought::Look) => left.busy += 1,
                Err(Lost::Stopped(Stop::NoMemory)) => {
                    left.busy += 1;
                    left.short += 1;
                    if large {
                        // There is none for the next either.
                        break;
                    }
                }
                Err(Lost::Failed(failure)) => {
                    self.report(&failure);
                    left.failed += 1;
                }
                Err(Lost::Stopped(Stop::OwnerGone)) => {
                    self.owner_is_gone();
                    return Err(PrefetchStop::Ending);
                }
                Err(Lost::Stopped(stop @ (Stop::Stuck | Stop::Refused(_)))) => {
                    self.report(&self.install_failure(page, stop));
                    return Err(PrefetchStop::Kernel);
                }
            }
        }
        self.look_if_settled();
        Ok(left)
    }
}
