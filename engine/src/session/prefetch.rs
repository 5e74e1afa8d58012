//! Bringing pages before they are touched: the same path as for faults, from the other side.

use std::ops::Range;

use snapshot_format::Reason;

use super::fault::{Brought, Lost};
use super::install::Stop;
use super::platform::{Image, PageNumber, Platform};
use super::{Session, Worker};

/// Why prefetch stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrefetchStop {
    /// The session ends.
    Ending,
    /// The kernel would not go on.
    Kernel,
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Brings what is absent of `pages`. `pause` is called before each frame or fill, with no claim
    /// held, and returns when demand may be overtaken. Returns how many pages were left absent: because somebody
    /// else is bringing them, or because they can't be restored (which is reported).
    pub(crate) fn prefetch(
        &self,
        worker: &mut Worker<I>,
        pages: Range<PageNumber>,
        mut pause: impl FnMut(),
    ) -> Result<u64, PrefetchStop> {
        let mut left = 0;
        let mut next = pages.start;
        while let Some(absent) = self.state.absent_in(next..pages.end) {
            if self.is_ending() {
                return Err(PrefetchStop::Ending);
            }
            pause();
            let page = absent.start;
            next = page + 1;
            match self.bring(worker, page, Reason::Prefetch) {
                Ok(Brought::Yes) => {}
                Ok(Brought::Look) | Err(Lost::Stopped(Stop::NoMemory)) => left += 1,
                Err(Lost::Failed(failure)) => {
                    self.report(&failure);
                    left += 1;
                }
                Err(Lost::Stopped(Stop::OwnerGone)) => {
                    self.owner_is_gone();
                    return Err(PrefetchStop::Ending);
                }
                Err(Lost::Stopped(Stop::Stuck | Stop::Refused(_))) => {
                    return Err(PrefetchStop::Kernel);
                }
            }
        }
        if self.state.may_be_settled() {
            self.platform.kick();
        }
        Ok(left)
    }
}
