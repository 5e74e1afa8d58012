//! Huge pages: the pool of hugetlbfs.

#![allow(unsafe_code, reason = "a test that touches memory under restore")]

mod support;

use std::sync::Arc;

use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::huge_pool::HugePool;
use snaprestore_uffd::memory::{MappingOptions, RawRegion, first_populated};
use snaprestore_uffd::uffd::{Installed, Ioctls, Modes, OpenOptions, Wake};
use support::{errno, page, peek};

/// Linux 6.18 returns EEXIST when it can't get a huge page, although the page is absent; earlier
/// kernels return ENOMEM. Treated as "present", this would be a fault that returns forever.
#[test]
fn empty_huge_pool_is_no_memory_or_looks_present() {
    let _pool = match HugePool::empty() {
        Ok(pool) => pool,
        Err(why) => {
            let test = "empty_huge_pool_is_no_memory_or_looks_present";
            return skipped(test, &why);
        }
    };
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
fn huge_pool_pages_are_copied_whole_and_never_zeroed() {
    let _pool = match HugePool::with(2) {
        Ok(pool) => pool,
        Err(why) => {
            let test = "huge_pool_pages_are_copied_whole_and_never_zeroed";
            return skipped(test, &why);
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
