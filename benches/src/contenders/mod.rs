//! The implementations, one file each.

pub(crate) mod eager;
pub(crate) mod handler;
pub(crate) mod mapped;
pub(crate) mod ours;
mod region;

pub(crate) use region::Region;
