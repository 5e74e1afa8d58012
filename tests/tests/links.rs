//! The documentation leads somewhere: links between its pages, and the paths that it names, exist.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders of the repository whose paths the documentation names.
const FOLDERS: [&str; 7] = [
    "benches/",
    "cli/",
    "docs/",
    "engine/",
    "fixtures/",
    "snapshot-format/",
    "tests/",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Collects all Markdown files, except built, cached or hidden ones.
fn pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if path.is_dir() {
            if !name.starts_with('.') && !["target", "cache"].contains(&&*name) {
                pages(&path, found);
            }
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
}

/// Returns the text without its code blocks.
fn prose(text: &str) -> String {
    let parts = text.split("```").step_by(2);
    parts.collect::<Vec<_>>().join("\n")
}

/// Returns the targets of links.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let after = text.split("](").skip(1);
    after.filter_map(|rest| rest.split(')').next())
}

/// Returns the anchors of a page's headings, as the hosting site makes them.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let heading = line.trim_start_matches('#').trim().to_lowercase();
            let kept = heading
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn every_link_between_pages_leads_somewhere() {
    let mut all = Vec::new();
    pages(root(), &mut all);
    let mut count = 0;
    for page in all {
        let text = prose(&fs::read_to_string(&page).unwrap());
        for link in links(&text).filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            assert!(target.exists(), "{}: no file at {link}", page.display());
            if !anchor.is_empty() {
                let there = anchors(&prose(&fs::read_to_string(&target).unwrap()));
                let found = there.iter().any(|heading| heading == anchor);
                assert!(found, "{}: no heading at {link}", page.display());
            }
            count += 1;
        }
    }
    assert!(count > 60, "{count}");
}

#[test]
fn every_path_that_a_guide_names_exists() {
    let mut count = 0;
    for page in ["ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = prose(&fs::read_to_string(root().join(page)).unwrap());
        for code in text.split('`').skip(1).step_by(2) {
            let is_path = FOLDERS.iter().any(|folder| code.starts_with(folder));
            if is_path && !code.contains(['*', ' ']) && !code.starts_with("fixtures/cache") {
                assert!(root().join(code).exists(), "{page}: there is no {code}");
                count += 1;
            }
        }
    }
    assert!(count > 50, "{count}");
}
