//! Stops every thread of a process, and lets it go on in any case.
//!
//! `PTRACE_SEIZE` and `PTRACE_INTERRUPT` stop a thread without sending it a signal. When the
//! tracer dies, by whatever cause, the kernel detaches and the thread goes on: nothing that happens
//! to this process can leave the other one stopped.
//!
//! A thread may stop on its way to a signal instead, in the moment between the two calls; it must
//! get that signal when it goes on. Stops are only peeked at (`WNOWAIT`), so that the kernel itself
//! remembers the signal of a thread whose tracer ends.

use std::collections::BTreeMap;
use std::fs;
use std::marker::PhantomData;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::exit::Refusal;
use crate::signals::Cancel;

/// How long a thread may take to stop. One that waits in the kernel for a disk stops when that
/// answers.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process whose threads are all stopped until this is dropped.
#[derive(Debug)]
pub(super) struct Hold {
    pid: i32,
    threads: BTreeMap<Pid, Thread>,
    /// Tracing belongs to the thread that began it.
    not_send: PhantomData<*const ()>,
}

#[derive(Clone, Copy, Debug)]
enum Thread {
    /// Asked to stop.
    Running,
    /// Stopped, perhaps on the way to this signal, which it must get when it goes on.
    Stopped(Option<Signal>),
    /// Stopped on the way to a real-time signal. Detaching would have to name it, which `nix`
    /// can't; the end of the tracing thread lets it go on, with the signal.
    UntilEnd,
}

impl Hold {
    /// Stops all threads of process `pid`.
    pub(super) fn new(pid: i32, cancel: &Cancel) -> Result<Self> {
        check_target(pid)?;
        let mut hold = Self {
            pid,
            threads: BTreeMap::new(),
            not_send: PhantomData,
        };
        // A thread that still runs can start another one while the list is read; once a pass finds
        // no new thread, all those that could were stopped before it.
        loop {
            let new = hold.seize_new()?;
            hold.wait_stopped(cancel)?;
            if !new {
                break;
            }
        }
        // Killed meanwhile, or it ended by itself.
        if hold.thread().is_none() {
            bail!("process {pid} ended before it could be held");
        }
        Ok(hold)
    }

    /// A held thread, through which the memory can be reached: the main one, unless that ended
    /// before the others.
    pub(super) fn thread(&self) -> Option<Pid> {
        let main = Pid::from_raw(self.pid);
        let others = self.threads.keys().copied().filter(|&tid| tid != main);
        std::iter::once(main)
            .chain(others)
            .find(|&tid| thread_state(self.pid, tid) == Some(TRACED))
    }

    /// Whether a thread is still held. Only a kill can change that.
    pub(super) fn holds(&self, tid: Pid) -> bool {
        thread_state(self.pid, tid) == Some(TRACED)
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
            self.threads.insert(tid, Thread::Running);
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

    fn wait_stopped(&mut self, cancel: &Cancel) -> Result<()> {
        let began = Instant::now();
        let mut pause = Duration::from_micros(50);
        loop {
            self.collect();
            let Some(tid) = self.running().next() else {
                return Ok(());
            };
            cancel.check()?;
            if began.elapsed() > PATIENCE {
                bail!(
                    "process {}: thread {tid} does not stop; it has waited in the kernel for {} s \
                     (for a disk or a file server?)",
                    self.pid,
                    PATIENCE.as_secs()
                );
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    fn running(&self) -> impl Iterator<Item = Pid> {
        self.threads
            .iter()
            .filter(|(_, thread)| matches!(thread, Thread::Running))
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
            let stopped = match waitid(Id::Pid(tid), peek) {
                // On its way to a signal: an event has a number above zero.
                Ok(WaitStatus::PtraceEvent(_, signal, 0)) => Thread::Stopped(Some(signal)),
                // The stop that was asked for, or that of a stopped job, which stays stopped.
                Ok(WaitStatus::PtraceEvent(..)) => Thread::Stopped(None),
                // A signal without a name in `nix`.
                Err(Errno::EINVAL) => Thread::UntilEnd,
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => {
                    let _ = waitpid(tid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
                    self.threads.remove(&tid);
                    continue;
                }
                Err(Errno::ECHILD) => {
                    self.threads.remove(&tid);
                    continue;
                }
                // The end of a main thread is not reported while others are there, ended or not.
                Ok(_) | Err(_) if has_ended(self.pid, tid) => {
                    self.threads.remove(&tid);
                    continue;
                }
                Ok(_) | Err(_) => continue,
            };
            self.threads.insert(tid, stopped);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Only a stopped thread can be let go. One that hasn't stopped yet is waited for a little;
        // after that the end of this process does it.
        let began = Instant::now();
        while self.running().next().is_some() && began.elapsed() < Duration::from_secs(1) {
            self.collect();
            sleep(Duration::from_micros(200));
        }
        for (&tid, thread) in &self.threads {
            if let Thread::Stopped(signal) = *thread {
                let _ = ptrace::detach(tid, signal);
            }
        }
    }
}

/// Says what can be said before anything is tried.
fn check_target(pid: i32) -> Result<()> {
    if pid == i32::try_from(std::process::id())? {
        bail!("process {pid} is snaprestore itself; name another one");
    }
    let status = match fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) if pid > 0 => status,
        _ => bail!("there is no process {pid}"),
    };
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

/// The state letter of a thread, if there is one. The name before it may contain anything.
fn thread_state(pid: i32, tid: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
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
