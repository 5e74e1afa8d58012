//! The commands that manage chains: `flatten`, `rebase`, `tree`, and what `create` does for them.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{Folder, command, finish_within, noise, number, run};
use crate::layers::{base, create, holds, write_diff};

const PAGE: usize = 4096;

/// Creates `base.snap` and the chain `1.snap` to `3.snap` on it; returns the memory of each.
fn chain(folder: &Folder) -> Vec<Vec<u8>> {
    folder.write("state", b"the state");
    folder.write("note", b"a note");
    let mut memory = base(folder);
    let attach = ["create", "base.raw", "-o", "base.snap", "--force"];
    let both = ["--attach", "vm=state", "--attach", "note=note"];
    run(folder, &[&attach[..], &both].concat()).exits(0);
    let mut states = vec![memory.clone()];
    let mut before = "base.snap".to_owned();
    // No page of a state is anywhere in another one.
    let new = noise(4 * 40 * PAGE);
    for number in 1..4 {
        let diff = File::create(folder.file("diff")).unwrap();
        diff.set_len(memory.len() as u64).unwrap();
        let pages = new.chunks(PAGE).skip(40 * number).take(40);
        for (n, page) in pages.enumerate() {
            let at = (50 * n + number) * PAGE;
            memory[at..at + PAGE].copy_from_slice(page);
            diff.write_all_at(page, at as u64).unwrap();
        }
        let child = format!("{number}.snap");
        create(folder, "diff", &before, &child, &[]);
        states.push(memory.clone());
        before = child;
    }
    fs::remove_file(folder.file("diff")).unwrap();
    states
}

fn info(folder: &Folder, file: &str) -> Value {
    run(folder, &["info", file, "--json"]).exits(0).json()
}

fn id(folder: &Folder, file: &str) -> String {
    let info = info(folder, file);
    info["snapshot_id"].as_str().unwrap().to_owned()
}

/// Returns the digest of the content.
fn digest(folder: &Folder, file: &str) -> Value {
    info(folder, file)["content_digest"].clone()
}

#[test]
fn flattened_chain_is_one_file_with_the_same_memory() {
    let folder = Folder::new();
    let states = chain(&folder);
    for (number, state) in states.iter().enumerate().skip(1) {
        let chain = format!("{number}.snap");
        let flatten = ["flatten", &chain, "-o", "flat.snap", "--force", "--json"];
        let report = run(&folder, &flatten).exits(0).json();
        assert_eq!(report["source"]["file"], *chain);
        assert_eq!(report["source"]["ancestors"], number);
        assert_eq!(self::number(&report, "ancestor_pages"), 0);
        let frames =
            self::number(&report, "copied_frames") + self::number(&report, "packed_frames");
        assert_eq!(self::number(&report, "frames"), frames);
        assert!(self::number(&report, "copied_frames") > 0, "{report}");
        assert_eq!(report["content_digest"], digest(&folder, &chain));
        let alone = Folder::new();
        alone.write("flat.snap", &folder.read("flat.snap"));
        holds(&alone, "flat.snap", state);
        let properties = &info(&alone, "flat.snap")["properties"];
        assert!(properties["source.base_hole_bytes"].is_string());
        assert!(properties["base.id"].is_null(), "{properties}");
        assert!(
            properties
                .as_object()
                .unwrap()
                .keys()
                .all(|key| !key.starts_with("ancestor.")),
            "{properties}"
        );
    }
    let text = run(&folder, &["flatten", "base.snap", "-o", "same.snap"])
        .exits(0)
        .text();
    for part in [
        "copied as stored, 0 packed again",
        "flattened   base.snap",
        "0 ancestors",
    ] {
        assert!(text.contains(part), "{text}");
    }
    holds(&folder, "same.snap", &states[0]);
    let attachments = info(&folder, "same.snap")["attachments"].clone();
    assert_eq!(attachments, info(&folder, "base.snap")["attachments"]);
    assert_eq!(attachments.as_array().unwrap().len(), 2);
}

#[test]
fn flatten_refuses_outputs_in_use_and_damaged_chains() {
    let folder = Folder::new();
    chain(&folder);
    let names = folder.names();
    let refused: &[(&[&str], i32, &str)] = &[
        (&["3.snap", "-o", "3.snap", "--force"], 2, "would be lost"),
        (
            &["3.snap", "-o", "base.snap", "--force"],
            2,
            "is an ancestor of 3.snap",
        ),
        (
            &["base.snap", "-o", "1.snap", "--force"],
            2,
            "1.snap: is an ancestor of",
        ),
        (&["base.snap", "-o", "3.snap"], 1, "--force replaces it"),
        (&["none", "-o", "n"], 1, "none"),
        (&["note", "-o", "n"], 3, "not a snapshot"),
        (&["3.snap", "-o", "-", "--json"], 2, "--json"),
    ];
    for (args, code, says) in refused {
        run(&folder, &[&["flatten"], *args].concat())
            .exits(*code)
            .says(&[says]);
    }
    assert_eq!(folder.names(), names);
    // What nothing needs may be replaced.
    run(
        &folder,
        &["flatten", "base.snap", "-o", "3.snap", "--force"],
    )
    .exits(0);

    let whole = folder.read("base.snap");
    let mut bytes = whole.clone();
    bytes[4096 + 200] ^= 1;
    folder.write("base.snap", &bytes);
    let flatten = ["flatten", "2.snap", "-o", "n"];
    run(&folder, &flatten)
        .exits(3)
        .says(&["base.snap: damaged frame"]);
    fs::remove_file(folder.file("base.snap")).unwrap();
    run(&folder, &flatten)
        .exits(1)
        .says(&["last known as base.snap", "--layers DIR"]);
    assert!(!folder.file("n").exists());
    fs::create_dir(folder.file("old")).unwrap();
    folder.write("old/base", &whole);
    run(&folder, &[&flatten[..], &["--layers", "old"]].concat()).exits(0);
}

#[test]
fn long_chain_is_flattened_on_creation() {
    let folder = Folder::new();
    let mut memory = chain(&folder).pop().unwrap();
    write_diff(&folder, "diff", &mut memory, (1, 50, 9));
    let after = ["--flatten-after", "4"];
    let report = create(&folder, "diff", "3.snap", "child.snap", &after);
    assert!(report["flattened"].is_null(), "{report}");
    assert_eq!(
        info(&folder, "child.snap")["ancestors"]
            .as_array()
            .unwrap()
            .len(),
        4
    );
    holds(&folder, "child.snap", &memory);

    let after = ["--flatten-after", "3"];
    let report = create(&folder, "diff", "3.snap", "flat.snap", &after);
    assert_eq!(report["flattened"]["ancestors"], 4);
    assert_eq!(report["flattened"]["limit"], 3);
    assert!(number(&report["flattened"], "copied_frames") > 0);
    assert_eq!(number(&report, "ancestor_pages"), 0);
    assert!(number(&report["base"], "pages") > 0);
    assert_eq!(report["content_digest"], digest(&folder, "child.snap"));
    assert_eq!(info(&folder, "flat.snap")["ancestors"], json!([]));
    holds(&folder, "flat.snap", &memory);
    let told = ["create", "diff", "--base", "3.snap", "-o", "2nd.snap"];
    let text = run(&folder, &[&told[..], &after].concat()).exits(0).text();
    assert!(
        text.contains("needs no other file; would have needed 4 files, more than 3"),
        "{text}"
    );

    let args = [
        "create",
        "diff",
        "--base",
        "3.snap",
        "-o",
        "-",
        "--flatten-after",
        "3",
    ];
    run(&folder, &args)
        .exits(2)
        .says(&["needs a file as its output"]);
    let args = ["create", "base.raw", "-o", "n", "--flatten-after", "3"];
    run(&folder, &args).exits(2).says(&["--base"]);
    assert!(folder.names().iter().all(|name| !name.ends_with("partial")));
}

#[test]
fn attachments_of_the_base_are_inherited_by_name() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    folder.write("state", b"the state");
    folder.write("note", b"a note");
    let attach = ["--force", "--attach", "vm=state", "--attach", "note=note"];
    run(
        &folder,
        &[&["create", "base.raw", "-o", "base.snap"][..], &attach].concat(),
    )
    .exits(0);
    write_diff(&folder, "diff", &mut memory, (1, 60, 3));
    let inherit = ["--inherit-attachment", "vm", "--attach", "own=note"];
    create(&folder, "diff", "base.snap", "child.snap", &inherit);
    let attachments = info(&folder, "child.snap")["attachments"].clone();
    let expected = json!([{"name": "vm", "bytes": 9}, {"name": "own", "bytes": 6}]);
    assert_eq!(attachments, expected);
    let extract = ["extract", "child.snap", "--attachment", "vm", "-o", "out"];
    run(&folder, &extract).exits(0);
    assert_eq!(folder.read("out"), b"the state");
    run(&folder, &["verify", "child.snap"]).exits(0);

    let args = ["create", "diff", "--base", "base.snap", "-o", "n"];
    let refused = |more: &[&str], code| run(&folder, &[&args[..], more].concat()).exits(code);
    refused(&["--inherit-attachment", "vmstate"], 1).says(&[
        "base.snap: has no attachment \"vmstate\"",
        "\"vm\", \"note\"",
    ]);
    refused(&["--inherit-attachment", "vm", "--attach", "vm=note"], 2)
        .says(&["two attachments are named \"vm\""]);
    let args = [
        "create",
        "base.raw",
        "-o",
        "n",
        "--inherit-attachment",
        "vm",
    ];
    run(&folder, &args).exits(2).says(&["--base"]);
    assert!(!folder.file("n").exists());
}

#[test]
fn child_is_rebased_onto_the_flattened_base() {
    let folder = Folder::new();
    let states = chain(&folder);
    let before = digest(&folder, "3.snap");
    run(&folder, &["flatten", "2.snap", "-o", "flat.snap"]).exits(0);
    // The old base and its ancestors are gone.
    fs::create_dir(folder.file("old")).unwrap();
    for name in ["base.snap", "1.snap", "2.snap"] {
        fs::rename(folder.file(name), folder.file("old").join(name)).unwrap();
    }
    run(&folder, &["info", "3.snap"]).exits(1);
    let old_id = {
        let info = run(&folder, &["info", "3.snap", "--layers", "old", "--json"])
            .exits(0)
            .json();
        info["snapshot_id"].clone()
    };
    let rebase = ["rebase", "3.snap", "--base", "flat.snap"];
    let other = run(
        &folder,
        &[&rebase[..], &["-o", "other.snap", "--json"]].concat(),
    );
    let report = other.exits(0).json();
    assert_eq!(report["old_snapshot_id"], old_id);
    assert_eq!(report["base"]["snapshot_id"], *id(&folder, "flat.snap"));
    assert_eq!(report["content_digest"], before);
    assert!(number(&report, "ancestor_pages") > 0);
    holds(&folder, "other.snap", &states[3]);
    run(&folder, &["info", "3.snap"]).exits(1);

    // In place.
    let text = run(&folder, &rebase).exits(0).text();
    assert!(text.contains("taken from it and its ancestors"), "{text}");
    let replaced = format!(
        "replaced    3.snap (its ID was {})",
        old_id.as_str().unwrap()
    );
    assert!(text.contains(&replaced), "{text}");
    assert_ne!(*id(&folder, "3.snap"), old_id);
    holds(&folder, "3.snap", &states[3]);
    let info = info(&folder, "3.snap");
    let [ancestor] = &info["ancestors"].as_array().unwrap()[..] else {
        panic!("{info}");
    };
    assert_eq!(ancestor["file"], "./flat.snap");
    assert_eq!(info["properties"]["base.id"], *id(&folder, "flat.snap"));
    // The same by name.
    run(&folder, &[&rebase[..], &["-o", "3.snap"]].concat()).exits(0);
    holds(&folder, "3.snap", &states[3]);
}

#[test]
fn rebase_refuses_other_memory_and_what_others_need() {
    let folder = Folder::new();
    chain(&folder);
    run(&folder, &["flatten", "1.snap", "-o", "flat-1"]).exits(0);
    run(&folder, &["flatten", "2.snap", "-o", "flat-2"]).exits(0);
    fs::create_dir(folder.file("old")).unwrap();
    let names = folder.names();
    let read = |name: &str| folder.read(name);
    let (second, third) = (read("2.snap"), read("3.snap"));
    let refused: &[(&[&str], i32, &str)] = &[
        (
            &["3.snap", "--base", "flat-1"],
            1,
            "flat-1: holds other memory than ./2.snap",
        ),
        (
            &["2.snap", "--base", "flat-1"],
            2,
            "2.snap: is an ancestor of ./3.snap",
        ),
        (&["flat-2", "--base", "flat-1"], 1, "needs no other file"),
        (
            &["2.snap", "--base", "3.snap", "-o", "n"],
            1,
            "cannot become a child of 3.snap",
        ),
        (&["3.snap", "--base", "3.snap"], 2, "would be lost"),
        (&["3.snap", "--base", "none"], 1, "cannot open the new base"),
        (
            &["3.snap", "--base", "flat-2", "-o", "flat-1"],
            1,
            "--force replaces it",
        ),
        (
            &["3.snap", "--base", "2.snap", "-o", "1.snap", "--force"],
            2,
            "is an ancestor of",
        ),
        (
            &["3.snap", "--base", "flat-2", "-o", "-"],
            2,
            "name a file to write",
        ),
    ];
    for (args, code, says) in refused {
        run(&folder, &[&["rebase"], *args].concat())
            .exits(*code)
            .says(&[says]);
    }
    // The old base is missing: the blocks tell.
    for name in ["base.snap", "1.snap", "2.snap"] {
        fs::rename(folder.file(name), folder.file("old").join(name)).unwrap();
    }
    run(&folder, &["rebase", "3.snap", "--base", "flat-1"])
        .exits(1)
        .says(&[
            "3.snap: its block",
            "is not as in flat-1",
            "2.snap",
            "--layers DIR",
        ]);
    for name in ["base.snap", "1.snap", "2.snap"] {
        fs::rename(folder.file("old").join(name), folder.file(name)).unwrap();
    }
    assert_eq!(folder.names(), names);
    assert!(read("2.snap") == second && read("3.snap") == third);
}

#[test]
fn tree_shows_what_needs_what() {
    let folder = Folder::new();
    chain(&folder);
    fs::write(folder.file("readme"), "no snapshot").unwrap();
    fs::create_dir(folder.file("more")).unwrap();
    fs::copy(folder.file("1.snap"), folder.file("copy.snap")).unwrap();
    fs::hard_link(folder.file("3.snap"), folder.file("hard.snap")).unwrap();
    std::os::unix::fs::symlink("3.snap", folder.file("link.snap")).unwrap();
    let whole = folder.read("3.snap");
    folder.write("cut.snap", &whole[..whole.len() / 2]);
    let mut damaged = whole;
    let at = damaged.len() - 100;
    damaged[at] ^= 1;
    folder.write("damaged.snap", &damaged);

    let tree = |args: &[&str]| {
        run(&folder, &[&["tree", "--json"], args].concat())
            .exits(0)
            .json()
    };
    let report = tree(&[]);
    let files = report["files"].as_array().unwrap();
    let node = |file: &str| {
        let node = files.iter().find(|node| node["file"] == file);
        node.unwrap_or_else(|| panic!("no {file} in {report}"))
    };
    assert_eq!(files.len(), 5, "{report}");
    assert_eq!(files[0]["file"], "base.snap");
    let base = node("base.snap");
    assert_eq!(
        base["needed_by"],
        json!(["1.snap", "2.snap", "3.snap", "copy.snap"])
    );
    assert_eq!(base["parent"], json!(null));
    let bytes: u64 = files.iter().map(|node| number(node, "file_bytes")).sum();
    assert_eq!(number(base, "bytes_with_dependents"), bytes);
    let length = fs::metadata(folder.file("base.snap")).unwrap().len();
    assert_eq!(number(base, "file_bytes"), length);
    // One of the two copies must stay.
    assert_eq!(node("1.snap")["needed_by"], json!(["2.snap", "3.snap"]));
    assert_eq!(node("1.snap")["copies"], json!(["copy.snap"]));
    assert_eq!(node("copy.snap")["needed_by"], json!([]));
    assert_eq!(node("copy.snap")["copies"], json!(["1.snap"]));
    assert_eq!(
        node("3.snap")["other_names"],
        json!(["hard.snap", "link.snap"])
    );
    assert_eq!(node("2.snap")["needed_by"], json!(["3.snap"]));
    assert_eq!(node("3.snap")["parent"], "2.snap");
    assert_eq!(node("3.snap")["needed_by"], json!([]));
    assert_eq!(node("3.snap")["ancestors"].as_array().unwrap().len(), 3);
    assert_eq!(report["missing"], json!([]));
    let unreadable = report["unreadable"].as_array().unwrap();
    let named: Vec<&str> = unreadable
        .iter()
        .map(|file| file["file"].as_str().unwrap())
        .collect();
    assert_eq!(named, ["cut.snap", "damaged.snap"]);
    assert!(
        unreadable[0]["error"]
            .as_str()
            .unwrap()
            .contains("incomplete snapshot")
    );
    assert!(
        unreadable[1]["error"]
            .as_str()
            .unwrap()
            .contains("damaged trailer")
    );
    // base.raw, note, readme, state, and the folder.
    assert_eq!(number(&report, "other_entries"), 5);

    let text = run(&folder, &["tree"]).exits(0).text();
    for part in [
        "\n   1.snap",
        "\n       3.snap",
        "(copy of 1.snap)",
        "no other needs 2 files of",
        ": 3.snap, copy.snap; ",
        "what the unreadable files need is not known",
        "UNREADABLE  cut.snap: incomplete",
        "5 other entries are not snapshots",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn tree_names_missing_and_replaced_ancestors() {
    let folder = Folder::new();
    chain(&folder);
    fs::create_dir(folder.file("more")).unwrap();
    let tree = |args: &[&str]| {
        run(&folder, &[&["tree", "--json"], args].concat())
            .exits(0)
            .json()
    };
    let missing = id(&folder, "base.snap");
    fs::rename(folder.file("base.snap"), folder.file("more/renamed")).unwrap();
    let report = tree(&["."]);
    let [entry] = &report["missing"].as_array().unwrap()[..] else {
        panic!("{report}");
    };
    assert_eq!(
        (&entry["snapshot_id"], &entry["name"]),
        (&json!(missing), &json!("base.snap"))
    );
    assert_eq!(entry["needed_by"].as_array().unwrap().len(), 3);
    let text = run(&folder, &["tree"]).exits(0).text();
    assert!(
        text.contains(&format!("MISSING     {missing} (last known as base.snap)")),
        "{text}"
    );
    assert_eq!(tree(&[".", "more", "./more"])["missing"], json!([]));

    // A file with the id of the base, but another length.
    let mut longer = folder.read("more/renamed");
    let trailer = longer.split_off(longer.len() - 4096);
    longer.extend([0; 4096]);
    longer.extend(trailer);
    let file = fs::File::create(folder.file("longer"));
    file.unwrap().write_all(&resealed(longer)).unwrap();
    let report = tree(&[]);
    assert_eq!(report["missing"][0]["replaced_by"], "longer");
}

#[test]
fn tree_tells_an_empty_folder_from_one_with_a_file() {
    let folder = Folder::new();
    let empty = run(&folder, &["tree"]).exits(0).text();
    assert_eq!(empty, "no snapshots here\n");
    base(&folder);
    let text = run(&folder, &["tree"]).exits(0).text();
    assert!(text.contains("no other needs 1 file of"), "{text}");
    run(&folder, &["tree", "none"]).exits(1).says(&["none"]);
}

/// Corrects the length that a trailer names, and its checksum.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let len = bytes.len() as u64;
    let at = bytes.len() - 4096;
    let trailer = &mut bytes[at..];
    trailer[40..48].copy_from_slice(&len.to_le_bytes());
    let crc = crc32fast::hash(&trailer[..4084]);
    trailer[4084..4088].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// A chain in which much was changed is repacked where little is left of a frame.
#[test]
fn frames_of_which_little_is_left_are_packed_anew() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    write_diff(&folder, "diff", &mut memory, (3, 4, 0));
    create(&folder, "diff", "base.snap", "child.snap", &[]);
    let flatten = ["flatten", "child.snap", "-o", "flat.snap", "--json"];
    let report = run(&folder, &flatten).exits(0).json();
    assert!(number(&report, "packed_frames") > 0, "{report}");
    holds(&folder, "flat.snap", &memory);
}

#[test]
fn damaged_block_of_the_base_is_stored_whole_with_a_warning() {
    let folder = Folder::new();
    // Each page is in one frame only.
    let mut memory = noise(1100 * PAGE);
    folder.write("base.raw", &memory);
    run(&folder, &["create", "base.raw", "-o", "base.snap"]).exits(0);
    let mut bytes = folder.read("base.snap");
    bytes[4096 + 200] ^= 1;
    folder.write("base.snap", &bytes);
    memory[..8].copy_from_slice(b"changed!");
    folder.write("image", &memory);
    let args = ["create", "image", "--base", "base.snap", "-o", "child.snap"];
    run(&folder, &args)
        .exits(0)
        .says(&["warning: 1 block", "base.snap: damaged frame"]);
    let info = info(&folder, "child.snap");
    assert_eq!(info["properties"]["base.damaged_blocks"], "1");
    assert!(number(&info, "ancestor_pages") > 0, "{info}");
    holds(&folder, "child.snap", &memory);
}

/// Regression test: the folder of the link was searched instead of that of the file.
#[test]
fn ancestor_is_not_replaced_through_a_link() {
    let folder = Folder::new();
    chain(&folder);
    fs::create_dir(folder.file("links")).unwrap();
    std::os::unix::fs::symlink("../1.snap", folder.file("links/1")).unwrap();
    let before = folder.read("1.snap");
    run(&folder, &["flatten", "base.snap", "-o", "links/flat"]).exits(0);
    run(
        &folder,
        &["flatten", "base.snap", "-o", "links/1", "--force"],
    )
    .exits(2)
    .says(&["is an ancestor of"]);
    run(&folder, &["rebase", "links/1", "--base", "links/flat"])
        .exits(2)
        .says(&["is an ancestor of"]);
    assert!(folder.read("1.snap") == before);
}

/// Regression test: the child was written, and nothing could read it.
#[test]
fn base_that_is_replaced_meanwhile_is_an_error() {
    let folder = Folder::new();
    chain(&folder);
    let args = [
        "create", "-", "--raw", "--base", "1.snap", "--holes", "zero",
    ];
    let mut create = command(args.into_iter().chain(["-o", "late.snap"]));
    let create = create.current_dir(folder.path()).stdin(Stdio::piped());
    let mut create = create
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It has opened its base when it has read more than fits into the pipe.
    let memory = folder.read("base.raw");
    let mut stdin = create.stdin.take().unwrap();
    stdin.write_all(&memory[..4 << 20]).unwrap();
    run(&folder, &["flatten", "1.snap", "-o", "flat"]).exits(0);
    fs::rename(folder.file("flat"), folder.file("1.snap")).unwrap();
    stdin.write_all(&memory[4 << 20..]).unwrap();
    drop(stdin);
    finish_within(create, Duration::from_secs(60))
        .exits(1)
        .says(&["1.snap: was replaced", "repeat the command"]);
    assert!(!folder.file("late.snap").exists());
}
