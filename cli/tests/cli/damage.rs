//! Snapshots that are broken, cut off, or none at all.

use snaprestore_fixtures::images::Mix;

use crate::common::{Folder, number, run};

fn snapshot(folder: &Folder) -> Vec<u8> {
    folder.write("raw", &Mix::new(700, 5).bytes());
    run(folder, &["create", "raw", "-o", "good"]).exits(0);
    folder.read("good")
}

#[test]
fn a_flipped_bit_in_a_frame_is_found_and_nothing_is_extracted() {
    let folder = Folder::new();
    let mut bytes = snapshot(&folder);
    // The first frame follows the header.
    bytes[4096 + 200] ^= 1;
    folder.write("bad", &bytes);
    let verified = run(&folder, &["verify", "bad", "--json"]).exits(3).json();
    assert_eq!(verified["ok"], false);
    number(&verified, "frames_checked");
    number(&verified, "pages_checked");
    let problem = &verified["problems"][0];
    assert_eq!(problem["what"], "frame");
    assert_eq!(number(problem, "offset"), 4096);
    assert!(problem["detail"].as_str().unwrap().contains("checksum"));
    let text = run(&folder, &["verify", "bad"]).exits(3).text();
    assert!(
        text.contains("DAMAGED") && text.contains("at byte 4096"),
        "{text}"
    );

    run(&folder, &["extract", "bad", "-o", "out"])
        .exits(3)
        .says(&["bad", "damaged frame at byte 4096"]);
    assert_eq!(folder.names(), ["bad", "good", "raw"]);
    let streamed = run(&folder, &["extract", "bad", "-o", "-"]).exits(3);
    let raw = folder.read("raw");
    assert!(
        raw.starts_with(&streamed.out),
        "what was streamed before it is right"
    );
    // The directory is intact.
    run(&folder, &["info", "bad"]).exits(0);
}

#[test]
fn what_is_cut_off_or_no_snapshot_exits_3() {
    let folder = Folder::new();
    let bytes = snapshot(&folder);
    folder.write("short", &bytes[..bytes.len() - 1]);
    folder.write("half", &bytes[..bytes.len() / 2]);
    folder.write("text", b"hello");
    folder.write("empty", b"");
    for file in ["short", "half", "text", "empty", "raw"] {
        for command in [&["info"][..], &["verify"], &["extract", "-o", "out"]] {
            let mut args = command.to_vec();
            args.push(file);
            let run = run(&folder, &args);
            assert_eq!(run.code, Some(3), "{args:?}: {}{}", run.text(), run.err);
            assert!(
                run.text().contains(file) || run.err.contains(file),
                "{args:?}"
            );
        }
        let verified = run(&folder, &["verify", file, "--json"]).exits(3).json();
        assert_eq!(verified["ok"], false);
        assert!(!verified["problems"].as_array().unwrap().is_empty());
    }
    assert!(!folder.file("out").exists());
}

#[test]
fn what_is_no_snapshot_is_not_called_damaged() {
    let folder = Folder::new();
    folder.write("empty", b"");
    std::fs::create_dir(folder.file("folder")).unwrap();
    let text = run(&folder, &["verify", "empty"]).exits(3).text();
    assert!(text.starts_with("empty: not a snapshot"), "{text}");
    assert_eq!(text.matches("empty").count(), 1, "{text}");
    for command in [
        &["info"][..],
        &["verify"],
        &["restore"],
        &["extract", "-o", "out"],
    ] {
        let run = run(&folder, &[command, &["folder"]].concat()).exits(1);
        assert!(
            run.err.starts_with("snaprestore: folder: is a folder"),
            "{}",
            run.err
        );
    }
}

#[test]
fn what_only_a_newer_program_reads_exits_3() {
    let folder = Folder::new();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/golden/v1/");
    for (file, says) in [
        ("bad-version-2.snap", "version 2"),
        ("bad-required-feature.snap", "features"),
    ] {
        let path = format!("{golden}{file}");
        for command in ["info", "verify", "restore"] {
            run(&folder, &[command, &path]).exits(3).says(&[says]);
        }
    }
}

#[test]
fn a_section_that_several_checks_read_is_told_once() {
    let folder = Folder::new();
    // A run of zero pages long enough to be listed.
    let mut raw = crate::common::noise(8 * 4096);
    raw.resize(4096 * 4096, 0);
    folder.write("raw", &raw);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let mut bytes = folder.read("s");
    let runs = crate::restore::section(&bytes, 3);
    bytes[runs + 8] ^= 1;
    folder.write("s", &bytes);
    let report = run(&folder, &["verify", "s", "--json"]).exits(3).json();
    assert_eq!(report["problems"].as_array().unwrap().len(), 1, "{report}");
}

#[test]
fn a_missing_file_is_a_failed_operation() {
    let folder = Folder::new();
    for command in [&["info"][..], &["verify"], &["extract", "-o", "out"]] {
        let mut args = command.to_vec();
        args.push("nowhere");
        run(&folder, &args)
            .exits(1)
            .says(&["snaprestore: nowhere", "No such file"]);
    }
}
