//! Valid zstd frames of a payload: the rules of `FORMAT.md` for codecs, checked in the reader, the
//! verifier and the writer.

mod common;

use std::sync::Arc;

use common::{Pack, Sample, compress};
use snapshot_format::layout::{PAGE_SIZE, RawFrameHeader, RawPageRun};
use snapshot_format::{
    Dictionary, FrameDecoder, FrameRef, MemoryStore, Page, Reason, RegionSpec, Snapshot,
    VerifyOptions, Writer, WriterOptions, dictionary, verify,
};
use zerocopy::FromBytes;
use zstd::zstd_safe::{self, CCtx, CParameter};

/// Single segment: the window is as large as the content.
const SINGLE_SEGMENT: u8 = 1 << 5;
const CHECKSUM: u8 = 1 << 2;
const DICTIONARY_ID: u8 = 3;
/// A skippable zstd frame, with one byte in it.
const SKIPPABLE: &[u8] = b"\x50\x2a\x4d\x18\x01\x00\x00\x00!";

fn frame_of_page(snapshot: &Snapshot, page: u64) -> FrameRef {
    match snapshot
        .look_up(page, Reason::Demand)
        .expect("cannot look up the page")
    {
        Page::Stored { frame, .. } => frame,
        other => panic!("page {page} is {other:?}"),
    }
}

/// Decodes the frame that `pack` made. Returns the result, and the problems that the verifier
/// finds.
fn outcome(pack: Pack<'_>) -> (Result<(), String>, Vec<String>) {
    let sample = Sample::build_with(true, pack);
    let snapshot = sample.open().expect("cannot open the snapshot");
    let frame = frame_of_page(&snapshot, 4);
    let mut out = vec![0; frame.decoded_len()];
    let decoded = FrameDecoder::new()
        .decode(&snapshot, &frame, Reason::Demand, &mut out)
        .map(|_| ())
        .map_err(|error| {
            assert!(error.is_damage(), "{error}");
            error.to_string()
        });
    if decoded.is_ok() {
        assert!(out[..PAGE_SIZE] == common::pattern(4));
    }
    // Decoding in steps gives the same result.
    out.fill(0);
    let mut steps = FrameDecoder::in_steps(&snapshot).expect("a decoder");
    let first = steps.decode_first(&snapshot, &frame, Reason::Demand, 1, &mut out);
    let first = first.map(|(_, ready)| ready);
    let in_steps = first.and_then(|ready| {
        assert!(out[..PAGE_SIZE] == common::pattern(4));
        if ready == frame.slots() {
            return Ok(());
        }
        steps.decode_rest(&snapshot, &frame, &mut out)
    });
    assert_eq!(decoded.is_ok(), in_steps.is_ok(), "{in_steps:?}");
    // The index block that is packed in the same way.
    assert_eq!(
        decoded.is_ok(),
        snapshot.look_up(1536, Reason::Demand).is_ok()
    );
    let report = verify(sample.store(), VerifyOptions::default().threads(1))
        .expect("cannot verify the snapshot");
    let problems = report.problems.into_iter().map(|p| p.detail).collect();
    (decoded, problems)
}

fn with(parameter: CParameter) -> impl Fn(&[u8]) -> Vec<u8> {
    move |raw| {
        let mut context = CCtx::create();
        context.set_parameter(parameter).expect("a parameter");
        let mut out = vec![0; zstd_safe::compress_bound(raw.len())];
        let len = context
            .compress2(&mut out[..], raw)
            .expect("cannot compress");
        out.truncate(len);
        out
    }
}

/// Returns a frame without content size: a byte that describes the window follows the first five.
fn windowed(raw: &[u8]) -> Vec<u8> {
    let frame = with(CParameter::ContentSizeFlag(false))(raw);
    assert_eq!(frame[4], 0, "a window, and nothing else");
    frame
}

#[test]
fn unusual_valid_zstd_frames_are_accepted() {
    let window = |log: u8| {
        move |raw: &[u8]| {
            let mut frame = windowed(raw);
            frame[5] = (log - 10) << 3;
            frame
        }
    };
    let all: [(&str, Pack<'_>); 4] = [
        ("without the content's size", &windowed),
        ("with a checksum", &with(CParameter::ChecksumFlag(true))),
        ("with a window of 8 MiB", &window(23)),
        ("with a window of 2 GiB", &window(31)),
    ];
    for (what, pack) in all {
        let (decoded, problems) = outcome(pack);
        assert_eq!(decoded, Ok(()), "{what}");
        assert_eq!(problems, [""; 0], "{what}");
    }
}

#[test]
fn invalid_zstd_frames_are_refused() {
    let all: [(&str, Pack<'_>); 9] = [
        ("a wrong checksum", &|raw| {
            let mut frame = with(CParameter::ChecksumFlag(true))(raw);
            *frame.last_mut().expect("not empty") ^= 1;
            frame
        }),
        ("a wrong content size", &|raw| {
            let mut frame = compress(raw, &[]);
            assert_eq!(frame[4] & SINGLE_SEGMENT, SINGLE_SEGMENT);
            frame[5] ^= 1;
            frame
        }),
        ("a dictionary that the codec doesn't name", &|raw| {
            let mut frame = windowed(raw);
            frame[4] |= 1;
            frame.insert(6, 77);
            frame
        }),
        ("a window above 2 GiB", &|raw| {
            let mut frame = windowed(raw);
            frame[5] = (32 - 10) << 3;
            frame
        }),
        ("bytes that are no frame behind it", &|raw| {
            [&compress(raw, &[])[..], b"and so on"].concat()
        }),
        ("two frames, one behind the other", &|raw| {
            let (one, other) = raw.split_at(raw.len() / 2);
            [compress(one, &[]), compress(other, &[])].concat()
        }),
        ("a skippable frame before it", &|raw| {
            [SKIPPABLE, &compress(raw, &[])].concat()
        }),
        ("a skippable frame behind it", &|raw| {
            [&compress(raw, &[]), SKIPPABLE].concat()
        }),
        ("a frame that was cut off", &|raw| {
            let mut frame = compress(raw, &[]);
            frame.pop();
            frame
        }),
    ];
    for (what, pack) in all {
        let (decoded, problems) = outcome(pack);
        assert!(decoded.is_err(), "{what}");
        assert!(problems.len() >= 2, "{what}: {problems:?}");
    }
}

/// Writes a snapshot file of one region.
fn pack(
    dictionary: Dictionary,
    level: i32,
    frame_pages: usize,
    pages: impl Iterator<Item = Vec<u8>>,
) -> Vec<u8> {
    let options = WriterOptions {
        level,
        frame_pages,
        dictionary,
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).expect("writer");
    writer
        .begin_region(&RegionSpec::default())
        .expect("cannot begin a region");
    for page in pages {
        writer.write_pages(&page).expect("pages");
    }
    writer.finish().expect("cannot finish the snapshot").0
}

fn open(bytes: Vec<u8>) -> Snapshot {
    Snapshot::open(Arc::new(MemoryStore::new(bytes))).expect("cannot open the snapshot")
}

/// Returns the frame header descriptor of the first frame, and its codec.
fn written(dictionary: Dictionary, level: i32, frame_pages: usize) -> (u8, u8) {
    let bytes = pack(
        dictionary,
        level,
        frame_pages,
        (0..1024).map(common::pattern),
    );
    let snapshot = open(bytes.clone());
    let frame = frame_of_page(&snapshot, 0);
    let at = usize::try_from(frame.offset()).expect("in memory");
    let (header, _) = RawFrameHeader::ref_from_prefix(&bytes[at..]).expect("a header");
    let payload = at
        + size_of::<RawFrameHeader>()
        + usize::from(header.run_count.get()) * size_of::<RawPageRun>();
    assert_eq!(bytes[payload..][..4], 0xfd2f_b528_u32.to_le_bytes());
    (bytes[payload + 4], header.codec)
}

/// Returns a page of text, which compresses and differs from other pages.
fn text_page(page: u64) -> Vec<u8> {
    let lines = (0..).flat_map(|line: u64| {
        let number = (page << 8 | line).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        format!("{number:x} is what line {line} of page {page} has to say\n").into_bytes()
    });
    lines.take(PAGE_SIZE).collect()
}

#[test]
fn frames_are_decoded_only_as_far_as_requested() {
    let dictionary = || Dictionary::Use(text_page(5000));
    for (frame_pages, dictionary) in [
        (16, Dictionary::Off),
        (16, dictionary()),
        (32, Dictionary::Off),
        (512, dictionary()),
    ] {
        let snapshot = open(pack(dictionary, 3, frame_pages, (0..2048).map(text_page)));
        let mut whole = FrameDecoder::new();
        let mut steps = FrameDecoder::in_steps(&snapshot).expect("a decoder");
        let mut expected = vec![0; frame_pages * PAGE_SIZE];
        let mut stopped = 0;
        for (n, page) in (0..2048).step_by(frame_pages).enumerate() {
            let frame = frame_of_page(&snapshot, page);
            let listed = whole
                .decode(&snapshot, &frame, Reason::Demand, &mut expected)
                .expect("cannot decode");
            let mut out = vec![0xaa; frame.decoded_len()];
            let wanted = u16::try_from(n * 7 % frame_pages + 1).expect("small");
            let (named, ready) = steps
                .decode_first(&snapshot, &frame, Reason::Demand, wanted, &mut out)
                .expect("cannot decode");
            assert!(named.runs().eq(listed.runs()));
            assert!(ready >= wanted && ready <= frame.slots());
            let ready = usize::from(ready) * PAGE_SIZE;
            assert!(out[..ready] == expected[..ready]);
            stopped += usize::from(ready < out.len());
            if n % 3 == 0 {
                // Another frame is begun, and the rest of this one is forgotten.
                continue;
            }
            steps
                .decode_rest(&snapshot, &frame, &mut out)
                .expect("cannot decode");
            assert!(out == expected);
            // A frame that wasn't begun is decoded from the start.
            let mut other = vec![0; out.len()];
            steps
                .decode_rest(&snapshot, &frame, &mut other)
                .expect("cannot decode");
            assert!(other == expected);
        }
        let frames = 2048 / frame_pages;
        assert!(stopped > frames / 4, "{stopped} of {frames}");
    }
}

#[test]
fn damaged_rest_keeps_the_pages_before_it() {
    // The payload is damaged before the record's checksum is computed.
    let sample = Sample::build_with(true, &|raw| {
        let mut frame = with(CParameter::MaxBlockSize(1024))(raw);
        let len = frame.len();
        frame[len - 1] ^= 0xff;
        frame[len - 2] ^= 0xff;
        frame
    });
    let snapshot = sample.open().expect("cannot open the snapshot");
    let frame = frame_of_page(&snapshot, 4);
    let mut steps = FrameDecoder::in_steps(&snapshot).expect("a decoder");
    let mut out = vec![0; frame.decoded_len()];
    let (_, ready) = steps
        .decode_first(&snapshot, &frame, Reason::Demand, 1, &mut out)
        .expect("the first page comes out");
    assert!(ready < frame.slots());
    assert!(out[..PAGE_SIZE] == common::pattern(4));
    let error = steps
        .decode_rest(&snapshot, &frame, &mut out)
        .expect_err("damaged");
    assert!(error.is_damage(), "{error}");
}

#[test]
fn writer_emits_the_documented_zstd_frames() {
    for (level, frame_pages) in [(1, 1), (3, 32), (19, 512)] {
        let (plain, codec) = written(Dictionary::Off, level, frame_pages);
        assert_eq!(
            plain & (SINGLE_SEGMENT | CHECKSUM | DICTIONARY_ID),
            SINGLE_SEGMENT
        );
        assert_eq!(codec, 1);
        let raw = common::pattern(5000);
        let (content, codec) = written(Dictionary::Use(raw), level, frame_pages);
        assert_eq!(
            content & (SINGLE_SEGMENT | CHECKSUM | DICTIONARY_ID),
            SINGLE_SEGMENT
        );
        assert_eq!(codec, 2);
    }
    let text: Vec<u8> = (0..1024u64)
        .flat_map(|page| {
            let line = format!("line {} of a page that looks like all others; ", page * 77);
            line.into_bytes()
                .repeat(PAGE_SIZE)
                .into_iter()
                .take(PAGE_SIZE)
        })
        .collect();
    let trained = dictionary::train(&text, 1, 3, 1 << 40).expect("a dictionary that pays");
    let (formatted, codec) = written(Dictionary::Use(trained.bytes), 3, 32);
    assert_eq!(formatted & (SINGLE_SEGMENT | CHECKSUM), SINGLE_SEGMENT);
    assert_ne!(formatted & DICTIONARY_ID, 0, "names its dictionary");
    assert_eq!(codec, 2);
}
