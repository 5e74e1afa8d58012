//! Failures around a command, and their promised outcome: exit code, message, files.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use snaprestore_fixtures::host::find_program;
use snaprestore_fixtures::images::{Mix, Shares};
use snaprestore_tests::program::{Run, done, program, snaprestore};
use snaprestore_tests::real::{guest, guest_piece, skip};

/// A small file system of its own.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Mounts the file system; `None`, which is reported, if this user may not mount.
    fn new(test: &str, bytes: u64) -> Option<Self> {
        if !geteuid().is_root() {
            skip(test, "only root can mount a small file system to fill");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={bytes}");
        let mounted = mount(
            Some("tmpfs"),
            folder.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        );
        match mounted {
            Ok(()) => Some(Self(folder)),
            Err(why) => {
                skip(
                    test,
                    &format!("root may not mount here ({why}); CAP_SYS_ADMIN permits it"),
                );
                None
            }
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Writes a file that doesn't compress.
fn noise(path: &Path, mib: u64) {
    Mix::with_shares(mib * 256, 1, Shares::RANDOM)
        .write_sparse(path)
        .unwrap();
}

#[test]
fn a_full_disk_leaves_the_old_target() {
    let name = "a_full_disk_leaves_the_old_target";
    let Some(disk) = SmallDisk::new(name, 2 << 20) else {
        return;
    };
    let sources = tempfile::tempdir().unwrap();
    let raw = sources.path().join("raw");
    match guest(name) {
        Some(image) => guest_piece(&image, 64 << 20, &raw),
        None => noise(&raw, 64),
    }
    let target = disk.file("s");
    let create = || {
        let mut command = snaprestore(["create", "--force", "--output"]);
        command.arg(&target).arg(&raw);
        Run::to_end(&mut command).exits(1)
    };
    create().says(&[target.to_str().unwrap(), "No space left"]);
    assert_eq!(names(disk.0.path()), [""; 0]);

    fs::write(&target, "precious").unwrap();
    create().says(&["No space left"]);
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    assert_eq!(names(disk.0.path()), ["s"]);

    // The reverse direction.
    let snapshot = sources.path().join("s");
    done([
        "create".as_ref(),
        raw.as_os_str(),
        "-o".as_ref(),
        snapshot.as_os_str(),
    ]);
    Run::to_end(
        snaprestore(["extract", "--force", "--output"])
            .arg(&target)
            .arg(&snapshot),
    )
    .exits(1)
    .says(&["No space left"]);
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    assert_eq!(names(disk.0.path()), ["s"]);
}

#[test]
fn a_missing_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    noise(&raw, 1);
    let missing = folder.path().join("missing");
    let target = missing.join("s");
    let snapshot = folder.path().join("s");
    done([
        "create".as_ref(),
        raw.as_os_str(),
        "-o".as_ref(),
        snapshot.as_os_str(),
    ]);
    for (command, source) in [("create", &raw), ("extract", &snapshot)] {
        Run::to_end(snaprestore([command, "--output"]).arg(&target).arg(source))
            .exits(1)
            .says(&[missing.to_str().unwrap(), "does not exist"]);
    }
    assert_eq!(names(folder.path()), ["raw", "s"]);
}

/// Returns the number of bytes that a process has read.
fn read_so_far(child: &Child) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.map_or(0, |count| count.parse().unwrap())
}

/// Starts `create` of a large file and stops the process when it has read a part of it.
fn stopped_within(raw: &Path, target: &Path) -> Child {
    let mut child = snaprestore(["create", "--threads", "1", "--output"])
        .arg(target)
        .arg(raw)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while read_so_far(&child) < 24 << 20 {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it read the source"
        );
        assert!(began.elapsed() < Duration::from_secs(60), "it doesn't read");
        std::thread::sleep(Duration::from_millis(1));
    }
    kill(pid(&child), Signal::SIGSTOP).unwrap();
    child
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

#[test]
fn a_source_that_shrinks_while_it_is_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, target) = (folder.path().join("raw"), folder.path().join("s"));
    noise(&raw, 256);
    let child = stopped_within(&raw, &target);
    assert!(
        read_so_far(&child) < 200 << 20,
        "it was too quick to be stopped"
    );
    let file = File::options().write(true).open(&raw).unwrap();
    file.set_len(210 << 20).unwrap();
    kill(pid(&child), Signal::SIGCONT).unwrap();
    Run::finish(child).exits(1).says(&[raw.to_str().unwrap()]);
    assert_eq!(names(folder.path()), ["raw"]);
}

#[test]
fn ctrl_c_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let folder = tempfile::tempdir().unwrap();
        let (raw, target) = (folder.path().join("raw"), folder.path().join("s"));
        noise(&raw, 256);
        let child = stopped_within(&raw, &target);
        kill(pid(&child), signal).unwrap();
        kill(pid(&child), Signal::SIGCONT).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(signal as i32), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("interrupted"), "{said}");
        assert_eq!(names(folder.path()), ["raw"]);
    }
}

/// Returns a `snaprestore` command for the user nobody, who may read the folder and run the program
/// in it.
fn as_nobody(folder: &Path) -> Command {
    let copy = folder.join("snaprestore");
    if !copy.exists() {
        fs::copy(program(), &copy).unwrap();
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .arg(copy)
        .stdin(Stdio::null());
    command
}

/// Returns whether tests can run as the user nobody.
fn can_be_nobody(test: &str) -> bool {
    if !geteuid().is_root() {
        skip(test, "only root can become another user");
        return false;
    }
    if find_program("setpriv").is_none() {
        skip(
            test,
            "setpriv is missing; apt-get install util-linux gives it",
        );
        return false;
    }
    true
}

#[test]
fn a_source_that_may_not_be_read_is_named() {
    if !can_be_nobody("a_source_that_may_not_be_read_is_named") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (raw, target) = (folder.path().join("raw"), folder.path().join("s"));
    noise(&raw, 1);
    fs::set_permissions(&raw, fs::Permissions::from_mode(0o600)).unwrap();
    Run::to_end(
        as_nobody(folder.path())
            .args(["create", "-o"])
            .arg(&target)
            .arg(&raw),
    )
    .exits(1)
    .says(&[raw.to_str().unwrap(), "Permission denied"]);
    Run::to_end(
        as_nobody(folder.path())
            .args(["create", "-o", "/s"])
            .arg(program()),
    )
    .exits(1)
    .says(&["/", "Permission denied"]);
    assert_eq!(names(folder.path()), ["raw", "snaprestore"]);
}

/// The first commands of the README work for a user who may not create a full userfaultfd, as on
/// most machines.
#[test]
fn ordinary_user_runs_the_first_commands() {
    let name = "ordinary_user_runs_the_first_commands";
    if !can_be_nobody(name) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let nobody = |args: &[&str]| {
        let mut command = as_nobody(folder.path());
        Run::to_end(command.args(args).current_dir(folder.path()))
    };
    let doctor = nobody(&["doctor", "--json"]);
    if doctor.code != Some(0) {
        return skip(
            name,
            "userfaultfd is permitted to no other user at all here",
        );
    }
    let doctor: serde_json::Value = serde_json::from_slice(&doctor.out).unwrap();
    let is_limited = doctor["user_mode_only"] == true;
    noise(&folder.path().join("raw"), 1);
    let raw = fs::Permissions::from_mode(0o644);
    fs::set_permissions(folder.path().join("raw"), raw).unwrap();
    let _ = nobody(&["create", "raw", "-o", "s"]).exits(0);
    let _ = nobody(&["verify", "s"]).exits(0);
    for args in [
        &["demo", "--size", "16"][..],
        &["restore", "s", "--check", "raw", "--touch", "random"],
    ] {
        let run = nobody(args).exits(0);
        assert_eq!(run.err.contains("user mode only"), is_limited, "{run:?}");
    }
}
