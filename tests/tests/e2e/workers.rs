//! The process that serves VMs dies, at every fail point and at random, and the VMs don't notice.

use std::process::Child;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use snaprestore_engine::fail_point::FailPoint;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::Run;

use crate::scene::{PAGES, Scene, endings};

/// Part of the daemon's log line about the death of a worker.
const DIED: &str = "started a new one";

/// A VMM that gives memory back, moves some, and touches the rest from three threads.
const VMM: &[&str] = &["--threads", "3", "--discard", "--move", "--split", "3000"];

fn all_right(vmm: Child) {
    let run = Run::finish(vmm).exits(0);
    assert_eq!(run.out, format!("{PAGES} pages right\n").as_bytes());
}

/// Kills the worker at each point where the state shared with the supervisor is between two steps.
/// Several workers in a row reach each point; the first of them finds the leftovers of one that
/// died after a read.
#[test]
fn worker_killed_at_any_fail_point_is_replaced() {
    let mut scene = Scene::new(Shares::MIXED);
    for point in FailPoint::ALL {
        let name = point.name();
        // The tables are made once, before anything is read.
        let before = match point {
            FailPoint::TablesMade | FailPoint::TablesGiven => "received",
            _ => "read:3",
        };
        let places = format!("{before},{name}:1,{name}:2,{name}:5,{name}:1");
        // How often a point is reached depends on the scheduler: a VM may be done with few reads.
        let reached = (0..5).any(|_| {
            scene.serve_with(&["--prefetch", "all"], &[("SNAPRESTORE_FAIL", &places)]);
            let vmm = scene.vmm(VMM).spawn().expect("cannot start a VMM");
            all_right(vmm);
            assert_eq!(endings(&scene.stop()), ["exited"], "{name}");
            scene.said().matches(DIED).count() >= 2
        });
        assert!(reached, "{name}: {}", scene.said());
    }
}

/// The worker is killed again and again while two VMs are restored: one that it completes and one
/// that requests its pages one by one.
#[test]
fn workers_killed_at_random_make_no_byte_wrong() {
    let mut scene = Scene::new(Shares::MIXED);
    let (mut kills, mut round) = (0, 0_u64);
    while kills < 200 {
        let prefetch = if round.is_multiple_of(2) {
            "off"
        } else {
            "all"
        };
        scene.serve(&["--prefetch", prefetch]);
        let mut vmms: Vec<Child> = (0..2)
            .map(|_| scene.vmm(VMM).spawn().expect("cannot start a VMM"))
            .collect();
        while vmms
            .iter_mut()
            .any(|vmm| vmm.try_wait().expect("cannot query the child").is_none())
        {
            // Kills workers that have hardly started as well as workers that are well under way.
            std::thread::sleep(Duration::from_micros(500 + kills * 7919 % 25_000));
            if let Some(worker) = scene.worker() {
                let _ = kill(worker, Signal::SIGKILL);
                kills += 1;
            }
        }
        vmms.into_iter().for_each(all_right);
        assert_eq!(endings(&scene.stop()), ["exited"; 2]);
        round += 1;
    }
}

#[test]
fn stopped_worker_is_replaced_while_vm_waits() {
    let mut scene = Scene::new(Shares::MIXED);
    scene.serve(&["--prefetch", "off", "--stuck-after", "1"]);
    let mut vmm = scene.vmm(&["--wait"]).spawn().expect("cannot start a VMM");
    scene.wait_for("served", 1);
    let worker = scene.worker().expect("no worker runs");
    kill(worker, Signal::SIGSTOP).expect("cannot stop the process");
    drop(vmm.stdin.take());
    let run = Run::finish(vmm).exits(0);
    assert!(String::from_utf8_lossy(&run.out).ends_with("pages right\n"));
    assert_eq!(
        scene.said().matches("hung and was killed").count(),
        1,
        "{}",
        scene.said()
    );
    let _ = scene.stop();
}

/// A frame that crashes its decoder would crash every worker.
#[test]
fn frame_that_crashed_two_workers_is_quarantined() {
    let mut scene = Scene::new(Shares::RANDOM);
    let crash = "decoding:1:crash,decoding:1:crash";
    let options = ["--prefetch", "off", "--threads", "1"];
    scene.serve_with(&options, &[("SNAPRESTORE_FAIL", crash)]);
    let run = Run::to_end(&mut scene.vmm(&[]));
    assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
    let vms = scene.stop();
    assert_eq!(endings(&vms), ["killed"]);
    let reason = vms[0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("two workers crashed or hung"), "{reason}");
    assert_eq!(scene.said().matches(DIED).count(), 2, "{}", scene.said());
}
