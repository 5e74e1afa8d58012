//! Code shared by the end-to-end tests of `snaprestore`: the program, real memory, comparisons.
#![allow(
    clippy::missing_panics_doc,
    reason = "what fails here fails a test, and that is done by a panic"
)]

pub mod compare;
pub mod program;
pub mod real;
