//! A source that can be read at any place, and that nobody should change meanwhile.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::extents::{Extents, Stretch};
use super::{CHUNK, PAGE, Samples, Sampling, Sink};
use crate::names;
use crate::output::Output;
use crate::signals::Cancel;

/// What a path turned out to be.
pub(crate) enum Opened {
    File(SourceFile),
    Pipe(File),
}

/// A regular file or block device, with its size when it was opened.
#[derive(Debug)]
pub(crate) struct SourceFile {
    file: File,
    path: PathBuf,
    len: u64,
    /// Size and time of change of a regular file.
    at_opening: Option<(u64, i64, i64)>,
}

/// Opens `path` for reading, if it is something that holds memory.
pub(crate) fn open(path: &Path) -> Result<Opened> {
    let named = || names::path(path);
    // Not blocking, so that a pipe whose writer hasn't come yet can be waited for with Ctrl-C in
    // mind.
    let file = File::options()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(path)
        .with_context(named)?;
    let metadata = file.metadata().with_context(named)?;
    let kind = metadata.file_type();
    let at_opening = kind.is_file().then(|| stamp(&metadata));
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
        } else if kind.is_char_device() {
            "a character device"
        } else {
            "a socket"
        };
        bail!(
            "{}: is {what}; name a file, a block device or a pipe",
            names::path(path)
        );
    };
    Ok(Opened::File(SourceFile {
        file,
        path: path.to_owned(),
        len,
        at_opening,
    }))
}

/// Takes standard input if it is a regular file of which nothing was read yet.
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
        at_opening: Some(stamp(&metadata)),
    }))
}

fn stamp(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

impl SourceFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn as_file(&self) -> &File {
        &self.file
    }

    /// The first bytes, to tell what it is.
    pub(crate) fn start(&self) -> Result<Vec<u8>> {
        let mut start = vec![0; usize::try_from(self.len.min(64))?];
        self.read(&mut start, 0)?;
        Ok(start)
    }

    /// Where the data is.
    pub(crate) fn extents(&self) -> Result<Extents> {
        if self.at_opening.is_none() {
            return Ok(Extents::dense(self.len));
        }
        Extents::of(&self.file, self.len)
            .with_context(|| format!("{}: finding its holes", names::path(&self.path)))
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

    /// Delivers `range` of the file, whole pages counted from its start.
    pub(crate) fn feed(
        &self,
        extents: &Extents,
        range: Range<u64>,
        sink: &mut dyn Sink,
        cancel: &Cancel,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        for stretch in extents.stretches(range.clone()) {
            match stretch {
                Stretch::Hole(hole) => sink.zeros((hole.end - hole.start) / PAGE)?,
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

    /// Pages from places spread evenly over the data.
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

    /// After the last read: is it still what was opened? A size that changed means that parts are
    /// missing; a write meanwhile may have torn the snapshot, which only the user can judge.
    pub(crate) fn check_unchanged(&self, output: Output) -> Result<()> {
        let Some(before) = self.at_opening else {
            return Ok(());
        };
        let metadata = self
            .file
            .metadata()
            .with_context(|| names::path(&self.path))?;
        let now = stamp(&metadata);
        if now.0 != before.0 {
            return Err(self.changed_size());
        }
        if now != before {
            output.warn(format_args!(
                "warning: {} was written to while it was read; its pages may come from different \
                 moments (stop its owner first, or use --pid)",
                names::path(&self.path)
            ));
        }
        Ok(())
    }

    fn changed_size(&self) -> anyhow::Error {
        let now = self
            .file
            .metadata()
            .map_or_else(|_| "unknown".into(), |metadata| metadata.len().to_string());
        anyhow::anyhow!(
            "{}: its size changed while it was read, from {} to {now} bytes; try again when nobody \
             writes to it",
            names::path(&self.path),
            self.len
        )
    }
}
