//! Restores arbitrary files lazily and compares every touched page with the naive reader's result:
//! the bytes are correct, or there are none. Nothing hangs.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use snaprestore_fuzz::restoring::restore_and_compare;
use snaprestore_fuzz::{mutate, open, watched};

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed)
});

fuzz_target!(|bytes: &[u8]| watched(|| {
    if let Ok(snapshot) = open(bytes) {
        restore_and_compare(snapshot, bytes);
    }
}));
