//! `snaprestore restore`: restores a snapshot lazily into this process.

mod order;
mod record;
mod report;
mod run_file;
mod touch;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use snaprestore_engine::RecordingOptions;
use snaprestore_engine::restore::{self, FailurePolicy, Restored, StartError};
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{FileStore, ReadError, Snapshot, Store as _};

use crate::args::{self, Touch};
use crate::exit::{self, Exit, Refusal};
use crate::layers;
use crate::names;
use crate::output::Output;
use crate::progress::Progress;
use crate::signals::Cancel;
use crate::target;
use crate::trace_file::TraceFile;
use order::Order;
use record::TraceWriter;
pub(crate) use report::RestoreReport;
use run_file::RunFile;
use touch::Pages;

/// Note that the command works with less permission than the engine wants.
pub(crate) const USER_MODE_ONLY: &str = "note: this user may not make a full userfaultfd; going on with \
     one for faults of user mode only, which is enough for this command (`snaprestore doctor` says \
     what would permit the other)";

/// Maximum time for the engine to notice that every page was touched.
const COMPLETE_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) fn run(args: &args::Restore, output: Output, cancel: &Cancel) -> Result<Exit> {
    if args.record.is_none() {
        // The memory disappears with this process: nothing has to be undone or waited for.
        cancel.end_at_once();
    }
    let report = restore(args, output, cancel)?;
    output.report(&report)?;
    let failed = report.unwritten.iter().map(|error| output.fail(error));
    let failed = failed.fold(Exit::Done, |_, failed| failed);
    // A file that could not be written does not hide how the restore went.
    Ok(match report.exit() {
        Exit::Done => failed,
        exit => exit,
    })
}

/// Restores a snapshot and returns a report.
pub(crate) fn restore(
    args: &args::Restore,
    output: Output,
    cancel: &Cancel,
) -> Result<RestoreReport> {
    if args.check.is_some() && args.touch == Touch::None {
        return Err(Refusal::Usage(
            "--check compares pages when they are touched, and --touch none touches none; leave \
             one of them out"
                .into(),
        )
        .into());
    }
    if args.working_set.is_some() && args.prefetch == args::Prefetch::Off {
        return Err(Refusal::Usage(
            "--working-set has no effect with --prefetch off; leave one of them out".into(),
        )
        .into());
    }
    refuse_stdout(args)?;
    let snapshot = Arc::new(layers::open(&args.file, &args.layers)?);
    let pages = Pages::all(&snapshot);
    let raw = match &args.check {
        Some(path) => Some(open_raw(path, pages.count * PAGE_SIZE_U64)?),
        None => None,
    };
    let order = match &args.touch {
        Touch::None => None,
        Touch::Sequential => Some(Order::Sequential(pages.count)),
        Touch::Random => Some(Order::random(pages.count, args.seed)),
        Touch::File(path) => Some(listed(path, &pages, cancel)?),
    };
    let run_file = match &args.run_json {
        Some(path) => {
            refuse_run_json(path, args, &snapshot)?;
            Some(RunFile::open(path)?)
        }
        None => None,
    };
    check_working_sets(args, &snapshot, output)?;
    let trace = args.record.as_deref().map(TraceFile::create).transpose()?;
    let began = Instant::now();
    let restored =
        start(&snapshot, args, output).map_err(|error| exit::name_the_remedies(error.into()))?;
    if restored.is_user_mode_only() && !args.user_mode_only {
        output.warn(USER_MODE_ONLY);
    }
    let trace = match (trace, restored.recording()) {
        (Some(file), Some(recording)) => Some(TraceWriter::start(recording, file, output, cancel)?),
        _ => None,
    };
    let touched = match order {
        None => None,
        Some(order) => {
            let progress = Progress::bytes(output, "touching", Some(order.len() * PAGE_SIZE_U64));
            let touching = Instant::now();
            let work = touch::Work {
                restored: &restored,
                pages: &pages,
                order: &order,
                raw: raw.as_ref(),
                began,
            };
            let touched = work.run(args.touch_threads, &progress, cancel)?;
            Some((touched, touching.elapsed()))
        }
    };
    if let Some(trace) = &trace {
        trace.stop();
    }
    if args.prefetch != args::Prefetch::Off {
        restored.wait_complete();
    }
    // The engine counts the last touched page as present a moment later. Unavailable pages weren't
    // touched, so a restore that has some never completes.
    let touches_all = matches!(args.touch, Touch::Sequential | Touch::Random);
    if touches_all && snapshot.summary().unavailable_pages == 0 {
        let waiting = Instant::now();
        while !restored.is_complete() && waiting.elapsed() < COMPLETE_TIMEOUT {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    let stats = restored.stats();
    let mut unwritten = Vec::new();
    if let Some(file) = run_file {
        let record = restored.run_record(format!("restore of {}", names::exact(&args.file)));
        unwritten.extend(file.write(&record).err());
    }
    let mut report = RestoreReport::new(
        names::exact(&args.file),
        &snapshot,
        &stats,
        &restored.failures(),
        touched.as_ref().map(|(touched, took)| (touched, *took)),
    );
    match trace.map(TraceWriter::finish).transpose() {
        Ok(trace) => report.trace = trace,
        Err(error) => unwritten.push(error),
    }
    report.unwritten = unwritten;
    Ok(report)
}

/// Refuses files on standard output, which the report goes to.
fn refuse_stdout(args: &args::Restore) -> Result<()> {
    let files = [("--record", &args.record), ("--run-json", &args.run_json)];
    for (option, file) in files {
        if file.as_deref().is_some_and(target::is_stdout) {
            let text = format!("{option} -: the report goes to standard output; name a file");
            return Err(Refusal::Usage(text).into());
        }
    }
    Ok(())
}

/// Reports damage of the working sets. The one that was selected must be good; without the others,
/// their pages come on demand.
fn check_working_sets(args: &args::Restore, snapshot: &Snapshot, output: Output) -> Result<()> {
    if let Some(name) = &args.working_set {
        snapshot.working_set(name)?;
    } else if args.prefetch != args::Prefetch::Off {
        let check = || -> Result<(), ReadError> {
            for set in snapshot.working_sets()? {
                snapshot.working_set(&set.name)?;
            }
            Ok(())
        };
        if let Err(error) = check() {
            output.warn(format_args!(
                "warning: {error}; the pages of this working set are fetched without it"
            ));
        }
    }
    Ok(())
}

/// Refuses to replace a file that is read or needed by the statistics of the restore.
fn refuse_run_json(path: &Path, args: &args::Restore, snapshot: &Snapshot) -> Result<()> {
    target::refuse_source(path, &args.file)?;
    if let Some(raw) = &args.check {
        target::refuse_source(path, raw)?;
    }
    if let Touch::File(list) = &args.touch {
        target::refuse_source(path, list)?;
    }
    let record = args.record.as_deref();
    if record.is_some_and(|record| target::is_same_name(record, path)) {
        let text = "--record and --run-json name the same file; name two files to write";
        return Err(Refusal::Usage(text.into()).into());
    }
    layers::refuse_ancestor(path, snapshot)?;
    layers::refuse_needed(path, &args.layers)
}

/// Reads a list of pages to touch, which may come from a pipe.
fn listed(path: &Path, pages: &Pages, cancel: &Cancel) -> Result<Order> {
    let (path, pages) = (path.to_owned(), pages.clone());
    cancel.unless_stopped(move || Order::listed(&path, &pages))?
}

/// Opens the file to compare with, which must be as long as the memory.
fn open_raw(path: &Path, bytes: u64) -> Result<File> {
    let named = || names::path(path);
    let store = FileStore::open(path).with_context(named)?;
    let len = store.len().with_context(named)?;
    if len != bytes {
        bail!(
            "{}: has {len} bytes, but the snapshot holds {bytes} bytes of memory; `extract` makes \
             a file to check against",
            names::path(path)
        );
    }
    Ok(store.into_file())
}

/// Maps the memory and starts serving it.
fn start(
    snapshot: &Arc<Snapshot>,
    args: &args::Restore,
    output: Output,
) -> Result<Restored, StartError> {
    let with = |on_failure| {
        let mut restore = restore::Restore::new(Arc::clone(snapshot));
        if args.record.is_some() {
            restore = restore.record(RecordingOptions::default());
        }
        if let Some(name) = &args.working_set {
            restore = restore.working_set(name);
        }
        restore
            .fault_threads(args.threads)
            .retry_timeout(Duration::from_secs(args.retry_timeout))
            .prefetch(match args.prefetch {
                args::Prefetch::Off => snaprestore_engine::Prefetch::Off,
                args::Prefetch::WorkingSet => snaprestore_engine::Prefetch::WorkingSet,
                args::Prefetch::All => snaprestore_engine::Prefetch::All,
            })
            .on_failure(on_failure)
            .user_mode_only(true)
            .start()
    };
    match with(FailurePolicy::Poison) {
        // Without poison, a bad page can't be marked: the touching thread would wait forever.
        Err(StartError::NoPoison) => with(FailurePolicy::Ask(Arc::new(move |failure| {
            output.fail(&anyhow!(
                "{failure}; this kernel cannot poison pages (that needs Linux 6.6), so the restore \
                 stops here"
            ));
            // A thread is blocked on this page, and only the end of the process unblocks it.
            std::process::exit(Exit::Damaged as i32)
        }))),
        result => result,
    }
}
