//! Page states and the address map: the data that must outlive a worker, in one block of memory.
//!
//! | words | content |
//! | --- | --- |
//! | 16 | header: valid copy and extents of the address map, unsettled pages, layout, reads |
//! | 256 | activity of 32 threads, 8 words each: whether it serves, which frame it decodes |
//! | n | `removed`, one bit per page: sticky, the page is zero from now on |
//! | n | `present`, one bit per page: the kernel reported the page as present; advisory |
//! | n | `poisoned`, one bit per page |
//! | n | `unmapped`, one bit per page: sticky, the owner has no session memory at its address |
//! | n / 512 | `left`, one bit per 512 pages: left to the kernel |
//! | m | the address map, two copies ([`address_map`]) |
//!
//! n is one word per 64 page numbers. Pages that are left to the kernel are never looked up in the
//! other bitmaps, so that those bitmaps take no memory for them: a restore of 16 TiB of zeros needs
//! a megabyte. In a memfd, the block is what a successor continues from, and what a supervisor
//! observes of a worker ([`Vitals`]). Bits are set under a hold of the install lock, for an event
//! under an exclusive one. All accesses are relaxed, because the lock provides the ordering.

pub(crate) mod address_map;
mod bits;
mod vitals;

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, Release};

use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use snaprestore_uffd::memory::{Block, Ring};

use crate::session::platform::{FrameId, PAGE, PageNumber};
use crate::session::state::address_map::{Extent, Growth, Map, Unit};
use crate::session::state::bits::{first_bit, masks, place, word_of};

pub use vitals::{Pulse, Vitals};

/// Word of the header with the number of changes of the map, which selects the valid copy.
const MAP_VERSION: usize = 0;
/// Word of the header that counts the unsettled pages; never more than there really are.
const UNSETTLED: usize = 1;
/// Words of the header that count the extents of each copy of the map.
const EXTENTS: usize = 2;
/// Word of the header that identifies the layout, because another program may have created the
/// block.
const LAYOUT: usize = 4;
/// Word of the header that holds the number of page numbers.
const PAGES: usize = 5;
/// Word of the header that holds the capacity of each copy of the map, in extents.
const CAPACITY: usize = 6;
/// Word of the header that counts reads of messages.
const READS: usize = 7;
/// Word of the header that is non-zero if some of the owner's memory has large pages.
const LARGE: usize = 8;
/// Word of the header that counts the unmapped pages.
const UNMAPPED: usize = 9;
/// First word of the threads.
const THREADS: usize = 16;
/// Number of words per thread: one cache line, so that threads don't contend for it.
const THREAD_WORDS: usize = 8;
/// Maximum number of threads that have words. The activity of further threads is unknown.
const MAX_THREADS: usize = 32;
/// Word of a thread that counts the starts and ends of serving: odd while it serves.
const HEARTBEATS: usize = 0;
/// Word of a thread that holds the frame that it decodes: the frame's offset plus one, or 0.
const DECODING: usize = 1;
/// Word of a thread that holds the layer of that frame, which is stored first.
const DECODING_LAYER: usize = 2;
/// Number of bitmaps with one bit per page.
const BITMAPS: usize = 4;
/// Number of pages that are left to the kernel together: those of one index block.
const LEFT_PAGES: u64 = PAGES_PER_BLOCK_U64;
/// Number of words before the bitmaps.
const HEADER_END: usize = THREADS + MAX_THREADS * THREAD_WORDS;
/// Version of the layout of the block.
const VERSION: u64 = u64::from_le_bytes(*b"snaptab3");

/// The session's knowledge of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Status {
    /// The page must be installed.
    Absent,
    /// The kernel reported the page as present.
    Present,
    /// The owner discarded or unmapped the page: it is zero from then on.
    Removed,
    /// The page couldn't be restored.
    Poisoned,
}

/// The shared state of a session.
#[derive(Debug)]
pub(crate) struct State {
    block: Arc<Block>,
    words: usize,
    pages: PageNumber,
    bitmap_words: usize,
    left_words: usize,
    extent_capacity: usize,
    /// The growth of the map, if no other process needs to find the map.
    growth: Growth,
}

impl State {
    /// Number of pieces, beyond one per region, into which `mremap` may split an owner's memory
    /// before the map must grow. Tables that are shared with another process can't grow.
    pub(crate) const SPARE_PIECES: usize = 4096;

    /// Creates the state of `pages` page numbers, of which those in `extents` belong to the owner,
    /// with room for `extra` pieces that moves may leave before the map grows. The returned ring is
    /// for the messages of the session.
    pub(crate) fn new(
        pages: PageNumber,
        extents: &[Extent],
        extra: usize,
    ) -> io::Result<(Self, Ring)> {
        Self::begin(pages, extents, extra, Block::private)
    }

    /// Creates the state like [`State::new`], in a memfd that other processes can share.
    pub(crate) fn shared(
        pages: PageNumber,
        extents: &[Extent],
        extra: usize,
    ) -> io::Result<(Self, Ring)> {
        Self::begin(pages, extents, extra, |len| {
            Block::memfd(c"snaprestore session", len)
        })
    }

    /// Opens the state that [`State::shared`] created, in this or another process, as it is now.
    pub(crate) fn open(memfd: OwnedFd) -> io::Result<(Self, Ring)> {
        let (block, ring) = Block::from_memfd(memfd)?;
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        if block.len() < (HEADER_END * size_of::<u64>()) as u64 {
            return Err(invalid("the session's tables are too short"));
        }
        let header = |word: usize| block.words(0, HEADER_END)[word].load(Relaxed);
        if header(LAYOUT) != VERSION {
            return Err(invalid("the session's tables are of another version"));
        }
        let number = |word| usize::try_from(header(word)).unwrap_or(usize::MAX);
        let state = Self::over(Arc::clone(&block), header(PAGES), number(CAPACITY));
        match state.filter(|state| (state.words * size_of::<u64>()) as u64 == block.len()) {
            Some(state) => Ok((state, ring)),
            None => Err(invalid("the session's tables contradict themselves")),
        }
    }

    fn over(block: Arc<Block>, pages: PageNumber, extent_capacity: usize) -> Option<Self> {
        Some(Self {
            words: words(pages, extent_capacity)?,
            growth: Growth::new(block.as_memfd().is_none()),
            block,
            pages,
            bitmap_words: usize::try_from(pages.div_ceil(64)).ok()?,
            left_words: usize::try_from(pages.div_ceil(64 * LEFT_PAGES)).ok()?,
            extent_capacity,
        })
    }

    fn begin(
        pages: PageNumber,
        extents: &[Extent],
        extra: usize,
        block: impl FnOnce(u64) -> io::Result<(Arc<Block>, Ring)>,
    ) -> io::Result<(Self, Ring)> {
        let too_many = || io::Error::other(format!("{pages} pages are too many for memory"));
        let extent_capacity = extents.len() + extra;
        let words = words(pages, extent_capacity).ok_or_else(too_many)?;
        let (block, ring) = block((words * size_of::<u64>()) as u64)?;
        let state = Self::over(block, pages, extent_capacity).ok_or_else(too_many)?;
        let header = state.words();
        header[PAGES].store(pages, Relaxed);
        header[CAPACITY].store(extent_capacity as u64, Relaxed);
        let large = extents.iter().any(|extent| extent.large);
        header[LARGE].store(u64::from(large), Relaxed);
        // They fit, because the capacity is at least their number.
        let _ = state.map().publish(extents.to_vec(), 0);
        // Numbers past the end of a region belong to no page, so nobody needs to load them.
        let mut owned: Vec<_> = extents.iter().map(Extent::page_numbers).collect();
        owned.sort_unstable_by_key(|range| range.start);
        let mut next = 0;
        for range in &owned {
            state.mark_removed(next..range.start);
            next = range.end;
        }
        state.mark_removed(next..pages);
        let owned = owned.iter().map(|range| range.end - range.start).sum();
        state.words()[UNSETTLED].store(owned, Relaxed);
        state.words()[LAYOUT].store(VERSION, Relaxed);
        Ok((state, ring))
    }

    /// Returns the memfd that contains the state, if there is one.
    pub(crate) fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.block.as_memfd()
    }

    /// Returns the number of page numbers that the state has room for.
    pub(crate) fn page_slots(&self) -> PageNumber {
        self.pages
    }

    /// Counts a read of messages, as a sign of life.
    pub(crate) fn count_read(&self) {
        self.words()[READS].fetch_add(1, Relaxed);
    }

    /// Records that thread number `thread` starts or finishes serving a fault.
    pub(crate) fn beat(&self, thread: usize) {
        if let Some(words) = self.thread(thread) {
            words[HEARTBEATS].fetch_add(1, Relaxed);
        }
    }

    /// Records that serving takes long because of the owner and not because a thread is stuck: an
    /// owner that changes its mappings without a pause can force any number of retries of every
    /// install.
    pub(crate) fn beat_all(&self) {
        for words in (0..MAX_THREADS).filter_map(|thread| self.thread(thread)) {
            // Adding two keeps odd counts odd and even counts even.
            words[HEARTBEATS].fetch_add(2, Relaxed);
        }
    }

    /// Records the frame that thread number `thread` decodes.
    pub(crate) fn set_decoding(&self, thread: usize, frame: Option<FrameId>) {
        let Some(words) = self.thread(thread) else {
            return;
        };
        if let Some(frame) = frame {
            words[DECODING_LAYER].store(frame.layer.into(), Relaxed);
        }
        words[DECODING].store(frame.map_or(0, |frame| frame.offset + 1), Release);
    }

    fn thread(&self, thread: usize) -> Option<&[AtomicU64]> {
        (thread < MAX_THREADS).then(|| {
            let start = THREADS + thread * THREAD_WORDS;
            &self.words()[start..start + THREAD_WORDS]
        })
    }

    /// Takes over from threads that are gone: clears their activity, and counts what they may have
    /// left uncounted. No other thread may use the state meanwhile.
    pub(crate) fn recover(&self) {
        for thread in 0..MAX_THREADS {
            if let Some(words) = self.thread(thread) {
                words[HEARTBEATS].store(0, Relaxed);
                words[DECODING].store(0, Relaxed);
            }
        }
        self.recount();
    }

    /// Returns the map of where the owner has the pages.
    pub(crate) fn map(&self) -> Map<'_> {
        let words = self.words();
        let start = HEADER_END + BITMAPS * self.bitmap_words + self.left_words;
        let each = Map::words(self.extent_capacity);
        Map::new(
            &words[MAP_VERSION],
            &words[EXTENTS..EXTENTS + 2],
            [
                &words[start..start + each],
                &words[start + each..start + 2 * each],
            ],
            &self.growth,
        )
    }

    /// Returns the maximum number of pieces of an owner's memory if the owner is in another
    /// process.
    pub(crate) fn max_pieces(&self) -> usize {
        self.extent_capacity
    }

    /// Returns the extents that the owner still has mapped: the map without unmapped pages.
    pub(crate) fn mapped(&self) -> Vec<Extent> {
        let extents = self.map().extents();
        if self.words()[UNMAPPED].load(Relaxed) == 0 {
            return extents.collect();
        }
        let unmapped = self.unmapped();
        let gone = |word: usize| unmapped[word].load(Relaxed);
        let mut mapped = Vec::new();
        for extent in extents {
            let end = extent.page_numbers().end;
            let mut next = extent.first_page;
            while let Some(start) = first_bit(next..end, |word| !gone(word)) {
                next = first_bit(start..end, gone).unwrap_or(end);
                mapped.push(Extent {
                    address: extent.address + (start - extent.first_page) * PAGE,
                    pages: next - start,
                    first_page: start,
                    large: extent.large,
                });
            }
        }
        mapped
    }

    /// Returns whether the owner has neither moved nor unmapped anything, according to the events
    /// so far.
    pub(crate) fn is_in_place(&self) -> bool {
        self.words()[UNMAPPED].load(Relaxed) == 0 && self.map().is_first()
    }

    /// Returns the state of `page`. Removed takes precedence over everything else.
    pub(crate) fn status(&self, page: PageNumber) -> Status {
        let (word, bit) = place(page);
        let set = |bitmap: &[AtomicU64]| bitmap[word].load(Relaxed) & bit != 0;
        if self.is_left(page / LEFT_PAGES) {
            Status::Present
        } else if set(self.removed()) {
            Status::Removed
        } else if set(self.present()) {
            Status::Present
        } else if set(self.poisoned()) {
            Status::Poisoned
        } else {
            Status::Absent
        }
    }

    /// Returns whether some of the owner's memory has large pages. This never changes.
    pub(crate) fn has_large(&self) -> bool {
        self.words()[LARGE].load(Relaxed) != 0
    }

    /// Returns the state of a unit as a whole (reasons in [`super::fault::huge`]).
    pub(crate) fn status_of(&self, unit: &Unit) -> Status {
        if !unit.large {
            return self.status(unit.pages.start);
        }
        let (mut present, mut poisoned, mut removed) = (false, false, true);
        for (word, mask) in masks(unit.pages.clone()) {
            let load = |bitmap: &[AtomicU64]| bitmap[word].load(Relaxed) & mask;
            present |= load(self.present()) != 0;
            poisoned |= load(self.poisoned()) != 0;
            removed &= load(self.removed()) == mask;
        }
        if removed {
            Status::Removed
        } else if present {
            Status::Present
        } else if poisoned {
            Status::Poisoned
        } else {
            Status::Absent
        }
    }

    /// Calls `each` with the pages of `within` that are removed.
    pub(crate) fn each_removed(&self, within: Range<PageNumber>, mut each: impl FnMut(PageNumber)) {
        for (word, mask) in masks(within) {
            let mut left = mask & self.removed()[word].load(Relaxed);
            while left != 0 {
                each(word as u64 * 64 + u64::from(left.trailing_zeros()));
                left &= left - 1;
            }
        }
    }

    /// Returns the first range of absent pages in `within`.
    pub(crate) fn absent_in(&self, within: Range<PageNumber>) -> Option<Range<PageNumber>> {
        let start = self.first_absent(within.clone())?;
        // The first page is not checked again: it may have arrived meanwhile, and no range is
        // empty.
        let rest = start + 1..within.end;
        let end = first_bit(rest, |word| self.settled_word(word)).unwrap_or(within.end);
        Some(start..end)
    }

    /// Returns the first absent page of `within`. Checks 64 pages at once, and none that are left
    /// to the kernel.
    pub(crate) fn first_absent(&self, within: Range<PageNumber>) -> Option<PageNumber> {
        self.not_left(within)
            .find_map(|part| first_bit(part, |word| !self.settled_word(word)))
    }

    /// Returns whether any page of `within` is absent. Checks 64 pages at once.
    pub(crate) fn any_absent(&self, within: Range<PageNumber>) -> bool {
        self.first_absent(within).is_some()
    }

    /// Returns the parts of `within` that are not left to the kernel.
    fn not_left(&self, within: Range<PageNumber>) -> impl Iterator<Item = Range<PageNumber>> {
        let mut next = within.start;
        std::iter::from_fn(move || {
            while next < within.end {
                let block = next / LEFT_PAGES;
                let left = self.left()[word_of(block)].load(Relaxed) >> (block % 64);
                // Number of blocks until the next that is not left to the kernel, or until the next
                // word.
                let skipped = u64::from(left.trailing_ones()).min(64 - block % 64);
                if skipped == 0 {
                    let start = next;
                    next = within.end.min((block + 1) * LEFT_PAGES);
                    return Some(start..next);
                }
                next = (block + skipped) * LEFT_PAGES;
            }
            None
        })
    }

    /// Returns whether every page of `within` is present.
    pub(crate) fn all_present(&self, within: Range<PageNumber>) -> bool {
        masks(within).all(|(word, mask)| {
            let load = |bitmap: &[AtomicU64]| bitmap[word].load(Relaxed);
            load(self.present()) & !load(self.removed()) & !load(self.poisoned()) & mask == mask
        })
    }

    /// Returns the number of absent pages in `within`.
    pub(crate) fn count_absent(&self, within: Range<PageNumber>) -> u64 {
        self.not_left(within)
            .flat_map(masks)
            .map(|(word, mask)| u64::from((mask & !self.settled_word(word)).count_ones()))
            .sum()
    }

    /// Returns the number of the owner's pages that are present, without those that are left to the
    /// kernel.
    pub(crate) fn count_present(&self) -> u64 {
        let of = |(word, mask): (usize, u64)| {
            let load = |bitmap: &[AtomicU64]| bitmap[word].load(Relaxed);
            u64::from((load(self.present()) & !load(self.removed()) & mask).count_ones())
        };
        self.not_left(0..self.pages).flat_map(masks).map(of).sum()
    }

    /// Marks pages that the kernel reported as present.
    pub(crate) fn mark_present(&self, pages: Range<PageNumber>) {
        self.mark(self.present(), pages);
    }

    /// Leaves `pages` to the kernel. Must be called before any state of these pages is recorded.
    pub(crate) fn leave_to_kernel(&self, pages: Range<PageNumber>) {
        let blocks = pages.start.div_ceil(LEFT_PAGES)..pages.end / LEFT_PAGES;
        for (word, mask) in masks(blocks.clone()) {
            self.left()[word].fetch_or(mask, Relaxed);
        }
        // The other bitmaps are not read: that would allocate a page of memory for each of their
        // pages.
        let whole = if blocks.is_empty() {
            pages.start..pages.start
        } else {
            blocks.start * LEFT_PAGES..blocks.end * LEFT_PAGES
        };
        for edge in [pages.start..whole.start, whole.end..pages.end] {
            for (word, mask) in masks(edge) {
                self.present()[word].fetch_or(mask, Relaxed);
            }
        }
        self.words()[UNSETTLED].fetch_sub(pages.end - pages.start, Relaxed);
    }

    /// Marks pages as removed: they are zero from now on.
    pub(crate) fn mark_removed(&self, pages: Range<PageNumber>) {
        self.mark(self.removed(), pages);
    }

    /// Marks pages that the owner has unmapped: nobody ever requests them again.
    pub(crate) fn mark_unmapped(&self, pages: Range<PageNumber>) {
        let mut new = 0;
        for (word, mask) in masks(pages.clone()) {
            let before = self.unmapped()[word].fetch_or(mask, Relaxed);
            new += u64::from((mask & !before).count_ones());
        }
        self.words()[UNMAPPED].fetch_add(new, Relaxed);
        self.mark_removed(pages);
    }

    /// Marks pages that couldn't be restored.
    pub(crate) fn mark_poisoned(&self, pages: Range<PageNumber>) {
        self.mark(self.poisoned(), pages);
    }

    /// Marks poisoned pages as present after all.
    pub(crate) fn mark_healed(&self, pages: Range<PageNumber>) {
        self.mark_present(pages.clone());
        for (word, mask) in masks(pages) {
            self.poisoned()[word].fetch_and(!mask, Relaxed);
        }
    }

    /// Returns the first poisoned page at or after `page` that the owner still has.
    pub(crate) fn first_poisoned(&self, page: PageNumber) -> Option<PageNumber> {
        let mut parts = self.not_left(page..self.pages);
        parts.find_map(|part| first_bit(part, |word| self.poisoned_word(word)))
    }

    /// Returns the number of the owner's pages that are poisoned.
    pub(crate) fn count_poisoned(&self) -> u64 {
        self.not_left(0..self.pages)
            .flat_map(masks)
            .map(|(word, mask)| u64::from((self.poisoned_word(word) & mask).count_ones()))
            .sum()
    }

    /// Returns the pages of a word whose status is poisoned, as a bit mask.
    fn poisoned_word(&self, word: usize) -> u64 {
        let load = |bitmap: &[AtomicU64]| bitmap[word].load(Relaxed);
        load(self.poisoned()) & !load(self.present()) & !load(self.removed())
    }

    fn mark(&self, bitmap: &[AtomicU64], pages: Range<PageNumber>) {
        let mut new = 0;
        for (word, mask) in masks(pages.start..pages.end.min(self.pages)) {
            let others = self.settled_word(word) & !bitmap[word].load(Relaxed);
            let before = bitmap[word].fetch_or(mask, Relaxed);
            new += u64::from((mask & !before & !others).count_ones());
        }
        if new > 0 {
            let unsettled = &self.words()[UNSETTLED];
            // Two threads may both have counted a page, one as present and one as poisoned. Then
            // the count is too small until `recount` corrects it. It must not wrap.
            let _ = unsettled.fetch_update(Relaxed, Relaxed, |n| Some(n.saturating_sub(new)));
        }
    }

    /// Returns the number of unsettled pages: never more than there really are, and fewer where two
    /// threads have counted the same page.
    pub(crate) fn unsettled(&self) -> u64 {
        self.words()[UNSETTLED].load(Relaxed)
    }

    /// Returns whether every page may be settled; [`State::recount`] returns the exact number.
    pub(crate) fn may_be_settled(&self) -> bool {
        self.words()[UNSETTLED].load(Relaxed) == 0
    }

    /// Counts the owner's absent pages. The caller must hold the install lock exclusively.
    pub(crate) fn recount(&self) -> u64 {
        let map = self.map();
        let absent = map
            .extents()
            .map(|extent| self.count_absent(extent.page_numbers()))
            .sum();
        self.words()[UNSETTLED].store(absent, Relaxed);
        absent
    }

    /// Returns the state as numbers, to tell two states of the model apart.
    #[cfg(test)]
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        // The past activity of the threads makes no difference to their future behavior.
        let words = self.words();
        let words = words[..LAYOUT].iter().chain(&words[HEADER_END..]);
        words.map(|word| word.load(Relaxed)).collect()
    }

    fn is_left(&self, block: u64) -> bool {
        let (word, bit) = place(block);
        self.left()[word].load(Relaxed) & bit != 0
    }

    fn settled_word(&self, word: usize) -> u64 {
        if self.is_left(word as u64 * 64 / LEFT_PAGES) {
            return u64::MAX;
        }
        self.removed()[word].load(Relaxed)
            | self.present()[word].load(Relaxed)
            | self.poisoned()[word].load(Relaxed)
    }

    fn removed(&self) -> &[AtomicU64] {
        self.bitmap(0)
    }

    fn present(&self) -> &[AtomicU64] {
        self.bitmap(1)
    }

    fn poisoned(&self) -> &[AtomicU64] {
        self.bitmap(2)
    }

    fn unmapped(&self) -> &[AtomicU64] {
        self.bitmap(3)
    }

    fn left(&self) -> &[AtomicU64] {
        let start = HEADER_END + BITMAPS * self.bitmap_words;
        &self.words()[start..start + self.left_words]
    }

    fn bitmap(&self, which: usize) -> &[AtomicU64] {
        let start = HEADER_END + which * self.bitmap_words;
        &self.words()[start..start + self.bitmap_words]
    }

    fn words(&self) -> &[AtomicU64] {
        self.block.words(0, self.words)
    }
}

/// Returns the number of words of a state of `pages` page numbers with a map of `extents`.
fn words(pages: PageNumber, extents: usize) -> Option<usize> {
    let bitmap = usize::try_from(pages.div_ceil(64)).ok()?;
    let left = usize::try_from(pages.div_ceil(64 * LEFT_PAGES)).ok()?;
    let map = extents.checked_mul(Map::words(1))?.checked_mul(2)?;
    let bitmaps = bitmap.checked_mul(BITMAPS)?.checked_add(left)?;
    HEADER_END.checked_add(bitmaps)?.checked_add(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Status::{Absent, Poisoned, Present, Removed};

    fn one_extent(pages: u64) -> State {
        let extent = Extent {
            address: 1 << 30,
            pages,
            first_page: 0,
            large: false,
        };
        State::new(pages, &[extent], 8).unwrap().0
    }

    /// Regression test: two threads that installed the same pages killed an owner. Between finding
    /// the first absent page and the end of its range, the other thread marked the page, the range
    /// came out empty, and the kernel refuses to install nothing.
    #[test]
    fn absent_range_is_never_empty_during_marking() {
        const PAGES: u64 = 1 << 22;
        let state = one_extent(PAGES);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..PAGES).for_each(|page| state.mark_present(page..page + 1)));
            let mut next = 0;
            while let Some(first) = state.first_absent(next..PAGES) {
                if let Some(absent) = state.absent_in(first..PAGES.min(first + 2)) {
                    assert!(!absent.is_empty(), "{absent:?}");
                }
                next = first;
            }
        });
    }

    #[test]
    fn removed_takes_precedence_over_other_states() {
        let state = one_extent(100);
        state.mark_present(3..5);
        state.mark_poisoned(4..6);
        state.mark_removed(3..4);
        let seen: Vec<_> = (2..7).map(|page| state.status(page)).collect();
        assert_eq!(seen, [Absent, Removed, Present, Poisoned, Absent]);
        assert_eq!(state.recount(), 97);
        assert!(state.all_present(4..4) && !state.all_present(3..5) && !state.all_present(4..6));
        state.mark_present(10..80);
        assert!(state.all_present(10..80) && !state.all_present(10..81));
    }

    #[test]
    fn healed_pages_are_present_not_poisoned() {
        let state = one_extent(200);
        state.mark_poisoned(60..70);
        state.mark_removed(61..62);
        assert_eq!(
            (state.first_poisoned(0), state.count_poisoned()),
            (Some(60), 9)
        );
        assert_eq!(state.first_poisoned(61), Some(62));
        state.mark_healed(60..69);
        assert_eq!(
            (state.first_poisoned(0), state.count_poisoned()),
            (Some(69), 1)
        );
        assert_eq!((state.status(60), state.status(61)), (Present, Removed));
        assert!(state.all_present(62..69));
        assert_eq!(state.recount(), 190);
        state.mark_healed(69..70);
        assert_eq!((state.first_poisoned(0), state.count_poisoned()), (None, 0));
    }

    /// A large page is present if any part of it was marked, and removed only if all of it was.
    #[test]
    fn large_page_has_a_single_status() {
        let unit = Unit {
            address: 1 << 30,
            pages: 64..192,
            large: true,
        };
        let after = |marks: &[fn(&State)]| {
            let state = one_extent(256);
            for mark in marks {
                mark(&state);
            }
            state.status_of(&unit)
        };
        let some: fn(&State) = |state| state.mark_removed(10..191);
        let rest: fn(&State) = |state| state.mark_removed(191..192);
        let present: fn(&State) = |state| state.mark_present(70..71);
        let poisoned: fn(&State) = |state| state.mark_poisoned(64..192);
        let outside: fn(&State) = |state| state.mark_present(0..64);
        assert_eq!(after(&[]), Absent);
        assert_eq!(after(&[some, outside]), Absent);
        assert_eq!(after(&[some, rest]), Removed);
        assert_eq!(after(&[some, present]), Present);
        assert_eq!(after(&[some, poisoned]), Poisoned);
        assert_eq!(after(&[poisoned, present]), Present);
        assert_eq!(after(&[present, poisoned, some, rest]), Removed);
        let state = one_extent(256);
        state.mark_removed(62..66);
        state.mark_removed(130..131);
        let mut removed = Vec::new();
        state.each_removed(64..192, |page| removed.push(page));
        assert_eq!(removed, [64, 65, 130]);
    }

    #[test]
    fn unsettled_pages_are_counted_once_where_mapped() {
        let state = one_extent(130);
        state.mark_present(0..130);
        state.mark_removed(10..500);
        assert!(state.may_be_settled());
        assert_eq!(state.recount(), 0);
        let state = one_extent(130);
        state.mark_present(0..129);
        assert!(!state.may_be_settled());
        assert!(state.any_absent(64..130));
        assert!(!state.any_absent(0..129));
        assert_eq!(state.absent_in(0..130), Some(129..130));
    }
}
