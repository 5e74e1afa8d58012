//! Confinement of the engine's threads: the system calls that they make, and the signals that they
//! block.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use seccompiler::{BpfProgram, TargetArch, apply_filter, compile_from_json};
use snaprestore_engine::restore::{FailureDecision, FailurePolicy, Restore};
use snaprestore_engine::{Prefetch, SYSTEM_CALLS};
use snapshot_format::Snapshot;

use crate::common::{
    PAGE, compare, damaged, frame_of, in_child, open, pack, pages_of_frame, random_bytes, source,
};

const PAGES: u64 = 4096;

/// Returns a filter that permits `allowed` and kills the process otherwise.
fn filter(allowed: &[&str]) -> BpfProgram {
    let mut calls = String::new();
    for call in allowed {
        let separator = if calls.is_empty() { "" } else { "," };
        write!(calls, "{separator}{{\"syscall\":\"{call}\"}}").unwrap();
    }
    let json = format!(
        "{{\"engine\":{{\"mismatch_action\":\"kill_process\",\"match_action\":\"allow\",\"filter\":[{calls}]}}}}"
    );
    let arch: TargetArch = std::env::consts::ARCH.try_into().unwrap();
    let mut filters = compile_from_json(json.as_bytes(), arch).unwrap();
    filters.remove("engine").unwrap()
}

/// Restores with all features of the engine, with each of its threads confined to `allowed`.
fn restore_confined(allowed: &[&str]) {
    let program = Arc::new(filter(allowed));
    let bytes = random_bytes(PAGES, 1);
    let file = pack(&bytes, 8);
    let frame = frame_of(&open(file.clone()), 1000);
    let bad = pages_of_frame(&open(file.clone()), frame.offset());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("confined.snap");
    std::fs::write(&path, damaged(file, &frame)).unwrap();
    let snapshot = || Arc::new(Snapshot::open_path(&path).unwrap());
    let ask = FailurePolicy::Ask(Arc::new(|_| FailureDecision::Poison));
    for (prefetch, on_failure) in [
        (Prefetch::Off, FailurePolicy::Poison),
        (Prefetch::All, FailurePolicy::Poison),
        (Prefetch::All, ask),
    ] {
        for bandwidth in [u64::MAX, 64 << 20] {
            let program = Arc::clone(&program);
            let restored = Restore::new(snapshot())
                .fault_threads(2)
                .prefetch(prefetch.clone())
                .prefetch_bandwidth(bandwidth)
                .on_failure(on_failure.clone())
                .huge_pages(true)
                .on_thread_start(move |_| apply_filter(&program).unwrap())
                .start()
                .unwrap();
            // Events to read between faults, from several threads.
            std::thread::scope(|scope| {
                for part in 0..4 {
                    let (restored, bytes, bad) = (&restored, &bytes, &bad);
                    scope.spawn(move || {
                        let pages = (part * 1024..(part + 1) * 1024).rev();
                        compare(restored, bytes, pages.filter(|page| !bad.contains(page)));
                    });
                }
            });
            let mut page = [0; PAGE];
            for bad in &bad {
                assert!(restored.read_at(0, bad * 4096, &mut page).is_err());
            }
            assert!(restored.wait_complete());
            restored.read_at(0, 5 * 4096, &mut page).unwrap();
            assert!(page == source(&bytes, 5));
            drop(restored);
        }
        // A restore that is given up.
        let program = Arc::clone(&program);
        let restored = Restore::new(snapshot())
            .prefetch_bandwidth(1 << 20)
            .prefetch(prefetch)
            .on_failure(on_failure)
            .on_thread_start(move |_| apply_filter(&program).unwrap())
            .start()
            .unwrap();
        compare(&restored, &bytes, 0..10);
    }
}

#[test]
fn engine_threads_make_only_the_listed_system_calls() {
    in_child(|| restore_confined(SYSTEM_CALLS)).expect_success();
}

/// The filter is effective: without a call that every fault needs, the process is killed.
#[test]
fn unlisted_system_call_kills_the_process() {
    let ended = in_child(|| {
        let fewer: Vec<&str> = SYSTEM_CALLS
            .iter()
            .copied()
            .filter(|call| *call != "ioctl")
            .collect();
        restore_confined(&fewer);
    });
    assert_eq!(ended.signal(), Some(libc::SIGSYS), "{ended:?}");
}

/// KILL and STOP; also 32 and 33, which belong to the C library.
const CANNOT_BE_BLOCKED: u64 =
    1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1) | 1 << 31 | 1 << 32;

/// Returns whether a thread with this name is the engine's. Threads of the snapshot's writer may
/// still be exiting.
fn is_engine(name: &str) -> bool {
    name.starts_with("snap-") && !name.starts_with("snap-write")
}

/// Returns the name and the blocked signals of each thread of this process.
fn masks_of_threads() -> Vec<(String, u64)> {
    let mut masks = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let folder = task.unwrap().path();
        let name = std::fs::read_to_string(folder.join("comm")).unwrap();
        let status = std::fs::read_to_string(folder.join("status")).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
        masks.push((name.trim().to_owned(), mask));
    }
    masks
}

#[test]
fn engine_threads_block_every_signal() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 2);
        let restored = Restore::new(open(pack(&bytes, 8)))
            .fault_threads(2)
            .prefetch(Prefetch::All)
            .prefetch_threads(2)
            .prefetch_bandwidth(1 << 20)
            // With a hook, the session has its own prefetch threads.
            .on_thread_start(|_| {})
            .on_failure(FailurePolicy::Ask(Arc::new(|_| FailureDecision::Poison)))
            .start()
            .unwrap();
        compare(&restored, &bytes, 0..64);
        // A thread has its creator's name until it has set its own.
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut masks = masks_of_threads();
        while masks
            .iter()
            .filter(|(name, _)| name.starts_with("snap-"))
            .count()
            < 5
        {
            assert!(Instant::now() < deadline, "{masks:?}");
            std::thread::sleep(Duration::from_millis(1));
            masks = masks_of_threads();
        }
        let mut names = Vec::new();
        for (name, mask) in masks {
            if is_engine(&name) {
                assert_eq!(mask | CANNOT_BE_BLOCKED, u64::MAX, "{name}: {mask:x}");
                names.push(name);
            } else {
                assert_eq!(mask, 0, "{name}: the caller's own mask is as it was");
            }
        }
        names.sort();
        assert_eq!(
            names,
            [
                "snap-ask",
                "snap-fault-0",
                "snap-fault-1",
                "snap-fetch-0",
                "snap-fetch-1"
            ]
        );
    })
    .expect_success();
}
