//! `snaprestore serve`, with VMMs that are processes of their own.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::huge_pool::HugePool;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};
use snaprestore_uffd::uffd::{Features, OpenOptions};

use crate::scene::{HANG_TIMEOUT, PAGES, Scene, end_of, endings, ends_within, within};

#[test]
fn vms_of_every_release_are_served() {
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
        let _ = Run::to_end(&mut scene.vmm(options)).exits(0);
    }
    let at_once: Vec<Child> = options
        .iter()
        .map(|options| scene.vmm(options).spawn().expect("cannot start a VMM"))
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
            .map(|options| scene.vmm(options).spawn().expect("cannot start a VMM"))
            .collect();
        for vmm in vmms {
            let run = Run::finish(vmm).exits(0);
            assert_eq!(run.out, format!("{PAGES} pages right\n").as_bytes());
        }
        assert_eq!(endings(&scene.stop()), ["exited"; 2]);
    }
    // The field that v1.7 calls KiB is in bytes.
    scene.serve(&[]);
    let _ = Run::to_end(&mut scene.vmm(&["--manner", "v1.7", "--huge"])).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

#[test]
fn stopping_daemon_completes_its_vms() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--prefetch", "off"]);
    // It has touched nothing when the daemon exits.
    let mut vmm = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("no pipe to the child")).lines();
    assert_eq!(
        said.next()
            .expect("no line was written")
            .expect("output is not UTF-8"),
        "handed over"
    );
    scene.wait_for(": served", 1);
    let vms = scene.stop();
    assert_eq!(vms.len(), 1);
    assert_eq!(vms[0]["ending"], "complete");
    assert_eq!(vms[0]["faults"], 0);
    drop(vmm.stdin.take());
    assert!(vmm.wait().expect("cannot wait for the process").success());
    assert_eq!(
        said.next()
            .expect("no line was written")
            .expect("output is not UTF-8"),
        format!("{PAGES} pages right")
    );
}

#[test]
fn vm_with_damaged_page_is_killed_alone() {
    let mut scene = Scene::new(Shares::RANDOM);
    scene.serve(&["--prefetch", "off"]);
    let mut good = scene.vmm(&["--hold"]).spawn().expect("cannot start a VMM");
    let mut said = BufReader::new(good.stdout.take().expect("no pipe to the child")).lines();
    assert_eq!(
        said.next()
            .expect("no line was written")
            .expect("output is not UTF-8"),
        "right so far"
    );
    damage(&scene.snapshot);
    let bad = Run::to_end(&mut scene.vmm(&["--threads", "2"]));
    assert_eq!(bad.signal, Some(libc::SIGKILL), "{}", bad.err);
    drop(good.stdin.take());
    assert!(good.wait().expect("cannot wait for the process").success());
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
fn damaged_page_is_poisoned_if_asked_for() {
    let test = "damaged_page_is_poisoned_if_asked_for";
    if let Err(error) = OpenOptions::new().required(Features::POISON).open() {
        return skipped(test, &error);
    }
    let mut scene = Scene::new(Shares::RANDOM);
    damage(&scene.snapshot);
    let options = ["--on-error", "poison", "--log-format", "json"];
    scene.serve(&[&options[..], &["--prefetch", "off"]].concat());
    let run = Run::to_end(&mut scene.vmm(&["--threads", "2"]));
    assert_eq!(run.signal, Some(libc::SIGBUS), "{}", scene.said());
    let vms = scene.stop();
    assert_eq!(endings(&vms), ["exited"], "{}", scene.said());
    let (id, pid) = (&vms[0]["id"], &vms[0]["pid"]);
    let mut of_vm = Vec::new();
    for line in scene.said().lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        let fields = &line["fields"];
        if fields["vm"].is_null() {
            let message = fields["message"].as_str().expect("no message arrived");
            assert!(
                !message.contains("VM") && !message.contains("page"),
                "{line}"
            );
            continue;
        }
        let of = (&fields["vm"], &fields["pid"], &fields["service"]);
        assert_eq!(of, (id, pid, &"default".into()), "{line}");
        of_vm.push(
            fields["message"]
                .as_str()
                .expect("no message arrived")
                .to_owned(),
        );
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
    let vmm = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    scene.wait_for(": served", 1);
    damage(&scene.snapshot);
    kill(scene.supervisor(), Signal::SIGTERM).expect("cannot reach the process");
    let report = scene.exits(1);
    assert_eq!(report["incomplete"], 1, "{report}");
    assert_eq!(report["vms"][0]["ending"], "killed", "{report}");
    assert_eq!(end_of(vmm).signal, Some(libc::SIGKILL));
    // A VM that was killed before does not count.
    scene.serve(&["--prefetch", "off"]);
    let run = Run::to_end(&mut scene.vmm(&[]));
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    scene.wait_for("killed: ", 1);
    assert_eq!(endings(&scene.stop()), ["killed"]);
}

/// The tables of a session and the description of a VM are memory files, which have the limit of
/// other files.
#[test]
fn file_size_limit_costs_vms_and_not_workers() {
    let mut scene = Scene::new(Shares::MIXED);
    let mut limited = scene.daemon(&[]);
    limit_file_size(&mut limited);
    scene.start(limited);
    let run = end_of(scene.vmm(&[]).spawn().expect("cannot start a VMM"));
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    scene.wait_for("File too large", 1);
    kill(scene.supervisor(), Signal::SIGTERM).expect("daemon exited unexpectedly");
    let report = scene.exits(0);
    assert_eq!(report["vms"][0]["ending"], "refused", "{report}");
    assert_eq!(report["worker_restarts"], 0, "{report}");
}

fn limit_file_size(command: &mut Command) {
    let limit = || Ok(setrlimit(Resource::RLIMIT_FSIZE, 4096, 4096)?);
    // SAFETY: the closure makes one system call, and allocates nothing.
    unsafe { command.pre_exec(limit) };
}

/// A program that knows nothing of the signal: the daemon inside blocks it.
#[test]
fn file_size_limit_costs_a_launcher_only_vms() {
    let scene = Scene::new(Shares::MIXED);
    let mut launcher = launcher(&scene);
    limit_file_size(&mut launcher);
    let launcher = start_launcher(&scene, launcher);
    let run = end_of(scene.vmm(&[]).spawn().expect("cannot start a VMM"));
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    let run = stop_launcher(launcher);
    run.says(&["refused: ", "File too large"]);
    assert!(!run.err.contains("started a new one"), "{}", run.err);
}

/// Returns the command of a program that has the supervisor inside.
fn launcher(scene: &Scene) -> Command {
    let mut launcher = Command::new(env!("CARGO_BIN_EXE_launcher"));
    launcher.arg(&scene.snapshot).arg(scene.socket());
    for variable in ["NOTIFY_SOCKET", "FDSTORE", "LISTEN_FDS"] {
        launcher.env_remove(variable);
    }
    let pipe = Stdio::piped;
    launcher.stdin(pipe()).stdout(pipe()).stderr(pipe());
    launcher
}

/// Starts a launcher, and waits until it listens.
fn start_launcher(scene: &Scene, mut launcher: Command) -> Child {
    let launcher = launcher.spawn().expect("cannot start the launcher");
    let listens = within(HANG_TIMEOUT, || scene.socket().exists());
    assert!(listens, "the launcher does not listen");
    launcher
}

/// Ends the input of a launcher, and waits until it has stopped.
fn stop_launcher(mut launcher: Child) -> Run {
    drop(launcher.stdin.take());
    let stops = ends_within(&mut launcher, HANG_TIMEOUT);
    assert!(stops, "the launcher does not stop");
    Run::finish(launcher).exits(0)
}

/// Another program has the supervisor inside, and is its own worker and guardian.
#[test]
fn launcher_with_the_supervisor_inside_serves_vms() {
    let scene = Scene::new(Shares::MIXED);
    let launcher = start_launcher(&scene, launcher(&scene));
    let run = Run::to_end(&mut scene.vmm(&["--discard"])).exits(0);
    assert!(String::from_utf8_lossy(&run.out).ends_with("pages right\n"));
    let run = stop_launcher(launcher);
    let said = String::from_utf8_lossy(&run.out);
    assert!(said.ends_with("served 1 VMs\n"), "{said}");
    assert!(!scene.socket().exists(), "the socket is left");
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
    let socket = fs::metadata(scene.socket()).expect("no socket at the path");
    assert_eq!(socket.permissions().mode() & 0o7777, 0o664);
    assert_eq!(socket.gid(), group);
    let _ = Run::to_end(&mut scene.vmm(&[])).exits(0);
    let _ = scene.stop();
    let run = Run::to_end(&mut scene.daemon(&["--socket-group", "no-such-group"])).exits(1);
    run.says(&["there is no group \"no-such-group\""]);
    assert!(!scene.socket().exists(), "the socket is left");
    let _ = Run::to_end(&mut scene.daemon(&["--socket-mode", "0x1"])).exits(2);
}

/// Half of the memory gets its pages from the pool, and the rest doesn't.
#[test]
fn empty_huge_page_pool_is_named() {
    let test = "empty_huge_page_pool_is_named";
    let pool = match HugePool::with(PAGES / 512 / 2) {
        Ok(pool) => pool,
        Err(why) => return skipped(test, &why),
    };
    let huge_pages = pool.free() + 4;
    let mut scene = Scene::with_pages(huge_pages * 512, Shares::MIXED);
    let control = scene.folder.path().join("control");
    let control = control.display().to_string();
    scene.serve(&["--prefetch", "off", "--control", &control]);
    let mut vmm = scene
        .vmm(&["--huge", "--wait"])
        .spawn()
        .expect("cannot start a VMM");
    scene.wait_for(": served", 1);
    let ctl = |args: &[&str]| {
        let mut ctl = snaprestore([&["ctl", "--control", &control], args].concat());
        Run::to_end(&mut ctl)
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
    vmm.kill().expect("cannot kill the process");
    vmm.wait().expect("cannot wait for the process");
    let _ = scene.stop();
}

/// Flips a bit in the middle of the file, which is full of frames in a snapshot of random pages.
fn damage(snapshot: &Path) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(snapshot)
        .expect("cannot open the file");
    let middle = file.metadata().expect("its length").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle)
        .expect("cannot read the file");
    byte[0] ^= 1;
    file.write_all_at(&byte, middle)
        .expect("cannot write the file");
}

#[test]
fn peer_that_is_no_vmm_is_refused() {
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
    fs::write(&short, vec![0; 4096 * 10]).expect("cannot write the file");
    let mut misfit = scene
        .vmm_of(&short, &[])
        .spawn()
        .expect("cannot start a VMM");
    let _ = Run::to_end(&mut scene.vmm(&[])).exits(0);
    for part in [
        "other than Firecracker's region list",
        "then nothing for 1s",
        "after 0 bytes",
        "the snapshot of another VM",
    ] {
        scene.wait_for(part, 1);
    }
    for peer in &mut peers {
        peer.kill().expect("cannot kill the process");
        peer.wait().expect("cannot wait for the process");
    }
    assert_eq!(
        endings(&scene.stop()),
        ["exited", "refused", "refused", "refused", "refused"]
    );
    // No process serves it, so its owner has to kill it.
    misfit.kill().expect("cannot kill the process");
    misfit.wait().expect("cannot wait for the process");
}

/// Covers two failures that the fake VMM can't show: KVM reads the memory by itself, and does so
/// before the first instruction.
#[test]
fn kvm_guest_is_served_or_killed_for_bad_page() {
    let test = "kvm_guest_is_served_or_killed_for_bad_page";
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return skipped(test, &format!("/dev/kvm: {error}"));
    }
    let mut scene = Scene::new(Shares::ZERO);
    fs::remove_file(&scene.snapshot).expect("cannot remove the file");
    let microvm = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_microvm"));
        command.args(args).stdin(Stdio::null());
        Run::to_end(&mut command)
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
