//! Access, negotiation, masks, and the results of probing the machine.

#![allow(unsafe_code, reason = "a child process gives up its privileges")]

mod support;

use std::os::fd::{AsFd, AsRawFd};

use snaprestore_fixtures::host::skipped;
use snaprestore_uffd::uffd::{
    Access, Features, Ioctls, KernelVersion, Mask, OpenError, OpenOptions, Probe, UserModeOnly,
};
use support::{Child, Ended};

/// Returns the kernel's features, if they include all known ones.
fn everything() -> Option<Features> {
    let all = Features::KNOWN
        .iter()
        .fold(Features::EMPTY, |all, entry| all | entry.set);
    Probe::take()
        .features
        .filter(|features| features.contains(all))
}

#[test]
fn new_userfaultfd_has_the_events_and_is_close_on_exec_and_non_blocking() {
    let uffd = OpenOptions::new().open().unwrap();
    assert_eq!(uffd.features(), Features::EVENTS);
    assert!(
        uffd.available()
            .contains(Features::EVENTS | Features::PAGEFAULT_FLAG_WP)
    );
    assert!(uffd.is_own_memory() && !uffd.is_user_mode_only());
    let raw = uffd.as_fd().as_raw_fd();
    // SAFETY: F_GETFL and F_GETFD take and return numbers.
    let (status, flags) = unsafe {
        (
            libc::fcntl(raw, libc::F_GETFL),
            libc::fcntl(raw, libc::F_GETFD),
        )
    };
    assert_ne!(status & libc::O_NONBLOCK, 0);
    assert_ne!(flags & libc::FD_CLOEXEC, 0);
}

#[test]
fn device_and_system_call_give_the_same_features() {
    let (mut found, mut closed) = (Vec::new(), Vec::new());
    for access in [Access::Device, Access::Syscall] {
        match OpenOptions::new().access(access).open() {
            Ok(uffd) => found.push(uffd.available()),
            Err(error) => closed.push(format!("{access}: {error}")),
        }
    }
    if !closed.is_empty() {
        return skipped(
            "device_and_system_call_give_the_same_features",
            &closed.join("; "),
        );
    }
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{found:?}");
}

#[test]
fn wanted_features_are_optional_and_required_ones_fail_by_name() {
    let wanted = Features::THREAD_ID | Features::WP_UNPOPULATED;
    let mask = Mask::kernel(KernelVersion::new(5, 7));
    let uffd = OpenOptions::new().wanted(wanted).mask(mask).open().unwrap();
    assert_eq!(uffd.features(), Features::EVENTS | Features::THREAD_ID);
    assert!(!uffd.available().contains(Features::WP_UNPOPULATED));

    let required = Features::EVENTS | Features::WP_UNPOPULATED;
    let error = OpenOptions::new()
        .required(required)
        .mask(mask)
        .open()
        .unwrap_err();
    let OpenError::MissingFeatures { missing, available } = &error else {
        panic!("{error}")
    };
    assert_eq!(*missing, Features::WP_UNPOPULATED);
    assert!(available.contains(Features::EVENTS));
    assert!(
        error
            .to_string()
            .contains("lacks the userfaultfd features WP_UNPOPULATED"),
        "{error}"
    );
}

#[test]
fn every_kernel_since_the_minimum_can_be_imitated() {
    let Some(all) = everything() else {
        return skipped(
            "every_kernel_since_the_minimum_can_be_imitated",
            &"this kernel lacks features itself",
        );
    };
    let versions = Features::KNOWN.iter().map(|entry| entry.since);
    for version in versions.filter(|version| *version >= KernelVersion::MINIMUM) {
        let mask = Mask::kernel(version);
        let uffd = OpenOptions::new()
            .wanted(all.without(Features::EVENT_FORK | Features::SIGBUS))
            .mask(mask);
        let uffd = uffd.open().unwrap();
        for entry in Features::KNOWN {
            let expected = entry.since <= version;
            assert_eq!(
                uffd.available().contains(entry.set),
                expected,
                "{} on {version}",
                entry.name
            );
        }
        assert!(uffd.available().contains(uffd.features()));
    }
}

#[test]
fn kernel_below_the_minimum_is_refused_by_number() {
    let mask = Mask::kernel(KernelVersion::new(5, 4));
    let error = OpenOptions::new().mask(mask).open().unwrap_err();
    let OpenError::KernelTooOld { found, needed } = &error else {
        panic!("{error}")
    };
    assert_eq!(
        (found.to_string(), needed.to_string()),
        ("5.4".into(), "5.7".into())
    );
    assert!(
        error.to_string().starts_with("Linux 5.4 is too old"),
        "{error}"
    );
}

#[test]
fn hiding_a_feature_hides_its_ioctl() {
    let mask = Mask::NONE.hiding(Features::POISON);
    assert_eq!(mask.ioctls, Ioctls::POISON);
    let mask = Mask::NONE.hiding(Features::MOVE | Features::POISON);
    assert_eq!(mask.ioctls, Ioctls::MOVE | Ioctls::POISON);
    let probe = Probe::with_mask(mask);
    let ioctls = probe.ioctls.expect("cannot open a userfaultfd");
    assert!(
        !ioctls.contains(Ioctls::MOVE) && !ioctls.contains(Ioctls::POISON),
        "{ioctls}"
    );
    assert!(
        ioctls.contains(Ioctls::COPY | Ioctls::ZEROPAGE | Ioctls::WAKE),
        "{ioctls}"
    );
}

#[test]
fn kernel_releases_are_parsed() {
    let good = [
        ("5.7", 5, 7),
        ("6.1.0-28-amd64", 6, 1),
        ("6.18.44-fc-v669", 6, 18),
        ("7.0-rc1", 7, 0),
    ];
    for (release, major, minor) in good {
        assert_eq!(
            release.parse(),
            Ok(KernelVersion::new(major, minor)),
            "{release}"
        );
    }
    for bad in ["", "6", "linux", "6.", ".1", "99999.1"] {
        assert!(bad.parse::<KernelVersion>().is_err(), "{bad}");
    }
    assert!(KernelVersion::running().unwrap() >= KernelVersion::MINIMUM);
}

#[test]
fn sets_are_printed_by_name() {
    let set = Features::EVENT_REMOVE | Features::MOVE | Features::from_bits(1 << 40);
    assert_eq!(set.to_string(), "EVENT_REMOVE, MOVE, 0x10000000000");
    assert_eq!(Features::from_bits(1 << 40).to_string(), "0x10000000000");
    assert_eq!(Features::EMPTY.to_string(), "none");
    assert_eq!(format!("{:?}", Ioctls::COPY), "Ioctls(COPY)");
    let all = Features::KNOWN
        .iter()
        .fold(0, |all, entry| all | entry.set.bits());
    assert_eq!(all, 0x1ffff, "every bit up to MOVE has a name");
}

/// Becomes a user without capabilities. Only for a child process.
fn become_nobody() {
    // SAFETY: both calls take numbers. In a child with one thread they change only that thread.
    unsafe {
        assert_eq!(libc::setresgid(65534, 65534, 65534), 0);
        assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
    }
}

fn can_drop_privileges(test: &str) -> bool {
    // SAFETY: returns a number.
    let root = unsafe { libc::geteuid() } == 0;
    let open_to_all = Probe::take().unprivileged_userfaultfd == Some(true);
    if !root || open_to_all {
        skipped(test, &"needs root, and vm.unprivileged_userfaultfd=0");
    }
    root && !open_to_all
}

#[test]
fn unprivileged_process_gets_a_remedy() {
    if !can_drop_privileges("unprivileged_process_gets_a_remedy") {
        return;
    }
    let child = Child::start(|| {
        become_nobody();
        let error = OpenOptions::new().open().unwrap_err();
        let text = error.to_string();
        let OpenError::NotPermitted {
            tried,
            user_mode_only_would_do,
        } = error
        else {
            return 1;
        };
        let remedies = [
            "vm.unprivileged_userfaultfd=1",
            "CAP_SYS_PTRACE",
            "access to /dev/userfaultfd",
            "user-mode-only",
        ];
        let named = remedies.iter().all(|remedy| text.contains(remedy));
        i32::from(!(named && user_mode_only_would_do && tried.len() == 2)) * 2
    });
    assert_eq!(child.wait(), Ended::Exit(0));
}

#[test]
fn user_mode_only_is_used_when_allowed_and_needed() {
    if !can_drop_privileges("user_mode_only_is_used_when_allowed_and_needed") {
        return;
    }
    let options = OpenOptions::new().user_mode_only(UserModeOnly::IfNeeded);
    assert!(
        !options.open().unwrap().is_user_mode_only(),
        "not needed here"
    );
    let child = Child::start(move || {
        become_nobody();
        let uffd = options.open().unwrap();
        // Fork events need the dropped capability: wanting them is fine, requiring them is not.
        let wanted = options.clone().wanted(Features::EVENT_FORK).open().unwrap();
        let required = options.required(Features::EVENT_FORK).open();
        let refused = matches!(required, Err(OpenError::ForkEventsNotPermitted));
        let without = wanted.features() == Features::EVENTS;
        i32::from(!(uffd.is_user_mode_only() && refused && without))
    });
    assert_eq!(child.wait(), Ended::Exit(0));
}

#[test]
fn system_call_meets_efault_where_only_user_mode_is_served() {
    use snaprestore_uffd::memory::{ReadFault, read_checked};
    use snaprestore_uffd::uffd::Modes;
    let options = OpenOptions::new().user_mode_only(UserModeOnly::Always);
    let scene = support::Scene::with(1, &options, Modes::MISSING);
    assert!(scene.uffd.is_user_mode_only());
    let error = read_checked(scene.at(0), &mut [0; 16]).unwrap_err();
    assert!(matches!(error, ReadFault::Unreadable { .. }), "{error}");
}

#[test]
fn probe_agrees_with_opening() {
    let probe = Probe::take();
    assert_eq!(probe.kernel, KernelVersion::running());
    assert!(
        probe
            .kernel_release
            .starts_with(&probe.kernel.unwrap().to_string())
    );
    assert_eq!(probe.access.len(), 4);
    assert!(probe.open.is_ok(), "{:?}", probe.open);
    assert!(
        probe
            .access
            .iter()
            .any(|way| !way.user_mode_only && way.result.is_ok())
    );
    assert!(probe.features.unwrap().contains(Features::EVENTS));
    assert!(probe.max_map_count.unwrap() > 1000);
    assert!(probe.open_files.unwrap().soft.is_none_or(|limit| limit > 3));
    assert!(probe.memlock.is_some());
    assert!(probe.cap_sys_ptrace.is_some());
    let thp = probe
        .transparent_huge_pages
        .unwrap_or_else(|| "never".into());
    assert!(
        ["always", "madvise", "never"].contains(&thp.as_str()),
        "{thp}"
    );
    for pool in &probe.huge_pools {
        assert!(
            pool.page_size.is_power_of_two() && pool.free <= pool.total,
            "{pool:?}"
        );
    }
    assert_eq!(
        probe.kvm.is_ok(),
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
    );
}

#[test]
fn memory_of_another_userfaultfd_is_busy_and_files_unsuitable() {
    use snaprestore_uffd::memory::RawRegion;
    use snaprestore_uffd::uffd::{Modes, RegisterError};
    let scene = support::Scene::new(2);
    let other = OpenOptions::new().open().unwrap();
    let busy = other
        .register(&scene.region, 0, 4096, Modes::MISSING)
        .unwrap_err();
    assert!(matches!(busy, RegisterError::Busy { .. }), "{busy}");
    let beyond = scene
        .uffd
        .register(&scene.region, 4096, 8192, Modes::MISSING)
        .unwrap_err();
    assert!(
        matches!(beyond, RegisterError::OutOfRegion { .. }),
        "{beyond}"
    );
    let odd = scene
        .uffd
        .register(&scene.region, 8, 4096, Modes::MISSING)
        .unwrap_err();
    assert!(matches!(odd, RegisterError::Unsuitable { .. }), "{odd}");

    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(4096).unwrap();
    // SAFETY: a mapping of this test's own file that stays until the process exits, accessed only
    // through raw pointers.
    let region = unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let start = libc::mmap(
            std::ptr::null_mut(),
            4096,
            access,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(start, libc::MAP_FAILED);
        RawRegion::new(start.cast(), 4096).unwrap()
    };
    let unsuitable = other
        .register(&region, 0, 4096, Modes::MISSING)
        .unwrap_err();
    assert!(
        matches!(unsuitable, RegisterError::Unsuitable { .. }),
        "{unsuitable}"
    );
}

#[test]
fn closing_the_last_descriptor_leaves_zeros() {
    let mut scene = support::Scene::new(2);
    let reader = support::peeking(scene.at(1));
    scene.fault();
    drop(scene.uffd);
    assert_eq!(
        reader.join().unwrap(),
        0,
        "which is why nothing of the engine closes early"
    );
}
