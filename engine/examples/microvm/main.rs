//! A minimal launcher of microVMs that takes snapshots and restores them lazily.
//!
//! ```sh
//! cargo run --release -p snaprestore-engine --features rust-vmm --example microvm -- demo
//! ```
//!
//! `microvm snapshot FILE` starts a guest on `/dev/kvm`, waits until it has filled its memory,
//! pauses it, and writes memory and registers as one snapshot. `microvm restore FILE`, another
//! process, resumes it at once, with none of its pages present: each arrives when the virtual CPU
//! touches it. The guest verifies all pages in shuffled order and reports the result over its
//! serial port. `microvm demo` does both and compares the two guests.
//!
//! With `--child CHILD`, the guest is snapshotted a second time after its first verification, which
//! has changed a quarter of its pages. KVM's dirty log says which pages these are, and `CHILD`
//! stores them alone: it is a child of `FILE`, from which the other pages are restored.
//!
//! | file | contents |
//! | --- | --- |
//! | `guest.s`, `guest.rs` | the guest's program, and the initial state of its memory and CPU |
//! | `vm.rs` | KVM: memory slots, running, the serial port, pausing |
//! | `cpu.rs` | the state of a virtual CPU, in a snapshot and outside |
//! | `snapshot.rs` | from a paused VM to a file |
//! | `restore.rs` | from a file to a running VM, wherever its memory comes from |
//! | `in_process.rs` | memory that the engine fills, in this process |
//! | `handed_over.rs` | memory that `snaprestore serve` fills, from another process |
//! | `demo.rs` | both, compared |
#![allow(
    unsafe_code,
    reason = "memory that a guest writes to is shared with the kernel by its address"
)]
#![allow(clippy::print_stdout, reason = "it is a program")]

mod cpu;
mod demo;
mod guest;
mod handed_over;
mod in_process;
mod restore;
mod snapshot;
mod vm;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use kvm_ioctls::Kvm;
use snaprestore_engine::Prefetch;
use snapshot_format::Snapshot;

use crate::handed_over::HandedOver;
use crate::in_process::InProcess;
use crate::snapshot::Base;
use crate::vm::Stopped;

const USAGE: &str = "\
usage: microvm snapshot FILE [--memory MIB] [--child CHILD]
       microvm restore FILE [--prefetch off|all | --serve SOCKET] [--child CHILD]
       microvm demo [--memory MIB] [--prefetch off|all]";

/// The seed from which, with their addresses, the content of the guest's pages follows.
const SEED: u64 = 0x5eed_0fa1_17b1_e5ed;

fn main() -> Result<()> {
    let begun = Instant::now();
    // If a page can't be restored, the engine logs which and why before it aborts the process.
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let Options {
        command,
        file,
        mib,
        prefetch,
        socket,
        child,
    } = Options::parse(std::env::args_os().skip(1))?;
    match (command, file) {
        (Command::Snapshot, Some(file)) => {
            let kvm = open_kvm()?;
            let memory = snapshot::new_memory(mib)?;
            let log_writes = child.is_some();
            let mut vm = snapshot::run_until_filled(&kvm, &memory, mib, SEED, log_writes)?;
            let bytes = snapshot::write(&file, &kvm, &vm, &memory, None)?;
            println!("snapshot   {mib} MiB in {} KiB", bytes >> 10);
            let Some(child) = child else { return Ok(()) };
            // The writes before the snapshot are in it.
            vm.take_written()?;
            let stopped = vm.run()?;
            ensure!(stopped == Stopped::Paused, "the guest has not paused");
            let base = Base {
                snapshot: Arc::new(Snapshot::open_path(&file)?),
                written: vm.take_written()?,
            };
            let bytes = snapshot::write(&child, &kvm, &vm, &memory, Some(&base))?;
            println!("child      {} KiB", bytes >> 10);
            Ok(())
        }
        (Command::Restore, Some(file)) => {
            let kvm = open_kvm()?;
            let snapshot = Arc::new(Snapshot::open_path(&file)?);
            if let Some(socket) = socket {
                let memory = HandedOver::start(&snapshot, &socket)?;
                return restore::run(&kvm, &snapshot, &memory, child.as_deref(), begun);
            }
            let memory = InProcess::start(Arc::clone(&snapshot), prefetch)?;
            restore::run(&kvm, &snapshot, &memory, child.as_deref(), begun)
        }
        (Command::Demo, None) => demo::run(&open_kvm()?, mib, SEED, &prefetch),
        _ => bail!(USAGE),
    }
}

fn open_kvm() -> Result<Kvm> {
    Kvm::new().context("/dev/kvm can't be opened")
}

enum Command {
    Snapshot,
    Restore,
    Demo,
}

/// The command line options.
struct Options {
    command: Command,
    file: Option<PathBuf>,
    mib: u64,
    prefetch: Prefetch,
    /// The socket of the process that serves the memory, if one does.
    socket: Option<PathBuf>,
    /// File for a second snapshot, which becomes a child of the first.
    child: Option<PathBuf>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = std::ffi::OsString>) -> Result<Self> {
        let command = match args.next().as_ref().and_then(|name| name.to_str()) {
            Some("snapshot") => Command::Snapshot,
            Some("restore") => Command::Restore,
            Some("demo") => Command::Demo,
            _ => bail!(USAGE),
        };
        let mut options = Self {
            command,
            file: None,
            mib: 64,
            prefetch: Prefetch::Off,
            socket: None,
            child: None,
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().and_then(|value| value.into_string().ok());
            match arg.to_str() {
                Some("--memory") => {
                    let mib = value().and_then(|mib| mib.parse().ok());
                    options.mib = mib.context("--memory takes a number of MiB")?;
                }
                Some("--prefetch") => {
                    options.prefetch = match value().as_deref() {
                        Some("off") => Prefetch::Off,
                        Some("all") => Prefetch::All,
                        _ => bail!("--prefetch takes off or all"),
                    };
                }
                Some("--serve") => {
                    let socket = args.next().context("--serve takes a path")?;
                    options.socket = Some(socket.into());
                }
                Some("--child") => {
                    let child = args.next().context("--child takes a path")?;
                    options.child = Some(child.into());
                }
                Some(option) if option.starts_with('-') => bail!(USAGE),
                _ if options.file.is_none() => options.file = Some(arg.into()),
                _ => bail!(USAGE),
            }
        }
        if matches!(options.command, Command::Demo) && options.child.is_some() {
            bail!("--child needs snapshot or restore\n{USAGE}");
        }
        Ok(options)
    }
}
