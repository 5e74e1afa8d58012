//! Children whose regions begin or end elsewhere than in the base, or whose content moved.

use super::*;
use snapshot_format::SnapshotId;
use snapshot_format::flatten;

/// Pages of a region, and the page of the base that is named as that of the first.
#[derive(Clone, Debug)]
struct Part {
    base_page: Option<u64>,
    pages: Vec<Content>,
    /// Set if pages that are as in the base are given as such.
    as_base: bool,
}

impl Part {
    fn new(base_page: impl Into<Option<u64>>, pages: Vec<Content>) -> Self {
        Self {
            base_page: base_page.into(),
            pages,
            as_base: false,
        }
    }

    fn diffed(self) -> Self {
        Self {
            as_base: true,
            ..self
        }
    }
}

/// Returns pages of the base, by number.
fn pages_of(base: &File) -> HashMap<u64, Content> {
    let regions = base.memory.iter().zip(first_pages(&base.memory));
    regions
        .flat_map(|(pages, first)| (first..).zip(pages.iter().copied()))
        .collect()
}

/// Returns the page after the last in the region of the base that has `page`.
fn region_end(base: &File, page: u64) -> u64 {
    let mut regions = base.memory.iter().zip(first_pages(&base.memory));
    let ends = regions.find_map(|(pages, first)| {
        let end = first + pages.len() as u64;
        (first..end).contains(&page).then_some(end)
    });
    ends.unwrap_or(page)
}

/// Writes a child of `base` whose regions consist of parts.
fn write_parts(regions: &[Vec<Part>], base: &File, options: WriterOptions) -> File {
    let options = WriterOptions {
        base: Some(Arc::clone(&base.snapshot)),
        ..options
    };
    let before = pages_of(base);
    let mut writer = Writer::new(Vec::new(), options).expect("writer");
    for (number, parts) in regions.iter().enumerate() {
        let region = RegionSpec {
            start: start(number),
            base_page: parts.first().and_then(|part| part.base_page),
            ..RegionSpec::default()
        };
        writer.begin_region(&region).expect("region");
        for part in parts {
            writer.set_base_page(part.base_page).expect("page");
            let end = part.base_page.map_or(0, |page| region_end(base, page));
            for (i, page) in (0..).zip(&part.pages) {
                let there = part.base_page.map(|first| first + i);
                let there = there.filter(|there| *there < end);
                let is_same = there.is_some_and(|there| before.get(&there) == Some(page));
                if part.as_base && is_same {
                    writer.write_from_base(1).expect("as in the base");
                } else {
                    give(&mut writer, *page);
                }
            }
        }
    }
    let memory = regions
        .iter()
        .map(|parts| parts.iter().flat_map(|part| part.pages.clone()).collect())
        .collect();
    let (bytes, written) = writer.finish().expect("finish");
    let name = format!("layer {}", written.id);
    let store = Arc::new(MemoryStore::named(bytes.clone(), name));
    let options = SnapshotOptions::default().ancestors(Arc::new(ancestors_of(base)));
    let snapshot = Snapshot::open_with(store, &options).expect("open");
    File {
        bytes,
        written,
        snapshot: Arc::new(snapshot),
        memory,
    }
}

/// Writes a child given as bytes, and one in which pages as in the base are given as such. Checks
/// both, and that they store `stored` pages.
#[track_caller]
fn stores(base: &File, regions: &[Vec<Part>], stored: u64) {
    let as_base = |part: &Part| part.clone().diffed();
    let as_base = |parts: &Vec<Part>| parts.iter().map(as_base).collect();
    for regions in [regions.to_vec(), regions.iter().map(as_base).collect()] {
        let child = write_parts(&regions, base, options());
        let all: u64 = child.memory.iter().map(|pages| pages.len() as u64).sum();
        assert_eq!(child.written.summary.stored_pages, stored);
        assert_eq!(check(&child), all - stored);
    }
}

#[test]
fn region_that_grew_at_its_start_stores_the_new_pages() {
    let base = write(&vec![data(0..1100)], None, options());
    for grown in [1, 3, 511, 512, 700] {
        let mut old = base.memory[0].clone();
        old[800] = Content::Data(7000);
        let new = Part::new(None, data(9000..9000 + grown));
        stores(&base, &[vec![new, Part::new(0, old)]], grown + 1);
    }
}

#[test]
fn region_that_lost_its_start_or_end_stores_nothing() {
    let base = write(&vec![data(0..1100), data(2000..2100)], None, options());
    for lost in [1usize, 8, 300, 513] {
        let rest = base.memory[0][lost..].to_vec();
        stores(&base, &[vec![Part::new(lost as u64, rest)]], 0);
        let rest = base.memory[0][..1100 - lost].to_vec();
        let after = Part::new(1536, base.memory[1].clone());
        stores(&base, &[vec![Part::new(0, rest), after]], 0);
    }
}

#[test]
fn regions_that_merged_or_split_store_nothing() {
    let base = write(&vec![data(0..700), data(2000..2300)], None, options());
    let (first, second) = (&base.memory[0], &base.memory[1]);
    let merged = vec![Part::new(0, first.clone()), Part::new(1024, second.clone())];
    stores(&base, &[merged], 0);
    let split = [
        vec![Part::new(0, first[..100].to_vec())],
        vec![Part::new(100, first[100..650].to_vec())],
        vec![Part::new(1024, second.clone())],
    ];
    stores(&base, &split, 0);
    // Parts of a few pages each, in the wrong order.
    let parts = (0..100).rev().map(|part| {
        let pages = first[part * 7..part * 7 + 7].to_vec();
        Part::new(part as u64 * 7, pages)
    });
    stores(&base, &[parts.collect()], 0);
}

/// A region that moved as a whole has the same blocks, so nothing is decoded.
#[test]
fn region_that_moved_as_a_whole_is_found_without_decoding() {
    let memory = vec![data(0..300), data(1000..2700)];
    let base = write(&memory, None, options());
    let store = Arc::new(Counting::new(base.bytes.clone()));
    let counted = Arc::clone(&store) as Arc<dyn Store>;
    let counted = File {
        snapshot: Arc::new(Snapshot::open(counted).expect("open")),
        ..base
    };
    let moved = vec![
        vec![Part::new(None, memory[1].clone())],
        vec![Part::new(None, memory[0].clone())],
    ];
    store.take(Reason::Prefetch);
    let child = write_parts(&moved, &counted, options());
    let (reads, _) = store.take(Reason::Prefetch);
    assert_eq!(reads, 5, "the index blocks");
    let summary = child.written.summary;
    assert_eq!((summary.frames, summary.index_bytes), (0, 0));
    check(&child);
}

/// Content is found at any distance, whether or not something is known to correspond there.
#[test]
fn content_that_moved_by_any_number_of_pages_is_found() {
    let base = write(&vec![data(0..1500), data(3000..4000)], None, options());
    for lost in [1usize, 7, 8, 100, 511, 512, 513] {
        for base_page in [None, Some(0), Some(1536)] {
            let rest = base.memory[0][lost..].to_vec();
            let child = write_parts(&[vec![Part::new(base_page, rest)]], &base, options());
            assert_eq!(
                child.written.summary.stored_pages, 0,
                "{lost} {base_page:?}"
            );
            check(&child);
        }
        // Moved in between other content, of which a part is new. Sampled pages are the first of
        // each half of a block.
        let rest = base.memory[0][lost % 250..].to_vec();
        let parts = vec![
            Part::new(None, data(9000..9100)),
            Part::new(None, rest),
            Part::new(None, base.memory[1].clone()),
        ];
        let child = write_parts(&[parts], &base, options());
        assert_eq!(child.written.summary.stored_pages, 100, "{lost}");
        check(&child);
    }
}

/// A few pages are not worth the search: the base is not read for them.
#[test]
fn moved_content_is_not_looked_for_in_a_diff_or_for_few_pages() {
    let base = write(&vec![data(0..1600)], None, options());
    let mut memory = base.memory[0].clone();
    let moved = memory[1000..1400].to_vec();
    memory[20..420].copy_from_slice(&moved);
    let full = Part::new(0, memory);
    let child = write_parts(&[vec![full.clone()]], &base, options());
    assert_eq!(child.written.summary.stored_pages, 0);
    check(&child);
    let child = write_parts(&[vec![full.diffed()]], &base, options());
    assert_eq!(child.written.summary.stored_pages, 400);
    check(&child);
    let few = Part::new(None, base.memory[0][700..763].to_vec());
    let child = write_parts(&[vec![few]], &base, options());
    assert_eq!(child.written.summary.stored_pages, 63);
    check(&child);
}

#[test]
fn damage_of_the_base_hides_moved_content_and_nothing_else() {
    let base = write(&vec![data(0..1600)], None, options());
    let mut bytes = base.bytes.clone();
    bytes[4096 + 100] ^= 1;
    let store = MemoryStore::named(bytes, "the base");
    let damaged = File {
        snapshot: Arc::new(Snapshot::open(Arc::new(store)).expect("open")),
        ..base
    };
    let memory = damaged.memory[0][1..].to_vec();
    let child = write_parts(&[vec![Part::new(None, memory)]], &damaged, options());
    // The first frame is damaged, so the base's first block can't be decoded.
    assert_eq!(child.written.summary.stored_pages, 511);
    check(&child);
}

/// The threads find the same, in whatever order they get to examine the blocks.
#[test]
fn file_does_not_depend_on_the_threads_that_look_for_moved_content() {
    let base = write(&vec![data(0..6000)], None, options());
    let parts = [
        Part::new(None, base.memory[0][5..3000].to_vec()),
        Part::new(None, data(9000..9700)),
        Part::new(3300, base.memory[0][3333..].to_vec()),
    ];
    let file = |threads| {
        let options = WriterOptions {
            threads: Some(threads),
            snapshot_id: Some(SnapshotId([7; 16])),
            ..options()
        };
        write_parts(&[parts.to_vec()], &base, options)
    };
    let one = file(1);
    assert_eq!(one.written.summary.stored_pages, 700);
    check(&one);
    for _ in 0..5 {
        assert!(file(4).bytes == one.bytes);
    }
}

/// A child of which pages lie at other places than in the base keeps them when that is flattened.
#[test]
fn shifted_pages_are_found_in_a_new_base() {
    let base = write(&vec![data(0..1600)], None, options());
    let parts = vec![
        Part::new(None, data(9000..9003)),
        Part::new(0, base.memory[0].clone()),
    ];
    let child = write_parts(&[parts], &base, options());
    let (bytes, rewritten) =
        flatten(Vec::new(), &base.snapshot, rewritten::rewrite_options()).expect("flatten");
    let store = Arc::new(MemoryStore::named(bytes.clone(), "flat"));
    let flat = File {
        snapshot: Arc::new(Snapshot::open(Arc::clone(&store) as _).expect("open")),
        written: rewritten.written,
        bytes,
        memory: base.memory.clone(),
    };
    let (moved, _) = rewritten::rebased(&child, &flat);
    assert_eq!(moved.written.summary.stored_pages, 3);
}

/// A part of a child: where it comes from in the base, and how that is told.
fn part() -> impl Strategy<Value = (u64, usize, u8, bool, Option<(usize, u64)>)> {
    let change = prop::option::of((0usize..400, 0u64..600));
    (0u64..2600, 1usize..700, 0u8..4, any::<bool>(), change)
}

/// Makes a part: pages of the base from `first` on, with a change, or new ones.
fn made(
    base: &File,
    (first, count, told, as_base, change): (u64, usize, u8, bool, Option<(usize, u64)>),
) -> Part {
    let before = pages_of(base);
    let pages = (first..first + count as u64).map(|page| {
        // The gap between two regions, and what lies behind the last.
        before
            .get(&page)
            .copied()
            .unwrap_or(Content::Data(page + 9000))
    });
    let mut pages: Vec<Content> = pages.collect();
    if let Some((at, seed)) = change {
        for page in pages.iter_mut().skip(at).take(50) {
            *page = Content::Data(seed);
        }
    }
    Part {
        base_page: match told {
            0 => None,
            // Another place than the right one.
            1 => Some(first / 2),
            _ => Some(first),
        },
        pages,
        as_base,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Children put together from any parts of their base hold exactly their memory, and so do
    /// their children, and both when they are flattened or get another base.
    #[test]
    fn shifted_layers_read_back_exactly(
        (memory, edits) in layers(),
        regions in prop::collection::vec(prop::collection::vec(part(), 1..4), 1..3),
        more in prop::collection::vec(prop::collection::vec(part(), 1..4), 1..3),
    ) {
        let mut files = chain_of(memory, edits.into_iter().take(1).collect());
        for regions in [regions, more] {
            let base = files.last().expect("the first");
            let parts = |parts: Vec<_>| parts.into_iter().map(|part| made(base, part)).collect();
            let regions: Vec<Vec<Part>> = regions.into_iter().map(parts).collect();
            let child = write_parts(&regions, base, options());
            check(&child);
            files.push(child);
        }
        for pair in files.windows(2) {
            let (base, child) = (&pair[0], &pair[1]);
            let (flat, _) = rewritten::flat(base);
            rewritten::flat(child);
            if !child.snapshot.ancestors().is_empty() {
                rewritten::rebased(child, &flat);
            }
        }
    }
}
