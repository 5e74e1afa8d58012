//! One measurement, in a process of its own.
//!
//! The program that measures runs itself again for each trial ([`Runner`]), with the trial as JSON
//! on its standard input; the child ([`run_child`]) answers with the outcome on its standard
//! output.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use snapshot_format::{FileStore, LayerFolders, OpenError, Snapshot, SnapshotOptions};

use crate::contender::Contender;
use crate::contenders::outside::Outside;
use crate::crowd::Member;
use crate::server::Server;
use crate::stats::Latencies;
use crate::usage::{self, Held, Watcher, Who};
use crate::workload::{Access, Cache, Order, Plan, read_pages};
use crate::{BenchError, PAGE, cache, limits, uffd};

/// Time in seconds after which a trial is killed: nothing here takes a tenth of it.
const MAX_SECONDS: u32 = 300;

/// Kind of measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trial {
    /// A restore with touches.
    Restore(RestoreTrial),
    /// Every frame of a snapshot decoded once, and nothing else.
    Decode {
        /// The snapshot.
        snapshot: PathBuf,
        /// Threads.
        threads: usize,
    },
    /// Every page that a restore copies copied into empty memory, and nothing else.
    Copy {
        /// The snapshot.
        snapshot: PathBuf,
        /// Threads.
        threads: usize,
    },
    /// The frames of a snapshot's working sets decoded and their pages copied into empty memory,
    /// and nothing else.
    WorkingSet {
        /// The snapshot.
        snapshot: PathBuf,
        /// Threads.
        threads: usize,
    },
    /// Frames decoded one by one, in the order of a shuffle, each timed.
    DecodeEach {
        /// The snapshot.
        snapshot: PathBuf,
        /// Maximum number of frames.
        most: u64,
        /// Seed of the shuffle.
        seed: u64,
    },
    /// The other side of a trial: a handler that serves the memory of the trial's process. It
    /// measures nothing.
    Outside(Outside),
    /// One of several VMs that are served at once.
    Member(Member),
}

/// A restore with touches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RestoreTrial {
    /// Contender that restores.
    pub contender: Contender,
    /// File to restore from.
    pub file: PathBuf,
    /// The `snaprestore` that serves, for contenders that serve from another process.
    pub program: PathBuf,
    /// Size of the memory, in bytes.
    pub bytes: u64,
    /// Order of touches.
    pub order: Order,
    /// Seed of the shuffle.
    pub seed: u64,
    /// Share of the order that is touched.
    pub share: f64,
    /// Maximum number of touches.
    pub most_pages: Option<u64>,
    /// File of page numbers, for orders that come from one.
    pub listed: Option<PathBuf>,
    /// Kind of access of a touch.
    pub access: Access,
    /// Threads that touch.
    pub threads: usize,
    /// State of the page cache for the contender's file.
    pub cache: Cache,
    /// Whether each touch is timed.
    pub latencies: bool,
    /// Whether every byte of the touched pages is checked afterwards, and memory use is watched
    /// meanwhile. The times of such a trial are not used.
    pub proof: bool,
}

/// Measured values of a trial. Fields that make no sense for its kind are zero or none.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Time from the start to usable memory; of a VMM, until it has handed its memory over.
    pub start_us: f64,
    /// Time from usable memory to the last touch.
    pub touch_ms: f64,
    /// Time from the start to the end: the last touch, or the complete restore if nothing is
    /// touched.
    pub total_ms: f64,
    /// Processor time of the process, and of those that serve it.
    pub cpu_s: f64,
    /// Processor time of the whole machine meanwhile, because file systems also work in the
    /// kernel's threads.
    pub machine_cpu_s: f64,
    /// Anonymous memory and page tables at the end, beyond those before, of the process and of
    /// those that serve it.
    pub memory_bytes: u64,
    /// The part of it that is neither restored content nor its page tables.
    pub beyond_bytes: u64,
    /// The maximum of it that was observed, in a proof.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// Bytes read from disk by the process.
    pub disk_bytes: u64,
    /// Bytes read by all processes from the disk that holds the file.
    pub device_bytes: u64,
    /// Pages touched, or pages copied or frames decoded by a limit.
    pub count: u64,
    /// Sum of the touched bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sum: Option<u64>,
    /// Checksum of all bytes of the touched pages, in a proof.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksum: Option<u32>,
    /// Times of single touches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latencies: Option<Latencies>,
    /// Method by which the file was made cold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cooled: Option<String>,
    /// The contender's own counters.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub facts: serde_json::Value,
}

/// Answer of the child.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reply {
    Done(Box<Outcome>),
    Unavailable(String),
    Failed(String),
}

impl Trial {
    /// Runs the trial in this process.
    pub fn run(&self) -> Result<Outcome, BenchError> {
        match self {
            Self::Restore(trial) => trial.run(),
            Self::Decode { snapshot, threads } => limits::decode(snapshot, *threads),
            Self::Copy { snapshot, threads } => limits::copy(snapshot, *threads),
            Self::WorkingSet { snapshot, threads } => limits::working_set(snapshot, *threads),
            Self::DecodeEach {
                snapshot,
                most,
                seed,
            } => limits::decode_each(snapshot, *most, *seed),
            Self::Outside(outside) => outside.run().map(|()| Outcome::default()),
            Self::Member(member) => member.run(),
        }
    }

    fn file(&self) -> &Path {
        match self {
            Self::Restore(trial) => &trial.file,
            Self::Decode { snapshot, .. }
            | Self::Copy { snapshot, .. }
            | Self::WorkingSet { snapshot, .. }
            | Self::DecodeEach { snapshot, .. } => snapshot,
            Self::Outside(outside) => &outside.file,
            Self::Member(member) => member.socket(),
        }
    }
}

impl RestoreTrial {
    fn run(&self) -> Result<Outcome, BenchError> {
        let listed = self.listed.as_deref().map(read_pages).transpose()?;
        let pages = self.bytes / PAGE;
        let plan = Plan::new(
            pages,
            self.order,
            self.seed,
            self.share,
            self.most_pages,
            listed,
        );
        let core = if !self.contender.stays_on_a_core() {
            None
        } else if self.threads > 1 {
            return Err(BenchError::Unavailable(
                "a handler can share the core of one faulting thread only".into(),
            ));
        } else {
            let core = uffd::this_core();
            uffd::pin_to(core);
            Some(core)
        };
        let server = self.server(core)?;
        let cooled = match self.cache {
            Cache::Warm => {
                cache::warm(&self.file)?;
                None
            }
            Cache::Cold => Some(cache::cool(&self.file)?.to_owned()),
        };
        let watcher = self.proof.then(Watcher::start);
        let before = Before::served_by(&self.file, server.as_ref().map(Server::pid));

        let began = Instant::now();
        let socket = server.as_ref().map(Server::socket);
        let mut restored = self.contender.start(&self.file, self.bytes, core, socket)?;
        let usable = began.elapsed();
        let memory = restored.memory();
        // Set after the start, because threads inherit the affinity of their creator.
        if self.contender.has_pinned_toucher() {
            uffd::pin_to(uffd::this_core());
        }
        let touched = memory.touch(&plan.offsets, self.access, self.threads, self.latencies);
        if self.order == Order::None {
            restored.complete()?;
        }
        let total = began.elapsed();

        let mut outcome = before.outcome(&self.file);
        outcome.start_us = usable.as_secs_f64() * 1e6;
        outcome.touch_ms = total.saturating_sub(usable).as_secs_f64() * 1e3;
        outcome.total_ms = total.as_secs_f64() * 1e3;
        outcome.peak_bytes =
            watcher.map(|watcher| watcher.stop().saturating_sub(before.held.bytes()));
        let content = usage::content(memory.base().expose_provenance() as u64, memory.len())?;
        outcome.beyond_bytes = outcome.memory_bytes.saturating_sub(content.bytes());
        outcome.count = plan.offsets.len() as u64;
        outcome.sum = memory.sum_after(&plan.offsets, self.access, &touched);
        if outcome.sum.is_none() {
            return Err(BenchError::Trial {
                what: self.contender.to_string(),
                why: "a byte that was written is not there".into(),
            });
        }
        outcome.checksum = self.proof.then(|| memory.checksum(&plan.offsets));
        outcome.latencies = Latencies::from_nanos(touched.nanos);
        outcome.cooled = cooled;
        outcome.facts = restored.facts();
        // The memory still exists, so it may be completed now.
        if let Some(server) = server {
            outcome.facts["server"] = server.stop();
        }
        Ok(outcome)
    }

    /// Starts the process that serves from outside, if the contender has one.
    fn server(&self, core: Option<usize>) -> Result<Option<Server>, BenchError> {
        let handler = |everything| {
            let populated = self.cache == Cache::Warm;
            Server::handler(&self.file, self.bytes, core, everything, populated)
        };
        match &self.contender {
            Contender::Serve(options) => Server::serve(&self.program, &self.file, options),
            Contender::VmmHandler { .. } => handler(false),
            Contender::VmmCopyAll => handler(true),
            _ => return Ok(None),
        }
        .map(Some)
    }
}

/// Resource use before a measurement began.
pub(crate) struct Before {
    server: Option<u32>,
    held: Held,
    served: Served,
    cpu: f64,
    machine_cpu: f64,
    disk: u64,
    device: u64,
}

impl Before {
    pub(crate) fn now(file: &Path) -> Self {
        Self::served_by(file, None)
    }

    /// Records the current use, including that of `server` and its descendants.
    pub(crate) fn served_by(file: &Path, server: Option<u32>) -> Self {
        Self {
            server,
            served: Served::by(server),
            held: Held::now(),
            device: usage::device_bytes(file),
            disk: usage::disk_bytes(),
            machine_cpu: usage::machine_cpu_seconds(),
            cpu: usage::cpu_seconds(Who::Own),
        }
    }

    /// Returns the use since then.
    pub(crate) fn outcome(&self, file: &Path) -> Outcome {
        let own = usage::cpu_seconds(Who::Own) - self.cpu;
        let served = Served::by(self.server);
        let held = Held::now().bytes().saturating_sub(self.held.bytes());
        Outcome {
            cpu_s: own + served.cpu - self.served.cpu,
            machine_cpu_s: usage::machine_cpu_seconds() - self.machine_cpu,
            memory_bytes: held + served.bytes.saturating_sub(self.served.bytes),
            disk_bytes: usage::disk_bytes() - self.disk,
            device_bytes: usage::device_bytes(file) - self.device,
            ..Outcome::default()
        }
    }
}

/// Resource use of the processes that serve a trial.
#[derive(Default)]
struct Served {
    cpu: f64,
    bytes: u64,
}

impl Served {
    fn by(server: Option<u32>) -> Self {
        let family = server.map(usage::family).unwrap_or_default();
        family.into_iter().fold(Self::default(), |sum, pid| Self {
            cpu: sum.cpu + usage::cpu_seconds_of(pid),
            bytes: sum.bytes + Held::of_process(pid).bytes(),
        })
    }
}

/// The environment variable with folders of ancestors, as `snaprestore` reads it.
const LAYERS_VARIABLE: &str = "SNAPRESTORE_LAYERS";

/// Opens a snapshot in a trial's process: see [`Runner::layers`].
pub(crate) fn open_snapshot(path: &Path) -> Result<Snapshot, OpenError> {
    let folders = std::env::var_os(LAYERS_VARIABLE).unwrap_or_default();
    let folders = std::env::split_paths(&folders).filter(|path| !path.as_os_str().is_empty());
    let options = SnapshotOptions::default().ancestors(Arc::new(LayerFolders::new(folders)));
    Snapshot::open_with(FileStore::open_snapshot(path)?, &options)
}

/// Runs trials in processes of their own.
#[derive(Clone, Debug)]
pub struct Runner {
    program: PathBuf,
    args: Vec<OsString>,
    layers: Option<OsString>,
}

impl Runner {
    /// Creates a runner whose trials run as `program` with `args`, which must call [`run_child`].
    pub fn new(program: PathBuf, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            program,
            args: args.into_iter().map(Into::into).collect(),
            layers: None,
        }
    }

    /// Sets the folders in which trials look for ancestors of snapshots, besides the snapshot's
    /// own, separated by colons: the environment variable `SNAPRESTORE_LAYERS` of their processes.
    #[must_use]
    pub fn layers(mut self, folders: OsString) -> Self {
        self.layers = Some(folders);
        self
    }

    /// Runs one trial to its end.
    pub fn run(&self, trial: &Trial) -> Result<Outcome, BenchError> {
        let what = || format!("a trial with {}", trial.file().display());
        let failed = || BenchError::io(what());
        let text = serde_json::to_vec(trial).map_err(BenchError::trial(what()))?;
        let layers = self.layers.iter().map(|folders| (LAYERS_VARIABLE, folders));
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .envs(layers)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed())?;
        if let Some(mut stdin) = child.stdin.take() {
            // The death of a child is reported by its status.
            let _ = stdin.write_all(&text);
        }
        let output = child.wait_with_output().map_err(failed())?;
        let reply = output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout));
        match reply {
            Some(Ok(Reply::Done(outcome))) => Ok(*outcome),
            Some(Ok(Reply::Unavailable(why))) => Err(BenchError::Unavailable(why)),
            Some(Ok(Reply::Failed(why))) => Err(BenchError::Trial { what: what(), why }),
            Some(Err(error)) => Err(BenchError::trial(what())(error)),
            None => {
                let said = String::from_utf8_lossy(&output.stderr);
                let why = format!("it ended with {}: {}", output.status, said.trim());
                Err(BenchError::Trial { what: what(), why })
            }
        }
    }
}

/// Runs the child's side: reads a trial, runs it, and writes its result.
#[expect(unsafe_code, reason = "the limit on a trial's time is a signal")]
pub fn run_child(input: &mut dyn Read, output: &mut dyn Write) -> Result<(), BenchError> {
    // SAFETY: both calls request signals that kill this process, whatever its threads wait for:
    // after a time, and when the thread that started it exits.
    unsafe {
        libc::alarm(MAX_SECONDS);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    let trial: Trial =
        serde_json::from_reader(input).map_err(BenchError::trial("reading a trial"))?;
    let reply = match trial.run() {
        Ok(outcome) => Reply::Done(Box::new(outcome)),
        Err(BenchError::Unavailable(why)) => Reply::Unavailable(why),
        Err(error) => Reply::Failed(crate::with_causes(&error)),
    };
    let text = serde_json::to_vec(&reply).map_err(BenchError::trial("writing an outcome"))?;
    output
        .write_all(&text)
        .map_err(BenchError::io("writing an outcome"))
}
