//! Images as plain lists of pages, and a reader that compares every one of them.

use proptest::prelude::*;
use snapshot_format::layout::PAGE_SIZE;
use snapshot_format::{
    Dictionary, FrameDecoder, FrameRef, Page, Reason, RegionSpec, Snapshot, SnapshotId, Writer,
    WriterOptions, Written,
};

/// Returns options that give the same bytes each time.
pub(crate) fn options() -> WriterOptions {
    WriterOptions {
        dictionary: Dictionary::Off,
        threads: Some(2),
        snapshot_id: Some(SnapshotId([0x5a; 16])),
        ..WriterOptions::default()
    }
}

fn next(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Returns a compressible page; the same number gives the same content.
pub(crate) fn data_page(number: u64) -> Vec<u8> {
    let mut state = number ^ 0x1234_5678;
    let mut page = format!("page {number} ").into_bytes();
    while page.len() < PAGE_SIZE {
        page.extend_from_slice(
            [&b"the quick "[..], b"brown fox ", b"0x7f3a00", b"\0\0\0\0"]
                [usize::try_from(next(&mut state) % 4).unwrap()],
        );
        page.push(u8::try_from(next(&mut state) & 0xff).unwrap());
    }
    page.truncate(PAGE_SIZE);
    page
}

/// Returns an incompressible page.
pub(crate) fn noise_page(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xabcd;
    (0..PAGE_SIZE)
        .map(|_| u8::try_from(next(&mut state) & 0xff).unwrap())
        .collect()
}

/// Content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// The page is [`data_page`] of this number.
    Data(u64),
    /// The page is given as a fill.
    Fill(u64),
    /// The page is a fill given as bytes.
    FillBytes(u64),
    Unavailable,
}

#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) spec: RegionSpec,
    pub(crate) runs: Vec<(Given, u64)>,
}

#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) regions: Vec<Region>,
}

/// Returns regions of a few blocks with all kinds of pages; contents repeat.
pub(crate) fn images() -> impl Strategy<Value = Image> {
    let given = prop_oneof![
        4 => (0u64..60).prop_map(Given::Data),
        4 => (1000u64..100_000).prop_map(Given::Data),
        2 => Just(Given::Fill(0)),
        1 => Just(Given::FillBytes(0)),
        1 => (0u64..3).prop_map(Given::Fill),
        1 => (1u64..4).prop_map(Given::FillBytes),
        1 => Just(Given::Unavailable),
    ];
    let len = prop_oneof![6 => 1u64..8, 2 => 1u64..200, 1 => 400u64..1300];
    let runs = prop::collection::vec((given, len), 0..30);
    let region =
        (0u32..3, 0u64..1 << 40, runs, "[a-z/]{0,12}").prop_map(|(space, start, runs, name)| {
            Region {
                spec: RegionSpec {
                    space,
                    flags: space,
                    start: start * 4096,
                    page_shift: 12,
                    name,
                    base_page: None,
                },
                runs,
            }
        });
    prop::collection::vec(region, 0..5).prop_map(|regions| Image { regions })
}

impl Image {
    pub(crate) fn one_region(runs: Vec<(Given, u64)>) -> Self {
        Self {
            regions: vec![Region {
                spec: RegionSpec::default(),
                runs,
            }],
        }
    }

    /// Writes the image; runs of data are given in pieces of these lengths in turn.
    pub(crate) fn write(&self, options: WriterOptions, pieces: &[usize]) -> (Vec<u8>, Written) {
        let mut writer = Writer::new(Vec::new(), options).unwrap();
        let mut pieces = pieces.iter().copied().cycle();
        for region in &self.regions {
            writer.begin_region(&region.spec).unwrap();
            let mut bytes = Vec::new();
            for &(given, pages) in &region.runs {
                match given {
                    Given::Data(number) => {
                        // A run of data consists of consecutive contents.
                        bytes.extend((number..number + pages).flat_map(data_page));
                        continue;
                    }
                    Given::FillBytes(word) => {
                        bytes.extend(
                            word.to_le_bytes()
                                .repeat(PAGE_SIZE / 8 * usize::try_from(pages).unwrap()),
                        );
                        continue;
                    }
                    Given::Fill(_) | Given::Unavailable => {}
                }
                write_in_pieces(&mut writer, &std::mem::take(&mut bytes), &mut pieces);
                match given {
                    Given::Fill(word) => writer.write_fill(pages, word).unwrap(),
                    _ => writer.write_unavailable(pages).unwrap(),
                }
            }
            write_in_pieces(&mut writer, &bytes, &mut pieces);
        }
        writer.finish().unwrap()
    }

    /// Compares the image with everything that a reader returns.
    pub(crate) fn assert_equals(&self, snapshot: &Snapshot, written: &Written) {
        assert_eq!(snapshot.summary(), &written.summary);
        assert_eq!(snapshot.file_bytes(), written.file_bytes);
        assert_eq!(snapshot.id(), written.id);
        let regions = snapshot.regions();
        assert_eq!(regions, written.regions);
        assert_eq!(regions.len(), self.regions.len());
        let mut pages = Pages::new(snapshot);
        for (expected, region) in self.regions.iter().zip(regions) {
            let RegionSpec {
                space,
                flags,
                start,
                ref name,
                ..
            } = expected.spec;
            assert_eq!(
                (region.space, region.flags, region.start, &region.name),
                (space, flags, start, name)
            );
            let mut page = region.first_page;
            for &(given, count) in &expected.runs {
                for n in 0..count {
                    let found = snapshot.look_up(page, Reason::Demand).unwrap();
                    match given {
                        Given::Data(number) => {
                            assert!(pages.bytes(found) == data_page(number + n), "page {page}");
                        }
                        Given::Fill(word) | Given::FillBytes(word) => {
                            assert_eq!(found, Page::Fill(word), "page {page}");
                        }
                        Given::Unavailable => assert_eq!(found, Page::Unavailable, "page {page}"),
                    }
                    page += 1;
                }
            }
            assert_eq!(page, region.first_page + region.pages);
        }
        let zeros: u64 = snapshot
            .fill_runs()
            .unwrap()
            .iter()
            .map(|run| run.pages)
            .sum();
        assert!(zeros <= written.summary.zero_pages);
    }
}

fn write_in_pieces(
    writer: &mut Writer<Vec<u8>>,
    bytes: &[u8],
    pieces: &mut impl Iterator<Item = usize>,
) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let len = (pieces.next().unwrap() * PAGE_SIZE).min(rest.len());
        let (now, later) = rest.split_at(len);
        writer.write_pages(now).unwrap();
        rest = later;
    }
}

/// Decodes stored pages, keeping the last frame.
struct Pages<'a> {
    snapshot: &'a Snapshot,
    decoder: FrameDecoder,
    last: Option<FrameRef>,
    decoded: Vec<u8>,
}

impl<'a> Pages<'a> {
    fn new(snapshot: &'a Snapshot) -> Self {
        Self {
            snapshot,
            decoder: FrameDecoder::new(),
            last: None,
            decoded: Vec::new(),
        }
    }

    fn bytes(&mut self, page: Page) -> &[u8] {
        let Page::Stored { frame, slot } = page else {
            panic!("{page:?} is not stored")
        };
        if self.last != Some(frame) {
            self.decoded.resize(frame.decoded_len(), 0);
            self.decoder
                .decode(self.snapshot, &frame, Reason::Demand, &mut self.decoded)
                .unwrap();
            self.last = Some(frame);
        }
        &self.decoded[usize::from(slot) * PAGE_SIZE..][..PAGE_SIZE]
    }
}
