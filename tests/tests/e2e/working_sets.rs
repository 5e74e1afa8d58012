//! The whole loop on real memory: the first touches are recorded, the snapshot is optimized, and
//! restored again.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use snaprestore_tests::program::{done, number};
use snaprestore_tests::real::{can_restore, guest, live};
use snapshot_format::trace::{Trace, TraceEnd};
use snapshot_format::{Page, Reason, Snapshot};

use crate::guest;

/// Number of pages that the owner touches, in runs.
const TOUCHES: usize = 3000;
const RUN: u64 = 3;

fn text(path: &Path) -> &str {
    path.to_str().expect("the path is not UTF-8")
}

fn content(snapshot: &Snapshot, page: u64) -> Page {
    snapshot.look_up(page, Reason::Verify).unwrap()
}

/// Chooses runs of pages all over the memory, in a random order.
fn touches(snapshot: &Snapshot) -> Vec<u64> {
    let mut firsts: Vec<u64> = Vec::new();
    for region in snapshot.regions() {
        let pages = region.page_numbers();
        firsts.extend((pages.start..pages.end.saturating_sub(RUN)).step_by(8));
    }
    firsts.shuffle(&mut SmallRng::seed_from_u64(5));
    let runs = firsts.into_iter().flat_map(|first| first..first + RUN);
    let available = runs.filter(|page| content(snapshot, *page) != Page::Unavailable);
    let mut pages: Vec<u64> = available.take(TOUCHES).collect();
    pages.shuffle(&mut SmallRng::seed_from_u64(6));
    pages
}

/// Records touches of a snapshot, optimizes it, and restores the result in every mode. `raw` is its
/// memory.
fn record_optimize_restore(snapshot: &Path, raw: &Path, folder: &Path) {
    let (pages, trace, optimized) = (
        folder.join("pages"),
        folder.join("start.trace"),
        folder.join("optimized.snap"),
    );
    let plain = Snapshot::open_path(snapshot).unwrap();
    let wanted = touches(&plain);
    let mut list = String::new();
    for page in &wanted {
        writeln!(list, "{page}").unwrap();
    }
    std::fs::write(&pages, list).unwrap();
    let touch = format!("file:{}", text(&pages));
    let restore = |snapshot: &Path, touch: &str, more: &[&str]| {
        let args = ["restore", text(snapshot), "--check", text(raw), "--touch"];
        let report = done(args.iter().chain(&[touch]).chain(more));
        assert_eq!(number(&report, "mismatches"), 0, "{more:?}: {report}");
        let failures = report["failures"].as_array().unwrap();
        assert!(failures.is_empty(), "{more:?}: {report}");
        report
    };

    // Prefetch waits until the recording has ended.
    restore(snapshot, &touch, &["--record", text(&trace)]);
    let recorded = Trace::read_path(&trace).unwrap();
    recorded.check_matches(&plain).unwrap();
    assert_eq!(recorded.present_at_start, 0);
    // Long runs of zeros are left to the kernel, and their touches are not seen.
    let is_stored = |page: &u64| matches!(content(&plain, *page), Page::Stored { .. });
    let stored = |pages: &[u64]| -> Vec<u64> { pages.iter().copied().filter(is_stored).collect() };
    let (found, wanted) = (stored(&recorded.pages()), stored(&wanted));
    if matches!(recorded.end, TraceEnd::Stopped | TraceEnd::Completed) {
        assert_eq!(found, wanted);
    } else {
        // On a slow machine the recording may end before the last touch.
        assert!(found.len() > TOUCHES / 100, "{} touches", found.len());
        assert_eq!(found, wanted[..found.len()], "{}", recorded.end);
    }

    let args = ["optimize", text(snapshot), "--output", text(&optimized)];
    done(args.iter().chain(&["--trace", text(&trace)]));
    let packed = Snapshot::open_path(&optimized).unwrap();
    let digest = |snapshot: &Snapshot| snapshot.summary().content_digest;
    assert_eq!(digest(&packed), digest(&plain));
    let verified = done(["verify", text(&optimized)]);
    assert_eq!(verified["ok"], true, "{verified}");
    for prefetch in ["off", "working-set", "all"] {
        for order in ["random", &touch] {
            restore(&optimized, order, &["--prefetch", prefetch]);
        }
    }
    // The working set alone is loaded before anything is touched.
    let args = ["restore", text(&optimized), "--touch", "none"];
    let report = done(args.iter().chain(&["--prefetch", "working-set"]));
    let stored = found.len() as u64;
    let copied = number(&report, "pages_copied");
    assert!(copied >= stored, "{copied} of {stored} pages");
    // Pages elsewhere with the same content come along. The plain file would bring ten neighbours
    // for each page.
    assert!(copied < stored * 4, "{copied} pages for {stored}");
}

#[test]
fn recorded_touches_of_a_guest_come_first_and_nothing_changes() {
    let name = "recorded_touches_of_a_guest_come_first_and_nothing_changes";
    let (true, Some(image)) = (can_restore(name), guest(name)) else {
        return;
    };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    record_optimize_restore(guest::snapshot(&image), &image.raw, folder.path());
}

#[test]
fn recorded_touches_of_a_live_process_come_first_and_nothing_changes() {
    let name = "recorded_touches_of_a_live_process_come_first_and_nothing_changes";
    let (true, Some(live)) = (can_restore(name), live(name, 48)) else {
        return;
    };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let (snapshot, raw) = (path("process.snap"), path("process.raw"));
    let pid = live.pid().to_string();
    done(["create", "--pid", &pid, "--output", text(&snapshot)]);
    done(["extract", text(&snapshot), "--output", text(&raw)]);
    record_optimize_restore(&snapshot, &raw, folder.path());
}
