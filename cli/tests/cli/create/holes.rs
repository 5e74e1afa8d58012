//! Holes of sparse files: zeros, or what a diff of Firecracker leaves out.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use crate::common::{Folder, Run, command, noise, remarks, run};

/// Starts of states as written by releases of Firecracker with bincode and with bitcode.
const STATES: [&[u8]; 2] = [
    b"\x00\x00\x64\x86\x84\x19\x10\x07\x06\x00\x00\x00\x00\x00\x00\x00",
    b"\x00\x00\x00\x64\x86\x84\x19\x10\x07\x06\x31\x31\x2e\x30\x2e\x30",
];

/// Writes a file of 8 MiB with 64 KiB of data.
fn write_diff(folder: &Folder, name: &str) {
    let file = File::create(folder.file(name)).unwrap();
    file.set_len(8 << 20).unwrap();
    file.write_all_at(&vec![7; 64 << 10], 1 << 20).unwrap();
}

#[test]
fn holes_read_as_zeros_are_remarked() {
    let folder = Folder::new();
    write_diff(&folder, "diff");
    let create = ["create", "diff", "-o", "s", "--force"];
    let told = run(&folder, &create).exits(0);
    for says in ["read as zeros from holes", "snapshot-editor"] {
        assert!(told.text().contains(says), "{}", told.text());
    }
    // Most raw files have holes, so this is no warning.
    assert_eq!(told.err, "");
    let told = run(&folder, &[&create[..], &["--json"]].concat()).json();
    let remark = &told["remarks"][0];
    assert_eq!(remark["key"], "source.hole_bytes");
    let bytes: u64 = remark["value"].as_str().unwrap().parse().unwrap();
    assert!((7 << 20..8 << 20).contains(&bytes), "{bytes}");
    let info = run(&folder, &["info", "s", "--json"]).exits(0).json();
    assert_eq!(info["properties"]["source.hole_bytes"], remark["value"]);

    // A user who has confirmed it needs no advice.
    let confirmed = [&create[..], &["--holes", "zero"]].concat();
    let told = run(&folder, &confirmed).exits(0).text();
    assert!(told.contains("as --holes zero says"), "{told}");
    assert!(!told.contains("snapshot-editor"), "{told}");

    // A file is treated the same through standard input.
    let stdin = File::open(folder.file("diff")).unwrap();
    let mut piped = command(["create", "-", "-o", "s", "-f", "--json"]);
    let piped = Run::to_end(piped.current_dir(folder.path()).stdin(stdin)).exits(0);
    assert_eq!(piped.json()["remarks"], json_remarks(&folder, &create));

    folder.write("dense", &vec![7; 64 << 10]);
    let told = run(&folder, &["create", "dense", "-o", "s", "-f", "--json"]).exits(0);
    assert_eq!(told.json()["remarks"], serde_json::json!([]));
}

fn json_remarks(folder: &Folder, create: &[&str]) -> serde_json::Value {
    run(folder, &[create, &["--json"]].concat()).json()["remarks"].take()
}

#[test]
fn firecracker_diff_is_refused_unless_holes_are_zeros() {
    let folder = Folder::new();
    write_diff(&folder, "diff");
    folder.write("dense", &noise(1 << 20));
    folder.write("other", b"{\"vcpus\": 2}");
    for state in STATES {
        folder.write("state", &[state, &[1; 100]].concat());
        let names = folder.names();
        let attach = ["--attach", "vmstate=state"];
        let diff = [&["create", "diff", "-o", "s"][..], &attach].concat();
        run(&folder, &diff).exits(1).says(&[
            "diff: ",
            "\"vmstate\"",
            "merge it into its base",
            "--holes zero",
        ]);
        assert_eq!(folder.names(), names);
        run(&folder, &[&diff[..], &["--holes", "zero"]].concat()).exits(0);
        run(
            &folder,
            &["extract", "s", "--attachment", "vmstate", "-o", "out"],
        )
        .exits(0);
        assert_eq!(folder.read("out"), folder.read("state"));
        // The full memory of a VM, and a diff beside which another file is attached.
        run(
            &folder,
            &[&["create", "dense", "-o", "t"][..], &attach].concat(),
        )
        .exits(0);
        run(
            &folder,
            &["create", "diff", "-o", "u", "--attach", "a=other"],
        )
        .exits(0);
        for name in ["s", "t", "u", "out"] {
            std::fs::remove_file(folder.file(name)).unwrap();
        }
    }
}

/// The pages that a guest has written are scattered over its memory, with holes between them that
/// are shorter than what is read at once.
#[test]
fn scattered_diff_is_refused_and_its_holes_counted() {
    let folder = Folder::new();
    let diff = File::create(folder.file("diff")).unwrap();
    diff.set_len(8 << 20).unwrap();
    for place in (0..8 << 20).step_by(32 << 10) {
        diff.write_all_at(&[7; 4096], place).unwrap();
    }
    folder.write("state", &[STATES[0], &[1; 100]].concat());
    let args = ["create", "diff", "-o", "s"];
    run(
        &folder,
        &[&args[..], &["--attach", "vmstate=state"]].concat(),
    )
    .exits(1)
    .says(&["diff: most of it is holes"]);
    let told = run(&folder, &[&args[..], &["--json"]].concat())
        .exits(0)
        .json();
    assert_eq!(
        remarks(&told),
        [("source.hole_bytes".to_owned(), (8 << 20) / 8 * 7)]
    );
}
