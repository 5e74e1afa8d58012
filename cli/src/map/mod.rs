//! A map of the memory of a snapshot: kinds of pages by address, in a bounded number of cells.
//!
//! One pass over the index gathers it, one block at a time. Besides the cells, it keeps one entry
//! for each frame, in order to distinguish the first page of a slot from those that share it.

mod frames;
mod layout;

use std::ops::AddAssign;

use anyhow::Result;
use snapshot_format::layout::PAGES_PER_BLOCK_U64;
use snapshot_format::{Page, Reason, Snapshot, Top};

use crate::signals::{Cancel, Interrupted};
use frames::Frames;
pub(crate) use frames::{RATIO_LIMITS, Ratios};
pub(crate) use layout::Limits;

/// Numbers of pages by kind. A page is of one kind; hot pages are counted once more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) zero: u64,
    /// Pages that repeat a word other than zero.
    pub(crate) fill: u64,
    /// Pages in frames of the file itself: the first of each slot.
    pub(crate) stored: u64,
    /// Pages in frames of the file itself that share the slot of an earlier page.
    pub(crate) duplicate: u64,
    /// Pages in frames of ancestors.
    pub(crate) ancestor: u64,
    pub(crate) unavailable: u64,
    /// Pages that are in the working sets or in the trace.
    pub(crate) hot: u64,
    /// Hot pages whose content is in a frame.
    pub(crate) hot_in_frames: u64,
    /// Pages that are the first of a slot, in any file.
    pub(crate) distinct: u64,
    /// Bytes that these take in the frames, in thousandths.
    pub(crate) millibytes: u64,
}

impl Counts {
    /// Returns the number of pages.
    pub(crate) fn pages(&self) -> u64 {
        self.zero + self.fill + self.in_frames() + self.unavailable
    }

    /// Returns the number of pages whose content is in a frame.
    pub(crate) fn in_frames(&self) -> u64 {
        self.stored + self.duplicate + self.ancestor
    }

    /// Returns the bytes that the distinct pages take in the frames.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.millibytes.div_ceil(1000)
    }
}

impl AddAssign<&Self> for Counts {
    fn add_assign(&mut self, other: &Self) {
        let Self {
            zero,
            fill,
            stored,
            duplicate,
            ancestor,
            unavailable,
            hot,
            hot_in_frames,
            distinct,
            millibytes,
        } = other;
        self.zero += zero;
        self.fill += fill;
        self.stored += stored;
        self.duplicate += duplicate;
        self.ancestor += ancestor;
        self.unavailable += unavailable;
        self.hot += hot;
        self.hot_in_frames += hot_in_frames;
        self.distinct += distinct;
        self.millibytes += millibytes;
    }
}

/// A number of consecutive pages of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) counts: Counts,
    /// Numbers of pages in the frames of each layer.
    pub(crate) layers: Vec<(u16, u64)>,
}

/// A region, or several small ones that are shown as if they were one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// Numbers of the regions, rising.
    pub(crate) regions: Vec<usize>,
    pub(crate) pages: u64,
    pub(crate) cells: Vec<Cell>,
}

/// The map, and what was counted on the way.
#[derive(Debug)]
pub(crate) struct MemoryMap {
    /// Number of pages of a cell; the last cell of a group has fewer.
    pub(crate) cell_pages: u64,
    pub(crate) groups: Vec<Group>,
    pub(crate) total: Counts,
    /// Counts of each region.
    pub(crate) regions: Vec<Counts>,
    /// Number of pages in the frames of each layer.
    pub(crate) layers: Vec<u64>,
    pub(crate) ratios: Ratios,
}

/// A set of page numbers.
#[derive(Debug, Default)]
pub(crate) struct PageSet(Vec<u64>);

impl PageSet {
    /// Creates an empty set for page numbers below `slots`.
    pub(crate) fn new(slots: u64) -> Self {
        Self(vec![0; to_index(slots.div_ceil(64))])
    }

    /// Returns the pages of all working sets in a snapshot.
    pub(crate) fn of_working_sets(snapshot: &Snapshot) -> Result<Self> {
        let sets = snapshot.working_sets()?;
        if sets.is_empty() {
            return Ok(Self::default());
        }
        let mut pages = Self::new(snapshot.page_slots());
        for set in sets {
            for run in snapshot.working_set(&set.name)? {
                pages.insert(run.first_page, run.pages);
            }
        }
        Ok(pages)
    }

    /// Adds `pages` pages from `first` on; numbers that are too large are left out.
    pub(crate) fn insert(&mut self, first: u64, pages: u64) {
        let end = first.saturating_add(pages).min(self.0.len() as u64 * 64);
        for page in first..end {
            self.0[to_index(page / 64)] |= 1 << (page % 64);
        }
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        let word = self.0.get(to_index(page / 64));
        word.is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Returns how many of these numbers are in the set.
    fn count(&self, first: u64, pages: u64) -> u64 {
        if self.0.is_empty() {
            return 0;
        }
        let set = (first..first + pages).filter(|page| self.contains(*page));
        set.count() as u64
    }
}

/// Converts a number that is bounded by a length in memory.
fn to_index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl MemoryMap {
    /// Reads the index of a snapshot. The pages of `hot` are counted as hot.
    pub(crate) fn read(
        snapshot: &Snapshot,
        hot: &PageSet,
        limits: Limits,
        cancel: &Cancel,
    ) -> Result<Self> {
        let regions = snapshot.regions();
        let sizes: Vec<u64> = regions.iter().map(|region| region.pages).collect();
        let (cell_pages, groups) = layout::plan(&sizes, limits);
        let mut map = Self {
            cell_pages,
            groups,
            total: Counts::default(),
            regions: vec![Counts::default(); regions.len()],
            layers: vec![0; 1 + snapshot.ancestors().len()],
            ratios: Ratios::default(),
        };
        let mut frames = Frames::default();
        for group in 0..map.groups.len() {
            let mut place = 0;
            for region in map.groups[group].regions.clone() {
                let mut reader = Reader {
                    snapshot,
                    hot,
                    cancel,
                    frames: &mut frames,
                    group,
                    region,
                    place,
                };
                reader.read(&mut map)?;
                place += regions[region].pages;
            }
        }
        for region in &map.regions {
            map.total += region;
        }
        map.ratios = frames.ratios;
        Ok(map)
    }

    /// Adds `counts` to a cell and a region.
    fn add(&mut self, (group, place, region): (usize, u64, usize), counts: &Counts) -> &mut Cell {
        self.regions[region] += counts;
        let cell = &mut self.groups[group].cells[to_index(place / self.cell_pages)];
        cell.counts += counts;
        cell
    }
}

/// A pass over the index blocks of one region.
struct Reader<'a> {
    snapshot: &'a Snapshot,
    hot: &'a PageSet,
    cancel: &'a Cancel,
    frames: &'a mut Frames,
    group: usize,
    region: usize,
    /// Number of pages of the group before the region.
    place: u64,
}

impl Reader<'_> {
    fn read(&mut self, map: &mut MemoryMap) -> Result<()> {
        let region = &self.snapshot.regions()[self.region];
        let mut first = 0;
        while first < region.pages {
            if self.cancel.requested() {
                return Err(Interrupted.into());
            }
            let pages = PAGES_PER_BLOCK_U64.min(region.pages - first);
            let block = (region.first_page + first) / PAGES_PER_BLOCK_U64;
            match self.snapshot.top(block) {
                Top::Fill(word) => self.alike(map, first, pages, &Page::Fill(word)),
                Top::Unavailable => self.alike(map, first, pages, &Page::Unavailable),
                Top::Block => self.each(map, first, pages, block)?,
            }
            first += pages;
        }
        Ok(())
    }

    /// Adds pages that are all alike.
    fn alike(&self, map: &mut MemoryMap, first: u64, pages: u64, page: &Page) {
        let region = &self.snapshot.regions()[self.region];
        let mut done = 0;
        while done < pages {
            let place = self.place + first + done;
            // As far as the end of the cell.
            let run = (map.cell_pages - place % map.cell_pages).min(pages - done);
            let mut counts = Counts {
                hot: self.hot.count(region.first_page + first + done, run),
                ..Counts::default()
            };
            match page {
                Page::Fill(0) => counts.zero = run,
                Page::Fill(_) => counts.fill = run,
                _ => counts.unavailable = run,
            }
            map.add((self.group, place, self.region), &counts);
            done += run;
        }
    }

    /// Adds the pages of an index block.
    fn each(&mut self, map: &mut MemoryMap, first: u64, pages: u64, block: u64) -> Result<()> {
        let index = self.snapshot.uncached_block(block, Reason::Verify)?;
        let number = self.snapshot.regions()[self.region].first_page + first;
        for i in 0..pages {
            let mut counts = Counts {
                hot: u64::from(self.hot.contains(number + i)),
                ..Counts::default()
            };
            let mut layer = None;
            match index.page(to_index(i)) {
                Page::Fill(0) => counts.zero = 1,
                Page::Fill(_) => counts.fill = 1,
                Page::Unavailable | Page::Unused => counts.unavailable = 1,
                Page::Stored { frame, slot } => {
                    counts.hot_in_frames = counts.hot;
                    let is_first = self.frames.is_first(&frame, slot);
                    if is_first {
                        counts.distinct = 1;
                        let bytes = u64::from(frame.stored_len()) * 1000;
                        counts.millibytes = bytes / u64::from(frame.slots());
                    }
                    match (frame.layer(), is_first) {
                        (0, true) => counts.stored = 1,
                        (0, false) => counts.duplicate = 1,
                        _ => counts.ancestor = 1,
                    }
                    map.layers[usize::from(frame.layer())] += 1;
                    layer = Some(frame.layer());
                }
            }
            let cell = map.add((self.group, self.place + first + i, self.region), &counts);
            if let Some(layer) = layer {
                match cell.layers.iter_mut().find(|(number, _)| *number == layer) {
                    Some((_, pages)) => *pages += 1,
                    None => cell.layers.push((layer, 1)),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_set_counts_within_its_bounds() {
        let mut set = PageSet::new(130);
        set.insert(60, 10);
        set.insert(128, u64::MAX);
        assert!(set.contains(69) && !set.contains(70) && !set.contains(5000));
        assert_eq!(set.count(0, 130), 12);
        // Up to the last word of the set.
        assert_eq!(set.count(0, 1000), 10 + 192 - 128);
        assert_eq!(PageSet::default().count(0, 1 << 40), 0);
    }
}
