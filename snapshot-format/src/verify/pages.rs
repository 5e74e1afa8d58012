//! The index and the frames, window by window.

use std::collections::HashMap;

use rayon::prelude::*;

use super::frames::{FrameKey, Remembered, Seen, Slots, Wanted, Workers, key, look_at};
use super::{Check, Problem, VerifyError};
use crate::digest::{self, ContentHasher, Digest, UniformBlocks};
use crate::error::{Part, ReadError};
use crate::frame::FrameRef;
use crate::index::{IndexBlock, Page, Top};
use crate::layout::{PAGES_PER_BLOCK, PAGES_PER_BLOCK_U64, SectionKind};
use crate::store::Reason;

/// Number of blocks that are checked together: their page digests take 16 MiB, their index blocks
/// at most 20 MiB.
const BATCH_BLOCKS: u64 = 1024;
/// Frames between two calls of the progress callback.
const BATCH: usize = 64;

/// A window's index blocks; none for blocks without one, and for bad ones.
pub(super) struct Window {
    first: u64,
    blocks: Vec<Option<IndexBlock>>,
}

impl Window {
    /// Returns the content of a page, if this window knows it.
    pub(super) fn look_up(&self, page: u64) -> Option<Page> {
        let i = (page / PAGES_PER_BLOCK_U64).checked_sub(self.first)?;
        let block = self.blocks.get(usize::try_from(i).ok()?)?.as_ref()?;
        let page = usize::try_from(page % PAGES_PER_BLOCK_U64).ok()?;
        Some(block.page(page))
    }
}

/// A frame that some index block names.
struct Known {
    frame: FrameRef,
    /// Slots that pages use.
    used: Slots,
}

/// Digests of the blocks as they become known, and the root over them.
struct Digests {
    content: ContentHasher,
    uniform: UniformBlocks,
    /// Digests of a window's pages.
    pages: Vec<Digest>,
    /// Blocks of the window with a page whose content is not known.
    unknown: Vec<bool>,
    /// Frames whose page list doesn't name all their slots, with those that it names.
    partly_listed: Vec<(FrameKey, Slots)>,
    remembered: Remembered,
}

impl Check<'_> {
    pub(super) fn pages(&mut self) -> Result<(), VerifyError> {
        let blocks = self.snapshot.block_count();
        let workers = Workers::default();
        let mut frames = HashMap::new();
        let mut digests = Digests {
            content: ContentHasher::new(),
            uniform: UniformBlocks::default(),
            pages: Vec::new(),
            unknown: Vec::new(),
            partly_listed: Vec::new(),
            remembered: Remembered::default(),
        };
        let mut first = 0;
        while first < blocks {
            let count = BATCH_BLOCKS.min(blocks - first);
            let window = self.load_window(first, count);
            digests.unknown.clear();
            digests.unknown.resize(window.blocks.len(), false);
            digests
                .pages
                .resize(window.blocks.len() * PAGES_PER_BLOCK, Digest::default());
            let wanted = self.plan(&window, &mut frames, &mut digests);
            for batch in wanted.chunks(BATCH) {
                self.decode_batch(batch, &window, &workers, &mut digests);
                self.report_progress()?;
            }
            self.finish_window(&window, &mut digests);
            self.report_progress()?;
            first += count;
        }
        let mut own: Vec<&Known> = frames
            .values()
            .filter(|known| known.frame.layer() == 0)
            .collect();
        own.sort_by_key(|known| known.frame.offset());
        let mut used_slots = 0;
        for known in own {
            let frame = &known.frame;
            used_slots += known.used.len();
            self.counted.frames += 1;
            self.counted.stored_pages += u64::from(frame.slots());
            self.counted.stored_bytes += u64::from(frame.stored_len());
            self.extents
                .add(Part::Frame, frame.offset(), frame.stored_len().into());
        }
        for (key, listed) in &digests.partly_listed {
            let Some(Known { frame, used }) = frames.get(key) else {
                continue;
            };
            let mut slots = 0..frame.slots();
            if let Some(slot) = slots.find(|slot| used.contains(*slot) && !listed.contains(*slot)) {
                let detail = format!("no page is listed for slot {slot} of the frame");
                self.report.add("page list", frame.offset(), detail);
            }
        }
        // The first page of each slot is no duplicate.
        self.counted.duplicate_pages = self.own_pages.saturating_sub(used_slots);
        let regions = self.snapshot.regions();
        self.counted.content_digest = digests
            .content
            .finish(regions.iter().map(|r| (r.space, r.start, r.pages)));
        Ok(())
    }

    fn load_window(&mut self, first: u64, count: u64) -> Window {
        let snapshot = self.snapshot;
        let loaded: Vec<Option<Result<IndexBlock, ReadError>>> = self.pool.install(|| {
            (first..first + count)
                .into_par_iter()
                .map(|block| {
                    (snapshot.top(block) == Top::Block)
                        .then(|| snapshot.uncached_block(block, Reason::Verify))
                })
                .collect()
        });
        let mut blocks = Vec::with_capacity(loaded.len());
        for (block, loaded) in (first..).zip(loaded) {
            if let Some(index) = snapshot.block_ref(block).filter(|index| index.layer == 0) {
                self.counted.index_bytes += u64::from(index.stored_len);
                self.extents
                    .add(Part::IndexBlock, index.offset, index.stored_len.into());
            }
            blocks.push(loaded.and_then(|result| self.note(result)));
        }
        Window { first, blocks }
    }

    /// Counts the window's pages, enters the digests that need no frame, and lists the frames in
    /// the order of the file.
    fn plan(
        &mut self,
        window: &Window,
        frames: &mut HashMap<FrameKey, Known>,
        digests: &mut Digests,
    ) -> Vec<Wanted> {
        let mut wanted: HashMap<FrameKey, Wanted> = HashMap::new();
        for (number, block) in window.blocks.iter().enumerate() {
            let Some(block) = block else { continue };
            let place = self
                .snapshot
                .block_ref(window.first + number as u64)
                .map_or((0, 0), |index| (index.layer, index.offset));
            // Frames as numbered by this block: whether each agrees with other blocks.
            let known: Vec<bool> = block
                .frames()
                .iter()
                .map(|frame| {
                    let new = !frames.contains_key(&key(frame));
                    let first = frames.entry(key(frame)).or_insert_with(|| Known {
                        frame: *frame,
                        used: Slots::new(frame.slots()),
                    });
                    let first = first.frame;
                    wanted.entry(key(frame)).or_insert(Wanted {
                        frame: first,
                        new,
                        uses: Vec::new(),
                    });
                    first == *frame
                })
                .collect();
            if known.contains(&false) {
                let detail = "names a frame otherwise than another index block does";
                self.index_problem(place, detail);
            }
            self.unused(block, place);
            let fills: Vec<Digest> = block
                .fills()
                .iter()
                .map(|word| digest::fill(*word))
                .collect();
            for i in 0..block.page_count() {
                let at = number * PAGES_PER_BLOCK + i;
                self.counted.pages += 1;
                match block.page(i) {
                    Page::Fill(word) => {
                        let fill = block.fills().iter().position(|fill| *fill == word);
                        digests.pages[at] = fills[fill.unwrap_or(0)];
                        if word == 0 {
                            self.counted.zero_pages += 1;
                        } else {
                            self.counted.fill_pages += 1;
                        }
                        self.report.pages_checked += 1;
                    }
                    Page::Unavailable => {
                        digests.pages[at] = digest::unavailable();
                        self.counted.unavailable_pages += 1;
                        self.report.pages_checked += 1;
                    }
                    Page::Stored { frame, slot } => {
                        self.own_pages += u64::from(frame.layer() == 0);
                        let agrees = block.stored(i).is_some_and(|(frame, _)| known[frame]);
                        match wanted.get_mut(&key(&frame)).filter(|_| agrees) {
                            // A window has 2^19 pages.
                            Some(wanted) => wanted
                                .uses
                                .push((u32::try_from(at).unwrap_or(u32::MAX), slot)),
                            None => digests.unknown[number] = true,
                        }
                    }
                    Page::Unused => {}
                }
            }
        }
        let mut wanted: Vec<Wanted> = wanted.into_values().collect();
        for wanted in &wanted {
            if let Some(known) = frames.get_mut(&key(&wanted.frame)) {
                wanted
                    .uses
                    .iter()
                    .for_each(|(_, slot)| known.used.add(*slot));
            }
        }
        wanted.sort_by_key(|wanted| key(&wanted.frame));
        wanted
    }

    /// Checks that an index block names nothing twice and has no unused frames or words.
    fn unused(&mut self, block: &IndexBlock, place: (u16, u64)) {
        let mut used = vec![false; block.frames().len()];
        let mut used_words = vec![false; block.fills().len()];
        for i in 0..block.page_count() {
            if let Some((frame, _)) = block.stored(i) {
                used[frame] = true;
            }
            if let Some(word) = block.fill_number(i) {
                used_words[word] = true;
            }
        }
        if let Some(word) = used_words.iter().position(|used| !used) {
            let detail = format!("names fill word {word}, which no page of it uses");
            self.index_problem(place, detail);
        }
        if let Some(frame) = used.iter().position(|used| !used) {
            let detail = format!("names frame {frame}, which no page of it uses");
            self.index_problem(place, detail);
        }
        let mut offsets: Vec<FrameKey> = block.frames().iter().map(key).collect();
        offsets.sort_unstable();
        if offsets.windows(2).any(|pair| pair[0] == pair[1]) {
            self.index_problem(place, "names a frame twice");
        }
        let mut words = block.fills().to_vec();
        words.sort_unstable();
        if words.windows(2).any(|pair| pair[0] == pair[1]) {
            self.index_problem(place, "names a fill word twice");
        }
    }

    /// Reports a problem of the index block at this layer and offset.
    fn index_problem(&mut self, (layer, offset): (u16, u64), detail: impl Into<String>) {
        let file = self.snapshot.ancestor_name(layer);
        self.report.add_problem(Problem {
            file: file.map(ToOwned::to_owned),
            what: Part::IndexBlock.to_string(),
            offset,
            detail: detail.into(),
        });
    }

    fn decode_batch(
        &mut self,
        batch: &[Wanted],
        window: &Window,
        workers: &Workers,
        digests: &mut Digests,
    ) {
        let snapshot = self.snapshot;
        let remembered = &digests.remembered;
        let seen: Vec<Seen> = self.pool.install(|| {
            batch
                .par_iter()
                .map(|wanted| {
                    if let Some(seen) = remembered.get(wanted) {
                        return seen;
                    }
                    workers.with(|decoder, out| look_at(snapshot, window, wanted, decoder, out))
                })
                .collect()
        });
        for (wanted, seen) in batch.iter().zip(seen) {
            self.report.frames_checked += u64::from(wanted.new);
            for problem in seen.problems {
                self.report.add_problem(problem);
            }
            if let Some(listed) = seen.listed {
                digests.partly_listed.push((key(&wanted.frame), listed));
            }
            self.report.more_problems += seen.more;
            if let Some(failed) = seen.failed {
                self.failed.get_or_insert(failed);
            }
            if seen.digests.is_none() {
                self.complete = false;
            }
            for (place, slot) in &wanted.uses {
                let place = *place as usize;
                match &seen.digests {
                    Some(slots) => {
                        digests.pages[place] = slots[usize::from(*slot)];
                        self.report.pages_checked += 1;
                    }
                    None => digests.unknown[place / PAGES_PER_BLOCK] = true,
                }
            }
            digests.remembered.keep(wanted, seen.digests);
        }
    }

    /// Computes the digests of the window's blocks, and compares them with those in the file.
    fn finish_window(&mut self, window: &Window, digests: &mut Digests) {
        let recorded = self.recorded_digests(window);
        for (number, index) in window.blocks.iter().enumerate() {
            let block = window.first + number as u64;
            let digest = match (self.snapshot.top(block), index) {
                (Top::Block, Some(index)) if !digests.unknown[number] => {
                    let from = number * PAGES_PER_BLOCK;
                    digest::block(&digests.pages[from..from + index.page_count()])
                }
                // Its problem is in the report, and the root can no longer be computed.
                (Top::Block, _) => {
                    self.complete = false;
                    continue;
                }
                (top, _) => self.alike(block, top, &mut digests.uniform),
            };
            digests.content.block(&digest);
            self.pages_done += index.as_ref().map_or(0, |index| index.page_count() as u64);
            let differs = recorded.get(number).filter(|recorded| **recorded != digest);
            if differs.is_some() {
                let directory = &self.snapshot.own().ends().directory;
                let section = directory.get(SectionKind::BlockDigests);
                let at = section.map_or(0, |section| section.offset) + 32 * block;
                let detail = format!("block {block} has another digest than is recorded");
                self.report.add("digest", at, detail);
            }
        }
    }

    /// Counts a block without an index block, and returns its digest.
    fn alike(&mut self, block: u64, top: Top, uniform: &mut UniformBlocks) -> Digest {
        let pages = self
            .snapshot
            .uncached_block(block, Reason::Verify)
            .map_or(0, |index| index.page_count());
        let count = pages as u64;
        self.counted.pages += count;
        self.report.pages_checked += count;
        self.pages_done += count;
        let page = match top {
            Top::Fill(word) => {
                if word == 0 {
                    self.counted.zero_pages += count;
                } else {
                    self.counted.fill_pages += count;
                }
                digest::fill(word)
            }
            Top::Block | Top::Unavailable => {
                self.counted.unavailable_pages += count;
                digest::unavailable()
            }
        };
        uniform.digest(page, pages)
    }

    /// Returns the digests that the file records for the window's blocks; empty if it has no
    /// section of them.
    fn recorded_digests(&mut self, window: &Window) -> Vec<Digest> {
        let snapshot = self.snapshot;
        let directory = &snapshot.own().ends().directory;
        let Some(section) = directory.get(SectionKind::BlockDigests) else {
            return Vec::new();
        };
        if section.count != snapshot.block_count() {
            if window.first == 0 {
                let detail = format!(
                    "there are {} digests for {} blocks",
                    section.count,
                    snapshot.block_count()
                );
                let part = Part::Section(SectionKind::BlockDigests);
                self.report.add(part, section.offset, detail);
            }
            return Vec::new();
        }
        let mut digests = vec![Digest::default(); window.blocks.len()];
        let read = snapshot.own().read(
            Part::Section(SectionKind::BlockDigests),
            digests.as_flattened_mut(),
            section.offset + 32 * window.first,
            Reason::Verify,
        );
        // An unreadable section has already been found, and reported, when its checksum was
        // checked.
        if read.is_err() { Vec::new() } else { digests }
    }
}
