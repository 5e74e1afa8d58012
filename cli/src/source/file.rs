//! A source with random access that should not change while it is read.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};

use super::extents::{Extents, Stretch};
use super::kinds::START_BYTES;
use super::{CHUNK, PAGE, Remark, Samples, Sampling, Sink};
use crate::args::Holes;
use crate::names;
use crate::signals::Cancel;

/// Kinds of source that a path can name.
pub(crate) enum Opened {
    File(SourceFile),
    Pipe(File),
}

/// A regular file or block device, with its size at opening.
#[derive(Debug)]
pub(crate) struct SourceFile {
    file: File,
    path: PathBuf,
    len: u64,
    at_opening: Stamp,
}

/// Size and times of a regular file at one moment; `None` for anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp(Option<Times>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    len: u64,
    written: (i64, i64),
    /// Time of the last change of the inode. Unlike the modification time, it can't be set back.
    changed: (i64, i64),
}

/// Difference between two stamps of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    None,
    /// The file was written to, or its modification time was set.
    Written,
    /// The attributes or links changed, or the file was written to and its modification time set
    /// back.
    Touched,
    Size,
}

impl Stamp {
    pub(crate) fn from_metadata(metadata: &Metadata) -> Self {
        Self(metadata.is_file().then(|| Times {
            len: metadata.len(),
            written: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }))
    }

    /// Returns how the file changed between this stamp and `now`.
    pub(crate) fn change(self, now: Self) -> Change {
        match (self.0, now.0) {
            (Some(before), Some(now)) if before.len != now.len => Change::Size,
            (Some(before), Some(now)) if before.written != now.written => Change::Written,
            (Some(before), Some(now)) if before.changed != now.changed => Change::Touched,
            _ => Change::None,
        }
    }
}

/// Opens `path` for reading, if it can hold memory.
pub(crate) fn open(path: &Path) -> Result<Opened> {
    let named = || format!("cannot open {}", names::path(path));
    // Opens without blocking, so that waiting for the writer of a pipe can be interrupted with
    // Ctrl-C.
    let file = File::options()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(|error| match path.metadata() {
            // The error of opening a socket would say that there is no such device.
            Ok(metadata) if metadata.file_type().is_socket() => no_memory(path, "a socket"),
            _ => anyhow::Error::new(error).context(named()),
        })?;
    let metadata = file.metadata().with_context(named)?;
    let kind = metadata.file_type();
    let len = if kind.is_file() {
        metadata.len()
    } else if kind.is_block_device() {
        (&file)
            .seek(SeekFrom::End(0))
            .with_context(|| format!("{}: finding the size of the device", names::path(path)))?
    } else if kind.is_fifo() {
        return Ok(Opened::Pipe(file));
    } else {
        let what = if kind.is_dir() {
            "a folder"
        } else {
            "a character device"
        };
        return Err(no_memory(path, what));
    };
    Ok(Opened::File(SourceFile {
        file,
        path: path.to_owned(),
        len,
        at_opening: Stamp::from_metadata(&metadata),
    }))
}

fn no_memory(path: &Path, what: &str) -> anyhow::Error {
    anyhow!(
        "{}: is {what}; name a file, a block device or a pipe",
        names::path(path)
    )
}

/// Takes standard input if it is a regular file that has not been read from yet.
pub(crate) fn stdin() -> Result<Option<SourceFile>> {
    let named = || "standard input";
    let fd = io::stdin().as_fd().try_clone_to_owned().context(named())?;
    let mut file = File::from(fd);
    let metadata = file.metadata().with_context(named)?;
    if !metadata.is_file() || file.stream_position().with_context(named)? > 0 {
        return Ok(None);
    }
    Ok(Some(SourceFile {
        file,
        path: named().into(),
        len: metadata.len(),
        at_opening: Stamp::from_metadata(&metadata),
    }))
}

impl SourceFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether this is a block device, which has no holes.
    pub(crate) fn is_device(&self) -> bool {
        self.at_opening.0.is_none()
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn as_file(&self) -> &File {
        &self.file
    }

    /// Returns the first bytes, from which the kind of file is guessed.
    pub(crate) fn start(&self) -> Result<Vec<u8>> {
        let mut start = vec![0; usize::try_from(self.len)?.min(START_BYTES)];
        self.read(&mut start, 0)?;
        Ok(start)
    }

    /// Finds the data of the file.
    pub(crate) fn extents(&self) -> Result<Extents> {
        if self.at_opening.0.is_none() {
            return Ok(Extents::dense(self.len));
        }
        Extents::find(&self.file, self.len)
            .with_context(|| format!("{}: finding its holes", names::path(&self.path)))
    }

    /// Finds the data of the file with all its holes, which mean "as in the base". Fails if they
    /// can't be told reliably.
    pub(crate) fn exact_extents(&self) -> Result<Extents> {
        if self.at_opening.0.is_none() {
            return Ok(Extents::dense(self.len));
        }
        let path = names::path(&self.path);
        let extents = Extents::exact(&self.file, self.len)
            .with_context(|| format!("{path}: finding its holes"))?;
        extents.ok_or_else(|| {
            anyhow!(
                "{path}: its file system does not tell reliably where its holes are, and in a diff \
                 a hole means \"as in the base\"; write the diff to ext4, xfs, btrfs or tmpfs; if \
                 the file is all of the memory: --holes zero"
            )
        })
    }

    /// Returns the size of the pieces in which the file system stores the file.
    pub(crate) fn piece_bytes(&self) -> Result<u64> {
        let metadata = self.file.metadata();
        Ok(metadata.with_context(|| names::path(&self.path))?.blksize())
    }

    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => self.changed_size(),
                _ => anyhow::Error::new(error).context(format!(
                    "{}: reading {} bytes at offset {offset}",
                    names::path(&self.path),
                    buffer.len()
                )),
            })
    }

    /// Delivers `range` of the file, in whole pages counted from its start. `holes` tells what its
    /// holes mean.
    pub(crate) fn feed(
        &self,
        extents: &Extents,
        range: Range<u64>,
        holes: Holes,
        sink: &mut dyn Sink,
        cancel: &Cancel,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        for stretch in extents.stretches(range.clone()) {
            match stretch {
                Stretch::Hole(hole) => {
                    let pages = (hole.end - hole.start) / PAGE;
                    match holes {
                        Holes::Zero => sink.zeros(pages)?,
                        Holes::Base => sink.as_in_base(pages)?,
                    }
                }
                Stretch::Data(data) => {
                    for at in data.clone().step_by(CHUNK) {
                        cancel.check()?;
                        let chunk = (data.end - at).min(CHUNK as u64);
                        let chunk = &mut buffer[..usize::try_from(chunk)?];
                        self.read(chunk, range.start + at)?;
                        sink.pages(chunk)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Samples pages from places spread evenly over the data.
    pub(crate) fn sample(&self, extents: &Extents, wanted: &Sampling) -> Result<Samples> {
        let mut samples = Samples {
            all: extents.data_bytes(),
            ..Samples::default()
        };
        if samples.all <= wanted.bytes as u64 {
            return Ok(samples);
        }
        let mut piece = vec![0; wanted.piece];
        for number in 0..wanted.pieces() {
            // The product may need more than 64 bits.
            let position =
                u128::from(samples.all) * u128::from(number) / u128::from(wanted.pieces());
            let Some(at) = extents.nth_data_byte(u64::try_from(position)?) else {
                break;
            };
            let at = at / PAGE * PAGE;
            let len = (self.len - at).min(piece.len() as u64);
            let piece = &mut piece[..usize::try_from(len)?];
            self.read(piece, at)?;
            samples.keep(piece);
        }
        Ok(samples)
    }

    /// Compares the file, after the last read, with its state at opening. A changed size is an
    /// error, since parts are missing. A write may have torn the snapshot, which only the user can
    /// judge, so it gives a remark.
    pub(crate) fn check_unchanged(&self) -> Result<Option<Remark>> {
        let metadata = self
            .file
            .metadata()
            .with_context(|| names::path(&self.path))?;
        let (value, what) = match self.at_opening.change(Stamp::from_metadata(&metadata)) {
            Change::None => return Ok(None),
            Change::Size => return Err(self.changed_size()),
            Change::Written => ("written", "was written to while it was read"),
            Change::Touched => (
                "touched",
                "may have been written to while it was read (its ctime changed)",
            ),
        };
        Ok(Some(Remark {
            key: "source.changed",
            value: value.into(),
            text: format!(
                "{} {what}; its pages may come from different moments (stop its owner first, or use \
                 --pid)",
                names::path(&self.path)
            ),
            warning: true,
        }))
    }

    /// Returns the error for a read that ended early.
    fn changed_size(&self) -> anyhow::Error {
        let path = names::path(&self.path);
        match self.file.metadata().map(|metadata| metadata.len()) {
            Ok(now) if now == self.len => anyhow!(
                "{path}: ends before the {now} bytes that are its size, as files of sysfs do; copy \
                 it, and name the copy"
            ),
            now => anyhow!(
                "{path}: its size changed while it was read, from {} to {} bytes; try again when \
                 nobody writes to it",
                self.len,
                now.map_or_else(|_| "unknown".into(), |now| now.to_string())
            ),
        }
    }
}
