//! The supervisor dies, and its worker with it: the next one serves the VMs, or they are killed,
//! and they never read wrong memory.

use std::fs;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};

use crate::manager::FakeManager;
use crate::scene::{HANG_TIMEOUT, Scene, end_of, endings, within};

/// Starts a VMM that has given some memory back, keeps no descriptor, and touches nothing until its
/// input is closed.
fn vmm(scene: &Scene) -> (Child, Lines<BufReader<ChildStdout>>) {
    let options = ["--wait", "--let-go", "--discard", "--threads", "2"];
    let mut vmm = scene.vmm(&options).spawn().expect("cannot start a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("no pipe to the child")).lines();
    let line = said
        .next()
        .expect("no line was written")
        .expect("cannot read the file");
    assert_eq!(line, "handed over");
    (vmm, said)
}

#[test]
fn next_supervisor_serves_vms_stored_by_systemd() {
    let mut scene = Scene::new(Shares::MIXED);
    let notify = scene.folder.path().join("notify");
    let mut manager = FakeManager::at(&notify);
    let options = ["--prefetch", "off"];
    scene.start(manager.manages(scene.daemon(&options), 64));
    let (mut vmm, _said) = vmm(&scene);
    // Two descriptors for the service: the snapshot's file and the socket. Four for the VM.
    while manager.names().len() < 6 {
        manager.take_one();
    }
    scene.kill();
    drop(vmm.stdin.take());

    let next = manager.start(&scene.daemon(&options));
    scene.start(manager.manages(next, 64));
    scene.wait_for("taken back", 1);
    let run = Run::finish(vmm).exits(0);
    assert_eq!(run.err, "");
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

/// The store has room for everything of a VM except its tables, as happens to some VM sooner or
/// later. Regression: the daemon took this as a reason to give up all its VMs.
#[test]
fn vm_without_room_in_store_is_served() {
    let mut scene = Scene::new(Shares::MIXED);
    let notify = scene.folder.path().join("notify");
    let mut manager = FakeManager::at(&notify);
    scene.start(manager.manages(scene.daemon(&["--prefetch", "off"]), 5));
    let vmm = scene
        .vmm(&["--discard", "--hold"])
        .spawn()
        .expect("cannot start a VMM");
    scene.wait_for("cannot store all of its descriptors; it is killed", 1);
    // The service's two and the VM's three. The VM's are then removed, except for the one by which
    // a next supervisor kills it.
    while manager.names().len() < 5 {
        manager.take_one();
    }
    while manager.names()[2..] != ["vm.vm-1.owner"] {
        manager.take_one();
    }
    let _ = Run::finish(vmm).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

#[test]
fn guardian_kills_vms_of_killed_supervisor() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--prefetch", "off"]);
    let (mut vmm, _said) = vmm(&scene);
    scene.kill();
    drop(vmm.stdin.take());
    let run = Run::finish(vmm);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
}

#[test]
fn supervisor_killed_at_random_leaves_no_wrong_byte() {
    let mut scene = Scene::new(Shares::MIXED);
    for round in 0..12 {
        scene.serve(&["--prefetch", "all"]);
        let options = ["--threads", "3", "--discard", "--let-go"];
        let vmm = scene.vmm(&options).spawn().expect("cannot start a VMM");
        // Until then it may be accepted without being held by any other process, for the duration
        // of three system calls.
        scene.wait_for("served", 1);
        std::thread::sleep(Duration::from_millis(round * 3));
        scene.kill();
        let run = Run::finish(vmm);
        let ended = run.signal == Some(libc::SIGKILL);
        let said = String::from_utf8_lossy(&run.out).into_owned();
        assert!(ended || run.code == Some(0), "{round}: {said}");
        assert!(!said.contains("wrong"), "{round}: {said}");
    }
}

/// Returns whether a guardian holds the process.
fn is_guarded(pid: u32) -> bool {
    let holds = |process: &Path| {
        let is_guardian =
            fs::read_to_string(process.join("comm")).is_ok_and(|name| name == "snap-guardian\n");
        let open = fs::read_dir(process.join("fdinfo")).into_iter().flatten();
        let mut infos = open.filter_map(|info| fs::read_to_string(info.ok()?.path()).ok());
        is_guardian && infos.any(|info| info.contains(&format!("Pid:\t{pid}\n")))
    };
    let mut processes = fs::read_dir("/proc").expect("cannot list the processes");
    processes.any(|process| process.is_ok_and(|process| holds(&process.path())))
}

/// The VM has a descriptor of its memory, as Firecracker has, and so would wait at its first page.
#[test]
fn vm_in_handshake_dies_with_its_supervisor() {
    let mut scene = Scene::new(Shares::MIXED);
    for part in ["nothing", "half"] {
        scene.serve(&["--handshake-timeout", "3600"]);
        let vmm = scene
            .vmm(&["--send", part])
            .spawn()
            .expect("cannot start a VMM");
        let held = within(HANG_TIMEOUT, || is_guarded(vmm.id()));
        assert!(held, "nobody holds it");
        scene.kill();
        let run = end_of(vmm);
        assert_eq!(run.signal, Some(libc::SIGKILL), "{part}: {}", run.err);
    }
    // A refused VM is released, and nobody kills it when the supervisor dies.
    scene.start(scene.marked(&["--handshake-timeout", "1"]));
    let guardian = scene.guardian().expect("no guardian runs");
    let mut vmm = scene
        .vmm(&["--send", "half"])
        .spawn()
        .expect("cannot start a VMM");
    scene.wait_for("refused", 1);
    scene.kill();
    wait_for_end(guardian);
    assert!(
        vmm.try_wait().expect("cannot query the child").is_none(),
        "it was ended"
    );
    vmm.kill().expect("cannot kill the process");
    vmm.wait().expect("cannot wait for the process");
}

/// Waits until a guardian has finished its work.
fn wait_for_end(guardian: Pid) {
    let runs = || {
        let stat = fs::read_to_string(format!("/proc/{guardian}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    assert!(
        within(HANG_TIMEOUT, || !runs()),
        "the guardian does not end"
    );
}

/// Starts a VMM that hands its memory over to a supervisor that no longer accepts anything.
fn queued(scene: &Scene) -> (Child, Lines<BufReader<ChildStdout>>) {
    kill(scene.supervisor(), Signal::SIGSTOP).expect("cannot stop the process");
    let mut vmm = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("no pipe to the child")).lines();
    let line = said
        .next()
        .expect("no line was written")
        .expect("cannot read the file");
    assert_eq!(line, "handed over");
    (vmm, said)
}

#[test]
fn vm_in_backlog_dies_with_its_supervisor() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&[]);
    let (mut vmm, _said) = queued(&scene);
    scene.kill();
    drop(vmm.stdin.take());
    let run = end_of(vmm);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    // Another daemon can start at once.
    scene.serve(&[]);
    let _ = Run::to_end(&mut scene.vmm(&[])).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

/// Returns the number of sockets that a process has open.
fn open_sockets(pid: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("process exited unexpectedly");
    let links = open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    let is_socket = |link: &std::path::PathBuf| link.to_string_lossy().starts_with("socket:");
    links.filter(is_socket).count()
}

/// The guardian has no access to the socket except for the copy that its supervisor sent.
#[test]
fn second_guardian_kills_vms_that_wait_to_be_accepted() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.start(scene.marked(&[]));
    let first = scene.guardian().expect("no guardian runs");
    kill(first, Signal::SIGKILL).expect("cannot kill the process");
    // Logged once everything is stored again.
    scene.wait_for("the guardian exited", 1);
    let second = scene.guardian().expect("no other guardian runs");
    assert_ne!(first, second);
    let (mut vmm, _said) = queued(&scene);
    scene.kill();
    drop(vmm.stdin.take());
    let run = end_of(vmm);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    wait_for_end(second);
}

/// A stopped guardian receives all messages when it is resumed: it kills no VM that it was told to
/// release.
#[test]
fn release_for_stopped_guardian_is_not_lost() {
    let mut scene = Scene::with_pages(16, Shares::MIXED);
    let control = scene.folder.path().join("control");
    let control = control.display().to_string();
    scene.start(scene.marked(&["--prefetch", "off", "--control", &control]));
    let guardian = scene.guardian().expect("no guardian runs");
    let (mut vmm, _said) = vmm(&scene);
    scene.wait_for(": served", 1);
    assert!(
        within(HANG_TIMEOUT, || is_guarded(vmm.id())),
        "nobody holds it"
    );
    kill(guardian, Signal::SIGSTOP).expect("cannot stop the process");
    // Each VM is held twice and released, until nothing more fits into the guardian's socket.
    while !scene.said().contains("messages are queued") {
        let _ = Run::to_end(&mut scene.vmm(&[])).exits(0);
    }
    let complete = ["ctl", "complete", "1", "--control", &control];
    let _ = Run::to_end(&mut snaprestore(complete)).exits(0);
    kill(guardian, Signal::SIGCONT).expect("cannot continue the process");
    scene.wait_for("has read all queued messages", 1);
    scene.kill();
    wait_for_end(guardian);
    assert!(
        vmm.try_wait().expect("cannot query the child").is_none(),
        "it was killed"
    );
    drop(vmm.stdin.take());
    let _ = end_of(vmm).exits(0);
}

/// A VMM has connected and was accepted before the daemon is asked to stop, and hands its memory
/// over afterwards.
#[test]
fn vm_that_hands_over_during_a_drain_is_completed() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--prefetch", "off"]);
    let mut vmm = scene
        .vmm(&["--send", "late", "--wait"])
        .spawn()
        .expect("cannot start a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("no pipe to the child")).lines();
    assert_eq!(
        said.next()
            .expect("no line was written")
            .expect("cannot read the file"),
        "half sent"
    );
    assert!(
        within(HANG_TIMEOUT, || is_guarded(vmm.id())),
        "nobody holds it"
    );
    kill(scene.supervisor(), Signal::SIGTERM).expect("cannot reach the process");
    let is_draining = || !scene.socket().exists();
    assert!(within(HANG_TIMEOUT, is_draining), "it goes on listening");
    let mut stdin = vmm.stdin.take().expect("no pipe to the child");
    writeln!(stdin).expect("cannot reach the daemon");
    let vms = scene.ended();
    assert_eq!(vms[0]["ending"], "complete", "{vms:?}");
    drop(stdin);
    let _ = end_of(vmm).exits(0);
}

/// The folder of a scene, a copy of the VMM in it, and the user nobody, who may use both.
struct Nobody(std::path::PathBuf);

impl Nobody {
    fn new(test: &str, scene: &Scene) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            skipped(test, &"it needs root, to have a VM of another user");
            return None;
        }
        let folder = scene.folder.path();
        let everybody = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
                .expect("cannot change the setting");
        };
        everybody(folder, 0o755);
        everybody(scene.raw(), 0o644);
        everybody(&scene.socket(), 0o666);
        let program = folder.join("vmm");
        fs::copy(env!("CARGO_BIN_EXE_fake-vmm"), &program).expect("cannot copy the program");
        Some(Self(program))
    }

    /// Returns the same VMM command, run as this user.
    fn vmm(&self, like: &Command) -> Command {
        let mut command = Command::new(&self.0);
        command.args(like.get_args()).current_dir("/");
        command.uid(65534).gid(65534);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        command
    }
}

#[test]
fn users_not_in_allow_uid_are_refused() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--allow-uid", "65534"]);
    let test = "users_not_in_allow_uid_are_refused";
    let Some(nobody) = Nobody::new(test, &scene) else {
        return;
    };
    let mut refused = scene.vmm(&[]).spawn().expect("cannot start a VMM");
    scene.wait_for("refused: its user 0 is not in --allow-uid", 1);
    let _ = Run::to_end(&mut nobody.vmm(&scene.vmm(&[]))).exits(0);
    refused.kill().expect("cannot kill the process");
    refused.wait().expect("cannot wait for the process");
    assert_eq!(endings(&scene.stop()), ["exited"]);
    // The same check with the roles of the users exchanged.
    scene.serve(&["--allow-uid", "0"]);
    fs::set_permissions(scene.socket(), fs::Permissions::from_mode(0o666))
        .expect("cannot change the setting");
    let mut refused = nobody
        .vmm(&scene.vmm(&[]))
        .spawn()
        .expect("cannot start a VMM");
    scene.wait_for("refused: its user 65534 is not in --allow-uid", 1);
    let _ = Run::to_end(&mut scene.vmm(&[])).exits(0);
    refused.kill().expect("cannot kill the process");
    refused.wait().expect("cannot wait for the process");
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

#[test]
fn backlog_peers_of_other_users_are_not_killed() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.start(scene.marked(&["--allow-uid", "65534"]));
    let guardian = scene.guardian().expect("no guardian runs");
    let test = "backlog_peers_of_other_users_are_not_killed";
    let Some(nobody) = Nobody::new(test, &scene) else {
        return;
    };
    let (mut stranger, _said) = queued(&scene);
    let mut vmm = nobody
        .vmm(&scene.vmm(&["--wait"]))
        .spawn()
        .expect("cannot start a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("no pipe to the child")).lines();
    assert_eq!(
        said.next()
            .expect("no line was written")
            .expect("cannot read the file"),
        "handed over"
    );
    scene.kill();
    let run = end_of(vmm);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    wait_for_end(guardian);
    assert!(
        stranger
            .try_wait()
            .expect("cannot query the child")
            .is_none(),
        "it was killed"
    );
    stranger.kill().expect("cannot kill the process");
    stranger.wait().expect("cannot wait for the process");
}

/// The daemon is in a PID namespace of its own, as in a container, and the VMM is outside.
#[test]
fn vmm_of_another_pid_namespace_is_refused_with_the_remedy() {
    let test = "vmm_of_another_pid_namespace_is_refused_with_the_remedy";
    let within_namespace = |inner: &Command| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--"]);
        command.arg(inner.get_program()).args(inner.get_args());
        command
    };
    match within_namespace(&Command::new("true")).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => return skipped(test, &String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => return skipped(test, &format!("unshare: {error}")),
    }
    let mut scene = Scene::new(Shares::MIXED);
    scene.start(within_namespace(&scene.daemon(&[])));
    let mut vmm = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    scene.wait_for("is in a PID namespace that this one can't see", 1);
    scene.wait_for("--pid=host", 1);
    // It may have exited by itself: its connection may be closed before it has sent its memory.
    let ended = vmm.try_wait().expect("cannot query the child");
    let signal = ended.and_then(|status| status.signal());
    assert_eq!(signal, None, "it was killed");
    vmm.kill().expect("cannot kill the process");
    vmm.wait().expect("cannot wait for the process");
}

/// Regression: after the first refused VM, those that waited behind it were killed.
#[test]
fn stopping_daemon_serves_vm_behind_refused_peer() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&[]);
    kill(scene.supervisor(), Signal::SIGSTOP).expect("cannot stop the process");
    // One more than is allowed per process. It is a separate process, because the daemon might kill
    // it.
    let mut crowd = Command::new(env!("CARGO_BIN_EXE_lying-vmm"));
    let crowd = crowd.arg(scene.socket()).arg(scene.raw());
    let crowd = crowd.args(["Nothing", "None", "times=17", "seconds=600"]);
    let mut crowd = crowd
        .stdout(Stdio::null())
        .spawn()
        .expect("cannot start the crowd");
    let connected = || open_sockets(crowd.id()) == 17;
    assert!(
        within(HANG_TIMEOUT, connected),
        "the crowd does not connect"
    );
    let (mut vmm, _said) = queued(&scene);
    kill(scene.supervisor(), Signal::SIGTERM).expect("cannot reach the process");
    kill(scene.supervisor(), Signal::SIGCONT).expect("cannot continue the process");
    scene.wait_for("already has 16 VMs", 1);
    crowd.kill().expect("cannot kill the process");
    crowd.wait().expect("cannot wait for the process");
    drop(vmm.stdin.take());
    let run = end_of(vmm);
    assert_eq!(run.code, Some(0), "{}", scene.said());
    let vms = scene.ended();
    let served = endings(&vms).into_iter().filter(|how| *how == "exited");
    assert_eq!(served.count(), 1, "{vms:?}");
}

#[test]
fn next_supervisor_serves_backlog_and_kills_handshakes() {
    let mut scene = Scene::new(Shares::MIXED);
    let notify = scene.folder.path().join("notify");
    let mut manager = FakeManager::at(&notify);
    let options = ["--prefetch", "off", "--handshake-timeout", "3600"];
    scene.start(manager.manages(scene.daemon(&options), 64));
    let half = scene
        .vmm(&["--send", "half"])
        .spawn()
        .expect("cannot start a VMM");
    while !manager.names().contains(&"vm.vm-1.owner") {
        manager.take_one();
    }
    let (mut waits, _said) = queued(&scene);
    scene.kill();
    let next = manager.start(&scene.daemon(&options));
    scene.start(manager.manages(next, 64));
    let run = end_of(half);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    scene.wait_for(
        "killed: the previous supervisor died during its handshake",
        1,
    );
    while !manager.names().contains(&"vm.vm-2.tables") {
        manager.take_one();
    }
    drop(waits.stdin.take());
    let _ = end_of(waits).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited", "killed"]);
    // Neither of them is stored any more, nor is the socket.
    let is_file = |name: &&str| name.starts_with("vm.file-");
    while !manager.names().iter().all(is_file) {
        manager.take_one();
    }
    assert_eq!(manager.names().len(), 1);
}
