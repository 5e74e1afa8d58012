//! Callbacks that misbehave: they touch memory under restore, panic, or never return.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{
    FailureDecision, FailurePolicy, ReadAtError, Restore, Restored, StopError, StopMode,
};
use snaprestore_fixtures::host::skipped;
use snaprestore_uffd::memory::Loads;
use snaprestore_uffd::memory::RawRegion;
use snapshot_format::{Reason, Snapshot};

use crate::common::{
    Ended, Gate, PAGE, address, compare, damaged, frame_of, in_child, open, open_hooked, pack,
    peek, random_bytes, source, wait_until, within,
};

const PAGES: u64 = 1024;
/// A page of the damaged frame, where there is one.
const BAD: u64 = 500;

/// Touches a page in a thread of its own. The result is `None` if the page is poisoned or
/// inaccessible.
fn touch(address: usize) -> JoinHandle<Option<u8>> {
    std::thread::spawn(move || {
        let loads = Loads::in_this_thread().unwrap();
        loads.byte(address as u64).ok()
    })
}

fn drops(restored: Restored) {
    within("dropping", move || drop(restored));
}

fn with_bad_frame(seed: u64) -> Arc<Snapshot> {
    let file = pack(&random_bytes(PAGES, seed), 8);
    let frame = frame_of(&open(file.clone()), BAD);
    open(damaged(file, &frame))
}

#[track_caller]
fn is_aborted_for_touching(ended: &Ended, thread: &str) {
    assert_eq!(ended.signal(), Some(libc::SIGABRT), "{ended:?}");
    let why = format!("engine thread {thread}");
    let line = |line: &&str| line.contains("snaprestore: aborting") && line.contains(&why);
    let line = ended.output.lines().find(line);
    let line = line.unwrap_or_else(|| panic!("no reason in {ended:?}"));
    assert!(line.contains("must not touch"), "{line}");
}

#[test]
fn observer_that_touches_memory_aborts_with_the_reason() {
    let ended = in_child(|| {
        let target = Arc::new(AtomicUsize::new(0));
        let observed = Arc::clone(&target);
        let restored = Restore::new(open(pack(&random_bytes(PAGES, 1), 8)))
            .fault_threads(1)
            .on_first_touch(move |_| {
                peek(observed.load(SeqCst));
            })
            .start()
            .unwrap();
        target.store(address(&restored, 700), SeqCst);
        peek(address(&restored, 0));
        std::thread::sleep(crate::common::HANG_TIMEOUT);
    });
    is_aborted_for_touching(&ended, "snap-fault-");
}

/// Its only fault thread waits for itself, so that drop detects it.
#[test]
fn store_that_touches_memory_aborts_with_the_reason() {
    let ended = in_child(|| {
        let target = Arc::new(AtomicUsize::new(0));
        let (reads, reading) = (Arc::clone(&target), Arc::new(AtomicBool::new(false)));
        let began = Arc::clone(&reading);
        let snapshot = open_hooked(pack(&random_bytes(PAGES, 2), 8), move |_, _, reason| {
            if reason == Reason::Demand && reads.load(SeqCst) != 0 {
                began.store(true, SeqCst);
                peek(reads.load(SeqCst));
            }
            Ok(())
        });
        let restored = Restore::new(snapshot).fault_threads(1).start().unwrap();
        target.store(address(&restored, 700), SeqCst);
        let _toucher = touch(address(&restored, 0));
        wait_until("it reads", || reading.load(SeqCst));
        drop(restored);
    });
    is_aborted_for_touching(&ended, "snap-fault-0");
}

#[test]
fn callback_that_panics_aborts_with_the_reason() {
    let ended = in_child(|| {
        std::panic::set_hook(Box::new(|_| {}));
        let restored = Restore::new(open(pack(&random_bytes(PAGES, 3), 8)))
            .on_first_touch(|_| panic!("in silence"))
            .start()
            .unwrap();
        peek(address(&restored, 0));
        std::thread::sleep(crate::common::HANG_TIMEOUT);
    });
    assert_eq!(ended.signal(), Some(libc::SIGABRT), "{ended:?}");
    assert!(
        ended.output.contains("snaprestore: aborting") && ended.output.contains("panicked"),
        "{ended:?}"
    );
}

#[test]
fn callback_that_blocks_does_not_block_drop() {
    in_child(|| {
        let gate = Gate::default();
        let asked = gate.clone();
        let restored = Restore::new(with_bad_frame(4))
            .on_failure(FailurePolicy::Ask(Arc::new(move |_| {
                asked.pass();
                FailureDecision::Abort
            })))
            .start()
            .unwrap();
        let toucher = touch(address(&restored, BAD));
        wait_until("it asks", || gate.waiting() == 1);
        drops(restored);
        assert_eq!(toucher.join().unwrap(), None);
        // The answer comes too late to abort because of it.
        gate.open();
        wait_until("it has answered", || gate.waiting() == 0);
        std::thread::sleep(std::time::Duration::from_millis(50));
    })
    .expect_success();
}

/// A thread that is left behind in the store can't reach memory that is mapped there afterwards.
#[test]
fn store_that_blocks_does_not_block_drop() {
    in_child(|| {
        for (reason, prefetch) in [
            (Reason::Demand, Prefetch::Off),
            (Reason::Prefetch, Prefetch::All),
        ] {
            let len = PAGES as usize * PAGE;
            let bytes = random_bytes(PAGES, 5);
            let (gate, armed) = (Gate::default(), Arc::new(AtomicBool::new(false)));
            let (blocks, arms) = (gate.clone(), Arc::clone(&armed));
            let snapshot = open_hooked(pack(&bytes, 8), move |_, _, why| {
                if why == reason && arms.load(SeqCst) {
                    blocks.pass();
                }
                Ok(())
            });
            let memory = map(std::ptr::null_mut(), len, 0);
            // SAFETY: the memory was just mapped, is used only through raw pointers, and is
            // unmapped after the restore was dropped.
            let region = unsafe { RawRegion::new(memory.cast(), len as u64) }.unwrap();
            armed.store(true, SeqCst);
            let restored = Restore::new(snapshot)
                .region(0, region)
                .fault_threads(1)
                .prefetch(prefetch)
                .start()
                .unwrap();
            let start = address(&restored, 0);
            let toucher = (reason == Reason::Demand).then(|| touch(start));
            wait_until("it reads", || gate.waiting() > 0);
            drops(restored);
            if let Some(toucher) = toucher {
                assert_eq!(toucher.join().unwrap(), None);
            }
            // SAFETY: nobody uses the memory any more; then something else is mapped there.
            unsafe { libc::munmap(memory, len) };
            let other = map(memory, len, libc::MAP_FIXED_NOREPLACE);
            assert_eq!(other, memory);
            gate.open();
            wait_until("the store has answered", || gate.waiting() == 0);
            wait_until("its threads have ended", || engine_threads().is_empty());
            for page in 0..PAGES as usize {
                assert!(peek(start + page * PAGE) == [0; PAGE], "page {page}");
            }
        }
    })
    .expect_success();
}

/// Returns the engine's threads in this process, except those of the snapshot's writer.
fn engine_threads() -> Vec<(String, i32)> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let named = |task: std::io::Result<std::fs::DirEntry>| {
        let folder = task.ok()?.path();
        let number = folder.file_name()?.to_str()?.parse().ok()?;
        Some((std::fs::read_to_string(folder.join("comm")).ok()?, number))
    };
    let is_engine =
        |(name, _): &(String, i32)| name.starts_with("snap-f") || name.starts_with("snap-ask");
    tasks.filter_map(named).filter(is_engine).collect()
}

fn map(address: *mut libc::c_void, len: usize, more: i32) -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | more;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, which replaces none.
    let memory = unsafe { libc::mmap(address, len, access, flags, -1, 0) };
    assert_ne!(memory, libc::MAP_FAILED);
    memory
}

#[test]
fn hook_that_blocks_does_not_block_drop() {
    in_child(|| {
        let gate = Gate::default();
        let hook = gate.clone();
        let restored = Restore::new(open(pack(&random_bytes(PAGES, 6), 8)))
            .on_thread_start(move |_| hook.pass())
            .start()
            .unwrap();
        wait_until("it is called", || gate.waiting() > 0);
        drops(restored);
    })
    .expect_success();
}

/// A slot for the handle, from which a callback can drop it.
type Slot = Arc<Mutex<Option<Restored>>>;

#[test]
fn handle_can_be_dropped_inside_any_callback() {
    in_child(|| {
        let (slot, told) = (Slot::default(), channel());
        let dropper = |slot: &Slot| {
            let (slot, tell) = (Arc::clone(slot), told.0.clone());
            move || {
                if let Some(restored) = slot.lock().unwrap().take() {
                    drop(restored);
                    tell.send(()).unwrap();
                }
            }
        };
        let bytes = random_bytes(PAGES, 7);
        let observer = dropper(&slot);
        let asker = dropper(&slot);
        let store = dropper(&slot);
        let in_store = Arc::new(AtomicBool::new(false));
        let armed = Arc::clone(&in_store);
        let hooked = open_hooked(pack(&bytes, 8), move |_, _, _| {
            if armed.load(SeqCst) {
                store();
            }
            Ok(())
        });
        let ask = FailurePolicy::Ask(Arc::new(move |_| {
            asker();
            FailureDecision::Poison
        }));
        let ways = [
            Restore::new(open(pack(&bytes, 8))).on_first_touch(move |_| observer()),
            Restore::new(hooked).prefetch_threads(2),
            Restore::new(with_bad_frame(7)).on_failure(ask),
        ];
        for (way, page) in ways.into_iter().zip([0, 1, BAD]) {
            let restored = way.start().unwrap();
            let touched = address(&restored, page);
            *slot.lock().unwrap() = Some(restored);
            in_store.store(page == 1, SeqCst);
            let touching = touch(touched);
            told.1.recv_timeout(crate::common::HANG_TIMEOUT).unwrap();
            let got = touching.join().unwrap();
            // The observer is called when the page is present, and the page may be unmapped before
            // it is read.
            assert!(got.is_none() || page == 0, "page {page}: {got:?}");
            wait_until("its threads have ended", || engine_threads().is_empty());
        }
    })
    .expect_success();
}

#[test]
fn callback_that_would_wait_for_itself_gets_an_error() {
    let (handle, told) = (Arc::new(OnceLock::<Mutex<Restored>>::new()), channel());
    let (observed, tell) = (Arc::clone(&handle), told.0);
    let bytes = random_bytes(PAGES, 8);
    let restored = Restore::new(open(pack(&bytes, 8)))
        .on_first_touch(move |_| {
            let mut restored = observed.get().unwrap().lock().unwrap();
            let read = restored.read_at(0, 9000, &mut [0; 8]);
            let complete = restored.wait_complete();
            let stop = restored.stop(StopMode::Complete);
            let _ = tell.send((read, complete, stop));
        })
        .start()
        .unwrap();
    let first = address(&restored, 0);
    handle.set(Mutex::new(restored)).unwrap();
    assert!(peek(first) == source(&bytes, 0));
    let (read, complete, stop) = told.1.recv_timeout(crate::common::HANG_TIMEOUT).unwrap();
    assert!(matches!(read, Err(ReadAtError::InCallback)), "{read:?}");
    assert!(matches!(stop, Err(StopError::InCallback)), "{stop:?}");
    assert!(!complete);
    compare(&handle.get().unwrap().lock().unwrap(), &bytes, [0]);
}

#[test]
fn drop_in_forked_child_changes_nothing() {
    in_child(|| {
        let bytes = random_bytes(PAGES, 9);
        let mut restored = Restore::new(open(pack(&bytes, 8)))
            .prefetch(Prefetch::All)
            .prefetch_bandwidth(1 << 20)
            .start()
            .unwrap();
        compare(&restored, &bytes, 0..10);
        // SAFETY: the child only drops its copy, and exits without running anything else.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let refused = matches!(
                restored.stop(StopMode::Inaccessible),
                Err(StopError::InChild)
            );
            drop(restored);
            // SAFETY: exits the child at once.
            unsafe { libc::_exit(if refused { 0 } else { 3 }) };
        }
        let mut status = 0;
        // SAFETY: waits for that child, and writes to a live integer.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
            "{status:#x}"
        );
        compare(&restored, &bytes, 0..PAGES);
        assert!(restored.wait_complete());
    })
    .expect_success();
}

/// A thread under `SCHED_FIFO`, bound to one core, starts a restore.
#[test]
fn engine_threads_do_not_inherit_policy_or_affinity() {
    let test = "engine_threads_do_not_inherit_policy_or_affinity";
    let said = in_child(|| {
        // More than one task, so that prefetch is not finished during the check.
        let bytes = random_bytes(4 * 512, 10);
        // SAFETY: system calls on live values of the types that they take.
        let set = |core: usize| unsafe {
            let mut cores: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(core, &mut cores);
            let first = libc::sched_param { sched_priority: 1 };
            libc::sched_setaffinity(0, size_of_val(&cores), &raw const cores) == 0
                && libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const first) == 0
        };
        // SAFETY: as above.
        let cores = |thread: i32| unsafe {
            let mut cores: libc::cpu_set_t = std::mem::zeroed();
            libc::sched_getaffinity(thread, size_of_val(&cores), &raw mut cores);
            (0..1024)
                .filter(|core| libc::CPU_ISSET(*core, &cores))
                .collect::<Vec<_>>()
        };
        let all = cores(std::process::id().cast_signed());
        let starter = std::thread::spawn(move || {
            if !set(all[0]) {
                println!("not permitted");
                return;
            }
            let restored = Restore::new(open(pack(&bytes, 8)))
                .prefetch(Prefetch::All)
                .prefetch_threads(2)
                .prefetch_bandwidth(4096)
                .start()
                .unwrap();
            compare(&restored, &bytes, 0..10);
            // A thread has its name a moment before it drops its inherited attributes. A fault
            // thread may be following the touching thread.
            let has_left = |name: &str, thread: i32| {
                // SAFETY: takes and returns numbers.
                let policy = unsafe { libc::sched_getscheduler(thread) };
                policy == libc::SCHED_OTHER
                    && (name.starts_with("snap-fault") || cores(thread) == all)
            };
            wait_until("all have left what they inherited", || {
                let threads = engine_threads();
                threads.len() >= 4 && threads.iter().all(|(name, id)| has_left(name, *id))
            });
        });
        starter.join().unwrap();
    })
    .expect_success();
    if said.contains("not permitted") {
        skipped(test, &"a real-time policy needs CAP_SYS_NICE");
    }
}
