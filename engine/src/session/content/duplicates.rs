//! Pages that repeat the content of a frame without being listed by the frame.
//!
//! A frame is written once, and lists the pages that were known by then. Only the index knows of
//! later pages that repeat one of its slots. Without a note of them, each such page makes the whole
//! frame be decoded again: in a real guest this is a third of all decoding when the pages are
//! touched in random order.
//!
//! An index block is noted when one of its stored pages is first looked up; before a complete
//! prefetch, all blocks are. The notes come from index blocks with valid checksums, so they need no
//! further confirmation. Nothing is allocated after the start: when the table is full, each page
//! that is not in it costs a decode.
//!
//! A page of a working set is loaded with its own frame, which lists it, so it is not noted. Its
//! frame lies at the front of the file: by the order of the frames, each such page would look like
//! a repetition.
//!
//! The page list of an ancestor's frame has the page numbers of another file. The pages beside the
//! wanted one, in its index block, come from that block instead, so only those of other blocks are
//! noted: pages that repeat an older frame, and those at the ends of a block, whose frame may have
//! pages in the next or the previous block.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use snapshot_format::layout::PAGES_PER_BLOCK_U64;
use snapshot_format::{FrameRef, IndexBlock};

use crate::session::platform::{PageNumber, Run};

/// Maximum number of runs that are noted; they take 1.5 MiB.
const MAX_RUNS: usize = 1 << 15;
/// Number of chains in the table.
const CHAINS: usize = 1 << 12;
/// Marks the end of a chain.
const END: u32 = u32::MAX;

/// The notes of one session.
pub(crate) struct Duplicates {
    /// One bit per index block, set once the block was noted.
    seen: Box<[AtomicU64]>,
    /// The pages that are not noted, as disjoint ranges in order, once they are known.
    left_out: OnceLock<Box<[Range<PageNumber>]>>,
    table: Mutex<Table>,
}

/// A table of runs by frame: chains through one list.
struct Table {
    chains: Box<[u32]>,
    noted: Vec<Noted>,
    /// The block after the one noted last, and the newest frame up to there, for each layer. A
    /// block that is noted out of order yields only runs that are older than its own newest frame.
    next_block: u64,
    newest: Box<[u64]>,
}

struct Noted {
    frame: FrameRef,
    run: Run,
    next: u32,
}

impl Table {
    fn push(&mut self, frame: &FrameRef, run: Run) {
        if self.noted.len() == MAX_RUNS {
            return;
        }
        // An index below MAX_RUNS fits.
        let here = u32::try_from(self.noted.len()).unwrap_or(END);
        let next = std::mem::replace(&mut self.chains[chain(frame)], here);
        self.noted.push(Noted {
            frame: *frame,
            run,
            next,
        });
    }
}

impl Duplicates {
    /// Creates notes for a snapshot of `blocks` index blocks, in `layers` files.
    pub(crate) fn new(blocks: u64, layers: usize) -> Self {
        Self {
            seen: (0..blocks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            left_out: OnceLock::new(),
            table: Mutex::new(Table {
                chains: vec![END; CHAINS].into(),
                noted: Vec::with_capacity(MAX_RUNS),
                next_block: 0,
                newest: vec![0; layers].into(),
            }),
        }
    }

    /// Leaves `pages` out of the notes from now on. Only the first call has an effect.
    pub(crate) fn leave_out(&self, pages: &[Range<PageNumber>]) {
        self.left_out.get_or_init(|| {
            let mut pages = pages.to_vec();
            pages.sort_unstable_by_key(|range| range.start);
            // Working sets may overlap.
            pages.dedup_by(|next, range| {
                let overlaps = next.start <= range.end;
                if overlaps {
                    range.end = range.end.max(next.end);
                }
                overlaps
            });
            pages.into()
        });
    }

    /// Returns whether this is the first look at `block`, and marks it as seen. If so, the caller
    /// must [note](Self::note) it.
    pub(crate) fn first_look(&self, block: u64) -> bool {
        let bit = 1 << (block % 64);
        usize::try_from(block / 64)
            .ok()
            .and_then(|word| self.seen.get(word))
            .is_some_and(|word| {
                word.load(Relaxed) & bit == 0 && word.fetch_or(bit, Relaxed) & bit == 0
            })
    }

    /// Returns whether the table is full.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().noted.len() == MAX_RUNS
    }

    /// Notes the pages of index block `number` whose frame was written before the frames of the
    /// pages in front of them, and those at its ends that lie in frames of ancestors.
    pub(crate) fn note(&self, number: u64, block: &IndexBlock) {
        let mut table = self.lock();
        let first = number * PAGES_PER_BLOCK_U64;
        let left_out = self.left_out.get().map_or(&[][..], |ranges| ranges);
        let mut left_out = &left_out[left_out.partition_point(|range| range.end <= first)..];
        let mut newest = std::mem::take(&mut table.newest);
        if number != table.next_block {
            newest.fill(0);
        }
        let frame_of = |i: usize| block.stored(i).map(|(frame, _)| frame);
        let pages = 0..block.page_count();
        let ends = [
            pages.clone().find_map(frame_of),
            pages.clone().rev().find_map(frame_of),
        ];
        let mut open: Option<(usize, Run)> = None;
        for (page, i) in (first..).zip(pages) {
            let stored = block.stored(i);
            if let (Some((frame, slot)), Some((open_frame, run))) = (stored, &mut open)
                && frame == *open_frame
                && slot == run.slot + run.count
                && page == run.page + u64::from(run.count)
            {
                run.count += 1;
                continue;
            }
            if let Some((frame, run)) = open.take() {
                table.push(&block.frames()[frame], run);
            }
            let Some((frame, slot)) = stored else {
                continue;
            };
            let frame_ref = &block.frames()[frame];
            let offset = frame_ref.offset();
            let layer = usize::from(frame_ref.layer());
            let is_older = newest.get_mut(layer).is_some_and(|newest| {
                *newest = (*newest).max(offset);
                offset < *newest
            });
            while left_out.first().is_some_and(|range| range.end <= page) {
                left_out = &left_out[1..];
            }
            if left_out.first().is_some_and(|range| range.start <= page) {
                continue;
            }
            if is_older || layer != 0 && ends.contains(&Some(frame)) {
                let count = 1;
                open = Some((frame, Run { page, slot, count }));
            }
        }
        if let Some((frame, run)) = open {
            table.push(&block.frames()[frame], run);
        }
        (table.next_block, table.newest) = (number + 1, newest);
    }

    /// Moves noted runs of `frame` to `runs`, as far as it has room, until they have `most` pages.
    /// Each run is returned once: if it can't be installed now, its pages cost a decode later.
    pub(crate) fn take(&self, frame: &FrameRef, most: usize, runs: &mut Vec<Run>) {
        let mut table = self.lock();
        let table = &mut *table;
        let mut pages = 0;
        // The place of the next note's index: the head of the chain, or the previous note.
        let mut link = &mut table.chains[chain(frame)];
        let mut rest = table.noted.as_mut_slice();
        while pages < most && runs.len() < runs.capacity() && *link != END {
            // A note points to an older one, thus to a smaller index.
            let (older, from) = rest.split_at_mut(*link as usize);
            let noted = &mut from[0];
            rest = older;
            if noted.frame == *frame {
                runs.push(noted.run);
                pages += usize::from(noted.run.count);
                *link = noted.next;
            } else {
                link = &mut noted.next;
            }
        }
    }

    /// Locks the table. It is consistent after every statement, so a panic elsewhere leaves nothing
    /// to repair.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the chain of a frame. Frames lie some kilobytes apart.
fn chain(frame: &FrameRef) -> usize {
    let hash = frame.offset().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    usize::try_from(hash).unwrap_or(0) % CHAINS
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use snapshot_format::{
        Ancestor, Ancestors, Layer, MemoryStore, OpenError, Page, Reason, RegionSpec, Snapshot,
        SnapshotOptions, Writer, WriterOptions,
    };

    use super::*;

    /// Returns a snapshot in which blocks 0 and 1 are new, in frames of 8 pages; block 2 repeats
    /// block 0 from its page 4 on, and block 3 repeats block 0 page by page in reverse.
    fn snapshot() -> Snapshot {
        let page = |n: u64| {
            let mut page = vec![0; 4096];
            page[..8].copy_from_slice(&(n + 1).to_le_bytes());
            page
        };
        let new = (0..1024).collect::<Vec<u64>>();
        let shifted = (0..512).map(|n| (n + 4) % 512);
        let reversed = (0..512).rev();
        let options = WriterOptions {
            frame_pages: 8,
            ..WriterOptions::default()
        };
        let mut writer = Writer::new(Vec::new(), options).unwrap();
        writer.begin_region(&RegionSpec::default()).unwrap();
        for n in new.into_iter().chain(shifted).chain(reversed) {
            writer.write_pages(&page(n)).unwrap();
        }
        let (bytes, _) = writer.finish().unwrap();
        Snapshot::open(Arc::new(MemoryStore::new(bytes))).unwrap()
    }

    /// Returns the frame of `page`.
    fn frame(snapshot: &Snapshot, page: u64) -> FrameRef {
        match snapshot.look_up(page, Reason::Demand).unwrap() {
            Page::Stored { frame, .. } => frame,
            other => panic!("{other:?}"),
        }
    }

    fn noted(snapshot: &Snapshot, blocks: impl IntoIterator<Item = u64>) -> Duplicates {
        let notes = Duplicates::new(snapshot.block_count(), 1 + snapshot.ancestors().len());
        for block in blocks {
            assert!(notes.first_look(block));
            assert!(!notes.first_look(block));
            notes.note(block, &snapshot.index_block(block, Reason::Demand).unwrap());
        }
        notes
    }

    fn taken(notes: &Duplicates, frame: &FrameRef, most: usize) -> Vec<Run> {
        let mut runs = Vec::with_capacity(100);
        notes.take(frame, most, &mut runs);
        runs
    }

    #[test]
    fn pages_that_are_left_out_are_not_noted() {
        let snapshot = snapshot();
        let all: usize = noted_pages(&noted(&snapshot, 0..4)).len();
        assert_eq!(all, 1024);
        let notes = Duplicates::new(snapshot.block_count(), 1);
        // The ranges overlap, and are in no order. The last one ends in the middle of block 3.
        notes.leave_out(&[1600..1700, 1024..1030, 1020..1025, 1650..1660, 1690..1801]);
        for block in 0..4 {
            notes.note(block, &snapshot.index_block(block, Reason::Demand).unwrap());
        }
        let expected: Vec<u64> = (1030..1600).chain(1801..2048).collect();
        assert_eq!(noted_pages(&notes), expected);
    }

    fn noted_pages(notes: &Duplicates) -> Vec<u64> {
        let table = notes.lock();
        let runs = table.noted.iter().map(|noted| noted.run.pages());
        let mut pages: Vec<u64> = runs.flatten().collect();
        pages.sort_unstable();
        pages
    }

    #[test]
    fn duplicates_are_noted_and_returned_once() {
        let snapshot = snapshot();
        let notes = noted(&snapshot, 0..4);
        for number in 0..64 {
            let frame = frame(&snapshot, number * 8);
            let mut pages = Vec::new();
            // Ten pages need two calls, because a call ends when it has enough.
            for most in [3, usize::MAX] {
                let runs = taken(&notes, &frame, most);
                assert!(!runs.is_empty());
                for run in runs {
                    for (page, slot) in run.pages().zip(run.slot..) {
                        let said = snapshot.look_up(page, Reason::Demand).unwrap();
                        assert_eq!(said, Page::Stored { frame, slot });
                        pages.push(page);
                    }
                }
            }
            pages.sort_unstable();
            pages.dedup();
            assert_eq!(pages.len(), 16, "frame {number}: {pages:?}");
            assert!(pages.iter().all(|page| *page >= 1024));
            assert!(taken(&notes, &frame, usize::MAX).is_empty());
        }
        for number in 64..128 {
            let frame = frame(&snapshot, number * 8);
            assert!(taken(&notes, &frame, usize::MAX).is_empty());
        }
    }

    #[test]
    fn block_out_of_order_finds_older_frames() {
        let snapshot = snapshot();
        let notes = noted(&snapshot, [3, 0]);
        // Its first frame is the newest of block 0.
        assert!(taken(&notes, &frame(&snapshot, 504), usize::MAX).is_empty());
        assert_eq!(taken(&notes, &frame(&snapshot, 0), usize::MAX).len(), 8);
    }

    /// A resolver that knows one layer.
    #[derive(Debug)]
    struct Given(Arc<Layer>);

    impl Ancestors for Given {
        fn find(&self, _: &Ancestor, _: Option<&Path>) -> Result<Option<Arc<Layer>>, OpenError> {
            Ok(Some(Arc::clone(&self.0)))
        }
    }

    /// The pages beside a wanted one come from its index block. Noting them as well would fill the
    /// table with a few gigabytes.
    #[test]
    fn ancestors_frames_are_noted_at_ends_of_blocks_only() {
        let write = |base: Option<Arc<Snapshot>>, first: u64| {
            let options = WriterOptions {
                frame_pages: 24,
                base: base.clone(),
                ..WriterOptions::default()
            };
            let mut writer = Writer::new(Vec::new(), options).unwrap();
            let region = RegionSpec {
                base_page: base.is_some().then_some(0),
                ..RegionSpec::default()
            };
            writer.begin_region(&region).unwrap();
            for n in [first].into_iter().chain(1..1536) {
                let mut page = vec![0; 4096];
                page[..8].copy_from_slice(&(n + 1).to_le_bytes());
                writer.write_pages(&page).unwrap();
            }
            Arc::new(MemoryStore::new(writer.finish().unwrap().0))
        };
        let base = Arc::new(Snapshot::open(write(None, 0)).unwrap());
        let child = write(Some(Arc::clone(&base)), 1 << 40);
        let layer = Arc::clone(base.layer(0).unwrap());
        let options = SnapshotOptions::default().ancestors(Arc::new(Given(layer)));
        let child = Snapshot::open_with(child, &options).unwrap();

        let notes = noted(&child, 0..3);
        let pages = |page: u64| {
            let frame = frame(&child, page);
            assert_eq!(frame.layer(), 1);
            let runs = taken(&notes, &frame, usize::MAX);
            let mut pages: Vec<_> = runs.iter().flat_map(Run::pages).collect();
            pages.sort_unstable();
            pages
        };
        assert_eq!(
            frame(&child, 511),
            frame(&child, 512),
            "one frame in two blocks"
        );
        let across = pages(511);
        assert!(across.contains(&511) && across.contains(&512), "{across:?}");
        assert!(pages(1000).is_empty() && pages(100).is_empty());
    }

    #[test]
    fn full_table_accepts_no_more_entries() {
        let snapshot = snapshot();
        let notes = Duplicates::new(4, 1);
        let block = snapshot.index_block(3, Reason::Demand).unwrap();
        while !notes.is_full() {
            notes.note(3, &block);
        }
        notes.note(3, &block);
        assert!(notes.is_full());
        let mut none = Vec::new();
        notes.take(&frame(&snapshot, 0), usize::MAX, &mut none);
        assert!(none.is_empty(), "there is no room in what was given");
    }
}
