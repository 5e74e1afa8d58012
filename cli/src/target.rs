//! Output targets: a file that appears under its name only when it is complete, or a stream.

use std::fs::{self, File, Metadata};
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::makedev;
use snapshot_format::{FileError, SnapshotFile, WriteError, is_unsupported};

use crate::exit::Refusal;
use crate::names;
use crate::output::Output;
use crate::signals::Cancel;

/// The device number of `/dev/null`.
const NULL_DEVICE: u64 = makedev(1, 3);
/// Number of bytes that a pipe accepts without blocking if it accepts any.
const PIPE_BUF: usize = 4096;

/// An opened target.
pub(crate) enum Target {
    /// A file that appears under its name when it is complete.
    File(SnapshotFile),
    /// Standard output, or a named pipe or device.
    Stream(Stream),
}

/// A target that is written in place. With `cancel`, a signal interrupts a write that waits for the
/// reader of a pipe or socket.
pub(crate) struct Stream {
    file: File,
    /// Handle that interrupts a blocked write; `None` if no write blocks, or none is interrupted.
    cancel: Option<Cancel>,
    /// Maximum number of bytes per write.
    piece: usize,
}

/// Returns whether `path` means standard output.
pub(crate) fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}

/// Returns whether `path` means standard output; refuses it if JSON goes there, too.
pub(crate) fn is_stdout_without_json(path: &Path, output: Output) -> Result<bool> {
    let is_stdout = is_stdout(path);
    if is_stdout && output.json() {
        return Err(Refusal::Usage(
            "--json writes to standard output, and so does --output -; name a file".into(),
        )
        .into());
    }
    Ok(is_stdout)
}

/// Returns the name of a target in messages.
pub(crate) fn name(target: &Path) -> String {
    if is_stdout(target) {
        "standard output".into()
    } else {
        names::path(target)
    }
}

/// Refuses a target that is the same file as `source` (`-`: standard input), since the output would
/// replace its own source. All other problems of either are found when it is opened.
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

/// Returns whether two names refer to one file, or to one block device.
fn is_same(a: &Metadata, b: &Metadata) -> bool {
    let holds_data = a.is_file() || a.file_type().is_block_device();
    let one_file = (a.dev(), a.ino()) == (b.dev(), b.ino());
    let are_devices = a.file_type().is_block_device() && b.file_type().is_block_device();
    holds_data && one_file || are_devices && a.rdev() == b.rdev()
}

/// Returns whether two targets, which need not exist, are one name in one folder.
pub(crate) fn is_same_name(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| {
        let path = std::path::absolute(path).ok()?;
        let folder = fs::canonicalize(path.parent()?).ok()?;
        Some((folder, path.file_name()?.to_owned()))
    };
    one == other || place(one).is_some_and(|place_of_one| Some(place_of_one) == place(other))
}

/// Adds the target's name to a write error, which the writer doesn't know.
pub(crate) fn named(error: anyhow::Error, target: &Path) -> anyhow::Error {
    if matches!(error.downcast_ref(), Some(WriteError::Io { .. })) {
        error.context(name(target))
    } else {
        error
    }
}

impl Target {
    /// Opens `path` for writing. An existing file is unchanged until [`Target::complete`], and an
    /// error without `force`.
    pub(crate) fn create(path: &Path, force: bool, cancel: &Cancel) -> Result<Self> {
        Self::open(path, force, Some(cancel)).map_err(|error| {
            match error.downcast_ref::<FileError>() {
                Some(FileError::Exists { .. }) => anyhow!("{error}; --force replaces it"),
                _ => error,
            }
        })
    }

    /// Opens `path` for writing, for a command that replaces no file. No signal interrupts a write
    /// that waits for a reader.
    pub(crate) fn create_new(path: &Path) -> Result<Self> {
        Self::open(path, false, None).map_err(|error| match error.downcast_ref::<FileError>() {
            Some(FileError::Exists { .. }) => anyhow!("{error}; name another file to write"),
            _ => error,
        })
    }

    fn open(path: &Path, force: bool, cancel: Option<&Cancel>) -> Result<Self> {
        if is_stdout(path) {
            let stdout = io::stdout();
            if stdout.is_terminal() {
                return Err(Refusal::Usage(
                    "standard output is a terminal; name a file, or pipe it somewhere".into(),
                )
                .into());
            }
            let fd = stdout.as_fd().try_clone_to_owned();
            let file = File::from(fd.context("standard output")?);
            return Ok(Self::Stream(Stream::new(file, cancel)?));
        }
        match SnapshotFile::create(path, force) {
            Ok(file) if file.is_regular() => Ok(Self::File(file)),
            Ok(mut file) => {
                let copy = file.file().and_then(File::try_clone);
                let file = copy.with_context(|| name(path))?;
                Ok(Self::Stream(Stream::new(file, cancel)?))
            }
            Err(error @ FileError::NoReader { .. }) => Err(anyhow!(
                "{error}; start its reader first, or pipe standard output into it (-o -)"
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns whether it is a file that gets its name when it is complete.
    pub(crate) fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// Returns the file, to be read; `None` for a stream.
    pub(crate) fn open_again(&mut self) -> io::Result<Option<File>> {
        match self {
            Self::File(file) => file.file()?.try_clone().map(Some),
            Self::Stream(_) => Ok(None),
        }
    }

    /// Returns the file, set to `len` bytes of holes. Returns `None` if the target can't have holes
    /// or can't be written at any offset.
    pub(crate) fn sparse(&mut self, len: u64) -> io::Result<Option<&File>> {
        match self {
            Self::File(file) => {
                let file = file.file()?;
                match file.set_len(len) {
                    Ok(()) => Ok(Some(file)),
                    // Some file systems can only append.
                    Err(error) if is_unsupported(&error) => Ok(None),
                    Err(error) => Err(error),
                }
            }
            Self::Stream(_) => Ok(None),
        }
    }

    /// Makes the file appear under its name, or flushes the stream.
    pub(crate) fn complete(self) -> Result<()> {
        match self {
            Self::File(file) => Ok(file.commit()?),
            Self::Stream(mut stream) => stream.flush().context("standard output"),
        }
    }
}

impl Stream {
    /// Returns a target that is written in place. With `cancel`, a signal interrupts a write that
    /// waits for a reader.
    pub(crate) fn new(file: File, cancel: Option<&Cancel>) -> Result<Self> {
        let metadata = file.metadata().context("finding the kind of the output")?;
        let kind = metadata.file_type();
        if kind.is_char_device() && metadata.rdev() == NULL_DEVICE {
            // If standard output was closed, the runtime has replaced it with /dev/null, opened for
            // reading and writing, before `main`.
            let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
            if flags & OFlag::O_ACCMODE == OFlag::O_RDWR {
                return Err(Refusal::Usage(
                    "standard output is closed; redirect it to a file or a pipe (or with \
                     >/dev/null, if it is to be lost)"
                        .into(),
                )
                .into());
            }
        }
        let cancel = cancel.filter(|_| kind.is_fifo() || kind.is_socket());
        let Some(cancel) = cancel else {
            return Ok(Self {
                file,
                cancel: None,
                piece: usize::MAX,
            });
        };
        // Reopening a pipe sets the flag for this command alone: others may write to it too. A
        // socket can't be reopened, so it is written in pieces that it has room for.
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let opened = File::options()
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path);
        let (file, piece) = match opened {
            Ok(anew) => (anew, usize::MAX),
            Err(_) => (file, PIPE_BUF),
        };
        Ok(Self {
            file,
            cancel: Some(cancel.clone()),
            piece,
        })
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(cancel) = &self.cancel else {
            return self.file.write(bytes);
        };
        let bytes = &bytes[..bytes.len().min(self.piece)];
        loop {
            cancel
                .wait_writable(self.file.as_fd())
                .map_err(io::Error::other)?;
            match self.file.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
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
