//! Owners whose memory is in pages of 2 MiB.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use snaprestore_engine::{Prefetch, RecordingOptions};

use snaprestore_engine::pager::{OnError, Pager, SessionEnd};
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::huge_pool::HugePool;
use snaprestore_uffd::os::open_page_map;

use crate::common::{damaged, frame_of, open, open_hooked, pack, random_bytes, wait_until};
use crate::owner::{Backing, Memory, Owner, Region, mixed};
use crate::uffd_support::{Ended, in_threads, madvise};

/// Number of the snapshot's pages in one of the owner's.
const LARGE: u64 = 512;
/// Number of large pages of an owner.
const COUNT: u64 = 12;
const PAGES: u64 = COUNT * LARGE;

const REGIONS: [Region; 2] = [
    Region {
        pages: 7 * LARGE,
        offset_pages: 0,
    },
    Region {
        pages: (COUNT - 7) * LARGE,
        offset_pages: 7 * LARGE,
    },
];

/// Returns one region of `count` large pages.
fn one_region(count: u64) -> [Region; 1] {
    [Region {
        pages: count * LARGE,
        offset_pages: 0,
    }]
}

/// Sets up a pool of `pages` pages; reports it if the test can't run.
fn pool(test: &str, pages: u64) -> Option<HugePool> {
    HugePool::with(pages)
        .map_err(|why| skipped(test, &why))
        .ok()
}

#[test]
fn huge_page_owner_reads_source_at_every_frame_size() {
    let test = "huge_page_owner_reads_source_at_every_frame_size";
    let Some(_pool) = pool(test, COUNT) else {
        return;
    };
    let bytes = Arc::new(mixed(PAGES));
    for (frame_pages, prefetch) in [
        (1, Prefetch::Off),
        (16, Prefetch::All),
        (64, Prefetch::Off),
        (512, Prefetch::Off),
        (512, Prefetch::All),
    ] {
        let expected = Arc::clone(&bytes);
        let owner = Owner::start_in(Backing::Huge, &REGIONS, move |memory| {
            memory.compare_in_threads(&expected, 4)
        });
        let paged = Pager::new(open(pack(&bytes, frame_pages)))
            .prefetch(prefetch.clone())
            .attach(owner.handover())
            .unwrap();
        assert_eq!(owner.child.wait(), Ended::Exit(0), "{frame_pages}");
        paged.wait();
        let stats = paged.stats();
        assert_eq!(stats.failures, 0);
        if prefetch == Prefetch::Off {
            let loaded = stats.demand;
            assert_eq!(loaded.copied + loaded.filled + loaded.zeroed, PAGES);
            assert!((COUNT..=4 * COUNT).contains(&stats.faults));
        }
    }
}

/// The kernel does not tell which part of a huge page was touched.
#[test]
fn touched_huge_page_is_recorded_as_all_its_pages() {
    let test = "touched_huge_page_is_recorded_as_all_its_pages";
    let Some(_pool) = pool(test, COUNT) else {
        return;
    };
    let bytes = Arc::new(mixed(3 * LARGE));
    let expected = Arc::clone(&bytes);
    let owner = Owner::start_in(Backing::Huge, &one_region(3), move |memory| {
        let page = |page: u64| &expected[usize::try_from(page).unwrap() * 4096..][..4096];
        let right = [LARGE + 7, 3, LARGE].map(|number| memory.is(number, page(number)));
        i32::from(right.contains(&false))
    });
    let paged = Pager::new(open(pack(&bytes, 32)))
        .prefetch(Prefetch::All)
        .record(RecordingOptions {
            max_time: Duration::MAX,
            max_pages: Some(3 * LARGE),
            settled_after: None,
        })
        .attach(owner.handover())
        .unwrap();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
    paged.wait();
    let trace = paged.recording().unwrap().stop();
    let touched: Vec<u64> = (LARGE..2 * LARGE).chain(0..LARGE).collect();
    assert_eq!((trace.pages(), trace.present_at_start), (touched, 0));
}

/// The kernel removes only whole pages from private memory, and rounds the end of a range down.
#[test]
fn discarded_huge_pages_are_zero_during_prefetch() {
    let test = "discarded_huge_pages_are_zero_during_prefetch";
    let Some(_pool) = pool(test, COUNT) else {
        return;
    };
    let bytes = Arc::new(mixed(PAGES));
    for round in 0..8 {
        let expected = Arc::clone(&bytes);
        let owner = Owner::start_in(Backing::Huge, &REGIONS, move |memory| {
            let gone = |page: u64| page / LARGE % 4 == round % 4;
            for large in (0..COUNT).filter(|large| gone(large * LARGE)) {
                if large % 2 == 0 {
                    memory.is(large * LARGE, &[]);
                }
                // The page after it is not wholly in the range, or in another region.
                let more = if (large + 1) % 7 == 0 || large + 1 == COUNT {
                    0
                } else {
                    1 << 20
                };
                let start = memory.page(large * LARGE);
                madvise(start, (2 << 20) + more, libc::MADV_DONTNEED);
            }
            i32::from((0..2).any(|_| memory.wrong(&expected, gone).is_some()))
        });
        let paged = Pager::new(open(pack(&bytes, 32)))
            .prefetch(Prefetch::All)
            .attach(owner.handover())
            .unwrap();
        assert_eq!(owner.child.wait(), Ended::Exit(0), "round {round}");
        assert!(paged.stats().discards > 0);
        paged.wait();
    }
}

/// Returns ranges of pages that begin and end anywhere, some in one large page and some across
/// several.
fn ranges(round: u64) -> Vec<std::ops::Range<u64>> {
    let ranges = (0..PAGES / 700).map(|k| {
        let start = k * 700 + 13 * round;
        start..(start + (k * 331 + round * 77) % 690 + 1).min(PAGES)
    });
    // Not across the boundary of two mappings.
    let border = 7 * LARGE;
    let whole = |range: &std::ops::Range<u64>| range.end <= border || range.start >= border;
    ranges.filter(whole).collect()
}

fn remove(memory: &Memory, ranges: &[std::ops::Range<u64>]) {
    for pages in ranges {
        let len = (pages.end - pages.start) * 4096;
        madvise(memory.page(pages.start), len, libc::MADV_REMOVE);
    }
}

/// Regression test: if a page is missing, the kernel zeroes nothing when a part of it is discarded.
/// Rounded inwards, the discarded parts came back from the snapshot.
#[test]
fn discarded_parts_of_huge_pages_are_zero() {
    let test = "discarded_parts_of_huge_pages_are_zero";
    let Some(_pool) = pool(test, COUNT) else {
        return;
    };
    let bytes = Arc::new(random_bytes(PAGES, 9));
    for round in 0..8 {
        let expected = Arc::clone(&bytes);
        let prefetch = [Prefetch::Off, Prefetch::All][usize::from(round % 2 == 1)].clone();
        let owner = Owner::start_in(Backing::HugeFile, &REGIONS, move |memory| {
            let ranges = ranges(round);
            let (before, during) = ranges.split_at(ranges.len() / 2);
            // Another thread touches the pages that are being discarded.
            let touch = |_| {
                for page in (0..PAGES).step_by(97) {
                    memory.is(page, &[]);
                }
            };
            in_threads(1, touch, || remove(memory, during));
            // Everything is present by now; then it is discarded again.
            remove(memory, before);
            let gone = |page: u64| ranges.iter().any(|pages| pages.contains(&page));
            let right = (0..2).all(|_| memory.wrong(&expected, gone).is_none());
            i32::from(!right)
        });
        let paged = Pager::new(open(pack(&bytes, 32)))
            .prefetch(prefetch)
            .attach(owner.handover())
            .unwrap();
        assert_eq!(owner.child.wait(), Ended::Exit(0), "round {round}");
        assert!(paged.stats().discards > 0);
        paged.wait();
    }
}

/// Nothing was touched before the discards, which are the first events that the pager reads.
#[test]
fn parts_discarded_before_load_are_zero() {
    let test = "parts_discarded_before_load_are_zero";
    let Some(_pool) = pool(test, COUNT) else {
        return;
    };
    let bytes = Arc::new(random_bytes(PAGES, 10));
    for round in 0..4 {
        let expected = Arc::clone(&bytes);
        let owner = Owner::start_in(Backing::HugeFile, &REGIONS, move |memory| {
            let ranges = ranges(round);
            remove(memory, &ranges);
            memory.wait_for_word();
            let gone = |page: u64| ranges.iter().any(|pages| pages.contains(&page));
            i32::from(memory.wrong(&expected, gone).is_some())
        });
        let paged = Pager::new(open(pack(&bytes, 64)))
            .attach(owner.handover())
            .unwrap();
        let discards = ranges(round).len() as u64;
        crate::common::wait_until("the discards are known", || {
            paged.stats().discards == discards
        });
        if round % 2 == 1 {
            assert!(paged.complete());
        }
        owner.word();
        assert_eq!(owner.child.wait(), Ended::Exit(0), "round {round}");
        paged.wait();
    }
}

#[test]
fn completed_huge_page_owner_runs_without_pager() {
    let test = "completed_huge_page_owner_runs_without_pager";
    let Some(_pool) = pool(test, COUNT) else {
        return;
    };
    let bytes = Arc::new(mixed(PAGES));
    let expected = Arc::clone(&bytes);
    let owner = Owner::start_in(Backing::Huge, &REGIONS, move |memory| {
        memory.wait_for_word();
        memory.compare_in_threads(&expected, 1)
    });
    let paged = Pager::new(open(pack(&bytes, 32)))
        .attach(owner.handover())
        .unwrap();
    assert!(paged.complete());
    assert_eq!(paged.ending(), Some(SessionEnd::Complete));
    drop(paged);
    owner.word();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
}

/// Only one of many frames in a large page is bad.
#[test]
fn bad_frame_in_huge_page_kills_owner() {
    let Some(_pool) = pool("bad_frame_in_huge_page_kills_owner", COUNT) else {
        return;
    };
    let bytes = Arc::new(random_bytes(PAGES, 5));
    let file = pack(&bytes, 16);
    let frame = frame_of(&open(file.clone()), 700);
    for (on_error, signal) in [
        (OnError::Kill, libc::SIGKILL),
        (OnError::Poison, libc::SIGBUS),
    ] {
        let expected = Arc::clone(&bytes);
        let owner = Owner::start_in(Backing::Huge, &REGIONS, move |memory| {
            // Never wrong: the owner is killed here.
            memory.compare_in_threads(&expected, 2)
        });
        let paged = Pager::new(open(damaged(file.clone(), &frame)))
            .on_error(on_error)
            .prefetch(Prefetch::All)
            .attach(owner.handover())
            .unwrap();
        assert_eq!(owner.child.wait(), Ended::Signal(signal));
        let ending = paged.wait();
        match on_error {
            OnError::Kill => {
                let place = format!("offset {}", frame.offset());
                assert!(
                    matches!(&ending, SessionEnd::Killed(why) if why.contains(&place)),
                    "{ending:?}"
                );
            }
            OnError::Poison => assert_eq!(paged.stats().poisoned, 1),
        }
        let failures = paged.failures();
        assert!(!failures.is_empty());
        for failure in failures {
            assert_eq!(failure.page / LARGE, 700 / LARGE);
            assert_eq!(failure.offset, Some(frame.offset()));
        }
    }
}

/// Writes the byte at `address` to a pipe: poison makes a system call fail, without a signal.
fn wrote(pipe: &std::io::PipeWriter, address: u64) -> Result<(), i32> {
    let from = std::ptr::with_exposed_provenance(usize::try_from(address).unwrap());
    // SAFETY: the kernel reads one byte of this process, or returns an error.
    let written = unsafe { libc::write(pipe.as_raw_fd(), from, 1) };
    match written {
        1 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

/// A large page was poisoned while the store failed for one of its frames. The store works again
/// when the session is completed.
#[test]
fn completing_heals_poisoned_huge_pages() {
    let test = "completing_heals_poisoned_huge_pages";
    let Some(_pool) = pool(test, 2) else {
        return;
    };
    let bytes = Arc::new(random_bytes(2 * LARGE, 21));
    let file = pack(&bytes, 16);
    let frame = frame_of(&open(file.clone()), LARGE + 300).offset();
    let ill = Arc::new(AtomicBool::new(true));
    let is_ill = Arc::clone(&ill);
    let snapshot = open_hooked(file, move |_, offset, _| {
        if offset == frame && is_ill.load(SeqCst) {
            return Err(std::io::Error::other("the store is ill"));
        }
        Ok(())
    });
    let expected = Arc::clone(&bytes);
    let (mut signal, to_parent) = std::io::pipe().unwrap();
    let owner = Owner::start_in(Backing::Huge, &one_region(2), move |memory| {
        let (_reader, pipe) = std::io::pipe().unwrap();
        let touches = [LARGE + 5, LARGE + 300].map(|page| wrote(&pipe, memory.page(page)));
        (&to_parent).write_all(b"!").unwrap();
        if touches != [Err(libc::EFAULT); 2] {
            return 1;
        }
        memory.wait_for_word();
        let wrong = memory.wrong(&expected, |_| false);
        if wrong.is_some() { 2 } else { 0 }
    });
    let paged = Pager::new(snapshot)
        .on_error(OnError::Poison)
        .retry_timeout(Duration::ZERO)
        .attach(owner.handover())
        .unwrap();
    // The page stays poisoned until both touches have met it.
    signal.read_exact(&mut [0]).unwrap();
    wait_until("the page is marked", || paged.stats().poisoned > 0);
    assert_eq!(paged.failures()[0].page / LARGE, 1);
    ill.store(false, SeqCst);
    assert!(paged.complete());
    owner.word();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
}

/// The kernel returns EEXIST when it has no free page. If that were trusted, the page would be
/// zeros from then on.
#[test]
fn owner_waits_until_a_huge_page_is_free() {
    let test = "owner_waits_until_a_huge_page_is_free";
    let Some(pool) = pool(test, 4) else {
        return;
    };
    if pool.free() > 64 {
        return skipped(test, &"the pool of 2 MiB pages is too large to be used up");
    }
    for with_page_map in [false, true] {
        wait_for_a_huge_page(&pool, with_page_map);
    }
}

fn wait_for_a_huge_page(pool: &HugePool, with_page_map: bool) {
    let count = pool.free() + 2;
    let bytes = Arc::new(random_bytes(count * LARGE, 11));
    let expected = Arc::clone(&bytes);
    let owner = Owner::start_in(Backing::Huge, &one_region(count), move |memory| {
        let memory: &Memory = memory;
        let source = |page: u64| &expected[usize::try_from(page * 4096).unwrap()..][..4096];
        let right = (0..count - 2).all(|large| memory.is(large * LARGE, source(large * LARGE)));
        let other = |number| {
            let page = (count - 2 + number) * LARGE + 5;
            memory.is(page, source(page))
        };
        let (others, ()) = in_threads(2, other, || {
            // Long enough for both to find the pool empty.
            std::thread::sleep(std::time::Duration::from_millis(100));
            madvise(memory.page(0), 4 << 20, libc::MADV_DONTNEED);
        });
        i32::from(!right || others != [true; 2])
    });
    let mut handover = owner.handover();
    if with_page_map {
        handover.page_map = Some(open_page_map(handover.owner.as_fd()).unwrap());
    }
    let paged = Pager::new(open(pack(&bytes, 64)))
        .fault_threads(1)
        .attach(handover)
        .unwrap();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
    paged.wait();
}

#[test]
fn empty_huge_page_pool_kills_owner() {
    let test = "empty_huge_page_pool_kills_owner";
    let _pool = match HugePool::empty() {
        Ok(pool) => pool,
        Err(why) => return skipped(test, &why),
    };
    let bytes = Arc::new(random_bytes(LARGE, 12));
    let expected = Arc::clone(&bytes);
    let owner = Owner::start_in(Backing::Huge, &one_region(1), move |memory| {
        memory.compare_in_threads(&expected, 1)
    });
    let paged = Pager::new(open(pack(&bytes, 64)))
        .attach(owner.handover())
        .unwrap();
    assert!(!paged.complete(), "with no memory");
    assert_eq!(owner.child.wait(), Ended::Signal(libc::SIGKILL));
    let ending = paged.wait();
    assert!(
        matches!(&ending, SessionEnd::Killed(why) if why.contains("hugepages-2048kB")),
        "{ending:?}"
    );
}
