//! Memory that the engine fills, in the launcher's own process.

use std::sync::Arc;

use anyhow::Result;
use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{FailurePolicy, Restore, Restored};
use snaprestore_uffd::memory::guest_memory;
use snapshot_format::Snapshot;
use vm_memory::GuestMemoryMmap;

use crate::restore::ArrivingMemory;

/// A running restore, with its memory as `vm-memory` types.
pub(crate) struct InProcess {
    // Fields are dropped in this order: the memory goes before the value that keeps it mapped.
    memory: GuestMemoryMmap,
    restored: Restored,
}

impl InProcess {
    /// Maps and registers memory for the regions of `snapshot`. None of it is read yet.
    pub(crate) fn start(snapshot: Arc<Snapshot>, prefetch: Prefetch) -> Result<Self> {
        let restored = Restore::new(snapshot)
            .prefetch(prefetch)
            // A page that can't be restored aborts this process, while the virtual CPU waits for
            // it. Poison would not be sufficient: where KVM reads memory itself, for instance to
            // emulate an instruction, a guest could read zeros.
            .on_failure(FailurePolicy::Abort)
            .start()?;
        // SAFETY: the memory is used at most as long as this value lives: it is only lent out, and
        // nobody in this program clones it. The restore is not stopped before, and nobody unmaps or
        // moves its memory.
        let memory = unsafe { guest_memory(&restored.guest_regions()) }?;
        Ok(Self { memory, restored })
    }
}

impl ArrivingMemory for InProcess {
    fn guest(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn report(&self) -> String {
        let stats = self.restored.stats();
        let (demand, prefetch) = (stats.demand, stats.prefetch);
        format!(
            "memory     usable {:.1?} after it was asked for\n\
             faults     {}; {:.1?} at p50, {:.1?} p99\n\
             installed  {} pages copied, {} filled, {} zeroed; {} of them by prefetch; {} left to the kernel\n\
             read       {} KiB, decoded to {} KiB",
            stats.mapped,
            stats.faults,
            stats.fault_time.p50,
            stats.fault_time.p99,
            demand.copied + prefetch.copied,
            demand.filled + prefetch.filled,
            demand.zeroed + prefetch.zeroed,
            prefetch.copied + prefetch.filled + prefetch.zeroed,
            stats.left_to_kernel,
            stats.bytes_read >> 10,
            stats.bytes_decoded >> 10,
        )
    }
}
