//! Internal file systems of the kernel, which no path leads to: those of anonymous huge pages and
//! of `memfd_secret`. The name of such a mapping can also be that of an ordinary file. The device
//! tells them apart: a file that this process creates on the same file system has the same device.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{major, minor};
use snaprestore_uffd::os::create_secret_memory;

use super::maps::Device;

/// An internal file system of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Internal {
    /// File system of `MAP_ANONYMOUS | MAP_HUGETLB`.
    AnonymousHuge,
    /// File system of `memfd_secret`.
    Secret,
}

impl Internal {
    /// Returns the file system that a name belongs to, unless an ordinary file has that name.
    pub(super) fn named(name: &[u8]) -> Option<Self> {
        if name.starts_with(b"/anon_hugepage") {
            Some(Self::AnonymousHuge)
        } else if name.starts_with(b"/secretmem") {
            Some(Self::Secret)
        } else {
            None
        }
    }

    /// Returns the devices of this file system. Each size of huge pages has its own.
    pub(super) fn devices(self) -> Vec<Device> {
        let files = match self {
            Self::AnonymousHuge => (MIN_HUGE_SHIFT..=MAX_HUGE_SHIFT)
                .filter_map(|shift| {
                    let size = MFdFlags::from_bits_retain(shift << HUGE_SHIFT);
                    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | size;
                    memfd_create(c"huge", flags).ok()
                })
                .collect(),
            Self::Secret => Vec::from_iter(create_secret_memory().ok()),
        };
        let of_file = |file: File| file.metadata().ok().map(|metadata| device(metadata.dev()));
        files
            .into_iter()
            .map(File::from)
            .filter_map(of_file)
            .collect()
    }
}

/// Bit position of the huge page size in the flags, as a power of two (`MFD_HUGE_SHIFT`), and the
/// sizes that an architecture can have: 64 KiB to 16 GiB.
const HUGE_SHIFT: u32 = 26;
const MIN_HUGE_SHIFT: u32 = 16;
const MAX_HUGE_SHIFT: u32 = 34;

/// Returns the major and minor number.
pub(super) fn device(number: u64) -> Device {
    (major(number), minor(number))
}
