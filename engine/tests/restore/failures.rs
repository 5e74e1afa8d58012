//! Pages that can't be restored: exactly those of the bad frame, handled by policy, and never
//! zeros.

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use snaprestore_engine::restore::{
    FailureDecision, FailurePolicy, Restore, Restored, StartError, StopError, StopMode,
};
use snaprestore_engine::{FailureKind, Prefetch};
use snaprestore_uffd::uffd::{KernelVersion, Mask};
use snapshot_format::{Reason, RegionSpec, Snapshot, Writer, WriterOptions};

use crate::common::{
    Ended, Gate, PAGE, address, compare, damaged, frame_of, in_child, index, open, open_hooked,
    pack, pages_of_frame, peek, random_bytes, source, wait_until, within,
};

const PAGES: u64 = 600;
/// A page of the damaged frame.
const BAD: u64 = 101;

/// Returns an image, its damaged snapshot, and the pages of the bad frame.
fn bad_frame(seed: u64) -> (Vec<u8>, Arc<Snapshot>, Vec<u64>) {
    let bytes = random_bytes(PAGES, seed);
    let file = pack(&bytes, 8);
    let good = open(file.clone());
    let frame = frame_of(&good, BAD);
    let bad = pages_of_frame(&good, frame.offset());
    assert_eq!(bad.len(), 8);
    (bytes, open(damaged(file, &frame)), bad)
}

/// Reads every page by `read_at`: those in `bad` fail, all others are right.
fn exactly_bad(restored: &Restored, bytes: &[u8], bad: &[u64]) {
    let mut page = [0; PAGE];
    for n in 0..PAGES {
        let read = restored.read_at(0, n * 4096, &mut page);
        assert_eq!(read.is_err(), bad.contains(&n), "page {n}: {read:?}");
        assert!(read.is_err() || page == source(bytes, n), "page {n}");
    }
}

#[test]
fn poison_hits_exactly_the_bad_frame() {
    let (bytes, snapshot, bad) = bad_frame(1);
    for prefetch in [Prefetch::Off, Prefetch::All] {
        let restored = Restore::new(Arc::clone(&snapshot))
            .prefetch(prefetch)
            .start()
            .unwrap();
        exactly_bad(&restored, &bytes, &bad);
        exactly_bad(&restored, &bytes, &bad);
        let mut failed: Vec<u64> = restored
            .failures()
            .iter()
            .map(|failure| failure.page)
            .collect();
        failed.sort_unstable();
        failed.dedup();
        assert_eq!(failed, bad);
        assert!(
            restored
                .failures()
                .iter()
                .all(|failure| failure.kind == FailureKind::Damaged && failure.offset.is_some())
        );
        // Every page is settled, so the restore is complete; the poison stays.
        assert!(restored.wait_complete());
        assert_eq!(restored.stats().poisoned, 8);
        exactly_bad(&restored, &bytes, &bad);
    }
}

#[test]
fn touching_poison_raises_sigbus() {
    let ended = in_child(|| {
        let (bytes, snapshot, _) = bad_frame(2);
        let restored = Restore::new(snapshot).start().unwrap();
        compare(&restored, &bytes, 0..50);
        peek(address(&restored, BAD));
        panic!("the touch went on");
    });
    assert_eq!(ended.signal(), Some(libc::SIGBUS), "{ended:?}");
}

#[test]
fn system_call_on_poison_returns_efault() {
    let (bytes, snapshot, _) = bad_frame(3);
    let restored = Restore::new(snapshot).start().unwrap();
    let mut to = tempfile::tempfile().unwrap();
    let write = |page: u64| {
        let from = std::ptr::with_exposed_provenance(address(&restored, page));
        // SAFETY: the kernel reads a mapped page, or returns an error if it can't.
        let written = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&to), from, PAGE) };
        if written < 0 {
            Err(io::Error::last_os_error().raw_os_error().unwrap())
        } else {
            Ok(usize::try_from(written).unwrap())
        }
    };
    assert_eq!(write(BAD), Err(libc::EFAULT));
    assert_eq!(write(BAD), Err(libc::EFAULT), "also the second time");
    assert_eq!(write(7), Ok(PAGE));
    let mut page = Vec::new();
    io::Seek::rewind(&mut to).unwrap();
    io::Read::read_to_end(&mut to, &mut page).unwrap();
    assert!(page == source(&bytes, 7));
}

#[test]
fn abort_policy_aborts_the_process() {
    let ended = in_child(|| {
        let (bytes, snapshot, _) = bad_frame(4);
        let restored = Restore::new(snapshot)
            .on_failure(FailurePolicy::Abort)
            .start()
            .unwrap();
        compare(&restored, &bytes, 0..50);
        peek(address(&restored, BAD));
        panic!("the touch went on");
    });
    assert_eq!(ended.signal(), Some(libc::SIGABRT), "{ended:?}");
    // Without a tracing subscriber.
    let line = ended
        .output
        .lines()
        .find(|line| line.contains("snaprestore: aborting"));
    let line = line.unwrap_or_else(|| panic!("no reason in {ended:?}"));
    assert!(line.contains("damaged frame"), "{line}");
}

#[test]
fn abort_does_not_wait_for_a_full_standard_error() {
    let ended = in_child(|| {
        let (_, snapshot, _) = bad_frame(4);
        let restored = Restore::new(snapshot)
            .on_failure(FailurePolicy::Abort)
            .start()
            .unwrap();
        let (_reader, mut writer) = io::pipe().unwrap();
        // SAFETY: system calls on an open descriptor, and on numbers.
        unsafe {
            libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK);
            while io::Write::write(&mut writer, &[0; 4096]).is_ok() {}
            libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, 0);
            libc::dup2(writer.as_raw_fd(), 2);
        }
        peek(address(&restored, BAD));
    });
    assert_eq!(ended.signal(), Some(libc::SIGABRT), "{ended:?}");
}

/// Prefetch alone never ends the owner: nobody has touched the page yet.
#[test]
fn prefetch_skips_and_reports_a_bad_frame() {
    let (bytes, snapshot, bad) = bad_frame(5);
    let restored = Restore::new(snapshot)
        .on_failure(FailurePolicy::Abort)
        .prefetch(Prefetch::All)
        .start()
        .unwrap();
    assert!(!restored.wait_complete());
    let good = (0..PAGES).filter(|page| !bad.contains(page));
    compare(&restored, &bytes, good);
    let stats = restored.stats();
    assert_eq!(stats.faults, 0);
    assert_eq!(stats.prefetch.copied, PAGES - 8);
    assert_eq!(stats.poisoned, 0);
    let mut reported: Vec<u64> = restored.failures().iter().map(|f| f.page).collect();
    reported.sort_unstable();
    reported.dedup();
    assert_eq!(reported, bad);
}

/// Prefetch reads a damaged frame once, rather than for each of its pages. A touch reads it again,
/// and so does a stop.
#[test]
fn prefetch_reads_a_bad_frame_once() {
    let bytes = random_bytes(PAGES, 13);
    let file = pack(&bytes, 8);
    let frame = frame_of(&open(file.clone()), BAD).offset();
    let healed = Arc::new(AtomicBool::new(false));
    let (heals, reads) = (Arc::clone(&healed), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&reads);
    let snapshot = open_hooked(file, move |buf, offset, _| {
        if let Some(at) = place_in(buf, offset, frame) {
            counted.fetch_add(1, SeqCst);
            buf[at + 40] ^= u8::from(!heals.load(SeqCst));
        }
        Ok(())
    });
    let mut restored = Restore::new(snapshot)
        .prefetch(Prefetch::All)
        .prefetch_threads(1)
        .start()
        .unwrap();
    assert!(!restored.wait_complete());
    assert_eq!(reads.load(SeqCst), 1);
    let reported: Vec<u64> = restored.failures().iter().map(|f| f.page).collect();
    assert_eq!(reported, (BAD / 8 * 8..BAD / 8 * 8 + 8).collect::<Vec<_>>());
    assert!(restored.stop(StopMode::Complete).is_err());
    assert_eq!(reads.load(SeqCst), 2);
    healed.store(true, SeqCst);
    compare(&restored, &bytes, [BAD]);
    restored.stop(StopMode::Complete).unwrap();
    compare(&restored, &bytes, 0..PAGES);
}

/// Returns the place of offset `wanted` in a part of a file that was read: prefetch reads several
/// frames at once.
fn place_in(read: &[u8], offset: u64, wanted: u64) -> Option<usize> {
    let place = usize::try_from(wanted.checked_sub(offset)?).ok()?;
    (place < read.len()).then_some(place)
}

/// A store that fails for one frame until it is healed.
struct Ill {
    snapshot: Arc<Snapshot>,
    healed: Arc<AtomicBool>,
    /// Number of reads of that frame.
    reads: Arc<AtomicUsize>,
    bytes: Vec<u8>,
}

fn ill(seed: u64) -> Ill {
    let bytes = random_bytes(PAGES, seed);
    let file = pack(&bytes, 8);
    let bad = frame_of(&open(file.clone()), BAD).offset();
    let healed = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicUsize::new(0));
    let (heals, counted) = (Arc::clone(&healed), Arc::clone(&reads));
    let snapshot = open_hooked(file, move |buf, offset, _| {
        if place_in(buf, offset, bad).is_none() {
            return Ok(());
        }
        counted.fetch_add(1, SeqCst);
        if heals.load(SeqCst) {
            return Ok(());
        }
        Err(io::Error::other("the store is ill"))
    });
    Ill {
        snapshot,
        healed,
        reads,
        bytes,
    }
}

/// A timeout that is never reached.
const NEVER: Duration = Duration::from_secs(3600);

/// A read error isn't final: the only fault thread reads the page again, and serves others
/// meanwhile.
#[test]
fn read_error_is_retried_while_others_are_served() {
    let Ill {
        snapshot,
        healed,
        reads,
        bytes,
    } = ill(14);
    let restored = Restore::new(snapshot)
        .fault_threads(1)
        .retry_timeout(NEVER)
        .on_failure(FailurePolicy::Abort)
        .start()
        .unwrap();
    let bad = address(&restored, BAD);
    let touch = std::thread::spawn(move || peek(bad));
    // More reads than were ever made before the page counted as failed.
    wait_until("the frame is read again", || reads.load(SeqCst) >= 8);
    let others: Vec<_> = (0..PAGES).filter(|page| page / 8 != BAD / 8).collect();
    let addresses: Vec<_> = others
        .iter()
        .map(|page| address(&restored, *page))
        .collect();
    let seen = within("other faults are served", move || {
        addresses.into_iter().map(peek).collect::<Vec<_>>()
    });
    for (seen, page) in seen.iter().zip(others) {
        assert!(seen == source(&bytes, page), "page {page}");
    }
    assert!(!touch.is_finished());
    assert!(restored.failures().is_empty());
    healed.store(true, SeqCst);
    let seen = within("the fault is answered", move || touch.join().unwrap());
    assert!(seen == source(&bytes, BAD));
    assert_eq!(restored.stats().failures, 0);
}

#[test]
fn read_error_fails_after_the_retry_timeout() {
    for (timeout, least) in [(Duration::ZERO, 1), (Duration::from_millis(20), 3)] {
        let Ill {
            snapshot, reads, ..
        } = ill(15);
        let restored = Restore::new(snapshot)
            .retry_timeout(timeout)
            .start()
            .unwrap();
        assert!(restored.read_at(0, BAD * 4096, &mut [0; PAGE]).is_err());
        let reads = reads.load(SeqCst);
        // The pauses between them grow: no machine is fast enough for many reads.
        assert!((least..=7).contains(&reads), "{reads} reads in {timeout:?}");
        assert_eq!(restored.failures()[0].kind, FailureKind::Io);
        assert_eq!(restored.stats().poisoned, 1);
    }
}

#[test]
fn damage_is_not_read_again() {
    let bytes = random_bytes(PAGES, 16);
    let file = pack(&bytes, 8);
    let frame = frame_of(&open(file.clone()), BAD);
    let reads = Arc::new(AtomicUsize::new(0));
    let (counted, offset) = (Arc::clone(&reads), frame.offset());
    let snapshot = open_hooked(damaged(file, &frame), move |_, at, _| {
        counted.fetch_add(usize::from(at == offset), SeqCst);
        Ok(())
    });
    let restored = Restore::new(snapshot).retry_timeout(NEVER).start().unwrap();
    assert!(restored.read_at(0, BAD * 4096, &mut [0; PAGE]).is_err());
    assert_eq!(reads.load(SeqCst), 1);
}

/// Pages of every kind were poisoned while the store failed. The store works again when the restore
/// is completed.
#[test]
fn completing_heals_poisoned_pages() {
    let mut bytes = random_bytes(1024, 17);
    bytes[600 * PAGE..601 * PAGE].fill(0);
    bytes[601 * PAGE..603 * PAGE].fill(0xcc);
    let ill = Arc::new(AtomicBool::new(true));
    let is_ill = Arc::clone(&ill);
    let snapshot = open_hooked(pack(&bytes, 8), move |_, _, reason| {
        if reason != Reason::Open && is_ill.load(SeqCst) {
            return Err(io::Error::other("the store is ill"));
        }
        Ok(())
    });
    let mut restored = Restore::new(snapshot)
        .retry_timeout(Duration::ZERO)
        .start()
        .unwrap();
    let poisoned = [0, 1, 599, 600, 601, 602, 1023];
    for page in poisoned {
        let read = restored.read_at(0, page * 4096, &mut [0; PAGE]);
        assert!(read.is_err(), "page {page}");
    }
    assert_eq!(restored.stats().poisoned, poisoned.len() as u64);
    ill.store(false, SeqCst);
    restored.stop(StopMode::Complete).unwrap();
    assert!(restored.is_complete());
    compare(&restored, &bytes, 0..1024);
}

/// While the restore is being completed, the store fails a little longer.
#[test]
fn completing_retries_unreadable_pages() {
    let Ill {
        snapshot,
        healed,
        reads,
        bytes,
    } = ill(18);
    let mut restored = Restore::new(snapshot).retry_timeout(NEVER).start().unwrap();
    std::thread::scope(|scope| {
        let stops = scope.spawn(|| restored.stop(StopMode::Complete));
        wait_until("it is read again", || reads.load(SeqCst) >= 8);
        healed.store(true, SeqCst);
        stops.join().unwrap().unwrap();
    });
    compare(&restored, &bytes, 0..PAGES);
}

/// Prefetch skips pages that it can't read, loads everything else, and comes back to them.
#[test]
fn prefetch_retries_unreadable_pages() {
    let Ill {
        snapshot,
        healed,
        reads,
        bytes,
    } = ill(20);
    let restored = Restore::new(snapshot)
        .prefetch(Prefetch::All)
        .retry_timeout(NEVER)
        .start()
        .unwrap();
    wait_until("all else is there, and it is read again", || {
        restored.stats().prefetch.copied == PAGES - 8 && reads.load(SeqCst) >= 4
    });
    assert!(restored.failures().is_empty());
    healed.store(true, SeqCst);
    assert!(restored.wait_complete());
    let stats = restored.stats();
    assert_eq!((stats.prefetch.copied, stats.failures), (PAGES, 0));
    compare(&restored, &bytes, 0..PAGES);
}

/// Pages that prefetch could not read until the timeout are reported one by one.
#[test]
fn prefetch_reports_pages_unreadable_until_timeout() {
    for timeout in [Duration::ZERO, Duration::from_millis(30)] {
        let Ill {
            snapshot, bytes, ..
        } = ill(21);
        let restored = Restore::new(snapshot)
            .prefetch(Prefetch::All)
            .retry_timeout(timeout)
            .start()
            .unwrap();
        assert!(!restored.wait_complete());
        let first = BAD / 8 * 8;
        let mut reported: Vec<u64> = restored.failures().iter().map(|f| f.page).collect();
        reported.sort_unstable();
        assert_eq!(reported, (first..first + 8).collect::<Vec<_>>());
        assert!(
            restored
                .failures()
                .iter()
                .all(|f| f.kind == FailureKind::Io)
        );
        assert_eq!(restored.stats().prefetch.copied, PAGES - 8);
        let good = (0..PAGES).filter(|page| page / 8 != BAD / 8);
        compare(&restored, &bytes, good);
    }
}

/// The prefetch threads get ENOMEM, as if the owner's cgroup were at its limit.
#[test]
fn prefetch_without_memory_ends_with_failure() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 22);
        // An ioctl that copies pages fails with ENOMEM.
        let json = format!(
            r#"{{"it": {{"mismatch_action": "allow", "match_action": {{"errno": {}}}, "filter": [
                {{"syscall": "ioctl", "args": [{{"index": 1, "type": "dword", "op": "eq", "val": {}}}]}}]}}}}"#,
            libc::ENOMEM,
            0xc028_aa03_u32
        );
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let mut filters = seccompiler::compile_from_json(json.as_bytes(), arch).unwrap();
        let filter = filters.remove("it").unwrap();
        let restored = Restore::new(open(pack(&bytes, 8)))
            .prefetch(Prefetch::All)
            .retry_timeout(Duration::from_millis(50))
            .on_thread_start(move |name| {
                if name.starts_with("snap-fetch") {
                    seccompiler::apply_filter(&filter).unwrap();
                }
            })
            .start()
            .unwrap();
        assert!(!restored.wait_complete());
        let failures = restored.failures();
        let said = failures.first().expect("it says why").to_string();
        assert!(said.contains("memory"), "{said}");
        assert!(failures.iter().all(|f| f.kind == FailureKind::Install));
        assert_eq!(restored.stats().prefetch.copied, 0);
        // Touches are served nevertheless.
        compare(&restored, &bytes, 0..PAGES);
        assert!(restored.wait_complete());
    })
    .expect_success();
}

#[test]
fn completing_with_pages_that_stay_poisoned_is_an_error() {
    let (bytes, snapshot, bad) = bad_frame(19);
    // Completed by the stop, or before it.
    for touched in [0..PAGES, BAD / 8 * 8..BAD / 8 * 8 + 8] {
        let mut restored = Restore::new(Arc::clone(&snapshot)).start().unwrap();
        for page in touched {
            let _ = restored.read_at(0, page * 4096, &mut [0; PAGE]);
        }
        match restored.stop(StopMode::Complete) {
            Err(StopError::Poisoned { pages: 8, first }) => assert!(bad.contains(&first.page)),
            other => panic!("{other:?}"),
        }
        assert!(restored.is_complete());
        exactly_bad(&restored, &bytes, &bad);
    }
}

#[test]
fn retry_decision_heals_while_others_are_served() {
    let Ill {
        snapshot,
        healed,
        bytes,
        ..
    } = ill(6);
    let gate = Gate::default();
    let (asked, asked_on) = (gate.clone(), Arc::new(Mutex::new(Vec::new())));
    let threads = Arc::clone(&asked_on);
    let restored = Restore::new(snapshot)
        .fault_threads(1)
        .retry_timeout(Duration::ZERO)
        .on_failure(FailurePolicy::Ask(Arc::new(move |failure| {
            let name = std::thread::current().name().unwrap_or("").to_owned();
            threads
                .lock()
                .unwrap()
                .push((name, failure.page, failure.kind));
            asked.pass();
            FailureDecision::Retry
        })))
        .start()
        .unwrap();
    let _opener = gate.opener();
    let bad = address(&restored, BAD);
    let touch = std::thread::spawn(move || peek(bad));
    wait_until("the callback is asked", || gate.waiting() == 1);
    // The only fault thread serves others while the question is open.
    let others: Vec<_> = (0..PAGES)
        .filter(|page| page / 8 != BAD / 8)
        .map(|page| address(&restored, page))
        .collect();
    let seen = within("other faults are served", move || {
        others.into_iter().map(peek).collect::<Vec<_>>()
    });
    let expected = (0..PAGES).filter(|page| page / 8 != BAD / 8);
    for (seen, page) in seen.iter().zip(expected) {
        assert!(seen == source(&bytes, page), "page {page}");
    }
    assert!(!touch.is_finished());
    healed.store(true, SeqCst);
    gate.open();
    let seen = within("the fault is answered", move || touch.join().unwrap());
    assert!(seen == source(&bytes, BAD));
    let asked_on = asked_on.lock().unwrap();
    assert!(
        asked_on
            .iter()
            .all(|asked| *asked == ("snap-ask".to_owned(), BAD, FailureKind::Io)),
        "{asked_on:?}"
    );
}

#[test]
fn poison_decision_poisons_the_page() {
    let Ill {
        snapshot, bytes, ..
    } = ill(7);
    let restored = Restore::new(snapshot)
        .retry_timeout(Duration::from_millis(1))
        .on_failure(FailurePolicy::Ask(Arc::new(|_| FailureDecision::Poison)))
        .start()
        .unwrap();
    let bad: Vec<u64> = (BAD / 8 * 8..BAD / 8 * 8 + 8).collect();
    exactly_bad(&restored, &bytes, &bad);
}

/// While a decision is pending the restore may still become complete, so a wait for completion
/// waits for the decision.
#[test]
fn wait_complete_waits_for_the_decision() {
    let (bytes, snapshot, bad) = bad_frame(11);
    let gate = Gate::default();
    let asked = gate.clone();
    let restored = Restore::new(snapshot)
        .on_failure(FailurePolicy::Ask(Arc::new(move |_| {
            asked.pass();
            FailureDecision::Poison
        })))
        .start()
        .unwrap();
    compare(&restored, &bytes, (0..PAGES).filter(|n| !bad.contains(n)));
    std::thread::scope(|scope| {
        let _opener = gate.opener();
        let read = |page: &u64| {
            let (restored, page) = (&restored, *page);
            scope.spawn(move || restored.read_at(0, page * 4096, &mut [0; PAGE]))
        };
        let reads: Vec<_> = bad.iter().map(read).collect();
        wait_until("the callback is asked", || gate.waiting() == 1);
        let waits = scope.spawn(|| restored.wait_complete());
        // Longer than the polling interval of a waiter.
        std::thread::sleep(Duration::from_millis(120));
        assert!(!waits.is_finished(), "the decision is pending");
        gate.open();
        assert!(reads.into_iter().all(|read| read.join().unwrap().is_err()));
        assert!(waits.join().unwrap());
    });
}

/// A signal handler that only interrupts.
extern "C" fn interrupted(_: libc::c_int) {}

/// A signal that interrupts a waiting thread makes it touch the page again. There is still one
/// question, and the page isn't read again because of the signal.
#[test]
fn interrupted_touch_is_asked_once() {
    in_child(|| {
        // SAFETY: the handler does nothing, so it may run anywhere.
        unsafe {
            let handler = interrupted as extern "C" fn(libc::c_int);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            assert_eq!(
                libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()),
                0
            );
        }
        let bytes = random_bytes(PAGES, 12);
        let file = pack(&bytes, 8);
        let frame = frame_of(&open(file.clone()), BAD).offset();
        let reads = Arc::new(AtomicUsize::new(0));
        let (healed, counted) = (Arc::new(AtomicBool::new(false)), Arc::clone(&reads));
        let heals = Arc::clone(&healed);
        let snapshot = open_hooked(file, move |buf, offset, _| {
            if offset == frame {
                counted.fetch_add(1, SeqCst);
                buf[40] ^= u8::from(!heals.load(SeqCst));
            }
            Ok(())
        });
        let gate = Gate::default();
        let (asked, times) = (gate.clone(), Arc::new(AtomicUsize::new(0)));
        let asks = Arc::clone(&times);
        let restored = Restore::new(snapshot)
            .on_failure(FailurePolicy::Ask(Arc::new(move |_| {
                asks.fetch_add(1, SeqCst);
                asked.pass();
                FailureDecision::Retry
            })))
            .start()
            .unwrap();
        let _opener = gate.opener();
        let bad = address(&restored, BAD);
        let touch = std::thread::spawn(move || peek(bad));
        wait_until("the callback is asked", || gate.waiting() == 1);
        let thread = std::os::unix::thread::JoinHandleExt::as_pthread_t(&touch);
        for faults in 2..20 {
            // SAFETY: the thread waits for its page and hasn't been joined.
            assert_eq!(unsafe { libc::pthread_kill(thread, libc::SIGUSR1) }, 0);
            wait_until("it touches again", || restored.stats().faults >= faults);
        }
        assert_eq!((times.load(SeqCst), reads.load(SeqCst)), (1, 1));
        healed.store(true, SeqCst);
        gate.open();
        assert!(touch.join().unwrap() == source(&bytes, BAD));
        assert_eq!((times.load(SeqCst), reads.load(SeqCst)), (1, 2));
    })
    .expect_success();
}

/// Returns a snapshot whose pages 3 and 4 of 10 were unreadable when it was taken.
fn with_unavailable() -> (Vec<u8>, Arc<Snapshot>) {
    let bytes = random_bytes(10, 8);
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_pages(&bytes[..3 * PAGE]).unwrap();
    writer.write_unavailable(2).unwrap();
    writer.write_pages(&bytes[5 * PAGE..]).unwrap();
    (bytes, open(writer.finish().unwrap().0))
}

#[test]
fn unavailable_pages_never_read_as_zeros() {
    let (bytes, snapshot) = with_unavailable();
    let restored = Restore::new(snapshot).start().unwrap();
    let mut page = [0; PAGE];
    for n in 0..10 {
        let read = restored.read_at(0, n * 4096, &mut page);
        assert_eq!(read.is_err(), n == 3 || n == 4, "page {n}");
        assert!(read.is_err() || page == source(&bytes, n));
    }
    let kinds: Vec<_> = restored
        .failures()
        .iter()
        .map(|f| (f.page, f.kind))
        .collect();
    let unavailable = FailureKind::Unavailable;
    assert_eq!(kinds, [(3, unavailable), (4, unavailable)]);
    let ended: Ended = in_child(|| {
        let (_, snapshot) = with_unavailable();
        let restored = Restore::new(snapshot)
            .on_failure(FailurePolicy::Abort)
            .start()
            .unwrap();
        peek(address(&restored, 4));
    });
    assert_eq!(ended.signal(), Some(libc::SIGABRT), "{ended:?}");
}

/// A snapshot of 64 GiB of unreadable pages, and nothing else. Each index block is one failure:
/// page by page there would be millions.
#[test]
fn unavailable_blocks_are_skipped_at_once() {
    const BLOCKS: u64 = 32 << 10;
    const BLOCK_PAGES: u64 = 512;
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).unwrap();
    writer.begin_region(&RegionSpec::default()).unwrap();
    writer.write_unavailable(BLOCKS * BLOCK_PAGES).unwrap();
    let restored = Restore::new(open(writer.finish().unwrap().0))
        .prefetch(Prefetch::All)
        .start()
        .unwrap();
    assert!(!restored.wait_complete());
    assert_eq!(restored.stats().failures, BLOCKS);
    let failures = restored.failures();
    let mut pages: Vec<u64> = failures.iter().map(|failure| failure.page).collect();
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(pages.len(), failures.len());
    assert!(pages.iter().all(|page| page % BLOCK_PAGES == 0));
    assert!(
        failures
            .iter()
            .all(|failure| failure.kind == FailureKind::Unavailable)
    );
    // They are not zeros either.
    for page in [0, 7, BLOCKS * BLOCK_PAGES - 1] {
        assert!(restored.read_at(0, page * 4096, &mut [0; PAGE]).is_err());
    }
}

#[test]
fn poison_policy_is_refused_without_kernel_support() {
    let (_, snapshot, _) = bad_frame(9);
    let start = |policy| {
        Restore::new(Arc::clone(&snapshot))
            .on_failure(policy)
            .mask(Mask::kernel(KernelVersion::new(6, 5)))
            .start()
    };
    let ask = FailurePolicy::Ask(Arc::new(|_| FailureDecision::Poison));
    for policy in [FailurePolicy::Poison, ask] {
        let refused = start(policy).unwrap_err();
        assert!(matches!(refused, StartError::NoPoison), "{refused}");
    }
    start(FailurePolicy::Abort).unwrap();
}

/// A damaged index block is a failure of each of its pages, found by the same checks.
#[test]
fn damaged_index_block_poisons_only_its_pages() {
    let bytes = random_bytes(1024, 10);
    let file = pack(&bytes, 8);
    let good = open(file.clone());
    let frames: Vec<u64> = (0..1024)
        .map(|page| frame_of(&good, page).offset())
        .collect();
    let hit = Arc::new(Mutex::new(None));
    let first = Arc::clone(&hit);
    // The first demand read that is not for a frame is for an index block.
    let snapshot = open_hooked(file, move |buf, offset, reason| {
        if reason == Reason::Demand && !frames.contains(&offset) {
            let mut first = first.lock().unwrap();
            if *first.get_or_insert(offset) == offset {
                buf[0] ^= 1;
            }
        }
        Ok(())
    });
    let restored = Restore::new(snapshot).start().unwrap();
    let mut page = [0; PAGE];
    for n in [700, 5, 1023, 512, 511] {
        let read = restored.read_at(0, n * 4096, &mut page);
        assert_eq!(read.is_err(), n >= 512, "page {n}");
        assert!(read.is_err() || page == bytes[index(n) * PAGE..][..PAGE]);
    }
    let pages: Vec<u64> = restored.failures().iter().map(|f| f.page).collect();
    assert_eq!(pages, [700, 1023, 512]);
}
