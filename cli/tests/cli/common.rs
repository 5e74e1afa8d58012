//! Helpers to run the command and check its output.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Returns the path of the program to run.
pub(crate) fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_snaprestore"))
}

/// Returns a `snaprestore` command with arguments, and nothing on standard input.
pub(crate) fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program());
    command.args(args).stdin(Stdio::null());
    command
}

/// Makes `command` start with the default actions for all signals that terminate it, whatever the
/// parent of these tests ignores: under `nohup`, it would never react to a hang-up.
pub(crate) fn with_default_signals(mut command: Command) -> Command {
    let reset = || {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: between fork and exec only this thread runs, and setting a signal's default
            // action is allowed there and touches no memory.
            if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure neither allocates nor takes a lock.
    unsafe { command.pre_exec(reset) };
    command
}

/// Makes `command` start where no `/proc` is mounted, which needs root.
pub(crate) fn without_proc(mut command: Command) -> Command {
    let hide = || {
        let none = c"none".as_ptr();
        let private = libc::MS_REC | libc::MS_PRIVATE;
        // SAFETY: these system calls only read the names, and may be made between fork and exec.
        let failed = unsafe {
            libc::unshare(libc::CLONE_NEWNS) != 0
                || libc::mount(
                    none,
                    c"/".as_ptr(),
                    std::ptr::null(),
                    private,
                    std::ptr::null(),
                ) != 0
                || libc::mount(
                    none,
                    c"/proc".as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    std::ptr::null(),
                ) != 0
        };
        if failed {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure neither allocates nor takes a lock.
    unsafe { command.pre_exec(hide) };
    command
}

/// Runs the command in `folder`, and returns its results.
pub(crate) fn run(folder: &Folder, args: &[&str]) -> Run {
    Run::to_end(command(args).current_dir(folder.path()))
}

/// Runs the command in `folder` as an unprivileged user, which needs root.
pub(crate) fn as_nobody(folder: &Folder, args: &[&str]) -> Run {
    // That user must be able to run the copy in the folder, and to write there.
    let mode = fs::Permissions::from_mode(0o777);
    fs::set_permissions(folder.path(), mode.clone()).unwrap();
    fs::copy(program(), folder.file("snaprestore")).unwrap();
    fs::set_permissions(folder.file("snaprestore"), mode).unwrap();
    let mut command = Command::new(folder.file("snaprestore"));
    command
        .args(args)
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .uid(65534)
        .gid(65534);
    loop {
        match command.output() {
            // A child that another test has just forked has the copy open for writing until it
            // executes its own program.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(5));
            }
            output => return output.expect("cannot start the command").into(),
        }
    }
}

/// A finished command.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) out: Vec<u8>,
    pub(crate) err: String,
}

impl Run {
    pub(crate) fn to_end(command: &mut Command) -> Self {
        command.output().expect("cannot start the command").into()
    }

    /// Asserts the exit code, and shows the output if it is another one.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.text(), self.err);
        self
    }

    /// Asserts that the error message contains each of these parts.
    #[track_caller]
    pub(crate) fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.err.contains(part), "no {part:?} in: {}", self.err);
        }
        self
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    /// Parses standard output as one JSON object.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let value: Value = serde_json::from_slice(&self.out)
            .unwrap_or_else(|error| panic!("{error}: {}\n{}", self.text(), self.err));
        assert!(value.is_object(), "{value}");
        value
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: output.stdout,
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// A temporary folder of one test, deleted afterwards.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("cannot create a temporary folder"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.file(name), bytes).expect("cannot write the test file");
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).expect("cannot read the test file")
    }

    /// Returns the names in the folder, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path())
            .expect("cannot list the folder")
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// Waits until `done` returns true; panics after a time that no working machine needs.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(60), "waiting: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns the state letters of all threads of process `pid`.
pub(crate) fn states(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("process is missing");
    let state = |task: std::io::Result<fs::DirEntry>| {
        // The name before it may be any bytes.
        let stat = fs::read(task.ok()?.path().join("stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        stat.rsplit_once(") ")?.1.chars().next()
    };
    tasks.filter_map(state).collect()
}

/// Waits for a child and takes its output.
pub(crate) fn finish(child: Child) -> Run {
    child
        .wait_with_output()
        .expect("cannot wait for the child")
        .into()
}

/// Waits for a child like [`finish`], but panics if it hasn't exited after `timeout`.
#[track_caller]
pub(crate) fn finish_within(mut child: Child, timeout: Duration) -> Run {
    let began = Instant::now();
    while child
        .try_wait()
        .expect("cannot wait for the child")
        .is_none()
    {
        if began.elapsed() > timeout {
            let _ = child.kill();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    finish(child)
}

/// Creates a named pipe.
pub(crate) fn make_fifo(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a fifo");
}

/// Returns the keys and values of `create`'s remarks on its source.
#[track_caller]
pub(crate) fn remarks(report: &Value) -> Vec<(String, u64)> {
    let remarks = report["remarks"].as_array().expect("a list of remarks");
    let text = |remark: &Value, key: &str| remark[key].as_str().expect("a text").to_owned();
    remarks
        .iter()
        .map(|remark| {
            assert!(!text(remark, "text").is_empty(), "{remark}");
            (text(remark, "key"), text(remark, "value").parse().unwrap())
        })
        .collect()
}

/// Returns a number of a JSON report.
#[track_caller]
pub(crate) fn number(report: &Value, key: &str) -> u64 {
    report[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key:?} in {report}"))
}

/// Returns incompressible bytes.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = vec![0; len];
    for word in bytes.as_chunks_mut::<8>().0 {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        *word = (state ^ (state >> 29)).to_le_bytes();
    }
    bytes
}
