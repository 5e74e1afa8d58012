//! `snaprestore rebase`: gives a layered snapshot another base of the same memory.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;
use snapshot_format::rebase;

use super::flatten::{RewriteFacts, options};
use crate::args;
use crate::exit::{Exit, Refusal};
use crate::facts::Facts;
use crate::layers;
use crate::names;
use crate::output::{Output, count};
use crate::signals::Cancel;
use crate::source::Remark;
use crate::target::{self, Target};

/// Report about the rewritten child.
#[derive(Serialize)]
struct RebaseReport {
    file: String,
    #[serde(flatten)]
    facts: Facts,
    #[serde(flatten)]
    rewrite: RewriteFacts,
    base: NewBase,
    /// Id of the child before.
    old_snapshot_id: String,
    /// Whether the file of the child was replaced.
    #[serde(skip)]
    in_place: bool,
    remarks: Vec<Remark>,
    elapsed_ms: u64,
}

#[derive(Serialize)]
struct NewBase {
    file: String,
    snapshot_id: String,
}

impl fmt::Display for RebaseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.facts, self.rewrite)?;
        let pages = count(self.facts.ancestor_pages, "page");
        let (base, id) = (names::shown(&self.base.file), &self.base.snapshot_id);
        writeln!(
            f,
            "base        {base} ({id}): {pages} taken from it and its ancestors"
        )?;
        let (file, old) = (names::shown(&self.file), &self.old_snapshot_id);
        if self.in_place {
            writeln!(f, "replaced    {file} (its ID was {old})")?;
        } else {
            writeln!(f, "written     {file}")?;
        }
        for remark in &self.remarks {
            write!(f, "{remark}")?;
        }
        writeln!(f, "time        {} ms", self.elapsed_ms)
    }
}

pub(crate) fn run(args: &args::Rebase, output: Output, cancel: &Cancel) -> Result<Exit> {
    let began = Instant::now();
    let to = args.output.as_ref().unwrap_or(&args.file);
    if target::is_stdout(to) {
        let text = "a child is looked for beside its ancestors; name a file to write";
        return Err(Refusal::Usage(text.into()).into());
    }
    let in_place = args.output.is_none() || target::refuse_source(to, &args.file).is_err();
    target::refuse_source(to, &args.base)?;
    let base = layers::open(&args.base, &args.layers).context("cannot open the new base")?;
    let base = Arc::new(base);
    layers::refuse_ancestor(to, &base)?;
    let child = Arc::new(layers::open_alone(&args.file, &args.layers)?);
    layers::refuse_needed(to, &args.layers)?;
    let target = Target::create(to, args.force || in_place, cancel)?;
    let mut options = options(&args.packing, &child, (output, "rebasing"), cancel);
    options.properties = vec![
        ("base.id".into(), base.id().to_string()),
        ("base.path".into(), base.name().to_owned()),
    ];
    let (mut target, rewritten) =
        rebase(target, &child, &base, options).map_err(|error| target::named(error.into(), to))?;
    layers::check_unchanged(&args.base, &base)?;
    if in_place {
        layers::check_unchanged(to, &child)?;
    }
    layers::refuse_needed(to, &args.layers)?;
    let remarks = layers::remark_away(&mut target, to)?;
    target.complete()?;
    output.report(&RebaseReport {
        file: names::exact(to),
        facts: Facts::of_written(&rewritten.written),
        rewrite: RewriteFacts::of(&rewritten),
        base: NewBase {
            file: names::exact(&args.base),
            snapshot_id: base.id().to_string(),
        },
        old_snapshot_id: child.id().to_string(),
        in_place,
        remarks: remarks.into_iter().collect(),
        elapsed_ms: u64::try_from(began.elapsed().as_millis())?,
    })?;
    Ok(Exit::Done)
}
