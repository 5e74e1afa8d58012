//! The page states and the address map: what has to outlive a worker, in one block of memory.
//!
//! | words | what |
//! | --- | --- |
//! | 16 | header: which copy of the address map is valid, pages not settled, extents of each copy, what tells the layout, reads of messages so far |
//! | 256 | what each of 32 threads is doing, 8 words each: whether it serves, which frame it decodes |
//! | n | `removed`, one bit a page: sticky, the page is zero from now on |
//! | n | `present`, one bit a page: the kernel said that the page is there; advice |
//! | n | `poisoned`, one bit a page |
//! | n | `unmapped`, one bit a page: sticky, the owner has nothing of the session's at its address |
//! | n / 512 | `left`, one bit for each 512 pages: left to the kernel |
//! | m | the address map, two copies ([`super::map`]) |
//!
//! n is a word for each 64 page numbers. Pages that are left to the kernel are never looked up in the
//! other bitmaps, so that those take no memory for them: a restore of 16 TiB of zeros needs a
//! megabyte. In a memfd it is what a successor goes on from, and what a
//! keeper sees of a worker ([`Vitals`]). Bits are set under a hold of the install lock, for an
//! event under an exclusive one. All accesses are relaxed: the lock orders what has to be in order.

pub(crate) mod address_map;

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use snaprestore_uffd::memory::{Block, Ring};

use crate::session::platform::{PAGE, PageNumber};
use crate::session::state::address_map::{Extent, Growth, Map, Unit};

/// Word of the header that says which copy of the map is valid, and how often it changed.
const MAP_VERSION: usize = 0;
/// Word of the header that counts the pages in no settled state; never above the truth.
const UNSETTLED: usize = 1;
/// Words of the header that count the extents of each copy of the map.
const EXTENTS: usize = 2;
/// Word of the header that says how all of this is laid out: another program may have made it.
const LAYOUT: usize = 4;
/// Word of the header that holds the number of page numbers.
const PAGES: usize = 5;
/// Word of the header that holds the room of each copy of the map, in extents.
const CAPACITY: usize = 6;
/// Word of the header that counts reads of messages.
const READS: usize = 7;
/// Word of the header that says whether some of the owner's memory is of large pages.
const LARGE: usize = 8;
/// Word of the header that counts the pages that were unmapped.
const UNMAPPED: usize = 9;
/// Where the words of the threads begin.
const THREADS: usize = 16;
/// Words of a thread: a line of the cache, so that threads don't take it from each other.
const THREAD_WORDS: usize = 8;
/// Threads that have words. Of what others do nothing is known.
const MAX_THREADS: usize = 32;
/// Word of a thread that counts the beginnings and ends of what it serves: odd while it serves.
const HEARTBEATS: usize = 0;
/// Word of a thread that names the frame that it decodes: one more than the frame's number, or 0.
const DECODING: usize = 1;
/// Bitmaps with one bit a page.
const BITMAPS: usize = 4;
/// Pages that are left to the kernel together: those of one block of the index.
const LEFT_PAGES: u64 = PAGES_PER_BLOCK_U64;
/// Words before the bitmaps.
const HEADER_END: usize = THREADS + MAX_THREADS * THREAD_WORDS;
/// The layout of this file's table.
const VERSION: u64 = u64::from_le_bytes(*b"snaptab3");

/// What the session believes of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Status {
    /// It has to be installed.
    Absent,
    /// The kernel said that it is there.
    Present,
    /// The owner discarded it: it is zero.
    Removed,
    /// It couldn't be restored.
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
    /// Where the map grows if no other process has to find it.
    growth: Growth,
}

impl State {
    /// Pieces beyond one for each region that an owner may tear its memory into by `mremap` before
    /// the map has to grow, which it can't in tables that are shared with another process.
    pub(crate) const SPARE_PIECES: usize = 4096;

    /// The state of `pages` page numbers, of which those in `extents` belong to the owner, with
    /// room for `extra` pieces that moving may leave before the map grows. The ring is for its
    /// messages.
    pub(crate) fn new(
        pages: PageNumber,
        extents: &[Extent],
        extra: usize,
    ) -> io::Result<(Self, Ring)> {
        Self::begin(pages, extents, extra, Block::anonymous)
    }

    /// As [`State::new`], in a memfd that other processes can share.
    pub(crate) fn shared(
        pages: PageNumber,
        extents: &[Extent],
        extra: usize,
    ) -> io::Result<(Self, Ring)> {
        Self::begin(pages, extents, extra, |len| {
            Block::memfd(c"snaprestore session", len)
        })
    }

    /// The state that [`State::shared`] made, here or in another process, as it is now.
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
        // They fit: the capacity is theirs and more.
        let _ = state.map().publish(extents.to_vec(), 0);
        // Numbers past the end of a region belong to no page: nobody has to bring them.
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

    /// The memfd that it lies in, if it does.
    pub(crate) fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.block.as_memfd()
    }

    /// Page numbers that it has room for.
    pub(crate) fn page_slots(&self) -> PageNumber {
        self.pages
    }

    /// Counts a read of messages: a sign of life.
    pub(crate) fn count_read(&self) {
        self.words()[READS].fetch_add(1, Relaxed);
    }

    /// Notes that thread number `thread` begins, or has ended, to serve a fault.
    pub(crate) fn beat(&self, thread: usize) {
        if let Some(words) = self.thread(thread) {
            words[HEARTBEATS].fetch_add(1, Relaxed);
        }
    }

    /// Notes that serving takes long because the owner has it take long, and not because a thread stands still:
    /// whoever changes its mappings without a pause can have every install repeated for as long as it likes.
    pub(crate) fn beat_all(&self) {
        for words in (0..MAX_THREADS).filter_map(|thread| self.thread(thread)) {
            // Odd stays odd, and even even.
            words[HEARTBEATS].fetch_add(2, Relaxed);
        }
    }

    /// Notes the frame that thread number `thread` decodes.
    pub(crate) fn decoding(&self, thread: usize, frame: Option<u64>) {
        if let Some(words) = self.thread(thread) {
            words[DECODING].store(frame.map_or(0, |frame| frame + 1), Relaxed);
        }
    }

    fn thread(&self, thread: usize) -> Option<&[AtomicU64]> {
        (thread < MAX_THREADS).then(|| {
            let start = THREADS + thread * THREAD_WORDS;
            &self.words()[start..start + THREAD_WORDS]
        })
    }

    /// Takes over from threads that are gone: what they were doing is theirs no more, and what they
    /// may have left uncounted is counted. Nobody else uses the state.
    pub(crate) fn recover(&self) {
        for thread in 0..MAX_THREADS {
            if let Some(words) = self.thread(thread) {
                words[HEARTBEATS].store(0, Relaxed);
                words[DECODING].store(0, Relaxed);
            }
        }
        self.recount();
    }

    /// Where the owner has the pages.
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

    /// The pieces that the memory of an owner in another process may be in at most.
    pub(crate) fn most_pieces(&self) -> usize {
        self.extent_capacity
    }

    /// Where the owner still has pages: the map without what was unmapped.
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

    /// Whether the owner has neither moved nor unmapped anything, as far as events tell.
    pub(crate) fn is_in_place(&self) -> bool {
        self.words()[UNMAPPED].load(Relaxed) == 0 && self.map().is_first()
    }

    /// What is believed of `page`. A removed page is that whatever else happened to it.
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

    /// Whether some of the owner's memory is of large pages. It can't become so later.
    pub(crate) fn has_large(&self) -> bool {
        self.words()[LARGE].load(Relaxed) != 0
    }

    /// What is believed of the pages of a unit as a whole ([`super::large`] says why).
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

    /// The first range of absent pages in `within`.
    pub(crate) fn absent_in(&self, within: Range<PageNumber>) -> Option<Range<PageNumber>> {
        let start = self.first_absent(within.clone())?;
        // The first page is not looked at again: it may have come meanwhile, and no range is empty.
        let rest = start + 1..within.end;
        let end = first_bit(rest, |word| self.settled_word(word)).unwrap_or(within.end);
        Some(start..end)
    }

    /// The first absent page of `within`; looks at 64 pages at once, and at nothing of what is left
    /// to the kernel.
    pub(crate) fn first_absent(&self, within: Range<PageNumber>) -> Option<PageNumber> {
        self.not_left(within)
            .find_map(|part| first_bit(part, |word| !self.settled_word(word)))
    }

    /// Whether any page of `within` is absent; looks at 64 pages at once.
    pub(crate) fn any_absent(&self, within: Range<PageNumber>) -> bool {
        self.first_absent(within).is_some()
    }

    /// The parts of `within` that are not left to the kernel.
    fn not_left(&self, within: Range<PageNumber>) -> impl Iterator<Item = Range<PageNumber>> {
        let mut next = within.start;
        std::iter::from_fn(move || {
            while next < within.end {
                let block = next / LEFT_PAGES;
                let left = self.left()[word_of(block)].load(Relaxed) >> (block % 64);
                // Blocks until the next that is not left, or the next word.
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

    /// Whether every page of `within` is present.
    pub(crate) fn all_present(&self, within: Range<PageNumber>) -> bool {
        masks(within).all(|(word, mask)| {
            let load = |bitmap: &[AtomicU64]| bitmap[word].load(Relaxed);
            load(self.present()) & !load(self.removed()) & !load(self.poisoned()) & mask == mask
        })
    }

    /// How many pages of `within` are absent.
    pub(crate) fn count_absent(&self, within: Range<PageNumber>) -> u64 {
        self.not_left(within)
            .flat_map(masks)
            .map(|(word, mask)| u64::from((mask & !self.settled_word(word)).count_ones()))
            .sum()
    }

    /// Records pages that the kernel said are there.
    pub(crate) fn mark_present(&self, pages: Range<PageNumber>) {
        self.mark(self.present(), pages);
    }

    /// Leaves `pages` to the kernel, before anything else is known of them.
    pub(crate) fn leave_out(&self, pages: Range<PageNumber>) {
        let blocks = pages.start.div_ceil(LEFT_PAGES)..pages.end / LEFT_PAGES;
        for (word, mask) in masks(blocks.clone()) {
            self.left()[word].fetch_or(mask, Relaxed);
        }
        // Nothing is read of the other bitmaps: that would take a page of memory for each of theirs.
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

    /// Records pages that are zero from now on.
    pub(crate) fn mark_removed(&self, pages: Range<PageNumber>) {
        self.mark(self.removed(), pages);
    }

    /// Records pages that the owner has unmapped: nobody ever asks for them again.
    pub(crate) fn mark_unmapped(&self, pages: Range<PageNumber>) {
        let mut new = 0;
        for (word, mask) in masks(pages.clone()) {
            let before = self.unmapped()[word].fetch_or(mask, Relaxed);
            new += u64::from((mask & !before).count_ones());
        }
        self.words()[UNMAPPED].fetch_add(new, Relaxed);
        self.mark_removed(pages);
    }

    /// Records pages that couldn't be restored.
    pub(crate) fn mark_poisoned(&self, pages: Range<PageNumber>) {
        self.mark(self.poisoned(), pages);
    }

    /// Records that poisoned pages are there after all.
    pub(crate) fn mark_healed(&self, pages: Range<PageNumber>) {
        self.mark_present(pages.clone());
        for (word, mask) in masks(pages) {
            self.poisoned()[word].fetch_and(!mask, Relaxed);
        }
    }

    /// The first poisoned page from `page` on that the owner still has.
    pub(crate) fn first_poisoned(&self, page: PageNumber) -> Option<PageNumber> {
        let mut parts = self.not_left(page..self.pages);
        parts.find_map(|part| first_bit(part, |word| self.poisoned_word(word)))
    }

    /// How many pages of the owner's are poisoned.
    pub(crate) fn count_poisoned(&self) -> u64 {
        self.not_left(0..self.pages)
            .flat_map(masks)
            .map(|(word, mask)| u64::from((self.poisoned_word(word) & mask).count_ones()))
            .sum()
    }

    /// The pages of a word whose status is poisoned.
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
            // Two threads may both have counted a page, one as present and one as poisoned: the
            // count may fall short of the truth, and `recount` corrects it. It must not wrap.
            let _ = unsettled.fetch_update(Relaxed, Relaxed, |n| Some(n.saturating_sub(new)));
        }
    }

    /// How many pages are not settled: never more than there are, and less where two threads have
    /// counted the same page.
    pub(crate) fn unsettled(&self) -> u64 {
        self.words()[UNSETTLED].load(Relaxed)
    }

    /// Whether every page may be settled; [`State::recount`] tells.
    pub(crate) fn may_be_settled(&self) -> bool {
        self.words()[UNSETTLED].load(Relaxed) == 0
    }

    /// Counts the owner's pages that are absent. The caller holds the install lock exclusively.
    pub(crate) fn recount(&self) -> u64 {
        let map = self.map();
        let absent = map
            .extents()
            .map(|extent| self.count_absent(extent.page_numbers()))
            .sum();
        self.words()[UNSETTLED].store(absent, Relaxed);
        absent
    }

    /// The state as numbers, for telling two states apart.
    #[cfg(test)]
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        // What the threads have done, and how often, makes no difference to what they will do.
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

/// What a keeper sees of the threads over a session in a memfd.
#[derive(Debug)]
pub struct Vitals {
    state: State,
}

/// What the threads over a session had done at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Reads of messages.
    pub reads: u64,
    /// For each thread the beginnings and ends of what it served: odd while it serves.
    pub turns: Vec<u64>,
}

impl Vitals {
    /// Of the session whose tables lie in `memfd`.
    pub fn new(memfd: OwnedFd) -> io::Result<Self> {
        let state = State::open(memfd)?.0;
        Ok(Self { state })
    }

    /// What was done so far.
    pub fn pulse(&self) -> Pulse {
        let turns = self.threads().map(|words| words[HEARTBEATS].load(Relaxed));
        Pulse {
            reads: self.state.words()[READS].load(Relaxed),
            turns: turns.collect(),
        }
    }

    /// The frames that are being decoded, by their offset in the file. Of a dead worker: those that it
    /// died on.
    pub fn decoding(&self) -> Vec<u64> {
        self.threads()
            .filter_map(|words| words[DECODING].load(Relaxed).checked_sub(1))
            .collect()
    }

    fn threads(&self) -> impl Iterator<Item = &[AtomicU64]> {
        (0..MAX_THREADS).filter_map(|thread| self.state.thread(thread))
    }
}

/// The words of a state of `pages` page numbers with a map of `extents`.
fn words(pages: PageNumber, extents: usize) -> Option<usize> {
    let bitmap = usize::try_from(pages.div_ceil(64)).ok()?;
    let left = usize::try_from(pages.div_ceil(64 * LEFT_PAGES)).ok()?;
    let map = extents.checked_mul(Map::words(1))?.checked_mul(2)?;
    let bitmaps = bitmap.checked_mul(BITMAPS)?.checked_add(left)?;
    HEADER_END.checked_add(bitmaps)?.checked_add(map)
}

/// The first page of `within` whose bit is set in the words that `word` gives.
fn first_bit(within: Range<PageNumber>, word: impl Fn(usize) -> u64) -> Option<PageNumber> {
    masks(within).find_map(|(index, mask)| {
        let set = mask & word(index);
        (set != 0).then(|| index as u64 * 64 + u64::from(set.trailing_zeros()))
    })
}

/// The word of a page's bit, and the bit.
fn place(page: PageNumber) -> (usize, u64) {
    (word_of(page), 1 << (page % 64))
}

/// The word of a page's bit. Page numbers fit: the block that holds the bits was allocated.
fn word_of(page: PageNumber) -> usize {
    snaprestore_uffd::to_usize(page / 64)
}

/// The words that hold the bits of `pages`, each with the mask of those bits.
fn masks(pages: Range<PageNumber>) -> impl Iterator<Item = (usize, u64)> {
    let words = if pages.is_empty() {
        0..0
    } else {
        pages.start / 64..(pages.end - 1) / 64 + 1
    };
    words.map(move |word| {
        let low = pages.start.max(word * 64) - word * 64;
        let high = pages.end.min((word + 1) * 64) - word * 64;
        let ones = if high - low == 64 {
            u64::MAX
        } else {
            (1 << (high - low)) - 1
        };
        (word_of(word * 64), ones << low)
    })
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

    /// Two threads that install the same pages killed an owner: between finding the first absent page
    /// and the end of its range the other one marked it, the range came out empty, and the kernel
    /// refuses to install nothing.
    #[test]
    fn a_range_of_absent_pages_is_never_empty_while_another_thread_marks() {
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

    /// The masks of a range have exactly the bits of its pages.
    #[test]
    fn masks_are_the_pages() {
        for start in 0..140_u64 {
            for end in start..200 {
                let mut bits = [0_u64; 4];
                for (word, mask) in masks(start..end) {
                    bits[word] |= mask;
                }
                for page in 0..200_u64 {
                    let set = bits[word_of(page)] >> (page % 64) & 1 == 1;
                    assert_eq!(set, (start..end).contains(&page), "{start}..{end}: {page}");
                }
            }
        }
    }

    #[test]
    fn removed_wins_over_all() {
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
    fn healed_pages_are_present_and_poisoned_no_more() {
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

    /// A large page is there if any of it was marked, and removed only if all of it was.
    #[test]
    fn a_large_page_has_one_status() {
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
    fn pages_are_counted_once_and_only_where_mapped() {
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
