//! Command line of the commands that manage chains: `flatten`, `rebase` and `tree`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueHint};

use super::{Layers, threads};

/// Write a chain of layered snapshots as one file
///
/// The new snapshot holds the same memory, attachments, working sets and properties, and needs no
/// other file. Frames of which at least half is still in use are copied as they are; the others are
/// repacked. SNAPSHOT need not be layered: a flat one then takes less room, if its frames hold many
/// pages that it does not use. Every checksum is verified, and the digests of the result are
/// compared with those of the chain; `verify` compares every page. The output file appears only
/// when it is complete and on disk. The files of the chain are not changed.
#[derive(Debug, ClapArgs)]
pub(crate) struct Flatten {
    /// Snapshot to flatten: the newest of the chain
    #[arg(value_name = "SNAPSHOT", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) layers: Layers,
    /// Snapshot to write; `-` is standard output, and a named pipe must have a reader
    #[arg(long, short, value_hint = ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// Replace an existing snapshot, once the new one is complete
    #[arg(long, short)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) packing: Packing,
}

/// Options for repacking frames.
#[derive(Debug, ClapArgs)]
pub(crate) struct Packing {
    /// Compression level of zstd, for frames that are repacked
    #[arg(long, short, default_value_t = 3, value_name = "N", allow_hyphen_values = true,
          value_parser = clap::value_parser!(i32).range(-7..=22))]
    pub(crate) level: i32,
    /// Threads [default: one per core, at most 8]
    #[arg(long, value_name = "N", value_parser = threads())]
    pub(crate) threads: Option<usize>,
}

/// Give a layered snapshot another base that holds the same memory
///
/// The new base is the old one flattened, or packed with other options. CHILD is replaced by a
/// snapshot with the same memory and a new ID, which needs the new base and its ancestors only.
/// The old base is needed only for blocks in which CHILD took a page from another place of it, or
/// of its ancestors. For the others, digests prove that the new base has the same pages. A base
/// with other memory is refused, and so is the replacement of a snapshot that is itself an ancestor
/// of another one in its folder or in those of --layers.
#[derive(Debug, ClapArgs)]
pub(crate) struct Rebase {
    /// Layered snapshot
    #[arg(value_name = "CHILD", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// The new base
    #[arg(long, value_name = "SNAPSHOT", value_hint = ValueHint::FilePath)]
    pub(crate) base: PathBuf,
    #[command(flatten)]
    pub(crate) layers: Layers,
    /// Snapshot to write [default: CHILD, which is replaced once the new one is complete]
    #[arg(long, short, value_hint = ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// Replace an existing snapshot other than CHILD, once the new one is complete
    #[arg(long, short)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) packing: Packing,
}

/// Show which snapshots of a folder need which others
///
/// Each snapshot is listed below one that it needs, with its size, with the size of it and all that
/// need it (what deleting all of these frees), and with the number of files that would be lost if
/// it were deleted. The report also names the files that no other needs, the ancestors that are
/// missing, and the files that are incomplete or damaged at their ends. Only the ends of files are
/// read: use `snaprestore verify --chain` to check all of them. Folders within the folder are not
/// searched.
#[derive(Debug, ClapArgs)]
pub(crate) struct Tree {
    /// Folders to search together [default: .]
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) folders: Vec<PathBuf>,
}
