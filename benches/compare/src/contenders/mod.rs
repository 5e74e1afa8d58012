//! The implementations, one file each.

pub(crate) mod eager;
pub(crate) mod handler;
pub(crate) mod mapped;
pub(crate) mod ours;
pub(crate) mod outside;
mod region;
pub(crate) mod vmm;

pub(crate) use region::Region;
