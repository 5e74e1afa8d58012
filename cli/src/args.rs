//! The command-line arguments. Nothing here opens or checks a file; each command does that first.

#![expect(
    clippy::doc_markdown,
    reason = "the comments of options are help texts, in which backticks are shown"
)]

mod chain;
mod ctl;
mod serve;
mod working_set;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{
    Args as ClapArgs, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum,
    ValueHint,
};
use clap_complete::Shell;
use snaprestore_compare::contender::Contender;
use snaprestore_daemon::api::config::RETRY_TIMEOUT;
use snaprestore_daemon::log::LogFormat;
use snapshot_format::is_blob_name;
use snapshot_format::layout::MAX_NAME_BYTES;

use crate::exit;
use crate::names;

pub(crate) use snaprestore_daemon::api::config::Prefetch;

pub(crate) use chain::{Flatten, Packing, Rebase, Tree};
pub(crate) use ctl::{Ctl, CtlOp, CtlRecord, CtlTop};
pub(crate) use serve::{Serve, ServiceOptions};
pub(crate) use working_set::{Merging, Optimize, Trace, TraceCompare, TraceMerge, TraceOp};

/// Saves the memory of microVMs and processes in small, verified files and restores it lazily.
#[derive(Debug, Parser)]
#[command(name = "snaprestore", version, after_help = exit::HELP, max_term_width = 100)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct Common {
    /// Print the result, or the error and exit code, as one JSON object on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print errors only
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
}

/// Parses a command line.
pub(crate) fn parse(line: impl IntoIterator<Item = OsString>) -> Result<Args, clap::Error> {
    let mut command = Args::command();
    let matches = command.try_get_matches_from_mut(line)?;
    if let Some(("serve", serve)) = matches.subcommand() {
        serve::refuse_ignored(serve, &mut command)?;
    }
    Args::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Create(Create),
    Info(Info),
    Report(Report),
    Verify(Verify),
    Extract(Extract),
    Flatten(Flatten),
    Rebase(Rebase),
    Tree(Tree),
    Optimize(Optimize),
    Trace(Trace),
    Restore(Restore),
    Serve(Serve),
    Ctl(Ctl),
    /// Check what this machine supports and permits, with remedies
    Doctor,
    Bench(Bench),
    Demo(Demo),
    Completions(Completions),
    Man(Man),
    #[command(hide = true)]
    DemoOwner(DemoOwner),
    /// One trial of `bench`, told on standard input
    #[command(hide = true)]
    BenchTrial,
}

impl Command {
    /// Returns whether the command writes a file and could leave an incomplete one behind.
    pub(crate) fn writes(&self) -> bool {
        match self {
            Self::Create(_)
            | Self::Extract(_)
            | Self::Flatten(_)
            | Self::Rebase(_)
            | Self::Optimize(_)
            | Self::Report(_)
            | Self::Bench(_)
            | Self::Demo(_) => true,
            Self::Trace(trace) => matches!(trace.op, TraceOp::Merge(_)),
            Self::Man(man) => man.output.is_some(),
            _ => false,
        }
    }

    /// Returns the log format if the command is a daemon.
    pub(crate) fn log_format(&self) -> Option<LogFormat> {
        match self {
            Self::Serve(serve) => Some(serve.log_format),
            _ => None,
        }
    }
}

/// Pack memory into a snapshot
///
/// SOURCE is a raw memory file (holes of a sparse one are not read), an ELF core (of a process, by
/// gcore or the kernel; of a guest, by QEMU's dump-guest-memory or VirtualBox's dumpvmcore; of a
/// machine, by its kernel), a block device, or a pipe. Files that are clearly not memory
/// (compressed files, saved states, disk images) are refused. Anything left out or assumed is
/// reported in the summary, in `remarks` of --json, and in a property of the snapshot. The output
/// file appears only when it is complete and on disk.
#[derive(Debug, ClapArgs)]
pub(crate) struct Create {
    /// Memory to pack; `-` is standard input
    #[arg(required_unless_present = "pid", value_hint = ValueHint::FilePath)]
    pub(crate) source: Option<PathBuf>,
    /// Take the memory of a live process
    ///
    /// All its threads are stopped while its memory is read. They continue as soon as it is read,
    /// or if snaprestore is killed. Memory that is not compressed yet waits in a temporary file
    /// beside the output (in TMPDIR or /var/tmp for standard output), so a slow output does not
    /// keep the process stopped; if there is no room, it does. Needs permission to trace the
    /// process: the same user, or root.
    ///
    /// Some blocking system calls of the process may fail with EINTR afterwards, without a signal
    /// handler: epoll_wait, semop and semtimedop, sigtimedwait and sigwaitinfo, io_uring_enter, and
    /// socket calls with a timeout (SO_RCVTIMEO, SO_SNDTIMEO). Others are restarted.
    ///
    /// Memory excluded from core dumps (MADV_DONTDUMP, often keys) is included, since a restore
    /// needs it. Pages that cannot be read are recorded as unavailable: secret memory
    /// (memfd_secret), device memory, pages that another process still has to serve, and pages
    /// beyond the end of a mapped file. Reserved address space is left out, and so are the kernel's
    /// vvar and contiguous ranges of 64 GiB or more that were never touched or cannot be read.
    #[arg(long, conflicts_with_all = ["source", "raw"])]
    pub(crate) pid: Option<i32>,
    /// Treat SOURCE as plain memory, whatever it looks like
    #[arg(long)]
    pub(crate) raw: bool,
    /// Store only what differs from this snapshot; the new one needs it and its ancestors
    ///
    /// Holes of a sparse raw file then mean "as in the base" (see --holes), so the file may be a
    /// diff snapshot of Firecracker. All other memory is compared with the base: raw files and
    /// streams from their start, cores and processes by address and name of the region. The base is
    /// found later by its ID, under any name, in the folder of the new snapshot or in those of
    /// --layers. It must not be changed or deleted. Damage in blocks of the base that did not
    /// change is not noticed: run `snaprestore verify` on the base first.
    #[arg(long, value_name = "SNAPSHOT", value_hint = ValueHint::FilePath)]
    pub(crate) base: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) layers: Layers,
    /// Meaning of the holes of a raw file [default: base with --base, or else zero]
    ///
    /// Without --base, holes are read as zeros, and the summary counts them. In a diff snapshot of
    /// Firecracker, a hole means "unchanged", so a diff needs its base. A file that is mostly holes
    /// is therefore refused together with the state of a Firecracker VM (--attach), unless this
    /// option or --base is given.
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with = "pid")]
    pub(crate) holes: Option<Holes>,
    /// Accept a truncated ELF core; the missing part is recorded as unavailable
    #[arg(long, conflicts_with_all = ["pid", "raw"])]
    pub(crate) incomplete: bool,
    /// Snapshot to write; `-` is standard output, and a named pipe must have a reader
    #[arg(long, short, value_hint = ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// Replace an existing snapshot, once the new one is complete
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Compression level of zstd
    #[arg(long, short, default_value_t = 3, value_name = "N", allow_hyphen_values = true,
          value_parser = clap::value_parser!(i32).range(-7..=22))]
    pub(crate) level: i32,
    /// Memory compressed together, a power of two from 4 to 2048 KiB, such as 64, 128K or 2M
    ///
    /// Larger frames compress better; smaller frames make a single page fault faster.
    #[arg(long, default_value = "128", value_name = "KIB")]
    pub(crate) frame_size: FrameSize,
    /// Compression dictionary: trained, none, or a file made by `zstd --train`
    ///
    /// `auto` trains one for frames of up to 64 KiB. For larger ones it saves about half a percent,
    /// and writing takes 40 % longer. A dictionary that does not make the file smaller is dropped.
    #[arg(
        long,
        default_value = "auto",
        value_name = "auto|train|off|PATH",
        value_hint = ValueHint::FilePath,
        value_parser = OsStringValueParser::new().try_map(Dictionary::parse)
    )]
    pub(crate) dictionary: Dictionary,
    /// Store a file beside the memory, under a name (may be repeated)
    #[arg(long, value_name = "NAME=PATH",
          value_parser = OsStringValueParser::new().try_map(Attachment::parse))]
    pub(crate) attach: Vec<Attachment>,
    /// Store an attachment of the base, too (may be repeated)
    #[arg(long, value_name = "NAME", requires = "base")]
    pub(crate) inherit_attachment: Vec<String>,
    /// Write a flat snapshot instead of one that would need more than N other files
    ///
    /// N is 0 to 1024; 0 always flattens. The new snapshot is first packed as a child of the base,
    /// in a file without a name, and then flattened as `snaprestore flatten` does. It holds the
    /// same, and needs neither the base nor its ancestors. The summary and `flattened` of --json
    /// say so. The output must be a file.
    #[arg(long, value_name = "N", requires = "base",
          value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub(crate) flatten_after: Option<u16>,
    /// Put the pages of this trace to the front, in order of first touch (may be repeated)
    ///
    /// The snapshot is packed in a file without a name first, and then written again as
    /// `snaprestore optimize` does, with the working set "default". The trace may be one of an
    /// earlier snapshot of the same machine, if the page numbers agree: the order is then used for
    /// the new content, and the summary says so. The output must be a file.
    #[arg(long = "trace", value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub(crate) traces: Vec<PathBuf>,
    /// Compression threads [default: one per core, at most 8]
    #[arg(long, value_name = "N", value_parser = threads())]
    pub(crate) threads: Option<usize>,
}

impl Create {
    /// Returns the meaning of the holes of a raw file.
    pub(crate) fn meaning_of_holes(&self) -> Holes {
        match (self.holes, &self.base) {
            (Some(holes), _) => holes,
            (None, Some(_)) => Holes::Base,
            (None, None) => Holes::Zero,
        }
    }
}

/// `create --holes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Holes {
    /// They are zeros
    Zero,
    /// They are as in the base
    Base,
}

/// The folders with ancestors of layered snapshots.
#[derive(Clone, Debug, Default, ClapArgs)]
pub(crate) struct Layers {
    /// Folder with ancestors of a layered snapshot (may be repeated)
    ///
    /// A snapshot made with `create --base` needs the files of its ancestors. They are found by
    /// their ID, under any name: in the folder of the snapshot, then in these folders, then in
    /// those of the environment variable SNAPRESTORE_LAYERS, which are separated by colons.
    #[arg(long = "layers", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) folders: Vec<PathBuf>,
}

/// `create --frame-size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameSize {
    pub(crate) kib: usize,
}

impl FromStr for FrameSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, factor) = match text.trim_end_matches("iB") {
            digits if digits.ends_with(['k', 'K']) => (&digits[..digits.len() - 1], 1),
            digits if digits.ends_with(['m', 'M']) => (&digits[..digits.len() - 1], 1024),
            digits => (digits, 1),
        };
        digits
            .parse::<usize>()
            .ok()
            .and_then(|number| number.checked_mul(factor))
            .filter(|kib| kib.is_power_of_two() && (4..=2048).contains(kib))
            .map(|kib| Self { kib })
            .ok_or_else(|| {
                "must be a power of two from 4 to 2048 (KiB), such as 64, 128K or 2M".to_owned()
            })
    }
}

/// `create --dictionary`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dictionary {
    Auto,
    Train,
    Off,
    File(PathBuf),
}

impl Dictionary {
    fn parse(text: OsString) -> Result<Self, String> {
        match text.to_str() {
            Some("") => Err("must be auto, train, off, or the path of a dictionary".into()),
            Some("auto") => Ok(Self::Auto),
            Some("train") => Ok(Self::Train),
            Some("off") => Ok(Self::Off),
            _ => Ok(Self::File(text.into())),
        }
    }
}

/// `create --attach`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl Attachment {
    fn parse(text: OsString) -> Result<Self, String> {
        let bytes = text.into_vec();
        let at = bytes.iter().position(|&byte| byte == b'=');
        let Some((name, path)) = at
            .map(|at| (&bytes[..at], &bytes[at + 1..]))
            .filter(|(name, path)| !name.is_empty() && !path.is_empty())
        else {
            return Err("must be NAME=PATH, such as vmstate=/run/vm/state.json".into());
        };
        match std::str::from_utf8(name) {
            Ok(name) if is_blob_name(name) => Ok(Self {
                name: name.to_owned(),
                path: OsStr::from_bytes(path).into(),
            }),
            _ => Err(format!(
                "invalid name \"{}\": it must have at most {MAX_NAME_BYTES} \
                 bytes of UTF-8, no / and no control characters, and not be . or ..",
                names::stored(name)
            )),
        }
    }
}

/// Show what a snapshot holds
///
/// Prints identity, sizes, regions, attachments and properties; of a layered snapshot also the
/// files of its ancestors, with the number of pages taken from each. Reads only the directory of
/// the file, whatever its size, and the index of a layered one.
#[derive(Debug, ClapArgs)]
pub(crate) struct Info {
    /// Snapshot to look at
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Draw a map of the memory, too, which needs the whole index
    ///
    /// Each character shows what most of its pages are; their number depends on the width of the
    /// terminal. Without a terminal the map is plain text, 80 columns wide. `snaprestore report`
    /// writes a larger one.
    #[arg(long, conflicts_with = "json")]
    pub(crate) map: bool,
    #[command(flatten)]
    pub(crate) layers: Layers,
}

/// Write a page about a snapshot that can be sent around
///
/// The page is one HTML file without references to others: a map of the memory by kind of page,
/// compression, layer and working set; what compresses and what does not; the working set over time
/// (--trace); and how a restore went, with the latencies of its faults and a timeline of demand and
/// prefetch (--run). It holds names and counts, but no content of memory or attachments. Reads the
/// index of the snapshot, and no memory.
#[derive(Debug, ClapArgs)]
pub(crate) struct Report {
    /// Snapshot to report on
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) layers: Layers,
    /// Trace of a restore of this memory, whose pages are shown as hot [default: the working sets
    /// in the snapshot]
    #[arg(long, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub(crate) trace: Option<PathBuf>,
    /// Statistics of a restore of this memory, as written by `restore --run-json` and
    /// `serve --run-json`
    #[arg(long, value_name = "RUN.json", value_hint = ValueHint::FilePath)]
    pub(crate) run: Option<PathBuf>,
    /// HTML file to write; `-` is standard output
    #[arg(long, short, value_hint = ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// Replace an existing file, once the new one is complete
    #[arg(long, short)]
    pub(crate) force: bool,
}

/// Check every byte of a snapshot
///
/// Checks the structure and every checksum, decodes every frame, checks the index against the
/// frames and the frames against the index, and checks the digest of the content. Of the ancestors
/// of a layered snapshot it checks what this snapshot uses.
#[derive(Debug, ClapArgs)]
pub(crate) struct Verify {
    /// Snapshot to check
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Check every byte of the ancestors of a layered snapshot, too
    #[arg(long)]
    pub(crate) chain: bool,
    #[command(flatten)]
    pub(crate) layers: Layers,
    /// Decoding threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = threads())]
    pub(crate) threads: Option<usize>,
}

/// Write a snapshot's memory, or an attachment, to a plain file
///
/// Regions are written one after another, without the gaps between them. Where memory does not
/// begin at 0 or has a gap (as on every PC with more than 3 GiB), file offsets are not addresses:
/// `info` lists the offset of each region of the snapshot, and the summary those of the regions
/// written. Runs of zero pages become holes. Every byte is verified. The output file appears only
/// when it is complete.
#[derive(Debug, ClapArgs)]
pub(crate) struct Extract {
    /// Snapshot to read
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) layers: Layers,
    /// File to write; `-` is standard output, and a named pipe must have a reader
    #[arg(long, short, value_hint = ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// Replace an existing file, once the new one is complete
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Only this region (may be repeated): its name, or its number as `info` shows it
    #[arg(long, value_name = "NAME|NUMBER", conflicts_with = "attachment")]
    pub(crate) region: Vec<String>,
    /// This attachment instead of memory
    #[arg(long, value_name = "NAME")]
    pub(crate) attachment: Option<String>,
    /// Policy for pages that could not be read when the snapshot was taken
    #[arg(long, value_enum, default_value_t = Unavailable::Refuse, value_name = "WHAT")]
    pub(crate) unavailable: Unavailable,
    /// Decoding threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = threads())]
    pub(crate) threads: Option<usize>,
}

/// `extract --unavailable`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Unavailable {
    /// Write nothing and fail
    Refuse,
    /// Write zeros in their place
    Zero,
}

/// Restore a snapshot lazily into this process and report how it went
///
/// The memory is mapped at once, empty; each page is decoded and installed when it is first
/// touched or prefetched. A damaged frame is reported with its pages, the rest is restored, and the
/// exit code is 3. The memory is discarded when the command exits: it is a test and a measurement.
#[derive(Debug, ClapArgs)]
pub(crate) struct Restore {
    /// Snapshot to restore
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) layers: Layers,
    /// Order in which pages are touched: none, sequential, random or file:PATH
    ///
    /// Sequential and random touch every page once. The file lists the numbers of pages to touch,
    /// one per line, in this order; empty lines and lines that start with # are ignored.
    #[arg(long, default_value = "sequential", value_name = "ORDER",
          value_parser = OsStringValueParser::new().try_map(|text| Touch::parse(&text)))]
    pub(crate) touch: Touch,
    /// Pages to fetch in the background before they are touched
    #[arg(long, value_enum, default_value_t = Prefetch::All, value_name = "WHAT")]
    pub(crate) prefetch: Prefetch,
    /// Working set to fetch [default: all of them, in their order]
    #[arg(long, value_name = "NAME")]
    pub(crate) working_set: Option<String>,
    /// Threads that serve page faults
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = threads())]
    pub(crate) threads: usize,
    /// Threads that touch pages
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = threads())]
    pub(crate) touch_threads: usize,
    /// Seed of the random order
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Seconds to retry a failed read before its pages count as bad; damaged data is not retried
    #[arg(long, default_value_t = RETRY_TIMEOUT, value_name = "SECONDS", value_parser = retry_timeout())]
    pub(crate) retry_timeout: u64,
    /// Compare every touched page with this raw memory file, as `extract` writes it
    #[arg(long, value_name = "RAW", value_hint = ValueHint::FilePath)]
    pub(crate) check: Option<PathBuf>,
    /// Record the pages that are touched, in order of first touch, to this new file
    ///
    /// A recording ends after 10 s, after a quarter of the pages (at most 262,144), when the rate
    /// of first touches has settled (after 3 s at the earliest), or with the command. Until then
    /// each touch installs one page, and prefetch waits.
    #[arg(long, value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub(crate) record: Option<PathBuf>,
    /// Write the statistics of the restore to this file, for `snaprestore report --run`
    ///
    /// The JSON object has the statistics of `ctl stats`, with the buckets of the latencies, and a
    /// timeline of demand and prefetch. An existing file is replaced.
    #[arg(long, value_name = "RUN.json", value_hint = ValueHint::FilePath)]
    pub(crate) run_json: Option<PathBuf>,
    /// Suppress the note that only user-mode faults are permitted here
    ///
    /// Without permission for a full userfaultfd, the command falls back to one that catches faults
    /// of user code but not of system calls. That is enough here.
    #[arg(long)]
    pub(crate) user_mode_only: bool,
}

/// `restore --touch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// No page.
    None,
    /// From the first page to the last.
    Sequential,
    /// Each page once, in a random order.
    Random,
    /// The pages that a file lists.
    File(PathBuf),
}

impl Touch {
    fn parse(text: &OsStr) -> Result<Self, &'static str> {
        match text.as_bytes() {
            b"none" => Ok(Self::None),
            b"sequential" => Ok(Self::Sequential),
            b"random" => Ok(Self::Random),
            other => match other.strip_prefix(b"file:") {
                Some(path) if !path.is_empty() => Ok(Self::File(OsStr::from_bytes(path).into())),
                _ => Err("expected none, sequential, random or file:PATH"),
            },
        }
    }
}

/// Compare restores with alternatives, on your file and machine
///
/// The alternatives: a private mapping of the raw file (mmap), a userfaultfd handler that copies
/// one page a fault (handler, handler-pinned: on the core of the thread that faults), reading
/// everything first (read-all), decompressing everything first (unzstd), and a mapping of the raw
/// file inside a compressed file system (squashfs-64k, squashfs-128k, erofs: as root, with
/// squashfs-tools or erofs-utils). Memory that another process serves, as that of a VMM: serve,
/// vmm-handler, vmm-handler-pinned, vmm-copy-all. Missing images are created in a temporary folder.
/// Each trial runs in its own process. All contenders must read the same bytes.
#[derive(Debug, ClapArgs)]
pub(crate) struct Bench {
    /// Snapshot, or raw memory file
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) layers: Layers,
    /// Measured rounds, after one that compares all bytes
    #[arg(long, default_value_t = 3, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// Order of touches
    #[arg(long, value_enum, default_value_t = BenchOrder::Random, value_name = "ORDER")]
    pub(crate) order: BenchOrder,
    /// Seed of the random order
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Share of the pages to touch, in percent
    #[arg(long, default_value_t = 100, value_name = "PERCENT",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) share: u8,
    /// Write to the pages instead of reading them
    #[arg(long)]
    pub(crate) writes: bool,
    /// Begin with a cold page cache (as root, drops the whole cache of the machine; otherwise only
    /// that of the files)
    #[arg(long)]
    pub(crate) cold: bool,
    /// Threads that touch
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = threads())]
    pub(crate) threads: usize,
    /// Contenders, separated by semicolons; `ours` and `serve` take options, for example
    /// ours:prefetch=all,frame=64 or ours:prefetch=working-set,working-set=boot
    #[arg(
        long,
        value_delimiter = ';',
        value_name = "NAMES",
        default_value = "ours:prefetch=all;ours;mmap;handler;handler-pinned;read-all;unzstd;squashfs-128k;erofs"
    )]
    pub(crate) contenders: Vec<Contender>,
    /// Folder on a disk for temporary images
    #[arg(long, default_value = "/var/tmp", value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
}

/// `bench --order`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchOrder {
    /// From the first page to the last
    Sequential,
    /// Each page once, in a random order
    Random,
}

/// Snapshot, verify and restore a live process, without preparation
///
/// Starts a process that loads this machine's own files into memory and indexes them, snapshots
/// it while it runs, verifies the snapshot, restores it lazily under random touches, and compares
/// every page with the memory of the process.
#[derive(Debug, ClapArgs)]
pub(crate) struct Demo {
    /// Snapshot this process instead
    #[arg(long)]
    pub(crate) pid: Option<i32>,
    /// Keep the snapshot under this name
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) keep: Option<PathBuf>,
    /// Replace an existing file of that name, once the new one is complete
    #[arg(long, short, requires = "keep")]
    pub(crate) force: bool,
    /// Memory that the demonstrated process fills, in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB",
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) size: u32,
    /// Suppress the note that only user-mode faults are permitted here
    ///
    /// Without permission for a full userfaultfd, the command falls back to one that catches faults
    /// of user code but not of system calls. That is enough here.
    #[arg(long)]
    pub(crate) user_mode_only: bool,
}

/// The process that `demo` snapshots: loads files until it holds so much, says so, and waits.
#[derive(Debug, ClapArgs)]
pub(crate) struct DemoOwner {
    /// Memory to fill, in MiB
    pub(crate) size: u32,
}

/// Print the completion script of a shell
#[derive(Debug, ClapArgs)]
pub(crate) struct Completions {
    /// Shell to complete for
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

/// Print the manual pages, or write them to a folder
#[derive(Debug, ClapArgs)]
pub(crate) struct Man {
    /// Command whose page to print, such as create or ctl-add [default: the page of snaprestore
    /// itself]
    #[arg(conflicts_with = "output")]
    pub(crate) command: Option<OsString>,
    /// Folder to write all pages to
    #[arg(long, short, value_hint = ValueHint::DirPath)]
    pub(crate) output: Option<PathBuf>,
    /// Replace existing pages in that folder
    #[arg(long, short, requires = "output")]
    pub(crate) force: bool,
}

/// Parses the seconds of `--retry-timeout`; 0 disables retries.
fn retry_timeout() -> impl clap::builder::TypedValueParser<Value = u64> {
    clap::value_parser!(u64).range(0..=3600)
}

/// Parses a number of threads. The limit suffices for any machine and catches typing mistakes.
fn threads() -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u16).range(1..=512).map(usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_finds_no_contradiction() {
        Args::command().debug_assert();
    }

    #[test]
    fn options_of_a_service_need_its_snapshot() {
        let error = |line: &str| {
            let line = line.split(' ').map(OsString::from);
            parse(line).err().map(|error| error.to_string())
        };
        let values = [
            ("prefetch", "all"),
            ("working-set", "boot"),
            ("on-error", "kill"),
            ("allow-uid", "7"),
            ("threads", "2"),
            ("handshake-timeout", "10"),
            ("retry-timeout", "5"),
            ("socket-mode", "0660"),
            ("socket-group", "kvm"),
            ("record", "traces"),
        ];
        let all = ServiceOptions::augment_args(clap::Command::new("x"));
        let all: Vec<_> = all
            .get_arguments()
            .filter_map(clap::Arg::get_long)
            .collect();
        assert_eq!(all, values.map(|(option, _)| option));
        for (option, value) in values {
            let option = format!("--{option}");
            let with = |what: &str| error(&format!("snaprestore serve {what} {option} {value}"));
            assert_eq!(with("--snapshot s --socket t"), None, "{option}");
            let named = |text: Option<String>, remedy: &str| {
                let text = text.unwrap_or_default();
                assert!(text.contains(&option) && text.contains(remedy), "{text}");
            };
            named(with("--config f"), "in the configuration file");
            named(with("--control c"), "ctl add");
        }
        assert_eq!(error("snaprestore serve --config f --control c"), None);
    }

    #[test]
    fn frame_sizes_are_powers_of_two_from_4_kib_to_2_mib() {
        for (text, kib) in [
            ("4", 4),
            ("128", 128),
            ("64K", 64),
            ("64KiB", 64),
            ("2M", 2048),
        ] {
            assert_eq!(text.parse(), Ok(FrameSize { kib }), "{text}");
        }
        for text in [
            "",
            "0",
            "2",
            "96",
            "4096",
            "4M",
            "K",
            "-4",
            "18014398509481985M",
        ] {
            assert!(text.parse::<FrameSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn attachments_are_split_at_the_first_equals_sign() {
        assert_eq!(
            Attachment::parse("state=a=b".into()),
            Ok(Attachment {
                name: "state".into(),
                path: "a=b".into()
            })
        );
        let long = format!("{}=path", "x".repeat(4097));
        for text in [
            "",
            "state",
            "=path",
            "state=",
            "..=path",
            "a/b=path",
            "a\u{1b}b=path",
            &long,
        ] {
            assert!(Attachment::parse(text.into()).is_err(), "{text}");
        }
        // A path may be any bytes; a name must be UTF-8.
        let path = OsString::from_vec(b"state=/\xff".to_vec());
        assert_eq!(
            Attachment::parse(path).unwrap().path.as_os_str().as_bytes(),
            b"/\xff"
        );
        let name = OsString::from_vec(b"\xff=state".to_vec());
        assert!(Attachment::parse(name).unwrap_err().contains("\\xff"));
    }

    #[test]
    fn dictionary_is_a_keyword_or_a_path() {
        assert_eq!(Dictionary::parse("auto".into()), Ok(Dictionary::Auto));
        assert_eq!(
            Dictionary::parse("./off".into()),
            Ok(Dictionary::File("./off".into()))
        );
        assert!(Dictionary::parse("".into()).is_err());
    }
}
