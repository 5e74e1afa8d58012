//! The `snaprestore` program and the engine on real memory, end to end.
#![allow(
    unsafe_code,
    reason = "restored memory is touched and discarded through raw pointers"
)]

mod confined;
mod damage;
mod fd_store;
mod filesystems;
mod flips;
mod footprint;
mod guest;
mod hung;
mod killed;
mod layers;
mod lazily;
mod lies;
mod live;
mod manager;
mod memory;
mod operators;
mod outcomes;
mod recordings;
mod scene;
mod serve;
mod states;
mod supervisors;
mod thousand;
mod workers;
mod working_sets;
