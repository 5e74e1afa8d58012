//! Messages and waiting, tested against the running kernel.

#![allow(unsafe_code, reason = "a test that touches memory under restore")]

mod support;

use std::io::{PipeReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use snaprestore_fixtures::host::skipped;
use snaprestore_uffd::memory::{Mapping, RawRegion, Ring};
use snaprestore_uffd::uffd::{
    AdoptError, Features, Installed, Ioctls, Message, Modes, OpenOptions, Presence, ReadError,
    ReadOutcome, Readiness, Unregistered, Userfaultfd, WaitQueue, Wake,
};
use support::{
    Child, Ended, PAGE, Scene, TIMEOUT, Thread, eventually, madvise, messages, munmap, page, peek,
    peeking, pointer,
};

/// Registers memory that a test may move or unmap piece by piece: nothing unmaps it at the end.
fn leaked(uffd: &Userfaultfd, pages: u64) -> u64 {
    let (start, len) = Mapping::new(pages * PAGE).unwrap().into_raw();
    // SAFETY: the memory stays this test's own, is accessed only through raw pointers, and events
    // are on.
    let region = unsafe { RawRegion::new(start, len) }.unwrap();
    uffd.register(&region, 0, len, Modes::MISSING).unwrap();
    region.address()
}

/// Moves memory by `mremap` to a place that the kernel chooses.
fn mremap(from: u64, old_pages: u64, new_pages: u64) -> u64 {
    let bytes = |pages| usize::try_from(pages * PAGE).unwrap();
    // SAFETY: this test's own memory, to which nobody holds references.
    let to = unsafe {
        let to = Mapping::new(new_pages * PAGE).unwrap().into_raw().0;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        libc::mremap(
            pointer(from).cast(),
            bytes(old_pages),
            bytes(new_pages),
            flags,
            to,
        )
    };
    assert_ne!(to, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    to.expose_provenance() as u64
}

#[test]
fn discard_is_one_message_and_pages_can_be_refilled() {
    let mut scene = Scene::with_events(4);
    assert_eq!(
        scene.uffd.copy(scene.at(1), &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
    let (start, len) = (scene.at(1), 2 * PAGE);
    let owner = std::thread::spawn(move || madvise(start, len, libc::MADV_DONTNEED));
    let messages = scene.messages();
    assert!(
        matches!(messages[..], [Message::Remove { start: from, end }] if from == start && end == start + len),
        "{messages:?}"
    );
    owner.join().unwrap();
    let reader = peeking(scene.at(1));
    assert_eq!(
        scene.fault(),
        scene.at(1),
        "what was discarded is missing again"
    );
    assert_eq!(
        scene.uffd.zeropage(scene.at(1), PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn moved_memory_is_filled_at_its_new_place_only() {
    let uffd = OpenOptions::new().open().unwrap();
    let mut ring = Ring::private().unwrap();
    let from = leaked(&uffd, 4);
    let owner = std::thread::spawn(move || mremap(from, 4, 4));
    let mut seen = messages(&uffd, &mut ring);
    eventually("the move is over", || {
        uffd.read(&mut ring, &mut seen).unwrap();
        owner.is_finished()
    });
    let to = owner.join().unwrap();
    uffd.read(&mut ring, &mut seen).unwrap();
    assert!(
        matches!(seen[0], Message::Remap { from: old, to: new, len } if old == from && new == to && len == 4 * PAGE),
        "{seen:?}"
    );
    // The kernel decides whether an Unmap of the old range follows; nothing else may follow.
    for message in &seen[1..] {
        assert!(
            matches!(message, Message::Unmap { start, end } if *start == from && *end == from + 4 * PAGE),
            "{seen:?}"
        );
    }
    assert_eq!(
        uffd.copy(from, &page(1), Wake::Now).unwrap(),
        Installed::Gone
    );
    let reader = peeking(to + PAGE);
    let faults = messages(&uffd, &mut ring);
    assert!(
        matches!(faults[..], [Message::Pagefault { address, .. }] if address == to + PAGE),
        "{faults:?}"
    );
    assert_eq!(
        uffd.copy(to + PAGE, &page(9), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 9);
}

#[test]
fn memory_that_grew_by_mremap_is_known_from_its_first_fault() {
    let uffd = OpenOptions::new().open().unwrap();
    let mut ring = Ring::private().unwrap();
    let from = leaked(&uffd, 1);
    let owner = std::thread::spawn(move || mremap(from, 1, 3));
    let mut seen = messages(&uffd, &mut ring);
    eventually("the move is over", || {
        uffd.read(&mut ring, &mut seen).unwrap();
        owner.is_finished()
    });
    let to = owner.join().unwrap();
    assert!(
        matches!(seen[0], Message::Remap { len, .. } if len == PAGE),
        "the old length: {seen:?}"
    );
    let reader = peeking(to + 2 * PAGE);
    let faults = messages(&uffd, &mut ring);
    assert!(
        matches!(faults[..], [Message::Pagefault { address, .. }] if address == to + 2 * PAGE),
        "{faults:?}"
    );
    assert_eq!(
        uffd.zeropage(to + 2 * PAGE, PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn unmapped_memory_is_reported_and_gone() {
    let uffd = OpenOptions::new().open().unwrap();
    let mut ring = Ring::private().unwrap();
    let start = leaked(&uffd, 4);
    let owner = std::thread::spawn(move || munmap(start + PAGE, PAGE));
    let seen = messages(&uffd, &mut ring);
    assert!(
        matches!(seen[..], [Message::Unmap { start: from, end }] if from == start + PAGE && end == start + 2 * PAGE),
        "{seen:?}"
    );
    owner.join().unwrap();
    assert_eq!(
        uffd.copy(start + PAGE, &page(1), Wake::Now).unwrap(),
        Installed::Gone
    );
    assert_eq!(
        uffd.copy(start + 2 * PAGE, &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
}

/// A common cause of hangs: a thread that waits for a page while another unmaps it is woken only if
/// its old range is woken.
#[test]
fn fault_across_munmap_resolves_by_waking_the_old_range() {
    let child = Child::start(|| {
        let uffd = OpenOptions::new().open().unwrap();
        let mut ring = Ring::private().unwrap();
        let start = leaked(&uffd, 1);
        let _reader = Thread::start(move || peek(start));
        let fault = messages(&uffd, &mut ring);
        assert!(
            matches!(fault[..], [Message::Pagefault { .. }]),
            "{fault:?}"
        );
        let owner = Thread::start(move || munmap(start, PAGE));
        let unmap = messages(&uffd, &mut ring);
        assert!(matches!(unmap[..], [Message::Unmap { .. }]), "{unmap:?}");
        owner.join().unwrap();
        uffd.wake(start, PAGE).unwrap();
        // The reader now touches unmapped memory, which kills this process.
        std::thread::sleep(TIMEOUT);
        1
    });
    assert_eq!(child.wait(), Ended::Signal(libc::SIGSEGV));
}

#[test]
fn fault_is_read_before_an_older_discard() {
    let mut scene = Scene::with_events(8);
    let (start, len) = (scene.at(0), PAGE);
    let owner = std::thread::spawn(move || madvise(start, len, libc::MADV_DONTNEED));
    eventually("the discard begins", || {
        scene.uffd.probe(start).unwrap() == Presence::Changing
    });
    let reader = peeking(scene.at(5));
    // The fault is pending as soon as the reader sleeps in it; until then only the discard can be
    // polled.
    eventually("the reader sleeps in its fault", || {
        pending(&scene.uffd) == 1
    });
    let messages = scene.messages();
    assert!(
        matches!(
            messages[..],
            [Message::Pagefault { .. }, Message::Remove { .. }]
        ),
        "{messages:?}"
    );
    owner.join().unwrap();
    assert_eq!(
        scene.uffd.zeropage(scene.at(5), PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    reader.join().unwrap();
}

/// Returns the number of pending faults, as the kernel counts them.
fn pending(uffd: &Userfaultfd) -> u64 {
    let info = format!("/proc/self/fdinfo/{}", uffd.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(info).unwrap();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("pending:"))
        .expect("cannot open a userfaultfd");
    line.trim().parse().unwrap()
}

#[test]
fn read_fault_is_reported_again_only_after_wake() {
    let mut scene = Scene::with_events(4);
    let reader = peeking(scene.at(3));
    let address = scene.fault();
    let start = scene.at(0);
    let owner = std::thread::spawn(move || madvise(start, PAGE, libc::MADV_DONTNEED));
    eventually("the discard begins", || {
        scene.uffd.probe(start).unwrap() == Presence::Changing
    });
    assert_eq!(
        scene.uffd.copy(address, &page(1), Wake::Now).unwrap(),
        Installed::Again
    );
    assert!(matches!(scene.messages()[..], [Message::Remove { .. }]));
    owner.join().unwrap();
    scene.assert_quiet();
    assert!(!reader.is_finished());
    // 22b: waking makes the thread retry; its page is still missing, so the fault is new.
    scene.uffd.wake(address, PAGE).unwrap();
    assert_eq!(scene.fault(), address);
    assert_eq!(
        scene.uffd.copy(address, &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 1);
}

#[test]
fn page_may_be_woken_many_times_before_it_is_served() {
    let mut scene = Scene::new(1);
    let reader = peeking(scene.at(0));
    for _ in 0..100 {
        assert_eq!(scene.fault(), scene.at(0));
        scene.uffd.wake(scene.at(0), PAGE).unwrap();
    }
    scene.fault();
    assert_eq!(
        scene.uffd.copy(scene.at(0), &page(8), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 8);
}

#[test]
fn faults_name_their_thread_and_access_when_asked_to() {
    let options = OpenOptions::new().required(Features::THREAD_ID | Features::EXACT_ADDRESS);
    let mut scene = Scene::with(2, &options, Modes::MISSING);
    let address = scene.at(1) + 123;
    let (tell, told) = std::sync::mpsc::channel();
    let writer = std::thread::spawn(move || {
        // SAFETY: gettid only returns a number.
        tell.send(unsafe { libc::gettid() }).unwrap();
        support::poke(address, 1);
    });
    let messages = scene.messages();
    let [
        Message::Pagefault {
            address: at,
            flags,
            thread,
        },
    ] = messages[..]
    else {
        panic!("{messages:?}")
    };
    assert_eq!(at, address);
    assert!(
        flags.write && !flags.minor && !flags.write_protect,
        "{flags:?}"
    );
    assert_eq!(thread, u32::try_from(told.recv().unwrap()).ok());
    assert_eq!(
        scene.uffd.zeropage(scene.at(1), PAGE, Wake::Now).unwrap(),
        Installed::Done
    );
    writer.join().unwrap();
}

#[test]
fn ring_keeps_64_messages_until_it_is_cleared() {
    let mut scene = Scene::new(70);
    let readers: Vec<_> = (0..70).map(|at| peeking(scene.at(at))).collect();
    eventually("all wait", || pending(&scene.uffd) == 70);
    let mut messages = Vec::with_capacity(Ring::SLOTS);
    let outcome = scene.uffd.read(&mut scene.ring, &mut messages).unwrap();
    assert_eq!(outcome, ReadOutcome::Messages(64));
    assert_eq!(
        messages.capacity(),
        Ring::SLOTS,
        "reading allocates nothing"
    );
    assert!(!scene.ring.is_clear());
    for (slot, message) in messages.iter().enumerate() {
        use snaprestore_uffd::uffd::Raw;
        let Message::Pagefault { address, .. } = message else {
            panic!("{message:?}")
        };
        let raw = Raw::from_words(scene.ring.load(slot));
        assert_eq!(
            raw,
            Raw::Pagefault {
                address: *address,
                flags: 0,
                thread: 0
            }
        );
    }
    messages.clear();
    assert_eq!(
        scene.uffd.read(&mut scene.ring, &mut messages).unwrap(),
        ReadOutcome::Messages(6)
    );
    // Messages of the first read after the sixth slot are gone, because the ring is zeroed before
    // each read.
    assert_eq!(scene.ring.load(6), [0; 4]);
    scene.ring.clear();
    assert!(scene.ring.is_clear());
    scene
        .uffd
        .zeropage(scene.at(0), 70 * PAGE, Wake::Now)
        .map(drop)
        .unwrap();
    for reader in readers {
        assert_eq!(reader.join().unwrap(), 0);
    }
}

#[test]
fn blocking_userfaultfd_polls_as_an_error_and_is_repaired() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut scene = Scene::new(1);
    let raw = scene.uffd.as_fd().as_raw_fd();
    let nonblocking = || {
        // SAFETY: F_GETFL takes and returns numbers.
        unsafe { libc::fcntl(raw, libc::F_GETFL) & libc::O_NONBLOCK != 0 }
    };
    assert!(nonblocking());
    // SAFETY: F_SETFL takes a number. A process that shares the open file can do the same at any
    // time.
    unsafe { libc::fcntl(raw, libc::F_SETFL, 0) };
    assert!(!nonblocking());
    let mut fds = [PollFd::new(scene.uffd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 1);
    assert_eq!(fds[0].revents(), Some(PollFlags::POLLERR));

    let reader = peeking(scene.at(0));
    assert_eq!(scene.fault(), scene.at(0));
    assert!(nonblocking());
    assert_eq!(
        scene.uffd.copy(scene.at(0), &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 1);
}

/// Regression test: a process that shares the open file can make its reads block, just before one.
/// That read held the lock that all installs need, and its thread could no longer be killed.
#[test]
fn read_does_not_block_without_o_nonblock() {
    let scene = Scene::new(1);
    let raw = scene.uffd.as_fd().as_raw_fd();
    // SAFETY: F_SETFL takes a number.
    unsafe { libc::fcntl(raw, libc::F_SETFL, 0) };
    let mut nothing = [0_u8; 32];
    let slice = libc::iovec {
        iov_base: nothing.as_mut_ptr().cast(),
        iov_len: nothing.len(),
    };
    // SAFETY: the slice is live memory of that length.
    let read = unsafe { libc::preadv2(raw, &raw const slice, 1, -1, libc::RWF_NOWAIT) };
    assert_eq!(read, -1);
    if std::io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN) {
        let test = "read_does_not_block_without_o_nonblock";
        return skipped(test, &"the kernel has only the flag (Linux 6.10)");
    }
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut ring = Ring::private().unwrap();
        let read = scene.uffd.read(&mut ring, &mut Vec::new());
        let _ = done.send(read.unwrap());
    });
    assert_eq!(is_done.recv_timeout(TIMEOUT), Ok(ReadOutcome::Empty));
}

#[test]
fn empty_read_is_not_the_end_of_input() {
    let mut scene = Scene::new(1);
    scene.assert_quiet();
    let waiting = WaitQueue::new(&scene.uffd).unwrap();
    let nothing = waiting
        .wait(&scene.uffd, Some(Duration::from_millis(1)))
        .unwrap();
    assert_eq!(nothing, Readiness::default());
    let reader = peeking(scene.at(0));
    assert_eq!(scene.fault(), scene.at(0));
    scene.assert_quiet();
    assert_eq!(
        scene.uffd.copy(scene.at(0), &page(1), Wake::Now).unwrap(),
        Installed::Done
    );
    assert_eq!(reader.join().unwrap(), 1);
}

#[test]
fn wakeup_ends_this_wait_or_the_next() {
    let scene = Scene::new(1);
    let waiting = WaitQueue::new(&scene.uffd).unwrap();
    let woken = Readiness {
        woken: true,
        ..Readiness::default()
    };
    std::thread::scope(|scope| {
        let wait = || waiting.wait(&scene.uffd, Some(TIMEOUT)).unwrap();
        let waiters: Vec<_> = (0..6).map(|_| scope.spawn(wait)).collect();
        let finished = || waiters.iter().filter(|w| w.is_finished()).count();
        let mut wakeups = 0;
        while finished() < waiters.len() {
            let before = finished();
            waiting.wake();
            wakeups += 1;
            eventually("one more waiter ends", || finished() > before);
        }
        assert!(wakeups >= 3, "a wakeup ended more than two waitings");
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), woken);
        }
    });
    let now = || waiting.wait(&scene.uffd, Some(Duration::ZERO)).unwrap();
    // A row in which nobody waited still has the last wakeup.
    let _ = now();
    assert_eq!(now(), Readiness::default());
    waiting.wake();
    assert_eq!(now(), woken);
    assert_eq!(now(), Readiness::default());
}

/// Each fault wakes one or two waiting threads, and none is lost while nobody waits.
#[test]
fn message_ends_this_wait_or_the_next() {
    let mut scene = Scene::new(6);
    let waiting = WaitQueue::new(&scene.uffd).unwrap();
    let came = Readiness {
        messages: true,
        ..Readiness::default()
    };
    let readers = std::thread::scope(|scope| {
        let wait = || waiting.wait(&scene.uffd, Some(TIMEOUT)).unwrap();
        let waiters: Vec<_> = (0..6).map(|_| scope.spawn(wait)).collect();
        let finished = || waiters.iter().filter(|w| w.is_finished()).count();
        let mut readers = Vec::new();
        while finished() < waiters.len() {
            let before = finished();
            readers.push(peeking(scene.at(readers.len() as u64)));
            eventually("one more waiter ends", || finished() > before);
        }
        assert!(readers.len() >= 3, "a message ended more than two waitings");
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), came);
        }
        readers
    });
    let mut read = 0;
    while read < readers.len() {
        read += messages(&scene.uffd, &mut scene.ring).len();
        scene.ring.clear();
    }
    for (number, reader) in (0..).zip(readers) {
        let copied = scene.uffd.copy(scene.at(number), &page(1), Wake::Now);
        assert_eq!(copied.unwrap(), Installed::Done);
        assert_eq!(reader.join().unwrap(), 1);
    }
    // Edges of messages that were read are left: they must not look like new ones.
    let mut seen = Vec::new();
    scene.uffd.read(&mut scene.ring, &mut seen).unwrap();
    assert!(seen.is_empty());
}

/// Starts an owner in another process, which runs `body`. Returns it with its userfaultfd, with
/// events, and the start of its memory.
fn owner(pages: u64, body: impl FnOnce(u64) -> i32) -> (Child, OwnedFd, u64) {
    let (mut from_child, mut to_parent) = std::io::pipe().unwrap();
    let child = Child::start(move || {
        let uffd = OpenOptions::new().open().unwrap();
        let start = leaked(&uffd, pages);
        let number = u64::try_from(uffd.as_fd().as_raw_fd()).unwrap();
        to_parent.write_all(&number.to_le_bytes()).unwrap();
        to_parent.write_all(&start.to_le_bytes()).unwrap();
        let code = body(start);
        drop(uffd);
        code
    });
    let number = i32::try_from(next(&mut from_child)).unwrap();
    let start = next(&mut from_child);
    let fd = child.descriptor(number);
    (child, fd, start)
}

fn next(pipe: &mut PipeReader) -> u64 {
    let mut bytes = [0; 8];
    pipe.read_exact(&mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn adopt(fd: OwnedFd) -> Result<Userfaultfd, AdoptError> {
    // SAFETY: the descriptors of these tests belong to children with address spaces of their own.
    unsafe { Userfaultfd::adopt(fd, Features::EVENTS, Ioctls::EMPTY) }
}

#[test]
fn other_process_is_served_and_its_exit_is_no_error() {
    let (child, fd, start) = owner(4, |start| {
        // Two pages that only the parent can fill, and a discard that it must read.
        let sum = peek(start) + peek(start + PAGE);
        madvise(start, PAGE, libc::MADV_DONTNEED);
        i32::from(sum)
    });
    let uffd = adopt(fd).unwrap();
    assert!(!uffd.is_own_memory());
    let mut ring = Ring::private().unwrap();
    let mut expected = start;
    for byte in [40, 2] {
        let faults = messages(&uffd, &mut ring);
        assert!(
            matches!(faults[..], [Message::Pagefault { address, .. }] if address == expected),
            "{faults:?}"
        );
        assert_eq!(
            uffd.copy(expected, &page(byte), Wake::Now).unwrap(),
            Installed::Done
        );
        expected += PAGE;
    }
    let removed = messages(&uffd, &mut ring);
    assert!(
        matches!(removed[..], [Message::Remove { .. }]),
        "{removed:?}"
    );
    assert_eq!(child.wait(), Ended::Exit(42));

    let mut last = Vec::new();
    uffd.read(&mut ring, &mut last).unwrap();
    assert_eq!(
        uffd.copy(start, &page(1), Wake::Now).unwrap(),
        Installed::OwnerGone
    );
    assert_eq!(
        uffd.zeropage(start, PAGE, Wake::Now).unwrap(),
        Installed::OwnerGone
    );
    assert_eq!(
        uffd.poison(start, PAGE, Wake::Now).unwrap(),
        Installed::OwnerGone
    );
    assert_eq!(uffd.probe(start).unwrap(), Presence::OwnerGone);
    assert_eq!(
        uffd.unregister(start, 4 * PAGE).unwrap(),
        Unregistered::OwnerGone
    );
    uffd.wake(start, 4 * PAGE).unwrap();
}

#[test]
fn only_a_negotiated_userfaultfd_is_adopted_and_made_non_blocking() {
    let pipe = std::io::pipe().unwrap();
    let error = adopt(OwnedFd::from(pipe.0)).unwrap_err();
    assert!(
        matches!(&error, AdoptError::NotUserfaultfd { found } if found.starts_with("pipe:")),
        "{error}"
    );

    // SAFETY: userfaultfd(2) takes a number and returns a new descriptor.
    let raw = unsafe {
        use std::os::fd::FromRawFd;
        let number = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1);
        assert!(number >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(i32::try_from(number).unwrap())
    };
    let error = adopt(raw).unwrap_err();
    assert!(matches!(error, AdoptError::NotNegotiated), "{error}");

    let (_child, fd, _) = owner(1, |_| {
        // SAFETY: waits to be killed.
        unsafe { libc::pause() }
    });
    // SAFETY: F_SETFL takes a number.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, 0) };
    let uffd = adopt(fd).unwrap();
    let mut ring = Ring::private().unwrap();
    assert_eq!(
        uffd.read(&mut ring, &mut Vec::new()).unwrap(),
        ReadOutcome::Empty
    );
}

#[test]
fn fork_delivers_a_userfaultfd_for_the_child() {
    let options = OpenOptions::new().required(Features::EVENTS | Features::EVENT_FORK);
    if let Err(error) = options.open() {
        return skipped("fork_delivers_a_userfaultfd_for_the_child", &error);
    }
    // In a separate process: fork copies every registered memory of a process, and other tests have
    // some.
    let result = Child::start(move || {
        let scene = Scene::with(2, &options, Modes::MISSING);
        let Scene {
            uffd,
            mut ring,
            region,
            ..
        } = scene;
        let address = region.address();
        let forker = Thread::start(move || Child::start(move || i32::from(peek(address))));
        let mut seen = messages(&uffd, &mut ring);
        let Some(Message::Fork { child }) = seen.pop() else {
            return 1;
        };
        let of_child = child.into_userfaultfd();
        assert!(!of_child.is_own_memory());
        assert_eq!(of_child.features(), uffd.features());
        let grandchild = forker.join().unwrap();
        let faults = messages(&of_child, &mut ring);
        assert!(
            matches!(faults[..], [Message::Pagefault { address: at, .. }] if at == address),
            "{faults:?}"
        );
        assert_eq!(
            of_child.copy(address, &page(33), Wake::Now).unwrap(),
            Installed::Done
        );
        assert_eq!(grandchild.wait(), Ended::Exit(33));
        // That leaves the parent's page untouched.
        assert_eq!(
            uffd.copy(address, &page(34), Wake::Now).unwrap(),
            Installed::Done
        );
        i32::from(peek(address))
    });
    assert_eq!(result.wait(), Ended::Exit(34));
}

#[test]
fn without_a_free_descriptor_a_fork_message_stays_pending() {
    let options = OpenOptions::new().required(Features::EVENTS | Features::EVENT_FORK);
    if let Err(error) = options.open() {
        return skipped(
            "without_a_free_descriptor_a_fork_message_stays_pending",
            &error,
        );
    }
    let result = Child::start(move || {
        let Scene {
            uffd,
            mut ring,
            mapping,
            ..
        } = Scene::with(1, &options, Modes::MISSING);
        let forker = Thread::start(|| Child::start(|| 7));
        let waiting = WaitQueue::new(&uffd).unwrap();
        assert!(waiting.wait(&uffd, Some(TIMEOUT)).unwrap().messages);
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: both calls take a live rlimit. Only the limit of this child process changes.
        unsafe {
            libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
            let none = libc::rlimit {
                rlim_cur: 0,
                ..limit
            };
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const none), 0);
        }
        let mut seen = Vec::new();
        let error = uffd.read(&mut ring, &mut seen).unwrap_err();
        assert!(matches!(error, ReadError::NoDescriptor(_)), "{error}");
        // SAFETY: as above.
        unsafe { assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0) };
        assert!(matches!(
            messages(&uffd, &mut ring)[..],
            [Message::Fork { .. }]
        ));
        assert_eq!(forker.join().unwrap().wait(), Ended::Exit(7));
        drop(mapping);
        0
    });
    assert_eq!(result.wait(), Ended::Exit(0));
}

/// An owner's madvise that is already waiting when everything is unregistered must still be read.
#[test]
fn reading_continues_until_the_probe_says_gone() {
    let mut scene = Scene::with_events(4);
    let (start, len) = (scene.at(0), 4 * PAGE);
    let owner = std::thread::spawn(move || madvise(start, len, libc::MADV_DONTNEED));
    eventually("the discard begins", || {
        scene.uffd.probe(start).unwrap() == Presence::Changing
    });
    scene.uffd.unregister(start, len).unwrap();
    assert_eq!(scene.uffd.probe(start).unwrap(), Presence::Changing);
    assert!(matches!(scene.messages()[..], [Message::Remove { .. }]));
    owner.join().unwrap();
    assert_eq!(scene.uffd.probe(start).unwrap(), Presence::Gone);
}

/// A child that holds a copy of the descriptor keeps the userfaultfd alive, and nobody reads its
/// events any more.
#[test]
fn drop_unregisters_although_a_child_holds_the_descriptor() {
    let Scene {
        uffd,
        mapping,
        region,
        ..
    } = Scene::with_events(2);
    let child = Child::start(|| {
        // SAFETY: waits to be killed.
        unsafe { libc::pause() }
    });
    drop((mapping, region));
    // The userfaultfd is the mapping's last owner: this unmaps the mapping, and returns.
    drop(uffd);
    drop(child);
}
