//! Restores memory lazily from snaprestore snapshots.

// The model checker of the session, a test, switches stacks.
#![cfg_attr(not(test), forbid(unsafe_code))]

#[doc(hidden)]
pub mod fail_point;
pub mod pager;
pub mod restore;
mod runtime;
mod session;
pub mod stats;

pub use snaprestore_uffd as uffd;

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
