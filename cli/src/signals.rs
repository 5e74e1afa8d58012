//! Handling of Ctrl-C and similar signals: a command that is asked to stop undoes what it began and
//! then dies by the signal.
//!
//! The signals are blocked in every thread and received by a thread of their own. It sets a flag
//! that loops check, and closes a pipe that blocking waits poll. A second signal kills the process
//! at once; the kernel then detaches from traced processes and frees unnamed files.
//!
//! Ctrl-Z stops the process as usual, after the command's hook has run ([`Cancel::before_stop`]).
//! The signals for a background job that uses its terminal are handled likewise. Because they are
//! blocked, the kernel sends none of them when the command writes a message: a command is not
//! stopped by its own messages (`stty tostop`), perhaps while it holds a process.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use snaprestore_daemon::StopRequests;

/// Signals by which a user or a service manager stops a command.
const STOPPING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Signals that suspend a job until it is continued.
const SUSPENDING: [Signal; 3] = [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU];

/// Error of a command that was asked to stop. It unwinds to `main`, which handles it.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// A handle that tells whether the command was asked to stop.
#[derive(Clone, Debug)]
pub(crate) struct Cancel {
    signal: Arc<AtomicI32>,
    at_once: Arc<AtomicBool>,
    /// Number of stopping signals, and whether the command itself acts on the second one.
    count: Arc<AtomicU32>,
    counts: Arc<AtomicBool>,
    hangs_up: Arc<PipeReader>,
    before_stop: Arc<Mutex<Option<Hook>>>,
}

/// A function that the signal thread calls.
#[derive(Clone)]
struct Hook(Arc<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

/// Keeps the hook of [`Cancel::before_stop`] registered until dropped.
#[derive(Debug)]
pub(crate) struct BeforeStop(Arc<Mutex<Option<Hook>>>);

impl Drop for BeforeStop {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Blocks `SIGXFSZ`, so that a write beyond `RLIMIT_FSIZE` fails instead of killing the process.
/// Must be called before any other thread exists, so that all threads inherit the mask.
pub(crate) fn outlive_file_limit() -> anyhow::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGXFSZ);
    set.thread_block().context("blocking SIGXFSZ")
}

/// Blocks the stopping signals and starts the thread that receives them. Must be called before any
/// other thread exists, so that all threads inherit the mask.
pub(crate) fn watch() -> anyhow::Result<Cancel> {
    let (reader, writer) = io::pipe().context("creating a pipe for signals")?;
    let cancel = Cancel::new(reader);
    // A signal that the parent ignored (nohup, a background job of a script) stays ignored. If it
    // were blocked and waited for, it would be delivered.
    let ignored = ignored_signals();
    let mut wanted = SigSet::empty();
    for signal in STOPPING.into_iter().chain(SUSPENDING) {
        if ignored & (1 << (signal as i32 - 1)) == 0 {
            wanted.add(signal);
        }
    }
    wanted.thread_block().context("blocking signals")?;
    let seen = Arc::clone(&cancel.signal);
    let at_once = Arc::clone(&cancel.at_once);
    let (count, counts) = (Arc::clone(&cancel.count), Arc::clone(&cancel.counts));
    let before_stop = Arc::clone(&cancel.before_stop);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut writer = Some(writer);
            while let Ok(signal) = wanted.wait() {
                if SUSPENDING.contains(&signal) {
                    stop(signal, &before_stop);
                    continue;
                }
                let again = seen.swap(signal as i32, Ordering::SeqCst) != 0;
                count.fetch_add(1, Ordering::SeqCst);
                let again = again && !counts.load(Ordering::SeqCst);
                if again || at_once.load(Ordering::SeqCst) {
                    die_by(signal);
                }
                drop(writer.take());
            }
        })
        .context("starting the thread that waits for signals")?;
    Ok(cancel)
}

impl Cancel {
    /// Returns a handle that is never triggered.
    #[cfg(test)]
    pub(crate) fn never() -> Self {
        let (reader, writer) = io::pipe().unwrap();
        std::mem::forget(writer);
        Self::new(reader)
    }

    fn new(hangs_up: PipeReader) -> Self {
        Self {
            signal: Arc::default(),
            at_once: Arc::default(),
            count: Arc::default(),
            counts: Arc::default(),
            hangs_up: Arc::new(hangs_up),
            before_stop: Arc::default(),
        }
    }

    pub(crate) fn requested(&self) -> bool {
        self.signal.load(Ordering::SeqCst) != 0
    }

    /// Lets later signals kill the process at once. For commands that never leave anything behind.
    pub(crate) fn end_at_once(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }

    /// Only counts further signals: the second one no longer kills the process.
    pub(crate) fn count_signals(&self) {
        self.counts.store(true, Ordering::SeqCst);
    }

    /// Registers `hook`, which is called when Ctrl-Z is about to stop the process, until the
    /// returned value is dropped. A command needs at most one hook.
    pub(crate) fn before_stop(&self, hook: impl Fn() + Send + Sync + 'static) -> BeforeStop {
        let mut place = self
            .before_stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *place = Some(Hook(Arc::new(hook)));
        BeforeStop(Arc::clone(&self.before_stop))
    }

    /// Runs work that does not check for signals, in a thread of its own. Fails as soon as the
    /// command is asked to stop; the thread then ends with the process.
    pub(crate) fn unless_stopped<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let (ended, end) = io::pipe().context("creating a pipe between threads")?;
        let thread = std::thread::Builder::new().name("work".into());
        let thread = thread.spawn(move || {
            // Closed when the work is done, or has panicked.
            let _end = end;
            work()
        });
        let thread = thread.context("starting a thread to work in")?;
        self.wait_readable(ended.as_fd())?;
        thread
            .join()
            .map_err(|panic| std::panic::resume_unwind(panic))
    }

    /// Fails if the command was asked to stop. Called in loops.
    pub(crate) fn check(&self) -> Result<(), Interrupted> {
        if self.requested() {
            Err(Interrupted)
        } else {
            Ok(())
        }
    }

    /// Waits until `fd` is readable or at its end. Fails if the command is asked to stop.
    pub(crate) fn wait_readable(&self, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
        self.wait(fd, PollFlags::POLLIN)
            .context("waiting for input")
    }

    /// Waits until `fd` is writable or has no reader any more. Fails if the command is asked to
    /// stop.
    pub(crate) fn wait_writable(&self, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
        self.wait(fd, PollFlags::POLLOUT)
            .context("waiting for the reader of the output")
    }

    fn wait(&self, fd: BorrowedFd<'_>, events: PollFlags) -> anyhow::Result<()> {
        loop {
            let mut fds = [
                PollFd::new(fd, events),
                PollFd::new(self.hangs_up.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let is_ready = fds[0].any().unwrap_or(true);
            self.check()?;
            if is_ready {
                return Ok(());
            }
        }
    }

    /// Lets the signal have its default effect. Returns only where it has none, as in the first
    /// process of a container, and then returns the exit code that a shell would show.
    pub(crate) fn die(&self) -> ExitCode {
        if let Ok(signal) = Signal::try_from(self.signal.load(Ordering::SeqCst)) {
            die_by(signal);
        }
        ExitCode::from(u8::try_from(self.exit_code()).unwrap_or(1))
    }

    /// Returns the exit code that a shell shows for a process killed by the signal.
    pub(crate) fn exit_code(&self) -> i32 {
        128 + self.signal.load(Ordering::SeqCst)
    }
}

impl StopRequests for Cancel {
    fn count(&self) -> u32 {
        self.count.load(Ordering::SeqCst)
    }
}

/// A pipe that reaches its end when the command is asked to stop.
impl AsFd for Cancel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.hangs_up.as_fd()
    }
}

/// Runs the hook and lets Ctrl-Z, or another suspending signal, have its effect. Returns when the
/// process is continued.
fn stop(signal: Signal, before: &Mutex<Option<Hook>>) {
    let hook = before
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    if let Some(Hook(hook)) = hook {
        hook();
    }
    die_by(signal);
    let mut set = SigSet::empty();
    set.add(signal);
    let _ = set.thread_block();
}

/// Raises a blocked signal and unblocks it, which delivers it to this thread.
fn die_by(signal: Signal) {
    let mut set = SigSet::empty();
    set.add(signal);
    let _ = raise(signal);
    let _ = set.thread_unblock();
}

/// Returns the signals that this process ignores, as bits; none if they can't be read.
fn ignored_signals() -> u64 {
    std::fs::read("/proc/self/status")
        .ok()
        .and_then(|status| {
            // The file also contains the program's name, which may be any bytes.
            let status = String::from_utf8_lossy(&status);
            let mask = status
                .lines()
                .find_map(|line| line.strip_prefix("SigIgn:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        })
        .unwrap_or(0)
}
