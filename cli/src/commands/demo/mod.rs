//! `snaprestore demo`: snapshots and restores a real process, without preparation.

mod owner;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use indicatif::{BinaryBytes, HumanCount};
use nix::fcntl::OFlag;
use serde::Serialize;
use snaprestore_daemon::api::config::RETRY_TIMEOUT;
use snaprestore_uffd::uffd::{OpenOptions, UserModeOnly};

use self::owner::{Owner, OwnerCounts};
use super::create::{self, DictionaryChoice, WriteSettings};
use super::{restore, verify};
use crate::args::{self, Prefetch, Touch};
use crate::exit::{self, Exit, Refusal};
use crate::facts::Facts;
use crate::names;
use crate::output::{Output, count, percent, ratio};
use crate::progress::Progress;
use crate::signals::Cancel;
use crate::source::{HeldProcess, PAGE, Place, Region, Sink, Source as _};
use crate::target::{self, Stream, Target};

pub(crate) use owner::run as run_owner;

#[derive(Serialize)]
struct DemoReport {
    /// Whether every page was restored as the process held it.
    ok: bool,
    pid: i32,
    /// Answers of the process before and after it was packed.
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<OwnerCounts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<OwnerCounts>,
    create: create::CreateReport,
    verify: verify::VerifyReport,
    restore: restore::RestoreReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<PathBuf>,
}

pub(crate) fn run(args: &args::Demo, output: Output, cancel: &Cancel) -> Result<Exit> {
    // Reports at the start if the restore at the end is not possible.
    OpenOptions::new()
        .user_mode_only(UserModeOnly::IfNeeded)
        .open()
        .map_err(|error| exit::name_the_remedies(error.into()))?;
    let (target, snapshot) = destination(args, cancel)?;
    let step = |what: &str| {
        if output.shows_progress() {
            output.warn(what);
        }
    };
    let mut owner = None;
    let mut before = None;
    let pid = if let Some(pid) = args.pid {
        pid
    } else {
        step("starting a process that reads this machine's files ...");
        let mut started = Owner::start(args.size)?;
        let pid = started.pid()?;
        before = Some(started.ask(cancel)?);
        owner = Some(started);
        pid
    };
    cancel.check()?;
    step("packing it while it lives ...");
    let reference = temporary_file()?;
    let create = pack(pid, target, &reference, output, cancel)?;
    let after = match &mut owner {
        Some(owner) => Some(owner.ask(cancel)?),
        None => None,
    };
    // The process has shown that it continues; its memory is compared with a copy.
    drop(owner);

    step("verifying the snapshot ...");
    let check = args::Verify {
        file: snapshot.path.clone(),
        chain: false,
        layers: args::Layers::default(),
        threads: None,
    };
    let verify = verify::check(&check, output, cancel)?;
    step("restoring it lazily under random touches ...");
    let options = args::Restore {
        file: snapshot.path.clone(),
        layers: args::Layers::default(),
        touch: Touch::Random,
        prefetch: Prefetch::Off,
        working_set: None,
        threads: 1,
        touch_threads: 2,
        seed: 1,
        retry_timeout: RETRY_TIMEOUT,
        check: Some(fd_path(&reference)),
        record: None,
        run_json: None,
        user_mode_only: args.user_mode_only,
    };
    let restore = restore::restore(&options, output, cancel)?;
    let equal = restore.mismatches == 0 && restore.checked_pages == restore.known_pages();
    let report = DemoReport {
        ok: verify.ok && restore.exit() == Exit::Done && equal,
        pid,
        before,
        after,
        create,
        verify,
        restore,
        kept: args.keep.clone(),
    };
    output.report(&report)?;
    Ok(if report.ok { Exit::Done } else { Exit::Failed })
}

/// A snapshot that exists as long as this value.
struct Packed {
    path: PathBuf,
    /// The open handle that keeps an unnamed file alive.
    _file: Option<File>,
}

/// Returns the target for the snapshot, and the path to read it from afterwards.
fn destination(args: &args::Demo, cancel: &Cancel) -> Result<(Target, Packed)> {
    if let Some(path) = &args.keep {
        if target::is_stdout(path) {
            let text = "--keep -: standard output cannot be read again; name a file";
            return Err(Refusal::Usage(text.into()).into());
        }
        let packed = Packed {
            path: path.clone(),
            _file: None,
        };
        return Ok((Target::create(path, args.force, cancel)?, packed));
    }
    let file = temporary_file()?;
    // The target closes its handle when it is written; this handle stays open for the path.
    let open = file.try_clone().context("keeping a temporary file open")?;
    let packed = Packed {
        path: fd_path(&open),
        _file: Some(open),
    };
    Ok((Target::Stream(Stream::new(file, Some(cancel))?), packed))
}

/// Packs a process, and writes a raw copy of the same memory to `reference`.
fn pack(
    pid: i32,
    target: Target,
    reference: &File,
    output: Output,
    cancel: &Cancel,
) -> Result<create::CreateReport> {
    let settings = WriteSettings {
        level: 3,
        frame_bytes: 128 << 10,
        dictionary: DictionaryChoice::Off,
        threads: None,
        attachments: Vec::new(),
        base: None,
        inherited: Vec::new(),
    };
    let began = Instant::now();
    let place = Place::beside(Some(&std::env::temp_dir().join("snapshot")));
    let mut process = HeldProcess::hold(pid, &place, output, cancel)?;
    let progress = Progress::bytes(output, "packing", process.pages().map(|pages| pages * PAGE));
    let mut writer = settings.start(target, &mut process, progress, cancel)?;
    let mut both = Both {
        snapshot: &mut writer,
        reference,
        offset: 0,
    };
    process.feed(&mut both)?;
    let bytes = both.offset;
    let remarks = process.remarks();
    let held = process.held().map(|held| held.as_millis());
    let held_ms = held.map(u64::try_from).transpose()?;
    drop(process);
    reference.set_len(bytes)?;
    let (target, written) = writer.finish(&remarks)?;
    target.complete()?;
    Ok(create::CreateReport {
        facts: Facts::of_written(&written),
        base: None,
        flattened: None,
        working_set: None,
        remarks,
        held_ms,
        elapsed_ms: u64::try_from(began.elapsed().as_millis())?,
    })
}

/// A sink that sends memory to the snapshot and to a plain file for comparison.
struct Both<'a, S> {
    snapshot: &'a mut S,
    reference: &'a File,
    offset: u64,
}

impl<S: Sink> Sink for Both<'_, S> {
    fn region(&mut self, region: &Region) -> Result<()> {
        self.snapshot.region(region)
    }

    fn pages(&mut self, bytes: &[u8]) -> Result<()> {
        self.reference
            .write_all_at(bytes, self.offset)
            .context("writing the memory to compare with to a temporary file")?;
        self.offset += bytes.len() as u64;
        self.snapshot.pages(bytes)
    }

    fn zeros(&mut self, pages: u64) -> Result<()> {
        self.offset += pages * PAGE;
        self.snapshot.zeros(pages)
    }

    fn unavailable(&mut self, pages: u64) -> Result<()> {
        self.offset += pages * PAGE;
        self.snapshot.unavailable(pages)
    }
}

/// Creates an unnamed file, which disappears with this process however it ends.
fn temporary_file() -> Result<File> {
    let folder = std::env::temp_dir();
    let mut options = File::options();
    options.read(true).write(true).mode(0o600);
    let nameless = options
        .clone()
        .custom_flags(OFlag::O_TMPFILE.bits())
        .open(&folder);
    nameless
        .or_else(|_| {
            let path = folder.join(format!("snaprestore-demo-{}", std::process::id()));
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok::<_, io::Error>(file)
        })
        .with_context(|| format!("cannot create a temporary file in {}", names::path(&folder)))
}

/// Returns a path to an open file.
fn fd_path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

impl fmt::Display for DemoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = &self.create.facts;
        match &self.before {
            Some(told) => writeln!(
                f,
                "process     {} has read {} of this machine ({}) and indexed {}",
                self.pid,
                count(told.files, "file"),
                BinaryBytes(told.bytes),
                count(told.words, "word")
            )?,
            None => writeln!(f, "process     {}", self.pid)?,
        }
        writeln!(
            f,
            "packed      {} of memory in {} into {}: {} times smaller",
            BinaryBytes(facts.logical_bytes),
            count(facts.regions.len() as u64, "region"),
            BinaryBytes(facts.file_bytes),
            ratio(facts.logical_bytes, facts.file_bytes)
        )?;
        writeln!(
            f,
            "            {} zero, {} duplicate, {} stored; it was held for {} ms",
            percent(facts.zero_pages, facts.pages),
            percent(facts.duplicate_pages, facts.pages),
            percent(facts.stored_pages, facts.pages),
            HumanCount(self.create.held_ms.unwrap_or(0))
        )?;
        if let (Some(before), Some(after)) = (&self.before, &self.after) {
            writeln!(
                f,
                "goes on     asked before and after, it counts {:?} {} and {} times; its thread \
                 went {} rounds further",
                owner::WORD,
                HumanCount(before.occurrences),
                HumanCount(after.occurrences),
                HumanCount(after.rounds.saturating_sub(before.rounds))
            )?;
        }
        writeln!(
            f,
            "verified    {}: {} in {}, in {} ms",
            if self.verify.ok { "good" } else { "DAMAGED" },
            count(self.verify.own.pages_checked, "page"),
            count(self.verify.own.frames_checked, "frame"),
            HumanCount(self.verify.elapsed_ms)
        )?;
        write!(f, "{}", self.restore)?;
        if let Some(kept) = &self.kept {
            writeln!(f, "kept        {}", names::path(kept))?;
        }
        writeln!(
            f,
            "\n{}",
            if self.ok {
                "Every page came back, when it was touched, as the process held it."
            } else {
                "NOT every page came back as the process held it."
            }
        )
    }
}
