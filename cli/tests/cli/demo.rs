//! The demonstration as a newcomer starts it.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{Folder, as_nobody, command, number, run, wait_until};
use crate::owner::Owner;
use crate::restore::{nobody_is_limited, possible};

#[test]
fn demo_packs_and_restores_a_process_without_preparation() {
    let folder = Folder::new();
    if !possible(
        &folder,
        "demo_packs_and_restores_a_process_without_preparation",
    ) {
        return;
    }
    let args = ["demo", "--size", "24", "--keep", "kept"];
    let text = run(&folder, &args).exits(0).text();
    for line in [
        "process",
        "packed",
        "goes on",
        "verified    good",
        "all equal",
        "Every page",
    ] {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    run(&folder, &["verify", "kept"]).exits(0);
    // A kept snapshot is not overwritten.
    run(&folder, &args)
        .exits(1)
        .says(&["kept", "exists", "--force"]);
    let before = folder.read("kept");
    run(&folder, &[&args[..], &["--force"]].concat()).exits(0);
    // Even a process that did the same would get a snapshot with a different identity.
    assert_ne!(folder.read("kept"), before);
    assert_eq!(folder.names(), ["kept"]);

    let report = run(&folder, &["demo", "--size", "24", "--json"])
        .exits(0)
        .json();
    assert_eq!(report["ok"], true);
    assert!(
        number(&report["before"], "bytes") >= 24 << 20 || number(&report["before"], "files") > 0
    );
    assert!(number(&report["after"], "rounds") >= number(&report["before"], "rounds"));
    assert_eq!(
        report["before"]["occurrences"],
        report["after"]["occurrences"]
    );
    assert_eq!(report["verify"]["ok"], true);
    let restore = &report["restore"];
    assert_eq!(number(restore, "mismatches"), 0);
    assert_eq!(
        number(restore, "checked_pages"),
        number(&report["create"], "pages") - number(&report["create"], "unavailable_pages")
    );
    assert!(number(restore, "faults") > 0);
}

#[test]
fn ordinary_user_can_run_the_demo() {
    if !nobody_is_limited("ordinary_user_can_run_the_demo") {
        return;
    }
    let folder = Folder::new();
    let run = as_nobody(&folder, &["demo", "--size", "8"]).exits(0);
    assert!(run.text().contains("Every page"), "{}", run.text());
    run.says(&["note: ", "user mode only"]);
}

#[test]
fn demo_accepts_another_process() {
    let folder = Folder::new();
    if !possible(&folder, "demo_accepts_another_process") {
        return;
    }
    let mut owner = Owner::small();
    let pid = owner.pid().to_string();
    let report = run(&folder, &["demo", "--pid", &pid, "--json"])
        .exits(0)
        .json();
    assert_eq!(report["ok"], true);
    assert_eq!(report["pid"], owner.pid());
    let before = owner.rounds();
    wait_until("it goes on", || owner.rounds() > before);
}

#[test]
fn interrupted_demo_leaves_no_process_behind() {
    let folder = Folder::new();
    if !possible(&folder, "interrupted_demo_leaves_no_process_behind") {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut child = command(["demo", "--size", "2000", "-q"])
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id();
        let children = || {
            let path = format!("/proc/{pid}/task/{pid}/children");
            std::fs::read_to_string(path).unwrap_or_default()
        };
        wait_until("its process starts", || !children().trim().is_empty());
        let owner: i32 = children().trim().parse().unwrap();
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(signal as i32));
        wait_until("its process ends", || {
            let stat = std::fs::read_to_string(format!("/proc/{owner}/stat")).unwrap_or_default();
            !stat.contains("snaprestore") || stat.contains(") Z ")
        });
    }
}
