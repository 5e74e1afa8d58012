//! Command line of the commands for working sets: `optimize` and `trace`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args as ClapArgs, Subcommand, ValueHint};
use snapshot_format::DEFAULT_WORKING_SET;
use snapshot_format::is_blob_name;
use snapshot_format::trace::MergeOptions;

use super::{Layers, Packing};

/// Put the pages that are needed first to the front of a snapshot
///
/// The pages of the traces lie in frames of their own, in order of first touch, and are recorded as
/// a working set: a restore reads them with a few large reads before it is asked for them. The rest
/// follows. The memory stays the same: its digest is compared, every page of the new file is
/// decoded and verified, and only then does the file get its name. Attachments, properties and
/// other working sets are kept. A trace of other memory is refused.
///
/// A layered snapshot stays a child of its ancestors, which are not changed. Pages of the working
/// set that lie among others in an ancestor are stored in the new file, too; those in frames of
/// which at least half belongs to the working set stay there. So optimize a base first, `rebase`
/// its children onto it, and then optimize the children. A snapshot that is an ancestor of another
/// one, in its folder or in those of --layers, is not replaced. Children in other folders are not
/// found, and would lose their base.
#[derive(Debug, ClapArgs)]
pub(crate) struct Optimize {
    /// Snapshot to optimize
    #[arg(value_name = "SNAPSHOT", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Snapshot to write; may be SNAPSHOT itself, which is replaced once the new one is complete
    #[arg(long, short, value_hint = ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// Replace an existing snapshot other than SNAPSHOT, once the new one is complete
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Trace of the memory; several are merged (may be repeated)
    #[arg(long = "trace", value_name = "TRACE", required = true, value_hint = ValueHint::FilePath)]
    pub(crate) traces: Vec<PathBuf>,
    /// Name of the working set; one of this name is replaced
    #[arg(long, default_value = DEFAULT_WORKING_SET, value_parser = set_name)]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) merging: Merging,
    #[command(flatten)]
    pub(crate) layers: Layers,
    #[command(flatten)]
    pub(crate) packing: Packing,
}

/// Options for merging traces.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct Merging {
    /// Share of the traces, 0 to 1, that a page must be in
    #[arg(long, default_value = "0.5", value_name = "SHARE")]
    pub(crate) min_share: Share,
}

impl Default for Merging {
    fn default() -> Self {
        let share = MergeOptions::default().min_share;
        Self {
            min_share: Share(share),
        }
    }
}

impl Merging {
    pub(crate) fn options(self) -> MergeOptions {
        MergeOptions {
            min_share: self.min_share.0,
        }
    }
}

/// A share of a whole, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Share(f64);

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = text
            .parse()
            .ok()
            .filter(|share| (0.0..=1.0).contains(share));
        share
            .map(Self)
            .ok_or_else(|| "must be a number from 0 to 1, such as 0.5".to_owned())
    }
}

fn set_name(text: &str) -> Result<String, String> {
    if is_blob_name(text) {
        return Ok(text.to_owned());
    }
    Err("must be UTF-8 without / and control characters, and not be . or ..".to_owned())
}

/// Show, compare and merge traces
///
/// A trace is a recording of the pages that an owner touched after a restore, in order of first
/// touch: see `restore --record`. It belongs to the content of the memory, not to a file.
#[derive(Debug, ClapArgs)]
pub(crate) struct Trace {
    #[command(subcommand)]
    pub(crate) op: TraceOp,
}

/// The operations on traces.
#[derive(Debug, Subcommand)]
pub(crate) enum TraceOp {
    Show(TraceShow),
    Compare(TraceCompare),
    Merge(TraceMerge),
}

/// Show what a trace holds
#[derive(Debug, ClapArgs)]
pub(crate) struct TraceShow {
    /// Trace to look at
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

/// Compare two traces: how well does the first predict the second?
///
/// Precision is the share of the first trace's pages that the second has, recall the share of the
/// second's that the first has. The order is Spearman's rank correlation of the pages in both: 1
/// if it is the same, 0 if there is none, -1 if it is reversed. The traces may be of different
/// content, such as snapshots of one machine at two times, if their page numbers agree.
#[derive(Debug, ClapArgs)]
pub(crate) struct TraceCompare {
    /// Trace that predicts, such as an earlier or merged one
    #[arg(value_name = "A", value_hint = ValueHint::FilePath)]
    pub(crate) a: PathBuf,
    /// Trace that is predicted
    #[arg(value_name = "B", value_hint = ValueHint::FilePath)]
    pub(crate) b: PathBuf,
}

/// Merge traces of the same memory
///
/// The merged trace has the pages that are in at least half of the traces (see --min-share), in the
/// order of their median rank: the rank of a page is its place in a trace. Times are medians, too.
#[derive(Debug, ClapArgs)]
pub(crate) struct TraceMerge {
    /// Traces to merge
    #[arg(required = true, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub(crate) traces: Vec<PathBuf>,
    /// Trace to write; `-` is standard output, and a named pipe must have a reader
    #[arg(long, short, value_hint = ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// Replace an existing file
    #[arg(long, short)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) merging: Merging,
}
