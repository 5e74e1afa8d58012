//! Opens, looks up, decodes and verifies arbitrary files. Nothing panics or hangs, and a file that
//! the verifier calls good can be read completely.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use snaprestore_fuzz::reading::read_and_verify;
use snaprestore_fuzz::{mutate, watched};

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed)
});

// Of a mutation of a layered snapshot there are no other files.
fuzz_target!(|bytes: &[u8]| watched(|| read_and_verify(bytes, &Arc::default())));
