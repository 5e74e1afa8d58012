//! Content sources: the open snapshot, frames that were decoded earlier, and their duplicates.

pub(crate) mod duplicates;
pub(crate) mod frame_cache;
pub(crate) mod snapshot;
