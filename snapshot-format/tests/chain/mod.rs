//! Layered snapshots assembled by hand, without the writer: a small independent encoder, and a
//! chain of three files made with it.

#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "all lengths are small and written here"
)]

use std::path::Path;
use std::sync::Arc;

use snapshot_format::digest::{self, ContentHasher, Digest, UniformBlocks};
use snapshot_format::layout::{
    FORMAT_VERSION, FRAME_MAGIC, HEADER_BYTES, HEADER_MAGIC, INDEX_MAGIC, PAGE_SIZE,
    RawAncestorEntry, RawBlobEntry, RawFrameHeader, RawFrameRef, RawHeader, RawIndexHeader,
    RawPageEntry, RawPageRun, RawRegionEntry, RawSectionEntry, RawTopEntry, RawTrailer,
    SectionKind, TRAILER_BYTES, TRAILER_MAGIC, codec, page_kind, required, top_kind,
};
use snapshot_format::{
    Ancestor, Ancestors, Layer, MemoryStore, OpenError, Snapshot, SnapshotOptions,
};
use zerocopy::{FromZeros, IntoBytes};

use crate::common::{compress, pattern};

/// Content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Fill(u64),
    /// Bytes of [`pattern`] with this seed.
    Seed(u64),
    Unavailable,
}

/// A frame in some file, and the content of its slots.
#[derive(Clone)]
pub struct Frame {
    pub raw: RawFrameRef,
    pub seeds: Vec<u64>,
}

impl Frame {
    /// Returns the frame as a file names it that has its file as this layer.
    pub fn of(&self, layer: u16) -> Self {
        let mut frame = self.clone();
        frame.raw.layer = layer.into();
        frame
    }
}

/// A page of an index block.
#[derive(Clone)]
pub enum Entry {
    Fill(u64),
    Unavailable,
    /// A slot of a frame.
    Stored(Frame, u16),
}

/// A finished file.
#[derive(Clone)]
pub struct File {
    pub name: String,
    pub id: [u8; 16],
    pub bytes: Vec<u8>,
    pub top: Vec<RawTopEntry>,
    /// Content of the pages of each block.
    pub blocks: Vec<Vec<Content>>,
    /// Kind, offset and length of each section.
    pub sections: Vec<(SectionKind, usize, usize)>,
}

/// Number of frames and pages, as the summary counts them.
#[derive(Default)]
struct Counts {
    frames: u64,
    slots: u64,
    stored_bytes: u64,
    index_bytes: u64,
    own_pages: u64,
    unused_slots: u64,
}

pub struct Encoder {
    name: String,
    id: [u8; 16],
    regions: Vec<(&'static str, u64)>,
    listed: Vec<(String, RawAncestorEntry)>,
    bytes: Vec<u8>,
    top: Vec<RawTopEntry>,
    blocks: Vec<Vec<Content>>,
    dictionary: Option<(u16, Vec<u8>)>,
    counts: Counts,
    /// Name the ancestors in a property.
    pub names: bool,
}

impl Encoder {
    /// Starts a file with regions of these names and lengths in pages.
    pub fn new(name: &str, regions: &[(&'static str, u64)], ancestors: &[&File]) -> Self {
        let mut id = [0; 16];
        id[..name.len().min(16)].copy_from_slice(&name.as_bytes()[..name.len().min(16)]);
        let listed = ancestors.iter().map(|file| {
            let trailer = &file.bytes[file.bytes.len() - TRAILER_BYTES..];
            let entry = RawAncestorEntry {
                snapshot_id: file.id,
                file_bytes: (file.bytes.len() as u64).into(),
                reserved: 0.into(),
                trailer_hash: blake3::hash(trailer).into(),
            };
            (file.name.clone(), entry)
        });
        Self {
            name: name.to_owned(),
            id,
            regions: regions.to_vec(),
            listed: listed.collect(),
            bytes: vec![0; HEADER_BYTES],
            top: Vec::new(),
            blocks: Vec::new(),
            dictionary: None,
            counts: Counts::default(),
            names: true,
        }
    }

    /// Gives the file a dictionary.
    pub fn dictionary(&mut self, number: u16, bytes: Vec<u8>) {
        self.dictionary = Some((number, bytes));
    }

    /// Writes a frame of these contents; slot `n` is listed for page `first_page + n`.
    pub fn frame(&mut self, first_page: u64, seeds: &[u64], with_dictionary: bool) -> Frame {
        self.write_frame(
            &[(first_page, 0, seeds.len() as u16)],
            seeds,
            with_dictionary,
        )
    }

    /// Writes a frame of these contents with a page list of (first page, slot, pages).
    pub fn frame_listing(&mut self, runs: &[(u64, u16, u16)], seeds: &[u64]) -> Frame {
        self.write_frame(runs, seeds, false)
    }

    fn write_frame(
        &mut self,
        runs: &[(u64, u16, u16)],
        seeds: &[u64],
        with_dictionary: bool,
    ) -> Frame {
        let base_page = runs.iter().map(|run| run.0).min().expect("a run");
        let runs: Vec<RawPageRun> = runs
            .iter()
            .map(|(page, slot, count)| RawPageRun {
                page: ((page - base_page) as u32).into(),
                slot: (*slot).into(),
                count: (*count).into(),
            })
            .collect();
        let plain: Vec<u8> = seeds.iter().copied().flat_map(pattern).collect();
        let (codec, number, payload) = match &self.dictionary {
            Some((number, bytes)) if with_dictionary => {
                (codec::ZSTD_DICTIONARY, *number, compress(&plain, bytes))
            }
            _ => (codec::ZSTD, 0, compress(&plain, &[])),
        };
        let header = RawFrameHeader {
            magic: FRAME_MAGIC.into(),
            slots: (seeds.len() as u16).into(),
            run_count: (runs.len() as u16).into(),
            dictionary: number.into(),
            codec,
            reserved: 0,
            payload_len: (payload.len() as u32).into(),
            base_page: base_page.into(),
        };
        let record = [header.as_bytes(), runs.as_bytes(), &payload].concat();
        let raw = RawFrameRef {
            offset: (self.bytes.len() as u64).into(),
            stored_len: (record.len() as u32).into(),
            crc: crc32fast::hash(&record).into(),
            slots: (seeds.len() as u16).into(),
            layer: 0.into(),
            dictionary: number.into(),
            codec,
            reserved: 0,
        };
        self.bytes.extend_from_slice(&record);
        self.counts.frames += 1;
        self.counts.slots += seeds.len() as u64;
        self.counts.stored_bytes += record.len() as u64;
        Frame {
            raw,
            seeds: seeds.to_vec(),
        }
    }

    /// Records that this many slots of the file's frames are used by no page.
    pub fn unused_slots(&mut self, slots: u64) {
        self.counts.unused_slots = slots;
    }

    /// Writes the index block of the next block, compressed if its number is odd.
    pub fn block(&mut self, entries: &[Entry]) {
        let mut frames: Vec<RawFrameRef> = Vec::new();
        let mut fills: Vec<u64> = Vec::new();
        let mut raw = Vec::new();
        let mut contents = Vec::new();
        for entry in entries {
            let (frame, slot, content) = match entry {
                Entry::Fill(word) => {
                    let number = place(&mut fills, *word);
                    (page_kind::FILL, number, Content::Fill(*word))
                }
                Entry::Unavailable => (page_kind::UNAVAILABLE, 0, Content::Unavailable),
                Entry::Stored(frame, slot) => {
                    self.counts.own_pages += u64::from(frame.raw.layer.get() == 0);
                    let number = place(&mut frames, frame.raw);
                    let seed = frame.seeds[usize::from(*slot)];
                    (number, *slot, Content::Seed(seed))
                }
            };
            raw.push(RawPageEntry {
                frame: frame.into(),
                slot: slot.into(),
            });
            contents.push(content);
        }
        let header = RawIndexHeader {
            magic: INDEX_MAGIC.into(),
            page_count: (raw.len() as u16).into(),
            frame_count: (frames.len() as u16).into(),
            fill_count: (fills.len() as u16).into(),
            reserved: [0; 6],
            first_page: (self.top.len() as u64 * 512).into(),
            reserved2: 0.into(),
        };
        let mut plain = [header.as_bytes(), frames.as_bytes()].concat();
        for word in &fills {
            plain.extend_from_slice(&word.to_le_bytes());
        }
        plain.extend_from_slice(raw.as_bytes());
        let compressed = self.top.len() % 2 == 1;
        let stored = if compressed {
            compress(&plain, &[])
        } else {
            plain.clone()
        };
        self.top.push(RawTopEntry {
            kind: top_kind::BLOCK,
            codec: if compressed { codec::ZSTD } else { codec::RAW },
            layer: 0.into(),
            stored_len: (stored.len() as u16).into(),
            decoded_len: (plain.len() as u16).into(),
            word_or_offset: (self.bytes.len() as u64).into(),
            crc: crc32fast::hash(&stored).into(),
            ancestor_block: 0.into(),
        });
        self.counts.index_bytes += stored.len() as u64;
        self.bytes.extend_from_slice(&stored);
        self.blocks.push(contents);
    }

    /// Makes the next block block `number` of `file`, an ancestor that is this layer here.
    pub fn block_of(&mut self, file: &File, layer: u16, number: usize) {
        let mut entry = file.top[number];
        assert_eq!(entry.kind, top_kind::BLOCK);
        entry.layer = layer.into();
        entry.ancestor_block = (number as u32).into();
        self.top.push(entry);
        self.blocks.push(file.blocks[number].clone());
    }

    #[expect(
        clippy::too_many_lines,
        reason = "one thing after the other, as in the file"
    )]
    pub fn finish(self) -> File {
        let Self {
            name,
            id,
            regions,
            listed,
            mut bytes,
            top,
            blocks,
            dictionary,
            counts,
            names,
        } = self;
        let digests: Vec<Digest> = blocks.iter().map(|pages| block_digest(pages)).collect();
        let mut region_records = Vec::new();
        let mut region_names = String::new();
        let mut first_page = 0u64;
        let mut start = 0u64;
        let mut starts = Vec::new();
        for (region, pages) in &regions {
            region_records.push(RawRegionEntry {
                space: 0.into(),
                flags: 3.into(),
                start: start.into(),
                pages: (*pages).into(),
                first_page: first_page.into(),
                page_shift: 12.into(),
                name_len: (region.len() as u32).into(),
                name_offset: (region_names.len() as u64).into(),
                reserved: 0.into(),
                unused: 0.into(),
            });
            starts.push((0, start, *pages));
            region_names += region;
            first_page = (first_page + pages).next_multiple_of(512);
            start += 1 << 30;
        }
        let mut sections: Vec<(SectionKind, Vec<u8>, u64)> = Vec::new();
        if let Some((number, dictionary)) = &dictionary {
            let entry = RawBlobEntry {
                offset: (bytes.len() as u64).into(),
                len: (dictionary.len() as u64).into(),
                crc: crc32fast::hash(dictionary).into(),
                tag: u32::from(*number).into(),
                name_offset: 0.into(),
                name_len: 0.into(),
            };
            bytes.extend_from_slice(dictionary);
            sections.push((SectionKind::Dictionaries, entry.as_bytes().to_vec(), 1));
        }
        let all: Vec<RawAncestorEntry> = listed.iter().map(|(_, entry)| *entry).collect();
        if !all.is_empty() {
            let count = all.len() as u64;
            sections.push((SectionKind::Ancestors, all.as_bytes().to_vec(), count));
            let mut lines: Vec<String> = listed
                .iter()
                .map(|(name, entry)| {
                    let id = u128::from_be_bytes(entry.snapshot_id);
                    format!("ancestor.{id:032x}={name}\n")
                })
                .collect();
            lines.sort();
            let text = if names { lines.concat() } else { String::new() };
            let count = text.lines().count() as u64;
            sections.push((SectionKind::Properties, text.into_bytes(), count));
        }
        sections.push((
            SectionKind::BlockDigests,
            digests.as_flattened().to_vec(),
            digests.len() as u64,
        ));
        let mut region_section = region_records.as_bytes().to_vec();
        region_section.extend_from_slice(region_names.as_bytes());
        sections.push((SectionKind::Regions, region_section, regions.len() as u64));
        sections.push((SectionKind::Top, top.as_bytes().to_vec(), top.len() as u64));

        let count = |wanted: fn(Content) -> bool| {
            let all = blocks.iter().flatten();
            all.filter(|page| wanted(**page)).count() as u64
        };
        let mut hasher = ContentHasher::new();
        for digest in &digests {
            hasher.block(digest);
        }
        let content = hasher.finish(starts);
        let mut trailer = RawTrailer::new_zeroed();
        trailer.version = FORMAT_VERSION.into();
        trailer.section_count = (sections.len() as u32).into();
        if !all.is_empty() {
            trailer.required_features = required::ANCESTORS.into();
        }
        trailer.snapshot_id = id;
        let summary = &mut trailer.summary;
        summary.pages = count(|_| true).into();
        summary.zero_pages = count(|page| page == Content::Fill(0)).into();
        summary.fill_pages = count(|page| matches!(page, Content::Fill(1..))).into();
        summary.unavailable_pages = count(|page| page == Content::Unavailable).into();
        summary.stored_pages = counts.slots.into();
        let used_slots = counts.slots - counts.unused_slots;
        summary.duplicate_pages = (counts.own_pages - used_slots).into();
        summary.frames = counts.frames.into();
        summary.frame_bytes = (8 * PAGE_SIZE as u64).into();
        summary.stored_bytes = counts.stored_bytes.into();
        summary.index_bytes = counts.index_bytes.into();
        summary.content_digest = content;
        summary.state_digest = state_digest(&content, &regions);
        trailer.magic = TRAILER_MAGIC;
        let mut places = Vec::new();
        for ((kind, section, count), entry) in sections.iter().zip(&mut trailer.sections) {
            *entry = RawSectionEntry {
                kind: (*kind as u32).into(),
                crc: crc32fast::hash(section).into(),
                offset: (bytes.len() as u64).into(),
                len: (section.len() as u64).into(),
                count: (*count).into(),
                reserved: 0.into(),
            };
            places.push((*kind, bytes.len(), section.len()));
            bytes.extend_from_slice(section);
        }
        trailer.file_bytes = ((bytes.len() + TRAILER_BYTES) as u64).into();
        bytes.extend_from_slice(trailer.as_bytes());
        let mut header = RawHeader::new_zeroed();
        header.magic = HEADER_MAGIC;
        header.version = FORMAT_VERSION.into();
        header.page_size = (PAGE_SIZE as u32).into();
        header.snapshot_id = id;
        bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        let mut file = File {
            name,
            id,
            bytes,
            top,
            blocks,
            sections: places,
        };
        file.seal();
        file
    }
}

/// Returns the number of `value` in `list`; appends it if it is new.
fn place<T: PartialEq + Copy>(list: &mut Vec<T>, value: T) -> u16 {
    let known = list.iter().position(|known| *known == value);
    known.unwrap_or_else(|| {
        list.push(value);
        list.len() - 1
    }) as u16
}

fn block_digest(pages: &[Content]) -> Digest {
    let digests: Vec<Digest> = pages
        .iter()
        .map(|page| match page {
            Content::Unavailable => digest::unavailable(),
            Content::Fill(word) => digest::fill(*word),
            Content::Seed(seed) => digest::stored(&pattern(*seed)),
        })
        .collect();
    if digests.iter().all(|page| *page == digests[0]) {
        return UniformBlocks::default().digest(digests[0], digests.len());
    }
    digest::block(&digests)
}

/// Returns the state digest, computed from its definition in `FORMAT.md`.
fn state_digest(content: &Digest, regions: &[(&str, u64)]) -> Digest {
    let mut all = b"snaprestore state".to_vec();
    all.extend_from_slice(content);
    for (name, _) in regions {
        for number in [3, 12, name.len() as u32] {
            all.extend_from_slice(&number.to_le_bytes());
        }
        all.extend_from_slice(name.as_bytes());
    }
    all.extend_from_slice(&(regions.len() as u64).to_le_bytes());
    all.extend_from_slice(&0u64.to_le_bytes());
    blake3::hash(&all).into()
}

impl File {
    /// Recomputes the checksums of sections, header and trailer.
    pub fn seal(&mut self) {
        let trailer = self.bytes.len() - TRAILER_BYTES;
        for (number, (_, offset, len)) in self.sections.iter().enumerate() {
            let crc = crc32fast::hash(&self.bytes[*offset..offset + len]);
            let at = trailer
                + std::mem::offset_of!(RawTrailer, sections)
                + number * size_of::<RawSectionEntry>()
                + std::mem::offset_of!(RawSectionEntry, crc);
            self.bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        }
        let crc = crc32fast::hash(&self.bytes[..HEADER_BYTES - 4]);
        self.bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        let at = trailer + std::mem::offset_of!(RawTrailer, crc);
        let crc = crc32fast::hash(&self.bytes[trailer..at]);
        self.bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }

    pub fn section(&self, kind: SectionKind) -> usize {
        let all = self.sections.iter();
        let mut found = all.filter(|(section, _, _)| *section == kind);
        found.next().expect("the section").1
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn write_to(&self, folder: &Path) {
        std::fs::write(folder.join(&self.name), &self.bytes).expect("write");
    }

    pub fn store(&self) -> Arc<MemoryStore> {
        Arc::new(MemoryStore::named(self.bytes.clone(), self.name.clone()))
    }

    /// Returns the bytes of every page, by its number; none if it is unavailable or unused.
    pub fn pages(&self) -> Vec<Option<Vec<u8>>> {
        let mut all = Vec::new();
        for block in &self.blocks {
            let bytes = block.iter().map(|page| match page {
                Content::Fill(word) => Some(word.to_le_bytes().repeat(PAGE_SIZE / 8)),
                Content::Seed(seed) => Some(pattern(*seed)),
                Content::Unavailable => None,
            });
            all.extend(bytes);
            all.resize(all.len().next_multiple_of(512), None);
        }
        all
    }
}

/// Files in memory as ancestors, by their ids.
#[derive(Debug, Default)]
pub struct Given(pub Vec<Arc<Layer>>);

impl Given {
    pub fn of(files: &[&File]) -> Result<Self, OpenError> {
        let layers = files
            .iter()
            .map(|file| Layer::open(file.store()).map(Arc::new));
        Ok(Self(layers.collect::<Result<_, _>>()?))
    }
}

impl Ancestors for Given {
    fn find(
        &self,
        wanted: &Ancestor,
        _beside: Option<&Path>,
    ) -> Result<Option<Arc<Layer>>, OpenError> {
        Ok(self.0.iter().find(|layer| layer.id() == wanted.id).cloned())
    }
}

/// Opens `file` with these ancestors.
pub fn open(file: &File, ancestors: &[&File]) -> Result<Snapshot, OpenError> {
    let given = Arc::new(Given::of(ancestors)?);
    Snapshot::open_with(file.store(), &SnapshotOptions::default().ancestors(given))
}

/// Pages of the longer region.
pub const PAGES: u64 = 1024 + 76;

/// A grandparent, its child, and that one's child.
#[derive(Clone)]
pub struct Three {
    pub a: File,
    pub b: File,
    pub c: File,
}

fn stored(frame: &Frame, slots: std::ops::Range<u16>) -> impl Iterator<Item = Entry> {
    slots.map(|slot| Entry::Stored(frame.clone(), slot))
}

fn padded(entries: impl Iterator<Item = Entry>, pages: usize) -> Vec<Entry> {
    let mut entries: Vec<Entry> = entries.collect();
    entries.resize(pages, Entry::Fill(0));
    entries
}

/// Returns a chain that uses all that the format allows:
///
/// ```text
/// a          b                               c, whose list is b, a
///                                            block 0   block 2 of a
/// block 0    block 0   frames of a and b     block 1   block 0 of b: frames of a through b's list
/// block 1    block 1   block 1 of a          block 2   frames of a, b and c, two with a dictionary
/// block 2    block 2   frames of b           block 3   block 2 of b
/// ```
///
/// The last block of each region has 76 pages. `a` and `c` have different dictionaries of the same
/// number.
pub fn three() -> Three {
    let ram = [("ram", PAGES)];
    let mut a = Encoder::new("a.snap", &ram, &[]);
    a.dictionary(7, [pattern(100), pattern(101)].concat());
    let a0 = a.frame(0, &[1, 2, 3, 4], false);
    let a1 = a.frame(512, &[100, 101, 102, 103, 104], true);
    let a2 = a.frame(1024, &[201, 202], false);
    a.block(&padded(stored(&a0, 0..4), 512));
    a.block(&padded(stored(&a1, 0..5), 512));
    a.block(&padded(stored(&a2, 0..2), 76));
    let a = a.finish();

    let mut b = Encoder::new("b.snap", &ram, &[&a]);
    let b0 = b.frame(2, &[301, 302], false);
    let b1 = b.frame(1024, &[401], false);
    let in_b = |frame: &Frame| frame.of(1);
    b.block(&padded(
        stored(&in_b(&a0), 0..2).chain(stored(&b0, 0..2)),
        512,
    ));
    b.block_of(&a, 1, 1);
    b.block(&padded(
        stored(&b1, 0..1)
            .chain(stored(&in_b(&a2), 0..2))
            .chain([Entry::Unavailable, Entry::Fill(7)]),
        76,
    ));
    let b = b.finish();

    let mut c = Encoder::new("c.snap", &[("low", 76), ("high", PAGES)], &[&b, &a]);
    c.dictionary(7, [pattern(500), pattern(501)].concat());
    let c0 = c.frame(1024, &[500, 501, 502], true);
    c.block_of(&a, 2, 2);
    c.block_of(&b, 1, 0);
    c.block(&padded(
        stored(&c0, 0..3)
            .chain(stored(&a1.of(2), 0..5))
            .chain(stored(&b0.of(1), 1..2))
            // A duplicate of a page of this file, and one of an ancestor's.
            .chain(stored(&c0, 0..1))
            .chain(stored(&a1.of(2), 0..1)),
        512,
    ));
    c.block_of(&b, 1, 2);
    Three {
        a,
        b,
        c: c.finish(),
    }
}
