//! An upgrade: a worker of another program is started beside the current one, and takes over when
//! it is ready.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use snapshot_format::names::escape_path;

use super::Supervisor;
use super::workers::{Outgoing, SHUTDOWN_TIMEOUT};
use crate::api::types::Upgraded;
use crate::ipc::FromWorker;
use crate::supervisor::worker_process::WorkerProcess;

/// Time limit for a new program to become ready.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A worker that is about to take over.
#[derive(Debug)]
pub(super) struct Upgrade {
    pub(super) worker: WorkerProcess,
    pub(super) program: OsString,
    /// The number of the operator's request.
    pub(super) number: u64,
    /// The time at which it became ready.
    pub(super) ready: Option<Instant>,
}

impl Supervisor {
    /// Starts the program that takes over.
    pub(super) fn start_upgrade(&mut self, number: u64, program: Option<PathBuf>) -> Result<()> {
        if self.upgrade.is_some() {
            bail!("another upgrade is in progress");
        }
        let program = match program {
            Some(program) => program,
            None => own_path()?,
        };
        let program = program.into_os_string();
        let worker = WorkerProcess::start(&program, self.workers, &self.options)?;
        self.workers += 1;
        self.upgrade = Some(Upgrade {
            worker,
            program,
            number,
            ready: None,
        });
        Ok(())
    }

    /// Reads the first message of the worker that takes over.
    pub(super) fn read_upgrade(&mut self) {
        let Some(upgrade) = &mut self.upgrade else {
            return;
        };
        match upgrade.worker.channel.receive() {
            Ok(Some((FromWorker::Ready { version }, _))) => {
                let upgraded = Upgraded {
                    from: self.worker.version.clone().unwrap_or_default(),
                    to: version.clone(),
                };
                upgrade.worker.version = Some(version);
                upgrade.ready = Some(Instant::now());
                let answer = Outgoing::Reply(upgrade.number, Ok(Some(upgraded)));
                self.outgoing.push_back(answer);
            }
            Ok(Some((FromWorker::ConfineFailed { why }, _))) => self.abort_upgrade(&why),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.abort_upgrade("it exited, or is not a snaprestore worker"),
        }
    }

    pub(super) fn abort_upgrade(&mut self, why: &str) {
        if let Some(upgrade) = self.upgrade.take() {
            let program = escape_path(upgrade.program.as_ref());
            let why = format!("cannot upgrade to {program}: {why}; the old worker keeps serving");
            self.outgoing
                .push_back(Outgoing::Reply(upgrade.number, Err(why.into())));
        }
    }

    pub(super) fn check_upgrade(&mut self) {
        let Some(upgrade) = &self.upgrade else {
            return;
        };
        match upgrade.ready {
            None if upgrade.worker.started.elapsed() >= START_TIMEOUT => {
                self.abort_upgrade("it did not start in time");
            }
            Some(since) if since.elapsed() >= SHUTDOWN_TIMEOUT => self.worker.kill(),
            _ => {}
        }
    }
}

/// Returns the path of this program, or of the file that has replaced it.
fn own_path() -> Result<PathBuf> {
    let path = std::env::current_exe().context("cannot find the path of this program")?;
    // The kernel marks a replaced file like this.
    let deleted = path.as_os_str().as_bytes().strip_suffix(b" (deleted)");
    Ok(deleted.map_or_else(|| path.clone(), |name| OsStr::from_bytes(name).into()))
}
