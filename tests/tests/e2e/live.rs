//! A live process with real data: captured, compared with the contents of `/proc`, restored.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;
use snaprestore_fixtures::host::ensure_program;
use snaprestore_fixtures::live::Live;
use snaprestore_tests::compare::PAGE;
use snaprestore_tests::program::{done, number, snaprestore};
use snaprestore_tests::real::{can_restore, live, skip};

fn pid(live: &Live) -> Pid {
    Pid::from_raw(live.pid().cast_signed())
}

/// Returns the states of a process's threads, one letter each.
fn states(pid: Pid) -> String {
    std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).ok())
        .filter_map(|stat| stat.rsplit_once(") ")?.1.chars().next())
        .collect()
}

/// Stops the process, so that all readers see the same memory.
fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    for _ in 0..6000 {
        if states(pid).chars().all(|state| state == 'T') {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the process doesn't stop: {}", states(pid));
}

/// A region of a snapshot, and its position in the output of `extract`.
struct Region {
    name: String,
    start: u64,
    bytes: u64,
    at: u64,
}

fn regions(info: &Value) -> Vec<Region> {
    let mut at = 0;
    let regions = info["regions"].as_array().unwrap().iter();
    regions
        .map(|region| {
            let region = Region {
                name: region["name"].as_str().unwrap().to_owned(),
                start: number(region, "start"),
                bytes: number(region, "bytes"),
                at,
            };
            at += region.bytes;
            region
        })
        .collect()
}

/// Compares the extracted memory with that of the stopped process, page by page. Returns the number
/// of equal pages, and of pages that the process doesn't allow to be read.
fn compare_with_process(pid: Pid, regions: &[Region], extracted: &Path) -> (u64, u64) {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let extracted = File::open(extracted).unwrap();
    let (mut same, mut unreadable) = (0, 0);
    let (mut wanted, mut found) = ([0; PAGE], [0; PAGE]);
    for region in regions {
        for page in 0..region.bytes / PAGE as u64 {
            let offset = page * PAGE as u64;
            extracted
                .read_exact_at(&mut found, region.at + offset)
                .unwrap();
            let address = region.start + offset;
            match memory.read_exact_at(&mut wanted, address) {
                // The kernel's own data: its clock changes even while the process is stopped.
                _ if region.name.starts_with("[vvar") => unreadable += 1,
                Ok(()) => {
                    assert!(wanted == found, "{:?} differs at {address:#x}", region.name);
                    same += 1;
                }
                Err(_) => unreadable += 1,
            }
        }
    }
    (same, unreadable)
}

fn path(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_owned()
}

#[test]
fn a_live_process_goes_on_and_is_taken_whole() {
    let name = "a_live_process_goes_on_and_is_taken_whole";
    let Some(mut live) = live(name, 48) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (snapshot, out) = (path(&folder, "s"), path(&folder, "out"));
    let id = pid(&live).to_string();

    // While the process runs.
    let before = live.checksum().unwrap();
    done(["create", "--pid", &id, "-o", &snapshot]);
    assert_eq!(live.checksum().unwrap(), before, "its data is untouched");
    live.work(10).unwrap();
    let worked = live.checksum().unwrap();
    assert_ne!(worked, before, "it goes on");

    // While the process is stopped, and can be compared.
    stop(pid(&live));
    let report = done(["create", "--pid", &id, "-o", &snapshot, "--force"]);
    assert!(states(pid(&live)).chars().all(|state| state == 'T'));
    assert_eq!(done(["verify", &snapshot])["ok"], true);
    let info = done(["info", &snapshot]);
    done(["extract", &snapshot, "-o", &out, "--unavailable", "zero"]);
    let (same, unreadable) = compare_with_process(pid(&live), &regions(&info), Path::new(&out));
    assert!(same * 4096 > 48 << 20, "{same} pages");
    assert!(unreadable >= number(&report, "unavailable_pages"));
    assert_eq!(same + unreadable, number(&report, "pages"));
    kill(pid(&live), Signal::SIGCONT).unwrap();
    assert_eq!(live.checksum().unwrap(), worked);
    assert!(live.quit().unwrap());

    if can_restore(name) {
        restore_with_unknown_pages(&snapshot, &out, &report);
    }
}

/// Restores a process's memory with one thread and with several. Pages that could not be read when
/// the snapshot was taken are left out, all others are correct, and this counts as success.
fn restore_with_unknown_pages(snapshot: &str, raw: &str, created: &Value) {
    let unknown = number(created, "unavailable_pages");
    let pages = number(created, "pages");
    for (prefetch, threads) in [("off", "1"), ("all", "1"), ("off", "4"), ("all", "4")] {
        let report = done([
            "restore",
            snapshot,
            "--check",
            raw,
            "--touch",
            "random",
            "--prefetch",
            prefetch,
            "--threads",
            threads,
            "--touch-threads",
            threads,
        ]);
        assert_eq!(number(&report, "mismatches"), 0, "{report}");
        assert_eq!(report["failures"].as_array().unwrap().len(), 0, "{report}");
        assert_eq!(
            number(&report, "checked_pages"),
            pages - unknown,
            "{report}"
        );
    }
}

/// Every state of a process that works is a child of the state before.
#[test]
fn every_state_of_a_live_process_comes_back() {
    let name = "every_state_of_a_live_process_comes_back";
    let Some(mut live) = live(name, 24) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let id = pid(&live).to_string();
    let mut states: Vec<(String, String, Value)> = Vec::new();
    for state in 0..5 {
        live.work(40).unwrap();
        let before = live.checksum().unwrap();
        let snapshot = path(&folder, &format!("{state}.snap"));
        let out = path(&folder, &format!("{state}.raw"));
        let create = ["create", "--pid", &id, "-o", &snapshot];
        stop(pid(&live));
        let report = match states.last() {
            None => done(create),
            Some((base, _, _)) => done([&create[..], &["--base", base]].concat()),
        };
        done(["extract", &snapshot, "-o", &out, "--unavailable", "zero"]);
        let info = done(["info", &snapshot]);
        let (same, unreadable) = compare_with_process(pid(&live), &regions(&info), Path::new(&out));
        assert_eq!(same + unreadable, number(&report, "pages"));
        kill(pid(&live), Signal::SIGCONT).unwrap();
        assert_eq!(live.checksum().unwrap(), before, "its data is untouched");
        let stored = number(&report, "stored_pages");
        if let Some((_, _, first)) = states.first() {
            let all = number(first, "stored_pages");
            assert!(stored < all / 2, "{stored} pages of {all} are new");
            assert!(number(&report, "ancestor_pages") > all / 2, "{report}");
        }
        states.push((snapshot, out, report));
    }
    assert!(live.quit().unwrap());

    states.shuffle(&mut SmallRng::seed_from_u64(5));
    for (snapshot, out, report) in &states {
        assert_eq!(done(["verify", snapshot, "--chain"])["ok"], true);
        if can_restore(name) {
            restore_with_unknown_pages(snapshot, out, report);
        }
    }
}

/// A stack that grew, a mapping that lost pages and one that moved are not stored again.
#[test]
fn remapped_memory_of_a_live_process_is_not_stored_again() {
    let name = "remapped_memory_of_a_live_process_is_not_stored_again";
    let Some(mut live) = live(name, 8) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let id = pid(&live).to_string();
    let (base, child) = (path(&folder, "base.snap"), path(&folder, "child.snap"));
    let out = path(&folder, "out");
    live.map().unwrap();
    done(["create", "--pid", &id, "-o", &base]);
    live.remap().unwrap();
    stop(pid(&live));
    let report = done(["create", "--pid", &id, "--base", &base, "-o", &child]);
    done(["extract", &child, "-o", &out, "--unavailable", "zero"]);
    let info = done(["info", &child]);
    let (same, unreadable) = compare_with_process(pid(&live), &regions(&info), Path::new(&out));
    assert_eq!(same + unreadable, number(&report, "pages"));
    kill(pid(&live), Signal::SIGCONT).unwrap();
    assert!(live.quit().unwrap());

    // The new part of the stack, and what the interpreter wrote to meanwhile.
    let stored = number(&info, "stored_pages");
    assert!((256..1024).contains(&stored), "{stored} pages: {report}");
    assert_eq!(done(["verify", &child, "--chain"])["ok"], true);
    if can_restore(name) {
        restore_with_unknown_pages(&child, &out, &report);
    }
}

#[test]
fn a_core_of_a_live_process_comes_back() {
    let name = "a_core_of_a_live_process_comes_back";
    let gcore = match ensure_program("gcore", "gdb") {
        Ok(gcore) => gcore,
        Err(why) => return skip(name, &why.to_string()),
    };
    let Some(mut live) = live(name, 24) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (core, snapshot, out) = (
        path(&folder, "core"),
        path(&folder, "s"),
        path(&folder, "out"),
    );
    let before = live.checksum().unwrap();
    stop(pid(&live));
    let id = pid(&live).to_string();
    let made = Command::new(gcore)
        .args(["-o", &core, &id])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let core = format!("{core}.{id}");
    assert!(Path::new(&core).is_file(), "{made:?}");
    stop(pid(&live));

    done(["create", &core, "-o", &snapshot]);
    assert_eq!(done(["verify", &snapshot])["ok"], true);
    let info = done(["info", &snapshot]);
    done(["extract", &snapshot, "-o", &out, "--unavailable", "zero"]);
    let (same, _) = compare_with_process(pid(&live), &regions(&info), Path::new(&out));
    assert!(same * 4096 > 24 << 20, "{same} pages");
    kill(pid(&live), Signal::SIGCONT).unwrap();
    assert_eq!(live.checksum().unwrap(), before);

    if can_restore(name) {
        let report = done(["restore", &snapshot, "--check", &out, "--touch", "random"]);
        assert_eq!(number(&report, "mismatches"), 0, "{report}");
        assert!(number(&report, "checked_pages") >= same, "{report}");
    }
}

#[test]
fn a_process_goes_on_whenever_create_is_interrupted_or_killed() {
    let name = "a_process_goes_on_whenever_create_is_interrupted_or_killed";
    let Some(mut live) = live(name, 24) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let snapshot = path(&folder, "s");
    let id = pid(&live).to_string();
    let before = live.checksum().unwrap();
    let whole = number(
        &done(["create", "--pid", &id, "-o", &snapshot]),
        "elapsed_ms",
    );
    std::fs::remove_file(&snapshot).unwrap();
    let mut rng = SmallRng::seed_from_u64(7);
    let mut cut_short = 0;
    for round in 0..12 {
        let mut child = snaprestore(["create", "--pid", &id, "-o", &snapshot])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(rng.random_range(0..=whole)));
        let signal = [Signal::SIGINT, Signal::SIGKILL][round % 2];
        let child_id = Pid::from_raw(child.id().cast_signed());
        kill(child_id, signal).unwrap();
        child.wait().unwrap();
        assert_eq!(live.checksum().unwrap(), before, "round {round}");
        assert!(!states(pid(&live)).contains(['t', 'T']), "round {round}");
        if Path::new(&snapshot).exists() {
            // The snapshot has just been written.
            assert_eq!(done(["verify", &snapshot])["ok"], true);
            std::fs::remove_file(&snapshot).unwrap();
        } else {
            cut_short += 1;
        }
    }
    assert!(cut_short > 0, "no round was cut short");
}
