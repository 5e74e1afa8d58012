//! Working sets that a restore prefetches.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{Restore, StartError};
use snaprestore_fixtures::host::skipped;
use snaprestore_uffd::memory::Pagemap;
use snapshot_format::{
    OptimizeOptions, ReadError, Reason, RegionSpec, Snapshot, WorkingSetRun, Writer, WriterOptions,
    optimize,
};

use crate::common::{
    Gate, PAGE, address, compare, frame_of, open, open_hooked, pages_of_frame, peek, random_bytes,
    wait_until, within,
};

const PAGES: u64 = 4096;

/// Writes a snapshot with these working sets, each a list of first pages and numbers of pages.
fn file_with_sets(bytes: &[u8], sets: &[(&str, &[(u64, u64)])]) -> Vec<u8> {
    let options = WriterOptions {
        frame_pages: 8,
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_pages(bytes).unwrap();
    for (name, runs) in sets {
        let runs = runs.iter();
        let runs = runs.map(|&(first_page, pages)| WorkingSetRun { first_page, pages });
        writer.add_working_set(name, runs).unwrap();
    }
    writer.finish().unwrap().0
}

fn with_sets(bytes: &[u8], sets: &[(&str, &[(u64, u64)])]) -> Arc<Snapshot> {
    open(file_with_sets(bytes, sets))
}

/// Returns all pages of the frames that hold these runs.
fn frames_of(snapshot: &Snapshot, runs: &[(u64, u64)]) -> BTreeSet<u64> {
    let pages = runs.iter().flat_map(|(first, pages)| *first..first + pages);
    let frames: BTreeSet<_> = pages
        .map(|page| frame_of(snapshot, page).offset())
        .collect();
    let frames = frames.into_iter();
    frames
        .flat_map(|frame| pages_of_frame(snapshot, frame))
        .collect()
}

#[test]
fn selected_working_set_is_prefetched_alone() {
    let bytes = random_bytes(PAGES, 41);
    let (boot, idle): (&[_], &[_]) = (&[(1700, 9), (3, 1)], &[(3000, 2)]);
    let snapshot = with_sets(&bytes, &[("boot", boot), ("idle", idle)]);
    let both = [boot, idle].concat();
    for (selected, runs) in [
        (Some("boot"), boot),
        (Some("idle"), idle),
        (None, &both[..]),
    ] {
        let mut restore = Restore::new(Arc::clone(&snapshot)).prefetch(Prefetch::WorkingSet);
        if let Some(name) = selected {
            restore = restore.working_set(name);
        }
        let restored = restore.start().unwrap();
        assert!(!restored.wait_complete());
        let expected = frames_of(&snapshot, runs);
        assert_eq!(
            restored.stats().prefetch.total(),
            expected.len() as u64,
            "{selected:?}"
        );
        compare(&restored, &bytes, expected);
        assert_eq!(restored.stats().faults, 0, "{selected:?}");
        compare(&restored, &bytes, 0..PAGES);
    }
}

/// Two working sets in file order, as that of an optimized file: their frames are read together, in
/// few reads. Demand is served while such a read blocks, inside and outside of it.
#[test]
fn replay_reads_many_frames_at_once_and_demand_does_not_wait() {
    const SET: (u64, u64) = (512, 2048);
    let bytes = random_bytes(PAGES, 43);
    let gate = Gate::default();
    let reads = Arc::new(Mutex::new(Vec::new()));
    let (held, noted) = (gate.clone(), Arc::clone(&reads));
    let is_frame = |len: usize| len > 4 * PAGE;
    let file = file_with_sets(&bytes, &[("boot", &[SET])]);
    let snapshot = open_hooked(file, move |buffer, offset, reason| {
        if reason == Reason::Prefetch && is_frame(buffer.len()) {
            noted.lock().unwrap().push((offset, buffer.len() as u64));
            held.pass();
        }
        Ok(())
    });
    let restored = Restore::new(Arc::clone(&snapshot))
        .fault_threads(1)
        .prefetch(Prefetch::WorkingSet)
        .prefetch_threads(1)
        .start()
        .unwrap();
    let opener = gate.opener();
    wait_until("a large read blocks", || gate.waiting() == 1);
    let (start, len) = reads.lock().unwrap()[0];
    assert!(len > 500_000, "{len}");
    let is_inside = |page: u64| (start..start + len).contains(&frame_of(&snapshot, page).offset());
    let inside = [SET.0 + 1, SET.0 + 100];
    let outside = [0, SET.0 + SET.1 - 1, PAGES - 1];
    assert!(inside.iter().all(|page| is_inside(*page)));
    assert!(!outside.iter().any(|page| is_inside(*page)));
    let addresses = inside.iter().chain(&outside);
    let addresses: Vec<_> = addresses.map(|page| address(&restored, *page)).collect();
    within("demand is served", move || {
        for address in addresses {
            peek(address);
        }
    });
    assert_eq!(gate.waiting(), 1, "the read still blocks");
    drop(opener);
    assert!(!restored.wait_complete());
    let faults = restored.stats().faults;
    compare(&restored, &bytes, SET.0..SET.0 + SET.1);
    assert_eq!(restored.stats().faults, faults);
    let reads = reads.lock().unwrap();
    // The set takes 8 MiB, and noise does not compress.
    assert!(reads.len() <= 20, "{reads:?}");
    let total: u64 = reads.iter().map(|(_, len)| len).sum();
    assert!(total <= (SET.1 + 64) * 4096 * 105 / 100, "{total}");
}

/// Frames that lie apart are read one by one, in order of the set, each under a claim. Demand for
/// such a frame is served nevertheless, and the replay then leaves its pages as they are.
#[test]
fn demand_for_a_frame_that_replay_loads_does_not_wait() {
    const SET: [(u64, u64); 3] = [(2403, 1), (803, 1), (831, 1)];
    let bytes = random_bytes(PAGES, 46);
    let gate = Gate::default();
    let reads = Arc::new(Mutex::new(Vec::new()));
    let (held, noted) = (gate.clone(), Arc::clone(&reads));
    let file = file_with_sets(&bytes, &[("boot", &SET)]);
    let good = open(file.clone());
    let frames = SET.map(|(page, _)| frame_of(&good, page));
    let snapshot = open_hooked(file, move |buffer, offset, reason| {
        if reason == Reason::Prefetch && frames.iter().any(|frame| frame.offset() == offset) {
            noted.lock().unwrap().push((offset, buffer.len()));
            held.pass();
        }
        Ok(())
    });
    let restored = Restore::new(snapshot)
        .fault_threads(1)
        .prefetch(Prefetch::WorkingSet)
        .prefetch_threads(1)
        .start()
        .unwrap();
    let opener = gate.opener();
    wait_until("the read of a frame blocks", || gate.waiting() == 1);
    let records = frames.map(|frame| (frame.offset(), frame.stored_len() as usize));
    assert_eq!(*reads.lock().unwrap(), records[..1]);
    let pages = pages_of_frame(&good, records[0].0);
    let addresses: Vec<_> = pages.iter().map(|page| address(&restored, *page)).collect();
    within("demand is served", move || {
        for address in addresses {
            peek(address);
        }
    });
    assert_eq!(gate.waiting(), 1, "the read still blocks");
    drop(opener);
    assert!(!restored.wait_complete());
    assert_eq!(*reads.lock().unwrap(), records);
    let loaded = records[1..].iter();
    let loaded: Vec<u64> = loaded
        .flat_map(|(frame, _)| pages_of_frame(&good, *frame))
        .collect();
    assert_eq!(restored.stats().prefetch.total(), loaded.len() as u64);
    compare(&restored, &bytes, pages.into_iter().chain(loaded));
}

/// Prefetch that stops in the middle of a task continues with the rest of it.
#[test]
fn paused_replay_continues_with_every_page_of_the_set() {
    let bytes = random_bytes(PAGES, 48);
    let runs: Vec<(u64, u64)> = (0..64).map(|n| (n * 64 + 3, 1)).collect();
    let gate = Gate::default();
    let held = gate.clone();
    let snapshot = open_hooked(
        file_with_sets(&bytes, &[("boot", &runs[..])]),
        move |buffer, _, reason| {
            if reason == Reason::Prefetch && buffer.len() > 4 * PAGE {
                held.pass();
            }
            Ok(())
        },
    );
    let restored = Restore::new(Arc::clone(&snapshot))
        .prefetch(Prefetch::WorkingSet)
        .prefetch_threads(1)
        .start()
        .unwrap();
    let opener = gate.opener();
    wait_until("the read of a frame blocks", || gate.waiting() == 1);
    restored.pause_prefetch();
    drop(opener);
    wait_until("its pages are installed", || {
        restored.stats().prefetch.total() == 8
    });
    restored.resume_prefetch();
    assert!(!restored.wait_complete());
    let expected = frames_of(&snapshot, &runs);
    assert_eq!(restored.stats().prefetch.total(), expected.len() as u64);
    compare(&restored, &bytes, expected);
}

/// The index blocks of an optimized file are read before its frames, and together.
#[test]
fn demand_does_not_wait_for_index_blocks_that_replay_reads() {
    let bytes = random_bytes(PAGES, 47);
    let plain = with_sets(&bytes, &[]);
    let set: Vec<u64> = (0..PAGES).step_by(8).collect();
    let options = OptimizeOptions::default();
    let (file, _) = optimize(Vec::new(), &plain, &set, options).unwrap();
    let gate = Gate::default();
    let reads = Arc::new(AtomicU64::new(0));
    let (held, counted) = (gate.clone(), Arc::clone(&reads));
    let snapshot = open_hooked(file, move |_, _, reason| {
        if reason == Reason::Prefetch {
            counted.fetch_add(1, SeqCst);
            held.pass();
        }
        Ok(())
    });
    let restored = Restore::new(Arc::clone(&snapshot))
        .fault_threads(1)
        .prefetch(Prefetch::WorkingSet)
        .prefetch_threads(2)
        .start()
        .unwrap();
    let opener = gate.opener();
    wait_until("a read of the replay blocks", || gate.waiting() > 0);
    let addresses: Vec<_> = set.iter().map(|page| address(&restored, *page)).collect();
    within("demand is served", move || {
        for address in addresses {
            peek(address);
        }
    });
    // No frame is wanted before the index blocks are there.
    assert_eq!(gate.waiting(), 1);
    assert_eq!(restored.stats().prefetch.total(), 0);
    drop(opener);
    assert!(!restored.wait_complete());
    compare(&restored, &bytes, set.iter().copied());
    drop(restored);

    // 2 MiB of hot frames are read in a few pieces, although each page is a run of its own.
    reads.store(0, SeqCst);
    let restored = Restore::new(snapshot)
        .prefetch(Prefetch::WorkingSet)
        .prefetch_threads(1)
        .start()
        .unwrap();
    assert!(!restored.wait_complete());
    compare(&restored, &bytes, set);
    assert_eq!(restored.stats().faults, 0);
    let reads = reads.load(SeqCst);
    assert!(reads <= 8, "{reads} reads");
}

/// Long zero runs are left to the kernel. A prefetch of everything maps them in the end, so that
/// touching them costs no fault; another prefetch does not.
#[test]
fn prefetch_of_everything_maps_long_zero_runs() {
    let zeros: usize = 16 << 20;
    let mut bytes = random_bytes(512, 44);
    bytes.resize(bytes.len() + zeros, 0);
    bytes.extend(random_bytes(512, 45));
    let snapshot = with_sets(&bytes, &[]);
    let pagemap = match Pagemap::open() {
        Ok(pagemap) => pagemap,
        Err(why) => return skipped("prefetch_of_everything_maps_long_zero_runs", &why),
    };
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let restored = Restore::new(Arc::clone(&snapshot))
            .prefetch(prefetch.clone())
            .start()
            .unwrap();
        let run = address(&restored, 512) as u64;
        let is_mapped = |address: u64| {
            let populated = pagemap.first_populated(address, 4096).unwrap();
            populated.is_some()
        };
        if prefetch == Prefetch::All {
            assert!(restored.wait_complete());
            wait_until("the last zero is mapped", || {
                is_mapped(run + zeros as u64 - 4096)
            });
            assert!((0..zeros as u64 / 4096).all(|page| is_mapped(run + page * 4096)));
            assert_eq!(restored.stats().left_to_kernel, zeros as u64 / 4096);
        } else {
            // Touches complete the restore as well.
            compare(&restored, &bytes, (0..512).chain(4608..5120));
            assert!(restored.wait_complete());
            let populated = pagemap.first_populated(run, zeros as u64).unwrap();
            assert_eq!(populated, None);
        }
        compare(&restored, &bytes, 0..5120);
    }
}

#[test]
fn missing_working_set_is_an_error_that_lists_names() {
    let bytes = random_bytes(8, 42);
    let snapshot = with_sets(&bytes, &[("boot", &[]), ("idle", &[])]);
    let restore = Restore::new(snapshot)
        .prefetch(Prefetch::WorkingSet)
        .working_set("none");
    let Err(StartError::Snapshot(error @ ReadError::NoSuchName { .. })) = restore.start() else {
        panic!("started");
    };
    let text = error.to_string();
    for name in ["\"none\"", "\"boot\"", "\"idle\""] {
        assert!(text.contains(name), "{text}");
    }
}
