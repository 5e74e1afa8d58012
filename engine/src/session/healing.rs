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

use crate::session::Session;
use crate::session::failure::{Failure, FailureKind};
use crate::session::fault::context::{Assembly, ThreadContext};
use crate::session::fault::install::InstallRetries;
use crate::session::fault::outcome::{InstallError, LoadError, Prefetched};
use crate::session::platform::{Content, Image, Installed, PageNumber, Platform};
use crate::session::state::Status;
use crate::session::state::address_map::{LARGE_PAGES, block_of};
use crate::session::stats::add;

impl<P: Platform, I: Image> Session<P, I> {
    /// Loads the poisoned pages. Unless this is the `last` attempt, it stops without a report at
    /// the first page that can't be read now. Returns the pages that were left, or `None` if the
    /// session ends; [`State::count_poisoned`] returns how many stay poisoned.
    ///
    /// [`State::count_poisoned`]: super::State::count_poisoned
    pub(crate) fn heal(&self, context: &mut ThreadContext<I>, last: bool) -> Option<Prefetched> {
        if self.state.first_poisoned(0).is_none() || self.phase.finishing.swap(true, Relaxed) {
            return Some(Prefetched::default());
        }
        context.prepare(&self.state);
        let healed = self.heal_each(context, last);
        self.phase.finishing.store(false, Relaxed);
        self.wake_if_settled();
        healed
    }

    fn heal_each(&self, context: &mut ThreadContext<I>, last: bool) -> Option<Prefetched> {
        let mut done = Prefetched::default();
        let mut next = 0;
        while let Some(page) = self.state.first_poisoned(next) {
            if self.is_ending() {
                return None;
            }
            let large = self.is_large(page);
            next = if large { block_of(page).end } else { page + 1 };
            let healed = if large {
                self.heal_large(context, page)
            } else {
                self.heal_page(context, page)
            };
            match healed {
                Ok(()) => {}
                Err(LoadError::Content(failure)) if failure.kind == FailureKind::Io && !last => {
                    done.unread += 1;
                    return Some(done);
                }
                Err(LoadError::Content(failure)) => {
                    self.report(&failure);
                    done.failed += 1;
                }
                Err(LoadError::Install(InstallError::OwnerGone)) => {
                    self.mark_owner_gone();
                    return None;
                }
                Err(LoadError::Install(error)) => {
                    self.report(&self.install_failure(page, error));
                    done.failed += 1;
                }
            }
        }
        Some(done)
    }

    fn heal_page(&self, context: &mut ThreadContext<I>, page: PageNumber) -> Result<(), LoadError> {
        match self.image.content(page, Reason::Prefetch)? {
            Content::Fill(word) => {
                let bytes = &context.filled(word)[..PAGE_SIZE];
                Ok(self.install_over_poison(page, bytes)?)
            }
            Content::Stored(frame, slot) => {
                if let Some(failure) = context.known_bad(&frame) {
                    let failure = failure.clone();
                    return Err(LoadError::Content(Failure { page, ..failure }));
                }
                self.check_quarantine(page, &frame)?;
                let slots = self.image.slots(&frame);
                self.decode(context, page, &frame, slots, Reason::Prefetch)?;
                let start = usize::from(slot) * PAGE_SIZE;
                let bytes = &self.image.bytes(&context.decoder)[start..start + PAGE_SIZE];
                Ok(self.install_over_poison(page, bytes)?)
            }
            Content::Unavailable => Err(self.unavailable(page).into()),
        }
    }

    fn install_over_poison(&self, page: PageNumber, bytes: &[u8]) -> Result<(), InstallError> {
        // Each page is tried once, so it is retried as often as a large one.
        let mut retries = InstallRetries::new(true, Reason::Prefetch);
        while let Err(error) = self.install_over_poison_once(page, bytes) {
            self.before_retry(&mut retries, error, page)?;
        }
        Ok(())
    }

    /// Looks up the page and issues one COPY, in one hold of the lock.
    fn install_over_poison_once(&self, page: PageNumber, bytes: &[u8]) -> Result<(), InstallError> {
        let _hold = self.platform.shared(page);
        let pages = page..page + 1;
        if self.state.status(page) != Status::Poisoned {
            return Ok(());
        }
        let Some(at) = self.state.map().rest_from(page) else {
            return Ok(());
        };
        match self.platform.copy(at.address, bytes) {
            Installed::Done | Installed::Partial(_) => {
                self.state.mark_healed(pages);
                add(&self.stats.prefetch.copied, 1);
                Ok(())
            }
            // Another thread is healing it.
            Installed::Exists => Ok(()),
            Installed::Again => Err(InstallError::Changing),
            Installed::Gone if self.platform.is_changing(at.address) => Err(InstallError::Changing),
            Installed::Gone => {
                self.state.mark_removed(pages);
                Ok(())
            }
            Installed::NoMemory => Err(InstallError::NoMemory { large: false }),
            Installed::OwnerGone => Err(InstallError::OwnerGone),
            Installed::Refused(errno) => Err(InstallError::Refused(errno)),
        }
    }

    fn heal_large(
        &self,
        context: &mut ThreadContext<I>,
        page: PageNumber,
    ) -> Result<(), LoadError> {
        let mut assembly = context.assembly.take().unwrap_or_else(Assembly::new);
        let pages = block_of(page);
        let healed = match self.assemble(context, &mut assembly, pages, Reason::Prefetch) {
            Ok(Some(_)) => self.install_large_over_poison(&mut assembly, page),
            Ok(None) => Ok(()),
            Err(failure) => Err(failure.into()),
        };
        context.assembly = Some(assembly);
        healed
    }

    fn install_large_over_poison(
        &self,
        assembly: &mut Assembly<I::Frame>,
        page: PageNumber,
    ) -> Result<(), LoadError> {
        let over = Status::Poisoned;
        if self.install_large(assembly, page, over, Reason::Prefetch)? {
            add(&self.stats.prefetch.copied, LARGE_PAGES);
        }
        Ok(())
    }
}
