//! A skipped test must report that where it is counted. The test harness swallows the output of
//! `println!` if a test passes, and a skipped one passes.

use std::fs;
use std::path::{Path, PathBuf};

/// Collects all Rust files of the project, except built, cached or hidden ones.
fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if path.is_dir() {
            if !name.starts_with('.') && !["target", "cache"].contains(&&*name) {
                rust_files(&path, found);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// Returns the lines with a call of `print!`, `println!` or their counterparts for standard error
/// that prints SKIPPED, possibly on the next line.
fn swallowed(text: &str) -> Vec<usize> {
    let calls = ["print!(", "println!("];
    calls
        .iter()
        .flat_map(|call| text.match_indices(call))
        .filter(|(at, call)| {
            let said = text[at + call.len()..].trim_start();
            said.trim_start_matches(['r', '#', '"'])
                .starts_with("SKIPPED")
        })
        .map(|(at, _)| text[..at].lines().count())
        .collect()
}

#[test]
fn no_skip_is_swallowed() {
    let mut files = Vec::new();
    rust_files(
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap(),
        &mut files,
    );
    assert!(files.len() > 100, "{}", files.len());
    let places: Vec<String> = files
        .iter()
        .flat_map(|file| {
            let lines = swallowed(&fs::read_to_string(file).unwrap());
            lines
                .into_iter()
                .map(move |line| format!("{}:{line}", file.display()))
        })
        .collect();
    assert!(
        places.is_empty(),
        "say it with snaprestore_fixtures::host::skipped: {places:?}"
    );
}

#[test]
fn swallowed_skips_are_seen() {
    let macros = ["println", "eprintln", "print", "eprint"];
    for name in macros {
        let text = format!("fn f() {{\n    {name}!(\n        \"SKIPPED f: why\"\n    );\n}}\n");
        assert_eq!(swallowed(&text), [2], "{text}");
    }
    assert!(swallowed("println!(\"done\"); writeln!(out, \"SKIPPED f: why\");").is_empty());
}
