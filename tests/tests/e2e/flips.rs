//! Every byte of a small snapshot, and of a chain of two, is flipped, and the snapshot is cut at
//! every length: the engine restores each page correctly or poisons it, and it poisons exactly the
//! pages of the bad frame.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use snaprestore_engine::restore::{FailurePolicy, Restore, Restored, StartError};
use snaprestore_engine::{Failure, FailureKind, Prefetch};
use snaprestore_fixtures::chain::InMemory;
use snaprestore_fixtures::images::{Mix, Shares};
use snaprestore_tests::compare::PAGE;
use snaprestore_tests::real::{can_restore, skip};
use snapshot_format::{
    FrameRef, Layer, MemoryStore, OpenError, Page, Reason, Region, RegionSpec, Snapshot,
    SnapshotOptions, Writer, WriterOptions,
};

const PAGES: u64 = 24;

/// Returns pages of every kind; most compress well, so that the file is small.
fn image() -> Mix {
    let shares = Shares {
        zero_single: 80,
        fill_single: 80,
        almost_fill: 540,
        text: 100,
        pointers: 100,
        copy_near: 100,
        ..Shares::NONE
    };
    Mix::with_shares(PAGES, 4, shares)
}

/// Returns a snapshot of `image` in several frames.
fn snapshot(image: &Mix) -> Vec<u8> {
    let options = WriterOptions {
        frame_pages: 4,
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_pages(&image.bytes()).unwrap();
    writer.finish().unwrap().0
}

/// Returns the byte range of each frame, and the pages in it.
fn frames(bytes: &[u8]) -> Vec<(Range<u64>, Vec<u64>)> {
    let snapshot = Snapshot::open(Arc::new(MemoryStore::new(bytes.to_vec()))).unwrap();
    let mut frames: BTreeMap<u64, (Range<u64>, Vec<u64>)> = BTreeMap::new();
    for page in 0..PAGES {
        if let Page::Stored { frame, .. } = snapshot.look_up(page, Reason::Verify).unwrap() {
            let at = frame.offset();
            let place = at..at + u64::from(frame.stored_len());
            frames.entry(at).or_insert((place, Vec::new())).1.push(page);
        }
    }
    frames.into_values().collect()
}

/// Starts a restore of a snapshot that may be damaged; `None` if it is refused as damaged.
fn start(snapshot: Vec<u8>, prefetch: Prefetch) -> Option<Restored> {
    start_opened(
        Snapshot::open(Arc::new(MemoryStore::new(snapshot))),
        prefetch,
    )
}

fn start_opened(opened: Result<Snapshot, OpenError>, prefetch: Prefetch) -> Option<Restored> {
    let snapshot = match opened {
        Ok(snapshot) => snapshot,
        Err(error) => {
            assert!(error.is_damage(), "{error}");
            return None;
        }
    };
    match restore(Arc::new(snapshot)).prefetch(prefetch).start() {
        Ok(restored) => Some(restored),
        Err(StartError::Snapshot(error)) => {
            assert!(error.is_damage(), "{error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn restore(snapshot: Arc<Snapshot>) -> Restore {
    Restore::new(snapshot)
        .fault_threads(1)
        .prefetch_threads(1)
        .retry_timeout(Duration::ZERO)
        .on_failure(FailurePolicy::Poison)
}

/// Returns whether this kernel supports poisoning pages.
fn can_poison(test: &str, image: &Mix) -> bool {
    let snapshot = Snapshot::open(Arc::new(MemoryStore::new(snapshot(image)))).unwrap();
    match restore(Arc::new(snapshot)).start() {
        Err(why @ StartError::NoPoison) => {
            skip(test, &why.to_string());
            false
        }
        started => {
            started.unwrap();
            true
        }
    }
}

/// Returns the pages that can't be read; all others must be correct.
fn poisoned(restored: &Restored, image: &Mix, case: &dyn std::fmt::Debug) -> Vec<u64> {
    let mut buffer = [0; PAGE];
    (0..PAGES)
        .filter(|page| {
            // Bytes left over from the previous page must not be taken for this one.
            buffer.fill(0xee);
            let read = restored.read_at(0, page * PAGE as u64, &mut buffer);
            if read.is_ok() {
                assert!(
                    buffer == image.page(*page),
                    "{case:?}: page {page} is WRONG"
                );
            }
            read.is_err()
        })
        .collect()
}

#[test]
fn a_flipped_byte_poisons_the_pages_of_its_frame_and_is_never_wrong() {
    let name = "a_flipped_byte_poisons_the_pages_of_its_frame_and_is_never_wrong";
    let image = image();
    if !can_restore(name) || !can_poison(name, &image) {
        return;
    }
    let good = snapshot(&image);
    let frames = frames(&good);
    assert!(frames.len() >= 4, "{} frames", frames.len());
    assert!(good.len() < 64 << 10, "{} bytes take too long", good.len());
    let whole = start(good.clone(), Prefetch::Off).unwrap();
    assert!(poisoned(&whole, &image, &"good").is_empty());

    let (mut refused, mut in_frames, mut harmless) = (0, 0, 0);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        // Now and then with the other prefetch mode.
        let prefetch = if at % 3 == 0 {
            Prefetch::All
        } else {
            Prefetch::Off
        };
        let Some(restored) = start(bad, prefetch) else {
            refused += 1;
            let hit = frames.iter().any(|(place, _)| place.contains(&(at as u64)));
            assert!(
                !hit,
                "byte {at}: a bad frame is no reason to refuse the rest"
            );
            continue;
        };
        let lost = poisoned(&restored, &image, &at);
        match frames
            .iter()
            .find(|(place, _)| place.contains(&(at as u64)))
        {
            Some((place, held)) => {
                assert_eq!(&lost, held, "byte {at}");
                let failures = restored.failures();
                let named = |page| {
                    failures.iter().any(|failure| {
                        failure.page == page
                            && failure.offset == Some(place.start)
                            && failure.kind == FailureKind::Damaged
                    })
                };
                assert!(
                    held.iter().any(|page| named(*page)),
                    "byte {at} of frame {place:?} with {held:?}: {failures:?}"
                );
                in_frames += 1;
            }
            None if lost.is_empty() => harmless += 1,
            // An index block: all pages that it describes may be lost, and at least the stored ones
            // are.
            None => {
                let mut all = frames.iter().flat_map(|(_, held)| held);
                assert!(all.all(|page| lost.contains(page)), "byte {at}: {lost:?}");
            }
        }
    }
    let stored: u64 = frames
        .iter()
        .map(|(place, _)| place.end - place.start)
        .sum();
    assert_eq!(in_frames, stored);
    assert!(
        refused > 0 && harmless < good.len() / 2,
        "{refused} {harmless}"
    );
}

#[test]
fn a_snapshot_cut_at_any_length_is_refused() {
    let good = snapshot(&image());
    for len in 0..good.len() {
        assert!(
            start(good[..len].to_vec(), Prefetch::Off).is_none(),
            "{len} bytes"
        );
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_restored_is_never_wrong() {
    let name = "a_file_that_shrinks_while_it_is_restored_is_never_wrong";
    let image = image();
    if !can_restore(name) || !can_poison(name, &image) {
        return;
    }
    let good = snapshot(&image);
    let frames = frames(&good);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&good).unwrap();
    for (cut, (place, _)) in frames.iter().enumerate() {
        let copy = tempfile::NamedTempFile::new().unwrap();
        std::fs::copy(file.path(), copy.path()).unwrap();
        let snapshot = Arc::new(Snapshot::open_path(copy.path()).unwrap());
        // The index is cached, the frames are not: only they are lost.
        snapshot.look_up(0, Reason::Demand).unwrap();
        let restored = restore(snapshot).start().unwrap();
        let half = place.start + (place.end - place.start) / 2;
        File::options()
            .write(true)
            .open(copy.path())
            .unwrap()
            .set_len(half)
            .unwrap();
        let mut gone: Vec<u64> = frames[cut..]
            .iter()
            .flat_map(|(_, held)| held.clone())
            .collect();
        gone.sort_unstable();
        assert_eq!(poisoned(&restored, &image, &cut), gone);
        let failures = restored.failures();
        let of_a_frame = |failure: &Failure| {
            let mut places = frames[cut..].iter().map(|(place, _)| place.start);
            places.any(|start| failure.offset == Some(start))
        };
        assert!(failures.iter().all(of_a_frame), "{failures:?}");
        assert!(failures.len() >= frames.len() - cut, "{failures:?}");
    }
}

/// Pages of each of the two regions of a chain's memory: each region is a block.
const REGION: usize = 10;

/// Two files of a chain, the child first, and the memory of the child.
struct Chain {
    files: [(&'static str, Vec<u8>); 2],
    memory: Vec<u8>,
}

impl Chain {
    /// Makes a child that changes pages of one block of two, so that the other block is the base's.
    fn new() -> Self {
        let shares = Shares {
            almost_fill: 600,
            text: 200,
            pointers: 200,
            ..Shares::NONE
        };
        let mut memory = Mix::with_shares(2 * REGION as u64, 4, shares).bytes();
        let write = |memory: &[u8], base: Option<Snapshot>| {
            let options = WriterOptions {
                frame_pages: 4,
                base: base.map(Arc::new),
                ..WriterOptions::default()
            };
            let is_child = options.base.is_some();
            let mut writer = Writer::new(Vec::new(), options).unwrap();
            for (number, pages) in (0..).zip(memory.chunks(REGION * PAGE)) {
                let region = RegionSpec {
                    start: number << 30,
                    base_page: is_child.then_some(number * 512),
                    ..RegionSpec::default()
                };
                writer.begin_region(&region).unwrap();
                writer.write_pages(pages).unwrap();
            }
            writer.finish().unwrap().0
        };
        let base = write(&memory, None);
        let opened = Snapshot::open(Arc::new(MemoryStore::named(base.clone(), "base"))).unwrap();
        let new = Mix::with_shares(3, 5, shares).bytes();
        memory[2 * PAGE..5 * PAGE].copy_from_slice(&new);
        let child = write(&memory, Some(opened));
        Self {
            files: [("child", child), ("base", base)],
            memory,
        }
    }

    /// Opens the child, with a byte of a file changed if one is given.
    fn open(&self, flip: Option<(usize, usize)>) -> Result<Snapshot, OpenError> {
        let store = |number: usize| {
            let (name, bytes) = &self.files[number];
            let mut bytes = bytes.clone();
            if let Some((_, at)) = flip.filter(|(file, _)| *file == number) {
                bytes[at] ^= 1 << (at % 8);
            }
            Arc::new(MemoryStore::named(bytes, *name))
        };
        // A file that is not a snapshot any more is found by nobody.
        let found = Layer::open(store(1))
            .ok()
            .map(Arc::new)
            .into_iter()
            .collect();
        let options = SnapshotOptions::default().ancestors(Arc::new(InMemory(found)));
        Snapshot::open_with(store(0), &options)
    }

    /// Returns the frames that the child's pages lie in, with the numbers of these pages.
    fn frames(&self) -> Vec<(FrameRef, Vec<u64>)> {
        let snapshot = self.open(None).unwrap();
        let mut frames: Vec<(FrameRef, Vec<u64>)> = Vec::new();
        for page in snapshot.regions().iter().flat_map(Region::page_numbers) {
            if let Page::Stored { frame, .. } = snapshot.look_up(page, Reason::Verify).unwrap() {
                match frames.iter_mut().find(|(known, _)| *known == frame) {
                    Some((_, pages)) => pages.push(page),
                    None => frames.push((frame, vec![page])),
                }
            }
        }
        frames
    }

    /// Returns the numbers of the pages that can't be read; all others must be correct.
    fn poisoned(&self, restored: &Restored, case: (&str, usize)) -> Vec<u64> {
        let mut lost = Vec::new();
        for (region, pages) in self.memory.chunks(REGION * PAGE).enumerate() {
            for (page, wanted) in pages.chunks(PAGE).enumerate() {
                let mut found = [0xee; PAGE];
                match restored.read_at(region, (page * PAGE) as u64, &mut found) {
                    Ok(()) => assert!(
                        found == wanted,
                        "{case:?}: page {page} of region {region} is WRONG"
                    ),
                    Err(_) => lost.push((region * 512 + page) as u64),
                }
            }
        }
        lost
    }
}

#[test]
fn a_flipped_byte_of_a_chain_poisons_the_pages_of_its_frame_by_file() {
    let name = "a_flipped_byte_of_a_chain_poisons_the_pages_of_its_frame_by_file";
    if !can_restore(name) || !can_poison(name, &image()) {
        return;
    }
    let chain = Chain::new();
    let frames = chain.frames();
    let in_file = |file: usize| {
        let all = frames.iter();
        all.filter(move |(frame, _)| usize::from(frame.layer()) == file)
    };
    assert!(in_file(0).count() > 0 && in_file(1).count() >= 3);
    for (file, (file_name, bytes)) in chain.files.iter().enumerate() {
        assert!(
            bytes.len() < 24 << 10,
            "{} bytes take too long",
            bytes.len()
        );
        let (mut refused, mut in_frames, mut in_index, mut harmless) = (0, 0, 0, 0);
        // Most of a header is reserved bytes, and nothing but a verifier reads them.
        for at in (0..64)
            .chain((64..4096).step_by(61))
            .chain(4096..bytes.len())
        {
            let case = (*file_name, at);
            let hit = in_file(file).find(|(frame, _)| {
                let end = frame.offset() + u64::from(frame.stored_len());
                (frame.offset()..end).contains(&(at as u64))
            });
            let prefetch = if at % 3 == 0 {
                Prefetch::All
            } else {
                Prefetch::Off
            };
            let restored = match chain.open(Some((file, at))) {
                // A damaged base is not found, which is no damage of the child.
                Err(OpenError::AncestorMissing { .. }) if file == 1 => None,
                opened => start_opened(opened, prefetch),
            };
            let Some(restored) = restored else {
                refused += 1;
                assert!(hit.is_none(), "{case:?}: a bad frame is no reason");
                continue;
            };
            let lost = chain.poisoned(&restored, case);
            let failures = restored.failures();
            let is_here = |failure: &Failure| failure.file == *file_name;
            assert!(failures.iter().all(is_here), "{case:?}: {failures:?}");
            match hit {
                Some((frame, held)) => {
                    assert_eq!(&lost, held, "{case:?}");
                    assert!(!failures.is_empty(), "{case:?}");
                    for failure in failures {
                        assert_eq!(failure.offset, Some(frame.offset()), "{case:?}");
                        assert_eq!(failure.kind, FailureKind::Damaged, "{case:?}");
                    }
                    in_frames += 1;
                }
                None if lost.is_empty() => harmless += 1,
                // An index block: that of the child is of its first region, and the base's is that
                // of the second.
                None => {
                    let first = 512 * file as u64;
                    let all: Vec<u64> = (first..first + REGION as u64).collect();
                    assert_eq!(lost, all, "{case:?}");
                    in_index += 1;
                }
            }
        }
        let stored: u64 = in_file(file)
            .map(|(frame, _)| u64::from(frame.stored_len()))
            .sum();
        assert_eq!(in_frames, stored);
        assert!(
            refused >= 4096 && in_index > 32 && harmless > 100,
            "{refused} {in_index} {harmless}"
        );
    }
}
