//! Life cycle of restores: starting, ending, and doing so often.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{FailureDecision, FailurePolicy, Restore, StopMode};
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::{Mix, Shares};
use snapshot_format::{RegionSpec, Snapshot, Writer, WriterOptions};

use crate::common::{
    Gate, PAGE, address, compare, in_child, index, open, open_hooked, pack, peek, random_bytes,
    source, wait_until,
};

#[test]
fn two_concurrent_restores_of_one_snapshot() {
    const PAGES: u64 = 2048;
    let bytes = random_bytes(PAGES, 1);
    let snapshot = open(pack(&bytes, 8));
    let start = |prefetch| {
        Restore::new(Arc::clone(&snapshot))
            .prefetch(prefetch)
            .start()
            .unwrap()
    };
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let (one, other) = (start(prefetch.clone()), start(prefetch));
        std::thread::scope(|scope| {
            for restored in [&one, &other] {
                let bytes = &bytes;
                scope.spawn(move || compare(restored, bytes, (0..PAGES).rev()));
            }
        });
        drop(one);
        compare(&other, &bytes, 0..PAGES);
    }
}

/// A thread waits for a page while the restore is dropped: it gets SIGSEGV. Closing first would
/// have shown it zeros.
#[test]
fn dropping_never_shows_zeros_to_waiters() {
    let ended = in_child(|| {
        let bytes = random_bytes(64, 2);
        let gate = Gate::default();
        let held = gate.clone();
        let file = pack(&bytes, 8);
        let restored = Restore::new(open_hooked(file, move |_, _, reason| {
            if reason == snapshot_format::Reason::Demand {
                held.pass();
                return Err(std::io::Error::other("gone"));
            }
            Ok(())
        }))
        .fault_threads(1)
        .retry_timeout(Duration::ZERO)
        .on_failure(snaprestore_engine::restore::FailurePolicy::Ask(Arc::new(
            |_| snaprestore_engine::restore::FailureDecision::Retry,
        )))
        .start()
        .unwrap();
        let page = address(&restored, 20);
        let toucher = std::thread::spawn(move || {
            let seen = peek(page);
            println!("the touch went on with zeros: {}", seen == [0; PAGE]);
        });
        wait_until("the fault is being served", || gate.waiting() == 1);
        let drops = std::thread::spawn(move || drop(restored));
        gate.open();
        drops.join().unwrap();
        toucher.join().unwrap();
    });
    assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended:?}");
    assert!(!ended.output.contains("went on"), "{ended:?}");
}

/// Counters of the threads that have started and of those that have exited. Prefetch threads are
/// slow to exit.
#[derive(Default)]
struct Threads {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

struct Ends(Arc<Threads>, Duration);

impl Drop for Ends {
    fn drop(&mut self) {
        std::thread::sleep(self.1);
        self.0.ended.fetch_add(1, SeqCst);
    }
}

thread_local! {
    static ENDS: RefCell<Option<Ends>> = const { RefCell::new(None) };
}

/// When a restore was dropped, or completed by a stop, its threads have exited, and are not merely
/// about to exit.
#[test]
fn dropping_waits_for_every_thread() {
    let bytes = random_bytes(512, 5);
    let snapshot = open(pack(&bytes, 8));
    for complete in [false, true] {
        let threads = Arc::new(Threads::default());
        let counted = Arc::clone(&threads);
        let mut restored = Restore::new(Arc::clone(&snapshot))
            .prefetch(Prefetch::All)
            .prefetch_threads(3)
            .on_failure(FailurePolicy::Ask(Arc::new(|_| FailureDecision::Poison)))
            // Prefetch has not finished before it is ended.
            .prefetch_bandwidth(1)
            .on_thread_start(move |name| {
                counted.begun.fetch_add(1, SeqCst);
                let slow = u64::from(name.starts_with("snap-fetch"));
                let ends = Ends(Arc::clone(&counted), Duration::from_millis(300 * slow));
                ENDS.with_borrow_mut(|slot| *slot = Some(ends));
            })
            .start()
            .unwrap();
        wait_until("all threads run", || threads.begun.load(SeqCst) == 6);
        if complete {
            restored.stop(StopMode::Complete).unwrap();
        } else {
            drop(restored);
        }
        assert_eq!(threads.ended.load(SeqCst), 6, "complete: {complete}");
    }
}

/// Returns the number of entries in a folder of /proc.
fn entries(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

/// Returns the number of mappings of this process.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

#[test]
fn fifty_restores_leak_nothing() {
    in_child(|| {
        let bytes = random_bytes(512, 3);
        let snapshot = open(pack(&bytes, 8));
        let round = |i: u64| {
            let prefetch = [Prefetch::Off, Prefetch::All][index(i % 2)].clone();
            let restored = Restore::new(Arc::clone(&snapshot))
                .prefetch(prefetch)
                .start()
                .unwrap();
            // Some are complete, some are dropped halfway.
            compare(&restored, &bytes, 0..[5, 512][index(i / 2 % 2)]);
        };
        // One-time allocations of the process have been made by now.
        let threads = entries("/proc/self/task");
        let all_ended = || entries("/proc/self/task") <= threads;
        (0..4).for_each(round);
        // The threads of a pool exit by themselves, soon.
        wait_until("all threads have ended", all_ended);
        let (descriptors, mapped) = (entries("/proc/self/fd"), mappings());
        (0..50).for_each(round);
        wait_until("all threads have ended", all_ended);
        assert_eq!(entries("/proc/self/fd"), descriptors);
        // The allocator keeps some of the threads' memory.
        assert!(mappings() < mapped + 20, "{mapped} -> {}", mappings());
    })
    .expect_success();
}

/// Returns a snapshot of `gib` GiB, most of which repeats 8 MiB with all kinds of pages.
fn large(gib: u64) -> (Arc<Snapshot>, Mix) {
    let part = Mix::with_shares(2048, 4, Shares::MIXED);
    let bytes = part.bytes();
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    // 32 MiB of every GiB are that part, the rest is fills of two kinds.
    for _ in 0..gib {
        for _ in 0..4 {
            writer.write_pages(&bytes).unwrap();
        }
        writer.write_fill(120 * 1024, 0).unwrap();
        writer
            .write_fill(128 * 1024 + 4 * 1024 - 4 * 2048, u64::MAX)
            .unwrap();
        writer.write_fill(4 * 1024, 0).unwrap();
    }
    (open(writer.finish().unwrap().0), part)
}

/// For information: the time until memory can be used.
#[test]
fn start_times() {
    for gib in [1, 64] {
        let (snapshot, part) = large(gib);
        assert_eq!(snapshot.summary().pages, gib << 18);
        let mut times: Vec<_> = (0..7)
            .map(|_| {
                let begun = Instant::now();
                let restored = Restore::new(Arc::clone(&snapshot)).start().unwrap();
                let started = begun.elapsed();
                let last = (gib - 1) << 18;
                assert!(peek(address(&restored, last + 77)) == part.page(77));
                assert!(peek(address(&restored, last + (1 << 18) - 1)) == [0; PAGE]);
                assert!(peek(address(&restored, last + 200_000)) == [0xff; PAGE]);
                started
            })
            .collect();
        times.sort_unstable();
        println!(
            "start of {gib} GiB: fastest {:?}, median {:?}, slowest {:?}",
            times[0], times[3], times[6]
        );
    }
}

/// Regression test: regions in mappings of their own, given by the caller. The mappings of the
/// process were read again for each region, and ten thousand took a minute.
#[test]
fn ten_thousand_given_regions_start_at_once() {
    const REGIONS: usize = 10_000;
    in_child(|| {
        let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
        for region in 0..REGIONS as u64 {
            let spec = RegionSpec {
                start: region << 13,
                ..RegionSpec::default()
            };
            writer.begin_region(&spec).unwrap();
            writer.write_fill(1, region + 1).unwrap();
        }
        let snapshot = open(writer.finish().unwrap().0);
        let places = crate::owner::own_apart(REGIONS);
        let mut restore = Restore::new(Arc::clone(&snapshot));
        // In no particular order.
        for (index, memory) in places.into_iter().enumerate() {
            restore = restore.region(index * 7919 % REGIONS, memory);
        }
        let begun = Instant::now();
        let mut restored = restore.start().unwrap();
        let started = begun.elapsed();
        println!("start of {REGIONS} given regions: {started:?}");
        assert!(started < Duration::from_secs(10), "{started:?}");
        restored.stop(StopMode::Complete).unwrap();
        println!("complete after {:?}", begun.elapsed());
        for (region, n) in restored.regions().iter().zip(1_u64..) {
            assert_eq!(
                peek(region.as_ptr().expose_provenance())[..8],
                n.to_le_bytes()
            );
        }
    })
    .expect_success();
}

/// The kernel returns ENOMEM, on a machine that has memory.
#[test]
fn too_many_regions_error_names_the_limit() {
    let test = "too_many_regions_error_names_the_limit";
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: u64 = limit.trim().parse().unwrap();
    if limit > 200_000 {
        skipped(test, &format!("vm.max_map_count is {limit}"));
        return;
    }
    in_child(|| {
        let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
        for region in 0..limit + 500 {
            let spec = RegionSpec {
                start: 2 * region * PAGE as u64,
                ..RegionSpec::default()
            };
            writer.begin_region(&spec).unwrap();
            writer.write_pages(&random_bytes(1, region)).unwrap();
        }
        let snapshot = open(writer.finish().unwrap().0);
        let error = Restore::new(snapshot).start().unwrap_err();
        let causes = std::iter::successors(std::error::Error::source(&error), |it| it.source());
        let said: String = causes.map(ToString::to_string).collect();
        assert!(said.contains("vm.max_map_count"), "{said}");
    })
    .expect_success();
}

/// Returns the shared memory of this process in KiB, including anonymous memory mapped as shared,
/// in which tables lie.
fn shared_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssShmem"))
        .unwrap();
    line.split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

/// Regression test: page ranges left to the kernel need no memory for their states. They took half
/// a gigabyte for 16 TiB.
#[test]
fn terabyte_of_zeros_allocates_no_tables() {
    const PAGES: u64 = 1 << 28;
    in_child(|| {
        let bytes = random_bytes(512, 7);
        let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
        writer.begin_region(&RegionSpec::default()).unwrap();
        writer.write_pages(&bytes).unwrap();
        writer.write_fill(PAGES - 1024, 0).unwrap();
        writer.write_pages(&bytes).unwrap();
        let snapshot = open(writer.finish().unwrap().0);
        let before = shared_kib();
        let begun = Instant::now();
        let mut restored = Restore::new(snapshot)
            .prefetch(Prefetch::All)
            .start()
            .unwrap();
        println!("start of a sparse TiB: {:?}", begun.elapsed());
        compare(&restored, &bytes, 0..512);
        assert!(peek(address(&restored, PAGES - 1)) == source(&bytes, 511));
        assert!(peek(address(&restored, PAGES / 2)) == [0; PAGE]);
        restored.stop(StopMode::Complete).unwrap();
        let grown = shared_kib() - before;
        assert!(grown < 4096, "{grown} KiB");
    })
    .expect_success();
}

/// If the process may not have more memory (`RLIMIT_DATA`), starting is an error, and does not kill
/// the process.
#[test]
fn start_without_memory_returns_error() {
    in_child(|| {
        let bytes = random_bytes(4096, 8);
        let snapshot = open(pack(&bytes, 8));
        let limit = |soft: u64| {
            let limit = libc::rlimit {
                rlim_cur: soft,
                rlim_max: libc::RLIM_INFINITY,
            };
            // SAFETY: the pointer is to a live rlimit.
            let set = unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) };
            assert_eq!(set, 0);
        };
        let data = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status
                .lines()
                .find(|line| line.starts_with("VmData"))
                .unwrap();
            line.split_ascii_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u64>()
                .unwrap()
                << 10
        };
        let (mut refused, mut started) = (0, 0);
        for more in (1..64).map(|i| i << 20) {
            println!("{} MiB more", more >> 20);
            let restore = Restore::new(Arc::clone(&snapshot)).prefetch(Prefetch::All);
            limit(data() + more);
            let result = restore.start();
            limit(libc::RLIM_INFINITY);
            match result {
                Ok(restored) => {
                    compare(&restored, &bytes, 0..4096);
                    started += 1;
                }
                Err(error) => {
                    let told = format!("{error:?}");
                    assert!(told.contains("memory"), "{told}");
                    refused += 1;
                }
            }
        }
        println!("refused {refused}, started {started}");
        assert!(refused > 0 && started > 0);
    })
    .expect_success();
}
