//! The memory of a live process, held still while it is read.

mod backing;
mod hold;
mod maps;
mod pagemap;

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::errno::Errno;
use nix::unistd::Pid;

use snapshot_format::layout::region_flags;

use super::extents::Stretch;
use super::{CHUNK, PAGE, Region, Samples, Sampling, Sink, Source};
use crate::exit::Refusal;
use crate::output::{Output, count};
use crate::signals::Cancel;
use backing::Backing;
use hold::Hold;
use maps::{Mapping, Untouched};
use pagemap::Pagemap;

/// A stopped process and what it has mapped. It goes on when this is dropped.
#[derive(Debug)]
pub(crate) struct HeldProcess {
    pid: i32,
    name: String,
    mappings: Vec<Mapping>,
    memory: File,
    pagemap: Option<Pagemap>,
    output: Output,
    cancel: Cancel,
    /// The thread through which the memory is read.
    thread: Pid,
    /// Last, so that the process is held while anything above is used.
    hold: Hold,
}

/// Pages never touched, so many in a row or more, are left out: 64 GiB. Sanitizers and some
/// runtimes set terabytes aside as if to use them, and a snapshot has 64 bytes for each 2 MiB.
const VAST: u64 = (64 << 30) / PAGE;

/// What is known of some pages without reading them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Read,
    Zero,
    Unavailable,
}

impl HeldProcess {
    /// Stops process `pid` and looks at what it has mapped.
    pub(crate) fn hold(pid: i32, output: Output, cancel: &Cancel) -> Result<Self> {
        let hold = Hold::new(pid, cancel)?;
        // Through a thread, because a main one that ended early has no memory any more.
        let thread = hold.thread().ok_or_else(|| ended(pid))?;
        let folder = format!("/proc/{pid}/task/{thread}");
        let mappings: Vec<_> = Mapping::all(&folder)
            .map_err(|error| not_opened(pid, "its mappings", error))?
            .into_iter()
            .filter(|mapping| !mapping.is_vsyscall() && !mapping.is_empty_reservation())
            .collect();
        if mappings.is_empty() {
            bail!("process {pid} has no memory: it is ending");
        }
        let memory = File::open(format!("{folder}/mem"))
            .map_err(|error| not_opened(pid, "its memory", error))?;
        Ok(Self {
            pid,
            name: fs::read_to_string(format!("/proc/{pid}/comm"))
                .map(|name| maps::shown(name.trim_end()))
                .unwrap_or_default(),
            mappings,
            memory,
            pagemap: Pagemap::open(&folder).ok(),
            output,
            cancel: cancel.clone(),
            thread,
            hold,
        })
    }

    /// What `mapping` is, in runs of pages that are to be treated alike.
    fn plan(
        &self,
        mapping: &Mapping,
        run: &mut dyn FnMut(u64, u64, Plan) -> Result<()>,
    ) -> Result<()> {
        let details = mapping.details.unwrap_or_default();
        let pages = (mapping.end - mapping.start) / PAGE;
        if details.device {
            return run(mapping.start, pages, Plan::Unavailable);
        }
        let absent = match mapping.untouched() {
            Untouched::Read => return self.plan_file(mapping, run),
            Untouched::Zero => Plan::Zero,
            Untouched::Unknown => Plan::Unavailable,
        };
        if mapping.details.is_some() && details.populated == 0 {
            return run(mapping.start, pages, absent);
        }
        let Some(pagemap) = &self.pagemap else {
            // Without it, reading tells; but a page that another process answers for would keep
            // this one waiting.
            let plan = if absent == Plan::Zero {
                Plan::Read
            } else {
                absent
            };
            return run(mapping.start, pages, plan);
        };
        pagemap
            .runs(mapping.start, pages, |start, pages, populated| {
                self.cancel.check()?;
                run(start, pages, if populated { Plan::Read } else { absent })
            })
            .map_err(|error| self.explain(error))
    }

    /// As [`Self::plan`], for a mapping whose untouched pages are what its file holds.
    fn plan_file(
        &self,
        mapping: &Mapping,
        run: &mut dyn FnMut(u64, u64, Plan) -> Result<()>,
    ) -> Result<()> {
        let len = mapping.end - mapping.start;
        let Some(backing) = Backing::of(self.pid, mapping) else {
            return run(mapping.start, len / PAGE, Plan::Read);
        };
        let there = backing.end.saturating_sub(mapping.offset).min(len);
        let range = mapping.offset..mapping.offset.saturating_add(there);
        for stretch in backing.extents.stretches(range) {
            self.cancel.check()?;
            let (piece, plan) = match stretch {
                Stretch::Data(piece) => (piece, Plan::Read),
                Stretch::Hole(piece) => (piece, Plan::Zero),
            };
            let pages = (piece.end - piece.start) / PAGE;
            run(mapping.start + piece.start, pages, plan)?;
        }
        if there < len {
            run(
                mapping.start + there,
                (len - there) / PAGE,
                Plan::Unavailable,
            )?;
        }
        Ok(())
    }

    /// What an error of reading from the process means.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        if error.downcast_ref::<io::Error>().is_none() {
            error
        } else if self.hold.holds(self.thread) {
            error.context(format!("process {}", self.pid))
        } else {
            ended(self.pid)
        }
    }

    /// Reads `pages` pages at `start`; those that can't be read are unavailable. Returns how many.
    fn read_run(&self, start: u64, pages: u64, sink: &mut dyn Sink) -> Result<u64> {
        let mut buffer = vec![0; usize::try_from((pages * PAGE).min(CHUNK as u64))?];
        let end = start + pages * PAGE;
        let (mut at, mut unreadable) = (start, 0);
        while at < end {
            self.cancel.check()?;
            let want = usize::try_from((end - at).min(CHUNK as u64))?;
            match self.memory.read_at(&mut buffer[..want], at) {
                Ok(0) => return Err(ended(self.pid)),
                Ok(count) if count as u64 >= PAGE => {
                    let whole = count as u64 / PAGE * PAGE;
                    sink.pages(&buffer[..usize::try_from(whole)?])?;
                    at += whole;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) => {
                    sink.unavailable(1)?;
                    unreadable += 1;
                    at += PAGE;
                }
                Err(error) if is_unreadable(&error) => {
                    if !self.hold.holds(self.thread) {
                        return Err(ended(self.pid));
                    }
                    sink.unavailable(1)?;
                    unreadable += 1;
                    at += PAGE;
                }
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("process {}: reading at {at:#x}", self.pid));
                }
            }
        }
        Ok(unreadable)
    }
}

/// The region of a mapping, or of the part of it from `start` on.
fn region(mapping: &Mapping, start: u64) -> Region {
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    Region {
        start,
        flags: bit(mapping.read, region_flags::READ)
            | bit(mapping.write, region_flags::WRITE)
            | bit(mapping.execute, region_flags::EXECUTE)
            | bit(mapping.shared, region_flags::SHARED),
        page_shift: mapping.page_shift(),
        name: mapping.name.clone(),
    }
}

/// The error of an address without memory behind it, as past the end of a mapped file.
fn is_unreadable(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EIO | Errno::EFAULT | Errno::EOVERFLOW))
}

fn ended(pid: i32) -> anyhow::Error {
    anyhow!("process {pid} ended while it was read")
}

/// A part of `/proc/PID` could not be opened.
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
        anyhow::Error::new(error).context(format!("process {pid}: reading {what}"))
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
        let bytes: u64 = self
            .mappings
            .iter()
            .filter(|mapping| {
                // The vast ones are left out, most or all of them.
                let populated = mapping.details.map(|details| details.populated);
                mapping.untouched() != Untouched::Zero
                    || mapping.end - mapping.start < VAST * PAGE
                    || populated != Some(0)
            })
            .map(|mapping| mapping.end - mapping.start)
            .sum();
        Some(bytes / PAGE)
    }

    fn sample(&mut self, wanted: &Sampling) -> Result<Samples> {
        // What the process wrote itself is most of what will be stored, and is found without
        // reading: private anonymous memory that is populated, and shared memory.
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
                if plan != Plan::Read {
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

    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()> {
        let (mut unreadable, mut unknown, mut left_out) = (0, 0, 0);
        for mapping in &self.mappings {
            let answered = mapping.untouched() == Untouched::Unknown;
            // A region ends where vast memory is left out, and another begins behind it.
            let mut begun = false;
            self.plan(mapping, &mut |start, pages, plan| {
                if plan == Plan::Zero && pages >= VAST {
                    left_out += pages;
                    begun = false;
                    return Ok(());
                }
                if !begun {
                    sink.region(&region(mapping, start))?;
                    begun = true;
                }
                match plan {
                    Plan::Read => {
                        unreadable += self.read_run(start, pages, sink)?;
                        Ok(())
                    }
                    Plan::Zero => sink.zeros(pages),
                    Plan::Unavailable => {
                        if answered {
                            unknown += pages;
                        }
                        sink.unavailable(pages)
                    }
                }
            })?;
        }
        if !self.hold.holds(self.thread) {
            return Err(ended(self.pid));
        }
        if left_out > 0 {
            self.output.warn(format_args!(
                "{} GiB of process {} were set aside and never touched; left out",
                (left_out * PAGE) >> 30,
                self.pid
            ));
        }
        if unknown > 0 {
            self.output.warn(format_args!(
                "warning: {} of process {} not in its memory yet: another process still brings them \
                 (a lazy restore?); recorded as unavailable",
                count(unknown, "page"),
                self.pid
            ));
        }
        if unreadable > 0 {
            self.output.warn(format_args!(
                "warning: {} of process {} could not be read; recorded as unavailable",
                count(unreadable, "page"),
                self.pid
            ));
        }
        Ok(())
    }
}
