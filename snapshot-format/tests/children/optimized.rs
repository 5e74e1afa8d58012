//! Files with a working set at their front: the memory stays the same, and the pages come in order
//! of need.

use super::*;
use crate::common::Sample;
use snapshot_format::{
    OptimizeOptions, Optimized, RewriteOptions, WorkingSetRun, WorkingSetStats, flatten, optimize,
    rebase,
};

/// Pages of a frame in these tests.
const HOT: usize = 8;

fn optimize_options() -> OptimizeOptions {
    OptimizeOptions {
        rewrite: rewrite_options(),
        ..OptimizeOptions::default()
    }
}

fn rewrite_options() -> RewriteOptions {
    RewriteOptions {
        threads: Some(2),
        ..RewriteOptions::default()
    }
}

/// Optimizes a file, and compares the result with its memory.
fn optimized(file: &File, pages: &[u64], options: OptimizeOptions) -> (File, Optimized) {
    let (bytes, optimized) =
        optimize(Vec::new(), &file.snapshot, pages, options).expect("optimize");
    let ancestors = Given(file.snapshot.ancestors().to_vec());
    let options = SnapshotOptions::default().ancestors(Arc::new(ancestors));
    let name = format!("layer {}", optimized.rewritten.written.id);
    let store = Arc::new(MemoryStore::named(bytes.clone(), name));
    let snapshot = Snapshot::open_with(store, &options).expect("open");
    let new = File {
        bytes,
        written: optimized.rewritten.written.clone(),
        snapshot: Arc::new(snapshot),
        memory: file.memory.clone(),
    };
    let in_ancestors = check_with(&new, optimized.rewritten.dead_slots);
    assert_eq!(new.written.ancestor_pages, in_ancestors);
    assert_eq!(
        new.snapshot.summary().state_digest,
        file.snapshot.summary().state_digest
    );
    (new, optimized)
}

fn pages_of(runs: &[WorkingSetRun]) -> Vec<u64> {
    let runs = runs.iter();
    runs.flat_map(|run| run.first_page..run.first_page + run.pages)
        .collect()
}

fn working_set(file: &File, name: &str) -> Vec<u64> {
    pages_of(&file.snapshot.working_set(name).expect("the working set"))
}

/// Layer, offset and slot of a page, if it is stored.
fn place(snapshot: &Snapshot, page: u64) -> Option<(u16, u64, u16)> {
    match snapshot.look_up(page, Reason::Demand).expect("look up") {
        Page::Stored { frame, slot } => Some((frame.layer(), frame.offset(), slot)),
        _ => None,
    }
}

/// Finds naively how the file should be: the list of the working set, and the pages of each hot
/// frame.
fn expected(old: &Snapshot, pages: &[u64]) -> (Vec<u64>, Vec<Vec<u64>>) {
    let exists = |page: u64| {
        old.regions()
            .iter()
            .any(|r| r.page_numbers().contains(&page))
    };
    let mut order: Vec<u64> = Vec::new();
    for page in pages {
        if exists(*page) && !order.contains(page) {
            order.push(*page);
        }
    }
    let slots = |page: u64| match old.look_up(page, Reason::Demand) {
        Ok(Page::Stored { frame, .. }) => usize::from(frame.slots()),
        _ => 0,
    };
    // Frames of ancestors of which half is hot stay.
    let stays = |page: u64| {
        let Some((layer, offset, _)) = place(old, page) else {
            return true;
        };
        let mut hot: Vec<_> = order.iter().filter_map(|page| place(old, *page)).collect();
        hot.retain(|place| (place.0, place.1) == (layer, offset));
        hot.sort_unstable();
        hot.dedup();
        layer > 0 && 2 * hot.len() >= slots(page)
    };
    let mut list: Vec<u64> = Vec::new();
    let mut group: Vec<u64> = Vec::new();
    let mut seen: Vec<(u16, u64, u16)> = Vec::new();
    let mut frames: Vec<Vec<u64>> = Vec::new();
    for page in &order {
        let new = place(old, *page).filter(|place| !stays(*page) && !seen.contains(place));
        if let Some(new) = new {
            if seen.len().is_multiple_of(HOT) {
                if !frames.is_empty() {
                    group.sort_unstable();
                    list.append(&mut group);
                }
                frames.push(Vec::new());
            }
            seen.push(new);
            frames.last_mut().expect("a frame").push(*page);
        }
        group.push(*page);
    }
    group.sort_unstable();
    list.append(&mut group);
    // The lowest number counts among pages that share a slot.
    let lowest = |page: u64| {
        let same = order
            .iter()
            .filter(|other| place(old, **other) == place(old, page));
        same.min().copied().unwrap_or(page)
    };
    for frame in &mut frames {
        for page in frame.iter_mut() {
            *page = lowest(*page);
        }
        frame.sort_unstable();
    }
    (list, frames)
}

/// Compares the working set and the frames of a new file with the naive result.
fn check_order(old: &File, new: &File, pages: &[u64], set: &WorkingSetStats) {
    let (list, frames) = expected(&old.snapshot, pages);
    assert_eq!(working_set(new, "default"), list);
    assert_eq!(set.pages, list.len() as u64);
    assert_eq!(set.ignored_pages, (pages.len() - list.len()) as u64);
    assert_eq!(set.frames, frames.len() as u64);
    let mut at = 4096;
    for frame in &frames {
        for (page, slot) in frame.iter().zip(0..) {
            let found = place(&new.snapshot, *page);
            assert_eq!(found, Some((0, at, slot)), "page {page}");
        }
        let Ok(Page::Stored { frame, .. }) = new.snapshot.look_up(frame[0], Reason::Demand) else {
            panic!("page {} is stored", frame[0]);
        };
        at += u64::from(frame.stored_len());
    }
    assert_eq!(at, 4096 + set.stored_bytes, "the frames follow each other");
    let is_stored = |page: &&u64| place(&new.snapshot, **page).is_some();
    let not_stored = list.len() - list.iter().filter(is_stored).count();
    assert_eq!(set.not_stored_pages, not_stored as u64);
    let in_ancestors = |file: &File| {
        let layers = list.iter().filter_map(|page| place(&file.snapshot, *page));
        layers.filter(|(layer, _, _)| *layer > 0).count() as u64
    };
    assert_eq!(set.left_in_ancestors, in_ancestors(new));
    assert_eq!(
        set.left_in_ancestors + set.from_ancestors,
        in_ancestors(old)
    );
}

#[test]
fn working_set_lies_at_the_front_in_order_of_need() {
    let mut memory = vec![data(0..600), data(1000..1100)];
    memory[0][40] = Content::Fill(0);
    memory[0][41] = Content::Fill(7);
    memory[0][42] = Content::Unavailable;
    // A page of the same content as one of the working set, and one in it.
    memory[0][43] = Content::Data(300);
    memory[0][44] = Content::Data(301);
    let plain = write(&memory, None, options());
    let pages = [
        300, 40, 5, 599, 1024, 301, 44, 42, 600, 5, 1123, 1124, 9999, 7, 41, 8, 200, 100,
    ];
    let (file, told) = optimized(&plain, &pages, optimize_options());
    assert_eq!(
        (told.working_set.pages, told.working_set.ignored_pages),
        (14, 4)
    );
    assert_eq!(told.working_set.not_stored_pages, 3);
    check_order(&plain, &file, &pages, &told.working_set);
    // Two frames, of 8 slots and of 2.
    let first = [5, 7, 8, 40, 41, 42, 44, 300, 301, 599, 1024, 1123];
    let list = [&first[..], &[100, 200]].concat();
    assert_eq!(working_set(&file, "default"), list);
    assert_eq!(place(&file.snapshot, 43), place(&file.snapshot, 300));
    // Other frames are copied, the rest of those with hot pages is repacked.
    assert!(told.rewritten.copied_frames > 60);
    assert_eq!(told.rewritten.dead_slots, 0);
}

/// Index blocks lie together, so that one sequential read gets all that a replay needs.
#[test]
fn index_blocks_follow_each_other_behind_the_frames() {
    let plain = write(&vec![data(0..2000)], None, options());
    let (file, _) = optimized(&plain, &[1999, 3], optimize_options());
    let summary = file.written.summary;
    // The last frame is written behind the working set of two runs.
    let frames_end = 4096 + summary.stored_bytes + 2 * 16;
    let mut frame_ends = Vec::new();
    for block in 0..file.snapshot.block_count() {
        let index = file
            .snapshot
            .index_block(block, Reason::Demand)
            .expect("index");
        let ends = index
            .frames()
            .iter()
            .map(|f| f.offset() + u64::from(f.stored_len()));
        frame_ends.extend(ends);
    }
    assert_eq!(frame_ends.into_iter().max(), Some(frames_end));
}

#[test]
fn other_working_sets_are_kept_and_packed_behind() {
    let plain = write(&vec![data(0..600)], None, options());
    let named = |name: &str| OptimizeOptions {
        name: name.into(),
        ..optimize_options()
    };
    let (one, _) = optimized(&plain, &[500, 10, 400, 20, 300, 30], named("one"));
    let (two, told) = optimized(&one, &[77, 20, 400], named("two"));
    let sets_of = |file: &File| -> Vec<String> {
        let sets = file.snapshot.working_sets().expect("sets").into_iter();
        sets.map(|set| set.name).collect()
    };
    assert_eq!(sets_of(&two), ["two", "one"]);
    assert_eq!(working_set(&two, "one"), working_set(&one, "one"));
    assert_eq!((told.working_set.pages, told.working_set.frames), (3, 1));
    let frames: Vec<u64> = [77, 20, 400, 500, 10, 300, 30]
        .iter()
        .map(|page| place(&two.snapshot, *page).expect("stored").1)
        .collect();
    assert!(frames.is_sorted(), "{frames:?}");
    assert!(frames[2] < frames[3], "each set has frames of its own");
    let between = frames[3] - frames[0];
    assert!(
        (1..=between).contains(&told.working_set.stored_bytes),
        "{}",
        told.working_set.stored_bytes
    );
    assert_eq!(frames[3], frames[6]);
    // A set of the same name is replaced, and its pages are ordinary ones again.
    let (three, _) = optimized(&two, &[1], named("two"));
    assert_eq!(sets_of(&three), ["two", "one"]);
    assert_eq!(working_set(&three, "two"), [1]);
    let frame = |page| place(&three.snapshot, page).expect("stored").1;
    assert!(frame(77) > frame(10));
}

/// The last page of a region and the first of the next one have consecutive numbers.
#[test]
fn run_of_a_working_set_ends_with_its_region() {
    let plain = write(&vec![data(0..512), data(512..600)], None, options());
    let (new, _) = optimized(&plain, &[512, 511], optimize_options());
    let runs = new.snapshot.working_set("default").expect("a set");
    let runs: Vec<_> = runs.iter().map(|run| (run.first_page, run.pages)).collect();
    assert_eq!(runs, [(511, 1), (512, 1)]);
}

#[test]
fn attachments_dictionaries_and_properties_are_kept() {
    let sample = Sample::new();
    let snapshot = Arc::new(sample.open().expect("open"));
    let (bytes, told) = optimize(
        Vec::new(),
        &snapshot,
        &[1536, 4, 520, 0],
        optimize_options(),
    )
    .expect("optimize");
    let store = Arc::new(MemoryStore::new(bytes));
    let new = Snapshot::open(Arc::clone(&store) as _).expect("open");
    let report = verify(store, VerifyOptions::default()).expect("verify");
    assert_eq!(report.problems, []);
    assert_eq!(told.working_set.pages, 4);
    assert_eq!(new.summary().state_digest, snapshot.summary().state_digest);
    assert_eq!(new.regions(), snapshot.regions());
    let attachments = snapshot.attachments().expect("attachments");
    assert_eq!(new.attachments().expect("attachments"), attachments);
    for set in snapshot.working_sets().expect("sets") {
        let runs = |of: &Snapshot| of.working_set(&set.name).expect("runs");
        assert_eq!(runs(&new), runs(&snapshot));
    }
    let properties = new.properties().expect("properties");
    let kept = snapshot.properties().expect("properties");
    for property in kept.iter().filter(|(key, _)| !key.starts_with("writer")) {
        assert!(properties.contains(property), "{property:?}");
    }
}

/// Small frames need their dictionary, also if none of them is copied.
#[test]
fn repacked_frames_use_the_dictionary_of_the_file() {
    let with_dictionary = WriterOptions {
        frame_pages: 1,
        dictionary: Dictionary::Use(pattern(9999)),
        ..options()
    };
    let plain = write(&vec![data(0..20)], None, with_dictionary);
    let pages: Vec<u64> = (0..20).rev().collect();
    let (bytes, _) =
        optimize(Vec::new(), &plain.snapshot, &pages, optimize_options()).expect("optimize");
    let new = Snapshot::open(Arc::new(MemoryStore::new(bytes))).expect("open");
    assert_eq!(new.dictionaries().expect("dictionaries").len(), 1);
    let index = new.index_block(0, Reason::Demand).expect("index");
    for frame in index.frames() {
        assert_eq!(frame.codec(), snapshot_format::Codec::ZstdDictionary(1));
    }
}

#[test]
fn file_without_block_digests_is_optimized() {
    let mut sample = Sample::new();
    let at = sample.entry_of(snapshot_format::layout::SectionKind::BlockDigests);
    sample.put_u32(at, 2000);
    sample.seal();
    let snapshot = Arc::new(sample.open().expect("open"));
    let result = optimize(Vec::new(), &snapshot, &[520, 3, 1536], optimize_options());
    let report = verify(
        Arc::new(MemoryStore::new(result.expect("optimize").0)),
        VerifyOptions::default(),
    );
    assert_eq!(report.expect("verify").problems, []);
}

#[test]
fn damaged_working_sets_and_frames_are_refused() {
    let refused = |at: fn(&Sample) -> usize, says: &str| {
        let mut sample = Sample::new();
        let at = at(&sample);
        sample.bytes[at] ^= 1;
        let snapshot = Arc::new(sample.open().expect("open"));
        let error = optimize(Vec::new(), &snapshot, &[1, 2, 3], optimize_options());
        let error = error.expect_err("damaged");
        let source = std::error::Error::source(&error)
            .expect("a source")
            .to_string();
        assert!(source.contains(says), "{source}");
    };
    let working_sets = |sample: &Sample| {
        sample
            .section(snapshot_format::layout::SectionKind::WorkingSets)
            .start
    };
    refused(working_sets, "damaged working set section");
    let first_frame = |_: &Sample| 4096 + 200;
    refused(first_frame, "damaged frame");
}

#[test]
fn pages_of_sparse_ancestor_frames_move_to_the_child() {
    let base = write(&vec![data(0..2000)], None, options());
    let mut memory = base.memory.clone();
    memory[0][600] = Content::Data(7000);
    let child = write(&memory, Some((&base, How::Diff)), options());
    // Frames have 8 pages: half of one of the base's, one page of another, and the child's own.
    let pages = [1601, 1600, 600, 8, 1602, 1603];
    let (file, told) = optimized(&child, &pages, optimize_options());
    check_order(&child, &file, &pages, &told.working_set);
    assert_eq!(
        (
            told.working_set.left_in_ancestors,
            told.working_set.from_ancestors
        ),
        (4, 1)
    );
    assert_eq!(file.written.summary.stored_pages, 2);
    let ids: Vec<_> = file
        .snapshot
        .ancestors()
        .iter()
        .map(|layer| layer.id())
        .collect();
    assert_eq!(ids, [base.written.id]);
    // Blocks without a page of the working set are still those of the base.
    let summary = file.written.summary;
    assert!(
        summary.index_bytes < 2 * base.written.summary.index_bytes / 3,
        "{summary:?}"
    );
}

#[test]
fn children_of_an_optimized_base_are_rebased() {
    let base = write(&vec![data(0..1600)], None, options());
    let mut memory = base.memory.clone();
    memory[0][5] = Content::Data(7001);
    let child = write(&memory, Some((&base, How::Diff)), options());
    let (new, _) = optimized(&base, &[1500, 3, 900, 4, 5], optimize_options());
    let result = rebase(
        Vec::new(),
        &child.snapshot,
        &new.snapshot,
        rewrite_options(),
    );
    let (bytes, rewritten) = result.expect("rebase");
    assert_eq!(rewritten.written.summary.stored_pages, 1);
    let ancestors = SnapshotOptions::default().ancestors(Arc::new(ancestors_of(&new)));
    let store = Arc::new(MemoryStore::new(bytes.clone()));
    let moved = File {
        bytes,
        written: rewritten.written,
        snapshot: Arc::new(Snapshot::open_with(store, &ancestors).expect("open")),
        memory,
    };
    check(&moved);
    // The child of the optimized base finds all but its own page dense in the base.
    let (file, told) = optimized(&moved, &[1500, 3, 900, 4, 5], optimize_options());
    assert_eq!(
        (
            told.working_set.left_in_ancestors,
            told.working_set.from_ancestors
        ),
        (4, 0)
    );
    assert_eq!(file.written.summary.stored_pages, 1);
}

#[test]
fn unusable_names_are_refused() {
    let plain = write(&vec![data(0..20)], None, options());
    let refused = |options: OptimizeOptions| {
        let error = optimize(Vec::new(), &plain.snapshot, &[1], options).expect_err("refused");
        assert!(matches!(error, WriteError::Argument { .. }), "{error}");
    };
    for name in ["", "a/b", ".."] {
        refused(OptimizeOptions {
            name: name.into(),
            ..optimize_options()
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    /// Every layer of a chain of random edits has the same memory, and the order of the naive
    /// result, when it is optimized, when that is optimized again in another order, and when that
    /// is flattened.
    #[test]
    fn optimized_layers_are_as_found_naively(
        (memory, edits) in layers(),
        picks in proptest::collection::vec(0_u64..2600, 0..120),
    ) {
        for file in chain_of(memory, edits) {
            let slots = file.snapshot.page_slots().max(1);
            let pages: Vec<u64> = picks.iter().map(|pick| pick % (slots + 9)).collect();
            let (once, told) = optimized(&file, &pages, optimize_options());
            check_order(&file, &once, &pages, &told.working_set);
            let back: Vec<u64> = pages.iter().rev().copied().collect();
            let (twice, told) = optimized(&once, &back, optimize_options());
            check_order(&once, &twice, &back, &told.working_set);
            let (bytes, rewritten) =
                flatten(Vec::new(), &twice.snapshot, rewrite_options()).expect("flatten");
            let store = Arc::new(MemoryStore::new(bytes.clone()));
            let flat = File {
                bytes,
                written: rewritten.written,
                snapshot: Arc::new(Snapshot::open(store).expect("open")),
                memory: file.memory.clone(),
            };
            check_with(&flat, rewritten.dead_slots);
            prop_assert_eq!(working_set(&flat, "default"), working_set(&twice, "default"));
        }
    }
}
