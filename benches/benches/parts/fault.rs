//! One fault from end to end: a touch, the kernel, the engine's thread, a frame, COPY, and the
//! touching thread continues.
#![allow(
    unsafe_code,
    reason = "restored memory is touched through raw pointers"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use snaprestore_engine::restore::Restore;
use snapshot_format::{Dictionary, Snapshot};

use crate::pieces::{frames, memory, snapshot};

/// Measures faults on frames that have not been decoded, one after the other.
pub(crate) fn one_fault(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fault");
    for frame_kib in [4, 16, 64, 128, 256] {
        let snapshot = snapshot(memory(), frame_kib / 4, Dictionary::Off);
        let pages: Vec<u64> = frames(&snapshot)
            .into_iter()
            .map(|(_, page)| page)
            .collect();
        if Restore::new(Arc::clone(&snapshot)).start().is_err() {
            // Not permitted here; `snaprestore doctor` prints what would permit it.
            continue;
        }
        group.bench_function(
            BenchmarkId::from_parameter(format!("{frame_kib} KiB")),
            |bencher| {
                bencher.iter_custom(|count| time(&snapshot, &pages, count));
            },
        );
    }
    group.finish();
}

fn time(snapshot: &Arc<Snapshot>, pages: &[u64], count: u64) -> Duration {
    let mut total = Duration::ZERO;
    let mut left = usize::try_from(count).expect("64 bits");
    while left > 0 {
        let restored = Restore::new(Arc::clone(snapshot))
            .start()
            .expect("cannot start the restore");
        let base = restored.regions()[0].as_ptr();
        let now = left.min(pages.len());
        let began = Instant::now();
        for page in &pages[..now] {
            let offset = usize::try_from(page * 4096).expect("64 bits");
            // SAFETY: the page is in the region, which is mapped as long as `restored` lives.
            let _ = unsafe { base.add(offset).read_volatile() };
        }
        total += began.elapsed();
        left -= now;
    }
    total
}
