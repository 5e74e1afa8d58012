//! The engine's threads.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::session::{Place, RETRY_TIMEOUT};
use snaprestore_uffd::os::{SignalsBlocked, abort, leave_creator};

use super::session_prefetch::Plan;
use super::{Prefetch, Runtime, Shared, contexts};

/// The system calls that engine threads make after [`Restore::on_thread_start`](crate::restore::Restore::on_thread_start)'s hook: for a
/// seccomp filter.
pub const SYSTEM_CALLS: &[&str] = &[
    // Faults, and installing.
    "ioctl",
    "preadv2",
    "read",
    "epoll_wait",
    "epoll_pwait",
    "epoll_ctl",
    // Going to the core of the thread that faults.
    "sched_getscheduler",
    "sched_getaffinity",
    "sched_setaffinity",
    // Waking each other, and waiting.
    "futex",
    "write",
    "sched_yield",
    "clock_nanosleep",
    "clock_gettime",
    // The snapshot's file.
    "pread64",
    // Memory for index blocks, and what is freed.
    "mmap",
    "munmap",
    "mremap",
    "brk",
    "madvise",
    "mprotect",
    // Starting and ending a thread.
    "sigaltstack",
    "exit",
    "rt_sigprocmask",
    "rseq",
    "set_robust_list",
    "getrandom",
    // Prefetch: which thread it is, for each session that it works for.
    "gettid",
    // Ending the process that is served, or this one: whether standard error has room for why.
    "pidfd_send_signal",
    "poll",
    "ppoll",
    // Closing the userfaultfd; before it, in a build with debug assertions, a look whether it is
    // open.
    "close",
    "fcntl",
];

/// Runs in each thread before anything else, with its name.
pub(crate) type Hook = Arc<dyn Fn(&str) + Send + Sync>;

/// A thread, or something for it, could not be made.
pub(crate) struct ThreadError {
    pub(crate) what: &'static str,
    pub(crate) source: io::Error,
}

/// Ends the process if its thread panics: whoever waits for that thread's pages would wait for
/// ever.
struct EndOnPanic<'a>(&'a str);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            abort(&format!(
                "engine thread {} panicked; a callback or the store must not",
                self.0
            ));
        }
    }
}

/// Runs `body` in an engine thread that another program's code runs: it must not catch its panics.
pub(super) fn aborting_on_panic(body: impl FnOnce()) {
    let thread = std::thread::current();
    let _end = EndOnPanic(thread.name().unwrap_or_default());
    body();
}

/// Runs `body` in the calling thread, which was started as engine thread `name`.
/// It keeps its `place` in a session, if it works for one only.
pub(super) fn run(name: &str, place: Option<Place>, hook: Option<&Hook>, body: impl FnOnce()) {
    let _end = EndOnPanic(name);
    leave_creator();
    if let Some(place) = &place {
        place.begin();
    }
    if let Some(hook) = hook {
        hook(name);
    }
    body();
    drop(place);
}

/// The threads over a session.
pub(crate) type Threads = Vec<JoinHandle<()>>;

/// What a thread does.
pub(crate) type Body = Box<dyn FnOnce(&Runtime) + Send>;

/// Which threads are started.
pub(crate) struct ThreadOptions {
    pub(crate) fault_threads: usize,
    pub(crate) prefetch: Prefetch,
    pub(crate) prefetch_threads: usize,
    pub(crate) prefetch_bandwidth: Option<u64>,
    pub(crate) retry_timeout: Duration,
    pub(crate) hook: Option<Hook>,
    pub(crate) shared: Option<Shared>,
    /// One more, with its name.
    pub(crate) other: Option<(&'static str, Body)>,
}

impl Default for ThreadOptions {
    fn default() -> Self {
        Self {
            fault_threads: 2,
            prefetch: Prefetch::Off,
            prefetch_threads: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            prefetch_bandwidth: None,
            retry_timeout: RETRY_TIMEOUT,
            hook: None,
            shared: None,
            other: None,
        }
    }
}

/// The options of a builder that has its threads in `crew`.
macro_rules! crew_options {
    () => {
        /// Threads that serve faults; at least 1, and 2 with an observer of first touches, so that
        /// a fault of its own is noticed. One serves one toucher well; more help when many touch at
        /// once, or when the store is slow. Default 2.
        pub fn fault_threads(mut self, threads: usize) -> Self {
            self.crew.fault_threads = threads.max(1);
            self
        }

        /// What is fetched before it is touched. Default [`Prefetch::Off`].
        pub fn prefetch(mut self, prefetch: Prefetch) -> Self {
            self.crew.prefetch = prefetch;
            self
        }

        /// Threads that fetch ahead for this session at once; from 1 to 64. They are those of
        /// [`Shared`]: no more than half as many as its first session started. Default: one for
        /// each core.
        pub fn prefetch_threads(mut self, threads: usize) -> Self {
            self.crew.prefetch_threads = threads.max(1);
            self
        }

        /// Limits prefetch to so many bytes of memory a second, on average. Default: no limit.
        pub fn prefetch_bandwidth(mut self, bytes_per_second: u64) -> Self {
            self.crew.prefetch_bandwidth = Some(bytes_per_second.max(1));
            self
        }

        /// How long a page that can't be read is read again, with pauses that grow from 1 ms to half
        /// a second, before it counts as failed. Other faults are served meanwhile. Damage isn't
        /// read again. Prefetch that finds no memory goes on for as long. Default 5 s.
        pub fn retry_timeout(mut self, timeout: std::time::Duration) -> Self {
            self.crew.retry_timeout = timeout;
            self
        }

        /// What the session shares with others of the same process. Default: with all others that
        /// were given nothing else the threads that fetch ahead, unless it has a hook
        /// ([`on_thread_start`](Self::on_thread_start)).
        pub fn shared(mut self, shared: &Shared) -> Self {
            self.crew.shared = Some(shared.clone());
            self
        }

        /// Called in each thread of this session before it does anything, for instance to confine it,
        /// or to give it a policy or cores. The signals are blocked by then. The thread has the cores
        /// of the main thread and of the one that starts it, and no real-time policy, whatever the
        /// latter has. The hook must return, and must not touch memory that is being restored. The
        /// threads that fetch ahead are the session's own then, unless it was given a
        /// [`Shared`](Self::shared): those serve several sessions, and call the hook of
        /// [`Shared::on_thread_start`] only.
        pub fn on_thread_start(mut self, hook: impl Fn(&str) + Send + Sync + 'static) -> Self {
            self.crew.hook = Some(Arc::new(hook));
            self
        }
    };
}

impl ThreadOptions {
    /// What the session shares, be it with nobody.
    pub(crate) fn shared(&self) -> Shared {
        match (&self.shared, &self.hook) {
            (Some(shared), _) => shared.clone(),
            (None, Some(hook)) => Shared::alone(hook),
            (None, None) => Shared::of_the_process(),
        }
    }

    /// Threads that are started, at most.
    pub(crate) fn threads(&self) -> usize {
        let shared = self.shared();
        self.fault_threads + shared.pool().thread_count(self.prefetch_threads)
    }

    /// Threads that decode for the session at the same time, at most.
    pub(crate) fn decoders(&self) -> usize {
        self.fault_threads + self.prefetch_threads
    }

    /// Starts them. If one can't be started, those that were are ended.
    pub(crate) fn start(self, running: &Arc<Runtime>) -> Result<Threads, ThreadError> {
        // Threads inherit the mask: no signal reaches them, not even before their first instruction.
        let blocked = SignalsBlocked::now().map_err(|source| ThreadError {
            what: "threads that block signals",
            source,
        })?;
        let mut threads = Threads::new();
        let started = self.start_all(running, &mut threads);
        drop(blocked);
        match started {
            Ok(()) => Ok(threads),
            Err(source) => {
                running.session.end();
                running.end_threads(&mut threads);
                Err(ThreadError {
                    what: "the engine's threads",
                    source,
                })
            }
        }
    }

    fn start_all(self, running: &Arc<Runtime>, threads: &mut Threads) -> io::Result<()> {
        let mut spawn = |name: String, body: Box<dyn FnOnce() + Send>| -> io::Result<()> {
            let hook = self.hook.clone();
            let place = running.session.threads.place(&name);
            let named = name.clone();
            let span = tracing::Span::current();
            let thread = Builder::new().name(name).spawn(move || {
                let _of = span.entered();
                run(&named, Some(place), hook.as_ref(), body);
            })?;
            threads.push(thread);
            Ok(())
        };
        for i in 0..self.fault_threads {
            let running = Arc::clone(running);
            spawn(
                format!("snap-fault-{i}"),
                Box::new(move || {
                    let workers = contexts::For {
                        workers: running.pool.workers(),
                        image: &running.session.image,
                    };
                    // Before the first fault, and not in the way of the start.
                    workers.prepare();
                    running.session.serve(i, &workers);
                    running.fault_thread_ends();
                }),
            )?;
        }
        if let Some((name, body)) = self.other {
            let running = Arc::clone(running);
            spawn(name.to_owned(), Box::new(move || body(&running)))?;
        }
        if self.prefetch == Prefetch::Off {
            running.prefetch_ended();
            return Ok(());
        }
        running.prefetch(Plan {
            prefetch: self.prefetch,
            completes: false,
            threads: self.prefetch_threads,
            first_number: self.fault_threads,
            bandwidth: self.prefetch_bandwidth,
        })
    }
}

pub(crate) use crew_options;
