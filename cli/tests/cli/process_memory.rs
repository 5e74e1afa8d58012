//! Kinds of memory of a live process that reading alone can't tell apart, or would change.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};

use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, geteuid};
use serde_json::Value;
use snaprestore_fixtures::host::{ensure_python3, skipped};
use snaprestore_fixtures::huge_pool::HugePool;

use crate::common::{Folder, Run, as_nobody, command, finish, number, remarks, run, states};

const NOBODY: u32 = 65534;
const PAGE: usize = 4096;

/// Functions for the programs below. Constants are the kernel's.
const PRELUDE: &str = r"
import ctypes, fcntl, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
SHARED, PRIVATE, ANONYMOUS, NORESERVE = 1, 2, 0x20, 0x4000
PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
def unable(why):
    print('unable', why, flush=True)
    sys.exit()
def mapped(name, size, protection=3, flags=PRIVATE | ANONYMOUS | NORESERVE, fd=-1, offset=0):
    at = libc.mmap(None, size, protection, flags, fd, offset)
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), name)
    print(name, at, flush=True)
    return at
def fill(at, size, byte=1):
    ctypes.memset(at, byte, size)
def advise(at, size, advice):
    return libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), advice)
def userfaultfd(features):
    fd = libc.syscall(323, 0) if os.uname().machine == 'x86_64' else libc.syscall(282, 0)
    if fd < 0:
        fd = libc.syscall(323, 1)
    if fd < 0:
        unable('userfaultfd is not permitted')
    try:
        fcntl.ioctl(fd, 0xc018aa3f, struct.pack('QQQ', 0xaa, features, 0))
    except OSError:
        unable('the kernel has no such userfaultfd')
    return fd
def register(fd, at, size, mode):
    fcntl.ioctl(fd, 0xc020aa00, struct.pack('QQQQ', at, size, mode, 0))
";

/// A Python process that has executed its program and waits.
pub(crate) struct Puppet {
    pub(crate) child: Child,
    stdin: Option<ChildStdin>,
    places: Vec<(String, u64)>,
}

impl Puppet {
    /// Runs `program`, and records where it has mapped its memory. Reports and returns `None` if
    /// the machine can't run it. `as_user` needs root.
    pub(crate) fn start(test: &str, program: &str, as_user: Option<u32>) -> Option<Self> {
        let python = match ensure_python3() {
            Ok(python) => python,
            Err(why) => {
                skipped(test, &why);
                return None;
            }
        };
        let mut command = Command::new(python);
        let end = "print('ready', flush=True)\nsys.stdin.read()\n";
        command
            .args(["-c", &format!("{PRELUDE}{program}\n{end}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(user) = as_user {
            command.uid(user).gid(user);
        }
        let mut child = command.spawn().unwrap();
        let mut puppet = Self {
            stdin: child.stdin.take(),
            places: Vec::new(),
            child,
        };
        let mut lines = BufReader::new(puppet.child.stdout.take().unwrap()).lines();
        loop {
            let line = lines.next().expect("the program ended").unwrap();
            match line.split_once(' ') {
                None if line == "ready" => return Some(puppet),
                Some(("unable", why)) => {
                    skipped(test, &why);
                    return None;
                }
                Some((name, place)) => puppet.places.push((name.into(), place.parse().unwrap())),
                None => panic!("{line:?}"),
            }
        }
    }

    pub(crate) fn place(&self, name: &str) -> u64 {
        let found = self.places.iter().find(|(known, _)| known == name);
        found.unwrap_or_else(|| panic!("no {name}")).1
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Lets the process exit by itself.
    pub(crate) fn end(&mut self) {
        self.stdin = None;
    }

    /// Returns the state letters of all its threads.
    pub(crate) fn states(&self) -> String {
        states(self.child.id())
    }

    /// Returns a number in KiB from its `/proc/PID/status`.
    fn status(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(field));
        let number = line.unwrap().trim_start_matches(':').trim();
        number.trim_end_matches(" kB").parse().unwrap()
    }

    /// Packs the process into `s`.
    fn take(&self, folder: &Folder) -> Run {
        let pid = self.child.id().to_string();
        run(folder, &["create", "--pid", &pid, "-o", "s", "--json"])
    }

    /// Packs the process like [`Self::take`], and counts the read system calls.
    fn take_counting_reads(&self, folder: &Folder) -> (Run, u64) {
        let child = command(["create", "--pid", &self.child.id().to_string(), "-o", "s"])
            .arg("--json")
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The counters of an exited process exist until it is reaped.
        let pid = child.id();
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(Pid::from_raw(pid.cast_signed())), peek).unwrap();
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let reads = io.lines().find_map(|line| line.strip_prefix("syscr: "));
        (finish(child), reads.unwrap().parse().unwrap())
    }
}

/// Returns the remarks of `create`, in pages. Asserts that the warnings among them were printed on
/// standard error, and that the snapshot `s` has the same remarks as properties.
pub(crate) fn remarked(folder: &Folder, taken: &Run) -> Vec<(String, u64)> {
    let report = taken.json();
    let remarks = remarks(&report);
    let info = run(folder, &["info", "s", "--json"]).exits(0).json();
    let properties = info["properties"].as_object().unwrap();
    let recorded = properties
        .iter()
        .filter(|(key, _)| key.ends_with("_bytes"))
        .map(|(key, value)| (key.clone(), value.as_str().unwrap().parse().unwrap()));
    let recorded: Vec<(String, u64)> = recorded.collect();
    let mut sorted = remarks.clone();
    sorted.sort();
    assert_eq!(sorted, recorded);
    let texts: Vec<_> = report["remarks"].as_array().unwrap().iter().collect();
    for line in taken.err.lines() {
        let text = line.strip_prefix("snaprestore: warning: ").unwrap();
        assert!(texts.iter().any(|remark| remark["text"] == text), "{line}");
    }
    remarks
        .into_iter()
        .map(|(key, bytes)| (key, bytes / PAGE as u64))
        .collect()
}

/// Returns one remark, in the form of [`remarked`].
pub(crate) fn remark(key: &str, pages: u64) -> (String, u64) {
    (format!("source.{key}_bytes"), pages)
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the first `len` bytes of the snapshot at `address`, or the reason why it can't.
fn memory(folder: &Folder, address: u64, len: usize) -> Result<Vec<u8>, String> {
    let info = run(folder, &["info", "s", "--json"]).exits(0).json();
    let regions: Vec<Value> = info["regions"].as_array().unwrap().clone();
    let found = regions.iter().enumerate().find(|(_, region)| {
        let start = number(region, "start");
        (start..start + number(region, "bytes")).contains(&address)
    });
    let (index, region) = found.ok_or("no region")?;
    let index = index.to_string();
    let extracted = run(
        folder,
        &["extract", "s", "-o", "o", "-f", "--region", &index],
    );
    if extracted.code != Some(0) {
        return Err(extracted.err);
    }
    let mut file = std::fs::File::open(folder.file("o")).unwrap();
    let at = address - number(region, "start");
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(at)).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact(&mut bytes).unwrap();
    Ok(bytes)
}

#[test]
fn poisoned_page_among_untouched_ones_is_unavailable() {
    let test = "poisoned_page_among_untouched_ones_is_unavailable";
    // UFFD_FEATURE_POISON, UFFDIO_POISON. Closing the descriptor leaves the marker.
    let program = "
fd = userfaultfd(1 << 14)
for name, protection in (('memory', 3), ('hidden', 0)):
    at = mapped(name, 16 * PAGE)
    register(fd, at, 16 * PAGE, 1)
    fcntl.ioctl(fd, 0xc020aa08, struct.pack('QQQq', at + 3 * PAGE, PAGE, 0, 0))
    if libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(16 * PAGE), protection): unable('mprotect')
os.close(fd)
";
    let Some(puppet) = Puppet::start(test, program, None) else {
        return;
    };
    let folder = Folder::new();
    let taken = puppet.take(&folder).exits(0);
    assert!(taken.err.contains("2 pages of process"), "{}", taken.err);
    assert_eq!(number(&taken.json(), "unavailable_pages"), 2);
    assert_eq!(remarked(&folder, &taken), [remark("unreadable", 2)]);
    let pid = puppet.child.id().to_string();
    let told = run(&folder, &["create", "--pid", &pid, "-o", "t"]).exits(0);
    let line = format!("WARNING     2 pages of process {pid} could not be read");
    assert!(told.text().contains(&line), "{}", told.text());
    for name in ["memory", "hidden"] {
        let error = memory(&folder, puppet.place(name), PAGE).unwrap_err();
        assert!(
            error.contains("unavailable") || error.contains("could not be read"),
            "{error}"
        );
    }
}

fn is_kernel_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

#[test]
fn guard_page_is_not_reported_as_lost() {
    let test = "guard_page_is_not_reported_as_lost";
    // MADV_GUARD_INSTALL.
    let program = "
at = mapped('memory', 16 * PAGE)
fill(at, 16 * PAGE, 7)
if advise(at + 4 * PAGE, PAGE, 102): unable('no MADV_GUARD_INSTALL')
at = mapped('many', 512 * MIB)
if advise(at, 512 * MIB, 102): unable('no MADV_GUARD_INSTALL')
";
    let Some(puppet) = Puppet::start(test, program, None) else {
        return;
    };
    let folder = Folder::new();
    let (taken, reads) = puppet.take_counting_reads(&folder);
    let taken = taken.exits(0);
    assert_eq!(taken.err, "", "no warning");
    assert_eq!(remarked(&folder, &taken), []);
    assert_eq!(number(&taken.json(), "unavailable_pages"), 0);
    // If the kernel lists guard pages (Linux 6.16), none of the many is read.
    if is_kernel_at_least(6, 16) {
        assert!(reads < (512 << 20) / PAGE as u64 / 4, "{reads} reads");
    }
    let found = memory(&folder, puppet.place("memory"), 6 * PAGE).unwrap();
    let expected = [vec![7; 4 * PAGE], vec![0; PAGE], vec![7; PAGE]].concat();
    assert!(found == expected);
    run(&folder, &["extract", "s", "-o", "all"]).exits(0);
}

/// Mappings of 256 MiB each, of which one page is touched.
const SPARSE: &str = "
def sparse(name, flags, fd=-1, keep=True):
    at = mapped(name, 256 * MIB, 3, flags, fd)
    fill(at, 1, 9)
    if fd >= 0 and not keep: os.close(fd)
    return at
def memfd(name):
    fd = os.memfd_create(name)
    os.ftruncate(fd, 256 * MIB)
    return fd
";

#[test]
fn reading_untouched_memory_does_not_make_the_process_grow() {
    let test = "reading_untouched_memory_does_not_make_the_process_grow";
    let program = format!(
        "{SPARSE}
import tempfile
file = tempfile.TemporaryFile()
file.truncate(256 * MIB)
os.pwrite(file.fileno(), b'file', 128 * MIB)
sparse('anonymous', SHARED | ANONYMOUS)
sparse('memfd', SHARED, memfd('a'), False)
sparse('private_memfd', PRIVATE, memfd('b'))
sparse('private_file', PRIVATE, file.fileno())
held = memfd('c')
os.pwrite(held, b'written', 64 * MIB)
sparse('written', SHARED, held)
"
    );
    let Some(puppet) = Puppet::start(test, &program, None) else {
        return;
    };
    let folder = Folder::new();
    let before = puppet.status("VmRSS");
    let taken = puppet.take(&folder).exits(0);
    let grown = puppet.status("VmRSS").saturating_sub(before);
    assert!(grown < 8 << 10, "{grown} KiB");
    if geteuid().is_root() {
        assert_eq!(taken.err, "");
        assert_eq!(number(&taken.json(), "unavailable_pages"), 0);
    }
    for name in ["memfd", "private_memfd", "private_file", "written"] {
        // Through the name of a descriptor, anyone can open a file that is still open.
        if name != "memfd" || geteuid().is_root() {
            let found = memory(&folder, puppet.place(name), PAGE).unwrap();
            assert_eq!(found[..2], [9, 0], "{name}");
        }
    }
    // Pages that were never touched through the mapping, but are no holes.
    for (name, at, wanted) in [
        ("private_file", 128 << 20, &b"file"[..]),
        ("written", 64 << 20, b"written"),
    ] {
        let found = memory(&folder, puppet.place(name) + at, wanted.len()).unwrap();
        assert_eq!(found, wanted, "{name}");
    }
}

/// Without privileges, nobody can tell what shared memory holds that isn't in a page table; it is
/// never taken for zeros.
#[test]
fn ordinary_user_is_warned_about_shared_memory() {
    let test = "ordinary_user_is_warned_about_shared_memory";
    if !geteuid().is_root() {
        return skipped(test, &"becoming another user needs root");
    }
    let program = format!(
        "libc.prctl(4, 1)
{SPARSE}
sparse('anonymous', SHARED | ANONYMOUS)
sparse('memfd', SHARED, memfd('a'), False)
sparse('private_memfd', PRIVATE, memfd('b'))
libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
libc.shmat.restype, libc.shmat.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
segment = libc.shmget(0, 256 * MIB, 0o1600)
at = libc.shmat(segment, None, 0)
libc.shmctl(segment, 0, None)
fill(at, 1, 9)
print('system_v', at, flush=True)
fill(mapped('small', MIB, 3, SHARED | ANONYMOUS), 1, 9)
"
    );
    let Some(puppet) = Puppet::start(test, &program, Some(NOBODY)) else {
        return;
    };
    let folder = Folder::new();
    let before = puppet.status("VmRSS");
    let pid = puppet.child.id().to_string();
    let taken = as_nobody(&folder, &["create", "--pid", &pid, "-o", "s", "--json"]).exits(0);
    let grown = puppet.status("VmRSS").saturating_sub(before);
    assert!(grown < 8 << 10, "{grown} KiB");
    assert!(taken.err.contains("not in its page table"), "{}", taken.err);
    let hidden = 3 * ((256 << 20) / PAGE as u64 - 1);
    assert_eq!(number(&taken.json(), "unavailable_pages"), hidden);
    assert_eq!(remarked(&folder, &taken), [remark("hidden", hidden)]);
    for name in ["private_memfd", "small"] {
        let found = memory(&folder, puppet.place(name), PAGE).unwrap();
        assert_eq!(found[..2], [9, 0], "{name}");
    }
    for name in ["anonymous", "system_v"] {
        memory(&folder, puppet.place(name), PAGE).unwrap_err();
    }
}

/// A snapshotter that write-protects memory leaves markers for pages that don't exist.
#[test]
fn write_protected_holes_of_shared_memory_stay_holes() {
    let test = "write_protected_holes_of_shared_memory_stay_holes";
    if !geteuid().is_root() {
        return skipped(test, &"seeing the file behind shared memory needs root");
    }
    // UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFDIO_WRITEPROTECT.
    let program = format!(
        "{SPARSE}
fd = userfaultfd(1 << 12 | 1)
at = sparse('memory', SHARED, memfd('a'))
register(fd, at, 256 * MIB, 2)
fcntl.ioctl(fd, 0xc018aa06, struct.pack('QQQ', at, 256 * MIB, 1))
"
    );
    let Some(puppet) = Puppet::start(test, &program, None) else {
        return;
    };
    let folder = Folder::new();
    let before = puppet.status("VmRSS");
    let taken = puppet.take(&folder).exits(0);
    let grown = puppet.status("VmRSS").saturating_sub(before);
    assert!(grown < 8 << 10, "{grown} KiB");
    assert_eq!(taken.err, "");
    let found = memory(&folder, puppet.place("memory"), 2 * PAGE).unwrap();
    assert_eq!(found[..2], [9, 0]);
}

#[test]
fn untouched_huge_pages_stay_in_the_pool() {
    let test = "untouched_huge_pages_stay_in_the_pool";
    let _pool = match HugePool::with(12) {
        Ok(pool) => pool,
        Err(why) => return skipped(test, &why),
    };
    // MFD_HUGETLB; MAP_HUGETLB.
    let program = "
libc.memfd_create.restype = ctypes.c_int
def file():
    fd = libc.memfd_create(b'huge', 4)
    os.ftruncate(fd, 64 * MIB)
    return fd
fill(mapped('shared', 64 * MIB, 3, SHARED | NORESERVE, file()), 1, 9)
fill(mapped('private', 64 * MIB, 3, PRIVATE | NORESERVE, file()), 1, 9)
fill(mapped('anonymous', 64 * MIB, 3, SHARED | ANONYMOUS | NORESERVE | 0x40000), 1, 9)
fill(mapped('own', 64 * MIB, 3, PRIVATE | ANONYMOUS | NORESERVE | 0x40000), 1, 9)
other = file()
at = mapped('partly', 2 * MIB, 3, SHARED | NORESERVE, other, 4 * MIB)
fill(at, 1, 8)
fill(mapped('whole', 64 * MIB, 3, SHARED | NORESERVE, other), 1, 9)
";
    let Some(puppet) = Puppet::start(test, program, None) else {
        return;
    };
    let folder = Folder::new();
    let before = puppet.status("HugetlbPages");
    let taken = puppet.take(&folder).exits(0);
    assert_eq!(puppet.status("HugetlbPages"), before);
    assert_eq!(
        (number(&taken.json(), "unavailable_pages"), &*taken.err),
        (0, "")
    );
    for name in ["shared", "private", "anonymous", "own", "whole"] {
        let found = memory(&folder, puppet.place(name), PAGE).unwrap();
        assert_eq!(found[..2], [9, 0], "{name}");
    }
    // Touched through another mapping only.
    let found = memory(&folder, puppet.place("whole") + (4 << 20), 2).unwrap();
    assert_eq!(found, [8, 0]);
}

#[test]
fn mapping_beyond_its_file_costs_no_read_per_page() {
    let test = "mapping_beyond_its_file_costs_no_read_per_page";
    let program = "
import tempfile
file = tempfile.TemporaryFile()
file.write(b'x' * (PAGE + 1))
file.flush()
mapped('private', 16 * GIB, 1, PRIVATE | NORESERVE, file.fileno())
mapped('shared', 16 * GIB, 1, SHARED, file.fileno())
mapped('hidden', 16 * GIB, 0, PRIVATE | NORESERVE, file.fileno())
mapped('vast', 4096 * GIB, 1, SHARED, file.fileno())
";
    let Some(puppet) = Puppet::start(test, program, None) else {
        return;
    };
    let folder = Folder::new();
    let taken = puppet.take(&folder).exits(0);
    let report = taken.json();
    // Reading page by page would take 2 minutes.
    assert!(number(&report, "held_ms") < 30_000, "{report}");
    let beyond = 3 * ((16_u64 << 30) / PAGE as u64 - 2);
    assert_eq!(number(&report, "unavailable_pages"), beyond);
    let vast = (4096_u64 << 30) / PAGE as u64 - 2;
    let expected = [remark("beyond_file", beyond), remark("left_out", vast)];
    assert_eq!(remarked(&folder, &taken), expected);
    assert!(
        taken.err.contains("longer than their file"),
        "{}",
        taken.err
    );
    assert!(number(&report, "file_bytes") < 32 << 20, "{report}");
    run(&folder, &["verify", "s"]).exits(0);
    let all = "zero";
    for name in ["private", "shared", "hidden", "vast"] {
        let info = run(&folder, &["info", "s", "--json"]).json();
        let regions = info["regions"].as_array().unwrap();
        let start = puppet.place(name);
        let index = regions.iter().position(|r| number(r, "start") == start);
        let index = index.unwrap().to_string();
        // Without the missing parts the file is short, whatever its holes.
        run(
            &folder,
            &[
                "extract",
                "s",
                "-o",
                "o",
                "-f",
                "--region",
                &index,
                "--unavailable",
                all,
            ],
        )
        .exits(0);
        let mut bytes = vec![0; PAGE + 2];
        let mut file = std::fs::File::open(folder.file("o")).unwrap();
        file.read_exact(&mut bytes).unwrap();
        let expected = [vec![b'x'; PAGE + 1], vec![0]].concat();
        assert!(bytes == expected, "{name}");
    }
}

#[test]
fn secret_memory_is_unavailable_and_dontdump_memory_is_read() {
    let test = "secret_memory_is_unavailable_and_dontdump_memory_is_read";
    // memfd_secret, MADV_DONTDUMP.
    let program = "
at = mapped('undumped', 4 * PAGE)
fill(at, 4 * PAGE, 5)
if advise(at, 4 * PAGE, 16): unable('no MADV_DONTDUMP')
fd = libc.syscall(447, 0)
if fd < 0: unable('no memfd_secret here')
os.ftruncate(fd, 8 * PAGE)
fill(mapped('secret', 8 * PAGE, 3, SHARED, fd), 2 * PAGE, 6)
";
    let Some(puppet) = Puppet::start(test, program, None) else {
        return;
    };
    let folder = Folder::new();
    let taken = puppet.take(&folder).exits(0);
    assert!(taken.err.contains("8 pages of process"), "{}", taken.err);
    assert!(taken.err.contains("memfd_secret"), "{}", taken.err);
    let expected = [remark("secret", 8), remark("undumped", 4)];
    assert_eq!(remarked(&folder, &taken), expected);
    let found = memory(&folder, puppet.place("undumped"), PAGE).unwrap();
    assert!(found == vec![5; PAGE]);
    memory(&folder, puppet.place("secret"), PAGE).unwrap_err();
}

/// An ordinary file may have the name that the kernel uses for something else.
#[test]
fn files_named_like_kernel_memory_are_packed() {
    let test = "files_named_like_kernel_memory_are_packed";
    if !geteuid().is_root() {
        return skipped(test, &"mounting needs root");
    }
    let mount = Folder::new();
    // A path in a detached mount begins at its root. CLONE_NEWNS; MS_REC | MS_PRIVATE; MNT_DETACH.
    let program = format!(
        "
folder = {:?}
if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None): unable('no mounts of its own')
if libc.mount(b'none', folder.encode(), b'tmpfs', 0, None): unable('tmpfs cannot be mounted')
for name, flags in (('anon_hugepage', PRIVATE), ('secretmem', SHARED)):
    with open(folder + '/' + name, 'w+b') as file:
        file.write(b'z' * 4 * PAGE)
        file.flush()
        mapped(name, 4 * PAGE, 3, flags, file.fileno())
if libc.umount2(folder.encode(), 2): unable('tmpfs cannot be detached')
",
        mount.path()
    );
    let Some(puppet) = Puppet::start(test, &program, None) else {
        return;
    };
    let folder = Folder::new();
    let taken = puppet.take(&folder).exits(0);
    assert_eq!(remarked(&folder, &taken), []);
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    let regions = info["regions"].as_array().unwrap();
    for name in ["anon_hugepage", "secretmem"] {
        // The test is about names that can be mistaken for others.
        let of_kernel = format!("/{name}");
        assert!(
            regions
                .iter()
                .any(|region| region["name"] == of_kernel.as_str())
        );
        let found = memory(&folder, puppet.place(name), 4 * PAGE).unwrap();
        assert!(found == [b'z'; 4 * PAGE], "{name}");
    }
}

#[test]
fn pages_served_by_another_process_are_unavailable() {
    let test = "pages_served_by_another_process_are_unavailable";
    let program = "
fd = userfaultfd(0)
at = mapped('memory', 16 * PAGE)
fill(at, 2 * PAGE, 7)
register(fd, at, 16 * PAGE, 1)
";
    let Some(puppet) = Puppet::start(test, program, None) else {
        return;
    };
    let folder = Folder::new();
    let taken = puppet.take(&folder).exits(0);
    assert_eq!(number(&taken.json(), "unavailable_pages"), 14);
    assert_eq!(remarked(&folder, &taken), [remark("missing", 14)]);
    memory(&folder, puppet.place("memory"), PAGE).unwrap_err();
}

/// Names may be any bytes: those of two files, or of a process, stay different.
#[test]
fn names_that_differ_in_one_byte_stay_different() {
    let test = "names_that_differ_in_one_byte_stay_different";
    let files = Folder::new();
    // PR_SET_NAME. The kernel writes a line feed as `\\012`.
    let program = format!(
        r"
os.chdir({:?})
for name in (b'a\x01', b'a\x02', b'b\xfe', b'b\xff', b'c\n', b'c\\012'):
    with open(name, 'wb') as file:
        file.write(b'x' * PAGE)
    with open(name, 'rb') as file:
        mapped('file', PAGE, 1, PRIVATE, file.fileno())
libc.prctl(15, b'n\xff) Z\x1b[1m', 0, 0, 0)
",
        files.path()
    );
    let Some(puppet) = Puppet::start(test, &program, None) else {
        return;
    };
    let folder = Folder::new();
    puppet.take(&folder).exits(0);
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    assert_eq!(info["properties"]["source.name"], r"n\xff) Z\x1b[1m");
    let prefix = format!("{}/", files.path().display());
    let regions = info["regions"].as_array().unwrap().iter();
    let names = regions.filter_map(|region| region["name"].as_str()?.strip_prefix(&prefix));
    let names: std::collections::BTreeSet<_> = names.collect();
    // Only root can follow the link that reveals a line feed.
    let line_feed = geteuid().is_root().then_some(r"c\x0a");
    let expected = [r"a\x01", r"a\x02", r"b\xfe", r"b\xff", r"c\\012"];
    assert_eq!(names, expected.into_iter().chain(line_feed).collect());
}
