//! Resources that sessions of one process share.

use std::sync::Arc;

use snaprestore_engine::pager::{Pager, SessionEnd};
use snaprestore_engine::stats::Stats;
use snaprestore_engine::{Prefetch, Shared};
use snapshot_format::Snapshot;

use crate::common::{damaged, frame_of, open, pack, random_bytes};
use crate::owner::{Owner, mixed};
use crate::uffd_support::Ended;
use crate::{PAGES, REGIONS};

/// Size of a cache with room for everything.
const PLENTY: u64 = 256 << 20;

/// Serves an owner that compares all of its memory, until the owner has exited.
fn serve(
    snapshot: &Arc<Snapshot>,
    bytes: &Arc<Vec<u8>>,
    prefetch: Prefetch,
    shared: &Shared,
) -> (Ended, SessionEnd, Stats) {
    let expected = Arc::clone(bytes);
    let owner = Owner::start(&REGIONS, move |memory| {
        memory.compare_in_threads(&expected, 2)
    });
    let paged = Pager::new(Arc::clone(snapshot))
        .prefetch(prefetch)
        .shared(shared)
        .attach(owner.handover())
        .unwrap();
    let ended = owner.child.wait();
    (ended, paged.wait(), paged.stats())
}

#[test]
fn second_session_reuses_decoded_frames() {
    let bytes = Arc::new(mixed(PAGES));
    let snapshot = open(pack(&bytes, 32));
    let shared = Shared::new(PLENTY);
    for session in 0..2 {
        let (ended, _, stats) = serve(&snapshot, &bytes, Prefetch::Off, &shared);
        assert_eq!(ended, Ended::Exit(0));
        assert!(stats.bytes_decoded > 0);
        // The first session may have been the only one.
        assert_eq!(shared.frame_cache().frames > 0, session > 0);
    }
    let (ended, _, third) = serve(&snapshot, &bytes, Prefetch::Off, &shared);
    assert_eq!(ended, Ended::Exit(0));
    assert_eq!((third.bytes_read, third.bytes_decoded), (0, 0));
    let cache = shared.frame_cache();
    assert!(cache.hits > 0 && cache.frames > 0 && cache.bytes <= PLENTY);
    // Without anything shared.
    let (ended, _, alone) = serve(&snapshot, &bytes, Prefetch::Off, &Shared::new(0));
    assert_eq!(ended, Ended::Exit(0));
    assert!(alone.bytes_decoded > 0);
}

/// More sessions than cores prefetch at the same time, in turn, and wait for each other's frames.
#[test]
fn concurrent_sessions_all_read_the_source() {
    let bytes = Arc::new(mixed(PAGES));
    let snapshot = open(pack(&bytes, 32));
    for room in [PLENTY, 2 << 20] {
        let shared = Shared::new(room);
        std::thread::scope(|scope| {
            let sessions: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| serve(&snapshot, &bytes, Prefetch::All, &shared)))
                .collect();
            for session in sessions {
                let (ended, ending, stats) = session.join().unwrap();
                assert_eq!(ended, Ended::Exit(0));
                assert!(matches!(ending, SessionEnd::Complete | SessionEnd::Exited));
                assert_eq!(stats.failures, 0);
            }
        });
        let cache = shared.frame_cache();
        assert!(cache.bytes <= room, "{cache:?}");
        assert_eq!(cache.evictions > 0, room < PLENTY, "{cache:?}");
    }
}

/// Both files claim the same ID, and their indexes say the same about the frame.
#[test]
fn damaged_and_good_file_share_no_frames() {
    let bytes = Arc::new(random_bytes(PAGES, 7));
    let file = pack(&bytes, 32);
    let good = open(file.clone());
    let bad = open(damaged(file, &frame_of(&good, 700)));
    assert_eq!(good.id(), bad.id());
    let shared = Shared::new(PLENTY);
    for _ in 0..3 {
        let (ended, ..) = serve(&good, &bytes, Prefetch::Off, &shared);
        assert_eq!(ended, Ended::Exit(0));
        let (ended, ending, _) = serve(&bad, &bytes, Prefetch::Off, &shared);
        assert_eq!(ended, Ended::Signal(libc::SIGKILL));
        assert!(matches!(ending, SessionEnd::Killed(_)), "{ending:?}");
    }
}

#[test]
fn frames_of_a_closed_snapshot_are_dropped() {
    let bytes = Arc::new(mixed(PAGES));
    let snapshot = open(pack(&bytes, 32));
    let shared = Shared::new(PLENTY);
    for _ in 0..2 {
        serve(&snapshot, &bytes, Prefetch::Off, &shared);
    }
    shared.forget_closed();
    assert!(shared.frame_cache().frames > 0);
    drop(snapshot);
    shared.forget_closed();
    let cache = shared.frame_cache();
    assert_eq!((cache.frames, cache.bytes), (0, 0));
}
