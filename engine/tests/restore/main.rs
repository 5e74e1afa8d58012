//! Restores on the real kernel, each against its source.
//!
//! One program with a module for what is shown, so that the engine is linked once. What must die, take signals, fork or
//! count threads runs in a child process ([`common::in_child`]).

#![allow(
    unsafe_code,
    reason = "the owner of restored memory touches it through raw pointers"
)]

mod common;
mod demand;
mod failures;
mod orders;
mod owner;
