//! Where a command writes: a file that appears under its name only when it is complete, or a
//! stream.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use snapshot_format::{FileError, SnapshotFile, WriteError};

use crate::exit::Refusal;

/// An opened target.
pub(crate) enum Target {
    /// Appears when it is complete.
    File(SnapshotFile),
    /// Standard output.
    Stream(File),
}

/// Whether `path` means standard output.
pub(crate) fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}

/// What messages call a target.
pub(crate) fn name(target: &Path) -> String {
    if is_stdout(target) {
        "standard output".into()
    } else {
        target.display().to_string()
    }
}

/// Says which target could not be written: what writes to it doesn't know.
pub(crate) fn named(error: anyhow::Error, target: &Path) -> anyhow::Error {
    if matches!(error.downcast_ref(), Some(WriteError::Io { .. })) {
        error.context(name(target))
    } else {
        error
    }
}

impl Target {
    /// Opens `path` for writing. An existing file stays as it is until [`Target::complete`], and
    /// is an error without `force`.
    pub(crate) fn create(path: &Path, force: bool) -> Result<Self> {
        if is_stdout(path) {
            let stdout = io::stdout();
            if stdout.is_terminal() {
                return Err(Refusal::Usage(
                    "standard output is a terminal; name a file, or pipe it somewhere".into(),
                )
                .into());
            }
            let fd = stdout.as_fd().try_clone_to_owned();
            return Ok(Self::Stream(fd.context("standard output")?.into()));
        }
        match SnapshotFile::create(path, force) {
            Ok(file) => Ok(Self::File(file)),
            Err(error @ FileError::Exists { .. }) => {
                Err(anyhow::anyhow!("{error}; --force replaces it"))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The file, if bytes can be written anywhere in it.
    pub(crate) fn file(&mut self) -> io::Result<Option<&File>> {
        match self {
            Self::File(file) if file.is_regular() => file.file().map(Some),
            Self::File(_) | Self::Stream(_) => Ok(None),
        }
    }

    /// Makes a file appear under its name.
    pub(crate) fn complete(self) -> Result<()> {
        match self {
            Self::File(file) => Ok(file.commit()?),
            Self::Stream(mut stream) => stream.flush().context("standard output"),
        }
    }
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Stream(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::File(file) => file.flush(),
            Self::Stream(stream) => stream.flush(),
        }
    }
}
