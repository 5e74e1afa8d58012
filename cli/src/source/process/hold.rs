//! Stops every thread of a process, and guarantees that they continue.
//!
//! ```text
//!   tracer thread:  seize + interrupt all ──all stopped──▶ wait ──release──▶ exits
//!                        │    ▲                                  (the kernel detaches)
//!                        ▼    │ after a pause, in which the process runs
//!                   one thread doesn't stop
//! ```
//!
//! `PTRACE_SEIZE` and `PTRACE_INTERRUPT` stop a thread without sending it a signal. Tracing belongs
//! to the thread that began it. When that thread exits, for whatever reason, the kernel detaches
//! and the stopped threads continue: nothing that happens to this process can leave the other one
//! stopped. Therefore a dedicated thread does the tracing, and its exit releases the process.
//!
//! This process may block on the one that it holds: on a file system, a device or a terminal that
//! the other serves, directly or through a third process. The tracer thread never blocks. It
//! releases the process when the command is asked to stop, or when no thread has read for
//! [`STALL_TIMEOUT`].
//!
//! Instead of the interrupt, a thread may stop to receive a signal that arrived between the two
//! calls; it must get that signal when it continues. Stops are only peeked at (`WNOWAIT`), so that
//! the kernel itself remembers the signal.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::kill;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, geteuid, gettid};

use super::stuck::{self, Stuck};
use crate::exit::Refusal;
use crate::output::Output;
use crate::signals::{BeforeStop, Cancel, Interrupted};

/// Maximum time for which the other threads stay stopped because one does not stop: one that waits
/// in the kernel, and one that runs and stops as soon as it gets a processor.
const WAITING_THREAD_TIMEOUT: Duration = Duration::from_millis(200);
const RUNNING_THREAD_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for which the process runs between two attempts, and total time for attempts. A thread that
/// waits in the kernel for a disk stops when the disk answers.
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(300);
const ATTEMPTS_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time that Ctrl-Z waits for the memory to be read before it releases the process.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum time for which the process is held while nothing is read from it because this process
/// waits in the kernel. A disk under load may take seconds to answer.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval at which the tracer checks for a stall.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// Number of times that threads may refuse to be traced, and the pause after each. A thread that
/// exits refuses, and so does a process for a moment when it runs another program (`execve`).
const MAX_REFUSALS: u32 = 20;
const REFUSAL_INTERVAL: Duration = Duration::from_millis(1);

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

/// Latch that tells the tracer thread to release the process.
#[derive(Debug, Default)]
struct Latch {
    open: Mutex<Open>,
    changed: Condvar,
    /// Progress counter that grows while the process is being read.
    steps: AtomicU64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Open {
    /// The process is held.
    #[default]
    No,
    /// The memory was read, or is not wanted any more.
    Done,
    /// Ctrl-Z is about to stop this process.
    Stopping,
    /// The command was asked to stop.
    Interrupted,
    /// Nothing was read for too long.
    Stalled,
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

    /// Waits until the latch is open, or for `timeout`.
    fn wait(&self, timeout: Duration) -> Open {
        let is_shut = |open: &mut Open| *open == Open::No;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), timeout, is_shut);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Fails if the process was released before its memory was read.
    fn check(&self, pid: i32) -> Result<()> {
        match *self.lock() {
            Open::No | Open::Done => Ok(()),
            Open::Interrupted => Err(Interrupted.into()),
            Open::Stopping => bail!(
                "released process {pid} because Ctrl-Z stopped this command before it had read \
                 all memory; run it again"
            ),
            Open::Stalled => bail!(
                "process {pid} was let go before all its memory was read: for {} s a disk or a \
                 file system did not answer; if process {pid} serves it, write to another one, \
                 and set TMPDIR to a folder on a local disk",
                STALL_TIMEOUT.as_secs()
            ),
        }
    }

    /// Waits until the latch is open. Opens it when the command is asked to stop, or if nothing was
    /// read for `stall`, since the reading thread may be blocked on the process itself.
    fn watch(&self, cancel: &Cancel, stall: Duration) {
        let mut steps = 0;
        // Excludes time in which this process was stopped.
        let mut quiet = Duration::ZERO;
        while self.wait(WATCH_INTERVAL) == Open::No {
            let now = self.steps.load(Ordering::Relaxed);
            if now == steps {
                quiet += WATCH_INTERVAL;
            } else {
                (steps, quiet) = (now, Duration::ZERO);
            }
            if cancel.requested() {
                self.open(Open::Interrupted);
            } else if quiet > stall {
                self.open(Open::Stalled);
            }
        }
    }
}

impl Hold {
    /// Stops all threads of process `pid`.
    pub(super) fn new(pid: i32, output: Output, cancel: &Cancel) -> Result<Self> {
        Self::with_stall_timeout(pid, output, cancel, STALL_TIMEOUT)
    }

    fn with_stall_timeout(
        pid: i32,
        output: Output,
        cancel: &Cancel,
        stall: Duration,
    ) -> Result<Self> {
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
                    .spawn(move || trace(pid, &latch, &cancel, stall, &answer))
                    .context("starting a thread to stop the process with")?
            };
            let stopped = loop {
                match answers.recv_timeout(WATCH_INTERVAL) {
                    Err(RecvTimeoutError::Timeout) => reap_threads(pid),
                    answer => break answer.context("stopping the process")?,
                }
            };
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
                Ok(Stopped::Ended) => {
                    let _ = tracer.join();
                    check_target(pid)?;
                    if began.elapsed() > ATTEMPTS_TIMEOUT {
                        bail!(
                            "process {pid} runs one program after the other, too fast to be held"
                        );
                    }
                    // The process has run another program in the meantime.
                    sleep(REFUSAL_INTERVAL);
                    cancel.check()?;
                    continue;
                }
                Err(error) => {
                    let _ = tracer.join();
                    return Err(error);
                }
            };
            // All threads continue here.
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

    /// Returns a held thread through which the memory can be accessed: the main thread, unless it
    /// exited before the others.
    pub(super) fn thread(&self) -> Pid {
        self.thread
    }

    /// Returns the time at which the process was stopped.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Fails if the process is no longer held, because it was killed or released.
    pub(super) fn check(&self) -> Result<()> {
        self.latch.check(self.pid)?;
        if thread_state(self.pid, self.thread) != Some(TRACED) {
            // The state may have changed because the process was released.
            self.latch.check(self.pid)?;
            return Err(ended(self.pid));
        }
        Ok(())
    }

    /// Fails if the process was released, but not if it was killed. Needs no system call.
    pub(super) fn check_latch(&self) -> Result<()> {
        self.step();
        self.latch.check(self.pid)
    }

    /// Records progress in reading the process. Without progress for a while, the process is
    /// released.
    pub(super) fn step(&self) {
        self.latch.steps.fetch_add(1, Ordering::Relaxed);
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

/// Reaps traced threads that have exited. A process that runs another program waits until all its
/// other threads are reaped, and meanwhile the tracer is blocked in `PTRACE_SEIZE` and can't do it.
fn reap_threads(pid: i32) {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let tid = task.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(tid) = tid.filter(|tid| *tid != pid).map(Pid::from_raw)
            && has_ended(pid, tid)
        {
            let _ = waitpid(tid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
        }
    }
}

/// Returns the error for a process that no longer exists.
pub(super) fn ended(pid: i32) -> anyhow::Error {
    anyhow!("process {pid} ended while it was read")
}

/// Releases the process before this one is stopped: as soon as its memory was read, or after
/// [`STOP_TIMEOUT`].
fn let_go_before_stop(pid: i32, latch: &Latch) {
    if latch.wait(STOP_TIMEOUT) == Open::No {
        latch.open(Open::Stopping);
    }
    // The tracer thread must exit before it is stopped as well.
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

/// Result of an attempt to stop all threads.
enum Stopped {
    /// All threads are stopped; this is one of them.
    All(Pid),
    /// One thread did not stop.
    Not(Stuck),
    /// No thread is left: the process has exited, or runs another program.
    Ended,
}

/// Runs the tracer thread: stops all threads of `pid`, reports that, and holds them until the latch
/// opens.
fn trace(
    pid: i32,
    latch: &Latch,
    cancel: &Cancel,
    stall: Duration,
    answer: &Sender<Result<Stopped>>,
) {
    let stopped = Tracer {
        pid,
        latch,
        cancel,
        threads: BTreeMap::new(),
        refusals: 0,
    }
    .stop();
    let is_held = matches!(stopped, Ok(Stopped::All(_)));
    if answer.send(stopped).is_ok() && is_held {
        latch.watch(cancel, stall);
    }
}

/// The threads of a process that are being stopped.
struct Tracer<'a> {
    pid: i32,
    latch: &'a Latch,
    cancel: &'a Cancel,
    /// Whether each thread has stopped.
    threads: BTreeMap<Pid, bool>,
    /// Number of times that threads refused to be traced.
    refusals: u32,
}

impl Tracer<'_> {
    fn stop(mut self) -> Result<Stopped> {
        // A running thread can start another one while the list is read. Once a pass finds no new
        // thread, every thread that could start one had stopped before that pass.
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
        Ok(held.map_or(Stopped::Ended, Stopped::All))
    }

    /// Traces and interrupts the threads that aren't traced yet. Returns whether there were any.
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
                // A main thread that exited before the others refuses as well.
                Err(Errno::EPERM) if has_ended(pid, tid) => continue,
                // A thread that ran another program took the main thread's place, and is traced
                // already.
                Err(Errno::EPERM) if tracer_of(pid, tid) == Some(gettid()) => {}
                Err(Errno::EPERM) if self.refusals < MAX_REFUSALS => {
                    self.refusals += 1;
                    new = true;
                    sleep(REFUSAL_INTERVAL);
                    continue;
                }
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

    /// Waits until all threads have stopped. Gives up and returns the reason if one doesn't.
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
                // A thread that waits in the kernel, which the other threads can't end.
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

    /// Records which threads have stopped or exited.
    fn collect(&mut self) {
        let peek = WaitPidFlag::WSTOPPED
            | WaitPidFlag::WEXITED
            | WaitPidFlag::__WALL
            | WaitPidFlag::WNOHANG
            | WaitPidFlag::WNOWAIT;
        for tid in self.running().collect::<Vec<_>>() {
            match waitid(Id::Pid(tid), peek) {
                // The requested stop, that of a stopped job, which stays stopped, or one for the
                // delivery of a signal. A signal that `nix` has no name for is reported as an
                // error.
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
                // The exit of a main thread is not reported while other threads exist, exited or
                // not.
                Ok(_) | Err(_) if has_ended(self.pid, tid) => {
                    self.threads.remove(&tid);
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
}

/// Checks what can be known before the first attempt.
fn check_target(pid: i32) -> Result<()> {
    if pid == i32::try_from(std::process::id())? {
        bail!("process {pid} is snaprestore itself; name another one");
    }
    look(pid).or_else(|_| {
        // A thread that runs another program takes the main thread's place. For a moment, the
        // process looks as if it had exited.
        sleep(5 * REFUSAL_INTERVAL);
        look(pid)
    })
}

fn look(pid: i32) -> Result<()> {
    let status = match fs::read(format!("/proc/{pid}/status")) {
        Ok(status) if pid > 0 => status,
        _ => return Err(absent(pid)),
    };
    // The file also contains the name of the process, which may be any bytes.
    let status = String::from_utf8_lossy(&status);
    let field = |name| field(&status, name);
    if let Some(group) = field("Tgid:").filter(|group| *group != pid.to_string()) {
        bail!("{pid} is a thread of process {group}; name that: --pid {group}");
    }
    if is_of_the_kernel(pid) {
        bail!("process {pid} is a kernel thread, which has no memory of its own");
    }
    if field("State:").is_some_and(|state| state.starts_with(['Z', 'X'])) && !has_threads(pid) {
        bail!("process {pid} has ended; its memory is gone");
    }
    if field("VmSize:").is_none() && !has_threads(pid) {
        bail!("process {pid} is ending; its memory is gone");
    }
    if let Some(tracer) = field("TracerPid:").filter(|tracer| *tracer != "0") {
        bail!(
            "process {pid} is traced by process {tracer} already (a debugger?); end that, and try \
             again"
        );
    }
    Ok(())
}

/// Returns a field of `/proc/PID/status`; `name` must end with its colon.
fn field<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim())
}

/// Returns the error for a process that `/proc` does not list.
fn absent(pid: i32) -> anyhow::Error {
    let is_there = || matches!(kill(Pid::from_raw(pid), None), Ok(()) | Err(Errno::EPERM));
    if !Path::new("/proc/self/status").exists() {
        anyhow!(
            "process {pid} can't be looked at: no /proc of this PID namespace is mounted; mount \
             it: mount -t proc proc /proc"
        )
    } else if pid > 0 && is_there() {
        Refusal::NotPermitted(format!(
            "process {pid} can't be looked at: /proc hides it from this user (mount option \
             hidepid); run as root"
        ))
        .into()
    } else {
        anyhow!("there is no process {pid}")
    }
}

/// Returns whether this is a kernel thread. Any other process without memory is exiting.
fn is_of_the_kernel(pid: i32) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let main = format!("/proc/{pid}/stat");
    let flags = stat_field(&main, 6).and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_KTHREAD != 0)
}

/// Returns the thread that traces thread `tid`.
fn tracer_of(pid: i32, tid: Pid) -> Option<Pid> {
    let status = fs::read(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let tracer = field(&status, "TracerPid:")?.parse().ok()?;
    Some(Pid::from_raw(tracer)).filter(|tracer| tracer.as_raw() != 0)
}

/// Returns whether the process has threads besides the main one, which may have exited before them.
fn has_threads(pid: i32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() > 1)
}

fn has_ended(pid: i32, tid: Pid) -> bool {
    matches!(thread_state(pid, tid), Some('Z' | 'X') | None)
}

/// State letter of a thread that its tracer has stopped.
const TRACED: char = 't';

/// Returns the state letter of a thread, if the thread exists.
pub(super) fn thread_state(pid: i32, tid: Pid) -> Option<char> {
    stat_field(&format!("/proc/{pid}/task/{tid}/stat"), 0)?
        .chars()
        .next()
}

/// Returns field `number` of a `stat` file, counted from the one after the name, which may be any
/// bytes.
fn stat_field(file: &str, number: usize) -> Option<String> {
    let stat = fs::read(file).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let fields = stat.rsplit_once(") ")?.1;
    fields.split_whitespace().nth(number).map(str::to_owned)
}

fn refused(pid: i32, tid: Pid) -> anyhow::Error {
    if let Some(tracer) = tracer_of(pid, tid) {
        return anyhow!(
            "process {pid} can't be held: thread {tid} is traced by {tracer} already (a \
             debugger?); end that, and try again"
        );
    }
    let scope = fs::read("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let remedy = match scope.trim_ascii() {
        b"3" => {
            "kernel.yama.ptrace_scope is 3, which forbids it until the next boot; reboot \
             without that setting"
        }
        _ if geteuid().is_root() => {
            "this root has no right to trace it: it lacks the capability CAP_SYS_PTRACE, or a \
             security module forbids it"
        }
        b"" | b"0" => "run as root, or as the user that owns the process",
        _ => "run as root, or permit it to users: sysctl kernel.yama.ptrace_scope=0",
    };
    Refusal::NotPermitted(format!(
        "cannot stop process {pid} (thread {tid}: {}); {remedy} (in a container: add the \
         capability CAP_SYS_PTRACE)",
        Errno::EPERM.desc()
    ))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Returns whether the main thread is stopped by its tracer.
    fn is_traced(pid: Pid) -> bool {
        thread_state(pid.as_raw(), pid) == Some(TRACED)
    }

    #[test]
    fn process_is_released_when_nothing_is_read_of_it() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let output = Output::new(crate::args::Common {
            json: false,
            quiet: true,
        });
        let stall = Duration::from_millis(200);
        let hold = Hold::with_stall_timeout(pid.as_raw(), output, &Cancel::never(), stall).unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(60) && is_traced(pid) {
            sleep(Duration::from_millis(5));
        }
        assert!(!is_traced(pid));
        let error = hold.check().unwrap_err().to_string();
        assert!(error.contains("did not answer"), "{error}");
        drop(hold);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
