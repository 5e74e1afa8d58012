//! Restores memory lazily from snaprestore snapshots.

pub mod mem;
pub mod sys;
