//! Every install and its outcomes, tested against the running kernel.

#![allow(unsafe_code, reason = "a test that touches memory under restore")]

mod support;

use std::sync::Arc;

use snaprestore_fixtures::host::skipped;
use snaprestore_uffd::memory::{Mapping, RawRegion};
use snaprestore_uffd::memory::{ReadFault, read_checked};
use snaprestore_uffd::uffd::{
    Features, InstallError, Installed, Ioctls, Message, Modes, OpenOptions, Presence, Protected,
    Userfaultfd, Wake,
};
use support::{Child, Ended, PAGE, Scene, errno, eventually, madvise, page, peek, peeking, poke};

/// Registers memory of which a part may be unmapped: nothing unmaps it later, when the hole may
/// belong to something else.
fn leaked(uffd: &Userfaultfd, pages: u64) -> impl Fn(u64) -> u64 {
    let (start, len) = Mapping::new(pages * PAGE).unwrap().into_raw();
    // SAFETY: the memory stays this test's own, and is accessed only through raw pointers.
    let region = unsafe { RawRegion::new(start, len) }.unwrap();
    uffd.register(&region, 0, len, Modes::MISSING).unwrap();
    move |page| region.address() + page * PAGE
}

fn write_protecting(pages: u64) -> Scene {
    let options = OpenOptions::new().required(Features::PAGEFAULT_FLAG_WP);
    Scene::with(pages, &options, Modes::MISSING.and(Modes::WRITE_PROTECT))
}

#[test]
fn fault_is_read_and_served_by_copy() {
    let mut scene = Scene::new(16);
    let reader = peeking(scene.at(3) + 7);
    let address = scene.fault();
    assert_eq!(address, scene.at(3));
    assert_eq!(
        scene.uffd.copy(address, &page(0x5a), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 0x5a);
    scene.assert_quiet();
}

#[test]
fn fault_is_served_by_zeropage() {
    let mut scene = Scene::new(4);
    let reader = peeking(scene.at(1));
    let address = scene.fault();
    assert_eq!(
        scene.uffd.zeropage(address, PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 0);
    assert_eq!(
        scene
            .uffd
            .zeropage(scene.at(2), 2 * PAGE, Wake::Now)
            .unwrap(),
        Installed::Done
    );
    assert_eq!(peek(scene.at(3)), 0);
}

#[test]
fn copies_of_many_pages_arrive_in_order() {
    let scene = Scene::new(64);
    let bytes: Vec<u8> = (0..64).flat_map(page).collect();
    assert_eq!(
        scene.uffd.copy(scene.at(0), &bytes, Wake::Now).unwrap(),
        Installed::Done
    );
    for at in 0..64 {
        assert_eq!(u64::from(peek(scene.at(at) + 4095)), at);
    }
}

#[test]
fn eexist_wakes_nobody_and_wake_does() {
    let mut scene = Scene::new(1);
    let reader = peeking(scene.at(0));
    let address = scene.fault();
    // The winner of the race installs without waking; the loser gets EEXIST.
    assert_eq!(
        scene.uffd.copy(address, &page(1), Wake::Later).unwrap(),
        Installed::Done
    );
    assert_eq!(
        scene.uffd.copy(address, &page(2), Wake::Now).unwrap(),
        Installed::Exists
    );
    assert!(!reader.is_finished(), "the kernel wakes nobody on EEXIST");
    scene.uffd.wake(address, PAGE).unwrap();
    assert_eq!(reader.join().unwrap(), 1, "the first install counts");
}

#[test]
fn copy_stops_at_a_present_page_and_continues_behind() {
    let scene = Scene::new(8);
    assert_eq!(
        scene
            .uffd
            .copy(scene.at(3), &page(0xee), Wake::Now)
            .unwrap(),
        Installed::Done
    );
    let bytes: Vec<u8> = (0..8).flat_map(|_| page(0x11)).collect();
    let first = scene.uffd.copy(scene.at(0), &bytes, Wake::Now).unwrap();
    assert_eq!(first, Installed::Partial { done: 3 * PAGE });
    let second = scene
        .uffd
        .copy(scene.at(3), &bytes[3 * 4096..], Wake::Now)
        .unwrap();
    assert_eq!(second, Installed::Exists);
    let third = scene
        .uffd
        .copy(scene.at(4), &bytes[4 * 4096..], Wake::Now)
        .unwrap();
    assert_eq!(third, Installed::Done);
    let seen: Vec<u8> = (0..8).map(|at| peek(scene.at(at))).collect();
    assert_eq!(seen, [0x11, 0x11, 0x11, 0xee, 0x11, 0x11, 0x11, 0x11]);
}

#[test]
fn partial_copy_wakes_the_waiters_of_its_part() {
    let mut scene = Scene::new(2);
    assert_eq!(
        scene.uffd.copy(scene.at(1), &page(2), Wake::Now).unwrap(),
        Installed::Done
    );
    let reader = peeking(scene.at(0));
    scene.fault();
    let both: Vec<u8> = [page(1), page(1)].concat();
    let outcome = scene.uffd.copy(scene.at(0), &both, Wake::Now).unwrap();
    assert_eq!(outcome, Installed::Partial { done: PAGE });
    assert_eq!(reader.join().unwrap(), 1);
}

#[test]
fn every_install_reports_a_partial_run_and_an_existing_page() {
    let scene = Scene::new(4);
    assert_eq!(
        scene.uffd.copy(scene.at(2), &page(7), Wake::Now).unwrap(),
        Installed::Done
    );
    let partial = Installed::Partial { done: 2 * PAGE };
    let all = 4 * PAGE;
    assert_eq!(
        scene.uffd.zeropage(scene.at(0), all, Wake::Now).unwrap(),
        partial
    );
    assert_eq!(
        scene.uffd.zeropage(scene.at(2), PAGE, Wake::Now).unwrap(),
        Installed::Exists
    );

    let scene = Scene::new(4);
    assert_eq!(
        scene.uffd.copy(scene.at(2), &page(7), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(
        scene.uffd.poison(scene.at(0), all, Wake::Now).unwrap(),
        partial
    );
    assert_eq!(
        scene.uffd.poison(scene.at(2), PAGE, Wake::Now).unwrap(),
        Installed::Exists
    );
}

#[test]
fn unmapped_memory_is_gone_and_unregistered_an_error() {
    let uffd = OpenOptions::new().required(Features::EMPTY).open().unwrap();
    let at = leaked(&uffd, 4);
    let (start, len) = (at(2), 2 * PAGE);
    support::munmap(start, len);
    assert_eq!(
        uffd.copy(start, &page(1), Wake::Now).unwrap(),
        Installed::Gone
    );
    assert_eq!(
        uffd.zeropage(start, len, Wake::Now).unwrap(),
        Installed::Gone
    );
    assert_eq!(uffd.poison(start, len, Wake::Now).unwrap(), Installed::Gone);
    assert_eq!(uffd.probe(start).unwrap(), Presence::Gone);
    // A range that extends beyond its mapping is refused as a whole, although its start is inside.
    let across: Vec<u8> = [page(1), page(1), page(1)].concat();
    assert_eq!(
        uffd.copy(at(1), &across, Wake::Now).unwrap(),
        Installed::Gone
    );

    let beyond = uffd.copy(at(4), &page(1), Wake::Now).unwrap_err();
    assert!(
        matches!(beyond, InstallError::NotRegistered { .. }),
        "{beyond}"
    );
    let over_the_end: Vec<u8> = [page(1), page(1)].concat();
    let over_the_end = uffd.copy(at(3), &over_the_end, Wake::Now).unwrap_err();
    assert!(
        matches!(over_the_end, InstallError::NotRegistered { .. }),
        "{over_the_end}"
    );
}

#[test]
fn unregistered_pages_are_gone_and_read_as_zeros() {
    let mut scene = Scene::new(4);
    let reader = peeking(scene.at(1));
    scene.fault();
    scene.uffd.unregister(scene.at(0), 2 * PAGE).unwrap();
    assert_eq!(
        reader.join().unwrap(),
        0,
        "unregistering wakes, and what is absent is zero"
    );
    assert_eq!(
        scene.uffd.copy(scene.at(0), &page(1), Wake::Now).unwrap(),
        Installed::Gone
    );
    assert_eq!(scene.uffd.probe(scene.at(0)).unwrap(), Presence::Gone);
    assert_eq!(scene.uffd.probe(scene.at(2)).unwrap(), Presence::Registered);
    assert_eq!(
        scene.uffd.copy(scene.at(2), &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
}

#[test]
fn memory_registered_with_another_userfaultfd_cannot_be_filled() {
    let scene = Scene::new(2);
    let other = OpenOptions::new().open().unwrap();
    // The kernel alone would permit this: any userfaultfd of a process fills any registered memory
    // of the process.
    assert_eq!(other.probe(scene.at(0)).unwrap(), Presence::Registered);
    let error = other.copy(scene.at(0), &page(1), Wake::Now).unwrap_err();
    assert!(
        matches!(error, InstallError::NotRegistered { .. }),
        "{error}"
    );
    assert_eq!(
        scene.uffd.copy(scene.at(0), &page(2), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(peek(scene.at(0)), 2);
}

#[test]
fn unreadable_source_is_an_error_and_installs_nothing() {
    let scene = Scene::new(2);
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    // SAFETY: a mapping of this test's own; the slice is only passed to the kernel, which notices
    // that the file behind it has become shorter.
    let bytes = unsafe {
        use std::os::fd::AsRawFd;
        let (access, how) = (libc::PROT_READ, libc::MAP_SHARED);
        let start = libc::mmap(std::ptr::null_mut(), 4096, access, how, file.as_raw_fd(), 0);
        assert_ne!(start, libc::MAP_FAILED);
        std::slice::from_raw_parts(start.cast::<u8>(), 4096)
    };
    file.set_len(0).unwrap();
    let error = scene.uffd.copy(scene.at(0), bytes, Wake::Now).unwrap_err();
    assert_eq!(errno(&error), Some(libc::EFAULT), "{error}");
    assert_eq!(
        scene.uffd.zeropage(scene.at(0), PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
}

#[test]
fn requests_of_partial_pages_are_refused() {
    let scene = Scene::new(2);
    let odd = scene
        .uffd
        .copy(scene.at(0), &[1; 100], Wake::Now)
        .unwrap_err();
    assert_eq!(errno(&odd), Some(libc::EINVAL));
    let inside = scene
        .uffd
        .zeropage(scene.at(0) + 8, PAGE, Wake::Now)
        .unwrap_err();
    assert_eq!(errno(&inside), Some(libc::EINVAL));
    assert!(scene.uffd.copy(scene.at(0), &[], Wake::Now).is_err());
    assert!(
        scene
            .uffd
            .zeropage(u64::MAX - 4095, 2 * PAGE, Wake::Now)
            .is_err()
    );
}

#[test]
fn write_protection_stops_a_write_until_it_is_cleared() {
    let mut scene = write_protecting(2);
    let address = scene.at(0);
    assert_eq!(
        scene.uffd.copy(address, &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
    let protect = |on| {
        scene
            .uffd
            .write_protect(address, PAGE, on, Wake::Now)
            .unwrap()
    };
    assert_eq!(protect(true), Protected::Done);
    assert_eq!(peek(address), 1, "reading goes on");
    let writer = std::thread::spawn(move || poke(address, 2));
    let message = support::messages(&scene.uffd, &mut scene.ring);
    let [
        Message::Pagefault {
            address: at, flags, ..
        },
    ] = message[..]
    else {
        panic!("{message:?}");
    };
    assert_eq!(at, address);
    assert!(
        flags.write && flags.write_protect && !flags.minor,
        "{flags:?}"
    );
    assert_eq!(peek(address), 1);
    let cleared = scene
        .uffd
        .write_protect(address, PAGE, false, Wake::Now)
        .unwrap();
    assert_eq!(cleared, Protected::Done);
    writer.join().unwrap();
    assert_eq!(peek(address), 2);
}

#[test]
fn protected_copy_misses_no_write() {
    let mut scene = write_protecting(1);
    let address = scene.at(0);
    let writer = std::thread::spawn(move || poke(address, 2));
    assert_eq!(scene.fault(), address);
    let copied = scene
        .uffd
        .copy_protected(address, &page(1), Wake::Now)
        .unwrap();
    assert_eq!(copied, Installed::Done);
    // The writer was woken, and its write is reported instead of being performed.
    let messages = scene.messages();
    assert!(
        matches!(messages[..], [Message::Pagefault { flags, .. }] if flags.write_protect),
        "{messages:?}"
    );
    let cleared = scene
        .uffd
        .write_protect(address, PAGE, false, Wake::Now)
        .unwrap();
    assert_eq!(cleared, Protected::Done);
    writer.join().unwrap();
    assert_eq!(peek(address), 2);
}

#[test]
fn write_protection_without_registration_is_gone() {
    let scene = Scene::new(1);
    let outcome = scene
        .uffd
        .write_protect(scene.at(0), PAGE, true, Wake::Now)
        .unwrap();
    assert_eq!(outcome, Protected::Gone);
}

#[test]
fn continue_installs_what_the_file_holds() {
    use std::os::fd::AsRawFd;
    let options = OpenOptions::new().required(Features::MINOR_SHMEM);
    let uffd = match options.open() {
        Ok(uffd) => uffd,
        Err(error) => return skipped("continue_installs_what_the_file_holds", &error),
    };
    let file = nix_memfd(4 * 4096);
    let map = || {
        // SAFETY: two shared mappings of this test's own memfd, accessed only through raw pointers,
        // until the process exits.
        let start = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(
                std::ptr::null_mut(),
                4 * 4096,
                access,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        start.cast::<u8>()
    };
    let (writer, reader) = (map(), map());
    let writer = writer.expose_provenance() as u64;
    // SAFETY: the mapping stays until the process exits, and only raw accesses touch it.
    let region = unsafe { RawRegion::new(reader, 4 * PAGE) }.unwrap();
    let ioctls = uffd
        .register(&region, 0, region.len(), Modes::MINOR)
        .unwrap();
    assert!(ioctls.contains(Ioctls::CONTINUE), "{ioctls}");
    poke(writer, 0x77);
    poke(writer + PAGE, 0x78);

    let address = region.address();
    let toucher = peeking(address);
    let mut ring = snaprestore_uffd::memory::Ring::private().unwrap();
    let messages = support::messages(&uffd, &mut ring);
    assert!(
        matches!(messages[..], [Message::Pagefault { flags, .. }] if flags.minor),
        "{messages:?}"
    );
    assert_eq!(
        uffd.continue_(address, PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(toucher.join().unwrap(), 0x77);
    assert_eq!(
        uffd.continue_(address, PAGE, Wake::Now).unwrap(),
        Installed::Exists
    );
    // The third page is not in the page cache: the run stops before it, and then there is nothing
    // to continue.
    let rest = uffd.continue_(address + PAGE, 2 * PAGE, Wake::Now).unwrap();
    assert_eq!(rest, Installed::Partial { done: PAGE });
    let hole = uffd
        .continue_(address + 2 * PAGE, PAGE, Wake::Now)
        .unwrap_err();
    assert_eq!(errno(&hole), Some(libc::EFAULT), "{hole}");
}

fn nix_memfd(len: u64) -> std::fs::File {
    use std::os::fd::FromRawFd;
    // SAFETY: the kernel copies the name, and the new descriptor is ours alone.
    let file = unsafe {
        let number = libc::memfd_create(c"snaprestore-test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(number >= 0);
        std::fs::File::from_raw_fd(number)
    };
    file.set_len(len).unwrap();
    file
}

#[test]
fn poison_is_sigbus_to_an_instruction_and_an_error_to_a_system_call() {
    let scene = Scene::new(4);
    assert_eq!(
        scene.uffd.copy(scene.at(0), &page(3), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(
        scene.uffd.poison(scene.at(1), PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    let address = scene.at(1);
    // The child doesn't inherit the registration, but it does inherit the poison of private memory,
    // or it would read zeros there.
    let child = Child::start(move || i32::from(peek(address)));
    let ended = child.wait();
    // Linux copies poison markers at fork only if a userfaultfd follows; otherwise the page is zero
    // there.
    assert!(
        matches!(ended, Ended::Exit(0) | Ended::Signal(libc::SIGBUS)),
        "{ended:?}"
    );

    let mut buffer = vec![0; 2 * 4096];
    let error = read_checked(scene.at(0), &mut buffer).unwrap_err();
    assert!(
        matches!(error, ReadFault::Unreadable { address: at } if at == address),
        "{error}"
    );
    assert_eq!(buffer[4095], 3, "what comes before the poison is read");

    assert_eq!(
        scene.uffd.poison(address, PAGE, Wake::Now).unwrap(),
        Installed::Exists
    );
    assert_eq!(
        scene.uffd.zeropage(address, PAGE, Wake::Now).unwrap(),
        Installed::Exists
    );
    assert_eq!(
        scene.uffd.copy(address, &page(4), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(peek(address), 4, "a copy heals");
}

#[test]
fn poison_kills_the_process_that_touches_it() {
    let child = Child::start(|| {
        let scene = Scene::new(1);
        let poisoned = scene.uffd.poison(scene.at(0), PAGE, Wake::Now);
        if !matches!(poisoned, Ok(Installed::Done)) {
            return 1;
        }
        i32::from(peek(scene.at(0))) + 2
    });
    assert_eq!(child.wait(), Ended::Signal(libc::SIGBUS));
}

#[test]
fn discard_clears_poison() {
    let scene = Scene::new(1);
    assert_eq!(
        scene.uffd.poison(scene.at(0), PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    madvise(scene.at(0), PAGE, libc::MADV_DONTNEED);
    assert_eq!(
        scene.uffd.zeropage(scene.at(0), PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(peek(scene.at(0)), 0);
}

#[test]
fn installs_are_refused_while_a_discard_is_unread() {
    let mut scene = Scene::with_events(4);
    let (start, len) = (scene.at(0), 4 * PAGE);
    let owner = std::thread::spawn(move || madvise(start, len, libc::MADV_DONTNEED));
    eventually("the discard begins", || {
        scene.uffd.probe(start).unwrap() == Presence::Changing
    });
    assert_eq!(
        scene.uffd.copy(start, &page(1), Wake::Now).unwrap(),
        Installed::Again
    );
    assert_eq!(
        scene.uffd.zeropage(start, PAGE, Wake::Now).unwrap(),
        Installed::Again
    );
    assert_eq!(
        scene.uffd.poison(start, PAGE, Wake::Now).unwrap(),
        Installed::Again
    );
    assert!(
        !owner.is_finished(),
        "the owner waits for its message to be read"
    );

    let messages = scene.messages();
    assert!(
        matches!(messages[..], [Message::Remove { start: from, end }] if from == start && end == start + len),
        "{messages:?}"
    );
    owner.join().unwrap();
    assert_eq!(
        scene.uffd.copy(start, &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
}

#[test]
fn hidden_ioctls_are_refused_as_by_a_kernel_without_them() {
    use snaprestore_uffd::uffd::{KernelVersion, Mask};
    let options = OpenOptions::new().mask(Mask::kernel(KernelVersion::new(5, 7)));
    let uffd = options.open().unwrap();
    let region = RawRegion::owned(Arc::new(Mapping::new(PAGE).unwrap()));
    let ioctls = uffd.register(&region, 0, PAGE, Modes::MISSING).unwrap();
    assert_eq!(ioctls, Ioctls::WAKE | Ioctls::COPY | Ioctls::ZEROPAGE);
    let address = region.address();
    let refused = [
        uffd.poison(address, PAGE, Wake::Now),
        uffd.continue_(address, PAGE, Wake::Now),
    ];
    for result in refused {
        assert_eq!(errno(&result.unwrap_err()), Some(libc::EINVAL));
    }
    assert_eq!(
        uffd.copy(address, &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
}
