//! Where the bytes of a snapshot come from.
//!
//! The reader asks a [`Store`] for exact ranges and never maps a file: what is checked must be what
//! is used, and a mapped file can change between the two or end in a SIGBUS.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Why bytes are read. Stores may treat the reasons differently; statistics count them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Header, trailer, sections and dictionaries.
    Open,
    /// Somebody waits for the page.
    Demand,
    /// Somebody may soon want the page.
    Prefetch,
    /// The whole file is being checked, or read from one end to the other.
    Verify,
}

/// A snapshot's bytes. Reads come from many threads at once.
pub trait Store: Send + Sync {
    /// Length in bytes. Asked once, when the snapshot is opened.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are no bytes at all.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from `offset` on, or fails. A store that ends too early fails with
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_exact_at(&self, buf: &mut [u8], offset: u64, reason: Reason) -> io::Result<()>;

    /// What messages call the store: for a file, its path.
    fn name(&self) -> String;
}

/// A snapshot in a local file, read with `pread`.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    path: PathBuf,
}

impl FileStore {
    /// Opens the file at `path` for reading.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = File::open(&path)?;
        Ok(Self { file, path })
    }

    /// Takes a file that is open already; `path` is what messages call it.
    pub fn from_file(file: File, path: impl Into<PathBuf>) -> Self {
        Self {
            file,
            path: path.into(),
        }
    }

    /// The file itself, for a caller who gives advice about it to the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Store for FileStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, _reason: Reason) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// A snapshot in memory.
#[derive(Clone)]
pub struct MemoryStore {
    bytes: Vec<u8>,
    name: String,
}

impl MemoryStore {
    /// A store of `bytes` that messages call `(memory)`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self::named(bytes, "(memory)")
    }

    /// A store of `bytes` with a name of its own.
    pub fn named(bytes: Vec<u8>, name: impl Into<String>) -> Self {
        Self {
            bytes,
            name: name.into(),
        }
    }

    /// The bytes.
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
