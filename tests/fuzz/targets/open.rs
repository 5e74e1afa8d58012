//! Opens, looks up, decodes and verifies arbitrary files. Nothing panics or hangs, and a file that
//! the verifier calls good can be read completely.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use snaprestore_fuzz::{Eager, Found, mutate, only_damage, open, watched};
use snapshot_format::{MemoryStore, OpenError, Snapshot, VerifyOptions, verify};
use std::io;
use std::sync::Arc;

/// Blocks whose pages are looked up; the verifier looks at all.
const MAX_BLOCKS: u64 = 16;

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed)
});

fuzz_target!(|bytes: &[u8]| watched(|| check(bytes)));

fn check(bytes: &[u8]) {
    let opened = open(bytes);
    let store = Arc::new(MemoryStore::new(bytes.to_vec()));
    let report = verify(store, VerifyOptions::default().threads(1));
    let snapshot = match opened {
        Ok(snapshot) => snapshot,
        Err(
            OpenError::UnsupportedVersion { .. }
            | OpenError::UnsupportedFeature { .. }
            // A mutation of a layered snapshot: there are no other files.
            | OpenError::AncestorMissing { .. },
        ) => {
            assert!(report.is_err());
            return;
        }
        Err(error) => {
            assert!(error.is_damage(), "{error}");
            assert!(!report.expect("a report").ok());
            return;
        }
    };
    let report = report.expect("a report");
    let lost = pages(&snapshot);
    let whole = sections(&snapshot);
    if report.ok() {
        assert!(!lost, "a page of a good file can't be read");
        assert!(whole, "a section of a good file can't be read");
        assert_eq!(report.pages_checked, snapshot.summary().pages);
    }
}

/// Reads pages. Returns whether one of them should be readable but is not.
fn pages(snapshot: &Snapshot) -> bool {
    let mut eager = Eager::new(snapshot);
    let mut lost = false;
    for page in 0..snapshot.page_slots().min(MAX_BLOCKS * 512) {
        if matches!(eager.page(page), Found::Nothing | Found::Torn(_)) {
            let unavailable = snapshot.look_up(page, snapshot_format::Reason::Demand);
            lost |= !matches!(unavailable, Ok(snapshot_format::Page::Unavailable));
        }
    }
    lost
}

/// Reads everything else. Returns whether all of it is readable.
fn sections(snapshot: &Snapshot) -> bool {
    let mut whole = true;
    let mut note = |result: Result<(), snapshot_format::ReadError>| {
        if let Err(error) = &result {
            only_damage(error);
            whole = false;
        }
    };
    note(snapshot.fill_runs().map(drop));
    note(snapshot.properties().map(drop));
    note(snapshot.dictionaries().map(drop));
    note(snapshot.prepare().map(drop));
    match snapshot.working_sets() {
        Ok(sets) => sets
            .iter()
            .for_each(|set| note(snapshot.working_set(&set.name).map(drop))),
        Err(error) => note(Err(error)),
    }
    match snapshot.attachments() {
        Ok(all) => all
            .iter()
            .for_each(|one| note(snapshot.read_attachment(&one.name, io::sink()).map(drop))),
        Err(error) => note(Err(error)),
    }
    whole
}
