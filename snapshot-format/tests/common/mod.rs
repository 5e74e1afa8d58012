//! A small snapshot assembled by hand, field by field, without the writer: an independent
//! implementation of the format. It records the position of every part, so that tests can change a
//! field and recompute the checksums around it.

#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "all lengths are small and written here"
)]

use std::ops::Range;
use std::sync::Arc;

use snapshot_format::digest::{self, ContentHasher, Digest, UniformBlocks};
use snapshot_format::layout::{
    self, FORMAT_VERSION, FRAME_MAGIC, HEADER_BYTES, HEADER_MAGIC, INDEX_MAGIC, PAGE_SIZE,
    RawBlobEntry, RawFillRun, RawFrameHeader, RawFrameRef, RawHeader, RawIndexHeader, RawPageEntry,
    RawPageRun, RawRegionEntry, RawSectionEntry, RawTopEntry, RawTrailer, RawWorkingSetRun,
    SectionKind, TRAILER_BYTES, TRAILER_MAGIC, codec, page_kind, top_kind,
};
use snapshot_format::{MemoryStore, OpenError, Snapshot};
use zerocopy::{FromZeros, IntoBytes};
use zstd::zstd_safe;

pub const CC: u64 = 0xcccc_cccc_cccc_cccc;
pub const AB: u64 = 0xabab_abab_abab_abab;
pub const DICTIONARY: u16 = 7;
pub const ID: [u8; 16] = *b"0123456789abcdef";

/// Content of a page of the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Fill(u64),
    /// Bytes of [`pattern`] with this seed.
    Stored(u64),
    Unavailable,
}

/// (space, start, pages, name) of the sample's regions.
pub const REGIONS: [(u32, u64, u64, &str); 3] = [
    (0, 0, 1000, "ram"),
    (1, 0x7f00_0000_0000, 520, "stack"),
    (1, 0xffff_ffff_ffff_b000, 5, "gone"),
];
/// Number of each region's first page.
pub const FIRST_PAGES: [u64; 3] = [0, 1024, 2048];
pub const BLOCKS: u64 = 5;

/// Returns the content of a page number of the sample; none for unused numbers.
pub fn content(page: u64) -> Option<Content> {
    Some(match page {
        // The second page with the same content lies in the same block, the third in another.
        20 => Content::Stored(4),
        520 => Content::Stored(0),
        0..20 | 512..520 | 1536 => Content::Stored(page),
        21..30 => Content::Fill(CC),
        30..512 | 521..600 | 601..1000 | 1024..1536 => Content::Fill(0),
        600 | 2048..2053 => Content::Unavailable,
        1537..1544 => Content::Fill(AB),
        _ => return None,
    })
}

/// Returns 4096 bytes that compress about twofold and differ from seed to seed.
pub fn pattern(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut bytes = Vec::with_capacity(PAGE_SIZE);
    for word in 0..(PAGE_SIZE / 8) as u64 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = if word % 2 == 0 { state } else { word };
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Returns the 4096 bytes of a page; none if it is unavailable or unused.
pub fn page_bytes(page: u64) -> Option<Vec<u8>> {
    match content(page)? {
        Content::Fill(word) => Some(word.to_le_bytes().repeat(PAGE_SIZE / 8)),
        Content::Stored(seed) => Some(pattern(seed)),
        Content::Unavailable => None,
    }
}

struct FrameSpec {
    /// Page whose content lies in each slot.
    pages: Range<u64>,
    codec: u8,
    dictionary: u16,
}

/// Returns the frames of the sample, by the pages that were stored first.
fn frame_specs() -> [FrameSpec; 4] {
    [
        FrameSpec {
            pages: 0..4,
            codec: codec::RAW,
            dictionary: 0,
        },
        FrameSpec {
            pages: 4..20,
            codec: codec::ZSTD,
            dictionary: 0,
        },
        FrameSpec {
            pages: 512..520,
            codec: codec::ZSTD_DICTIONARY,
            dictionary: DICTIONARY,
        },
        FrameSpec {
            pages: 1536..1537,
            codec: codec::ZSTD,
            dictionary: 0,
        },
    ]
}

/// Returns the number of the frame that holds a content, and its slot there.
pub fn frame_of(seed: u64) -> (usize, u16) {
    let frame = frame_specs()
        .iter()
        .position(|frame| frame.pages.contains(&seed))
        .expect("stored in some frame");
    (frame, (seed - frame_specs()[frame].pages.start) as u16)
}

pub fn dictionary_bytes() -> Vec<u8> {
    pattern(512).into_iter().chain(pattern(513)).collect()
}

/// Function that makes a payload of bytes.
pub type Pack<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;

/// The sample's bytes and the positions of its parts.
#[derive(Clone)]
pub struct Sample {
    pub bytes: Vec<u8>,
    /// Frame records.
    pub frames: Vec<Range<usize>>,
    /// Index blocks as stored, with their numbers; the last one is compressed.
    pub blocks: Vec<(u64, Range<usize>)>,
    /// Positions of the frame references in raw index blocks, with the frames' numbers.
    pub frame_refs: Vec<(usize, usize)>,
    /// (kind of the table, number in it, bytes).
    pub blobs: Vec<(SectionKind, usize, Range<usize>)>,
    /// (kind as a number, bytes), in the order of the directory.
    pub sections: Vec<(u32, Range<usize>)>,
}

/// The kind of a section that no version defines.
pub const UNKNOWN_KIND: u32 = 1000;

impl Sample {
    pub fn new() -> Self {
        Self::build(true)
    }

    /// Builds the sample. With `inline_regions`, the region section lies right before the top
    /// table.
    pub fn build(inline_regions: bool) -> Self {
        Self::build_with(inline_regions, &|raw| compress(raw, &[]))
    }

    /// Builds the sample; `pack` compresses the second frame's pages and the fourth index block.
    #[expect(
        clippy::too_many_lines,
        reason = "one thing after the other, as in the file"
    )]
    pub fn build_with(inline_regions: bool, pack: Pack<'_>) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        let mut frames = Vec::new();
        let mut refs = Vec::new();
        let mut stored_pages = 0;
        for (number, spec) in frame_specs().iter().enumerate() {
            let at = bytes.len();
            let record = frame_record(spec, (number == 1).then_some(pack));
            let slots = (spec.pages.end - spec.pages.start) as u16;
            stored_pages += u64::from(slots);
            refs.push(RawFrameRef {
                offset: (at as u64).into(),
                stored_len: (record.len() as u32).into(),
                crc: crc32fast::hash(&record).into(),
                slots: slots.into(),
                layer: 0.into(),
                dictionary: spec.dictionary.into(),
                codec: spec.codec,
                reserved: 0,
            });
            frames.push(at..at + record.len());
            bytes.extend_from_slice(&record);
            if number == 0 {
                // A gap, as left by a writer that aligns its frames.
                bytes.extend_from_slice(&[0; 64]);
            }
        }

        let mut blocks = Vec::new();
        let mut frame_refs = Vec::new();
        let mut top = Vec::new();
        let mut index_bytes = 0;
        for block in 0..BLOCKS {
            let mut entry = RawTopEntry::new_zeroed();
            match block {
                2 => entry.kind = top_kind::FILL,
                4 => entry.kind = top_kind::UNAVAILABLE,
                _ => {
                    let (decoded, named) = index_block(block, &refs);
                    let at = bytes.len();
                    let compressed = block == 3;
                    let stored = if compressed {
                        pack(&decoded)
                    } else {
                        frame_refs.extend(named.iter().enumerate().map(|(number, frame)| {
                            let from =
                                size_of::<RawIndexHeader>() + number * size_of::<RawFrameRef>();
                            (at + from, *frame)
                        }));
                        decoded.clone()
                    };
                    entry.kind = top_kind::BLOCK;
                    entry.codec = if compressed { codec::ZSTD } else { codec::RAW };
                    entry.stored_len = (stored.len() as u16).into();
                    entry.decoded_len = (decoded.len() as u16).into();
                    entry.word_or_offset = (at as u64).into();
                    entry.crc = crc32fast::hash(&stored).into();
                    index_bytes += stored.len() as u64;
                    blocks.push((block, at..at + stored.len()));
                    bytes.extend_from_slice(&stored);
                }
            }
            top.push(entry);
        }

        let mut blobs = Vec::new();
        let mut blob_section = |bytes: &mut Vec<u8>, kind, all: &[(u32, &str, Vec<u8>)]| {
            let mut entries = Vec::new();
            let mut names = String::new();
            for (number, (tag, name, content)) in all.iter().enumerate() {
                entries.push(RawBlobEntry {
                    offset: (bytes.len() as u64).into(),
                    len: (content.len() as u64).into(),
                    crc: crc32fast::hash(content).into(),
                    tag: (*tag).into(),
                    name_offset: (names.len() as u32).into(),
                    name_len: (name.len() as u32).into(),
                });
                names += name;
                blobs.push((kind, number, bytes.len()..bytes.len() + content.len()));
                bytes.extend_from_slice(content);
            }
            let mut section = entries.as_bytes().to_vec();
            section.extend_from_slice(names.as_bytes());
            (kind as u32, section, all.len() as u64)
        };
        let runs: Vec<RawWorkingSetRun> = [(512, 8), (0, 4)]
            .map(|(first, pages): (u64, u64)| RawWorkingSetRun {
                first_page: first.into(),
                pages: pages.into(),
            })
            .to_vec();
        let mut sections = vec![
            blob_section(
                &mut bytes,
                SectionKind::Dictionaries,
                &[(DICTIONARY.into(), "", dictionary_bytes())],
            ),
            blob_section(
                &mut bytes,
                SectionKind::WorkingSets,
                &[(0, "boot", runs.as_bytes().to_vec()), (0, "idle", vec![])],
            ),
            blob_section(&mut bytes, SectionKind::Attachments, &attachments()),
        ];

        let fill_runs =
            [(1024, 512), (30, 482), (601, 399)].map(|(first, pages): (u64, u64)| RawFillRun {
                first_page: first.into(),
                pages: pages.into(),
                word: 0.into(),
            });
        let block_digests: Vec<Digest> = (0..BLOCKS).map(block_digest).collect();
        let properties = "source=by hand\nwriter=test\n";
        sections.push((
            SectionKind::FillRuns as u32,
            fill_runs.as_bytes().to_vec(),
            3,
        ));
        sections.push((
            SectionKind::BlockDigests as u32,
            block_digests.as_flattened().to_vec(),
            BLOCKS,
        ));
        sections.push((
            SectionKind::Properties as u32,
            properties.as_bytes().to_vec(),
            2,
        ));
        sections.push((UNKNOWN_KIND, b"from the future".to_vec(), 1));
        let top = (SectionKind::Top as u32, top.as_bytes().to_vec(), BLOCKS);
        let regions = (SectionKind::Regions as u32, region_section(), 3);
        if inline_regions {
            sections.extend([regions, top]);
        } else {
            sections.extend([top, regions]);
        }

        let mut hasher = ContentHasher::new();
        for digest in &block_digests {
            hasher.block(digest);
        }
        let mut trailer = RawTrailer::new_zeroed();
        trailer.version = FORMAT_VERSION.into();
        trailer.section_count = (sections.len() as u32).into();
        trailer.snapshot_id = ID;
        trailer.magic = TRAILER_MAGIC;
        trailer.summary = summary(stored_pages, &frames, index_bytes);
        trailer.summary.content_digest = hasher.finish(
            REGIONS
                .iter()
                .map(|(space, start, pages, _)| (*space, *start, *pages)),
        );
        let content = trailer.summary.content_digest;
        trailer.summary.state_digest = state_digest(&content, &attachments());
        let mut places = Vec::new();
        for ((kind, section, count), entry) in sections.iter().zip(&mut trailer.sections) {
            *entry = RawSectionEntry {
                kind: (*kind).into(),
                crc: 0.into(),
                offset: (bytes.len() as u64).into(),
                len: (section.len() as u64).into(),
                count: (*count).into(),
                reserved: 0.into(),
            };
            places.push((*kind, bytes.len()..bytes.len() + section.len()));
            bytes.extend_from_slice(section);
        }
        trailer.file_bytes = ((bytes.len() + TRAILER_BYTES) as u64).into();
        bytes.extend_from_slice(trailer.as_bytes());

        let mut header = RawHeader::new_zeroed();
        header.magic = HEADER_MAGIC;
        header.version = FORMAT_VERSION.into();
        header.page_size = (PAGE_SIZE as u32).into();
        header.snapshot_id = ID;
        bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        let mut sample = Self {
            bytes,
            frames,
            blocks,
            frame_refs,
            blobs,
            sections: places,
        };
        sample.seal();
        sample
    }

    /// Recomputes every checksum, innermost first.
    pub fn seal(&mut self) {
        for (at, frame) in self.frame_refs.clone() {
            let crc = crc32fast::hash(&self.bytes[self.frames[frame].clone()]);
            self.put_u32(at + std::mem::offset_of!(RawFrameRef, crc), crc);
        }
        for (block, range) in self.blocks.clone() {
            let crc = crc32fast::hash(&self.bytes[range]);
            let at = self.top_entry(block) + std::mem::offset_of!(RawTopEntry, crc);
            self.put_u32(at, crc);
        }
        for (kind, number, range) in self.blobs.clone() {
            let crc = crc32fast::hash(&self.bytes[range]);
            let at = self.section(kind).start + number * size_of::<RawBlobEntry>();
            self.put_u32(at + std::mem::offset_of!(RawBlobEntry, crc), crc);
        }
        for (number, (_, range)) in self.sections.clone().into_iter().enumerate() {
            let crc = crc32fast::hash(&self.bytes[range]);
            let at = self.section_entry(number) + std::mem::offset_of!(RawSectionEntry, crc);
            self.put_u32(at, crc);
        }
        let crc = crc32fast::hash(&self.bytes[..HEADER_BYTES - 4]);
        self.put_u32(HEADER_BYTES - 4, crc);
        let trailer = self.trailer();
        let crc_at = trailer + std::mem::offset_of!(RawTrailer, crc);
        let crc = crc32fast::hash(&self.bytes[trailer..crc_at]);
        self.put_u32(crc_at, crc);
    }

    pub fn trailer(&self) -> usize {
        self.bytes.len() - TRAILER_BYTES
    }

    pub fn section(&self, kind: SectionKind) -> Range<usize> {
        let place = self
            .sections
            .iter()
            .find(|(number, _)| *number == kind as u32);
        place.expect("the sample has all sections").1.clone()
    }

    /// Returns the position of the directory's entry for a kind.
    pub fn entry_of(&self, kind: SectionKind) -> usize {
        let number = self
            .sections
            .iter()
            .position(|(number, _)| *number == kind as u32);
        self.section_entry(number.expect("the sample has all sections"))
    }

    pub fn section_entry(&self, number: usize) -> usize {
        let sections = std::mem::offset_of!(RawTrailer, sections);
        self.trailer() + sections + number * size_of::<RawSectionEntry>()
    }

    pub fn top_entry(&self, block: u64) -> usize {
        self.section(SectionKind::Top).start + block as usize * size_of::<RawTopEntry>()
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn put_u16(&mut self, at: usize, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn put_u32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn put_u64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn store(&self) -> Arc<MemoryStore> {
        Arc::new(MemoryStore::named(self.bytes.clone(), "sample"))
    }

    pub fn open(&self) -> Result<Snapshot, OpenError> {
        Snapshot::open(self.store())
    }
}

fn frame_record(spec: &FrameSpec, pack: Option<Pack<'_>>) -> Vec<u8> {
    let slots = (spec.pages.end - spec.pages.start) as u16;
    let raw: Vec<u8> = spec.pages.clone().flat_map(pattern).collect();
    let payload = match (spec.codec, pack) {
        (codec::RAW, _) => raw,
        (codec::ZSTD, None) => compress(&raw, &[]),
        (codec::ZSTD, Some(pack)) => pack(&raw),
        _ => compress(&raw, &dictionary_bytes()),
    };
    // Two runs if there is room for two, so that the list is longer than one.
    let half = slots / 2;
    let runs: Vec<RawPageRun> = [(0, half), (half, slots - half)]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(slot, count)| RawPageRun {
            page: u32::from(slot).into(),
            slot: slot.into(),
            count: count.into(),
        })
        .collect();
    let header = RawFrameHeader {
        magic: FRAME_MAGIC.into(),
        slots: slots.into(),
        run_count: (runs.len() as u16).into(),
        dictionary: spec.dictionary.into(),
        codec: spec.codec,
        reserved: 0,
        payload_len: (payload.len() as u32).into(),
        base_page: spec.pages.start.into(),
    };
    [header.as_bytes(), runs.as_bytes(), &payload].concat()
}

pub fn compress(bytes: &[u8], dictionary: &[u8]) -> Vec<u8> {
    let mut out = vec![0; zstd_safe::compress_bound(bytes.len())];
    let len = zstd_safe::CCtx::create()
        .compress_using_dict(&mut out[..], bytes, dictionary, 3)
        .expect("cannot compress");
    out.truncate(len);
    out
}

/// Returns the numbers of a block's pages.
fn pages_of(block: u64) -> Range<u64> {
    let first = block * 512;
    let end = (first..first + 512).find(|page| content(*page).is_none());
    first..end.unwrap_or(first + 512)
}

/// Returns a block's index block, and the numbers of the frames that it names.
fn index_block(block: u64, refs: &[RawFrameRef]) -> (Vec<u8>, Vec<usize>) {
    let mut named = Vec::new();
    let mut fills: Vec<u64> = Vec::new();
    let mut entries = Vec::new();
    let number = |known: usize| known as u16;
    for page in pages_of(block) {
        let (frame, slot) = match content(page).expect("a used number") {
            Content::Unavailable => (page_kind::UNAVAILABLE, 0),
            Content::Fill(word) => {
                let known = fills.iter().position(|fill| *fill == word);
                let known = known.unwrap_or_else(|| {
                    fills.push(word);
                    fills.len() - 1
                });
                (page_kind::FILL, number(known))
            }
            Content::Stored(seed) => {
                let (frame, slot) = frame_of(seed);
                let known = named.iter().position(|name| *name == frame);
                let known = known.unwrap_or_else(|| {
                    named.push(frame);
                    named.len() - 1
                });
                (number(known), slot)
            }
        };
        entries.push(RawPageEntry {
            frame: frame.into(),
            slot: slot.into(),
        });
    }
    let header = RawIndexHeader {
        magic: INDEX_MAGIC.into(),
        page_count: number(entries.len()).into(),
        frame_count: number(named.len()).into(),
        fill_count: number(fills.len()).into(),
        reserved: [0; 6],
        first_page: (block * 512).into(),
        reserved2: 0.into(),
    };
    let mut bytes = header.as_bytes().to_vec();
    for frame in &named {
        bytes.extend_from_slice(refs[*frame].as_bytes());
    }
    for word in fills {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(entries.as_bytes());
    (bytes, named)
}

fn block_digest(block: u64) -> Digest {
    let pages: Vec<Digest> = pages_of(block)
        .map(|page| match content(page).expect("a used number") {
            Content::Unavailable => digest::unavailable(),
            Content::Fill(word) => digest::fill(word),
            Content::Stored(seed) => digest::stored(&pattern(seed)),
        })
        .collect();
    if pages.iter().all(|page| *page == pages[0]) {
        return UniformBlocks::default().digest(pages[0], pages.len());
    }
    digest::block(&pages)
}

fn attachments() -> [(u32, &'static str, Vec<u8>); 2] {
    [
        (0, "vmm state", b"registers and devices".repeat(4000)),
        (0, "empty", vec![]),
    ]
}

/// Returns the state digest, computed from its definition in `FORMAT.md`.
fn state_digest(content: &Digest, attachments: &[(u32, &str, Vec<u8>)]) -> Digest {
    let mut all = b"snaprestore state".to_vec();
    all.extend_from_slice(content);
    for (_, _, _, name) in REGIONS {
        for number in [3, 12, name.len() as u32] {
            all.extend_from_slice(&number.to_le_bytes());
        }
        all.extend_from_slice(name.as_bytes());
    }
    all.extend_from_slice(&(REGIONS.len() as u64).to_le_bytes());
    let mut attachments = attachments.to_vec();
    attachments.sort_by_key(|(_, name, _)| *name);
    for (_, name, bytes) in &attachments {
        all.extend_from_slice(&(name.len() as u32).to_le_bytes());
        all.extend_from_slice(name.as_bytes());
        all.extend_from_slice(blake3::hash(bytes).as_bytes());
    }
    all.extend_from_slice(&(attachments.len() as u64).to_le_bytes());
    blake3::hash(&all).into()
}

fn region_section() -> Vec<u8> {
    let mut entries = Vec::new();
    let mut names = String::new();
    for ((space, start, pages, name), first_page) in REGIONS.iter().zip(FIRST_PAGES) {
        entries.push(RawRegionEntry {
            space: (*space).into(),
            flags: 3.into(),
            start: (*start).into(),
            pages: (*pages).into(),
            first_page: first_page.into(),
            page_shift: 12.into(),
            name_len: (name.len() as u32).into(),
            name_offset: (names.len() as u64).into(),
            reserved: 0.into(),
            unused: 0.into(),
        });
        names += name;
    }
    let mut section = entries.as_bytes().to_vec();
    section.extend_from_slice(names.as_bytes());
    section
}

fn summary(stored_pages: u64, frames: &[Range<usize>], index_bytes: u64) -> layout::RawSummary {
    let count = |wanted: fn(Content) -> bool| {
        (0..BLOCKS * 512)
            .filter_map(content)
            .filter(|page| wanted(*page))
            .count() as u64
    };
    let stored_entries = count(|page| matches!(page, Content::Stored(_)));
    layout::RawSummary {
        pages: count(|_| true).into(),
        zero_pages: count(|page| page == Content::Fill(0)).into(),
        fill_pages: count(|page| matches!(page, Content::Fill(1..))).into(),
        stored_pages: stored_pages.into(),
        duplicate_pages: (stored_entries - stored_pages).into(),
        unavailable_pages: count(|page| page == Content::Unavailable).into(),
        frames: (frames.len() as u64).into(),
        frame_bytes: (16 * PAGE_SIZE as u64).into(),
        stored_bytes: frames
            .iter()
            .map(|frame| frame.len() as u64)
            .sum::<u64>()
            .into(),
        index_bytes: index_bytes.into(),
        content_digest: [0; 32],
        state_digest: [0; 32],
    }
}
