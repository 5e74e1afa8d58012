//! Soak test: four owners read, write, discard, move and unmap their memory for a while, and know
//! the expected content of every page.
//!
//! ```sh
//! SNAPRESTORE_SOAK_SECONDS=60 \
//!   cargo test --release -p snaprestore-engine --test restore soak -- --nocapture
//! ```
//!
//! This runs it for that long with 1, 2 and 4 fault threads each, and then requires 100,000
//! discards, 10,000 of them of absent pages. Without the variable each run takes [`SHORT`], and the
//! required numbers are proportional.
//!
//! A restore of the image takes a fraction of a second, so it is repeated: most of the time pages
//! are still arriving.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::Restore;
use snaprestore_fixtures::host::told;
use snaprestore_fixtures::images::{Mix, SplitMix};
use snaprestore_uffd::memory::RawRegion;
use snapshot_format::Snapshot;

use crate::common::{PAGE, open, pack, peek, poke};

/// Duration of each run without the variable.
const SHORT: Duration = Duration::from_secs(3);
/// Discards required per minute for each number of fault threads, so that three of them make
/// 100,000.
const DISCARDS_A_MINUTE: u64 = 34_000;
/// Discards required per minute of pages that were apparently absent.
const ABSENT_A_MINUTE: u64 = 3_400;
/// Maximum time that an owner may be without progress.
const MAX_WAIT: Duration = Duration::from_secs(3);

const OWNERS: usize = 4;
/// Number of pages of each owner.
const SHARE: usize = 4096;
const PAGES: usize = OWNERS * SHARE;
/// Maximum number of actions of an owner in one restore.
const ACTIONS: u64 = 3000;

/// Number of actions of each kind, over all restores.
#[derive(Default, Debug)]
struct Counts {
    restores: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    discards: AtomicU64,
    discards_of_absent: AtomicU64,
    moves: AtomicU64,
    unmaps: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

fn pointer(address: usize) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(address)
}

/// Reserves address space for `pages` pages, without memory.
fn reserve(pages: usize, access: libc::c_int) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the kernel picks addresses that nothing else uses.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, access, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    start.expose_provenance()
}

fn release(address: usize, pages: usize) {
    // SAFETY: the range is the test's own, and nobody refers to it.
    assert_eq!(unsafe { libc::munmap(pointer(address), pages * PAGE) }, 0);
}

/// The expected content of a page.
#[derive(Clone, Copy)]
enum Expected {
    /// The snapshot's content, with the first byte replaced if it was written to.
    Source(Option<u8>),
    /// Zeros, with the first byte replaced.
    Zero(u8),
    Unmapped,
}

/// The part of the memory that belongs to one owner.
struct Owner<'a> {
    image: &'a [u8],
    first: usize,
    /// The address of each page.
    at: Vec<usize>,
    expected: Vec<Expected>,
    /// Pages that this owner has touched.
    touched: Vec<bool>,
    /// Address space of its own to which pages may be moved.
    spare: usize,
    spare_used: usize,
    random: SplitMix,
    counts: &'a Counts,
}

impl Owner<'_> {
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.random.next() % n as u64).unwrap()
    }

    fn check(&mut self, page: usize) {
        let wanted = match self.expected[page] {
            Expected::Unmapped => return,
            Expected::Zero(first) => {
                let mut wanted = [0; PAGE];
                wanted[0] = first;
                wanted
            }
            Expected::Source(written) => {
                let from = (self.first + page) * PAGE;
                let mut wanted: [u8; PAGE] = self.image[from..from + PAGE].try_into().unwrap();
                wanted[0] = written.unwrap_or(wanted[0]);
                wanted
            }
        };
        let seen = peek(self.at[page]);
        let what = match self.expected[page] {
            Expected::Zero(_) => "discarded",
            _ => "of the source",
        };
        assert!(
            seen == wanted,
            "page {} ({what}) is wrong",
            self.first + page
        );
        self.touched[page] = true;
        add(&self.counts.reads, 1);
    }

    fn write(&mut self, page: usize, byte: u8) {
        self.expected[page] = match self.expected[page] {
            Expected::Unmapped => return,
            Expected::Zero(_) => Expected::Zero(byte),
            Expected::Source(_) => Expected::Source(Some(byte)),
        };
        poke(self.at[page], byte);
        self.touched[page] = true;
        add(&self.counts.writes, 1);
    }

    /// Returns the number of consecutive pages from `page` on, at most `most`, that are at
    /// consecutive addresses.
    fn run(&self, page: usize, most: usize) -> usize {
        let end = SHARE.min(page + most);
        let is_next = |next: &usize| {
            self.at[*next] == self.at[page] + (next - page) * PAGE
                && !matches!(self.expected[*next], Expected::Unmapped)
        };
        (page + 1..end).take_while(is_next).count() + 1
    }

    /// Returns whether the page is absent now; it may arrive between this check and the discard.
    fn is_absent(&self, page: usize) -> bool {
        let mut resident = 0_u8;
        // SAFETY: the result goes to a live byte.
        let result = unsafe { libc::mincore(pointer(self.at[page]), PAGE, &raw mut resident) };
        result == 0 && resident & 1 == 0
    }

    fn discard(&mut self, page: usize, advice: libc::c_int) {
        let count = self.run(page, 4);
        let absent = (page..page + count).any(|page| {
            !self.touched[page]
                && matches!(self.expected[page], Expected::Source(_))
                && self.is_absent(page)
        });
        // SAFETY: the pages belong only to this owner, which holds no references into them.
        let result = unsafe { libc::madvise(pointer(self.at[page]), count * PAGE, advice) };
        assert_eq!(result, 0);
        add(&self.counts.discards, 1);
        add(&self.counts.discards_of_absent, u64::from(absent));
        for page in page..page + count {
            self.expected[page] = Expected::Zero(0);
            self.check(page);
        }
    }

    fn relocate(&mut self, page: usize) {
        let count = self.run(page, 8);
        if self.spare_used + count > SHARE {
            return;
        }
        let to = self.spare + self.spare_used * PAGE;
        self.spare_used += count;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let mremap = |pages: usize| {
            let bytes = pages * PAGE;
            // SAFETY: both ranges are this owner's.
            unsafe { libc::mremap(pointer(self.at[page]), bytes, bytes, flags, pointer(to)) }
        };
        let mut moved = mremap(count);
        let mut count = count;
        if moved == libc::MAP_FAILED {
            // Pages from two places can be two mappings, which don't move together.
            count = 1;
            moved = mremap(count);
        }
        assert_eq!(moved, pointer(to), "{}", std::io::Error::last_os_error());
        for i in 0..count {
            self.at[page + i] = to + i * PAGE;
        }
        add(&self.counts.moves, count as u64);
        self.check(page + count - 1);
    }

    fn unmap(&mut self, page: usize) {
        let count = self.run(page, 2);
        release(self.at[page], count);
        self.expected[page..page + count].fill(Expected::Unmapped);
        add(&self.counts.unmaps, count as u64);
    }

    /// Unmaps all remaining pages, but no address that something else may be using by now.
    fn leave(self) {
        let mut page = 0;
        while page < SHARE {
            if matches!(self.expected[page], Expected::Unmapped) {
                page += 1;
                continue;
            }
            let count = self.run(page, SHARE);
            release(self.at[page], count);
            page += count;
        }
        if self.spare_used < SHARE {
            let rest = self.spare + self.spare_used * PAGE;
            release(rest, SHARE - self.spare_used);
        }
    }

    fn act(&mut self) {
        let page = self.below(SHARE);
        if matches!(self.expected[page], Expected::Unmapped) {
            return;
        }
        match self.below(1000) {
            0..=399 => self.check(page),
            400..=599 => {
                let byte = self.below(256);
                self.write(page, u8::try_from(byte).unwrap());
                self.check(page);
            }
            600..=984 => self.discard(page, libc::MADV_DONTNEED),
            985..=994 => self.relocate(page),
            _ => self.unmap(page),
        }
    }
}

/// Runs one restore with its four owners, until each has done its actions and seen every page.
fn one_restore(
    snapshot: &Arc<Snapshot>,
    image: &[u8],
    fault_threads: usize,
    seed: u64,
    counts: &Counts,
    progress: &[Progress],
) {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let base = reserve(PAGES, access);
    // SAFETY: the memory was just mapped and is used only through raw pointers. It is unmapped and
    // moved under a restore, which always requests the events.
    let region = unsafe { RawRegion::new(pointer(base).cast(), (PAGES * PAGE) as u64) }.unwrap();
    let restored = Restore::new(Arc::clone(snapshot))
        .region(0, region)
        .leave_zero_runs(false)
        .fault_threads(fault_threads)
        .prefetch(Prefetch::All)
        .prefetch_threads(2)
        .prefetch_bandwidth(100 << 20)
        .start()
        .unwrap();
    std::thread::scope(|scope| {
        for (number, progress) in progress[..OWNERS].iter().enumerate() {
            scope.spawn(move || {
                progress.busy.store(true, Relaxed);
                let first = number * SHARE;
                let mut owner = Owner {
                    image,
                    first,
                    at: (0..SHARE).map(|i| base + (first + i) * PAGE).collect(),
                    expected: vec![Expected::Source(None); SHARE],
                    touched: vec![false; SHARE],
                    spare: reserve(SHARE, libc::PROT_NONE),
                    spare_used: 0,
                    random: SplitMix(seed * 10 + number as u64),
                    counts,
                };
                for _ in 0..ACTIONS {
                    owner.act();
                    progress.step();
                }
                for page in 0..SHARE {
                    owner.check(page);
                    progress.step();
                }
                owner.leave();
                progress.busy.store(false, Relaxed);
            });
        }
    });
    // Everything is settled, at the latest because it was unmapped and thereby removed.
    progress[OWNERS].busy.store(true, Relaxed);
    assert!(restored.wait_complete());
    progress[OWNERS].busy.store(false, Relaxed);
    assert!(restored.failures().is_empty());
    add(&counts.restores, 1);
}

/// The progress of a thread. An idle thread isn't expected to make any.
#[derive(Default)]
struct Progress {
    steps: AtomicU64,
    busy: AtomicBool,
}

impl Progress {
    fn step(&self) {
        add(&self.steps, 1);
    }
}

/// Aborts the process if a thread hangs: a thread that waits for a page can't be stopped otherwise.
fn watch(progress: &[Progress], longest: Duration, ended: &AtomicBool) {
    let mut last: Vec<(u64, Instant)> = progress.iter().map(|_| (0, Instant::now())).collect();
    while !ended.load(Relaxed) {
        for (number, (progress, last)) in progress.iter().zip(&mut last).enumerate() {
            let steps = progress.steps.load(Relaxed);
            if steps != last.0 || !progress.busy.load(Relaxed) {
                *last = (steps, Instant::now());
            }
            if last.1.elapsed() > longest {
                told(&format_args!(
                    "owner {number} made no progress for {longest:?} after {steps} steps"
                ));
                std::process::abort();
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A guard that ends the watch, even if the test fails.
struct EndWatch(Arc<AtomicBool>);

impl Drop for EndWatch {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn random_owner_always_reads_expected_pages() {
    let asked: Option<u64> = std::env::var("SNAPRESTORE_SOAK_SECONDS")
        .ok()
        .map(|text| text.parse().expect("seconds"));
    let duration = asked.map_or(SHORT, Duration::from_secs);
    // The short form shares the machine with the other tests.
    let longest = asked.map_or(crate::common::HANG_TIMEOUT, |_| MAX_WAIT);
    let image = Mix::new(PAGES as u64, 1).bytes();
    let snapshot = open(pack(&image, 8));
    for fault_threads in [1, 2, 4] {
        let counts = Counts::default();
        let progress: Arc<Vec<Progress>> =
            Arc::new((0..=OWNERS).map(|_| Progress::default()).collect());
        let ended = Arc::new(AtomicBool::new(false));
        let watcher = {
            let (progress, ended) = (Arc::clone(&progress), Arc::clone(&ended));
            std::thread::spawn(move || watch(&progress, longest, &ended))
        };
        let end_watch = EndWatch(ended);
        let begun = Instant::now();
        let mut seed = fault_threads as u64 * 1000;
        while begun.elapsed() < duration {
            seed += 1;
            one_restore(&snapshot, &image, fault_threads, seed, &counts, &progress);
        }
        drop(end_watch);
        watcher.join().unwrap();
        told(&format_args!(
            "soak, {fault_threads} fault threads, {:?}: {counts:?}",
            begun.elapsed()
        ));
        let wanted = |a_minute: u64| a_minute * duration.as_secs() / 60;
        assert!(counts.discards.load(Relaxed) >= wanted(DISCARDS_A_MINUTE));
        assert!(counts.discards_of_absent.load(Relaxed) >= wanted(ABSENT_A_MINUTE));
        for others in [&counts.moves, &counts.unmaps, &counts.writes] {
            assert!(others.load(Relaxed) > 0);
        }
    }
}
