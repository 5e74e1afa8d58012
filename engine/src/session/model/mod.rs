//! Model checker: runs the session in every interleaving on a model of the kernel.
//!
//! Each scenario has threads of the owner, which touch, discard, unmap and move pages and know what
//! they must read, and threads of the session: fault threads, a prefetcher, and one that gives the
//! session up. The correct code passes in every interleaving. Each mistake planted in the platform
//! below it makes some interleaving fail.

mod explore;
mod pages;
mod platform;
mod scenario;
mod world;

use std::ops::Range;

use platform::Mistake;
use scenario::{Act, Scenario};

use Act::{Discard, MapAfresh, Move, Touch, TouchIfMapped, Unmap, Write};

/// The second touch may come before, during or after the discard, and must read accordingly.
const TWO_AND_A_DISCARDER: &[&[Act]] = &[&[Touch(0)], &[Touch(2)], &[Discard(1, 3)]];

/// One frame at a time: with both frames there are ten times as many interleavings.
fn two_faulting_threads_a_prefetcher_and_a_discarder_of(prefetched: Range<u64>) {
    Scenario {
        owner: TWO_AND_A_DISCARDER,
        prefetchers: 1,
        prefetched,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn two_faulting_threads_a_prefetcher_and_a_discarder() {
    two_faulting_threads_a_prefetcher_and_a_discarder_of(2..4);
}

#[test]
fn two_faulting_threads_a_prefetcher_of_the_other_frame_and_a_discarder() {
    two_faulting_threads_a_prefetcher_and_a_discarder_of(0..2);
}

/// Both frames are prefetched, and one thread touches both.
#[test]
fn a_faulting_thread_a_prefetcher_of_two_frames_and_a_discarder() {
    Scenario {
        owner: &[&[Touch(0), Touch(2)], &[Discard(1, 3)]],
        prefetchers: 1,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn two_fault_threads_and_a_discarder() {
    Scenario {
        owner: &[&[Touch(0)], &[Touch(2)], &[Discard(0, 2)]],
        fault_threads: 2,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn copies_cut_short() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Touch(1)]],
        prefetchers: 1,
        cuts: 1,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: PAGES_BEHIND_THE_CUT,
        prefetchers: 1,
        cuts: 2,
        ..Scenario::default()
    }
    .passes();
}

/// The pages after the cut, of either frame, are touched as well: the session must not consider
/// them present.
const PAGES_BEHIND_THE_CUT: &[&[Act]] = &[&[Touch(0), Touch(1)], &[Touch(3)]];

#[test]
fn installs_without_memory() {
    Scenario {
        owner: &[&[Touch(0)], &[Touch(3)]],
        prefetchers: 1,
        shortages: 1,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn write_after_discard_is_kept() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Write(1, 99), Touch(1)]],
        prefetchers: 1,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn unmapping_during_faults() {
    Scenario {
        owner: &[&[TouchIfMapped(0)], &[Unmap(0, 1), Touch(1)]],
        prefetchers: 1,
        ..Scenario::default()
    }
    .passes();
}

/// Regression test: a page was moved while its install waited for the kernel's lock. The kernel had
/// checked for a change before, and returned ENOENT. The page was considered gone and read as zeros
/// at its new address. A thread that gets ENOENT now checks whether a change has begun.
#[test]
fn moving_while_install_waits_for_kernel() {
    Scenario {
        owner: &[&[TouchIfMapped(0)], &[Move(0, 9)]],
        two_checks: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Move(0, 9)]],
        prefetchers: 1,
        two_checks: true,
        ..Scenario::default()
    }
    .passes();
}

/// Regression test: one thread settled the last page while another waited for messages forever.
#[test]
fn session_completes_by_itself() {
    Scenario {
        owner: &[&[Touch(0), Touch(2)], &[Touch(3)]],
        fault_threads: 2,
        completes: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 3)]],
        prefetchers: 1,
        completes: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: FAULTS_AT_THE_END,
        completes: true,
        ..Scenario::default()
    }
    .passes();
}

/// Two threads may both count a page, so that all pages seem settled when one is not. The exact
/// check finds it, and is repeated later.
#[test]
fn session_completes_after_page_was_counted_twice() {
    Scenario {
        owner: &[&[Touch(0)], &[Touch(3)]],
        lost: &[1],
        miscounted: true,
        prefetchers: 1,
        completes: true,
        ..Scenario::default()
    }
    .passes();
}

/// Touches of discarded pages come at any moment of the completion, also between the kernel's
/// wake-up and the end of the registration.
const FAULTS_AT_THE_END: &[&[Act]] = &[&[Touch(0), Touch(3)], &[Discard(1, 2), Touch(1)]];

#[test]
fn moving_during_faults() {
    Scenario {
        owner: &[&[TouchIfMapped(0)], &[Move(0, 9), Touch(1)]],
        prefetchers: 1,
        ..Scenario::default()
    }
    .passes();
}

/// One thread may read both faults at once: another one must serve the second.
#[test]
fn faults_served_at_the_same_time() {
    Scenario {
        owner: &[&[Touch(0)], &[Touch(2)]],
        fault_threads: 2,
        together: 2,
        ..Scenario::default()
    }
    .passes();
}

/// A fault is read during an install for prefetch, by a thread that does not serve it.
#[test]
fn faults_read_during_an_install() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2)]],
        prefetchers: 1,
        prefetched: 2..4,
        ..Scenario::default()
    }
    .passes();
}

/// A thread that only fills a page with zeros reads the discard of the last absent page.
#[test]
fn session_settled_during_an_install_completes() {
    Scenario {
        owner: &[&[Touch(2)], &[Discard(1, 2)]],
        lost: &[0],
        zeroed: Some(0),
        completes: true,
        ..Scenario::default()
    }
    .passes();
}

/// The pages of a damaged frame are poisoned, and discarded ones among them are zero, including one
/// that is discarded after its frame has failed.
#[test]
fn damaged_frame_poisons_its_pages() {
    let owners: [&[&[Act]]; 5] = [
        &[&[Touch(1)], &[Discard(1, 2)]],
        &[&[Touch(1)], &[Discard(1, 2), Touch(1)]],
        &[&[TouchIfMapped(0)], &[Unmap(0, 1), Touch(1)]],
        &[&[Touch(0)], &[Discard(1, 2), Write(1, 99), Touch(1)]],
        &[&[TouchIfMapped(0)], &[Move(0, 9)]],
    ];
    for owner in owners {
        Scenario {
            owner,
            damaged: Some(0),
            ..Scenario::default()
        }
        .passes();
    }
    Scenario {
        owner: &[&[Touch(0), Touch(2)], &[Touch(1)]],
        fault_threads: 2,
        damaged: Some(0),
        completes: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Touch(1)], &[Discard(0, 2)]],
        prefetchers: 1,
        damaged: Some(0),
        completes: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn page_marked_present_but_missing_is_zero() {
    Scenario {
        owner: &[&[Touch(1)], &[Touch(1), Touch(0)]],
        lost: &[1],
        prefetchers: 1,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn event_later_than_its_change() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(0, 2), Touch(1)]],
        slow: true,
        ..Scenario::default()
    }
    .passes();
}

/// Parts of large pages are discarded while the pages are assembled, and when they are present.
#[test]
fn large_pages_with_discarded_parts() {
    let owners: [(usize, &[&[Act]]); 3] = [
        (1, &[&[Touch(0)], &[Discard(1, 2), Touch(1)]]),
        (1, &[&[Touch(3)], &[Discard(1, 3)]]),
        (
            0,
            &[&[Touch(1)], &[Discard(0, 1), Discard(1, 2), Write(0, 99)]],
        ),
    ];
    for (prefetchers, owner) in owners {
        Scenario {
            owner,
            prefetchers,
            large: true,
            ..Scenario::default()
        }
        .passes();
    }
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Touch(1)]],
        fault_threads: 2,
        large: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn large_pages_without_memory_lost_or_complete() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Touch(3)]],
        shortages: 1,
        large: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Touch(1)], &[Touch(0), Touch(2)]],
        lost: &[0, 1],
        prefetchers: 1,
        large: true,
        ..Scenario::default()
    }
    .passes();
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 3), Touch(2)]],
        prefetchers: 1,
        completes: true,
        large: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn mistake_no_install_lock_is_found_with_large_pages() {
    Scenario {
        owner: &[&[Touch(0)], &[Discard(1, 2), Touch(1)]],
        prefetchers: 1,
        large: true,
        mistake: Some(Mistake::NoInstallLock),
        ..Scenario::default()
    }
    .fails_with("wrong byte");
}

/// Owners of a session that is given up at any moment.
const GIVEN_UP: [&[&[Act]]; 5] = [
    &[&[Touch(0)], &[Touch(2), Touch(3)]],
    &[&[Touch(0)], &[Discard(1, 3), Touch(1)]],
    &[&[Discard(0, 1), Write(0, 99), Touch(0)], &[Discard(2, 4)]],
    &[&[Unmap(0, 2), Touch(2)], &[MapAfresh(0)]],
    &[&[Move(0, 9)], &[MapAfresh(0), Touch(3)]],
];

/// Missing pages are poisoned wherever they are, present and discarded ones stay, and new mappings
/// of the owner at unmapped places are left alone.
#[test]
fn giving_up_while_owner_changes_memory() {
    for owner in GIVEN_UP {
        for two_checks in [false, true] {
            Scenario {
                owner,
                two_checks,
                gives_up: true,
                ..Scenario::default()
            }
            .passes();
        }
    }
    Scenario {
        owner: &[&[Touch(0), Discard(1, 2)]],
        prefetchers: 1,
        cuts: 1,
        gives_up: true,
        ..Scenario::default()
    }
    .passes();
}

#[test]
fn mistake_protecting_by_address_is_found() {
    Scenario {
        owner: GIVEN_UP[3],
        gives_up: true,
        mistake: Some(Mistake::ProtectByAddress),
        ..Scenario::default()
    }
    .fails_with("fresh place");
}

#[test]
fn mistake_eagain_dropped_in_giving_up_is_found() {
    Scenario {
        owner: GIVEN_UP[1],
        fault_threads: 0,
        gives_up: true,
        mistake: Some(Mistake::EagainDropped),
        ..Scenario::default()
    }
    .fails_with("page 0");
}

fn planted(mistake: Mistake) -> Scenario {
    Scenario {
        owner: TWO_AND_A_DISCARDER,
        prefetchers: 1,
        mistake: Some(mistake),
        ..Scenario::default()
    }
}

#[test]
fn mistake_no_install_lock_is_found() {
    planted(Mistake::NoInstallLock).fails_with("wrong byte");
}

#[test]
fn mistake_wake_for_present_is_found() {
    Scenario {
        owner: &[&[Touch(1)]],
        lost: &[1],
        mistake: Some(Mistake::WakeForPresent),
        ..Scenario::default()
    }
    .fails_with("no progress");
}

#[test]
fn mistake_eagain_dropped_is_found() {
    planted(Mistake::EagainDropped).fails_with("hang");
}

#[test]
fn mistake_no_wake_after_unmap_is_found() {
    Scenario {
        owner: &[&[TouchIfMapped(0)], &[Unmap(0, 1), Touch(1)]],
        mistake: Some(Mistake::NoWakeAfterUnmap),
        ..Scenario::default()
    }
    .fails_with("hang");
}

#[test]
fn mistake_present_before_copy_is_found() {
    planted(Mistake::PresentBeforeCopy).fails_with("wrong byte");
}

#[test]
fn mistake_remove_after_faults_is_found() {
    planted(Mistake::RemoveAfterFaults).fails_with("wrong byte");
}

#[test]
fn mistake_cut_marks_one_page_more_is_found() {
    Scenario {
        owner: PAGES_BEHIND_THE_CUT,
        prefetchers: 1,
        cuts: 2,
        mistake: Some(Mistake::CutMarksOneMore),
        ..Scenario::default()
    }
    .fails_with("wrong byte");
}

#[test]
fn mistake_no_wake_after_unregister_is_found() {
    Scenario {
        owner: FAULTS_AT_THE_END,
        completes: true,
        mistake: Some(Mistake::NoWakeAfterUnregister),
        ..Scenario::default()
    }
    .fails_with("hang");
}
