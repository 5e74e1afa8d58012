//! The memory of a live process, which is stopped while it is read.
//!
//! ```text
//!   tracer thread (hold)   stops the threads ........................ lets them go   reader thread
//! (read)        what is where (plan) ── read ──▶ spool ─┘   main thread
//! spool ──▶ sink: compress, write
//! ```
//!
//! The process continues as soon as its memory is read, however slowly the snapshot is written.
//!
//! This process may depend on the one that it holds: for a file system, a terminal, or the reader
//! of its output. While the process is held, nothing that it is known to serve is touched, and the
//! tracer thread releases it in time if the other threads block on it all the same.

mod backing;
mod hold;
mod internal;
mod maps;
mod pagemap;
mod plan;
mod read;
mod spool;
mod stuck;

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::errno::Errno;
use snapshot_format::layout::region_flags;

use super::{PAGE, Region, Remark, Samples, Sampling, Sink, Source, VAST};
use crate::exit::Refusal;
use crate::names;
use crate::output::Output;
use crate::signals::Cancel;
use backing::{Backing, Served};
use hold::{Hold, ended};
use maps::{Mapping, Untouched};
use pagemap::Pagemap;
use read::Summary;
pub(crate) use spool::Place;
use spool::Spool;

/// A stopped process and its mappings. The process continues when its memory is read, or when this
/// is dropped.
#[derive(Debug)]
pub(crate) struct HeldProcess {
    pid: i32,
    name: String,
    pages: u64,
    reading: Reading,
    held: Option<Duration>,
    remarks: Vec<Remark>,
}

/// Progress of reading.
#[derive(Debug)]
enum Reading {
    /// Reading has not begun. The spool is created before the process is held.
    NotYet(Box<Inner>, Arc<Spool>),
    /// A thread reads the memory into the spool.
    Begun(Arc<Spool>, JoinHandle<Result<Summary>>),
    Done,
}

/// Everything needed to read the memory.
#[derive(Debug)]
struct Inner {
    pid: i32,
    mappings: Vec<Mapping>,
    memory: File,
    pagemap: Option<Pagemap>,
    /// The file that was looked up last, and whether it was found.
    last_backing: RefCell<Option<FoundBacking>>,
    served: Served,
    cancel: Cancel,
    /// Dropped last, so that the process is held while anything above is in use.
    hold: Hold,
}

/// Device and inode of a file, and the file if it can be opened.
type FoundBacking = ((u64, u64), u64, Option<Arc<Backing>>);

impl HeldProcess {
    /// Stops process `pid` and reads its mappings. Memory that is read but not yet written is
    /// stored at `place`.
    pub(crate) fn hold(pid: i32, place: &Place, output: Output, cancel: &Cancel) -> Result<Self> {
        let served = Served::by(pid);
        let spool = Arc::new(Spool::new(place, &served));
        let hold = Hold::new(pid, output, cancel)?;
        // Goes through a held thread, because a main thread that exited early has no memory any
        // more.
        let folder = format!("/proc/{pid}/task/{}", hold.thread());
        let pagemap = Pagemap::open(&folder).ok();
        let is_empty = |mapping: &Mapping| {
            let untouched = |pagemap: &Pagemap| pagemap.is_untouched(mapping);
            mapping.is_empty_reservation() && pagemap.as_ref().is_none_or(untouched)
        };
        let mappings: Vec<_> = Mapping::all(pid, &folder, &|| hold.step())
            .map_err(|error| not_opened(pid, "its mappings", error))?
            .into_iter()
            .filter(|mapping| !mapping.is_kernel_data() && !is_empty(mapping))
            .collect();
        if mappings.is_empty() {
            bail!("process {pid} has no memory: it is ending");
        }
        let memory = File::open(format!("{folder}/mem"))
            .map_err(|error| not_opened(pid, "its memory", error))?;
        Ok(Self {
            pid,
            name: fs::read(format!("/proc/{pid}/comm"))
                .map(|name| names::stored(name.strip_suffix(b"\n").unwrap_or(&name)))
                .unwrap_or_default(),
            pages: expected_pages(&mappings),
            reading: Reading::NotYet(
                Box::new(Inner {
                    pid,
                    mappings,
                    memory,
                    pagemap,
                    last_backing: RefCell::default(),
                    served,
                    cancel: cancel.clone(),
                    hold,
                }),
                spool,
            ),
            held: None,
            remarks: Vec::new(),
        })
    }

    /// Starts the thread that reads the memory.
    fn start_reading(&mut self, inner: Box<Inner>, spool: Arc<Spool>) -> Result<()> {
        let most = inner
            .mappings
            .iter()
            .map(|mapping| inner.max_stored(mapping));
        spool.leave_room(most.sum());
        let reader = {
            let spool = Arc::clone(&spool);
            std::thread::Builder::new()
                .name("reader".into())
                .spawn(move || inner.read(&spool))
                .context("starting a thread to read the process with")?
        };
        self.reading = Reading::Begun(spool, reader);
        Ok(())
    }

    /// Waits for the reading thread and takes its result.
    fn end(&mut self) -> Result<()> {
        let Reading::Begun(_, reader) = std::mem::replace(&mut self.reading, Reading::Done) else {
            return Ok(());
        };
        let summary = match reader.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        self.held = Some(summary.held);
        self.remarks = summary.remarks(self.pid);
        Ok(())
    }
}

impl Drop for HeldProcess {
    fn drop(&mut self) {
        if let Reading::Begun(spool, reader) = std::mem::replace(&mut self.reading, Reading::Done) {
            spool.close();
            let _ = reader.join();
        }
    }
}

/// Estimates the number of pages that will be delivered.
fn expected_pages(mappings: &[Mapping]) -> u64 {
    let bytes: u64 = mappings
        .iter()
        .filter(|mapping| {
            // Most or all of the vast mappings are left out.
            let populated = mapping.details.map(|details| details.populated);
            mapping.end - mapping.start < VAST * PAGE || populated != Some(0)
        })
        .map(|mapping| mapping.end - mapping.start)
        .sum();
    bytes / PAGE
}

impl Inner {
    /// Returns an upper bound of the bytes of `mapping` that are not zero.
    fn max_stored(&self, mapping: &Mapping) -> u64 {
        let len = mapping.end - mapping.start;
        let Some(details) = mapping.details else {
            return len;
        };
        let of_file = match mapping.untouched() {
            Untouched::File if self.served.has(mapping) => 0,
            Untouched::File => backing::allocated(self.pid, mapping).unwrap_or(len),
            Untouched::Zero | Untouched::Unknown | Untouched::Read => 0,
        };
        details.populated.saturating_add(of_file).min(len)
    }

    /// Fails if the command was asked to stop, or if the process was released early.
    fn check(&self) -> Result<()> {
        self.cancel.check()?;
        self.hold.check_latch()
    }

    /// Explains an error in reading from the process.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        if error.downcast_ref::<io::Error>().is_none() {
            return error;
        }
        match self.hold.check() {
            Ok(()) => error.context(format!("process {}", self.pid)),
            Err(gone) => gone,
        }
    }

    fn sample(&self, wanted: &Sampling) -> Result<Samples> {
        use std::os::unix::fs::FileExt as _;
        // Most of what will be stored was written by the process itself, and can be found without
        // reading: populated private anonymous memory, and shared memory.
        let own = || {
            self.mappings.iter().filter(|mapping| {
                let shared = mapping.shared && mapping.write;
                mapping.untouched() == Untouched::Zero || shared
            })
        };
        let mut samples = Samples {
            all: own()
                .filter_map(|mapping| mapping.details)
                .map(|details| details.populated)
                .sum(),
            ..Samples::default()
        };
        if samples.all <= wanted.bytes as u64 {
            return Ok(samples);
        }
        let step = (samples.all / PAGE / wanted.pieces().max(1)).max(1);
        let (mut passed, mut next) = (0, 0);
        let mut piece = vec![0; wanted.piece];
        for mapping in own() {
            self.plan(mapping, &mut |start, pages, plan| {
                if !matches!(plan, plan::Plan::Process) {
                    return Ok(());
                }
                while next < passed + pages {
                    let page = next - passed;
                    let len = usize::try_from((pages - page) * PAGE)?.min(piece.len());
                    let place = start + page * PAGE;
                    if let Ok(count) = self.memory.read_at(&mut piece[..len], place) {
                        samples.keep(&piece[..count]);
                    }
                    next += step;
                }
                passed += pages;
                Ok(())
            })?;
        }
        Ok(samples)
    }
}

/// Returns the region for a mapping, or for the part of it that begins at `start`.
fn region(mapping: &Mapping, start: u64) -> Region {
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    Region {
        start,
        flags: bit(mapping.read, region_flags::READ)
            | bit(mapping.write, region_flags::WRITE)
            | bit(mapping.execute, region_flags::EXECUTE)
            | bit(mapping.shared, region_flags::SHARED),
        page_shift: mapping.page_shift(),
        name: names::stored(&mapping.name),
    }
}

/// Returns the error for a part of `/proc/PID` that could not be opened.
fn not_opened(pid: i32, what: &str, error: io::Error) -> anyhow::Error {
    let errno = error.raw_os_error().map(Errno::from_raw);
    if matches!(errno, Some(Errno::ESRCH | Errno::ENOENT)) {
        ended(pid)
    } else if error.kind() == ErrorKind::PermissionDenied {
        Refusal::NotPermitted(format!(
            "process {pid}: {what} may not be read ({error}); run as root, or as the user that \
             owns the process"
        ))
        .into()
    } else {
        anyhow!(error).context(format!("process {pid}: reading {what}"))
    }
}

impl Source for HeldProcess {
    fn describe(&self) -> Vec<(String, String)> {
        vec![
            ("source".into(), "process".into()),
            ("source.pid".into(), self.pid.to_string()),
            ("source.name".into(), self.name.clone()),
        ]
    }

    fn pages(&self) -> Option<u64> {
        Some(self.pages)
    }

    fn sample(&mut self, wanted: &Sampling) -> Result<Samples> {
        let Reading::NotYet(inner, _) = &self.reading else {
            return Ok(Samples::default());
        };
        let samples = inner.sample(wanted)?;
        // The process is read while a dictionary is trained.
        self.begin()?;
        Ok(samples)
    }

    fn begin(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.reading, Reading::Done) {
            Reading::NotYet(inner, spool) => self.start_reading(inner, spool),
            begun => {
                self.reading = begun;
                Ok(())
            }
        }
    }

    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()> {
        self.begin()?;
        if let Reading::Begun(spool, _) = &self.reading {
            Arc::clone(spool).empty(sink)?;
        }
        self.end()
    }

    fn remarks(&self) -> Vec<Remark> {
        self.remarks.clone()
    }

    fn held(&self) -> Option<Duration> {
        self.held
    }
}
