//! Restores of layered snapshots: frames of ancestors come with page numbers that are not those of
//! the snapshot.

use std::path::Path;
use std::sync::Arc;

use snaprestore_engine::restore::Restore;
use snaprestore_engine::{FailureKind, Prefetch};
use snapshot_format::{RegionSpec, Snapshot, Writer, WriterOptions};

use crate::common::{PAGE, compare, frame_of, index, random_bytes};

const PAGES: u64 = 2048 + 100;
const FRAME: usize = 8;

/// Writes `bytes` as a file of this name, and a child of the snapshot `base` in the same folder.
fn write(folder: &Path, name: &str, bytes: &[u8], base: Option<&str>) {
    let base = base.map(|base| Arc::new(Snapshot::open_path(folder.join(base)).unwrap()));
    let region = RegionSpec {
        base_page: base.as_ref().map(|_| 0),
        ..RegionSpec::default()
    };
    let options = WriterOptions {
        frame_pages: FRAME,
        base,
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).unwrap();
    writer.begin_region(&region).unwrap();
    writer.write_pages(bytes).unwrap();
    std::fs::write(folder.join(name), writer.finish().unwrap().0).unwrap();
}

/// Writes three generations of a memory; in the last, pages of the first lie at other places.
/// Returns the memory of the last.
fn write_chain(folder: &Path) -> Vec<u8> {
    let mut bytes = random_bytes(PAGES, 1);
    write(folder, "a.snap", &bytes, None);
    let other = random_bytes(64, 2);
    let put = |bytes: &mut [u8], page: usize, from: &[u8]| {
        bytes[page * PAGE..][..from.len()].copy_from_slice(from);
    };
    put(&mut bytes, 100, &other[..40 * PAGE]);
    put(&mut bytes, 2100, &other[40 * PAGE..]);
    write(folder, "b.snap", &bytes, Some("a.snap"));
    // Within block 0, pages 10 to 20 move to 300, so that frames list them at wrong places.
    let moved = bytes[10 * PAGE..20 * PAGE].to_vec();
    put(&mut bytes, 300, &moved);
    put(&mut bytes, 10, &vec![0; 5 * PAGE]);
    put(&mut bytes, 1000, &other[..3 * PAGE]);
    write(folder, "c.snap", &bytes, Some("b.snap"));
    bytes
}

#[test]
fn chain_restores_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = write_chain(folder.path());
    let snapshot = Arc::new(Snapshot::open_path(folder.path().join("c.snap")).unwrap());
    assert_eq!(snapshot.ancestors().len(), 2);
    // An open chain needs no names.
    drop(folder);
    let all = || 0..PAGES;
    let backwards = || (0..PAGES).rev();
    for prefetch in [Prefetch::Off, Prefetch::All] {
        for huge in [false, true] {
            let start = || {
                Restore::new(Arc::clone(&snapshot))
                    .prefetch(prefetch.clone())
                    .huge_pages(huge)
                    .start()
                    .unwrap()
            };
            compare(&start(), &bytes, all());
            compare(&start(), &bytes, backwards());
            compare(&start(), &bytes, all().map(|n| n * 1031 % PAGES));
        }
    }
    let restored = Restore::new(snapshot)
        .prefetch(Prefetch::All)
        .start()
        .unwrap();
    assert!(restored.wait_complete());
    assert_eq!(restored.stats().faults, 0);
    compare(&restored, &bytes, all());
}

/// Frames of ancestors bring the pages beside the wanted one, as the snapshot's own do.
#[test]
fn frames_of_ancestors_bring_neighbours() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = random_bytes(PAGES, 3);
    write(folder.path(), "a.snap", &bytes, None);
    write(folder.path(), "b.snap", &bytes, Some("a.snap"));
    // One page within each frame of the base changes, so that its others are in two pieces.
    let mut changed = bytes.clone();
    for page in changed.chunks_mut(PAGE).skip(3).step_by(FRAME) {
        page[0] ^= 1;
    }
    write(folder.path(), "c.snap", &changed, Some("a.snap"));
    let decoded = |name: &str, bytes: &[u8]| {
        let snapshot = Arc::new(Snapshot::open_path(folder.path().join(name)).unwrap());
        let restored = Restore::new(snapshot)
            .prefetch(Prefetch::Off)
            .start()
            .unwrap();
        compare(&restored, bytes, (0..PAGES).map(|n| n * 1031 % PAGES));
        restored.stats().bytes_decoded
    };
    let (flat, layered) = (decoded("a.snap", &bytes), decoded("b.snap", &bytes));
    assert!(
        layered <= flat * 11 / 10,
        "{layered} bytes decoded, {flat} flat"
    );
    let (own, split) = (PAGES * 4096 / 8, decoded("c.snap", &changed));
    assert!(
        split <= (flat + own) * 11 / 10,
        "{split} bytes decoded, {flat} flat and {own} changed"
    );
}

#[test]
fn damage_in_an_ancestor_fails_its_pages_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = write_chain(folder.path());
    let path = folder.path().join("a.snap");
    let mut file = std::fs::read(&path).unwrap();
    // The frame of page 500, which the child still uses.
    let snapshot = Snapshot::open_path(folder.path().join("c.snap")).unwrap();
    let frame = frame_of(&snapshot, 500);
    assert_eq!(
        snapshot.layer(frame.layer()).unwrap().name(),
        path.to_str().unwrap()
    );
    file[index(frame.offset()) + 100] ^= 1;
    std::fs::write(&path, file).unwrap();
    let snapshot = Arc::new(Snapshot::open_path(folder.path().join("c.snap")).unwrap());
    let restored = Restore::new(snapshot)
        .prefetch(Prefetch::All)
        .start()
        .unwrap();
    compare(
        &restored,
        &bytes,
        (0..PAGES).filter(|page| !(490..510).contains(page)),
    );
    assert!(!restored.wait_complete());
    let failures = restored.failures();
    assert!(!failures.is_empty());
    for failure in failures {
        assert_eq!(failure.file, path.to_str().unwrap(), "{failure:?}");
        assert_eq!(failure.kind, FailureKind::Damaged);
        assert!((490..510).contains(&failure.page), "{failure:?}");
    }
}
