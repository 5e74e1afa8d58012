//! Commands that write a file which another command replaces or needs meanwhile.
//!
//! The command runs under ptrace. Before its first step on files, when it has read what it needs to
//! know, another command runs to its end.

use std::fs::File;

use snaprestore_fixtures::images::Mix;

use crate::common::{Folder, Run, command, noise, run};
use crate::killed::{Next, can_trace, run_in_steps};
use crate::layers::holds;
use crate::working_sets::write_trace;

const PAGE: usize = 4096;

/// Creates `base.snap` with the child `child.snap`, and `another.snap`, which holds the memory of
/// the base in other frames. Returns the memory of base and child.
fn chain(folder: &Folder) -> [Vec<u8>; 2] {
    let base = Mix::new(2000, 3).bytes();
    let mut child = base.clone();
    child[40 * PAGE..80 * PAGE].copy_from_slice(&noise(40 * PAGE));
    folder.write("base.raw", &base);
    folder.write("child.raw", &child);
    let create = |args: &[&str]| {
        run(folder, &[&["create"], args].concat()).exits(0);
    };
    create(&["base.raw", "-o", "base.snap"]);
    create(&["base.raw", "-o", "another.snap", "--frame-size", "64"]);
    create(&["child.raw", "--base", "base.snap", "-o", "child.snap"]);
    for snapshot in ["base", "child"] {
        let (trace, file) = (format!("{snapshot}.trace"), format!("{snapshot}.snap"));
        write_trace(folder, &trace, &file, &[1500, 60, 7, 1501]);
    }
    [base, child]
}

/// Runs a command, and before its first step on files another one to its end. Returns both.
fn with_another(folder: &Folder, args: &[&str], other: &[&str]) -> (Run, Run) {
    let outside = Folder::new();
    let said = File::create(outside.file("err")).unwrap();
    let mut command = command(args);
    command.current_dir(folder.path());
    command.stdout(said.try_clone().unwrap()).stderr(said);
    let mut beside = None;
    let code = run_in_steps(command, |_| {
        beside.get_or_insert_with(|| run(folder, other).exits(0));
        Next::Continue
    });
    let err = String::from_utf8(outside.read("err")).unwrap();
    let out = Vec::new();
    (Run { code, out, err }, beside.expect("it has steps"))
}

/// A command that replaces a file would undo what another has made of it meanwhile.
#[test]
fn file_replaced_meanwhile_is_not_replaced_again() {
    if !can_trace("file_replaced_meanwhile_is_not_replaced_again") {
        return;
    }
    let folder = Folder::new();
    let [_, memory] = chain(&folder);
    let optimize = ["optimize", "child.snap", "--trace", "child.trace", "-o"];
    let in_place = [&optimize[..], &["child.snap"]].concat();
    let rebase = ["rebase", "child.snap", "--base", "another.snap"];
    let before = folder.read("child.snap");
    for (first, other) in [
        (&in_place[..], &in_place[..]),
        (&in_place, &rebase),
        (&rebase, &in_place),
        (&rebase, &rebase),
    ] {
        folder.write("child.snap", &before);
        let names = folder.names();
        let told = [other, &["--json"]].concat();
        let (told, report) = with_another(&folder, first, &told);
        told.exits(1)
            .says(&["child.snap: was replaced", "repeat the command"]);
        assert_eq!(folder.names(), names, "{first:?}");
        // It is the file of the other command.
        let info = run(&folder, &["info", "child.snap", "--json"]).exits(0);
        let id = &info.json()["snapshot_id"];
        assert_eq!(*id, report.json()["snapshot_id"], "{first:?}");
        holds(&folder, "child.snap", &memory);
    }
    // Under another name nothing is undone: it is made of the old file, which stays open.
    let elsewhere = [&optimize[..], &["new.snap"]].concat();
    folder.write("child.snap", &before);
    let (told, _) = with_another(&folder, &elsewhere, &in_place);
    told.exits(0);
    holds(&folder, "new.snap", &memory);
}

/// A child of the new base would need a file that is gone.
#[test]
fn base_replaced_meanwhile_makes_rebase_fail() {
    if !can_trace("base_replaced_meanwhile_makes_rebase_fail") {
        return;
    }
    let folder = Folder::new();
    chain(&folder);
    write_trace(&folder, "another.trace", "another.snap", &[1500, 7]);
    let before = folder.read("child.snap");
    let rebase = ["rebase", "child.snap", "--base", "another.snap"];
    let optimize = ["optimize", "another.snap", "--trace", "another.trace"];
    let other = [&optimize[..], &["-o", "another.snap"]].concat();
    let (told, _) = with_another(&folder, &rebase, &other);
    told.exits(1)
        .says(&["another.snap: was replaced", "repeat the command"]);
    assert!(folder.read("child.snap") == before);
}

/// A snapshot that got its first child meanwhile is needed by it.
#[test]
fn file_that_becomes_an_ancestor_meanwhile_is_not_replaced() {
    if !can_trace("file_that_becomes_an_ancestor_meanwhile_is_not_replaced") {
        return;
    }
    let folder = Folder::new();
    let [_, memory] = chain(&folder);
    let before = folder.read("another.snap");
    write_trace(&folder, "another.trace", "another.snap", &[1500, 7]);
    let other = [
        "create",
        "child.raw",
        "--base",
        "another.snap",
        "-o",
        "new.snap",
    ];
    for first in [
        &[
            "optimize",
            "another.snap",
            "--trace",
            "another.trace",
            "-o",
            "another.snap",
        ][..],
        &["flatten", "child.snap", "-o", "another.snap", "--force"],
        &[
            "rebase",
            "child.snap",
            "--base",
            "base.snap",
            "-o",
            "another.snap",
            "--force",
        ],
    ] {
        let (told, _) = with_another(&folder, first, &other);
        told.exits(2)
            .says(&["another.snap: is an ancestor of", "new.snap"]);
        assert!(folder.read("another.snap") == before, "{first:?}");
        holds(&folder, "new.snap", &memory);
        std::fs::remove_file(folder.file("new.snap")).unwrap();
    }
}
