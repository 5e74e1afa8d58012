//! Crowds: many threads at once, many threads on one page, many pages with one content.

use std::sync::{Arc, Barrier};

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::Restore;

use crate::common::{
    PAGE, address, compare, frame_of, index, open, pack, pages_of_frame, peek, random_bytes,
    source, within,
};

#[test]
fn sixty_four_threads_fault_at_once_correctly() {
    let bytes = Arc::new(random_bytes(4096, 1));
    let snapshot = open(pack(&bytes, 8));
    for fault_threads in [1, 2, 4] {
        let restored = Restore::new(Arc::clone(&snapshot))
            .fault_threads(fault_threads)
            .start()
            .unwrap();
        let base = address(&restored, 0);
        let start = Arc::new(Barrier::new(64));
        let threads: Vec<_> = (0..64)
            .map(|thread| {
                let (bytes, start) = (Arc::clone(&bytes), Arc::clone(&start));
                std::thread::spawn(move || {
                    start.wait();
                    for i in 0..64 {
                        let page = (i * 64 + thread * 67) % 4096;
                        assert!(
                            peek(base + index(page) * PAGE) == source(&bytes, page),
                            "page {page}"
                        );
                    }
                })
            })
            .collect();
        within("all threads are served", move || {
            for thread in threads {
                thread.join().unwrap();
            }
        });
        compare(&restored, &bytes, 0..4096);
    }
}

#[test]
fn three_hundred_threads_touch_the_same_page() {
    let bytes = Arc::new(random_bytes(64, 2));
    let snapshot = open(pack(&bytes, 8));
    for _ in 0..5 {
        let restored = Restore::new(Arc::clone(&snapshot)).start().unwrap();
        let page = address(&restored, 17);
        let start = Arc::new(Barrier::new(300));
        let threads: Vec<_> = (0..300)
            .map(|_| {
                let (bytes, start) = (Arc::clone(&bytes), Arc::clone(&start));
                std::thread::spawn(move || {
                    start.wait();
                    assert!(peek(page) == source(&bytes, 17));
                })
            })
            .collect();
        within("all threads are served", move || {
            for thread in threads {
                thread.join().unwrap();
            }
        });
        // One frame of eight pages was enough for all.
        assert_eq!(restored.stats().bytes_decoded, 8 * 4096);
    }
}

/// Eight contents are shared by 10,000 pages: a fault must not install them all, and the frame is
/// not decoded for each.
#[test]
fn frame_shared_by_ten_thousand_pages() {
    const PAGES: u64 = 10_000;
    let eight = random_bytes(8, 3);
    let bytes: Vec<u8> = (0..PAGES)
        .flat_map(|page| source(&eight, page * 7 % 8).to_vec())
        .collect();
    let snapshot = open(pack(&bytes, 8));
    let frame = frame_of(&snapshot, 0);
    assert_eq!(
        pages_of_frame(&snapshot, frame.offset()).len() as u64,
        PAGES
    );
    for (prefetch, threads) in [(Prefetch::Off, 1), (Prefetch::Off, 3), (Prefetch::All, 2)] {
        let restored = Restore::new(Arc::clone(&snapshot))
            .fault_threads(threads)
            .prefetch(prefetch)
            .prefetch_threads(2)
            .start()
            .unwrap();
        compare(&restored, &bytes, [PAGES - 1]);
        let stats = restored.stats();
        if stats.prefetch.copied == 0 {
            assert!(stats.demand.copied <= 1 + 4 * 8, "{stats:?}");
        }
        compare(&restored, &bytes, (0..PAGES).rev());
        assert!(restored.wait_complete());
        // Each thread keeps the frames that it has decoded.
        let decoded = restored.stats().bytes_decoded;
        let threads = threads as u64 + 2;
        assert!(decoded <= threads * 8 * 4096, "{decoded}");
    }
}
