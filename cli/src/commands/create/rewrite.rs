//! Snapshots that `create` writes a second time before they get their name.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use snapshot_format::trace::{Trace, TraceError};
use snapshot_format::{DEFAULT_WORKING_SET, FileStore, Snapshot, Written};

use super::Flattened;
use crate::args;
use crate::commands::flatten::{self, RewriteFacts};
use crate::commands::optimize::{self, WorkingSetFacts};
use crate::commands::trace;
use crate::layers;
use crate::names;
use crate::output::{Output, count};
use crate::signals::Cancel;
use crate::source::Remark;
use crate::target::Target;

/// Flattens a child that is written but has no name yet, if it needs more than `limit` files.
pub(super) fn flatten_beyond(
    limit: u16,
    args: &args::Create,
    base: &Snapshot,
    (mut target, written): (Target, Written),
    (output, cancel): (Output, &Cancel),
) -> Result<(Target, Written, Option<Flattened>)> {
    let Some(file) = target.open_again()? else {
        return Ok((target, written, None));
    };
    let child = Arc::new(layers::open_child(file, &args.output, base)?);
    let ancestors = child.ancestors().len();
    if ancestors <= limit.into() {
        return Ok((target, written, None));
    }
    let packing = packing(args);
    let options = flatten::options(&packing, &child, (output, "flattening"), cancel);
    let flat = Target::create(&args.output, args.force, cancel)?;
    let (flat, rewritten) = snapshot_format::flatten(flat, &child, options)?;
    let rewrite = args.traces.is_empty().then(|| RewriteFacts::of(&rewritten));
    let flattened = Flattened {
        ancestors,
        limit,
        rewrite,
    };
    Ok((flat, rewritten.written, Some(flattened)))
}

/// Refuses traces of memory of another size: it has more or fewer than `page_slots` page numbers.
pub(super) fn check_size(args: &args::Create, traces: &[Trace], page_slots: u64) -> Result<()> {
    for (path, trace) in args.traces.iter().zip(traces) {
        if trace.page_slots != page_slots {
            bail!(
                "{}: the trace is of memory with {} page numbers, and this memory has \
                 {page_slots}; create the snapshot without --trace",
                names::path(path),
                trace.page_slots
            );
        }
    }
    Ok(())
}

/// Optimizes a snapshot that is written but has no name yet. Returns a remark if the traces are of
/// other content.
pub(super) fn optimize_written(
    args: &args::Create,
    traces: Vec<Trace>,
    base: Option<&Snapshot>,
    mut target: Target,
    (output, cancel): (Output, &Cancel),
) -> Result<(Target, Written, WorkingSetFacts, Option<Remark>)> {
    let file = target.open_again()?.context("the output cannot be read")?;
    let snapshot = match base {
        Some(base) => layers::open_child(file, &args.output, base)?,
        None => Snapshot::open(Arc::new(FileStore::from_file(file, &args.output)))?,
    };
    let mut others = 0;
    check_size(args, &traces, snapshot.page_slots())?;
    for (path, trace) in args.traces.iter().zip(&traces) {
        match trace.check_matches(&snapshot) {
            Err(TraceError::OtherContent { .. }) => others += 1,
            result => result.map_err(trace::named(path))?,
        }
    }
    let packing = packing(args);
    let trace_count = traces.len();
    let pages = optimize::merged(traces, args::Merging::default(), cancel)?;
    let plan = optimize::Plan {
        name: DEFAULT_WORKING_SET,
        pages: &pages,
        packing: &packing,
    };
    let snapshot = Arc::new(snapshot);
    let new = Target::create(&args.output, args.force, cancel)?;
    let (new, optimized) = plan.execute(new, &args.output, &snapshot, (output, cancel))?;
    let set = WorkingSetFacts::of(&optimized.working_set, DEFAULT_WORKING_SET, trace_count);
    let remark = (others > 0).then(|| Remark {
        key: "traces.other_content",
        value: others.to_string(),
        text: format!(
            "{} of other content: their order is used for this one, as the page numbers agree",
            count(others, "trace")
        ),
        warning: false,
    });
    Ok((new, optimized.rewritten.written, set, remark))
}

/// Returns the settings of the first writing.
fn packing(args: &args::Create) -> args::Packing {
    args::Packing {
        level: args.level,
        threads: args.threads,
    }
}
