//! The engine's threads.

use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::session::{Place, RETRY_TIMEOUT, RecordingOptions};
use snaprestore_uffd::os::{SignalsBlocked, abort, leave_creator};

use super::session_prefetch::Plan;
use super::{Prefetch, Runtime, Shared, contexts};

/// System calls that engine threads make after the hook of
/// [`Restore::on_thread_start`](crate::restore::Restore::on_thread_start) has run, for a seccomp
/// filter.
pub const SYSTEM_CALLS: &[&str] = &[
    // Reading faults and installing pages.
    "ioctl",
    "preadv2",
    "read",
    "epoll_wait",
    "epoll_pwait",
    "epoll_ctl",
    // Waking other threads, and waiting.
    "futex",
    "write",
    "sched_yield",
    "clock_nanosleep",
    "clock_gettime",
    // The snapshot's file.
    "pread64",
    // Allocating and freeing memory for index blocks.
    "mmap",
    "munmap",
    "mremap",
    "brk",
    "madvise",
    "mprotect",
    // Starting and exiting a thread.
    "sigaltstack",
    "exit",
    "rt_sigprocmask",
    "rseq",
    "set_robust_list",
    "getrandom",
    // Prefetch: identifying the thread for each session that it works for.
    "gettid",
    // Killing the owner or this process: checks whether standard error has room for the reason.
    "pidfd_send_signal",
    "poll",
    "ppoll",
    // Closing the userfaultfd; builds with debug assertions first check that it is open.
    "close",
    "fcntl",
];

/// A callback that runs in each thread before anything else, with the thread's name.
pub(crate) type Hook = Arc<dyn Fn(&str) + Send + Sync>;

/// The error for a thread, or a resource for it, that could not be created.
pub(crate) struct ThreadError {
    pub(crate) what: &'static str,
    pub(crate) source: io::Error,
}

/// Aborts the process if its thread panics: waiters for that thread's pages would otherwise wait
/// forever.
struct AbortOnPanic<'a>(&'a str);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            abort(&format!(
                "engine thread {} panicked; a callback or the store must not",
                self.0
            ));
        }
    }
}

/// Runs `body` in an engine thread that is managed by foreign code, which must not catch its
/// panics.
pub(super) fn aborting_on_panic(body: impl FnOnce()) {
    let thread = std::thread::current();
    let _end = AbortOnPanic(thread.name().unwrap_or_default());
    body();
}

/// Runs `body` in the calling thread, which was started as engine thread `name`. It keeps its
/// `place` in a session if it works for only one.
pub(super) fn run(name: &str, place: Option<Place>, hook: Option<&Hook>, body: impl FnOnce()) {
    let _end = AbortOnPanic(name);
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

/// The threads of a session.
pub(crate) type Threads = Vec<JoinHandle<()>>;

/// The work of a thread.
pub(crate) type Body = Box<dyn FnOnce(&Runtime) + Send>;

/// Options for the threads of a session.
pub(crate) struct ThreadOptions {
    pub(crate) fault_threads: usize,
    pub(crate) prefetch: Prefetch,
    pub(crate) prefetch_threads: usize,
    pub(crate) prefetch_bandwidth: Option<u64>,
    pub(crate) retry_timeout: Duration,
    /// Options of the recording that begins with the session.
    pub(crate) record: Option<RecordingOptions>,
    pub(crate) hook: Option<Hook>,
    /// The resources shared with other sessions; set at their first use if they were not given.
    pub(crate) shared: OnceLock<Shared>,
    /// One additional thread, with its name.
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
            record: None,
            hook: None,
            shared: OnceLock::new(),
            other: None,
        }
    }
}

impl ThreadOptions {
    /// Returns the resources that the session shares, which may be its own.
    pub(crate) fn shared(&self) -> &Shared {
        self.shared.get_or_init(|| match &self.hook {
            Some(hook) => Shared::alone(hook),
            None => Shared::of_the_process(),
        })
    }

    /// Returns the maximum number of threads that are started.
    pub(crate) fn threads(&self) -> usize {
        if self.prefetch == Prefetch::Off {
            return self.fault_threads;
        }
        self.fault_threads + self.shared().pool().thread_count(self.prefetch_threads)
    }

    /// Returns the maximum number of threads that decode for the session at the same time.
    pub(crate) fn decoders(&self) -> usize {
        self.fault_threads + self.prefetch_threads
    }

    /// Starts the threads. If one can't be started, those already started are ended.
    pub(crate) fn start(self, runtime: &Arc<Runtime>) -> Result<Threads, ThreadError> {
        if let Some(options) = self.record {
            // No other recording is running yet.
            let _ = runtime.record(options);
        }
        // Threads inherit the mask, so no signal reaches them even before their first instruction.
        let blocked = SignalsBlocked::now().map_err(|source| ThreadError {
            what: "threads that block signals",
            source,
        })?;
        let mut threads = Threads::new();
        let started = self.start_all(runtime, &mut threads);
        drop(blocked);
        match started {
            Ok(()) => Ok(threads),
            Err(source) => {
                runtime.session.end();
                runtime.end_threads(&mut threads);
                Err(ThreadError {
                    what: "the engine's threads",
                    source,
                })
            }
        }
    }

    fn start_all(self, runtime: &Arc<Runtime>, threads: &mut Threads) -> io::Result<()> {
        let mut spawn = |name: String, body: Box<dyn FnOnce() + Send>| -> io::Result<()> {
            let hook = self.hook.clone();
            let place = runtime.session.threads.place(&name);
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
            let runtime = Arc::clone(runtime);
            spawn(
                format!("snap-fault-{i}"),
                Box::new(move || {
                    let contexts = contexts::SessionContexts {
                        contexts: runtime.pool.contexts(),
                        image: &runtime.session.image,
                    };
                    // Done before the first fault, without delaying the start.
                    contexts.prepare();
                    runtime.session.serve(i, &contexts);
                    runtime.fault_thread_ends();
                }),
            )?;
        }
        if let Some((name, body)) = self.other {
            let runtime = Arc::clone(runtime);
            spawn(name.to_owned(), Box::new(move || body(&runtime)))?;
        }
        if self.prefetch == Prefetch::Off {
            runtime.prefetch_ended();
            return Ok(());
        }
        runtime.prefetch(Plan {
            prefetch: self.prefetch,
            completes: false,
            threads: self.prefetch_threads,
            first_number: self.fault_threads,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_with_a_hook_creates_one_pool() {
        let hook: Hook = Arc::new(|_: &str| ());
        let threads = ThreadOptions {
            hook: Some(hook),
            ..ThreadOptions::default()
        };
        let pool = Arc::clone(threads.shared().pool());
        assert!(Arc::ptr_eq(&pool, threads.shared().pool()));
        let process = ThreadOptions::default();
        assert!(!Arc::ptr_eq(&pool, process.shared().pool()));
    }
}
