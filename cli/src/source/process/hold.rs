//! Stops every thread of a process, and lets it go on in any case.
//!
//! ```text
//!   tracer thread:  seize + interrupt all ──all stopped──▶ wait ──let go──▶ ends
//!                        │    ▲                                  (the kernel detaches)
//!                        ▼    │ after a pause, in which the process runs
//!                   one thread doesn't stop
//! ```
//!
//! `PTRACE_SEIZE` and `PTRACE_INTERRUPT` stop a thread without sending it a signal. Tracing belongs
//! to the thread that began it. When that ends, by whatever cause, the kernel detaches and the
//! stopped threads go on: nothing that happens to this process can leave the other one stopped. So
//! there is a thread for tracing alone, and its end is how the process is let go.
//!
//! A thread may stop on its way to a signal instead, in the moment between the two calls; it must
//! get that signal when it goes on. Stops are only peeked at (`WNOWAIT`), so that the kernel itself
//! remembers the signal.

use std::collections::BTreeMap;
use std::fs;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::stuck::{self, Stuck};
use crate::exit::Refusal;
use crate::output::Output;
use crate::signals::{BeforeStop, Cancel};

/// How long the others may stand still because one thread doesn't stop: one that waits in the
/// kernel, and one that runs and stops as soon as it gets a processor.
const WAITING_THREAD_TIMEOUT: Duration = Duration::from_millis(200);
const RUNNING_THREAD_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the process runs between two attempts, and how long attempts are made. A thread that
/// waits in the kernel for a disk stops when that answers.
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(300);
const ATTEMPTS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long Ctrl-Z waits for the memory to be read, before the process is let go without.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// A process whose threads are all stopped until this is dropped.
#[derive(Debug)]
pub(super) struct Hold {
    pid: i32,
    thread: Pid,
    since: Instant,
    latch: Arc<Latch>,
    tracer: Option<JoinHandle<()>>,
    _before_stop: BeforeStop,
}

/// Whether the process shall be let go.
#[derive(Debug, Default)]
struct Latch {
    open: Mutex<Open>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Open {
    /// It is held.
    #[default]
    No,
    /// Its memory was read, or nobody wants it any more.
    Done,
    /// This process is about to be stopped by Ctrl-Z.
    Stopping,
}

impl Latch {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, why: Open) {
        let mut open = self.lock();
        if *open == Open::No {
            *open = why;
        }
        drop(open);
        self.changed.notify_all();
    }

    /// Waits until it is open, or for `timeout`.
    fn wait(&self, timeout: Duration) -> Open {
        let is_shut = |open: &mut Open| *open == Open::No;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), timeout, is_shut);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Fails if this process is about to be stopped.
    fn check(&self, pid: i32) -> Result<()> {
        if *self.lock() == Open::Stopping {
            bail!(
                "process {pid} was let go because Ctrl-Z stopped this command before it had read \
                 all memory; run it again"
            );
        }
        Ok(())
    }
}

impl Hold {
    /// Stops all threads of process `pid`.
    pub(super) fn new(pid: i32, output: Output, cancel: &Cancel) -> Result<Self> {
        check_target(pid)?;
        let began = Instant::now();
        let latch = Arc::<Latch>::default();
        let before_stop = {
            let latch = Arc::clone(&latch);
            cancel.before_stop(move || let_go_before_stop(pid, &latch))
        };
        let mut is_told = false;
        loop {
            let since = Instant::now();
            let (answer, answers) = channel();
            let tracer = {
                let (latch, cancel) = (Arc::clone(&latch), cancel.clone());
                std::thread::Builder::new()
                    .name("tracer".into())
                    .spawn(move || trace(pid, &latch, &cancel, &answer))
                    .context("starting a thread to stop the process with")?
            };
            let stopped = answers.recv().context("stopping the process")?;
            let stuck = match stopped {
                Ok(Stopped::All(thread)) => {
                    return Ok(Self {
                        pid,
                        thread,
                        since,
                        latch,
                        tracer: Some(tracer),
                        _before_stop: before_stop,
                    });
                }
                Ok(Stopped::Not(stuck)) => stuck,
                Err(error) => {
                    let _ = tracer.join();
                    return Err(error);
                }
            };
            // All threads go on here.
            let _ = tracer.join();
            if stuck.is_frozen() || began.elapsed() > ATTEMPTS_TIMEOUT {
                return Err(anyhow!("{stuck}"));
            }
            if !is_told {
                output.warn(format_args!(
                    "{stuck}; trying again for {} s",
                    ATTEMPTS_TIMEOUT.as_secs()
                ));
                is_told = true;
            }
            sleep(ATTEMPT_INTERVAL);
            cancel.check()?;
        }
    }

    /// A held thread, through which the memory can be reached: the main one, unless that ended
    /// before the others.
    pub(super) fn thread(&self) -> Pid {
        self.thread
    }

    /// Since when the process is held.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Fails if the process is held no longer: it was killed, or let go because of Ctrl-Z.
    pub(super) fn check(&self) -> Result<()> {
        self.latch.check(self.pid)?;
        if thread_state(self.pid, self.thread) != Some(TRACED) {
            // The state may have changed because of that.
            self.latch.check(self.pid)?;
            return Err(ended(self.pid));
        }
        Ok(())
    }

    /// Fails if the process was let go because of Ctrl-Z. Costs no system call.
    pub(super) fn check_latch(&self) -> Result<()> {
        self.latch.check(self.pid)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.latch.open(Open::Done);
        if let Some(tracer) = self.tracer.take() {
            let _ = tracer.join();
        }
    }
}

/// What is said of a process that isn't there any more.
pub(super) fn ended(pid: i32) -> anyhow::Error {
    anyhow!("process {pid} ended while it was read")
}

/// Lets the process go on before this one is stopped: at once when its memory was read, and after a
/// while in any case.
fn let_go_before_stop(pid: i32, latch: &Latch) {
    if latch.wait(STOP_TIMEOUT) == Open::No {
        latch.open(Open::Stopping);
    }
    // The tracer must end before it is stopped as well.
    let began = Instant::now();
    while began.elapsed() < STOP_TIMEOUT && any_traced(pid) {
        sleep(Duration::from_millis(1));
    }
}

fn any_traced(pid: i32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    tasks.into_iter().flatten().flatten().any(|task| {
        let tid = task.file_name().to_str().and_then(|name| name.parse().ok());
        tid.is_some_and(|tid| thread_state(pid, Pid::from_raw(tid)) == Some(TRACED))
    })
}

/// How an attempt went.
enum Stopped {
    /// All threads are stopped; this is one of them.
    All(Pid),
    /// One is not.
    Not(Stuck),
}

/// What the tracer thread does: it stops all threads of `pid`, reports that, and keeps them until
/// the latch opens.
fn trace(pid: i32, latch: &Latch, cancel: &Cancel, answer: &Sender<Result<Stopped>>) {
    let stopped = Tracer {
        pid,
        latch,
        cancel,
        threads: BTreeMap::new(),
    }
    .stop();
    let is_held = matches!(stopped, Ok(Stopped::All(_)));
    if answer.send(stopped).is_ok() && is_held {
        while latch.wait(Duration::from_secs(60)) == Open::No {}
    }
}

/// The threads of a process that are being stopped.
struct Tracer<'a> {
    pid: i32,
    latch: &'a Latch,
    cancel: &'a Cancel,
    /// Whether each has stopped.
    threads: BTreeMap<Pid, bool>,
}

impl Tracer<'_> {
    fn stop(mut self) -> Result<Stopped> {
        // A thread that still runs can start another one while the list is read; once a pass finds
        // no new thread, all those that could were stopped before it.
        while self.seize_new()? {
            if let Some(stuck) = self.wait_stopped()? {
                return Ok(Stopped::Not(stuck));
            }
        }
        let main = Pid::from_raw(self.pid);
        let others = self.threads.keys().copied().filter(|&tid| tid != main);
        let held = std::iter::once(main)
            .chain(others)
            .find(|&tid| thread_state(self.pid, tid) == Some(TRACED));
        // Killed meanwhile, or it ended by itself.
        let thread =
            held.with_context(|| format!("process {} ended before it could be held", self.pid))?;
        Ok(Stopped::All(thread))
    }

    /// Traces and interrupts the threads that aren't yet; tells whether there were any.
    fn seize_new(&mut self) -> Result<bool> {
        let pid = self.pid;
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))
            .with_context(|| format!("process {pid} ended before it could be held"))?;
        let mut new = false;
        for task in tasks.flatten() {
            let Some(tid) = task.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let tid = Pid::from_raw(tid);
            if self.threads.contains_key(&tid) {
                continue;
            }
            match ptrace::seize(tid, Options::empty()) {
                Ok(()) => {}
                Err(Errno::ESRCH) => continue,
                // A main thread that ended while others go on refuses as well.
                Err(Errno::EPERM) if has_ended(pid, tid) => continue,
                Err(Errno::EPERM) => return Err(refused(pid, tid)),
                Err(error) => {
                    return Err(error).with_context(|| format!("holding process {pid}"));
                }
            }
            self.threads.insert(tid, false);
            new = true;
            match ptrace::interrupt(tid) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("stopping process {pid}"));
                }
            }
        }
        Ok(new)
    }

    /// Waits until all have stopped. Gives up and returns the reason if one doesn't.
    fn wait_stopped(&mut self) -> Result<Option<Stuck>> {
        let mut pause = Duration::from_micros(50);
        let mut left = usize::MAX;
        let mut last_stop = Instant::now();
        loop {
            self.collect();
            let mut running = self.running();
            let Some(tid) = running.next() else {
                return Ok(None);
            };
            let now_left = 1 + running.count();
            if now_left < left {
                (left, last_stop) = (now_left, Instant::now());
            }
            self.cancel.check()?;
            self.latch.check(self.pid)?;
            let waited = last_stop.elapsed();
            if waited > WAITING_THREAD_TIMEOUT {
                // One that waits in the kernel: the others can't stop it from doing so.
                let waits = |tid: &Pid| thread_state(self.pid, *tid) == Some('D');
                let waiting = self.running().find(waits);
                if let Some(tid) = waiting {
                    return Ok(Some(stuck::why(self.pid, tid)));
                }
                if waited > RUNNING_THREAD_TIMEOUT {
                    return Ok(Some(stuck::why(self.pid, tid)));
                }
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    fn running(&self) -> impl Iterator<Item = Pid> {
        let threads = self.threads.iter();
        threads
            .filter(|(_, stopped)| !**stopped)
            .map(|(&tid, _)| tid)
    }

    /// Looks which threads have stopped or ended meanwhile.
    fn collect(&mut self) {
        let peek = WaitPidFlag::WSTOPPED
            | WaitPidFlag::WEXITED
            | WaitPidFlag::__WALL
            | WaitPidFlag::WNOHANG
            | WaitPidFlag::WNOWAIT;
        for tid in self.running().collect::<Vec<_>>() {
            match waitid(Id::Pid(tid), peek) {
                // The stop that was asked for, that of a stopped job, which stays stopped, or one on
                // the way to a signal. A signal without a name in `nix` is an error of its own.
                Ok(WaitStatus::PtraceEvent(..)) | Err(Errno::EINVAL) => {
                    self.threads.insert(tid, true);
                }
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => {
                    let _ = waitpid(tid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
                    self.threads.remove(&tid);
                }
                Err(Errno::ECHILD) => {
                    self.threads.remove(&tid);
                }
                // The end of a main thread is not reported while others are there, ended or not.
                Ok(_) | Err(_) if has_ended(self.pid, tid) => {
                    self.threads.remove(&tid);
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
}

/// Says what can be said before anything is tried.
fn check_target(pid: i32) -> Result<()> {
    if pid == i32::try_from(std::process::id())? {
        bail!("process {pid} is snaprestore itself; name another one");
    }
    let status = match fs::read(format!("/proc/{pid}/status")) {
        Ok(status) if pid > 0 => status,
        _ => bail!("there is no process {pid}"),
    };
    // The name of the process, which stands there too, is any bytes.
    let status = String::from_utf8_lossy(&status);
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().to_owned())
    };
    if let Some(group) = field("Tgid:").filter(|group| *group != pid.to_string()) {
        bail!("{pid} is a thread of process {group}; name that: --pid {group}");
    }
    if field("State:").is_some_and(|state| state.starts_with(['Z', 'X'])) && !has_threads(pid) {
        bail!("process {pid} has ended; its memory is gone");
    }
    if field("VmSize:").is_none() && !has_threads(pid) {
        bail!("process {pid} is a thread of the kernel, without memory of its own");
    }
    if let Some(tracer) = field("TracerPid:").filter(|tracer| tracer != "0") {
        bail!(
            "process {pid} is traced by process {tracer} already (a debugger?); end that, and try \
             again"
        );
    }
    Ok(())
}

/// Whether it has more threads than the main one, which may have ended before them.
fn has_threads(pid: i32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() > 1)
}

fn has_ended(pid: i32, tid: Pid) -> bool {
    matches!(thread_state(pid, tid), Some('Z' | 'X') | None)
}

/// State letter of a thread that its tracer has stopped.
const TRACED: char = 't';

/// The state letter of a thread, if there is one. The name before it is any bytes.
pub(super) fn thread_state(pid: i32, tid: Pid) -> Option<char> {
    let stat = fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    stat.rsplit_once(") ")?.1.chars().next()
}

fn refused(pid: i32, tid: Pid) -> anyhow::Error {
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let remedy = match scope.trim() {
        "" | "0" => "run as root, or as the user that owns the process",
        "3" => {
            "kernel.yama.ptrace_scope is 3, which forbids it to everyone until the next boot; \
             start without that setting"
        }
        _ => "run as root, or permit it to users: sysctl kernel.yama.ptrace_scope=0",
    };
    Refusal::NotPermitted(format!(
        "process {pid} may not be held (thread {tid}: {}); {remedy} (in a container: add the \
         capability CAP_SYS_PTRACE)",
        Errno::EPERM.desc()
    ))
    .into()
}
