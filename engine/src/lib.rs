//! Restores memory lazily from snaprestore snapshots.

pub mod mem;
pub mod restore;
mod session;
pub mod sys;

/// What only the project's own benches measure; no part of the interface.
#[cfg(feature = "bench-internals")]
#[doc(hidden)]
pub mod bench {
    pub use crate::session::PageStates;
}
