//! Touching every page, from several threads, and comparing what arrives.
//!
//! A touch is a load of one byte, as an owner's: its page fault is what is measured. Whole pages are
//! read only to compare them.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use snaprestore_engine::restore::{ReadAtError, Restored};
use snaprestore_uffd::memory::{Loads, ReadFault};
use snapshot_format::layout::{PAGE_SIZE, PAGE_SIZE_U64, PAGES_PER_BLOCK_U64};
use snapshot_format::{Page, Reason, Region, Snapshot, Top};

use super::order::Order;
use crate::progress::Progress;
use crate::signals::Cancel;

/// Positions of the order that a thread takes at once.
const AT_ONCE: u64 = 64;
/// Mismatches that are listed.
const LISTED: usize = 16;

/// The pages of all regions, counted through without the gaps of their numbers.
#[derive(Debug)]
pub(super) struct Pages {
    /// For each region, its first page so counted, and its first page number.
    regions: Vec<(u64, u64)>,
    pub(super) count: u64,
    /// Page numbers whose content was not known when the snapshot was taken: nothing to touch.
    unavailable: Vec<Range<u64>>,
}

impl Pages {
    pub(super) fn of(snapshot: &Snapshot) -> Result<Self> {
        let mut count = 0;
        let mut regions = Vec::new();
        for region in snapshot.regions()? {
            regions.push((count, region.first_page));
            count += region.pages;
        }
        let unavailable = if snapshot.summary().unavailable_pages > 0 {
            unavailable(snapshot, snapshot.regions()?)
        } else {
            Vec::new()
        };
        Ok(Self {
            regions,
            count,
            unavailable,
        })
    }

    /// Region, offset in it, and page number of a page.
    fn place(&self, page: u64) -> (usize, u64, u64) {
        let region = self.regions.partition_point(|&(first, _)| first <= page) - 1;
        let (first, number) = self.regions[region];
        let nth = page - first;
        (region, nth * PAGE_SIZE_U64, number + nth)
    }

    fn is_unavailable(&self, number: u64) -> bool {
        let after = self.unavailable.partition_point(|run| run.start <= number);
        after > 0 && number < self.unavailable[after - 1].end
    }
}

/// The page numbers that are unavailable, in order. A block that can't be read is found out by
/// touching it.
fn unavailable(snapshot: &Snapshot, regions: &[Region]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut add = |from: u64, to: u64| match runs.last_mut() {
        Some(last) if last.end == from => last.end = to,
        _ => runs.push(from..to),
    };
    for region in regions {
        let numbers = region.page_numbers();
        for block in numbers.start / PAGES_PER_BLOCK_U64..numbers.end.div_ceil(PAGES_PER_BLOCK_U64)
        {
            let first = block * PAGES_PER_BLOCK_U64;
            let end = numbers.end.min(first + PAGES_PER_BLOCK_U64);
            match snapshot.top(block) {
                Top::Fill(_) => {}
                Top::Unavailable => add(first, end),
                Top::Block => {
                    let Ok(index) = snapshot.uncached_block(block, Reason::Verify) else {
                        continue;
                    };
                    for (page, number) in (first..end).enumerate() {
                        if index.page(page) == Page::Unavailable {
                            add(number, number + 1);
                        }
                    }
                }
            }
        }
    }
    runs
}

/// What touching found.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// From the start of the restore to the first page.
    pub(super) first_page: Option<Duration>,
    pub(super) checked_pages: u64,
    pub(super) mismatches: u64,
    /// Numbers of the first pages that differed.
    pub(super) mismatched: Vec<u64>,
    /// Numbers of pages that could not be had, sorted.
    pub(super) bad: Vec<u64>,
}

/// What is to be touched, and how.
pub(super) struct Work<'a> {
    pub(super) restored: &'a Restored,
    pub(super) pages: &'a Pages,
    pub(super) order: Order,
    /// Memory to compare with.
    pub(super) raw: Option<&'a File>,
    /// When the restore began.
    pub(super) began: Instant,
}

/// What the touching threads share.
struct Shared<'a> {
    work: &'a Work<'a>,
    cancel: &'a Cancel,
    progress: &'a Progress,
    next: AtomicU64,
    stop: AtomicBool,
    first_page: OnceLock<Duration>,
    found: Mutex<Touched>,
}

impl Work<'_> {
    /// Touches every page once.
    pub(super) fn all(
        &self,
        threads: usize,
        progress: &Progress,
        cancel: &Cancel,
    ) -> Result<Touched> {
        let shared = Shared {
            work: self,
            cancel,
            progress,
            next: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            first_page: OnceLock::new(),
            found: Mutex::default(),
        };
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads)
                .map(|number| {
                    std::thread::Builder::new()
                        .name(format!("touch-{number}"))
                        .spawn_scoped(scope, || {
                            let result = shared.run();
                            shared.stop.fetch_or(result.is_err(), Relaxed);
                            result
                        })
                        .context("starting a thread to touch pages")
                })
                .collect();
            for handle in handles {
                match handle?.join() {
                    Ok(result) => result?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok::<_, anyhow::Error>(())
        })?;
        let first_page = shared.first_page.get().copied();
        let mut touched = shared
            .found
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        touched.first_page = first_page;
        touched.bad.sort_unstable();
        touched.mismatched.sort_unstable();
        Ok(touched)
    }
}

impl Shared<'_> {
    fn run(&self) -> Result<()> {
        let loads = Loads::in_this_thread().context("catching bad pages")?;
        let mut memory = vec![0; PAGE_SIZE];
        let mut expected = vec![0; PAGE_SIZE];
        let mut found = Touched::default();
        while !self.stop.load(Relaxed) {
            let from = self.next.fetch_add(AT_ONCE, Relaxed);
            if from >= self.work.pages.count {
                break;
            }
            self.cancel.check()?;
            let to = self.work.pages.count.min(from + AT_ONCE);
            for position in from..to {
                let page = self.work.order.at(position);
                self.touch(&loads, page, &mut memory, &mut expected, &mut found)?;
            }
            self.progress.advance((to - from) * PAGE_SIZE_U64);
        }
        let mut all = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        all.checked_pages += found.checked_pages;
        all.mismatches += found.mismatches;
        let room = LISTED - all.mismatched.len();
        all.mismatched.extend(found.mismatched.iter().take(room));
        all.bad.append(&mut found.bad);
        Ok(())
    }

    fn touch(
        &self,
        loads: &Loads,
        page: u64,
        memory: &mut [u8],
        expected: &mut [u8],
        found: &mut Touched,
    ) -> Result<()> {
        let (region, offset, number) = self.work.pages.place(page);
        if self.work.pages.is_unavailable(number) {
            return Ok(());
        }
        let start = self.work.restored.regions()[region].as_ptr();
        match loads.byte(start.expose_provenance() as u64 + offset) {
            Ok(_) => {}
            // Poisoned: its frame is bad.
            Err(ReadFault::Unreadable { .. }) => {
                found.bad.push(number);
                return Ok(());
            }
            Err(error) => return Err(error).with_context(|| format!("touching page {number}")),
        }
        if self.first_page.get().is_none() {
            let _ = self.first_page.set(self.work.began.elapsed());
        }
        let Some(raw) = self.work.raw else {
            return Ok(());
        };
        match self.work.restored.read_at(region, offset, memory) {
            Ok(()) => {}
            // It was there a moment ago: memory is failing.
            Err(ReadAtError::Unreadable { .. }) => {
                found.bad.push(number);
                return Ok(());
            }
            Err(error) => return Err(error).with_context(|| format!("reading page {number}")),
        }
        raw.read_exact_at(expected, page * PAGE_SIZE_U64)
            .context("reading the file to check against")?;
        found.checked_pages += 1;
        if memory != expected {
            found.mismatches += 1;
            if found.mismatched.len() < LISTED {
                found.mismatched.push(number);
            }
        }
        Ok(())
    }
}
