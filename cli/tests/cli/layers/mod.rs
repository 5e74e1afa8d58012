//! Layered snapshots: children that hold what differs from a base, and their chains.
//!
//! The commands that manage chains have tests of their own in `chains`.

mod content;
mod damage;
mod refused;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use serde_json::Value;
use snaprestore_fixtures::images::Mix;

use crate::common::{Folder, Run, command, run};

const PAGE: usize = 4096;
/// Pages of the base, of which the last block is a short one.
const PAGES: usize = 2100;

/// Creates the image `base.raw` and its snapshot `base.snap`; returns the image.
pub(crate) fn base(folder: &Folder) -> Vec<u8> {
    let bytes = Mix::new(PAGES as u64, 3).bytes();
    folder.write("base.raw", &bytes);
    run(folder, &["create", "base.raw", "-o", "base.snap"]).exits(0);
    bytes
}

/// Changes granules of `granule` pages, every `stride` pages from page `first` on, and writes them
/// to a sparse file of full length, as Firecracker does. Returns the number of changed pages.
pub(crate) fn write_diff(
    folder: &Folder,
    name: &str,
    memory: &mut [u8],
    (granule, stride, first): (usize, usize, usize),
) -> usize {
    let file = File::create(folder.file(name)).unwrap();
    file.set_len(memory.len() as u64).unwrap();
    let pages = memory.len() / PAGE;
    let mut changed = 0;
    for page in (first..pages).step_by(stride) {
        let range = page * PAGE..(page + granule).min(pages) * PAGE;
        // The pages of all diffs of these tests differ.
        let seed = (page + memory.len() * first) as u64;
        let new = Mix::new((range.len() / PAGE) as u64, seed).bytes();
        memory[range.clone()].copy_from_slice(&new);
        file.write_all_at(&new, range.start as u64).unwrap();
        changed += range.len() / PAGE;
    }
    changed
}

#[track_caller]
pub(crate) fn create(
    folder: &Folder,
    source: &str,
    base: &str,
    child: &str,
    more: &[&str],
) -> Value {
    let args = ["create", source, "--base", base, "-o", child, "--json"];
    run(folder, &[&args[..], more].concat()).exits(0).json()
}

/// Runs the command with a file's bytes in a pipe as its standard input.
fn piped(folder: &Folder, file: &str, args: &[&str]) -> Run {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let bytes = folder.read(file);
    // Fails if the command refuses the pipe.
    let feeder = std::thread::spawn(move || writer.write_all(&bytes));
    let mut command = command(args);
    let run = Run::to_end(command.current_dir(folder.path()).stdin(reader));
    // The read end is closed with the command that holds it.
    drop(command);
    let _ = feeder.join().expect("the feeder does not panic");
    run
}

/// Asserts that a snapshot is good and holds `memory`.
#[track_caller]
pub(crate) fn holds(folder: &Folder, snapshot: &str, memory: &[u8]) {
    run(folder, &["verify", snapshot]).exits(0);
    run(folder, &["extract", snapshot, "-o", "out", "--force"]).exits(0);
    assert!(folder.read("out") == memory, "{snapshot}");
}

/// Creates a base and its child in a folder, and returns the base's id.
fn child(folder: &Folder) -> (Vec<u8>, String) {
    let mut memory = base(folder);
    write_diff(folder, "diff", &mut memory, (1, 37, 5));
    create(folder, "diff", "base.snap", "child.snap", &[]);
    let info = run(folder, &["info", "base.snap", "--json"]).json();
    (memory, info["snapshot_id"].as_str().unwrap().to_owned())
}
