//! Opens, looks up, decodes, verifies and restores arbitrary chains of files. An input is the files
//! of a chain behind each other, ancestors first. Nothing panics or hangs, a chain that the
//! verifier calls good can be read completely, and restored bytes are correct, or there are none.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use snaprestore_fuzz::chain::{ancestors, mutate, open, split};
use snaprestore_fuzz::reading::read_and_verify;
use snaprestore_fuzz::restoring::restore_and_compare;
use snaprestore_fuzz::watched;

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed)
});

fuzz_target!(|bytes: &[u8]| watched(|| {
    let files = split(bytes);
    let Some((own, others)) = files.split_last() else {
        return;
    };
    let ancestors = ancestors(others);
    read_and_verify(own, &ancestors);
    if let Ok(snapshot) = open(own, &ancestors) {
        restore_and_compare(snapshot, bytes);
    }
}));
