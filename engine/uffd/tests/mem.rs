//! Mappings, regions, shared blocks, and the proof that memory is empty.

#![allow(unsafe_code, reason = "a test that touches memory directly")]

mod support;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use snaprestore_uffd::memory::{
    Advice, Block, HUGE_PAGE, Mapping, MappingOptions, RawRegion, Ring, first_populated,
    first_populated_by_pagemap,
};
use snaprestore_uffd::memory::{Loads, ReadFault, read_checked};
use snaprestore_uffd::os::SignalsBlocked;
use snaprestore_uffd::uffd::{Installed, Wake};
use support::{Child, Ended, PAGE, Scene, page, peek, poke};

fn is_mapped(address: u64) -> bool {
    let mut residence = 0_u8;
    // SAFETY: mincore writes one byte for the one page in the range, and fails with ENOMEM if it
    // isn't mapped.
    unsafe { libc::mincore(support::pointer(address).cast(), 4096, &raw mut residence) == 0 }
}

#[test]
fn mapping_is_empty_readable_and_congruent_to_the_owners_start() {
    for owner_start in [
        0,
        PAGE,
        0x7f12_3456_7000,
        HUGE_PAGE - PAGE,
        HUGE_PAGE,
        0x5555_5560_0000,
    ] {
        for len in [PAGE, 3 * PAGE, HUGE_PAGE, HUGE_PAGE + PAGE, 5 * HUGE_PAGE] {
            let mapping = MappingOptions::new()
                .congruent_to(owner_start)
                .map(len)
                .unwrap();
            assert_eq!(mapping.len(), len);
            assert_eq!(mapping.address() % HUGE_PAGE, owner_start % HUGE_PAGE);
            assert_eq!(first_populated(mapping.address(), len).unwrap(), None);
            assert_eq!(peek(mapping.address()), 0);
            poke(mapping.address() + len - 1, 7);
            assert_eq!(peek(mapping.address() + len - 1), 7);
        }
    }
}

#[test]
fn mapping_of_partial_pages_is_refused() {
    for len in [0, 1, PAGE + 1, u64::MAX, u64::MAX - 4095] {
        assert!(Mapping::new(len).is_err(), "{len}");
    }
    assert!(MappingOptions::new().congruent_to(12).map(PAGE).is_err());
    assert!(MappingOptions::new().huge_pool(true).map(PAGE).is_err());
}

#[test]
fn mapping_is_unmapped_when_dropped_unless_it_was_given_away() {
    // In a separate process, where nobody else maps anything at the freed address.
    let child = Child::start(|| {
        let mapping = Mapping::new(4 * PAGE).unwrap();
        let address = mapping.address();
        let before = is_mapped(address);
        drop(mapping);
        let after = is_mapped(address);
        let (given, len) = Mapping::new(4 * PAGE).unwrap().into_raw();
        let kept = is_mapped(given.expose_provenance() as u64) && len == 4 * PAGE;
        i32::from(!(before && !after && kept))
    });
    assert_eq!(child.wait(), Ended::Exit(0));
}

#[test]
fn mapping_is_empty_under_mlockall_too() {
    let child = Child::start(|| {
        // SAFETY: mlockall takes a number; it changes only this child process.
        if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
            return 2;
        }
        // The control: any other mapping is filled with zeros at once.
        // SAFETY: new memory, at a place of the kernel's choice.
        let plain = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), 8 * 4096, access, how, -1, 0)
        };
        let plain = plain.expose_provenance() as u64;
        if first_populated(plain, 8 * PAGE).unwrap() != Some(plain) {
            return 3;
        }
        let mapping = Mapping::new(64 * PAGE).unwrap();
        i32::from(
            first_populated(mapping.address(), mapping.len())
                .unwrap()
                .is_some(),
        )
    });
    assert_eq!(child.wait(), Ended::Exit(0));
}

#[test]
fn first_populated_page_is_found_in_both_ways() {
    let scene = Scene::new(2048);
    let (start, len) = (scene.at(0), 2048 * PAGE);
    let both = |start, len| {
        let scanned = first_populated(start, len).unwrap();
        assert_eq!(scanned, first_populated_by_pagemap(start, len).unwrap());
        scanned
    };
    assert_eq!(both(start, len), None);
    assert_eq!(
        scene
            .uffd
            .zeropage(scene.at(1234), PAGE, Wake::Now)
            .unwrap(),
        Installed::Done
    );
    assert_eq!(both(start, len), Some(scene.at(1234)), "a zero page counts");
    assert_eq!(
        scene.uffd.poison(scene.at(77), PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(both(start, len), Some(scene.at(77)), "poison counts");
    assert_eq!(both(scene.at(78), PAGE), None);
    assert_eq!(
        both(scene.at(78), 2048 * PAGE - 78 * PAGE),
        Some(scene.at(1234))
    );
    assert_eq!(
        scene
            .uffd
            .copy(scene.at(2047), &page(1), Wake::Now)
            .unwrap(),
        Installed::Done
    );
    assert_eq!(
        both(scene.at(1235), (2048 - 1235) * PAGE),
        Some(scene.at(2047))
    );
}

#[test]
fn dontfork_memory_is_absent_in_children() {
    let region = RawRegion::owned(Arc::new(Mapping::new(PAGE).unwrap()));
    let address = region.address();
    poke(address, 5);
    let look = || Child::start(move || i32::from(peek(address))).wait();
    region.advise(Advice::DontFork, 0, PAGE).unwrap();
    assert_eq!(look(), Ended::Signal(libc::SIGSEGV));
    region.advise(Advice::DoFork, 0, PAGE).unwrap();
    assert_eq!(look(), Ended::Exit(5));
}

#[test]
fn small_pages_collapse_into_a_huge_one_while_registered() {
    let scene = Scene::new(2 * 512);
    let bytes: Vec<u8> = (0..512_u32)
        .flat_map(|at| page(at.to_le_bytes()[0]))
        .collect();
    assert_eq!(
        scene.uffd.copy(scene.at(0), &bytes, Wake::Now).unwrap(),
        Installed::Done
    );
    scene
        .region
        .advise(Advice::HugePages, 0, scene.region.len())
        .unwrap();
    scene.region.advise(Advice::Collapse, 0, HUGE_PAGE).unwrap();
    assert_eq!(peek(scene.at(300)), 300_u32.to_le_bytes()[0]);
    // Nothing appears where nothing was installed.
    let missing = first_populated(scene.at(512), HUGE_PAGE).unwrap();
    assert_eq!(missing, None);
    scene
        .region
        .advise(Advice::NoHugePages, 0, scene.region.len())
        .unwrap();
    assert!(
        scene
            .region
            .advise(Advice::HugePages, PAGE, scene.region.len())
            .is_err(),
        "beyond the end"
    );
}

#[test]
fn inaccessible_memory_is_an_error_and_not_zeros() {
    let region = RawRegion::owned(Arc::new(Mapping::new(2 * PAGE).unwrap()));
    poke(region.address(), 3);
    region.make_inaccessible(PAGE, PAGE).unwrap();
    assert_eq!(peek(region.address()), 3);
    let error = read_checked(region.address() + PAGE - 1, &mut [0; 2]).unwrap_err();
    assert!(
        matches!(error, ReadFault::Unreadable { address } if address == region.address() + PAGE),
        "{error}"
    );
    assert!(region.make_inaccessible(PAGE, 2 * PAGE).is_err());
}

#[test]
fn checked_reads_wait_for_missing_pages() {
    let mut scene = Scene::new(2);
    let address = scene.at(0) + 4000;
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 200];
        read_checked(address, &mut bytes).map(|()| bytes)
    });
    for byte in [1, 2] {
        let at = scene.fault();
        assert_eq!(
            scene.uffd.copy(at, &page(byte), Wake::Now).unwrap(),
            Installed::Done
        );
    }
    let bytes = reader.join().unwrap().unwrap();
    assert_eq!((bytes[0], bytes[95], bytes[96], bytes[199]), (1, 1, 2, 2));
    read_checked(0, &mut []).unwrap();
    assert!(read_checked(0, &mut [0]).is_err());
    assert!(read_checked(u64::MAX - 1, &mut [0; 8]).is_err());
}

#[test]
fn regions_of_the_callers_memory_are_whole_pages() {
    let mapping = Mapping::new(4 * PAGE).unwrap();
    // SAFETY: the mapping outlives the regions, which are registered nowhere.
    let region =
        |offset: usize, len| unsafe { RawRegion::new(mapping.as_ptr().wrapping_add(offset), len) };
    assert_eq!(
        region(4096, 2 * PAGE).unwrap().address(),
        mapping.address() + PAGE
    );
    assert!(region(1, PAGE).is_err());
    assert!(region(0, PAGE + 1).is_err());
    assert!(region(0, 0).is_err());
    // SAFETY: as above.
    assert!(unsafe { RawRegion::new(std::ptr::null_mut(), PAGE) }.is_err());
}

#[test]
fn registration_keeps_its_mapping_alive() {
    let Scene {
        uffd,
        mapping,
        region,
        ..
    } = Scene::new(2);
    let weak = Arc::downgrade(&mapping);
    let (start, len) = (region.address(), region.len());
    drop((mapping, region));
    assert!(weak.upgrade().is_some());
    uffd.unregister(start, PAGE).unwrap();
    assert!(
        weak.upgrade().is_some(),
        "the second page is still registered"
    );
    uffd.unregister(start + PAGE, len - PAGE).unwrap();
    assert!(weak.upgrade().is_none());
}

#[test]
fn private_block_starts_as_zeros_and_can_be_locked() {
    let (block, _ring) = Block::private(1 << 16).unwrap();
    assert!(
        block
            .words(0, (1 << 16) / 8)
            .iter()
            .all(|word| word.load(Ordering::Relaxed) == 0)
    );
    assert!(block.as_memfd().is_none());
    let child = Child::start(|| {
        block.word(65528).store(9, Ordering::Release);
        0
    });
    assert_eq!(child.wait(), Ended::Exit(0));
    assert_eq!(block.word(65528).load(Ordering::Acquire), 0);
    block.lock().unwrap();
}

#[test]
fn block_in_a_memfd_keeps_size_and_content_for_other_processes() {
    let (block, ring) = Block::memfd(c"snaprestore-test", 4096).unwrap();
    block.word(8).fetch_or(0b101, Ordering::AcqRel);
    let child = Child::start(|| {
        block.word(4088).store(9, Ordering::Release);
        0
    });
    assert_eq!(child.wait(), Ended::Exit(0));
    assert_eq!(block.word(4088).load(Ordering::Acquire), 9);
    block.lock().unwrap();
    let fd: OwnedFd = block.as_memfd().unwrap().try_clone_to_owned().unwrap();
    for size in [0, 4096, 1 << 20] {
        // SAFETY: ftruncate takes numbers.
        let result = unsafe { libc::ftruncate(fd.as_raw_fd(), size) };
        assert_eq!(result, -1, "{size}");
    }
    drop((block, ring));
    let (again, ring) = Block::from_memfd(fd).unwrap();
    assert_eq!(again.len(), 4096);
    assert_eq!(again.word(8).load(Ordering::Relaxed), 0b101);
    assert!(ring.is_clear());

    let unsealed: OwnedFd = tempfile::tempfile().unwrap().into();
    assert!(Block::from_memfd(unsealed).is_err());
}

#[test]
fn views_outside_a_block_are_refused() {
    let (block, _ring) = Block::private(64).unwrap();
    assert_eq!(block.words(0, 8).len(), 8);
    assert_eq!(block.words(64, 0).len(), 0);
    for (offset, count) in [(0, 9), (64, 1), (4, 1), (u64::MAX - 7, 2), (0, usize::MAX)] {
        let view = std::panic::catch_unwind(|| block.words(offset, count).len());
        assert!(view.is_err(), "{offset} {count}");
    }
    assert!(Block::private(7).is_err());
    assert!(Block::private(u64::MAX - 7).is_err());
    assert_eq!(Ring::BYTES, 2048);
}

#[test]
fn threads_started_while_signals_are_blocked_get_none() {
    fn blocked(signal: i32) -> bool {
        // SAFETY: the set is filled by pthread_sigmask before it is read.
        unsafe {
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            assert_eq!(
                libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &raw mut set),
                0
            );
            libc::sigismember(&raw const set, signal) == 1
        }
    }
    let signals = [
        libc::SIGINT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGCHLD,
        libc::SIGPROF,
    ];
    let before = signals.map(blocked);
    let guard = SignalsBlocked::now().unwrap();
    let thread = std::thread::spawn(move || signals.map(blocked));
    drop(guard);
    assert_eq!(thread.join().unwrap(), [true; 5]);
    assert_eq!(signals.map(blocked), before);
}

#[cfg(feature = "rust-vmm")]
#[test]
fn regions_become_guest_memory() {
    use snaprestore_uffd::memory::{GuestMemoryError, guest_memory};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    let mut scene = Scene::new(4);
    let other = RawRegion::owned(Arc::new(Mapping::new(2 * PAGE).unwrap()));
    let parts = [(0, &scene.region), (0x10_0000, &other)];
    // SAFETY: both regions live until the end of this test.
    let memory = unsafe { guest_memory(&parts) }.unwrap();
    assert_eq!(memory.num_regions(), 2);
    memory.write_obj(7_u64, GuestAddress(0x10_1000)).unwrap();
    assert_eq!(peek(other.address() + PAGE), 7);

    let reader = {
        let memory = memory.clone();
        std::thread::spawn(move || memory.read_obj::<u16>(GuestAddress(0x2010)).unwrap())
    };
    assert_eq!(scene.fault(), scene.at(2));
    assert_eq!(
        scene
            .uffd
            .copy(scene.at(2), &page(0x21), Wake::Now)
            .unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 0x2121);

    let overlapping = [(0, &scene.region), (0x1000, &other)];
    // SAFETY: as above.
    let error = unsafe { guest_memory(&overlapping) }.unwrap_err();
    assert!(matches!(error, GuestMemoryError::Regions(_)), "{error}");
    let beyond = [(u64::MAX - 100, &other)];
    // SAFETY: as above.
    let error = unsafe { guest_memory(&beyond) }.unwrap_err();
    assert!(matches!(error, GuestMemoryError::Region { .. }), "{error}");
}

/// Maps two pages: one without access, and one of a file that is too short for it.
fn pages_that_fault() -> [u64; 2] {
    let file = tempfile::tempfile().unwrap();
    let map = |access: i32, flags: i32, fd: i32| {
        // SAFETY: a new mapping, at a place of the kernel's choice.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, flags, fd, 0) };
        assert_ne!(memory, libc::MAP_FAILED);
        memory.expose_provenance() as u64
    };
    [
        map(libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        map(libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd()),
    ]
}

#[test]
fn load_of_an_unreadable_page_is_an_error() {
    let child = Child::start(|| {
        let mapping = Mapping::new(PAGE).unwrap();
        poke(mapping.address() + 5, 7);
        // A blocked signal of this kind would kill the process.
        let blocked = SignalsBlocked::now().unwrap();
        let loads = Loads::in_this_thread().unwrap();
        for _ in 0..3 {
            assert_eq!(loads.byte(mapping.address() + 5).unwrap(), 7);
            assert_eq!(loads.byte(mapping.address()).unwrap(), 0);
            for bad in pages_that_fault().into_iter().chain([0, PAGE]) {
                let error = loads.byte(bad).unwrap_err();
                let is_it = matches!(error, ReadFault::Unreadable { address } if address == bad);
                assert!(is_it, "{error}");
            }
        }
        drop((loads, blocked));
        0
    });
    assert_eq!(child.wait(), Ended::Exit(0));
}

#[test]
fn other_faults_reach_the_previous_signal_action() {
    extern "C" fn exits(signal: i32) {
        // SAFETY: exits this child process at once.
        unsafe { libc::_exit(40 + signal) };
    }
    let faults = |signal: i32, handled: bool, page: u64| {
        Child::start(move || {
            let action = if handled {
                (exits as extern "C" fn(i32) as *const ()).expose_provenance()
            } else {
                libc::SIG_DFL
            };
            // SAFETY: a number, and a handler that may run at any point of this child process.
            unsafe { libc::signal(signal, action) };
            let loads = Loads::in_this_thread().unwrap();
            assert!(loads.byte(page).is_err());
            i32::from(peek(page))
        })
    };
    let [inaccessible, beyond] = pages_that_fault();
    for (signal, page) in [(libc::SIGSEGV, inaccessible), (libc::SIGBUS, beyond)] {
        assert_eq!(faults(signal, true, page).wait(), Ended::Exit(40 + signal));
        assert_eq!(faults(signal, false, page).wait(), Ended::Signal(signal));
    }
}
