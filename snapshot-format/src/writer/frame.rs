//! Frames: collecting pages, listing the pages that share each slot, and building the record.
//!
//! The open frame takes new pages in order. Pages of the block that is being sequenced are only
//! referenced; their bytes are copied if the block ends before the frame is full. A frame that
//! starts and ends within one block is compressed directly from the block's buffer.

use std::collections::VecDeque;
use std::sync::Arc;

use zerocopy::IntoBytes;
use zstd::zstd_safe::{self, CCtx, CParameter, ErrorCode};

use super::WriteError;
use super::block::BlockBuffer;
use super::workers::RecordBuffers;
use crate::frame::FrameRef;
use crate::layout::{
    FRAME_MAGIC, MAX_LISTED_PAGES_PER_SLOT, PAGE_SIZE, PAGES_PER_BLOCK_U64, RawFrameHeader,
    RawFrameRef, RawPageRun, codec,
};

/// The pages that a frame's record lists.
#[derive(Default)]
pub(super) struct PageList {
    base_page: u64,
    runs: Vec<RawPageRun>,
    /// Number of listed pages of each slot; as long as the frame has slots.
    listed: Vec<u8>,
}

impl PageList {
    /// Creates the empty list of a frame of which `base_page` is the first page that is listed.
    pub(super) fn new(base_page: u64, slots: u16) -> Self {
        Self {
            base_page,
            runs: Vec::new(),
            listed: vec![0; slots.into()],
        }
    }

    /// Lists `page` as one with the content of `slot`, unless the list has no room for it. Returns
    /// whether the slot has a listed page.
    pub(super) fn list(&mut self, page: u64, slot: u16) -> bool {
        let listed = &mut self.listed[usize::from(slot)];
        let Ok(delta) = u32::try_from(page - self.base_page) else {
            return *listed > 0;
        };
        if usize::from(*listed) == MAX_LISTED_PAGES_PER_SLOT {
            return true;
        }
        *listed += 1;
        if let Some(last) = self.runs.last_mut() {
            let count = last.count.get();
            if last.page.get().checked_add(count.into()) == Some(delta)
                && last.slot.get() + count == slot
            {
                last.count.set(count + 1);
                return true;
            }
        }
        self.runs.push(RawPageRun {
            page: delta.into(),
            slot: slot.into(),
            count: 1.into(),
        });
        true
    }

    /// Returns whether a page is listed for `slot`.
    pub(super) fn has(&self, slot: u16) -> bool {
        self.listed[usize::from(slot)] > 0
    }

    /// Returns the number of slots for which a page is listed.
    pub(super) fn slots_in_use(&self) -> usize {
        self.listed.iter().filter(|count| **count > 0).count()
    }

    /// Returns the length of a record with this list and a payload of `payload` bytes.
    pub(super) fn record_len(&self, payload: usize) -> usize {
        size_of::<RawFrameHeader>() + size_of_val(&self.runs[..]) + payload
    }
}

/// The frame that takes new pages.
#[derive(Default)]
pub(super) struct OpenFrame {
    pages: PageList,
    /// Bytes of the pages from earlier blocks.
    own: Vec<u8>,
    /// Pages of the current block, by their index in it.
    tail: Vec<u16>,
}

impl OpenFrame {
    pub(super) fn slots(&self) -> usize {
        self.pages.listed.len()
    }

    /// Returns whether the page list can name `page`: it counts from the first page in 32 bits.
    pub(super) fn reaches(&self, page: u64) -> bool {
        self.slots() == 0 || u32::try_from(page - self.pages.base_page).is_ok()
    }

    /// Adds page `page`, which is page `index` of the current block, and returns its slot.
    pub(super) fn add(&mut self, page: u64, index: u16) -> u16 {
        if self.slots() == 0 {
            self.pages.base_page = page;
        }
        let slot = u16::try_from(self.slots()).expect("a frame has at most 512 slots");
        self.tail.push(index);
        self.pages.listed.push(0);
        self.list(page, slot);
        slot
    }

    /// Lists `page` as one with the content of `slot`, unless the list has no room for it.
    pub(super) fn list(&mut self, page: u64, slot: u16) {
        self.pages.list(page, slot);
    }

    /// Copies the referenced pages of `block`, which is about to be released. `spare` returns a
    /// buffer to copy into.
    pub(super) fn keep(&mut self, block: &BlockBuffer, spare: impl FnOnce() -> Vec<u8>) {
        if self.tail.is_empty() {
            return;
        }
        if self.own.capacity() == 0 {
            self.own = spare();
            self.own.clear();
        }
        for index in self.tail.drain(..) {
            self.own.extend_from_slice(block.page(index.into()));
        }
    }

    /// Seals the frame. `block` is the current one, if the frame has pages of it.
    pub(super) fn seal(&mut self, number: u64, block: Option<&Arc<BlockBuffer>>) -> Sealed {
        let block = if self.tail.is_empty() {
            None
        } else {
            block.cloned()
        };
        let sealed = Sealed {
            number,
            slots: self.slots(),
            base_page: self.pages.base_page,
            runs: std::mem::take(&mut self.pages.runs),
            own: std::mem::take(&mut self.own),
            tail: std::mem::take(&mut self.tail),
            block,
            is_hot: false,
        };
        self.pages.listed.clear();
        sealed
    }
}

/// A frame that takes no more pages.
pub(super) struct Sealed {
    pub(super) number: u64,
    slots: usize,
    base_page: u64,
    runs: Vec<RawPageRun>,
    own: Vec<u8>,
    tail: Vec<u16>,
    block: Option<Arc<BlockBuffer>>,
    is_hot: bool,
}

impl Sealed {
    /// Creates a hot frame, of which all bytes are known. The frame counts as a copied one.
    pub(super) fn hot(pages: PageList, bytes: Vec<u8>) -> Self {
        debug_assert_eq!(bytes.len(), pages.listed.len() * PAGE_SIZE);
        Self {
            number: 0,
            slots: pages.listed.len(),
            base_page: pages.base_page,
            runs: pages.runs,
            own: bytes,
            tail: Vec::new(),
            block: None,
            is_hot: true,
        }
    }

    /// Returns the number of its pages.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// Returns the bytes of all pages in slot order. They are borrowed in place if they are
    /// contiguous, and otherwise gathered into `gathered`.
    pub(super) fn bytes<'a>(&'a self, gathered: &'a mut Vec<u8>) -> &'a [u8] {
        let Some(block) = &self.block else {
            return &self.own;
        };
        let contiguous = self.tail.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        if self.own.is_empty() && contiguous {
            return block.pages(self.tail[0].into(), self.tail.len());
        }
        gathered.clear();
        gathered.extend_from_slice(&self.own);
        for &index in &self.tail {
            gathered.extend_from_slice(block.page(index.into()));
        }
        gathered
    }
}

/// Range of the zstd block size that a writer requests, in bytes.
const BLOCK_BYTES: std::ops::RangeInclusive<usize> = 32 << 10..=64 << 10;

/// Compression settings for frames.
pub(super) struct Compression {
    level: i32,
    /// Bytes of a zstd block. A reader that waits for one page decodes the blocks up to it first,
    /// so a frame has at least two, unless they would be too short to decode fast.
    block_bytes: u32,
    /// The dictionary's number and its bytes.
    dictionary: Option<(u16, Vec<u8>)>,
}

impl Compression {
    pub(super) fn new(level: i32, frame_pages: usize) -> Self {
        let half = frame_pages * PAGE_SIZE / 2;
        let block = half.clamp(*BLOCK_BYTES.start(), *BLOCK_BYTES.end());
        Self {
            level,
            block_bytes: u32::try_from(block).expect("a block has at most 64 KiB"),
            dictionary: None,
        }
    }

    /// Returns these settings with a dictionary added.
    pub(super) fn with(&self, number: u16, dictionary: &[u8]) -> Self {
        Self {
            dictionary: Some((number, dictionary.to_vec())),
            ..*self
        }
    }

    pub(super) fn level(&self) -> i32 {
        self.level
    }

    /// Returns the dictionary's number, or 0 if there is none; a writer has only one dictionary.
    fn dictionary_number(&self) -> u16 {
        self.dictionary.as_ref().map_or(0, |(number, _)| *number)
    }
}

/// Buffers and contexts that a thread needs to build a frame, reused from one frame to the next.
pub(super) struct Scratch {
    context: CCtx<'static>,
    /// The number of the dictionary for which the context is prepared, if it is.
    prepared: Option<u16>,
    gathered: Vec<u8>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self {
            context: CCtx::create(),
            prepared: None,
            gathered: Vec::new(),
        }
    }

    /// Prepares the context, once.
    fn prepare(&mut self, compression: &Compression) -> Result<(), ErrorCode> {
        let number = compression.dictionary_number();
        if self.prepared == Some(number) {
            return Ok(());
        }
        let context = &mut self.context;
        context.set_parameter(CParameter::CompressionLevel(compression.level))?;
        context.set_parameter(CParameter::MaxBlockSize(compression.block_bytes))?;
        let dictionary = compression.dictionary.as_ref();
        context.load_dictionary(dictionary.map_or(&[], |(_, bytes)| bytes))?;
        self.prepared = Some(number);
        Ok(())
    }
}

/// A frame record and the data that index blocks need about it.
pub(super) struct Built {
    pub(super) number: u64,
    /// The record is the first `len` bytes.
    pub(super) record: Vec<u8>,
    pub(super) len: usize,
    /// The reference; its offset is known when the record is written.
    pub(super) reference: RawFrameRef,
    /// A buffer to reuse.
    pub(super) spare: Vec<u8>,
    /// Set for the copy of a frame of another file, and for a hot frame, which counts as one.
    pub(super) copied: bool,
}

/// Returns the size of a buffer that holds any record of `frame_pages` pages while it is built.
pub(super) fn record_room(frame_pages: usize) -> usize {
    size_of::<RawFrameHeader>()
        + frame_pages * MAX_LISTED_PAGES_PER_SLOT * size_of::<RawPageRun>()
        + zstd_safe::compress_bound(frame_pages * PAGE_SIZE)
}

/// Compresses `sealed` into `record`, which has [`record_room`].
pub(super) fn build(
    sealed: Sealed,
    compression: &Compression,
    scratch: &mut Scratch,
    mut record: Vec<u8>,
) -> Result<Built, WriteError> {
    let prepared = scratch.prepare(compression);
    let head = size_of::<RawFrameHeader>() + size_of_val(&sealed.runs[..]);
    let bytes = sealed.bytes(&mut scratch.gathered);
    debug_assert_eq!(bytes.len(), sealed.slots * PAGE_SIZE);

    let target = &mut record[head..];
    let compressed = prepared
        .and_then(|()| scratch.context.compress2(target, bytes))
        .map_err(|code| WriteError::Compress {
            what: "a frame",
            detail: zstd_safe::get_error_name(code),
        })?;
    let (codec, dictionary, payload) = if compressed < bytes.len() {
        match compression.dictionary_number() {
            0 => (codec::ZSTD, 0, compressed),
            number => (codec::ZSTD_DICTIONARY, number, compressed),
        }
    } else {
        target[..bytes.len()].copy_from_slice(bytes);
        (codec::RAW, 0, bytes.len())
    };

    let slots = u16::try_from(sealed.slots).expect("a frame has at most 512 slots");
    let list = (&sealed.runs[..], sealed.base_page);
    let encoding = (codec, dictionary);
    let len = head + payload;
    let reference = complete(&mut record[..len], list, slots, encoding);
    Ok(Built {
        number: sealed.number,
        record,
        len,
        reference,
        spare: sealed.own,
        copied: sealed.is_hot,
    })
}

/// Writes header and list of a record that has its payload in place, and returns its reference.
/// `encoding` is codec and dictionary.
fn complete(
    record: &mut [u8],
    (runs, base_page): (&[RawPageRun], u64),
    slots: u16,
    (codec, dictionary): (u8, u16),
) -> RawFrameRef {
    let head = size_of::<RawFrameHeader>() + size_of_val(runs);
    let header = RawFrameHeader {
        magic: FRAME_MAGIC.into(),
        slots: slots.into(),
        run_count: u16::try_from(runs.len())
            .expect("at most 4 runs for each slot")
            .into(),
        dictionary: dictionary.into(),
        codec,
        reserved: 0,
        payload_len: u32::try_from(record.len() - head)
            .expect("a frame has at most 2 MiB")
            .into(),
        base_page: base_page.into(),
    };
    record[..size_of::<RawFrameHeader>()].copy_from_slice(header.as_bytes());
    record[size_of::<RawFrameHeader>()..head].copy_from_slice(runs.as_bytes());
    RawFrameRef {
        offset: 0.into(),
        stored_len: u32::try_from(record.len())
            .expect("a record has at most 2.1 MiB")
            .into(),
        crc: crc32fast::hash(record).into(),
        slots: slots.into(),
        layer: 0.into(),
        dictionary: dictionary.into(),
        codec,
        reserved: 0,
    }
}

/// Copies a frame with its payload as it is, for a file in which it has the page list `pages` and
/// its dictionary, if any, has the number `dictionary`.
pub(super) fn copy(
    frame: &FrameRef,
    payload: &[u8],
    pages: &PageList,
    dictionary: u16,
    buffers: &RecordBuffers,
) -> Built {
    let (head, len) = (pages.record_len(0), pages.record_len(payload.len()));
    let mut record = buffers.get(len);
    record[head..len].copy_from_slice(payload);
    let encoding = (frame.to_raw(0).codec, dictionary);
    let list = (&pages.runs[..], pages.base_page);
    let reference = complete(&mut record[..len], list, frame.slots(), encoding);
    Built {
        // The number is given when it is handed out.
        number: 0,
        record,
        len,
        reference,
        spare: Vec::new(),
        copied: true,
    }
}

/// Number of frames that are kept besides those that can be shared. While a block is processed, at
/// most 512 frames are sealed and one stays open, and its index block is written when the last of
/// them is.
const MARGIN: u64 = 2 * PAGES_PER_BLOCK_U64;

/// References of the newest written frames, so that later pages can share theirs.
pub(super) struct FrameRefs {
    /// Number of frames, counted back from the newest, that can be shared.
    bound: u64,
    kept: VecDeque<RawFrameRef>,
    /// Number of the first of `kept`.
    first: u64,
}

impl FrameRefs {
    pub(super) fn new(bound: u64) -> Self {
        let most = usize::try_from(bound + MARGIN).expect("bounded by the options");
        Self {
            bound,
            // Untouched capacity takes no memory, and growing would take twice as much.
            kept: VecDeque::with_capacity(most),
            first: 0,
        }
    }

    /// Returns the number of frames written.
    pub(super) fn written(&self) -> u64 {
        self.first + self.kept.len() as u64
    }

    /// Returns the number of the oldest frame that a block may share if it starts when `sealed`
    /// frames are sealed.
    pub(super) fn oldest_shared(&self, sealed: u64) -> u64 {
        sealed.saturating_sub(self.bound)
    }

    pub(super) fn push(&mut self, reference: RawFrameRef) {
        if self.kept.len() as u64 == self.bound + MARGIN {
            self.kept.pop_front();
            self.first += 1;
        }
        self.kept.push_back(reference);
    }

    pub(super) fn get(&self, number: u64) -> RawFrameRef {
        let index = number.checked_sub(self.first);
        self.kept[usize::try_from(index.expect("a frame that is kept")).expect("an index")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(n: u64) -> RawFrameRef {
        RawFrameRef {
            offset: n.into(),
            stored_len: 1.into(),
            crc: 0.into(),
            slots: 1.into(),
            layer: 0.into(),
            dictionary: 0.into(),
            codec: codec::RAW,
            reserved: 0,
        }
    }

    #[test]
    fn newest_references_are_kept() {
        let mut refs = FrameRefs::new(3);
        for n in 0..5000 {
            assert_eq!(refs.written(), n);
            refs.push(reference(n));
            // The worst case: a block that began when its newest frame had not been started, with
            // 512 frames sealed meanwhile.
            let began = (n + 1).saturating_sub(513);
            for shared in refs.oldest_shared(began)..=n {
                assert_eq!(refs.get(shared).offset.get(), shared);
            }
        }
        assert_eq!(refs.kept.len(), 3 + 1024);
    }

    #[test]
    fn list_names_each_slot_at_most_four_times() {
        let mut open = OpenFrame::default();
        for page in 0..8 {
            open.add(page, 0);
        }
        for page in 8..1000 {
            open.list(page, u16::try_from(page % 8).unwrap());
        }
        let sealed = open.seal(0, None);
        let listed: usize = sealed
            .runs
            .iter()
            .map(|run| usize::from(run.count.get()))
            .sum();
        assert_eq!(listed, 8 * MAX_LISTED_PAGES_PER_SLOT);
        assert_eq!(
            sealed.runs.len(),
            MAX_LISTED_PAGES_PER_SLOT,
            "consecutive pages share a run"
        );
        assert_eq!(open.slots(), 0);
    }

    #[test]
    fn pages_beyond_the_list_reach_are_refused_or_omitted() {
        let mut open = OpenFrame::default();
        assert!(open.reaches(u64::MAX));
        open.add(512, 0);
        let last = 512 + u64::from(u32::MAX);
        assert!(open.reaches(last) && !open.reaches(last + 1));
        open.list(last, 0);
        open.list(last + 1, 0);
        assert_eq!(open.seal(0, None).runs.len(), 2);
    }
}
