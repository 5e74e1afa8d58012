//! Recordings of first touches.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

use snaprestore_engine::restore::{Restore, Restored, StopMode};
use snaprestore_engine::{Prefetch, RecordError, RecordingOptions};
use snaprestore_fixtures::images::Mix;
use snapshot_format::Reason;
use snapshot_format::trace::{TouchReason, Trace, TraceEnd};

use crate::common::{
    Gate, HANG_TIMEOUT, PAGE, address, compare, damaged, frame_of, open, open_hooked, pack, peek,
    random_bytes, wait_until, within,
};
use crate::waits::sleeps;

const PAGES: u64 = 1024;
const FRAME: usize = 16;

/// Ends by no limit.
const UNLIMITED: RecordingOptions = RecordingOptions {
    max_time: Duration::MAX,
    max_pages: Some(u64::MAX),
    settled_after: None,
};

/// Returns every `1 / step` of the pages, in an order in which neighbours are far apart.
fn scattered(step: u64) -> Vec<u64> {
    (0..PAGES)
        .map(|at| at * 389 % PAGES)
        .filter(|page| page % step == 1)
        .collect()
}

fn stop(restored: &Restored) -> Trace {
    restored.recording().expect("it was recorded").stop()
}

/// Prefetch waits, and no neighbour is installed: every touch is seen, by any number of threads
/// that serve faults.
#[test]
fn recording_has_touched_pages_in_order_without_neighbours() {
    let bytes = random_bytes(PAGES, 41);
    for threads in [1, 3] {
        let snapshot = open(pack(&bytes, FRAME));
        let restored = Restore::new(snapshot.clone())
            .fault_threads(threads)
            .prefetch(Prefetch::All)
            .record(UNLIMITED)
            .start()
            .unwrap();
        let touched = scattered(3);
        compare(&restored, &bytes, touched.iter().copied());
        // A second touch is not recorded.
        compare(&restored, &bytes, touched.iter().copied());
        let recording = restored.recording().unwrap();
        assert!(recording.is_running());
        assert_eq!(restored.stats().prefetch.total(), 0);
        // A page is counted after its waiter was woken.
        wait_until("all pages are counted", || {
            restored.stats().demand.total() >= touched.len() as u64
        });
        assert_eq!(restored.stats().demand.total(), touched.len() as u64);
        let trace = recording.stop();
        assert_eq!(trace.pages(), touched);
        assert_eq!((trace.end, trace.present_at_start), (TraceEnd::Stopped, 0));
        assert!(trace.touches.is_sorted_by_key(|touch| touch.at));
        trace.check_matches(&snapshot).unwrap();
        // Prefetch continues.
        let restored = within("prefetch ends", move || {
            assert!(restored.wait_complete());
            restored
        });
        compare(&restored, &bytes, 0..PAGES);
        assert_eq!(recording.stop(), trace);
    }
}

#[test]
fn neighbour_of_recorded_page_is_decoded_once() {
    let bytes = random_bytes(PAGES, 42);
    let restored = Restore::new(open(pack(&bytes, FRAME)))
        .fault_threads(2)
        .record(UNLIMITED)
        .start()
        .unwrap();
    let frame = FRAME as u64;
    // Each frame is wanted again after all others.
    for round in 0..frame {
        compare(
            &restored,
            &bytes,
            (0..PAGES).filter(|page| page % frame == round),
        );
        assert_eq!(restored.stats().bytes_decoded, PAGES * PAGE as u64);
    }
    wait_until("it is complete", || restored.is_complete());
    let trace = stop(&restored);
    assert_eq!(trace.end, TraceEnd::Completed);
    assert_eq!(trace.touches.len() as u64, PAGES);
    assert!(
        restored
            .record(UNLIMITED)
            .is_err_and(|error| error == RecordError::Over)
    );
}

#[test]
fn concurrent_touches_record_each_page_once() {
    let bytes = random_bytes(PAGES, 43);
    let restored = Restore::new(open(pack(&bytes, FRAME)))
        .fault_threads(4)
        .record(UNLIMITED)
        .start()
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| compare(&restored, &bytes, scattered(2)));
        }
    });
    let pages = stop(&restored).pages();
    let distinct: BTreeSet<u64> = pages.iter().copied().collect();
    assert_eq!(distinct.len(), pages.len());
    assert_eq!(distinct, scattered(2).into_iter().collect());
}

/// The session then works as without a recording: the page that follows comes with its frame.
#[test]
fn recording_ends_at_its_limit_of_pages() {
    let bytes = random_bytes(PAGES, 44);
    let options = RecordingOptions {
        max_pages: Some(5),
        ..UNLIMITED
    };
    let restored = Restore::new(open(pack(&bytes, FRAME)))
        .record(options)
        .start()
        .unwrap();
    let touched: Vec<u64> = (0..40).map(|at| at * 16).collect();
    compare(&restored, &bytes, touched.iter().copied());
    let recording = restored.recording().unwrap();
    assert!(!recording.is_running() && recording.wait(Duration::ZERO));
    wait_until("whole frames are installed", || {
        restored.stats().demand.total() >= 30 * FRAME as u64
    });
    let trace = recording.stop();
    assert_eq!(trace.end, TraceEnd::PageLimit);
    assert_eq!(trace.pages(), touched[..5]);
}

#[test]
fn recording_ends_by_itself_and_prefetch_continues() {
    for (settled_after, end) in [
        (Some(Duration::ZERO), TraceEnd::Settled),
        (None, TraceEnd::TimeLimit),
    ] {
        let bytes = random_bytes(PAGES, 45);
        let options = RecordingOptions {
            max_time: match settled_after {
                Some(_) => HANG_TIMEOUT,
                None => Duration::from_millis(50),
            },
            settled_after,
            ..UNLIMITED
        };
        let restored = Restore::new(open(pack(&bytes, FRAME)))
            .prefetch(Prefetch::All)
            .record(options)
            .start()
            .unwrap();
        compare(&restored, &bytes, [7]);
        let recording = restored.recording().unwrap();
        let restored = within("prefetch ends", move || {
            // Nobody asks whether the recording is due, except prefetch.
            assert!(restored.wait_complete());
            restored
        });
        assert!(recording.wait(HANG_TIMEOUT));
        let trace = recording.stop();
        assert_eq!(trace.end, end);
        // A slow machine may take longer than the limit of time before the touch.
        assert!(
            end == TraceEnd::TimeLimit || trace.pages() == [7],
            "{trace:?}"
        );
        compare(&restored, &bytes, 0..PAGES);
    }
}

#[test]
fn recording_in_mid_life_counts_present_pages() {
    let bytes = random_bytes(PAGES, 46);
    let restored = Restore::new(open(pack(&bytes, FRAME))).start().unwrap();
    assert!(restored.recording().is_none());
    compare(&restored, &bytes, [3]);
    let frame = FRAME as u64;
    wait_until("the frame is there", || {
        restored.stats().demand.total() == frame
    });
    let recording = restored.record(UNLIMITED).unwrap();
    assert!(
        restored
            .record(UNLIMITED)
            .is_err_and(|error| error == RecordError::Running)
    );
    compare(&restored, &bytes, [4, 900, 5, 40]);
    let trace = recording.stop();
    assert_eq!(
        (trace.pages(), trace.present_at_start),
        (vec![900, 40], frame)
    );
    // The next one is a recording of its own.
    wait_until("all pages are counted", || {
        restored.stats().demand.total() == frame + 2
    });
    let recording = restored.record(UNLIMITED).unwrap();
    compare(&restored, &bytes, [900, 41]);
    let trace = recording.stop();
    assert_eq!(
        (trace.pages(), trace.present_at_start),
        (vec![41], frame + 2)
    );
}

/// Fills are touched one by one. Discarded pages are no longer pages of the snapshot.
#[test]
fn fills_are_recorded_and_discarded_pages_are_not() {
    let bytes = Mix::new(PAGES, 47).bytes();
    let restored = Restore::new(open(pack(&bytes, FRAME)))
        .leave_zero_runs(false)
        .record(UNLIMITED)
        .start()
        .unwrap();
    for page in [10, 300] {
        let start = std::ptr::with_exposed_provenance_mut(address(&restored, page));
        // SAFETY: the page belongs to the restore, and nobody reads it meanwhile.
        let advised = unsafe { libc::madvise(start, PAGE, libc::MADV_DONTNEED) };
        assert_eq!(advised, 0);
        assert_eq!(peek(address(&restored, page)), [0; PAGE]);
    }
    let rest: Vec<u64> = (0..PAGES)
        .filter(|page| ![10, 300].contains(page))
        .collect();
    compare(&restored, &bytes, rest.iter().copied());
    wait_until("it is complete", || restored.is_complete());
    let trace = stop(&restored);
    assert_eq!(trace.pages(), rest);
    assert!(
        trace
            .touches
            .iter()
            .all(|touch| touch.reason == TouchReason::Demand)
    );
}

#[test]
fn page_that_cannot_be_restored_is_not_in_the_trace() {
    let bytes = random_bytes(PAGES, 48);
    let file = pack(&bytes, FRAME);
    let frame = frame_of(&open(file.clone()), 100);
    let restored = Restore::new(open(damaged(file, &frame)))
        .record(UNLIMITED)
        .start()
        .unwrap();
    let at = address(&restored, 100) as u64;
    let loads = snaprestore_uffd::memory::Loads::in_this_thread().unwrap();
    assert!(loads.byte(at).is_err());
    compare(&restored, &bytes, [700]);
    assert_eq!(stop(&restored).pages(), [700]);
}

#[test]
fn completing_a_restore_ends_its_recording() {
    let bytes = random_bytes(PAGES, 49);
    let mut restored = Restore::new(open(pack(&bytes, FRAME)))
        .record(UNLIMITED)
        .start()
        .unwrap();
    compare(&restored, &bytes, [9, 2]);
    restored.stop(StopMode::Complete).unwrap();
    let recording = restored.recording().unwrap();
    drop(restored);
    let trace = recording.stop();
    assert_eq!((trace.end, trace.pages()), (TraceEnd::Stopped, vec![9, 2]));
}

#[test]
fn dropping_a_restore_ends_its_recording() {
    let bytes = random_bytes(PAGES, 50);
    let restored = Restore::new(open(pack(&bytes, FRAME)))
        .record(UNLIMITED)
        .start()
        .unwrap();
    compare(&restored, &bytes, [9, 2]);
    let recording = restored.recording().unwrap();
    assert!(!recording.wait(Duration::ZERO));
    drop(restored);
    assert!(!recording.is_running() && recording.wait(Duration::ZERO));
    let trace = recording.stop();
    assert_eq!((trace.end, trace.pages()), (TraceEnd::Stopped, vec![9, 2]));
}

/// A thread always keeps its last few frames. So the test wants each of many frames again only
/// after all the others.
#[test]
fn frames_are_not_kept_after_the_recording() {
    let bytes = random_bytes(PAGES, 51);
    let restored = Restore::new(open(pack(&bytes, FRAME)))
        .fault_threads(1)
        .record(UNLIMITED)
        .start()
        .unwrap();
    let firsts = (0..PAGES).step_by(FRAME);
    compare(&restored, &bytes, firsts.clone());
    let decoded = PAGES * PAGE as u64;
    assert_eq!(restored.stats().bytes_decoded, decoded);
    stop(&restored);
    compare(&restored, &bytes, firsts.map(|page| page + 1));
    wait_until("it is complete", || restored.is_complete());
    assert_eq!(restored.stats().bytes_decoded, 2 * decoded);
}

/// A prefetch that had begun before the recording installs a page while its fault waits to be
/// served.
#[test]
fn touch_of_page_that_prefetch_installs_meanwhile_is_recorded() {
    const FIRST: u64 = 900;
    const DEMANDED: u64 = 500;
    const PREFETCHED: u64 = 100;
    let bytes = random_bytes(PAGES, 52);
    let file = pack(&bytes, FRAME);
    let good = open(file.clone());
    let frames = [FIRST, DEMANDED, PREFETCHED].map(|page| frame_of(&good, page).offset());
    let gates: [Gate; 3] = Default::default();
    let held = gates.clone();
    let snapshot = open_hooked(file, move |_, offset, reason| {
        let gate = frames.iter().position(|frame| *frame == offset);
        if let Some(gate) = gate.filter(|_| reason != Reason::Open) {
            held[gate].pass();
        }
        Ok(())
    });
    let restored = Restore::new(snapshot)
        .fault_threads(1)
        .prefetch(Prefetch::Pages(
            [PREFETCHED].map(|page| page..page + 1).into(),
        ))
        .prefetch_threads(1)
        .start()
        .unwrap();
    let _openers = gates.each_ref().map(Gate::opener);
    wait_until("prefetch reads", || gates[2].waiting() == 1);
    let recording = restored.record(UNLIMITED).unwrap();
    std::thread::scope(|scope| {
        // The faults come in this order. The thread that serves them reads the last two together.
        for (page, gate) in [(FIRST, Some(0)), (DEMANDED, None), (PREFETCHED, None)] {
            let (say, said) = mpsc::channel();
            let (restored, bytes) = (&restored, &bytes);
            scope.spawn(move || {
                // SAFETY: the call has no arguments.
                say.send(unsafe { libc::gettid() }).unwrap();
                compare(restored, bytes, [page]);
            });
            let thread = said.recv().unwrap();
            match gate {
                Some(gate) => wait_until("its frame is read", || gates[gate].waiting() == 1),
                None => wait_until("it waits for its page", || sleeps(thread)),
            }
        }
        gates[0].open();
        wait_until("the second frame is read", || gates[1].waiting() == 1);
        gates[2].open();
        wait_until("prefetch installs its frame", || {
            restored.stats().prefetch.total() == FRAME as u64
        });
        gates[1].open();
    });
    // The last fault is counted after its touch was recorded.
    wait_until("all faults are served", || {
        let stats = restored.stats();
        (stats.fault_time.count, stats.demand.total()) == (3, 2)
    });
    let trace = recording.stop();
    let seen = trace.touches.iter().map(|touch| (touch.page, touch.reason));
    assert_eq!(
        seen.collect::<Vec<_>>(),
        [
            (FIRST, TouchReason::Demand),
            (DEMANDED, TouchReason::Demand),
            (PREFETCHED, TouchReason::Present)
        ]
    );
    // Its neighbours were installed unseen.
    assert_eq!(trace.present_at_start, FRAME as u64);
}
