//! Pages of the base that have the content of a block's pages.
//!
//! ```text
//! same place     the page that corresponds has the digest
//! same blocks    any slot of a frame that the blocks of those pages use has it
//! moved          samples say by how far content moved: the same with the blocks there, for up to
//!                4 distances
//! ```
//!
//! Moved content is looked for in blocks of which at least 64 pages are not in the same place, and
//! at least one isn't found in the same blocks. The base is sampled when the first of them turns
//! up: up to 32 pages of one frame of each half of a block, an eighth of its pages with frames of
//! 128 KiB. Wherever content moved to, 256 consecutive pages of a dense base have sampled ones
//! among them. A sampled page that a block of the child has says by how many pages the content
//! moved, and so where the rest of it is to be compared.
//!
//! Which pages are found depends on the block and the base alone, not on the order in which threads
//! examine blocks: the file would depend on it, too.

use std::cmp::Reverse;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use super::WriteError;
use super::base::{Base, BaseFrame, BasePage, Pages, lock};
use super::block::{Seen, key};
use super::dedup::Key;
use crate::digest::{self, Digest};
use crate::index::{IndexBlock, Top};
use crate::layout::{PAGES_PER_BLOCK, PAGES_PER_BLOCK_U64};
use crate::store::Reason;

/// Minimum number of pages of a block that are not in the same place for which moved content is
/// looked for. With fewer, the search may take longer than storing the pages.
const MIN_MOVED_PAGES: usize = 64;
/// Maximum number of distances that the content of one block may have moved by.
const MAX_DISTANCES: usize = 4;
/// Maximum number of samples: 8 MiB.
const MAX_SAMPLES: u64 = 1 << 19;
/// Number of consecutive pages of which one frame is sampled.
const SAMPLED_PAGES: usize = PAGES_PER_BLOCK / 2;
/// Maximum number of samples of one frame.
const MAX_FRAME_SAMPLES: u64 = 32;
/// Number of pages that a sampled frame should have.
const ENOUGH_SAMPLES: usize = 16;

/// Consecutive pages of a block that correspond to consecutive pages of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BaseRun {
    /// The first of them, counted from the start of the block.
    at: usize,
    count: usize,
    /// Page of the base that corresponds to the first.
    pub(super) page: u64,
}

impl BaseRun {
    pub(super) fn new(at: usize, count: usize, page: u64) -> Self {
        Self { at, count, page }
    }

    /// Adds pages to a list, and extends its last run if they continue it.
    pub(super) fn append(base_runs: &mut Vec<Self>, at: usize, count: usize, page: u64) {
        match base_runs.last_mut() {
            Some(last) if last.range().end == at && last.page_of(at) == page => last.count += count,
            _ => base_runs.push(Self::new(at, count, page)),
        }
    }

    /// Returns its pages, counted from the start of the block.
    pub(super) fn range(&self) -> Range<usize> {
        self.at..self.at + self.count
    }

    /// Returns the page of the base that corresponds to page `i` of the block.
    pub(super) fn page_of(&self, i: usize) -> u64 {
        self.page + (i - self.at) as u64
    }

    /// Returns the blocks of the base that have its pages.
    pub(super) fn blocks(&self) -> Range<u64> {
        let end = self.page + self.count as u64;
        self.page / PAGES_PER_BLOCK_U64..end.div_ceil(PAGES_PER_BLOCK_U64)
    }
}

/// Blocks of the base that were decoded to be compared with a block.
#[derive(Default)]
pub(super) struct LoadedBlocks(BTreeMap<u64, Pages>);

impl LoadedBlocks {
    /// Decodes a block of the base, unless that was done before.
    pub(super) fn load(&mut self, base: &Base, number: u64) -> Result<(), WriteError> {
        if let Entry::Vacant(place) = self.0.entry(number) {
            place.insert(base.pages(number)?);
        }
        Ok(())
    }

    fn has(&self, number: u64) -> bool {
        self.0.contains_key(&number)
    }

    /// Returns the digest of a loaded block.
    pub(super) fn digest(&self, number: u64) -> Option<Digest> {
        let pages = self.0.get(&number)?;
        Some(digest::block(&pages.digests))
    }

    fn block_of(&self, page: u64) -> Option<(&Pages, usize)> {
        let pages = self.0.get(&(page / PAGES_PER_BLOCK_U64))?;
        let i = usize::try_from(page % PAGES_PER_BLOCK_U64).ok()?;
        (i < pages.digests.len()).then_some((pages, i))
    }

    /// Returns what a page of the base is, and its digest, if its block is loaded.
    pub(super) fn page(&self, page: u64) -> Option<(Seen, Digest)> {
        let (pages, i) = self.block_of(page)?;
        Some((pages.seen(i), pages.digests[i]))
    }

    /// Replaces pages that have the content of the pages of a loaded block that correspond.
    fn find_in_place(&self, pages: &mut [Seen], base_runs: &[BaseRun]) {
        for run in base_runs {
            for i in run.range() {
                if let Some((there, at)) = self.block_of(run.page_of(i))
                    && pages[i] == Seen::Data(key(&there.digests[at]))
                    && let Some(page) = there.page(at)
                {
                    pages[i] = Seen::Base(page);
                }
            }
        }
    }

    /// Replaces pages whose content is in any frame of a loaded block.
    fn find_anywhere(&self, pages: &mut [Seen]) {
        let mut known = None;
        for seen in pages {
            let Seen::Data(data) = *seen else { continue };
            let known = known.get_or_insert_with(|| PagesByKey::new(self));
            if let Some(page) = known.find(data) {
                *seen = Seen::Base(page);
            }
        }
    }

    pub(super) fn into_frames(self) -> Vec<BaseFrame> {
        let blocks = self.0.into_values();
        blocks.flat_map(|pages| pages.frames).collect()
    }
}

/// Pages of the frames that some blocks of the base use, sorted by key.
struct PagesByKey(Vec<(Key, BasePage)>);

impl PagesByKey {
    fn new(blocks: &LoadedBlocks) -> Self {
        let frames = blocks.0.values().flat_map(|pages| &pages.frames);
        let pages = frames.flat_map(|BaseFrame { frame, digests }| {
            let slots = digests.iter().zip(0..);
            slots.map(|(digest, slot)| {
                let frame = *frame;
                (key(digest), BasePage { frame, slot })
            })
        });
        let mut pages: Vec<_> = pages.collect();
        pages.sort_by_key(|(key, _)| *key);
        // The first of equal ones is kept.
        pages.dedup_by_key(|(key, _)| *key);
        Self(pages)
    }

    fn find(&self, key: Key) -> Option<BasePage> {
        let at = self.0.binary_search_by_key(&key, |(key, _)| *key).ok()?;
        Some(self.0[at].1)
    }
}

/// Returns the number and the key of a page whose content isn't found in the base.
fn data((i, seen): (usize, &Seen)) -> Option<(usize, Key)> {
    match seen {
        Seen::Data(key) => Some((i, *key)),
        _ => None,
    }
}

/// A sample: a part of a page's key, and the page's number in the base.
type Sample = (u64, u64);

/// Pages from all over the base, by which moved content is recognized.
#[derive(Default)]
pub(super) struct Samples {
    /// The first block that no thread has taken to sample it.
    next: AtomicU64,
    by_block: Mutex<HashMap<u64, Vec<Sample>>>,
    /// All samples, sorted. Where several pages have the same content, the first of them.
    sorted: OnceLock<Vec<Sample>>,
}

impl Base {
    /// Replaces pages whose content is found in the base: first in the loaded blocks, then, with
    /// `search`, in others as far as samples tell.
    pub(super) fn find(
        &self,
        pages: &mut [Seen],
        base_runs: &[BaseRun],
        loaded: &mut LoadedBlocks,
        search: bool,
    ) -> Result<(), WriteError> {
        // Pages in the same place are replaced first, so that those of a frame stay together.
        loaded.find_in_place(pages, base_runs);
        let elsewhere: Vec<(usize, Key)> = (0..).zip(&*pages).filter_map(data).collect();
        loaded.find_anywhere(pages);
        if search && elsewhere.len() >= MIN_MOVED_PAGES {
            self.find_moved(pages, &elsewhere, loaded)?;
        }
        Ok(())
    }

    /// Replaces pages whose content moved by as much as that of pages that are known not to be in
    /// the same place.
    fn find_moved(
        &self,
        pages: &mut [Seen],
        elsewhere: &[(usize, Key)],
        loaded: &mut LoadedBlocks,
    ) -> Result<(), WriteError> {
        let is_complete = |pages: &[Seen]| !(0..).zip(pages).any(|page| data(page).is_some());
        if is_complete(pages) {
            return Ok(());
        }
        let samples = self.samples();
        let mut votes: HashMap<i64, usize> = HashMap::new();
        for (i, key) in elsewhere {
            if let Ok(at) = samples.binary_search_by_key(&key[0], |(key, _)| *key) {
                let distance = samples[at].1.cast_signed() - i64::try_from(*i).unwrap_or(0);
                *votes.entry(distance).or_default() += 1;
            }
        }
        let mut votes: Vec<(i64, usize)> = votes.into_iter().collect();
        votes.sort_by_key(|(distance, votes)| (Reverse(*votes), *distance));
        votes.truncate(MAX_DISTANCES);
        for (distance, _) in votes {
            let before = usize::try_from(distance.saturating_neg()).unwrap_or(0);
            let page = u64::try_from(distance).unwrap_or(0);
            let there = BaseRun::new(before, pages.len().saturating_sub(before), page);
            for number in there.blocks() {
                if number < self.snapshot().block_count()
                    && self.snapshot().top(number) == Top::Block
                    && !loaded.has(number)
                {
                    match loaded.load(self, number) {
                        // The pages are stored. A block that corresponds reports its damage.
                        Err(error) if error.is_base_damage() => {}
                        result => result?,
                    }
                }
            }
            loaded.find_in_place(pages, &[there]);
            loaded.find_anywhere(pages);
            if is_complete(pages) {
                break;
            }
        }
        Ok(())
    }

    /// Returns the samples. Threads that need them at the same time share the work.
    fn samples(&self) -> &[Sample] {
        let samples = &self.samples;
        if let Some(sorted) = samples.sorted.get() {
            return sorted;
        }
        let blocks = self.snapshot().block_count();
        let frames = blocks * (PAGES_PER_BLOCK / SAMPLED_PAGES) as u64;
        let stride = frames.div_ceil(MAX_SAMPLES).max(1);
        let most = (MAX_SAMPLES / frames.max(1)).clamp(1, MAX_FRAME_SAMPLES);
        let most = usize::try_from(most).expect("at most 32");
        loop {
            let block = samples.next.fetch_add(stride, Ordering::Relaxed);
            if block >= blocks {
                break;
            }
            let sample = self.sample(block, most);
            lock(&samples.by_block).insert(block, sample);
        }
        samples.sorted.get_or_init(|| {
            // Other threads may not be done with their last blocks.
            let mut by_block = std::mem::take(&mut *lock(&samples.by_block));
            let all = (0..blocks)
                .step_by(usize::try_from(stride).expect("at most 2^10"))
                .map(|block| {
                    let sample = by_block.remove(&block);
                    sample.unwrap_or_else(|| self.sample(block, most))
                });
            let mut sorted: Vec<Sample> = all.flatten().collect();
            sorted.sort_unstable();
            sorted.dedup_by_key(|(key, _)| *key);
            sorted.shrink_to_fit();
            sorted
        })
    }

    /// Samples pages of a block. A block that can't be read has none.
    fn sample(&self, block: u64, most: usize) -> Vec<Sample> {
        if self.snapshot().top(block) != Top::Block {
            return Vec::new();
        }
        let Ok(index) = self.snapshot().uncached_block(block, Reason::Prefetch) else {
            return Vec::new();
        };
        let first_page = block * PAGES_PER_BLOCK_U64;
        let stored = (first_page..).zip((0..index.page_count()).map(|i| index.stored(i)));
        let stored: Vec<_> = stored
            .filter_map(|(page, stored)| stored.map(|(frame, slot)| (page, frame, slot)))
            .collect();
        let part = |(page, ..): &(u64, usize, u16)| (page - first_page) / SAMPLED_PAGES as u64;
        let parts = stored.chunk_by(|a, b| part(a) == part(b));
        let samples = parts.flat_map(|stored| self.sample_frame(&index, stored, most));
        samples.collect()
    }

    /// Samples pages of one frame: of the first that has enough of these, or else of the one that
    /// has most.
    fn sample_frame(
        &self,
        index: &IndexBlock,
        stored: &[(u64, usize, u16)],
        most: usize,
    ) -> Vec<Sample> {
        let mut uses = vec![0; index.frames().len()];
        for (_, frame, _) in stored {
            uses[*frame] += 1;
        }
        let enough = uses.iter().position(|uses| *uses >= ENOUGH_SAMPLES);
        let largest = || (0..uses.len()).min_by_key(|frame| Reverse(uses[*frame]));
        let Some(number) = enough.or_else(largest) else {
            return Vec::new();
        };
        let Ok(digests) = self.frame_digests(&index.frames()[number]) else {
            return Vec::new();
        };
        let of_frame = stored.iter().filter(|(_, frame, _)| *frame == number);
        of_frame
            .map(|(page, _, slot)| (key(&digests[usize::from(*slot)])[0], *page))
            .take(most)
            .collect()
    }
}
