//! `snaprestore trace`: shows, compares and merges traces.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use indicatif::{BinaryBytes, HumanCount};
use serde::Serialize;
use snaprestore_compare::machine::date;
use snaprestore_engine::stats::{whole_micros, whole_millis};
use snapshot_format::digest;
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::trace::{Comparison, MergeOptions, TouchReason, Trace, TraceError, compare};

use crate::args::{self, TraceOp};
use crate::exit::{Exit, Refusal};
use crate::layers;
use crate::names;
use crate::output::{Output, count, percent};
use crate::signals::Cancel;
use crate::target::{self, Target};

pub(crate) fn run(args: &args::Trace, output: Output, cancel: &Cancel) -> Result<Exit> {
    match &args.op {
        TraceOp::Show(show) => {
            cancel.end_at_once();
            let trace = Trace::read_path(&show.file)?;
            output.report(&ShowReport {
                trace: TraceFacts::of(&show.file, &trace),
            })?;
        }
        TraceOp::Compare(compare) => {
            cancel.end_at_once();
            output.report(&compared(compare)?)?;
        }
        TraceOp::Merge(merge) => write_merged(merge, output, cancel)?,
    }
    Ok(Exit::Done)
}

/// Reads traces of the same memory, each with its name in errors.
///
/// # Errors
///
/// A trace without touches is refused: with others it would only make their pages rarer.
pub(crate) fn read_all(paths: &[PathBuf], cancel: &Cancel) -> Result<Vec<Trace>> {
    let paths = paths.to_owned();
    let read = |path: &PathBuf| {
        let trace = Trace::read_path(path)?;
        if trace.touches.is_empty() {
            let path = names::path(path);
            let text = format!("{path}: the trace has no touches; leave it out");
            return Err(Refusal::Usage(text).into());
        }
        Ok(trace)
    };
    // Reading traces of millions of pages takes seconds.
    cancel.unless_stopped(move || paths.iter().map(read).collect())?
}

/// Adds the name of a trace to an error about its content.
pub(crate) fn named(path: &Path) -> impl FnOnce(TraceError) -> anyhow::Error {
    move |error| anyhow::Error::from(error).context(names::path(path))
}

/// Facts about a trace.
#[derive(Serialize)]
struct TraceFacts {
    file: String,
    content_digest: String,
    page_slots: u64,
    /// Time since 1970 at which the recording began.
    begun_unix_ms: u64,
    /// Reason for the end of the recording.
    end: &'static str,
    #[serde(skip)]
    end_text: String,
    present_at_start: u64,
    touched_pages: u64,
    touched_bytes: u64,
    /// Number of touches that were faults.
    demand_touches: u64,
    /// Number of touches of pages that were present.
    present_touches: u64,
    /// Number of touches whose page follows that of the touch before.
    sequential_touches: u64,
    /// Times by which half, 90 % and all of the pages were touched.
    half_us: u64,
    most_us: u64,
    last_us: u64,
}

#[derive(Serialize)]
struct ShowReport {
    #[serde(flatten)]
    trace: TraceFacts,
}

impl TraceFacts {
    fn of(path: &Path, trace: &Trace) -> Self {
        let touches = &trace.touches;
        let begun = trace.begun.duration_since(SystemTime::UNIX_EPOCH);
        let demand = touches
            .iter()
            .filter(|touch| touch.reason == TouchReason::Demand);
        let demand_touches = demand.count() as u64;
        let pairs = touches.windows(2);
        let sequential = pairs.filter(|pair| pair[0].page + 1 == pair[1].page);
        // The order of a merged trace is not that of its times.
        let mut times: Vec<Duration> = touches.iter().map(|touch| touch.at).collect();
        times.sort_unstable();
        let time = |part: usize, of: usize| {
            let number = (times.len() * part).div_ceil(of);
            number
                .checked_sub(1)
                .map_or(0, |number| whole_micros(times[number]))
        };
        Self {
            file: names::exact(path),
            content_digest: digest::hex(&trace.content_digest),
            page_slots: trace.page_slots,
            begun_unix_ms: begun.map_or(0, whole_millis),
            end: trace.end.name(),
            end_text: trace.end.to_string(),
            present_at_start: trace.present_at_start,
            touched_pages: touches.len() as u64,
            touched_bytes: touches.len() as u64 * PAGE_SIZE_U64,
            demand_touches,
            present_touches: touches.len() as u64 - demand_touches,
            sequential_touches: sequential.count() as u64,
            half_us: time(1, 2),
            most_us: time(9, 10),
            last_us: time(1, 1),
        }
    }

    /// Writes the line about the date and the end of the recording.
    fn write_recorded(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (begun, end) = (date(self.begun_unix_ms / 1000), &self.end_text);
        writeln!(f, "recorded    {begun}; end: {end}")
    }
}

/// Formats microseconds as milliseconds with one decimal.
fn millis(micros: u64) -> String {
    format!("{}.{} ms", micros / 1000, micros % 1000 / 100)
}

impl fmt::Display for ShowReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trace = &self.trace;
        writeln!(f, "content     {}", trace.content_digest)?;
        if trace.touched_pages == 0 {
            let slots = count(trace.page_slots, "page number");
            writeln!(f, "touched     no page; the memory has {slots}")?;
            let present = count(trace.present_at_start, "page");
            writeln!(f, "present     {present} at the start")?;
            return trace.write_recorded(f);
        }
        writeln!(
            f,
            "touched     {}, {}: {} of the {} page numbers of the memory",
            count(trace.touched_pages, "page"),
            BinaryBytes(trace.touched_bytes),
            percent(trace.touched_pages, trace.page_slots),
            HumanCount(trace.page_slots)
        )?;
        writeln!(
            f,
            "times       half by {}, 90 % by {}, all by {}",
            millis(trace.half_us),
            millis(trace.most_us),
            millis(trace.last_us)
        )?;
        writeln!(
            f,
            "order       the next page is the next touch in {} of the cases",
            percent(
                trace.sequential_touches,
                trace.touched_pages.saturating_sub(1)
            )
        )?;
        writeln!(
            f,
            "seen        {} by faults, {} by other means; {} pages were present at the start",
            HumanCount(trace.demand_touches),
            HumanCount(trace.present_touches),
            HumanCount(trace.present_at_start)
        )?;
        trace.write_recorded(f)
    }
}

/// The comparison of two traces.
#[derive(Serialize)]
struct CompareReport {
    a: TraceFacts,
    b: TraceFacts,
    /// Equality of the content of both.
    same_content: bool,
    common_pages: u64,
    only_a_pages: u64,
    only_b_pages: u64,
    precision: Option<f64>,
    recall: Option<f64>,
    order: Option<f64>,
}

fn compared(args: &args::TraceCompare) -> Result<CompareReport> {
    let (a, b) = (Trace::read_path(&args.a)?, Trace::read_path(&args.b)?);
    if a.page_slots != b.page_slots {
        bail!(
            "{} is of memory with {} page numbers, {} of one with {}; their pages cannot be \
             compared",
            names::path(&args.a),
            a.page_slots,
            names::path(&args.b),
            b.page_slots
        );
    }
    let Comparison {
        common,
        only_a,
        only_b,
        precision,
        recall,
        order,
        ..
    } = compare(&a.pages(), &b.pages());
    Ok(CompareReport {
        same_content: a.content_digest == b.content_digest,
        a: TraceFacts::of(&args.a, &a),
        b: TraceFacts::of(&args.b, &b),
        common_pages: common,
        only_a_pages: only_a,
        only_b_pages: only_b,
        precision,
        recall,
        order,
    })
}

impl fmt::Display for CompareReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, trace) in [("A", &self.a), ("B", &self.b)] {
            let (pages, file) = (HumanCount(trace.touched_pages), names::shown(&trace.file));
            let bytes = BinaryBytes(trace.touched_bytes);
            writeln!(f, "{name}           {pages} pages, {bytes}: {file}")?;
        }
        writeln!(
            f,
            "overlap     {} pages in both, {} in A only, {} in B only",
            HumanCount(self.common_pages),
            HumanCount(self.only_a_pages),
            HumanCount(self.only_b_pages)
        )?;
        writeln!(
            f,
            "precision   {} of A",
            percent(self.common_pages, self.a.touched_pages)
        )?;
        writeln!(
            f,
            "recall      {} of B",
            percent(self.common_pages, self.b.touched_pages)
        )?;
        match self.order {
            Some(order) => writeln!(f, "order       rank correlation {order:.3}")?,
            None => writeln!(f, "order       -")?,
        }
        if self.same_content {
            return Ok(());
        }
        writeln!(f, "note        the traces are of different content")
    }
}

/// Report about a merged trace.
#[derive(Serialize)]
struct MergeReport {
    #[serde(flatten)]
    trace: TraceFacts,
    /// The traces that were merged.
    sources: Vec<SourceFacts>,
}

#[derive(Serialize)]
struct SourceFacts {
    file: String,
    touched_pages: u64,
    /// Number of its pages that the merged trace has.
    kept_pages: u64,
}

fn write_merged(args: &args::TraceMerge, output: Output, cancel: &Cancel) -> Result<()> {
    let to_stdout = target::is_stdout_without_json(&args.output, output)?;
    for trace in &args.traces {
        target::refuse_source(&args.output, trace)?;
    }
    layers::refuse_needed(&args.output, &args::Layers::default())?;
    let mut target = Target::create(&args.output, args.force, cancel)?;
    let traces = read_all(&args.traces, cancel)?;
    for (path, trace) in args.traces.iter().zip(&traces).skip(1) {
        let first = (&traces[0], &args.traces[0]);
        trace
            .check_same_memory(first.0, &names::path(first.1))
            .map_err(named(path))?;
    }
    let (paths, to) = (args.traces.clone(), args.output.clone());
    let options = args.merging.options();
    let (bytes, report) =
        cancel.unless_stopped(move || merged(&traces, &paths, &to, options))??;
    let named = || target::name(&args.output);
    target.write_all(&bytes).with_context(named)?;
    target.complete()?;
    output.report_beside(to_stdout, &report)
}

/// Merges traces that were read from `paths` into one that is written to `to`. Returns its bytes,
/// and the report.
fn merged(
    traces: &[Trace],
    paths: &[PathBuf],
    to: &Path,
    options: MergeOptions,
) -> Result<(Vec<u8>, MergeReport)> {
    let merged = Trace::merged(traces, &options)?;
    let bytes = merged.to_bytes().with_context(|| target::name(to))?;
    let pages = merged.pages();
    let sources = paths.iter().zip(traces).map(|(path, trace)| SourceFacts {
        file: names::exact(path),
        touched_pages: trace.touches.len() as u64,
        kept_pages: compare(&trace.pages(), &pages).common,
    });
    let mut report = MergeReport {
        sources: sources.collect(),
        trace: TraceFacts::of(to, &merged),
    };
    if target::is_stdout(to) {
        report.trace.file = target::name(to);
    }
    Ok((bytes, report))
}

impl fmt::Display for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for source in &self.sources {
            writeln!(
                f,
                "merged      {} of {} pages: {}",
                HumanCount(source.kept_pages),
                HumanCount(source.touched_pages),
                names::shown(&source.file)
            )?;
        }
        let (pages, file) = (
            HumanCount(self.trace.touched_pages),
            names::shown(&self.trace.file),
        );
        let bytes = BinaryBytes(self.trace.touched_bytes);
        writeln!(f, "written     {pages} pages, {bytes}: {file}")
    }
}
