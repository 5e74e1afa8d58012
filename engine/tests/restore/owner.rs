//! Operations of the owner on its memory during a restore.

use std::sync::Arc;

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{Restore, Restored, StartError, StopMode};
use snaprestore_fixtures::host::skipped;
use snaprestore_uffd::memory::RawRegion;
use snapshot_format::{RegionSpec, Writer, WriterOptions};

use crate::common::{
    PAGE, address, compare, in_child, open, pack, peek, poke, random_bytes, source, wait_until,
    within,
};

const PAGES: u64 = 1024;
const ZERO: [u8; PAGE] = [0; PAGE];

fn start(bytes: &[u8], prefetch: Prefetch) -> Restored {
    Restore::new(open(pack(bytes, 8)))
        .prefetch(prefetch)
        .leave_zero_runs(false)
        .start()
        .unwrap()
}

/// Starts a restore like [`start`], in memory of the test's own, which may be unmapped and moved.
/// The rest of it stays mapped.
fn start_in_own(bytes: &[u8], prefetch: Prefetch) -> Restored {
    let restore = Restore::new(open(pack(bytes, 8)));
    restore
        .region(0, own(PAGES as usize))
        .prefetch(prefetch)
        .start()
        .unwrap()
}

/// Returns memory of the test's own that is never unmapped as a whole.
pub(crate) fn own(pages: usize) -> RawRegion {
    let start = pointer(map(pages)).cast();
    // SAFETY: the memory was just mapped and is used only through raw pointers. Parts of it are
    // unmapped or moved only under a restore, which always requests the events.
    unsafe { RawRegion::new(start, (pages * PAGE) as u64) }.unwrap()
}

/// Returns single pages of the test's own in mappings of their own.
pub(crate) fn own_apart(count: usize) -> Vec<RawRegion> {
    let start = map(2 * count);
    let page = |i: usize| {
        munmap(start + (2 * i + 1) * PAGE, 1);
        // SAFETY: as in `own`.
        unsafe { RawRegion::new(pointer(start + 2 * i * PAGE).cast(), PAGE as u64) }.unwrap()
    };
    (0..count).map(page).collect()
}

fn pointer(address: usize) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(address)
}

#[track_caller]
fn succeeded(result: libc::c_int) {
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

pub(crate) fn madvise(address: usize, pages: usize, advice: libc::c_int) {
    // SAFETY: the tests give advice about their own memory, to which they hold no references.
    succeeded(unsafe { libc::madvise(pointer(address), pages * PAGE, advice) });
}

pub(crate) fn munmap(address: usize, pages: usize) {
    // SAFETY: the tests unmap their own memory, to which they hold no references.
    succeeded(unsafe { libc::munmap(pointer(address), pages * PAGE) });
}

/// Maps anonymous memory of the test's own, which nobody has registered.
fn map(pages: usize) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel picks memory that nothing else uses.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, access, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    start.expose_provenance()
}

/// Maps anonymous memory of the test's own at an address where nothing is mapped.
pub(crate) fn map_at(address: usize, pages: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel refuses if something is mapped there.
    let start = unsafe { libc::mmap(pointer(address), pages * PAGE, access, flags, -1, 0) };
    assert_eq!(
        start,
        pointer(address),
        "{}",
        std::io::Error::last_os_error()
    );
}

/// Moves `pages` pages from `from` to `to`, where the last `grown` of them are new.
fn mremap(from: usize, pages: usize, to: usize, grown: usize, flags: libc::c_int) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | flags;
    // SAFETY: both ranges are the test's own, and nobody refers to their content.
    let moved = unsafe {
        libc::mremap(
            pointer(from),
            pages * PAGE,
            (pages + grown) * PAGE,
            flags,
            pointer(to),
        )
    };
    assert_eq!(moved, pointer(to), "{}", std::io::Error::last_os_error());
}

/// `MCL_FUTURE` fills every new mapping with zeros at once: the engine must avoid that for its own
/// mappings.
#[test]
fn memory_under_mlockall_is_restored_or_refused() {
    in_child(|| {
        // SAFETY: locking changes no content.
        succeeded(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) });
        let bytes = random_bytes(PAGES, 1);
        for prefetch in [Prefetch::Off, Prefetch::All] {
            let restored = start(&bytes, prefetch);
            compare(&restored, &bytes, 0..PAGES);
            assert!(restored.wait_complete());
        }
        let full = own(PAGES as usize);
        let there = full.address();
        let refused = Restore::new(open(pack(&bytes, 8)))
            .region(0, full)
            .start()
            .unwrap_err();
        assert!(
            matches!(refused, StartError::NotEmpty { region: 0, address } if address == there),
            "{refused}"
        );
    })
    .expect_success();
}

/// A single present page is found, wherever it is; empty memory of the caller's is accepted.
#[test]
fn given_memory_with_present_page_is_refused() {
    let bytes = random_bytes(PAGES, 2);
    let memory = map(PAGES as usize);
    // SAFETY: the memory is the test's own and is never unmapped.
    let region = || unsafe { RawRegion::new(pointer(memory).cast(), PAGES * 4096) }.unwrap();
    let give = || {
        Restore::new(open(pack(&bytes, 8)))
            .region(0, region())
            .start()
    };
    poke(memory + 700 * PAGE, 1);
    let refused = give().unwrap_err();
    let there = (memory + 700 * PAGE) as u64;
    assert!(
        matches!(refused, StartError::NotEmpty { address, .. } if address == there),
        "{refused}"
    );
    madvise(memory, PAGES as usize, libc::MADV_DONTNEED);
    let restored = give().unwrap();
    assert_eq!(address(&restored, 0), memory);
    compare(&restored, &bytes, 0..PAGES);
}

/// Returns the first byte of the page at `address` in a forked child, or `None` if the child
/// doesn't have the page.
fn in_a_fork(address: usize) -> Option<u8> {
    let mut pipe = [0; 2];
    // SAFETY: the array takes two descriptors.
    succeeded(unsafe { libc::pipe(pipe.as_mut_ptr()) });
    // SAFETY: the child makes only system calls and leaves by _exit.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            let written = libc::write(pipe[1], pointer(address), 1);
            libc::_exit(i32::from(written != 1));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        assert!(libc::WIFEXITED(status), "{status:#x}");
        let mut byte = 0_u8;
        let there = libc::WEXITSTATUS(status) == 0;
        if there {
            assert_eq!(libc::read(pipe[0], (&raw mut byte).cast(), 1), 1);
        }
        libc::close(pipe[0]);
        libc::close(pipe[1]);
        there.then_some(byte)
    }
}

#[test]
fn children_inherit_memory_only_after_completion() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 3);
        let mut restored = start(&bytes, Prefetch::Off);
        compare(&restored, &bytes, 0..100);
        let (present, absent) = (address(&restored, 50), address(&restored, 900));
        assert_eq!(in_a_fork(present), None);
        assert_eq!(in_a_fork(absent), None);
        restored.stop(StopMode::Complete).unwrap();
        assert_eq!(in_a_fork(present), Some(source(&bytes, 50)[0]));
        assert_eq!(in_a_fork(absent), Some(source(&bytes, 900)[0]));
        compare(&restored, &bytes, 0..PAGES);
    })
    .expect_success();
}

/// A restore that is given up, and one that doesn't start, leave the caller's memory as it was, for
/// children as well.
#[test]
fn children_inherit_memory_after_giving_up() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 11);
        for end in [
            |mut it: Restored| it.stop(StopMode::Inaccessible).unwrap(),
            drop,
        ] {
            let restored = start_in_own(&bytes, Prefetch::Off);
            compare(&restored, &bytes, 0..100);
            let present = address(&restored, 50);
            assert_eq!(in_a_fork(present), None);
            end(restored);
            assert_eq!(in_a_fork(present), Some(source(&bytes, 50)[0]));
        }
        let memory = own(PAGES as usize);
        let there = memory.as_ptr().expose_provenance() + 9 * PAGE;
        poke(there, 7);
        let refused = Restore::new(open(pack(&bytes, 8)))
            .region(0, memory)
            .start()
            .unwrap_err();
        assert!(matches!(refused, StartError::NotEmpty { .. }), "{refused}");
        assert_eq!(in_a_fork(there), Some(7));
    })
    .expect_success();
}

/// Regression test: moved memory was advised about at its old address when the restore became
/// complete. Children never had it, and whatever was at the old address by then was advised about
/// instead. The advice now follows the memory.
#[test]
fn children_inherit_moved_memory_after_completion() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 10);
        let mut restored = start_in_own(&bytes, Prefetch::Off);
        let there = map(16);
        mremap(address(&restored, 500), 16, there, 0, 0);
        assert_eq!(in_a_fork(there), None);
        restored.stop(StopMode::Complete).unwrap();
        assert_eq!(in_a_fork(there + 3 * PAGE), Some(source(&bytes, 503)[0]));
    })
    .expect_success();
}

/// Regression test: memory that the caller itself had left out of children stays left out. The end
/// of the restore gave it to them.
#[test]
fn memory_with_dontfork_is_never_inherited() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 15);
        let give = |memory: RawRegion| {
            let start = memory.as_ptr().expose_provenance();
            madvise(start + 40 * PAGE, 20, libc::MADV_DONTFORK);
            Restore::new(open(pack(&bytes, 8)))
                .region(0, memory)
                .start()
        };
        let had = |base: usize| [39, 40, 59, 60].map(|page| in_a_fork(base + page * PAGE));
        let kept = [true, false, false, true];
        for end in [
            |it: &mut Restored| it.stop(StopMode::Complete).unwrap(),
            |it: &mut Restored| it.stop(StopMode::Inaccessible).unwrap(),
        ] {
            let mut restored = give(own(PAGES as usize)).unwrap();
            let base = address(&restored, 0);
            compare(&restored, &bytes, 30..70);
            assert_eq!(had(base), [None; 4]);
            // The pages stay left out, wherever they are.
            let there = map(8);
            mremap(base + 50 * PAGE, 8, there, 0, 0);
            end(&mut restored);
            assert_eq!(had(base).map(|byte| byte.is_some()), kept);
            assert_eq!(in_a_fork(there + 3 * PAGE), None);
            assert!(peek(there + 3 * PAGE) == source(&bytes, 53));
        }
        let memory = own(PAGES as usize);
        let base = memory.as_ptr().expose_provenance();
        poke(base, 7);
        give(memory).unwrap_err();
        assert_eq!(had(base).map(|byte| byte.is_some()), kept);
    })
    .expect_success();
}

/// Regression test: an owner was killed when its memory was in more than some thousand pieces.
#[test]
fn memory_may_be_split_into_any_number_of_pieces() {
    const MANY: u64 = 12_000;
    in_child(|| {
        let bytes = random_bytes(MANY, 16);
        let restored = Restore::new(open(pack(&bytes, 8)))
            .region(0, own(MANY as usize))
            .start()
            .unwrap();
        let base = address(&restored, 0);
        for page in (1..MANY as usize).step_by(2) {
            munmap(base + page * PAGE, 1);
        }
        compare(&restored, &bytes, (0..MANY).step_by(1000));
        // Each page moves to where another was unmapped, the last first, so that no two stay
        // together.
        for page in (0..MANY as usize / 2).step_by(2) {
            mremap(
                base + page * PAGE,
                1,
                base + (MANY as usize - 1 - page) * PAGE,
                0,
                0,
            );
        }
        for page in (0..MANY).step_by(2) {
            let place = if page < MANY / 2 {
                MANY - 1 - page
            } else {
                page
            };
            assert!(
                peek(base + place as usize * PAGE) == source(&bytes, page),
                "page {page}"
            );
        }
        assert!(restored.wait_complete());
    })
    .expect_success();
}

/// Mappings that begin and end inside frames: installs must stop at their borders.
#[test]
fn split_mappings_with_huge_page_advice_restore() {
    let bytes = random_bytes(PAGES, 4);
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let restored = start(&bytes, prefetch);
        let base = address(&restored, 0);
        madvise(base, PAGES as usize, libc::MADV_HUGEPAGE);
        for page in (3..PAGES as usize).step_by(37) {
            // SAFETY: nobody writes to the page until it is writable again.
            succeeded(unsafe {
                libc::mprotect(pointer(base + page * PAGE), 2 * PAGE, libc::PROT_READ)
            });
        }
        compare(&restored, &bytes, (0..PAGES).rev());
        assert!(restored.wait_complete());
        compare(&restored, &bytes, 0..PAGES);
    }
}

/// Returns the KiB of `field` in `/proc/self/smaps`, summed over the mappings from `start` on.
fn smaps(start: usize, pages: usize, field: &str) -> usize {
    let mut inside = false;
    let mut sum = 0;
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let word = line.split_ascii_whitespace().next().unwrap();
        if let Some((from, _)) = word.split_once('-') {
            let from = usize::from_str_radix(from, 16).unwrap();
            inside = (start..start + pages * PAGE).contains(&from);
        } else if inside && word.strip_suffix(':') == Some(field) {
            let value = line.split_ascii_whitespace().nth(1).unwrap();
            sum += value.parse::<usize>().unwrap();
        }
    }
    sum
}

/// Regression test: an owner may reuse addresses that it unmaps in memory of its own, zero run or
/// not. Giving the restore up took the new mapping there, in an unregistered run of zeros that
/// reports no events.
#[test]
fn unmapped_parts_of_given_memory_are_left_alone() {
    const HUGE: u64 = 512;
    let mut bytes = random_bytes(6 * HUGE, 14);
    bytes[HUGE as usize * PAGE..3 * HUGE as usize * PAGE].fill(0);
    let memory = own(6 * HUGE as usize);
    let start = memory.as_ptr().expose_provenance();
    let mut restored = Restore::new(open(pack(&bytes, 8)))
        .region(0, memory)
        .start()
        .unwrap();
    let (hole, len) = (start + HUGE as usize * PAGE, HUGE as usize * PAGE);
    // SAFETY: the range is the test's own, nobody refers to it, and what is mapped there again is
    // the test's own, too.
    unsafe {
        assert_eq!(libc::munmap(pointer(hole), len), 0);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(
            libc::mmap(pointer(hole), len, access, flags, -1, 0),
            pointer(hole)
        );
    }
    poke(hole, 7);
    restored.stop(StopMode::Inaccessible).unwrap();
    assert_eq!(peek(hole)[0], 7);
}

/// Huge pages are formed from present memory, and from nothing else.
#[test]
fn huge_pages_allocate_nothing_in_holes() {
    const HUGE: usize = 512;
    let said = in_child(|| {
        // Stored, zero, stored except for a discarded page, half stored and half zero, and stored
        // again.
        let mut bytes = random_bytes(5 * HUGE as u64, 12);
        bytes[HUGE * PAGE..2 * HUGE * PAGE].fill(0);
        bytes[7 * HUGE / 2 * PAGE..4 * HUGE * PAGE].fill(0);
        for leave in [true, false] {
            let mut restored = Restore::new(open(pack(&bytes, 8)))
                .huge_pages(true)
                .leave_zero_runs(leave)
                .start()
                .unwrap();
            let start = address(&restored, 0);
            madvise(start + (2 * HUGE + 77) * PAGE, 1, libc::MADV_DONTNEED);
            restored.stop(StopMode::Complete).unwrap();
            let huge = smaps(start, 5 * HUGE, "AnonHugePages");
            if huge == 0 {
                println!("no huge page was made");
                return;
            }
            let rss = smaps(start, 5 * HUGE, "Rss");
            // Mapped zero pages among others get memory; 2 MiB of them get none, left to the kernel
            // or not.
            assert_eq!((huge, rss), (3 * 2048, (4 * HUGE - 1) * 4), "left: {leave}");
            for page in 0..5 * HUGE as u64 {
                let expected = if page as usize == 2 * HUGE + 77 {
                    &ZERO
                } else {
                    source(&bytes, page)
                };
                assert!(peek(address(&restored, page)) == expected, "page {page}");
            }
        }
    })
    .expect_success();
    if said.contains("no huge page was made") {
        skipped(
            "huge_pages_allocate_nothing_in_holes",
            &"this kernel made no huge page",
        );
    }
}

#[test]
fn unmapped_parts_are_settled() {
    let bytes = random_bytes(PAGES, 5);
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let restored = start_in_own(&bytes, prefetch);
        compare(&restored, &bytes, [99, 208]);
        munmap(address(&restored, 100), 105);
        munmap(address(&restored, 1000), 24);
        let kept = (0..1000).filter(|page| !(100..205).contains(page));
        compare(&restored, &bytes, kept);
        within("it is complete", {
            let restored = Arc::new(restored);
            let waits = Arc::clone(&restored);
            move || {
                assert!(waits.wait_complete());
                drop(waits);
            }
        });
    }
}

/// Two regions are adjacent in one mapping, so that the kernel reports a discard across their
/// border in one message.
#[test]
fn discard_over_two_regions_is_zero_in_both() {
    const HALF: usize = PAGES as usize / 2;
    let bytes = random_bytes(PAGES, 15);
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    for half in bytes.chunks(HALF * PAGE) {
        writer.begin_region(&RegionSpec::default()).unwrap();
        writer.write_pages(half).unwrap();
    }
    let memory = map(2 * HALF);
    let half = |number: usize| {
        let start = pointer(memory + number * HALF * PAGE).cast();
        // SAFETY: the memory was just mapped, is used only through raw pointers, and is never
        // unmapped.
        unsafe { RawRegion::new(start, (HALF * PAGE) as u64) }.unwrap()
    };
    let restored = Restore::new(open(writer.finish().unwrap().0))
        .region(0, half(0))
        .region(1, half(1))
        .start()
        .unwrap();
    madvise(memory + (HALF - 10) * PAGE, 20, libc::MADV_DONTNEED);
    for page in 0..2 * HALF {
        let expected = if (HALF - 10..HALF + 10).contains(&page) {
            &ZERO
        } else {
            source(&bytes, page as u64)
        };
        assert!(peek(memory + page * PAGE) == expected, "page {page}");
    }
    assert_eq!(restored.stats().discards, 1);
}

#[test]
fn moved_memory_is_restored_where_it_is() {
    let bytes = random_bytes(PAGES, 6);
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let restored = start_in_own(&bytes, prefetch);
        let base = address(&restored, 0);
        compare(&restored, &bytes, [301, 305]);
        // Pages 300..420 move and grow by 30; the new pages read as zeros.
        let there = map(150);
        mremap(base + 300 * PAGE, 120, there, 30, 0);
        for page in [0, 5, 119, 1, 60, 77] {
            let seen = peek(there + page * PAGE);
            assert!(seen == source(&bytes, 300 + page as u64), "page {page}");
        }
        for page in 120..150 {
            assert!(peek(there + page * PAGE) == ZERO, "grown page {page}");
        }
        // A second, partial move over previously moved pages.
        let again = map(40);
        mremap(there + 20 * PAGE, 40, again, 0, 0);
        for page in 0..40 {
            assert!(peek(again + page * PAGE) == source(&bytes, 320 + page as u64));
        }
        for page in (0..20).chain(60..120) {
            assert!(peek(there + page * PAGE) == source(&bytes, 300 + page as u64));
        }
        compare(&restored, &bytes, (0..300).chain(420..PAGES));
        assert!(restored.wait_complete());
        for page in 120..150 {
            assert!(peek(there + page * PAGE) == ZERO, "grown page {page}");
        }
    }
}

/// `MREMAP_DONTUNMAP` leaves an empty mapping behind, which reads as zeros.
#[test]
fn memory_left_behind_by_a_move_is_zero() {
    let bytes = random_bytes(PAGES, 7);
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let restored = start_in_own(&bytes, prefetch);
        let base = address(&restored, 0);
        compare(&restored, &bytes, [301, 305]);
        let there = map(120);
        let dontunmap = 4;
        mremap(base + 300 * PAGE, 120, there, 0, dontunmap);
        for page in (0..120).rev() {
            let left = peek(base + (300 + page) * PAGE);
            assert!(left == ZERO, "page {page} left behind");
            let seen = peek(there + page * PAGE);
            assert!(seen == source(&bytes, 300 + page as u64), "page {page}");
        }
        compare(&restored, &bytes, (0..300).chain(420..PAGES));
        assert!(restored.wait_complete());
        assert!(peek(base + 310 * PAGE) == ZERO);
    }
}

/// Threads discard without a pause while the restore becomes complete: none may wait forever, and
/// discarded pages are zero.
#[test]
fn discards_during_completion_do_not_block() {
    let bytes = random_bytes(64, 8);
    let file = pack(&bytes, 8);
    for _ in 0..200 {
        let restored = Restore::new(open(file.clone()))
            .prefetch(Prefetch::All)
            .prefetch_threads(1)
            .start()
            .unwrap();
        let base = address(&restored, 0);
        let discards = move |page: usize| {
            move || {
                for _ in 0..30 {
                    madvise(base + page * PAGE, 1, libc::MADV_DONTNEED);
                    assert!(peek(base + page * PAGE) == ZERO);
                }
            }
        };
        let threads = [5, 40].map(|page| std::thread::spawn(discards(page)));
        within("the discards", move || {
            threads.map(|thread| thread.join().unwrap())
        });
        assert!(restored.wait_complete());
        let kept = (0..64).filter(|page| ![5, 40].contains(page));
        compare(&restored, &bytes, kept);
    }
}

/// Regression test: the owner unmaps and moves memory while the restore is given up, and nobody
/// reads the events any more. Missing pages were looked for at the old addresses: the process was
/// aborted because nothing was mapped there, and moved pages would have read as zeros. Missing
/// pages are now poisoned, which the kernel refuses until the events have been read.
#[test]
fn giving_up_follows_the_last_moves() {
    let ended = in_child(|| {
        let bytes = random_bytes(PAGES, 9);
        let gate = crate::common::Gate::default();
        let held = gate.clone();
        let restored = Restore::new(open(pack(&bytes, 8)))
            .region(0, own(PAGES as usize))
            .fault_threads(1)
            .on_first_touch(move |_| held.pass())
            .start()
            .unwrap();
        let base = address(&restored, 0);
        // Its observer blocks the only thread that reads events.
        let touch = std::thread::spawn(move || peek(base));
        wait_until("the observer is called", || gate.waiting() == 1);
        touch.join().unwrap();
        let there = map(8);
        let unmaps = std::thread::spawn(move || munmap(base + 100 * PAGE, 8));
        let moves = std::thread::spawn(move || mremap(base + 200 * PAGE, 8, there, 0, 0));
        let gone = |page: usize| {
            let mut resident = 0_u8;
            // SAFETY: the result goes to a live byte; unmapped addresses are an error.
            let result =
                unsafe { libc::mincore(pointer(base + page * PAGE), PAGE, &raw mut resident) };
            result != 0
        };
        wait_until("both have happened", || gone(100) && gone(200));
        let drops = std::thread::spawn(move || drop(restored));
        // By now the drop has most likely told the thread to exit, which is the case that matters.
        // If not, the events are read as usual.
        std::thread::sleep(std::time::Duration::from_millis(200));
        gate.open();
        drops.join().unwrap();
        unmaps.join().unwrap();
        moves.join().unwrap();
        // The moved page was missing: it must not read as zeros.
        println!("the move is touched");
        peek(there);
        println!("the touch went on");
    });
    assert_eq!(ended.signal(), Some(libc::SIGBUS), "{ended:?}");
    assert!(ended.output.contains("the move is touched"), "{ended:?}");
}
