//! Restores memory lazily from snaprestore snapshots.

pub mod mem;
pub mod restore;
mod session;
pub mod sys;
