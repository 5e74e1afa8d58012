//! Statistics that a session keeps of its faults.

use std::sync::Arc;
use std::time::Duration;

use snaprestore_engine::restore::{Restore, Restored};
use snaprestore_engine::stats::Stats;
use snapshot_format::{Reason, Snapshot};

use crate::common::{PAGE, address, index, open, open_hooked, pack, peek, random_bytes, source};

/// Number of stored pages, all different.
const STORED: u64 = 512;
/// Number of pages that repeat the first one; its frame's list can't name them all.
const REPEATED: u64 = 1024;
/// Number of pages that repeat a word.
const FILLS: u64 = 512;
const FRAME: usize = 8;

fn image() -> Vec<u8> {
    let mut bytes = random_bytes(STORED, 3);
    for _ in 0..REPEATED {
        bytes.extend_from_within(..PAGE);
    }
    bytes.resize(bytes.len() + index(FILLS) * PAGE, 0xcc);
    bytes
}

fn start(snapshot: Arc<Snapshot>, fault_threads: usize) -> Restored {
    Restore::new(snapshot)
        .fault_threads(fault_threads)
        .leave_zero_runs(false)
        .start()
        .unwrap()
}

/// Returns the statistics once every fault read is answered: a woken thread runs before its fault
/// is counted.
fn settled(restored: &Restored) -> Stats {
    loop {
        let stats = restored.stats();
        if stats.fault_time.count == stats.faults {
            return stats;
        }
        std::thread::yield_now();
    }
}

#[test]
fn faults_are_counted_by_kind_and_source() {
    let bytes = image();
    let restored = start(open(pack(&bytes, FRAME)), 1);
    let touch = |page: u64| assert!(peek(address(&restored, page)) == source(&bytes, page));
    let begun = settled(&restored);
    assert_eq!((begun.faults, begun.pages), (0, STORED + REPEATED + FILLS));
    assert_eq!(begun.missing, begun.pages);

    // Each page comes with the seven others of its frame.
    for page in (0..STORED).step_by(FRAME) {
        touch(page);
    }
    let stored = settled(&restored);
    assert_eq!(stored.faults, STORED / FRAME as u64);
    assert_eq!(stored.fault_kinds.stored, stored.faults);
    assert_eq!(stored.sources.read.count, stored.faults);
    assert!(stored.fault_time.sum >= stored.fault_time.max);
    assert!(stored.missing <= begun.missing - STORED, "{stored:?}");

    let filled = STORED + REPEATED;
    touch(filled);
    let stats = settled(&restored);
    assert_eq!(stats.fault_kinds.fill, 1);
    assert_eq!(stats.sources.fill.count, 1);
    assert_eq!(stats.sources.none.count, 0);

    let start = std::ptr::with_exposed_provenance_mut(address(&restored, filled));
    // SAFETY: the memory is the test's, which has no reference to it.
    let advised = unsafe { libc::madvise(start, PAGE, libc::MADV_DONTNEED) };
    assert_eq!(advised, 0);
    assert!(
        peek(address(&restored, filled))
            .iter()
            .all(|byte| *byte == 0)
    );
    let stats = settled(&restored);
    assert_eq!(stats.fault_kinds.removed, 1);
    assert_eq!(stats.sources.none.count, 1);

    // The frame is read at most once more, and is then cached for all pages that repeat it.
    for page in STORED..STORED + REPEATED {
        touch(page);
    }
    let stats = settled(&restored);
    assert!(stats.sources.cached.count > 0, "{stats:?}");
    assert!(stats.sources.read.count <= stored.faults + 1, "{stats:?}");
    let kinds = stats.fault_kinds;
    assert_eq!(kinds.stored + kinds.fill + kinds.removed, stats.faults);
    assert_eq!(kinds.present + kinds.poisoned + kinds.outside, 0);
}

/// Two threads want pages of one frame, whose read is slow: one of their faults waits for the
/// other's. The scheduler decides how soon the second one begins, so one frame after another is
/// tried.
#[test]
fn fault_that_waited_is_counted_separately() {
    let bytes = random_bytes(STORED, 4);
    let snapshot = open_hooked(pack(&bytes, FRAME), |_, _, reason| {
        if reason == Reason::Demand {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
    let restored = start(snapshot, 2);
    for first in (0..STORED).step_by(FRAME) {
        std::thread::scope(|scope| {
            for page in [first, first + 7] {
                let address = address(&restored, page);
                let bytes = &bytes;
                scope.spawn(move || assert!(peek(address) == source(bytes, page)));
            }
        });
        let stats = settled(&restored);
        if stats.sources.waited.count > 0 {
            assert!(stats.fault_kinds.stored >= 2, "{stats:?}");
            return;
        }
    }
    panic!("none has waited: {:?}", restored.stats());
}
