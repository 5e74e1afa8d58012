//! Many restores in one process: shared resources, total cost, and leftovers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::available_parallelism;

use snaprestore_engine::restore::{Restore, Restored};
use snaprestore_engine::{Prefetch, Shared};
use snaprestore_fixtures::host::told;
use snapshot_format::{Reason, Snapshot};

use crate::common::{
    Gate, PAGE, address, compare, in_child, open, open_hooked, pack, peek, random_bytes, source,
    wait_until, within,
};

const RESTORES: usize = 300;
const PAGES: u64 = 128;
/// Maximum memory in bytes that they take together beyond their content.
const MAX_OVERHEAD: u64 = 64 << 20;
/// Maximum memory in bytes that the allocator may keep after they are gone.
const MAX_LEFT: u64 = 24 << 20;
/// Maximum memory in bytes that may still be allocated then.
const MAX_ALLOCATED: u64 = 2 << 20;

/// Returns a snapshot whose prefetch reads wait at the gate.
fn gated(bytes: &[u8], gate: &Gate) -> Arc<Snapshot> {
    let held = gate.clone();
    open_hooked(pack(bytes, 32), move |_, _, reason| {
        if reason == Reason::Prefetch {
            held.pass();
        }
        Ok(())
    })
}

fn start(snapshot: &Arc<Snapshot>) -> Restored {
    Restore::new(Arc::clone(snapshot))
        .prefetch(Prefetch::All)
        .start()
        .unwrap()
}

/// Returns the number of threads of this process whose name has this prefix.
fn threads(prefix: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // A thread that exits meanwhile no longer has a name.
    let names = tasks.filter_map(|task| {
        let path = task.ok()?.path().join("comm");
        std::fs::read_to_string(path).ok()
    });
    names.filter(|name| name.starts_with(prefix)).count()
}

fn entries(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

/// Returns the private resident memory of this process in bytes.
fn resident() -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.trim().parse::<u64>().unwrap() << 10
}

/// Returns the number of bytes that this process has allocated and not freed.
#[cfg(target_env = "gnu")]
fn allocated() -> u64 {
    // SAFETY: takes no pointer, and any thread may call it at any time.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}

/// Other allocators don't report this.
#[cfg(not(target_env = "gnu"))]
fn allocated() -> u64 {
    0
}

#[test]
fn three_hundred_restores_share_one_pool() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 1);
        // Make the one-time allocations of the process now.
        assert!(start(&open(pack(&bytes, 32))).wait_complete());
        let gate = Gate::default();
        let snapshot = gated(&bytes, &gate);
        let cores = available_parallelism().unwrap().get();
        let (all, descriptors, before) = (threads(""), entries("/proc/self/fd"), resident());
        let allocated_before = allocated();

        let opener = gate.opener();
        let restores: Vec<_> = (0..RESTORES).map(|_| start(&snapshot)).collect();
        wait_until("the pool's threads wait in reads", || {
            gate.waiting() >= cores
        });
        wait_until("all fault threads run", || {
            threads("snap-fault") == 2 * RESTORES
        });
        assert!(
            threads("snap-fetch") <= 2 * cores,
            "{}",
            threads("snap-fetch")
        );
        assert!(threads("snap-") <= 2 * RESTORES + 2 * cores);
        // Each has served a fault.
        for restored in &restores {
            compare(restored, &bytes, [PAGES - 1]);
        }
        let content = RESTORES as u64 * PAGES * PAGE as u64;
        let running = resident() - before;
        drop(opener);
        for restored in &restores {
            assert!(restored.wait_complete());
            compare(restored, &bytes, [0, PAGES / 2]);
        }
        let complete = resident() - before;
        told(&format_args!(
            "{RESTORES} restores of {} MiB: {} MiB while they run, {} MiB when all is there",
            content >> 20,
            running >> 20,
            complete >> 20
        ));
        assert!(running <= content + MAX_OVERHEAD, "{running}");
        assert!(complete <= content + MAX_OVERHEAD, "{complete}");

        drop(restores);
        drop(snapshot);
        // Some threads of the snapshot's writer may have been exiting at the time of the count.
        assert!(threads("") <= all, "threads");
        assert_eq!(entries("/proc/self/fd"), descriptors, "descriptors");
        let left = resident().saturating_sub(before);
        let allocated = allocated().saturating_sub(allocated_before);
        told(&format_args!(
            "{} KiB are left of them, {} KiB allocated",
            left >> 10,
            allocated >> 10
        ));
        assert!(left <= MAX_LEFT, "{left} bytes are left");
        assert!(allocated <= MAX_ALLOCATED, "{allocated} bytes are kept");
    })
    .expect_success();
}

/// A session whose prefetch is blocked occupies at most as many threads as it may use. The prefetch
/// of another session proceeds.
#[test]
fn blocked_prefetch_does_not_stop_that_of_other_sessions() {
    let gate = Gate::default();
    let bytes = random_bytes(2048, 2);
    let shared = Shared::new(0);
    let start = |snapshot| {
        Restore::new(snapshot)
            .prefetch(Prefetch::All)
            .prefetch_threads(2)
            .shared(&shared)
            .start()
            .unwrap()
    };
    let _blocked = start(gated(&bytes, &gate));
    let _opener = gate.opener();
    wait_until("its threads wait", || gate.waiting() == 2);
    let other = start(open(pack(&bytes, 32)));
    let other = within("the other is complete", move || {
        assert!(other.wait_complete());
        other
    });
    compare(&other, &bytes, 0..2048);
}

/// Sessions of several snapshots borrow the same contexts: none is served with frames that another
/// has decoded.
#[test]
fn contexts_used_by_several_snapshots_stay_separate() {
    const PAGES: u64 = 512;
    let shared = Shared::new(0);
    let images: Vec<_> = (0..12)
        .map(|seed| {
            // Frames of all snapshots have the same offsets and lengths, or different ones.
            let bytes = random_bytes(PAGES, 10 + seed);
            let snapshot = open(pack(&bytes, [32, 8, 16][seed as usize % 3]));
            (bytes, snapshot)
        })
        .collect();
    let restores: Vec<_> = images
        .iter()
        .map(|(_, snapshot)| {
            Restore::new(Arc::clone(snapshot))
                .shared(&shared)
                .start()
                .unwrap()
        })
        .collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (images, restores) = (&images, &restores);
            scope.spawn(move || {
                for page in (thread..PAGES).step_by(4) {
                    for (restored, (bytes, _)) in restores.iter().zip(images) {
                        let page = (page * 37) % PAGES;
                        assert!(peek(address(restored, page)) == source(bytes, page));
                    }
                }
            });
        }
    });
}

/// A session's own hook is called in all of its threads, a hook of `Shared` only in those of the
/// pool.
#[test]
fn hooks_run_only_in_their_own_threads() {
    let bytes = random_bytes(512, 3);
    let own = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let of_pool = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let notes = |[fault, fetch]: &[Arc<AtomicBool>; 2]| {
        let (fault, fetch) = (Arc::clone(fault), Arc::clone(fetch));
        move |name: &str| {
            fault.fetch_or(name.starts_with("snap-fault"), SeqCst);
            fetch.fetch_or(name.starts_with("snap-fetch"), SeqCst);
        }
    };
    let seen = |hooks: &[Arc<AtomicBool>; 2]| [0, 1].map(|at| hooks[at].swap(false, SeqCst));
    let snapshot = open(pack(&bytes, 8));
    let restore = || {
        Restore::new(Arc::clone(&snapshot))
            .prefetch(Prefetch::All)
            .on_thread_start(notes(&own))
    };
    assert!(restore().start().unwrap().wait_complete());
    assert_eq!((seen(&own), seen(&of_pool)), ([true, true], [false, false]));
    let shared = Shared::new(0).on_thread_start(notes(&of_pool));
    assert!(restore().shared(&shared).start().unwrap().wait_complete());
    assert_eq!((seen(&own), seen(&of_pool)), ([true, false], [false, true]));
}
