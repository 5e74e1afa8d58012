//! snaprestore: the library's restore into this process.
#![allow(
    unsafe_code,
    reason = "memory for several regions is given to the library"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use snaprestore_engine::restore::{self, FailurePolicy, Restore};
use snaprestore_uffd::memory::RawRegion;

use super::region::Region;
use crate::BenchError;
use crate::contender::{Ours, Prefetch, Restored};
use crate::touch::Memory;
use crate::trial::open_snapshot;

pub(crate) struct Lazily {
    // Dropped, and thereby stopped, before the memory is unmapped.
    restored: restore::Restored,
    prefetch: Prefetch,
    open: Duration,
    start: Duration,
    memory: Memory,
    _given: Option<Region>,
}

/// Opens the snapshot and starts its restore, `bytes` of memory in all.
pub(crate) fn start(file: &Path, bytes: u64, options: &Ours) -> Result<Lazily, BenchError> {
    let failed = || format!("{}: restoring", file.display());
    let began = Instant::now();
    let snapshot = open_snapshot(file).map_err(BenchError::trial(failed()))?;
    let open = began.elapsed();
    let snapshot = Arc::new(snapshot);
    let lens: Vec<u64> = snapshot
        .regions()
        .iter()
        .map(snapshot_format::Region::bytes)
        .collect();
    if lens.iter().sum::<u64>() != bytes {
        let found = lens.iter().sum::<u64>();
        return Err(BenchError::Invalid(format!(
            "{}: {found} bytes, not {bytes}",
            failed()
        )));
    }
    // Only the touching loop, in user mode, reads the memory during the restore.
    let mut restore = Restore::new(snapshot)
        .on_failure(FailurePolicy::Abort)
        .user_mode_only(true);
    restore = restore.prefetch(match options.prefetch {
        Prefetch::Off => snaprestore_engine::Prefetch::Off,
        Prefetch::WorkingSet => snaprestore_engine::Prefetch::WorkingSet,
        Prefetch::All => snaprestore_engine::Prefetch::All,
    });
    if let Some(name) = &options.working_set {
        restore = restore.working_set(name);
    }
    if let Some(threads) = options.fault_threads {
        restore = restore.fault_threads(threads);
    }
    if let Some(threads) = options.prefetch_threads {
        restore = restore.prefetch_threads(threads);
    }
    restore = restore.huge_pages(options.huge_pages);
    // The library places a single region; several are given memory in which they are contiguous, as
    // in the raw file.
    let given = if lens.len() == 1 {
        None
    } else {
        let region = Region::anonymous(bytes)?;
        let mut offset = 0;
        for (index, len) in lens.iter().enumerate().filter(|(_, len)| **len > 0) {
            // SAFETY: the mapping is fresh, used only by the touching loop, and outlives the
            // restore: `Lazily` drops the restore first.
            let memory = unsafe { RawRegion::new(region.at(offset), *len) };
            restore = restore.region(index, memory.map_err(BenchError::trial(failed()))?);
            offset += len;
        }
        Some(region)
    };
    let began = Instant::now();
    let restored = restore.start();
    let start = began.elapsed();
    let restored = restored.map_err(|error| match error {
        restore::StartError::Userfaultfd(error) => {
            BenchError::Unavailable(crate::with_causes(&error))
        }
        error => BenchError::trial(failed())(error),
    })?;
    let memory = match (&given, restored.regions().first()) {
        (Some(region), _) => region.memory(),
        // SAFETY: the region is mapped, and may be read and written, as long as `restored` lives.
        (None, Some(region)) => unsafe { Memory::new(region.as_ptr(), region.len()) },
        (None, None) => return Err(BenchError::Invalid(format!("{}: no memory", failed()))),
    };
    Ok(Lazily {
        restored,
        prefetch: options.prefetch,
        open,
        start,
        memory,
        _given: given,
    })
}

impl Restored for Lazily {
    fn memory(&self) -> Memory {
        self.memory
    }

    fn complete(&mut self) -> Result<(), BenchError> {
        // With a working set, the restore ends when that is there.
        if self.restored.wait_complete() || self.prefetch == Prefetch::WorkingSet {
            return Ok(());
        }
        Err(BenchError::Trial {
            what: "waiting for the restore to complete".into(),
            why: "prefetch ended before".into(),
        })
    }

    fn facts(&self) -> serde_json::Value {
        let stats = self.restored.stats();
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        json!({
            "open_us": micros(self.open),
            "start_us": micros(self.start),
            "mapped_us": micros(stats.mapped),
            "complete_ms": stats.complete.map(|time| time.as_secs_f64() * 1e3),
            "faults": stats.faults,
            "fault_us": { "p50": micros(stats.fault_time.p50), "p99": micros(stats.fault_time.p99) },
            "demand_pages": stats.demand.total(),
            "prefetch_pages": stats.prefetch.total(),
            "bytes_read": stats.bytes_read,
            "bytes_decoded": stats.bytes_decoded,
            "retries": stats.retries,
        })
    }
}
