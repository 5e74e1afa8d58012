//! An upgrade: a worker of another program is started beside the current one, and takes over when
//! it is ready.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::Instant;

use super::worker_process::{StartError, WorkerProcess};

/// A worker that is about to take over.
#[derive(Debug)]
pub(super) struct Upgrade {
    pub(super) worker: WorkerProcess,
    pub(super) program: OsString,
    /// The number of the operator's request.
    pub(super) number: u64,
    /// The time at which it became ready.
    pub(super) ready: Option<Instant>,
    /// Support of its program for the newer settings of services.
    pub(super) knows_newer: bool,
}

/// Why another program can't take over.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpgradeError {
    #[error("another upgrade is in progress")]
    InProgress,
    #[error("cannot find the path of this program")]
    OwnPath(#[source] io::Error),
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Returns the path of this program, or of the file that has replaced it.
pub(super) fn own_path() -> Result<PathBuf, UpgradeError> {
    let path = std::env::current_exe().map_err(UpgradeError::OwnPath)?;
    // The kernel marks a replaced file like this.
    let deleted = path.as_os_str().as_bytes().strip_suffix(b" (deleted)");
    Ok(deleted.map_or_else(|| path.clone(), |name| OsStr::from_bytes(name).into()))
}
