//! Older kernels, simulated by hiding features, and restricted permissions.

use std::sync::Arc;

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{FailurePolicy, ReadAtError, Restore, StartError};
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::Mix;
use snaprestore_uffd::uffd::{Features, KernelVersion, Mask};

use crate::common::{
    address, compare, damaged, frame_of, in_child, open, pack, pages_of_frame, peek, random_bytes,
    source,
};

#[test]
fn every_kernel_level_restores_correctly() {
    const PAGES: u64 = 2048;
    let bytes = Mix::new(PAGES, 1).bytes();
    let snapshot = open(pack(&bytes, 8));
    let levels = [(5, 7), (5, 11), (6, 1), (6, 6)].map(|(major, minor)| {
        let version = KernelVersion::new(major, minor);
        (Mask::kernel(version), version >= KernelVersion::new(6, 6))
    });
    for (mask, poisons) in levels.into_iter().chain([(Mask::NONE, true)]) {
        let start = |prefetch, on_failure| {
            Restore::new(Arc::clone(&snapshot))
                .mask(mask)
                .prefetch(prefetch)
                .on_failure(on_failure)
                .start()
        };
        for prefetch in [Prefetch::Off, Prefetch::All] {
            let restored = start(prefetch, FailurePolicy::Abort).unwrap();
            compare(&restored, &bytes, (0..PAGES).rev());
            assert!(restored.wait_complete(), "{mask:?}");
        }
        match start(Prefetch::Off, FailurePolicy::Poison) {
            Ok(restored) => {
                assert!(poisons, "{mask:?}");
                compare(&restored, &bytes, 0..100);
            }
            Err(StartError::NoPoison) => assert!(!poisons, "{mask:?}"),
            Err(other) => panic!("{mask:?}: {other}"),
        }
    }
}

/// Without its events a discarded page would come back, so that kernel is refused.
#[test]
fn kernel_without_events_is_refused() {
    let bytes = Mix::new(64, 2).bytes();
    for event in [
        Features::EVENT_REMOVE,
        Features::EVENT_REMAP,
        Features::EVENT_UNMAP,
    ] {
        let refused = Restore::new(open(pack(&bytes, 8)))
            .mask(Mask::NONE.hiding(event))
            .start()
            .unwrap_err();
        assert!(matches!(refused, StartError::Userfaultfd(_)), "{refused}");
    }
}

/// A process that may use userfaultfd only for user code is refused unless it permits that. If it
/// does, user code is served, a system call gets EFAULT where it would have to wait, and `read_at`
/// reads everything readable.
#[test]
fn user_mode_only_requires_permission() {
    let said = in_child(|| {
        // SAFETY: none of these touches memory. The user `nobody` has no permission for the device,
        // and none for the system call except for user code, unless the machine grants it to all.
        unsafe {
            assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
            assert_eq!(libc::setgid(65534), 0);
            assert_eq!(libc::setuid(65534), 0);
        }
        let bytes = random_bytes(512, 3);
        let file = pack(&bytes, 8);
        let frame = frame_of(&open(file.clone()), 77);
        let bad = pages_of_frame(&open(file.clone()), frame.offset());
        let file = damaged(file, &frame);
        let start = |permitted| {
            Restore::new(open(file.clone()))
                .user_mode_only(permitted)
                .start()
        };
        match start(false) {
            Ok(restored) => {
                assert!(!restored.is_user_mode_only());
                println!("every user may use userfaultfd on this machine");
                return;
            }
            Err(StartError::Userfaultfd(_)) => {}
            Err(other) => panic!("{other}"),
        }
        let restored = start(true).unwrap();
        assert!(restored.is_user_mode_only());
        // A system call is not served.
        let mut pipe = [0; 2];
        let from = std::ptr::with_exposed_provenance(address(&restored, 500));
        // SAFETY: the kernel reads a mapped page, or returns an error.
        let written = unsafe {
            assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
            libc::write(pipe[1], from, 4096)
        };
        assert_eq!(written, -1);
        assert_eq!(
            std::io::Error::last_os_error().raw_os_error(),
            Some(libc::EFAULT)
        );
        let mut page = [0; 4096];
        restored.read_at(0, 500 * 4096, &mut page).unwrap();
        assert!(page == source(&bytes, 500));
        assert!(peek(address(&restored, 501)) == source(&bytes, 501));
        // One discarded page was present, the other was not.
        for discarded in [100, 500] {
            let start = std::ptr::with_exposed_provenance_mut(address(&restored, discarded));
            // SAFETY: the memory is the test's, which has no reference to it.
            let advised = unsafe { libc::madvise(start, 4096, libc::MADV_DONTNEED) };
            assert_eq!(advised, 0);
        }
        // Many pages at once: with holes, and up to the first bad one.
        let mut all = vec![1; 512 * 4096];
        let refused = restored.read_at(0, 0, &mut all).unwrap_err();
        assert!(
            matches!(refused, ReadAtError::Unreadable { offset, .. } if offset == bad[0] * 4096),
            "{refused}"
        );
        let after = bad[7] + 1;
        let rest = &mut all[after as usize * 4096..];
        restored.read_at(0, after * 4096, rest).unwrap();
        for n in (0..512).filter(|n| !bad.contains(n)) {
            let expected = if [100, 500].contains(&n) {
                &[0; 4096]
            } else {
                source(&bytes, n)
            };
            assert!(source(&all, n) == expected, "page {n}");
            assert!(peek(address(&restored, n)) == expected, "page {n}");
        }
        for n in &bad {
            assert!(restored.read_at(0, n * 4096, &mut page).is_err());
        }
        assert!(restored.wait_complete());
        restored.read_at(0, 500 * 4096, &mut page).unwrap();
        assert!(page == [0; 4096]);
        println!("user code was served");
    })
    .expect_success();
    if said.contains("every user may") {
        skipped(
            "user_mode_only_requires_permission",
            &"every user may use userfaultfd on this machine",
        );
    } else {
        assert!(said.contains("user code was served"), "{said}");
    }
}
