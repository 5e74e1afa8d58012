//! Comparison with other ways to restore.

use std::fs;

use snaprestore_fixtures::host::{Unavailable, skipped};
use snaprestore_fixtures::images::Mix;
use snaprestore_uffd::uffd::OpenOptions;

use crate::common::{Folder, as_nobody, number, run};
use crate::restore::nobody_is_limited;

const EVERYBODY: [&str; 7] = [
    "ours:prefetch=all",
    "ours",
    "mmap",
    "handler",
    "handler-pinned",
    "read-all",
    "unzstd",
];

/// Writes an image of 16 MiB. Returns whether memory can be restored lazily on this machine.
fn prepared(test: &str, folder: &Folder) -> bool {
    folder.write("raw", &Mix::new(4096, 7).bytes());
    match OpenOptions::new().open() {
        Ok(_) => true,
        Err(why) => {
            let why = why.to_string();
            skipped(test, &Unavailable { why });
            false
        }
    }
}

#[test]
fn every_contender_reads_the_same_bytes_in_every_way_to_touch() {
    let folder = Folder::new();
    if !prepared(
        "every_contender_reads_the_same_bytes_in_every_way_to_touch",
        &folder,
    ) {
        return;
    }
    let ways: [&[&str]; 4] = [
        &[],
        &["--writes", "--order", "sequential"],
        &["--cold", "--share", "10"],
        &["--threads", "3"],
    ];
    for way in ways {
        let args = ["bench", "raw", "--rounds", "1", "--dir", ".", "--json"];
        // The run fails if two contenders differ in a byte of any page that was touched.
        let report = run(&folder, &[&args[..], way].concat()).exits(0).json();
        assert_eq!(number(&report, "memory_bytes"), 16 << 20);
        let rows = report["contenders"].as_array().unwrap();
        let absent = report["not_available"].as_array().unwrap();
        let has = |list: &[serde_json::Value], name: &str| {
            list.iter().any(|entry| entry["contender"] == name)
        };
        for name in EVERYBODY {
            // A handler can be pinned to the core of only one touching thread.
            let cannot = way.contains(&"--threads") && name == "handler-pinned";
            assert_eq!(has(absent, name), cannot, "{way:?}: {name}: {absent:?}");
            assert_eq!(has(rows, name), !cannot, "{way:?}: {name}: {rows:?}");
        }
        for row in rows {
            assert!(row["total_ms"]["median"].as_f64().unwrap() > 0.0, "{row}");
        }
        assert_eq!(
            folder.names(),
            ["raw"],
            "{way:?}: something was left behind"
        );
    }
}

#[test]
fn served_memory_has_the_same_bytes() {
    let folder = Folder::new();
    if !prepared("served_memory_has_the_same_bytes", &folder) {
        return;
    }
    let everybody = [
        "serve",
        "serve:prefetch=all,frame=16",
        "vmm-handler",
        "vmm-handler-pinned",
        "vmm-copy-all",
        "mmap",
    ];
    let contenders = everybody.join(";");
    let args = ["bench", "raw", "--rounds", "1", "--dir", ".", "--json"];
    let report = run(
        &folder,
        &[&args[..], &["--contenders", &contenders]].concat(),
    )
    .exits(0)
    .json();
    let rows = report["contenders"].as_array().unwrap();
    assert_eq!(rows.len(), everybody.len(), "{report}");
    assert_eq!(folder.names(), ["raw"], "something was left behind");
}

#[test]
fn existing_snapshot_is_benchmarked_unchanged() {
    let folder = Folder::new();
    if !prepared("existing_snapshot_is_benchmarked_unchanged", &folder) {
        return;
    }
    run(
        &folder,
        &["create", "--raw", "raw", "-o", "snap", "--frame-size", "16"],
    )
    .exits(0);
    let args = [
        "bench",
        "snap",
        "--rounds",
        "1",
        "--dir",
        ".",
        "--contenders",
        "ours;mmap",
    ];
    let report = run(&folder, &[&args[..], &["--json"]].concat())
        .exits(0)
        .json();
    let len = folder.read("snap").len() as u64;
    assert_eq!(number(&report, "snapshot_bytes"), len);
    let text = run(&folder, &args).exits(0).text();
    for part in ["contender", "total ms", "mmap", "same bytes"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn ordinary_user_compares_for_user_mode() {
    if !nobody_is_limited("ordinary_user_compares_for_user_mode") {
        return;
    }
    let folder = Folder::new();
    folder.write("raw", &Mix::new(256, 7).bytes());
    let args = ["bench", "raw", "--rounds", "1", "--dir", ".", "--json"];
    let run = as_nobody(
        &folder,
        &[&args[..], &["--contenders", "ours;mmap"]].concat(),
    )
    .exits(0);
    let rows = run.json()["contenders"].as_array().unwrap().len();
    assert_eq!(rows, 2, "{}", run.text());
    run.says(&["note: ", "user mode only"]);
}

#[test]
fn unsupported_benchmark_input_is_refused() {
    let folder = Folder::new();
    folder.write("odd", &[1; 5000]);
    run(&folder, &["bench", "odd", "--dir", "."])
        .exits(1)
        .says(&["whole pages"]);
    run(&folder, &["bench", "odd", "--contenders", "ours;theirs"])
        .exits(2)
        .says(&["theirs", "there are"]);
    run(&folder, &["bench", "none"]).exits(1).says(&["none"]);
    run(&folder, &["bench", "odd", "--dir", "nowhere"])
        .exits(1)
        .says(&["nowhere"]);
    assert_eq!(folder.names(), ["odd"]);
}

#[test]
fn chain_in_several_folders_is_benchmarked() {
    let folder = Folder::new();
    if !prepared("chain_in_several_folders_is_benchmarked", &folder) {
        return;
    }
    let mut later = folder.read("raw");
    later[0] ^= 1;
    folder.write("later", &later);
    fs::create_dir(folder.file("bases")).unwrap();
    run(&folder, &["create", "raw", "-o", "bases/base.snap"]).exits(0);
    let args = [
        "create",
        "later",
        "--base",
        "bases/base.snap",
        "--holes",
        "zero",
    ];
    run(&folder, &[&args[..], &["-o", "child.snap"]].concat()).exits(0);
    let args = [
        "bench",
        "child.snap",
        "--rounds",
        "1",
        "--dir",
        ".",
        "--contenders",
        "ours;mmap",
    ];
    let report = run(
        &folder,
        &[&args[..], &["--layers", "bases", "--json"]].concat(),
    );
    let report = report.exits(0).json();
    assert_eq!(
        report["contenders"].as_array().unwrap().len(),
        2,
        "{report}"
    );
    run(&folder, &args)
        .exits(1)
        .says(&["base.snap", "--layers DIR"]);
}
