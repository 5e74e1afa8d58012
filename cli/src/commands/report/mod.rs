//! `snaprestore report`: writes a page about a snapshot, and about a trace and a run of it.
//!
//! ```text
//!   facts    reads the snapshot, the trace and the run, and counts     ──▶ ReportFacts
//!   page     the sections of the page, from the facts                  ──▶ HTML
//!     html     elements: escaped text, figures, tables
//!     map      the picture of the memory, and its table
//!     charts   bars, curves and scatter plots, each with its table
//! ```
//!
//! Everything that comes from a file is escaped by [`html::text`], [`html::foreign`] or
//! [`html::json`], the only ways for it into the page.

mod charts;
mod facts;
mod html;
mod map;
mod page;

use std::fmt;
use std::io::Write as _;

use anyhow::{Context as _, Result};
use indicatif::BinaryBytes;
use serde::Serialize;

use crate::args;
use crate::exit::Exit;
use crate::layers;
use crate::names;
use crate::output::{Output, count};
use crate::signals::Cancel;
use crate::target::{self, Target};
use facts::ReportFacts;

/// Summary of a page that was written. The field names are part of the command's interface.
#[derive(Serialize)]
struct ReportSummary {
    file: String,
    report: String,
    report_bytes: u64,
    /// Number of cells of the map, and the number of pages that each shows.
    cells: u64,
    cell_pages: u64,
    /// Number of pages in the working sets or the trace.
    hot_pages: u64,
}

pub(crate) fn run(args: &args::Report, output: Output, cancel: &Cancel) -> Result<Exit> {
    let to_stdout = target::is_stdout_without_json(&args.output, output)?;
    let sources = [Some(&args.file), args.trace.as_ref(), args.run.as_ref()];
    for source in sources.into_iter().flatten() {
        target::refuse_source(&args.output, source)?;
    }
    let snapshot = layers::open(&args.file, &args.layers)?;
    layers::refuse_ancestor(&args.output, &snapshot)?;
    layers::refuse_needed(&args.output, &args.layers)?;
    let facts = ReportFacts::gather(&snapshot, args, cancel)?;
    let page = page::write(&facts);
    let mut target = Target::create(&args.output, args.force, cancel)?;
    target
        .write_all(page.as_bytes())
        .with_context(|| target::name(&args.output))?;
    target.complete()?;
    let cells: usize = facts.map.groups.iter().map(|group| group.cells.len()).sum();
    let summary = ReportSummary {
        file: names::exact(&args.file),
        report: target::name(&args.output),
        report_bytes: page.len() as u64,
        cells: cells as u64,
        cell_pages: facts.map.cell_pages,
        hot_pages: facts.map.total.hot,
    };
    output.report_beside(to_stdout, &summary)?;
    Ok(Exit::Done)
}

impl fmt::Display for ReportSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "report      {}, {}",
            names::shown(&self.report),
            BinaryBytes(self.report_bytes)
        )?;
        let (cells, pages) = (count(self.cells, "cell"), count(self.cell_pages, "page"));
        writeln!(f, "map         {cells} of {pages} each")?;
        writeln!(f, "hot         {}", count(self.hot_pages, "page"))
    }
}
