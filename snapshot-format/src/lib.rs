//! The snaprestore file format.
#![forbid(unsafe_code)]

pub mod layout;
