//! Where a command writes: a file that appears under its name only when it is complete, or a
//! stream.

use std::fs::{self, File, Metadata};
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use snapshot_format::{FileError, SnapshotFile, WriteError, is_unsupported};

use crate::exit::Refusal;
use crate::names;

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
        names::path(target)
    }
}

/// Refuses a target that is the file that `source` (`-`: standard input) names: it would be replaced
/// by what is made of it. Whatever else is wrong with either is found when it is opened.
pub(crate) fn refuse_source(target: &Path, source: &Path) -> Result<()> {
    if is_stdout(target) {
        return Ok(());
    }
    let of_source = if source == Path::new("-") {
        let stdin = io::stdin().as_fd().try_clone_to_owned();
        stdin.and_then(|stdin| File::from(stdin).metadata())
    } else {
        fs::metadata(source)
    };
    let (Ok(of_target), Ok(of_source)) = (fs::metadata(target), of_source) else {
        return Ok(());
    };
    if is_same(&of_target, &of_source) {
        return Err(Refusal::Usage(format!(
            "{}: is read to make the output, and would be lost; name another file to write",
            names::path(target)
        ))
        .into());
    }
    Ok(())
}

/// Whether two names lead to one file, or to one block device.
fn is_same(a: &Metadata, b: &Metadata) -> bool {
    let holds_data = a.is_file() || a.file_type().is_block_device();
    let one_file = (a.dev(), a.ino()) == (b.dev(), b.ino());
    let are_devices = a.file_type().is_block_device() && b.file_type().is_block_device();
    holds_data && one_file || are_devices && a.rdev() == b.rdev()
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
            Err(error @ FileError::NoReader { .. }) => Err(anyhow::anyhow!(
                "{error}; start its reader first, or pipe standard output into it (-o -)"
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// The file with `len` bytes that are all holes, if it can have them, and if bytes can be
    /// written anywhere in it.
    pub(crate) fn sparse(&mut self, len: u64) -> io::Result<Option<&File>> {
        match self {
            Self::File(file) if file.is_regular() => {
                let file = file.file()?;
                match file.set_len(len) {
                    Ok(()) => Ok(Some(file)),
                    // Some file systems can only append.
                    Err(error) if is_unsupported(&error) => Ok(None),
                    Err(error) => Err(error),
                }
            }
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
