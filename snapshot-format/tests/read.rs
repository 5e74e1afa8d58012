//! The hand-made sample, read back: every page, every table, and the number of reads.

mod common;
mod counting;

use std::io;
use std::sync::Arc;

use common::{BLOCKS, CC, Content, DICTIONARY, REGIONS, Sample, content, page_bytes};
use counting::Counting;
use snapshot_format::layout::{PAGE_SIZE, TAIL_BYTES};
use snapshot_format::{
    FrameDecoder, FrameRef, ListedRun, Page, ReadError, Reason, RegionSpec, Snapshot, Top, Writer,
    WriterOptions,
};

/// Returns the bytes of a page as a reader gets them; none if the page has none.
fn read_page(snapshot: &Snapshot, decoder: &mut FrameDecoder, page: u64) -> Option<Vec<u8>> {
    match snapshot
        .look_up(page, Reason::Demand)
        .expect("cannot look up the page")
    {
        Page::Fill(word) => Some(word.to_le_bytes().repeat(PAGE_SIZE / 8)),
        Page::Stored { frame, slot } => {
            let mut out = vec![0; frame.decoded_len()];
            decoder
                .decode(snapshot, &frame, Reason::Demand, &mut out)
                .expect("cannot decode");
            Some(
                out.chunks(PAGE_SIZE)
                    .nth(slot.into())
                    .expect("slot")
                    .to_vec(),
            )
        }
        Page::Unavailable | Page::Unused => None,
    }
}

#[test]
fn every_page_reads_as_it_was_written() {
    for inline_regions in [true, false] {
        let snapshot = Sample::build(inline_regions)
            .open()
            .expect("cannot open the snapshot");
        let mut decoder = FrameDecoder::new();
        for page in 0..BLOCKS * 512 + 3 {
            assert!(
                read_page(&snapshot, &mut decoder, page) == page_bytes(page),
                "page {page}"
            );
            let found = snapshot
                .look_up(page, Reason::Demand)
                .expect("cannot look up the page");
            match content(page) {
                None => assert_eq!(found, Page::Unused, "page {page}"),
                Some(Content::Unavailable) => assert_eq!(found, Page::Unavailable, "page {page}"),
                Some(_) => {}
            }
        }
        assert_eq!(
            snapshot
                .look_up(u64::MAX, Reason::Demand)
                .expect("any number"),
            Page::Unused
        );
    }
}

#[test]
fn everything_in_the_file_can_be_queried() {
    let snapshot = Sample::new().open().expect("cannot open the snapshot");
    assert_eq!(
        snapshot.id().to_string(),
        "30313233343536373839616263646566"
    );
    assert_eq!(snapshot.format_version(), 1);
    assert_eq!(snapshot.block_count(), BLOCKS);
    assert_eq!(snapshot.page_slots(), BLOCKS * 512);
    let regions = snapshot.regions();
    let seen: Vec<_> = regions
        .iter()
        .map(|r| (r.space, r.start, r.pages, r.name.as_str()))
        .collect();
    assert_eq!(seen, REGIONS);
    assert_eq!(snapshot.top(0), Top::Block);
    assert_eq!(snapshot.top(2), Top::Fill(0));
    assert_eq!(snapshot.top(4), Top::Unavailable);

    let block = snapshot.index_block(0, Reason::Demand).expect("block");
    assert_eq!(block.page_count(), 512);
    assert_eq!(block.frames().len(), 2);
    assert_eq!(block.fills(), [CC, 0]);
    assert_eq!(block.page(25), Page::Fill(CC));
    assert_eq!(block.stored(20), Some((1, 0)));
    assert_eq!(block.stored(25), None);
    assert_eq!(block.page(512), Page::Unused);
    let alike = snapshot.index_block(4, Reason::Demand).expect("block");
    assert_eq!((alike.page_count(), alike.page(4)), (5, Page::Unavailable));
    assert!(matches!(
        snapshot.index_block(5, Reason::Demand),
        Err(ReadError::NoSuchBlock {
            block: 5,
            count: 5,
            ..
        })
    ));

    let runs = snapshot.fill_runs().expect("cannot read the fill runs");
    assert_eq!(
        (runs.len(), runs[0].first_page, runs[0].pages),
        (3, 1024, 512)
    );
    let dictionaries = snapshot
        .dictionaries()
        .expect("cannot read the dictionaries");
    assert_eq!(dictionaries[0].number, DICTIONARY);
    let names: Vec<_> = snapshot
        .working_sets()
        .expect("sets")
        .into_iter()
        .map(|s| s.name)
        .collect();
    assert_eq!(names, ["boot", "idle"]);
    let boot = snapshot.working_set("boot").expect("boot");
    assert_eq!((boot.len(), boot[0].first_page, boot[1].pages), (2, 512, 4));
    assert_eq!(snapshot.working_set("idle").expect("idle"), []);
    let properties = snapshot.properties().expect("cannot read the properties");
    assert_eq!(properties[1], ("writer".to_owned(), "test".to_owned()));

    let mut state = Vec::new();
    snapshot
        .read_attachment("vmm state", &mut state)
        .expect("attachment");
    assert_eq!(state, b"registers and devices".repeat(4000));
    assert_eq!(snapshot.attachment_bytes("empty", 0).expect("empty"), b"");
    assert!(snapshot.attachment_bytes("vmm state", 100).is_err());
    assert!(matches!(
        snapshot.read_attachment("none", io::sink()),
        Err(ReadError::NoSuchName { .. })
    ));
}

#[test]
fn missing_working_set_is_reported_with_existing_names() {
    let snapshot = Sample::new().open().expect("cannot open the snapshot");
    snapshot.check_working_set("boot").expect("boot");
    for missing in [
        snapshot.check_working_set("none").unwrap_err(),
        snapshot.working_set("none").unwrap_err(),
    ] {
        let text = missing.to_string();
        for part in ["\"none\"", "\"boot\"", "\"idle\""] {
            assert!(text.contains(part), "{text}");
        }
    }
}

#[test]
fn frame_lists_its_pages() {
    let snapshot = Sample::new().open().expect("cannot open the snapshot");
    let Page::Stored { frame, .. } = snapshot
        .look_up(515, Reason::Demand)
        .expect("cannot look up the page")
    else {
        panic!("page 515 is stored");
    };
    let mut decoder = FrameDecoder::new();
    let mut out = vec![0; frame.decoded_len()];
    let listed = decoder
        .decode(&snapshot, &frame, Reason::Demand, &mut out)
        .expect("cannot decode");
    let run = |first_page, slot| ListedRun {
        first_page,
        slot,
        count: 4,
    };
    assert_eq!(
        listed.runs().collect::<Vec<_>>(),
        [run(512, 0), run(516, 4)]
    );
    assert!(
        decoder
            .decode(&snapshot, &frame, Reason::Demand, &mut out[1..])
            .is_err_and(|error| !error.is_damage()),
        "a buffer of the wrong size is the caller's mistake"
    );
}

#[test]
fn opening_and_look_up_take_one_read_each() {
    for inline_regions in [true, false] {
        let store = Arc::new(Counting::new(Sample::build(inline_regions).bytes));
        let snapshot = Snapshot::open(store.clone()).expect("cannot open the snapshot");
        let (reads, bytes) = store.take(Reason::Open);
        assert_eq!((reads, bytes), (1, TAIL_BYTES as u64));
        assert_eq!(snapshot.regions().len(), 3);
        assert_eq!(store.take(Reason::Open), (0, 0));

        for page in 0..snapshot.page_slots() {
            snapshot
                .look_up(page, Reason::Demand)
                .expect("cannot look up the page");
        }
        let (reads, bytes) = store.take(Reason::Demand);
        assert_eq!(
            reads, 3,
            "one for each index block, which stays in the cache"
        );
        assert!(bytes <= 3 * (16 << 10));
        assert_eq!(store.take(Reason::Open), (0, 0));

        snapshot.prepare().expect("cannot read the dictionaries");
        assert_eq!(
            store.take(Reason::Open).0,
            2,
            "the table of dictionaries and the dictionary"
        );
        let Page::Stored { frame, .. } = snapshot
            .look_up(512, Reason::Prefetch)
            .expect("cannot look up the page")
        else {
            panic!("page 512 is stored");
        };
        let mut out = vec![0; frame.decoded_len()];
        FrameDecoder::new()
            .decode(&snapshot, &frame, Reason::Prefetch, &mut out)
            .expect("cannot decode");
        assert_eq!(
            store.take(Reason::Prefetch),
            (1, u64::from(frame.stored_len()))
        );
        assert_eq!(store.take(Reason::Open), (0, 0), "the dictionary is ready");
    }
}

#[test]
fn index_cache_has_a_bound_and_look_ups_work_without_it() {
    let store = Arc::new(Counting::new(Sample::new().bytes));
    let options = snapshot_format::SnapshotOptions::default().index_cache_bytes(0);
    let snapshot = Snapshot::open_with(store.clone(), &options).expect("cannot open the snapshot");
    for _ in 0..10 {
        assert_eq!(
            snapshot
                .look_up(25, Reason::Demand)
                .expect("cannot look up the page"),
            Page::Fill(CC)
        );
    }
    assert_eq!(store.take(Reason::Demand).0, 10);
}

/// Returns 64 pages that do not compress.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        u32::try_from(state >> 32).expect("it has 32 bits")
    };
    let words = (0..64 * PAGE_SIZE / 4).flat_map(|_| next().to_le_bytes());
    words.collect()
}

/// Packs memory into eight frames.
fn packed(memory: &[u8]) -> (Snapshot, Arc<Counting>, Vec<FrameRef>) {
    let options = WriterOptions {
        frame_pages: 8,
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).expect("cannot begin");
    let region = RegionSpec::default();
    writer.begin_region(&region).expect("cannot begin");
    writer.write_pages(memory).expect("cannot write");
    let (file, _) = writer.finish().expect("cannot finish");
    let store = Arc::new(Counting::new(file));
    let snapshot = Snapshot::open(store.clone()).expect("cannot open the snapshot");
    let frame = |page| match snapshot.look_up(page, Reason::Open) {
        Ok(Page::Stored { frame, .. }) => frame,
        other => panic!("page {page} is {other:?}"),
    };
    let frames = (0..64).step_by(8).map(frame).collect();
    (snapshot, store, frames)
}

/// Records that were read ahead are used for prefetch only, for their own file only, and until
/// another record takes their place.
#[test]
fn records_read_ahead_are_decoded_without_another_read() {
    let (memory, other_memory) = (noise(1), noise(2));
    let (snapshot, reads, frames) = packed(&memory);
    let (other, other_reads, other_frames) = packed(&other_memory);
    let decode = |decoder: &mut FrameDecoder, number: usize, reason| {
        let mut out = vec![0; frames[number].decoded_len()];
        let decoded = decoder.decode(&snapshot, &frames[number], reason, &mut out);
        decoded.unwrap_or_else(|error| panic!("frame {number}: {error}"));
        assert!(out == memory[number * out.len()..][..out.len()], "{number}");
        reads.take(reason).0
    };
    let mut decoder = FrameDecoder::new();
    let ahead = |decoder: &mut FrameDecoder| {
        let read = decoder.read_ahead(&snapshot, &frames[2], &frames[5]);
        read.expect("cannot read ahead");
        assert_eq!(reads.take(Reason::Prefetch).0, 1);
        let is_ahead = |frame: &&FrameRef| decoder.is_ahead(&snapshot, frame);
        assert_eq!(frames.iter().filter(is_ahead).count(), 4);
    };
    ahead(&mut decoder);
    for number in [2, 5, 3, 4, 2] {
        assert_eq!(
            decode(&mut decoder, number, Reason::Prefetch),
            0,
            "{number}"
        );
    }
    // A frame before or behind them is read alone, and takes the place of all of them.
    for number in [1, 6] {
        ahead(&mut decoder);
        assert_eq!(decode(&mut decoder, number, Reason::Prefetch), 1);
        assert_eq!(decode(&mut decoder, 4, Reason::Prefetch), 1);
    }
    // The file may have been repaired since.
    ahead(&mut decoder);
    assert_eq!(decode(&mut decoder, 4, Reason::Demand), 1);
    assert_eq!(decode(&mut decoder, 3, Reason::Prefetch), 1);
    // Another file has other bytes at the same place.
    ahead(&mut decoder);
    let frame = &other_frames[3];
    assert_eq!(frame.offset(), frames[3].offset());
    assert!(!decoder.is_ahead(&other, frame));
    let mut out = vec![0; frame.decoded_len()];
    let read = decoder.decode(&other, frame, Reason::Prefetch, &mut out);
    read.expect("cannot decode");
    assert!(out == other_memory[3 * out.len()..][..out.len()]);
    assert_eq!(other_reads.take(Reason::Prefetch).0, 1);
}
