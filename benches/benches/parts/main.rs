//! The parts of a restore, one by one.
//!
//! ```sh
//! cargo bench -p snaprestore-benches --bench parts -- decode
//! ```
//! The pages are those of a real guest if its memory is available, and synthetic ones otherwise.

mod fault;
mod format;
mod install;
mod pieces;
mod states;

use criterion::{criterion_group, criterion_main};

criterion_group!(
    parts,
    format::open,
    format::look_up,
    format::fills,
    format::decode,
    install::install,
    fault::one_fault,
    states::page_states
);
criterion_main!(parts);
