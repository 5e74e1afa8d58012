//! Sources of a snapshot's bytes.
//!
//! The reader asks a [`Store`] for exact ranges and never maps a file: the bytes that are checked
//! must be the bytes that are used, and a mapped file can change between the two or cause a SIGBUS.

use std::fmt;
use std::fs::{File, FileType};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};

use crate::error::OpenError;
use crate::names::escape_path;

/// The reason for which bytes are read. Stores may treat the reasons differently; statistics count
/// them separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Header, trailer, sections and dictionaries.
    Open,
    /// A thread waits for the page.
    Demand,
    /// The page may be needed soon.
    Prefetch,
    /// The whole file is being checked, or read from start to end.
    Verify,
}

/// A source of a snapshot's bytes. Reads come from many threads at once.
pub trait Store: Send + Sync {
    /// Returns the length in bytes. Called once, when the snapshot is opened.
    fn len(&self) -> io::Result<u64>;

    /// Returns whether the store is empty.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from `offset` on, or fails. A store that ends too early fails with
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_exact_at(&self, buf: &mut [u8], offset: u64, reason: Reason) -> io::Result<()>;

    /// Tells the store that reads follow no order from now on, and are as large as they need to be:
    /// fetching what follows a read would be in vain.
    fn expect_random_reads(&self) {}

    /// Returns the store's name in messages: for a file, its path, escaped.
    fn name(&self) -> String;

    /// Returns the folder in which the ancestors of a layered snapshot are looked for first: for a
    /// file that was opened by its path, the folder that it lies in.
    fn folder(&self) -> Option<PathBuf> {
        None
    }

    /// Returns the open file that is read, if the store is one: its descriptor can be passed to
    /// another process.
    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// A snapshot in a regular file or on a block device, read with `pread`.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    name: String,
    /// The folder of the file, if it was opened by its path.
    folder: Option<PathBuf>,
}

impl FileStore {
    /// Opens the regular file or block device at `path`, to read a snapshot from it.
    pub fn open_snapshot(path: &Path) -> Result<Arc<Self>, OpenError> {
        let store = Self::open(path).map_err(|source| OpenError::NoStore {
            file: escape_path(path),
            source,
        })?;
        Ok(Arc::new(store))
    }

    /// Opens the regular file or block device at `path` for reading. It refuses everything else,
    /// and never blocks: a pipe without a writer, or a terminal, would block here forever.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        // Opening a device can have side effects, and opening a socket has no error that names it.
        check_kind(path.metadata()?.file_type())?;
        let file = File::options()
            .read(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(path)?;
        // The name may refer to another file by now.
        check_kind(file.metadata()?.file_type())?;
        make_blocking(&file)?;
        let folder = path.parent().map(|folder| match folder.as_os_str() {
            empty if empty.is_empty() => PathBuf::from("."),
            _ => folder.to_owned(),
        });
        Ok(Self {
            file,
            name: escape_path(path),
            folder,
        })
    }

    /// Wraps a file that is already open; `path` is its name in messages.
    pub fn from_file(file: File, path: impl AsRef<Path>) -> Self {
        Self::named(file, escape_path(path.as_ref()))
    }

    /// Wraps a file that is already open, with the given name.
    pub fn named(file: File, name: impl Into<String>) -> Self {
        Self {
            file,
            name: name.into(),
            folder: None,
        }
    }

    /// Returns the file itself, for a caller that gives the kernel advice about it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the file alone.
    pub fn into_file(self) -> File {
        self.file
    }
}

/// Clears `O_NONBLOCK`, which was needed for opening only.
pub(crate) fn make_blocking(file: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Refuses files that can't be read at any offset.
fn check_kind(kind: FileType) -> io::Result<()> {
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "folder"
    } else if kind.is_fifo() {
        "named pipe"
    } else if kind.is_socket() {
        "socket"
    } else {
        "character device"
    };
    Err(io::Error::other(format!(
        "it is a {what}; name a regular file or a block device"
    )))
}

impl Store for FileStore {
    fn len(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        if metadata.file_type().is_block_device() {
            // A device's metadata has no length. Nothing else uses the file position.
            return (&self.file).seek(SeekFrom::End(0));
        }
        Ok(metadata.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, _reason: Reason) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn expect_random_reads(&self) {
        // A hint: without it, the kernel reads up to some megabytes more.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn folder(&self) -> Option<PathBuf> {
        self.folder.clone()
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// A snapshot in memory.
#[derive(Clone)]
pub struct MemoryStore {
    bytes: Vec<u8>,
    name: String,
}

impl MemoryStore {
    /// Creates a store of `bytes` that is named `(memory)` in messages.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self::named(bytes, "(memory)")
    }

    /// Creates a store of `bytes` with the given name.
    pub fn named(bytes: Vec<u8>, name: impl Into<String>) -> Self {
        Self {
            bytes,
            name: name.into(),
        }
    }

    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("name", &self.name)
            .field("bytes", &self.bytes.len())
            .finish()
    }
}

impl Store for MemoryStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, _reason: Reason) -> io::Result<()> {
        let wanted = usize::try_from(offset)
            .ok()
            .and_then(|from| Some(from..from.checked_add(buf.len())?))
            .and_then(|range| self.bytes.get(range))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(wanted);
        Ok(())
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
