//! Copying of a snapshot into a new file: which frames keep their bytes, and what each page is in
//! the new file.
//!
//! ```text
//! plan      read all index blocks; note for every frame which slots are in use, and by which pages
//! decide    mostly in use: copied, with a new page list; otherwise its pages are repacked
//! examine   for each block, on the pool: check its frames, build the copies of those that no
//!           earlier block uses, decode the others
//! ```
//!
//! A copy has the payload of the original, byte for byte. Only header, page list and checksum are
//! new. The checksum of the original is verified, and that its payload is one zstd frame; it is not
//! decoded, which would take most of the time. The digest of a block with copied pages is the
//! recorded one, and the root over all digests must be the recorded content digest. Without
//! recorded digests, everything is decoded.
//!
//! With a new base (a rebase), only frames of the snapshot's own file are copied. Blocks whose
//! digest is that of the new base's block become the base's. In the others, pages that lay in an
//! ancestor are first assumed to be as in the new base; if the block's digest says that this is
//! right, the old ancestor isn't needed.
//!
//! With hot pages, these go to frames of their own, before everything else: see `hot`.

mod hot;

use std::collections::HashMap;
use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use rayon::prelude::*;

use super::WriteError;
use super::base::{Base, BaseFrame, block_digests};
use super::block::{Alike, BlockBuffer, Examined, Seen, key};
use super::frame::{Built, PageList, copy};
use super::matching::{BaseRun, LoadedBlocks};
use super::workers::{FreeList, RecordBuffers, Workers};
use crate::digest::{self, Digest};
use crate::error::{Defect, Flaw, Part};
use crate::frame::{Codec, FrameRef};
use crate::index::{IndexBlock, Page, Top};
use crate::layout::{
    MAX_DICTIONARIES, MAX_FRAME_RECORD_BYTES, MAX_FRAME_SLOTS, PAGE_SIZE, PAGES_PER_BLOCK,
    PAGES_PER_BLOCK_U64, SectionKind,
};
use crate::snapshot::{FrameDecoder, Snapshot};
use crate::store::Reason;
use hot::Hot;
pub(super) use hot::Wanted;

/// Percentage of a frame's slots that must be in use for it to be copied as it is.
///
/// Measured with a guest of 1 GiB after 64 layers that each change 1 % of the pages, relative to
/// packing its memory (CPU time, size of the file): 25 % 0.18, 1.41; 40 % 0.28, 1.31;
/// 45 % 0.35, 1.26; 50 % 0.38, 1.23; 55 % 0.48, 1.18; 60 % 0.56, 1.13; 75 % 0.85, 1.06.
const MIN_PERCENT_IN_USE: usize = 50;
/// Number of blocks whose index is read together for the plan.
const INDEX_BATCH_BLOCKS: u64 = 1024;
/// Maximum number of remembered digests of slots, of frames that several blocks use: 32 MiB.
const MAX_REMEMBERED_SLOTS: u64 = 1 << 20;

/// A snapshot that is copied. Threads of the pool share it.
pub(super) struct CopySource {
    snapshot: Arc<Snapshot>,
    /// Digest of each block as recorded; empty if the file records none.
    recorded: Vec<Digest>,
    base: Option<NewBase>,
    hot: Hot,
    /// Frames whose pages go into the new file, in the order of their first use.
    frames: Vec<Planned>,
    by_place: HashMap<Place, usize>,
    /// Dictionaries that copied frames use, by their numbers in the new file from 1 on.
    dictionaries: Vec<Vec<u8>>,
    /// Digests of slots, by the frame's index in `frames`.
    remembered: Cache<usize, Arc<[Digest]>, BySlots>,
    decoders: FreeList<Decoder>,
    /// Buffers of blocks.
    buffers: Arc<FreeList<Vec<u8>>>,
    /// Buffers of frame records.
    record_buffers: Arc<RecordBuffers>,
}

/// The kind of a rewrite.
pub(super) enum RewriteMode<'a> {
    /// A file that needs no other.
    Flatten,
    /// A child of another base. `old_base` is the name of the previous base, for messages.
    Rebase {
        base: &'a Arc<Snapshot>,
        old_base: String,
    },
    /// A file of the same ancestors, if any, with hot pages at its front: the working set `name`,
    /// and then those of the other sets.
    Optimize { wanted: Wanted, name: &'a str },
}

/// Layer and offset of a frame.
type Place = (u16, u64);
/// Pages of a block with their slots in one frame.
type Uses = Vec<(usize, u16)>;

/// A frame of the snapshot.
struct Planned {
    frame: FrameRef,
    first_block: u64,
    last_block: u64,
    /// Pages of the snapshot that lie in the frame.
    pages: PageList,
    /// Whether each slot in use has a listed page.
    is_listed: bool,
    /// Number among the copied frames, and number of its dictionary or 0; none if its pages are
    /// repacked.
    copied: Option<(u32, u16)>,
    /// Hot slots, sorted, each with its number among all hot slots.
    hot: Vec<(u16, u32)>,
}

/// A copied frame that is ready to be written.
pub(super) struct CopiedFrame {
    pub(super) built: Built,
    /// Number of slots that pages of the snapshot use.
    pub(super) slots_in_use: u64,
}

/// The base of a snapshot that gets another one.
struct NewBase {
    base: Arc<Base>,
    /// The first block of the base's region that corresponds to each region, and the number of
    /// blocks there.
    counterparts: Vec<Option<(u64, u64)>>,
    /// Name of the old base, for messages.
    old_base: String,
}

#[derive(Clone)]
struct BySlots;

impl Weighter<usize, Arc<[Digest]>> for BySlots {
    fn weight(&self, _frame: &usize, slots: &Arc<[Digest]>) -> u64 {
        slots.len() as u64
    }
}

struct Decoder {
    frames: FrameDecoder,
    bytes: Vec<u8>,
}

/// The pages of a block as they become known.
struct Block {
    number: u64,
    pages: Vec<Seen>,
    digests: Vec<Digest>,
    /// Bytes of the pages that are repacked.
    buffer: Option<BlockBuffer>,
    /// Whether the digest of a page is not known, because its frame is not decoded.
    has_unknown: bool,
    copies: Vec<(u32, CopiedFrame)>,
    base_frames: Vec<BaseFrame>,
}

impl CopySource {
    /// Plans the copy of `snapshot`. `base` is the base of the new file, if it has one.
    pub(super) fn plan(
        snapshot: &Arc<Snapshot>,
        base: Option<&Arc<Base>>,
        mode: RewriteMode<'_>,
        workers: &Workers,
    ) -> Result<Self, WriteError> {
        snapshot.prepare().map_err(WriteError::Copied)?;
        let (new_base, hot) = match mode {
            RewriteMode::Flatten => (None, Hot::default()),
            RewriteMode::Rebase { old_base, .. } => {
                let base = base.map(|base| NewBase::new(snapshot, base, old_base));
                (base, Hot::default())
            }
            RewriteMode::Optimize { wanted, .. } => (None, Hot::new(wanted, base)),
        };
        let mut source = Self {
            recorded: block_digests(snapshot).map_err(WriteError::Copied)?,
            base: new_base,
            hot,
            frames: Vec::new(),
            by_place: HashMap::new(),
            dictionaries: Vec::new(),
            remembered: Cache::with_weighter(1 << 15, MAX_REMEMBERED_SLOTS, BySlots),
            decoders: FreeList::default(),
            buffers: Arc::default(),
            record_buffers: Arc::clone(workers.record_buffers()),
            snapshot: Arc::clone(snapshot),
        };
        let blocks = snapshot.block_count();
        let mut first = 0;
        while first < blocks {
            let end = blocks.min(first + INDEX_BATCH_BLOCKS);
            let loaded: Vec<Option<Result<IndexBlock, WriteError>>> =
                workers.pool().install(|| {
                    (first..end)
                        .into_par_iter()
                        .map(|block| source.needs_index(block).then(|| source.index_block(block)))
                        .collect()
                });
            for (block, index) in (first..end).zip(loaded) {
                if let Some(index) = index {
                    source.note(block, &index?)?;
                }
            }
            first = end;
        }
        source.assign_hot();
        source.decide()?;
        Ok(source)
    }

    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Takes the dictionaries that copied frames use, in the order of their numbers.
    pub(super) fn take_dictionaries(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.dictionaries)
    }

    /// Returns the number of frames that are copied as they are.
    pub(super) fn copied_frames(&self) -> u64 {
        let copied = self.frames.iter().filter(|frame| frame.copied.is_some());
        copied.count() as u64
    }

    fn needs_index(&self, block: u64) -> bool {
        let is_kept = self.kept(block).is_some()
            || self.is_of_ancestor(block) && self.hot.in_block(block).is_empty();
        self.snapshot.top(block) == Top::Block && !is_kept
    }

    /// Returns the new base's block that is the same as `block`, and its digest.
    fn kept(&self, block: u64) -> Option<(u64, Digest)> {
        let base = &self.base.as_ref()?.base;
        let digest = *self.recorded(block)?;
        let pages = self.snapshot.pages_of_block(block);
        let same = self.counterpart(block).filter(|there| {
            base.digest(*there) == Some(digest) && base.snapshot().pages_of_block(*there) == pages
        });
        let there = same.or_else(|| base.block_of(&digest, pages))?;
        Some((there, digest))
    }

    /// Returns the number of the block that corresponds to `block` in the new base.
    fn counterpart(&self, block: u64) -> Option<u64> {
        let base = self.base.as_ref()?;
        let regions = self.snapshot.regions();
        let first_page = block * PAGES_PER_BLOCK_U64;
        let after = regions.partition_point(|region| region.first_page <= first_page);
        // Regions without pages have the number of the one behind them.
        let region = after.checked_sub(1)?;
        let (first, blocks) = base.counterparts[region]?;
        let within = block - regions[region].first_page / PAGES_PER_BLOCK_U64;
        (within < blocks).then_some(first + within)
    }

    /// Reads an index block of the snapshot.
    fn index_block(&self, block: u64) -> Result<IndexBlock, WriteError> {
        let place = self.snapshot.block_ref(block);
        let holder = place.and_then(|place| self.snapshot.layer(place.layer));
        if holder.is_some_and(|layer| layer.is_absent()) {
            return Err(self.not_in_base(block));
        }
        self.snapshot
            .uncached_block(block, Reason::Prefetch)
            .map_err(WriteError::Copied)
    }

    fn not_in_base(&self, block: u64) -> WriteError {
        let base = self.base.as_ref();
        WriteError::NotInBase {
            file: self.snapshot.name().to_owned(),
            block,
            base: base.map_or_else(String::new, |new| new.base.snapshot().name().to_owned()),
            old_base: base.map_or_else(String::new, |new| new.old_base.clone()),
        }
    }

    /// Notes which frames the pages of a block use.
    fn note(&mut self, block: u64, index: &IndexBlock) -> Result<(), WriteError> {
        let own_only = self.base.is_some() || self.hot.keeps_ancestors();
        let mut planned: Vec<Option<usize>> = vec![None; index.frames().len()];
        for i in 0..index.page_count() {
            let Some((number, slot)) = index.stored(i) else {
                continue;
            };
            let frame = index.frames()[number];
            if own_only && frame.layer() > 0 {
                continue;
            }
            let page = block * PAGES_PER_BLOCK_U64 + i as u64;
            let at = planned[number].unwrap_or_else(|| self.planned(frame, page));
            planned[number] = Some(at);
            let planned = &mut self.frames[at];
            if planned.frame != frame {
                let place = self.snapshot.block_ref(block);
                let detail = "names a frame otherwise than another index block does".into();
                let field = "frame of an index block";
                let flaw = Flaw::new(
                    place.map_or(0, |place| place.offset),
                    Defect::Text { field, detail },
                );
                let holder = place.and_then(|place| self.snapshot.layer(place.layer));
                let holder = holder.map_or(self.snapshot.own(), |layer| layer);
                return Err(WriteError::Copied(holder.damaged(Part::IndexBlock, flaw)));
            }
            planned.last_block = block;
            planned.is_listed &= planned.pages.list(page, slot);
        }
        self.note_hot(block, index);
        Ok(())
    }

    /// Returns the index of a frame in the plan, to which it is added at its first page.
    fn planned(&mut self, frame: FrameRef, page: u64) -> usize {
        let next = self.frames.len();
        let place = (frame.layer(), frame.offset());
        let at = *self.by_place.entry(place).or_insert(next);
        if at == next {
            let block = page / PAGES_PER_BLOCK_U64;
            self.frames.push(Planned {
                frame,
                first_block: block,
                last_block: block,
                pages: PageList::new(page, frame.slots()),
                is_listed: true,
                copied: None,
                hot: Vec::new(),
            });
        }
        at
    }

    /// Decides which frames are copied as they are.
    fn decide(&mut self) -> Result<(), WriteError> {
        let mut numbers: HashMap<(u16, u16), Option<u16>> = HashMap::new();
        let mut dictionary_of = |frame: &FrameRef| {
            let Codec::ZstdDictionary(number) = frame.codec() else {
                return Ok(Some(0));
            };
            let known = (frame.layer(), number);
            if let Some(number) = numbers.get(&known) {
                return Ok(*number);
            }
            let bytes = dictionary(&self.snapshot, known)?;
            let number = add_dictionary(&mut self.dictionaries, bytes);
            numbers.insert(known, number);
            Ok::<_, WriteError>(number)
        };
        // The hot frames have the first numbers.
        let mut copies = self.hot.frame_count();
        let keeps_ancestors = self.hot.keeps_ancestors();
        for planned in &mut self.frames {
            let frame = planned.frame;
            if keeps_ancestors && frame.layer() > 0 {
                planned.pages = PageList::default();
                continue;
            }
            // The rest of a frame with hot pages is repacked, with the same dictionary: the file
            // would have them twice if the frame were copied.
            if !planned.hot.is_empty() {
                dictionary_of(&frame)?;
                planned.pages = PageList::default();
                continue;
            }
            let in_use = planned.pages.slots_in_use() * 100;
            let is_live = in_use >= MIN_PERCENT_IN_USE * usize::from(frame.slots());
            // The record gets no longer than this: the original has a list, too.
            let room = planned.pages.record_len(frame.stored_len() as usize);
            let fits = room <= MAX_FRAME_RECORD_BYTES;
            if is_live && fits && planned.is_listed && copies < u32::MAX {
                let dictionary = dictionary_of(&frame)?;
                planned.copied = dictionary.map(|dictionary| (copies, dictionary));
            }
            if planned.copied.is_some() {
                copies += 1;
            } else {
                planned.pages = PageList::default();
            }
        }
        Ok(())
    }

    /// Examines a block that has an index block.
    pub(super) fn examine(&self, block: u64) -> Result<Examined, WriteError> {
        if let Some((there, digest)) = self.kept(block)
            && let Some(base) = &self.base
        {
            return base.base.unchanged_block(there, digest);
        }
        if let Some(unchanged) = self.ancestor_block(block) {
            return unchanged;
        }
        let index = self.index_block(block)?;
        let mut pages = Block::new(block, &index);
        let mut uses: Vec<Uses> = vec![Uses::new(); index.frames().len()];
        for i in 0..index.page_count() {
            if let Some((frame, slot)) = index.stored(i) {
                uses[frame].push((i, slot));
            }
        }
        let mut elsewhere = Vec::new();
        for (frame, mut uses) in index.frames().iter().zip(uses) {
            self.take_hot(frame, &mut uses, &mut pages)?;
            if uses.is_empty() {
                continue;
            }
            match self.by_place.get(&(frame.layer(), frame.offset())) {
                Some(_) if self.hot.keeps_ancestors() && frame.layer() > 0 => {
                    self.leave_in_ancestor(frame, &uses, &mut pages)?;
                }
                Some(&at) => match self.frames[at].copied {
                    Some((number, _)) if self.trusts_digests() => {
                        self.copy_unseen(at, &mut pages)?;
                        pages.has_unknown = true;
                        for (i, slot) in uses {
                            pages.pages[i] = Seen::Copied(number, slot);
                        }
                    }
                    Some((number, _)) => {
                        let digests = self.slots(at, &mut pages)?;
                        for (i, slot) in uses {
                            pages.pages[i] = Seen::Copied(number, slot);
                            pages.digests[i] = digests[usize::from(slot)];
                        }
                    }
                    None => self.take_bytes(frame, &uses, &mut pages)?,
                },
                None if self.hot.keeps_ancestors() => {
                    self.leave_in_ancestor(frame, &uses, &mut pages)?;
                }
                None => elsewhere.push((frame, uses)),
            }
        }
        if !elsewhere.is_empty() {
            self.take_from_base(&elsewhere, &mut pages)?;
        }
        self.check(pages)
    }

    /// Returns whether the digests of blocks need not be computed. A rebase compares them with
    /// those of other pages.
    fn trusts_digests(&self) -> bool {
        self.base.is_none() && !self.recorded.is_empty()
    }

    fn recorded(&self, block: u64) -> Option<&Digest> {
        self.recorded.get(usize::try_from(block).ok()?)
    }

    /// Compares a block with its recorded digest.
    fn check(&self, mut block: Block) -> Result<Examined, WriteError> {
        let recorded = self.recorded(block.number);
        let digest = match recorded {
            Some(recorded) if block.has_unknown => *recorded,
            _ => digest::block(&block.digests),
        };
        if recorded.is_some_and(|recorded| *recorded != digest) {
            let own = self.snapshot.own();
            let part = Part::Section(SectionKind::BlockDigests);
            let section = own.ends().directory.get(SectionKind::BlockDigests);
            let at = section.map_or(0, |section| section.offset) + 32 * block.number;
            let detail = format!("block {} has another digest than is recorded", block.number);
            let defect = Defect::Text {
                field: "digest",
                detail: detail.into(),
            };
            return Err(WriteError::Copied(own.damaged(part, Flaw::new(at, defect))));
        }
        block.copies.sort_by_key(|(number, _)| *number);
        Ok(Examined {
            pages: block.pages,
            digest,
            copies: block.copies.into_iter().map(|(_, copy)| copy).collect(),
            buffer: block.buffer.map(Arc::new),
            base_frames: block.base_frames,
            ..Examined::default()
        })
    }

    /// Gives the first block that uses a frame its copy, without decoding it.
    fn copy_unseen(&self, at: usize, block: &mut Block) -> Result<(), WriteError> {
        let planned = &self.frames[at];
        if planned.first_block != block.number {
            return Ok(());
        }
        let frame = &planned.frame;
        let mut decoder = self.take_decoder();
        let checked = decoder
            .frames
            .check(&self.snapshot, frame, Reason::Prefetch)
            .map(|payload| {
                let copy = planned.copy(payload, &self.record_buffers);
                block.copies.extend(copy);
            });
        self.decoders.push(decoder);
        checked.map_err(WriteError::CopiedFrame)
    }

    /// Returns the digests of the slots in use of a copied frame. The first block that uses the
    /// frame gets its copy.
    fn slots(&self, at: usize, block: &mut Block) -> Result<Arc<[Digest]>, WriteError> {
        let planned = &self.frames[at];
        let is_first = planned.first_block == block.number;
        if !is_first && let Some(digests) = self.remembered.get(&at) {
            return Ok(digests);
        }
        let frame = &planned.frame;
        let digests: Arc<[Digest]> = self.decode(frame, |decoder, bytes| {
            if is_first {
                let payload = decoder.payload(frame);
                block
                    .copies
                    .extend(planned.copy(payload, &self.record_buffers));
            }
            let slots = (0u16..).zip(bytes.chunks_exact(PAGE_SIZE));
            slots
                .map(|(slot, page)| {
                    if planned.pages.has(slot) {
                        digest::page(page)
                    } else {
                        Digest::default()
                    }
                })
                .collect()
        })?;
        if planned.last_block > block.number {
            self.remembered.insert(at, Arc::clone(&digests));
        }
        Ok(digests)
    }

    /// Takes the bytes of pages that are repacked.
    fn take_bytes(
        &self,
        frame: &FrameRef,
        uses: &Uses,
        block: &mut Block,
    ) -> Result<(), WriteError> {
        self.decode(frame, |_, bytes| {
            for &(i, slot) in uses {
                let page = &bytes[usize::from(slot) * PAGE_SIZE..][..PAGE_SIZE];
                let digest = digest::page(page);
                block.digests[i] = digest;
                block.pages[i] = if let Some(word) = digest::fill_word(page) {
                    Seen::Alike(Alike::Fill(word))
                } else {
                    let buffer = block
                        .buffer
                        .get_or_insert_with(|| BlockBuffer::of(&self.buffers));
                    buffer.pages_mut(i, 1).copy_from_slice(page);
                    Seen::Data(key(&digest))
                };
            }
        })
    }

    /// Finds pages that lay in ancestors in the new base, and takes the bytes of the others.
    fn take_from_base(
        &self,
        elsewhere: &[(&FrameRef, Uses)],
        block: &mut Block,
    ) -> Result<(), WriteError> {
        let new = self.base.as_ref();
        let mut loaded = LoadedBlocks::default();
        let mut base_runs = Vec::new();
        if let Some((new, there)) = new.zip(self.counterpart(block.number)) {
            loaded.load(&new.base, there)?;
            let first = there * PAGES_PER_BLOCK_U64;
            base_runs.push(BaseRun::new(0, block.pages.len(), first));
            // If all are as in the new base, the digest of the block is right.
            for &(i, _) in elsewhere.iter().flat_map(|(_, uses)| uses) {
                if let Some((seen, digest)) = loaded.page(first + i as u64) {
                    block.pages[i] = seen;
                    block.digests[i] = digest;
                }
            }
            let digest = digest::block(&block.digests);
            if self.recorded(block.number) == Some(&digest) {
                block.base_frames = loaded.into_frames();
                return Ok(());
            }
        }
        for (frame, uses) in elsewhere {
            if self.snapshot.layer_of(frame).is_absent() {
                return Err(self.not_in_base(block.number));
            }
            self.take_bytes(frame, uses, block)?;
        }
        if let Some(new) = new {
            let base = &new.base;
            base.find(&mut block.pages, &base_runs, &mut loaded, true)?;
        }
        if !block.pages.iter().any(|seen| matches!(seen, Seen::Data(_))) {
            block.buffer = None;
        }
        block.base_frames = loaded.into_frames();
        Ok(())
    }

    /// Reads, checks and decodes a frame.
    fn decode<T>(
        &self,
        frame: &FrameRef,
        then: impl FnOnce(&FrameDecoder, &[u8]) -> T,
    ) -> Result<T, WriteError> {
        let mut decoder = self.take_decoder();
        let bytes = &mut decoder.bytes[..frame.decoded_len()];
        let result = decoder
            .frames
            .decode(&self.snapshot, frame, Reason::Prefetch, bytes)
            .map(drop)
            .map_err(WriteError::CopiedFrame)
            .map(|()| then(&decoder.frames, &decoder.bytes[..frame.decoded_len()]));
        self.decoders.push(decoder);
        result
    }

    fn take_decoder(&self) -> Decoder {
        let idle = self.decoders.pop();
        idle.unwrap_or_else(|| Decoder {
            frames: FrameDecoder::new(),
            bytes: vec![0; MAX_FRAME_SLOTS * PAGE_SIZE],
        })
    }
}

impl Planned {
    /// Returns the number and the copy of the frame, if it is copied. `payload` is its payload.
    fn copy(&self, payload: &[u8], buffers: &RecordBuffers) -> Option<(u32, CopiedFrame)> {
        let (number, dictionary) = self.copied?;
        let copy = CopiedFrame {
            built: copy(&self.frame, payload, &self.pages, dictionary, buffers),
            slots_in_use: self.pages.slots_in_use() as u64,
        };
        Some((number, copy))
    }
}

impl NewBase {
    fn new(snapshot: &Snapshot, base: &Arc<Base>, old_base: String) -> Self {
        let there = base.snapshot().regions();
        let counterparts = snapshot.regions().iter().map(|region| {
            let mut same = there.iter().filter(|other| {
                (other.space, other.start) == (region.space, region.start)
                    && other.name == region.name
            });
            let other = same.next()?;
            let first = other.first_page / PAGES_PER_BLOCK_U64;
            Some((first, other.pages.div_ceil(PAGES_PER_BLOCK_U64)))
        });
        Self {
            counterparts: counterparts.collect(),
            base: Arc::clone(base),
            old_base,
        }
    }
}

impl Block {
    /// Creates a block of which the fills and the unavailable pages are known.
    fn new(number: u64, index: &IndexBlock) -> Self {
        let fills: Vec<Digest> = index
            .fills()
            .iter()
            .map(|word| digest::fill(*word))
            .collect();
        let unavailable = digest::unavailable();
        let mut pages = Vec::with_capacity(PAGES_PER_BLOCK);
        let mut digests = Vec::with_capacity(PAGES_PER_BLOCK);
        for i in 0..index.page_count() {
            let (seen, digest) = match (index.page(i), index.fill_number(i)) {
                (Page::Fill(word), Some(number)) => (Alike::Fill(word), fills[number]),
                (Page::Fill(word), None) => (Alike::Fill(word), digest::fill(word)),
                // Stored pages get their content from the frames.
                _ => (Alike::Unavailable, unavailable),
            };
            pages.push(Seen::Alike(seen));
            digests.push(digest);
        }
        Self {
            number,
            pages,
            digests,
            buffer: None,
            has_unknown: false,
            copies: Vec::new(),
            base_frames: Vec::new(),
        }
    }
}

/// Reads a dictionary: the number that a layer's frames name.
fn dictionary(snapshot: &Snapshot, (layer, number): (u16, u16)) -> Result<Vec<u8>, WriteError> {
    let file = snapshot.layer(layer).map_or(snapshot.own(), |layer| layer);
    let bytes = file.dictionary_bytes(number);
    bytes.map(<[u8]>::to_vec).map_err(WriteError::Copied)
}

/// Adds a dictionary unless it is there, and returns its number; none if there are too many.
fn add_dictionary(all: &mut Vec<Vec<u8>>, bytes: Vec<u8>) -> Option<u16> {
    let at = all.iter().position(|known| *known == bytes);
    let at = at.unwrap_or_else(|| {
        if all.len() < MAX_DICTIONARIES {
            all.push(bytes);
            all.len() - 1
        } else {
            all.len()
        }
    });
    let number = u16::try_from(at + 1).ok()?;
    (at < all.len()).then_some(number)
}
