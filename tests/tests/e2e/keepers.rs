//! The keeper dies, and its worker with it: VMs go on with the next, or are ended, and never read what
//! is wrong.

use std::fs;
use std::io::{BufRead as _, BufReader, Lines};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::Run;

use crate::manager::FakeManager;
use crate::scene::{PATIENCE, Scene, end_of, endings, within};

/// A VMM that has given some memory back, keeps no descriptor, and touches nothing until its input ends.
fn vmm(scene: &Scene) -> (Child, Lines<BufReader<ChildStdout>>) {
    let options = ["--wait", "--let-go", "--discard", "--threads", "2"];
    let mut vmm = scene.vmm(&options).spawn().expect("a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("a pipe")).lines();
    let line = said.next().expect("a line").expect("read");
    assert_eq!(line, "handed over");
    (vmm, said)
}

#[test]
fn the_next_keeper_goes_on_with_what_systemd_has_held() {
    let mut scene = Scene::new(Shares::MIXED);
    let notify = scene.folder.path().join("notify");
    let mut manager = FakeManager::at(&notify);
    let options = ["--prefetch", "off"];
    scene.start(manager.manages(scene.daemon(&options), 64));
    let (mut vmm, _said) = vmm(&scene);
    // The snapshot's file, and the socket; of the VM four.
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

/// There is room for all of a VM but its tables, as there is in the end for some VM: it was taken for a reason to
/// give up, with all VMs.
#[test]
fn a_vm_for_which_the_store_has_no_room_is_served_all_the_same() {
    let mut scene = Scene::new(Shares::MIXED);
    let notify = scene.folder.path().join("notify");
    let mut manager = FakeManager::at(&notify);
    scene.start(manager.manages(scene.daemon(&["--prefetch", "off"]), 5));
    let vmm = scene.vmm(&["--discard", "--hold"]).spawn().expect("a VMM");
    scene.wait_for("can't be held with all that it needs, and is ended", 1);
    // The service's two and the VM's three; then those are let go but for the one by which a next keeper ends it.
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
fn without_systemd_a_guardian_ends_the_vms_of_a_killed_keeper() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--prefetch", "off"]);
    let (mut vmm, _said) = vmm(&scene);
    scene.kill();
    drop(vmm.stdin.take());
    let run = Run::finish(vmm);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
}

#[test]
fn a_keeper_killed_at_random_leaves_no_vm_with_a_wrong_byte() {
    let mut scene = Scene::new(Shares::MIXED);
    for round in 0..12 {
        scene.serve(&["--prefetch", "all"]);
        let options = ["--threads", "3", "--discard", "--let-go"];
        let vmm = scene.vmm(&options).spawn().expect("a VMM");
        // Before, it may be accepted, and in nobody else's hands for the time of three system calls.
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

/// Whether a guardian holds the process.
fn is_guarded(pid: u32) -> bool {
    let holds = |process: &Path| {
        let is_guardian =
            fs::read_to_string(process.join("comm")).is_ok_and(|name| name == "snap-guardian\n");
        let open = fs::read_dir(process.join("fdinfo")).into_iter().flatten();
        let mut infos = open.filter_map(|info| fs::read_to_string(info.ok()?.path()).ok());
        is_guardian && infos.any(|info| info.contains(&format!("Pid:\t{pid}\n")))
    };
    let mut processes = fs::read_dir("/proc").expect("processes");
    processes.any(|process| process.is_ok_and(|process| holds(&process.path())))
}

/// It has a descriptor of its memory, as Firecracker has, and so would wait at its first page.
#[test]
fn a_vm_that_is_handing_over_when_the_keeper_is_killed_is_ended() {
    let mut scene = Scene::new(Shares::MIXED);
    for part in ["nothing", "half"] {
        scene.serve(&["--patience", "3600"]);
        let vmm = scene.vmm(&["--send", part]).spawn().expect("a VMM");
        let held = within(PATIENCE, || is_guarded(vmm.id()));
        assert!(held, "nobody holds it");
        scene.kill();
        let run = end_of(vmm);
        assert_eq!(run.signal, Some(libc::SIGKILL), "{part}: {}", run.err);
    }
    // Who is refused is let go, and nobody ends it when the keeper dies.
    scene.serve(&["--patience", "1"]);
    let mut vmm = scene.vmm(&["--send", "half"]).spawn().expect("a VMM");
    scene.wait_for("refused", 1);
    scene.kill();
    let released = within(PATIENCE, || !is_guarded(vmm.id()));
    assert!(released, "it is still held");
    std::thread::sleep(Duration::from_millis(100));
    assert!(vmm.try_wait().expect("a child").is_none(), "it was ended");
    vmm.kill().expect("killed");
    vmm.wait().expect("its end");
}

/// A VMM that hands all over to a keeper which takes nothing any more.
fn queued(scene: &Scene) -> (Child, Lines<BufReader<ChildStdout>>) {
    kill(scene.keeper(), Signal::SIGSTOP).expect("stopped");
    let mut vmm = scene.vmm(&["--wait"]).spawn().expect("a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("a pipe")).lines();
    let line = said.next().expect("a line").expect("read");
    assert_eq!(line, "handed over");
    (vmm, said)
}

#[test]
fn a_vm_that_waits_to_be_accepted_when_the_keeper_is_killed_is_ended() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&[]);
    let (mut vmm, _said) = queued(&scene);
    // Who only looks whether somebody is there is not ended: it is this test.
    drop(UnixStream::connect(scene.socket()).expect("connected"));
    scene.kill();
    drop(vmm.stdin.take());
    let run = end_of(vmm);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    // Another can begin at once.
    scene.serve(&[]);
    let _ = Run::of(&mut scene.vmm(&[])).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

/// The first of them that was refused left those behind to be ended.
#[test]
fn a_daemon_that_is_asked_to_stop_serves_who_waits_behind_one_that_is_refused() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&[]);
    kill(scene.keeper(), Signal::SIGSTOP).expect("stopped");
    // One more than may be of one process.
    let connect = |_| UnixStream::connect(scene.socket()).expect("connected");
    let crowd: Vec<_> = (0..17).map(connect).collect();
    let (mut vmm, _said) = queued(&scene);
    kill(scene.keeper(), Signal::SIGTERM).expect("asked");
    kill(scene.keeper(), Signal::SIGCONT).expect("goes on");
    scene.wait_for("has 16 VMs already", 1);
    drop(crowd);
    drop(vmm.stdin.take());
    let run = end_of(vmm);
    assert_eq!(run.code, Some(0), "{}", scene.said());
    let vms = scene.ended();
    let served = endings(&vms).into_iter().filter(|how| *how == "exited");
    assert_eq!(served.count(), 1, "{vms:?}");
}

#[test]
fn the_next_keeper_serves_who_waits_and_ends_who_was_handing_over() {
    let mut scene = Scene::new(Shares::MIXED);
    let notify = scene.folder.path().join("notify");
    let mut manager = FakeManager::at(&notify);
    let options = ["--prefetch", "off", "--patience", "3600"];
    scene.start(manager.manages(scene.daemon(&options), 64));
    let half = scene.vmm(&["--send", "half"]).spawn().expect("a VMM");
    while !manager.names().contains(&"vm.vm-1.owner") {
        manager.take_one();
    }
    let (mut waits, _said) = queued(&scene);
    scene.kill();
    let next = manager.start(&scene.daemon(&options));
    scene.start(manager.manages(next, 64));
    let run = end_of(half);
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    scene.wait_for("killed: it was handing its memory over when", 1);
    while !manager.names().contains(&"vm.vm-2.tables") {
        manager.take_one();
    }
    drop(waits.stdin.take());
    let _ = end_of(waits).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited", "killed"]);
    // Neither of them is held any more, nor the socket.
    let is_file = |name: &&str| name.starts_with("vm.file-");
    while !manager.names().iter().all(is_file) {
        manager.take_one();
    }
    assert_eq!(manager.names().len(), 1);
}
