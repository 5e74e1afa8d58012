//! Older kernels, by hiding what they lack, and less permission.

use std::sync::Arc;

use snaprestore_engine::restore::{OnFailure, Prefetch, Restore, StartError};
use snaprestore_engine::sys::{Features, KernelVersion, Mask};
use snaprestore_fixtures::images::Mix;

use crate::common::{address, compare, in_child, open, pack, peek, source};

#[test]
fn every_kernel_level_restores_right() {
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
            let restored = start(prefetch, OnFailure::Abort).unwrap();
            compare(&restored, &bytes, (0..PAGES).rev());
            assert!(restored.wait_complete(), "{mask:?}");
        }
        match start(Prefetch::Off, OnFailure::Poison) {
            Ok(restored) => {
                assert!(poisons, "{mask:?}");
                compare(&restored, &bytes, 0..100);
            }
            Err(StartError::NoPoison) => assert!(!poisons, "{mask:?}"),
            Err(other) => panic!("{mask:?}: {other}"),
        }
    }
}

/// Without its events a discarded page would come back: that kernel is refused.
#[test]
fn a_kernel_without_events_is_refused() {
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

/// Who may use userfaultfd for user code only is refused unless that was asked for; then user code is served, and a
/// system call gets EFAULT where it would have to wait.
#[test]
fn user_mode_only_is_asked_for() {
    let device = std::path::Path::new("/dev/userfaultfd");
    let said = in_child(|| {
        // SAFETY: none of these touches memory. A user who is nobody has no right to the device, and none to the system call
        // but for user code, unless the machine gives it to all.
        unsafe {
            assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
            assert_eq!(libc::setgid(65534), 0);
            assert_eq!(libc::setuid(65534), 0);
            // Changing users closed /proc/self to the process, and with it the proof that memory is empty.
            assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0), 0);
        }
        let bytes = Mix::new(512, 3).bytes();
        let start = |permitted| {
            Restore::new(open(pack(&bytes, 8)))
                .user_mode_only(permitted)
                .leave_zero_runs(false)
                .start()
        };
        match start(false) {
            Ok(_) => {
                println!("every user may use userfaultfd on this machine");
                return;
            }
            Err(StartError::Userfaultfd(_)) => {}
            Err(other) => panic!("{other}"),
        }
        let restored = start(true).unwrap();
        let mut page = [0; 4096];
        assert!(restored.read_at(0, 500 * 4096, &mut page).is_err());
        assert!(peek(address(&restored, 500)) == source(&bytes, 500));
        restored.read_at(0, 500 * 4096, &mut page).unwrap();
        compare(&restored, &bytes, 0..512);
        println!("user code was served");
    })
    .expect_success();
    if said.contains("every user may") {
        println!(
            "SKIPPED user_mode_only_is_asked_for: every user may open {}",
            device.display()
        );
    } else {
        assert!(said.contains("user code was served"), "{said}");
    }
}
