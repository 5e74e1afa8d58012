//! The confinement of the worker: it serves a whole VM under it, and can do little else.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::huge_pool::HugePool;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};

use crate::manager::FakeManager;
use crate::scene::{Scene, endings};

const PAGES: u64 = 2048;

/// Creates a scene in a folder that a VM of another user can connect in.
fn scene(shares: Shares) -> Scene {
    let scene = Scene::with_pages(PAGES, shares);
    scene.share_folder(0o755);
    scene
}

/// Runs a worker with these options that serves one VM to its end. Returns the lines that the
/// worker printed, and both runs.
fn serve_confined(scene: &Scene, options: &[&str]) -> (Vec<String>, Run, Run) {
    let _ = fs::remove_file(scene.socket());
    let mut worker = Command::new(env!("CARGO_BIN_EXE_confined-worker"));
    let mut worker = worker
        .arg(scene.socket())
        .arg(&scene.snapshot)
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("no worker runs");
    let mut lines = BufReader::new(worker.stdout.take().expect("no pipe to the child")).lines();
    let first = lines.next().map(|line| line.expect("output is not UTF-8"));
    let Some("listening") = first.as_deref() else {
        panic!("{first:?}: {}", Run::finish(worker).err);
    };
    let mut vm = Command::new(env!("CARGO_BIN_EXE_fake-vmm"));
    vm.arg(scene.socket()).arg(scene.raw());
    vm.args(["--threads", "2", "--split", "500", "--discard"]);
    let vm = Run::to_end(&mut vm);
    let said = lines
        .map(|line| line.expect("output is not UTF-8"))
        .collect();
    (said, Run::finish(worker), vm)
}

fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skipped(test, &"it needs root, to become another user");
    }
    root
}

#[track_caller]
fn last(said: &[String]) -> &str {
    said.last().map_or("", String::as_str)
}

/// The worker of `serve`, as operators use it, is confined by default and runs as another user, and
/// VMs still survive its death.
#[test]
fn killed_confined_worker_is_replaced() {
    let all: [(&[&str], _); 3] = [
        (&[], "2"),
        (&["--user", "nobody"], "2"),
        (&["--no-confine"], "0"),
    ];
    for (options, filtered) in all {
        let mut scene = Scene::new(Shares::MIXED);
        scene.serve(&[&["--prefetch", "off"], options].concat());
        let mut vmm = scene
            .vmm(&["--wait", "--discard"])
            .spawn()
            .expect("cannot start a VMM");
        scene.wait_for("served", 1);
        let worker = scene.worker().expect("no worker runs");
        let status = fs::read_to_string(format!("/proc/{worker}/status"))
            .expect("cannot read the status of the worker");
        let expected = format!("\nSeccomp:\t{filtered}\n");
        assert!(status.contains(&expected), "{status}");
        kill(worker, Signal::SIGKILL).expect("cannot kill the process");
        drop(vmm.stdin.take());
        let run = Run::finish(vmm).exits(0);
        assert!(String::from_utf8_lossy(&run.out).ends_with("pages right\n"));
        assert_eq!(endings(&scene.stop()), ["exited"]);
    }
}

/// If no filter can be installed, nothing is served unless the operator opts out of confinement.
#[test]
fn missing_seccomp_is_named_with_its_remedy() {
    let mut scene = Scene::new(Shares::MIXED);
    let mut refused = scene.daemon(&[]);
    forbid_seccomp(&mut refused);
    let run = Run::to_end(&mut refused).exits(1);
    run.says(&[
        "cannot sandbox the worker",
        "--no-confine",
        "seccomp filter",
    ]);
    assert_eq!(run.err.matches("cannot sandbox").count(), 1, "{}", run.err);
    let mut served = scene.daemon(&["--no-confine"]);
    forbid_seccomp(&mut served);
    scene.start(served);
    let _ = Run::to_end(&mut scene.vmm(&[])).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

/// Nobody connects to a daemon that is about to fail.
#[test]
fn unknown_user_is_refused_before_serve_listens() {
    let scene = crate::scene::Scene::new(Shares::MIXED);
    let run = Run::to_end(&mut scene.daemon(&["--user", "nosuch"])).exits(1);
    run.says(&["no user nosuch"]);
    assert!(!run.err.contains("serving "), "{}", run.err);
}

/// Makes the call that installs filters fail in this program, by a filter.
fn forbid_seccomp(command: &mut Command) {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: u16::try_from(code).expect("code out of range"),
        jt,
        jf,
        k,
    };
    let call = u32::try_from(libc::SYS_seccomp).expect("number out of range");
    let eperm = u32::try_from(libc::EPERM).expect("number out of range");
    let filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | eperm,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        nix::sys::prctl::set_no_new_privs()?;
        snaprestore_uffd::os::sandbox::install_filter(&filter)
    };
    // SAFETY: the closure makes two system calls, and allocates nothing.
    unsafe { command.pre_exec(install) };
}

/// The daemon's user may control it, regardless of the user that its worker has become and of the
/// worker's allowed system calls.
#[test]
fn unprivileged_daemon_is_controlled_by_its_user() {
    if !is_root("unprivileged_daemon_is_controlled_by_its_user") {
        return;
    }
    let mut scene = Scene::new(Shares::ZERO);
    scene.share_folder(0o777);
    // A place where the user nobody may run it.
    let program = scene.path("program");
    fs::copy(snaprestore_tests::program::program(), &program).expect("cannot copy the program");
    let readable = fs::Permissions::from_mode(0o644);
    fs::set_permissions(&scene.snapshot, readable).expect("cannot change the setting");
    let control = scene.path("control");
    let as_nobody = |like: &Command| {
        let mut command = Command::new(&program);
        command.args(like.get_args()).current_dir("/");
        command.uid(65534).gid(65534);
        command
    };
    let options = ["--control", &control.display().to_string()];
    scene.start(as_nobody(&scene.daemon(&options)));
    let list = snaprestore(["ctl", "list", "--control"].map(OsStr::new));
    let mut list = as_nobody(&list);
    let _ = Run::to_end(list.arg(&control)).exits(0);
    let _ = scene.stop();
}

/// Each of three workers must know which huge pages are present, although none of them may open the
/// file with that information.
#[test]
fn huge_pages_survive_confined_workers_and_supervisors() {
    let test = "huge_pages_survive_confined_workers_and_supervisors";
    let _pool = match HugePool::with(crate::scene::PAGES / 512) {
        Ok(pool) => pool,
        Err(why) => return skipped(test, &why),
    };
    let mut scene = Scene::new(Shares::MIXED);
    let notify = scene.path("notify");
    let mut manager = FakeManager::at(&notify);
    let options = ["--prefetch", "off"];
    scene.start(manager.manages(scene.daemon(&options), 64));
    let huge = ["--huge", "--split", "3072", "--wait", "--discard"];
    let mut vmm = scene.vmm(&huge).spawn().expect("cannot start a VMM");
    scene.wait_for(": served", 1);
    kill(scene.worker().expect("no worker runs"), Signal::SIGKILL)
        .expect("cannot kill the process");
    scene.wait_for(": served", 2);
    // Two descriptors for the service: the snapshot's file and the socket. Five for the VM.
    while manager.names().len() < 7 {
        manager.take_one();
    }
    assert!(manager.names().contains(&"vm.vm-1.pagemap"));
    scene.kill();
    let next = manager.start(&scene.daemon(&options));
    scene.start(manager.manages(next, 64));
    scene.wait_for(": served", 1);
    drop(vmm.stdin.take());
    let run = Run::finish(vmm).exits(0);
    assert!(String::from_utf8_lossy(&run.out).ends_with("pages right\n"));
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

#[test]
fn confined_worker_serves_and_can_do_nothing_else() {
    let scene = scene(Shares::MIXED);
    for what in ["open", "socket", "connect", "fork", "kill", "pidfd", "stat"] {
        let (said, worker, vm) = serve_confined(&scene, &["--then", what]);
        let _ = vm.exits(0);
        assert_eq!(
            last(&said),
            format!("{what}: Some({})", libc::EPERM),
            "{}",
            worker.err
        );
        assert!(said.contains(&"0 failures".into()), "{said:?}");
    }
    for what in ["exec", "userfaultfd"] {
        let (said, worker, vm) = serve_confined(&scene, &["--then", what]);
        let _ = vm.exits(0);
        assert_eq!(worker.signal, Some(libc::SIGSYS), "{said:?}");
    }
}

#[test]
fn confined_worker_opens_only_its_readable_folders() {
    let test = "confined_worker_opens_only_its_readable_folders";
    let scene = scene(Shares::MIXED);
    let folder = scene.folder.path().display().to_string();
    let with = |what: &str| {
        let (said, worker, vm) = serve_confined(&scene, &["--readable", &folder, "--then", what]);
        let _ = vm.exits(0);
        assert!(said[0].starts_with("landlock "), "{said:?} {}", worker.err);
        (said[0] != "landlock 0", last(&said).to_owned())
    };
    assert_eq!(with("read").1, "read: done");
    assert_eq!(with("write").1, format!("write: Some({})", libc::EPERM));
    let (has_landlock, opened) = with("open");
    if !has_landlock {
        return skipped(test, &"the kernel has no Landlock");
    }
    assert_eq!(opened, format!("open: Some({})", libc::EACCES));
}

/// The VM runs as root, and is nevertheless killed when a page of it is damaged.
#[test]
fn worker_of_nobody_kills_vm_of_another_user() {
    let test = "worker_of_nobody_kills_vm_of_another_user";
    if !is_root(test) {
        return;
    }
    let scene = scene(Shares::RANDOM);
    let (said, worker, vm) = serve_confined(&scene, &["--user", "nobody", "--then", "kill"]);
    let _ = vm.exits(0);
    assert_eq!(
        last(&said),
        format!("kill: Some({})", libc::EPERM),
        "{}",
        worker.err
    );
    let mut bytes = fs::read(scene.path("snap")).expect("cannot read the file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(scene.path("snap"), bytes).expect("cannot write the file");
    let (said, worker, vm) = serve_confined(&scene, &["--user", "nobody"]);
    assert_eq!(vm.signal, Some(libc::SIGKILL), "{said:?} {}", worker.err);
    assert!(
        said.iter().any(|line| line.starts_with("ended: Killed(")),
        "{said:?}"
    );
}
