//! `snaprestore bench`: compares this restore with the alternatives, on the user's file and
//! machine.

use std::fmt;
use std::io::{Write as _, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use indicatif::BinaryBytes;
use serde::Serialize;
use snaprestore_compare::machine::Machine;
use snaprestore_compare::prepare::{Images, run as run_program};
use snaprestore_compare::report::{Row, rows, table};
use snaprestore_compare::rounds::{self, Absent, Samples};
use snaprestore_compare::trial::{Runner, run_child};
use snaprestore_compare::workload::{Access, Cache, Order, Workload};
use snaprestore_uffd::uffd;
use snapshot_format::{OpenError, Snapshot};

use crate::args;
use crate::exit::{Exit, Refusal};
use crate::layers;
use crate::names;
use crate::output::{Output, count};
use crate::signals::Cancel;

/// Name of the hidden command that runs one trial in a process of its own.
pub(crate) const TRIAL: &str = "bench-trial";

#[derive(Serialize)]
struct BenchReport {
    file: String,
    machine: Machine,
    memory_bytes: u64,
    snapshot_bytes: Option<u64>,
    rounds: u32,
    workload: Workload,
    contenders: Vec<Row>,
    not_available: Vec<Absent>,
    #[serde(skip)]
    table: String,
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine {
            cpu, cores, kernel, ..
        } = &self.machine;
        writeln!(f, "machine     {cpu}, {cores} cores, Linux {kernel}")?;
        write!(f, "memory      {}", BinaryBytes(self.memory_bytes))?;
        if let Some(bytes) = self.snapshot_bytes {
            write!(f, ", as a snapshot {}", BinaryBytes(bytes))?;
        }
        writeln!(f, "\n\n{}", self.table)?;
        writeln!(
            f,
            "Medians of {}. All contenders read the same bytes, which was checked. `extra` is memory beyond what was \
             restored.",
            count(self.rounds.into(), "round")
        )
    }
}

pub(crate) fn run(args: &args::Bench, output: Output, cancel: &Cancel) -> Result<Exit> {
    let workload = workload(args)?;
    if matches!(
        uffd::OpenOptions::new().open(),
        Err(uffd::OpenError::NotPermitted {
            user_mode_only_would_do: true,
            ..
        })
    ) {
        output.warn(super::restore::USER_MODE_ONLY);
    }
    let own = std::env::current_exe()
        .context("finding this program, which runs itself for each trial")?;
    let snapshot = match layers::open(&args.file, &args.layers) {
        Ok(snapshot) => Some(snapshot),
        Err(error) => match error.downcast_ref() {
            Some(OpenError::NotASnapshot { .. }) => None,
            _ => return Err(error),
        },
    };
    // Removed when the command ends, unless it is killed.
    let folder = tempfile::Builder::new()
        .prefix("snaprestore-bench-")
        .tempdir_in(&args.dir)
        .with_context(|| {
            format!(
                "cannot create a folder for the images in {}",
                names::path(&args.dir)
            )
        })?;
    let mut images = images(args, snapshot.as_ref(), folder.path(), &own, output)?;
    let mut samples = Samples::default();
    let folders = std::env::join_paths(layers::folders(&args.layers, &[])?)
        .context("a folder of --layers has a colon in its name")?;
    let runner = Runner::new(own, [TRIAL]).layers(folders);
    let mut on_step = |step: &str| {
        if output.shows_progress() {
            // On a terminal, each step overwrites the line, which is cleared at the end.
            let _ = write!(stderr(), "\r\x1b[K{step}");
        }
        !cancel.requested()
    };
    let done = rounds::run(
        &workload,
        &mut images,
        &runner,
        args.rounds,
        &mut on_step,
        &mut samples,
    );
    if output.shows_progress() {
        let _ = write!(stderr(), "\r\x1b[K");
    }
    done?;
    let report = BenchReport {
        file: names::exact(&args.file),
        machine: Machine::describe(),
        memory_bytes: images.bytes(),
        snapshot_bytes: images
            .snapshot(&workload.snapshot())
            .ok()
            .and_then(|path| Some(path.metadata().ok()?.len())),
        rounds: args.rounds,
        contenders: rows(&samples, &workload),
        table: table(&samples, &workload),
        not_available: samples.absent,
        workload,
    };
    output.report(&report)?;
    let ours = |name: &str| name.starts_with("ours") || name.starts_with("serve");
    let lacks = report
        .not_available
        .iter()
        .any(|absent| ours(&absent.contender));
    Ok(if lacks {
        Exit::NotPermitted
    } else {
        Exit::Done
    })
}

/// Runs one trial: reads it from standard input and prints the result on standard output.
pub(crate) fn run_trial(cancel: &Cancel) -> Result<Exit> {
    cancel.end_at_once();
    run_child(&mut stdin().lock(), &mut stdout().lock())?;
    Ok(Exit::Done)
}

/// Builds the workload from the arguments.
fn workload(args: &args::Bench) -> Result<Workload> {
    let order = match args.order {
        args::BenchOrder::Sequential => Order::Sequential,
        args::BenchOrder::Random => Order::Random,
    };
    let access = if args.writes {
        Access::Write
    } else {
        Access::Read
    };
    let cache = if args.cold { Cache::Cold } else { Cache::Warm };
    let verb = if args.writes { "Write to" } else { "Read" };
    let what = match args.share {
        100 => "every page".to_owned(),
        share => format!("{share} % of the pages"),
    };
    let how = match order {
        Order::Sequential => "in order",
        _ => "at random",
    };
    let threads = if args.threads == 1 {
        String::new()
    } else {
        format!(", {} threads", args.threads)
    };
    let state = if args.cold { "cold" } else { "warm" };
    let workload = Workload {
        name: "bench".into(),
        title: format!("{verb} {what} {how}, {state}{threads}"),
        image: names::exact(&args.file),
        order,
        seed: args.seed,
        trace: None,
        share: f64::from(args.share) / 100.0,
        most_pages: None,
        access,
        threads: args.threads,
        cache,
        latencies: false,
        contenders: args.contenders.clone(),
        limits: Vec::new(),
    };
    workload
        .check()
        .map_err(|error| Refusal::Usage(error.to_string()))?;
    Ok(workload)
}

/// Prepares the raw file and the images made from it.
fn images(
    args: &args::Bench,
    snapshot: Option<&Snapshot>,
    folder: &Path,
    own: &Path,
    output: Output,
) -> Result<Images> {
    let Some(snapshot) = snapshot else {
        return Ok(Images::new(&args.file, folder, own)?);
    };
    let raw: PathBuf = folder.join("memory.raw");
    run_program(
        Command::new(own)
            .args(["extract", "--quiet", "--unavailable", "zero"])
            .args(
                args.layers
                    .folders
                    .iter()
                    .flat_map(|folder| ["--layers".as_ref(), folder.as_os_str()]),
            )
            .arg(&args.file)
            .arg("-o")
            .arg(&raw),
    )?;
    let mut images = Images::new(&raw, folder, own)?;
    if snapshot.summary().unavailable_pages == 0 {
        images.use_snapshot(&args.file.canonicalize()?);
    } else {
        // A page of unknown content can't be restored, and every contender touches every page.
        output.warn("pages of unknown content are treated as zeros, in a new snapshot");
    }
    Ok(images)
}
