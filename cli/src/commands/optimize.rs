//! `snaprestore optimize`: puts the pages that are needed first to the front of a snapshot.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use indicatif::{BinaryBytes, HumanCount};
use serde::Serialize;
use snapshot_format::trace::{Trace, merge};
use snapshot_format::{OptimizeOptions, Optimized, Snapshot, WorkingSetStats, optimize};

use super::flatten::{self, RewriteFacts};
use super::{trace, verify};
use crate::args;
use crate::exit::{Exit, Refusal};
use crate::facts::Facts;
use crate::layers::{self, KnownLayers};
use crate::names;
use crate::output::{Output, count};
use crate::signals::Cancel;
use crate::source::Remark;
use crate::target::{self, Target};

/// Report about the optimized snapshot.
#[derive(Serialize)]
struct OptimizeReport {
    file: String,
    #[serde(flatten)]
    facts: Facts,
    #[serde(flatten)]
    rewrite: RewriteFacts,
    working_set: WorkingSetFacts,
    /// Length of the file before.
    old_file_bytes: u64,
    /// Id of the snapshot before.
    old_snapshot_id: String,
    /// Replacement of the file that was read.
    #[serde(skip)]
    in_place: bool,
    remarks: Vec<Remark>,
    elapsed_ms: u64,
}

/// The working set at the front of a file.
#[derive(Serialize)]
pub(crate) struct WorkingSetFacts {
    name: String,
    /// Number of traces that were merged.
    traces: usize,
    pages: u64,
    /// Number of pages that no frame stores, such as zero pages.
    not_stored_pages: u64,
    /// Number of pages left in frames of ancestors.
    left_in_ancestors: u64,
    /// Number of pages taken from frames of ancestors, by which the file grows.
    from_ancestors: u64,
    /// Number of pages of the traces that the memory does not have.
    ignored_pages: u64,
    /// Number of its frames, and their length.
    frames: u64,
    stored_bytes: u64,
}

impl WorkingSetFacts {
    pub(crate) fn of(set: &WorkingSetStats, name: &str, traces: usize) -> Self {
        Self {
            name: name.to_owned(),
            traces,
            pages: set.pages,
            not_stored_pages: set.not_stored_pages,
            left_in_ancestors: set.left_in_ancestors,
            from_ancestors: set.from_ancestors,
            ignored_pages: set.ignored_pages,
            frames: set.frames,
            stored_bytes: set.stored_bytes,
        }
    }
}

impl fmt::Display for WorkingSetFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "working set \"{}\": {} of {}; {} in {} at the front",
            names::shown(&self.name),
            count(self.pages, "page"),
            count(self.traces as u64, "trace"),
            BinaryBytes(self.stored_bytes),
            count(self.frames, "frame")
        )?;
        let lines = [
            (self.not_stored_pages, "not stored: zeros and other fills"),
            (self.left_in_ancestors, "left in ancestors, in dense frames"),
            (self.from_ancestors, "taken from ancestors, and stored here"),
            (
                self.ignored_pages,
                "of the traces left out: the memory does not have them",
            ),
        ];
        for (pages, what) in lines {
            if pages > 0 {
                writeln!(
                    f,
                    "            {:>13} pages {what}",
                    HumanCount(pages).to_string()
                )?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for OptimizeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}{}", self.facts, self.rewrite, self.working_set)?;
        let file = names::shown(&self.file);
        let (size, old) = (BinaryBytes(self.old_file_bytes), &self.old_snapshot_id);
        if self.in_place {
            writeln!(f, "replaced    {file} (its ID was {old}, its size {size})")?;
        } else {
            writeln!(f, "written     {file} (the size before was {size})")?;
        }
        writeln!(
            f,
            "verified    every page, after decoding it from the new file"
        )?;
        for remark in &self.remarks {
            write!(f, "{remark}")?;
        }
        writeln!(f, "time        {} ms", self.elapsed_ms)
    }
}

pub(crate) fn run(args: &args::Optimize, output: Output, cancel: &Cancel) -> Result<Exit> {
    let began = Instant::now();
    let to = &args.output;
    for trace in &args.traces {
        target::refuse_source(to, trace)?;
    }
    let in_place = target::refuse_source(to, &args.file).is_err();
    let traces = trace::read_all(&args.traces, cancel)?;
    let snapshot = Arc::new(layers::open(&args.file, &args.layers)?);
    for (path, trace) in args.traces.iter().zip(&traces) {
        trace.check_matches(&snapshot).map_err(trace::named(path))?;
    }
    layers::refuse_ancestor(to, &snapshot)?;
    layers::refuse_needed(to, &args.layers)?;
    let target = create_target(to, args.force || in_place, cancel)?;
    let (trace_count, pages) = (traces.len(), merged(traces, args.merging, cancel)?);
    let plan = Plan {
        name: &args.name,
        pages: &pages,
        packing: &args.packing,
    };
    let (mut target, optimized) = plan
        .execute(target, to, &snapshot, (output, cancel))
        .map_err(|error| target::named(error, to))?;
    layers::refuse_needed(to, &args.layers)?;
    if in_place {
        layers::check_unchanged(to, &snapshot)?;
    }
    let remarks = layers::remark_away(&mut target, to)?;
    target.complete()?;
    output.report(&OptimizeReport {
        file: names::exact(to),
        facts: Facts::of_written(&optimized.rewritten.written),
        rewrite: RewriteFacts::of(&optimized.rewritten),
        working_set: WorkingSetFacts::of(&optimized.working_set, &args.name, trace_count),
        old_file_bytes: snapshot.file_bytes(),
        old_snapshot_id: snapshot.id().to_string(),
        in_place,
        remarks: remarks.into_iter().collect(),
        elapsed_ms: u64::try_from(began.elapsed().as_millis())?,
    })?;
    Ok(Exit::Done)
}

/// Merges traces. A signal stops it: millions of pages take seconds.
pub(crate) fn merged(
    traces: Vec<Trace>,
    merging: args::Merging,
    cancel: &Cancel,
) -> Result<Vec<u64>> {
    cancel.unless_stopped(move || merge(&traces, &merging.options()))
}

/// Opens a target that can be read again.
fn create_target(path: &Path, force: bool, cancel: &Cancel) -> Result<Target> {
    let refused = || {
        let text = "the new snapshot is read again to be verified, which a stream cannot be; name \
                    a file to write";
        Refusal::Usage(text.into())
    };
    if target::is_stdout(path) {
        return Err(refused().into());
    }
    let target = Target::create(path, force, cancel)?;
    if !target.is_file() {
        return Err(refused().into());
    }
    Ok(target)
}

/// The settings for optimizing a snapshot.
pub(crate) struct Plan<'a> {
    pub(crate) name: &'a str,
    /// The pages of the working set, in order of need.
    pub(crate) pages: &'a [u64],
    pub(crate) packing: &'a args::Packing,
}

impl Plan<'_> {
    /// Optimizes `snapshot` into `target`, which will be named `path`, and verifies the result.
    pub(crate) fn execute(
        &self,
        target: Target,
        path: &Path,
        snapshot: &Arc<Snapshot>,
        (output, cancel): (Output, &Cancel),
    ) -> Result<(Target, Optimized)> {
        let options = OptimizeOptions {
            name: self.name.to_owned(),
            rewrite: flatten::options(self.packing, snapshot, (output, "optimizing"), cancel),
        };
        let (mut target, optimized) = optimize(target, snapshot, self.pages, options)?;
        let ancestors = KnownLayers::new(snapshot.ancestors().to_vec(), None);
        if let Some(file) = target.open_again()? {
            let threads = self.packing.threads;
            verify::check_new(file, path, Arc::new(ancestors), threads, (output, cancel))?;
        }
        Ok((target, optimized))
    }
}
