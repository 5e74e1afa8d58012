//! A daemon and its VMMs, each a process of its own.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use snaprestore_fixtures::images::{Mix, Shares};
use snaprestore_tests::program::{Run, snaprestore};
use tempfile::TempDir;

use crate::footprint::process_with;

pub(crate) const PAGES: u64 = 8192;
/// Time limit that only a hang exceeds.
pub(crate) const HANG_TIMEOUT: Duration = Duration::from_secs(120);

/// A memory image, its snapshot, and the daemon that serves it.
pub(crate) struct Scene {
    pub(crate) folder: TempDir,
    raw: PathBuf,
    pub(crate) snapshot: PathBuf,
    daemon: Option<Child>,
    /// Output of the daemon so far.
    said: Arc<Mutex<String>>,
}

impl Scene {
    pub(crate) fn new(shares: Shares) -> Self {
        Self::with_pages(PAGES, shares)
    }

    /// Creates a scene with `pages` pages.
    pub(crate) fn with_pages(pages: u64, shares: Shares) -> Self {
        let folder = TempDir::new().expect("cannot create a folder");
        let (raw, snapshot) = (folder.path().join("raw"), folder.path().join("snap"));
        fs::write(&raw, Mix::with_shares(pages, 31, shares).bytes())
            .expect("cannot write the file");
        let create = snaprestore([
            "create".as_ref(),
            raw.as_os_str(),
            "--output".as_ref(),
            snapshot.as_os_str(),
        ]);
        let _ = Run::to_end(&mut { create }).exits(0);
        Self {
            folder,
            raw,
            snapshot,
            daemon: None,
            said: Arc::default(),
        }
    }

    /// Changes `pages` of the memory, and makes the scene's snapshot a child of the one before, as
    /// a file of this name.
    pub(crate) fn branch(&mut self, name: &str, pages: impl Iterator<Item = u64>) {
        let mut memory = fs::read(&self.raw).expect("cannot read the file");
        for page in pages {
            let page = usize::try_from(page).expect("page number out of range");
            let salt = name.len() * 31 + page;
            let bytes = memory[page * 4096..][..4096].iter_mut();
            for (at, byte) in bytes.enumerate() {
                *byte = byte.wrapping_add((salt + at * at).to_le_bytes()[0] | 1);
            }
        }
        self.raw = self.path(&format!("{name}.raw"));
        fs::write(&self.raw, memory).expect("cannot write the file");
        let (base, child) = (self.snapshot.clone(), self.path(name));
        let mut create = snaprestore(["create", "--holes", "zero", "--base"]);
        create.args([&base, &self.raw]).arg("--output").arg(&child);
        let _ = Run::to_end(&mut create).exits(0);
        self.snapshot = child;
    }

    /// Makes the scene's snapshot and memory those of an earlier one.
    pub(crate) fn base_on(&mut self, snapshot: &Path, raw: &Path) {
        (self.snapshot, self.raw) = (snapshot.to_owned(), raw.to_owned());
    }

    /// Returns the path of the original memory.
    pub(crate) fn raw(&self) -> &Path {
        &self.raw
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    /// Returns the path of a file in the scene's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Sets the mode of the scene's folder: with 0o755, every user may read its files and connect
    /// to its sockets; with 0o777, also create files.
    pub(crate) fn share_folder(&self, mode: u32) {
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(self.folder.path(), mode).expect("cannot change the mode");
    }

    pub(crate) fn serve(&mut self, options: &[&str]) {
        self.serve_with(options, &[]);
    }

    /// Starts the daemon with these variables in its environment.
    pub(crate) fn serve_with(&mut self, options: &[&str], environment: &[(&str, &str)]) {
        let mut command = self.daemon(options);
        command.envs(environment.iter().copied());
        self.start(command);
    }

    /// Returns the daemon's command.
    pub(crate) fn daemon(&self, options: &[&str]) -> Command {
        let mut command = snaprestore(["serve", "--json", "--snapshot"]);
        command
            .arg(&self.snapshot)
            .arg("--socket")
            .arg(self.socket())
            .args(options);
        for variable in ["NOTIFY_SOCKET", "FDSTORE", "LISTEN_FDS"] {
            command.env_remove(variable);
        }
        command
    }

    pub(crate) fn start(&mut self, mut command: Command) {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.said = Arc::default();
        let mut daemon = command.spawn().expect("cannot start the daemon");
        let lines = BufReader::new(daemon.stderr.take().expect("no pipe to the child")).lines();
        let said = Arc::clone(&self.said);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut said = said.lock().expect("another thread panicked");
                said.push_str(&line);
                said.push('\n');
            }
        });
        self.daemon = Some(daemon);
        self.wait_for("serving ", 1);
    }

    /// Waits until the daemon has logged `what` this many times.
    pub(crate) fn wait_for(&self, what: &str, times: usize) {
        let is_said = || self.said().matches(what).count() >= times;
        assert!(
            within(HANG_TIMEOUT, is_said),
            "no {what:?} in {}",
            self.said()
        );
    }

    pub(crate) fn said(&self) -> String {
        self.said.lock().expect("another thread panicked").clone()
    }

    pub(crate) fn vmm(&self, options: &[&str]) -> Command {
        self.vmm_of(&self.raw, options)
    }

    pub(crate) fn vmm_of(&self, raw: &Path, options: &[&str]) -> Command {
        self.vmm_to(&self.socket(), raw, options)
    }

    /// Returns a VMM's command with the given socket.
    pub(crate) fn vmm_at(&self, socket: &Path, options: &[&str]) -> Command {
        self.vmm_to(socket, &self.raw, options)
    }

    /// Returns a VMM's command with the given socket and memory.
    #[expect(clippy::unused_self, reason = "a VMM is one of a scene")]
    pub(crate) fn vmm_to(&self, socket: &Path, raw: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fake-vmm"));
        command.arg(socket).arg(raw).args(options);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Kills the supervisor.
    pub(crate) fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("process exited unexpectedly");
        daemon.kill().expect("cannot kill the process");
        daemon.wait().expect("cannot wait for the process");
    }

    /// Returns the supervisor's process.
    pub(crate) fn supervisor(&self) -> Pid {
        let daemon = self.daemon.as_ref().expect("process exited unexpectedly");
        Pid::from_raw(i32::try_from(daemon.id()).expect("PID out of range"))
    }

    /// Returns the worker's process, if there is one at the moment.
    pub(crate) fn worker(&self) -> Option<Pid> {
        let supervisor = self.daemon.as_ref()?.id();
        let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"));
        let first = children.ok()?.split_whitespace().next()?.parse().ok()?;
        Some(Pid::from_raw(first))
    }

    /// Asks the daemon to stop, and returns its report.
    pub(crate) fn stop(&mut self) -> Vec<Value> {
        kill(self.supervisor(), Signal::SIGTERM).expect("cannot reach the process");
        self.ended()
    }

    /// Waits until the daemon, which was asked to stop, exits, and returns its report.
    pub(crate) fn ended(&mut self) -> Vec<Value> {
        let report = self.exits(0);
        report["vms"].as_array().expect("report has no VMs").clone()
    }

    /// Waits until the daemon, which was asked to stop, exits with this code, and returns its
    /// report.
    pub(crate) fn exits(&mut self, code: i32) -> Value {
        let mut daemon = self.daemon.take().expect("process exited unexpectedly");
        // A report of many VMs is larger than a pipe's buffer: the daemon would wait for its
        // reader.
        let mut stdout = daemon.stdout.take().expect("no pipe to the child");
        let report = std::thread::spawn(move || {
            let mut report = Vec::new();
            stdout.read_to_end(&mut report).map(|_| report)
        });
        if !ends_within(&mut daemon, HANG_TIMEOUT) {
            let _ = daemon.kill();
            panic!("the daemon does not end: {}", self.said());
        }
        let mut run = Run::finish(daemon);
        run.out = report
            .join()
            .expect("the thread panicked")
            .expect("cannot read the report");
        let run = run.exits(code);
        assert!(!self.socket().exists(), "the socket is left");
        run.json()
    }

    /// Returns the guardian of a daemon that is [`Scene::marked`].
    pub(crate) fn guardian(&self) -> Option<Pid> {
        let mark = self.folder.path().display();
        process_with(&format!("SNAPRESTORE_TEST={mark}"), "guardian")
    }

    /// Returns the command of a daemon whose processes can be told from those of other tests.
    pub(crate) fn marked(&self, options: &[&str]) -> Command {
        let mut command = self.daemon(options);
        command.env("SNAPRESTORE_TEST", self.folder.path());
        command
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Waits for a VMM to exit, with a time limit.
#[track_caller]
pub(crate) fn end_of(mut vmm: Child) -> Run {
    if !ends_within(&mut vmm, HANG_TIMEOUT) {
        let _ = vmm.kill();
        panic!("it waits forever");
    }
    Run::finish(vmm)
}

/// Returns whether the child exits by itself within this time.
pub(crate) fn ends_within(child: &mut Child, time: Duration) -> bool {
    within(time, || {
        child.try_wait().expect("cannot query the child").is_some()
    })
}

/// Returns whether the condition becomes true within this time.
pub(crate) fn within(time: Duration, mut is_true: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if is_true() {
            return true;
        }
        if began.elapsed() > time {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns how the VMs ended. `complete` counts as `exited`, because a VM that has touched
/// everything may have been complete before it exited.
pub(crate) fn endings(vms: &[Value]) -> Vec<&str> {
    fn ending(vm: &Value) -> Option<&str> {
        match vm["ending"].as_str()? {
            "complete" => Some("exited"),
            other => Some(other),
        }
    }
    let mut endings: Vec<_> = vms.iter().filter_map(ending).collect();
    endings.sort_unstable();
    endings
}
