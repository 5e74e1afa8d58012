//! Installs pages into the owner's memory, one hold of the install lock after another.
//!
//! ```text
//! install(pages):
//!   while pages are left:
//!     hold the lock shared:
//!       find the next absent pages, and where the owner has them now
//!       one ioctl for at most 256 KiB of them, which wakes their waiters
//!       mark the pages that it installed
//!     after EAGAIN: read events, then continue (everything is looked up again)
//! ```

use std::ops::Range;

use snapshot_format::Reason;
use snapshot_format::layout::PAGE_SIZE;

use crate::fail_point::{FailPoint, fail_point};
use crate::session::fault::context::Purpose;
use crate::session::fault::outcome::InstallError;
use crate::session::platform::{Image, Installed, PAGE, PageNumber, Platform, Run};
use crate::session::stats::add;
use crate::session::{Counters, Session};

/// Maximum number of pages of one hold: 256 KiB, so that the reader of events waits only briefly.
pub(crate) const MAX_HOLD_PAGES: u64 = 64;

/// Maximum number of pages of one hold that poisons: 1 GiB, for which the kernel takes about 30 ms.
const MAX_POISON_PAGES: u64 = 1 << 18;

/// Number of consecutive refusals of POISON after which the owner is held up.
const MAX_POISON_REFUSALS: u32 = 16;

/// Returns how often an install that found no memory is retried: for some seconds for a fault, only
/// briefly for prefetch. Large pages come from a pool, in which one becomes free only when somebody
/// returns it.
const fn no_memory_retries(large: bool, reason: Reason) -> u32 {
    match reason {
        Reason::Demand => 1000,
        _ if large => 100,
        _ => 20,
    }
}

/// The source from which pages are installed.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Slots of a decoded frame: `run.page` is in `run.slot`.
    Frame(&'a [u8], Run),
    /// Zeros.
    Zeros,
    /// A buffer that repeats the page; it may be shorter than the range.
    Filled(&'a [u8]),
    /// Nothing: the pages become poisoned.
    Poison,
}

/// Retries of one install so far.
pub(crate) struct InstallRetries {
    /// Consecutive attempts that met a changing mapping with no event to read.
    changing: u32,
    /// Consecutive attempts that found no memory.
    no_memory: u32,
    max_no_memory: u32,
}

impl InstallRetries {
    pub(crate) fn new(large: bool, reason: Reason) -> Self {
        Self {
            changing: 0,
            no_memory: 0,
            max_no_memory: no_memory_retries(large, reason),
        }
    }

    /// Returns the retries of an install that a thread waits for.
    pub(crate) fn of_fault() -> Self {
        Self::new(false, Reason::Demand)
    }
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Installs the absent pages of `pages`. Returns `true` if this call installed the wanted page
    /// and woke its waiters.
    pub(crate) fn install(
        &self,
        pages: Range<PageNumber>,
        source: Source<'_>,
        purpose: Purpose,
    ) -> Result<bool, InstallError> {
        // A page that is not absent never becomes absent again, so there is no need to take the
        // lock.
        if !self.state.any_absent(pages.clone()) {
            return Ok(false);
        }
        let mut next = pages.start;
        let mut limit = source.max_pages();
        let mut retries = InstallRetries::new(false, purpose.reason);
        let mut wanted_done = false;
        let (mut refusals, mut brake) = (0, None);
        while next < pages.end {
            let piece = next..pages.end.min(next + limit);
            let installed = self.install_piece(piece, source, |done| {
                let installed = done.end - done.start;
                wanted_done |= purpose.wanted.is_some_and(|page| done.contains(&page));
                count(&self.stats, source, purpose.reason, installed);
            });
            fail_point(FailPoint::Marked);
            match installed {
                Ok((page, None)) => {
                    next = page;
                    (retries, refusals) = (InstallRetries::new(false, purpose.reason), 0);
                    limit = source.max_pages().min(limit * 2);
                    self.record_memory(false);
                }
                Ok((page, Some(fewer))) => (next, limit) = (page, fewer),
                Err(error) => {
                    self.before_retry(&mut retries, error, next)?;
                    refusals += u32::from(error == InstallError::Changing);
                    if matches!(source, Source::Poison) && refusals > MAX_POISON_REFUSALS {
                        brake.get_or_insert_with(|| self.platform.brake());
                        // The thread that was released must run before the next one is held up.
                        self.platform.back_off(1);
                    }
                }
            }
        }
        Ok(wanted_done)
    }

    /// Looks up pages and issues one ioctl, in one hold of the lock. Passes the pages that it
    /// installed, and the address of the first, to `done`. Returns the first page that is left and,
    /// if the range may span several mappings, how many pages to try at once from there.
    fn install_piece(
        &self,
        pages: Range<PageNumber>,
        source: Source<'_>,
        done: impl FnOnce(Range<PageNumber>),
    ) -> Result<(PageNumber, Option<u64>), InstallError> {
        let _hold = self.platform.shared(pages.start);
        let Some(absent) = self.state.absent_in(pages.clone()) else {
            return Ok((pages.end, None));
        };
        let first = absent.start;
        // Unmapping a page also marks it removed, in the same exclusive hold.
        let Some(rest) = self.state.map().rest_from(first) else {
            return Ok((first + 1, None));
        };
        if rest.large {
            return Ok((rest.page_numbers().end, None));
        }
        let address = rest.address;
        let count = (absent.end - first).min(rest.pages).min(source.max_pages());
        let installed = source.install(&self.platform, first, address, count);
        fail_point(FailPoint::Installed);
        match installed {
            Installed::Done => {
                self.mark(first..first + count, source);
                done(first..first + count);
                Ok((first + count, None))
            }
            Installed::Partial(bytes) => {
                let end = first + bytes / PAGE;
                self.mark(first..end, source);
                done(first..end);
                Ok((end, None))
            }
            Installed::Exists => {
                self.state.mark_present(first..first + 1);
                self.platform.wake(address, PAGE);
                Ok((first + 1, None))
            }
            Installed::Again => {
                add(&self.stats.retries, 1);
                Err(InstallError::Changing)
            }
            // The range may span several mappings, each of which accepts a part of it.
            Installed::Gone if count > 1 => Ok((first, Some(count / 2))),
            // The kernel checks for a change before it looks up the mapping: a change that began
            // meanwhile has moved or unmapped the page. Its event, which can't be read during this
            // hold, will say where the page is.
            Installed::Gone if self.platform.is_changing(address) => Err(InstallError::Changing),
            Installed::Gone => {
                self.state.mark_removed(first..first + 1);
                self.platform.wake(address, PAGE);
                Ok((first + 1, None))
            }
            Installed::NoMemory => Err(InstallError::NoMemory { large: false }),
            Installed::OwnerGone => Err(InstallError::OwnerGone),
            Installed::Refused(errno) => Err(InstallError::Refused(errno)),
        }
    }

    /// Records the installed pages.
    fn mark(&self, pages: Range<PageNumber>, source: Source<'_>) {
        match source {
            Source::Poison => self.state.mark_poisoned(pages),
            Source::Frame(..) | Source::Zeros | Source::Filled(_) => self.state.mark_present(pages),
        }
    }

    /// Prepares another attempt after `error`: reads events, and waits if that alone changes
    /// nothing. Returns the error if there must be no further attempt.
    pub(crate) fn before_retry(
        &self,
        retries: &mut InstallRetries,
        error: InstallError,
        about: u64,
    ) -> Result<(), InstallError> {
        match error {
            InstallError::Changing => self.after_changing(&mut retries.changing, about),
            InstallError::NoMemory { large } => {
                if retries.no_memory == retries.max_no_memory {
                    self.record_shortage(large);
                    return Err(error);
                }
                retries.no_memory += 1;
                if large {
                    self.state.beat_all();
                }
                // The owner may be about to return memory, and proceeds only after the event of
                // that was read.
                self.read_now(about);
                self.platform.back_off(retries.no_memory);
                Ok(())
            }
            InstallError::OwnerGone | InstallError::Refused(_) => Err(error),
        }
    }

    /// Handles EAGAIN: reads the events that it announced, or waits if there are none yet.
    pub(crate) fn after_changing(&self, tries: &mut u32, about: u64) -> Result<(), InstallError> {
        self.state.beat_all();
        if self.read_now(about) {
            *tries = 0;
            return Ok(());
        }
        *tries += 1;
        if self.platform.back_off(*tries) {
            Ok(())
        } else {
            Err(InstallError::Changing)
        }
    }

    /// Reads events in the middle of an install. Returns `true` if there were any.
    fn read_now(&self, about: u64) -> bool {
        let any = self.read_events(about) > 0;
        if any {
            self.wake_if_settled();
            if !self.queue.is_empty() {
                self.platform.kick();
            }
        }
        any
    }
}

impl Source<'_> {
    /// Returns the maximum number of pages of one ioctl from this source.
    fn max_pages(&self) -> u64 {
        match self {
            Self::Filled(buffer) => (buffer.len() / PAGE_SIZE) as u64,
            Self::Frame(..) | Self::Zeros => MAX_HOLD_PAGES,
            Self::Poison => MAX_POISON_PAGES,
        }
    }

    /// Issues the ioctl for `count` pages from `first` on, which the owner has at `address`.
    #[expect(clippy::cast_possible_truncation)] // Lengths of buffers in memory.
    fn install(
        &self,
        platform: &impl Platform,
        first: PageNumber,
        address: u64,
        count: u64,
    ) -> Installed {
        let len = count * PAGE;
        match self {
            Self::Frame(bytes, run) => {
                let start = (u64::from(run.slot) + (first - run.page)) * PAGE;
                let bytes = &bytes[start as usize..(start + len) as usize];
                platform.copy(address, bytes)
            }
            Self::Zeros => platform.zeropage(address, len),
            Self::Filled(buffer) => platform.copy(address, &buffer[..len as usize]),
            Self::Poison => platform.poison(address, len),
        }
    }
}

/// Counts installed pages by kind and reason.
fn count(stats: &Counters, source: Source<'_>, reason: Reason, pages: u64) {
    let by_reason = match reason {
        Reason::Demand => &stats.demand,
        _ => &stats.prefetch,
    };
    let counter = match source {
        Source::Frame(..) => &by_reason.copied,
        Source::Zeros => &by_reason.zeroed,
        Source::Filled(_) => &by_reason.filled,
        Source::Poison => &stats.poisoned,
    };
    add(counter, pages);
}
