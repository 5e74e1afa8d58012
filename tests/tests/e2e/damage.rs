//! Snapshots of real memory with a damaged byte: `verify` finds it, and no memory is ever wrong.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;
use snaprestore_tests::program::{Run, done, number, snaprestore};
use snaprestore_tests::real::{can_restore, guest, guest_piece};
use snapshot_format::{Page, Reason, Snapshot};

const PIECE: u64 = 24 << 20;

/// Returns the frames of a snapshot, and the pages in each of them.
fn frames(snapshot: &Snapshot) -> Vec<(Range<u64>, Vec<u64>)> {
    let mut frames: BTreeMap<u64, (Range<u64>, Vec<u64>)> = [].into();
    for region in snapshot.regions() {
        for page in region.page_numbers() {
            if let Page::Stored { frame, .. } = snapshot.look_up(page, Reason::Verify).unwrap() {
                let at = frame.offset();
                let bytes = at..at + u64::from(frame.stored_len());
                frames.entry(at).or_insert((bytes, Vec::new())).1.push(page);
            }
        }
    }
    frames.into_values().collect()
}

/// Inverts a byte of a file.
fn invert(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

#[test]
fn a_bad_byte_of_a_frame_costs_its_pages_and_no_more() {
    let name = "a_bad_byte_of_a_frame_costs_its_pages_and_no_more";
    let (true, Some(image)) = (can_restore(name), guest(name)) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (raw, snapshot) = (folder.path().join("raw"), folder.path().join("s"));
    guest_piece(&image, PIECE, &raw);
    let created = done([
        "create".as_ref(),
        raw.as_os_str(),
        "--output".as_ref(),
        snapshot.as_os_str(),
    ]);
    let pages = number(&created, "pages");
    let frames = frames(&Snapshot::open_path(&snapshot).unwrap());
    assert!(frames.len() > 20, "{} frames", frames.len());

    let mut rng = SmallRng::seed_from_u64(5);
    for (round, (bytes, held)) in
        (0..12).map(|round| (round, &frames[rng_pick(round, frames.len())]))
    {
        let at = rng.random_range(bytes.clone());
        invert(&snapshot, at);
        let verified = Run::to_end(snaprestore(["verify", "--json"]).arg(&snapshot))
            .exits(3)
            .json();
        assert_eq!(verified["ok"], false);
        let problems = verified["problems"].as_array().unwrap();
        let of_frame = |problem: &&Value| {
            problem["what"] == "frame" && number(problem, "offset") == bytes.start
        };
        assert!(
            problems.iter().find(of_frame).is_some(),
            "{at}: {problems:?}"
        );

        let (touch, prefetch) = [("sequential", "off"), ("random", "all")][round % 2];
        let run = Run::to_end(
            snaprestore([
                "restore",
                "--json",
                "--touch",
                touch,
                "--prefetch",
                prefetch,
            ])
            .arg("--check")
            .args([&raw, &snapshot]),
        )
        .exits(3);
        let report = run.json();
        assert_eq!(number(&report, "mismatches"), 0, "{at}: {report}");
        // Everything else was restored correctly.
        assert_eq!(
            number(&report, "checked_pages"),
            pages - held.len() as u64,
            "{at}: {report}"
        );
        // The report names the file, the frame and the pages.
        let failures = report["failures"].as_array().unwrap();
        assert_eq!(failures.len(), 1, "{report}");
        assert_eq!(failures[0]["file"], snapshot.to_str().unwrap());
        assert_eq!(number(&failures[0], "offset"), bytes.start);
        assert_eq!(&pages_of(&failures[0]), held, "{at}");
        invert(&snapshot, at);
    }
    let verified = done(["verify".as_ref(), snapshot.as_os_str()]);
    assert_eq!(verified["ok"], true, "all is as it was");
}

/// Returns the frame for a round: rounds are spread over the file and include the first and the
/// last frame.
fn rng_pick(round: usize, frames: usize) -> usize {
    round * (frames - 1) / 11
}

/// Returns the pages of a reported failure, which lists the first and last page of each run.
fn pages_of(failure: &Value) -> Vec<u64> {
    let runs: Vec<(u64, u64)> = serde_json::from_value(failure["pages"].clone()).unwrap();
    runs.into_iter()
        .flat_map(|(first, last)| first..=last)
        .collect()
}

#[test]
fn a_bad_byte_outside_the_frames_is_found_too() {
    let name = "a_bad_byte_outside_the_frames_is_found_too";
    let (true, Some(image)) = (can_restore(name), guest(name)) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (raw, snapshot) = (folder.path().join("raw"), folder.path().join("s"));
    guest_piece(&image, PIECE, &raw);
    done([
        "create".as_ref(),
        raw.as_os_str(),
        "--output".as_ref(),
        snapshot.as_os_str(),
    ]);
    let frames = frames(&Snapshot::open_path(&snapshot).unwrap());
    let len = std::fs::metadata(&snapshot).unwrap().len();
    let in_frame = |at: u64| frames.iter().any(|(bytes, _)| bytes.contains(&at));
    let mut rng = SmallRng::seed_from_u64(6);
    let after_frames = frames.last().unwrap().0.end;
    // Header, index blocks among the frames, sections, trailer.
    let mut places: Vec<u64> = vec![
        0,
        9,
        100,
        4095,
        after_frames,
        len - 4096,
        len - 100,
        len - 1,
    ];
    while places.len() < 16 {
        let at = rng.random_range(after_frames - (after_frames / 50)..len);
        if !in_frame(at) {
            places.push(at);
        }
    }
    for at in places {
        assert!(!in_frame(at));
        invert(&snapshot, at);
        let verified = Run::to_end(snaprestore(["verify", "--json"]).arg(&snapshot))
            .exits(3)
            .json();
        assert_eq!(verified["ok"], false, "{at}");
        let run = Run::to_end(
            snaprestore(["restore", "--json", "--touch", "sequential", "--check"])
                .args([&raw, &snapshot]),
        );
        match run.code {
            // The byte does not affect the restore.
            Some(0) => {}
            // The file is refused, or restored except for the pages that the byte describes; the
            // error names it.
            Some(3) => {
                let said = String::from_utf8_lossy(&run.out) + run.err.as_str();
                assert!(said.contains(snapshot.to_str().unwrap()), "{at}: {run:?}");
            }
            _ => panic!("{at}: {run:?}"),
        }
        if !run.out.is_empty() {
            let report = run.json();
            if report["mismatches"].is_u64() {
                assert_eq!(number(&report, "mismatches"), 0, "{at}: {report}");
            }
        }
        invert(&snapshot, at);
    }
}
