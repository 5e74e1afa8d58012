//! The files behind shared mappings. Reading a page of shared memory that nobody has touched makes
//! the kernel allocate it, for good: a guest's memory in a memfd would grow to its full size by
//! being looked at. The file itself tells where its holes are.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::fcntl::OFlag;

use super::super::PAGE;
use super::super::extents::Extents;
use super::maps::Mapping;

/// What a mapped file says about its data.
#[derive(Debug)]
pub(super) struct Backing {
    pub(super) extents: Extents,
    /// End of the last page of the file: beyond it a mapping can't be read.
    pub(super) end: u64,
}

impl Backing {
    /// Finds the file behind a shared mapping of process `pid`. None where there is no file, or no
    /// right to see it: then only reading tells.
    pub(super) fn of(pid: i32, mapping: &Mapping) -> Option<Self> {
        if !mapping.shared || mapping.inode == 0 {
            return None;
        }
        let link = format!(
            "/proc/{pid}/map_files/{:x}-{:x}",
            mapping.start, mapping.end
        );
        let file = open(Path::new(&link), mapping).or_else(|| by_descriptor(pid, mapping))?;
        let len = file.metadata().ok()?.len();
        Some(Self {
            extents: Extents::of(&file, len).ok()?,
            end: len.checked_next_multiple_of(PAGE)?,
        })
    }
}

/// Links in `map_files` can be followed with privileges only; a descriptor of the process leads to
/// the same file for whoever may trace it.
fn by_descriptor(pid: i32, mapping: &Mapping) -> Option<File> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .flatten()
        .find_map(|descriptor| open(&descriptor.path(), mapping))
}

/// Opens `path` if it is the mapped file. Looked at before it is opened, because opening a device
/// can do something.
fn open(path: &Path, mapping: &Mapping) -> Option<File> {
    let metadata = fs::metadata(path).ok()?;
    let device = (
        nix::sys::stat::major(metadata.dev()),
        nix::sys::stat::minor(metadata.dev()),
    );
    if !metadata.is_file() || metadata.ino() != mapping.inode || device != mapping.device {
        return None;
    }
    File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .ok()
}
