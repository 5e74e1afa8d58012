//! The keeper dies, and its worker with it: VMs go on with the next, or are ended, and never read what
//! is wrong.

use std::io::{BufRead as _, BufReader, Lines};
use std::process::{Child, ChildStdout};
use std::time::Duration;

use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::Run;

use crate::manager::FakeManager;
use crate::scene::{Scene, endings};

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
    let with_it = |mut command: std::process::Command| {
        command.env("NOTIFY_SOCKET", &notify).env("FDSTORE", "64");
        command
    };
    let options = ["--prefetch", "off"];
    scene.start(with_it(scene.daemon(&options)));
    let (mut vmm, _said) = vmm(&scene);
    // The snapshot's file; of the VM four.
    while manager.names().len() < 5 {
        manager.take_one();
    }
    scene.kill();
    drop(vmm.stdin.take());

    let next = manager.start(&scene.daemon(&options));
    scene.start(with_it(next));
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
    let mut daemon = scene.daemon(&["--prefetch", "off"]);
    daemon.env("NOTIFY_SOCKET", &notify).env("FDSTORE", "4");
    scene.start(daemon);
    let vmm = scene.vmm(&["--discard"]).spawn().expect("a VMM");
    scene.wait_for("is held by nobody else", 1);
    let _ = Run::finish(vmm).exits(0);
    // The snapshot's file, that it is ready, the VM's three, and those let go.
    for _ in 0..8 {
        manager.take_one();
    }
    let held = manager.names();
    assert!(
        held.len() == 1 && held[0].ends_with(".snapshot"),
        "{held:?}"
    );
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
        // Before, its memory may be on its way to the keeper, and in nobody else's hands.
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
