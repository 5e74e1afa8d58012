//! Restores the memory of microVMs and processes lazily from compressed snapshots: the owner runs
//! at once, and each page is decompressed when it is first touched, or shortly before.
//!
//! ```text
//!    guest.snap ── read ──▶ frame ── check, decode ──▶ pages ── COPY ──▶ owner's memory
//!  (snapshot-format)                                            ▲           │
//!                       ┌───────────────────────────────────────┘           │ touches a
//!                       │                                                   ▼ missing page
//!               ┌───────┴───────┐      fault: address, thread        ┌─────────────┐
//!               │    session    │ ◀───────────────────────────────── │ userfaultfd │
//!               │ fault threads │   discard, unmapping, move         │  (kernel)   │
//!               └───────┬───────┘                                    └─────────────┘
//!                       │ shares
//!       ┌───────────────┴────────────────┐
//!       │ prefetch threads               │
//!       │ decoded frames ([`Shared`])    │
//!       └────────────────────────────────┘
//! ```
//!
//! Every byte is verified before it reaches memory. A page that can't be restored never reads as
//! zeros, and a thread that touches it never waits forever: a failure policy decides whether to
//! poison the page, kill the owner or ask a callback.
//!
//! # Example
//!
//! ```
//! use std::sync::Arc;
//! use snaprestore_engine::Prefetch;
//! use snaprestore_engine::restore::Restore;
//! use snapshot_format::{MemoryStore, RegionSpec, Snapshot, Writer, WriterOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A snapshot of one region with four pages, here in memory instead of a file.
//! let mut writer = Writer::new(Vec::new(), WriterOptions::default())?;
//! writer.begin_region(&RegionSpec::default())?;
//! writer.write_pages(&[7; 4 * 4096])?;
//! let (file, _) = writer.finish()?;
//! let snapshot = Arc::new(Snapshot::open(Arc::new(MemoryStore::new(file)))?);
//!
//! // The memory may be touched as soon as `start` returns.
//! let restored = Restore::new(snapshot)
//!     .prefetch(Prefetch::WorkingSet)
//!     .user_mode_only(true) // Without privileges, serves only faults of user code.
//!     .start()?;
//! let region = &restored.regions()[0];
//! println!("{} bytes at {:p}", region.len(), region.as_ptr());
//!
//! // Reading loads the page, like a touch.
//! let mut byte = [0];
//! restored.read_at(0, 4096, &mut byte)?;
//! assert_eq!(byte, [7]);
//! # Ok(())
//! # }
//! ```
//!
//! # Where to start
//!
//! | to | start with |
//! | --- | --- |
//! | restore into this process | [`restore::Restore`]; `examples/lazy.rs` |
//! | restore a VM in your own VMM | [`restore`], "Under KVM"; `examples/microvm` |
//! | serve a VMM such as Firecracker | [`pager::Pager`] and [`pager::firecracker`] |
//! | supervise a serving process | [`pager::Pager::tables`], [`pager::Vitals`] |
//! | load pages before they are touched | [`Prefetch`] |
//! | record which pages are touched | [`Recording`] |
//! | run many sessions in one process | [`Shared`] |
//! | handle pages that can't be restored | [`restore::FailurePolicy`], [`pager::OnError`] |
//! | measure | [`stats`] |
//!
//! Snapshots are written and opened by `snapshot-format`; memory of your own is described by
//! [`RawRegion`](snaprestore_uffd::memory::RawRegion) of `snaprestore-uffd`, the package with all
//! `unsafe` code.
//!
//! # Features
//!
//! | feature | effect |
//! | --- | --- |
//! | `rust-vmm` | presents the restored regions as `vm-memory` guest memory |
//!
//! `bench-internals` and `fail-points` serve the project's own benchmarks and tests. No feature is
//! on by default.
//!
//! # Kernel and limits
//!
//! | Linux | what it permits |
//! | --- | --- |
//! | 5.7 | restoring; older kernels are refused, and everything below is optional |
//! | 5.11 | [`user_mode_only`](restore::Restore::user_mode_only) without privileges |
//! | 6.1 | [`huge_pages`](restore::Restore::huge_pages) for complete memory |
//! | 6.6 | poisoning of pages that can't be restored |
//!
//! - 64-bit Linux with 4 KiB pages; tested on x86-64. A [`pager`] also serves private memory in
//!   2 MiB pages of hugetlbfs.
//! - Restored memory is private and anonymous. Shared and file-backed memory is refused.
//! - Debuggers (`/proc/PID/mem`, ptrace) get EIO at a missing page instead of waiting.
//! - A `userfaultfd` needs `vm.unprivileged_userfaultfd`, access to `/dev/userfaultfd`, or
//!   `CAP_SYS_PTRACE`, unless faults of user code suffice.

// In tests, the model checker of the session needs `unsafe` to switch stacks.
#![cfg_attr(not(test), forbid(unsafe_code))]

#[doc(hidden)]
pub mod fail_point;
pub mod pager;
pub mod restore;
mod runtime;
mod session;
pub mod stats;

pub use runtime::{Prefetch, RecordError, Recording, SYSTEM_CALLS, Shared};
pub use session::{Failure, FailureKind, RecordingOptions};

/// The example of the project's front page, compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

/// Internals that only the project's own benchmarks measure; not part of the interface.
#[cfg(feature = "bench-internals")]
#[doc(hidden)]
pub mod bench {
    pub use crate::session::PageStates;
}
