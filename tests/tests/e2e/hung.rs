//! A disk that stops answering under a daemon: a file system in this process that withholds its
//! replies.

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry,
    ReplyOpen, Request,
};
use nix::mount::{MntFlags, umount2};
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};
use snapshot_format::{Page, Reason, Snapshot};

use crate::scene::{HANG_TIMEOUT, PAGES, Scene, end_of, endings, within};

const NAME: &str = "snap";
const TTL: Duration = Duration::from_secs(3600);

/// A file, and the requests that wait for its content.
struct Disk {
    content: Vec<u8>,
    /// Whether reads bypass the page cache. A process that waits for such a read can't be killed;
    /// otherwise it can.
    direct: bool,
    stalled: Mutex<Option<Stalled>>,
}

/// Requests that are not answered.
struct Stalled {
    bytes: Range<u64>,
    waiting: Vec<(u64, u32, ReplyData)>,
}

impl Disk {
    fn part(&self, offset: u64, size: u32) -> &[u8] {
        let len = self.content.len();
        let start = usize::try_from(offset).expect("an offset").min(len);
        let size = usize::try_from(size).expect("a size");
        &self.content[start..(start + size).min(len)]
    }

    fn attributes(&self, number: INodeNo) -> FileAttr {
        let is_root = number == INodeNo::ROOT;
        FileAttr {
            ino: number,
            size: self.content.len() as u64,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_root {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if is_root { 0o755 } else { 0o644 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

struct Served(Arc<Disk>);

impl Filesystem for Served {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Read-ahead would request more than the part that is meant to stall.
        config
            .set_max_readahead(1)
            .map(drop)
            .map_err(|_| io::ErrorKind::Unsupported.into())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&TTL, &self.0.attributes(INodeNo(2)), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.0.attributes(number));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = if self.0.direct {
            FopenFlags::FOPEN_DIRECT_IO
        } else {
            FopenFlags::empty()
        };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match &mut *self.0.stalled.lock().expect("another thread panicked") {
            Some(stalled)
                if offset < stalled.bytes.end && offset + u64::from(size) > stalled.bytes.start =>
            {
                stalled.waiting.push((offset, size, reply));
            }
            _ => reply.data(self.0.part(offset, size)),
        }
    }
}

/// The snapshot of a scene on a disk of its own.
struct Mounted {
    disk: Arc<Disk>,
    folder: PathBuf,
    _session: BackgroundSession,
}

impl Mounted {
    fn new(scene: &Scene, name: &str, direct: bool) -> io::Result<Self> {
        let folder = scene.folder.path().join(name);
        std::fs::create_dir(&folder)?;
        let disk = Arc::new(Disk {
            content: std::fs::read(&scene.snapshot)?,
            direct,
            stalled: Mutex::default(),
        });
        let served = Served(Arc::clone(&disk));
        Ok(Self {
            _session: fuser::spawn_mount(served, &folder, &Config::default())?,
            disk,
            folder,
        })
    }

    fn snapshot(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    fn socket(&self) -> PathBuf {
        self.folder.with_extension("socket")
    }

    /// Stops answering requests.
    fn stall(&self) {
        // Opening the file drops its content from the kernel's cache.
        std::fs::File::open(self.snapshot()).expect("cannot open the file");
        self.stall_at(0..u64::MAX);
    }

    fn stall_at(&self, bytes: Range<u64>) {
        let waiting = Vec::new();
        *self.disk.stalled.lock().expect("another thread panicked") =
            Some(Stalled { bytes, waiting });
    }

    /// Waits until a request is waiting.
    fn wait_until_asked(&self) {
        let is_asked = || {
            let stalled = self.disk.stalled.lock().expect("another thread panicked");
            stalled
                .as_ref()
                .is_some_and(|stalled| !stalled.waiting.is_empty())
        };
        assert!(within(HANG_TIMEOUT, is_asked), "nobody reads it");
    }

    /// Resumes answering, including the requests that waited.
    fn go_on(&self) {
        let waiting = self
            .disk
            .stalled
            .lock()
            .expect("another thread panicked")
            .take();
        let waiting = waiting.into_iter().flat_map(|stalled| stalled.waiting);
        for (offset, size, reply) in waiting {
            reply.data(self.disk.part(offset, size));
        }
    }

    fn vmm(&self, scene: &Scene, options: &[&str]) -> Child {
        let mut vmm = scene.vmm_at(&self.socket(), options);
        vmm.spawn().expect("cannot start a VMM")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // This also helps a worker that is still exiting and has the file open.
        self.go_on();
        let _ = umount2(&self.folder, MntFlags::MNT_DETACH);
    }
}

/// Seconds after which a worker counts as stuck; one that waits for a core does not.
const STUCK_AFTER: &str = "4";

/// Starts a daemon that serves one snapshot from the scene's folder, and others from disks that can
/// stall.
fn serve(scene: &mut Scene, stuck_after: &str, disks: &[&Mounted]) {
    let control = scene.folder.path().join("control");
    let control = control.display().to_string();
    let options = ["--stuck-after", stuck_after, "--prefetch", "off"];
    scene.serve(&[&options[..], &["--control", &control]].concat());
    for disk in disks {
        let _ = add(scene, disk).exits(0);
    }
}

fn add(scene: &Scene, disk: &Mounted) -> Run {
    Run::to_end(&mut adding(scene, disk))
}

fn adding(scene: &Scene, disk: &Mounted) -> Command {
    let name = disk.folder.file_name().expect("a name");
    let mut add = snaprestore(["ctl", "add"]);
    add.env("SNAPRESTORE_CONTROL", scene.folder.path().join("control"));
    add.arg(name).arg("--snapshot").arg(disk.snapshot());
    add.arg("--socket").arg(disk.socket());
    add.args(["--prefetch", "off"]);
    add
}

fn mount(test: &str, scene: &Scene, name: &str, direct: bool) -> Option<Mounted> {
    let mounted = Mounted::new(scene, name, direct);
    mounted.map_err(|error| skipped(test, &error)).ok()
}

#[track_caller]
fn is_killed(vmm: Child, scene: &Scene) {
    let run = end_of(vmm);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", scene.said());
}

#[track_caller]
fn is_right(mut vmm: Child) {
    drop(vmm.stdin.take());
    let run = end_of(vmm).exits(0);
    assert!(String::from_utf8_lossy(&run.out).ends_with("pages right\n"));
}

fn reason_with(vms: &[serde_json::Value], part: &Path) -> String {
    let reasons = vms.iter().filter_map(|vm| vm["reason"].as_str());
    let part = part.display().to_string();
    let mut found = reasons.filter(|reason| reason.contains(&part));
    found.next().expect("a reason that names it").to_owned()
}

/// Returns the offset of a place in a frame that shares its page of the file with nothing else.
fn place_in_frame(snapshot: &Path) -> u64 {
    let snapshot = Snapshot::open_path(snapshot).expect("a snapshot");
    let frame = |page| match snapshot.look_up(page, Reason::Verify).expect("a page") {
        Page::Stored { frame, .. } => Some(frame),
        _ => None,
    };
    let frames = (0..snapshot.page_slots()).filter_map(frame);
    let mut large = frames.filter(|frame| frame.stored_len() > 3 * 4096);
    large.next().expect("a frame").offset() + 2 * 4096
}

/// The waiting worker can be killed, and the next worker blocks at the same place.
#[test]
fn hung_disk_kills_its_vms_and_no_others() {
    let test = "hung_disk_kills_its_vms_and_no_others";
    let mut scene = Scene::new(Shares::MIXED);
    let Some(early) = mount(test, &scene, "early", false) else {
        return;
    };
    let Some(late) = mount(test, &scene, "late", false) else {
        return;
    };
    let Some(never) = mount(test, &scene, "never", false) else {
        return;
    };
    serve(&mut scene, STUCK_AFTER, &[&early, &late]);
    let good = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    let mut bad = late.vmm(&scene, &["--wait"]);
    scene.wait_for(": served", 2);
    let place = place_in_frame(&scene.snapshot);
    late.stall_at(place..place + 1);
    drop(bad.stdin.take());
    is_killed(bad, &scene);
    // The snapshot has not even been opened.
    early.stall();
    is_killed(early.vmm(&scene, &[]), &scene);
    never.stall();
    add(&scene, &never).exits(1).says(&["timed out after 4s"]);
    is_right(good);
    late.go_on();
    is_right(late.vmm(&scene, &[]));
    let vms = scene.stop();
    assert_eq!(endings(&vms), ["exited", "exited", "killed", "killed"]);
    let reason = reason_with(&vms, &late.snapshot());
    assert!(reason.contains("two workers crashed or hung"), "{reason}");
    let reason = reason_with(&vms, &early.snapshot());
    assert!(reason.contains("several workers in a row"), "{reason}");
}

/// The waiting worker can't be killed, and so it never exits.
#[test]
fn unkillable_worker_is_abandoned_and_replaced() {
    let test = "unkillable_worker_is_abandoned_and_replaced";
    let mut scene = Scene::new(Shares::MIXED);
    let Some(disk) = mount(test, &scene, "disk", true) else {
        return;
    };
    serve(&mut scene, STUCK_AFTER, &[&disk]);
    let good = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    let mut bad = disk.vmm(&scene, &["--wait"]);
    scene.wait_for(": served", 2);
    disk.stall();
    drop(bad.stdin.take());
    is_killed(bad, &scene);
    // No other worker may read its userfaultfd.
    is_killed(good, &scene);
    is_right(scene.vmm(&[]).spawn().expect("cannot start a VMM"));
    is_killed(disk.vmm(&scene, &[]), &scene);
    disk.go_on();
    scene.wait_for("readable again", 1);
    is_right(disk.vmm(&scene, &[]));
    let vms = scene.stop();
    let expected = ["exited", "exited", "killed", "killed", "refused"];
    assert_eq!(endings(&vms), expected);
    let reason = reason_with(&vms, &disk.snapshot());
    assert!(reason.contains("its worker hangs reading"), "{reason}");
    assert!(reason.contains("uninterruptible sleep in "), "{reason}");
}

/// Only the file of the base is on the disk that hangs.
#[test]
fn hung_disk_of_an_ancestor_is_named() {
    let test = "hung_disk_of_an_ancestor_is_named";
    let mut scene = Scene::new(Shares::MIXED);
    let Some(disk) = mount(test, &scene, "disk", true) else {
        return;
    };
    let base = scene.snapshot.clone();
    // Each index block is the child's own.
    scene.branch("child", (0..PAGES).step_by(50));
    std::fs::remove_file(base).expect("cannot remove the file");
    let folder = disk.folder.display().to_string();
    let options = ["--stuck-after", STUCK_AFTER, "--prefetch", "off"];
    scene.serve(&[&options[..], &["--layers", &folder]].concat());
    let mut bad = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    scene.wait_for(": served", 1);
    disk.stall();
    drop(bad.stdin.take());
    is_killed(bad, &scene);
    disk.go_on();
    let vms = scene.stop();
    let reason = reason_with(&vms, &disk.snapshot());
    let (ancestor, child) = (disk.snapshot(), scene.snapshot.display());
    let expected = format!("hangs reading {} for {child} and", ancestor.display());
    assert!(reason.contains(&expected), "{reason}");
}

/// Stopping the daemon must not depend on its worker's exit.
#[test]
fn daemon_with_unkillable_worker_can_be_stopped() {
    let test = "daemon_with_unkillable_worker_can_be_stopped";
    let mut scene = Scene::new(Shares::MIXED);
    let Some(disk) = mount(test, &scene, "disk", true) else {
        return;
    };
    serve(&mut scene, STUCK_AFTER, &[&disk]);
    let mut bad = disk.vmm(&scene, &["--wait"]);
    scene.wait_for(": served", 1);
    disk.stall();
    drop(bad.stdin.take());
    is_killed(bad, &scene);
    assert_eq!(endings(&scene.stop()), ["killed"]);
}

/// Regression: the supervisor waited for the disk, accepted nobody, and took its worker for stuck.
#[test]
fn service_on_hung_disk_delays_no_others() {
    let test = "service_on_hung_disk_delays_no_others";
    let mut scene = Scene::new(Shares::MIXED);
    let Some(disk) = mount(test, &scene, "disk", false) else {
        return;
    };
    serve(&mut scene, "60", &[]);
    disk.stall();
    let mut add = adding(&scene, &disk);
    let add = add.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut add = add.spawn().expect("cannot run ctl");
    disk.wait_until_asked();
    is_right(scene.vmm(&[]).spawn().expect("cannot start a VMM"));
    assert!(add.try_wait().expect("cannot query the child").is_none());
    disk.go_on();
    let _ = end_of(add).exits(0);
    is_right(disk.vmm(&scene, &[]));
    assert_eq!(endings(&scene.stop()), ["exited"; 2]);
}
