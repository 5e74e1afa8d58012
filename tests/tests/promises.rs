//! Every claim of `docs/promises.md` names a test, and every test that it names exists.

use std::fs;
use std::path::{Path, PathBuf};

/// A claim under a promise, and the tests behind it, each with its place.
struct Claim {
    text: String,
    tests: Vec<(String, String)>,
}

/// Returns the claims under each promise: items of a list whose nested items name one test each.
/// What a promise does not cover is no claim.
fn promises(text: &str) -> Vec<Vec<Claim>> {
    let chapters = text.split("\n## ").skip(1);
    let covered = chapters.map(|chapter| chapter.split("\n### ").next().unwrap_or_default());
    covered.map(claims).collect()
}

fn claims(chapter: &str) -> Vec<Claim> {
    let mut claims: Vec<Claim> = Vec::new();
    for item in items(chapter) {
        match (item.strip_prefix("  - "), item.strip_prefix("- ")) {
            (Some(test), _) => {
                let claim = claims.last_mut().expect("a claim above its test");
                claim.tests.push(place_and_name(test));
            }
            (None, Some(text)) => claims.push(Claim {
                text: text.to_owned(),
                tests: Vec::new(),
            }),
            (None, None) => panic!("neither a claim nor a test: {item}"),
        }
    }
    claims
}

/// Returns the items of all lists, each in one line with its indentation.
fn items(chapter: &str) -> Vec<String> {
    let mut items: Vec<String> = Vec::new();
    for line in chapter.lines().skip(1) {
        if line.trim_start().starts_with("- ") {
            items.push(line.to_owned());
        } else if line.starts_with(' ') {
            let item = items.last_mut().expect("an item above its next line");
            item.push(' ');
            item.push_str(line.trim_start());
        }
    }
    items
}

fn place_and_name(test: &str) -> (String, String) {
    let codes: Vec<&str> = test.split('`').collect();
    match codes[..] {
        ["", place, " ", name, ""] if place.contains('/') => (place.to_owned(), name.to_owned()),
        _ => panic!("not one place and one test: {test}"),
    }
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
    let promises = promises(&text);
    assert_eq!(promises.len(), 7);
    let mut tests = 0;
    for claims in promises {
        assert!(!claims.is_empty(), "a promise without a claim");
        for claim in claims {
            assert!(!claim.tests.is_empty(), "no test of: {}", claim.text);
            for (place, name) in claim.tests {
                let found = sources(&root.join(&place))
                    .iter()
                    .any(|source| has_test(source, &name));
                assert!(found, "{place} has no test {name}");
                tests += 1;
            }
        }
    }
    assert!(tests > 250, "{tests}");
}
