//! Kinds of files that are certainly not plain memory: those that hold it in a container that can't
//! be read, and those that hold something else. All are recognized by bytes at a fixed place near
//! their start.

use snapshot_format::layout::HEADER_MAGIC;

use super::elf_core;

/// Bytes that follow the low 16 bits of the number at the start of a Firecracker state, by
/// architecture.
const FIRECRACKER_MAGICS: [&[u8]; 2] = [b"\x64\x86\x84\x19\x10\x07", b"\xaa\xaa\x84\x19\x10\x07"];

/// Guess from the first bytes.
pub(super) enum Guess {
    Raw,
    ElfCore,
    /// A file that was certainly given by mistake.
    Other(&'static Kind),
}

/// Number of bytes at the start of a file that are checked.
pub(super) const START_BYTES: usize = 4096;

/// A kind of file that is not plain memory.
pub(super) struct Kind {
    /// The first bytes, or some at another place.
    magic: &'static [u8],
    /// Offset of the magic bytes.
    at: usize,
    /// Further bytes that the file must begin with.
    begins: &'static [u8],
    /// Description of the kind, to follow "is" in a message.
    is: &'static str,
    /// Advice on what to do instead.
    instead: &'static str,
}

impl Kind {
    /// Returns the error message: why the file is not packed, and what to do.
    pub(super) fn refusal(&self) -> String {
        format!(
            "is {}: {}; --raw packs it as if it were memory",
            self.is, self.instead
        )
    }
}

const VMWARE: &str = "a state of VMware";
const VMEM: &str = "take the .vmem file beside it, or convert it to an ELF core (vmss2core)";
const UNPACK: &str = "unpack it first";
const DUMP_ANEW: &str =
    "take the memory as an ELF dump (QEMU's dump-guest-memory, virsh dump --memory-only)";
const DISK: &str = "a disk is no memory; take a dump of the memory of the machine";
const XEN: &str = "a saved domain of Xen";
const CONVERT_XEN: &str = "convert it to raw memory";
const HIBERNATION: &str = "a hibernation file of Windows";
const CRIU: &str = "an image of CRIU";
const RESTORE_CRIU: &str = "restore the process (criu restore), and take it with --pid";
const MACH_O: &str = "a file of macOS (Mach-O)";
const CONVERT: &str = "convert it to raw memory (Volatility's layerwriter does)";
const LIME: &str = "a dump of LiME, whose ranges have headers";
const PADDED: &str = "convert it to raw memory (Volatility's layerwriter does), or take it with \
                      LiME's format=padded";

const KINDS: &[Kind] = &[
    kind(&HEADER_MAGIC, "a snapshot already", "use it as it is"),
    kind(
        b"\x28\xb5\x2f\xfd",
        "compressed (zstd)",
        "unpack it first (zstd -d)",
    ),
    kind(
        b"\x1f\x8b\x08",
        "compressed (gzip)",
        "unpack it first (gzip -d)",
    ),
    kind(b"\xfd7zXZ\0", "compressed (xz)", "unpack it first (xz -d)"),
    kind(
        b"\x04\x22\x4d\x18",
        "compressed (lz4)",
        "unpack it first (lz4 -d)",
    ),
    kind(
        b"\x02\x21\x4c\x18",
        "compressed (lz4)",
        "unpack it first (lz4 -d)",
    ),
    kind(
        b"\x89LZO\0\r\n\x1a\n",
        "compressed (lzop)",
        "unpack it first (lzop -d)",
    ),
    kind(b"BZh", "compressed (bzip2)", "unpack it first (bzip2 -d)"),
    kind(b"\xff\x06\0\0sNaPpY", "compressed (snappy)", UNPACK),
    kind(b"PK\x03\x04", "an archive (zip)", UNPACK),
    kind(b"7z\xbc\xaf\x27\x1c", "an archive (7z)", UNPACK),
    kind(b"Rar!\x1a\x07", "an archive (rar)", UNPACK),
    kind(b"070701", "an archive (cpio)", UNPACK),
    kind(b"070702", "an archive (cpio)", UNPACK),
    kind(b"070707", "an archive (cpio)", UNPACK),
    kind_at(
        257,
        b"ustar",
        b"",
        "an archive (tar)",
        "unpack it first (tar -x)",
    ),
    // Unknown size, as xz writes it.
    kind_at(
        5,
        &[0xff; 8],
        b"\x5d\0\0",
        "compressed (lzma)",
        "unpack it first (xz -d --format=lzma)",
    ),
    kind(
        b"LZIP\x01",
        "compressed (lzip)",
        "unpack it first (lzip -d)",
    ),
    kind(b"LRZI", "compressed (lrzip)", "unpack it first (lrzip -d)"),
    kind(
        b"hsqs",
        "a file system (squashfs)",
        "take the memory out of it first (unsquashfs)",
    ),
    kind(
        b"LUKS\xba\xbe",
        "encrypted (LUKS)",
        "open it first (cryptsetup open), and name the device in /dev/mapper",
    ),
    kind(b"QFI\xfb", "a disk image (qcow2)", DUMP_ANEW),
    kind(b"KDMV", "a disk image (VMDK)", DISK),
    kind(b"COWD", "a disk image (VMDK)", DISK),
    kind(b"# Disk DescriptorFile", "a disk image (VMDK)", DISK),
    kind(b"vhdxfile", "a disk image (VHDX)", DISK),
    kind(b"conectix", "a disk image (VHD)", DISK),
    kind(b"WithoutFreeSpace", "a disk image (Parallels)", DISK),
    kind(b"WithouFreSpacExt", "a disk image (Parallels)", DISK),
    kind_at(0x40, b"\x7f\x10\xda\xbe", b"", "a disk image (VDI)", DISK),
    kind(b"QEVM", "a migration stream of QEMU", DUMP_ANEW),
    // "LibvirtQemudSave", or "LibvirtQemudPart" while the file is being written.
    kind(
        b"LibvirtQemu",
        "a saved domain of libvirt (virsh save)",
        DUMP_ANEW,
    ),
    kind(
        b"KDUMP   ",
        "a kdump-compressed dump, which cannot be read",
        "dump without compression (dump-guest-memory without -z, -l, -s)",
    ),
    kind(
        b"DISKDUMP",
        "a kdump-compressed dump, which cannot be read",
        "write it without compression and as ELF (makedumpfile -E)",
    ),
    kind(b"Xen saved domain", XEN, CONVERT_XEN),
    kind(b"LibxlFmt", XEN, CONVERT_XEN),
    kind_at(8, b"XENF", &[0xff; 8], XEN, CONVERT_XEN),
    kind(b"hibr", HIBERNATION, CONVERT),
    kind(b"HIBR", HIBERNATION, CONVERT),
    kind(b"wake", HIBERNATION, CONVERT),
    kind(b"WAKE", HIBERNATION, CONVERT),
    // The magic numbers of all images (except that of the pages), of service files, and of
    // inventories.
    kind(b"\x19\x43\x56\x54", CRIU, RESTORE_CRIU),
    kind(b"\x40\x59\x10\x55", CRIU, RESTORE_CRIU),
    kind(b"\x16\x31\x31\x58", CRIU, RESTORE_CRIU),
    // 64-bit and 32-bit, little-endian.
    kind(b"\xcf\xfa\xed\xfe", MACH_O, CONVERT),
    kind(b"\xce\xfa\xed\xfe", MACH_O, CONVERT),
    kind(
        b"makedumpfile\0",
        "a flattened dump of makedumpfile, which cannot be read",
        "write it without compression and as ELF (makedumpfile -R, -E)",
    ),
    kind(
        b"\x7fVirtualBox Saved",
        "a saved state of VirtualBox",
        "take a core (VBoxManage debugvm VM dumpvmcore)",
    ),
    kind(b"\xd0\xbe\xd2\xbe", VMWARE, VMEM),
    kind(b"\xd1\xba\xd1\xba", VMWARE, VMEM),
    kind(b"\xd2\xbe\xd2\xbe", VMWARE, VMEM),
    kind(b"\xd3\xbe\xd3\xbe", VMWARE, VMEM),
    kind(b"EMiL", LIME, PADDED),
    kind(b"LiME", LIME, PADDED),
    kind(b"AVML", "a compressed dump of AVML", CONVERT),
    kind(
        b"MDMP\x93\xa7",
        "a minidump, which holds parts of a process only",
        "take a core of the process (gcore)",
    ),
    kind(b"PAGEDU64", "a Windows crash dump", CONVERT),
    kind(b"PAGEDUMP", "a Windows crash dump", CONVERT),
    kind(
        b"\x7fELF",
        "an ELF file, but no core",
        "take a core of the process (gcore)",
    ),
];

const fn kind(magic: &'static [u8], is: &'static str, instead: &'static str) -> Kind {
    kind_at(0, magic, b"", is, instead)
}

const fn kind_at(
    at: usize,
    magic: &'static [u8],
    begins: &'static [u8],
    is: &'static str,
    instead: &'static str,
) -> Kind {
    Kind {
        magic,
        at,
        begins,
        is,
        instead,
    }
}

/// Frames that zstd and lz4 skip. They have 16 magic numbers.
static SKIPPABLE: Kind = kind_at(
    1,
    b"\x2a\x4d\x18",
    b"",
    "compressed (zstd or lz4)",
    "unpack it first (zstd -d, lz4 -d)",
);

impl Kind {
    fn is_kind_of(&self, start: &[u8]) -> bool {
        let there = start.get(self.at..).unwrap_or_default();
        start.starts_with(self.begins) && there.starts_with(self.magic)
    }
}

/// Guesses the kind of a file that starts with `start`.
pub(super) fn guess(start: &[u8]) -> Guess {
    if elf_core::is_core(start) {
        return Guess::ElfCore;
    }
    if matches!(start, [0x50..=0x5f, ..]) && SKIPPABLE.is_kind_of(start) {
        return Guess::Other(&SKIPPABLE);
    }
    match KINDS.iter().find(|kind| kind.is_kind_of(start)) {
        Some(kind) => Guess::Other(kind),
        None => Guess::Raw,
    }
}

/// Returns whether a file that starts with `start` is the state of a Firecracker VM. Its first
/// number has the architecture in its upper bits. Newer releases write bitcode, which puts a byte
/// before the number.
pub(crate) fn is_firecracker_state(start: &[u8]) -> bool {
    [2, 3].iter().any(|&at| {
        let after = start.get(at..).unwrap_or_default();
        FIRECRACKER_MAGICS
            .iter()
            .any(|magic| after.starts_with(magic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_refused(start: &[u8]) -> bool {
        matches!(guess(start), Guess::Other(_))
    }

    #[test]
    fn each_kind_is_recognised_by_its_magic_alone() {
        for kind in KINDS {
            let mut start = [0xaa; 1024];
            start[..kind.begins.len()].copy_from_slice(kind.begins);
            start[kind.at..kind.at + kind.magic.len()].copy_from_slice(kind.magic);
            let Guess::Other(found) = guess(&start) else {
                panic!("{} is not refused", kind.is);
            };
            assert_eq!(found.is, kind.is);
            assert!(!found.refusal().contains("truncate"), "{}", kind.is);
            let end = kind.at + kind.magic.len();
            assert!(!is_refused(&start[..end - 1]), "{}", kind.is);
        }
    }

    #[test]
    fn skippable_frames_have_sixteen_magic_numbers() {
        for low in 0..=0xff {
            let start = [low, 0x2a, 0x4d, 0x18, 4, 0, 0, 0];
            assert_eq!(is_refused(&start), (0x50..0x60).contains(&low), "{low:#x}");
        }
    }

    #[test]
    fn memory_and_cores_are_accepted() {
        assert!(!is_refused(&[]));
        assert!(!is_refused(&[0; 64]));
        // Interrupt vectors of a guest, at the start of its memory.
        assert!(!is_refused(
            b"\x53\xff\x00\xf0\x53\xff\x00\xf0\xc3\xe2\x00\xf0"
        ));
        let core = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0";
        assert!(matches!(guess(core), Guess::ElfCore));
    }

    #[test]
    fn firecracker_states_are_recognised() {
        // The number as written by bincode and bitcode, for both architectures.
        for start in [
            &b"\x00\x00\x64\x86\x84\x19\x10\x07\x05\x00"[..],
            b"\x01\x00\x64\x86\x84\x19\x10\x07",
            b"\x00\x00\x00\x64\x86\x84\x19\x10\x07\x06\x31",
            b"\x00\x00\xaa\xaa\x84\x19\x10\x07",
            b"\x00\x00\x00\xaa\xaa\x84\x19\x10\x07\x06",
        ] {
            assert!(is_firecracker_state(start), "{start:x?}");
        }
        for start in [
            &b"{\"vcpus\": 2}"[..],
            b"",
            &[0; 32],
            b"\x64\x86\x84\x19\x10\x07",
        ] {
            assert!(!is_firecracker_state(start), "{start:x?}");
        }
    }
}
