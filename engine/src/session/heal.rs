//! Healing: pages that were poisoned because they could not be had then, and can be now.
//!
//! ```text
//! heal():
//!   keep the session from completing: afterwards nothing can be installed any more
//!   for each poisoned page: look up what it is, read, check, decode
//!     hold the lock shared: COPY it over the poison, mark it present
//! ```
//!
//! The kernel takes a COPY over poison. To ZEROPAGE and POISON it says EEXIST, so a page of zeros is
//! copied as well.

use std::sync::atomic::Ordering::Relaxed;

use snapshot_format::Reason;
use snapshot_format::layout::PAGE_SIZE;

use super::bring::Lost;
use super::install::Stop;
use super::large::Assembly;
use super::map::{LARGE_PAGES, block_of};
use super::platform::{Content, Image, Installed, PageNumber, Platform};
use super::state::Status;
use super::stats::add;
use super::{Failure, FailureKind, Left, PrefetchStop, Session, Worker};
use snaprestore_uffd::uffd::Wake;

/// What one hold came to.
enum Held {
    /// The page is there, or nobody wants it any more.
    Settled,
    /// Read events first.
    Again,
    /// No memory now.
    NoMemory,
    /// It can't go on.
    Stop(Stop),
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Brings the pages that are poisoned. Unless `last`, it stops at the first that can't be read
    /// now, without a report. Returns what was left; [`State::count_poisoned`] tells what stays
    /// poisoned.
    ///
    /// [`State::count_poisoned`]: super::State::count_poisoned
    pub(crate) fn heal(&self, worker: &mut Worker<I>, last: bool) -> Result<Left, PrefetchStop> {
        if self.state.first_poisoned(0).is_none() || self.phase.finishing.swap(true, Relaxed) {
            return Ok(Left::default());
        }
        worker.prepare(&self.state);
        let healed = self.heal_each(worker, last);
        self.phase.finishing.store(false, Relaxed);
        self.look_if_settled();
        healed
    }

    fn heal_each(&self, worker: &mut Worker<I>, last: bool) -> Result<Left, PrefetchStop> {
        let mut left = Left::default();
        let mut next = 0;
        while let Some(page) = self.state.first_poisoned(next) {
            if self.is_ending() {
                return Err(PrefetchStop::Ending);
            }
            let large = self.is_large(page);
            next = if large { block_of(page).end } else { page + 1 };
            let healed = if large {
                self.heal_large(worker, page)
            } else {
                self.heal_page(worker, page)
            };
            match healed {
                Ok(()) => {}
                Err(Lost::Failed(failure)) if failure.kind == FailureKind::Io && !last => {
                    left.unread += 1;
                    return Ok(left);
                }
                Err(Lost::Failed(failure)) => {
                    self.report(&failure);
                    left.failed += 1;
                }
                Err(Lost::Stopped(Stop::OwnerGone)) => {
                    self.owner_is_gone();
                    return Err(PrefetchStop::Ending);
                }
                Err(Lost::Stopped(stop)) => {
                    self.report(&self.install_failure(page, stop));
                    left.failed += 1;
                }
            }
        }
        Ok(left)
    }

    fn heal_page(&self, worker: &mut Worker<I>, page: PageNumber) -> Result<(), Lost> {
        match self.image.content(page, Reason::Prefetch)? {
            Content::Fill(word) => {
                let bytes = &worker.filled(word)[..PAGE_SIZE];
                Ok(self.install_over_poison(page, bytes)?)
            }
            Content::Stored(frame, slot) => {
                if let Some(failure) = worker.known_bad(&frame) {
                    let failure = failure.clone();
                    return Err(Lost::Failed(Failure { page, ..failure }));
                }
                self.refuse_deadly(page, &frame)?;
                let slots = self.image.slots(&frame);
                self.decode(worker, page, &frame, slots, Reason::Prefetch)?;
                let start = usize::from(slot) * PAGE_SIZE;
                let bytes = &self.image.bytes(&worker.decoder)[start..start + PAGE_SIZE];
                Ok(self.install_over_poison(page, bytes)?)
            }
            Content::Unavailable => Err(self.unavailable(page).into()),
        }
    }

    fn install_over_poison(&self, page: PageNumber, bytes: &[u8]) -> Result<(), Stop> {
        let (mut tries, mut shortages) = (0, 0);
        loop {
            match self.hold_over_poison(page, bytes) {
                Held::Settled => return Ok(()),
                Held::Again => self.after_again(&mut tries, page)?,
                Held::NoMemory => {
                    self.after_no_memory(&mut shortages, page, false, Reason::Prefetch)?;
                }
                Held::Stop(stop) => return Err(stop),
            }
        }
    }

    /// One hold of the lock: {look up; one COPY}.
    fn hold_over_poison(&self, page: PageNumber, bytes: &[u8]) -> Held {
        let _hold = self.platform.shared(page);
        let pages = page..page + 1;
        if self.state.status(page) != Status::Poisoned {
            return Held::Settled;
        }
        let Some(at) = self.state.map().rest_from(page) else {
            return Held::Settled;
        };
        match self.platform.copy(at.address, bytes, Wake::Now) {
            Installed::Done | Installed::Partial(_) => {
                self.state.mark_healed(pages);
                add(&self.stats.prefetch.copied, 1);
                Held::Settled
            }
            // Another thread heals it.
            Installed::Exists => Held::Settled,
            Installed::Again => Held::Again,
            Installed::Gone if self.platform.is_changing(at.address) => Held::Again,
            Installed::Gone => {
                self.state.mark_removed(pages);
                Held::Settled
            }
            Installed::NoMemory => Held::NoMemory,
            Installed::OwnerGone => Held::Stop(Stop::OwnerGone),
            Installed::Refused(errno) => Held::Stop(Stop::Refused(errno)),
        }
    }

    fn heal_large(&self, worker: &mut Worker<I>, page: PageNumber) -> Result<(), Lost> {
        let mut assembly = worker.assembly.take().unwrap_or_else(Assembly::new);
        let pages = block_of(page);
        let healed = match self.assemble(worker, &mut assembly, pages, Reason::Prefetch) {
            Ok(Some(_)) => self.install_large_over_poison(&mut assembly, page),
            Ok(None) => Ok(()),
            Err(failure) => Err(failure.into()),
        };
        worker.assembly = Some(assembly);
        healed
    }

    fn install_large_over_poison(
        &self,
        assembly: &mut Assembly<I::Frame>,
        page: PageNumber,
    ) -> Result<(), Lost> {
        let over = Status::Poisoned;
        if self.install_large(assembly, page, over, Wake::Now, Reason::Prefetch)? {
            add(&self.stats.prefetch.copied, LARGE_PAGES);
        }
        Ok(())
    }
}
