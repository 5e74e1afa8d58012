//! The `snaprestore` command as users and scripts see it: exit codes, messages, JSON, files.
#![allow(
    unsafe_code,
    reason = "a process with unusual memory has to map it first"
)]

mod bench;
mod chains;
mod common;
mod concurrent;
mod create;
mod ctl;
mod damage;
mod demo;
mod doctor;
mod elf_core;
mod extract;
mod interrupted;
mod killed;
mod layers;
mod owner;
mod process;
mod process_memory;
mod report;
mod restore;
mod usage;
mod working_sets;
