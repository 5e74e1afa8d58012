//! The worker's process as seen by the supervisor.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use snaprestore_uffd::os::open_pidfd;
use snapshot_format::names::escape_path;

use crate::fd_store::systemd;
use crate::ipc::{Channel, FAIL};
use crate::supervisor::Options;
use crate::worker::sandbox::SandboxError;

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is no socket for its messages.
    #[error("cannot create a socket for the worker")]
    Socket(#[source] io::Error),
    /// The program could not be run.
    #[error("cannot start {program} as a worker")]
    Program {
        /// The path of the program, escaped.
        program: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The process can't be watched.
    #[error("cannot open a pidfd of the worker")]
    Watch(#[source] io::Error),
    /// The user that the worker would run as can't be used.
    #[error(transparent)]
    User(#[from] SandboxError),
}

/// A worker process.
#[derive(Debug)]
pub(crate) struct WorkerProcess {
    child: Child,
    /// The pidfd, which is readable once every thread of the process is gone.
    pidfd: OwnedFd,
    pub(crate) channel: Channel,
    pub(crate) started: Instant,
    /// The version of its program, after its first message.
    pub(crate) version: Option<String>,
    /// Whether it was killed because it was stuck.
    stuck: bool,
    /// The time at which it was killed.
    killed: Option<Instant>,
}

/// Why a worker exited.
#[derive(Debug)]
pub(crate) struct ExitCause {
    /// A description for the log.
    pub(crate) description: String,
    /// Whether the frame that it was decoding may be the cause: it crashed or got stuck, and was
    /// not killed by somebody else.
    pub(crate) is_own_fault: bool,
    /// Whether it was killed because it was stuck.
    pub(crate) stuck: bool,
}

impl WorkerProcess {
    /// Starts `program` as worker number `number`, counted from 0.
    pub(crate) fn start(
        program: &OsStr,
        number: u64,
        options: &Options,
    ) -> Result<Self, StartError> {
        let (channel, theirs) = Channel::pair().map_err(StartError::Socket)?;
        let mut command = Command::new(program);
        // Only the supervisor reacts to Ctrl-C.
        command.arg("worker").process_group(0);
        let format = options.log_format.to_possible_value();
        let format = format.as_ref().map_or("text", |format| format.get_name());
        command.args(["--log-format", format]);
        command.args(["--frame-cache", &options.frame_cache.to_string()]);
        // A worker of an older program exits if it does not know an option. So newer settings are
        // sent with the services.
        if options.confine {
            command.arg("--confine");
        }
        if let Some(user) = &options.user {
            command.args(["--user", user]);
        }
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        for variable in systemd::VARIABLES {
            command.env_remove(variable);
        }
        match place_to_fail(number) {
            Some(place) => command.env(FAIL, place),
            None => command.env_remove(FAIL),
        };
        let child = command.spawn().map_err(|source| StartError::Program {
            program: escape_path(program.as_ref()),
            source,
        })?;
        let pidfd = open_pidfd(child.id()).map_err(StartError::Watch)?;
        Ok(Self {
            child,
            pidfd,
            channel,
            started: Instant::now(),
            version: None,
            stuck: false,
            killed: None,
        })
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Reaps the process if it has exited, and returns whether it has.
    pub(crate) fn reap_if_exited(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills the worker because it is stuck.
    pub(crate) fn kill_stuck(&mut self) {
        self.stuck = true;
        self.kill();
    }

    /// Kills the worker. The supervisor notices the exit like any other.
    pub(crate) fn kill(&mut self) {
        // The PID can't belong to another process, since the status has not been collected.
        let _ = self.child.kill();
        self.killed.get_or_insert_with(Instant::now);
    }

    /// Returns the time at which it was killed.
    pub(crate) fn killed(&self) -> Option<Instant> {
        self.killed
    }

    /// Describes where in the kernel its unkillable threads are blocked.
    pub(crate) fn blocked_in(&self) -> String {
        let tasks = format!("/proc/{}/task", self.child.id());
        let tasks = fs::read_dir(tasks).into_iter().flatten();
        let mut found: Vec<_> = tasks
            .filter_map(|task| uninterruptible(&task.ok()?.path()))
            .collect();
        found.dedup();
        if found.is_empty() {
            return "the kernel does not say where".to_owned();
        }
        found.truncate(3);
        format!("uninterruptible sleep in {}", found.join(", "))
    }

    /// Reaps a worker whose pidfd is readable.
    pub(crate) fn reap(&mut self) -> io::Result<ExitCause> {
        let status: ExitStatus = self.child.wait()?;
        let description = if self.stuck {
            "hung and was killed".to_owned()
        } else {
            match (status.code(), status.signal()) {
                (Some(code), _) => format!("exited with code {code}"),
                (None, signal) => format!("was killed by signal {}", signal.unwrap_or(0)),
            }
        };
        let killed_from_outside = !self.stuck && status.signal() == Some(SIGKILL);
        Ok(ExitCause {
            description,
            is_own_fault: !killed_from_outside,
            stuck: self.stuck,
        })
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        self.kill();
        // An unkillable worker is left to the process that reaps orphans.
        let began = Instant::now();
        while !self.reap_if_exited() && began.elapsed() < DROP_TIMEOUT {
            std::thread::sleep(DROP_TIMEOUT / 100);
        }
    }
}

/// Time limit for the exit of a worker that is dropped.
const DROP_TIMEOUT: Duration = Duration::from_secs(2);

/// Describes where in the kernel a task is blocked, if it waits uninterruptibly.
fn uninterruptible(task: &Path) -> Option<String> {
    let stat = fs::read(task.join("stat")).ok()?;
    // The file also contains the thread's name, which may be any bytes.
    let stat = String::from_utf8_lossy(&stat);
    if !stat.rsplit_once(") ")?.1.starts_with('D') {
        return None;
    }
    // Reading it takes permission to trace the worker; without it, the content is "0".
    let place = fs::read_to_string(task.join("wchan")).unwrap_or_default();
    let call = fs::read_to_string(task.join("syscall")).unwrap_or_default();
    let call = call.split(' ').next().unwrap_or_default().trim_end();
    let place = if ["", "0"].contains(&place.trim()) {
        "an unknown kernel function"
    } else {
        place.trim()
    };
    Some(if call.is_empty() {
        place.to_owned()
    } else {
        format!("{place} (system call {call})")
    })
}

const SIGKILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;

fn place_to_fail(number: u64) -> Option<String> {
    let places = std::env::var(FAIL).ok()?;
    let place = places.split(',').nth(usize::try_from(number).ok()?);
    place.map(str::to_owned)
}
