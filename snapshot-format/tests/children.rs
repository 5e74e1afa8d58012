//! Children that the writer makes of a base: every layer of a chain reads back exactly, whatever
//! was changed, and stores only what differs.

mod chain;
mod common;
mod counting;
#[path = "children/optimized.rs"]
mod optimized;
#[path = "children/rewritten.rs"]
mod rewritten;
#[path = "children/shifted.rs"]
mod shifted;

use std::collections::HashMap;
use std::sync::Arc;

use chain::Given;
use common::pattern;
use counting::Counting;
use proptest::prelude::*;
use snapshot_format::layout::{MAX_ANCESTORS, PAGE_SIZE, RawIndexHeader};
use snapshot_format::{
    Dictionary, FrameDecoder, Layer, MemoryStore, Page, Reason, RegionSpec, Snapshot,
    SnapshotOptions, Store, Top, VerifyOptions, WriteError, Writer, WriterOptions, Written, verify,
};

/// A page of the oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Data(u64),
    Fill(u64),
    Unavailable,
}

impl Content {
    fn bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Data(seed) => Some(pattern(seed)),
            Self::Fill(word) => Some(word.to_le_bytes().repeat(PAGE_SIZE / 8)),
            Self::Unavailable => None,
        }
    }
}

/// The memory of one layer: the pages of each region.
type Memory = Vec<Vec<Content>>;

/// A file of a chain.
struct File {
    bytes: Vec<u8>,
    written: Written,
    snapshot: Arc<Snapshot>,
    memory: Memory,
}

/// Way in which a child is given to the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// All of memory.
    Full,
    /// Pages that differ; the others are as in the base.
    Diff,
    /// All of memory, and nothing is known of where it was in the base.
    Unrelated,
}

fn options() -> WriterOptions {
    WriterOptions {
        dictionary: Dictionary::Off,
        threads: Some(2),
        frame_pages: 8,
        ..WriterOptions::default()
    }
}

fn start(region: usize) -> u64 {
    (region as u64) << 40
}

/// Returns the first page number of each region.
fn first_pages(memory: &Memory) -> Vec<u64> {
    let mut next = 0;
    let firsts = memory.iter().map(|pages| {
        let first = next;
        next = (first + pages.len() as u64).next_multiple_of(512);
        first
    });
    firsts.collect()
}

fn give(writer: &mut Writer<Vec<u8>>, page: Content) {
    match page {
        Content::Data(seed) => writer.write_pages(&pattern(seed)).expect("page"),
        Content::Fill(word) => writer.write_fill(1, word).expect("fill"),
        Content::Unavailable => writer.write_unavailable(1).expect("unavailable"),
    }
}

/// Writes `memory`, as a child of `base` if there is one.
fn write(memory: &Memory, base: Option<(&File, How)>, options: WriterOptions) -> File {
    let options = WriterOptions {
        base: base.map(|(base, _)| Arc::clone(&base.snapshot)),
        ..options
    };
    let mut writer = Writer::new(Vec::new(), options).expect("writer");
    for (number, pages) in memory.iter().enumerate() {
        let before = base.and_then(|(base, how)| {
            let firsts = first_pages(&base.memory);
            let first = firsts.get(number).copied();
            first.filter(|_| how != How::Unrelated)
        });
        let region = RegionSpec {
            start: start(number),
            base_page: before,
            ..RegionSpec::default()
        };
        writer.begin_region(&region).expect("region");
        for (i, page) in pages.iter().enumerate() {
            let same = base.is_some_and(|(base, how)| {
                let before = base.memory.get(number).and_then(|pages| pages.get(i));
                how == How::Diff && before == Some(page)
            });
            if same {
                writer.write_from_base(1).expect("as in the base");
            } else {
                give(&mut writer, *page);
            }
        }
    }
    let (bytes, written) = writer.finish().expect("finish");
    let name = format!("layer {}", written.id);
    let store = Arc::new(MemoryStore::named(bytes.clone(), name));
    let ancestors = base.map_or_else(Given::default, |(base, _)| ancestors_of(base));
    let options = SnapshotOptions::default().ancestors(Arc::new(ancestors));
    let snapshot = Snapshot::open_with(store, &options).expect("open");
    File {
        bytes,
        written,
        snapshot: Arc::new(snapshot),
        memory: memory.clone(),
    }
}

/// Returns a file and all its ancestors, as ancestors of a child.
fn ancestors_of(file: &File) -> Given {
    let name = file.snapshot.name().to_owned();
    let store = Arc::new(MemoryStore::named(file.bytes.clone(), name));
    let own = Arc::new(Layer::open(store).expect("a layer"));
    let mut layers = vec![own];
    layers.extend(file.snapshot.ancestors().iter().cloned());
    Given(layers)
}

/// Compares a file with its memory, and with a plain snapshot of it. Returns the number of pages
/// that lie in ancestors.
fn check(file: &File) -> u64 {
    check_with(file, 0)
}

/// Does the same with a file of which `dead_slots` slots have no page.
fn check_with(file: &File, dead_slots: u64) -> u64 {
    let snapshot = &file.snapshot;
    let mut decoder = FrameDecoder::new();
    let mut frames: HashMap<(u16, u64), Vec<u8>> = HashMap::new();
    let mut in_ancestors = 0;
    for (pages, region) in file.memory.iter().zip(snapshot.regions()) {
        assert_eq!(region.pages, pages.len() as u64);
        for (page, number) in pages.iter().zip(region.page_numbers()) {
            let found = match snapshot.look_up(number, Reason::Demand).expect("look up") {
                Page::Fill(word) => Some(word.to_le_bytes().repeat(PAGE_SIZE / 8)),
                Page::Unavailable => None,
                Page::Unused => panic!("page {number} has no number"),
                Page::Stored { frame, slot } => {
                    in_ancestors += u64::from(frame.layer() > 0);
                    let key = (frame.layer(), frame.offset());
                    let bytes = frames.entry(key).or_insert_with(|| {
                        let mut out = vec![0; frame.decoded_len()];
                        decoder
                            .decode(snapshot, &frame, Reason::Demand, &mut out)
                            .expect("decode");
                        out
                    });
                    Some(bytes[usize::from(slot) * PAGE_SIZE..][..PAGE_SIZE].to_vec())
                }
            };
            assert!(found == page.bytes(), "page {number} is not {page:?}");
        }
    }
    let summary = snapshot.summary();
    assert_eq!(
        summary.pages + dead_slots,
        summary.zero_pages
            + summary.fill_pages
            + summary.stored_pages
            + summary.duplicate_pages
            + summary.unavailable_pages
            + in_ancestors
    );
    let plain = write(&file.memory, None, options());
    assert_eq!(summary.content_digest, plain.written.summary.content_digest);
    assert_eq!(summary.zero_pages, plain.written.summary.zero_pages);
    assert_eq!(
        snapshot.fill_runs().expect("runs"),
        plain.snapshot.fill_runs().expect("runs")
    );
    let given = Given(snapshot.ancestors().to_vec());
    let store = Arc::new(MemoryStore::new(file.bytes.clone()));
    let options = VerifyOptions::default()
        .threads(2)
        .ancestors(Arc::new(given));
    let report = verify(store, options).expect("verify");
    assert_eq!(report.problems, []);
    in_ancestors
}

fn data(pages: std::ops::Range<u64>) -> Vec<Content> {
    pages.map(Content::Data).collect()
}

#[test]
fn unchanged_memory_is_stored_in_the_base_alone() {
    let base = write(&vec![data(0..1100)], None, options());
    for how in [How::Full, How::Diff] {
        let child = write(&base.memory, Some((&base, how)), options());
        assert_eq!(check(&child), 1100);
        let summary = child.written.summary;
        assert_eq!((summary.frames, summary.index_bytes), (0, 0), "{how:?}");
        // A grandchild refers to the file that has the blocks, and to no other.
        let grandchild = write(&base.memory, Some((&child, how)), options());
        check(&grandchild);
        let ids: Vec<_> = grandchild
            .snapshot
            .ancestors()
            .iter()
            .map(|l| l.id())
            .collect();
        assert_eq!(ids, [base.written.id]);
    }
    // Nothing is known of where it was, but digests of blocks tell.
    let other = write(&base.memory, Some((&base, How::Unrelated)), options());
    assert_eq!(check(&other), 1100);
    let summary = other.written.summary;
    assert_eq!((summary.frames, summary.index_bytes), (0, 0));
    // Nothing of a base with other memory is used.
    let memory = vec![data(5000..6100)];
    let other = write(&memory, Some((&base, How::Full)), options());
    assert_eq!(check(&other), 0);
    assert!(other.snapshot.ancestors().is_empty());
    assert_eq!(other.written.summary.stored_pages, 1100);
}

#[test]
fn changed_pages_and_no_others_are_stored() {
    let base = write(&vec![data(0..1536)], None, options());
    let mut memory = base.memory.clone();
    memory[0][700] = Content::Data(5000);
    // Content of the base's block at another place, and at the place that it had.
    memory[0][701] = Content::Data(513);
    memory[0][702] = Content::Fill(0);
    // The base's block is known exactly, however few pages the table of known ones has room for.
    let forgetful = || WriterOptions {
        exact_distinct_pages: 8,
        ..options()
    };
    for how in [How::Full, How::Diff] {
        let child = write(&memory, Some((&base, how)), forgetful());
        assert_eq!(check(&child), 1536 - 2, "{how:?}");
        assert_eq!(child.written.summary.stored_pages, 1, "{how:?}");
        assert_eq!(child.snapshot.top(0), Top::Block);
        // The page comes back: the grandparent still has it.
        let back = write(&base.memory, Some((&child, how)), options());
        check(&back);
        assert_eq!(back.written.summary.stored_pages, 0, "{how:?}");
    }
}

#[test]
fn ancestors_are_known_by_name_in_the_properties() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("the base.snap");
    let base = write(&vec![data(0..9)], None, options());
    std::fs::write(&path, &base.bytes).expect("write");
    let opened = Arc::new(Snapshot::open_path(&path).expect("open"));
    let options = WriterOptions {
        base: Some(opened),
        ..options()
    };
    let mut writer = Writer::new(Vec::new(), options).expect("writer");
    let region = RegionSpec {
        base_page: Some(0),
        ..RegionSpec::default()
    };
    writer.begin_region(&region).expect("region");
    writer.write_from_base(9).expect("as in the base");
    let (bytes, written) = writer.finish().expect("finish");
    assert_eq!(
        written.summary.content_digest,
        base.written.summary.content_digest
    );
    let child = folder.path().join("child.snap");
    std::fs::write(&child, bytes).expect("write");
    let child = Snapshot::open_path(&child).expect("open");
    let key = format!("ancestor.{}", base.written.id);
    let properties = child.properties().expect("properties");
    let name = properties.iter().find(|(known, _)| *known == key);
    assert_eq!(name.expect("a name").1, "the base.snap");
}

#[test]
fn pages_that_the_base_does_not_have_are_refused() {
    let base = write(&vec![data(0..600)], None, options());
    let refused = |base_page, pages, says: &str| {
        let options = WriterOptions {
            base: Some(Arc::clone(&base.snapshot)),
            ..options()
        };
        let mut writer = Writer::new(Vec::new(), options).expect("writer");
        let region = RegionSpec {
            base_page,
            ..RegionSpec::default()
        };
        let begun = writer.begin_region(&region);
        let result = begun.and_then(|()| writer.write_from_base(pages));
        let error = result.expect_err("refused");
        assert!(matches!(error, WriteError::Argument { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    };
    refused(
        Some(0),
        601,
        "601 from its page 0 on, where its region has 600 more",
    );
    refused(
        Some(512),
        89,
        "89 from its page 512 on, where its region has 88 more",
    );
    refused(Some(1024), 1, "has 0 more");
    refused(Some(1), 600, "600 from its page 1 on");
    refused(None, 1, "RegionSpec::base_page");
    refused(Some(u64::MAX - 511), 1, "has 0 more");
    let mut alone = Writer::new(Vec::new(), options()).expect("writer");
    let region = RegionSpec {
        base_page: Some(0),
        ..RegionSpec::default()
    };
    assert!(alone.begin_region(&region).is_err());
    let mut alone = Writer::new(Vec::new(), options()).expect("writer");
    alone
        .begin_region(&RegionSpec::default())
        .expect("a region");
    let error = alone.write_from_base(1).expect_err("no base");
    assert!(error.to_string().contains("WriterOptions::base"), "{error}");
}

/// Writes a child that is as its base, whose pages lie in `ancestors` other files.
fn write_child_of_many(ancestors: usize) -> Result<Written, WriteError> {
    let mut frames = Vec::new();
    let files: Vec<chain::File> = (0..ancestors)
        .map(|number| {
            let name = format!("{number:04}.snap");
            let mut file = chain::Encoder::new(&name, &[("ram", 1)], &[]);
            let frame = file.frame(0, &[number as u64], false);
            file.block(&[chain::Entry::Stored(frame.clone(), 0)]);
            frames.push(frame);
            file.finish()
        })
        .collect();
    let all: Vec<&chain::File> = files.iter().collect();
    let pages = ancestors as u64;
    let mut base = chain::Encoder::new("base.snap", &[("ram", pages)], &all);
    let entries: Vec<chain::Entry> = (1..)
        .zip(&frames)
        .map(|(layer, frame)| chain::Entry::Stored(frame.of(layer), 0))
        .collect();
    for block in entries.chunks(512) {
        base.block(block);
    }
    let snapshot = chain::open(&base.finish(), &all).expect("open");
    assert_eq!(snapshot.ancestors().len(), ancestors);
    let options = WriterOptions {
        base: Some(Arc::new(snapshot)),
        ..options()
    };
    let mut writer = Writer::new(Vec::new(), options).expect("writer");
    let region = RegionSpec {
        base_page: Some(0),
        ..RegionSpec::default()
    };
    writer.begin_region(&region).expect("region");
    writer.write_from_base(pages)?;
    Ok(writer.finish()?.1)
}

/// The base itself is an ancestor, too: its index blocks are used.
#[test]
fn child_of_more_than_1024_files_is_refused() {
    let written = write_child_of_many(MAX_ANCESTORS - 1).expect("1024 files");
    assert_eq!(written.summary.pages, 1023);
    let error = write_child_of_many(MAX_ANCESTORS).expect_err("1025 files");
    let WriteError::Limit { .. } = error else {
        panic!("{error}");
    };
    assert!(error.to_string().contains("ancestors"), "{error}");
}

#[test]
fn damage_of_the_base_is_an_error_that_names_it() {
    let base = write(&vec![data(0..100)], None, options());
    let mut bytes = base.bytes.clone();
    bytes[4096 + 100] ^= 1;
    let snapshot = Snapshot::open(Arc::new(MemoryStore::named(bytes, "the base"))).expect("open");
    let damaged = File {
        snapshot: Arc::new(snapshot),
        bytes: base.bytes.clone(),
        written: base.written.clone(),
        memory: base.memory.clone(),
    };
    let options = WriterOptions {
        base: Some(damaged.snapshot),
        ..options()
    };
    let mut writer = Writer::new(Vec::new(), options).expect("writer");
    let region = RegionSpec {
        base_page: Some(0),
        ..RegionSpec::default()
    };
    writer.begin_region(&region).expect("region");
    writer.write_pages(&pattern(7777)).expect("page");
    let result = writer
        .write_from_base(99)
        .and_then(|()| writer.finish().map(drop));
    let error = result.expect_err("damaged");
    let source = std::error::Error::source(&error).expect("a source");
    assert!(
        source.to_string().starts_with("the base: damaged frame"),
        "{source}"
    );
}

/// A full image has all bytes: the block is stored whole, and the damage is reported.
#[test]
fn damaged_block_of_the_base_is_stored_whole_if_all_bytes_are_given() {
    let base = write(&vec![data(0..1100)], None, options());
    let mut bytes = base.bytes.clone();
    bytes[4096 + 100] ^= 1;
    let snapshot = Snapshot::open(Arc::new(MemoryStore::named(bytes, "the base"))).expect("open");
    let snapshot = Arc::new(snapshot);
    let mut memory = base.memory.clone();
    for page in [0, 600] {
        memory[0][page] = Content::Data(9000 + page as u64);
    }
    let options = WriterOptions {
        base: Some(Arc::clone(&snapshot)),
        ..options()
    };
    let mut writer = Writer::new(Vec::new(), options).expect("writer");
    let region = RegionSpec {
        base_page: Some(0),
        ..RegionSpec::default()
    };
    writer.begin_region(&region).expect("region");
    for page in &memory[0] {
        give(&mut writer, *page);
    }
    let damage = writer.base_damage().expect("settled").expect("damage");
    assert_eq!(damage.blocks, 1);
    assert!(
        damage.first.starts_with("the base: damaged frame"),
        "{damage:?}"
    );
    assert!(writer.write_fill(1, 0).is_err(), "the region has ended");
    let refused = writer.finish();
    assert!(matches!(refused, Err(WriteError::Stopped)));

    let child = write(
        &memory,
        Some((&File { snapshot, ..base }, How::Full)),
        self::options(),
    );
    // All of the damaged block, and one page of the second.
    assert_eq!(child.written.summary.stored_pages, 512 + 1);
    assert_eq!(check(&child), 1100 - 513);
}

/// A child with a few changed pages costs these pages and, for each changed block, its index.
#[test]
fn size_of_a_child_is_that_of_the_changes() {
    let base = write(&vec![data(0..4096)], None, options());
    let mut memory = base.memory.clone();
    let mut changed = Vec::new();
    for block in [0, 2, 5] {
        for page in 0..40u64 {
            let at = block * 512 + page;
            memory[0][usize::try_from(at).expect("small")] = Content::Data(10_000 + at);
            changed.push(Content::Data(10_000 + at));
        }
    }
    let child = write(&memory, Some((&base, How::Diff)), options());
    check(&child);
    let plain = write(&vec![changed], None, options());
    let most = plain.written.summary.stored_bytes + 4096;
    assert!(child.written.summary.stored_bytes <= most);
    // Uncompressed, each of the three index blocks has at least an entry for each page.
    let index = child.written.summary.index_bytes;
    let plain_index = 3 * (size_of::<RawIndexHeader>() as u64 + 512 * 4);
    assert!(index < plain_index, "{index} bytes of index");
}

/// A frame that several blocks name is decoded for the first of them only.
#[test]
fn frames_of_the_base_are_decoded_once() {
    // Frames of 7 pages reach over the borders of blocks, and each block repeats pages of block 0.
    let options = || WriterOptions {
        frame_pages: 7,
        ..options()
    };
    let mut memory = vec![data(0..2048)];
    for block in 1..4 {
        for page in 0..50 {
            memory[0][block * 512 + page] = Content::Data(page as u64 * 10);
        }
    }
    let base = write(&memory, None, options());
    let store = Arc::new(Counting::new(base.bytes.clone()));
    let counted = Arc::clone(&store) as Arc<dyn Store>;
    let counted = File {
        snapshot: Arc::new(Snapshot::open(counted).expect("open")),
        bytes: base.bytes.clone(),
        written: base.written.clone(),
        memory: base.memory.clone(),
    };
    for block in 0..4 {
        memory[0][block * 512 + 100] = Content::Data(9000 + block as u64);
    }
    for how in [How::Diff, How::Full] {
        let child = write(&memory, Some((&counted, how)), options());
        let (reads, _) = store.take(Reason::Prefetch);
        assert_eq!(reads, base.written.summary.frames + 4, "{how:?}");
        assert_eq!(child.written.summary.stored_pages, 4, "{how:?}");
        check(&child);
    }
}

/// The first pages of an ancestor's frame are decoded alone, with a dictionary too.
#[test]
fn frames_of_ancestors_are_decoded_in_steps() {
    let options = || WriterOptions {
        dictionary: Dictionary::Use([pattern(3), pattern(900)].concat()),
        frame_pages: 32,
        ..options()
    };
    let base = write(&vec![data(0..512)], None, options());
    let mut memory = base.memory.clone();
    memory[0][100] = Content::Data(7000);
    let child = write(&memory, Some((&base, How::Diff)), options());
    check(&child);
    let snapshot = &child.snapshot;
    let mut decoder = FrameDecoder::in_steps(snapshot).expect("a decoder");
    let Ok(Page::Stored { frame, .. }) = snapshot.look_up(0, Reason::Demand) else {
        panic!("page 0 is stored");
    };
    assert_eq!(frame.layer(), 1);
    let mut out = vec![0; frame.decoded_len()];
    let first = decoder.decode_first(snapshot, &frame, Reason::Demand, 1, &mut out);
    let (_, ready) = first.expect("the first page");
    assert!(ready > 0 && ready < frame.slots(), "{ready} pages");
    assert_eq!(out[..PAGE_SIZE], pattern(0));
    decoder
        .decode_rest(snapshot, &frame, &mut out)
        .expect("the rest");
    assert_eq!(out[31 * PAGE_SIZE..], pattern(31));
}

/// A change of a layer: pages `first..` of a region become these.
type Change = (usize, usize, usize, Content);

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        5 => (0u64..400).prop_map(Content::Data),
        2 => Just(Content::Fill(0)),
        1 => (0u64..3).prop_map(Content::Fill),
        1 => Just(Content::Unavailable),
    ]
}

/// Changes that make a layer, a new length of its first region, and how it is given.
type Edit = (Vec<Change>, Option<usize>, How);

fn layers() -> impl Strategy<Value = (Memory, Vec<Edit>)> {
    let region = (1usize..1200, 0u64..200).prop_map(|(pages, seed)| {
        let numbers = (0..pages as u64).map(|page| seed + page % 300);
        numbers.map(Content::Data).collect::<Vec<_>>()
    });
    let memory = prop::collection::vec(region, 1..3);
    let change = (0usize..3, 0usize..1400, 1usize..60, content());
    let how = prop_oneof![
        3 => Just(How::Diff),
        3 => Just(How::Full),
        1 => Just(How::Unrelated),
    ];
    let new_len = prop_oneof![3 => Just(None), 1 => (1usize..1400).prop_map(Some)];
    let layer = (prop::collection::vec(change, 0..6), new_len, how);
    (memory, prop::collection::vec(layer, 1..5))
}

/// Writes a file of `memory`, and for each edit a child of the file before.
fn chain_of(memory: Memory, edits: Vec<Edit>) -> Vec<File> {
    let mut files = vec![write(&memory, None, options())];
    let mut memory = memory;
    for (changes, new_len, how) in edits {
        if let Some(len) = new_len {
            memory[0].resize(len, Content::Fill(9));
        }
        for (region, first, count, content) in changes {
            let regions = memory.len();
            let pages = &mut memory[region % regions];
            let first = first % pages.len();
            let end = (first + count).min(pages.len());
            for (n, page) in (0..).zip(&mut pages[first..end]) {
                *page = match content {
                    Content::Data(seed) => Content::Data(seed + n),
                    other => other,
                };
            }
        }
        let base = files.last().expect("the first");
        let child = write(&memory, Some((base, how)), options());
        files.push(child);
    }
    files
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every layer of a chain of random edits is exactly its memory.
    #[test]
    fn every_layer_reads_back_exactly((memory, edits) in layers()) {
        for file in &chain_of(memory, edits) {
            check(file);
        }
    }
}
