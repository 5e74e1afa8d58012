//! Helpers shared by the tests: memory under a userfaultfd, threads that touch it, and child
//! processes.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program includes it and uses a part"
)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use snaprestore_uffd::memory::{Mapping, RawRegion, Ring};
use snaprestore_uffd::uffd::{
    Features, InstallError, Message, Modes, OpenOptions, ReadOutcome, Userfaultfd, WaitQueue,
};

pub const PAGE: u64 = 4096;
/// Maximum time for a wait: long enough for any thread to be scheduled; only a broken test or
/// engine reaches it.
pub const TIMEOUT: Duration = Duration::from_secs(30);
/// Number of seconds after which a child process is killed, for the same reason.
const HANG_SECONDS: u32 = 300;

/// Returns a page that repeats one byte.
pub fn page(byte: u8) -> Vec<u8> {
    vec![byte; 4096]
}

pub fn pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).expect("64 bits"))
}

/// Reads the byte at `address`, waiting for its page if it is missing.
pub fn peek(address: u64) -> u8 {
    // SAFETY: the tests call this for memory that they keep mapped, through raw pointers only.
    unsafe { pointer(address).read_volatile() }
}

/// Writes the byte at `address`, waiting for its page like `peek`.
pub fn poke(address: u64, byte: u8) {
    // SAFETY: as for `peek`.
    unsafe { pointer(address).write_volatile(byte) }
}

/// Runs `peek` in a thread of its own.
pub fn peeking(address: u64) -> JoinHandle<u8> {
    std::thread::spawn(move || peek(address))
}

/// Calls `madvise` on memory of the test.
pub fn madvise(address: u64, len: u64, advice: i32) {
    // SAFETY: the tests discard only their own memory, to which they hold no references.
    let result = unsafe {
        libc::madvise(
            pointer(address).cast(),
            usize::try_from(len).expect("64 bits"),
            advice,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Unmaps memory that nothing else will unmap again.
pub fn munmap(address: u64, len: u64) {
    // SAFETY: the tests unmap only their own memory, to which they hold no references.
    let result = unsafe {
        libc::munmap(
            pointer(address).cast(),
            usize::try_from(len).expect("64 bits"),
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Memory of this process under a userfaultfd.
pub struct Scene {
    pub uffd: Userfaultfd,
    pub mapping: Arc<Mapping>,
    pub region: RawRegion,
    pub ring: Ring,
}

impl Scene {
    /// Registers `pages` absent pages for missing faults, without events.
    pub fn new(pages: u64) -> Self {
        Self::with(
            pages,
            &OpenOptions::new().required(Features::EMPTY),
            Modes::MISSING,
        )
    }

    /// Registers `pages` absent pages with REMOVE, REMAP and UNMAP events.
    pub fn with_events(pages: u64) -> Self {
        Self::with(pages, &OpenOptions::new(), Modes::MISSING)
    }

    pub fn with(pages: u64, options: &OpenOptions, modes: Modes) -> Self {
        let uffd = options.open().expect("cannot open a userfaultfd");
        let mapping = Arc::new(Mapping::new(pages * PAGE).expect("cannot map memory"));
        let region = RawRegion::owned(Arc::clone(&mapping));
        uffd.register(&region, 0, region.len(), modes)
            .expect("cannot register the memory");
        Self {
            uffd,
            mapping,
            region,
            ring: Ring::private().expect("cannot map a ring"),
        }
    }

    /// Returns the address of a page.
    pub fn at(&self, page: u64) -> u64 {
        self.region.address() + page * PAGE
    }

    /// Waits for messages and reads one batch of them.
    pub fn messages(&mut self) -> Vec<Message> {
        messages(&self.uffd, &mut self.ring)
    }

    /// Waits for one fault and returns its address.
    pub fn fault(&mut self) -> u64 {
        match self.messages()[..] {
            [Message::Pagefault { address, .. }] => address,
            ref other => panic!("one fault expected: {other:?}"),
        }
    }

    /// Asserts that nothing is pending.
    pub fn assert_quiet(&mut self) {
        let mut messages = Vec::new();
        let outcome = self.uffd.read(&mut self.ring, &mut messages).expect("read");
        assert_eq!(outcome, ReadOutcome::Empty, "{messages:?}");
    }
}

pub fn messages(uffd: &Userfaultfd, ring: &mut Ring) -> Vec<Message> {
    let waiting = WaitQueue::new(uffd).expect("cannot create an epoll");
    let mut messages = Vec::new();
    loop {
        let ready = waiting.wait(uffd, Some(TIMEOUT)).expect("wait");
        assert!(ready.messages && !ready.woken, "nothing came: {ready:?}");
        // A userfaultfd that had to be repaired has nothing to read yet.
        match uffd.read(ring, &mut messages).expect("read") {
            ReadOutcome::Empty => {}
            outcome @ ReadOutcome::Messages(_) => {
                assert_eq!(outcome, ReadOutcome::Messages(messages.len()));
                return messages;
            }
        }
    }
}

/// Returns the error number with which the kernel refused an install.
pub fn errno(error: &InstallError) -> Option<i32> {
    match error {
        InstallError::Refused { source, .. } => source.raw_os_error(),
        _ => None,
    }
}

/// Retries until the condition is true.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < TIMEOUT, "never: {what}");
        std::thread::yield_now();
    }
}

/// A thread in the body of a [`Child`].
///
/// Regression test: each thread of the standard library takes one of its locks when it starts. If
/// another thread of the parent held that lock at the fork, nobody releases it in the child, and
/// such a thread hung there.
pub struct Thread<T> {
    handle: libc::pthread_t,
    result: Arc<OnceLock<T>>,
}

impl<T: Send + Sync + 'static> Thread<T> {
    /// Runs `body` in a thread.
    pub fn start(body: impl FnOnce() -> T + Send + 'static) -> Self {
        // SAFETY: the body borrows nothing.
        unsafe { Self::start_unchecked(body) }
    }
}

impl<T: Send + Sync> Thread<T> {
    /// # Safety
    ///
    /// The thread must have been joined when anything that `body` borrows goes away.
    unsafe fn start_unchecked<'a>(body: impl FnOnce() -> T + Send + 'a) -> Self
    where
        T: 'a,
    {
        type Body<'a> = Box<dyn FnOnce() + Send + 'a>;
        extern "C" fn run(body: *mut libc::c_void) -> *mut libc::c_void {
            // SAFETY: `start_unchecked` gave this box away, to this thread only.
            let body = unsafe { Box::from_raw(body.cast::<Body<'_>>()) };
            // A panic was printed, and is found as a missing result.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            std::ptr::null_mut()
        }
        let result = Arc::new(OnceLock::new());
        let to_fill = Arc::clone(&result);
        let body: Body<'a> = Box::new(move || {
            let _ = to_fill.set(body());
        });
        let mut handle = 0;
        // SAFETY: `run` takes the box over. The caller keeps alive what the body borrows.
        let error = unsafe {
            let body = Box::into_raw(Box::new(body));
            libc::pthread_create(&raw mut handle, std::ptr::null(), run, body.cast())
        };
        assert_eq!(error, 0, "pthread_create");
        Self { handle, result }
    }

    /// Waits for the thread and returns its result, or `None` if it panicked.
    pub fn join(self) -> Option<T> {
        // SAFETY: the thread was neither joined nor detached.
        let error = unsafe { libc::pthread_join(self.handle, std::ptr::null_mut()) };
        assert_eq!(error, 0, "pthread_join");
        Arc::into_inner(self.result)?.into_inner()
    }
}

/// Runs `body` in `count` [`Thread`]s, which get their numbers, and `meanwhile` in this one.
/// Returns the results of both.
pub fn in_threads<T: Send + Sync, R>(
    count: u64,
    body: impl Fn(u64) -> T + Sync,
    meanwhile: impl FnOnce() -> R,
) -> (Vec<T>, R) {
    let body = &body;
    let threads: Vec<_> = (0..count)
        // SAFETY: all threads are joined before this returns or unwinds.
        .map(|number| unsafe { Thread::start_unchecked(move || body(number)) })
        .collect();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(meanwhile));
    let results: Vec<_> = threads.into_iter().map(Thread::join).collect();
    let results = results
        .into_iter()
        .map(|result| result.expect("a thread panicked"));
    match result {
        Ok(result) => (results.collect(), result),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The way in which a child process ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    Exit(i32),
    Signal(i32),
}

/// A forked child, killed if it is dropped before it has exited.
pub struct Child {
    pid: libc::pid_t,
    ended: bool,
}

impl Child {
    /// Runs `body` in a child process, which exits with its result. The body starts threads as
    /// [`Thread`]s only. SIGALRM kills a child that hangs.
    pub fn start(body: impl FnOnce() -> i32) -> Self {
        // SAFETY: the child runs only the test's body and leaves by _exit. glibc makes malloc and
        // pthread_create usable after fork in a process with threads; the bodies take no other
        // lock.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "{}", std::io::Error::last_os_error());
        if pid == 0 {
            // SAFETY: the call takes a number; SIGALRM is not handled.
            unsafe { libc::alarm(HANG_SECONDS) };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            // SAFETY: exits this process without running what belongs to the parent.
            unsafe { libc::_exit(outcome.unwrap_or(101)) }
        }
        Self { pid, ended: false }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until the child has exited.
    pub fn wait(mut self) -> Ended {
        let mut status = 0;
        // SAFETY: `status` is a live int; the child is ours and not yet waited for.
        let pid = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        assert_eq!(pid, self.pid);
        self.ended = true;
        if libc::WIFSIGNALED(status) {
            Ended::Signal(libc::WTERMSIG(status))
        } else {
            Ended::Exit(libc::WEXITSTATUS(status))
        }
    }

    /// Returns a copy of the child's descriptor `number`.
    pub fn descriptor(&self, number: i32) -> OwnedFd {
        // SAFETY: both system calls take numbers and return a new descriptor that nobody else owns.
        unsafe {
            let pidfd = libc::syscall(libc::SYS_pidfd_open, self.pid, 0);
            assert!(pidfd >= 0, "{}", std::io::Error::last_os_error());
            let pidfd = OwnedFd::from_raw_fd(i32::try_from(pidfd).expect("a descriptor"));
            let fd = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor"))
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            // SAFETY: the child is ours and not yet waited for, so its number refers to no other
            // process.
            unsafe {
                libc::kill(self.pid, libc::SIGKILL);
                libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            }
        }
    }
}
