//! `snaprestore serve`, with VMMs that are processes of their own.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::huge_pool::HugePool;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};
use snaprestore_uffd::uffd::{Features, OpenOptions};

use crate::scene::{PAGES, Scene, end_of, endings};

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
fn vms_with_huge_pages_are_served() {
    let _pool = match HugePool::with(2 * PAGES / 512) {
        Ok(pool) => pool,
        Err(why) => return skipped("vms_with_huge_pages_are_served", &why),
    };
    let mut scene = Scene::new(Shares::MIXED);
    for prefetch in ["off", "all"] {
        scene.serve(&["--prefetch", prefetch]);
        let options: [&[&str]; 2] = [
            &["--huge", "--split", "3072", "--threads", "3"],
            &["--huge", "--discard"],
        ];
        let vmms: Vec<Child> = options
            .iter()
            .map(|options| scene.vmm(options).spawn().expect("a VMM"))
            .collect();
        for vmm in vmms {
            let run = Run::finish(vmm).exits(0);
            assert_eq!(run.out, format!("{PAGES} pages right\n").as_bytes());
        }
        assert_eq!(endings(&scene.stop()), ["exited"; 2]);
    }
    // The field that v1.7 calls KiB is in bytes.
    scene.serve(&[]);
    let _ = Run::of(&mut scene.vmm(&["--manner", "v1.7", "--huge"])).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

#[test]
fn asked_to_stop_the_daemon_completes_its_vms_and_they_go_on() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--prefetch", "off"]);
    // It has touched nothing when the daemon exits.
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
    // The message names the file, the page and the place.
    scene.wait_for(&format!("killed: {}: page ", scene.snapshot.display()), 1);
    assert!(scene.said().contains("at offset"), "{}", scene.said());
    assert_eq!(endings(&scene.stop()), ["exited", "killed"]);
    // Logged once, however many threads have noticed it.
    let said = scene.said();
    let lines = said
        .lines()
        .filter(|line| line.contains("page ") && line.contains("offset"));
    assert_eq!(lines.count(), 1, "{said}");
}

/// An option for owners that are not VMs. The daemon's log is in the format for programs.
#[test]
fn an_owner_whose_page_is_damaged_gets_sigbus_if_that_is_wanted() {
    let test = "an_owner_whose_page_is_damaged_gets_sigbus_if_that_is_wanted";
    if let Err(error) = OpenOptions::new().required(Features::POISON).open() {
        return skipped(test, &error);
    }
    let mut scene = Scene::new(Shares::RANDOM);
    damage(&scene.snapshot);
    let options = ["--on-error", "poison", "--log-format", "json"];
    scene.serve(&[&options[..], &["--prefetch", "off"]].concat());
    let run = Run::of(&mut scene.vmm(&["--threads", "2"]));
    assert_eq!(run.signal, Some(libc::SIGBUS), "{}", scene.said());
    let vms = scene.stop();
    assert_eq!(endings(&vms), ["exited"], "{}", scene.said());
    let (id, pid) = (&vms[0]["id"], &vms[0]["pid"]);
    let mut of_vm = Vec::new();
    for line in scene.said().lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        let fields = &line["fields"];
        if fields["vm"].is_null() {
            let message = fields["message"].as_str().expect("a message");
            assert!(
                !message.contains("VM") && !message.contains("page"),
                "{line}"
            );
            continue;
        }
        let of = (&fields["vm"], &fields["pid"], &fields["service"]);
        assert_eq!(of, (id, pid, &"default".into()), "{line}");
        of_vm.push(fields["message"].as_str().expect("a message").to_owned());
    }
    // Messages from the supervisor, from a thread of the engine, and at the end.
    for part in ["served", "cannot restore a page", "exited"] {
        let has = of_vm.iter().any(|message| message.starts_with(part));
        assert!(has, "no {part:?} in {of_vm:?}");
    }
}

/// The daemon has to kill the VM that it should have completed, because a page of it is damaged.
#[test]
fn daemon_that_cannot_complete_a_vm_exits_with_1() {
    let mut scene = Scene::new(Shares::RANDOM);
    scene.serve(&["--prefetch", "off"]);
    let vmm = scene.vmm(&["--wait"]).spawn().expect("a VMM");
    scene.wait_for(": served", 1);
    damage(&scene.snapshot);
    kill(scene.supervisor(), Signal::SIGTERM).expect("asked");
    let report = scene.exits(1);
    assert_eq!(report["incomplete"], 1, "{report}");
    assert_eq!(report["vms"][0]["ending"], "killed", "{report}");
    assert_eq!(end_of(vmm).signal, Some(libc::SIGKILL));
    // A VM that was killed before does not count.
    scene.serve(&["--prefetch", "off"]);
    let run = Run::of(&mut scene.vmm(&[]));
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    scene.wait_for("killed: ", 1);
    assert_eq!(endings(&scene.stop()), ["killed"]);
}

#[test]
fn socket_has_the_mode_and_group_that_are_asked_for() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let mut scene = Scene::new(Shares::ZERO);
    let own = nix::unistd::getegid().as_raw();
    let group = if nix::unistd::geteuid().is_root() {
        65534
    } else {
        own
    };
    let options = ["--socket-mode", "0664", "--socket-group"];
    scene.serve(&[&options[..], &[&group.to_string()]].concat());
    let socket = fs::metadata(scene.socket()).expect("a socket");
    assert_eq!(socket.permissions().mode() & 0o7777, 0o664);
    assert_eq!(socket.gid(), group);
    let _ = Run::of(&mut scene.vmm(&[])).exits(0);
    let _ = scene.stop();
    let run = Run::of(&mut scene.daemon(&["--socket-group", "no-such-group"])).exits(1);
    run.says(&["there is no group \"no-such-group\""]);
    assert!(!scene.socket().exists(), "the socket is left");
    let _ = Run::of(&mut scene.daemon(&["--socket-mode", "0x1"])).exits(2);
}

/// Half of the memory gets its pages from the pool, and the rest doesn't.
#[test]
fn empty_huge_page_pool_is_named_by_those_who_need_it() {
    let test = "empty_huge_page_pool_is_named_by_those_who_need_it";
    let pool = match HugePool::with(PAGES / 512 / 2) {
        Ok(pool) => pool,
        Err(why) => return skipped(test, &why),
    };
    let huge_pages = pool.free() + 4;
    let mut scene = Scene::of(huge_pages * 512, Shares::MIXED);
    let control = scene.folder.path().join("control");
    let control = control.display().to_string();
    scene.serve(&["--prefetch", "off", "--control", &control]);
    let mut vmm = scene.vmm(&["--huge", "--wait"]).spawn().expect("a VMM");
    scene.wait_for(": served", 1);
    let ctl = |args: &[&str]| {
        let mut ctl = snaprestore([&["ctl", "--control", &control], args].concat());
        Run::of(&mut ctl)
    };
    let run = ctl(&["complete", "1"]).exits(1);
    let said = String::from_utf8_lossy(&run.out).into_owned();
    for part in ["hugepages-2048kB", "0 of ", "vm.nr_hugepages"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let stats = ctl(&["stats", "1", "--json"]).exits(0).json();
    let shortages = &stats["vms"][0]["shortages"];
    assert!(shortages["hugepages-2048kB"].as_u64() > Some(0), "{stats}");
    assert_eq!(shortages["memory"], 0, "{stats}");
    let said = String::from_utf8_lossy(&ctl(&["stats", "1"]).exits(0).out).into_owned();
    assert!(said.contains("shortage    pool hugepages-2048kB"), "{said}");
    // Logged once, however often it was tried.
    let logged = scene.said();
    let shortages = logged.matches("cannot install pages: no free page in the pool");
    assert_eq!(shortages.count(), 1, "{logged}");
    // Its pages return to the pool before the pool is as it was.
    vmm.kill().expect("killed");
    vmm.wait().expect("its end");
    let _ = scene.stop();
}

/// Flips a bit in the middle of the file, which is full of frames in a snapshot of random pages.
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
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--handshake-timeout", "1"]);
    // One peer sends nothing, one something else, one disconnects. They are separate processes,
    // because the daemon might kill its peer.
    let peer = |words: &[&str]| {
        let mut peer = Command::new(env!("CARGO_BIN_EXE_lying-vmm"));
        peer.arg(scene.socket()).arg(scene.raw()).args(words);
        peer.stdout(Stdio::null()).spawn().expect("a peer")
    };
    let mut peers = [
        peer(&["Nothing", "None", "seconds=600"]),
        peer(&["Noise", "None", "seconds=600"]),
        peer(&["Nothing", "None", "HangsUp", "seconds=600"]),
    ];
    let short = scene.folder.path().join("short");
    fs::write(&short, vec![0; 4096 * 10]).expect("written");
    let mut misfit = scene.vmm_of(&short, &[]).spawn().expect("a VMM");
    let _ = Run::of(&mut scene.vmm(&[])).exits(0);
    for part in [
        "other than Firecracker's region list",
        "then nothing for 1s",
        "after 0 bytes",
        "the snapshot of another VM",
    ] {
        scene.wait_for(part, 1);
    }
    for peer in &mut peers {
        peer.kill().expect("killed");
        peer.wait().expect("its end");
    }
    assert_eq!(
        endings(&scene.stop()),
        ["exited", "refused", "refused", "refused", "refused"]
    );
    // No process serves it, so its owner has to kill it.
    misfit.kill().expect("killed");
    misfit.wait().expect("its end");
}

/// Covers two failures that the fake VMM can't show: KVM reads the memory by itself, and does so
/// before the first instruction.
#[test]
fn a_guest_on_kvm_is_served_and_one_with_a_bad_page_is_ended() {
    let test = "a_guest_on_kvm_is_served_and_one_with_a_bad_page_is_ended";
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return skipped(test, &format!("/dev/kvm: {error}"));
    }
    let mut scene = Scene::new(Shares::ZERO);
    fs::remove_file(&scene.snapshot).expect("removed");
    let microvm = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_microvm"));
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
