//! Giving a restore up: missing pages become unreadable, present pages stay, and nothing else is
//! touched.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use snaprestore_engine::restore::{FailurePolicy, Restore, StopError, StopMode};
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::SplitMix;
use snaprestore_uffd::uffd::{Features, Mask};
use snapshot_format::{RegionSpec, Snapshot, Writer, WriterOptions};

use crate::common::{
    PAGE, address, compare, in_child, open, pack, peek, poke, random_bytes, wait_until,
};
use crate::owner::{madvise, map_at, munmap, own};

/// Returns a snapshot of `pages` pages that repeat one word each, so that its file is small.
fn filled(pages: u64) -> Arc<Snapshot> {
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_fill(pages, u64::MAX).unwrap();
    open(writer.finish().unwrap().0)
}

/// Returns the first byte of a page as the kernel reads it, or `None` if the kernel can't.
fn read(address: usize) -> Option<u8> {
    let mut byte = 0_u8;
    let from = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(address),
        iov_len: 1,
    };
    let to = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: the kernel reads one byte of this process, or returns an error, and writes it to a
    // live byte.
    let read =
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const from, 1, 0) };
    (read == 1).then_some(byte)
}

/// Regression test: a thread unmaps memory of its own, and maps something else at the same place,
/// while the restore is given up. The new mapping became inaccessible, because the missing pages
/// were protected by their addresses.
#[test]
fn giving_up_leaves_new_mappings_alone() {
    const PAGES: usize = 1024;
    const PIECE: usize = 16;
    let bytes = random_bytes(PAGES as u64, 1);
    let snapshot = open(pack(&bytes, 8));
    for round in 0..60 {
        let memory = own(PAGES);
        let base = memory.as_ptr().expose_provenance();
        let mut restored = Restore::new(Arc::clone(&snapshot))
            .region(0, memory)
            .start()
            .unwrap();
        // A present page in each piece, so that the missing pages are in many pieces.
        for page in (0..PAGES).step_by(PIECE) {
            peek(base + page * PAGE);
        }
        let (begun, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let maps = scope.spawn(|| {
                let mut mapped = Vec::new();
                for piece in (0..PAGES).step_by(PIECE).skip(1) {
                    let place = base + piece * PAGE;
                    munmap(place, PIECE);
                    map_at(place, PIECE);
                    poke(place, 7);
                    mapped.push(place);
                    begun.store(true, SeqCst);
                    if ended.load(SeqCst) {
                        break;
                    }
                }
                mapped
            });
            while !begun.load(SeqCst) {
                std::hint::spin_loop();
            }
            if round % 2 == 0 {
                restored.stop(StopMode::Inaccessible).unwrap();
            } else {
                drop(restored);
            }
            ended.store(true, SeqCst);
            for place in maps.join().unwrap() {
                assert_eq!(read(place), Some(7), "round {round}");
                assert_eq!(read(place + PAGE), Some(0), "round {round}");
            }
        });
        munmap(base, PAGES);
    }
}

/// Missing pages are errors in every read, and present and discarded ones stay as they are, on a
/// kernel that can poison and on one that can't.
#[test]
fn giving_up_loses_only_missing_pages() {
    const PAGES: usize = 512;
    let bytes = random_bytes(PAGES as u64, 2);
    let snapshot = open(pack(&bytes, 8));
    for mask in [Mask::NONE, Mask::NONE.hiding(Features::POISON)] {
        for by_drop in [false, true] {
            let memory = own(PAGES);
            let base = memory.as_ptr().expose_provenance();
            let mut restored = Restore::new(Arc::clone(&snapshot))
                .region(0, memory)
                .on_failure(FailurePolicy::Abort)
                .mask(mask)
                .start()
                .unwrap();
            compare(&restored, &bytes, [0, 100, 511]);
            madvise(base + 200 * PAGE, 2, libc::MADV_DONTNEED);
            if by_drop {
                drop(restored);
            } else {
                restored.stop(StopMode::Inaccessible).unwrap();
                restored.stop(StopMode::Inaccessible).unwrap();
            }
            let seen = |page: usize| read(base + page * PAGE);
            for page in [0, 100, 511] {
                assert_eq!(
                    seen(page),
                    Some(bytes[page * PAGE]),
                    "{mask:?}: page {page}"
                );
            }
            assert_eq!((seen(200), seen(201)), (Some(0), Some(0)), "{mask:?}");
            let lost = (0..PAGES).filter(|page| seen(*page).is_none()).count();
            // The touched pages came with the rest of their frames.
            assert!((400..=PAGES - 5).contains(&lost), "{mask:?}: {lost} lost");
            let is_right = |page: usize| seen(page) == Some(bytes[page * PAGE]);
            let right = (0..PAGES).filter(|page| is_right(*page)).count();
            assert!(
                right + lost + 2 >= PAGES,
                "{mask:?}: {right} right, {lost} lost"
            );
            munmap(base, PAGES);
        }
    }
}

/// Touching a missing page gets SIGBUS after the restore was given up.
#[test]
fn touching_a_given_up_page_raises_sigbus() {
    let ended = in_child(|| {
        let bytes = random_bytes(64, 3);
        let mut restored = Restore::new(open(pack(&bytes, 8))).start().unwrap();
        restored.stop(StopMode::Inaccessible).unwrap();
        peek(address(&restored, 7));
    });
    assert_eq!(ended.signal(), Some(libc::SIGBUS), "{ended:?}");
}

/// Regression test: missing pages are in more pieces than a process may have mappings. Present
/// pages became inaccessible then, without an error.
#[test]
fn too_many_mappings_are_reported_as_error() {
    const TEST: &str = "too_many_mappings_are_reported_as_error";
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    if limit > 200_000 {
        return skipped(TEST, &format!("vm.max_map_count is {limit}"));
    }
    // In a process of its own: other tests need mappings too.
    in_child(|| {
        let pages = 2 * limit + 2000;
        let snapshot = filled(pages as u64);
        for mask in [Mask::NONE, Mask::NONE.hiding(Features::POISON)] {
            let memory = own(pages);
            let base = memory.as_ptr().expose_provenance();
            let mut restored = Restore::new(Arc::clone(&snapshot))
                .region(0, memory)
                .on_failure(FailurePolicy::Abort)
                .mask(mask)
                .start()
                .unwrap();
            for page in (0..pages).step_by(2) {
                madvise(base + page * PAGE, 1, libc::MADV_DONTNEED);
            }
            let stopped = restored.stop(StopMode::Inaccessible);
            let seen = [0, 1, pages - 2, pages - 1].map(|page| read(base + page * PAGE));
            if mask == Mask::NONE {
                stopped.unwrap();
                assert_eq!(seen, [Some(0), None, Some(0), None]);
            } else {
                let refused = stopped.unwrap_err();
                assert!(
                    matches!(refused, StopError::TooManyMappings(_)),
                    "{refused}"
                );
                assert!(
                    refused.to_string().contains("vm.max_map_count"),
                    "{refused}"
                );
                assert_eq!(seen, [None; 4]);
            }
            drop(restored);
            munmap(base, pages);
        }
    })
    .expect_success();
}

/// Regression test: threads discard without a pause. Each poisoning restarted at the first page,
/// and stopping took seconds.
#[test]
fn giving_up_ends_under_constant_discards() {
    const PAGES: usize = 1 << 18;
    const THREADS: usize = 16;
    let snapshot = filled(PAGES as u64);
    for round in 0..4 {
        let memory = own(PAGES);
        let base = memory.as_ptr().expose_provenance();
        let mut restored = Restore::new(Arc::clone(&snapshot))
            .region(0, memory)
            .start()
            .unwrap();
        let ended = AtomicBool::new(false);
        let discards = AtomicUsize::new(0);
        let (elapsed, events) = std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (ended, discards) = (&ended, &discards);
                scope.spawn(move || {
                    let mut random = SplitMix(thread as u64);
                    while !ended.load(SeqCst) {
                        madvise(
                            base + (random.next() % PAGES as u64) as usize * PAGE,
                            1,
                            libc::MADV_DONTNEED,
                        );
                        discards.fetch_add(1, SeqCst);
                    }
                });
            }
            wait_until("the storm rages", || {
                discards.load(SeqCst) > 2000 * (round + 1)
            });
            let before = restored.stats().discards;
            let begun = Instant::now();
            restored.stop(StopMode::Inaccessible).unwrap();
            let elapsed = begun.elapsed();
            ended.store(true, SeqCst);
            (elapsed, restored.stats().discards - before)
        });
        println!(
            "stopped after {elapsed:?}, {events} events, {} discards",
            discards.into_inner()
        );
        // The goal is a tenth of a second on a machine with two cores.
        assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
        munmap(base, PAGES);
    }
}
