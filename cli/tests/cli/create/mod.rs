//! Packing memory into a snapshot, and extracting it again.

mod content;
mod extras;
mod holes;
mod output;
mod refused;

use std::process::{Command, Stdio};

use snaprestore_fixtures::images::Mix;

use crate::common::{Folder, Run, program};

/// Returns an image with every kind of page, 4 MiB and a part of a block.
fn image() -> Vec<u8> {
    Mix::new(1100, 7).bytes()
}

/// Runs `script` in a shell in which `$0` is the command.
fn shell(folder: &Folder, script: &str) -> Run {
    let mut shell = Command::new("/bin/sh");
    let shell = shell.args(["-c", script]).arg(program());
    Run::to_end(shell.current_dir(folder.path()).stdin(Stdio::null()))
}
