//! An upgrade: a worker of another program is started beside the one that serves, and takes over when it is
//! ready.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::Keeper;
use super::workers::{LAST_WORDS, Outgoing};
use crate::api::types::Upgraded;
use crate::ipc::FromWorker;
use crate::supervisor::worker_process::Worker;
use snapshot_format::names::escape_path;

/// How long a program that is to take over may need until it is ready.
const SUCCESSION: Duration = Duration::from_secs(20);

/// A worker that is to take over.
#[derive(Debug)]
pub(super) struct Successor {
    pub(super) worker: Worker,
    pub(super) program: OsString,
    /// The operator's question.
    pub(super) number: u64,
    /// Since when it has been ready.
    pub(super) ready: Option<Instant>,
}

impl Keeper {
    /// Starts the program that is to take over.
    pub(super) fn prepare_upgrade(&mut self, number: u64, program: Option<PathBuf>) -> Result<()> {
        if self.successor.is_some() {
            bail!("another upgrade is under way");
        }
        let program = match program {
            Some(program) => program,
            None => own_path()?,
        };
        let program = program.into_os_string();
        let worker = Worker::start(&program, self.workers, &self.options)?;
        self.workers += 1;
        self.successor = Some(Successor {
            worker,
            program,
            number,
            ready: None,
        });
        Ok(())
    }

    /// Takes the first word of the worker that is to take over.
    pub(super) fn listen_to_successor(&mut self) {
        let Some(successor) = &mut self.successor else {
            return;
        };
        match successor.worker.wire.receive() {
            Ok(Some((FromWorker::Ready { version }, _))) => {
                let upgraded = Upgraded {
                    from: self.worker.version.clone().unwrap_or_default(),
                    to: version.clone(),
                };
                successor.worker.version = Some(version);
                successor.ready = Some(Instant::now());
                let answer = Outgoing::Answer(successor.number, Ok(Some(upgraded)));
                self.outgoing.push_back(answer);
            }
            Ok(Some((FromWorker::Unfit { why }, _))) => self.give_up_upgrade(&why),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.give_up_upgrade("it ended, or says what no worker says"),
        }
    }

    pub(super) fn give_up_upgrade(&mut self, why: &str) {
        if let Some(successor) = self.successor.take() {
            let program = escape_path(successor.program.as_ref());
            let answer = Err(format!(
                "{program}: can't take over: {why}; all goes on as before"
            ));
            self.outgoing
                .push_back(Outgoing::Answer(successor.number, answer));
        }
    }

    pub(super) fn watch_succession(&mut self) {
        let Some(successor) = &self.successor else {
            return;
        };
        match successor.ready {
            None if successor.worker.started.elapsed() >= SUCCESSION => {
                self.give_up_upgrade("it takes too long to start");
            }
            Some(since) if since.elapsed() >= LAST_WORDS => self.worker.kill(),
            _ => {}
        }
    }
}

/// Where this program is, or what has taken its place.
fn own_path() -> Result<PathBuf> {
    let path = std::env::current_exe().context("where this program is")?;
    // So the kernel calls a file that was replaced.
    let deleted = path.as_os_str().as_bytes().strip_suffix(b" (deleted)");
    Ok(deleted.map_or_else(|| path.clone(), |name| OsStr::from_bytes(name).into()))
}
