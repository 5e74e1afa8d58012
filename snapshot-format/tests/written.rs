//! Files made by the writer: the costs of reading at any size, and the detection of every flipped
//! bit.

mod counting;

use std::sync::Arc;

use counting::Counting;
use snapshot_format::layout::{PAGE_SIZE, PAGES_PER_BLOCK_U64, RawTopEntry, TAIL_BYTES};
use snapshot_format::{
    Dictionary, FrameDecoder, MemoryStore, Page, Reason, RegionSpec, Snapshot, SnapshotId,
    VerifyOptions, Writer, WriterOptions, verify,
};

/// Returns a page that equals no other and of which half is noise.
fn page(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..PAGE_SIZE as u64 / 8)
        .flat_map(|word| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if word % 2 == 0 { state } else { number }.to_le_bytes()
        })
        .collect()
}

fn options(frame_pages: usize) -> WriterOptions {
    WriterOptions {
        frame_pages,
        dictionary: Dictionary::Off,
        threads: Some(2),
        snapshot_id: Some(SnapshotId([7; 16])),
        ..WriterOptions::default()
    }
}

/// Writes a snapshot of `gib` GiB in two regions: every block has a stored page, and the first has
/// 512, each in a frame of its own.
fn generate(gib: u64) -> Vec<u8> {
    let blocks = gib * 512;
    let mut writer = Writer::new(Vec::new(), options(1)).expect("new");
    for half in 0..2 {
        let region = RegionSpec {
            name: format!("half {half}"),
            start: half * (gib << 29),
            ..RegionSpec::default()
        };
        writer.begin_region(&region).expect("region");
        for block in half * blocks / 2..(half + 1) * blocks / 2 {
            let stored = if block == 0 { 512 } else { 1 };
            for i in 0..stored {
                writer
                    .write_pages(&page(block * PAGES_PER_BLOCK_U64 + i))
                    .expect("page");
            }
            writer.write_fill(512 - stored, 0).expect("fill");
        }
    }
    writer.finish().expect("cannot finish the snapshot").0
}

/// A snapshot of up to 4 GiB opens with one read; the top table of a larger one costs one more.
#[test]
fn opening_and_looking_up_cost_the_same_at_any_size() {
    for gib in [1, 4, 64] {
        let store = Arc::new(Counting::new(generate(gib)));
        let snapshot = Snapshot::open(store.clone()).expect("cannot open the snapshot");
        assert_eq!(snapshot.block_count(), gib * 512);
        assert_eq!(snapshot.regions().len(), 2);
        let (reads, bytes) = store.take(Reason::Open);
        let top = snapshot.block_count() * size_of::<RawTopEntry>() as u64;
        if gib <= 4 {
            assert_eq!((reads, bytes), (1, TAIL_BYTES as u64), "{gib} GiB");
        } else {
            assert_eq!(reads, 2, "{gib} GiB: the tail, and what lies before it");
            let most = TAIL_BYTES as u64 + top;
            assert!(bytes <= most, "{gib} GiB: {bytes} bytes to open");
        }

        // The last look-up in each block, in descending order: none is in the cache.
        for block in [gib * 512 - 1, gib * 256, gib * 256 - 1, 77, 0] {
            let number = block * PAGES_PER_BLOCK_U64;
            let found = snapshot
                .look_up(number, Reason::Demand)
                .expect("cannot look up the page");
            let (reads, bytes) = store.take(Reason::Demand);
            assert_eq!(reads, 1, "{gib} GiB: one read for block {block}");
            assert!(
                bytes <= 16 << 10,
                "{gib} GiB: {bytes} bytes for block {block}"
            );
            assert_eq!(store.take(Reason::Open), (0, 0));
            let Page::Stored { frame, slot } = found else {
                panic!("{gib} GiB: page {number} is {found:?}");
            };
            let mut out = vec![0; frame.decoded_len()];
            FrameDecoder::new()
                .decode(&snapshot, &frame, Reason::Demand, &mut out)
                .expect("cannot decode");
            assert_eq!((slot, out), (0, page(number)));
            assert_eq!(store.take(Reason::Demand), (1, frame.stored_len().into()));
        }
    }
}

#[test]
fn large_snapshot_verifies() {
    // More blocks than the verifier checks together, and contents shared across its windows.
    let mut writer = Writer::new(Vec::new(), options(16)).expect("new");
    for region in 0..3 {
        let region = RegionSpec {
            space: region,
            name: "part".to_owned(),
            ..RegionSpec::default()
        };
        writer.begin_region(&region).expect("region");
        for block in 0..1000 {
            for i in 0..3 {
                writer
                    .write_pages(&page(block % 500 * 3 + i))
                    .expect("page");
            }
            writer.write_fill(507, block % 3).expect("fill");
            if block % 100 == 0 {
                writer.write_unavailable(512 * 3).expect("unavailable");
            }
        }
        writer.write_pages(&page(5)).expect("page");
    }
    let (file, written) = writer.finish().expect("cannot finish the snapshot");
    let mut last = 0;
    let options = VerifyOptions::default().threads(2).progress(|progress| {
        last = progress.pages_done;
        std::ops::ControlFlow::Continue(())
    });
    let report =
        verify(Arc::new(MemoryStore::new(file)), options).expect("cannot verify the snapshot");
    assert_eq!(report.problems, []);
    assert_eq!(report.pages_checked, written.summary.pages);
    assert_eq!(report.frames_checked, written.summary.frames);
    assert_eq!(last, written.summary.pages);
}

#[test]
fn every_flipped_byte_of_a_small_snapshot_is_found() {
    let mut writer = Writer::new(Vec::new(), options(2)).expect("new");
    writer.begin_region(&RegionSpec::default()).expect("region");
    // Pages that compress to little, so that the file is small and every byte can be tried.
    let small = |number: u64| [number.to_le_bytes(), [1; 8]].concat().repeat(256);
    for number in 0..5 {
        writer.write_pages(&small(number)).expect("page");
    }
    writer.write_fill(600, 0).expect("fill");
    writer.write_unavailable(1).expect("unavailable");
    writer.write_pages(&small(3)).expect("page");
    writer
        .attach("note", &mut &b"attached"[..])
        .expect("cannot add the attachment");
    let (mut file, _) = writer.finish().expect("cannot finish the snapshot");
    assert!(file.len() < 12_000, "{} bytes", file.len());
    let problems = |file: &[u8]| {
        let store = Arc::new(MemoryStore::new(file.to_vec()));
        let report =
            verify(store, VerifyOptions::default().threads(1)).expect("cannot verify the snapshot");
        for (nth, problem) in report.problems.iter().enumerate() {
            let before = &report.problems[..nth];
            assert!(!before.contains(problem), "told twice: {problem:?}");
        }
        report.problems.len()
    };
    assert_eq!(problems(&file), 0);
    for at in 0..file.len() {
        let bit = 1 << (at % 8);
        file[at] ^= bit;
        assert_ne!(problems(&file), 0, "byte {at} was flipped unnoticed");
        file[at] ^= bit;
    }
}

/// A region can end at the last address, but not beyond it: the writer must not write a file that
/// the reader refuses.
#[test]
fn region_at_the_last_address_is_accepted() {
    for (start, good) in [
        (0u64.wrapping_sub(8192), true),
        (0u64.wrapping_sub(4096), false),
    ] {
        let mut writer = Writer::new(Vec::new(), options(1)).expect("new");
        let region = RegionSpec {
            start,
            ..RegionSpec::default()
        };
        let written = writer
            .begin_region(&region)
            .and_then(|()| writer.write_fill(2, 0))
            .and_then(|()| writer.finish());
        assert_eq!(written.is_ok(), good, "{start:#x}");
        if let Ok((file, _)) = written {
            let snapshot =
                Snapshot::open(Arc::new(MemoryStore::new(file))).expect("cannot open the snapshot");
            assert_eq!(snapshot.regions()[0].start, start);
        }
    }
}
