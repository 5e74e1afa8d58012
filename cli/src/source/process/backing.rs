//! The files behind mappings. If an untouched page of a mapped file is read through the process,
//! the kernel allocates it for good: a guest's memory in a memfd would grow to its full size. The
//! file itself tells where its holes are, and reading from it allocates nothing.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::fcntl::OFlag;

use super::super::PAGE;
use super::super::extents::Extents;
use super::internal::device;
use super::maps::{Device, Mapping};

/// A mapped file.
#[derive(Debug)]
pub(super) struct Backing {
    file: File,
    pub(super) extents: Extents,
    /// End of the last page of the file. A mapping has no content beyond it.
    pub(super) end: u64,
}

impl Backing {
    /// Opens the file behind a mapping of process `pid`. Returns `None` if there is no file, or no
    /// permission to open it. If the process serves files, it is looked up only under its own name.
    pub(super) fn open(pid: i32, mapping: &Mapping, served: &Served) -> Option<Self> {
        let file = open(Path::new(&mapping.link(pid)), |_| true)
            .or_else(|| by_descriptor(pid, mapping, served))
            .or_else(|| by_name(pid, mapping))?;
        let metadata = file.metadata().ok()?;
        let len = metadata.len();
        let extents = if mapping.page_size() > PAGE && is_all_mapped(mapping, &metadata) {
            // The file system of huge pages can't report holes.
            Extents::dense(0)
        } else {
            Extents::find(&file, len).ok()?
        };
        Some(Self {
            file,
            extents,
            end: len.checked_next_multiple_of(mapping.page_size())?,
        })
    }

    /// Fills whole pages. Bytes behind the end of the file are zeros.
    pub(super) fn read(&self, pages: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < pages.len() {
            match self
                .file
                .read_at(&mut pages[filled..], offset + filled as u64)
            {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if (filled as u64) < PAGE => return Err(error),
                // The next read begins at the page that fails.
                Err(_) => return Ok(filled),
            }
        }
        pages[filled..].fill(0);
        Ok(pages.len())
    }
}

/// The file systems that a process may serve through FUSE. While the process is held, it could not
/// answer, so nothing on them is touched.
#[derive(Debug, Default)]
pub(super) struct Served {
    devices: Vec<Device>,
}

impl Served {
    /// Returns the file systems that process `pid` may serve: none unless it has opened
    /// `/dev/fuse`, otherwise every FUSE file system that it or this process can see.
    pub(super) fn by(pid: i32) -> Self {
        if !serves(pid) {
            return Self::default();
        }
        let mut devices = Vec::new();
        for process in ["self", &pid.to_string()] {
            let mounts = fs::read(format!("/proc/{process}/mountinfo")).unwrap_or_default();
            devices.extend(mounts.split(|&byte| byte == b'\n').filter_map(fuse_device));
        }
        Self { devices }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// Returns whether the mapped file may be on one of them.
    pub(super) fn has(&self, mapping: &Mapping) -> bool {
        self.devices.contains(&mapping.device)
    }
}

/// Returns whether process `pid` serves a file system through FUSE.
fn serves(pid: i32) -> bool {
    const FUSE: Device = (10, 229);
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
    descriptors
        .into_iter()
        .flatten()
        .flatten()
        .any(|descriptor| {
            let path = descriptor.path();
            // Reading the link doesn't access any file system.
            let is_named = fs::read_link(&path).is_ok_and(|name| name.ends_with("fuse"));
            is_named
                && fs::metadata(&path).is_ok_and(|metadata| {
                    metadata.file_type().is_char_device() && device(metadata.rdev()) == FUSE
                })
        })
}

/// Returns the device in a line of `/proc/PID/mountinfo` if it is that of a FUSE file system.
fn fuse_device(line: &[u8]) -> Option<Device> {
    // Names in the line may be any bytes, and follow the device.
    let line = String::from_utf8_lossy(line);
    let (mount, about) = line.split_once(" - ")?;
    let kind = about.split(' ').next()?;
    matches!(kind.split('.').next()?, "fuse" | "fuseblk").then_some(())?;
    let (major, minor) = mount.split(' ').nth(2)?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Returns the number of bytes of the file behind `mapping` that are not holes, if it is
/// accessible.
pub(super) fn allocated(pid: i32, mapping: &Mapping) -> Option<u64> {
    let metadata = fs::metadata(mapping.link(pid)).ok()?;
    Some(metadata.blocks() * 512)
}

/// Returns whether every allocated page of the file is populated in this mapping.
fn is_all_mapped(mapping: &Mapping, metadata: &Metadata) -> bool {
    let allocated = metadata.blocks() * 512;
    let populated = mapping.details.map_or(0, |details| details.populated);
    allocated == 0 || mapping.shared && populated >= allocated
}

/// Returns whether this is a private mapping of `/dev/zero`, which is anonymous memory.
pub(super) fn is_dev_zero(pid: i32, mapping: &Mapping) -> bool {
    const ZERO: (u64, u64) = (1, 5);
    if mapping.shared || mapping.name != b"/dev/zero" {
        return false;
    }
    fs::metadata(format!("/proc/{pid}/root/dev/zero")).is_ok_and(|metadata| {
        let is_zero = metadata.file_type().is_char_device() && device(metadata.rdev()) == ZERO;
        is_zero && metadata.ino() == mapping.inode
    })
}

/// Opens the file through a descriptor of the process, which is permitted to anyone who may trace
/// the process.
fn by_descriptor(pid: i32, mapping: &Mapping, served: &Served) -> Option<File> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .flatten()
        .find_map(|descriptor| {
            let path = descriptor.path();
            let named = fs::read_link(&path).is_ok_and(|name| name == mapping.path());
            if !named && !served.is_empty() {
                return None;
            }
            open(&path, |metadata| is_mapped(metadata, mapping, named))
        })
}

/// Opens the file by its name, if it still has it.
fn by_name(pid: i32, mapping: &Mapping) -> Option<File> {
    let within = mapping.path().strip_prefix("/").ok()?;
    let path = Path::new("/proc").join(pid.to_string()).join("root");
    open(&path.join(within), |metadata| {
        is_mapped(metadata, mapping, false)
    })
}

/// Returns whether `metadata` is that of the file behind `mapping`. Some file systems (btrfs,
/// overlayfs) show other device numbers in `maps`; there, the kernel's name for the open file
/// decides.
fn is_mapped(metadata: &Metadata, mapping: &Mapping, same_name: bool) -> bool {
    let same_device = device(metadata.dev()) == mapping.device;
    metadata.ino() == mapping.inode && (same_device || same_name)
}

/// Opens `path` if it is a file that `fits`. It is checked before it is opened, because opening a
/// device can have side effects.
fn open(path: &Path, fits: impl Fn(&Metadata) -> bool) -> Option<File> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_file() || !fits(&metadata) {
        return None;
    }
    let file = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .ok()?;
    // Another file may have taken the name in between.
    let opened = file.metadata().ok()?;
    let same = (opened.dev(), opened.ino()) == (metadata.dev(), metadata.ino());
    same.then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuse_file_systems_are_found_among_mounts() {
        let line = b"99 27 0:47 / /mnt/a\xffb rw,nosuid shared:5 - fuse.sshfs host:/ rw,user_id=0";
        assert_eq!(fuse_device(line), Some((0, 47)));
        let line = b"99 27 259:3 / /mnt/disk rw - fuseblk /dev/sdb1 rw";
        assert_eq!(fuse_device(line), Some((259, 3)));
        // The file system of FUSE control files, that of shared host folders, and a local one.
        for kind in ["fusectl", "virtiofs", "ext4"] {
            let line = format!("99 27 0:30 / /mnt rw - {kind} none rw");
            assert_eq!(fuse_device(line.as_bytes()), None, "{kind}");
        }
        assert!(Served::by(std::process::id().cast_signed()).is_empty());
    }
}
