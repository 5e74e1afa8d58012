//! The memory of a real guest through the program: packed, verified, extracted, restored.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, OnceLock};

use snaprestore_fixtures::guest::{GuestImage, PC_WINDOW};
use snaprestore_fixtures::stats::PageStats;
use snaprestore_tests::compare::{assert_same_files, bytes_at, first_difference};
use snaprestore_tests::program::{Run, done, number, snaprestore};
use snaprestore_tests::real::{can_restore, guest};

/// Returns the path for a large file of these tests; the next run overwrites it.
fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Returns the guest's snapshot, which `create` makes from the raw file once for all tests.
pub(crate) fn snapshot(image: &GuestImage) -> &'static Path {
    static SNAPSHOT: OnceLock<PathBuf> = OnceLock::new();
    SNAPSHOT.get_or_init(|| {
        let snapshot = scratch("guest.snap");
        let report = done([
            "create".as_ref(),
            image.raw.as_os_str(),
            "--force".as_ref(),
            "--output".as_ref(),
            snapshot.as_os_str(),
        ]);
        check_report(image, &report);
        snapshot
    })
}

/// Compares the counts of `create` with counts of this test's own.
fn check_report(image: &GuestImage, report: &serde_json::Value) {
    let stats = PageStats::read(File::open(&image.raw).unwrap()).unwrap();
    let count = |key| number(report, key);
    assert_eq!(count("page_size"), 4096);
    assert_eq!(count("pages"), stats.pages);
    assert_eq!(count("zero_pages"), stats.zero);
    assert_eq!(count("fill_pages"), stats.fill);
    // A guest of 1 GiB has fewer distinct pages than the table holds exactly.
    assert_eq!(count("stored_pages"), stats.distinct);
    let kinds = [
        "zero_pages",
        "fill_pages",
        "stored_pages",
        "duplicate_pages",
    ];
    assert_eq!(kinds.map(count).iter().sum::<u64>(), stats.pages);
    assert_eq!(count("unavailable_pages"), 0);
    assert_eq!(count("logical_bytes"), stats.pages * 4096);
    assert!(count("file_bytes") * 4 < stats.pages * 4096, "{report}");
}

/// Serialises these tests: each of them compares and decodes 1 GiB, and two at a time would only
/// compete for cores and memory.
fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn a_raw_guest_comes_back_byte_for_byte() {
    let Some(image) = guest("a_raw_guest_comes_back_byte_for_byte") else {
        return;
    };
    let _turn = one_at_a_time();
    let snapshot = snapshot(&image);
    let verified = done(["verify".as_ref(), snapshot.as_os_str()]);
    assert_eq!(verified["ok"], true);
    assert_eq!(verified["problems"].as_array().unwrap().len(), 0);
    let pages = std::fs::metadata(&image.raw).unwrap().len() / 4096;
    assert_eq!(number(&verified, "pages_checked"), pages);

    let out = scratch("guest.out");
    done([
        "extract".as_ref(),
        snapshot.as_os_str(),
        "--force".as_ref(),
        "--output".as_ref(),
        out.as_os_str(),
    ]);
    assert_same_files(&image.raw, &out);
    std::fs::remove_file(&out).unwrap();
}

#[test]
fn a_guest_through_pipes_is_the_same_memory() {
    let Some(image) = guest("a_guest_through_pipes_is_the_same_memory") else {
        return;
    };
    let _turn = one_at_a_time();
    let snapshot = snapshot(&image);
    let info = done(["info".as_ref(), snapshot.as_os_str()]);
    let streamed = scratch("guest-stdin.snap");
    let report = Run::to_end(
        snaprestore(["create", "-", "--json", "--force", "--output"])
            .arg(&streamed)
            .stdin(File::open(&image.raw).unwrap()),
    )
    .exits(0)
    .json();
    assert_eq!(report["content_digest"], info["content_digest"]);
    assert_ne!(report["snapshot_id"], info["snapshot_id"]);

    let mut child = snaprestore(["extract", "--output", "-"])
        .arg(&streamed)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut raw = File::open(&image.raw).unwrap();
    let difference = first_difference(&mut raw, child.stdout.as_mut().unwrap()).unwrap();
    assert_eq!(difference, None);
    assert!(child.wait().unwrap().success());
    std::fs::remove_file(&streamed).unwrap();
}

/// A loadable segment of an ELF core.
struct Segment {
    offset: u64,
    physical: u64,
    file_bytes: u64,
}

/// Returns the segments of a 64-bit little-endian core, by a second parser.
fn segments(elf: &File) -> Vec<Segment> {
    let header = bytes_at(elf, 0, 64);
    assert_eq!(header[..6], *b"\x7fELF\x02\x01");
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    let half = |bytes: &[u8], at: usize| u16::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    let (table, size, count) = (word(&header, 32), half(&header, 54), half(&header, 56));
    (0..u64::from(count))
        .map(|i| bytes_at(elf, table + i * u64::from(size), 56))
        .filter(|entry| entry[..4] == [1, 0, 0, 0])
        .map(|entry| Segment {
            offset: word(&entry, 8),
            physical: word(&entry, 24),
            file_bytes: word(&entry, 32),
        })
        .collect()
}

#[test]
fn a_dumped_guest_comes_back_byte_for_byte() {
    let name = "a_dumped_guest_comes_back_byte_for_byte";
    let Some(image) = guest(name) else {
        return;
    };
    let _turn = one_at_a_time();
    let (snapshot, out) = (scratch("guest-elf.snap"), scratch("guest-elf.out"));
    done([
        "create".as_ref(),
        image.elf.as_os_str(),
        "--force".as_ref(),
        "--output".as_ref(),
        snapshot.as_os_str(),
    ]);
    let verified = done(["verify".as_ref(), snapshot.as_os_str()]);
    assert_eq!(verified["ok"], true);
    done([
        "extract".as_ref(),
        snapshot.as_os_str(),
        "--force".as_ref(),
        "--output".as_ref(),
        out.as_os_str(),
    ]);

    // Each byte of the dump is where the regions place it.
    let info = done(["info".as_ref(), snapshot.as_os_str()]);
    let mut at = 0;
    let regions: Vec<(u64, u64, u64)> = info["regions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|region| {
            let place = (number(region, "start"), number(region, "bytes"), at);
            at += place.1;
            place
        })
        .collect();
    let (elf, out_file) = (File::open(&image.elf).unwrap(), File::open(&out).unwrap());
    let segments = segments(&elf);
    let dumped: u64 = segments.iter().map(|segment| segment.file_bytes).sum();
    assert_eq!(number(&info, "logical_bytes"), dumped);
    for segment in &segments {
        let step = 1 << 20;
        let mut done = 0;
        while done < segment.file_bytes {
            let start = segment.physical + done;
            let (first, bytes, place) = regions
                .iter()
                .find(|(first, bytes, _)| (*first..first + bytes).contains(&start))
                .unwrap_or_else(|| panic!("no region has {start:#x}"));
            let len = step
                .min(segment.file_bytes - done)
                .min(first + bytes - start);
            let len_here = usize::try_from(len).unwrap();
            let wanted = bytes_at(&elf, segment.offset + done, len_here);
            let found = bytes_at(&out_file, place + (start - first), len_here);
            assert!(wanted == found, "differs near {start:#x}");
            done += len;
        }
    }

    // The guest's memory equals that of the raw file.
    let raw = File::open(&image.raw).unwrap();
    let raw_bytes = raw.metadata().unwrap().len();
    let mut compared = 0;
    for (start, bytes, place) in &regions {
        let mut at = *start;
        let end = (start + bytes).min(raw_bytes);
        while at < end {
            let len = (end - at).min(1 << 16);
            let len_here = usize::try_from(len).unwrap();
            // The window's borders are multiples of 64 KiB.
            if !PC_WINDOW.contains(&at) {
                let found = bytes_at(&out_file, place + (at - start), len_here);
                assert!(
                    bytes_at(&raw, at, len_here) == found,
                    "differs near {at:#x}"
                );
                compared += len;
            }
            at += len;
        }
    }
    assert!(compared + (PC_WINDOW.end - PC_WINDOW.start) >= raw_bytes);

    // The memory that was compared byte by byte is also the result of restoring the dump.
    if can_restore(name) {
        let report = done([
            "restore".as_ref(),
            snapshot.as_os_str(),
            "--check".as_ref(),
            out.as_os_str(),
        ]);
        assert_eq!(number(&report, "mismatches"), 0, "{report}");
        assert_eq!(number(&report, "checked_pages") * 4096, dumped, "{report}");
    }
    for file in [&snapshot, &out] {
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn a_guest_is_restored_in_every_order() {
    let name = "a_guest_is_restored_in_every_order";
    let (true, Some(image)) = (can_restore(name), guest(name)) else {
        return;
    };
    let _turn = one_at_a_time();
    let snapshot = snapshot(&image);
    let pages = std::fs::metadata(&image.raw).unwrap().len() / 4096;
    for (touch, prefetch, threads, touchers) in [
        ("sequential", "off", "1", "1"),
        ("sequential", "all", "1", "1"),
        ("sequential", "off", "4", "4"),
        ("sequential", "all", "4", "4"),
        ("random", "off", "1", "1"),
        ("random", "all", "1", "1"),
        ("random", "off", "4", "4"),
        ("random", "all", "4", "4"),
        ("random", "working-set", "2", "1"),
    ] {
        let report = done([
            "restore".as_ref(),
            snapshot.as_os_str(),
            "--check".as_ref(),
            image.raw.as_os_str(),
            "--touch".as_ref(),
            touch.as_ref(),
            "--prefetch".as_ref(),
            prefetch.as_ref(),
            "--threads".as_ref(),
            threads.as_ref(),
            "--touch-threads".as_ref(),
            touchers.as_ref(),
        ]);
        let count = |key| number(&report, key);
        assert_eq!(count("mismatches"), 0, "{touch} {prefetch}: {report}");
        assert_eq!(count("checked_pages"), pages, "{touch} {prefetch}");
        for key in ["map_us", "first_page_us", "touch_ms", "complete_ms"] {
            count(key);
        }
        for key in ["p50", "p90", "p99", "max"] {
            assert!(report["fault_us"][key].is_number(), "{report}");
        }
        // Long zero runs are left to the kernel, so fewer pages are installed than exist.
        let installed = count("pages_copied") + count("pages_zeroed");
        assert!(installed > 0 && installed <= pages, "{report}");
        assert!(count("bytes_read") > 0);
        match prefetch {
            "off" => {
                assert_eq!(count("prefetched_pages"), 0);
                assert!(count("faults") > 0);
            }
            "all" => assert!(count("prefetched_pages") > 0),
            // The snapshot has no such page.
            _ => {}
        }
    }
}
