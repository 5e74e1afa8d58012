//! `snaprestore info`: shows what a snapshot holds, from its directory alone. The map needs the
//! index as well.

mod map;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{BinaryBytes, HumanCount};
use serde::Serialize;
use snapshot_format::{Reason, Snapshot};

use crate::args;
use crate::exit::Exit;
use crate::facts::Facts;
use crate::layers;
use crate::names;
use crate::output::{Output, count};
use crate::signals::Cancel;
use map::Drawing;

/// Maximum number of regions listed for people; a process tree has tens of thousands.
const MAX_LISTED_REGIONS: usize = 200;

/// The facts about a snapshot that `info` and `report` show.
#[derive(Serialize)]
pub(crate) struct InfoReport {
    pub(crate) file: String,
    #[serde(flatten)]
    pub(crate) facts: Facts,
    pub(crate) properties: BTreeMap<String, String>,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) working_sets: Vec<WorkingSet>,
    dictionaries: Vec<Dictionary>,
    /// The other files that a layered snapshot needs.
    pub(crate) ancestors: Vec<Ancestor>,
    /// Number of pages whose content lies in the file itself, if it is layered.
    #[serde(skip)]
    own_pages: u64,
    #[serde(skip)]
    map: Option<Drawing>,
}

/// Another file that a layered snapshot needs.
#[derive(Serialize)]
pub(crate) struct Ancestor {
    pub(crate) file: String,
    pub(crate) snapshot_id: String,
    file_bytes: u64,
    /// Number of pages whose content lies in this file.
    pub(crate) pages: u64,
}

/// A file stored beside the memory.
#[derive(Serialize)]
pub(crate) struct Attachment {
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

/// A stored working set.
#[derive(Serialize)]
pub(crate) struct WorkingSet {
    pub(crate) name: String,
    runs: u64,
    pub(crate) pages: u64,
}

#[derive(Serialize)]
struct Dictionary {
    number: u16,
    bytes: u64,
}

pub(crate) fn run(args: &args::Info, output: Output, cancel: &Cancel) -> Result<Exit> {
    cancel.end_at_once();
    let snapshot = layers::open(&args.file, &args.layers)?;
    let mut report = InfoReport::of(&snapshot, &args.file)?;
    if args.map {
        report.map = Some(Drawing::of(&snapshot, cancel)?);
    }
    output.report(&report)?;
    Ok(Exit::Done)
}

impl InfoReport {
    /// Gathers the facts about an open snapshot.
    pub(crate) fn of(snapshot: &Snapshot, file: &Path) -> Result<Self> {
        let (own_pages, ancestors) = ancestors(snapshot)?;
        let mut facts = Facts::of(snapshot);
        facts.ancestor_pages = ancestors.iter().map(|ancestor| ancestor.pages).sum();
        Ok(Self {
            file: names::exact(file),
            facts,
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
            ancestors,
            own_pages,
            map: None,
        })
    }
}

/// Returns the number of pages that lie in the file of a layered snapshot, and its ancestors with
/// the number of pages that lie in each.
fn ancestors(snapshot: &Snapshot) -> Result<(u64, Vec<Ancestor>)> {
    let mut pages = vec![0; 1 + snapshot.ancestors().len()];
    let blocks = if snapshot.ancestors().is_empty() {
        0
    } else {
        snapshot.block_count()
    };
    for block in 0..blocks {
        let index = snapshot.uncached_block(block, Reason::Verify)?;
        for page in 0..index.page_count() {
            if let Some((frame, _)) = index.stored(page) {
                pages[usize::from(index.frames()[frame].layer())] += 1;
            }
        }
    }
    let ancestors = snapshot.ancestors().iter().zip(&pages[1..]);
    let ancestors = ancestors.map(|(layer, &pages)| Ancestor {
        file: layer.name().to_owned(),
        snapshot_id: layer.id().to_string(),
        file_bytes: layer.file_bytes(),
        pages,
    });
    Ok((pages[0], ancestors.collect()))
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
        if !self.ancestors.is_empty() {
            writeln!(f, "\n{}", self.chain_table().trim_fmt())?;
        }
        writeln!(f, "\n{}", region_table(&self.facts).trim_fmt())?;
        let left = self.facts.regions.len().saturating_sub(MAX_LISTED_REGIONS);
        if left > 0 {
            writeln!(f, "... and {left} more regions (all with --json)")?;
        }
        if let Some(map) = &self.map {
            write!(f, "\n{map}")?;
        }
        Ok(())
    }
}

impl InfoReport {
    /// Returns the files of a layered snapshot, its own first.
    fn chain_table(&self) -> Table {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_header(["layer", "id", "size", "pages", "file"]);
        let facts = &self.facts;
        let own = Ancestor {
            file: names::shown(&self.file).into_owned(),
            snapshot_id: facts.snapshot_id.clone(),
            file_bytes: facts.file_bytes,
            pages: self.own_pages,
        };
        for (number, layer) in [&own].into_iter().chain(&self.ancestors).enumerate() {
            table.add_row([
                number.to_string(),
                layer.snapshot_id.clone(),
                BinaryBytes(layer.file_bytes).to_string(),
                HumanCount(layer.pages).to_string(),
                layer.file.clone(),
            ]);
        }
        align_right(&mut table, &[0, 2, 3]);
        table
    }
}

fn align_right(table: &mut Table, columns: &[usize]) {
    for &column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn region_table(facts: &Facts) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(["#", "start", "size", "offset", "access", "name"]);
    for (number, region) in facts.regions.iter().take(MAX_LISTED_REGIONS).enumerate() {
        table.add_row([
            number.to_string(),
            format!("{:#x}", region.start),
            BinaryBytes(region.bytes).to_string(),
            format!("{:#x}", region.offset),
            region.protection.clone(),
            names::shown(&region.name).into_owned(),
        ]);
    }
    align_right(&mut table, &[0, 1, 2, 3]);
    table
}
