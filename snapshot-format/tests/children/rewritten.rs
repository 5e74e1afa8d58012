//! Chains that are flattened, and children that get another base: the memory stays the same.

use super::*;
use crate::common::Sample;
use snapshot_format::layout::{
    RawSectionEntry, RawSummary, RawTrailer, SectionKind, TRAILER_BYTES, codec,
};
use snapshot_format::{
    AllowMissing, Codec, RewriteOptions, Rewritten, WorkingSetRun, flatten, rebase,
};

pub(super) fn rewrite_options() -> RewriteOptions {
    RewriteOptions {
        threads: Some(2),
        ..RewriteOptions::default()
    }
}

/// Opens the bytes of a rewritten file, and compares it with the memory.
fn checked(
    (bytes, rewritten): (Vec<u8>, Rewritten),
    memory: &Memory,
    ancestors: Given,
) -> (File, Rewritten) {
    let store = Arc::new(MemoryStore::named(bytes.clone(), "rewritten"));
    let options = SnapshotOptions::default().ancestors(Arc::new(ancestors));
    let snapshot = Snapshot::open_with(store, &options).expect("open");
    let file = File {
        bytes,
        written: rewritten.written.clone(),
        snapshot: Arc::new(snapshot),
        memory: memory.clone(),
    };
    let in_ancestors = check_with(&file, rewritten.dead_slots);
    assert_eq!(rewritten.written.ancestor_pages, in_ancestors);
    (file, rewritten)
}

/// Flattens a file, and compares the result with its memory.
pub(super) fn flat(file: &File) -> (File, Rewritten) {
    let result = flatten(Vec::new(), &file.snapshot, rewrite_options()).expect("flatten");
    let (flat, rewritten) = checked(result, &file.memory, Given::default());
    assert!(flat.snapshot.ancestors().is_empty());
    (flat, rewritten)
}

/// Opens a child of which no ancestor is available.
fn alone(child: &File) -> Arc<Snapshot> {
    let store = Arc::new(MemoryStore::named(child.bytes.clone(), "the child"));
    let nothing = AllowMissing(Arc::new(Given::default()));
    let options = SnapshotOptions::default().ancestors(Arc::new(nothing));
    Arc::new(Snapshot::open_with(store, &options).expect("open"))
}

pub(super) fn rebased(child: &File, base: &File) -> (File, Rewritten) {
    let result = rebase(
        Vec::new(),
        &child.snapshot,
        &base.snapshot,
        rewrite_options(),
    );
    checked(result.expect("rebase"), &child.memory, ancestors_of(base))
}

fn payloads(file: &File) -> HashMap<u64, (u16, Codec)> {
    let mut frames = HashMap::new();
    for block in 0..file.snapshot.block_count() {
        let index = file.snapshot.index_block(block, Reason::Demand);
        for frame in index.expect("index block").frames() {
            frames.insert(frame.offset(), (frame.slots(), frame.codec()));
        }
    }
    frames
}

#[test]
fn frames_mostly_in_use_are_copied_and_others_packed_anew() {
    // Frames have 8 pages.
    let base = write(&vec![data(0..64)], None, options());
    let mut memory = base.memory.clone();
    // Five pages of the second frame, four of the third, and one of each of the fourth and fifth.
    for page in (8..13).chain(16..20).chain([24, 32]) {
        memory[0][page] = Content::Data(1000 + page as u64);
    }
    let child = write(&memory, Some((&base, How::Diff)), options());
    let (flat, rewritten) = flat(&child);
    // Of the base all but the second, and the two of the child, of 8 and of 3 pages.
    assert_eq!(rewritten.copied_frames, 7 + 2);
    assert_eq!(rewritten.dead_slots, 4 + 1 + 1);
    let summary = flat.written.summary;
    assert_eq!(summary.frames, 7 + 2 + 1);
    assert_eq!(summary.stored_pages, 64 + rewritten.dead_slots);
    let slots: Vec<u16> = payloads(&flat).values().map(|(slots, _)| *slots).collect();
    assert_eq!(slots.iter().filter(|slots| **slots == 3).count(), 2);

    // A flat file is copied frame by frame, and one in which less is in use gets smaller.
    let mut less = flat.memory.clone();
    less[0].truncate(3);
    let small = write(&less, Some((&flat, How::Full)), options());
    let (small, rewritten) = super::rewritten::flat(&small);
    assert_eq!((rewritten.copied_frames, rewritten.dead_slots), (0, 0));
    assert_eq!(small.written.summary.stored_pages, 3);
}

#[test]
fn payloads_of_copied_frames_are_the_same_bytes() {
    let base = write(&vec![data(0..600)], None, options());
    let (flat, rewritten) = flat(&base);
    assert_eq!(rewritten.copied_frames, base.written.summary.frames);
    assert_eq!(rewritten.dead_slots, 0);
    // Nothing else differs, so all of the file's length is the same.
    assert_eq!(flat.bytes.len(), base.bytes.len());
    assert_ne!(flat.written.id, base.written.id);
    let same = flat.bytes.iter().zip(&base.bytes).filter(|(a, b)| a == b);
    assert!(same.count() > flat.bytes.len() - 4096);
}

#[test]
fn attachments_working_sets_and_properties_are_kept() {
    let sample = Sample::new();
    let snapshot = Arc::new(sample.open().expect("open"));
    let options = RewriteOptions {
        properties: vec![("note".into(), "flat".into())],
        ..rewrite_options()
    };
    let (bytes, rewritten) = flatten(Vec::new(), &snapshot, options).expect("flatten");
    let store = Arc::new(MemoryStore::new(bytes));
    let flat = Snapshot::open(Arc::clone(&store) as _).expect("open");
    let report = verify(store, VerifyOptions::default()).expect("verify");
    assert_eq!(report.problems, []);
    let (old, new) = (snapshot.summary(), flat.summary());
    assert_eq!(old.content_digest, new.content_digest);
    assert_eq!(old.state_digest, new.state_digest);
    assert_eq!(rewritten.written.summary, *new);
    assert_eq!(snapshot.regions(), flat.regions());
    let names = snapshot.attachments().expect("attachments");
    assert_eq!(names, flat.attachments().expect("attachments"));
    assert!(!names.is_empty());
    for attachment in &names {
        let bytes = |snapshot: &Snapshot| snapshot.attachment_bytes(&attachment.name, 1 << 20);
        assert_eq!(bytes(&snapshot).expect("old"), bytes(&flat).expect("new"));
    }
    let sets = snapshot.working_sets().expect("sets");
    assert_eq!(sets, flat.working_sets().expect("sets"));
    assert!(!sets.is_empty());
    for set in &sets {
        let runs = |snapshot: &Snapshot| -> Vec<WorkingSetRun> {
            snapshot.working_set(&set.name).expect("runs")
        };
        assert_eq!(runs(&snapshot), runs(&flat));
    }
    let kept = snapshot.properties().expect("properties");
    let properties = flat.properties().expect("properties");
    for property in kept.iter().filter(|(key, _)| !key.starts_with("writer")) {
        assert!(properties.contains(property), "{property:?}");
    }
    assert!(properties.contains(&("note".into(), "flat".into())));
    assert_eq!(flat.dictionaries().expect("dictionaries").len(), 1);
}

/// A chain with dictionaries of the same number in two files, frames and index blocks of all three,
/// and blocks at other places than in the files that hold them.
#[test]
fn chain_that_uses_all_of_the_format_is_flattened() {
    let chain::Three { a, b, c } = chain::three();
    let snapshot = Arc::new(chain::open(&c, &[&b, &a]).expect("open"));
    let (bytes, rewritten) = flatten(Vec::new(), &snapshot, rewrite_options()).expect("flatten");
    let store = Arc::new(MemoryStore::new(bytes));
    let flat = Snapshot::open(Arc::clone(&store) as _).expect("open");
    let report = verify(store, VerifyOptions::default()).expect("verify");
    assert_eq!(report.problems, []);
    let digest = snapshot.summary().content_digest;
    assert_eq!(flat.summary().content_digest, digest);
    assert_eq!(flat.dictionaries().expect("dictionaries").len(), 2);
    let with_dictionary = (0..flat.block_count()).flat_map(|block| {
        let index = flat.index_block(block, Reason::Demand).expect("index");
        index.frames().to_vec()
    });
    let mut numbers: Vec<Codec> = with_dictionary.map(|frame| frame.codec()).collect();
    numbers.retain(|codec| matches!(codec, Codec::ZstdDictionary(_)));
    numbers.sort_by_key(|codec| format!("{codec:?}"));
    numbers.dedup();
    let expected = [Codec::ZstdDictionary(1), Codec::ZstdDictionary(2)];
    assert_eq!(numbers, expected);
    assert_eq!(codec::ZSTD_DICTIONARY, 2);
    assert!(rewritten.copied_frames > 3);
}

#[test]
fn damage_of_an_ancestor_fails_flattening_with_its_name() {
    let base = write(&vec![data(0..100)], None, options());
    let mut memory = base.memory.clone();
    memory[0][3] = Content::Data(5000);
    let child = write(&memory, Some((&base, How::Diff)), options());
    // All frames are copied, and none is decoded.
    let (_, rewritten) = flat(&child);
    assert_eq!(rewritten.copied_frames, rewritten.written.summary.frames);
    let index = base.snapshot.index_block(0, Reason::Demand).expect("index");
    let frame = index.frames()[0];
    let record = usize::try_from(frame.offset()).unwrap()..;
    let record = record.start..record.start + frame.stored_len() as usize;
    let mut damaged = 0;
    for at in record {
        let mut bytes = base.bytes.clone();
        bytes[at] ^= 1;
        let layer = Layer::open(Arc::new(MemoryStore::named(bytes, "the base"))).expect("layer");
        let options = SnapshotOptions::default().ancestors(Arc::new(Given(vec![Arc::new(layer)])));
        let store = Arc::new(MemoryStore::new(child.bytes.clone()));
        let snapshot = Snapshot::open_with(store, &options).expect("open");
        let result = flatten(Vec::new(), &Arc::new(snapshot), rewrite_options());
        let error = result.expect_err("damaged");
        assert!(matches!(error, WriteError::CopiedFrame(_)), "{error}");
        let source = std::error::Error::source(&error).expect("a source");
        let told = source.to_string();
        assert!(
            told.contains("the base: damaged frame"),
            "byte {at}: {told}"
        );
        damaged += 1;
    }
    assert!(damaged > 100, "{damaged} bytes");
}

/// Digests that were recorded wrongly, with right checksums, aren't passed on.
#[test]
fn wrong_digests_are_found_when_flattening() {
    let flattened = |sample: &Sample| {
        let snapshot = Arc::new(sample.open().expect("open"));
        let error = flatten(Vec::new(), &snapshot, rewrite_options()).expect_err("wrong");
        let source = std::error::Error::source(&error).expect("a source");
        source.to_string()
    };
    let mut sample = Sample::new();
    let at = sample.section(SectionKind::BlockDigests).start;
    sample.bytes[at] ^= 1;
    sample.seal();
    let told = flattened(&sample);
    assert!(told.contains("content digest"), "{told}");
    for (field, name) in [
        (
            std::mem::offset_of!(RawSummary, content_digest),
            "content digest",
        ),
        (
            std::mem::offset_of!(RawSummary, state_digest),
            "state digest",
        ),
    ] {
        let mut sample = Sample::new();
        let at = sample.trailer() + std::mem::offset_of!(RawTrailer, summary) + field;
        sample.bytes[at] ^= 1;
        sample.seal();
        let told = flattened(&sample);
        assert!(told.contains("damaged trailer"), "{told}");
        assert!(told.contains(name), "{told}");
    }
}

/// Without recorded digests the pages are decoded to compute them.
#[test]
fn file_without_block_digests_is_flattened() {
    let mut sample = Sample::new();
    let at = sample.entry_of(SectionKind::BlockDigests);
    sample.put_u32(at, 2000);
    sample.seal();
    let snapshot = Arc::new(sample.open().expect("open"));
    let (bytes, rewritten) = flatten(Vec::new(), &snapshot, rewrite_options()).expect("flatten");
    assert!(rewritten.copied_frames > 0);
    let report = verify(Arc::new(MemoryStore::new(bytes)), VerifyOptions::default());
    assert_eq!(report.expect("verify").problems, []);
}

/// Returns the file with one bit of the first block's recorded digest changed, and the checksums
/// corrected.
fn with_wrong_digest(file: &File) -> Vec<u8> {
    let mut bytes = file.bytes.clone();
    let trailer = bytes.len() - TRAILER_BYTES;
    let number = |bytes: &[u8], at: usize, len: usize| {
        let mut word = [0; 8];
        word[..len].copy_from_slice(&bytes[at..at + len]);
        usize::try_from(u64::from_le_bytes(word)).expect("small")
    };
    let first = trailer + std::mem::offset_of!(RawTrailer, sections);
    let entry = (0..64)
        .map(|entry| first + entry * size_of::<RawSectionEntry>())
        .find(|at| number(&bytes, *at, 4) == SectionKind::BlockDigests as usize)
        .expect("digests");
    let (from, len) = (number(&bytes, entry + 8, 8), number(&bytes, entry + 16, 8));
    bytes[from] ^= 1;
    let crc = crc32fast::hash(&bytes[from..from + len]);
    bytes[entry + 4..entry + 8].copy_from_slice(&crc.to_le_bytes());
    let end = trailer + std::mem::offset_of!(RawTrailer, crc);
    let crc = crc32fast::hash(&bytes[trailer..end]);
    bytes[end..end + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn wrong_digest_of_a_block_is_found_by_a_rebase() {
    let base = write(&vec![data(0..600)], None, options());
    let mut memory = base.memory.clone();
    memory[0][3] = Content::Data(5000);
    let child = write(&memory, Some((&base, How::Diff)), options());
    let store = MemoryStore::named(with_wrong_digest(&child), "the child");
    let options = SnapshotOptions::default().ancestors(Arc::new(ancestors_of(&base)));
    let child = Snapshot::open_with(Arc::new(store), &options).expect("open");
    let error = rebase(
        Vec::new(),
        &Arc::new(child),
        &flat(&base).0.snapshot,
        rewrite_options(),
    );
    let error = error.expect_err("wrong");
    let source = std::error::Error::source(&error).expect("a source");
    let source = source.to_string();
    assert!(source.contains("block 0 has another digest"), "{source}");
}

#[test]
fn child_moves_to_the_flattened_base_without_the_old_one() {
    let first = write(&vec![data(0..1600)], None, options());
    let mut memory = first.memory.clone();
    memory[0][5] = Content::Data(7001);
    let second = write(&memory, Some((&first, How::Diff)), options());
    memory[0][6] = Content::Data(7002);
    memory[0][700] = Content::Fill(3);
    let child = write(&memory, Some((&second, How::Diff)), options());
    let (base, _) = flat(&second);

    let (moved, _) = rebased(&child, &base);
    let ids = |file: &File| -> Vec<_> {
        let ancestors = file.snapshot.ancestors().iter();
        ancestors.map(|layer| layer.id()).collect()
    };
    assert_eq!(ids(&moved), [base.written.id]);
    assert_eq!(moved.written.summary.stored_pages, 1);

    let result = rebase(
        Vec::new(),
        &alone(&child),
        &base.snapshot,
        rewrite_options(),
    );
    let (lone, rewritten) = checked(result.expect("rebase"), &child.memory, ancestors_of(&base));
    assert_eq!(ids(&lone), [base.written.id]);
    assert_eq!(lone.written.summary.stored_pages, 1);
    assert_eq!(rewritten.copied_frames, 1);
}

/// A page whose content lay elsewhere in the base is found there by its digest, if the old base is
/// available.
#[test]
fn moved_pages_are_found_in_the_new_base() {
    let base = write(&vec![data(0..512)], None, options());
    let mut memory = base.memory.clone();
    memory[0][10] = Content::Data(200);
    memory[0][11] = Content::Data(9000);
    let child = write(&memory, Some((&base, How::Diff)), options());
    let (other, _) = flat(&base);
    let (moved, _) = rebased(&child, &other);
    assert_eq!(moved.written.summary.stored_pages, 1);

    let error = rebase(
        Vec::new(),
        &alone(&child),
        &other.snapshot,
        rewrite_options(),
    );
    let error = error.expect_err("the page's content is not known");
    assert!(
        matches!(error, WriteError::NotInBase { block: 0, .. }),
        "{error}"
    );
    assert!(error.to_string().starts_with("the child: its block 0"));
}

#[test]
fn page_that_the_new_base_lacks_is_stored() {
    let first = write(&vec![data(0..100)], None, options());
    let mut memory = first.memory.clone();
    memory[0][7] = Content::Data(8000);
    let second = write(&memory, Some((&first, How::Diff)), options());
    // The page returns to what the first file has.
    let child = write(&first.memory, Some((&second, How::Full)), options());
    assert_eq!(child.written.summary.stored_pages, 0);
    let plain = write(&second.memory, None, options());
    let (moved, _) = rebased(&child, &plain);
    assert_eq!(moved.written.summary.stored_pages, 1);
}

#[test]
fn unusable_new_bases_are_refused() {
    let base = write(&vec![data(0..600)], None, options());
    let mut memory = base.memory.clone();
    memory[0][3] = Content::Data(5000);
    let named = WriterOptions {
        properties: vec![("base.id".into(), base.written.id.to_string())],
        ..options()
    };
    let child = write(&memory, Some((&base, How::Diff)), named);
    let refused = |child: &Arc<Snapshot>, base: &File| {
        let result = rebase(Vec::new(), child, &base.snapshot, rewrite_options());
        result.expect_err("refused")
    };
    let error = refused(&base.snapshot, &base);
    assert!(matches!(error, WriteError::NotLayered { .. }), "{error}");
    memory[0][4] = Content::Data(5001);
    let grandchild = write(&memory, Some((&child, How::Diff)), options());
    assert_eq!(grandchild.snapshot.ancestors().len(), 2);
    let error = refused(&child.snapshot, &grandchild);
    assert!(matches!(error, WriteError::BaseOfItself { .. }), "{error}");
    let error = refused(&child.snapshot, &child);
    assert!(matches!(error, WriteError::BaseOfItself { .. }), "{error}");

    let mut another = base.memory.clone();
    another[0][9] = Content::Data(6000);
    let another = write(&another, None, options());
    let error = refused(&child.snapshot, &another);
    assert!(matches!(error, WriteError::OtherContent { .. }), "{error}");
    // Nothing is known of the old base, but the blocks tell.
    let error = refused(&alone(&child), &another);
    assert!(matches!(error, WriteError::NotInBase { .. }), "{error}");
}

#[test]
fn cancelled_or_failed_output_stops_a_rewrite() {
    let base = write(&vec![data(0..2000)], None, options());
    let options = RewriteOptions {
        progress: Some(Box::new(|_| std::ops::ControlFlow::Break(()))),
        ..rewrite_options()
    };
    let error = flatten(Vec::new(), &base.snapshot, options).expect_err("cancelled");
    assert!(matches!(error, WriteError::Cancelled), "{error}");
    let mut little = [0_u8; 10_000];
    let error = flatten(&mut little[..], &base.snapshot, rewrite_options());
    let error = error.expect_err("no room").to_string();
    assert!(error.starts_with("could not write"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    /// Every layer of a chain of random edits has the same memory when it is flattened, when it is
    /// flattened again, and when it gets its flattened base or a plain copy of it as its base.
    #[test]
    fn rewritten_layers_are_exactly_their_memory((memory, edits) in layers()) {
        let files = chain_of(memory, edits);
        for file in &files {
            let (once, _) = flat(file);
            let (twice, rewritten) = flat(&once);
            prop_assert!(rewritten.dead_slots <= once.written.summary.stored_pages);
            prop_assert!(twice.bytes.len() <= once.bytes.len() + 4096);
        }
        for pair in files.windows(2) {
            let (base, child) = (&pair[0], &pair[1]);
            if child.snapshot.ancestors().is_empty() {
                continue;
            }
            let (flattened, _) = flat(base);
            let larger = WriterOptions { frame_pages: 32, ..options() };
            for other in [flattened, write(&base.memory, None, larger)] {
                rebased(child, &other);
                // Without the old files it is the same, or an error.
                let result =
                    rebase(Vec::new(), &alone(child), &other.snapshot, rewrite_options());
                match result {
                    Ok(result) => {
                        checked(result, &child.memory, ancestors_of(&other));
                    }
                    Err(WriteError::NotInBase { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
}
