//! The engine's threads: the system calls that they make, and the signals that they block.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use seccompiler::{BpfProgram, TargetArch, apply_filter, compile_from_json};
use snaprestore_engine::restore::{OnFailure, Prefetch, Restore, SYSTEM_CALLS, Verdict};
use snapshot_format::Snapshot;

use crate::common::{
    PAGE, compare, damaged, frame_of, in_child, open, pack, pages_of_frame, random_bytes, source,
};

const PAGES: u64 = 4096;

/// A filter that allows `allowed` and ends the process otherwise.
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

/// Restores with all that the engine can do, each of its threads confined to `allowed`.
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
    let ask = OnFailure::Ask(Arc::new(|_| Verdict::Poison));
    for (prefetch, on_failure) in [
        (Prefetch::Off, OnFailure::Poison),
        (Prefetch::All, OnFailure::Poison),
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
            // Something to read between faults, from several threads.
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
        // And one that is given up.
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

/// The filter is one: without a call that every fault needs the process is ended.
#[test]
fn another_system_call_ends_the_process() {
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

#[test]
fn engine_threads_block_every_signal() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 2);
        let restored = Restore::new(open(pack(&bytes, 8)))
            .fault_threads(2)
            .prefetch(Prefetch::All)
            .prefetch_threads(2)
            .prefetch_bandwidth(1 << 20)
            .on_failure(OnFailure::Ask(Arc::new(|_| Verdict::Poison)))
            .start()
            .unwrap();
        compare(&restored, &bytes, 0..64);
        let mut blocked = BTreeMap::new();
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let folder = task.unwrap().path();
            let name = std::fs::read_to_string(folder.join("comm")).unwrap();
            let status = std::fs::read_to_string(folder.join("status")).unwrap();
            let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
            let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
            if name.starts_with("snap-") {
                blocked.insert(name.trim().to_owned(), mask);
            } else {
                assert_eq!(mask, 0, "{name}: the caller's own mask is as it was");
            }
        }
        let names: Vec<&str> = blocked.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "snap-ask",
                "snap-fault-0",
                "snap-fault-1",
                "snap-feed",
                "snap-fetch-0",
                "snap-fetch-1"
            ]
        );
        // KILL and STOP can't be blocked; 32 and 33 are the C library's own, which it doesn't let anybody block.
        let cannot = [libc::SIGKILL, libc::SIGSTOP, 32, 33]
            .into_iter()
            .fold(0_u64, |mask, signal| mask | 1 << (signal - 1));
        for (name, mask) in blocked {
            assert_eq!(mask | cannot, u64::MAX, "{name}: {mask:x}");
        }
    })
    .expect_success();
}
