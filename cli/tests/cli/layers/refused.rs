//! Bases, outputs and folders that are refused or remarked on.

use std::fs;

use super::{base, child, create, piped, write_diff};
use crate::common::{Folder, remarks, run};

#[test]
fn unusable_bases_and_outputs_are_refused() {
    let folder = Folder::new();
    let (_, _) = child(&folder);
    let whole = folder.read("base.snap");
    folder.write("cut", &whole[..whole.len() / 2]);
    folder.write("note", b"no snapshot");
    let names = folder.names();
    let refused: &[(&[&str], i32, &str)] = &[
        (&["diff", "--base", "cut", "-o", "n"], 3, "cut: "),
        (&["diff", "--base", "note", "-o", "n"], 3, "note: "),
        (&["diff", "--base", "none", "-o", "n"], 1, "none"),
        (
            &["diff", "--base", "base.snap", "-o", "base.snap", "--force"],
            2,
            "would be lost",
        ),
        (
            &["diff", "--base", "child.snap", "-o", "base.snap", "--force"],
            2,
            "base.snap: is an ancestor of child.snap",
        ),
        (&["diff", "--holes", "base", "-o", "n"], 2, "needs --base"),
    ];
    for (args, code, says) in refused {
        run(&folder, &[&["create"], *args].concat())
            .exits(*code)
            .says(&[says]);
    }
    let over = ["extract", "child.snap", "-o", "base.snap", "--force"];
    run(&folder, &over)
        .exits(2)
        .says(&["is an ancestor of child.snap"]);
    // Another snapshot of the folder, or of those of `--layers`, needs it.
    run(&folder, &["create", "base.raw", "-o", "other"]).exits(0);
    for over in [
        &["create", "base.raw", "-o", "base.snap", "--force"][..],
        &["extract", "other", "-o", "base.snap", "--force"],
    ] {
        run(&folder, over)
            .exits(2)
            .says(&["base.snap: is an ancestor of ./child.snap"]);
    }
    fs::create_dir(folder.file("more")).unwrap();
    fs::rename(folder.file("child.snap"), folder.file("more/child.snap")).unwrap();
    let over = ["extract", "other", "-o", "base.snap", "--force"];
    run(&folder, &[&over[..], &["--layers", "more"]].concat())
        .exits(2)
        .says(&["base.snap: is an ancestor of more/child.snap"]);
    fs::rename(folder.file("more/child.snap"), folder.file("child.snap")).unwrap();
    fs::remove_dir(folder.file("more")).unwrap();
    fs::remove_file(folder.file("other")).unwrap();
    assert_eq!(folder.names(), names);
    assert!(folder.read("base.snap") == whole);

    piped(
        &folder,
        "diff",
        &["create", "-", "--base", "base.snap", "-o", "n"],
    )
    .exits(2)
    .says(&["a pipe has no holes", "--holes zero"]);

    // Damage in the base where the child needs it.
    let mut bytes = whole;
    bytes[4096 + 200] ^= 1;
    folder.write("base.snap", &bytes);
    let mut memory = folder.read("base.raw");
    write_diff(&folder, "diff", &mut memory, (1, 512, 1));
    run(
        &folder,
        &["create", "diff", "--base", "base.snap", "-o", "n"],
    )
    .exits(3)
    .says(&[
        "base.snap",
        "damaged frame",
        "restore the base from a copy, or take a full snapshot",
    ]);
    assert!(!folder.file("n").exists());
}

#[test]
fn child_in_another_folder_than_its_base_is_remarked() {
    let folder = Folder::new();
    let mut memory = base(&folder);
    write_diff(&folder, "diff", &mut memory, (1, 37, 5));
    fs::create_dir(folder.file("out")).unwrap();
    let report = create(&folder, "diff", "base.snap", "out/child.snap", &[]);
    assert!(
        remarks(&report).contains(&("base.elsewhere".to_owned(), 1)),
        "{report}"
    );
    let text = report["remarks"].to_string();
    for part in ["base.snap", "pass --layers DIR"] {
        assert!(text.contains(part), "{text}");
    }
    run(&folder, &["info", "out/child.snap"]).exits(1);
    let args = ["info", "out/child.snap", "--layers", ".", "--json"];
    let info = run(&folder, &args).exits(0).json();
    assert!(info["properties"]["base.elsewhere"].is_null(), "{info}");
    run(&folder, &["bench", "out/child.snap"]).exits(1).says(&[
        "is missing",
        "name the folder that has it with --layers DIR",
    ]);
    // All files at hand, under another name.
    fs::copy(folder.file("base.snap"), folder.file("out/renamed")).unwrap();
    let report = create(&folder, "diff", "base.snap", "out/2nd.snap", &[]);
    assert!(!report.to_string().contains("base.elsewhere"), "{report}");
}
