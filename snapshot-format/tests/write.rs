//! The reader returns every page as it was written, for any input and options.

mod model;

use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::sync::Arc;

use model::{Given, Image, data_page, noise_page, options};
use proptest::prelude::*;
use snapshot_format::layout::{MAX_LISTED_PAGES_PER_SLOT, PAGE_SIZE, RawTopEntry};
use snapshot_format::{
    Codec, Dictionary, FrameDecoder, FrameRef, MemoryStore, Page, Reason, RegionSpec, Snapshot,
    SnapshotOptions, VerifyOptions, WorkingSetRun, WriteError, Writer, WriterOptions, Written,
    verify,
};

fn open(bytes: Vec<u8>) -> Snapshot {
    Snapshot::open(Arc::new(MemoryStore::new(bytes))).expect("a snapshot")
}

fn assert_verifies(bytes: Vec<u8>) {
    let report = verify(
        Arc::new(MemoryStore::new(bytes)),
        VerifyOptions::default().threads(2),
    )
    .unwrap();
    assert_eq!(report.problems, []);
}

/// Returns a writer with one region.
fn writer(options: WriterOptions) -> Writer<Vec<u8>> {
    let mut writer = Writer::new(Vec::new(), options).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer
}

/// Returns the bytes of `pages` data pages, from content `first` on.
fn data(first: u64, pages: u64) -> Vec<u8> {
    (first..first + pages).flat_map(data_page).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn snapshot_returns_what_was_written(
        image in model::images(),
        pieces in prop::collection::vec(1usize..1300, 1..5),
        frame_pages in prop::sample::select(vec![1usize, 2, 3, 7, 32, 100, 512]),
        exact in prop::sample::select(vec![8usize, 1 << 12]),
    ) {
        let options = WriterOptions { frame_pages, exact_distinct_pages: exact, ..options() };
        let (bytes, written) = image.write(options, &pieces);
        image.assert_equals(&open(bytes.clone()), &written);
        assert_verifies(bytes);
    }

    /// The file depends on the content alone, not on the number of threads or on how the input is
    /// split.
    #[test]
    fn same_input_gives_the_same_bytes(
        image in model::images(),
        pieces in prop::collection::vec(1usize..700, 1..4),
        frame_pages in 1usize..40,
    ) {
        let with = |threads, pieces: &[usize]| {
            let threads = Some(threads);
            image.write(WriterOptions { frame_pages, threads, ..options() }, pieces).0
        };
        let first = with(1, &[512]);
        prop_assert!(first == with(2, &pieces), "two threads, other pieces");
        prop_assert!(first == with(5, &[100_000]), "five threads, one piece");
    }
}

#[test]
fn same_content_is_stored_once() {
    let mut writer = writer(options());
    for _ in 0..40 {
        writer.write_pages(&data(0, 100)).unwrap();
    }
    let (bytes, written) = writer.finish().unwrap();
    assert_eq!(written.summary.stored_pages, 100);
    assert_eq!(written.summary.duplicate_pages, 3900);
    assert_eq!(
        written.summary.frames, 4,
        "three full frames and one of 4 pages"
    );
    assert_verifies(bytes);
}

#[test]
fn list_names_no_slot_more_than_four_times() {
    let mut writer = writer(options());
    // 31 pages don't fill a frame, so all pages that share them come while it is open.
    for _ in 0..100 {
        writer.write_pages(&data(0, 31)).unwrap();
    }
    let (bytes, written) = writer.finish().unwrap();
    assert_eq!(written.summary.frames, 1);
    let snapshot = open(bytes.clone());
    let Page::Stored { frame, .. } = snapshot.look_up(0, Reason::Demand).unwrap() else {
        panic!()
    };
    let mut out = vec![0; frame.decoded_len()];
    let mut decoder = FrameDecoder::new();
    let listed = decoder
        .decode(&snapshot, &frame, Reason::Demand, &mut out)
        .unwrap()
        .runs();
    let pages: usize = listed.map(|run| usize::from(run.count)).sum();
    assert_eq!(pages, 31 * MAX_LISTED_PAGES_PER_SLOT);
    assert_verifies(bytes);
}

#[test]
fn frames_are_sealed_early_for_index_blocks() {
    // Each block adds one page to the open frame, which would be full after 512 blocks.
    let (mut writer, shared) = (
        Writer::new(
            Positions::default(),
            WriterOptions {
                frame_pages: 512,
                ..options()
            },
        )
        .unwrap(),
        511,
    );
    writer.begin_region(&RegionSpec::default()).unwrap();
    for block in 0..300u64 {
        writer.write_pages(&data(1_000_000 + block, 1)).unwrap();
        writer.write_pages(&data(0, shared)).unwrap();
    }
    let (_, written) = writer.finish().unwrap();
    // The first block fills a frame by itself; after that there is one for each 64 blocks.
    assert_eq!(written.summary.frames, 6, "sealed early");
}

#[test]
fn trained_dictionary_is_used_where_it_pays() {
    // Small frames of pages that look alike.
    let template = data_page(7);
    let page = |n: u64| {
        let mut page = template.clone();
        for at in (0..PAGE_SIZE).step_by(64) {
            page[at..at + 8].copy_from_slice(&(n * 77 + at as u64).to_le_bytes());
        }
        page
    };
    let run = |dictionary: Dictionary| {
        let mut writer = writer(WriterOptions {
            frame_pages: 1,
            dictionary,
            ..options()
        });
        for n in 0..40_000 {
            writer.write_pages(&page(n)).unwrap();
        }
        writer.finish().unwrap()
    };
    let (plain, off) = run(Dictionary::Off);
    assert_eq!(off.dictionary_bytes, 0);
    let (bytes, trained) = run(Dictionary::Train);
    assert!(trained.dictionary_bytes > 0);
    assert!(
        bytes.len() < plain.len() / 10 * 9,
        "{} against {}",
        bytes.len(),
        plain.len()
    );
    assert_eq!(trained.summary.content_digest, off.summary.content_digest);
    assert_verifies(bytes.clone());
    assert_eq!(
        bytes,
        run(Dictionary::Train).0,
        "the training's speed doesn't show"
    );

    let samples: Vec<u8> = (0..2000).flat_map(page).collect();
    let trained =
        snapshot_format::dictionary::train(&samples, 1, 3, 1 << 30).expect("a dictionary");
    assert!(trained.saved_ratio > 0.2);
    let (used, _) = run(Dictionary::Use(trained.bytes));
    assert!(used.len() < bytes.len(), "used from the first frame on");
    assert_verifies(used);
}

#[test]
fn dictionary_that_does_not_pay_is_left_out() {
    let noise: Vec<u8> = (0..2000).flat_map(model::noise_page).collect();
    assert!(snapshot_format::dictionary::train(&noise, 32, 3, 1 << 40).is_none());
    let text = data(0, 1000);
    assert!(
        snapshot_format::dictionary::train(&text, 32, 3, 10 << 20).is_none(),
        "too little to pay"
    );
    let mut writer = writer(WriterOptions {
        frame_pages: 1,
        dictionary: Dictionary::Train,
        ..options()
    });
    for n in 0..36_000 {
        writer.write_pages(&model::noise_page(n)).unwrap();
    }
    let (bytes, written) = writer.finish().unwrap();
    assert_eq!(written.dictionary_bytes, 0);
    assert_verifies(bytes);
}

#[test]
fn blobs_and_properties_come_back() {
    let state: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    let mut writer = writer(options());
    writer.write_pages(&data(0, 100)).unwrap();
    writer.attach("vmstate", &mut &state[..]).unwrap();
    writer.write_pages(&data(100, 700)).unwrap();
    writer.attach("empty", &mut io::empty()).unwrap();
    let runs = [
        WorkingSetRun {
            first_page: 700,
            pages: 100,
        },
        WorkingSetRun {
            first_page: 0,
            pages: 3,
        },
    ];
    writer.add_working_set("boot", runs).unwrap();
    writer.set_property("source", "a test").unwrap();
    writer.write_fill(5, 0).unwrap();
    let (bytes, _) = writer.finish().unwrap();
    assert_verifies(bytes.clone());
    let snapshot = open(bytes);
    assert_eq!(
        snapshot.attachment_bytes("vmstate", 1 << 30).unwrap(),
        state
    );
    assert_eq!(snapshot.attachment_bytes("empty", 0).unwrap(), []);
    assert_eq!(snapshot.working_set("boot").unwrap(), runs);
    let properties = snapshot.properties().unwrap();
    assert!(properties.contains(&("source".into(), "a test".into())));
    assert!(properties.contains(&("writer.level".into(), "3".into())));
}

#[test]
fn snapshot_can_be_written_to_a_pipe() {
    let (mut reader, sink) = io::pipe().unwrap();
    let received = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut writer = Writer::new(sink, options()).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_pages(&data(0, 3000)).unwrap();
    let (sink, written) = writer.finish().unwrap();
    drop(sink);
    let bytes = received.join().unwrap();
    assert_eq!(bytes.len() as u64, written.file_bytes);
    assert_verifies(bytes);
}

/// An output that accepts a number of bytes, then fails.
struct Failing(usize);

impl Write for Failing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let len = bytes.len().min(self.0);
        self.0 -= len;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_all(mut writer: Writer<Failing>) -> Result<Written, WriteError> {
    writer.begin_region(&RegionSpec::default())?;
    for n in 0..4 {
        let noise: Vec<u8> = (n * 600..(n + 1) * 600)
            .flat_map(model::noise_page)
            .collect();
        if let Err(error) = writer.write_pages(&noise) {
            assert!(matches!(writer.write_fill(1, 0), Err(WriteError::Stopped)));
            assert!(matches!(writer.finish(), Err(WriteError::Stopped)));
            return Err(error);
        }
    }
    writer.finish().map(|(_, written)| written)
}

#[test]
fn failing_output_stops_the_writer() {
    let whole = write_all(Writer::new(Failing(usize::MAX), options()).unwrap())
        .unwrap()
        .file_bytes;
    let whole = usize::try_from(whole).unwrap();
    for room in [
        0,
        1,
        5000,
        1 << 20,
        2 << 20,
        whole / 2,
        whole - 4097,
        whole - 1,
    ] {
        let result = write_all(Writer::new(Failing(room), options()).unwrap());
        assert!(
            matches!(result, Err(WriteError::Io { .. })),
            "room for {room} of {whole} bytes"
        );
    }
    assert!(write_all(Writer::new(Failing(whole), options()).unwrap()).is_ok());
}

#[test]
fn failed_write_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("snapshot");
    let file = snapshot_format::SnapshotFile::create(&target, false).unwrap();
    let mut writer = Writer::new(file, options()).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_pages(&data(0, 2000)).unwrap();
    let broken = writer.read_pages(1000, |_| Err(io::ErrorKind::UnexpectedEof.into()));
    assert!(matches!(broken, Err(WriteError::Source(_))));
    drop(writer);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn progress_callback_can_cancel_writing() {
    let mut writer = writer(options());
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let record = Arc::clone(&seen);
    writer.on_progress(move |progress| {
        record.lock().unwrap().push(*progress);
        if progress.pages_done < 4000 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    let mut cancelled = None;
    for n in 0..100 {
        if let Err(error) = writer.write_pages(&data(n * 100, 100)) {
            cancelled = Some(error);
            break;
        }
    }
    assert!(matches!(cancelled, Some(WriteError::Cancelled)));
    assert!(matches!(writer.finish(), Err(WriteError::Stopped)));
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 2);
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].pages_done <= pair[1].pages_done
                && pair[0].bytes_written <= pair[1].bytes_written)
    );
}

type Call = fn(&mut Writer<Vec<u8>>) -> Result<(), WriteError>;

#[test]
fn wrong_arguments_are_refused() {
    let argument: [(&str, Call); 14] = [
        ("no multiple of a page", |w| w.write_pages(&[0; 100])),
        ("start", |w| {
            w.begin_region(&RegionSpec {
                start: 5,
                ..RegionSpec::default()
            })
        }),
        ("page shift", |w| {
            w.begin_region(&RegionSpec {
                page_shift: 11,
                ..RegionSpec::default()
            })
        }),
        ("flags", |w| {
            w.begin_region(&RegionSpec {
                flags: 8,
                ..RegionSpec::default()
            })
        }),
        ("key", |w| w.set_property("a=b", "")),
        ("value", |w| w.set_property("a", "b\nc")),
        ("a tab in a key", |w| w.set_property("a\tb", "c")),
        ("an escape in a value", |w| w.set_property("a", "\x1b[2J")),
        ("a control character in a region's name", |w| {
            w.begin_region(&RegionSpec {
                name: "\x7f".into(),
                ..RegionSpec::default()
            })
        }),
        ("a path as a name", |w| w.attach("../x", &mut io::empty())),
        ("a folder as a name", |w| w.add_working_set("..", [])),
        ("blob without a name", |w| w.attach("", &mut io::empty())),
        ("empty run", |w| {
            w.add_working_set(
                "x",
                [WorkingSetRun {
                    first_page: 0,
                    pages: 0,
                }],
            )
        }),
        ("unwritten page", |w| {
            w.add_working_set(
                "x",
                [WorkingSetRun {
                    first_page: 9,
                    pages: 2,
                }],
            )
        }),
    ];
    for (what, call) in argument {
        let mut writer = Writer::new(Vec::new(), options()).unwrap();
        writer.begin_region(&RegionSpec::default()).unwrap();
        writer.write_fill(10, 0).unwrap();
        let result = call(&mut writer);
        assert!(
            matches!(result, Err(WriteError::Argument { .. })),
            "{what}: {result:?}"
        );
        assert!(
            matches!(writer.finish(), Err(WriteError::Stopped)),
            "{what}"
        );
    }
}

/// A reader with the default options opens whatever the writer has written.
#[test]
fn memory_beyond_the_top_table_limit_is_refused() {
    let blocks = SnapshotOptions::default().max_top_bytes / size_of::<RawTopEntry>() as u64;
    let mut writer = Writer::new(io::sink(), WriterOptions::default()).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_fill(1, 0).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    let error = writer
        .write_unavailable((blocks - 1) * 512 + 1)
        .expect_err("too large");
    let WriteError::TopTooLarge { bytes, limit } = error else {
        panic!("{error}");
    };
    assert_eq!((bytes, limit), ((blocks + 1) * 24, 256 << 20));
    for says in ["21.3 TiB", "max_top_bytes", "in parts"] {
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn input_beyond_a_limit_is_refused() {
    let limit: [(&str, Call); 8] = [
        ("pages", |w| w.write_fill(1 << 36, 0)),
        ("long name", |w| {
            w.begin_region(&RegionSpec {
                name: "x".repeat(5000),
                ..RegionSpec::default()
            })
        }),
        ("working set", |w| {
            // More pages than the snapshot has, although each run is right.
            let run = WorkingSetRun {
                first_page: 0,
                pages: 10,
            };
            w.add_working_set("x", [run; 52])
        }),
        ("one property", |w| {
            w.set_property("x", &"y".repeat(1 << 20))
        }),
        ("all properties", |w| {
            // Far more than allowed: the call that exceeds the limit is the one that fails, and
            // replacing a value counts only the new one.
            for _ in 0..64 {
                w.set_property("replaced", &"y".repeat(1 << 19))?;
            }
            (0..1 << 20).try_for_each(|n| w.set_property(&n.to_string(), "y"))
        }),
        ("attachments", |w| {
            (0..5000).try_for_each(|n| w.attach(&n.to_string(), &mut io::empty()))
        }),
        ("regions", |w| {
            let name = "x".repeat(4096);
            let region = RegionSpec {
                name,
                ..RegionSpec::default()
            };
            (0..1 << 20).try_for_each(|_| w.begin_region(&region))
        }),
        ("address space", |w| {
            w.begin_region(&RegionSpec {
                start: u64::MAX - 4095,
                ..RegionSpec::default()
            })?;
            w.write_fill(1, 0)?;
            w.write_fill(1, 0)
        }),
    ];
    for (what, call) in limit {
        let mut writer = Writer::new(Vec::new(), options()).unwrap();
        writer.begin_region(&RegionSpec::default()).unwrap();
        writer.write_fill(10, 0).unwrap();
        let result = call(&mut writer);
        assert!(
            matches!(result, Err(WriteError::Limit { .. })),
            "{what}: {result:?}"
        );
    }
}

#[test]
fn wrong_options_are_refused() {
    let mut none = Writer::new(Vec::new(), options()).unwrap();
    assert!(
        matches!(none.write_fill(1, 0), Err(WriteError::Argument { .. })),
        "no region"
    );
    for options in [
        WriterOptions {
            frame_pages: 0,
            ..options()
        },
        WriterOptions {
            frame_pages: 513,
            ..options()
        },
        WriterOptions {
            level: 23,
            ..options()
        },
        WriterOptions {
            threads: Some(0),
            ..options()
        },
        WriterOptions {
            dictionary: Dictionary::Use(Vec::new()),
            ..options()
        },
    ] {
        assert!(matches!(
            Writer::new(Vec::new(), options),
            Err(WriteError::Argument { .. })
        ));
    }
}

#[test]
fn empty_snapshot_is_valid() {
    let (bytes, written) = Writer::new(Vec::new(), options())
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(written.summary.pages, 0);
    assert_verifies(bytes);
    let mut writer = Writer::new(Vec::new(), options()).unwrap();
    for name in ["a", "b"] {
        writer
            .begin_region(&RegionSpec {
                name: name.into(),
                ..RegionSpec::default()
            })
            .unwrap();
    }
    let (bytes, _) = writer.finish().unwrap();
    assert_eq!(open(bytes.clone()).regions().len(), 2);
    assert_verifies(bytes);
}

#[test]
fn terabyte_of_zeros_is_a_tiny_file() {
    let image = Image::one_region(vec![
        (Given::Fill(0), 1 << 27),
        (Given::Data(1), 1),
        (Given::Fill(0), 1 << 27),
        (Given::Unavailable, 1 << 20),
    ]);
    let (bytes, written) = image.write(options(), &[1 << 20]);
    assert_eq!(written.summary.zero_pages, 1 << 28);
    let snapshot = open(bytes);
    let runs = snapshot.fill_runs().unwrap();
    assert_eq!(
        runs.iter().map(|run| run.pages).collect::<Vec<_>>(),
        [1 << 27, 1 << 27]
    );
    assert_eq!(
        snapshot.look_up(1 << 28, Reason::Demand).unwrap(),
        Page::Fill(0)
    );
    assert_eq!(
        snapshot.look_up((1 << 28) + 1, Reason::Demand).unwrap(),
        Page::Unavailable
    );
}

/// An output that counts lengths only.
#[derive(Default)]
struct Positions(u64);

impl Write for Positions {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the codecs of the frames of 32 pages, and the bytes that they take.
fn stored(level: i32, pages: &[u8]) -> (Vec<Codec>, u64) {
    let mut writer = writer(WriterOptions { level, ..options() });
    writer.write_pages(pages).unwrap();
    let (bytes, written) = writer.finish().unwrap();
    let snapshot = open(bytes);
    let block = snapshot.index_block(0, Reason::Demand).unwrap();
    let codecs = block.frames().iter().map(FrameRef::codec).collect();
    (codecs, written.summary.stored_bytes)
}

#[test]
fn incompressible_frames_are_stored_raw() {
    let noise: Vec<u8> = (0..64).flat_map(noise_page).collect();
    let (codecs, bytes) = stored(3, &noise);
    assert_eq!(codecs, [Codec::Raw, Codec::Raw]);
    assert!(bytes < noise.len() as u64 + 1024, "{bytes}");
    let (codecs, _) = stored(3, &data(0, 64));
    assert_eq!(codecs, [Codec::Zstd, Codec::Zstd]);
}

#[test]
fn higher_level_compresses_more() {
    let pages = data(0, 64);
    let (_, fast) = stored(1, &pages);
    let (_, small) = stored(19, &pages);
    assert!(small < fast, "{small} bytes at level 19, {fast} at level 1");
}
