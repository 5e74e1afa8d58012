//! Attachments and dictionaries.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::Stdio;

use snaprestore_fixtures::images::Mix;

use super::image;
use crate::common::{Folder, command, finish, noise, number, remarks, run, wait_until};

#[test]
fn attachments_are_stored_beside_the_memory() {
    let folder = Folder::new();
    folder.write("raw", &[5; 4096]);
    folder.write("state", b"{\"vcpus\": 2}");
    folder.write("empty", b"");
    run(
        &folder,
        &[
            "create",
            "raw",
            "-o",
            "s",
            "--attach",
            "vm=state",
            "--attach",
            "nothing=empty",
        ],
    )
    .exits(0);
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    assert_eq!(
        info["attachments"],
        serde_json::json!([{"name": "vm", "bytes": 12}, {"name": "nothing", "bytes": 0}])
    );
    run(
        &folder,
        &["extract", "s", "--attachment", "vm", "-o", "out"],
    )
    .exits(0);
    assert_eq!(folder.read("out"), b"{\"vcpus\": 2}");
    let printed = run(
        &folder,
        &["extract", "s", "--attachment", "nothing", "-o", "-"],
    )
    .exits(0);
    assert!(printed.out.is_empty());
    run(
        &folder,
        &["extract", "s", "--attachment", "cpu", "-o", "none"],
    )
    .exits(1)
    .says(&["\"cpu\"", "vm, nothing"]);
    assert!(!folder.file("none").exists());
}

/// The command opens attachments before it reads its source.
#[test]
fn changing_attachment_is_remarked_or_an_error() {
    for grows in [false, true] {
        let folder = Folder::new();
        folder.write("state", b"{\"vcpus\": 2}");
        let args = ["create", "-", "-o", "s", "--attach", "vm=state", "--json"];
        let mut child = command(args)
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // More than the pipe holds: once it is written, the command is reading.
        stdin.write_all(&vec![7; 4 << 20]).unwrap();
        let state = File::options()
            .write(true)
            .open(folder.file("state"))
            .unwrap();
        let opened = state.metadata().unwrap();
        let place = if grows { opened.len() } else { 0 };
        wait_until("the file's time has moved on", || {
            state.write_all_at(b"[", place).unwrap();
            let now = state.metadata().unwrap();
            (now.mtime(), now.mtime_nsec()) != (opened.mtime(), opened.mtime_nsec())
        });
        drop(stdin);
        let run_of = finish(child);
        if grows {
            run_of
                .exits(1)
                .says(&["\"vm\": its size changed", "to 13 bytes"]);
            assert_eq!(folder.names(), ["state"]);
            continue;
        }
        let told = run_of.exits(0).says(&["warning: 1 attachment", "\"vm\""]);
        assert_eq!(
            remarks(&told.json()),
            [("attachments.changed".to_owned(), 1)]
        );
        let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
        assert_eq!(info["properties"]["attachments.changed"], "1");
    }
}

/// Unless the user asks for one, a dictionary is trained for small frames only.
#[test]
fn dictionary_is_trained_where_it_pays() {
    let folder = Folder::new();
    // Each frame has the same words, in a different order.
    let words: Vec<[u8; 32]> = noise(2000 * 32).as_chunks().0.to_vec();
    let order = noise((2000 * 32) + (24 << 16)).split_off(2000 * 32);
    let order = order.as_chunks::<2>().0.iter();
    let raw: Vec<u8> = order
        .flat_map(|n| words[usize::from(u16::from_le_bytes(*n)) % words.len()])
        .collect();
    folder.write("raw", &raw);
    let dictionaries = |arguments: &[&str]| {
        let arguments = [&["create", "raw", "-o", "s", "--force"], arguments].concat();
        run(&folder, &arguments).exits(0);
        let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
        info["dictionaries"].as_array().unwrap().len()
    };
    assert_eq!(dictionaries(&["--frame-size", "64"]), 1);
    assert_eq!(dictionaries(&["--frame-size", "128"]), 0);
    assert_eq!(
        dictionaries(&["--frame-size", "128", "--dictionary", "train"]),
        1
    );
    assert_eq!(
        dictionaries(&["--frame-size", "64", "--dictionary", "off"]),
        0
    );
}

#[test]
fn dictionary_file_can_be_supplied() {
    let folder = Folder::new();
    // Any bytes can serve as a dictionary; these are shared by the pages.
    let shared: Vec<u8> = Mix::new(16, 1).bytes();
    folder.write("dictionary", &shared[..32 << 10]);
    folder.write("raw", &image());
    run(
        &folder,
        &["create", "raw", "-o", "s", "--dictionary", "dictionary"],
    )
    .exits(0);
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    assert_eq!(number(&info["dictionaries"][0], "bytes"), 32 << 10);
    run(&folder, &["verify", "s"]).exits(0);
    run(&folder, &["extract", "s", "-o", "out"]).exits(0);
    assert!(folder.read("out") == image());
}
