//! The table of promises names tests that exist.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the places and test names of a table row: each `code` with a slash is a place, each
/// other one a test at the last place.
fn named(row: &str) -> Vec<(String, String)> {
    let mut place = String::new();
    let mut tests = Vec::new();
    let cell = row.rsplit('|').nth(1).unwrap_or_default();
    for code in cell.split('`').skip(1).step_by(2) {
        if code.contains('/') {
            code.clone_into(&mut place);
        } else {
            tests.push((place.clone(), code.to_owned()));
        }
    }
    tests
}

/// Returns the source files of a place: a file, all Rust files below a folder, or a file named
/// without its extension.
fn sources(place: &Path) -> Vec<PathBuf> {
    if let Ok(entries) = fs::read_dir(place) {
        return entries
            .flat_map(|entry| sources(&entry.unwrap().path()))
            .collect();
    }
    let with_ending = place.with_extension("rs");
    with_ending
        .is_file()
        .then_some(with_ending)
        .into_iter()
        .collect()
}

/// Returns whether a file has a test of this name: a function under `#[test]`, or a fuzz target.
fn has_test(source: &Path, name: &str) -> bool {
    let text = fs::read_to_string(source).unwrap();
    if name == "fuzz_target!" {
        return text.lines().any(|line| line.starts_with("fuzz_target!("));
    }
    let function = format!("fn {name}(");
    let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
    lines.iter().enumerate().any(|(at, line)| {
        line.starts_with(&function)
            && lines[..at]
                .iter()
                .rev()
                .take_while(|above| above.starts_with('#') || above.starts_with("//"))
                .any(|above| above.starts_with("#[test]"))
    })
}

#[test]
fn every_promise_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("docs/promises.md")).unwrap();
    let rows = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| ---"));
    let mut tests = 0;
    for row in rows.filter(|row| *row != "| what | test |") {
        let named = named(row);
        assert!(!named.is_empty(), "no test in: {row}");
        for (place, name) in named {
            let found = sources(&root.join(&place))
                .iter()
                .any(|source| has_test(source, &name));
            assert!(found, "{place} has no test {name}");
            tests += 1;
        }
    }
    let promises = text.lines().filter(|line| line.starts_with("## ")).count();
    assert_eq!(promises, 7);
    assert!(tests > 40, "{tests}");
}
