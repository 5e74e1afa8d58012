//! Hot pages: which ones go to frames of their own, at the front of the new file, and where there.
//!
//! ```text
//! want      pages of the working sets, each once, in order of need
//! note      where each of them is stored
//! assign    slots in order of need -> hot frames; within a frame by page number
//! gather    for some hot frames at a time: decode the old frames, each once
//! ```
//!
//! Hot frames have the first numbers of the copied frames. A slot that several pages share is hot
//! if one of them is. Hot frames list hot pages only, so that decoding one installs nothing else.
//!
//! Hot frames are packed as the other frames are, with the same length. Measured with a guest of
//! 1 GiB of which a tenth of the stored pages is hot, in random order, relative to the plain file:
//!
//! ```text
//! level, frame       size    read for the hot pages    decoded in
//! plain                 1    0.95                      43 us a page
//! 3, 128 KiB        1.020    0.12                      3.9 us a page
//! 3, 512 KiB        1.017    0.12                      3.3 to 4.7, as noise has it
//! 3, 2 MiB          1.013    0.11                      3.6 to 4.8
//! 1, 128 KiB        1.024    0.12                      4.5
//! -3, 512 KiB       1.037    0.14                      2.7
//! ```
//!
//! Frames that are longer than the file's save little, and make the first fault on one slower.
//! Faster levels, and a codec such as lz4 that packs as they do, cost more room than they save
//! time. Raw frames would need 2.5 times the room.
//!
//! In a child, pages in frames of ancestors of which at least half are hot stay there. Those in
//! other frames are taken: reading them one by one would cost more than storing them again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rayon::ThreadPool;
use rayon::prelude::*;

use super::{Block, CopySource, PageList, Uses};
use crate::digest;
use crate::frame::FrameRef;
use crate::index::{IndexBlock, Top};
use crate::layout::{PAGE_SIZE, PAGES_PER_BLOCK, PAGES_PER_BLOCK_U64};
use crate::sections;
use crate::snapshot::Snapshot;
use crate::types::{Region, WorkingSetRun};
use crate::writer::base::{Base, BasePage};
use crate::writer::block::{Examined, Seen};
use crate::writer::frame::Sealed;
use crate::writer::{WorkingSetStats, WriteError};

/// Maximum number of hot pages. Further ones stay where they are.
const MAX_HOT_PAGES: usize = 1 << 26;
/// Maximum number of hot pages that are gathered together: 64 MiB.
const MAX_GATHERED_PAGES: usize = 1 << 14;
/// Percentage of the slots of an ancestor's frame that must be hot for them to stay there.
const MIN_PERCENT_HOT: usize = 50;

/// Pages to pack at the front of a file.
pub(in crate::writer) struct Wanted {
    /// Pages of all sets, each once, in order of need: the first set, then those of the others.
    order: Vec<u64>,
    /// Number of pages of the first set.
    of_first: usize,
    /// All pages with their places in `order`, by page.
    by_page: Vec<(u64, u32)>,
    /// Pages of a full hot frame.
    frame_pages: usize,
}

/// The hot pages of a snapshot, and their new places.
#[derive(Default)]
pub(super) struct Hot {
    wanted: Wanted,
    /// The snapshot itself as the base whose ancestors the new file keeps, if it is layered.
    ancestors: Option<Arc<Base>>,
    /// Frame in the plan and slot of each wanted page, in order; none if it is not stored.
    found: Vec<Option<(u32, u16)>>,
    frames: Vec<HotFrame>,
    /// Hot frame and slot there of each hot slot.
    places: Vec<(u32, u16)>,
    /// Wanted pages before each hot frame.
    cuts: Vec<usize>,
}

struct HotFrame {
    /// Frame in the plan and slot there of each slot.
    sources: Vec<(u32, u16)>,
    pages: PageList,
}

impl Default for Wanted {
    fn default() -> Self {
        Self {
            order: Vec::new(),
            of_first: 0,
            by_page: Vec::new(),
            frame_pages: 1,
        }
    }
}

/// A set of pages: one bitmap for each block with pages.
#[derive(Default)]
struct SparseBitmap(HashMap<u64, [u64; PAGES_PER_BLOCK / 64]>);

impl SparseBitmap {
    /// Returns whether the page is new.
    fn insert(&mut self, page: u64) -> bool {
        let bits = self.0.entry(page / PAGES_PER_BLOCK_U64).or_default();
        let word = (page % PAGES_PER_BLOCK_U64) / 64;
        let word = &mut bits[usize::try_from(word).unwrap_or(0)];
        let bit = 1 << (page % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    fn is_full(&self, block: u64) -> bool {
        let bits = self.0.get(&block);
        bits.is_some_and(|bits| bits.iter().all(|word| *word == u64::MAX))
    }
}

impl Wanted {
    /// Wants `pages`, then those of `others` that are stored, in frames of `frame_pages`. Pages
    /// that no region has are left out, and repetitions.
    pub(in crate::writer) fn new(
        snapshot: &Snapshot,
        pages: &[u64],
        others: &[Vec<WorkingSetRun>],
        frame_pages: usize,
    ) -> Self {
        let mut listed = SparseBitmap::default();
        let has = |page| sections::region_of(snapshot.regions(), page).is_some();
        let mut order: Vec<u64> = pages
            .iter()
            .copied()
            .filter(|page| has(*page) && listed.insert(*page))
            .take(MAX_HOT_PAGES)
            .collect();
        let of_first = order.len();
        for run in others.iter().flatten() {
            let end = run.first_page + run.pages;
            let mut page = run.first_page;
            while page < end && order.len() < MAX_HOT_PAGES {
                let block = page / PAGES_PER_BLOCK_U64;
                let next = end.min((block + 1) * PAGES_PER_BLOCK_U64);
                if snapshot.top(block) == Top::Block && !listed.is_full(block) {
                    order.extend((page..next).filter(|page| has(*page) && listed.insert(*page)));
                }
                page = next;
            }
        }
        let mut by_page: Vec<(u64, u32)> = order.iter().copied().zip(0..).collect();
        by_page.sort_unstable();
        Self {
            order,
            of_first,
            by_page,
            frame_pages,
        }
    }
}

impl Hot {
    /// Begins a plan for the wanted pages. `ancestors` is the snapshot as a base, if it is layered.
    pub(super) fn new(wanted: Wanted, ancestors: Option<&Arc<Base>>) -> Self {
        Self {
            found: vec![None; wanted.order.len()],
            wanted,
            ancestors: ancestors.map(Arc::clone),
            ..Self::default()
        }
    }

    /// Returns whether the new file refers to the ancestors of the old one.
    pub(super) fn keeps_ancestors(&self) -> bool {
        self.ancestors.is_some()
    }

    /// Returns the number of hot frames.
    pub(super) fn frame_count(&self) -> u32 {
        u32::try_from(self.frames.len()).expect("no more frames than hot pages")
    }

    /// Returns the wanted pages of a block, with their places in order.
    pub(super) fn in_block(&self, block: u64) -> &[(u64, u32)] {
        let before = |end: u64| self.wanted.by_page.partition_point(|(page, _)| *page < end);
        let first = block * PAGES_PER_BLOCK_U64;
        &self.wanted.by_page[before(first)..before(first + PAGES_PER_BLOCK_U64)]
    }

    /// Cuts the hot slots, which are given with the pages that are stored there, into frames.
    fn cut(&mut self, slots: &[(u32, u16)], mut pages: Vec<(u32, u64)>, firsts: &[(usize, u64)]) {
        pages.sort_unstable();
        let mut pages = &pages[..];
        let mut from = 0;
        while from < slots.len() {
            let (rank, first) = firsts[from];
            let (mut low, mut high) = (first, first);
            let in_first_set = rank < self.wanted.of_first;
            let same_frame = firsts[from..].iter().take(self.wanted.frame_pages);
            let count = same_frame
                .take_while(|(rank, page)| {
                    (low, high) = (low.min(*page), high.max(*page));
                    // The page list counts in 32 bits.
                    in_first_set == (*rank < self.wanted.of_first)
                        && u32::try_from(high - low).is_ok()
                })
                .count();
            let end = from + count;
            let here = pages.partition_point(|(slot, _)| (*slot as usize) < end);
            let (these, others) = pages.split_at(here);
            pages = others;
            self.cuts.push(rank);
            self.add_frame(&slots[from..end], from, these);
            from = end;
        }
    }

    /// Adds a frame of these slots, the first of which has the number `from`.
    fn add_frame(&mut self, slots: &[(u32, u16)], from: usize, pages: &[(u32, u64)]) {
        let number = self.frame_count();
        let mut by_page: Vec<(u64, usize)> = pages
            .iter()
            .map(|(slot, page)| (*page, *slot as usize - from))
            .collect();
        by_page.sort_unstable();
        let mut sources = Vec::with_capacity(slots.len());
        let mut new: Vec<Option<u16>> = vec![None; slots.len()];
        let base_page = by_page.first().map_or(0, |(page, _)| *page);
        let count = u16::try_from(slots.len()).expect("a frame has at most 512 slots");
        let mut list = PageList::new(base_page, count);
        for (page, slot) in by_page {
            let place = *new[slot].get_or_insert_with(|| {
                sources.push(slots[slot]);
                u16::try_from(sources.len() - 1).expect("a frame has at most 512 slots")
            });
            list.list(page, place);
        }
        let places = new.iter().map(|place| (number, place.unwrap_or(0)));
        self.places.extend(places);
        self.frames.push(HotFrame {
            sources,
            pages: list,
        });
    }
}

impl CopySource {
    /// Notes where the wanted pages of a block are stored.
    pub(super) fn note_hot(&mut self, block: u64, index: &IndexBlock) {
        let (from, count) = {
            let wanted = self.hot.in_block(block);
            let Some(first) = wanted.first() else { return };
            let all = &self.hot.wanted.by_page;
            (all.partition_point(|page| page < first), wanted.len())
        };
        for at in from..from + count {
            let (page, rank) = self.hot.wanted.by_page[at];
            let i = usize::try_from(page % PAGES_PER_BLOCK_U64).unwrap_or(0);
            let Some((frame, slot)) = index.stored(i) else {
                continue;
            };
            let frame = index.frames()[frame];
            let planned = self.planned(frame, page);
            if frame.layer() > 0 && self.hot.keeps_ancestors() {
                self.frames[planned].pages.list(page, slot);
            }
            let planned = u32::try_from(planned).ok();
            self.hot.found[rank as usize] = planned.map(|planned| (planned, slot));
        }
    }

    /// Assigns each hot slot its place in a hot frame.
    pub(super) fn assign_hot(&mut self) {
        let mut hot = std::mem::take(&mut self.hot);
        let (mut slots, mut pages, mut firsts) = (Vec::new(), Vec::new(), Vec::new());
        for (rank, (page, found)) in hot.wanted.order.iter().zip(&hot.found).enumerate() {
            let Some((at, slot)) = *found else { continue };
            let planned = &mut self.frames[at as usize];
            if hot.keeps_ancestors() && planned.is_dense_ancestor() {
                continue;
            }
            let known = planned.hot.binary_search_by_key(&slot, |(slot, _)| *slot);
            let number = match known {
                Ok(known) => planned.hot[known].1,
                Err(place) => {
                    let number = u32::try_from(slots.len()).expect("at most 2^26 hot pages");
                    planned.hot.insert(place, (slot, number));
                    slots.push((at, slot));
                    firsts.push((rank, *page));
                    number
                }
            };
            pages.push((number, *page));
        }
        hot.cut(&slots, pages, &firsts);
        self.hot = hot;
    }

    /// Returns the runs of the first set, in the order of the new file: hot frame by hot frame, by
    /// page number within each.
    pub(in crate::writer) fn hot_runs(&self) -> Vec<WorkingSetRun> {
        let hot = &self.hot;
        let first_set = &hot.wanted.order[..hot.wanted.of_first];
        let starts = |regions: &[Region], page| {
            let region = sections::region_of(regions, page);
            region.is_some_and(|region| region.first_page == page)
        };
        let mut runs: Vec<WorkingSetRun> = Vec::new();
        let cuts = hot
            .cuts
            .iter()
            .copied()
            .filter(|cut| *cut < first_set.len());
        let mut from = 0;
        // The pages before the first hot frame belong to it.
        for end in cuts.skip(1).chain([first_set.len()]) {
            let mut pages = first_set[from..end].to_vec();
            pages.sort_unstable();
            from = end;
            for page in pages {
                match runs.last_mut() {
                    Some(last)
                        if last.first_page + last.pages == page
                            && !starts(self.snapshot.regions(), page) =>
                    {
                        last.pages += 1;
                    }
                    _ => runs.push(WorkingSetRun {
                        first_page: page,
                        pages: 1,
                    }),
                }
            }
        }
        runs
    }

    /// Counts the pages of the first set.
    pub(in crate::writer) fn count_hot_pages(&self) -> WorkingSetStats {
        let hot = &self.hot;
        let mut stats = WorkingSetStats {
            pages: hot.wanted.of_first as u64,
            ..WorkingSetStats::default()
        };
        for found in &hot.found[..hot.wanted.of_first] {
            let Some((at, _)) = *found else {
                stats.not_stored_pages += 1;
                continue;
            };
            let planned = &self.frames[at as usize];
            if hot.keeps_ancestors() && planned.frame.layer() > 0 {
                if planned.hot.is_empty() {
                    stats.left_in_ancestors += 1;
                } else {
                    stats.from_ancestors += 1;
                }
            }
        }
        stats
    }

    /// Returns the number of hot frames of the first set.
    pub(in crate::writer) fn first_hot_frames(&self) -> usize {
        let of_first = self.hot.wanted.of_first;
        self.hot.cuts.partition_point(|cut| *cut < of_first)
    }

    /// Returns the number of all hot frames.
    pub(in crate::writer) fn hot_frames(&self) -> usize {
        self.hot.frames.len()
    }

    /// Decodes the pages of some of the hot frames, from number `from` on. Returns no frame if
    /// there is none left.
    pub(in crate::writer) fn gather_hot(
        &mut self,
        from: usize,
        pool: &ThreadPool,
    ) -> Result<Vec<Sealed>, WriteError> {
        let mut gathered = 0;
        let here = self.hot.frames[from..].iter_mut().take_while(|frame| {
            let before = gathered;
            gathered += frame.sources.len();
            before == 0 || gathered <= MAX_GATHERED_PAGES
        });
        let mut frames: Vec<_> = here
            .map(|frame| {
                let bytes = vec![0; frame.sources.len() * PAGE_SIZE];
                let pages = std::mem::take(&mut frame.pages);
                (std::mem::take(&mut frame.sources), pages, bytes)
            })
            .collect();
        let mut uses: BTreeMap<u32, Vec<(u16, &mut [u8])>> = BTreeMap::new();
        for (sources, _, bytes) in &mut frames {
            for ((at, slot), page) in sources.iter().zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
                uses.entry(*at).or_default().push((*slot, page));
            }
        }
        let uses: Vec<_> = uses.into_iter().collect();
        pool.install(|| {
            uses.into_par_iter().try_for_each(|(at, uses)| {
                self.decode(&self.frames[at as usize].frame, |_, bytes| {
                    for (slot, page) in uses {
                        let from = usize::from(slot) * PAGE_SIZE;
                        page.copy_from_slice(&bytes[from..from + PAGE_SIZE]);
                    }
                })
            })
        })?;
        let frames = frames.into_iter();
        Ok(frames
            .map(|(_, pages, bytes)| Sealed::hot(pages, bytes))
            .collect())
    }

    /// Takes the pages of a block that lie in hot slots of a frame out of `uses`.
    pub(super) fn take_hot(
        &self,
        frame: &FrameRef,
        uses: &mut Uses,
        block: &mut Block,
    ) -> Result<(), WriteError> {
        let Some(&at) = self.by_place.get(&(frame.layer(), frame.offset())) else {
            return Ok(());
        };
        let hot = &self.frames[at].hot;
        if hot.is_empty() {
            return Ok(());
        }
        let mut taken = Uses::new();
        uses.retain(|&(i, slot)| {
            let known = hot.binary_search_by_key(&slot, |(slot, _)| *slot);
            if let Ok(known) = known {
                let (frame, place) = self.hot.places[hot[known].1 as usize];
                block.pages[i] = Seen::Copied(frame, place);
                taken.push((i, slot));
            }
            known.is_err()
        });
        self.digest_elsewhere(frame, &taken, block)
    }

    /// Makes the digests of pages known whose frame need not be decoded otherwise.
    fn digest_elsewhere(
        &self,
        frame: &FrameRef,
        uses: &Uses,
        block: &mut Block,
    ) -> Result<(), WriteError> {
        if uses.is_empty() {
            return Ok(());
        }
        if self.trusts_digests() {
            block.has_unknown = true;
            return Ok(());
        }
        self.decode(frame, |_, bytes| {
            for &(i, slot) in uses {
                let page = &bytes[usize::from(slot) * PAGE_SIZE..][..PAGE_SIZE];
                block.digests[i] = digest::page(page);
            }
        })
    }

    /// Leaves pages in a frame of an ancestor.
    pub(super) fn leave_in_ancestor(
        &self,
        frame: &FrameRef,
        uses: &Uses,
        block: &mut Block,
    ) -> Result<(), WriteError> {
        for &(i, slot) in uses {
            let frame = *frame;
            block.pages[i] = Seen::Base(BasePage { frame, slot });
        }
        self.digest_elsewhere(frame, uses, block)
    }

    /// Returns whether an index block of an ancestor describes the block.
    pub(super) fn is_of_ancestor(&self, block: u64) -> bool {
        let place = self.snapshot.block_ref(block);
        self.hot.keeps_ancestors() && place.is_some_and(|place| place.layer > 0)
    }

    /// Returns a block as its ancestor describes it, if nothing of it is taken.
    pub(super) fn ancestor_block(&self, block: u64) -> Option<Result<Examined, WriteError>> {
        let base = self.hot.ancestors.as_ref()?;
        if !self.is_of_ancestor(block) {
            return None;
        }
        let is_taken = self.hot.in_block(block).iter().any(|(_, rank)| {
            let found = self.hot.found[*rank as usize];
            found.is_some_and(|(at, _)| !self.frames[at as usize].hot.is_empty())
        });
        let digest = *self.recorded(block)?;
        (!is_taken).then(|| base.unchanged_block(block, digest))
    }
}

impl super::Planned {
    /// Returns whether the frame lies in an ancestor, and enough of it is hot.
    fn is_dense_ancestor(&self) -> bool {
        let hot = self.pages.slots_in_use() * 100;
        self.frame.layer() > 0 && hot >= MIN_PERCENT_HOT * usize::from(self.frame.slots())
    }
}
