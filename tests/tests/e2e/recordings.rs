//! Traces that the daemon records of its VMs.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};
use snapshot_format::Snapshot;
use snapshot_format::trace::{TouchReason, Trace, TraceEnd};

use crate::scene::{Scene, end_of, endings};

/// Creates the folder for traces.
fn folder(scene: &Scene) -> PathBuf {
    let folder = scene.path("traces");
    fs::create_dir(&folder).expect("cannot create a folder");
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the path is not UTF-8")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("cannot read the folder");
    entries
        .map(|entry| entry.expect("cannot read the folder").path())
        .collect()
}

#[test]
fn served_vm_leaves_a_trace_of_its_touches() {
    let mut scene = Scene::new(Shares::MIXED);
    let folder = folder(&scene);
    scene.serve(&["--prefetch", "all", "--record", text(&folder)]);
    let _ = Run::to_end(&mut scene.vmm(&["--only", "100"])).exits(0);
    scene.wait_for("recorded 100 touches to ", 1);
    assert_eq!(endings(&scene.stop()), ["exited"]);
    let files = files(&folder);
    let [file] = &files[..] else {
        panic!("{files:?}");
    };
    let name = file.file_name().and_then(|name| name.to_str());
    let name = name.expect("the name is not UTF-8");
    assert!(name.starts_with("default-1-"), "{name}");
    assert_eq!(file.extension(), Some("trace".as_ref()), "{name}");
    let trace = Trace::read_path(file).expect("cannot read the trace");
    let snapshot = Snapshot::open_path(&scene.snapshot).expect("cannot open the snapshot");
    trace
        .check_matches(&snapshot)
        .expect("the trace is of other memory");
    assert_eq!(
        (trace.end, trace.present_at_start),
        (TraceEnd::OwnerEnded, 0)
    );
    let is_demand = |touch: &snapshot_format::trace::Touch| touch.reason == TouchReason::Demand;
    assert!(trace.touches.iter().all(is_demand));
}

/// The next worker serves the VM, and records no part.
#[test]
fn killed_worker_loses_its_recordings() {
    let mut scene = Scene::new(Shares::MIXED);
    let folder = folder(&scene);
    scene.serve(&["--prefetch", "off", "--record", text(&folder)]);
    let mut vmm = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    scene.wait_for(": served", 1);
    let worker = scene.worker().expect("worker exited unexpectedly");
    kill(worker, Signal::SIGKILL).expect("cannot reach the process");
    scene.wait_for("its recording is lost with the worker", 1);
    drop(vmm.stdin.take());
    let _ = end_of(vmm).exits(0);
    assert_eq!(endings(&scene.stop()), ["exited"]);
    assert_eq!(files(&folder), Vec::<PathBuf>::new());
}

#[test]
fn folder_for_traces_must_exist() {
    let scene = Scene::new(Shares::MIXED);
    let missing = scene.path("missing");
    let refused = Run::to_end(&mut scene.daemon(&["--record", text(&missing)]));
    assert_eq!(refused.code, Some(1), "{}", refused.err);
    assert!(refused.err.contains(text(&missing)), "{}", refused.err);
}

#[test]
fn operator_records_a_vm_from_now_on() {
    let mut scene = Scene::new(Shares::MIXED);
    let control = scene.path("control");
    scene.serve(&["--prefetch", "off", "--control", text(&control)]);
    let vmm = scene.vmm(&["--only", "20", "--hold"]).spawn();
    let mut vmm = vmm.expect("cannot start a VMM");
    let mut said = BufReader::new(vmm.stdout.take().expect("no pipe to the child")).lines();
    let line = said.next().expect("no line was written");
    assert_eq!(line.expect("output is not UTF-8"), "right so far");
    let trace = scene.path("vm.trace");
    let ctl = |args: &[&str]| {
        let mut command = snaprestore(["ctl", "--json", "record"]);
        command.env("SNAPRESTORE_CONTROL", &control).args(args);
        Run::to_end(&mut command)
    };
    let refused = |args: &[&str], why: &str| {
        let run = ctl(args).exits(1);
        assert!(run.err.contains(why), "{}", run.err);
    };
    let stop = ["1", "stop", "--output", text(&trace)];
    refused(&stop, "VM 1 has no recording");
    refused(&["9", "start"], "no VM 9");
    let _ = ctl(&["1", "start"]).exits(0);
    refused(&["1", "start"], "VM 1 has a recording already");
    let stopped = ctl(&stop).exits(0).json();
    let recorded = Trace::read_path(&trace).expect("cannot read the trace");
    let snapshot = Snapshot::open_path(&scene.snapshot).expect("cannot open the snapshot");
    recorded
        .check_matches(&snapshot)
        .expect("the trace is of other memory");
    assert_eq!(stopped["touches"], recorded.touches.len());
    // Whole frames had been installed.
    assert!(
        recorded.present_at_start >= 20,
        "{}",
        recorded.present_at_start
    );
    // The file exists, which ends no recording.
    let _ = ctl(&["1", "start"]).exits(0);
    refused(&stop, "exists already");
    let other = scene.path("other.trace");
    // A full disk: the trace is still there.
    refused(&["1", "stop", "--output", "/dev/full"], "fetches it again");
    let _ = ctl(&["1", "stop", "--output", text(&other)]).exits(0);
    refused(&stop, "exists already");
    let again = scene.path("again.trace");
    let _ = ctl(&["1", "stop", "--output", text(&again)]).exits(0);
    let bytes = [&other, &again].map(|file| fs::read(file).expect("cannot read the trace"));
    assert!(bytes[0] == bytes[1], "another trace was sent");
    drop(vmm.stdin.take());
    let _ = end_of(vmm).exits(0);
    scene.stop();
    Trace::read_path(&other).expect("cannot read the trace");
}
