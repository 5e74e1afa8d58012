//! Freedoms that opening leaves to the caller or to later writers: a limit on memory, and unused
//! room.

mod common;

use std::mem::offset_of;

use common::{BLOCKS, Sample};
use snapshot_format::layout::{RawRegionEntry, RawTopEntry, RawTrailer, SectionKind};
use snapshot_format::{OpenError, Snapshot, SnapshotOptions, VerifyOptions, verify};

#[test]
fn unused_room_is_ignored_and_guarded() {
    let good = Sample::new();
    let region = good.section(SectionKind::Regions).start;
    let unused = good.trailer() + offset_of!(RawTrailer, unused);
    for (at, bytes) in [
        (region + offset_of!(RawRegionEntry, unused), &[1; 8][..]),
        (
            region + offset_of!(RawRegionEntry, flags),
            &[3, 0, 0xff, 0xff],
        ),
        (unused, &[0xff; 650]),
    ] {
        let mut sample = good.clone();
        sample.put(at, bytes);
        let error = sample.open().expect_err("its checksum is wrong");
        assert!(error.to_string().contains("checksum"), "{error}");
        sample.seal();
        let snapshot = sample.open().expect("cannot open the snapshot");
        assert_eq!(snapshot.regions(), good.open().unwrap().regions());
        let report =
            verify(sample.store(), VerifyOptions::default()).expect("cannot verify the snapshot");
        assert_eq!(report.problems, []);
    }
}

#[test]
fn top_table_above_the_callers_limit_is_named() {
    let sample = Sample::new();
    let open = |bytes| {
        let options = SnapshotOptions::default().max_top_bytes(bytes);
        Snapshot::open_with(sample.store(), &options)
    };
    let top_bytes = BLOCKS * size_of::<RawTopEntry>() as u64;
    let error = open(top_bytes - 1).expect_err("too large");
    assert!(!error.is_damage() && matches!(error, OpenError::TopTooLarge { .. }));
    assert!(error.to_string().contains("max_top_bytes"), "{error}");
    open(top_bytes).expect("cannot open the snapshot");
    let options = VerifyOptions::default().max_top_bytes(0);
    assert!(verify(sample.store(), options).is_err());
    assert_eq!(SnapshotOptions::default().max_top_bytes, 256 << 20);
}
