//! Defects that only the verifier finds: fields of the hand-made sample that are possible but not
//! true, and the report of many problems at once.

mod common;
mod field_case;

use std::mem::offset_of;
use std::sync::Arc;

use common::Sample;
use field_case::{Case, u8, u16, u32, u64};
use snapshot_format::layout::{
    HEADER_BYTES, RawBlobEntry, RawFillRun, RawFrameHeader, RawFrameRef, RawIndexHeader,
    RawPageRun, RawSummary, RawTrailer, SectionKind, TRAILER_BYTES,
};
use snapshot_format::{
    MAX_PROBLEMS, MemoryStore, RegionSpec, VerifyOptions, Writer, WriterOptions, verify,
};

/// Fields that only the verifier checks: each value is possible, but not true.
#[test]
fn consistent_but_false_fields_are_reported() {
    let sample = Sample::new();
    let summary = sample.trailer() + offset_of!(RawTrailer, summary);
    let index = sample.blocks[0].1.start;
    let frames = index + size_of::<RawIndexHeader>();
    let words = frames + 2 * size_of::<RawFrameRef>();
    let page = words + 16;
    let frame = sample.frames[0].start;
    let runs = frame + size_of::<RawFrameHeader>();
    let sections = |kind| sample.section(kind).start;
    let second = sample.blocks[1].1.start + size_of::<RawIndexHeader>();
    let gap = sample.frames[0].end + 10;
    #[rustfmt::skip]
    let cases = [
        u64(summary + offset_of!(RawSummary, zero_pages), 1, "zero_pages is 1"),
        u64(summary + offset_of!(RawSummary, fill_pages), 1, "fill_pages is 1"),
        u64(summary + offset_of!(RawSummary, stored_pages), 1, "stored_pages is 1"),
        u64(summary + offset_of!(RawSummary, duplicate_pages), 1, "duplicate_pages is 1"),
        u64(summary + offset_of!(RawSummary, unavailable_pages), 1, "unavailable_pages is 1"),
        u64(summary + offset_of!(RawSummary, frames), 1, "frames is 1"),
        u64(summary + offset_of!(RawSummary, frame_bytes), 4097, "frame_bytes is 4097"),
        u64(summary + offset_of!(RawSummary, frame_bytes), 1 << 22, "frame_bytes is 4194304"),
        u64(summary + offset_of!(RawSummary, stored_bytes), 1, "stored_bytes is 1"),
        u64(summary + offset_of!(RawSummary, index_bytes), 1, "index_bytes is 1"),
        u8(summary + offset_of!(RawSummary, content_digest), 0, "the content's digest is"),
        u8(summary + offset_of!(RawSummary, state_digest), 0, "the state's digest is"),
        u8(sections(SectionKind::BlockDigests), 0, "block 0 has another digest"),
        u8(sections(SectionKind::BlockDigests) + 2 * 32, 0, "block 2 has another digest"),
        u64(sections(SectionKind::FillRuns) + offset_of!(RawFillRun, word), 5, "of run 0 is not"),
        u64(sections(SectionKind::FillRuns) + size_of::<RawFillRun>(), 29, "page 29 of run 1 is not a fill"),
        u64(words, 5, "block 0 has another digest"),
        u64(words, 0, "names a fill word twice"),
        u16(page + 2, 1, "page 0 is listed in slot 0"),
        u16(page + 2, 1, "block 0 has another digest"),
        u16(page, 0xfffe, "page 0 is listed in slot 0"),
        u16(runs + size_of::<RawPageRun>() + offset_of!(RawPageRun, count), 1, "no page is listed for slot 3"),
        u32(runs + size_of::<RawPageRun>() + offset_of!(RawPageRun, page), 3, "page 3 is listed in slot 2"),
        u64(frame + offset_of!(RawFrameHeader, base_page), 1, "page 1 is listed in slot 0"),
        // The second block names the first frame for one page, 520.
        u16(second + 24 + offset_of!(RawFrameRef, slots), 3, "names a frame otherwise"),
        u16(second + 48 + 8 + 8 * 4, 0xffff, "names frame 1, which no page of it uses"),
        Case {
            at: page + 21 * 4,
            bytes: [0xff, 0xff, 1, 0].repeat(9),
            error: "names fill word 0, which no page of it uses",
        },
        Case {
            at: runs + size_of::<RawPageRun>(),
            bytes: vec![0; 6],
            error: "page 0 is listed twice",
        },
        u8(gap, 1, "belong to nothing"),
        u64(sections(SectionKind::Attachments) + offset_of!(RawBlobEntry, offset), 4096, "share bytes"),
    ];
    for case in cases {
        let mut wrong = sample.clone();
        wrong.put(case.at, &case.bytes);
        assert!(wrong.bytes != sample.bytes, "{}", case.error);
        wrong.seal();
        let report = verify(wrong.store(), VerifyOptions::default().threads(1))
            .expect("cannot verify the snapshot");
        assert!(
            report
                .problems
                .iter()
                .any(|problem| problem.detail.contains(case.error)),
            "wanted {:?}, got {:?}",
            case.error,
            report.problems
        );
    }
}

#[test]
fn index_block_may_not_name_a_frame_twice() {
    let mut sample = Sample::new();
    let frames = sample.blocks[1].1.start + size_of::<RawIndexHeader>();
    let first = sample.bytes[frames..frames + size_of::<RawFrameRef>()].to_vec();
    sample.put(frames + size_of::<RawFrameRef>(), &first);
    for (at, frame) in &mut sample.frame_refs {
        if *at == frames + size_of::<RawFrameRef>() {
            *frame = 2;
        }
    }
    sample.seal();
    let report =
        verify(sample.store(), VerifyOptions::default()).expect("cannot verify the snapshot");
    let details: Vec<_> = report.problems.iter().map(|p| p.detail.as_str()).collect();
    assert!(details.contains(&"names a frame twice"), "{details:?}");
    assert!(details.contains(&"block 1 has another digest than is recorded"));
}

#[test]
fn frame_may_not_store_fills_or_more_than_one_zstd_frame() {
    let mut sample = Sample::new();
    let payload =
        sample.frames[0].start + size_of::<RawFrameHeader>() + 2 * size_of::<RawPageRun>();
    sample.bytes[payload..payload + 4096].fill(0x11);
    sample.seal();
    let report =
        verify(sample.store(), VerifyOptions::default()).expect("cannot verify the snapshot");
    assert!(
        report
            .problems
            .iter()
            .any(|p| p.detail == "slot 0 stores a fill"),
        "{report:?}"
    );

    // A skippable zstd frame behind the payload decodes to nothing.
    let sample = Sample::build_with(true, &|raw| {
        [
            &common::compress(raw, &[])[..],
            b"\x50\x2a\x4d\x18\x01\x00\x00\x00!",
        ]
        .concat()
    });
    let report =
        verify(sample.store(), VerifyOptions::default()).expect("cannot verify the snapshot");
    let details: Vec<_> = report.problems.iter().map(|p| p.detail.as_str()).collect();
    assert_eq!(
        details, ["cannot be decoded: not exactly one zstd frame"; 2],
        "of the index block and of the frame"
    );
}

/// Each of 4100 index blocks is damaged in its own way: 1000 are listed, the rest are counted.
#[test]
fn list_of_problems_is_bounded() {
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).expect("writer");
    writer
        .begin_region(&RegionSpec::default())
        .expect("cannot begin a region");
    let blocks = 4100;
    for block in 0..blocks {
        writer.write_fill(511, 0).expect("a fill");
        writer.write_fill(1, block + 1).expect("another fill");
    }
    let (mut bytes, _) = writer.finish().expect("cannot finish the snapshot");
    // Nothing is stored but the index blocks, right behind the header.
    let summary = bytes.len() - TRAILER_BYTES + offset_of!(RawTrailer, summary);
    let index_bytes = summary + offset_of!(RawSummary, index_bytes);
    let index_bytes = u64::from_le_bytes(bytes[index_bytes..][..8].try_into().expect("8 bytes"));
    let index_bytes = usize::try_from(index_bytes).expect("in memory");
    bytes[HEADER_BYTES..][..index_bytes].fill(7);
    let report = verify(
        Arc::new(MemoryStore::new(bytes)),
        VerifyOptions::default().threads(2),
    )
    .expect("cannot verify the snapshot");
    assert_eq!(report.problems.len(), MAX_PROBLEMS);
    assert_eq!(report.more_problems, blocks - MAX_PROBLEMS as u64);
    assert!(report.problems.iter().all(|p| p.what == "index block"));
}

#[test]
fn bad_frames_are_all_reported() {
    let mut sample = Sample::new();
    for frame in sample.frames.clone() {
        sample.bytes[frame.start..frame.end].fill(7);
    }
    let report =
        verify(sample.store(), VerifyOptions::default()).expect("cannot verify the snapshot");
    assert_eq!(
        report.problems.iter().filter(|p| p.what == "frame").count(),
        4
    );
    assert_eq!(report.more_problems, 0);
    assert_eq!(report.frames_checked, 4);
    assert!(report.pages_checked < 1525);
}
