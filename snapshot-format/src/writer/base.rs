//! The base of a layered snapshot: which of a block's pages it has already.
//!
//! ```text
//! a block of the base has the same digest    the whole block is the base's: nothing is decoded
//! otherwise, see `matching`:
//!     pages correspond to pages of the base  decode the frames of their blocks; pages that one of
//!                                            them has lie there
//!     many pages are left, all bytes given   look for content that moved
//!     the others                             are new
//! ```
//!
//! Which pages correspond is up to the caller. Those of one block may correspond to several runs of
//! the base, which need not begin where a block does.
//!
//! All of it runs on the pool, as a part of examining a block. Several blocks may name one frame:
//! at their border, or because they share content. It is decoded once, and the digests of its pages
//! are kept.

use std::collections::{HashMap, HashSet, VecDeque};
use std::error::Error as _;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::WriteError;
use super::block::{Alike, BlockBuffer, Examined, Given, Seen, examine_pages, key};
use super::dedup::Key;
use super::matching::{BaseRun, LoadedBlocks, Samples};
use crate::digest::{self, Digest};
use crate::error::ReadError;
use crate::frame::FrameRef;
use crate::index::{BlockRef, IndexBlock, Page, Top};
use crate::layout::{
    MAX_ANCESTORS, MAX_FRAME_SLOTS, PAGE_SIZE, PAGES_PER_BLOCK_U64, RawAncestorEntry, RawTopEntry,
    SectionKind, codec, top_kind,
};
use crate::names::escape_text;
use crate::sections;
use crate::snapshot::{FrameDecoder, Snapshot, name_property};
use crate::store::Reason;

/// A snapshot that the new one refers to.
pub(super) struct Base {
    snapshot: Arc<Snapshot>,
    /// Digest of each block; empty if the file has none.
    digests: Vec<Digest>,
    /// Decoders that no thread uses now.
    decoders: Mutex<Vec<Decoder>>,
    damage: Mutex<Option<BaseDamage>>,
    decoded: Mutex<DecodedFrames>,
    /// Blocks that have an index block, in the order of their digests.
    by_digest: OnceLock<Vec<u32>>,
    pub(super) samples: Samples,
}

/// Damage in the base that made the child larger, but did not make it wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseDamage {
    /// Number of blocks that were not compared with all that corresponds in the base, because it
    /// could not be read.
    pub blocks: u64,
    /// The first damage that was found.
    pub first: String,
}

/// Maximum number of pages whose digests are kept: 16 MiB of digests.
const MAX_DECODED_PAGES: usize = 1 << 19;

/// Digests of the pages of frames that were decoded last, by frame.
#[derive(Default)]
struct DecodedFrames {
    by_frame: HashMap<FrameRef, DecodedFrame>,
    /// The frames in the order in which they were first wanted.
    oldest: VecDeque<FrameRef>,
    pages: usize,
}

/// The digests of a frame's pages, once a thread has decoded it. Others wait for that thread.
type DecodedFrame = Arc<Mutex<Option<Arc<[Digest]>>>>;

impl DecodedFrames {
    /// Returns the place of a frame's digests, which may be empty.
    fn place(&mut self, frame: &FrameRef) -> DecodedFrame {
        if let Some(known) = self.by_frame.get(frame) {
            return Arc::clone(known);
        }
        let place = DecodedFrame::default();
        self.by_frame.insert(*frame, Arc::clone(&place));
        self.oldest.push_back(*frame);
        self.pages += usize::from(frame.slots());
        while self.pages > MAX_DECODED_PAGES
            && let Some(oldest) = self.oldest.pop_front()
        {
            self.by_frame.remove(&oldest);
            self.pages -= usize::from(oldest.slots());
        }
        place
    }
}

struct Decoder {
    frames: FrameDecoder,
    bytes: Vec<u8>,
}

/// A block that is as in the base.
pub(super) struct Kept {
    index: BlockRef,
    /// Number of the block in the base.
    number: u64,
    /// Files of the frames that it names, as layers of the base.
    layers: Vec<u16>,
}

/// A page of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BasePage {
    pub(super) frame: FrameRef,
    pub(super) slot: u16,
}

/// The content of a base's block.
pub(super) struct Pages {
    index: IndexBlock,
    pub(super) digests: Vec<Digest>,
    pub(super) frames: Vec<BaseFrame>,
}

/// A frame that a block of the base names, and the digests of all its slots. Those that no page
/// uses any more have what the memory was before.
#[derive(Clone)]
pub(super) struct BaseFrame {
    pub(super) frame: FrameRef,
    pub(super) digests: Arc<[Digest]>,
}

impl Base {
    pub(super) fn new(snapshot: Arc<Snapshot>) -> Result<Self, WriteError> {
        snapshot.prepare()?;
        Ok(Self {
            digests: block_digests(&snapshot)?,
            snapshot,
            decoders: Mutex::default(),
            damage: Mutex::default(),
            decoded: Mutex::default(),
            by_digest: OnceLock::new(),
            samples: Samples::default(),
        })
    }

    /// Returns the damage that was found in blocks of which all bytes were given.
    pub(super) fn damage(&self) -> Option<BaseDamage> {
        let damage = self.damage.lock();
        damage.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes damage of a block that is then taken for one that differs.
    fn note_damage(&self, error: &WriteError) {
        let mut damage = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        let damage = damage.get_or_insert_with(|| BaseDamage {
            blocks: 0,
            first: error.source().map_or_else(String::new, ToString::to_string),
        });
        damage.blocks += 1;
    }

    /// Returns `page` and those after it in its region of the base; nothing if it has no region.
    pub(super) fn pages_from(&self, page: u64) -> Range<u64> {
        let region = sections::region_of(self.snapshot.regions(), page);
        page..region.map_or(page, |region| region.page_numbers().end)
    }

    pub(super) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    pub(super) fn digest(&self, block: u64) -> Option<Digest> {
        self.digests.get(usize::try_from(block).ok()?).copied()
    }

    /// Returns how many of the base's blocks from `block` on have only pages of one fill, or only
    /// unavailable ones, up to `most` blocks of 512 pages.
    pub(super) fn uniform_run(&self, block: u64, most: u64) -> Option<(Alike, u64)> {
        let end = self.snapshot.block_count().min(block.saturating_add(most));
        let top = |block| self.snapshot.top(block);
        let kind = (block < end).then(|| top(block))?;
        let alike = match kind {
            Top::Fill(word) => Alike::Fill(word),
            Top::Unavailable => Alike::Unavailable,
            Top::Block => return None,
        };
        let same = (block..end).take_while(|block| top(*block) == kind);
        Some((alike, same.count() as u64))
    }

    /// Examines the pages of a block as [`super::block::examine`] does, and compares them with the
    /// base: with its pages in `base_runs`, which correspond, and with others of the same content.
    pub(super) fn examine(
        &self,
        given: &[Given],
        buffer: Option<&Arc<BlockBuffer>>,
        base_runs: &[BaseRun],
    ) -> Result<Examined, WriteError> {
        let as_base = |given: &Given| matches!(given, Given::Base);
        let counterpart = self.counterpart(given.len(), base_runs);
        let mut loaded = LoadedBlocks::default();
        let is_given = !given.iter().any(as_base);
        let mut examined = if is_given {
            let alone = examine_pages(given, buffer, |_| unreachable!("no page is the base's"));
            if alone.uniform().is_some() {
                return Ok(alone);
            }
            let same = counterpart.filter(|number| self.digest(*number) == Some(alone.digest));
            if let Some(number) = same.or_else(|| self.block_of(&alone.digest, given.len())) {
                return match self.unchanged_block(number, alone.digest) {
                    Err(error) if error.is_base_damage() => {
                        self.note_damage(&error);
                        Ok(alone)
                    }
                    result => result,
                };
            }
            let mut damage = None;
            for number in base_runs.iter().flat_map(BaseRun::blocks) {
                // All bytes were given, so the base is not needed.
                match loaded.load(self, number) {
                    Err(error) if error.is_base_damage() => {
                        damage.get_or_insert(error);
                    }
                    result => result?,
                }
            }
            if let Some(error) = damage {
                self.note_damage(&error);
            }
            alone
        } else {
            if given.iter().all(as_base)
                && let Some(number) = counterpart
                && let Some(digest) = self.digest(number)
            {
                return self.unchanged_block(number, digest);
            }
            for number in base_runs.iter().flat_map(BaseRun::blocks) {
                loaded.load(self, number)?;
            }
            examine_pages(given, buffer, |i| {
                let run = base_runs.iter().find(|run| run.range().contains(&i));
                let page = run.and_then(|run| loaded.page(run.page_of(i)));
                page.expect("the writer has checked that the base has the page")
            })
        };
        if let Some(number) = counterpart
            && loaded.digest(number) == Some(examined.digest)
            && examined.uniform().is_none()
        {
            return self.unchanged_block(number, examined.digest);
        }
        // A page of a diff was written to, so it has rarely moved.
        self.find(&mut examined.pages, base_runs, &mut loaded, is_given)?;
        examined.base_frames = loaded.into_frames();
        Ok(examined)
    }

    /// Returns the number of the block of which all pages correspond to those of a block of `pages`
    /// pages, in the same places.
    fn counterpart(&self, pages: usize, base_runs: &[BaseRun]) -> Option<u64> {
        let [run] = base_runs else { return None };
        let number = run.page / PAGES_PER_BLOCK_U64;
        let same = run.page.is_multiple_of(PAGES_PER_BLOCK_U64)
            && run.range() == (0..pages)
            && self.snapshot.pages_of_block(number) == pages;
        same.then_some(number)
    }

    /// Returns a block of the base with this digest and number of pages.
    pub(super) fn block_of(&self, digest: &Digest, pages: usize) -> Option<u64> {
        let recorded = |block: &u32| &self.digests[*block as usize];
        let by_digest = self.by_digest.get_or_init(|| {
            let blocks = 0..u32::try_from(self.digests.len()).expect("at most 2^27 blocks");
            let is_stored = |block: &u32| self.snapshot.top((*block).into()) == Top::Block;
            let mut blocks: Vec<u32> = blocks.filter(is_stored).collect();
            blocks.sort_by_key(recorded);
            blocks
        });
        let first = by_digest.partition_point(|block| recorded(block) < digest);
        let number = by_digest
            .get(first)
            .filter(|block| recorded(block) == digest)?;
        let number = u64::from(*number);
        (self.snapshot.pages_of_block(number) == pages).then_some(number)
    }

    /// Returns a block that is as block `number` of the base.
    pub(super) fn unchanged_block(
        &self,
        number: u64,
        digest: Digest,
    ) -> Result<Examined, WriteError> {
        let index = self.snapshot.uncached_block(number, Reason::Prefetch)?;
        let pages = (0..index.page_count()).map(|i| seen(&index, i)).collect();
        let mut layers: Vec<u16> = index.frames().iter().map(FrameRef::layer).collect();
        layers.sort_unstable();
        layers.dedup();
        let kept = self.snapshot.block_ref(number).map(|index| Kept {
            index,
            number,
            layers,
        });
        Ok(Examined {
            pages,
            digest,
            kept,
            ..Examined::default()
        })
    }

    /// Decodes a block of the base, and computes the digests of its pages.
    pub(super) fn pages(&self, number: u64) -> Result<Pages, WriteError> {
        let index = self.snapshot.uncached_block(number, Reason::Prefetch)?;
        let mut digests: Vec<Digest> = (0..index.page_count())
            .map(|i| match index.page(i) {
                Page::Fill(word) => digest::fill(word),
                Page::Unavailable => digest::unavailable(),
                Page::Stored { .. } | Page::Unused => Digest::default(),
            })
            .collect();
        let mut uses: Vec<Vec<(usize, u16)>> = vec![Vec::new(); index.frames().len()];
        for i in 0..index.page_count() {
            if let Some((frame, slot)) = index.stored(i) {
                uses[frame].push((i, slot));
            }
        }
        let mut frames = Vec::with_capacity(uses.len());
        for (frame, uses) in index.frames().iter().zip(&uses) {
            let of_slots = self.frame_digests(frame)?;
            for (i, slot) in uses {
                digests[*i] = of_slots[usize::from(*slot)];
            }
            frames.push(BaseFrame {
                frame: *frame,
                digests: of_slots,
            });
        }
        Ok(Pages {
            index,
            digests,
            frames,
        })
    }

    /// Returns the digests of a frame's pages, and decodes it if no block has named it before.
    pub(super) fn frame_digests(&self, frame: &FrameRef) -> Result<Arc<[Digest]>, WriteError> {
        let place = lock(&self.decoded).place(frame);
        let mut digests = lock(&place);
        if let Some(digests) = &*digests {
            return Ok(Arc::clone(digests));
        }
        let idle = lock(&self.decoders).pop();
        let mut decoder = idle.unwrap_or_else(Decoder::new);
        let bytes = &mut decoder.bytes[..frame.decoded_len()];
        decoder
            .frames
            .decode(&self.snapshot, frame, Reason::Prefetch, bytes)?;
        let computed: Arc<[Digest]> = bytes.chunks_exact(PAGE_SIZE).map(digest::page).collect();
        *digests = Some(Arc::clone(&computed));
        lock(&self.decoders).push(decoder);
        Ok(computed)
    }
}

impl Decoder {
    fn new() -> Self {
        Self {
            frames: FrameDecoder::new(),
            bytes: vec![0; MAX_FRAME_SLOTS * PAGE_SIZE],
        }
    }
}

/// Locks data that is consistent after every statement.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the digest of each block that a snapshot records; nothing if it records none.
pub(super) fn block_digests(snapshot: &Snapshot) -> Result<Vec<Digest>, ReadError> {
    let section = snapshot.own().optional_section(SectionKind::BlockDigests)?;
    let bytes = section.map_or_else(Vec::new, |(_, bytes)| bytes);
    let (digests, _) = bytes.as_chunks::<32>();
    let complete = digests.len() as u64 == snapshot.block_count();
    Ok(if complete {
        digests.to_vec()
    } else {
        Vec::new()
    })
}

/// Returns page `i` of a block of the base.
fn seen(index: &IndexBlock, i: usize) -> Seen {
    match index.page(i) {
        Page::Fill(word) => Seen::Alike(Alike::Fill(word)),
        Page::Stored { frame, slot } => Seen::Base(BasePage { frame, slot }),
        // A page of the base's region is not unused.
        Page::Unavailable | Page::Unused => Seen::Alike(Alike::Unavailable),
    }
}

impl Pages {
    /// Returns page `i` of the block.
    pub(super) fn seen(&self, i: usize) -> Seen {
        seen(&self.index, i)
    }

    pub(super) fn page(&self, i: usize) -> Option<BasePage> {
        let (frame, slot) = self.index.stored(i)?;
        let frame = self.index.frames()[frame];
        Some(BasePage { frame, slot })
    }
}

/// Pages of ancestors' frames, to find content that turns up in another block than the base's.
#[derive(Default)]
pub(super) struct AncestorPages {
    frames: Vec<FrameRef>,
    /// All of them, to enter each once.
    noted: HashSet<FrameRef>,
    /// Number of the frame, and the slot.
    pages: HashMap<Key, (u32, u16), BuildHasherDefault<KeyHasher>>,
}

/// Maximum number of pages of ancestors that are known: 2 GiB of changed blocks, in 32 MiB.
const MAX_ANCESTOR_PAGES: usize = 1 << 19;

/// Hasher of keys, which are digests: any part of them is as good as any other.
#[derive(Default)]
pub(super) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for word in bytes.as_chunks::<8>().0 {
            self.0 ^= u64::from_le_bytes(*word);
        }
    }
}

impl AncestorPages {
    /// Enters the pages of these frames that aren't known yet, as far as there is room.
    pub(super) fn note(&mut self, frames: &[BaseFrame]) {
        for BaseFrame { frame, digests } in frames {
            if self.pages.len() + digests.len() > MAX_ANCESTOR_PAGES {
                return;
            }
            if !self.noted.insert(*frame) {
                continue;
            }
            // Each frame has a page, so there are no more than pages.
            let number = u32::try_from(self.frames.len()).expect("at most 2^19 frames");
            self.frames.push(*frame);
            for (digest, slot) in digests.iter().zip(0..) {
                self.pages.entry(key(digest)).or_insert((number, slot));
            }
        }
    }

    pub(super) fn find(&self, key: Key) -> Option<BasePage> {
        let (number, slot) = *self.pages.get(&key)?;
        let frame = self.frames[number as usize];
        Some(BasePage { frame, slot })
    }
}

/// The ancestors that the new snapshot refers to, in the order of first use.
#[derive(Default)]
pub(super) struct UsedLayers {
    base: Option<Arc<Base>>,
    /// Number here of each layer of the base; 0 if it is not used.
    numbers: Vec<u16>,
    /// Layers of the base that are used.
    used: Vec<u16>,
}

impl UsedLayers {
    pub(super) fn new(base: Arc<Base>) -> Self {
        Self {
            numbers: vec![0; base.snapshot.layers().len()],
            used: Vec::new(),
            base: Some(base),
        }
    }

    /// Returns the number of a layer of the base in the new snapshot.
    pub(super) fn number(&mut self, layer: u16) -> Result<u16, WriteError> {
        let number = &mut self.numbers[usize::from(layer)];
        if *number == 0 {
            let count = self.used.len() as u64 + 1;
            WriteError::limit("the number of ancestors", count, MAX_ANCESTORS as u64)?;
            self.used.push(layer);
            *number = u16::try_from(count).expect("at most 1024");
        }
        Ok(*number)
    }

    /// Returns the entry of the top table for a block that is as in the base.
    pub(super) fn top_entry(&mut self, kept: &Kept) -> Result<RawTopEntry, WriteError> {
        for &layer in &kept.layers {
            self.number(layer)?;
        }
        let index = &kept.index;
        let ancestor_block = match index.layer {
            0 => u32::try_from(kept.number).expect("at most 2^36 pages"),
            _ => index.ancestor_block,
        };
        Ok(RawTopEntry {
            kind: top_kind::BLOCK,
            codec: if index.compressed {
                codec::ZSTD
            } else {
                codec::RAW
            },
            layer: self.number(index.layer)?.into(),
            stored_len: index.stored_len.into(),
            decoded_len: index.decoded_len.into(),
            word_or_offset: index.offset.into(),
            crc: index.crc.into(),
            ancestor_block: ancestor_block.into(),
        })
    }

    /// Returns the records of the section of ancestors, and the properties with their names.
    pub(super) fn records(&self) -> (Vec<RawAncestorEntry>, Vec<(String, String)>) {
        let layers = self.base.iter().flat_map(|base| {
            let layers = base.snapshot.layers();
            self.used.iter().map(|used| &layers[usize::from(*used)])
        });
        layers
            .map(|layer| {
                let entry = RawAncestorEntry {
                    snapshot_id: layer.id().0,
                    file_bytes: layer.file_bytes().into(),
                    reserved: 0.into(),
                    trailer_hash: layer.ends().trailer_hash,
                };
                // The store's name is the path, escaped.
                let name = layer.name().rsplit('/').next().unwrap_or_default();
                let name = (name_property(layer.id()), escape_text(name).into_owned());
                (entry, name)
            })
            .unzip()
    }
}
