//! Restores on the real kernel, each compared with its source.
//!
//! One program with a module per topic, so that the engine is linked once. Tests that must die,
//! take signals, fork or count threads run in a child process ([`common::in_child`]).

#![allow(
    unsafe_code,
    reason = "the owner of restored memory touches it through raw pointers"
)]
#![allow(clippy::print_stdout, reason = "what children report")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "lengths of small test memory on 64-bit machines"
)]

mod callbacks;
mod common;
mod confined;
mod counted;
mod crowd;
mod demand;
mod failures;
mod give_up;
#[cfg(feature = "rust-vmm")]
mod guest_memory;
mod jailed;
mod kernels;
mod layers;
mod lifecycle;
mod many;
mod orders;
mod owner;
mod recorded;
mod soak;
mod throttled;
mod waits;
mod working_sets;
