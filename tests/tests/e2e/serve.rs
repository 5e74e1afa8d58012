//! `snaprestore serve`, with VMMs that are processes of their own.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::{Mix, Shares};
use snaprestore_tests::program::{self, Run, snaprestore};
use tempfile::TempDir;

const PAGES: u64 = 8192;
/// Only a hang takes so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// A memory, its snapshot, and who serves it.
struct Scene {
    folder: TempDir,
    raw: PathBuf,
    snapshot: PathBuf,
    daemon: Option<Child>,
    /// What it has said so far.
    said: Arc<Mutex<String>>,
}

impl Scene {
    fn new(shares: Shares) -> Self {
        let folder = TempDir::new().expect("a folder");
        let (raw, snapshot) = (folder.path().join("raw"), folder.path().join("snap"));
        fs::write(&raw, Mix::with_shares(PAGES, 31, shares).bytes()).expect("written");
        let create = snaprestore([
            "create".as_ref(),
            raw.as_os_str(),
            "--output".as_ref(),
            snapshot.as_os_str(),
        ]);
        let _ = Run::of(&mut { create }).exits(0);
        Self {
            folder,
            raw,
            snapshot,
            daemon: None,
            said: Arc::default(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn serve(&mut self, options: &[&str]) {
        let mut command = snaprestore(["serve", "--json", "--snapshot"]);
        command
            .arg(&self.snapshot)
            .arg("--socket")
            .arg(self.socket());
        command
            .args(options)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.said = Arc::default();
        let mut daemon = command.spawn().expect("the daemon");
        let lines = BufReader::new(daemon.stderr.take().expect("a pipe")).lines();
        let said = Arc::clone(&self.said);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut said = said.lock().expect("not poisoned");
                said.push_str(&line);
                said.push('\n');
            }
        });
        self.daemon = Some(daemon);
        self.wait_for("serving ", 1);
    }

    /// Waits until the daemon has said `what` so often.
    fn wait_for(&self, what: &str, times: usize) {
        let began = Instant::now();
        while self.said().matches(what).count() < times {
            assert!(began.elapsed() < PATIENCE, "no {what:?} in {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn said(&self) -> String {
        self.said.lock().expect("not poisoned").clone()
    }

    fn vmm(&self, options: &[&str]) -> Command {
        self.vmm_of(&self.raw, options)
    }

    fn vmm_of(&self, raw: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fake-vmm"));
        command.arg(self.socket()).arg(raw).args(options);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Asks the daemon to stop, and gives what it reports.
    fn stop(&mut self) -> Vec<Value> {
        let daemon = self.daemon.take().expect("it runs");
        let pid = Pid::from_raw(i32::try_from(daemon.id()).expect("a pid"));
        kill(pid, Signal::SIGTERM).expect("asked");
        let run = Run::finish(daemon).exits(0);
        let report: Value = serde_json::from_slice(&run.out).expect("JSON");
        assert!(!self.socket().exists(), "the socket is left");
        report["vms"].as_array().expect("VMs").clone()
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

/// How the VMs ended. One that has touched everything may have been complete before it exited.
fn endings(vms: &[Value]) -> Vec<&str> {
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

#[test]
fn vms_of_every_release_are_served_one_after_another_and_at_once() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--prefetch", "all"]);
    let options: [&[&str]; 5] = [
        &["--manner", "v1.1"],
        &["--manner", "v1.7", "--threads", "4"],
        &["--manner", "v1.12", "--split", "3000"],
        &["--split", "512", "--threads", "3", "--discard"],
        &["--discard"],
    ];
    for options in options {
        let _ = Run::of(&mut scene.vmm(options)).exits(0);
    }
    let at_once: Vec<Child> = options
        .iter()
        .map(|options| scene.vmm(options).spawn().expect("a VMM"))
        .collect();
    for vmm in at_once {
        let run = Run::finish(vmm).exits(0);
        assert_eq!(run.out, format!("{PAGES} pages right\n").as_bytes());
    }
    let vms = scene.stop();
    assert_eq!(endings(&vms), ["exited"; 10]);
}

#[test]
fn asked_to_stop_the_daemon_completes_its_vms_and_they_go_on() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--prefetch", "off"]);
    // It has touched nothing when the daemon goes.
    let mut vmm = scene.vmm(&["--wait"]).spawn().expect("a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("a pipe")).lines();
    assert_eq!(said.next().expect("a line").expect("text"), "handed over");
    scene.wait_for(": served", 1);
    let vms = scene.stop();
    assert_eq!(vms.len(), 1);
    assert_eq!(vms[0]["ending"], "complete");
    assert_eq!(vms[0]["faults"], 0);
    drop(vmm.stdin.take());
    assert!(vmm.wait().expect("its end").success());
    assert_eq!(
        said.next().expect("a line").expect("text"),
        format!("{PAGES} pages right")
    );
}

#[test]
fn a_vm_whose_page_is_damaged_is_killed_and_the_others_go_on() {
    let mut scene = Scene::new(Shares::RANDOM);
    scene.serve(&["--prefetch", "off"]);
    let mut good = scene.vmm(&["--hold"]).spawn().expect("a VMM");
    let mut said = BufReader::new(good.stdout.take().expect("a pipe")).lines();
    assert_eq!(said.next().expect("a line").expect("text"), "right so far");
    damage(&scene.snapshot);
    let bad = Run::of(&mut scene.vmm(&["--threads", "2"]));
    assert_eq!(bad.signal, Some(libc::SIGKILL), "{}", bad.err);
    drop(good.stdin.take());
    assert!(good.wait().expect("its end").success());
    // Which file, page and place.
    scene.wait_for(&format!("killed: {}: page ", scene.snapshot.display()), 1);
    assert!(scene.said().contains("at offset"), "{}", scene.said());
    assert_eq!(endings(&scene.stop()), ["exited", "killed"]);
}

/// Flips a bit in the middle of the frames, of which a snapshot of random pages is full.
fn damage(snapshot: &Path) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(snapshot)
        .expect("opened");
    let middle = file.metadata().expect("its length").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).expect("read");
    byte[0] ^= 1;
    file.write_all_at(&byte, middle).expect("written");
}

#[test]
fn who_is_no_vmm_is_refused_and_hurts_nobody() {
    use std::io::Write as _;
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--patience", "1"]);
    // One says nothing, one something else, one goes away.
    let silent = std::os::unix::net::UnixStream::connect(scene.socket()).expect("connected");
    let mut other = std::os::unix::net::UnixStream::connect(scene.socket()).expect("connected");
    other.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
    drop(std::os::unix::net::UnixStream::connect(scene.socket()).expect("connected"));
    let short = scene.folder.path().join("short");
    fs::write(&short, vec![0; 4096 * 10]).expect("written");
    let mut misfit = scene.vmm_of(&short, &[]).spawn().expect("a VMM");
    let _ = Run::of(&mut scene.vmm(&[])).exits(0);
    for part in [
        "no list of regions",
        "nothing more for 1s",
        "after 0 bytes",
        "the snapshot of another VM",
    ] {
        scene.wait_for(part, 1);
    }
    drop(silent);
    assert_eq!(
        endings(&scene.stop()),
        ["exited", "refused", "refused", "refused", "refused"]
    );
    // Nobody serves it: it is its owner's to end.
    misfit.kill().expect("killed");
    misfit.wait().expect("its end");
}

/// Two ways to be wrong are possible here that the fake VMM can't show: KVM reads the memory by itself,
/// and does so before the first instruction.
#[test]
fn a_guest_on_kvm_is_served_and_one_with_a_bad_page_is_ended() {
    let test = "a_guest_on_kvm_is_served_and_one_with_a_bad_page_is_ended";
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return skipped(test, &format!("/dev/kvm: {error}"));
    }
    let mut scene = Scene::new(Shares::ZERO);
    fs::remove_file(&scene.snapshot).expect("removed");
    let microvm = |args: &[&str]| {
        let mut command = Command::new(program::microvm());
        command.args(args).stdin(Stdio::null());
        Run::of(&mut command)
    };
    let (snapshot, socket) = (scene.snapshot.display().to_string(), scene.socket());
    let socket = socket.display().to_string();
    let _ = microvm(&["snapshot", &snapshot, "--memory", "32"]).exits(0);
    for prefetch in ["off", "all"] {
        scene.serve(&["--prefetch", prefetch]);
        let run = microvm(&["restore", &snapshot, "--serve", &socket]).exits(0);
        let said = String::from_utf8_lossy(&run.out).into_owned();
        assert!(said.contains("guest: verified again "), "{said}");
        let vms = scene.stop();
        assert_eq!(endings(&vms), ["exited"]);
    }
    damage(&scene.snapshot);
    scene.serve(&["--prefetch", "off"]);
    let run = microvm(&["restore", &snapshot, "--serve", &socket]);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    assert!(!String::from_utf8_lossy(&run.out).contains("verified again"));
    assert_eq!(endings(&scene.stop()), ["killed"]);
}
