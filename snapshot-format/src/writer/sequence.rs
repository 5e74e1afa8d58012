//! The stage that processes blocks in page order: finds pages that repeat earlier ones, fills
//! frames, and writes frames and index blocks.
//!
//! The *open* frame takes new pages. A *sealed* frame takes no more: the pool compresses it. A
//! *draft* is an index block that waits until the frames that it names are written.
//!
//! ```text
//! for each page of the next examined block:
//!     fill         -> word of the index block; zero pages also extend the fill runs
//!     known        -> its frame and slot; if that frame is still open, it lists the page
//!     new          -> next slot of the open frame; full -> sealed -> handed to the pool
//! the block's draft waits until all frames up to its newest are written
//! for each frame that comes back, in order: write it; write the drafts that waited for it
//! ```
//!
//! A draft is written after the last frame that it or a draft before it needs, so the file does not
//! depend on the speed of threads. The amount of waiting data is bounded by the frames in progress,
//! and by sealing the open frame early when [`MAX_DRAFTS_ON_OPEN`] drafts wait for it.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;

use super::WriteError;
use super::base::{AncestorPages, BasePage, UsedLayers};
use super::block::{Alike, BlockBuffer, Examined, Seen};
use super::copy::CopiedFrame;
use super::dedup::{DedupTable, Location};
use super::frame::{FrameRefs, OpenFrame, Sealed};
use super::index::{Draft, IndexEncoder};
use super::output::Output;
use super::runs::ZeroRuns;
use super::training::{Step, Training};
use super::workers::{Verdict, Workers};
use crate::digest::{self, Digest, UniformBlocks};
use crate::layout::{
    PAGE_SIZE_U64, PAGES_PER_BLOCK, PAGES_PER_BLOCK_U64, RawFrameRef, RawTopEntry, top_kind,
};
use crate::types::Summary;

/// Maximum number of drafts that wait for the open frame: 128 MiB of the source.
const MAX_DRAFTS_ON_OPEN: usize = 64;
/// Number of the newest frames whose pages later pages can share: 24 MiB of references. If the
/// table of known pages is larger, its size is used instead.
const RECENT_FRAMES: u64 = 1 << 20;

pub(super) struct Stage<W> {
    pub(super) out: Output<W>,
    pub(super) workers: Workers,
    frame_pages: usize,
    dedup: DedupTable,
    open: OpenFrame,
    /// Number of the open frame, which is the number of sealed frames.
    sealed: u64,
    refs: FrameRefs,
    drafts: VecDeque<Draft>,
    /// Number of drafts that arrived since the open frame got its first page.
    drafts_on_open: usize,
    index: IndexEncoder,
    /// Index blocks that are written together at the end, if they are.
    at_end: Option<IndexAtEnd>,
    training: Option<Training>,
    /// The dictionaries of the file, by their numbers from 1 on. New frames use the first.
    pub(super) dictionaries: Vec<Vec<u8>>,
    /// References of the copied frames that are written.
    copied: Vec<RawFrameRef>,
    /// Number of copied frames so far.
    copies: usize,
    /// Number of pages in copied frames.
    copied_pages: u64,
    copied_slots_in_use: u64,
    /// Number of slots in copied frames that no page uses.
    pub(super) dead_slots: u64,
    /// Number of pages that lie in files of ancestors.
    pub(super) ancestor_pages: u64,
    /// Ancestors that are referred to.
    pub(super) layers: UsedLayers,
    /// Pages of ancestors that were met so far.
    ancestor_content: AncestorPages,
    pub(super) top: Vec<RawTopEntry>,
    pub(super) digests: Vec<Digest>,
    uniform: UniformBlocks,
    pub(super) runs: ZeroRuns,
    /// The counts; the digest is added at the end.
    pub(super) summary: Summary,
}

/// Encoded index blocks that are not written yet.
#[derive(Default)]
struct IndexAtEnd {
    bytes: Vec<u8>,
    /// The blocks; their entries of the top table have offsets in `bytes`.
    blocks: Vec<usize>,
}

impl<W: Write> Stage<W> {
    pub(super) fn new(
        out: Output<W>,
        workers: Workers,
        frame_pages: usize,
        exact_distinct_pages: usize,
        training: Option<Training>,
    ) -> Self {
        Self {
            out,
            workers,
            frame_pages,
            dedup: DedupTable::new(exact_distinct_pages),
            open: OpenFrame::default(),
            sealed: 0,
            refs: FrameRefs::new(RECENT_FRAMES.max(exact_distinct_pages as u64)),
            drafts: VecDeque::new(),
            drafts_on_open: 0,
            index: IndexEncoder::new(),
            at_end: None,
            training,
            dictionaries: Vec::new(),
            copied: Vec::new(),
            copies: 0,
            copied_pages: 0,
            copied_slots_in_use: 0,
            dead_slots: 0,
            ancestor_pages: 0,
            layers: UsedLayers::default(),
            ancestor_content: AncestorPages::default(),
            top: Vec::new(),
            digests: Vec::new(),
            uniform: UniformBlocks::default(),
            runs: ZeroRuns::default(),
            summary: Summary {
                frame_bytes: frame_pages as u64 * PAGE_SIZE_U64,
                ..Summary::default()
            },
        }
    }

    /// Processes the next `blocks` blocks, all of whose pages (`pages` in all) are alike.
    pub(super) fn push_uniform(&mut self, region: usize, alike: Alike, blocks: usize, pages: u64) {
        let (kind, word, page) = match alike {
            Alike::Fill(word) => (top_kind::FILL, word, digest::fill(word)),
            Alike::Unavailable => (top_kind::UNAVAILABLE, 0, digest::unavailable()),
        };
        let entry = RawTopEntry {
            kind,
            word_or_offset: word.into(),
            ..empty_entry()
        };
        let first_page = self.top.len() as u64 * PAGES_PER_BLOCK_U64;
        self.count(region, Seen::Alike(alike), first_page, pages);
        let in_last = pages - (blocks as u64 - 1) * PAGES_PER_BLOCK_U64;
        let in_last = usize::try_from(in_last).expect("at most 512 pages in a block");
        self.top.resize(self.top.len() + blocks, entry);
        if blocks > 1 {
            let digest = self.uniform.digest(page, PAGES_PER_BLOCK);
            self.digests.resize(self.digests.len() + blocks - 1, digest);
        }
        self.digests.push(self.uniform.digest(page, in_last));
    }

    fn count(&mut self, region: usize, seen: Seen, first_page: u64, pages: u64) {
        self.summary.pages += pages;
        match seen {
            Seen::Alike(Alike::Fill(0)) => {
                self.summary.zero_pages += pages;
                self.runs.push(region, first_page, pages);
            }
            Seen::Alike(Alike::Fill(_)) => self.summary.fill_pages += pages,
            Seen::Alike(Alike::Unavailable) => self.summary.unavailable_pages += pages,
            Seen::Base(_) => self.ancestor_pages += pages,
            Seen::Copied(..) => self.copied_pages += pages,
            Seen::Data(_) => {}
        }
    }

    /// Processes the next block.
    pub(super) fn push_block(
        &mut self,
        region: usize,
        examined: Examined,
        buffer: Option<Arc<BlockBuffer>>,
    ) -> Result<(), WriteError> {
        let buffer = examined.buffer.clone().or(buffer);
        if let Some(alike) = examined.uniform() {
            self.push_uniform(region, alike, 1, examined.pages.len() as u64);
            return Ok(());
        }
        let first_page = self.top.len() as u64 * PAGES_PER_BLOCK_U64;
        if let Some(kept) = &examined.kept {
            for (&seen, page) in examined.pages.iter().zip(first_page..) {
                self.count(region, seen, page, 1);
            }
            let entry = self.layers.top_entry(kept)?;
            self.top.push(entry);
            self.digests.push(examined.digest);
            return Ok(());
        }
        self.push_copies(examined.copies)?;
        let needs = self.drafts.back().map_or(0, |draft| draft.needs);
        let mut draft = Draft::new(self.top.len(), first_page, needs, self.copies);
        let oldest = self.refs.oldest_shared(self.sealed);
        self.ancestor_content.note(&examined.base_frames);
        for (index, (&seen, page)) in (0u16..).zip(examined.pages.iter().zip(first_page..)) {
            self.count(region, seen, page, 1);
            match seen {
                Seen::Alike(Alike::Fill(word)) => draft.push_fill(word),
                Seen::Alike(Alike::Unavailable) => draft.push_unavailable(),
                Seen::Base(BasePage { frame, slot }) => {
                    let layer = self.layers.number(frame.layer())?;
                    draft.push_ancestor(frame.to_raw(layer), slot);
                }
                Seen::Copied(frame, slot) => draft.push_copied(frame, slot),
                Seen::Data(key) => {
                    if let Some(BasePage { frame, slot }) = self.ancestor_content.find(key) {
                        self.ancestor_pages += 1;
                        let layer = self.layers.number(frame.layer())?;
                        draft.push_ancestor(frame.to_raw(layer), slot);
                        continue;
                    }
                    let (frame, slot) = match self.dedup.find(key, oldest) {
                        Ok(Location { frame, slot }) => {
                            self.summary.duplicate_pages += 1;
                            let frame = u64::from(frame);
                            if frame == self.sealed {
                                self.open.list(page, slot);
                            }
                            (frame, slot)
                        }
                        Err(place) => {
                            self.summary.stored_pages += 1;
                            if !self.open.reaches(page) {
                                self.seal(buffer.as_ref())?;
                            }
                            let slot = self.open.add(page, index);
                            // Beyond 2^32 frames nothing is shared any more.
                            if let Ok(frame) = u32::try_from(self.sealed) {
                                self.dedup.insert(place, key, Location { frame, slot });
                            }
                            (self.sealed, slot)
                        }
                    };
                    draft.push_stored(frame, slot);
                    if self.open.slots() == self.frame_pages {
                        self.seal(buffer.as_ref())?;
                    }
                }
            }
        }
        if let Some(buffer) = buffer {
            self.open.keep(&buffer, || self.workers.spare());
        }
        self.top.push(empty_entry());
        self.digests.push(examined.digest);
        self.push_draft(draft)
    }

    /// Takes copied frames, whose numbers follow those so far.
    fn push_copies(&mut self, copies: Vec<CopiedFrame>) -> Result<(), WriteError> {
        for CopiedFrame {
            built,
            slots_in_use,
        } in copies
        {
            let slots = u64::from(built.reference.slots.get());
            self.summary.stored_pages += slots;
            self.summary.frame_bytes = self.summary.frame_bytes.max(slots * PAGE_SIZE_U64);
            self.copied_slots_in_use += slots_in_use;
            self.dead_slots += slots - slots_in_use;
            self.copies += 1;
            self.workers.add_built(built);
        }
        self.write_ready()?;
        Ok(())
    }

    fn push_draft(&mut self, draft: Draft) -> Result<(), WriteError> {
        self.drafts.push_back(draft);
        self.write_drafts()?;
        if self
            .drafts
            .back()
            .is_some_and(|draft| draft.needs > self.sealed)
        {
            self.drafts_on_open += 1;
            if self.drafts_on_open >= MAX_DRAFTS_ON_OPEN {
                self.seal(None)?;
            }
        }
        Ok(())
    }

    /// Seals the open frame. `buffer` has the bytes of the current block.
    fn seal(&mut self, buffer: Option<&Arc<BlockBuffer>>) -> Result<(), WriteError> {
        if self.open.slots() == 0 {
            return Ok(());
        }
        self.drafts_on_open = 0;
        let sealed = self.open.seal(self.sealed, buffer);
        self.sealed += 1;
        self.train(&sealed)?;
        self.hand_out(sealed)
    }

    fn hand_out(&mut self, sealed: Sealed) -> Result<(), WriteError> {
        while self.workers.frames_full() {
            if !self.write_ready()? {
                self.workers.wait()?;
            }
        }
        self.workers.build(sealed);
        Ok(())
    }

    /// Passes the next frame to the training. At the first frame that may use the dictionary, waits
    /// for the training to finish, and uses its dictionary if that pays.
    fn train(&mut self, sealed: &Sealed) -> Result<(), WriteError> {
        let Some(training) = &mut self.training else {
            return Ok(());
        };
        match training.step(sealed) {
            Step::Go => {}
            Step::Start(samples) => {
                let (level, expected) = (training.level, training.expected_bytes(&self.summary));
                self.workers.train(samples, level, expected);
            }
            Step::Decide => {
                self.training = None;
                let verdict = loop {
                    if let Some(verdict) = self.workers.pop_verdict() {
                        break verdict;
                    }
                    self.workers.wait()?;
                };
                if let Verdict::Pays(trained) = verdict {
                    self.workers.use_dictionary(&trained.bytes)?;
                    self.dictionaries.push(trained.bytes);
                }
            }
        }
        Ok(())
    }

    /// Writes the frames that are built, and the drafts that waited for them. Returns whether it
    /// wrote a frame.
    pub(super) fn write_ready(&mut self) -> Result<bool, WriteError> {
        let mut any = false;
        while let Some(mut built) = self.workers.pop_built() {
            any = true;
            built.reference.offset = self.out.offset().into();
            self.out.write("a frame", &built.record[..built.len])?;
            self.summary.frames += 1;
            self.summary.stored_bytes += built.len as u64;
            if built.copied {
                self.copied.push(built.reference);
            } else {
                self.refs.push(built.reference);
            }
            self.workers.recycle(built.record, built.spare);
            self.write_drafts()?;
        }
        Ok(any)
    }

    /// Makes all index blocks be written together, behind the last frame. They wait in memory.
    pub(super) fn write_index_at_end(&mut self) {
        self.at_end = Some(IndexAtEnd::default());
    }

    /// Hands out a hot frame, which counts as a copied one.
    pub(super) fn push_hot(&mut self, sealed: Sealed) -> Result<(), WriteError> {
        let slots = sealed.slots() as u64;
        self.summary.stored_pages += slots;
        self.copied_slots_in_use += slots;
        self.copies += 1;
        self.hand_out(sealed)
    }

    fn write_drafts(&mut self) -> Result<(), WriteError> {
        while let Some(draft) = self.drafts.front()
            && draft.needs <= self.refs.written()
            && draft.needs_copies <= self.copied.len()
        {
            let offset = match &self.at_end {
                Some(at_end) => at_end.bytes.len() as u64,
                None => self.out.offset(),
            };
            let (stored, entry) = self.index.encode(draft, &self.refs, &self.copied, offset)?;
            self.top[draft.block] = entry;
            self.summary.index_bytes += stored.len() as u64;
            match &mut self.at_end {
                Some(at_end) => {
                    at_end.bytes.extend_from_slice(stored);
                    at_end.blocks.push(draft.block);
                }
                None => self.out.write("an index block", stored)?,
            }
            self.drafts.pop_front();
        }
        Ok(())
    }

    /// Waits until every frame in progress is written.
    pub(super) fn settle(&mut self) -> Result<(), WriteError> {
        while self.workers.frames_under_way() {
            if !self.write_ready()? {
                self.workers.wait()?;
            }
        }
        Ok(())
    }

    /// Seals the last frame and writes all remaining frames and index blocks.
    pub(super) fn finish(&mut self) -> Result<(), WriteError> {
        self.seal(None)?;
        self.settle()?;
        if let Some(IndexAtEnd { bytes, blocks }) = self.at_end.take() {
            let from = self.out.offset();
            self.out.write("the index blocks", &bytes)?;
            for block in blocks {
                let offset = &mut self.top[block].word_or_offset;
                offset.set(offset.get() + from);
            }
        }
        self.summary.duplicate_pages += self.copied_pages - self.copied_slots_in_use;
        debug_assert!(self.drafts.is_empty() && self.refs.written() == self.sealed);
        Ok(())
    }
}

/// Returns a top-table entry without a block. It holds the place of a draft until that is written.
fn empty_entry() -> RawTopEntry {
    RawTopEntry {
        kind: top_kind::UNAVAILABLE,
        codec: 0,
        layer: 0.into(),
        stored_len: 0.into(),
        decoded_len: 0.into(),
        word_or_offset: 0.into(),
        crc: 0.into(),
        ancestor_block: 0.into(),
    }
}
