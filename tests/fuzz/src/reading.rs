//! Opening, looking up, decoding and verifying a file, of which nothing may panic.

use std::io;
use std::sync::Arc;

use snaprestore_fixtures::chain::InMemory;
use snapshot_format::{
    MemoryStore, OpenError, Page, ReadError, Reason, Snapshot, SnapshotOptions, VerifyOptions,
    verify,
};

use crate::{Eager, Found, only_damage};

/// Blocks whose pages are looked up; the verifier looks at all.
const MAX_BLOCKS: u64 = 16;

/// Opens and verifies the file in `bytes`, reads all of it, and asserts that the three agree.
pub fn read_and_verify(bytes: &[u8], ancestors: &Arc<InMemory>) {
    let store = || Arc::new(MemoryStore::new(bytes.to_vec()));
    let options = SnapshotOptions::default().ancestors(Arc::clone(ancestors) as _);
    let opened = Snapshot::open_with(store(), &options);
    let options = VerifyOptions::default().threads(1);
    let report = verify(store(), options.ancestors(Arc::clone(ancestors) as _));
    let snapshot = match opened {
        Ok(snapshot) => snapshot,
        Err(error) if error.is_damage() => {
            assert!(!report.expect("a report").ok());
            return;
        }
        Err(error) => {
            assert!(has_no_verdict(&error), "{error}");
            assert!(report.is_err());
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

/// Returns whether this is not a defect of the file: it is of a later version, or needs files that
/// are not there.
fn has_no_verdict(error: &OpenError) -> bool {
    match error {
        OpenError::UnsupportedVersion { .. }
        | OpenError::UnsupportedFeature { .. }
        | OpenError::AncestorMissing { .. }
        | OpenError::AncestorReplaced { .. }
        | OpenError::AncestorPageSize { .. } => true,
        OpenError::AncestorUnusable { source, .. } => has_no_verdict(source),
        _ => false,
    }
}

/// Reads pages. Returns whether one of them should be readable but is not.
fn pages(snapshot: &Snapshot) -> bool {
    let mut eager = Eager::new(snapshot);
    let mut lost = false;
    for page in 0..snapshot.page_slots().min(MAX_BLOCKS * 512) {
        if matches!(eager.page(page), Found::Nothing | Found::Torn(_)) {
            let unavailable = snapshot.look_up(page, Reason::Demand);
            lost |= !matches!(unavailable, Ok(Page::Unavailable));
        }
    }
    lost
}

/// Reads everything else. Returns whether all of it is readable.
fn sections(snapshot: &Snapshot) -> bool {
    let mut whole = true;
    let mut note = |result: Result<(), ReadError>| {
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
