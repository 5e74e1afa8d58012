//! A guest and its copy, side by side.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use kvm_ioctls::Kvm;
use snaprestore_engine::Prefetch;

use crate::{restore, snapshot};

/// Takes a snapshot of a guest and lets the guest continue, restores it in another process, and
/// compares the output and the final memory of both.
pub(crate) fn run(kvm: &Kvm, mib: u64, seed: u64, prefetch: &Prefetch) -> Result<()> {
    let folder = tempfile::tempdir().context("making a folder for the snapshot")?;
    let file = folder.path().join("guest.snap");

    let memory = snapshot::new_memory(mib)?;
    let mut vm = snapshot::run_until_filled(kvm, &memory, mib, seed, false)?;
    let bytes = snapshot::write(&file, kvm, &vm, &memory, None)?;
    println!(
        "snapshot   {mib} MiB in {} KiB; the guest continues",
        bytes >> 10
    );
    let said_before = vm.serial.lines.len();
    let stopped = vm.run_to_end()?;
    let said = vm.serial.lines.split_off(said_before);
    drop(vm);
    let ending = restore::ending(stopped, &memory)?;
    println!("{ending}");
    drop(memory);

    println!("restored   in another process:");
    let prefetch = if *prefetch == Prefetch::Off {
        "off"
    } else {
        "all"
    };
    let program = std::env::current_exe().context("finding this program")?;
    let output = Command::new(program)
        .arg("restore")
        .arg(&file)
        .args(["--prefetch", prefetch])
        .output()
        .context("starting this program again")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let said_again = text.lines().filter_map(|line| line.strip_prefix("guest: "));
    ensure!(said_again.eq(&said), "the two guests don't say the same");
    ensure!(
        text.lines().any(|line| line == ending),
        "the two guests don't end alike"
    );
    println!("compared   both guests said the same and left the same memory");
    Ok(())
}
