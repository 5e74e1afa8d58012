//! Files that appear under their name only when they are complete and synced to disk.
//!
//! ```text
//! create   nameless file in the target's folder (O_TMPFILE), or one with a temporary name
//! write    ...
//! commit   fsync of the file
//!          no --force: link to the target's name, which fails if that exists
//!          --force:    link to a temporary name, rename over the target
//!          fsync of the folder
//! ```
//!
//! If a file system doesn't support a step, there is a fallback, and none of them replaces a file
//! without `force`:
//!
//! - make a nameless file: make one with a temporary name
//! - link a nameless file: copy it to one with a temporary name
//! - rename, but not over a file (`RENAME_NOREPLACE`): link and remove; or make an empty target
//!   that must not exist yet, and rename over that
//! - fsync of a file or a folder: sync of the file system
//! - give the file the target's name: leave the finished file under its temporary name, and return
//!   an error that says so
//!
//! If the process is killed at any point, either the old target or the new one exists, complete. A
//! nameless file disappears with its process. Two things can stay behind after a kill: a temporary
//! name, `.snaprestore-*.partial`, if the file system has no nameless files or in the moment
//! between link and rename; and an empty target, in the moment before the rename, if the file
//! system can neither link nor rename without replacing.
//!
//! Memory holds secrets: only its owner can read and write a new file. A file that replaces another
//! gets that one's owner, group and permissions, because somebody chose them. If this process may
//! not give it the group, the group has no access.
//!
//! A target that is not a regular file (a pipe, `/dev/null`, `/dev/stdout`) is written directly. A
//! named pipe needs a reader beforehand: nothing waits for one.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, renameat2};
use nix::unistd::{linkat, syncfs};

use crate::names::escape_path;
use crate::store::make_blocking;

/// Size of the write buffer. Longer writes bypass it.
const BUFFER_BYTES: usize = 64 << 10;
/// Permissions of a new file.
const PRIVATE: u32 = 0o600;
/// Permissions that are copied from a replaced file. They exclude the bits that change the user or
/// group of a running program.
const KEPT_MODE_BITS: u32 = 0o777;
/// Permissions of the group.
const GROUP_MODE_BITS: u32 = 0o070;
/// Number of temporary names that are tried.
const NAME_RETRIES: u32 = 100;

/// An error of [`SnapshotFile`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The target exists, and the caller did not ask to replace it.
    #[error("{} exists already", escape_path(path))]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The target's folder doesn't exist.
    #[error("the folder {} does not exist", escape_path(folder))]
    NoFolder {
        /// The folder.
        folder: PathBuf,
    },
    /// The target is a folder.
    #[error("{} is a folder", escape_path(path))]
    IsFolder {
        /// The target.
        path: PathBuf,
    },
    /// The target is a named pipe without a reader: opening it would block until one appears.
    #[error("no process reads the named pipe {}", escape_path(path))]
    NoReader {
        /// The target.
        path: PathBuf,
    },
    /// The target is a disk, on which the end of the snapshot could not be found later.
    #[error(
        "{} is a block device; a snapshot is a file, a pipe or a stream",
        escape_path(path)
    )]
    BlockDevice {
        /// The target.
        path: PathBuf,
    },
    /// The file is complete, but could not be given its name: it stays under a temporary one.
    #[error(
        "could not name the file {}, which is complete and kept as {}: rename it",
        escape_path(path),
        escape_path(partial)
    )]
    NotNamed {
        /// The target.
        path: PathBuf,
        /// Path of the finished file.
        partial: PathBuf,
        /// Error of the operating system.
        #[source]
        source: io::Error,
    },
    /// The file is complete and has its name, but the name may not survive a crash of the machine.
    #[error(
        "{} is written, but its folder could not be brought to disk",
        escape_path(path)
    )]
    NotSynced {
        /// The target, which is there.
        path: PathBuf,
        /// Error of the operating system.
        #[source]
        source: io::Error,
    },
    /// The file system returned an error.
    #[error("could not {what} {}", escape_path(path))]
    Io {
        /// Description of the step that failed.
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        #[source]
        source: io::Error,
    },
}

impl FileError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }
}

/// The place that receives the bytes until the target gets its name.
enum Place {
    /// A file without a name in this folder.
    Nameless { folder: PathBuf },
    /// A file with a temporary name in this folder.
    Named { folder: PathBuf, temporary: PathBuf },
    /// The target itself, which is not a regular file.
    Straight,
}

/// A file that gets its name with [`SnapshotFile::commit`]. If it is dropped before that, it leaves
/// nothing behind.
pub struct SnapshotFile {
    out: BufWriter<File>,
    target: PathBuf,
    force: bool,
    place: Place,
}

impl SnapshotFile {
    /// Starts a file that will appear at `target`. With `force` it replaces a file that exists at
    /// the time of the commit. Without `force`, a file that exists now or then is an error and is
    /// left unchanged.
    pub fn create(target: impl AsRef<Path>, force: bool) -> Result<Self, FileError> {
        Self::create_with(target.as_ref(), force, true)
    }

    fn create_with(target: &Path, force: bool, nameless: bool) -> Result<Self, FileError> {
        if let Some(file) = open_straight(target)? {
            let out = BufWriter::with_capacity(BUFFER_BYTES, file);
            return Ok(Self {
                out,
                target: target.to_owned(),
                force,
                place: Place::Straight,
            });
        }
        if target.is_dir() || target.file_name().is_none() {
            return Err(FileError::IsFolder {
                path: target.to_owned(),
            });
        }
        let exists = target.symlink_metadata().is_ok();
        if exists && !force {
            return Err(FileError::Exists {
                path: target.to_owned(),
            });
        }
        // The file that a link points to is replaced, not the link.
        let target = match target.canonicalize() {
            Ok(path) if exists => path,
            _ => target.to_owned(),
        };
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        if !folder.is_dir() {
            return Err(FileError::NoFolder { folder });
        }
        // Some file systems (overlays, NFS, FUSE) refuse this, each with an error of its own.
        let unnamed = if nameless {
            open_nameless(&folder).ok()
        } else {
            None
        };
        let (file, place) = if let Some(file) = unnamed {
            (file, Place::Nameless { folder })
        } else {
            let (file, temporary) =
                create_named(&target).map_err(FileError::io("create a file in", &folder))?;
            (file, Place::Named { folder, temporary })
        };
        let created = Self {
            out: BufWriter::with_capacity(BUFFER_BYTES, file),
            target,
            force,
            place,
        };
        if exists && let Ok(replaced) = created.target.metadata() {
            keep_access(created.out.get_ref(), &replaced).map_err(FileError::io(
                "set the owner or the permissions of",
                &created.target,
            ))?;
        }
        Ok(created)
    }

    /// Returns whether the file is a regular file, which can be written at any offset; false for
    /// pipes and devices.
    pub fn is_regular(&self) -> bool {
        !matches!(self.place, Place::Straight)
    }

    /// Returns the file itself, after everything written so far has reached it, to be written at
    /// any offset.
    pub fn file(&mut self) -> io::Result<&File> {
        self.out.flush()?;
        Ok(self.out.get_ref())
    }

    /// Syncs the file to disk and gives it its name.
    pub fn commit(self) -> Result<(), FileError> {
        self.commit_with(link)
    }

    fn commit_with(
        mut self,
        link: impl Fn(&Path, &Path) -> io::Result<()>,
    ) -> Result<(), FileError> {
        self.out
            .flush()
            .map_err(FileError::io("write", &self.target))?;
        if !self.is_regular() {
            return Ok(());
        }
        let file = self.out.get_ref();
        sync(file, file).map_err(FileError::io("write to disk", &self.target))?;
        match &self.place {
            Place::Straight => {}
            Place::Nameless { folder } => {
                let folder = folder.clone();
                let source = link_source(self.out.get_ref());
                let linked = if self.force {
                    with_temporary_name(&self.target, |path| link(&source, path))
                        .map(|((), temporary)| Some(temporary))
                } else {
                    link(&source, &self.target).map(|()| None)
                };
                let temporary = match linked {
                    Ok(None) => return self.sync_folder(&folder),
                    Ok(Some(temporary)) => temporary,
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        // Another file was created in between. Hours of work still deserve a name.
                        let kept = with_temporary_name(&self.target, |path| link(&source, path));
                        let ((), temporary) = kept.map_err(FileError::io("name", &self.target))?;
                        self.place = Place::Named { folder, temporary };
                        return Err(self.keep(error));
                    }
                    // Some file systems make nameless files but can never give them a name. Hours
                    // of work are worth a copy.
                    Err(_) => copy_to_named(self.out.get_ref(), &self.target)
                        .map_err(FileError::io("name", &self.target))?,
                };
                // From here on a drop must remove the temporary file.
                self.place = Place::Named { folder, temporary };
                self.rename()?;
            }
            Place::Named { .. } => self.rename()?,
        }
        Ok(())
    }

    /// Renames a file with a temporary name to the target's.
    fn rename(&mut self) -> Result<(), FileError> {
        let Place::Named { folder, temporary } = &self.place else {
            return Ok(());
        };
        let folder = folder.clone();
        let renamed = if self.force {
            std::fs::rename(temporary, &self.target)
        } else {
            rename_new(temporary, &self.target)
        };
        renamed.map_err(|error| self.keep(error))?;
        // The temporary name no longer exists.
        self.place = Place::Straight;
        self.sync_folder(&folder)
    }

    /// Leaves a finished file under its temporary name, and returns the reason as an error.
    fn keep(&mut self, source: io::Error) -> FileError {
        match std::mem::replace(&mut self.place, Place::Straight) {
            Place::Named { temporary, .. } => FileError::NotNamed {
                path: self.target.clone(),
                partial: temporary,
                source,
            },
            Place::Nameless { .. } | Place::Straight => FileError::io("name", &self.target)(source),
        }
    }

    /// Syncs the folder, so that the target's name in it survives a crash.
    fn sync_folder(&self, folder: &Path) -> Result<(), FileError> {
        let file = self.out.get_ref();
        // A folder with write but not read permission can't be opened.
        let synced = match File::open(folder) {
            Ok(folder) => sync(&folder, file),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => sync_system(file),
            Err(error) => Err(error),
        };
        synced.map_err(|source| FileError::NotSynced {
            path: self.target.clone(),
            source,
        })
    }
}

impl Write for SnapshotFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Seek for SnapshotFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.out.seek(to)
    }
}

impl Drop for SnapshotFile {
    fn drop(&mut self) {
        if let Place::Named { temporary, .. } = &self.place {
            // There is nobody to report an error to.
            let _ = std::fs::remove_file(temporary);
        }
    }
}

/// Opens a target that is not a regular file, or the standard output by one of its names.
fn open_straight(target: &Path) -> Result<Option<File>, FileError> {
    let stdout = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];
    if stdout.iter().any(|name| target == Path::new(name)) {
        // If it were opened anew, a regular file behind it would be written from its start.
        let copy = io::stdout().as_fd().try_clone_to_owned();
        return copy
            .map(|fd| Some(fd.into()))
            .map_err(FileError::io("open", target));
    }
    let Ok(metadata) = target.metadata() else {
        return Ok(None);
    };
    let kind = metadata.file_type();
    if kind.is_block_device() {
        return Err(FileError::BlockDevice {
            path: target.to_owned(),
        });
    }
    if kind.is_fifo() {
        return open_pipe(target).map(Some);
    }
    if kind.is_char_device() || kind.is_socket() {
        let opened = OpenOptions::new().write(true).open(target);
        return opened.map(Some).map_err(FileError::io("open", target));
    }
    Ok(None)
}

/// Opens a named pipe for writing, without waiting for a reader, because such a wait could not be
/// cancelled cleanly.
fn open_pipe(target: &Path) -> Result<File, FileError> {
    let opened = OpenOptions::new()
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(target);
    match opened {
        Ok(pipe) => match make_blocking(&pipe) {
            Ok(()) => Ok(pipe),
            Err(error) => Err(FileError::io("open", target)(error)),
        },
        Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => {
            Err(FileError::NoReader {
                path: target.to_owned(),
            })
        }
        Err(error) => Err(FileError::io("open", target)(error)),
    }
}

/// Creates a file without a name, which can be linked to one later.
fn open_nameless(folder: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_TMPFILE.bits())
        .mode(PRIVATE)
        .open(folder)?;
    // Without /proc the file could not be linked, which would be discovered only at the very end.
    link_source(&file).metadata()?;
    Ok(file)
}

/// Returns the path under `/proc` that stands for the open `file`.
fn link_source(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

/// Links the open file that `source` stands for to the new name `path`.
fn link(source: &Path, path: &Path) -> io::Result<()> {
    linkat(AT_FDCWD, source, AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW).map_err(io::Error::from)
}

/// Returns whether an error says that a file system, or the server behind it, doesn't support the
/// operation.
pub fn is_unsupported(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(Errno::EINVAL | Errno::ENOSYS | Errno::ENOTTY | Errno::EOPNOTSUPP | Errno::EPERM)
    )
}

/// Renames a file, but never over an existing one.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => return Ok(()),
        // Each file system has an error of its own for a flag that it doesn't know.
        Err(error) if is_unsupported(&error.into()) => {}
        Err(error) => return Err(error.into()),
    }
    // A link fails on an existing name, too.
    match std::fs::hard_link(from, to) {
        Ok(()) => return std::fs::remove_file(from),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(error),
        Err(_) => {}
    }
    claim(to)?;
    std::fs::rename(from, to).inspect_err(|_| {
        // The target is empty, and was created here. The first error is the one to report.
        let _ = std::fs::remove_file(to);
    })
}

/// Creates an empty file that did not exist, and checks that the name still refers to it.
fn claim(path: &Path) -> io::Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(PRIVATE)
        .open(path)?
        .metadata()?;
    let there = path.symlink_metadata()?;
    if (made.dev(), made.ino()) == (there.dev(), there.ino()) && there.len() == 0 {
        Ok(())
    } else {
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

/// Gives a private file the owner, group and permissions of the one that it replaces, as far as
/// this process may and the file system supports them. Nobody gains access.
fn keep_access(file: &File, replaced: &Metadata) -> io::Result<()> {
    let private = file.metadata()?;
    let mut mode = replaced.mode() & KEPT_MODE_BITS;
    if private.gid() != replaced.gid() && !supported(fchown(file, None, Some(replaced.gid())))? {
        mode &= !GROUP_MODE_BITS;
    }
    supported(file.set_permissions(Permissions::from_mode(mode)))?;
    // A process that gave the file away may not be able to change it any more.
    if private.uid() != replaced.uid() {
        supported(fchown(file, Some(replaced.uid()), None))?;
    }
    Ok(())
}

/// Returns whether an operation succeeded; false if it isn't supported or permitted.
fn supported(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if is_unsupported(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Syncs `what` to disk: alone if possible, or else the whole file system of `file`.
fn sync(what: &File, file: &File) -> io::Result<()> {
    match what.sync_all() {
        Err(error) if is_unsupported(&error) => sync_system(file),
        result => result,
    }
}

/// Syncs the file system of `file` to disk, if that is supported.
fn sync_system(file: &File) -> io::Result<()> {
    match syncfs(file).map_err(io::Error::from) {
        Err(error) if is_unsupported(&error) => Ok(()),
        result => result,
    }
}

/// Copies the open `file` to one with a temporary name beside `target`, and syncs it.
fn copy_to_named(mut file: &File, target: &Path) -> io::Result<PathBuf> {
    let access = file.metadata()?;
    let (mut copy, temporary) = create_named(target)?;
    let copied = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| io::copy(&mut file, &mut copy))
        .and_then(|_| keep_access(&copy, &access))
        .and_then(|()| sync(&copy, &copy));
    match copied {
        Ok(()) => Ok(temporary),
        Err(error) => {
            // The first error is the one to report.
            let _ = std::fs::remove_file(&temporary);
            Err(error)
        }
    }
}

/// Creates a file with a temporary name beside `target`.
fn create_named(target: &Path) -> io::Result<(File, PathBuf)> {
    with_temporary_name(target, |path| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(PRIVATE)
            .open(path)
    })
}

/// Calls `make` with names beside `target` until one is free.
fn with_temporary_name<T>(
    target: &Path,
    mut make: impl FnMut(&Path) -> io::Result<T>,
) -> io::Result<(T, PathBuf)> {
    let mut tries = 0;
    loop {
        // The name doesn't contain the target's, which may have the maximum length already. The
        // number is random, so that nobody can predict the name and take it first.
        let number = RandomState::new().hash_one((std::process::id(), tries));
        let path = target.with_file_name(format!(".snaprestore-{number:016x}.partial"));
        match make(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < NAME_RETRIES => {
                tries += 1;
            }
            result => return result.map(|made| (made, path)),
        }
    }
}

#[cfg(test)]
mod tests;
