//! Memory in pages of 2 MiB (hugetlbfs), which are installed whole or not at all.
//!
//! ```text
//! load_large(block):
//!   claim it; if another claim blocks this, wait (a fault) and look again
//!   for each of its 512 pages that is not removed: look up its content, write it if it is a fill
//!   for each frame that holds some of the others, by offset: read, check, decode as far as needed,
//!     and copy the pages it holds
//!   if the content of one of them is unavailable, the whole page fails
//!   install:
//!     hold the lock shared:
//!       look up its address and state
//!       absent: zero the parts removed by now, one COPY of 2 MiB, mark all 512 present
//!     EAGAIN or no memory: read events, then hold again
//! ```
//!
//! The states are kept per 4 KiB, as everywhere: the owner may discard any part.
//!
//! # The state of a large page as a whole
//!
//! When the owner discards a part, the kernel sends the event for exactly that part. If the large
//! page is present, the kernel zeroes the part, or frees the page if the part is all of it. If the
//! page is missing, the kernel does nothing else. A fault means that the page is missing, and then:
//!
//! | its bits | history | state |
//! | --- | --- | --- |
//! | all removed | it was discarded, at once or piece by piece | removed: zeros |
//! | any present | it was installed once, so it was discarded as a whole since | present: zeros |
//! | some removed, none present | it was never installed | absent: zeros, rest from the snapshot |
//!
//! In the second case it doesn't matter which events of the discard were read. In the third case
//! the removed parts are zero, and the rest comes from the snapshot.
//!
//! One present bit is enough, because a worker may die while it sets the 512: if such a page
//! counted as absent, its old content would return from the snapshot. A page that is present and
//! partly removed needs no action: the kernel zeroes the parts after the event has been read, thus
//! after any COPY that was decided before the event, and a COPY decided later contains zeros there.
//!
//! # When the pool is empty
//!
//! The kernel returns ENOMEM or (seen with 6.18) EEXIST, as for a page that is present. Trusting
//! that EEXIST would mark a page present that was never installed, and its next fault would give
//! zeros. Therefore a thread that gets EEXIST checks the owner's page map, and treats a missing
//! page as a lack of memory: it retries for some seconds and reads events in between, because a
//! discard may be what frees a page. After that the owner is killed.
//!
//! One hold is longer than the 256 KiB of other installs, because the kernel doesn't accept a part
//! of such a page.

use std::ops::Range;

use snapshot_format::Reason;
use snapshot_format::layout::PAGE_SIZE;

use crate::fail_point::{FailPoint, fail_point};
use crate::session::Session;
use crate::session::failure::Failure;
use crate::session::fault::context::{Assembly, Part, ThreadContext};
use crate::session::fault::install::InstallRetries;
use crate::session::fault::outcome::{InstallError, LoadError};
use crate::session::platform::{Content, FrameId, Image, Installed, PageNumber, Platform};
use crate::session::state::Status;
use crate::session::state::address_map::block_of;
use crate::session::stats::add;
use snaprestore_uffd::to_usize;

/// Distinguishes the claim of a large page from that of a frame: no snapshot has this many layers.
const LARGE_CLAIM: u16 = u16::MAX;

/// Number of pages in a large page, by kind of content.
#[derive(Clone, Copy, Default)]
pub(crate) struct Parts {
    copied: u64,
    filled: u64,
    zeroed: u64,
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Returns zeros for a large page, or for the part of it that its owner still has mapped.
    pub(crate) fn zeros_of(&self, len: u64) -> &[u8] {
        &self.zeros[..to_usize(len)]
    }

    /// Loads the large page that contains `page`, which is absent. Returns `true` if this thread
    /// installed it.
    pub(super) fn load_large(
        &self,
        context: &mut ThreadContext<I>,
        page: PageNumber,
        reason: Reason,
    ) -> Result<bool, LoadError> {
        let id = FrameId {
            layer: LARGE_CLAIM,
            offset: block_of(page).start,
        };
        let Some(claim) = self.in_flight.claim(id, reason) else {
            if reason == Reason::Demand {
                self.platform.wait_in_flight(id, || self.in_flight.wait(id));
            }
            return Ok(false);
        };
        // Taken out of the context, because its decoder is needed at the same time.
        let mut assembly = context.assembly.take().unwrap_or_else(Assembly::new);
        let installed = self.load_claimed(context, &mut assembly, page, reason);
        context.assembly = Some(assembly);
        drop(claim);
        installed
    }

    fn load_claimed(
        &self,
        context: &mut ThreadContext<I>,
        assembly: &mut Assembly<I::Frame>,
        page: PageNumber,
        reason: Reason,
    ) -> Result<bool, LoadError> {
        // The previous holder of the claim may have loaded it.
        if self.settle(page) {
            return Ok(false);
        }
        let Some(parts) = self.assemble(context, assembly, block_of(page), reason)? else {
            return Ok(false);
        };
        if !self.install_large(assembly, page, Status::Absent, reason)? {
            return Ok(false);
        }
        let pages = match reason {
            Reason::Demand => &self.stats.demand,
            _ => &self.stats.prefetch,
        };
        add(&pages.copied, parts.copied);
        add(&pages.filled, parts.filled);
        add(&pages.zeroed, parts.zeroed);
        Ok(true)
    }

    /// Marks all of the large page that contains `page` if it is settled, and returns whether it
    /// is: a worker that died while marking it must not leave a part that stays wanted forever.
    fn settle(&self, page: PageNumber) -> bool {
        let _hold = self.platform.shared(page);
        let Some(unit) = self.state.map().unit_of(page) else {
            return true;
        };
        match self.state.status_of(&unit) {
            Status::Absent => return false,
            Status::Present => self.state.mark_present(unit.pages),
            Status::Poisoned => self.state.mark_poisoned(unit.pages),
            Status::Removed => {}
        }
        true
    }

    /// Writes the content of `pages` to the buffer, except for pages that are removed. Returns
    /// `None` if the session ends.
    pub(crate) fn assemble(
        &self,
        context: &mut ThreadContext<I>,
        assembly: &mut Assembly<I::Frame>,
        pages: Range<PageNumber>,
        reason: Reason,
    ) -> Result<Option<Parts>, Failure> {
        let mut parts = Parts::default();
        assembly.stored.clear();
        for page in pages {
            if self.state.status(page) == Status::Removed {
                parts.zeroed += 1;
                continue;
            }
            match self.image.content(page, reason)? {
                Content::Fill(word) => {
                    let counter = if word == 0 {
                        &mut parts.zeroed
                    } else {
                        &mut parts.filled
                    };
                    *counter += 1;
                    let bytes = assembly.pages_mut(&(page..page + 1));
                    for chunk in bytes.chunks_exact_mut(8) {
                        chunk.copy_from_slice(&word.to_le_bytes());
                    }
                }
                Content::Stored(frame, slot) => {
                    parts.copied += 1;
                    assembly.stored.push(Part { frame, slot, page });
                }
                Content::Unavailable => return Err(self.unavailable(page)),
            }
        }
        // Each frame is decoded once, however its pages are scattered.
        let mut stored = std::mem::take(&mut assembly.stored);
        stored.sort_unstable_by_key(|part| (self.image.id(&part.frame), part.slot));
        let copied = self.copy_stored(context, assembly, &stored, reason);
        assembly.stored = stored;
        Ok(copied?.then_some(parts))
    }

    /// Copies the pages whose content is in frames to the buffer. Returns `false` if the session
    /// ends.
    fn copy_stored(
        &self,
        context: &mut ThreadContext<I>,
        assembly: &mut Assembly<I::Frame>,
        stored: &[Part<I::Frame>],
        reason: Reason,
    ) -> Result<bool, Failure> {
        for of_frame in stored.chunk_by(|a, b| a.frame == b.frame) {
            let (Some(first), Some(last)) = (of_frame.first(), of_frame.last()) else {
                continue;
            };
            if reason != Reason::Demand {
                if self.is_ending() {
                    return Ok(false);
                }
                if let Some(failure) = context.known_bad(&first.frame) {
                    let page = first.page;
                    return Err(Failure {
                        page,
                        ..failure.clone()
                    });
                }
            }
            self.check_quarantine(first.page, &first.frame)?;
            self.decode(context, first.page, &first.frame, last.slot + 1, reason)?;
            let bytes = self.image.bytes(&context.decoder);
            for part in of_frame {
                let slot = &bytes[usize::from(part.slot) * PAGE_SIZE..][..PAGE_SIZE];
                assembly
                    .pages_mut(&(part.page..part.page + 1))
                    .copy_from_slice(slot);
            }
        }
        Ok(true)
    }

    /// Installs the large page that contains `page` from the buffer, if its state is `over` (absent
    /// or poisoned). Returns `true` if this call installed it.
    pub(crate) fn install_large(
        &self,
        assembly: &mut Assembly<I::Frame>,
        page: PageNumber,
        over: Status,
        reason: Reason,
    ) -> Result<bool, InstallError> {
        let mut retries = InstallRetries::new(true, reason);
        loop {
            match self.install_large_once(assembly, page, over) {
                Ok(installed) => {
                    if installed {
                        self.record_memory(true);
                    }
                    return Ok(installed);
                }
                Err(error) => self.before_retry(&mut retries, error, page)?,
            }
        }
    }

    /// Looks up the page, zeroes its removed parts and issues one COPY, in one hold of the lock.
    /// Returns `false` if there was nothing to install.
    fn install_large_once(
        &self,
        assembly: &mut Assembly<I::Frame>,
        page: PageNumber,
        over: Status,
    ) -> Result<bool, InstallError> {
        let _hold = self.platform.shared(page);
        // Unmapping a page also marks it removed, in the same exclusive hold.
        let Some(unit) = self.state.map().unit_of(page) else {
            return Ok(false);
        };
        if self.state.status_of(&unit) != over {
            return Ok(false);
        }
        self.state.each_removed(unit.pages.clone(), |page| {
            assembly.pages_mut(&(page..page + 1)).fill(0);
        });
        let bytes = assembly.pages_mut(&unit.pages);
        let installed = self.platform.copy(unit.address, bytes);
        fail_point(FailPoint::Installed);
        match installed {
            Installed::Done => {
                if over == Status::Poisoned {
                    self.state.mark_healed(unit.pages.clone());
                } else {
                    self.state.mark_present(unit.pages.clone());
                }
                Ok(true)
            }
            // Another thread is healing it.
            Installed::Exists if over == Status::Poisoned => Ok(false),
            Installed::Exists if self.platform.is_there(unit.address) => {
                self.state.mark_present(unit.pages.clone());
                self.platform.wake(unit.address, unit.len());
                Ok(false)
            }
            Installed::Exists | Installed::NoMemory => Err(InstallError::NoMemory { large: true }),
            Installed::Again => {
                add(&self.stats.retries, 1);
                Err(InstallError::Changing)
            }
            // As with small pages: a change that began meanwhile has moved or unmapped it.
            Installed::Gone if self.platform.is_changing(unit.address) => {
                Err(InstallError::Changing)
            }
            Installed::Gone => {
                self.state.mark_removed(unit.pages.clone());
                self.platform.wake(unit.address, unit.len());
                Ok(false)
            }
            // The mapping has small pages, contrary to what was declared.
            Installed::Partial(_) => Err(InstallError::Refused(libc::EINVAL)),
            Installed::OwnerGone => Err(InstallError::OwnerGone),
            Installed::Refused(errno) => Err(InstallError::Refused(errno)),
        }
    }
}
