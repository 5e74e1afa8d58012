//! Restores of synthetic images in different orders, compared page by page with the source.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{Restore, Restored, StopMode};
use snaprestore_fixtures::images::Mix;
use snapshot_format::{MemoryStore, Page, Reason, RegionSpec, Snapshot, Writer, WriterOptions};

use crate::common::wait_until;

const PAGE: usize = 4096;
/// Number of pages in the image: 32 MiB.
const PAGES: u64 = 8192;
/// The first page of its second region.
const SPLIT: u64 = 3000;

/// Returns a snapshot of `image` in two regions.
fn snapshot(image: &Mix) -> Arc<Snapshot> {
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    let bytes = image.bytes();
    let (low, high) = bytes.split_at(usize::try_from(SPLIT).unwrap() * PAGE);
    for (start, part) in [(0, low), (1 << 32, high)] {
        let region = RegionSpec {
            start,
            ..RegionSpec::default()
        };
        writer.begin_region(&region).unwrap();
        writer.write_pages(part).unwrap();
    }
    let (file, _) = writer.finish().unwrap();
    Arc::new(Snapshot::open(Arc::new(MemoryStore::new(file))).unwrap())
}

/// Returns the page from the restored memory; reading it is the touch.
fn touch(restored: &Restored, page: u64) -> [u8; PAGE] {
    let (region, first) = if page < SPLIT { (0, 0) } else { (1, SPLIT) };
    let region = &restored.regions()[region];
    assert!((page - first) * 4096 < region.len());
    // SAFETY: the page is inside the region's mapping, which lives as long as `restored`. Before
    // this read can see the page, only the engine writes to it.
    unsafe {
        let at = region
            .as_ptr()
            .add(usize::try_from(page - first).unwrap() * PAGE);
        at.cast::<[u8; PAGE]>().read_volatile()
    }
}

fn compare(restored: &Restored, image: &Mix, pages: impl Iterator<Item = u64>) {
    for page in pages {
        assert!(touch(restored, page) == image.page(page), "page {page}");
    }
}

/// Returns every number below `n` once, in an order without pattern.
fn shuffled(n: u64) -> impl Iterator<Item = u64> {
    // 4099 is prime and not a factor of n, so the steps reach all numbers.
    assert!(!n.is_multiple_of(4099));
    (0..n).map(move |i| i * 4099 % n)
}

#[test]
fn every_order_gives_the_source() {
    let image = Mix::new(PAGES, 1);
    let snapshot = snapshot(&image);
    for prefetch in [Prefetch::Off, Prefetch::WorkingSet, Prefetch::All] {
        for fault_threads in [1, 4] {
            let start = || {
                Restore::new(Arc::clone(&snapshot))
                    .prefetch(prefetch.clone())
                    .fault_threads(fault_threads)
                    .start()
                    .unwrap()
            };
            compare(&start(), &image, 0..PAGES);
            compare(&start(), &image, shuffled(PAGES));
            let restored = start();
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (restored, image) = (&restored, &image);
                    scope.spawn(move || compare(restored, image, shuffled(PAGES).skip(thread)));
                }
            });
        }
    }
}

#[test]
fn prefetch_all_completes_without_touches() {
    let image = Mix::new(PAGES, 2);
    let restored = Restore::new(snapshot(&image))
        .prefetch(Prefetch::All)
        .huge_pages(true)
        .start()
        .unwrap();
    assert!(restored.wait_complete());
    let before = restored.stats();
    assert_eq!(before.faults, 0);
    assert!(before.complete.is_some());
    compare(&restored, &image, 0..PAGES);
    assert_eq!(restored.stats().faults, 0);
    assert_eq!(restored.failures().len(), 0);
}

#[test]
fn touching_everything_completes() {
    let image = Mix::new(PAGES, 3);
    let restored = Restore::new(snapshot(&image)).start().unwrap();
    compare(&restored, &image, 0..PAGES);
    assert!(restored.wait_complete());
}

#[test]
fn stop_completes() {
    let image = Mix::new(PAGES, 4);
    let mut restored = Restore::new(snapshot(&image)).start().unwrap();
    compare(&restored, &image, 100..110);
    restored.stop(StopMode::Complete).unwrap();
    assert!(restored.is_complete());
    compare(&restored, &image, 0..PAGES);
}

#[test]
fn stop_makes_missing_pages_inaccessible() {
    let image = Mix::new(PAGES, 5);
    let mut restored = Restore::new(snapshot(&image)).start().unwrap();
    let page = (0..SPLIT).find(|page| image.page(*page)[0] != 0).unwrap();
    compare(&restored, &image, page..=page);
    restored.stop(StopMode::Inaccessible).unwrap();
    compare(&restored, &image, page..=page);
    let mut bytes = [0; PAGE];
    let unreadable = (0..SPLIT)
        .filter(|page| restored.read_at(0, page * 4096, &mut bytes).is_err())
        .count();
    assert!(unreadable > 1000, "{unreadable} pages are inaccessible");
}

#[test]
fn read_at_restores_missing_pages() {
    let image = Mix::new(PAGES, 6);
    let restored = Restore::new(snapshot(&image)).start().unwrap();
    let mut bytes = vec![0; 3 * PAGE];
    restored.read_at(1, 4096 * 7, &mut bytes).unwrap();
    for (i, page) in (0..).zip(bytes.chunks(PAGE)) {
        assert!(page == image.page(SPLIT + 7 + i));
    }
    assert!(restored.read_at(2, 0, &mut bytes).is_err());
    assert!(restored.read_at(1, u64::MAX - 5, &mut bytes).is_err());
}

#[test]
fn first_touches_are_observed_in_order() {
    let image = Mix::new(PAGES, 7);
    let snapshot = snapshot(&image);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let restored = Restore::new(Arc::clone(&snapshot))
        .fault_threads(1)
        .on_first_touch(move |page| log.lock().unwrap().push(page))
        .start()
        .unwrap();
    let region = snapshot.regions()[1].clone();
    let wanted = [4000, 3000, 8000, 6000];
    for page in wanted {
        compare(&restored, &image, std::iter::once(page));
        // The page is there before the observer is called.
        wait_until("the observer was called", || {
            let stats = restored.stats();
            stats.fault_time.count == stats.faults
        });
    }
    let numbers: Vec<u64> = wanted
        .iter()
        .map(|page| region.first_page + page - SPLIT)
        .collect();
    let seen = seen.lock().unwrap().clone();
    let in_order: Vec<u64> = numbers
        .into_iter()
        .filter(|page| seen.contains(page))
        .collect();
    assert_eq!(seen, in_order);
    assert!(!seen.is_empty());
}

/// Discards `pages` of the first region, as a balloon does.
fn discard(restored: &Restored, pages: Range<usize>) {
    let region = &restored.regions()[0];
    // SAFETY: the range is inside the region, and its content is read only as bytes.
    let result = unsafe {
        let start = region.as_ptr().add(pages.start * PAGE);
        libc::madvise(start.cast(), pages.len() * PAGE, libc::MADV_DONTNEED)
    };
    assert_eq!(result, 0);
}

#[test]
fn discarded_pages_stay_zero_during_prefetch() {
    let image = Mix::new(PAGES, 8);
    let snapshot = snapshot(&image);
    for round in 0..20 {
        let restored = Restore::new(Arc::clone(&snapshot))
            .prefetch(Prefetch::All)
            .leave_zero_runs(round % 2 == 0)
            .start()
            .unwrap();
        for start in (0..2900_usize).step_by(100) {
            discard(&restored, start..start + 50);
            for page in start as u64..start as u64 + 100 {
                let found = touch(&restored, page);
                if page < start as u64 + 50 {
                    assert!(found == [0; PAGE], "page {page} came back");
                } else {
                    assert!(found == image.page(page), "page {page}");
                }
            }
        }
    }
}

#[test]
fn threads_are_named_and_exit() {
    let image = Mix::new(PAGES, 9);
    let named = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&named);
    let restored = Restore::new(snapshot(&image))
        .prefetch(Prefetch::All)
        .prefetch_threads(2)
        .on_thread_start(move |name| {
            assert_eq!(std::thread::current().name(), Some(name));
            assert!(name.starts_with("snap-"));
            count.fetch_add(1, Relaxed);
        })
        .start()
        .unwrap();
    restored.wait_complete();
    drop(restored);
    assert_eq!(named.load(Relaxed), 2 + 2);
}

#[test]
fn prefetch_loads_the_requested_pages() {
    let image = Mix::new(PAGES, 11);
    let restored = Restore::new(snapshot(&image))
        .prefetch(Prefetch::Pages(vec![700..900, 0..10]))
        .leave_zero_runs(false)
        .start()
        .unwrap();
    assert!(!restored.wait_complete());
    compare(&restored, &image, (700..900).chain(0..10));
    assert_eq!(restored.stats().faults, 0);
}

fn golden(name: &str) -> Arc<Snapshot> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/golden/v1/");
    Arc::new(Snapshot::open_path(format!("{path}{name}")).unwrap())
}

/// Regression test: a region may have no pages. `mmap` refused its length of 0, and the whole
/// restore failed.
#[test]
fn empty_region_has_no_memory() {
    let restored = Restore::new(golden("good-several-regions.snap")).prefetch(Prefetch::All);
    let restored = restored.start().unwrap();
    assert!(restored.wait_complete());
    assert_eq!(restored.regions()[3].len(), 0);
    let mut page = [0; PAGE];
    restored.read_at(4, 0, &mut page).unwrap();
    assert!(page.starts_with(b"page 3 of a golden file"));
}

/// Regression test: a run of zeros that falsely covers stored pages, with a good checksum, left
/// these pages to the kernel, which made them zero. The index determines what is restored.
#[test]
fn wrong_fill_run_makes_no_zeros() {
    let snapshot = golden("bad-fill-run.snap");
    assert!(snapshot.fill_runs().is_err(), "the run is a lie");
    let restored = Restore::new(Arc::clone(&snapshot)).start().unwrap();
    let mut bytes = [0; PAGE];
    let mut stored = 0;
    for page in 0..snapshot.regions()[0].pages {
        if let Page::Stored { .. } = snapshot.look_up(page, Reason::Verify).unwrap() {
            restored.read_at(0, page * 4096, &mut bytes).unwrap();
            assert!(bytes.starts_with(b"page "), "page {page}");
            stored += 1;
        }
    }
    assert!(stored > 0);
}

/// Frames falsely list pages of other frames, or fills, with good checksums. Decoding such a frame
/// for one page must not install any page that the index places elsewhere.
#[test]
fn wrong_page_list_loads_no_page() {
    for name in [
        "bad-list-names-pages-of-other-frames.snap",
        "bad-list-disagrees.snap",
    ] {
        let read_all = |name: &str| -> Vec<Option<[u8; PAGE]>> {
            let snapshot = golden(name);
            let pages = snapshot.regions()[0].pages;
            let restored = Restore::new(snapshot)
                .prefetch(Prefetch::Off)
                .start()
                .unwrap();
            // The first touch decodes the false frame. It is finished before the next touch begins.
            (0..pages)
                .map(|page| {
                    let mut bytes = [0; PAGE];
                    let read = restored.read_at(0, page * 4096, &mut bytes);
                    read.is_ok().then_some(bytes)
                })
                .collect()
        };
        let (good, bad) = (read_all("good-raw-index.snap"), read_all(name));
        assert!(good[512].unwrap().starts_with(b"page 512 of a golden file"));
        assert!(good[100].unwrap() == [0; PAGE]);
        for (page, (good, bad)) in good.iter().zip(&bad).enumerate() {
            assert!(good == bad, "{name}: page {page} is another");
        }
    }
}
