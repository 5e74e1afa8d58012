//! Installs pages into the owner's memory, one hold of the install lock after another.
//!
//! ```text
//! install(pages):
//!   while pages are left:
//!     hold the lock shared:
//!       find the next absent pages, and where the owner has them now
//!       one ioctl for at most 256 KiB of them, which wakes their waiters
//!       mark the pages that it installed
//!     wake the waiters only now if they would run on this core and meet the lock
//!     after EAGAIN: read events, then continue (everything is looked up again)
//! ```

use std::ops::Range;

use snapshot_format::Reason;
use snapshot_format::layout::PAGE_SIZE;

use crate::fail_point::{FailPoint, fail_point};
use crate::session::platform::{Image, Installed, PAGE, PageNumber, Platform, Run};
use crate::session::stats::add;
use crate::session::{Counters, Session};
use snaprestore_uffd::uffd::Wake;

/// Maximum number of pages of one hold: 256 KiB, so that the reader of events waits only briefly.
pub(crate) const HOLD_PAGES: u64 = 64;

/// Maximum number of pages of one hold that poisons: 1 GiB, for which the kernel takes about 30 ms.
const POISON_PAGES: u64 = 1 << 18;

/// Number of consecutive refusals of POISON after which the owner is held up.
const MAX_REFUSALS: u32 = 16;

/// Returns how often an install that found no memory is retried: for some seconds for a fault, only
/// briefly for prefetch.
const fn memory_tries(reason: Reason) -> u32 {
    if matches!(reason, Reason::Demand) {
        1000
    } else {
        20
    }
}

/// Returns how often an install of a large page that found no memory is retried. Large pages come
/// from a pool, in which one becomes free only when somebody returns it.
const fn large_memory_tries(reason: Reason) -> u32 {
    if matches!(reason, Reason::Demand) {
        1000
    } else {
        100
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

/// The purpose of an install.
#[derive(Clone, Copy)]
pub(crate) struct Purpose {
    pub(crate) reason: Reason,
    /// The page that a thread is known to wait for.
    pub(crate) wanted: Option<PageNumber>,
    /// When the waiter for that page is woken: at once, or after the lock was released. A waiter on
    /// this core may run at once, and would then meet the lock at its next fault.
    pub(crate) wake: Wake,
}

impl Purpose {
    /// Returns the purpose of pages that are installed along with others.
    pub(crate) fn along(reason: Reason) -> Self {
        Self {
            reason,
            wanted: None,
            wake: Wake::Now,
        }
    }
}

/// Returns advice to the operator for when there is no memory for a page.
pub(crate) const fn no_memory(large: bool) -> &'static str {
    if large {
        "no free page in the pool hugepages-2048kB; raise vm.nr_hugepages, or hugetlb.2MB.max of the owner's \
         cgroup"
    } else {
        "out of memory; the machine or the owner's cgroup (memory.max) is at its limit"
    }
}

/// The reason why an install stopped early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InstallError {
    /// The owner is gone.
    OwnerGone,
    /// The mappings kept changing for too long, with no event to read.
    Stuck,
    /// The kernel had no memory, even after many retries.
    NoMemory,
    /// The kernel refused with this errno.
    Refused(i32),
}

/// The outcome of one hold of the lock.
enum HoldOutcome {
    /// Continue at this page.
    Next(PageNumber),
    /// Try again with fewer pages at once.
    Fewer(u64),
    /// Read events first.
    Again,
    /// The kernel had no memory for the pages.
    NoMemory,
    /// The install failed for good.
    Failed(InstallError),
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
        let mut limit = source.most_pages();
        let mut tries = 0;
        let mut wanted_done = false;
        let (mut refusals, mut brake) = (0, None);
        while next < pages.end {
            let mut woken_later = None;
            let piece = next..pages.end.min(next + limit);
            let held = self.hold(piece, source, purpose.wake, |done, address| {
                let installed = done.end - done.start;
                wanted_done |= purpose.wanted.is_some_and(|page| done.contains(&page));
                count(&self.stats, source, purpose.reason, installed);
                woken_later = (purpose.wake == Wake::Later).then_some((address, installed * PAGE));
            });
            fail_point(FailPoint::Marked);
            if let Some((address, len)) = woken_later {
                self.platform.wake(address, len);
            }
            match held {
                HoldOutcome::Next(page) => {
                    next = page;
                    (tries, refusals) = (0, 0);
                    limit = source.most_pages().min(limit * 2);
                    self.has_memory(false);
                }
                HoldOutcome::Fewer(pages) => limit = pages,
                HoldOutcome::Again => {
                    self.after_again(&mut tries, next)?;
                    refusals += 1;
                    if matches!(source, Source::Poison) && refusals > MAX_REFUSALS {
                        brake.get_or_insert_with(|| self.platform.brake());
                        // The thread that was released must run before the next one is held up.
                        self.platform.back_off(1);
                    }
                }
                HoldOutcome::NoMemory if tries < memory_tries(purpose.reason) => {
                    tries += 1;
                    self.platform.back_off(tries);
                }
                HoldOutcome::NoMemory => {
                    self.is_short(false);
                    return Err(InstallError::NoMemory);
                }
                HoldOutcome::Failed(stop) => return Err(stop),
            }
        }
        Ok(wanted_done)
    }

    /// Looks up pages and issues one ioctl, in one hold of the lock. Passes the pages that it
    /// installed, and the address of the first, to `done`.
    fn hold(
        &self,
        pages: Range<PageNumber>,
        source: Source<'_>,
        wake: Wake,
        done: impl FnOnce(Range<PageNumber>, u64),
    ) -> HoldOutcome {
        let _hold = self.platform.shared(pages.start);
        let Some(absent) = self.state.absent_in(pages.clone()) else {
            return HoldOutcome::Next(pages.end);
        };
        let first = absent.start;
        // Unmapping a page also marks it removed, in the same exclusive hold.
        let Some(rest) = self.state.map().rest_from(first) else {
            return HoldOutcome::Next(first + 1);
        };
        if rest.large {
            return HoldOutcome::Next(rest.page_numbers().end);
        }
        let address = rest.address;
        let count = (absent.end - first)
            .min(rest.pages)
            .min(source.most_pages());
        let installed = source.install(&self.platform, first, address, count, wake);
        fail_point(FailPoint::Installed);
        match installed {
            Installed::Done => {
                self.mark(first..first + count, source);
                done(first..first + count, address);
                HoldOutcome::Next(first + count)
            }
            Installed::Partial(bytes) => {
                let end = first + bytes / PAGE;
                self.mark(first..end, source);
                done(first..end, address);
                HoldOutcome::Next(end)
            }
            Installed::Exists => {
                self.state.mark_present(first..first + 1);
                self.platform.wake(address, PAGE);
                HoldOutcome::Next(first + 1)
            }
            Installed::Again => {
                add(&self.stats.retries, 1);
                HoldOutcome::Again
            }
            // The range may span several mappings, each of which accepts a part of it.
            Installed::Gone if count > 1 => HoldOutcome::Fewer(count / 2),
            // The kernel checks for a change before it looks up the mapping: a change that began
            // meanwhile has moved or unmapped the page. Its event, which can't be read during this
            // hold, will say where the page is.
            Installed::Gone if self.platform.is_changing(address) => HoldOutcome::Again,
            Installed::Gone => {
                self.state.mark_removed(first..first + 1);
                self.platform.wake(address, PAGE);
                HoldOutcome::Next(first + 1)
            }
            Installed::NoMemory => HoldOutcome::NoMemory,
            Installed::OwnerGone => HoldOutcome::Failed(InstallError::OwnerGone),
            Installed::Refused(errno) => HoldOutcome::Failed(InstallError::Refused(errno)),
        }
    }

    /// Records the installed pages.
    fn mark(&self, pages: Range<PageNumber>, source: Source<'_>) {
        match source {
            Source::Poison => self.state.mark_poisoned(pages),
            Source::Frame(..) | Source::Zeros | Source::Filled(_) => self.state.mark_present(pages),
        }
    }

    /// Waits after an install that found no memory. The owner may be about to return memory, and
    /// proceeds only after the event of that was read.
    pub(crate) fn after_no_memory(
        &self,
        tries: &mut u32,
        about: u64,
        large: bool,
        reason: Reason,
    ) -> Result<(), InstallError> {
        if *tries == large_memory_tries(reason) {
            self.is_short(large);
            return Err(InstallError::NoMemory);
        }
        *tries += 1;
        self.read_now(about);
        self.platform.back_off(*tries);
        Ok(())
    }

    /// Handles EAGAIN: reads the events that it announced, or waits if there are none yet.
    pub(crate) fn after_again(&self, tries: &mut u32, about: u64) -> Result<(), InstallError> {
        if self.read_now(about) {
            *tries = 0;
            return Ok(());
        }
        *tries += 1;
        if self.platform.back_off(*tries) {
            Ok(())
        } else {
            Err(InstallError::Stuck)
        }
    }

    /// Reads events in the middle of an install. Returns `true` if there were any.
    fn read_now(&self, about: u64) -> bool {
        self.state.beat_all();
        let any = self.read_events(about) > 0;
        if any {
            self.look_if_settled();
            if !self.queue.is_empty() {
                self.platform.kick();
            }
        }
        any
    }
}

impl Source<'_> {
    /// Returns the maximum number of pages of one ioctl from this source.
    fn most_pages(&self) -> u64 {
        match self {
            Self::Filled(buffer) => (buffer.len() / PAGE_SIZE) as u64,
            Self::Frame(..) | Self::Zeros => HOLD_PAGES,
            Self::Poison => POISON_PAGES,
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
        wake: Wake,
    ) -> Installed {
        let len = count * PAGE;
        match self {
            Self::Frame(bytes, run) => {
                let start = (u64::from(run.slot) + (first - run.page)) * PAGE;
                let bytes = &bytes[start as usize..(start + len) as usize];
                platform.copy(address, bytes, wake)
            }
            Self::Zeros => platform.zeropage(address, len, wake),
            Self::Filled(buffer) => platform.copy(address, &buffer[..len as usize], wake),
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
