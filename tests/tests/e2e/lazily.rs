//! The guest's memory restored through the library, by threads that touch, discard and touch again.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{Restore, Restored};
use snaprestore_tests::compare::PAGE;
use snaprestore_tests::real::{can_restore, guest};
use snapshot_format::Snapshot;

use crate::guest::snapshot;

/// Pages that one thread treats as a whole, and that it may discard together.
const RUN: u64 = 16;
const THREADS: u64 = 4;

/// Expected content of the pages of one restore, and their addresses.
struct Owner<'a> {
    restored: &'a Restored,
    raw: &'a File,
}

impl Owner<'_> {
    fn at(&self, page: u64) -> *mut u8 {
        let region = &self.restored.regions()[0];
        let offset = usize::try_from(page).unwrap() * PAGE;
        assert!((offset as u64) < region.len());
        // SAFETY: the offset is inside the region's mapping, as was just asserted.
        unsafe { region.as_ptr().add(offset) }
    }

    /// Reads the page from memory: the read is the touch.
    fn read(&self, page: u64) -> [u8; PAGE] {
        // SAFETY: the page is mapped as long as `restored` lives, and only this thread and the
        // engine write to the pages of this thread's runs.
        unsafe { self.at(page).cast::<[u8; PAGE]>().read_volatile() }
    }

    fn write(&self, page: u64, byte: u8) {
        // SAFETY: as in `read`.
        unsafe { self.at(page).write_volatile(byte) }
    }

    fn discard(&self, page: u64, pages: u64) {
        let len = usize::try_from(pages).unwrap() * PAGE;
        // SAFETY: the pages are of one run of this thread, which holds no reference into them.
        let result = unsafe { libc::madvise(self.at(page).cast(), len, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    fn source(&self, page: u64) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        self.raw
            .read_exact_at(&mut bytes, page * PAGE as u64)
            .unwrap();
        bytes
    }

    /// Visits one run. A tenth of the runs are discarded untouched, a tenth after a touch, a tenth
    /// after a write. Discarded pages read as zeros from then on, and all others as the source.
    fn visit(&self, run: u64, rng: &mut SmallRng) -> u64 {
        let pages = run * RUN..(run + 1) * RUN;
        let source = |page| {
            assert!(
                self.read(page) == self.source(page),
                "page {page} is not the source"
            );
        };
        let zero = |page| {
            assert!(
                self.read(page) == [0; PAGE],
                "page {page} was discarded and is not zero"
            );
        };
        match rng.random_range(0..10) {
            0 => self.discard(pages.start, RUN),
            1 => {
                source(pages.start + rng.random_range(0..RUN));
                self.discard(pages.start, RUN);
            }
            2 => {
                pages.clone().for_each(|page| self.write(page, 0x5a));
                self.discard(pages.start, RUN);
            }
            3 => {
                // Half of a run, so that frames are torn.
                self.discard(pages.start, RUN / 2);
                (pages.start + RUN / 2..pages.end).for_each(source);
                (pages.start..pages.start + RUN / 2).for_each(zero);
                return RUN / 2;
            }
            4 => {
                for page in pages {
                    self.write(page, 0xa5);
                    let mut wanted = self.source(page);
                    wanted[0] = 0xa5;
                    assert!(self.read(page) == wanted, "page {page} after a write");
                }
                return 0;
            }
            _ => {
                pages.for_each(source);
                return 0;
            }
        }
        pages.for_each(zero);
        RUN
    }
}

/// Visits all runs of the guest, distributed over four threads in random order.
fn exercise(restored: &Restored, raw: &File, seed: u64) -> u64 {
    let runs = restored.regions()[0].len() / PAGE as u64 / RUN;
    let mut order: Vec<u64> = (0..runs).collect();
    order.shuffle(&mut SmallRng::seed_from_u64(seed));
    let order = &order;
    let owner = &Owner { restored, raw };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    let mut rng = SmallRng::seed_from_u64(seed ^ (thread << 32));
                    let mine = order.iter().skip(usize::try_from(thread).unwrap());
                    mine.step_by(usize::try_from(THREADS).unwrap())
                        .map(|run| owner.visit(*run, &mut rng))
                        .sum::<u64>()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    })
}

#[test]
fn threads_touch_discard_and_touch_a_guest_again() {
    let name = "threads_touch_discard_and_touch_a_guest_again";
    let (true, Some(image)) = (can_restore(name), guest(name)) else {
        return;
    };
    let snapshot = Arc::new(Snapshot::open_path(snapshot(&image)).unwrap());
    let raw = File::open(&image.raw).unwrap();
    for (seed, prefetch, fault_threads) in [
        (1, Prefetch::Off, 1),
        (2, Prefetch::Off, 4),
        (3, Prefetch::All, 1),
        (4, Prefetch::All, 4),
    ] {
        let restored = Restore::new(Arc::clone(&snapshot))
            .prefetch(prefetch.clone())
            .fault_threads(fault_threads)
            .start()
            .unwrap();
        let discarded = exercise(&restored, &raw, seed);
        assert!(discarded > 10_000, "{discarded}");
        // Every page was touched or discarded, so the restore completes by itself.
        assert!(restored.wait_complete(), "{prefetch:?} {fault_threads}");
        let stats = restored.stats();
        assert_eq!(stats.failures, 0, "{:?}", restored.failures());
        assert!(stats.discards > 0);
        assert!(prefetch == Prefetch::All || stats.prefetch.copied == 0);
    }
}
