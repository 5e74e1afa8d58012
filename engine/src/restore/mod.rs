//! Restoring into one's own process.
//!
//! ```no_run
//! use std::sync::Arc;
//! use snaprestore_engine::restore::{OnFailure, Prefetch, Restore};
//! use snapshot_format::Snapshot;
//!
//! let snapshot = Arc::new(Snapshot::open_path("guest.snap")?);
//! let restored = Restore::new(snapshot)
//!     .prefetch(Prefetch::All)
//!     .on_failure(OnFailure::Abort)
//!     .start()?;
//! for region in restored.regions() {
//!     println!("{:#x}: {} bytes at {:p}", region.start, region.len(), region.as_ptr());
//! }
//! restored.wait_complete();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Restore::start`] maps memory (or takes the caller's), registers it with a userfaultfd and
//! returns at once. From then on the memory may be touched by any thread and by virtual CPUs: what
//! is missing arrives while the toucher waits. When everything has arrived, the memory is
//! unregistered and the engine's threads end.
//!
//! # Threads
//!
//! | name | how many | what |
//! | --- | --- | --- |
//! | `snap-fault-N` | [`Restore::fault_threads`] | read faults and events, serve faults |
//! | `snap-fetch-N` | a pool for all restores that share it ([`Shared`]) | read, decode and install ahead of faults |
//! | `snap-ask` | 1 with [`OnFailure::Ask`] | calls the callback |
//!
//! When a [`Restored`] is dropped or was stopped its threads have ended, and those of the pool if no
//! other restore wants something fetched. All block every signal and start no others. After the hook of [`Restore::on_thread_start`] has run they make only the system
//! calls of [`SYSTEM_CALLS`], and those that the snapshot's store, the callbacks and the tracing
//! subscriber make.
//!
//! # Under KVM
//!
//! The regions become memory slots, and a virtual CPU that touches a missing page waits in the kernel
//! until it is there. Choose [`OnFailure::Abort`], since a poisoned page can read as zeros where KVM
//! emulates an instruction, don't permit [`Restore::user_mode_only`], and keep the [`Restored`] as
//! long as the VM. `examples/microvm` is a whole launcher.
//!
//! # What memory may do meanwhile
//!
//! The owner may discard (`MADV_DONTNEED`, `MADV_FREE`: zeros from then on), `mprotect`, and, where
//! the memory is its own ([`Restore::region`]), `munmap` and `mremap`. Until the restore is
//! complete the memory is left out of children (`MADV_DONTFORK`): a child could not be served past
//! the parent's end. When the restore is complete, was stopped, or didn't start, children get it
//! again (`MADV_DOFORK`), but for what the owner had left out itself before.
//!
//! Memory that was unmapped costs the restore nothing more. What is moved piece by piece is
//! remembered piece by piece, as many as there are.

mod builder;
mod guard;
mod huge;
mod questions;
mod restored;

pub use builder::{Restore, StartError};
pub use restored::{ReadAtError, Restored, RestoredRegion, Stop, StopError};

pub use crate::running::{
    FaultKinds, FaultTimes, PageCounts, Prefetch, SYSTEM_CALLS, Shared, Stats,
};
pub use crate::session::{
    Durations, Failure, FailureKind, Histogram, OnFailure, Percentiles, Verdict,
};
