//! The files that the contenders need, made from the raw image at the first request.
//!
//! | file | how |
//! | --- | --- |
//! | snapshots | `snaprestore create`, one for each kind that a contender names; `optimize` |
//! | working set | a trace and lists of pages: see [`working_set`](crate::working_set) |
//! | `.zst` | solid, level 3, with a checksum: what `zstd -3` writes |
//! | squashfs | `mksquashfs -comp zstd`, as root where the kernel has the file system |
//! | erofs | `mkfs.erofs` with the best codec it has, likewise |
//!
//! File systems are mounted in a mount namespace of their own, which ends with the program, however
//! it ends.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use zstd::zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, get_error_name, zstd_sys};

use crate::contender::{Contender, SnapshotKind};
use crate::working_set::WorkingSetFiles;
use crate::{BenchError, limits};

/// Level of the solid file.
const SOLID_LEVEL: i32 = 3;

/// The kind of a snapshot that is the end of a chain.
const LAYERED: SnapshotKind = SnapshotKind {
    frame_kib: None,
    level: None,
    no_dictionary: false,
    layered: true,
    optimized: false,
};

/// The raw image and everything that was made from it.
#[derive(Debug)]
pub struct Images {
    raw: Option<PathBuf>,
    bytes: u64,
    folder: PathBuf,
    program: PathBuf,
    made: BTreeMap<String, Result<PathBuf, String>>,
    namespace: bool,
    /// Paths where images are mounted now.
    mounted: Vec<PathBuf>,
}

impl Images {
    /// Creates the images of the raw file `raw`, made in `folder` by the `snaprestore` at
    /// `program`.
    pub fn new(raw: &Path, folder: &Path, program: &Path) -> Result<Self, BenchError> {
        let named = || format!("{}: looking for it", raw.display());
        let raw = raw.canonicalize().map_err(BenchError::io(named()))?;
        let bytes = raw.metadata().map_err(BenchError::io(named()))?.len();
        if bytes == 0 || !bytes.is_multiple_of(crate::PAGE) {
            return Err(BenchError::Invalid(format!(
                "{}: {bytes} bytes are not whole pages of 4096",
                raw.display()
            )));
        }
        let named = format!("{}: making the folder", folder.display());
        fs::create_dir_all(folder).map_err(BenchError::io(named))?;
        Ok(Self::unprepared(Some(raw), bytes, folder, program))
    }

    fn unprepared(raw: Option<PathBuf>, bytes: u64, folder: &Path, program: &Path) -> Self {
        Self {
            raw,
            bytes,
            folder: folder.to_owned(),
            program: program.to_owned(),
            made: BTreeMap::new(),
            namespace: false,
            mounted: Vec::new(),
        }
    }

    /// Creates the images for a snapshot of `bytes` of memory and nothing else: only snaprestore
    /// can restore it.
    pub fn of_snapshot(snapshot: &Path, bytes: u64, folder: &Path, program: &Path) -> Self {
        let mut images = Self::unprepared(None, bytes, folder, program);
        images.use_snapshot(snapshot);
        images
    }

    /// Uses an existing snapshot as the one that `create` would make.
    pub fn use_snapshot(&mut self, snapshot: &Path) {
        let name = snapshot_name(&SnapshotKind::default());
        self.made.insert(name, Ok(snapshot.to_owned()));
    }

    /// Uses an existing chain of the same memory, which ends with the snapshot `last`.
    pub fn use_chain(&mut self, last: &Path) {
        let name = snapshot_name(&LAYERED);
        self.made.insert(name, Ok(last.to_owned()));
    }

    /// Returns the last snapshot of the chain.
    pub fn chain(&mut self) -> Result<PathBuf, BenchError> {
        self.snapshot(&LAYERED)
    }

    /// Returns the size of the memory, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the raw file.
    pub fn raw(&self) -> Result<&Path, BenchError> {
        self.raw
            .as_deref()
            .ok_or_else(|| BenchError::Unavailable("there is no raw file of this image".into()))
    }

    /// Returns the folder of the files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the `snaprestore` that makes snapshots.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Returns the file that a contender restores from. An unavailable file gives
    /// [`BenchError::Unavailable`] each time it is requested.
    pub fn file_for(&mut self, contender: &Contender) -> Result<PathBuf, BenchError> {
        match contender {
            Contender::Ours(ours) | Contender::Serve(ours) => self.snapshot(&ours.snapshot),
            Contender::Mmap
            | Contender::Handler { .. }
            | Contender::ReadAll
            | Contender::VmmHandler { .. }
            | Contender::VmmCopyAll => self.raw().map(Path::to_owned),
            Contender::Unzstd => self.solid(),
            Contender::Squashfs { block_kib } => {
                let block_kib = *block_kib;
                let name = format!("squashfs-{block_kib}k");
                self.once(name, |images| images.squashfs(block_kib))
            }
            Contender::Erofs => self.once("erofs".into(), Self::erofs),
        }
    }

    /// Returns a snapshot of the image.
    pub fn snapshot(&mut self, kind: &SnapshotKind) -> Result<PathBuf, BenchError> {
        self.once(snapshot_name(kind), |images| {
            let out = images.folder.join(snapshot_name(kind));
            if kind.optimized {
                images.optimize(&out, kind)?;
            } else {
                images.create(&out, kind)?;
            }
            Ok(out)
        })
    }

    /// Returns the pages of the image's working set, and how they are touched.
    pub fn working_set(&mut self) -> Result<WorkingSetFiles, BenchError> {
        let snapshot = self.snapshot(&SnapshotKind::default())?;
        let files = WorkingSetFiles::in_folder(&self.folder);
        self.once("working set".into(), |_| {
            files.write(&snapshot)?;
            Ok(snapshot)
        })?;
        Ok(files)
    }

    /// Writes a snapshot whose working set `snaprestore optimize` has packed for itself.
    fn optimize(&mut self, out: &Path, kind: &SnapshotKind) -> Result<(), BenchError> {
        let plain = self.snapshot(&SnapshotKind {
            optimized: false,
            ..kind.clone()
        })?;
        let trace = self.working_set()?.trace;
        let mut command = Command::new(&self.program);
        command.arg("optimize").arg(plain).arg("-o").arg(out);
        command.args(["--force", "--quiet", "--trace"]).arg(trace);
        run(&mut command)
    }

    /// Writes a snapshot with `snaprestore create`.
    pub fn create(&self, out: &Path, kind: &SnapshotKind) -> Result<(), BenchError> {
        if kind.layered {
            let why = "there is no chain of this image".into();
            return Err(BenchError::Unavailable(why));
        }
        let mut command = Command::new(&self.program);
        command
            .arg("create")
            .arg("--raw")
            .arg(self.raw()?)
            .arg("-o")
            .arg(out);
        command.args(["--force", "--quiet"]);
        if let Some(kib) = kind.frame_kib {
            command.args(["--frame-size", &kib.to_string()]);
        }
        if let Some(level) = kind.level {
            command.arg(format!("--level={level}"));
        }
        if kind.no_dictionary {
            command.args(["--dictionary", "off"]);
        }
        run(&mut command)
    }

    /// Returns the solid zstd file.
    pub fn solid(&mut self) -> Result<PathBuf, BenchError> {
        self.once("solid.zst".into(), |images| {
            images.keep("solid.zst", |images, making| {
                compress(images.raw()?, making, images.bytes)
            })
        })
    }

    /// Returns a file with the number of one page of each frame of a snapshot.
    pub fn page_of_each_frame(&mut self, kind: &SnapshotKind) -> Result<PathBuf, BenchError> {
        let snapshot = self.snapshot(kind)?;
        self.once(format!("{}.pages", snapshot_name(kind)), |images| {
            let out = images.folder.join(format!("{}.pages", snapshot_name(kind)));
            let mut text = String::new();
            for page in limits::page_of_each_frame(&snapshot)? {
                let _ = writeln!(text, "{page}");
            }
            let named = format!("{}: writing", out.display());
            fs::write(&out, text).map_err(BenchError::io(named))?;
            Ok(out)
        })
    }

    /// Makes a file, unless that has already been tried.
    fn once(
        &mut self,
        name: String,
        make: impl FnOnce(&mut Self) -> Result<PathBuf, BenchError>,
    ) -> Result<PathBuf, BenchError> {
        if let Some(made) = self.made.get(&name) {
            return made.clone().map_err(BenchError::Unavailable);
        }
        let result = make(self);
        match &result {
            Ok(path) => {
                self.made.insert(name, Ok(path.clone()));
            }
            Err(BenchError::Unavailable(why)) => {
                self.made.insert(name, Err(why.clone()));
            }
            Err(_) => {}
        }
        result
    }

    /// Makes a file in the folder, unless an earlier run made it from the same raw file. Output of
    /// snaprestore is never kept, because a newer one may write something better.
    fn keep(
        &self,
        name: &str,
        make: impl FnOnce(&Self, &Path) -> Result<(), BenchError>,
    ) -> Result<PathBuf, BenchError> {
        let out = self.folder.join(name);
        let written = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
        if let (Ok(made), Ok(raw)) = (written(&out), written(self.raw()?))
            && made > raw
        {
            return Ok(out);
        }
        let making = self.folder.join(format!("{name}.making"));
        let _ = fs::remove_file(&making);
        make(self, &making)?;
        let named = format!("{}: naming it", out.display());
        fs::rename(&making, &out).map_err(BenchError::io(named))?;
        Ok(out)
    }

    fn squashfs(&mut self, block_kib: u32) -> Result<PathBuf, BenchError> {
        needs_file_system("squashfs")?;
        let image = self.keep(&format!("squashfs-{block_kib}k.img"), |images, making| {
            let mut command = tool("mksquashfs", "squashfs-tools")?;
            command
                .arg(images.raw()?)
                .arg(making)
                .args(["-comp", "zstd", "-b"]);
            command
                .arg(format!("{block_kib}K"))
                .args(["-noappend", "-no-progress", "-quiet"]);
            run(&mut command)
        })?;
        let name = self.raw()?.file_name().unwrap_or_default().to_owned();
        Ok(self.mount("squashfs", &image)?.join(name))
    }

    fn erofs(&mut self) -> Result<PathBuf, BenchError> {
        needs_file_system("erofs")?;
        // The available codecs depend on how it was built, and the kernel may not read all of them.
        let mut why = String::new();
        for codec in ["zstd,3", "lz4hc"] {
            let name = format!("erofs-{}.img", codec.replace(',', "-"));
            let made = self.keep(&name, |images, making| images.make_erofs(codec, making));
            match made.and_then(|image| self.mount("erofs", &image)) {
                Ok(point) => return Ok(point.join("raw")),
                Err(error) => why = crate::with_causes(&error),
            }
        }
        Err(BenchError::Unavailable(why))
    }

    fn make_erofs(&self, codec: &str, out: &Path) -> Result<(), BenchError> {
        // The program takes a folder.
        let inside = self.folder.join("erofs.in");
        let named = || format!("{}: filling the folder", inside.display());
        let _ = fs::remove_dir_all(&inside);
        fs::create_dir(&inside).map_err(BenchError::io(named()))?;
        let file = inside.join("raw");
        let raw = self.raw()?;
        if fs::hard_link(raw, &file).is_err() {
            fs::copy(raw, &file).map_err(BenchError::io(named()))?;
        }
        // 64 KiB of compressed bytes at a time.
        let mut command = tool("mkfs.erofs", "erofs-utils")?;
        command
            .arg(format!("-z{codec}"))
            .arg("-C65536")
            .arg(out)
            .arg(&inside);
        let made = run(&mut command);
        let _ = fs::remove_dir_all(&inside);
        made
    }

    /// Mounts an image beside it.
    fn mount(&mut self, kind: &str, image: &Path) -> Result<PathBuf, BenchError> {
        if !self.namespace {
            own_mounts()?;
            self.namespace = true;
        }
        let point = mount_point(image);
        let named = format!("{}: making the mount point", point.display());
        fs::create_dir_all(&point).map_err(BenchError::io(named))?;
        let mut command = tool("mount", "mount")?;
        command
            .args(["-t", kind, "-o", "loop,ro"])
            .arg(image)
            .arg(&point);
        run(&mut command).map_err(|error| {
            BenchError::Unavailable(format!("{kind} can't be mounted: {error}"))
        })?;
        self.mounted.push(point.clone());
        Ok(point)
    }
}

/// Unmounts the images, because the caller may be about to remove the folder.
impl Drop for Images {
    fn drop(&mut self) {
        for point in self.mounted.drain(..).rev() {
            let _ = run(Command::new("umount").arg(point));
        }
    }
}

fn mount_point(image: &Path) -> PathBuf {
    image.with_extension("mounted")
}

/// Returns the file name of a snapshot.
fn snapshot_name(kind: &SnapshotKind) -> String {
    let mut name = String::from("snapshot");
    if let Some(kib) = kind.frame_kib {
        let _ = write!(name, "-{kib}k");
    }
    if let Some(level) = kind.level {
        let _ = write!(name, "-level{level}");
    }
    if kind.no_dictionary {
        name += "-plain";
    }
    if kind.layered {
        name += "-layered";
    }
    if kind.optimized {
        name += "-optimized";
    }
    name + ".snap"
}

/// Refuses a file system that the kernel can't mount, or this user may not.
fn needs_file_system(name: &str) -> Result<(), BenchError> {
    let unavailable = |why: String| Err(BenchError::Unavailable(why));
    if !is_root() {
        return unavailable(format!("mounting {name} needs root"));
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |known: &str| {
        known
            .lines()
            .any(|line| line.split_whitespace().next_back() == Some(name))
    };
    if has(&known) {
        return Ok(());
    }
    // The file system may be a module that is loaded on first use.
    let loaded = Command::new("modprobe")
        .arg(name)
        .stderr(Stdio::null())
        .status();
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if loaded.is_ok_and(|status| status.success()) && has(&known) {
        return Ok(());
    }
    unavailable(format!("this kernel has no {name}"))
}

#[expect(
    unsafe_code,
    reason = "system calls without arguments that could be wrong"
)]
fn is_root() -> bool {
    // SAFETY: the call reads a number of the process.
    unsafe { libc::geteuid() == 0 }
}

/// Makes later mounts of this thread and its children visible to them only.
#[expect(unsafe_code, reason = "a system call without a wrapper here")]
fn own_mounts() -> Result<(), BenchError> {
    // SAFETY: the call changes the mounts that this thread sees, to a copy of them.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(BenchError::Unavailable(format!(
            "no mount namespace of one's own: {error}"
        )));
    }
    run(Command::new("mount").args(["--make-rprivate", "/"]))
        .map_err(|error| BenchError::Unavailable(error.to_string()))
}

/// Returns a command for a program; if that is missing, the error names the package that has it.
fn tool(name: &str, package: &str) -> Result<Command, BenchError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|program| program.is_file());
    found.map(Command::new).ok_or_else(|| {
        BenchError::Unavailable(format!(
            "{name} is not installed (Debian: apt-get install {package})"
        ))
    })
}

/// Runs a program to its end; its standard error is part of the error.
pub fn run(command: &mut Command) -> Result<(), BenchError> {
    let what = format!("{}", command.get_program().display());
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(BenchError::io(format!("starting {what}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = format!("{}: {}", output.status, said.trim());
    Err(BenchError::Trial { what, why })
}

/// Writes `raw` as one zstd frame.
fn compress(raw: &Path, out: &Path, bytes: u64) -> Result<(), BenchError> {
    let named = || format!("{}: compressing", raw.display());
    let failed = || BenchError::io(named());
    let refused = |code| BenchError::Trial {
        what: named(),
        why: get_error_name(code).into(),
    };
    let mut from = File::open(raw).map_err(failed())?;
    let mut to = File::create(out).map_err(failed())?;
    let mut context = CCtx::create();
    for parameter in [
        CParameter::CompressionLevel(SOLID_LEVEL),
        CParameter::ChecksumFlag(true),
    ] {
        context.set_parameter(parameter).map_err(refused)?;
    }
    context.set_pledged_src_size(Some(bytes)).map_err(refused)?;
    let (mut plain, mut stored) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let len = from.read(&mut plain).map_err(failed())?;
        let end = if len == 0 {
            zstd_sys::ZSTD_EndDirective::ZSTD_e_end
        } else {
            zstd_sys::ZSTD_EndDirective::ZSTD_e_continue
        };
        let mut input = InBuffer::around(&plain[..len]);
        loop {
            let mut output = OutBuffer::around(&mut stored[..]);
            let left = context
                .compress_stream2(&mut output, &mut input, end)
                .map_err(refused)?;
            to.write_all(output.as_slice()).map_err(failed())?;
            if (len == 0 && left == 0) || (len > 0 && input.pos() == len) {
                break;
            }
        }
        if len == 0 {
            return to.sync_all().map_err(failed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_kinds_have_distinct_names() {
        let kind = |frame_kib, level, no_dictionary| SnapshotKind {
            frame_kib,
            level,
            no_dictionary,
            layered: false,
            optimized: false,
        };
        let names = [
            kind(None, None, false),
            kind(Some(64), None, false),
            kind(Some(64), Some(4), false),
            kind(Some(64), Some(4), true),
        ]
        .map(|kind| snapshot_name(&kind));
        assert_eq!(
            names,
            [
                "snapshot.snap",
                "snapshot-64k.snap",
                "snapshot-64k-level4.snap",
                "snapshot-64k-level4-plain.snap"
            ]
        );
    }

    #[test]
    fn solid_file_decompresses_to_its_source() {
        let folder = tempfile::tempdir().unwrap();
        let (raw, out) = (folder.path().join("raw"), folder.path().join("zst"));
        let bytes: Vec<u8> = (0..3_000_000_u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect();
        fs::write(&raw, &bytes).unwrap();
        compress(&raw, &out, bytes.len() as u64).unwrap();
        let stored = fs::read(&out).unwrap();
        let mut plain = vec![0; bytes.len()];
        zstd::zstd_safe::decompress(&mut plain[..], &stored).unwrap();
        assert!(stored.len() < bytes.len() && plain == bytes);
    }
}
