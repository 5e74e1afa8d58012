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
//! This process can wait for the one it holds: for a file system, a device or a terminal that the
//! other serves, by itself or because a third process needs it. The tracer thread waits for nothing,
//! and lets the process go once the command was asked to stop, or when no thread has read for
//! [`STALL_TIMEOUT`].
//!
//! A thread may stop on its way to a signal instead, in the moment between the two calls; it must
//! get that signal when it goes on. Stops are only peeked at (`WNOWAIT`), so that the kernel itself
//! remembers the signal.

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
/// How long the process is held while nothing is read of it, because this process waits in the
/// kernel. A disk under load may take seconds to answer.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the tracer looks for that.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// How often threads may refuse to be traced, and how long to wait then: one that ends does, and so
/// does a process for a moment when it runs another program (`execve`).
const REFUSALS: u32 = 20;
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

/// Whether the process shall be let go.
#[derive(Debug, Default)]
struct Latch {
    open: Mutex<Open>,
    changed: Condvar,
    /// Grows while the process is being read.
    steps: AtomicU64,
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

    /// Waits until it is open, or for `timeout`.
    fn wait(&self, timeout: Duration) -> Open {
        let is_shut = |open: &mut Open| *open == Open::No;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), timeout, is_shut);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Fails if the process was let go before its memory was read.
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

    /// Waits until it is open. Opens it once the command was asked to stop, or if nothing was read
    /// for `stall`: whoever reads may wait for the process itself.
    fn watch(&self, cancel: &Cancel, stall: Duration) {
        let mut steps = 0;
        // Without the time in which this process was stopped.
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
                    // It has run another program meanwhile.
                    sleep(REFUSAL_INTERVAL);
                    cancel.check()?;
                    continue;
                }
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

    /// Fails if the process is held no longer: it was killed, or let go.
    pub(super) fn check(&self) -> Result<()> {
        self.latch.check(self.pid)?;
        if thread_state(self.pid, self.thread) != Some(TRACED) {
            // The state may have changed because of that.
            self.latch.check(self.pid)?;
            return Err(ended(self.pid));
        }
        Ok(())
    }

    /// Fails if the process was let go, unless it was killed. Costs no system call.
    pub(super) fn check_latch(&self) -> Result<()> {
        self.step();
        self.latch.check(self.pid)
    }

    /// Tells that the process is being read. Without that for a time it is let go.
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

/// Takes note of the end of traced threads. A process that runs another program waits for that of all
/// its other threads, and until then the tracer waits in `PTRACE_SEIZE` and can't do it.
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
    /// None is left: the process has ended, or runs another program.
    Ended,
}

/// What the tracer thread does: it stops all threads of `pid`, reports that, and keeps them until
/// the latch opens.
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
    /// Whether each has stopped.
    threads: BTreeMap<Pid, bool>,
    /// How often one refused to be traced.
    refusals: u32,
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
        Ok(held.map_or(Stopped::Ended, Stopped::All))
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
                // One that ran another program took the main one's place, and is traced already.
                Err(Errno::EPERM) if tracer_of(pid, tid) == Some(gettid()) => {}
                Err(Errno::EPERM) if self.refusals < REFUSALS => {
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
    look(pid).or_else(|_| {
        // When a thread runs another program it takes the main one's place. In between the process
        // looks as if it had ended.
        sleep(5 * REFUSAL_INTERVAL);
        look(pid)
    })
}

fn look(pid: i32) -> Result<()> {
    let status = match fs::read(format!("/proc/{pid}/status")) {
        Ok(status) if pid > 0 => status,
        _ => return Err(absent(pid)),
    };
    // The name of the process, which stands there too, is any bytes.
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

/// A field of `/proc/PID/status`; `name` ends with its colon.
fn field<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim())
}

/// Why `/proc` has nothing of process `pid`.
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

/// Whether it is a thread of the kernel's own. Any other process without memory is ending.
fn is_of_the_kernel(pid: i32) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let main = format!("/proc/{pid}/stat");
    let flags = stat_field(&main, 6).and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_KTHREAD != 0)
}

/// The thread that traces thread `tid`.
fn tracer_of(pid: i32, tid: Pid) -> Option<Pid> {
    let status = fs::read(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let tracer = field(&status, "TracerPid:")?.parse().ok()?;
    Some(Pid::from_raw(tracer)).filter(|tracer| tracer.as_raw() != 0)
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

/// The state letter of a thread, if there is one.
pub(super) fn thread_state(pid: i32, tid: Pid) -> Option<char> {
    stat_field(&format!("/proc/{pid}/task/{tid}/stat"), 0)?
        .chars()
        .next()
}

/// Field `number` of a file `stat`, counted from the one behind the name, which is any bytes.
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

    /// Whether the thread is stopped.
    fn is_traced(pid: Pid) -> bool {
        thread_state(pid.as_raw(), pid) == Some(TRACED)
    }

    #[test]
    fn process_is_let_go_when_nothing_is_read_of_it() {
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
