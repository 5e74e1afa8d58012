//! `snaprestore flatten`: writes a chain of layered snapshots as one file.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use indicatif::HumanCount;
use serde::Serialize;
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{Progress as WriteProgress, RewriteOptions, Rewritten, Snapshot, flatten};

use crate::args;
use crate::exit::Exit;
use crate::facts::Facts;
use crate::layers;
use crate::names;
use crate::output::{Output, count};
use crate::progress::Progress;
use crate::signals::Cancel;
use crate::target::{self, Target};

/// Report about the flat snapshot.
#[derive(Serialize)]
struct FlattenReport {
    #[serde(flatten)]
    facts: Facts,
    #[serde(flatten)]
    rewrite: RewriteFacts,
    /// The snapshot that was flattened.
    source: SourceFacts,
    elapsed_ms: u64,
}

/// The frames of a rewritten snapshot.
#[derive(Serialize)]
pub(crate) struct RewriteFacts {
    /// Number of frames that were copied as they are.
    copied_frames: u64,
    /// Number of frames that were repacked.
    packed_frames: u64,
    /// Number of pages stored in copied frames that are not a part of the memory any more.
    dead_pages: u64,
}

#[derive(Serialize)]
struct SourceFacts {
    file: String,
    snapshot_id: String,
    /// Number of files of its ancestors.
    ancestors: usize,
}

impl RewriteFacts {
    pub(crate) fn of(rewritten: &Rewritten) -> Self {
        Self {
            copied_frames: rewritten.copied_frames,
            packed_frames: rewritten.written.summary.frames - rewritten.copied_frames,
            dead_pages: rewritten.dead_slots,
        }
    }
}

impl fmt::Display for RewriteFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (copied, packed) = (
            count(self.copied_frames, "frame"),
            HumanCount(self.packed_frames),
        );
        write!(
            f,
            "rewritten   {copied} copied as stored, {packed} packed again"
        )?;
        match self.dead_pages {
            0 => writeln!(f),
            dead => writeln!(f, "; {}", count(dead, "dead page")),
        }
    }
}

impl fmt::Display for FlattenReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.facts, self.rewrite)?;
        let SourceFacts {
            file,
            snapshot_id,
            ancestors,
        } = &self.source;
        let file = names::shown(file);
        let ancestors = count(*ancestors as u64, "ancestor");
        writeln!(f, "flattened   {file} ({snapshot_id}) and {ancestors}")?;
        writeln!(f, "time        {} ms", self.elapsed_ms)
    }
}

pub(crate) fn run(args: &args::Flatten, output: Output, cancel: &Cancel) -> Result<Exit> {
    let began = Instant::now();
    let to_stdout = target::is_stdout_without_json(&args.output, output)?;
    target::refuse_source(&args.output, &args.file)?;
    let snapshot = Arc::new(layers::open(&args.file, &args.layers)?);
    layers::refuse_ancestor(&args.output, &snapshot)?;
    layers::refuse_needed(&args.output, &args.layers)?;
    let target = Target::create(&args.output, args.force, cancel)?;
    let options = options(&args.packing, &snapshot, (output, "flattening"), cancel);
    let (target, rewritten) = flatten(target, &snapshot, options)
        .map_err(|error| target::named(error.into(), &args.output))?;
    layers::refuse_needed(&args.output, &args.layers)?;
    target.complete()?;
    let report = FlattenReport {
        facts: Facts::of_written(&rewritten.written),
        rewrite: RewriteFacts::of(&rewritten),
        source: SourceFacts {
            file: names::exact(&args.file),
            snapshot_id: snapshot.id().to_string(),
            ancestors: snapshot.ancestors().len(),
        },
        elapsed_ms: u64::try_from(began.elapsed().as_millis())?,
    };
    output.report_beside(to_stdout, &report)?;
    Ok(Exit::Done)
}

/// Returns the options for rewriting `snapshot`, with a progress that is called `what`.
pub(crate) fn options(
    packing: &args::Packing,
    snapshot: &Snapshot,
    (output, what): (Output, &'static str),
    cancel: &Cancel,
) -> RewriteOptions {
    let bytes = snapshot.summary().pages * PAGE_SIZE_U64;
    let progress = Progress::bytes(output, what, Some(bytes));
    let cancel = cancel.clone();
    RewriteOptions {
        level: packing.level,
        threads: packing.threads,
        progress: Some(Box::new(move |at: &WriteProgress| {
            progress.set(at.pages_done * PAGE_SIZE_U64);
            if cancel.requested() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })),
        ..RewriteOptions::default()
    }
}
