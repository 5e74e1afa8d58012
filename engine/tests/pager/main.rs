//! Serves the memory of other processes. The owners are children that map memory and register it as
//! Firecracker does, in two regions of which the second may be lower, and compare what they read
//! with the source.

#![allow(
    unsafe_code,
    reason = "owners are processes of their own that touch memory"
)]

mod ending;
mod huge;
mod layers;
mod owner;
mod shared;

#[path = "../restore/common.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod common;
#[path = "../../uffd/tests/support/mod.rs"]
mod uffd_support;

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use common::{damaged, frame_of, open, pack, random_bytes};
use owner::{Owner, Region, mixed};
use snaprestore_engine::pager::{AttachError, HandoverError, OnError, Pager, SessionEnd};
use snaprestore_engine::{Prefetch, RecordingOptions};
use snaprestore_uffd::uffd::{AdoptError, OpenOptions};
use snapshot_format::trace::TraceEnd;
use uffd_support::Ended;

const PAGES: u64 = 2048;

/// Two regions, like those of a VM with a gap.
const REGIONS: [Region; 2] = [
    Region {
        pages: 1500,
        offset_pages: 0,
    },
    Region {
        pages: PAGES - 1500,
        offset_pages: 1500,
    },
];

#[test]
fn owner_reads_source_in_any_order_and_thread() {
    let bytes = Arc::new(mixed(PAGES));
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let expected = Arc::clone(&bytes);
        let owner = Owner::start(&REGIONS, move |memory| {
            memory.compare_in_threads(&expected, 4)
        });
        let snapshot = open(pack(&bytes, 32));
        let prefetch_off = prefetch == Prefetch::Off;
        let paged = Pager::new(snapshot)
            .prefetch(prefetch)
            .attach(owner.handover())
            .unwrap();
        assert_eq!(owner.child.wait(), Ended::Exit(0));
        let ending = paged.wait();
        // With prefetch, everything may have been present before the owner exited.
        assert!(
            matches!(ending, SessionEnd::Exited | SessionEnd::Complete),
            "{ending:?}"
        );
        let stats = paged.stats();
        assert_eq!(stats.failures, 0);
        if prefetch_off {
            assert!(stats.faults > 0);
        }
    }
}

/// Regression test: a child that was forked while another thread attached an owner inherited the
/// range that attaching reserves, and was taken for the pager's own process.
#[test]
fn owner_forked_during_an_attach_is_foreign() {
    let snapshot = open(pack(&mixed(PAGES), 32));
    let attach = |owner: &Owner| {
        let pager = Pager::new(Arc::clone(&snapshot)).prefetch(Prefetch::Off);
        pager.attach(owner.handover()).map(drop)
    };
    let start = || {
        Owner::start(&REGIONS, |memory| {
            memory.wait_for_word();
            0
        })
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                attach(&start()).expect("cannot attach an owner");
            }
        });
        for _ in 0..200 {
            let attached = attach(&start());
            if attached.is_err() {
                stop.store(true, Relaxed);
            }
            attached.expect("cannot attach an owner forked during an attach");
        }
        stop.store(true, Relaxed);
    });
}

/// The owner discards while pages arrive: what it reads there afterwards is zero.
///
/// Regression test: one in some hundred owners hung. A fault came between the kernel's wake-up at
/// the end of the session and the unregistration, and nobody read faults any more. All threads are
/// now woken once more.
#[test]
fn discarded_pages_are_zero_during_prefetch() {
    let bytes = Arc::new(mixed(PAGES));
    for round in 0..8 {
        let expected = Arc::clone(&bytes);
        let owner = Owner::start(&REGIONS, move |memory| {
            memory.discard_and_compare(&expected, round)
        });
        let snapshot = open(pack(&bytes, 32));
        let paged = Pager::new(snapshot)
            .prefetch(Prefetch::All)
            .attach(owner.handover())
            .unwrap();
        assert_eq!(owner.child.wait(), Ended::Exit(0), "round {round}");
        assert!(paged.stats().discards > 0);
        paged.wait();
    }
}

#[test]
fn completed_owner_runs_without_its_pager() {
    let bytes = Arc::new(mixed(PAGES));
    let expected = Arc::clone(&bytes);
    let owner = Owner::start(&REGIONS, move |memory| {
        memory.wait_for_word();
        memory.compare_in_threads(&expected, 1)
    });
    let paged = Pager::new(open(pack(&bytes, 32)))
        .attach(owner.handover())
        .unwrap();
    assert_eq!(paged.ending(), None);
    assert!(paged.complete());
    assert_eq!(paged.ending(), Some(SessionEnd::Complete));
    drop(paged);
    owner.word();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
}

#[test]
fn paused_prefetch_resumes_or_is_completed() {
    for resume in [true, false] {
        let bytes = Arc::new(mixed(PAGES));
        let expected = Arc::clone(&bytes);
        let owner = Owner::start(&REGIONS, move |memory| {
            memory.wait_for_word();
            memory.compare_in_threads(&expected, 1)
        });
        let paged = Pager::new(open(pack(&bytes, 32)))
            .prefetch(Prefetch::All)
            .prefetch_bandwidth(1)
            .attach(owner.handover())
            .unwrap();
        paged.pause_prefetch();
        paged.set_prefetch_bandwidth(None);
        assert_eq!(paged.ending(), None);
        if resume {
            paged.resume_prefetch();
            assert!(paged.wait_complete());
        } else {
            assert!(paged.complete());
        }
        owner.word();
        assert_eq!(owner.child.wait(), Ended::Exit(0));
    }
}

/// Prefetch waits, and a neighbour in the frame is another touch.
#[test]
fn recording_has_the_pages_that_the_owner_touched() {
    let bytes = Arc::new(mixed(PAGES));
    let touched = [5, 2000, 6, 1499, 1500, 3, 1000];
    let expected = Arc::clone(&bytes);
    let owner = Owner::start(&REGIONS, move |memory| {
        let page = |page: u64| &expected[usize::try_from(page).unwrap() * 4096..][..4096];
        let right = touched.map(|number| memory.is(number, page(number)));
        i32::from(right.contains(&false))
    });
    let paged = Pager::new(open(pack(&bytes, 32)))
        .prefetch(Prefetch::All)
        .record(RecordingOptions {
            max_time: Duration::MAX,
            settled_after: None,
            ..RecordingOptions::default()
        })
        .attach(owner.handover())
        .unwrap();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
    assert_eq!(paged.wait(), SessionEnd::Exited);
    let trace = paged.recording().unwrap().stop();
    assert_eq!(
        (trace.end, trace.pages()),
        (TraceEnd::OwnerEnded, touched.to_vec())
    );
    assert_eq!(trace.present_at_start, 0);
}

#[test]
fn owner_with_damaged_page_is_killed_before_zeros() {
    let bytes = Arc::new(random_bytes(PAGES, 5));
    let file = pack(&bytes, 32);
    let page = 700;
    let frame = frame_of(&open(file.clone()), page);
    let expected = Arc::clone(&bytes);
    let owner = Owner::start(&REGIONS, move |memory| {
        memory.compare_in_threads(&expected, 2)
    });
    let paged = Pager::new(open(damaged(file, &frame)))
        .attach(owner.handover())
        .unwrap();
    assert_eq!(owner.child.wait(), Ended::Signal(libc::SIGKILL));
    let SessionEnd::Killed(why) = paged.wait() else {
        panic!("{:?}", paged.ending());
    };
    let place = format!("offset {}", frame.offset());
    assert!(why.contains("(memory)") && why.contains(&place), "{why}");
}

#[test]
fn damaged_page_is_poisoned_if_requested() {
    let bytes = Arc::new(random_bytes(PAGES, 6));
    let file = pack(&bytes, 32);
    let frame = frame_of(&open(file.clone()), 700);
    let expected = Arc::clone(&bytes);
    let owner = Owner::start(&REGIONS, move |memory| {
        memory.compare_in_threads(&expected, 1)
    });
    let paged = Pager::new(open(damaged(file, &frame)))
        .on_error(OnError::Poison)
        .attach(owner.handover())
        .unwrap();
    assert_eq!(owner.child.wait(), Ended::Signal(libc::SIGBUS));
    assert_eq!(paged.wait(), SessionEnd::Exited);
    assert_eq!(paged.stats().poisoned, 1);
}

#[test]
fn mismatched_owner_is_refused_and_not_killed() {
    let bytes = mixed(PAGES);
    let owner = Owner::start(&REGIONS, |memory| {
        memory.wait_for_word();
        0
    });
    let snapshot = open(pack(&bytes, 32));
    let mut handover = owner.handover();
    handover.regions.truncate(1);
    let refused = Pager::new(Arc::clone(&snapshot)).attach(handover);
    assert!(
        matches!(
            refused,
            Err(AttachError::Handover(HandoverError::Size { .. }))
        ),
        "{refused:?}"
    );
    let mut handover = owner.handover();
    handover.userfaultfd = std::fs::File::open("/dev/null").unwrap().into();
    let refused = Pager::new(snapshot).attach(handover);
    assert!(
        matches!(refused, Err(AttachError::Userfaultfd(_))),
        "{refused:?}"
    );
    owner.word();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
}

/// Its missing pages would read as zeros, and the session would be complete without them.
#[test]
fn memory_that_was_never_registered_is_refused() {
    let snapshot = open(pack(&mixed(PAGES), 32));
    let refuses = |move_region: fn(&mut u64)| {
        let owner = Owner::start(&REGIONS, |memory| {
            memory.wait_for_word();
            0
        });
        let mut handover = owner.handover();
        move_region(&mut handover.regions[1].address);
        let begins = handover.regions[1].address;
        let refused = Pager::new(Arc::clone(&snapshot)).attach(handover);
        assert!(
            matches!(refused, Err(AttachError::NotRegistered { address }) if address == begins),
            "{refused:?}"
        );
        // Nobody else has its userfaultfd: what it has registered would read as zeros.
        assert_eq!(owner.child.wait(), Ended::Signal(libc::SIGKILL));
    };
    // Nothing is mapped at this address of the owner; the end of the other region is registered.
    refuses(|address| *address = 64 << 20);
    refuses(|address| *address -= 4096);
}

/// A descriptor that came by a detour: filling memory through it would bypass the protection of
/// this process's own memory.
#[test]
fn memory_of_the_pager_itself_is_refused() {
    let own = OpenOptions::new().open().unwrap();
    let owner = Owner::start(&REGIONS, |memory| {
        memory.wait_for_word();
        0
    });
    let mut handover = owner.handover();
    handover.userfaultfd = own.as_fd().try_clone_to_owned().unwrap();
    let refused = Pager::new(open(pack(&mixed(PAGES), 32))).attach(handover);
    assert!(
        matches!(
            refused,
            Err(AttachError::Userfaultfd(AdoptError::OwnMemory))
        ),
        "{refused:?}"
    );
    owner.word();
    assert_eq!(owner.child.wait(), Ended::Exit(0));
}

/// Two hundred sessions leave no descriptors behind.
#[test]
fn finished_sessions_leak_nothing() {
    let bytes = Arc::new(mixed(64));
    let snapshot = open(pack(&bytes, 16));
    let regions = [Region {
        pages: 64,
        offset_pages: 0,
    }];
    let highest = || std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    let once = || {
        let expected = Arc::clone(&bytes);
        let owner = Owner::start(&regions, move |memory| {
            memory.compare_in_threads(&expected, 1)
        });
        let paged = Pager::new(Arc::clone(&snapshot))
            .attach(owner.handover())
            .unwrap();
        assert_eq!(owner.child.wait(), Ended::Exit(0));
        paged.wait();
    };
    once();
    // Other tests open descriptors meanwhile, so the number may rise by some, but not with each
    // round.
    let before = highest();
    for _ in 0..200 {
        once();
    }
    assert!(highest() < before + 100);
}
