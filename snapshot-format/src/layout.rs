//! The on-disk layout, byte for byte: the structs and constants of `FORMAT.md`.
//!
//! Every struct is little-endian with alignment 1 and can be read from any bytes. `Raw` in its name
//! says that nobody has checked it: the types without `Raw`, like [`FrameRef`](crate::FrameRef) for
//! [`RawFrameRef`], are the checked ones that the rest of the crate works with.
//! `tests/format_md.rs` compares the tables of `FORMAT.md`, which names the structs without `Raw`,
//! with this file.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of the format that this crate writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes of a page: the unit of every index entry.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] as a count for offsets.
pub const PAGE_SIZE_U64: u64 = 4096;

/// Pages described by one index block, and so by one entry of the top table: 2 MiB of memory.
pub const PAGES_PER_BLOCK: usize = 512;
/// [`PAGES_PER_BLOCK`] as a count for page numbers.
pub const PAGES_PER_BLOCK_U64: u64 = 512;

/// First bytes of the file.
pub const HEADER_MAGIC: [u8; 8] = *b"snaprst\x1a";
/// Last bytes of the file: without them the file is incomplete.
pub const TRAILER_MAGIC: [u8; 8] = *b"\x1atsrpans";
/// First bytes of an index block, before compression.
pub const INDEX_MAGIC: u32 = u32::from_le_bytes(*b"sidx");
/// First bytes of a frame record.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"sfrm");
/// First bytes of a trace, which is a file of its own.
pub const TRACE_MAGIC: [u8; 8] = *b"snaptrc\x1a";
/// Version of the traces that this crate writes and reads.
pub const TRACE_VERSION: u32 = 1;

/// Bytes of the header and of the trailer.
pub const HEADER_BYTES: usize = 4096;
/// See [`HEADER_BYTES`].
pub const TRAILER_BYTES: usize = 4096;
/// Sections that the trailer's directory has room for.
pub const MAX_SECTIONS: usize = 64;

/// Most slots of a frame: 2 MiB decoded, so that one decode buffer serves every frame.
pub const MAX_FRAME_SLOTS: usize = 512;
/// Pages that one frame's list may name for each slot that the frame has, all together, however
/// they are spread over the slots: bounds what one decode installs.
pub const MAX_LISTED_PAGES_PER_SLOT: usize = 4;
/// Bytes of the shortest frame record: header, one run of its list, one byte of payload.
pub const MIN_FRAME_RECORD_BYTES: usize = size_of::<RawFrameHeader>() + size_of::<RawPageRun>() + 1;
/// Most bytes of a stored frame record: header, a full page list, and a raw payload.
pub const MAX_FRAME_RECORD_BYTES: usize = size_of::<RawFrameHeader>()
    + MAX_FRAME_SLOTS * MAX_LISTED_PAGES_PER_SLOT * size_of::<RawPageRun>()
    + MAX_FRAME_SLOTS * PAGE_SIZE;
/// Most bytes of an index block, stored or decoded: bounds the one read of a look-up.
pub const MAX_INDEX_BLOCK_BYTES: usize = 16 * 1024;
/// Most pages of a snapshot (256 TiB): keeps every page number times [`PAGE_SIZE`] within `u64`
/// and every bitmap's size within memory that a 64-bit machine can map.
pub const MAX_PAGES: u64 = 1 << 36;
/// Most regions, and most bytes of the region section.
pub const MAX_REGIONS: u64 = 1 << 20;
/// Most bytes of a region's, working set's or attachment's name.
pub const MAX_NAME_BYTES: usize = 4096;
/// Most fill runs: each is a range that a restore leaves out of its registration.
pub const MAX_FILL_RUNS: usize = 64;
/// Most dictionaries of a snapshot.
pub const MAX_DICTIONARIES: usize = 64;
/// Most bytes of one dictionary.
pub const MAX_DICTIONARY_BYTES: usize = 1 << 20;
/// Most ancestors of a snapshot.
pub const MAX_ANCESTORS: usize = 1024;
/// Most working sets, and most attachments.
pub const MAX_BLOBS: usize = 4096;
/// Most bytes of a section that is read whole (the index top table excepted).
pub const MAX_SECTION_BYTES: u64 = 256 << 20;

/// Most bytes of the property section.
pub const MAX_PROPERTIES_BYTES: u64 = 1 << 20;
/// Most touches of a trace: 64 GiB of memory, as many pages as a working set has room for.
pub const MAX_TRACE_TOUCHES: u64 = 1 << 24;
/// Bytes at the end of the file that a reader opens it with: one read, which in an ordinary
/// snapshot brings the regions and the top table together with the trailer.
pub const TAIL_BYTES: usize = 64 << 10;

/// Bits of [`RawRegionEntry::flags`].
pub mod region_flags {
    /// The owner could read the memory.
    pub const READ: u32 = 1 << 0;
    /// The owner could write it.
    pub const WRITE: u32 = 1 << 1;
    /// The owner could execute it.
    pub const EXECUTE: u32 = 1 << 2;
    /// The owner's mapping was shared.
    pub const SHARED: u32 = 1 << 8;
    /// All bits that version 1 defines.
    pub const KNOWN: u32 = READ | WRITE | EXECUTE | SHARED;
    /// Bits that later writers may set as hints: a reader ignores those that it doesn't know.
    pub const HINTS: u32 = 0xffff_0000;
}

/// Bits of `required_features`: a reader refuses a file that sets one it doesn't know.
pub mod required {
    /// Some index entries point into ancestors.
    pub const ANCESTORS: u64 = 1 << 0;
    /// All bits that version 1 defines.
    pub const KNOWN: u64 = ANCESTORS;
    /// Name of each bit, for messages.
    pub const NAMES: &[(u64, &str)] = &[(ANCESTORS, "ancestors")];
}

/// Bits of `optional_features`: a reader may ignore those it doesn't know.
pub mod optional {
    /// Dictionaries are present. Frames name theirs, so nothing depends on this bit.
    pub const DICTIONARIES: u64 = 1 << 0;
    /// Strong hashes of frames and index blocks are present. Version 1 writers never set it.
    pub const STRONG_HASHES: u64 = 1 << 1;
}

/// The first 4 KiB of the file.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// [`HEADER_MAGIC`].
    pub magic: [u8; 8],
    /// [`FORMAT_VERSION`].
    pub version: U32,
    /// [`PAGE_SIZE`].
    pub page_size: U32,
    /// Features known before the first page; the trailer's bits are the authority.
    pub required_features: U64,
    /// See `required_features`.
    pub optional_features: U64,
    /// Id of this layout of frames: random, new for every file written.
    pub snapshot_id: [u8; 16],
    /// Zero.
    pub reserved: [u8; 4044],
    /// CRC-32 (IEEE) of the bytes before it.
    pub crc: U32,
}

/// The last 4 KiB of the file.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawTrailer {
    /// [`FORMAT_VERSION`], as in the header.
    pub version: U32,
    /// Used entries of `sections`.
    pub section_count: U32,
    /// All required features of the file.
    pub required_features: U64,
    /// All optional features of the file.
    pub optional_features: U64,
    /// Same id as in the header.
    pub snapshot_id: [u8; 16],
    /// Length of the whole file, this trailer included.
    pub file_bytes: U64,
    /// Totals of the snapshot's content.
    pub summary: RawSummary,
    /// Zero, unless [`optional::STRONG_HASHES`] is set: then the BLAKE3 hash of the section that
    /// holds the hashes of all others, of the index blocks and of the frames.
    pub strong_root: [u8; 32],
    /// Zero, and ignored.
    pub unused: [u8; 650],
    /// Zero.
    pub reserved: [u8; 650],
    /// Locations of the sections, in any order; unused entries are zero.
    pub sections: [RawSectionEntry; MAX_SECTIONS],
    /// CRC-32 (IEEE) of the bytes before it.
    pub crc: U32,
    /// [`TRAILER_MAGIC`].
    pub magic: [u8; 8],
}

/// Counts of a snapshot, over the pages of its regions, ancestors' pages included.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawSummary {
    /// Pages of all regions.
    pub pages: U64,
    /// Pages that are zero.
    pub zero_pages: U64,
    /// Pages that repeat an 8-byte word other than zero.
    pub fill_pages: U64,
    /// Distinct page contents in frames of this file.
    pub stored_pages: U64,
    /// Pages that share a stored page with an earlier page.
    pub duplicate_pages: U64,
    /// Pages that could not be read when the snapshot was taken.
    pub unavailable_pages: U64,
    /// Frames in this file.
    pub frames: U64,
    /// Decoded bytes of a full frame, as configured in the writer.
    pub frame_bytes: U64,
    /// Bytes of all frame records.
    pub stored_bytes: U64,
    /// Bytes of all index blocks in this file.
    pub index_bytes: U64,
    /// Digest of the content, the root of the tree over the block digests.
    pub content_digest: [u8; 32],
    /// Digest of the content, the regions' descriptions, and the attachments.
    pub state_digest: [u8; 32],
}

impl SectionKind {
    /// All kinds that version 1 defines.
    pub const ALL: [Self; 9] = [
        Self::Regions,
        Self::Top,
        Self::FillRuns,
        Self::Dictionaries,
        Self::WorkingSets,
        Self::Attachments,
        Self::Properties,
        Self::Ancestors,
        Self::BlockDigests,
    ];

    /// Returns the kind that `number` stands for.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// Location of one section.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawSectionEntry {
    /// A [`SectionKind`] as a number.
    pub kind: U32,
    /// CRC-32 (IEEE) of the section's bytes.
    pub crc: U32,
    /// First byte in the file.
    pub offset: U64,
    /// Length in bytes.
    pub len: U64,
    /// Records in the section.
    pub count: U64,
    /// Zero.
    pub reserved: U64,
}

/// Kind of content of a section. The numbers are part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum SectionKind {
    /// [`RawRegionEntry`] records, then the names.
    Regions = 1,
    /// One [`RawTopEntry`] for each index block of the page-number space.
    Top = 2,
    /// [`RawFillRun`] records, longest first.
    FillRuns = 3,
    /// [`RawBlobEntry`] records; a blob is a zstd dictionary, its `tag` the number that frames use.
    Dictionaries = 4,
    /// [`RawBlobEntry`] records, then the names; a blob is an array of [`RawWorkingSetRun`].
    WorkingSets = 5,
    /// [`RawBlobEntry`] records, then the names; a blob is the attachment.
    Attachments = 6,
    /// UTF-8 lines `key=value`, sorted by key: the writer of the file, its source and its options.
    Properties = 7,
    /// [`RawAncestorEntry`] records; layer n is record n - 1.
    Ancestors = 8,
    /// The 32-byte digest of each index block's content.
    BlockDigests = 9,
}

/// One region: a contiguous range of the owner's memory.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawRegionEntry {
    /// Address space: 0 for a VM, one for each process of a tree.
    pub space: U32,
    /// Protection bits as `PROT_*` (1 read, 2 write, 4 execute), bit 8 shared, hints
    /// from bit 16 on; 0 if unknown.
    pub flags: U32,
    /// Address in the owner's terms (guest-physical or virtual), a multiple of the page size.
    pub start: U64,
    /// Length in pages.
    pub pages: U64,
    /// Number of its first page, a multiple of 512; regions follow each other without gaps of a
    /// whole index block.
    pub first_page: U64,
    /// Page size of the owner's mapping, as a power of two (12 to 40); a hint.
    pub page_shift: U32,
    /// Bytes of the name.
    pub name_len: U32,
    /// Start of the name, counted from the end of the records.
    pub name_offset: U64,
    /// Zero.
    pub reserved: U64,
    /// Zero, and ignored.
    pub unused: U64,
}

/// One entry of the top table, which describes an index block's 512 pages.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawTopEntry {
    /// [`top_kind`].
    pub kind: u8,
    /// [`codec`] of the stored index block: raw or zstd.
    pub codec: u8,
    /// Layer that holds the index block: 0 is this file, n the n-th ancestor.
    pub layer: U16,
    /// Stored length of the index block.
    pub stored_len: U16,
    /// Decoded length of the index block.
    pub decoded_len: U16,
    /// The repeated word of a fill, or the first byte of the index block.
    pub word_or_offset: U64,
    /// CRC-32 (IEEE) of the stored index block.
    pub crc: U32,
    /// Number of the block in the ancestor that the index block lies in; 0 in layer 0.
    pub ancestor_block: U32,
}

/// Values of [`RawTopEntry::kind`].
pub mod top_kind {
    /// All pages are one fill; no index block.
    pub const FILL: u8 = 0;
    /// An index block describes the pages.
    pub const BLOCK: u8 = 1;
    /// No page could be read.
    pub const UNAVAILABLE: u8 = 2;
}

/// Encodings of stored bytes.
pub mod codec {
    /// Stored without compression.
    pub const RAW: u8 = 0;
    /// One zstd frame, without a dictionary.
    pub const ZSTD: u8 = 1;
    /// One zstd frame with the dictionary whose number stands beside the codec.
    pub const ZSTD_DICTIONARY: u8 = 2;
}

/// Start of an index block (after decompression). Then follow, without padding: `frame_count`
/// [`RawFrameRef`], `fill_count` words of 8 bytes, `page_count` [`RawPageEntry`].
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawIndexHeader {
    /// [`INDEX_MAGIC`].
    pub magic: U32,
    /// Pages described: 512, or fewer in the last block of a region.
    pub page_count: U16,
    /// Frames named.
    pub frame_count: U16,
    /// Fill words.
    pub fill_count: U16,
    /// Zero.
    pub reserved: [u8; 6],
    /// Number of its first page in the file that holds it, so that a block in the place of another
    /// is detected.
    pub first_page: U64,
    /// Zero.
    pub reserved2: U64,
}

/// Location and encoding of a frame.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawFrameRef {
    /// First byte of the frame record.
    pub offset: U64,
    /// Bytes of the record: header, page list and payload.
    pub stored_len: U32,
    /// CRC-32 (IEEE) of the record.
    pub crc: U32,
    /// Pages stored in the frame; the decoded length is this times 4 KiB.
    pub slots: U16,
    /// Layer that holds the frame, as in [`RawTopEntry::layer`].
    pub layer: U16,
    /// Number of the dictionary, or 0.
    pub dictionary: U16,
    /// [`codec`] of the payload.
    pub codec: u8,
    /// Zero.
    pub reserved: u8,
}

/// Content of one page.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawPageEntry {
    /// Number of the frame in this index block, or one of [`page_kind`].
    pub frame: U16,
    /// Slot in the frame, or number of the fill word in this index block, or 0.
    pub slot: U16,
}

/// Values of [`RawPageEntry::frame`] that name no frame.
pub mod page_kind {
    /// The page repeats the word numbered by `slot`.
    pub const FILL: u16 = 0xffff;
    /// The page could not be read when the snapshot was taken.
    pub const UNAVAILABLE: u16 = 0xfffe;
}

/// Start of a frame record. Then follow `run_count` [`RawPageRun`] and the payload.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawFrameHeader {
    /// [`FRAME_MAGIC`].
    pub magic: U32,
    /// Same meaning as in [`RawFrameRef`].
    pub slots: U16,
    /// Runs of pages that follow.
    pub run_count: U16,
    /// Same meaning as in [`RawFrameRef`].
    pub dictionary: U16,
    /// Same meaning as in [`RawFrameRef`].
    pub codec: u8,
    /// Zero.
    pub reserved: u8,
    /// Bytes of the payload.
    pub payload_len: U32,
    /// Lowest page number that a run names; runs count from it.
    pub base_page: U64,
}

/// Consecutive pages that lie in consecutive slots of a frame.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawPageRun {
    /// First page, counted from the frame's `base_page`.
    pub page: U32,
    /// Slot of the first page.
    pub slot: U16,
    /// Pages, at least 1.
    pub count: U16,
}

/// A range of pages that all repeat one word.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawFillRun {
    /// First page.
    pub first_page: U64,
    /// Pages.
    pub pages: U64,
    /// The word; version 1 writers list zero runs only.
    pub word: U64,
}

/// One named or numbered blob of a table section.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawBlobEntry {
    /// First byte in the file.
    pub offset: U64,
    /// Length in bytes.
    pub len: U64,
    /// CRC-32 (IEEE) of the blob.
    pub crc: U32,
    /// Number of a dictionary; otherwise 0.
    pub tag: U32,
    /// Start of the name, counted from the end of the records.
    pub name_offset: U32,
    /// Bytes of the name.
    pub name_len: U32,
}

/// Consecutive pages of a working set, which lists them in order of first touch.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawWorkingSetRun {
    /// First page.
    pub first_page: U64,
    /// Pages.
    pub pages: U64,
}

/// One ancestor of a layered snapshot.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawAncestorEntry {
    /// Its snapshot id.
    pub snapshot_id: [u8; 16],
    /// Its length in bytes, so that a file of the same id but another length is refused.
    pub file_bytes: U64,
    /// Zero.
    pub reserved: U64,
    /// BLAKE3 hash of its trailer, or zero if it isn't known.
    pub trailer_hash: [u8; 32],
}

/// The beginning of a trace.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawTraceHeader {
    /// [`TRACE_MAGIC`].
    pub magic: [u8; 8],
    /// [`TRACE_VERSION`].
    pub version: U32,
    /// Zero.
    pub flags: U32,
    /// Content digest of the memory.
    pub content_digest: [u8; 32],
    /// Page numbers of the memory.
    pub page_slots: U64,
    /// Nanoseconds since 1970.
    pub begun: U64,
    /// Pages that were present when the recording began.
    pub present_at_start: U64,
    /// Touches that follow.
    pub count: U64,
    /// One of [`trace_end`].
    pub end: U32,
    /// Zero.
    pub reserved: [u8; 44],
}

/// One first touch of a trace.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawTraceTouch {
    /// The page.
    pub page: U64,
    /// Microseconds since the recording began.
    pub at: U32,
    /// One of [`touch_reason`].
    pub reason: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Values of [`RawTraceHeader::end`].
pub mod trace_end {
    /// The caller stopped the recording.
    pub const STOPPED: u32 = 1;
    /// The rate of first touches had settled.
    pub const SETTLED: u32 = 2;
    /// The time limit was reached.
    pub const TIME_LIMIT: u32 = 3;
    /// The limit of pages was reached.
    pub const PAGE_LIMIT: u32 = 4;
    /// All pages were present.
    pub const COMPLETED: u32 = 5;
    /// The owner exited or unmapped its memory.
    pub const OWNER_ENDED: u32 = 6;
    /// The trace was merged from others.
    pub const MERGED: u32 = 7;
}

/// Values of [`RawTraceTouch::reason`].
pub mod touch_reason {
    /// A fault.
    pub const DEMAND: u8 = 0;
    /// Another means: the page was present.
    pub const PRESENT: u8 = 1;
}

const _: () = {
    assert!(size_of::<RawTraceHeader>() == 128);
    assert!(size_of::<RawTraceTouch>() == 16);
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(size_of::<RawTrailer>() == TRAILER_BYTES);
    assert!(size_of::<RawSummary>() == 144);
    assert!(size_of::<RawSectionEntry>() == 40);
    assert!(size_of::<RawRegionEntry>() == 64);
    assert!(size_of::<RawTopEntry>() == 24);
    assert!(size_of::<RawIndexHeader>() == 32);
    assert!(size_of::<RawFrameRef>() == 24);
    assert!(size_of::<RawPageEntry>() == 4);
    assert!(size_of::<RawFrameHeader>() == 24);
    assert!(size_of::<RawPageRun>() == 8);
    assert!(size_of::<RawFillRun>() == 24);
    assert!(size_of::<RawBlobEntry>() == 32);
    assert!(size_of::<RawWorkingSetRun>() == 16);
    assert!(size_of::<RawAncestorEntry>() == 64);
    // An index block never exceeds its limit, even if every page has a frame of its own: a page
    // costs either a frame or a fill word, besides its entry.
    assert!(
        size_of::<RawIndexHeader>()
            + PAGES_PER_BLOCK * (size_of::<RawFrameRef>() + size_of::<RawPageEntry>())
            <= MAX_INDEX_BLOCK_BYTES
    );
};
