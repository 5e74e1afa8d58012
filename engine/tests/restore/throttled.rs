//! Prefetch that is paused, resumed, and limited while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{Restore, StopMode};
use snapshot_format::Reason;

use crate::common::{Gate, compare, open, open_hooked, pack, random_bytes, wait_until, within};

const PAGES: u64 = 2048;
const FRAME: usize = 8;

#[test]
fn paused_prefetch_reads_nothing_until_resumed() {
    let bytes = random_bytes(PAGES, 31);
    let gate = Gate::default();
    let reads = Arc::new(AtomicU64::new(0));
    let (held, counted) = (gate.clone(), Arc::clone(&reads));
    let snapshot = open_hooked(pack(&bytes, FRAME), move |_, _, reason| {
        if reason == Reason::Prefetch {
            counted.fetch_add(1, SeqCst);
            held.pass();
        }
        Ok(())
    });
    let restored = Restore::new(snapshot)
        .prefetch(Prefetch::All)
        .prefetch_threads(1)
        .start()
        .unwrap();
    let opener = gate.opener();
    wait_until("prefetch waits in a read", || gate.waiting() == 1);
    restored.pause_prefetch();
    restored.pause_prefetch();
    drop(opener);
    wait_until("the read returns", || gate.waiting() == 0);
    // The first read was that of an index block, or of the frame that follows it. At most that
    // frame is still read. More reads would come soon.
    std::thread::sleep(Duration::from_millis(50));
    assert!(reads.load(SeqCst) <= 2, "{reads:?}");
    let demand = [5, 700, PAGES - 1];
    compare(&restored, &bytes, demand);
    assert!(reads.load(SeqCst) <= 2, "{reads:?}");
    assert!(!restored.is_complete());
    restored.resume_prefetch();
    let restored = within("prefetch ends", move || {
        assert!(restored.wait_complete());
        restored
    });
    compare(&restored, &bytes, 0..PAGES);
}

/// At one byte per second, the limit at the start, the first frame would be followed by the second
/// after hours.
#[test]
fn changed_bandwidth_applies_at_once() {
    let bytes = random_bytes(PAGES, 32);
    let restored = Restore::new(open(pack(&bytes, FRAME)))
        .prefetch(Prefetch::All)
        .prefetch_bandwidth(1)
        .start()
        .unwrap();
    wait_until("something is prefetched", || {
        restored.stats().prefetch.total() > 0
    });
    assert!(!restored.is_complete());
    restored.set_prefetch_bandwidth(Some(1 << 40));
    let restored = within("prefetch ends", move || {
        assert!(restored.wait_complete());
        restored
    });
    compare(&restored, &bytes, 0..PAGES);
}

/// A paused or slow prefetch neither delays a restore that is being completed, nor one that is
/// dropped.
#[test]
fn paused_prefetch_delays_no_end() {
    let bytes = random_bytes(PAGES, 33);
    for complete in [true, false] {
        let mut restored = Restore::new(open(pack(&bytes, FRAME)))
            .prefetch(Prefetch::All)
            .prefetch_bandwidth(1)
            .start()
            .unwrap();
        restored.pause_prefetch();
        let expected = bytes.clone();
        within("the restore ends", move || {
            if complete {
                restored.stop(StopMode::Complete).unwrap();
                compare(&restored, &expected, 0..PAGES);
            }
            drop(restored);
        });
    }
}
