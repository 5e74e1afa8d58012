//! Map between the owner's addresses and page numbers, in both directions.
//!
//! The session's block contains two copies of the map. A change writes the spare copy and makes it
//! valid with one store, so a worker killed in between leaves the old map intact. The same store
//! records which message of the batch made the change, so that a successor that reads the batch
//! again makes the change only once: a second move would find nothing at the old place and lose the
//! pages. Each copy lists its extents by address, and their order by page number. Changes need an
//! exclusive hold of the install lock, look-ups any hold.
//!
//! Only a move changes the map. Unmapped pages stay in it and are marked in the state's bitmap:
//! removed pages are installed nowhere, and a move to their address takes it from them. Thus an
//! owner may unmap any number of pieces. A move needs up to two more pieces. If they don't fit, the
//! map of this process's own memory continues in two longer copies on the heap ([`Growth`]). A map
//! that another process may take over can't grow.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::Release};

use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use crate::fail_point::{FailPoint, fail_point};
use crate::session::platform::{PAGE, PageNumber};

/// Number of words per extent: its address, its pages, its first page number, a word of the order
/// by page number, and whether it has large pages.
const EXTENT_WORDS: usize = 5;

/// Number of small pages in a large page (2 MiB): the pages of one index block. (The model uses
/// smaller blocks.)
pub(crate) const LARGE_PAGES: u64 = if cfg!(test) { 2 } else { PAGES_PER_BLOCK_U64 };

/// Size of a large page in bytes.
pub(crate) const LARGE_BYTES: usize =
    snaprestore_uffd::to_usize(LARGE_PAGES) * snapshot_format::layout::PAGE_SIZE;

/// A range of consecutive pages at consecutive addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Extent {
    pub(crate) address: u64,
    pub(crate) pages: u64,
    pub(crate) first_page: PageNumber,
    /// Whether the memory has large pages, which are installed whole or not at all. The extent then
    /// consists of whole large pages, provided that the owner's memory is as declared.
    pub(crate) large: bool,
}

/// A unit that can only be installed as a whole: a page, or all pages of a large one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) address: u64,
    pub(crate) pages: Range<PageNumber>,
    pub(crate) large: bool,
}

impl Unit {
    /// Returns its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        (self.pages.end - self.pages.start) * PAGE
    }
}

impl Extent {
    fn end(&self) -> u64 {
        self.address + self.pages * PAGE
    }

    /// Returns the part of the extent inside `range`.
    fn cut(&self, range: &Range<u64>) -> Option<Self> {
        let start = self.address.max(range.start);
        let end = self.end().min(range.end);
        (start < end).then(|| Self {
            address: start,
            pages: (end - start) / PAGE,
            first_page: self.first_page + (start - self.address) / PAGE,
            large: self.large,
        })
    }

    /// Returns its addresses.
    pub(crate) fn addresses(&self) -> Range<u64> {
        self.address..self.end()
    }

    /// Returns the unit that contains `page`, which must be one of the extent's pages.
    fn unit(&self, page: PageNumber) -> Unit {
        let own = self.page_numbers();
        let whole = if self.large {
            block_of(page)
        } else {
            page..page + 1
        };
        let pages = whole.start.max(own.start)..whole.end.min(own.end);
        Unit {
            address: self.address + (pages.start - self.first_page) * PAGE,
            pages,
            large: self.large,
        }
    }

    /// Returns its page numbers.
    pub(crate) fn page_numbers(&self) -> Range<PageNumber> {
        self.first_page..self.first_page + self.pages
    }
}

/// Two copies of a map.
type Copies = [Box<[AtomicU64]>; 2];

/// Progressively longer copies of the map, each as long as all earlier ones together.
#[derive(Debug)]
pub(crate) struct Growth {
    /// The copies made so far; `None` if the map can't grow.
    grown: Option<[OnceLock<Copies>; MAX_GROWTHS]>,
    /// Number of copies made so far; the last one is in use.
    count: AtomicUsize,
}

/// Maximum number of times that a map grows, each time to twice its length: from a thousand pieces
/// to four billion.
const MAX_GROWTHS: usize = 22;

impl Growth {
    pub(crate) fn new(possible: bool) -> Self {
        Self {
            grown: possible.then_some([const { OnceLock::new() }; MAX_GROWTHS]),
            count: AtomicUsize::new(0),
        }
    }

    /// Returns the copies in use, if the map has grown.
    fn copies(&self) -> Option<[&[AtomicU64]; 2]> {
        let last = self.count.load(Relaxed).checked_sub(1)?;
        let [first, second] = self.grown.as_ref()?[last].get()?;
        Some([first, second])
    }

    /// Adds copies of at least `words` words and puts them into use.
    fn grow(&self, words: usize) -> Option<[&[AtomicU64]; 2]> {
        let next = self.count.load(Relaxed);
        let slot = self.grown.as_ref()?.get(next)?;
        slot.set([zeroed(words)?, zeroed(words)?]).ok()?;
        self.count.store(next + 1, Relaxed);
        self.copies()
    }
}

/// Returns zeroed words, or `None` if there is no memory for them.
fn zeroed(words: usize) -> Option<Box<[AtomicU64]>> {
    let mut zeroed = Vec::new();
    zeroed.try_reserve_exact(words).ok()?;
    zeroed.resize_with(words, AtomicU64::default);
    Some(zeroed.into_boxed_slice())
}

/// The error for an owner whose memory is in more pieces than there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooManyPieces;

/// Number of bits of the version word that count the messages of the batch that the map reflects.
const HANDLED_BITS: u32 = 8;

/// A view of the map in the session's block.
#[derive(Clone, Copy)]
pub(crate) struct Map<'a> {
    version: &'a AtomicU64,
    counts: &'a [AtomicU64],
    copies: [&'a [AtomicU64]; 2],
    growth: &'a Growth,
}

impl<'a> Map<'a> {
    /// Returns the number of words of one copy with room for `extents`.
    pub(crate) const fn words(extents: usize) -> usize {
        extents * EXTENT_WORDS
    }

    pub(crate) fn new(
        version: &'a AtomicU64,
        counts: &'a [AtomicU64],
        copies: [&'a [AtomicU64]; 2],
        growth: &'a Growth,
    ) -> Self {
        Self {
            version,
            counts,
            copies: growth.copies().unwrap_or(copies),
            growth,
        }
    }

    /// Returns whether the map is unchanged since it was created.
    pub(crate) fn is_first(&self) -> bool {
        self.version.load(Relaxed) >> HANDLED_BITS == 1
    }

    /// Returns the page at `address`.
    pub(crate) fn page_at(&self, address: u64) -> Option<PageNumber> {
        let extent = self.extent_at(address);
        extent.map(|extent| extent.first_page + (address - extent.address) / PAGE)
    }

    /// Returns the unit that contains `address`.
    pub(crate) fn unit_at(&self, address: u64) -> Option<Unit> {
        let extent = self.extent_at(address)?;
        Some(extent.unit(extent.first_page + (address - extent.address) / PAGE))
    }

    /// Returns the unit that contains `page`.
    pub(crate) fn unit_of(&self, page: PageNumber) -> Option<Unit> {
        self.extent_of(page).map(|extent| extent.unit(page))
    }

    fn extent_at(&self, address: u64) -> Option<Extent> {
        let after = partition(self.len(), |i| self.extent(i).address <= address);
        let extent = after.checked_sub(1).map(|i| self.extent(i));
        extent.filter(|extent| address < extent.end())
    }

    fn extent_of(&self, page: PageNumber) -> Option<Extent> {
        let after = partition(self.len(), |i| self.by_page(i).first_page <= page);
        let extent = after.checked_sub(1).map(|i| self.by_page(i));
        extent.filter(|extent| extent.page_numbers().contains(&page))
    }

    /// Returns `page` and the pages that follow it at consecutive addresses.
    pub(crate) fn rest_from(&self, page: PageNumber) -> Option<Extent> {
        self.extent_of(page).map(|extent| {
            let index = page - extent.first_page;
            Extent {
                address: extent.address + index * PAGE,
                pages: extent.pages - index,
                first_page: page,
                large: extent.large,
            }
        })
    }

    /// Returns the pages in `range`, piece by piece.
    pub(crate) fn pages_in(
        self,
        range: Range<u64>,
    ) -> impl Iterator<Item = Range<PageNumber>> + 'a {
        let first = partition(self.len(), |i| self.extent(i).end() <= range.start);
        (first..self.len())
            .map(move |i| self.extent(i))
            .map_while(move |extent| extent.cut(&range))
            .map(|part| part.page_numbers())
    }

    /// Returns all extents, by address.
    pub(crate) fn extents(self) -> impl Iterator<Item = Extent> + 'a {
        (0..self.len()).map(move |i| self.extent(i))
    }

    /// Moves the addresses of `range` to `to`, as requested by the message in `slot` of the batch.
    /// The previous mapping at the target is gone.
    pub(crate) fn remap(
        &self,
        slot: usize,
        range: &Range<u64>,
        to: u64,
        gone: impl FnMut(Range<PageNumber>),
    ) -> Result<(), TooManyPieces> {
        let target = to..to.saturating_add(range.end - range.start);
        if !self.touches(range) && !self.touches(&target) {
            return Ok(());
        }
        let left = cut_out(self.extents(), &target, gone);
        let moved: Vec<Extent> = left
            .iter()
            .filter_map(|extent| extent.cut(range))
            .map(|part| Extent {
                address: to + (part.address - range.start),
                ..part
            })
            .collect();
        let mut next = cut_out(left.into_iter(), range, |_| ());
        next.extend(moved);
        self.publish(next, slot + 1)
    }

    fn touches(self, range: &Range<u64>) -> bool {
        self.extents().any(|extent| extent.cut(range).is_some())
    }

    /// Returns how many messages at the front of the batch were certainly handled. If the reader
    /// was killed, more may have been.
    pub(crate) fn handled(&self) -> usize {
        usize::try_from(self.version.load(Relaxed) & ((1 << HANDLED_BITS) - 1)).unwrap_or(0)
    }

    /// Resets the count of handled messages: the batch is over, and nobody will find its messages
    /// again.
    pub(crate) fn end_batch(&self) {
        let version = self.version.load(Relaxed);
        // Usually zero already, which saves a store to a cache line that every look-up reads.
        if self.handled() > 0 {
            let none = version >> HANDLED_BITS << HANDLED_BITS;
            self.version.store(none, Release);
        }
    }

    /// Makes `extents` the valid map, and records the first `handled` messages of the batch as
    /// handled.
    pub(crate) fn publish(
        &self,
        mut extents: Vec<Extent>,
        handled: usize,
    ) -> Result<(), TooManyPieces> {
        let mut copies = self.copies;
        if Self::words(extents.len()) > copies[0].len() {
            let more = Self::words(extents.len()).max(2 * copies[0].len());
            copies = self.growth.grow(more).ok_or(TooManyPieces)?;
        }
        let version = (self.version.load(Relaxed) >> HANDLED_BITS) + 1;
        let copy = copies[copy_of(version)];
        extents.sort_unstable_by_key(|extent| extent.address);
        let mut order: Vec<usize> = (0..extents.len()).collect();
        order.sort_unstable_by_key(|i| extents[*i].first_page);
        for ((words, extent), by_page) in copy.chunks_exact(EXTENT_WORDS).zip(&extents).zip(order) {
            words[0].store(extent.address, Relaxed);
            words[1].store(extent.pages, Relaxed);
            words[2].store(extent.first_page, Relaxed);
            words[3].store(by_page as u64, Relaxed);
            words[4].store(u64::from(extent.large), Relaxed);
        }
        self.counts[copy_of(version)].store(extents.len() as u64, Relaxed);
        fail_point(FailPoint::MapWritten);
        let word = version << HANDLED_BITS | handled as u64;
        self.version.store(word, Release);
        fail_point(FailPoint::MapPublished);
        Ok(())
    }

    fn valid(&self) -> usize {
        copy_of(self.version.load(Relaxed) >> HANDLED_BITS)
    }

    #[expect(clippy::cast_possible_truncation)] // The extents lie in memory.
    fn len(&self) -> usize {
        self.counts[self.valid()].load(Relaxed) as usize
    }

    fn extent(&self, i: usize) -> Extent {
        let words = &self.copies[self.valid()][i * EXTENT_WORDS..];
        Extent {
            address: words[0].load(Relaxed),
            pages: words[1].load(Relaxed),
            first_page: words[2].load(Relaxed),
            large: words[4].load(Relaxed) != 0,
        }
    }

    #[expect(clippy::cast_possible_truncation)] // An index into memory.
    fn by_page(&self, i: usize) -> Extent {
        let words = &self.copies[self.valid()][i * EXTENT_WORDS..];
        self.extent(words[3].load(Relaxed) as usize)
    }
}

/// Returns `extents` without `range`, and passes the pages that were in it to the callback.
fn cut_out(
    extents: impl Iterator<Item = Extent>,
    range: &Range<u64>,
    mut gone: impl FnMut(Range<PageNumber>),
) -> Vec<Extent> {
    let mut left = Vec::with_capacity(extents.size_hint().0 + 2);
    for extent in extents {
        left.extend(extent.cut(&(0..range.start)));
        left.extend(extent.cut(&(range.end..u64::MAX)));
        if let Some(part) = extent.cut(range) {
            gone(part.page_numbers());
        }
    }
    left
}

/// Returns the pages of the large page that contains `page`.
pub(crate) fn block_of(page: PageNumber) -> Range<PageNumber> {
    let start = page / LARGE_PAGES * LARGE_PAGES;
    start..start + LARGE_PAGES
}

/// Returns the index of the copy that is valid at a version; the two copies alternate.
fn copy_of(version: u64) -> usize {
    usize::from(version % 2 == 1)
}

/// Returns the first index of `0..len` for which `before` is false; it must be true for all earlier
/// ones.
fn partition(len: usize, before: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, len);
    while low < high {
        let middle = low + (high - low) / 2;
        if before(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::state::{State, Status};
    use std::collections::BTreeMap;

    const BASE: u64 = 0x1000_0000;

    fn at(index: u64) -> u64 {
        BASE + index * PAGE
    }

    /// Returns a map from each address to its page, one by one, as an oracle for the extents.
    fn naive(state: &State) -> BTreeMap<u64, u64> {
        let mapped = state.mapped().into_iter();
        let pages = mapped.flat_map(|extent| {
            (0..extent.pages).map(move |i| (extent.address + i * PAGE, extent.first_page + i))
        });
        let pages: BTreeMap<u64, u64> = pages.collect();
        for i in 0..4096 {
            let page = state.map().page_at(at(i));
            let is_mapped = |page: &u64| pages.get(&at(i)) == Some(page);
            let is_gone = |page: &u64| state.status(*page) == Status::Removed;
            assert!(
                page.is_none_or(|page| is_mapped(&page) || is_gone(&page)),
                "{i}: {page:?}"
            );
            assert!(page.is_some() || !pages.contains_key(&at(i)), "{i}");
        }
        pages
    }

    /// Applies an UNMAP message.
    fn unmap(state: &State, places: Range<u64>) {
        for pages in state.map().pages_in(at(places.start)..at(places.end)) {
            state.mark_unmapped(pages);
        }
    }

    #[test]
    fn changes_match_a_naive_map() {
        let extents =
            [(0, 64, 0), (100, 200, 512), (400, 64, 1024)].map(|(i, pages, first)| Extent {
                address: at(i),
                pages,
                first_page: first,
                large: false,
            });
        let state = State::new(2048, &extents, 200).unwrap().0;
        let mut expected = naive(&state);
        let mut seed = 7_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for round in 0..60 {
            let (from, len, to) = (random(600), 1 + random(40), 600 + random(3000));
            if round % 2 == 0 {
                unmap(&state, from..from + len);
                expected.retain(|address, _| !(at(from)..at(from + len)).contains(address));
            } else {
                state
                    .map()
                    .remap(0, &(at(from)..at(from + len)), at(to), |_| ())
                    .unwrap();
                for i in 0..len {
                    expected.remove(&at(to + i));
                }
                for i in 0..len {
                    if let Some(page) = expected.remove(&at(from + i)) {
                        expected.insert(at(to + i), page);
                    }
                }
            }
            assert_eq!(naive(&state), expected, "round {round}");
            for (address, page) in &expected {
                let rest = state.map().rest_from(*page).unwrap();
                assert_eq!((rest.address, rest.first_page), (*address, *page));
                let is_gone = |i: &u64| state.status(page + i) == Status::Removed;
                for i in (0..rest.pages).filter(|i| !is_gone(i)) {
                    assert_eq!(expected.get(&(address + i * PAGE)), Some(&(page + i)));
                }
            }
        }
    }

    /// A large page is looked up as a whole, by any of its addresses or pages.
    #[test]
    fn large_pages_are_returned_as_units() {
        let extent = |place, first_page, large| Extent {
            address: at(place),
            pages: 4 * LARGE_PAGES,
            first_page,
            large,
        };
        let extents = [extent(0, 512, true), extent(600 * LARGE_PAGES, 0, false)];
        let map = State::new(2048, &extents, 8).unwrap().0;
        let map = map.map();
        let second = Unit {
            address: at(LARGE_PAGES),
            pages: 512 + LARGE_PAGES..512 + 2 * LARGE_PAGES,
            large: true,
        };
        assert_eq!(second.len(), LARGE_PAGES * PAGE);
        for i in 0..LARGE_PAGES {
            assert_eq!(map.unit_at(at(LARGE_PAGES + i)), Some(second.clone()));
            assert_eq!(map.unit_of(512 + LARGE_PAGES + i), Some(second.clone()));
        }
        assert_eq!(map.unit_at(at(4 * LARGE_PAGES)), None);
        assert_eq!(map.unit_of(3).unwrap().pages, 3..4);
        // A moved large page is still one unit.
        let to = 900 * LARGE_PAGES;
        map.remap(0, &(at(0)..at(4 * LARGE_PAGES)), at(to), |_| ())
            .unwrap();
        let moved = map.unit_of(second.pages.start).unwrap();
        assert_eq!(moved.address, at(to + LARGE_PAGES));
        assert_eq!(moved.pages, second.pages);
    }

    fn ten_pages() -> Extent {
        Extent {
            address: at(0),
            pages: 10,
            first_page: 512,
            large: false,
        }
    }

    #[test]
    fn unmapped_pages_need_no_extra_piece() {
        let state = State::shared(1024, &[ten_pages()], 0).unwrap().0;
        for place in (1..10).step_by(2) {
            unmap(&state, place..place + 1);
        }
        let mapped = state.mapped();
        let mapped: Vec<_> = mapped
            .iter()
            .map(|part| (part.address, part.pages))
            .collect();
        assert_eq!(mapped, [0, 2, 4, 6, 8].map(|place| (at(place), 1)));
        assert_eq!(state.status(513), Status::Removed);
        assert_eq!(state.status(514), Status::Absent);
        assert_eq!(state.map().page_at(at(4)), Some(516));
    }

    /// A page that moves to an unmapped page's address is the only page there.
    #[test]
    fn move_reuses_addresses_of_unmapped_pages() {
        let state = State::new(1024, &[ten_pages()], 8).unwrap().0;
        unmap(&state, 2..4);
        let target = at(3);
        state
            .map()
            .remap(0, &(at(8)..at(9)), target, |_| ())
            .unwrap();
        assert_eq!(state.map().page_at(target), Some(520));
        assert_eq!(state.map().rest_from(520).unwrap().address, target);
        assert_eq!(state.map().rest_from(515), None);
        assert_eq!(naive(&state).get(&target), Some(&520));
    }

    #[test]
    fn too_many_moves_leave_shared_map_unchanged() {
        let state = State::shared(1024, &[ten_pages()], 2).unwrap().0;
        state
            .map()
            .remap(0, &(at(2)..at(3)), at(50), |_| ())
            .unwrap();
        let refused = state.map().remap(1, &(at(5)..at(6)), at(60), |_| ());
        assert_eq!(refused, Err(TooManyPieces));
        assert_eq!(state.map().page_at(at(5)), Some(517));
    }

    /// Pages that are moved one by one, in an order that leaves no two adjacent.
    #[test]
    fn moves_grow_a_map_that_is_not_shared() {
        const PAGES: u64 = 3000;
        let extent = Extent {
            pages: PAGES,
            first_page: 0,
            ..ten_pages()
        };
        let state = State::new(4096, &[extent], 4).unwrap().0;
        for page in 0..PAGES {
            let to = at(10_000 + 2 * (PAGES - page));
            state
                .map()
                .remap(0, &(at(page)..at(page + 1)), to, |_| ())
                .unwrap();
        }
        assert_eq!(state.map().extents().count(), 3000);
        for page in 0..PAGES {
            let to = at(10_000 + 2 * (PAGES - page));
            assert_eq!(state.map().page_at(to), Some(page));
            assert_eq!(state.map().rest_from(page).unwrap().address, to);
        }
    }

    #[test]
    fn change_records_its_message_until_batch_ends() {
        let extent = Extent {
            address: at(0),
            pages: 10,
            first_page: 0,
            large: false,
        };
        let state = State::new(64, &[extent], 8).unwrap().0;
        let map = state.map();
        assert_eq!(map.handled(), 0);
        map.remap(5, &(at(100)..at(101)), at(200), |_| ()).unwrap();
        assert_eq!(map.handled(), 0, "nothing of ours was there");
        map.remap(2, &(at(0)..at(2)), at(50), |_| ()).unwrap();
        assert_eq!(map.handled(), 3);
        map.remap(63, &(at(9)..at(10)), at(60), |_| ()).unwrap();
        assert_eq!(map.handled(), 64);
        let before: Vec<_> = map.extents().collect();
        map.end_batch();
        assert_eq!(map.handled(), 0);
        assert_eq!(map.extents().collect::<Vec<_>>(), before);
    }
}
