//! Where content comes from: the open snapshot, frames that were decoded before, and what repeats
//! them.

pub(crate) mod duplicates;
pub(crate) mod frame_cache;
pub(crate) mod snapshot;
