//! How to configure, query and control a daemon.

pub mod config;
pub mod control;
pub mod summary;
pub mod types;
