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
