//! What can be typed. Nothing here opens or checks a file: that is each command's first step.

#![expect(
    clippy::doc_markdown,
    reason = "the comments of options are help texts, in which backticks are shown"
)]

mod ctl;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use snaprestore_compare::contender::Contender;
use snaprestore_daemon::api::config::{
    FailurePolicy, MetricsAddress, RETRY_TIMEOUT, Service, SocketMode,
};
use snaprestore_daemon::log::LogFormat;
use snapshot_format::is_blob_name;
use snapshot_format::layout::MAX_NAME_BYTES;

use crate::exit;
use crate::names;

pub(crate) use snaprestore_daemon::api::config::Prefetch;

pub(crate) use ctl::{Ctl, CtlOp, CtlTop};

/// Packs the memory of microVMs and processes into small, verified files, and brings it back
/// lazily.
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
    /// Print the result as one JSON object on standard output; of a failure, its error and exit
    /// code
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print errors only
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Create(Create),
    Info(Info),
    Verify(Verify),
    Extract(Extract),
    Restore(Restore),
    Serve(Serve),
    Ctl(Ctl),
    /// Tell what this machine permits, and what would permit the rest
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
    /// Whether it leaves a file, and could leave half of one.
    pub(crate) fn writes(&self) -> bool {
        match self {
            Self::Create(_) | Self::Extract(_) | Self::Bench(_) | Self::Demo(_) => true,
            Self::Man(man) => man.output.is_some(),
            _ => false,
        }
    }

    /// How it logs, if it is a daemon.
    pub(crate) fn log_format(&self) -> Option<LogFormat> {
        match self {
            Self::Serve(serve) => Some(serve.log_format),
            _ => None,
        }
    }
}

/// Pack memory into a snapshot
///
/// SOURCE is a raw memory file (holes of a sparse one are not read), an ELF core (of a process,
/// by gcore or the kernel; of a guest, by QEMU's dump-guest-memory or VirtualBox's dumpvmcore; of a
/// machine, by its kernel), a block device, or a pipe. Files that are surely no memory (compressed,
/// saved states, disk images) are refused. Whatever is left out, or taken for something that it may
/// not be, is told: in the summary, in `remarks` of --json, and as a property of the snapshot.
/// The snapshot appears under its name when it is complete and on disk, never before.
#[derive(Debug, ClapArgs)]
pub(crate) struct Create {
    /// Memory to pack; `-` is standard input
    #[arg(required_unless_present = "pid", value_hint = ValueHint::FilePath)]
    pub(crate) source: Option<PathBuf>,
    /// Take the memory of a live process
    ///
    /// All its threads are stopped while its memory is read, and go on as soon as it is read, also if
    /// snaprestore is killed meanwhile or its output is taken slowly: until it is compressed, it lies
    /// in a temporary file beside the output (for standard output in TMPDIR or /var/tmp). If that
    /// has no room, the process waits. Needs the right to trace it: the same user, or root.
    ///
    /// Some blocking system calls of the process may fail with EINTR afterwards, without a signal
    /// handler: epoll_wait, semop and semtimedop, sigtimedwait and sigwaitinfo, io_uring_enter, and
    /// socket calls with a timeout (SO_RCVTIMEO, SO_SNDTIMEO). Others are restarted.
    ///
    /// Memory that is not to be dumped (MADV_DONTDUMP, often keys) is taken like any other: a
    /// restore needs it. What cannot be read is recorded as unavailable: secret memory
    /// (memfd_secret), memory of devices, pages that another process has yet to bring, and what lies
    /// beyond the end of a mapped file. Address space that is only set aside is left out, and so are
    /// 64 GiB or more in a row that were never touched or cannot be read, and the kernel's vvar.
    #[arg(long, conflicts_with_all = ["source", "raw"])]
    pub(crate) pid: Option<i32>,
    /// Take SOURCE as plain memory, whatever it looks like
    #[arg(long)]
    pub(crate) raw: bool,
    /// Confirm what the holes of a raw file are
    ///
    /// They are read as zeros, and the summary tells how many. In a diff (as Firecracker writes it)
    /// a hole means "unchanged": a diff must be merged into its base first. So a file most of which
    /// is holes is refused beside the state of a Firecracker VM (--attach), unless this is given.
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with = "pid")]
    pub(crate) holes: Option<Holes>,
    /// Take what is there of an ELF core that was cut short; the rest is recorded as unavailable
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
    /// Memory compressed together, a power of two from 4 to 2048 KiB, as 64, 128K or 2M
    ///
    /// Larger frames are smaller on disk; smaller ones come faster when a single page is needed.
    #[arg(long, default_value = "128", value_name = "KIB")]
    pub(crate) frame_size: FrameSize,
    /// Compression dictionary: trained, none, or a file made by `zstd --train`
    ///
    /// `auto` trains one for frames of up to 64 KiB. For larger ones it saves about half a percent, and writing
    /// takes 40 % longer. A dictionary that doesn't pay is dropped.
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
    /// Threads that compress [default: one a core, at most 8]
    #[arg(long, value_name = "N", value_parser = threads())]
    pub(crate) threads: Option<usize>,
}

/// `create --holes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Holes {
    /// They are zeros
    Zero,
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
                "must be a power of two from 4 to 2048 (KiB), as 64, 128K or 2M".to_owned()
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
            return Err("must be NAME=PATH, as vmstate=/run/vm/state.json".into());
        };
        match std::str::from_utf8(name) {
            Ok(name) if is_blob_name(name) => Ok(Self {
                name: name.to_owned(),
                path: OsStr::from_bytes(path).into(),
            }),
            _ => Err(format!(
                "the name \"{}\" can't be a file's: it must have at most {MAX_NAME_BYTES} \
                 bytes of UTF-8, no / and no control characters, and not be . or ..",
                names::stored(name)
            )),
        }
    }
}

/// Show what a snapshot holds
///
/// Identity, sizes, regions, attachments, properties: read from its directory alone, whatever its
/// size.
#[derive(Debug, ClapArgs)]
pub(crate) struct Info {
    /// Snapshot to look at
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

/// Check every byte of a snapshot
///
/// Structure, every checksum, every frame's decode, both directions of the index, the digest of
/// the content.
#[derive(Debug, ClapArgs)]
pub(crate) struct Verify {
    /// Snapshot to check
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Threads that decode [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads())]
    pub(crate) threads: Option<usize>,
}

/// Write a snapshot's memory, or an attachment, to a plain file
///
/// The regions follow one another in the order of the snapshot, without the addresses between them:
/// where memory doesn't begin at 0 or has a gap (as that of every PC with more than 3 GiB),
/// offsets are not addresses. `info` lists the offset of each region in the whole memory, and
/// the summary those of what was written. Runs of zero pages become holes. Every byte has passed its
/// checksum. The file appears under its name when it is complete.
#[derive(Debug, ClapArgs)]
pub(crate) struct Extract {
    /// Snapshot to read
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
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
    /// What to do with pages that could not be read when the snapshot was taken
    #[arg(long, value_enum, default_value_t = Unavailable::Refuse, value_name = "WHAT")]
    pub(crate) unavailable: Unavailable,
    /// Threads that decode [default: one a core]
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
/// touched or prefetched. A frame that is damaged is reported with its pages, the rest goes on,
/// and the exit code is 3.
#[derive(Debug, ClapArgs)]
pub(crate) struct Restore {
    /// Snapshot to restore
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Order in which every page is touched
    #[arg(long, value_enum, default_value_t = Touch::Sequential, value_name = "ORDER")]
    pub(crate) touch: Touch,
    /// What is fetched in the background before it is touched
    #[arg(long, value_enum, default_value_t = Prefetch::All, value_name = "WHAT")]
    pub(crate) prefetch: Prefetch,
    /// Threads that serve page faults
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = threads())]
    pub(crate) threads: usize,
    /// Threads that touch pages
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = threads())]
    pub(crate) touch_threads: usize,
    /// Start of the random order, to repeat one
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Seconds that a page that can't be read is read again, before it counts as bad; damage isn't
    /// read again
    #[arg(long, default_value_t = RETRY_TIMEOUT, value_name = "SECONDS", value_parser = retry_timeout())]
    pub(crate) retry_timeout: u64,
    /// Compare every touched page with this raw memory file, as `extract` writes it
    #[arg(long, value_name = "RAW", value_hint = ValueHint::FilePath)]
    pub(crate) check: Option<PathBuf>,
    /// Don't mention that a full userfaultfd isn't permitted here: with one for faults of user mode
    /// only, which is taken then, instructions of this process wait for missing pages, and system
    /// calls don't, which is enough for this command
    #[arg(long)]
    pub(crate) user_mode_only: bool,
}

/// What `serve --help` says of its configuration, and of the log.
const CONFIG_HELP: &str = "\
The file of --config is TOML; paths in it are meant from its folder. What it may say of a service is
what the options say, and needs as little:

  control = \"/run/snaprestore/control.socket\"
  metrics = \"127.0.0.1:9100\"

  [[service]]
  name = \"web\"
  snapshot = \"/var/lib/snaprestore/web.snap\"
  socket = \"/run/snaprestore/web.socket\"
  prefetch = \"working-set\"
  on_error = \"kill\"
  allow_uid = [1000]
  threads = 2
  handshake_timeout = 10
  retry_timeout = 5
  socket_mode = \"0660\"
  socket_group = \"kvm\"

Events are logged on standard error; SNAPRESTORE_LOG chooses which, as `warn` or
`info,snaprestore_engine=debug`.";

/// Serve the memory of VMs that hand over their userfaultfd
///
/// A VMM connects to the socket and hands over its memory, as Firecracker does when it loads a
/// snapshot with `mem_backend` of type `Uffd`; its pages then come from the snapshot when the guest
/// touches them. One socket serves any number of VMs, one after another and at once. A VM whose
/// page can't be restored is killed, and never reads wrong memory. Asked to stop (SIGTERM, Ctrl-C),
/// it installs what is missing in every VM and lets them go on without it; asked again, it kills those
/// that aren't complete. It exits with 0 if all of them were let go or had ended, and with 1 if it killed
/// one that it should have completed. The process that serves the pages is another one, which is replaced when it dies
/// or gets stuck.
///
/// --config serves several snapshots, each at its own socket, and --control lets `snaprestore ctl` add
/// and remove them, look at the VMs and let them go.
#[derive(Debug, ClapArgs)]
#[command(after_long_help = CONFIG_HELP)]
pub(crate) struct Serve {
    /// Snapshot of the VMs' memory
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath,
        required_unless_present_any = ["config", "control"], requires = "socket")]
    pub(crate) snapshot: Option<PathBuf>,
    /// Socket to listen on; it is made, and nobody may be listening there
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath,
        required_unless_present_any = ["config", "control"], requires = "snapshot")]
    pub(crate) socket: Option<PathBuf>,
    /// File that names what is served, instead of --snapshot and --socket
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath,
        conflicts_with_all = ["snapshot", "socket"])]
    pub(crate) config: Option<PathBuf>,
    /// Control socket for `snaprestore ctl`, made for this user and root only
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) control: Option<PathBuf>,
    /// Where Prometheus finds metrics: the path of a socket to make, or a loopback address, as
    /// 127.0.0.1:9100
    #[arg(long, value_name = "PATH|ADDRESS")]
    pub(crate) metrics: Option<MetricsAddress>,
    /// How events are logged
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Seconds that a VM may wait for the process that serves it, before that one is killed and replaced. A VM for
    /// which three of them got stuck in a row is killed
    #[arg(long, default_value_t = 30, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) stuck_after: u64,
    /// Decoded frames that VMs of one snapshot share, in MiB of memory for all of them; 0 keeps none
    #[arg(long, default_value_t = 64, value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(..=1 << 20))]
    pub(crate) frame_cache: u64,
    /// Don't confine the process that serves the pages to what it needs: no files, no programs, few system
    /// calls
    #[arg(long)]
    pub(crate) no_confine: bool,
    /// User that the confined process becomes, by name or number; it keeps the right to kill VMs
    #[arg(long, value_name = "USER", conflicts_with = "no_confine")]
    pub(crate) user: Option<String>,
    #[command(flatten)]
    pub(crate) options: ServiceOptions,
}

/// How VMs are served.
#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct ServiceOptions {
    /// What is fetched in the background before it is touched
    #[arg(long, value_enum, default_value_t = Prefetch::WorkingSet, value_name = "WHAT")]
    pub(crate) prefetch: Prefetch,
    /// What is done when a page that a VM waits for can't be restored
    #[arg(long, value_enum, default_value_t = FailurePolicy::Kill, value_name = "WHAT")]
    pub(crate) on_error: FailurePolicy,
    /// Users whose processes are served; more than one may be given [default: every user who may
    /// connect]
    #[arg(long, value_name = "UID")]
    pub(crate) allow_uid: Vec<u32>,
    /// Threads that serve the page faults of a VM
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = threads())]
    pub(crate) threads: usize,
    /// Seconds that a VMM that has connected may take to hand its memory over
    #[arg(long, alias = "patience", default_value_t = 10, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) handshake_timeout: u64,
    /// Seconds that a page that can't be read is read again, before --on-error decides; damage isn't
    /// read again
    #[arg(long, default_value_t = RETRY_TIMEOUT, value_name = "SECONDS", value_parser = retry_timeout())]
    pub(crate) retry_timeout: u64,
    /// Mode of the socket, in octal, as 0660: who may write to it may connect [default: what the umask
    /// leaves of 0777]
    #[arg(long, value_name = "MODE")]
    pub(crate) socket_mode: Option<SocketMode>,
    /// Group of the socket, by name or number [default: that of the daemon or of the folder]
    #[arg(long, value_name = "GROUP")]
    pub(crate) socket_group: Option<String>,
}

impl ServiceOptions {
    /// The service with these options.
    pub(crate) fn service(&self, name: String, snapshot: PathBuf, socket: PathBuf) -> Service {
        Service {
            name,
            snapshot,
            socket,
            prefetch: self.prefetch,
            on_error: self.on_error,
            allow_uid: self.allow_uid.clone(),
            threads: self.threads,
            handshake_timeout: self.handshake_timeout,
            retry_timeout: self.retry_timeout,
            socket_mode: self.socket_mode,
            socket_group: self.socket_group.clone(),
        }
    }
}

/// `restore --touch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Touch {
    /// No page is touched
    None,
    /// From the first page to the last
    Sequential,
    /// Each page once, in a random order
    Random,
}

/// Compare restores with the other ways to do it, on your file and machine
///
/// The others: a private mapping of the raw file (mmap), a userfaultfd handler that copies one page
/// a fault (handler, handler-pinned: on the core of the thread that faults), reading everything
/// first (read-all), decompressing everything first (unzstd), and a mapping of the raw file inside
/// a compressed file system (squashfs-64k, squashfs-128k, erofs: as root, with squashfs-tools or
/// erofs-utils). Memory that another process serves, as that of a VMM: serve, vmm-handler,
/// vmm-handler-pinned, vmm-copy-all. What is missing is made in a temporary folder; each trial runs in a process of its own; all must
/// read the same bytes.
#[derive(Debug, ClapArgs)]
pub(crate) struct Bench {
    /// Snapshot, or raw memory file
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Rounds that count, after one that doesn't
    #[arg(long, default_value_t = 3, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// Order of touches
    #[arg(long, value_enum, default_value_t = BenchOrder::Random, value_name = "ORDER")]
    pub(crate) order: BenchOrder,
    /// Start of the random order, to repeat one
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Part of the pages that is touched
    #[arg(long, default_value_t = 100, value_name = "PERCENT",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) share: u8,
    /// Write to the pages instead of reading them
    #[arg(long)]
    pub(crate) writes: bool,
    /// Begin with nothing in the page cache (drops all of it, as root)
    #[arg(long)]
    pub(crate) cold: bool,
    /// Threads that touch
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = threads())]
    pub(crate) threads: usize,
    /// Who takes part, separated by semicolons; `ours` and `serve` take options:
    /// ours:prefetch=all,frame=64
    #[arg(
        long,
        value_delimiter = ';',
        value_name = "NAMES",
        default_value = "ours:prefetch=all;ours;mmap;handler;handler-pinned;read-all;unzstd;squashfs-128k;erofs"
    )]
    pub(crate) contenders: Vec<Contender>,
    /// Folder, on a disk, for what is made on the way
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

/// Snapshot, verify and restore a live process, with nothing prepared
///
/// Starts a process that loads this machine's own files into memory and indexes them, snapshots
/// it while it lives, verifies the snapshot, restores it lazily under random touches, and compares
/// every page with what the process held.
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
    /// Don't mention that a full userfaultfd isn't permitted here: with one for faults of user mode
    /// only, which is taken then, instructions of this process wait for missing pages, and system
    /// calls don't, which is enough for this command
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
    /// Command whose page to print [default: the page of snaprestore itself]
    #[arg(conflicts_with = "output")]
    pub(crate) command: Option<OsString>,
    /// Folder to write all pages to
    #[arg(long, short, value_hint = ValueHint::DirPath)]
    pub(crate) output: Option<PathBuf>,
    /// Replace existing pages in that folder
    #[arg(long, short, requires = "output")]
    pub(crate) force: bool,
}

/// Seconds of `--retry-timeout`: 0 reads nothing again.
fn retry_timeout() -> impl clap::builder::TypedValueParser<Value = u64> {
    clap::value_parser!(u64).range(0..=3600)
}

/// A number of threads: enough for any machine, and no typing mistake.
fn threads() -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u16).range(1..=512).map(usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_finds_no_contradiction() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
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
        // A path is any bytes, a name isn't.
        let path = OsString::from_vec(b"state=/\xff".to_vec());
        assert_eq!(
            Attachment::parse(path).unwrap().path.as_os_str().as_bytes(),
            b"/\xff"
        );
        let name = OsString::from_vec(b"\xff=state".to_vec());
        assert!(Attachment::parse(name).unwrap_err().contains("\\xff"));
    }

    #[test]
    fn a_dictionary_is_a_word_or_a_path() {
        assert_eq!(Dictionary::parse("auto".into()), Ok(Dictionary::Auto));
        assert_eq!(
            Dictionary::parse("./off".into()),
            Ok(Dictionary::File("./off".into()))
        );
        assert!(Dictionary::parse("".into()).is_err());
    }
}
