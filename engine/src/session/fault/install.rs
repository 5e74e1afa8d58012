//! Putting pages into the owner's memory, one hold of the install lock after another.
//!
//! ```text
//! install(pages):
//!   while pages are left:
//!     hold the lock shared:
//!       find the next absent pages, and where the owner has them now
//!       one ioctl for at most 256 KiB of them, which wakes who waits
//!       mark what it did
//!     wake who waits now, if that would run on this core and meet the lock
//!     if it said EAGAIN: read events, then go on (everything is looked up again)
//! ```

use std::ops::Range;

use snapshot_format::Reason;
use snapshot_format::layout::PAGE_SIZE;

use crate::fail_point::{FailPoint, fail_point};
use crate::session::platform::{Image, Installed, PAGE, PageNumber, Platform, Run};
use crate::session::stats::add;
use crate::session::{Session, Stats};
use snaprestore_uffd::uffd::Wake;

/// Most pages of one hold: 256 KiB, so that who reads events waits for little.
pub(crate) const HOLD_PAGES: u64 = 64;

/// Most pages of one hold that poisons: 1 GiB, for which the kernel takes about 30 ms.
const POISON_PAGES: u64 = 1 << 18;

/// How often poisoning is refused in a row before the owner is held up.
const MAX_REFUSALS: u32 = 16;

/// How often an install that found no memory is tried again: for a fault some seconds long, for
/// prefetch hardly.
const fn memory_tries(reason: Reason) -> u32 {
    if matches!(reason, Reason::Demand) {
        1000
    } else {
        20
    }
}

/// The same for a large page: they come from a pool, where one is free only when somebody gives it
/// back.
const fn large_memory_tries(reason: Reason) -> u32 {
    if matches!(reason, Reason::Demand) {
        1000
    } else {
        100
    }
}

/// What pages are installed from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Slots of a decoded frame: `run.page` is in `run.slot`.
    Frame(&'a [u8], Run),
    /// Zeros.
    Zeros,
    /// A buffer that repeats the page; it may be shorter than the range.
    Filled(&'a [u8]),
    /// Nothing: they become poisoned.
    Poison,
}

/// What pages are installed for.
#[derive(Clone, Copy)]
pub(crate) struct Purpose {
    pub(crate) reason: Reason,
    /// The page that somebody is known to want.
    pub(crate) wanted: Option<PageNumber>,
    /// When who waits for it is woken: now, or when the lock was let go. On this core it may run at
    /// once, and meet the lock at its next fault.
    pub(crate) wake: Wake,
}

impl Purpose {
    /// They come along with others.
    pub(crate) fn along(reason: Reason) -> Self {
        Self {
            reason,
            wanted: None,
            wake: Wake::Now,
        }
    }
}

/// What an operator can do when there is no memory for a page.
pub(crate) const fn no_memory(large: bool) -> &'static str {
    if large {
        "no page of 2 MiB is free in the pool hugepages-2048kB; raise vm.nr_hugepages, or the hugetlb.2MB.max of the \
         owner's cgroup"
    } else {
        "the kernel has no memory for them; the machine or the owner's cgroup (memory.max) is at its limit"
    }
}

/// Why an install stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InstallError {
    /// The owner is gone.
    OwnerGone,
    /// The mappings kept changing, with nothing to read, for too long.
    Stuck,
    /// The kernel had no memory, many times.
    NoMemory,
    /// The kernel refused with this errno.
    Refused(i32),
}

/// What one hold came to.
enum HoldOutcome {
    /// Go on at this page.
    Next(PageNumber),
    /// Try again with fewer pages at once.
    Fewer(u64),
    /// Read events first.
    Again,
    /// No memory now.
    NoMemory,
    /// It can't go on.
    InstallError(InstallError),
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Installs what is absent of `pages`. True if the page that is wanted was installed, and its
    /// waiters woken, by this call.
    pub(crate) fn install(
        &self,
        pages: Range<PageNumber>,
        source: Source<'_>,
        purpose: Purpose,
    ) -> Result<bool, InstallError> {
        // What is not absent never becomes so again: no need to take the lock for nothing.
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
                        // Who was let go has to run before who comes next is held up.
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
                HoldOutcome::InstallError(stop) => return Err(stop),
            }
        }
        Ok(wanted_done)
    }

    /// One hold of the lock: {look up, one ioctl}. Tells `done` which pages it installed, and where
    /// the first lies.
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
        // A page whose address the owner has unmapped is marked removed in the same exclusive hold.
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
            // The range may lie in several mappings, each of which takes a part of it.
            Installed::Gone if count > 1 => HoldOutcome::Fewer(count / 2),
            // The kernel looks for a change before it looks for the mapping: a change that began in
            // between has moved or unmapped the page, and its event, which can't be read during
            // this hold, will say where it is.
            Installed::Gone if self.platform.is_changing(address) => HoldOutcome::Again,
            Installed::Gone => {
                self.state.mark_removed(first..first + 1);
                self.platform.wake(address, PAGE);
                HoldOutcome::Next(first + 1)
            }
            Installed::NoMemory => HoldOutcome::NoMemory,
            Installed::OwnerGone => HoldOutcome::InstallError(InstallError::OwnerGone),
            Installed::Refused(errno) => HoldOutcome::InstallError(InstallError::Refused(errno)),
        }
    }

    /// Records what was installed.
    fn mark(&self, pages: Range<PageNumber>, source: Source<'_>) {
        match source {
            Source::Poison => self.state.mark_poisoned(pages),
            Source::Frame(..) | Source::Zeros | Source::Filled(_) => self.state.mark_present(pages),
        }
    }

    /// After no memory was found: lets time pass. The owner may be about to give some back, and goes
    /// on only when the event of that was read.
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

    /// After EAGAIN: reads the events that it announced, or lets time pass if there are none yet.
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

    /// Reads events in the middle of an install. True if there were any.
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
    /// The most pages that one ioctl takes from here.
    fn most_pages(&self) -> u64 {
        match self {
            Self::Filled(buffer) => (buffer.len() / PAGE_SIZE) as u64,
            Self::Frame(..) | Self::Zeros => HOLD_PAGES,
            Self::Poison => POISON_PAGES,
        }
    }

    /// The ioctl for `count` pages from `first` on, which the owner has at `address`.
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
fn count(stats: &Stats, source: Source<'_>, reason: Reason, pages: u64) {
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
