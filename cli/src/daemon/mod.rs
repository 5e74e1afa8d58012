//! What `snaprestore serve` is made of, and what its operators talk to.

// Not all of it is called yet.
#![allow(dead_code, reason = "the daemon takes these up one after another")]

pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod desk;
