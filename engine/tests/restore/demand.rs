//! Priority of demand over prefetch, shown by blocked reads rather than by clocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{Restore, Restored};
use snaprestore_fixtures::host::told;
use snapshot_format::{Reason, Snapshot};

use crate::common::{
    Gate, Opener, address, frame_of, open, open_hooked, pack, peek, random_bytes, source,
    wait_until, within,
};

const PAGES: u64 = 2048;
const FRAME: usize = 8;

/// Starts a restore with one fault thread that prefetches everything. The reads of its snapshot
/// wait at the gate as set up in `snapshot`. Returns when all prefetch threads wait.
fn start_held(snapshot: Arc<Snapshot>, gate: &Gate, prefetch_threads: usize) -> (Restored, Opener) {
    let restored = Restore::new(snapshot)
        .fault_threads(1)
        .prefetch(Prefetch::All)
        .prefetch_threads(prefetch_threads)
        .start()
        .unwrap();
    let opener = gate.opener();
    wait_until("every prefetch thread waits in a read", || {
        gate.waiting() == prefetch_threads
    });
    (restored, opener)
}

/// Asserts that demand for `pages` is served, with the right content.
fn is_served(restored: &Restored, bytes: &[u8], pages: &[u64]) {
    let addresses: Vec<_> = pages.iter().map(|page| address(restored, *page)).collect();
    let seen = within("demand is served", move || {
        addresses.into_iter().map(peek).collect::<Vec<_>>()
    });
    for (seen, page) in seen.iter().zip(pages) {
        assert!(seen == source(bytes, *page), "page {page}");
    }
}

/// Every prefetch read of a frame waits, and those of index blocks pass: demand for every page is
/// served meanwhile. The frames that are being prefetched are read once more, for demand.
#[test]
fn demand_is_served_while_every_prefetch_read_waits() {
    let bytes = random_bytes(PAGES, 1);
    let file = pack(&bytes, FRAME);
    let good = open(file.clone());
    let mut frames: Vec<u64> = (0..PAGES)
        .map(|page| frame_of(&good, page).offset())
        .collect();
    frames.sort_unstable();
    frames.dedup();
    let reads = |_: &u64| [AtomicU64::new(0), AtomicU64::new(0)];
    let reads = Arc::new(frames.iter().map(reads).collect::<Vec<_>>());
    let gate = Gate::default();
    let (held, counted, known) = (gate.clone(), Arc::clone(&reads), frames.clone());
    let snapshot = open_hooked(file, move |_, offset, reason| {
        if let Ok(frame) = known.binary_search(&offset) {
            counted[frame][usize::from(reason == Reason::Demand)].fetch_add(1, SeqCst);
            if reason == Reason::Prefetch {
                held.pass();
            }
        }
        Ok(())
    });
    let (restored, _opener) = start_held(snapshot, &gate, 2);
    let reads_of = |page: u64| {
        let frame = frames.binary_search(&frame_of(&good, page).offset());
        [0, 1].map(|reason| reads[frame.unwrap()][reason].load(SeqCst))
    };
    let (being_read, others): (Vec<u64>, Vec<u64>) =
        (0..PAGES).partition(|page| reads_of(*page) != [0, 0]);
    assert_eq!(being_read.len(), 2 * FRAME);
    is_served(&restored, &bytes, &being_read);
    assert_eq!(gate.waiting(), 2, "prefetch still waits");
    assert!(being_read.iter().all(|page| reads_of(*page) == [1, 1]));
    is_served(&restored, &bytes, &others);
    assert_eq!(gate.waiting(), 2, "prefetch still waits");
    gate.open();
    assert!(restored.wait_complete());
    assert!(being_read.iter().all(|page| reads_of(*page) == [1, 1]));
    assert!(others.iter().all(|page| reads_of(*page) == [0, 1]));
}

/// Demand is also served while prefetch waits for index blocks.
#[test]
fn demand_is_served_while_prefetch_waits_for_an_index_block() {
    let bytes = random_bytes(PAGES, 2);
    let gate = Gate::default();
    let held = gate.clone();
    let snapshot = open_hooked(pack(&bytes, FRAME), move |_, _, reason| {
        if reason == Reason::Prefetch {
            held.pass();
        }
        Ok(())
    });
    let (restored, _opener) = start_held(snapshot, &gate, 1);
    // The first block is the one that is being prefetched.
    is_served(&restored, &bytes, &(0..PAGES).collect::<Vec<_>>());
    assert_eq!(gate.waiting(), 1);
}

/// For information: how long demand waits with a store that takes 10 ms per read.
#[test]
fn fault_times_with_a_slow_store() {
    let bytes = random_bytes(PAGES, 3);
    let file = pack(&bytes, FRAME);
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let snapshot = open_hooked(file.clone(), |_, _, reason| {
            if reason != Reason::Open {
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        });
        let restored = Restore::new(snapshot)
            .prefetch(prefetch.clone())
            .start()
            .unwrap();
        for i in 0..100 {
            let page = (i * 769) % PAGES;
            assert!(peek(address(&restored, page)) == source(&bytes, page));
        }
        let time = restored.stats().fault_time;
        told(&format_args!(
            "demand, 10 ms a read, prefetch {prefetch:?}: p50 {:?}, p99 {:?}, longest {:?} of {} faults",
            time.p50, time.p99, time.max, time.count
        ));
        assert!(time.count > 0);
    }
}
