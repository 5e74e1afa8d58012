//! Ctrl-C and its kin: asked to stop, a command undoes what it began and then dies by the signal.
//!
//! The signals are blocked in every thread and taken by one that waits for nothing else. It sets a
//! flag that loops look at, and closes a pipe that waits can watch. A second signal ends the
//! process at once; the kernel then lets go of traced processes and unnamed files.
//!
//! Ctrl-Z stops the process as it does any other, after what a command has to do before
//! ([`Cancel::before_stop`]). So do the signals for a job in the background that uses its terminal.
//! As they are blocked, the kernel sends none of them for a message that is written: a command is not
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

/// What a user or a service manager stops a command with.
const STOPPING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// What stops a job until it is continued.
const SUSPENDING: [Signal; 3] = [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU];

/// The command was asked to stop: unwinds to `main`, which knows.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// Tells whether the command was asked to stop.
#[derive(Clone, Debug)]
pub(crate) struct Cancel {
    signal: Arc<AtomicI32>,
    at_once: Arc<AtomicBool>,
    /// How many there were, and whether the second is the command's own to act on.
    count: Arc<AtomicU32>,
    counts: Arc<AtomicBool>,
    hangs_up: Arc<PipeReader>,
    before_stop: Arc<Mutex<Option<Hook>>>,
}

/// Called on the thread that takes signals.
#[derive(Clone)]
struct Hook(Arc<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

/// Keeps what [`Cancel::before_stop`] was given, until it is dropped.
#[derive(Debug)]
pub(crate) struct BeforeStop(Arc<Mutex<Option<Hook>>>);

impl Drop for BeforeStop {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Blocks `SIGXFSZ`: a write beyond `RLIMIT_FSIZE` fails, instead of killing the process. To be
/// called before any other thread exists, so that all inherit the mask.
pub(crate) fn outlive_file_limit() -> anyhow::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGXFSZ);
    set.thread_block().context("blocking SIGXFSZ")
}

/// Blocks the stopping signals and starts the thread that takes them. To be called before any
/// other thread exists, so that all inherit the mask.
pub(crate) fn watch() -> anyhow::Result<Cancel> {
    let (reader, writer) = io::pipe().context("creating a pipe for signals")?;
    let cancel = Cancel {
        signal: Arc::default(),
        at_once: Arc::default(),
        count: Arc::default(),
        counts: Arc::default(),
        hangs_up: Arc::new(reader),
        before_stop: Arc::default(),
    };
    // A signal that the parent had ignored (nohup, a background job of a script) stays ignored;
    // blocked and waited for it would arrive all the same.
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
    /// One that nothing ever sets off.
    #[cfg(test)]
    pub(crate) fn never() -> Self {
        let (reader, writer) = io::pipe().unwrap();
        std::mem::forget(writer);
        Self {
            signal: Arc::default(),
            at_once: Arc::default(),
            count: Arc::default(),
            counts: Arc::default(),
            hangs_up: Arc::new(reader),
            before_stop: Arc::default(),
        }
    }

    pub(crate) fn requested(&self) -> bool {
        self.signal.load(Ordering::SeqCst) != 0
    }

    /// From now on a signal ends the process where it stands: for commands that leave nothing
    /// behind in any case.
    pub(crate) fn end_at_once(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }

    /// From now on a second signal is only counted.
    pub(crate) fn count_signals(&self) {
        self.counts.store(true, Ordering::SeqCst);
    }

    /// Has `hook` called when Ctrl-Z is about to stop the process, until the returned value is
    /// dropped. One command needs no more than one.
    pub(crate) fn before_stop(&self, hook: impl Fn() + Send + Sync + 'static) -> BeforeStop {
        let mut place = self
            .before_stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *place = Some(Hook(Arc::new(hook)));
        BeforeStop(Arc::clone(&self.before_stop))
    }

    /// For loops: ends them with an error once the command was asked to stop.
    pub(crate) fn check(&self) -> Result<(), Interrupted> {
        if self.requested() {
            Err(Interrupted)
        } else {
            Ok(())
        }
    }

    /// Waits until `fd` has something to read or is at its end, or fails because the command was
    /// asked to stop.
    pub(crate) fn wait_readable(&self, fd: BorrowedFd<'_>) -> anyhow::Result<()> {
        self.wait(fd, PollFlags::POLLIN)
            .context("waiting for input")
    }

    /// Waits until `fd` takes bytes or has no reader any more, or fails because the command was
    /// asked to stop.
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
    /// process of a container: then with the code that a shell would show.
    pub(crate) fn die(&self) -> ExitCode {
        if let Ok(signal) = Signal::try_from(self.signal.load(Ordering::SeqCst)) {
            die_by(signal);
        }
        ExitCode::from(u8::try_from(self.exit_code()).unwrap_or(1))
    }

    /// The code that a shell shows for a process that ended by the signal.
    pub(crate) fn exit_code(&self) -> i32 {
        128 + self.signal.load(Ordering::SeqCst)
    }
}

impl StopRequests for Cancel {
    fn count(&self) -> u32 {
        self.count.load(Ordering::SeqCst)
    }
}

/// At its end once the command was asked to stop.
impl AsFd for Cancel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.hangs_up.as_fd()
    }
}

/// Lets Ctrl-Z, or another signal that suspends, have its effect. Returns when the process is
/// continued.
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

/// Bits of the signals that this process ignores. Unreadable counts as none.
fn ignored_signals() -> u64 {
    std::fs::read("/proc/self/status")
        .ok()
        .and_then(|status| {
            // The name of the program, which stands there too, is any bytes.
            let status = String::from_utf8_lossy(&status);
            let mask = status
                .lines()
                .find_map(|line| line.strip_prefix("SigIgn:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        })
        .unwrap_or(0)
}
