//! The arguments of `snaprestore ctl`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand, ValueHint};

use super::ServiceOptions;
use snaprestore_daemon::api::control::{self, RecordAction};

/// Control a running `serve`
///
/// Connects to the control socket of `serve --control`, which only the daemon's user and root may
/// use. A service is a snapshot that is served at a socket under a name. Each VM that connects to a
/// service gets a number.
#[derive(Debug, ClapArgs)]
pub(crate) struct Ctl {
    /// Control socket of the daemon
    #[arg(long, global = true, env = "SNAPRESTORE_CONTROL", default_value = control::DEFAULT_PATH,
        value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) control: PathBuf,
    #[command(subcommand)]
    pub(crate) op: CtlOp,
}

/// Requests to a daemon.
#[derive(Debug, Subcommand)]
pub(crate) enum CtlOp {
    Add(CtlAdd),
    Remove(CtlRemove),
    /// List the services, the VMs being served, and the last VMs that ended
    List,
    Stats(CtlStats),
    Complete(CtlComplete),
    Record(CtlRecord),
    /// Complete all VMs and stop the daemon
    ///
    /// The daemon accepts no more VMs, installs the missing pages of each, releases them, and
    /// exits. Returns then; fails if a VM could not be completed.
    Drain,
    Top(CtlTop),
    Upgrade(CtlUpgrade),
}

/// Serve one more snapshot
///
/// The ancestors of a layered snapshot are searched for in its folder, then in the folders of the
/// daemon: those of `serve --layers`, of its configuration, and of its SNAPRESTORE_LAYERS.
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlAdd {
    /// Name of the service: letters, digits, dots, dashes and underscores
    pub(crate) name: String,
    /// Snapshot of the VMs' memory
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) snapshot: PathBuf,
    /// Socket that the daemon creates and listens on; no other process may be listening there
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) socket: PathBuf,
    #[command(flatten)]
    pub(crate) options: ServiceOptions,
}

/// Remove a service; its current VMs are still served
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlRemove {
    /// Name of the service
    pub(crate) name: String,
}

/// Show statistics of a VM, or of all VMs being served
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlStats {
    /// Number of the VM [default: all]
    pub(crate) vm: Option<u64>,
    /// With --json, also the buckets of the histograms
    #[arg(long)]
    pub(crate) buckets: bool,
}

/// Install all missing pages of a VM and release it
///
/// Afterwards the VM has all its memory and no longer needs the daemon. Returns when that is done,
/// or fails with the reason.
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlComplete {
    /// Number of the VM
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) vm: Option<u64>,
    /// All VMs
    #[arg(long)]
    pub(crate) all: bool,
}

/// Record the pages that a VM touches, in order of first touch
///
/// Touches of pages that are present when the recording starts are not seen; the trace has their
/// number. The recording ends by itself like those of `serve --record`, and waits for `stop` then.
/// If the trace could not be written, repeat `stop`: the trace is kept until the VM is recorded
/// again or ends, or the worker of the daemon does. If the VM ends before `stop`, its recording is
/// lost.
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlRecord {
    /// Number of the VM
    pub(crate) vm: u64,
    /// Start or stop
    #[arg(value_enum)]
    pub(crate) action: RecordAction,
    /// Trace file to create, required by stop; `-` is standard output
    #[arg(short, long, value_name = "TRACE", value_hint = ValueHint::FilePath,
        required_if_eq("action", "stop"))]
    pub(crate) output: Option<PathBuf>,
}

/// Show live rates of the VMs
///
/// Rates are per second since the previous update. One update is printed if standard output is not
/// a terminal, or with --json. Quit with Ctrl-C.
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlTop {
    /// Print one update and exit
    #[arg(long)]
    pub(crate) once: bool,
    /// Seconds between updates
    #[arg(long, default_value_t = 1, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// VMs to show on a terminal: those with the most faults
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub(crate) rows: usize,
}

/// Replace the worker by one of another program file
///
/// A new worker takes over the VMs while they run. Without PROGRAM, it is the file that the daemon
/// was started from, which may have been replaced.
#[derive(Debug, ClapArgs)]
pub(crate) struct CtlUpgrade {
    /// Program to run
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) program: Option<PathBuf>,
}
