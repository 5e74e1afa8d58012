//! Layered snapshots: the daemon finds the files of a chain once, and then needs no names.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::process::Child;

use nix::sys::signal::{Signal, kill};
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};
use snapshot_format::{FrameRef, Page, Reason, Snapshot};

use crate::manager::FakeManager;
use crate::scene::{PAGES, Scene, end_of, endings};

/// Part of the daemon's log line about the death of a worker.
const DIED: &str = "started a new one";

/// Creates the chain `snap` (the base), `middle` and `child`, whose first pages are the base's.
fn chain(shares: Shares) -> Scene {
    let mut scene = Scene::new(shares);
    scene.branch("middle", (100..4000).step_by(37));
    scene.branch("child", (200..8000).step_by(53));
    scene
}

fn all_right(vmm: Child) {
    let run = end_of(vmm).exits(0);
    assert_eq!(run.out, format!("{PAGES} pages right\n").as_bytes());
}

/// Returns the frame of a page of the scene's snapshot, and the path of the file that has it.
fn frame_of(scene: &Scene, page: u64) -> (FrameRef, String) {
    let snapshot = Snapshot::open_path(&scene.snapshot).expect("cannot open the snapshot");
    let page = snapshot.look_up(page, Reason::Verify);
    let Ok(Page::Stored { frame, .. }) = page else {
        panic!("{page:?}");
    };
    let layer = snapshot.layer(frame.layer()).expect("no such layer");
    (frame, layer.name().to_owned())
}

/// Deletes the base, and puts another file in the place of `middle` and of the child.
fn lose_files(scene: &Scene) {
    fs::remove_file(scene.path("snap")).expect("cannot remove the file");
    for name in ["middle", "child"] {
        let path = scene.path(name);
        fs::rename(&path, scene.path(&format!("{name}.old"))).expect("cannot rename the file");
        fs::write(&path, "another file").expect("cannot write the file");
    }
}

#[test]
fn chain_is_served_byte_for_byte() {
    let mut scene = chain(Shares::MIXED);
    for prefetch in ["off", "all"] {
        scene.serve(&["--prefetch", prefetch]);
        scene.wait_for("(3 layers)", 1);
        let options: [&[&str]; 3] = [
            &["--threads", "3"],
            &["--split", "3000", "--discard"],
            &["--discard", "--move", "--threads", "2"],
        ];
        let vmms = options.map(|options| scene.vmm(options).spawn().expect("cannot start a VMM"));
        vmms.into_iter().for_each(all_right);
        assert_eq!(endings(&scene.stop()), ["exited"; 3]);
    }
}

/// Two workers die in the midst of a restore. Their successors, and VMs that connect later, get the
/// files that the supervisor opened, whatever their names refer to by then.
#[test]
fn chain_without_names_survives_its_workers() {
    let mut scene = chain(Shares::MIXED);
    let places = "decoding:20,decoding:20";
    scene.serve_with(&["--prefetch", "off"], &[("SNAPRESTORE_FAIL", places)]);
    lose_files(&scene);
    for _ in 0..2 {
        all_right(
            scene
                .vmm(&["--discard"])
                .spawn()
                .expect("cannot start a VMM"),
        );
    }
    assert_eq!(scene.said().matches(DIED).count(), 2, "{}", scene.said());
    // Killed between two VMs, too.
    let worker = scene.worker().expect("no worker runs");
    kill(worker, Signal::SIGKILL).expect("cannot kill the process");
    scene.wait_for(DIED, 3);
    all_right(scene.vmm(&[]).spawn().expect("cannot start a VMM"));
    assert_eq!(endings(&scene.stop()), ["exited"; 3]);
}

/// The next supervisor can't open the chain by its names any more: the service has another snapshot
/// of the same memory by then.
#[test]
fn next_supervisor_serves_vms_of_a_chain() {
    let mut scene = chain(Shares::MIXED);
    let mut manager = FakeManager::at(&scene.path("notify"));
    let options = ["--prefetch", "off"];
    scene.start(manager.manages(scene.daemon(&options), 64));
    let vmm = ["--wait", "--let-go", "--discard"];
    let mut vmm = scene.vmm(&vmm).spawn().expect("cannot start a VMM");
    scene.wait_for("served", 1);
    // Three files and the socket of the service, and four descriptors of the VM.
    while manager.names().len() < 8 {
        manager.take_one();
    }
    let names: BTreeSet<_> = manager.names().into_iter().collect();
    for role in ["snapshot", "layer-1", "layer-2"] {
        assert!(names.iter().any(|name| name.ends_with(role)), "{names:?}");
    }
    scene.kill();
    lose_files(&scene);
    let (raw, flat) = (scene.raw().to_owned(), scene.path("flat"));
    let mut create = snaprestore(["create".as_ref(), raw.as_os_str(), "-o".as_ref()]);
    let _ = Run::to_end(create.arg(&flat)).exits(0);
    scene.base_on(&flat, &raw);
    drop(vmm.stdin.take());

    let next = manager.start(&scene.daemon(&options));
    scene.start(manager.manages(next, 64));
    scene.wait_for("taken back", 1);
    let _ = end_of(vmm).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited"]);
}

/// A part of a chain is of no use to the next supervisor.
#[test]
fn chain_is_stored_as_a_whole_or_not_at_all() {
    let mut scene = chain(Shares::MIXED);
    let mut manager = FakeManager::at(&scene.path("notify"));
    scene.start(manager.manages(scene.daemon(&[]), 2));
    scene.wait_for("cannot store the descriptors of", 1);
    all_right(scene.vmm(&[]).spawn().expect("cannot start a VMM"));
    assert_eq!(endings(&scene.stop()), ["exited"]);
    while !manager
        .names()
        .iter()
        .any(|name| name.ends_with("listening"))
    {
        manager.take_one();
    }
    assert_eq!(manager.names().len(), 1, "{:?}", manager.names());
}

#[test]
fn damage_in_an_ancestor_kills_only_vms_that_touch_it() {
    let mut scene = chain(Shares::RANDOM);
    let (frame, file) = frame_of(&scene, 7000);
    assert_eq!(file, scene.path("snap").display().to_string());
    // The pages that the first VM touches lie in other frames.
    let touched = (0..20).map(|n| n * 1021 % PAGES);
    for page in touched {
        assert_ne!(frame_of(&scene, page).0, frame);
    }
    let base = File::options()
        .read(true)
        .write(true)
        .open(scene.path("snap"));
    let base = base.expect("cannot open the file");
    let (mut byte, at) = ([0], frame.offset() + u64::from(frame.stored_len()) / 2);
    base.read_exact_at(&mut byte, at)
        .expect("cannot read the file");
    base.write_all_at(&[!byte[0]], at)
        .expect("cannot write the file");

    scene.serve(&["--prefetch", "off"]);
    let run = Run::to_end(&mut scene.vmm(&["--only", "20"])).exits(0);
    assert_eq!(run.out, b"20 pages right\n");
    let run = Run::to_end(&mut scene.vmm(&[]));
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    let vms = scene.stop();
    assert_eq!(endings(&vms), ["exited", "killed"]);
    let reason = vms.iter().find_map(|vm| vm["reason"].as_str());
    let reason = reason.expect("no VM has a reason");
    assert!(reason.contains(&format!("{file}: page ")), "{reason}");
    let offset = format!("at offset {}", frame.offset());
    assert!(reason.contains(&offset), "{offset}: {reason}");
}

/// The operator is told the file and the place in it, although the frame lies in an ancestor.
#[test]
fn frame_of_an_ancestor_is_quarantined_by_name() {
    let mut scene = chain(Shares::RANDOM);
    let (frame, file) = frame_of(&scene, 0);
    assert_eq!(file, scene.path("snap").display().to_string());
    let crash = "decoding:1:crash,decoding:1:crash";
    let options = ["--prefetch", "off", "--threads", "1"];
    scene.serve_with(&options, &[("SNAPRESTORE_FAIL", crash)]);
    let run = Run::to_end(&mut scene.vmm(&[]));
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    let vms = scene.stop();
    let reason = vms[0]["reason"].as_str().expect("no reason");
    let (page, at) = (
        format!("{file}: page 0 "),
        format!("at offset {}:", frame.offset()),
    );
    for part in [&page[..], &at, "two workers crashed or hung"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
}

/// Runs a daemon that can't start, and returns its error.
fn refusal(scene: &Scene, code: i32) -> String {
    Run::to_end(&mut scene.daemon(&[])).exits(code).err
}

#[test]
fn incomplete_chain_is_refused() {
    let scene = chain(Shares::MIXED);
    let base = scene.path("snap");
    let id = Snapshot::open_path(&base)
        .expect("cannot open the snapshot")
        .id();
    let kept = fs::read(&base).expect("cannot read the file");

    fs::remove_file(&base).expect("cannot remove the file");
    let why = refusal(&scene, 1);
    let folder = scene.folder.path().display().to_string();
    for part in [
        &id.to_string()[..],
        "last known as snap",
        &folder,
        "--layers DIR",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }

    fs::write(&base, &kept[..kept.len() / 2]).expect("cannot write the file");
    let why = refusal(&scene, 3);
    assert!(
        why.contains(&id.to_string()) && why.contains("snap"),
        "{why}"
    );

    let _ = Run::to_end(
        snaprestore(["create", "--force"])
            .arg(scene.raw())
            .arg("--output")
            .arg(&base),
    )
    .exits(0);
    let why = refusal(&scene, 1);
    for part in [&id.to_string()[..], "is not the file that was recorded"] {
        assert!(why.contains(part), "{part}: {why}");
    }
}

/// Runs `ctl add` for the scene's snapshot.
fn add(scene: &Scene, name: &str) -> Run {
    let mut command = snaprestore(["ctl", "add", name, "--snapshot"]);
    command.env("SNAPRESTORE_CONTROL", scene.path("control"));
    command
        .arg(&scene.snapshot)
        .arg("--socket")
        .arg(scene.path(name));
    Run::to_end(&mut command)
}

#[test]
fn ancestors_are_found_in_folders_of_the_daemon() {
    let mut scene = chain(Shares::MIXED);
    let bases = scene.path("bases");
    fs::create_dir(&bases).expect("cannot create the folder");
    for name in ["snap", "middle"] {
        let moved = bases.join(format!("{name}-moved"));
        fs::rename(scene.path(name), moved).expect("cannot rename the file");
    }
    let folder = bases.display().to_string();
    let control = scene.path("control").display().to_string();
    let config = scene.path("config");
    let of_scene = |layers: &str| {
        format!(
            "{layers}\n[[service]]\nname = \"web\"\nsnapshot = \"child\"\nsocket = {:?}\n",
            scene.socket()
        )
    };
    fs::write(&config, of_scene("layers = [\"bases\"]")).expect("cannot write the file");
    let mut by_config = snaprestore(["serve", "--json", "--config"]);
    by_config.arg(&config);
    let mut by_variable = scene.daemon(&[]);
    by_variable.env("SNAPRESTORE_LAYERS", &folder);
    let by_option = scene.daemon(&["--layers", &folder, "--control", &control]);
    for daemon in [by_config, by_variable, by_option] {
        scene.start(daemon);
        all_right(scene.vmm(&[]).spawn().expect("cannot start a VMM"));
        if scene.path("control").exists() {
            let _ = add(&scene, "again").exits(0);
            let again = scene.path("again");
            all_right(
                scene
                    .vmm_at(&again, &[])
                    .spawn()
                    .expect("cannot start a VMM"),
            );
            // A truncated ancestor is no usable snapshot; one that is gone may be elsewhere.
            let base = bases.join("snap-moved");
            let file = File::options()
                .write(true)
                .open(&base)
                .expect("cannot open the file");
            let len = file.metadata().expect("cannot query the file").len();
            file.set_len(len - 1).expect("cannot truncate the file");
            let truncated = add(&scene, "truncated").exits(3);
            assert!(truncated.err.contains("snap-moved"), "{}", truncated.err);
            fs::remove_file(&base).expect("cannot remove the file");
            let missing = add(&scene, "missing").exits(1);
            for part in ["last known as snap", &folder, "--layers DIR"] {
                assert!(missing.err.contains(part), "{part}: {}", missing.err);
            }
        }
        let _ = scene.stop();
    }
}
