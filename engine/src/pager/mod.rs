//! Serving the memory of another process: a VMM that hands its userfaultfd over.
//!
//! ```text
//!   VMM                                      this process
//!   mmap, userfaultfd, REGISTER
//!   its regions and the descriptor  ──────▶  Pager::attach ──▶ Paged
//!   touches a missing page          ──────▶  fault thread: read, check, decode, COPY
//!   ends                            ──────▶  pidfd: the session ends
//! ```
//!
//! It is the session of [`restore`](crate::restore), with another owner: the same faults, events and
//! prefetch. What differs is who has the memory, and what happens when it can't be restored.
//!
//! # The process that serves may die
//!
//! What a session can't do without lies in its [tables](Pager::tables), a memfd into which messages are
//! read as well: a read is what lets the owner's discard go on, and a process that is killed during it
//! still finishes it. Somebody else, a keeper, holds the userfaultfd, the pidfd, the tables and the
//! snapshot's open file; after the process is gone another [goes on](Pager::resume) with them.
//! [`Vitals`] tells the keeper whether it is stuck, and on which frames it died.
//!
//! # The owner is never left with wrong memory
//!
//! When the last descriptor of a userfaultfd closes, what is missing becomes zeros, unless the owner
//! has kept a descriptor: then it waits for ever. So a session ends in one of three ways: everything
//! is installed and unregistered ([`Paged::complete`]); the owner has ended by itself; or it is killed,
//! by its pidfd, and the descriptor closed after it is gone. That is what dropping a [`Paged`]
//! does.

pub mod firecracker;
mod handover;
mod owner;
mod paged;

pub use handover::{Handover, HandoverError, OwnerRegion};
pub use owner::OnError;
pub use paged::{AttachError, Ending, Paged, Pager};

pub use crate::runtime::{
    FaultKinds, FaultTimes, PageCounts, Prefetch, SYSTEM_CALLS, Shared, Stats,
};
pub use crate::session::{
    Durations, Failure, FailureKind, FrameCacheStats, Histogram, Percentiles, Pulse, Vitals,
};
