//! Each test gives one field at a time of the hand-made sample a wrong value, with all checksums
//! right, and expects a specific error. A hostile writer would try exactly these defects, because
//! no checksum guards against them.

mod common;
mod field_case;

use std::mem::offset_of;
use std::ops::Range;

use common::{DICTIONARY, Sample, UNKNOWN_KIND};
use field_case::{Case, u8, u16, u32, u64};
use snapshot_format::layout::{
    RawBlobEntry, RawFillRun, RawFrameHeader, RawFrameRef, RawHeader, RawIndexHeader, RawPageEntry,
    RawPageRun, RawRegionEntry, RawSectionEntry, RawSummary, RawTopEntry, RawTrailer,
    RawWorkingSetRun, SectionKind, required,
};
use snapshot_format::{
    FrameDecoder, OpenError, Page, ReadError, Reason, Snapshot, VerifyOptions, verify,
};
/// Runs all cases; `outcome` returns whether the error is damage, and its text.
fn run(sample: &Sample, cases: &[Case], outcome: impl Fn(&Sample) -> (bool, String)) {
    for (number, case) in cases.iter().enumerate() {
        let mut wrong = sample.clone();
        assert_ne!(
            wrong.bytes[case.at..case.at + case.bytes.len()],
            case.bytes,
            "case {number} ({}) changes nothing",
            case.error
        );
        wrong.put(case.at, &case.bytes);
        wrong.seal();
        let (damage, error) = outcome(&wrong);
        assert!(
            error.contains(case.error),
            "case {number}: wanted {:?}, got {error:?}",
            case.error
        );
        assert!(damage, "case {number}: {error:?} is damage");
        // The verifier finds it as well, and reports it as a problem of the file.
        let report = verify(wrong.store(), VerifyOptions::default().threads(1))
            .expect("cannot verify the snapshot");
        assert!(
            report
                .problems
                .iter()
                .any(|p| p.detail.contains(case.error)),
            "case {number}: wanted {:?}, the verifier says {:?}",
            case.error,
            report.problems
        );
    }
}

fn opening(sample: &Sample) -> (bool, String) {
    match sample.open() {
        Ok(_) => (false, "opens".to_owned()),
        Err(error) => (error.is_damage(), error.to_string()),
    }
}

fn reading<T>(
    read: impl Fn(&Snapshot) -> Result<T, ReadError>,
) -> impl Fn(&Sample) -> (bool, String) {
    move |sample| match read(&sample.open().expect("cannot open the snapshot")) {
        Ok(_) => (false, "reads".to_owned()),
        Err(error) => (error.is_damage(), error.to_string()),
    }
}

#[test]
fn each_trailer_field_is_checked() {
    let sample = Sample::new();
    let trailer = sample.trailer();
    let entry = sample.entry_of(SectionKind::FillRuns);
    let last_used = sample.section_entry(sample.sections.len());
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u8(sample.bytes.len() - 1, 0, "incomplete"),
            u32(trailer + offset_of!(RawTrailer, section_count), 65, "number of sections is 65"),
            u32(trailer + offset_of!(RawTrailer, section_count), 8, "reserved bytes of the trailer"),
            u32(trailer + offset_of!(RawTrailer, section_count), 10, "kind of a section is 0"),
            u64(trailer + offset_of!(RawTrailer, file_bytes), 1, "length of the file as recorded"),
            u8(trailer + offset_of!(RawTrailer, strong_root) + 31, 1, "root of the strong hashes"),
            u8(trailer + offset_of!(RawTrailer, reserved), 1, "reserved bytes of the trailer"),
            u8(trailer + offset_of!(RawTrailer, reserved) + 649, 1, "reserved bytes of the trailer"),
            u8(last_used, 1, "reserved bytes of the trailer"),
            u64(entry + offset_of!(RawSectionEntry, reserved), 1, "reserved bytes of a section"),
            u32(entry + offset_of!(RawSectionEntry, kind), UNKNOWN_KIND, "each kind only once"),
            Case {
                at: sample.entry_of(SectionKind::BlockDigests),
                bytes: [8, sample.section(SectionKind::BlockDigests).start as u64, 0, 0]
                    .map(u64::to_le_bytes)
                    .concat(),
                error: "no ancestors",
            },
            u32(entry + offset_of!(RawSectionEntry, kind), 0, "kind of a section is 0"),
            u64(entry + offset_of!(RawSectionEntry, offset), 0, "do not lie within"),
            u64(entry + offset_of!(RawSectionEntry, offset), u64::MAX, "do not lie within"),
            u64(entry + offset_of!(RawSectionEntry, offset), trailer as u64, "do not lie within"),
            u64(entry + offset_of!(RawSectionEntry, len), u64::MAX, "do not lie within"),
            u64(entry + offset_of!(RawSectionEntry, len), 1, "length of a section is 1"),
            u64(entry + offset_of!(RawSectionEntry, count), 65, "count of a section is 65"),
            u64(entry + offset_of!(RawSectionEntry, count), 2, "48 bytes for its 2 records"),
            u64(
                entry + offset_of!(RawSectionEntry, offset),
                sample.section(SectionKind::Properties).start as u64,
                "overlap",
            ),
            u32(sample.entry_of(SectionKind::Top), UNKNOWN_KIND + 1, "top table is missing"),
            u32(sample.entry_of(SectionKind::Regions), UNKNOWN_KIND + 1, "region section is missing"),
            u64(
                sample.entry_of(SectionKind::Regions) + offset_of!(RawSectionEntry, count),
                u64::MAX,
                "count of a section",
            ),
            u64(
                sample.entry_of(SectionKind::Top) + offset_of!(RawSectionEntry, count),
                u64::MAX / 32,
                "count of a section",
            ),
        ],
        opening,
    );
}

/// A reader opens the file by its trailer. A contradiction in the header is for the verifier to
/// find.
#[test]
fn each_header_field_is_checked() {
    let sample = Sample::new();
    let trailer = sample.trailer();
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u8(0, b'S', "not the magic bytes"),
            u32(offset_of!(RawHeader, version), 2, "version of the header is 2"),
            u32(offset_of!(RawHeader, page_size), 8192, "page size is 8192"),
            u64(offset_of!(RawHeader, required_features), 1 << 9, "features of the header"),
            u64(offset_of!(RawHeader, optional_features), 1, "features of the header"),
            u8(offset_of!(RawHeader, snapshot_id), b'x', "snapshot id of the header"),
            u8(trailer + offset_of!(RawTrailer, snapshot_id), b'x', "snapshot id of the header"),
            u8(offset_of!(RawHeader, reserved), 1, "reserved bytes of the header"),
            u8(offset_of!(RawHeader, reserved) + 4043, 1, "reserved bytes of the header"),
        ],
        |sample| {
            sample.open().expect("cannot open the snapshot");
            let report = verify(sample.store(), VerifyOptions::default()).expect("cannot verify the snapshot");
            let [problem] = &report.problems[..] else {
                return (false, format!("{:?}", report.problems));
            };
            (problem.what == "header" && problem.offset == 0, problem.detail.clone())
        },
    );
}

#[test]
fn feature_of_ancestors_needs_their_section() {
    let mut sample = Sample::new();
    let at = sample.trailer() + offset_of!(RawTrailer, required_features);
    sample.put(at, &required::ANCESTORS.to_le_bytes());
    sample.seal();
    let error = sample.open().expect_err("refused");
    assert!(error.is_damage(), "{error}");
    assert!(
        error.to_string().contains("ancestor section is missing"),
        "{error}"
    );
}

#[test]
fn unsupported_feature_is_named_and_is_no_damage() {
    let refused = |at: usize, bytes: &[u8]| {
        let mut sample = Sample::new();
        sample.put(at, bytes);
        sample.seal();
        let error = sample.open().expect_err("refused");
        assert!(!error.is_damage(), "{error}");
        let report = verify(sample.store(), VerifyOptions::default());
        assert!(report.is_err(), "no verdict on what can't be read");
        error
    };
    let at = Sample::new().trailer();
    let version = refused(at + offset_of!(RawTrailer, version), &2u32.to_le_bytes());
    assert!(matches!(
        version,
        OpenError::UnsupportedVersion { version: 2, .. }
    ));
    let features = at + offset_of!(RawTrailer, required_features);
    let error = refused(features, &(1u64 << 40 | 1 << 3).to_le_bytes());
    assert!(error.to_string().contains("bit 3, bit 40"), "{error}");
    // A reader ignores unknown optional features and unknown sections.
    let mut sample = Sample::new();
    let optional = sample.trailer() + offset_of!(RawTrailer, optional_features);
    sample.put_u64(optional, 1 << 50);
    sample.seal();
    assert_eq!(
        sample
            .open()
            .expect("cannot open the snapshot")
            .optional_features(),
        1 << 50
    );
}

#[test]
fn checksums_of_header_and_trailer_are_checked() {
    let mut sample = Sample::new();
    sample.bytes[100] ^= 1;
    sample.open().expect("cannot open the snapshot");
    let report =
        verify(sample.store(), VerifyOptions::default()).expect("cannot verify the snapshot");
    let [problem] = &report.problems[..] else {
        panic!("{report:?}");
    };
    assert!(
        problem.what == "header" && problem.detail.contains("checksum"),
        "{problem:?}"
    );

    let at = sample.trailer() + 100;
    sample.bytes[at] ^= 1;
    let error = sample.open().expect_err("damaged").to_string();
    assert!(
        error.contains("trailer") && error.contains("checksum"),
        "{error}"
    );
}

#[test]
fn each_top_table_field_is_checked() {
    let sample = Sample::new();
    let (block, fill) = (sample.top_entry(0), sample.top_entry(2));
    let unavailable = sample.top_entry(4);
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u8(block, 3, "kind of a top entry is 3"),
            u8(block, 0, "must be zero"),
            u8(block + offset_of!(RawTopEntry, codec), 2, "codec of an index block is 2"),
            u8(block + offset_of!(RawTopEntry, codec), 255, "codec of an index block is 255"),
            u16(block + offset_of!(RawTopEntry, layer), 1, "layer is 1"),
            u16(block + offset_of!(RawTopEntry, stored_len), 16385, "limit of 16384"),
            u16(block + offset_of!(RawTopEntry, stored_len), u16::MAX, "limit of 16384"),
            u16(block + offset_of!(RawTopEntry, stored_len), 100, "stored length of a raw"),
            u16(sample.top_entry(3) + offset_of!(RawTopEntry, stored_len), 0, "at least 1"),
            u16(block + offset_of!(RawTopEntry, decoded_len), 16385, "limit of 16384"),
            u16(block + offset_of!(RawTopEntry, decoded_len), 31, "length of its header"),
            u64(block + offset_of!(RawTopEntry, word_or_offset), 4095, "do not lie within"),
            u64(block + offset_of!(RawTopEntry, word_or_offset), u64::MAX, "do not lie within"),
            u64(block + offset_of!(RawTopEntry, word_or_offset), sample.trailer() as u64 - 100, "do not lie within"),
            u32(block + offset_of!(RawTopEntry, ancestor_block), 1, "must be zero"),
            u8(fill + offset_of!(RawTopEntry, codec), 1, "must be zero"),
            u16(fill + offset_of!(RawTopEntry, layer), 1, "must be zero"),
            u16(fill + offset_of!(RawTopEntry, stored_len), 1, "must be zero"),
            u16(fill + offset_of!(RawTopEntry, decoded_len), 1, "must be zero"),
            u32(fill + offset_of!(RawTopEntry, crc), 1, "must be zero"),
            u32(fill + offset_of!(RawTopEntry, ancestor_block), 1, "must be zero"),
            u64(unavailable + offset_of!(RawTopEntry, word_or_offset), 1, "must be zero"),
        ],
        opening,
    );
}

#[test]
fn each_region_field_is_checked() {
    for inline_regions in [true, false] {
        let sample = Sample::build(inline_regions);
        let regions = sample.section(SectionKind::Regions).start;
        let second = regions + size_of::<RawRegionEntry>();
        let pages =
            sample.trailer() + offset_of!(RawTrailer, summary) + offset_of!(RawSummary, pages);
        #[rustfmt::skip]
        let cases = [
            u64(regions + offset_of!(RawRegionEntry, first_page), 512, "first page of a region"),
            u64(second + offset_of!(RawRegionEntry, first_page), 1000, "first page of a region"),
            u64(second + offset_of!(RawRegionEntry, first_page), 1536, "first page of a region"),
            u64(regions + offset_of!(RawRegionEntry, pages), 1025, "first page of a region"),
            u64(regions + offset_of!(RawRegionEntry, pages), u64::MAX, "pages of a region"),
            u64(regions + offset_of!(RawRegionEntry, pages), 999, "pages of all regions"),
            u64(second + size_of::<RawRegionEntry>() + offset_of!(RawRegionEntry, pages), 513, "start of a region"),
            u64(second + offset_of!(RawRegionEntry, pages), 1 << 36, "pages of a region"),
            u64(second + offset_of!(RawRegionEntry, start), 1, "start of a region"),
            u64(second + offset_of!(RawRegionEntry, start), !0xfff, "start of a region"),
            u32(second + offset_of!(RawRegionEntry, flags), 0x200, "flags of a region"),
            u32(second + offset_of!(RawRegionEntry, page_shift), 0, "page shift of a region"),
            u32(second + offset_of!(RawRegionEntry, page_shift), 64, "page shift of a region"),
            u32(second + offset_of!(RawRegionEntry, name_len), 4097, "name of a region is 4097"),
            u32(second + offset_of!(RawRegionEntry, name_len), 4, "name offset"),
            u64(second + offset_of!(RawRegionEntry, name_offset), 0, "name offset"),
            u64(second + offset_of!(RawRegionEntry, name_offset), u64::MAX, "name offset"),
            u32(
                second + size_of::<RawRegionEntry>() + offset_of!(RawRegionEntry, name_len),
                3,
                "length of the names",
            ),
            u64(second + offset_of!(RawRegionEntry, reserved), 1, "reserved bytes of a region"),
            u8(regions + 3 * size_of::<RawRegionEntry>(), b'\x1b', "has a control character"),
            u8(regions + 3 * size_of::<RawRegionEntry>(), 0xff, "not UTF-8"),
            u64(pages, 1526, "pages of all regions"),
        ];
        run(&sample, &cases, opening);
    }
}

#[test]
fn number_of_blocks_matches_the_regions() {
    // The last entry of the top table becomes part of a section of an unknown kind.
    let mut sample = Sample::build(false);
    let top = sample.entry_of(SectionKind::Top);
    sample.put_u64(top + offset_of!(RawSectionEntry, count), 4);
    sample.put_u64(
        top + offset_of!(RawSectionEntry, len),
        4 * size_of::<RawTopEntry>() as u64,
    );
    let place = sample.section(SectionKind::Top);
    for (kind, range) in &mut sample.sections {
        if *kind == SectionKind::Top as u32 {
            *range = place.start..place.end - size_of::<RawTopEntry>();
        }
    }
    sample.blocks.retain(|(block, _)| *block < 4);
    sample.seal();
    let error = sample.open().expect_err("refused").to_string();
    assert!(error.contains("number of index blocks"), "{error}");
}

fn index(block: u64) -> impl Fn(&Sample) -> (bool, String) {
    reading(move |snapshot| snapshot.index_block(block, Reason::Demand))
}

#[test]
fn each_index_block_field_is_checked() {
    let sample = Sample::new();
    let (_, Range { start, .. }) = sample.blocks[0];
    let frame = start + size_of::<RawIndexHeader>();
    // Two frames and two words come before the pages.
    let page = frame + 2 * size_of::<RawFrameRef>() + 16;
    let fill = page + 30 * size_of::<RawPageEntry>();
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u32(start, 0, "magic of an index block"),
            u16(start + offset_of!(RawIndexHeader, page_count), 511, "page count of an index block"),
            u16(start + offset_of!(RawIndexHeader, frame_count), 3, "length of an index block"),
            u16(start + offset_of!(RawIndexHeader, frame_count), 0xffff, "length of an index block"),
            u16(start + offset_of!(RawIndexHeader, fill_count), 1, "length of an index block"),
            u8(start + offset_of!(RawIndexHeader, reserved), 1, "reserved bytes of an index block"),
            u64(start + offset_of!(RawIndexHeader, reserved2), 1, "reserved bytes of an index block"),
            u64(start + offset_of!(RawIndexHeader, first_page), 512, "first page of an index block"),
            u64(frame + offset_of!(RawFrameRef, offset), 0, "do not lie within"),
            u64(frame + offset_of!(RawFrameRef, offset), u64::MAX, "do not lie within"),
            u32(frame + offset_of!(RawFrameRef, stored_len), 32, "stored length of a frame is 32"),
            u32(frame + offset_of!(RawFrameRef, stored_len), u32::MAX, "limit of 2113560"),
            u32(frame + offset_of!(RawFrameRef, stored_len), 2_000_000, "do not lie within"),
            u16(frame + offset_of!(RawFrameRef, slots), 0, "slots of a frame is 0"),
            u16(frame + offset_of!(RawFrameRef, slots), 513, "slots of a frame is 513"),
            u16(frame + offset_of!(RawFrameRef, slots), 3, "slot of a page is 3"),
            u16(frame + offset_of!(RawFrameRef, layer), 1, "layer is 1"),
            u16(frame + offset_of!(RawFrameRef, dictionary), 7, "dictionary of a frame"),
            u8(frame + offset_of!(RawFrameRef, codec), 2, "dictionary of a frame"),
            u8(frame + offset_of!(RawFrameRef, codec), 3, "codec of a frame is 3"),
            u8(frame + offset_of!(RawFrameRef, reserved), 1, "reserved byte of a frame reference"),
            u16(page, 2, "frame number of a page is 2"),
            u16(page, 0xfffd, "frame number of a page is 65533"),
            u16(page + 2, 4, "slot of a page is 4"),
            u16(fill + 2, 2, "fill number of a page is 2"),
            u16(fill, 0xfffe, "slot of an unavailable page"),
        ],
        index(0),
    );
}

#[test]
fn compressed_index_block_decodes_to_its_length() {
    let sample = Sample::new();
    let at = sample.top_entry(3) + offset_of!(RawTopEntry, decoded_len);
    let stored = sample.blocks[2].1.start;
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u16(at, 16384, "decoded length of an index block"),
            u16(at, 32, "cannot be decoded"),
            u8(stored, 0, "cannot be decoded"),
        ],
        index(3),
    );
}

/// Decodes the frame of a page.
fn frame_of(page: u64) -> impl Fn(&Sample) -> (bool, String) {
    move |sample| {
        let snapshot = sample.open().expect("cannot open the snapshot");
        let Ok(Page::Stored { frame, .. }) = snapshot.look_up(page, Reason::Demand) else {
            panic!("page {page} is stored");
        };
        let mut out = vec![0; frame.decoded_len()];
        match FrameDecoder::new().decode(&snapshot, &frame, Reason::Demand, &mut out) {
            Ok(_) => (false, "decodes".to_owned()),
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                (
                    error.is_damage(),
                    format!("{error}: {}", source.unwrap_or_default()),
                )
            }
        }
    }
}

#[test]
fn each_frame_field_is_checked() {
    let sample = Sample::new();
    let frame = sample.frames[0].start;
    let runs = frame + size_of::<RawFrameHeader>();
    let second = runs + size_of::<RawPageRun>();
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u32(frame, 0, "magic of a frame"),
            u16(frame + offset_of!(RawFrameHeader, slots), 3, "slots of a frame is 3"),
            u16(frame + offset_of!(RawFrameHeader, run_count), 1, "payload length of a frame"),
            u16(frame + offset_of!(RawFrameHeader, run_count), 0xffff, "payload length of a frame"),
            u16(frame + offset_of!(RawFrameHeader, dictionary), 7, "dictionary of a frame"),
            u8(frame + offset_of!(RawFrameHeader, codec), 1, "codec of a frame is 1"),
            u8(frame + offset_of!(RawFrameHeader, codec), 9, "codec of a frame is 9"),
            u8(frame + offset_of!(RawFrameHeader, reserved), 1, "reserved byte of a frame"),
            u32(frame + offset_of!(RawFrameHeader, payload_len), 0, "payload length of a frame"),
            u32(frame + offset_of!(RawFrameHeader, payload_len), u32::MAX, "payload length of a frame"),
            u64(frame + offset_of!(RawFrameHeader, base_page), u64::MAX, "pages of a page run"),
            u64(frame + offset_of!(RawFrameHeader, base_page), 5 * 512 - 3, "pages of a page run"),
            u32(runs + offset_of!(RawPageRun, page), 1, "lowest page of a frame's list"),
            u32(second + offset_of!(RawPageRun, page), u32::MAX, "pages of a page run"),
            u16(runs + offset_of!(RawPageRun, count), 0, "slots of a page run"),
            u16(second + offset_of!(RawPageRun, count), 3, "slots of a page run"),
            u16(second + offset_of!(RawPageRun, slot), 0xffff, "slots of a page run"),
        ],
        frame_of(0),
    );
}

#[test]
fn compressed_frames_decode_to_their_length() {
    let sample = Sample::new();
    let frame = sample.frames[1].clone();
    // The payload begins after the header and two runs, with zstd's own magic.
    let payload = frame.start + size_of::<RawFrameHeader>() + 2 * size_of::<RawPageRun>();
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u32(payload, 0, "cannot be decoded"),
            u8(frame.end - 100, !sample.bytes[frame.end - 100], ""),
        ],
        frame_of(4),
    );
    // A frame that decodes to fewer pages than it has slots.
    let short = common::compress(&common::pattern(4), &[]);
    let wrong = Sample::build_with(true, &|_| short.clone());
    let (damage, error) = frame_of(4)(&wrong);
    assert!(
        damage && error.contains("decoded length of a frame is 4096"),
        "{error}"
    );
}

#[test]
fn frame_has_a_checksum() {
    let mut sample = Sample::new();
    let middle = sample.frames[0].start + 1000;
    sample.bytes[middle] ^= 0x10;
    let (damage, error) = frame_of(0)(&sample);
    assert!(damage && error.contains("checksum"), "{error}");
}

#[test]
fn each_dictionary_field_is_checked() {
    let sample = Sample::new();
    let entry = sample.section(SectionKind::Dictionaries).start;
    let section = sample.entry_of(SectionKind::Dictionaries);
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u32(entry + offset_of!(RawBlobEntry, tag), 8, "dictionary 7 is missing"),
            u32(entry + offset_of!(RawBlobEntry, tag), 0, "number of a dictionary is 0"),
            u32(entry + offset_of!(RawBlobEntry, tag), 65543, "number of a dictionary is 65543"),
            u64(entry + offset_of!(RawBlobEntry, len), 0, "length of a dictionary is 0"),
            u64(entry + offset_of!(RawBlobEntry, len), 1 << 40, "do not lie within"),
            u32(section, UNKNOWN_KIND + 1, "dictionary 7 is missing"),
        ],
        frame_of(512),
    );
    assert_eq!(
        sample
            .open()
            .expect("cannot open the snapshot")
            .dictionaries()
            .expect("read")[0]
            .number,
        DICTIONARY
    );
}

#[test]
fn each_fill_run_field_is_checked() {
    let sample = Sample::new();
    let first = sample.section(SectionKind::FillRuns).start;
    let second = first + size_of::<RawFillRun>();
    let third = second + size_of::<RawFillRun>();
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u64(first + offset_of!(RawFillRun, pages), 0, "pages of a fill run is 0"),
            u64(second + offset_of!(RawFillRun, pages), 513, "no more than the run before"),
            u64(second + offset_of!(RawFillRun, first_page), 900, "pages of a fill run"),
            u64(second + offset_of!(RawFillRun, first_page), 1000, "pages of a fill run"),
            u64(first + offset_of!(RawFillRun, first_page), u64::MAX, "pages of a fill run"),
            u64(first + offset_of!(RawFillRun, pages), u64::MAX, "pages of a fill run"),
            u64(second + offset_of!(RawFillRun, first_page), 1030, "overlap"),
            u64(first + offset_of!(RawFillRun, word), 5, "page 1024 of run 0 is not a fill of 0x5"),
            u64(first + offset_of!(RawFillRun, first_page), 2048, "do not lie within"),
            u64(second + offset_of!(RawFillRun, first_page), 29, "page 29 of run 1 is not a fill"),
            u64(third + offset_of!(RawFillRun, first_page), 600, "page 600 of run 2 is not a fill"),
        ],
        reading(Snapshot::fill_runs),
    );
    // A whole block for which the top table has another entry, although its index entries may
    // agree.
    let top = sample.top_entry(2);
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u64(top + offset_of!(RawTopEntry, word_or_offset), 7, "page 1024 of run 0 is not a fill"),
            u8(top + offset_of!(RawTopEntry, kind), 2, "page 1024 of run 0 is not a fill"),
        ],
        reading(Snapshot::fill_runs),
    );
}

#[test]
fn fill_run_leaves_out_blocks_that_cannot_be_read() {
    let mut sample = Sample::new();
    let index = sample.blocks[0].1.clone();
    sample.bytes[index.end - 1] ^= 1;
    let runs = sample
        .open()
        .expect("cannot open the snapshot")
        .fill_runs()
        .expect("runs");
    let runs: Vec<_> = runs.iter().map(|run| (run.first_page, run.pages)).collect();
    assert_eq!(runs, [(1024, 512), (601, 399)]);
}

#[test]
fn each_named_blob_field_is_checked() {
    let sample = Sample::new();
    let sets = sample.section(SectionKind::WorkingSets).start;
    let second = sets + size_of::<RawBlobEntry>();
    let names = second + size_of::<RawBlobEntry>();
    let (_, _, runs) = &sample.blobs[1];
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u64(sets + offset_of!(RawBlobEntry, offset), 1, "do not lie within"),
            u64(sets + offset_of!(RawBlobEntry, len), 15, "length of a working set is 15"),
            u32(sets + offset_of!(RawBlobEntry, tag), 1, "number of a named blob"),
            u32(second + offset_of!(RawBlobEntry, name_offset), 0, "name offset"),
            u32(second + offset_of!(RawBlobEntry, name_len), 0, "empty"),
            u8(names, 0x7f, "has a control character"),
            u8(names, b'/', "has a /"),
            u32(second + offset_of!(RawBlobEntry, name_len), 5000, "name of a blob is 5000"),
            u32(second + offset_of!(RawBlobEntry, name_len), 5, "do not lie within"),
            u32(second + offset_of!(RawBlobEntry, name_len), 3, "length of the names"),
            u64(names, u64::from_le_bytes(*b"bootboot"), "appears twice"),
            u8(names, 0xff, "not UTF-8"),
            Case {
                at: second + offset_of!(RawBlobEntry, offset),
                bytes: [runs.start as u64 + 16, 16].map(u64::to_le_bytes).concat(),
                error: "overlap",
            },
        ],
        reading(Snapshot::working_sets),
    );
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u64(runs.start + offset_of!(RawWorkingSetRun, pages), 0, "pages of a working set"),
            u64(runs.start + offset_of!(RawWorkingSetRun, pages), u64::MAX, "pages of a working set"),
            u64(runs.start, 5 * 512, "pages of a working set"),
            u64(runs.start + 16 + offset_of!(RawWorkingSetRun, pages), 5 * 512, "of a working set is 2568"),
        ],
        reading(|snapshot| snapshot.working_set("boot")),
    );
}

#[test]
fn attachment_is_checked_before_it_is_written() {
    let mut sample = Sample::new();
    let (_, _, blob) = sample.blobs[3].clone();
    sample.bytes[blob.end - 1] ^= 1;
    let snapshot = sample.open().expect("cannot open the snapshot");
    let mut out = Vec::new();
    let error = snapshot
        .read_attachment("vmm state", &mut out)
        .expect_err("damaged");
    assert!(
        error.is_damage() && error.to_string().contains("checksum"),
        "{error}"
    );
    assert!(out.is_empty(), "not a byte of it was written");
}

#[test]
fn each_property_rule_is_checked() {
    let sample = Sample::new();
    let text = sample.section(SectionKind::Properties);
    let count = sample.entry_of(SectionKind::Properties) + offset_of!(RawSectionEntry, count);
    #[rustfmt::skip]
    run(
        &sample,
        &[
            u8(text.start, b'z', "not sorted"),
            u8(text.start, 0xff, "not UTF-8"),
            u8(text.start, b'=', "without a key"),
            u8(text.start + 1, b'\t', "control character"),
            u8(text.start + 8, 0x7f, "control character"),
            u8(text.start + 6, b':', "without ="),
            u8(text.end - 1, b'.', "no end"),
            u64(count, 1, "count of the property section"),
            // The directory has no rule for it, so the file opens.
            u64(count, u64::MAX, "count of the property section"),
        ],
        reading(Snapshot::properties),
    );
}
