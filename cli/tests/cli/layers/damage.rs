//! Chains with missing, replaced, truncated and damaged files.

use std::fs;

use super::{PAGE, PAGES, base, child, create, holds, write_diff};
use crate::common::{Folder, Run, command, noise, number, run};
use crate::restore::possible;

/// Returns commands that read `child.snap`; the last one writes a child of it from `memory`.
fn commands_on_child(memory: &'static str) -> [Vec<&'static str>; 6] {
    [
        vec!["info", "child.snap"],
        vec!["verify", "child.snap"],
        vec!["verify", "child.snap", "--chain"],
        vec!["extract", "child.snap", "-o", "out"],
        vec!["restore", "child.snap"],
        vec!["create", memory, "--base", "child.snap", "-o", "out"],
    ]
}

#[test]
fn missing_ancestor_is_named_with_folders_and_remedy() {
    let folder = Folder::new();
    let (memory, id) = child(&folder);
    fs::create_dir(folder.file("old")).unwrap();
    fs::create_dir(folder.file("empty")).unwrap();
    fs::rename(folder.file("base.snap"), folder.file("old/renamed")).unwrap();
    let names = folder.names();
    for args in commands_on_child("base.raw") {
        let told = run(&folder, &[&args[..], &["--layers", "empty"]].concat()).exits(1);
        told.says(&[
            "child.snap: is layered",
            &id,
            "last known as base.snap",
            "searched: ., empty",
            "--layers DIR or SNAPRESTORE_LAYERS",
        ]);
    }
    assert_eq!(folder.names(), names, "nothing was left behind");

    // In another folder, and under another name.
    let extract = ["extract", "child.snap", "-o", "out", "--force"];
    let layers = ["--layers", "empty", "--layers", "old"];
    run(&folder, &[&extract[..], &layers].concat()).exits(0);
    assert!(folder.read("out") == memory);
    for args in [
        &["info", "child.snap"][..],
        &["verify", "child.snap"],
        &["verify", "child.snap", "--chain"],
        &["create", "base.raw", "--base", "child.snap", "-o", "new"],
    ] {
        run(&folder, &[args, &layers].concat()).exits(0);
    }
    let mut by_variable = command(extract);
    by_variable
        .current_dir(folder.path())
        .env("SNAPRESTORE_LAYERS", "empty::old");
    Run::to_end(&mut by_variable).exits(0);

    // Beside the child, under another name.
    fs::rename(folder.file("old/renamed"), folder.file("renamed")).unwrap();
    holds(&folder, "child.snap", &memory);

    let wrong = [&extract[..], &["--layers", "child.snap"]].concat();
    run(&folder, &wrong)
        .exits(2)
        .says(&["child.snap: is not a folder"]);
    let wrong = [&extract[..], &["--layers", "none"]].concat();
    run(&folder, &wrong)
        .exits(1)
        .says(&["none: cannot search it"]);
}

#[test]
fn truncated_or_replaced_ancestor_is_an_error() {
    let folder = Folder::new();
    let (memory, id) = child(&folder);
    let whole = folder.read("base.snap");
    let extract = ["extract", "child.snap", "-o", "new"];

    folder.write("base.snap", &whole[..whole.len() - 1]);
    run(&folder, &extract).exits(3).says(&[&id, "base.snap"]);
    let verified = run(&folder, &["verify", "child.snap"]).exits(3).text();
    assert!(verified.contains("base.snap"), "{verified}");

    // The same memory, repacked.
    run(
        &folder,
        &["create", "base.raw", "-o", "base.snap", "--force"],
    )
    .exits(0);
    run(&folder, &extract).exits(1).says(&[
        "child.snap: is layered",
        &id,
        "base.snap: is not the file that was recorded",
        "its id is",
        "--layers DIR",
    ]);
    assert!(!folder.file("new").exists());

    folder.write("base.snap", &whole);
    holds(&folder, "child.snap", &memory);
}

/// Returns the damage that a test does to a file of a chain, by name.
fn damages(whole: &[u8]) -> [(&'static str, Option<Vec<u8>>); 4] {
    let mut trailer = whole.to_vec();
    let at = trailer.len() - 100;
    trailer[at] ^= 1;
    [
        ("missing", None),
        ("truncated", Some(whole[..whole.len() / 2].to_vec())),
        ("replaced", None),
        ("damaged trailer", Some(trailer)),
    ]
}

/// Whatever happens to whichever file of a chain, no command does anything before it says so.
#[test]
fn each_lost_file_of_a_chain_is_an_error_by_name() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    write_diff(&folder, "diff", &mut memory, (1, 40, 1));
    create(&folder, "diff", "base.snap", "middle.snap", &[]);
    write_diff(&folder, "diff", &mut memory, (1, 40, 2));
    create(&folder, "diff", "middle.snap", "child.snap", &[]);
    let id = |name| run(&folder, &["info", name, "--json"]).json()["snapshot_id"].to_string();
    let ids: Vec<_> = ["base.snap", "middle.snap", "child.snap"]
        .map(|name| (name, id(name).trim_matches('"').to_owned()))
        .into();
    fs::create_dir(folder.file("empty")).unwrap();
    // The same memory, repacked.
    run(&folder, &["create", "base.raw", "-o", "other"]).exits(0);
    let other = folder.read("other");
    fs::remove_file(folder.file("other")).unwrap();
    for (victim, id) in &ids {
        let whole = folder.read(victim);
        for (damage, bytes) in damages(&whole) {
            fs::remove_file(folder.file(victim)).unwrap();
            match (damage, bytes) {
                ("replaced", _) => folder.write(victim, &other),
                (_, Some(bytes)) => folder.write(victim, &bytes),
                (_, None) => {}
            }
            let names = folder.names();
            let is_child = *victim == "child.snap";
            for args in commands_on_child("diff") {
                let run = run(&folder, &[&args[..], &["--layers", "empty"]].concat());
                let case = format!("{damage} {victim}: {args:?}");
                if is_child && damage == "replaced" {
                    // Another good snapshot.
                    assert_eq!(run.code, Some(0), "{case}: {}", run.err);
                    let _ = fs::remove_file(folder.file("out"));
                    continue;
                }
                let code = match damage {
                    "missing" | "replaced" => 1,
                    _ => 3,
                };
                assert_eq!(run.code, Some(code), "{case}: {}{}", run.text(), run.err);
                // `verify` reports damage on standard output.
                let said = run.text() + &run.err;
                assert!(said.contains(victim), "{case}: {said}");
                if !is_child {
                    assert!(said.contains(id), "{case}: {said}");
                    assert!(said.contains("child.snap"), "{case}: {said}");
                }
                if !is_child && damage == "missing" {
                    let searched = ["searched: ., empty", "--layers DIR or SNAPRESTORE_LAYERS"];
                    let all = searched.iter().all(|part| said.contains(part));
                    assert!(all, "{case}: {said}");
                }
                assert_eq!(folder.names(), names, "{case} left a file");
            }
            folder.write(victim, &whole);
        }
    }
    holds(&folder, "child.snap", &memory);
}

#[test]
fn chain_is_verified_wholly_on_request() {
    let folder = Folder::new();
    base(&folder);
    // The child uses a few pages of the base only.
    folder.write("small", &folder.read("base.raw")[..100 * PAGE]);
    create(&folder, "small", "base.snap", "child.snap", &[]);
    let report = run(&folder, &["verify", "child.snap", "--chain", "--json"])
        .exits(0)
        .json();
    assert_eq!(report["ok"], true);
    let [ancestor] = &report["chain"].as_array().unwrap()[..] else {
        panic!("{report}");
    };
    assert_eq!(number(ancestor, "pages_checked"), PAGES as u64);
    assert_eq!(ancestor["ok"], true);

    // A byte near the end of the base's frames.
    let info = run(&folder, &["info", "base.snap", "--json"]).json();
    let mut bytes = folder.read("base.snap");
    let at = usize::try_from(number(&info, "stored_bytes")).unwrap();
    bytes[at] ^= 1;
    folder.write("base.snap", &bytes);
    run(&folder, &["verify", "child.snap"]).exits(0);
    let report = run(&folder, &["verify", "child.snap", "--chain", "--json"])
        .exits(3)
        .json();
    assert_eq!(report["ok"], false);
    assert_eq!(report["problems"], serde_json::json!([]));
    let ancestor = &report["chain"][0];
    assert_eq!(ancestor["ok"], false);
    assert_ne!(ancestor["problems"], serde_json::json!([]), "{report}");
    let text = run(&folder, &["verify", "child.snap", "--chain"])
        .exits(3)
        .text();
    assert!(text.contains("child.snap: good"), "{text}");
    assert!(text.contains("base.snap: DAMAGED"), "{text}");
}

/// A file that only an ancestor lists need not be there: nothing of the snapshot lies in it.
#[test]
fn chain_without_a_file_that_it_does_not_need_is_verified() {
    let folder = Folder::new();
    base(&folder);
    // The first block is of the base, and the second one is the child's own.
    let pages = 2 * 512;
    let mut memory = folder.read("base.raw")[..pages * PAGE].to_vec();
    memory[512 * PAGE..].copy_from_slice(&noise(512 * PAGE));
    folder.write("memory", &memory);
    create(&folder, "memory", "base.snap", "1.snap", &[]);
    // The grandchild needs only the latter.
    memory[..512 * PAGE].fill(0);
    folder.write("memory", &memory);
    create(&folder, "memory", "1.snap", "2.snap", &["--holes", "zero"]);
    let listed = run(&folder, &["info", "2.snap", "--json"]).json()["ancestors"].clone();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let verify = ["verify", "2.snap", "--chain", "--json"];
    let report = run(&folder, &verify).exits(0).json();
    assert_eq!(number(&report["chain"][0], "pages_checked"), pages as u64);
    assert_eq!(report["chain"][0].get("not_checked_alone"), None);

    let whole = folder.read("base.snap");
    let info = run(&folder, &["info", "base.snap", "--json"]).json();
    for (bytes, reason) in [
        (None, "missing"),
        (Some(&whole[..5000]), "./base.snap: incomplete"),
    ] {
        fs::remove_file(folder.file("base.snap")).unwrap();
        if let Some(bytes) = bytes {
            folder.write("base.snap", bytes);
        }
        let report = run(&folder, &verify).exits(0).json();
        assert_eq!(report["ok"], true);
        assert_eq!(number(&report, "pages_checked"), pages as u64);
        let unneeded = &report["chain"][0]["not_checked_alone"];
        assert_eq!(unneeded["snapshot_id"], info["snapshot_id"], "{report}");
        assert_eq!(unneeded["name"], "base.snap");
        let told = unneeded["reason"].as_str().unwrap();
        assert!(told.starts_with(reason), "{told}");
        let text = run(&folder, &["verify", "2.snap", "--chain"])
            .exits(0)
            .text();
        let expected = "1.snap: not checked beyond what 2.snap uses of it";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("last known as base.snap"), "{text}");
        assert!(text.contains("which 2.snap does not need"), "{text}");
        folder.write("base.snap", &whole);
    }

    // Damage in what the snapshot uses is found without the file, too.
    fs::remove_file(folder.file("base.snap")).unwrap();
    let mut bytes = folder.read("1.snap");
    bytes[4096 + 200] ^= 1;
    folder.write("1.snap", &bytes);
    let told = run(&folder, &["verify", "2.snap", "--chain"]).exits(3);
    assert!(told.text().contains("2.snap: DAMAGED"), "{}", told.text());
    // A snapshot that needs the file is still refused.
    run(&folder, &["verify", "1.snap", "--chain"]).exits(1);
}

/// Regression test: the report of a restore named the child, with the offset in the base.
#[test]
fn restore_names_the_file_of_a_damaged_frame() {
    let folder = Folder::new();
    child(&folder);
    let mut bytes = folder.read("base.snap");
    bytes[4096 + 200] ^= 1;
    folder.write("base.snap", &bytes);
    for prefetch in ["off", "all"] {
        let args = ["restore", "child.snap", "--prefetch", prefetch, "--json"];
        if !possible(&folder, "restore_names_the_file_of_a_damaged_frame") {
            return;
        }
        let report = run(&folder, &args).exits(3).json();
        let failures = report["failures"].as_array().unwrap();
        assert_eq!(failures.len(), 1, "{report}");
        assert_eq!(failures[0]["file"], "./base.snap", "{report}");
        assert_eq!(failures[0]["offset"], 4096, "{report}");
    }
}
