//! Touches pages, from several threads, and compares the contents.
//!
//! A touch loads one byte, as an owner of the memory would: its page fault is what is measured.
//! Whole pages are read only for comparison.

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

/// Number of positions of the order that a thread takes at once.
const PAGES_PER_BATCH: u64 = 64;
/// Maximum number of mismatches listed.
const MAX_LISTED: usize = 16;

/// The pages of all regions, numbered consecutively without the gaps between regions.
#[derive(Clone, Debug)]
pub(super) struct Pages {
    /// The first consecutive number and the first page number of each region.
    regions: Vec<(u64, u64)>,
    pub(super) count: u64,
    /// Page numbers whose content was unknown when the snapshot was taken. They are not touched.
    unavailable: Vec<Range<u64>>,
}

impl Pages {
    pub(super) fn all(snapshot: &Snapshot) -> Self {
        let mut count = 0;
        let mut regions = Vec::new();
        for region in snapshot.regions() {
            regions.push((count, region.first_page));
            count += region.pages;
        }
        let unavailable = if snapshot.summary().unavailable_pages > 0 {
            unavailable(snapshot, snapshot.regions())
        } else {
            Vec::new()
        };
        Self {
            regions,
            count,
            unavailable,
        }
    }

    /// Returns the page with a page number of the snapshot, if it has one.
    pub(super) fn with_number(&self, number: u64) -> Option<u64> {
        let after = self.regions.partition_point(|&(_, first)| first <= number);
        let &(page, first) = self.regions.get(after.checked_sub(1)?)?;
        let page = page.checked_add(number - first)?;
        let end = self.regions.get(after).map_or(self.count, |&(end, _)| end);
        (page < end).then_some(page)
    }

    /// Returns the region, the offset in it, and the page number of a page.
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

/// Returns the unavailable page numbers, in order. A block that can't be read is skipped; touching
/// it finds the error.
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

/// Results of touching.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Time from the start of the restore to the first touched page.
    pub(super) first_page: Option<Duration>,
    /// Number of touches.
    pub(super) pages: u64,
    pub(super) checked_pages: u64,
    pub(super) mismatches: u64,
    /// Numbers of the first pages that differed.
    pub(super) mismatched: Vec<u64>,
    /// Numbers of the pages that could not be restored, sorted.
    pub(super) bad: Vec<u64>,
}

/// The pages to touch, and the settings for it.
pub(super) struct Work<'a> {
    pub(super) restored: &'a Restored,
    pub(super) pages: &'a Pages,
    pub(super) order: &'a Order,
    /// Raw memory file to compare with.
    pub(super) raw: Option<&'a File>,
    /// Start of the restore.
    pub(super) began: Instant,
}

/// State shared by the touching threads.
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
    /// Touches the pages.
    pub(super) fn run(
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
        touched.bad.dedup();
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
            let from = self.next.fetch_add(PAGES_PER_BATCH, Relaxed);
            let count = self.work.order.len();
            if from >= count {
                break;
            }
            self.cancel.check()?;
            let to = count.min(from + PAGES_PER_BATCH);
            for position in from..to {
                let page = self.work.order.at(position);
                self.touch(&loads, page, &mut memory, &mut expected, &mut found)?;
            }
            self.progress.advance((to - from) * PAGE_SIZE_U64);
        }
        let mut all = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        all.pages += found.pages;
        all.checked_pages += found.checked_pages;
        all.mismatches += found.mismatches;
        let room = MAX_LISTED - all.mismatched.len();
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
        found.pages += 1;
        let start = self.work.restored.regions()[region].as_ptr();
        match loads.byte(start.expose_provenance() as u64 + offset) {
            Ok(_) => {}
            // The page is poisoned because its frame is bad.
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
            // The page was readable a moment ago: the hardware memory is failing.
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
            if found.mismatched.len() < MAX_LISTED {
                found.mismatched.push(number);
            }
        }
        Ok(())
    }
}
