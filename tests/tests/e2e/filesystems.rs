//! A file system in this process that supports less than ext4, or reports false holes.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use snaprestore_fixtures::host::skipped;
use snaprestore_tests::program::{Run, snaprestore};

const TTL: Duration = Duration::from_secs(1);
const PAGE: usize = 4096;

/// A folder of files in memory, without hard links and nameless files.
#[derive(Default)]
struct Folder {
    files: BTreeMap<u64, Vec<u8>>,
    names: BTreeMap<OsString, u64>,
    /// The error of a rename with flags.
    flags_error: Option<Errno>,
    /// The error of every rename.
    rename_error: Option<Errno>,
    /// Whether every range is reported as a hole.
    lies: bool,
}

impl Folder {
    fn add(&mut self, name: &OsStr, content: Vec<u8>) -> u64 {
        let number = self.files.last_key_value().map_or(2, |(last, _)| last + 1);
        self.files.insert(number, content);
        self.names.insert(name.to_owned(), number);
        number
    }

    fn attributes(&self, number: INodeNo) -> FileAttr {
        let file = self.files.get(&number.0);
        let data = file.map_or(0, |file| pages_of_data(file).count());
        FileAttr {
            ino: number,
            size: file.map_or(0, |file| file.len() as u64),
            blocks: (data * PAGE / 512) as u64,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file.is_none() {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if file.is_none() { 0o755 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

/// Returns the numbers of the pages that are not all zeros.
fn pages_of_data(file: &[u8]) -> impl Iterator<Item = usize> {
    let pages = file.chunks(PAGE).enumerate();
    pages.filter_map(|(number, page)| page.iter().any(|&byte| byte != 0).then_some(number))
}

#[derive(Clone, Default)]
struct Served(Arc<Mutex<Folder>>);

impl Served {
    fn folder(&self) -> MutexGuard<'_, Folder> {
        self.0.lock().expect("not poisoned")
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let folder = self.folder();
        match folder.names.get(name) {
            Some(&number) => {
                reply.entry(&TTL, &folder.attributes(INodeNo(number)), Generation(0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.folder().attributes(number));
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut folder = self.folder();
        if let (Some(size), Some(file)) = (size, folder.files.get_mut(&number.0)) {
            file.resize(usize::try_from(size).expect("a size"), 0);
        }
        reply.attr(&TTL, &folder.attributes(number));
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let mut folder = self.folder();
        if folder.names.contains_key(name) {
            return reply.error(Errno::EEXIST);
        }
        let number = folder.add(name, Vec::new());
        reply.created(
            &TTL,
            &folder.attributes(INodeNo(number)),
            Generation(0),
            FileHandle(0),
            FopenFlags::empty(),
        );
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let folder = self.folder();
        let file = &folder.files[&number.0];
        let start = usize::try_from(offset).expect("an offset").min(file.len());
        let end = (start + size as usize).min(file.len());
        reply.data(&file[start..end]);
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut folder = self.folder();
        let file = folder.files.get_mut(&number.0).expect("a file");
        let start = usize::try_from(offset).expect("an offset");
        let end = start + data.len();
        if file.len() < end {
            file.resize(end, 0);
        }
        file[start..end].copy_from_slice(data);
        reply.written(u32::try_from(data.len()).expect("a size"));
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.folder().names.remove(name) {
            Some(_) => reply.ok(),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        to: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut folder = self.folder();
        let flags_error = folder.flags_error.filter(|_| !flags.is_empty());
        if let Some(error) = flags_error.or(folder.rename_error) {
            return reply.error(error);
        }
        match folder.names.remove(name) {
            Some(number) => {
                folder.names.insert(to.to_owned(), number);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn lseek(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let folder = self.folder();
        let file = &folder.files[&number.0];
        let start = usize::try_from(offset).expect("an offset");
        let is_data = |page: &usize| {
            let bytes = &file[page * PAGE..file.len().min((page + 1) * PAGE)];
            !folder.lies && bytes.iter().any(|&byte| byte != 0)
        };
        let mut pages = start / PAGE..file.len().div_ceil(PAGE);
        let found = match whence {
            libc::SEEK_DATA => pages.find(is_data),
            _ => pages.find(|page| !is_data(page)),
        };
        match found {
            Some(page) => reply.offset(i64::try_from((page * PAGE).max(start)).expect("an offset")),
            None if whence == libc::SEEK_DATA => reply.error(Errno::ENXIO),
            None => reply.offset(i64::try_from(file.len()).expect("a size")),
        }
    }
}

/// A mount of that file system, and a folder beside it.
struct Mounted {
    at: PathBuf,
    served: Served,
    // Dropped before the folder that it is mounted in.
    _session: BackgroundSession,
    folder: tempfile::TempDir,
}

impl Mounted {
    fn new(test: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("mounted");
        fs::create_dir(&at).unwrap();
        let served = Served::default();
        match fuser::spawn_mount(served.clone(), &at, &Config::default()) {
            Ok(session) => Some(Self {
                at,
                served,
                _session: session,
                folder,
            }),
            Err(error) => {
                skipped(test, &format!("a file system can't be mounted: {error}"));
                None
            }
        }
    }

    /// Runs the program in the mounted folder and asserts that it exits with `code`. Returns its
    /// standard error.
    #[track_caller]
    fn run(&self, args: &[&str], code: i32) -> String {
        let run = Run::to_end(snaprestore(args).current_dir(self.folder.path()));
        run.exits(code).err
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let folder = self.served.folder();
        let names = folder.names.keys();
        names
            .map(|name| name.clone().into_string().unwrap())
            .collect()
    }
}

/// Returns pages that all differ.
fn image(pages: usize) -> Vec<u8> {
    (0..pages * PAGE / 8)
        .flat_map(|word| {
            (word as u64)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes()
        })
        .collect()
}

#[test]
fn targets_are_named_where_there_are_neither_links_nor_rename_flags() {
    let test = "targets_are_named_where_there_are_neither_links_nor_rename_flags";
    for error in [Errno::EINVAL, Errno::EOPNOTSUPP, Errno::EPERM] {
        let Some(mounted) = Mounted::new(test) else {
            return;
        };
        mounted.served.folder().flags_error = Some(error);
        let image = image(64);
        fs::write(mounted.path("raw"), &image).unwrap();
        let create = ["create", "raw", "-o", "mounted/s"];
        mounted.run(&create, 0);
        assert_eq!(mounted.names(), ["s"]);
        let first = fs::read(mounted.path("mounted/s")).unwrap();

        // Whatever the file system doesn't support, no file is replaced without `--force`.
        let refused = mounted.run(&create, 1);
        assert!(refused.contains("exists already"), "{refused}");
        assert!(fs::read(mounted.path("mounted/s")).unwrap() == first);
        mounted.run(&[&create[..], &["--force"]].concat(), 0);
        assert!(fs::read(mounted.path("mounted/s")).unwrap() != first);

        mounted.run(&["extract", "mounted/s", "-o", "mounted/raw"], 0);
        assert!(fs::read(mounted.path("mounted/raw")).unwrap() == image);
        assert_eq!(mounted.names(), ["raw", "s"]);
    }
}

#[test]
fn a_finished_file_that_cannot_be_named_is_kept() {
    let test = "a_finished_file_that_cannot_be_named_is_kept";
    let Some(mounted) = Mounted::new(test) else {
        return;
    };
    mounted.served.folder().rename_error = Some(Errno::EOPNOTSUPP);
    fs::write(mounted.path("raw"), image(64)).unwrap();
    for force in [&[][..], &["--force"]] {
        let create = [&["create", "raw", "-o", "mounted/s"][..], force].concat();
        let refused = mounted.run(&create, 1);
        let [kept] = &mounted.names()[..] else {
            panic!("{:?}", mounted.names());
        };
        assert!(kept.ends_with(".partial"), "{kept}");
        let kept = format!("mounted/{kept}");
        for says in [kept.as_str(), "mounted/s,", "rename it"] {
            assert!(refused.contains(says), "{refused}");
        }
        mounted.run(&["verify", &kept], 0);
        fs::remove_file(mounted.path(&kept)).unwrap();
    }
}

/// A shared mapping of a file, unmapped when dropped, because a file system with a mapped file
/// can't be unmounted.
struct Mapped {
    start: *mut libc::c_void,
    len: usize,
}

impl Mapped {
    fn new(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, of a length that the file has.
        let start = unsafe {
            let null = std::ptr::null_mut();
            libc::mmap(null, len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { start, len }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: it is mapped, nothing else uses it, and the range was checked.
        unsafe {
            let to = self.start.cast::<u8>().add(at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

#[test]
fn pages_that_were_written_to_a_mapping_are_no_hole() {
    let test = "pages_that_were_written_to_a_mapping_are_no_hole";
    let Some(mounted) = Mounted::new(test) else {
        return;
    };
    let name = OsStr::new("raw");
    mounted.served.folder().add(name, vec![0; 1 << 20]);
    let written = image(16);
    let mapped = Mapped::new(&mounted.at.join(name));
    mapped.write(16 * PAGE, &written);
    // The file system has not received the data yet.
    assert_eq!(pages_of_data(&mounted.served.folder().files[&2]).count(), 0);
    mounted.run(&["create", "mounted/raw", "-o", "s"], 0);
    mounted.run(&["extract", "s", "-o", "out"], 0);
    let out = fs::read(mounted.path("out")).unwrap();
    assert!(out[16 * PAGE..32 * PAGE] == written);
    assert!(out[32 * PAGE..].iter().all(|&byte| byte == 0));
}

#[test]
fn blocks_that_are_allocated_are_read_whatever_is_called_a_hole() {
    let test = "blocks_that_are_allocated_are_read_whatever_is_called_a_hole";
    let Some(mounted) = Mounted::new(test) else {
        return;
    };
    let mut content = vec![0; 1 << 20];
    content[5 * PAGE..6 * PAGE].fill(7);
    {
        let mut folder = mounted.served.folder();
        folder.add(OsStr::new("raw"), content.clone());
        folder.lies = true;
    }
    mounted.run(&["create", "mounted/raw", "-o", "s"], 0);
    mounted.run(&["extract", "s", "-o", "out"], 0);
    assert!(fs::read(mounted.path("out")).unwrap() == content);
}
