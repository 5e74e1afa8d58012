//! Index blocks on output.

use zerocopy::IntoBytes;
use zstd::zstd_safe::{self, CCtx};

use super::WriteError;
use super::frame::FrameRefs;
use crate::layout::{
    INDEX_MAGIC, MAX_INDEX_BLOCK_BYTES, PAGES_PER_BLOCK, RawFrameRef, RawIndexHeader, RawPageEntry,
    RawTopEntry, codec, page_kind, top_kind,
};

/// Compression level of index blocks. They are small, and their size hardly depends on the level.
const LEVEL: i32 = 3;

/// A frame that an index block names.
#[derive(Clone, Copy, PartialEq)]
enum NamedFrame {
    /// The number of a frame of this file.
    Own(u64),
    /// A frame of an ancestor.
    Ancestor(RawFrameRef),
    /// The number of a copied frame of this file.
    Copied(u32),
}

/// An index block whose frames may not be written yet.
pub(super) struct Draft {
    /// Its position in the top table.
    pub(super) block: usize,
    pub(super) first_page: u64,
    entries: Vec<RawPageEntry>,
    /// Frames that it names.
    frames: Vec<NamedFrame>,
    words: Vec<u64>,
    /// Number of frames that must be written before it: its own and those of the blocks before it,
    /// so that the order of the file doesn't depend on the speed of the threads.
    pub(super) needs: u64,
    /// Number of copied frames that must be written before it.
    pub(super) needs_copies: usize,
}

impl Draft {
    pub(super) fn new(block: usize, first_page: u64, needs: u64, needs_copies: usize) -> Self {
        Self {
            block,
            first_page,
            entries: Vec::with_capacity(PAGES_PER_BLOCK),
            frames: Vec::new(),
            words: Vec::new(),
            needs,
            needs_copies,
        }
    }

    pub(super) fn push_stored(&mut self, frame: u64, slot: u16) {
        self.needs = self.needs.max(frame + 1);
        self.push_frame(NamedFrame::Own(frame), slot);
    }

    /// Appends a page that lies in an ancestor's frame.
    pub(super) fn push_ancestor(&mut self, frame: RawFrameRef, slot: u16) {
        self.push_frame(NamedFrame::Ancestor(frame), slot);
    }

    /// Appends a page that lies in a copied frame.
    pub(super) fn push_copied(&mut self, frame: u32, slot: u16) {
        self.push_frame(NamedFrame::Copied(frame), slot);
    }

    fn push_frame(&mut self, frame: NamedFrame, slot: u16) {
        let frame = number(&mut self.frames, frame);
        self.entries.push(RawPageEntry {
            frame: frame.into(),
            slot: slot.into(),
        });
    }

    pub(super) fn push_fill(&mut self, word: u64) {
        let slot = number(&mut self.words, word);
        self.entries.push(RawPageEntry {
            frame: page_kind::FILL.into(),
            slot: slot.into(),
        });
    }

    pub(super) fn push_unavailable(&mut self) {
        self.entries.push(RawPageEntry {
            frame: page_kind::UNAVAILABLE.into(),
            slot: 0.into(),
        });
    }

    /// Appends the block's uncompressed bytes to `bytes`.
    fn encode(&self, refs: &FrameRefs, copied: &[RawFrameRef], bytes: &mut Vec<u8>) {
        let count = |len: usize| u16::try_from(len).expect("at most one for each of 512 pages");
        let header = RawIndexHeader {
            magic: INDEX_MAGIC.into(),
            page_count: count(self.entries.len()).into(),
            frame_count: count(self.frames.len()).into(),
            fill_count: count(self.words.len()).into(),
            reserved: [0; 6],
            first_page: self.first_page.into(),
            reserved2: 0.into(),
        };
        bytes.clear();
        bytes.extend_from_slice(header.as_bytes());
        for &frame in &self.frames {
            let reference = match frame {
                NamedFrame::Own(number) => refs.get(number),
                NamedFrame::Ancestor(reference) => reference,
                NamedFrame::Copied(number) => copied[number as usize],
            };
            bytes.extend_from_slice(reference.as_bytes());
        }
        for word in &self.words {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(self.entries.as_bytes());
    }
}

/// Returns the index of `value` in `list`, and appends it if it is new.
fn number<T: PartialEq>(list: &mut Vec<T>, value: T) -> u16 {
    // The newest values are looked up most often.
    let at = list
        .iter()
        .rposition(|known| *known == value)
        .unwrap_or_else(|| {
            list.push(value);
            list.len() - 1
        });
    u16::try_from(at).expect("at most one for each of 512 pages")
}

/// Compresses index blocks.
pub(super) struct IndexEncoder {
    context: CCtx<'static>,
    plain: Vec<u8>,
    packed: Vec<u8>,
}

impl IndexEncoder {
    pub(super) fn new() -> Self {
        Self {
            context: CCtx::create(),
            plain: Vec::with_capacity(MAX_INDEX_BLOCK_BYTES),
            packed: vec![0; zstd_safe::compress_bound(MAX_INDEX_BLOCK_BYTES)],
        }
    }

    /// Returns the stored bytes of `draft` and its entry in the top table for a block at `offset`.
    pub(super) fn encode(
        &mut self,
        draft: &Draft,
        refs: &FrameRefs,
        copied: &[RawFrameRef],
        offset: u64,
    ) -> Result<(&[u8], RawTopEntry), WriteError> {
        draft.encode(refs, copied, &mut self.plain);
        let packed = self
            .context
            .compress(&mut self.packed[..], &self.plain, LEVEL)
            .map_err(|code| WriteError::Compress {
                what: "an index block",
                detail: zstd_safe::get_error_name(code),
            })?;
        let (codec, stored) = if packed < self.plain.len() {
            (codec::ZSTD, &self.packed[..packed])
        } else {
            (codec::RAW, &self.plain[..])
        };
        let len = |len: usize| u16::try_from(len).expect("an index block has at most 16 KiB");
        let entry = RawTopEntry {
            kind: top_kind::BLOCK,
            codec,
            layer: 0.into(),
            stored_len: len(stored.len()).into(),
            decoded_len: len(self.plain.len()).into(),
            word_or_offset: offset.into(),
            crc: crc32fast::hash(stored).into(),
            ancestor_block: 0.into(),
        };
        Ok((stored, entry))
    }
}
