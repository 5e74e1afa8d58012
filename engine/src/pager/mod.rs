//! Serves the memory of another process: a VMM that hands its userfaultfd over.
//!
//! ```text
//!   VMM                                      this process
//!   mmap, userfaultfd, REGISTER
//!   its regions and the descriptor  ──────▶  Pager::attach ──▶ Paged
//!   touches a missing page          ──────▶  fault thread: read, check, decode, COPY
//!   exits                           ──────▶  pidfd: the session ends
//! ```
//!
//! It runs the same session as [`restore`](crate::restore), with the same faults, events and
//! prefetch. Two things differ: the memory belongs to another process, and that process is killed
//! if a page can't be restored (or the page is poisoned, with [`OnError::Poison`]).
//!
//! # The serving process may die
//!
//! The indispensable state of a session is in its [tables](Pager::tables), a memfd. Messages are
//! read into this memfd, too: a read permits the owner's discard to proceed, and the kernel
//! finishes it even if the process is killed meanwhile, so the message must not be lost. A
//! supervisor holds the userfaultfd, the pidfd, the tables and the snapshot's open files. After the
//! process is gone, another one [continues](Pager::resume) with them. [`Vitals`] tells the
//! supervisor whether the process is stuck, and on which frames it died.
//!
//! # The owner is never left with wrong memory
//!
//! When the last descriptor of a userfaultfd closes, missing pages become zeros. If the owner has
//! kept a descriptor, it waits forever instead. Therefore a session ends in one of three ways:
//! everything is installed and unregistered ([`Paged::complete`]); the owner has exited by itself;
//! or the owner is killed through its pidfd, and the descriptor is closed after it is gone.
//! Dropping a [`Paged`] that has not ended does the last.

pub mod firecracker;
mod handover;
mod owner;
mod paged;

pub use handover::{Handover, HandoverError, OwnerRegion};
pub use owner::OnError;
pub use paged::{AttachError, Paged, Pager, SessionEnd};

pub use crate::session::{FrameId, Pulse, Vitals};
