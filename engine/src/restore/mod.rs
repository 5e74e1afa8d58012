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
//! | `snap-ask` | 1 with [`FailurePolicy::Ask`] | calls the callback |
//! | `snap-brake` | 1 while a restore is given up under many discards | slows them down, without the hook |
//!
//! When a [`Restored`] is dropped or was stopped its threads have ended, unless a callback does not
//! return, and those of the pool if no other restore wants something fetched. All block every signal
//! and start no others. They take neither a real-time policy nor fewer cores than the main thread has
//! from the thread that starts them: one that spins for a page under `SCHED_FIFO` on the only core
//! of its handler would wait for ever. After the hook of [`Restore::on_thread_start`] has run they
//! make only the system calls of [`SYSTEM_CALLS`], and those that the snapshot's store, the
//! callbacks and the tracing subscriber make.
//!
//! # Callbacks
//!
//! The observer ([`Restore::on_first_touch`]), the callback of [`FailurePolicy::Ask`], the hook of
//! [`Restore::on_thread_start`], the snapshot's [`Store`](snapshot_format::Store) and the tracing
//! subscriber are called by the engine's threads while somebody waits for a page.
//!
//! A callback that
//!
//! - touches memory that its own session restores: the process is aborted with the reason, as soon
//!   as another thread reads the fault, in [`Restored`]'s drop at the latest;
//! - calls [`Restored::read_at`], or [`Restored::stop`] with [`StopMode::Complete`]: gets the error
//!   `InCallback`;
//! - calls [`Restored::wait_complete`]: comes back at once;
//! - drops the [`Restored`], or gives it up: all is done but waiting for the threads, which end when
//!   the callback has returned;
//! - does not return: its page waits; drop and stop leave its thread behind after two seconds;
//! - panics: the process is aborted with the reason.
//!
//! Touching means system calls on that memory, too. Memory of other sessions may be touched. A
//! thread that was left behind cannot reach the memory any more: it would do so through the
//! userfaultfd, which is closed.
//!
//! Every abort writes one line with the reason to standard error, with or without a subscriber.
//!
//! # Under KVM
//!
//! The regions become memory slots, and a virtual CPU that touches a missing page waits in the kernel
//! until it is there. Choose [`FailurePolicy::Abort`], since a poisoned page can read as zeros where KVM
//! emulates an instruction, don't permit [`Restore::user_mode_only`], and keep the [`Restored`] as
//! long as the VM. `examples/microvm` is a whole launcher.
//!
//! # What memory may do meanwhile
//!
//! The owner may discard (`MADV_DONTNEED`, `MADV_FREE`: zeros from then on), `mprotect`, and, where
//! the memory is its own ([`Restore::region`]), `munmap` and `mremap`. Until the restore is
//! complete the memory is left out of children (`MADV_DONTFORK`): a child could not be served past
//! the parent's end. When the restore is complete, was stopped, or didn't start, children get it
//! again (`MADV_DOFORK`), but for what the owner had left out itself before. A child that drops its
//! copy of the [`Restored`] changes nothing.
//!
//! Memory that was unmapped costs the restore nothing more. What is moved piece by piece is
//! remembered piece by piece, as many as there are.
//!
//! - `/proc/PID/mem` and ptrace don't wait for a page that is missing: debuggers and others who use
//!   them get EIO. [`Restored::read_at`] waits.
//! - Guard pages (`MADV_GUARD_INSTALL`) in memory that is not complete are overwritten when their
//!   page arrives. Install them when the restore is complete.

mod builder;
mod guard;
mod huge;
mod questions;
mod restored;

pub use builder::{Restore, StartError};
pub use restored::{ReadAtError, Restored, RestoredRegion, StopError, StopMode};

pub use crate::runtime::{
    FaultKinds, FaultTimes, PageCounts, Prefetch, SYSTEM_CALLS, Shared, Stats,
};
pub use crate::session::{
    Durations, Failure, FailureDecision, FailureKind, FailurePolicy, Histogram, Percentiles,
};
