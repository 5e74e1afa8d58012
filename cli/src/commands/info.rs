//! `snaprestore info`: shows what a snapshot holds, from its directory alone.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::BinaryBytes;
use serde::Serialize;
use snapshot_format::Snapshot;

use crate::args;
use crate::exit::Exit;
use crate::facts::Facts;
use crate::names;
use crate::output::{Output, count};

/// Maximum number of regions listed for people; a process tree has tens of thousands.
const LISTED_REGIONS: usize = 200;

#[derive(Serialize)]
struct InfoReport {
    file: String,
    #[serde(flatten)]
    facts: Facts,
    properties: BTreeMap<String, String>,
    attachments: Vec<Attachment>,
    working_sets: Vec<WorkingSet>,
    dictionaries: Vec<Dictionary>,
}

#[derive(Serialize)]
struct Attachment {
    name: String,
    bytes: u64,
}

#[derive(Serialize)]
struct WorkingSet {
    name: String,
    runs: u64,
    pages: u64,
}

#[derive(Serialize)]
struct Dictionary {
    number: u16,
    bytes: u64,
}

pub(crate) fn run(args: &args::Info, output: Output) -> Result<Exit> {
    let snapshot = Snapshot::open_path(&args.file)?;
    let report = InfoReport {
        file: names::exact(&args.file),
        facts: Facts::of(&snapshot),
        properties: snapshot.properties()?.into_iter().collect(),
        attachments: snapshot
            .attachments()?
            .into_iter()
            .map(|attachment| Attachment {
                name: attachment.name,
                bytes: attachment.bytes,
            })
            .collect(),
        working_sets: snapshot
            .working_sets()?
            .into_iter()
            .map(|set| {
                let runs = snapshot.working_set(&set.name)?;
                Ok(WorkingSet {
                    name: set.name,
                    runs: set.runs,
                    pages: runs.iter().map(|run| run.pages).sum(),
                })
            })
            .collect::<Result<_>>()?,
        dictionaries: snapshot
            .dictionaries()?
            .into_iter()
            .map(|dictionary| Dictionary {
                number: dictionary.number,
                bytes: dictionary.bytes,
            })
            .collect(),
    };
    output.report(&report)?;
    Ok(Exit::Done)
}

impl fmt::Display for InfoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.facts)?;
        for dictionary in &self.dictionaries {
            writeln!(
                f,
                "dictionary  number {}, {}",
                dictionary.number,
                BinaryBytes(dictionary.bytes)
            )?;
        }
        for set in &self.working_sets {
            writeln!(
                f,
                "working set \"{}\": {} in {}",
                names::shown(&set.name),
                count(set.pages, "page"),
                count(set.runs, "run")
            )?;
        }
        for attachment in &self.attachments {
            writeln!(
                f,
                "attachment  \"{}\": {}",
                names::shown(&attachment.name),
                BinaryBytes(attachment.bytes)
            )?;
        }
        for (key, value) in &self.properties {
            writeln!(f, "property    {key} = {value}")?;
        }
        writeln!(f, "\n{}", region_table(&self.facts).trim_fmt())?;
        let left = self.facts.regions.len().saturating_sub(LISTED_REGIONS);
        if left > 0 {
            writeln!(f, "... and {left} more regions (all with --json)")?;
        }
        Ok(())
    }
}

fn region_table(facts: &Facts) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(["#", "start", "size", "offset", "access", "name"]);
    for (number, region) in facts.regions.iter().take(LISTED_REGIONS).enumerate() {
        table.add_row([
            number.to_string(),
            format!("{:#x}", region.start),
            BinaryBytes(region.bytes).to_string(),
            format!("{:#x}", region.offset),
            region.protection.clone(),
            names::shown(&region.name).into_owned(),
        ]);
    }
    for column in [0, 1, 2, 3] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
