//! Huge pages: the pool of hugetlbfs, and 2 MiB moved at once.

#![allow(unsafe_code, reason = "a test that touches memory under restore")]

mod sys_support;

use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use snaprestore_engine::mem::{MappingOptions, RawRegion, Scratch, first_populated};
use snaprestore_engine::sys::{Installed, Ioctls, Modes, MoveHoles, OpenOptions, Probe, Wake};
use snaprestore_fixtures::host::skipped;
use sys_support::{Scene, errno, page, peek};

/// The machine has one pool of huge pages, and tests that need it empty and filled.
fn turn_at_the_pool() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the pool of 2 MiB pages has none and gets none; and how many of its pages are to be had.
fn pool() -> (bool, u64) {
    let pools = Probe::take().huge_pools;
    let pool = pools.iter().find(|pool| pool.page_size == 2 << 20);
    pool.map_or((false, 0), |pool| {
        let empty = pool.total == 0 && pool.overcommit == 0;
        (empty, pool.free - pool.reserved)
    })
}

const POOL_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Pages that a test put into the pool, taken out again when it ends.
struct Reserved {
    before: String,
}

impl Reserved {
    /// Sees to it that the pool has `pages` free ones, by adding as many if it has fewer. Only root may, and only with
    /// memory that is not in pieces.
    fn at_least(pages: u64) -> Result<Option<Self>, String> {
        let (_, free) = pool();
        if free >= pages {
            return Ok(None);
        }
        let failed = |error: &dyn Display| format!("{POOL_PAGES}: {error}");
        let before = std::fs::read_to_string(POOL_PAGES).map_err(|error| failed(&error))?;
        let there: u64 = before.trim().parse().map_err(|error| failed(&error))?;
        std::fs::write(POOL_PAGES, (there + pages).to_string()).map_err(|error| failed(&error))?;
        let reserved = Self { before };
        if pool().1 < pages {
            return Err(format!(
                "{POOL_PAGES}: the kernel finds no {pages} free pages"
            ));
        }
        Ok(Some(reserved))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // A page that is still mapped goes when it is unmapped.
        let _ = std::fs::write(POOL_PAGES, self.before.trim());
    }
}

/// Linux 6.18 answers EEXIST when it can't get a huge page, although the page is absent; kernels before say ENOMEM. Taken for
/// "present", that would be a fault that comes back for ever.
#[test]
fn an_empty_pool_of_huge_pages_is_no_memory_or_looks_like_an_existing_page() {
    let _turn = turn_at_the_pool();
    let (empty, _) = pool();
    if !empty {
        return skipped(
            "an_empty_pool_of_huge_pages_is_no_memory_or_looks_like_an_existing_page",
            &"needs an empty pool of 2 MiB pages",
        );
    }
    let uffd = OpenOptions::new().open().unwrap();
    let mapping = MappingOptions::new().huge_pool(true).map(2 << 20).unwrap();
    let region = RawRegion::owned(Arc::new(mapping));
    uffd.register(&region, 0, region.len(), Modes::MISSING)
        .unwrap();
    let bytes = vec![1; 2 << 20];
    let outcome = uffd.copy(region.address(), &bytes, Wake::Now).unwrap();
    assert!(
        matches!(outcome, Installed::NoMemory | Installed::Exists),
        "{outcome:?}"
    );
    assert_eq!(
        first_populated(region.address(), region.len()).unwrap(),
        None
    );
}

#[test]
fn lesson_6_huge_pool_pages_are_copied_whole_and_never_by_zeropage() {
    let _turn = turn_at_the_pool();
    let _reserved = match Reserved::at_least(2) {
        Ok(reserved) => reserved,
        Err(why) => {
            let test = "lesson_6_huge_pool_pages_are_copied_whole_and_never_by_zeropage";
            return skipped(test, &format_args!("needs two huge pages: {why}"));
        }
    };
    let uffd = OpenOptions::new().open().unwrap();
    let mapping = MappingOptions::new().huge_pool(true).map(4 << 20).unwrap();
    let region = RawRegion::owned(Arc::new(mapping));
    let ioctls = uffd
        .register(&region, 0, region.len(), Modes::MISSING)
        .unwrap();
    assert!(!ioctls.contains(Ioctls::ZEROPAGE), "{ioctls}");
    let zero = uffd
        .zeropage(region.address(), 2 << 20, Wake::Now)
        .unwrap_err();
    assert_eq!(errno(&zero), Some(libc::EINVAL));
    let small = uffd
        .copy(region.address(), &page(1), Wake::Now)
        .unwrap_err();
    assert_eq!(errno(&small), Some(libc::EINVAL));
    let bytes = vec![5; 2 << 20];
    assert_eq!(
        uffd.copy(region.address(), &bytes, Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(peek(region.address() + (1 << 20)), 5);
    assert_eq!(
        uffd.copy(region.address(), &bytes, Wake::Now).unwrap(),
        Installed::Exists
    );
}

#[test]
fn huge_pages_are_moved_whole() {
    let scene = Scene::new(1024);
    let mut source = Scratch::new(4 << 20).unwrap();
    source.bytes_mut().fill(3);
    let (start, len) = (scene.at(0), 4 << 20);
    let moved = scene
        .uffd
        .move_(start, &mut source, 0, len, MoveHoles::Refuse, Wake::Now);
    assert_eq!(moved.unwrap(), Installed::Done);
    assert_eq!(peek(start + len - 1), 3);
    assert!(
        source.bytes_mut().iter().all(|byte| *byte == 0),
        "moved pages are zero where they were"
    );
    source.bytes_mut().fill(4);
    let again = scene
        .uffd
        .move_(start, &mut source, 0, len, MoveHoles::Refuse, Wake::Now);
    assert_eq!(again.unwrap(), Installed::Exists);
    assert_eq!(peek(start), 3);
    assert_eq!(source.bytes_mut()[0], 4);
}
