//! Pages that repeat what a frame holds, and that the frame doesn't list.
//!
//! A frame is written once, and lists the pages that were known by then. What repeats one of its
//! slots further on in the memory is known to the index alone. Without a note of it each such page
//! has the whole frame decoded again: in a real guest a third of all that is decoded when its pages
//! are touched in random order.
//!
//! A block of the index is noted when a page of it is first looked up, and all of them when
//! everything is to be prefetched. The notes come from index blocks whose checksums were right, so
//! they need no further confirmation. Nothing is allocated after the start: when the table is full,
//! the pages that it doesn't have cost a decode.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use snapshot_format::layout::PAGES_PER_BLOCK_U64;
use snapshot_format::{FrameRef, IndexBlock};

use super::platform::Run;

/// Most runs that are noted: 1.5 MiB of them.
const MOST_RUNS: usize = 1 << 15;
/// Chains of the table.
const CHAINS: usize = 1 << 12;
/// The end of a chain.
const END: u32 = u32::MAX;

/// The notes of one session.
pub(crate) struct Duplicates {
    /// One bit for each block of the index that was noted.
    seen: Box<[AtomicU64]>,
    table: Mutex<Table>,
}

/// Runs by frame: chains through one list.
struct Table {
    chains: Box<[u32]>,
    noted: Vec<Noted>,
}

struct Noted {
    frame: FrameRef,
    run: Run,
    next: u32,
}

impl Duplicates {
    /// Room for a snapshot of `blocks` index blocks.
    pub(crate) fn new(blocks: u64) -> Self {
        Self {
            seen: (0..blocks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            table: Mutex::new(Table {
                chains: vec![END; CHAINS].into(),
                noted: Vec::with_capacity(MOST_RUNS),
            }),
        }
    }

    /// Whether `block` was noted; who learns that it wasn't has to [note](Self::note) it.
    pub(crate) fn first_look(&self, block: u64) -> bool {
        let bit = 1 << (block % 64);
        usize::try_from(block / 64)
            .ok()
            .and_then(|word| self.seen.get(word))
            .is_some_and(|word| {
                word.load(Relaxed) & bit == 0 && word.fetch_or(bit, Relaxed) & bit == 0
            })
    }

    /// Whether there is no more room.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().noted.len() == MOST_RUNS
    }

    /// Notes the pages of index block `number` whose frame was written before those of the pages in
    /// front of them.
    pub(crate) fn note(&self, number: u64, block: &IndexBlock) {
        let first = number * PAGES_PER_BLOCK_U64;
        let mut newest = 0;
        let mut open: Option<(usize, Run)> = None;
        for (page, i) in (first..).zip(0..block.page_count()) {
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
                self.push(&block.frames()[frame], run);
            }
            let Some((frame, slot)) = stored else {
                continue;
            };
            let offset = block.frames()[frame].offset();
            newest = newest.max(offset);
            if offset < newest {
                let count = 1;
                open = Some((frame, Run { page, slot, count }));
            }
        }
        if let Some((frame, run)) = open {
            self.push(&block.frames()[frame], run);
        }
    }

    fn push(&self, frame: &FrameRef, run: Run) {
        let mut table = self.lock();
        if table.noted.len() == MOST_RUNS {
            return;
        }
        let chain = chain(frame);
        // MOST_RUNS fits.
        let here = u32::try_from(table.noted.len()).unwrap_or(END);
        let next = std::mem::replace(&mut table.chains[chain], here);
        table.noted.push(Noted {
            frame: *frame,
            run,
            next,
        });
    }

    /// Appends the runs noted of `frame`, as far as `runs` has room, until they have `most` pages.
    pub(crate) fn append(&self, frame: &FrameRef, most: usize, runs: &mut Vec<Run>) {
        let table = self.lock();
        let mut pages = 0;
        let mut next = table.chains[chain(frame)];
        while let Some(noted) = table.noted.get(next as usize) {
            if pages >= most || runs.len() == runs.capacity() {
                return;
            }
            if noted.frame == *frame {
                runs.push(noted.run);
                pages += usize::from(noted.run.count);
            }
            next = noted.next;
        }
    }

    /// The table is whole after every statement, so a panic elsewhere leaves nothing to repair.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The chain of a frame. Frames lie some kilobytes apart.
fn chain(frame: &FrameRef) -> usize {
    let hash = frame.offset().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    usize::try_from(hash).unwrap_or(0) % CHAINS
}
