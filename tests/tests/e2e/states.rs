//! Chains of snapshots of memory that really changes: a working guest, of which each state is a
//! child of the one before.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use serde_json::Value;
use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::Restore;
use snaprestore_tests::compare::PAGE;
use snaprestore_tests::program::{done, number};
use snaprestore_tests::real::{can_restore, guest_states};
use snapshot_format::Snapshot;
use snapshot_format::digest::{self, ContentHasher};

/// Pages of a block.
const BLOCK: usize = 512;

/// Returns the content digest of one region of memory at address 0, by its definition.
fn content_digest(memory: &[u8]) -> String {
    let mut hasher = ContentHasher::new();
    for block in memory.chunks(BLOCK * PAGE) {
        let pages: Vec<_> = block.chunks(PAGE).map(digest::page).collect();
        hasher.block(&digest::block(&pages));
    }
    digest::hex(&hasher.finish([(0, 0, (memory.len() / PAGE) as u64)]))
}

/// Pages of a state that differ from the state before, by number.
type Changes = Vec<(usize, Box<[u8]>)>;

/// Reads the data of a sparse file.
fn changes(diff: &Path) -> Changes {
    let file = File::open(diff).unwrap();
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    let mut changes = Changes::new();
    let mut at = 0;
    while let Some((start, end)) = extent(&file, at) {
        file.read_exact_at(&mut bytes[start..end], start as u64)
            .unwrap();
        for page in start / PAGE..end.div_ceil(PAGE) {
            changes.push((page, bytes[page * PAGE..][..PAGE].into()));
        }
        at = end;
    }
    changes
}

/// Returns the first range of data of a file from `at` on.
fn extent(file: &File, at: usize) -> Option<(usize, usize)> {
    use nix::unistd::{Whence, lseek};
    let offset = |at: usize| i64::try_from(at).unwrap();
    let start = lseek(file, offset(at), Whence::SeekData).ok()?;
    let end = lseek(file, start, Whence::SeekHole).unwrap();
    Some((
        usize::try_from(start).unwrap(),
        usize::try_from(end).unwrap(),
    ))
}

/// Memory of each state: the first one whole, then what changed.
struct States {
    first: Vec<u8>,
    changes: Vec<Changes>,
}

impl States {
    fn memory(&self, state: usize) -> Vec<u8> {
        let mut memory = self.first.clone();
        for (page, bytes) in self.changes[..state].iter().flatten() {
            memory[page * PAGE..][..PAGE].copy_from_slice(bytes);
        }
        memory
    }
}

/// Restores a snapshot and compares all its pages, in a random order.
fn restores(snapshot: &Arc<Snapshot>, memory: &[u8], prefetch: &Prefetch, rng: &mut SmallRng) {
    let restored = Restore::new(Arc::clone(snapshot))
        .prefetch(prefetch.clone())
        .start()
        .unwrap();
    let mut pages: Vec<usize> = (0..memory.len() / PAGE).collect();
    pages.shuffle(rng);
    let mut found = [0; PAGE];
    for page in pages {
        let at = page * PAGE;
        restored.read_at(0, at as u64, &mut found).unwrap();
        let name = snapshot.name();
        assert!(
            found == memory[at..at + PAGE],
            "{name}, {prefetch:?}: page {page} is another"
        );
    }
    assert!(restored.failures().is_empty());
}

/// Every state of a guest that works, taken every second, is a child of the state before, made of
/// a diff or of all memory by turns.
#[test]
fn every_state_of_a_working_guest_restores_in_every_mode() {
    let name = "every_state_of_a_working_guest_restores_in_every_mode";
    let (true, Some(files)) = (can_restore(name), guest_states(name)) else {
        return;
    };
    let states = States {
        first: std::fs::read(&files.first).unwrap(),
        changes: files.diffs.iter().map(|diff| changes(diff)).collect(),
    };
    let count = states.changes.len();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |state: usize| folder.path().join(format!("{state}.snap"));
    let raw = folder.path().join("now.raw");
    let now = File::create(&raw).unwrap();
    now.write_all_at(&states.first, 0).unwrap();
    let create = |source: &Path, more: &[&str], to: &Path| -> Value {
        let args = [
            "create".as_ref(),
            source.as_os_str(),
            "-o".as_ref(),
            to.as_os_str(),
        ];
        done(
            args.into_iter()
                .chain(more.iter().map(std::ffi::OsStr::new)),
        )
    };
    let base = create(&files.first, &[], &path(0));
    assert_eq!(base["content_digest"], content_digest(&states.first));

    let mut digests = vec![base["content_digest"].clone()];
    for state in 1..=count {
        let changed = &states.changes[state - 1];
        assert!(changed.len() > 50, "{} pages changed", changed.len());
        for (page, bytes) in changed {
            now.write_all_at(bytes, (page * PAGE) as u64).unwrap();
        }
        let before = path(state - 1);
        let base = ["--base", before.to_str().unwrap()];
        let snapshot = path(state);
        let report = if state % 2 == 1 {
            create(&files.diffs[state - 1], &base, &snapshot)
        } else {
            let all = [&base[..], &["--holes", "zero"]].concat();
            create(&raw, &all, &snapshot)
        };
        assert!(
            number(&report, "stored_pages") <= changed.len() as u64,
            "{report}"
        );
        let digest = content_digest(&states.memory(state));
        assert_eq!(report["content_digest"], digest, "state {state}");
        digests.push(report["content_digest"].clone());
        let flat = folder.path().join("flat");
        // Packing all of the memory of each state would take longer than all else here.
        if state % 5 == 0 {
            let packed = create(&raw, &["--holes", "zero", "--force"], &flat);
            assert_eq!(packed["content_digest"], digest, "state {state}");
            assert!(number(&report, "file_bytes") * 4 < number(&packed, "file_bytes"));
        }
        let args = ["flatten".as_ref(), snapshot.as_os_str(), "--force".as_ref()];
        let flattened = done(args.into_iter().chain(["-o".as_ref(), flat.as_os_str()]));
        assert_eq!(flattened["content_digest"], digest, "state {state}");
        assert_eq!(number(&flattened, "ancestor_pages"), 0, "{flattened}");
        // Computes the digest of the content from every page.
        assert_eq!(done(["verify".as_ref(), flat.as_os_str()])["ok"], true);
    }
    std::fs::remove_file(folder.path().join("flat")).unwrap();
    let last = path(count);
    let verified = done(["verify".as_ref(), last.as_os_str(), "--chain".as_ref()]);
    assert_eq!(verified["ok"], true);
    assert!(verified["chain"].as_array().unwrap().len() > count / 2);

    let mut rng = SmallRng::seed_from_u64(20);
    let mut order: Vec<usize> = (0..=count).collect();
    order.shuffle(&mut rng);
    for state in order {
        let memory = states.memory(state);
        let snapshot = Arc::new(Snapshot::open_path(path(state)).unwrap());
        for prefetch in &[Prefetch::Off, Prefetch::All, Prefetch::WorkingSet] {
            restores(&snapshot, &memory, prefetch, &mut rng);
        }
    }
}
