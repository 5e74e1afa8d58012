//! What can be typed after `snaprestore ctl`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand, ValueHint};

use super::ServiceOptions;
use snaprestore_daemon::api::control;

/// Control a running `serve`
///
/// Talks to the control socket that `serve --control` or its configuration has made; only the
/// daemon's own user and root may use it. A service is a snapshot that is served at a socket, under a
/// name; a VM is one that was taken there, and has a number.
#[derive(Debug, ClapArgs)]
pub(crate) struct Ctl {
    /// Control socket of the daemon
    #[arg(long, global = true, env = "SNAPRESTORE_CONTROL", default_value = control::DEFAULT_PATH,
        value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) control: PathBuf,
    #[command(subcommand)]
    pub(crate) op: CtlOp,
}

/// What a daemon can be asked for.
#[derive(Debug, Subcommand)]
pub(crate) enum CtlOp {
    Add(CtlAdd),
    Remove(CtlRemove),
    /// List the services, the VMs that are served, and the last that have ended
    List,
    Stats(CtlStats),
    Complete(CtlComplete),
    /// Let all VMs go and end the daemon
    ///
    /// It takes no more VMs, installs what is missing in each, and ends when all are let go. Returns
    /// then; fails if one could not be completed.
    Drain,
    Top(CtlTop),
    Upgrade(CtlUpgrade),
}

/// Serve one more snapshot
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlAdd {
    /// Name of the service: letters, digits, dots, dashes and underscores
    pub(crate) name: String,
    /// Snapshot of the VMs' memory
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) snapshot: PathBuf,
    /// Socket that the daemon listens on for its VMs; it is made, and nobody may be listening there
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) socket: PathBuf,
    #[command(flatten)]
    pub(crate) options: ServiceOptions,
}

/// Take no more VMs for a service; those that it has go on
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlRemove {
    /// Name of the service
    pub(crate) name: String,
}

/// Show what was done for a VM, or for all that are served
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlStats {
    /// Number of the VM [default: all]
    pub(crate) vm: Option<u64>,
    /// With --json, also the buckets of the histograms
    #[arg(long)]
    pub(crate) buckets: bool,
}

/// Install what a VM misses and let it go
///
/// The VM then has all its memory, and needs the daemon no more. Returns when that is done; fails if
/// it can't be.
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlComplete {
    /// Number of the VM
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) vm: Option<u64>,
    /// All VMs
    #[arg(long)]
    pub(crate) all: bool,
}

/// Show what the VMs do right now, again and again
///
/// Rates are by the second, since the frame before. Where standard output is no terminal, or with
/// --json, one frame is printed. Ctrl-C ends it.
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlTop {
    /// Print one frame
    #[arg(long)]
    pub(crate) once: bool,
    /// Seconds from frame to frame
    #[arg(long, default_value_t = 1, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// VMs that are shown on a terminal: those with the most faults
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub(crate) rows: usize,
}

/// Go on with another program file
///
/// A new process takes the VMs over from the old one while they run. Without PROGRAM it is the file
/// that the daemon was started from, which may have been replaced.
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlUpgrade {
    /// Program to go on with
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) program: Option<PathBuf>,
}
