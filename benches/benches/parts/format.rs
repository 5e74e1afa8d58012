//! Opening, looking up, decoding.

use std::fs;
use std::hint::black_box;
use std::io::Write as _;

use criterion::{BenchmarkId, Criterion, Throughput};
use snapshot_format::{Dictionary, FrameDecoder, FrameRef, Reason, Snapshot, dictionary, digest};

use crate::pieces::{frames, memory, noise, snapshot, written};

/// Measures opening a file that is in the page cache.
pub(crate) fn open(criterion: &mut Criterion) {
    let mut file = tempfile::NamedTempFile::new().expect("cannot create a temporary file");
    file.write_all(&written(memory(), 32, Dictionary::Off))
        .expect("writing");
    let path = file.path().to_owned();
    assert!(fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0));
    criterion.bench_function("open", |bencher| {
        bencher.iter(|| black_box(Snapshot::open_path(&path).expect("cannot open the snapshot")));
    });
}

/// Measures looking up a page: with its index block in the cache, and without.
pub(crate) fn look_up(criterion: &mut Criterion) {
    let snapshot = snapshot(memory(), 32, Dictionary::Off);
    let mut group = criterion.benchmark_group("look-up");
    let pages = snapshot.page_slots();
    let mut page = 0;
    group.bench_function("cached", |bencher| {
        bencher.iter(|| {
            page = (page + 7919) % pages;
            black_box(snapshot.look_up(page, Reason::Demand).expect("a page"))
        });
    });
    let mut block = 0;
    group.bench_function("index block read and checked", |bencher| {
        bencher.iter(|| {
            block = (block + 1) % snapshot.block_count();
            black_box(
                snapshot
                    .uncached_block(block, Reason::Demand)
                    .expect("a block"),
            );
        });
    });
    group.finish();
}

/// Returns a dictionary for the memory: a trained one, or a piece of the memory if training doesn't
/// pay.
fn dictionary() -> Vec<u8> {
    let trained = dictionary::train(&memory()[..16 << 20], 16, 3, 1 << 30);
    trained.map_or_else(|| memory()[..64 << 10].to_vec(), |trained| trained.bytes)
}

/// Measures the check whether a page repeats one word, for a page that does and for one that
/// doesn't, against a comparison byte by byte.
pub(crate) fn fills(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("is a page a fill");
    group.throughput(Throughput::Bytes(4096));
    let pages = [
        ("zero", vec![0; 4096]),
        ("other in its last byte", [vec![0; 4095], vec![1]].concat()),
        ("noise", noise(4096)),
    ];
    for (name, page) in pages {
        group.bench_function(name, |bencher| {
            bencher.iter(|| digest::fill_word(black_box(&page)));
        });
        group.bench_function(format!("{name}, byte by byte"), |bencher| {
            bencher.iter(|| {
                let page = black_box(&page);
                (8..page.len()).all(|at| black_box(page[at]) == page[at % 8])
            });
        });
    }
    group.finish();
}

/// Measures a frame from memory to memory: checksum and decoding.
pub(crate) fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    let kinds: [(&str, &[u8], Dictionary); 3] = [
        ("zstd", memory(), Dictionary::Off),
        (
            "zstd with a dictionary",
            memory(),
            Dictionary::Use(dictionary()),
        ),
        ("raw", &noise(8 << 20), Dictionary::Off),
    ];
    for (name, bytes, kind) in kinds {
        for frame_kib in [4, 16, 64, 128, 256, 512] {
            let frame_pages = frame_kib / 4;
            let snapshot = snapshot(bytes, frame_pages, kind.clone());
            snapshot.prepare().expect("cannot read the dictionaries");
            let frames: Vec<FrameRef> = frames(&snapshot)
                .into_iter()
                .map(|(frame, _)| frame)
                .filter(|frame| usize::from(frame.slots()) == frame_pages)
                .collect();
            let mut decoder =
                FrameDecoder::in_steps(&snapshot).expect("cannot read the dictionaries");
            let mut out = vec![0; frame_pages * 4096];
            let mut next = 0;
            group.throughput(Throughput::Bytes(out.len() as u64));
            group.bench_function(
                BenchmarkId::new(name, format!("{frame_kib} KiB")),
                |bencher| {
                    bencher.iter(|| {
                        next = (next + 1) % frames.len();
                        let listed =
                            decoder.decode(&snapshot, &frames[next], Reason::Demand, &mut out);
                        black_box(listed.expect("a good frame").runs().len())
                    });
                },
            );
            // The wait of a thread that touches any page of a frame.
            group.bench_function(
                BenchmarkId::new(format!("{name}, up to a page"), format!("{frame_kib} KiB")),
                |bencher| {
                    bencher.iter(|| {
                        next = (next + 1) % frames.len();
                        let (frame, slots) = (&frames[next], next * 7 % frame_pages + 1);
                        let slots = u16::try_from(slots).expect("at most 512");
                        let first =
                            decoder.decode_first(&snapshot, frame, Reason::Demand, slots, &mut out);
                        black_box(first.expect("a good frame").1)
                    });
                },
            );
        }
    }
    group.finish();
}
