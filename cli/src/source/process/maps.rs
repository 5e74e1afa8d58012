//! The mappings of a process, from `/proc/PID/smaps`, or `maps` if the kernel has no `smaps`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use super::super::PAGE;
use super::internal::Internal;

/// Major and minor number of a device.
pub(super) type Device = (u64, u64);

/// A mapping of a process.
#[expect(
    clippy::struct_excessive_bools,
    reason = "the four letters of a line in maps"
)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) execute: bool,
    pub(super) shared: bool,
    /// Offset in the file at which the mapping begins.
    pub(super) offset: u64,
    /// Major and minor number of the file's device.
    pub(super) device: Device,
    pub(super) inode: u64,
    /// Internal file system of the kernel that the file is on.
    pub(super) internal: Option<Internal>,
    /// Name of the mapping; may be any bytes.
    pub(super) name: Vec<u8>,
    /// Details from `smaps`; absent if only `maps` could be read.
    pub(super) details: Option<Details>,
}

/// Details that only `smaps` has.
#[expect(clippy::struct_excessive_bools, reason = "as many flags of the kernel")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Details {
    /// Number of bytes present in memory or in swap.
    pub(super) populated: u64,
    /// Page size in bytes.
    pub(super) page_size: u64,
    /// Whether this is device memory, which may have side effects when read.
    pub(super) device: bool,
    /// Whether a userfaultfd handles missing pages.
    pub(super) userfault: bool,
    /// Whether the memory is excluded from core dumps (`MADV_DONTDUMP`).
    pub(super) undumped: bool,
    /// Whether the memory is locked.
    pub(super) locked: bool,
}

/// Content of the mapping's pages that were never touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Untouched {
    /// Zeros: private anonymous memory.
    Zero,
    /// Unknown except to the process that handles the faults.
    Unknown,
    /// The contents of a file.
    File,
    /// Found by reading: the kernel's own memory, such as `[vdso]`.
    Read,
}

impl Mapping {
    /// Reads all mappings of process `pid`, ordered by address, from `folder`, the folder in
    /// `/proc` of one of its threads. Calls `step` for each.
    pub(super) fn all(pid: i32, folder: &str, step: &dyn Fn()) -> io::Result<Vec<Self>> {
        let mut all = match File::open(format!("{folder}/smaps")) {
            Ok(file) => parse(BufReader::new(file), step),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                parse(BufReader::new(File::open(format!("{folder}/maps"))?), step)
            }
            Err(error) => Err(error),
        }?;
        for mapping in &mut all {
            step();
            mapping.tell_line_feeds(pid);
        }
        tell_internal(&mut all);
        Ok(all)
    }

    /// Restores line feeds in the name. The kernel writes `\012` for a line feed, but also for
    /// these four characters. Only a process with the privilege to follow links of mappings can
    /// tell them apart; without it, the name stays as the kernel writes it.
    fn tell_line_feeds(&mut self, pid: i32) {
        let written = b"\\012";
        if self.name.windows(written.len()).any(|part| part == written)
            && let Ok(name) = fs::read_link(self.link(pid))
        {
            self.name = name.into_os_string().into_vec();
        }
    }

    /// Returns a link to exactly the mapped file. Following it takes privileges.
    pub(super) fn link(&self, pid: i32) -> String {
        format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end)
    }

    /// Returns the name as a path.
    pub(super) fn path(&self) -> &Path {
        OsStr::from_bytes(&self.name).as_ref()
    }

    /// Returns whether this is data of the kernel, or its entry for obsolete system calls, which is
    /// not memory of the process and must not be read.
    pub(super) fn is_kernel_data(&self) -> bool {
        self.name == b"[vsyscall]" || self.name.starts_with(b"[vvar")
    }

    /// Returns whether this is memory of `memfd_secret`, which only the process itself can read.
    pub(super) fn is_secret(&self) -> bool {
        self.internal == Some(Internal::Secret)
    }

    /// Returns whether this is reserved address space: inaccessible, with nothing populated. Only
    /// the page table tells whether it has markers.
    pub(super) fn is_empty_reservation(&self) -> bool {
        !(self.read || self.write || self.execute)
            && self.is_private_anonymous()
            && self
                .details
                .is_some_and(|details| details.populated == 0 && !details.userfault)
    }

    /// Returns whether this is private memory without a file. The kernel's own mappings, such as
    /// `[vdso]`, have neither a file nor such a name.
    fn is_private_anonymous(&self) -> bool {
        let named_by_kernel = self.name.starts_with(b"[")
            && !matches!(&*self.name, b"[heap]" | b"[stack]")
            && !self.name.starts_with(b"[anon:");
        let huge = self.internal == Some(Internal::AnonymousHuge);
        !self.shared && ((!self.is_of_file() && !named_by_kernel) || huge)
    }

    /// Returns whether there is a file behind the mapping. The first segment of System V shared
    /// memory has inode number 0.
    fn is_of_file(&self) -> bool {
        self.inode != 0 || self.name.starts_with(b"/")
    }

    pub(super) fn untouched(&self) -> Untouched {
        if self.details.is_some_and(|details| details.userfault) {
            Untouched::Unknown
        } else if self.is_private_anonymous() {
            Untouched::Zero
        } else if self.is_of_file() {
            Untouched::File
        } else {
            Untouched::Read
        }
    }

    /// Returns the page size in bytes.
    pub(super) fn page_size(&self) -> u64 {
        let size = self.details.map_or(PAGE, |details| details.page_size);
        if size.is_power_of_two() {
            size.max(PAGE)
        } else {
            PAGE
        }
    }

    /// Returns the page size as a power of two: the format's hint has only 4 KiB and 2 MiB.
    pub(super) fn page_shift(&self) -> u32 {
        if self.page_size() >= 2 << 20 { 21 } else { 12 }
    }
}

/// Finds the mappings that belong to internal file systems of the kernel.
fn tell_internal(all: &mut [Mapping]) {
    let mut known: Vec<(Internal, Vec<Device>)> = Vec::new();
    for mapping in all {
        let Some(internal) = Internal::named(&mapping.name).filter(|_| mapping.inode != 0) else {
            continue;
        };
        let index = known.iter().position(|(known, _)| *known == internal);
        let index = index.unwrap_or_else(|| {
            known.push((internal, internal.devices()));
            known.len() - 1
        });
        let devices = &known[index].1;
        // A system call filter may hide the device from this process. The flags that the kernel
        // sets on all secret memory decide then.
        let is_hidden = || {
            let details = mapping.details;
            let is_alike = details.is_some_and(|details| details.locked && details.undumped);
            internal == Internal::Secret && devices.is_empty() && mapping.shared && is_alike
        };
        if devices.contains(&mapping.device) || is_hidden() {
            mapping.internal = Some(internal);
        }
    }
}

fn parse(reader: impl BufRead, step: &dyn Fn()) -> io::Result<Vec<Mapping>> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in reader.split(b'\n') {
        let line = line?;
        if let Some(mapping) = parse_mapping(&line) {
            step();
            all.push(mapping);
        } else if let Some(mapping) = all.last_mut()
            && let Ok(line) = str::from_utf8(&line)
            && let Some((key, value)) = line.split_once(':')
        {
            detail(mapping.details.get_or_insert_default(), key, value);
        }
    }
    Ok(all)
}

/// Parses `start-end rwxp offset device inode name`; the name is padded and optional.
fn parse_mapping(line: &[u8]) -> Option<Mapping> {
    let mut parts = line.splitn(6, |&byte| byte == b' ');
    let mut fields = parts.by_ref().take(5).map(|part| str::from_utf8(part).ok());
    let mut field = || fields.next().flatten();
    let (start, end) = field()?.split_once('-')?;
    let [read, write, execute, shared] = field()?.as_bytes().try_into().ok()?;
    let offset = u64::from_str_radix(field()?, 16).ok()?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?.parse().ok()?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        read: read == b'r',
        write: write == b'w',
        execute: execute == b'x',
        shared: shared == b's',
        offset,
        device: (
            u64::from_str_radix(major, 16).ok()?,
            u64::from_str_radix(minor, 16).ok()?,
        ),
        inode,
        internal: None,
        // A name never begins with a space.
        name: parts.next().unwrap_or_default().trim_ascii_start().to_vec(),
        details: None,
    })
}

fn detail(details: &mut Details, key: &str, value: &str) {
    let kib = || {
        let number = value.trim().strip_suffix("kB")?.trim();
        number.parse::<u64>().ok().map(|kib| kib << 10)
    };
    match key {
        "Rss" | "Swap" | "Shared_Hugetlb" | "Private_Hugetlb" => {
            details.populated += kib().unwrap_or(0);
        }
        "KernelPageSize" => details.page_size = kib().unwrap_or(0),
        "VmFlags" => {
            for flag in value.split_ascii_whitespace() {
                match flag {
                    "io" | "pf" => details.device = true,
                    "um" | "ui" => details.userfault = true,
                    "dd" => details.undumped = true,
                    "lo" => details.locked = true,
                    _ => {}
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
5581c0000000-5581c0021000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
KernelPageSize:        4 kB
Rss:                  12 kB
Swap:                  4 kB
VmFlags: rd wr mr mw me ac dd sd
7f0000000000-7f0010000000 ---p 00000000 00:00 0 
KernelPageSize:        4 kB
Rss:                   0 kB
VmFlags: mr mw me sd
7f1000000000-7f1000200000 rw-s 00001000 00:0f 42                         /tmp/a file: 1 kB (deleted)
Rss:                   0 kB
VmFlags: rd wr sh um
7ffd00000000-7ffd00004000 r--p 00000000 00:00 0                          [vvar]
VmFlags: rd mr pf io de dd sd
7ffd00004000-7ffd00006000 r-xp 00000000 00:00 0                          [vdso]
Rss:                   0 kB
VmFlags: rd ex mr mw me de sd
7ffe00000000-7ffe40000000 rw-p 00000000 00:10 77                         /anon_hugepage (deleted)
KernelPageSize:     2048 kB
Private_Hugetlb:    2048 kB
VmFlags: rd wr ht
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn smaps_is_parsed() {
        let mut all = parse(SMAPS.as_bytes(), &|| ()).unwrap();
        all[5].internal = Some(Internal::AnonymousHuge);
        assert_eq!(all.len(), 7);
        let [heap, reserved, file, vvar, vdso, huge, vsyscall] = &all[..] else {
            unreachable!()
        };
        assert_eq!((heap.start, heap.end), (0x5581_c000_0000, 0x5581_c002_1000));
        assert_eq!(heap.details.unwrap().populated, 16 << 10);
        assert_eq!(heap.untouched(), Untouched::Zero);
        assert!(heap.details.unwrap().undumped && !file.details.unwrap().undumped);
        assert!(!heap.is_empty_reservation());
        assert!(reserved.is_empty_reservation());
        assert_eq!(file.name, b"/tmp/a file: 1 kB (deleted)");
        assert_eq!((file.shared, file.inode), (true, 42));
        assert_eq!((file.offset, file.device), (0x1000, (0, 15)));
        assert_eq!(file.untouched(), Untouched::Unknown);
        assert!(vvar.details.unwrap().device);
        assert_eq!(vdso.untouched(), Untouched::Read);
        assert_eq!(huge.page_shift(), 21);
        assert_eq!(huge.untouched(), Untouched::Zero);
        assert!(vsyscall.is_kernel_data() && vvar.is_kernel_data() && !vdso.is_kernel_data());
    }

    #[test]
    fn first_system_v_segment_is_a_file() {
        let line = "7f0000000000-7f0010000000 rw-s 00000000 00:01 0    /SYSV00000000 (deleted)\n";
        let all = parse(line.as_bytes(), &|| ()).unwrap();
        assert_eq!(all[0].untouched(), Untouched::File);
    }

    /// Checks names that ordinary files share with the kernel's own: a file may have any name.
    #[test]
    fn files_named_as_the_kernel_names_its_own_are_files() {
        let lines = "\
7f0000000000-7f0000200000 rw-p 00000000 fe:00 7    /anon_hugepage (deleted)
7f1000000000-7f1000200000 rw-s 00000000 fe:00 8    /secretmem (deleted)
";
        let mut all = parse(lines.as_bytes(), &|| ()).unwrap();
        tell_internal(&mut all);
        for mapping in all {
            assert_eq!(mapping.untouched(), Untouched::File);
            assert!(!mapping.is_secret());
        }
    }

    #[test]
    fn names_may_be_any_bytes() {
        let line = b"7f0000000000-7f0010000000 r--p 00000000 00:0f 42   /tmp/a\x1b[31m \xff\x85\n";
        let all = parse(&line[..], &|| ()).unwrap();
        assert_eq!(all[0].name, b"/tmp/a\x1b[31m \xff\x85");
        assert_eq!(all[0].inode, 42);
    }

    #[test]
    fn maps_alone_does_not_prove_population() {
        let line = "7f0000000000-7f0010000000 ---p 00000000 00:00 0 \n";
        let all = parse(line.as_bytes(), &|| ()).unwrap();
        assert_eq!(all[0].details, None);
        assert!(!all[0].is_empty_reservation());
    }

    #[test]
    fn this_process_is_among_its_own_mappings() {
        let all = Mapping::all(std::process::id().cast_signed(), "/proc/self", &|| ()).unwrap();
        assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let here = 0_u8;
        let address = std::ptr::from_ref(&here) as u64;
        let stack = all
            .iter()
            .find(|mapping| (mapping.start..mapping.end).contains(&address));
        assert!(stack.is_some_and(|mapping| mapping.write));
    }
}
