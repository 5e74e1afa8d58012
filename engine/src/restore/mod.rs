//! Restores a snapshot into the calling process.
//!
//! ```no_run
//! use std::sync::Arc;
//! use snaprestore_engine::Prefetch;
//! use snaprestore_engine::restore::{FailurePolicy, Restore};
//! use snapshot_format::Snapshot;
//!
//! let snapshot = Arc::new(Snapshot::open_path("guest.snap")?);
//! let restored = Restore::new(snapshot)
//!     .prefetch(Prefetch::All)
//!     .on_failure(FailurePolicy::Abort)
//!     .start()?;
//! for region in restored.regions() {
//!     println!("{:#x}: {} bytes at {:p}", region.start, region.len(), region.as_ptr());
//! }
//! restored.wait_complete();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Restore::start`] maps memory (or takes the caller's), registers it with a userfaultfd and
//! returns at once. From then on any thread and any virtual CPU may touch the memory: a thread that
//! touches a missing page waits until the page arrives. When all pages have arrived, the memory is
//! unregistered and the engine's threads exit.
//!
//! # Threads
//!
//! | name | number | task |
//! | --- | --- | --- |
//! | `snap-fault-N` | [`Restore::fault_threads`] | read faults and events, serve faults |
//! | `snap-fetch-N` | a pool for all restores that share it ([`Shared`]) | prefetch |
//! | `snap-ask` | 1 with [`FailurePolicy::Ask`] | calls the callback |
//! | `snap-brake` | 1 while a restore is given up under many discards | slows them down (no hook) |
//!
//! When a [`Restored`] was dropped or stopped, its threads have exited, unless a callback does not
//! return. The threads of the pool have exited, too, if no other restore has a prefetch. All
//! threads block every signal and start no others. They inherit neither a real-time policy nor an
//! affinity smaller than the main thread's from the thread that starts them: a thread that spins
//! for a page under `SCHED_FIFO` on the only core of its handler would wait forever. After the hook
//! of [`Restore::on_thread_start`] has run, they make only the system calls of [`SYSTEM_CALLS`],
//! and those that the snapshot's store, the callbacks and the tracing subscriber make.
//!
//! # Callbacks
//!
//! The engine's threads call the observer ([`Restore::on_first_touch`]), the callback of
//! [`FailurePolicy::Ask`], the hook of [`Restore::on_thread_start`], the snapshot's
//! [`Store`](snapshot_format::Store) and the tracing subscriber while other threads may wait for a
//! page.
//!
//! What happens if a callback
//!
//! - touches memory that its own session restores: the process is aborted with the reason, as soon
//!   as another thread reads the fault, at the latest when the [`Restored`] is dropped;
//! - calls [`Restored::read_at`], or [`Restored::stop`] with [`StopMode::Complete`]: the call
//!   returns the error `InCallback`;
//! - calls [`Restored::wait_complete`]: the call returns at once;
//! - drops the [`Restored`], or gives it up: everything is done except waiting for the threads,
//!   which exit when the callback has returned;
//! - does not return: its page waits; drop and stop leave its thread behind after two seconds;
//! - panics: the process is aborted with the reason.
//!
//! System calls on that memory count as touching it, too. Memory of other sessions may be touched.
//! A thread that was left behind can't reach the memory any more: it could do so only through the
//! userfaultfd, which is closed.
//!
//! Every abort writes one line with the reason to standard error, with or without a subscriber.
//!
//! # Under KVM
//!
//! The regions become memory slots, and a virtual CPU that touches a missing page waits in the
//! kernel until the page is present. Choose [`FailurePolicy::Abort`], because a poisoned page can
//! read as zeros where KVM emulates an instruction. Don't permit [`Restore::user_mode_only`], and
//! keep the [`Restored`] as long as the VM. `examples/microvm` is a complete launcher.
//!
//! # Permitted operations on the memory
//!
//! The owner may discard memory (`MADV_DONTNEED`, `MADV_FREE`: zeros from then on) and `mprotect`
//! it. If the memory is its own ([`Restore::region`]), it may also `munmap` and `mremap` it. Until
//! the restore is complete, the memory is left out of forked children (`MADV_DONTFORK`), because a
//! child could not be served after the parent's exit. When the restore is complete, was stopped, or
//! failed to start, children get the memory again (`MADV_DOFORK`), except for parts that the owner
//! itself had left out before. A child that drops its copy of the [`Restored`] changes nothing.
//!
//! Unmapped memory costs the restore nothing more. Memory that is moved in pieces is tracked piece
//! by piece, without a limit on their number.
//!
//! - `/proc/PID/mem` and ptrace don't wait for a missing page: debuggers and other users of them
//!   get EIO. [`Restored::read_at`] waits.
//! - Guard pages (`MADV_GUARD_INSTALL`) in incomplete memory are overwritten when their page
//!   arrives. Install them when the restore is complete.
//!
//! [`Shared`]: crate::Shared
//! [`SYSTEM_CALLS`]: crate::SYSTEM_CALLS

mod builder;
mod guard;
mod huge;
mod questions;
mod restored;

pub use builder::{Restore, StartError};
pub use restored::{ReadAtError, Restored, RestoredRegion, StopError, StopMode};

pub use crate::session::{FailureDecision, FailurePolicy};
