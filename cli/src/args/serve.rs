//! The arguments of `snaprestore serve`, and those of a service.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args as ClapArgs, Command, ValueHint};
use snaprestore_daemon::api::config::{
    FailurePolicy, MetricsAddress, Prefetch, RETRY_TIMEOUT, Service, SocketMode,
};
use snaprestore_daemon::log::LogFormat;

use super::{Layers, retry_timeout, threads};

/// Help text of `serve --help` about the configuration file and the log.
const CONFIG_HELP: &str = "\
The file of --config is TOML. Relative paths in it are relative to its folder. The keys of a service
correspond to the options, with the same defaults; only name, snapshot and socket are required:

  control = \"/run/snaprestore/control.socket\"
  metrics = \"127.0.0.1:9100\"
  layers = [\"/var/lib/snaprestore/bases\"]
  run_json = \"/var/lib/snaprestore/runs\"

  [[service]]
  name = \"web\"
  snapshot = \"/var/lib/snaprestore/web.snap\"
  socket = \"/run/snaprestore/web.socket\"
  prefetch = \"working-set\"
  working_set = \"boot\"
  on_error = \"kill\"
  allow_uid = [1000]
  threads = 2
  handshake_timeout = 10
  retry_timeout = 5
  socket_mode = \"0660\"
  socket_group = \"kvm\"
  record = \"/var/lib/snaprestore/traces\"

Events are logged to standard error. SNAPRESTORE_LOG sets the level, for example `warn` or
`info,snaprestore_engine=debug`.";

/// Serve the memory of VMs that hand over their userfaultfd
///
/// A VMM connects to the socket and hands over its memory, as Firecracker does when it loads a
/// snapshot with `mem_backend` of type `Uffd`; its pages then come from the snapshot when the guest
/// touches them. One socket serves any number of VMs, one after another and at once. A VM whose
/// page can't be restored is killed and never reads wrong memory.
///
/// On SIGTERM or Ctrl-C, `serve` installs all missing pages of every VM, releases the VMs and
/// exits. On a second signal it kills the VMs that are not complete. The exit code is 1 if it
/// killed a VM that it should have completed. A worker process serves the pages; it is replaced
/// when it crashes or hangs.
///
/// A layered snapshot is served like any other. The daemon keeps the files of its ancestors open,
/// so they may be renamed or deleted while it is served.
///
/// --config serves several snapshots, each at its own socket. --control lets `snaprestore ctl` add
/// and remove snapshots, list the VMs, and complete them.
#[derive(Debug, ClapArgs)]
#[command(after_long_help = CONFIG_HELP)]
pub(crate) struct Serve {
    /// Snapshot of the VMs' memory
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath,
        required_unless_present_any = ["config", "control"], requires = "socket")]
    pub(crate) snapshot: Option<PathBuf>,
    /// Socket to create and listen on; no other process may be listening there
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath,
        required_unless_present_any = ["config", "control"], requires = "snapshot")]
    pub(crate) socket: Option<PathBuf>,
    /// Configuration file with the services; excludes --snapshot, --socket and the options of a
    /// service (--prefetch, --record and so on)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath,
        conflicts_with_all = ["snapshot", "socket"])]
    pub(crate) config: Option<PathBuf>,
    /// Control socket for `snaprestore ctl`, accessible to this user and root only
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) control: Option<PathBuf>,
    /// Where to serve Prometheus metrics: the path of a socket to create, or a loopback address
    /// such as 127.0.0.1:9100
    #[arg(long, value_name = "PATH|ADDRESS")]
    pub(crate) metrics: Option<MetricsAddress>,
    /// Log format
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Seconds that a VM may wait for a hung worker before the worker is killed and replaced; a VM
    /// for which three workers in a row hang is killed
    #[arg(long, default_value_t = 30, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) stuck_after: u64,
    /// Size of the cache of decoded frames that VMs of one snapshot, or of children of one base,
    /// share, in MiB for the whole daemon; 0 disables it
    #[arg(long, default_value_t = 64, value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(..=1 << 20))]
    pub(crate) frame_cache: u64,
    /// Folder in which to write the statistics of each VM that has ended, for `snaprestore report`
    ///
    /// The files are named SERVICE-VM-SECONDS.run.json; nothing replaces or deletes them. Their
    /// numbers begin with the worker that served the VM last.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) run_json: Option<PathBuf>,
    /// Run the worker without its sandbox, which forbids opening files, running programs and most
    /// system calls
    #[arg(long)]
    pub(crate) no_confine: bool,
    /// User to run the sandboxed worker as, by name or number; it keeps CAP_KILL to kill VMs
    #[arg(long, value_name = "USER", conflicts_with = "no_confine")]
    pub(crate) user: Option<String>,
    #[command(flatten)]
    pub(crate) layers: Layers,
    #[command(flatten)]
    pub(crate) options: ServiceOptions,
}

/// Options of a service.
#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct ServiceOptions {
    /// Pages to fetch in the background before they are touched
    #[arg(long, value_enum, default_value_t = Prefetch::WorkingSet, value_name = "WHAT")]
    pub(crate) prefetch: Prefetch,
    /// Working set to fetch [default: all of them, in their order]
    #[arg(long, value_name = "NAME")]
    pub(crate) working_set: Option<String>,
    /// Policy when a page that a VM waits for can't be restored
    #[arg(long, value_enum, default_value_t = FailurePolicy::Kill, value_name = "WHAT")]
    pub(crate) on_error: FailurePolicy,
    /// User whose processes are served (may be repeated) [default: every user who can connect]
    #[arg(long, value_name = "UID")]
    pub(crate) allow_uid: Vec<u32>,
    /// Threads that serve the page faults of a VM
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = threads())]
    pub(crate) threads: usize,
    /// Seconds that a VMM may take to hand over its memory after connecting
    #[arg(long, alias = "patience", default_value_t = 10, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) handshake_timeout: u64,
    /// Seconds to retry a failed read before --on-error applies; damaged data is not retried
    #[arg(long, default_value_t = RETRY_TIMEOUT, value_name = "SECONDS", value_parser = retry_timeout())]
    pub(crate) retry_timeout: u64,
    /// Octal mode of the socket, such as 0660; connecting needs write permission [default: 0777
    /// less the umask]
    #[arg(long, value_name = "MODE")]
    pub(crate) socket_mode: Option<SocketMode>,
    /// Group of the socket, by name or number [default: the daemon's, or the folder's if that is
    /// setgid]
    #[arg(long, value_name = "GROUP")]
    pub(crate) socket_group: Option<String>,
    /// Record the first touches of each VM to a trace file of its own in this folder
    ///
    /// A recording ends after 10 s, after a quarter of the pages (at most 262,144), or when the
    /// rate of first touches has settled (after 3 s at the earliest). Until then each touch
    /// installs one page, and prefetch waits.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) record: Option<PathBuf>,
}

/// Refuses options of a service on a command line that names no snapshot to serve: they would have
/// no effect.
pub(super) fn refuse_ignored(
    matches: &ArgMatches,
    command: &mut Command,
) -> Result<(), clap::Error> {
    if matches.contains_id("snapshot") {
        return Ok(());
    }
    let options = ServiceOptions::augment_args(Command::new("service"));
    let is_given = |option: &&Arg| {
        let source = matches.value_source(option.get_id().as_str());
        source == Some(ValueSource::CommandLine)
    };
    let given = options.get_arguments().filter(is_given);
    let given: Vec<_> = given
        .filter_map(|option| Some(format!("--{}", option.get_long()?)))
        .collect();
    if given.is_empty() {
        return Ok(());
    }
    let remedy = if matches.contains_id("config") {
        "set them for each service in the configuration file"
    } else {
        "name a snapshot to serve, or pass them to `snaprestore ctl add`"
    };
    let text = format!(
        "these options have no effect without --snapshot: {}; {remedy}",
        given.join(", ")
    );
    let serve = command.find_subcommand_mut("serve");
    let mut none = Command::new("serve");
    Err(serve
        .unwrap_or(&mut none)
        .error(ErrorKind::ArgumentConflict, text))
}

impl ServiceOptions {
    /// Returns the service with these options.
    pub(crate) fn service(
        &self,
        name: String,
        snapshot: PathBuf,
        socket: PathBuf,
    ) -> std::io::Result<Service> {
        Ok(Service {
            name,
            snapshot,
            socket,
            prefetch: self.prefetch,
            working_set: self.working_set.clone(),
            on_error: self.on_error,
            allow_uid: self.allow_uid.clone(),
            threads: self.threads,
            handshake_timeout: self.handshake_timeout,
            retry_timeout: self.retry_timeout,
            socket_mode: self.socket_mode,
            socket_group: self.socket_group.clone(),
            record: self.record.as_ref().map(std::path::absolute).transpose()?,
        })
    }
}
