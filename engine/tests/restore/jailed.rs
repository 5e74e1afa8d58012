//! Restores in processes that see little of the machine: without `/proc`, or not dumpable.

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{Restore, StartError};
use snaprestore_fixtures::host::skipped;

use crate::common::{compare, in_child, open, pack, random_bytes};
use crate::owner::own;

const PAGES: u64 = 256;

/// Restores into memory that the engine maps, and expects that the caller's memory is refused.
fn restore_here(folder: &str) {
    let bytes = random_bytes(PAGES, 1);
    let snapshot = open(pack(&bytes, 8));
    let restored = Restore::new(snapshot.clone())
        .user_mode_only(true)
        .prefetch(Prefetch::All)
        .start()
        .unwrap();
    compare(&restored, &bytes, (0..PAGES).rev());
    assert!(restored.wait_complete());
    let refused = Restore::new(snapshot)
        .user_mode_only(true)
        .region(0, own(PAGES as usize))
        .start()
        .unwrap_err();
    assert!(
        matches!(&refused, StartError::Unproven { region: 0, file, .. } if file.starts_with(folder)),
        "{refused}"
    );
    assert!(
        refused.to_string().contains("let the engine map"),
        "{refused}"
    );
}

/// Returns whether this process may become another user: only root may, and only root may change
/// the root folder.
fn is_root(test: &str) -> bool {
    // SAFETY: geteuid takes nothing and can't fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        skipped(test, &"it needs root, to give up what root may do");
    }
    root
}

#[test]
fn non_dumpable_process_can_restore() {
    if !is_root("non_dumpable_process_can_restore") {
        return;
    }
    in_child(|| {
        // SAFETY: all take numbers. Root may read its pagemap in any case; another user may not.
        unsafe {
            assert_eq!(libc::setresgid(65534, 65534, 65534), 0);
            assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
            assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 0), 0);
        }
        assert!(std::fs::File::open("/proc/self/pagemap").is_err());
        restore_here("/proc/self/pagemap");
    })
    .expect_success();
}

#[test]
fn process_without_proc_can_restore() {
    if !is_root("process_without_proc_can_restore") {
        return;
    }
    in_child(|| {
        // An empty folder that is removed when the process has exited.
        let folder = tempfile::tempdir().unwrap();
        std::env::set_current_dir(folder.path()).unwrap();
        folder.close().unwrap();
        std::os::unix::fs::chroot(".").unwrap();
        restore_here("/proc/self/");
    })
    .expect_success();
}
