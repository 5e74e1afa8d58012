//! The engine's threads.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use snapshot_format::Reason;

use crate::session::Worker;
use crate::sys::SignalsBlocked;

use super::builder::{Prefetch, Restore};
use super::feeder::{self, Plan};
use super::guard::Asker;
use super::restored::Inner;

/// The system calls that engine threads make after [`Restore::on_thread_start`]'s hook: for a
/// seccomp filter.
pub const SYSTEM_CALLS: &[&str] = &[
    // Faults, and installing.
    "ioctl",
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
    // Closing the userfaultfd; before it, in a build with debug assertions, a look whether it is
    // open.
    "close",
    "fcntl",
];

/// Runs in each thread before anything else, with its name.
pub(super) type Hook = Arc<dyn Fn(&str) + Send + Sync>;

/// A thread, or something for it, could not be made.
pub(super) struct ThreadError {
    pub(super) what: &'static str,
    pub(super) source: io::Error,
}

/// Ends the process if its thread panics: whoever waits for that thread's pages would wait for
/// ever.
pub(super) struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// The threads of a restore.
pub(super) type Threads = Vec<JoinHandle<()>>;

/// Starts all threads of a restore. If one can't be started, those that were are ended.
pub(super) fn start_threads(
    restore: &Restore,
    inner: &Arc<Inner>,
    asker: Option<Asker>,
) -> Result<Threads, ThreadError> {
    // Threads inherit the mask: no signal reaches them, not even before their first instruction.
    let blocked = SignalsBlocked::now().map_err(|source| ThreadError {
        what: "threads that block signals",
        source,
    })?;
    let mut threads = Threads::new();
    let started = start_all(restore, inner, asker, &mut threads);
    drop(blocked);
    match started {
        Ok(()) => Ok(threads),
        Err(source) => {
            inner.session.end();
            for thread in threads {
                let _ = thread.join();
            }
            Err(ThreadError {
                what: "the engine's threads",
                source,
            })
        }
    }
}

fn start_all(
    restore: &Restore,
    inner: &Arc<Inner>,
    asker: Option<Asker>,
    threads: &mut Threads,
) -> io::Result<()> {
    let hook = restore.hook.clone();
    let mut spawn = |name: String, body: Box<dyn FnOnce() + Send>| -> io::Result<()> {
        let hook = hook.clone();
        let named = name.clone();
        let thread = Builder::new().name(name).spawn(move || {
            let _end = EndOnPanic;
            if let Some(hook) = hook {
                hook(&named);
            }
            body();
        })?;
        threads.push(thread);
        Ok(())
    };
    for i in 0..restore.fault_threads {
        let inner = Arc::clone(inner);
        spawn(
            format!("snap-fault-{i}"),
            Box::new(move || {
                // Before the first fault, and not in the way of the start.
                let mut worker = Worker::new(inner.session.image.decoder(Reason::Demand));
                inner.session.serve(&mut worker);
                inner.fault_thread_ends();
            }),
        )?;
    }
    if let Some(asker) = asker {
        let inner = Arc::clone(inner);
        spawn(
            "snap-ask".to_owned(),
            Box::new(move || asker.run(&inner.session)),
        )?;
    }
    if restore.prefetch == Prefetch::Off {
        inner.prefetch_ended();
    } else {
        let plan = Plan {
            prefetch: restore.prefetch.clone(),
            threads: restore.prefetch_threads,
            bandwidth: restore.prefetch_bandwidth,
            hook: restore.hook.clone(),
        };
        let feeder = feeder::Feeder::new(inner, plan)?;
        spawn("snap-feed".to_owned(), Box::new(move || feeder.run()))?;
    }
    Ok(())
}
