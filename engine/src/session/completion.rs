//! Healing: replaces poison by content that was unavailable earlier and is available now.
//!
//! ```text
//! heal():
//!   keep the session from completing, because nothing can be installed afterwards
//!   for each poisoned page: look up its content, read, check, decode
//!     hold the lock shared: COPY it over the poison, mark it present
//! ```
//!
//! The kernel accepts a COPY over poison. ZEROPAGE and POISON return EEXIST there, so a page of
//! zeros is copied as well.

use std::sync::atomic::Ordering::Relaxed;

use snapshot_format::Reason;
use snapshot_format::layout::PAGE_SIZE;

use crate::session::fault::huge::Assembly;
use crate::session::fault::install::InstallError;
use crate::session::fault::load::LoadError;
use crate::session::platform::{Content, Image, Installed, PageNumber, Platform};
use crate::session::state::Status;
use crate::session::state::address_map::{LARGE_PAGES, block_of};
use crate::session::stats::add;
use crate::session::{Failure, FailureKind, Left, PrefetchStop, Session, ThreadContext};
use snaprestore_uffd::uffd::Wake;

/// The outcome of one hold of the lock.
enum HoldOutcome {
    /// The page is present, or nobody wants it any more.
    Settled,
    /// Read events first.
    Again,
    /// The kernel had no memory for the page.
    NoMemory,
    /// The install failed for good.
    Failed(InstallError),
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Loads the poisoned pages. Unless this is the `last` attempt, it stops without a report at
    /// the first page that can't be read now. Returns the pages that were left;
    /// [`State::count_poisoned`] returns how many stay poisoned.
    ///
    /// [`State::count_poisoned`]: super::State::count_poisoned
    pub(crate) fn heal(
        &self,
        worker: &mut ThreadContext<I>,
        last: bool,
    ) -> Result<Left, PrefetchStop> {
        if self.state.first_poisoned(0).is_none() || self.phase.finishing.swap(true, Relaxed) {
            return Ok(Left::default());
        }
        worker.prepare(&self.state);
        let healed = self.heal_each(worker, last);
        self.phase.finishing.store(false, Relaxed);
        self.look_if_settled();
        healed
    }

    fn heal_each(&self, worker: &mut ThreadContext<I>, last: bool) -> Result<Left, PrefetchStop> {
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
                Err(LoadError::Failed(failure)) if failure.kind == FailureKind::Io && !last => {
                    left.unread += 1;
                    return Ok(left);
                }
                Err(LoadError::Failed(failure)) => {
                    self.report(&failure);
                    left.failed += 1;
                }
                Err(LoadError::Stopped(InstallError::OwnerGone)) => {
                    self.owner_is_gone();
                    return Err(PrefetchStop::Ending);
                }
                Err(LoadError::Stopped(stop)) => {
                    self.report(&self.install_failure(page, stop));
                    left.failed += 1;
                }
            }
        }
        Ok(left)
    }

    fn heal_page(&self, worker: &mut ThreadContext<I>, page: PageNumber) -> Result<(), LoadError> {
        match self.image.content(page, Reason::Prefetch)? {
            Content::Fill(word) => {
                let bytes = &worker.filled(word)[..PAGE_SIZE];
                Ok(self.install_over_poison(page, bytes)?)
            }
            Content::Stored(frame, slot) => {
                if let Some(failure) = worker.known_bad(&frame) {
                    let failure = failure.clone();
                    return Err(LoadError::Failed(Failure { page, ..failure }));
                }
                self.check_quarantine(page, &frame)?;
                let slots = self.image.slots(&frame);
                self.decode(worker, page, &frame, slots, Reason::Prefetch)?;
                let start = usize::from(slot) * PAGE_SIZE;
                let bytes = &self.image.bytes(&worker.decoder)[start..start + PAGE_SIZE];
                Ok(self.install_over_poison(page, bytes)?)
            }
            Content::Unavailable => Err(self.unavailable(page).into()),
        }
    }

    fn install_over_poison(&self, page: PageNumber, bytes: &[u8]) -> Result<(), InstallError> {
        let (mut tries, mut shortages) = (0, 0);
        loop {
            match self.hold_over_poison(page, bytes) {
                HoldOutcome::Settled => return Ok(()),
                HoldOutcome::Again => self.after_again(&mut tries, page)?,
                HoldOutcome::NoMemory => {
                    self.after_no_memory(&mut shortages, page, false, Reason::Prefetch)?;
                }
                HoldOutcome::Failed(stop) => return Err(stop),
            }
        }
    }

    /// Looks up the page and issues one COPY, in one hold of the lock.
    fn hold_over_poison(&self, page: PageNumber, bytes: &[u8]) -> HoldOutcome {
        let _hold = self.platform.shared(page);
        let pages = page..page + 1;
        if self.state.status(page) != Status::Poisoned {
            return HoldOutcome::Settled;
        }
        let Some(at) = self.state.map().rest_from(page) else {
            return HoldOutcome::Settled;
        };
        match self.platform.copy(at.address, bytes, Wake::Now) {
            Installed::Done | Installed::Partial(_) => {
                self.state.mark_healed(pages);
                add(&self.stats.prefetch.copied, 1);
                HoldOutcome::Settled
            }
            // Another thread is healing it.
            Installed::Exists => HoldOutcome::Settled,
            Installed::Again => HoldOutcome::Again,
            Installed::Gone if self.platform.is_changing(at.address) => HoldOutcome::Again,
            Installed::Gone => {
                self.state.mark_removed(pages);
                HoldOutcome::Settled
            }
            Installed::NoMemory => HoldOutcome::NoMemory,
            Installed::OwnerGone => HoldOutcome::Failed(InstallError::OwnerGone),
            Installed::Refused(errno) => HoldOutcome::Failed(InstallError::Refused(errno)),
        }
    }

    fn heal_large(&self, worker: &mut ThreadContext<I>, page: PageNumber) -> Result<(), LoadError> {
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
    ) -> Result<(), LoadError> {
        let over = Status::Poisoned;
        if self.install_large(assembly, page, over, Wake::Now, Reason::Prefetch)? {
            add(&self.stats.prefetch.copied, LARGE_PAGES);
        }
        Ok(())
    }
}
