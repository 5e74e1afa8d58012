//! `snaprestore tree`: shows which snapshots of a folder need which, and what nothing needs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::BinaryBytes;
use serde::Serialize;
use snapshot_format::{Ancestor, Layer, OpenError, SnapshotId};

use crate::args;
use crate::exit::Exit;
use crate::names;
use crate::output::{Output, count};

/// Maximum number of levels by which a file is indented.
const MAX_INDENT: usize = 32;

/// The snapshots of one or several folders, and what they need.
#[derive(Serialize)]
struct TreeReport {
    files: Vec<Node>,
    /// Ancestors that are in none of the folders.
    missing: Vec<Missing>,
    /// Files that could not be read, or are damaged or incomplete.
    unreadable: Vec<Unreadable>,
    /// Number of entries that are not snapshots: other files, and folders.
    other_entries: u64,
}

#[derive(Serialize)]
struct Node {
    file: String,
    /// Other names of this file: hard and symbolic links.
    other_names: Vec<String>,
    snapshot_id: String,
    /// Length of the file, which deleting it frees.
    file_bytes: u64,
    /// The file below which this one is shown: of those that it needs, the one that needs most.
    parent: Option<String>,
    /// IDs of the files that it needs.
    ancestors: Vec<String>,
    /// Files that could not be read any more if this one were deleted. Of several copies, the first
    /// is the one that is needed.
    needed_by: Vec<String>,
    /// Bytes that deleting it and the files that need it would free.
    bytes_with_dependents: u64,
    /// Files with the same content, as far as their trailers tell.
    copies: Vec<String>,
    #[serde(skip)]
    depth: usize,
}

#[derive(Serialize)]
struct Missing {
    snapshot_id: String,
    /// Name under which it was last known; may be empty.
    name: String,
    /// File that has the ID but is not the recorded one, if there is one.
    replaced_by: Option<String>,
    needed_by: Vec<String>,
}

#[derive(Serialize)]
struct Unreadable {
    file: String,
    error: String,
}

/// A snapshot that was found.
struct Found {
    file: String,
    other_names: Vec<String>,
    layer: Layer,
    ancestors: Vec<Ancestor>,
}

/// All entries of the folders.
#[derive(Default)]
struct Findings {
    found: Vec<Found>,
    /// Place in `found` of each file, by device and inode.
    places: HashMap<(u64, u64), usize>,
    unreadable: Vec<Unreadable>,
    other_entries: u64,
}

pub(crate) fn run(args: &args::Tree, output: Output) -> Result<Exit> {
    let mut findings = Findings::default();
    let here = [PathBuf::from(".")];
    let folders = if args.folders.is_empty() {
        &here[..]
    } else {
        &args.folders[..]
    };
    let mut seen = BTreeSet::new();
    for folder in folders {
        // A folder that is named twice is not full of copies.
        let canonical = folder.canonicalize();
        let canonical = canonical.with_context(|| names::path(folder))?;
        if seen.insert(canonical) {
            findings.add_folder(folder)?;
        }
    }
    output.report(&findings.report())?;
    Ok(Exit::Done)
}

impl Findings {
    fn add_folder(&mut self, folder: &Path) -> Result<()> {
        let named = || format!("{}: cannot list the folder", names::path(folder));
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).with_context(named)? {
            let entry = entry.with_context(named)?;
            // A symbolic link to a file is one more name of it.
            if entry.path().is_file() {
                // Names in messages are as short as the folder's.
                paths.push(if folder == Path::new(".") {
                    PathBuf::from(entry.file_name())
                } else {
                    entry.path()
                });
            } else {
                self.other_entries += 1;
            }
        }
        paths.sort();
        for path in paths {
            let file = names::exact(&path);
            let inode = fs::metadata(&path)
                .map(|file| (file.dev(), file.ino()))
                .ok();
            if let Some(place) = inode.and_then(|inode| self.places.get(&inode)) {
                self.found[*place].other_names.push(file);
                continue;
            }
            match Layer::open_path(&path) {
                Ok(layer) => {
                    let place = self.found.len();
                    self.places.extend(inode.map(|inode| (inode, place)));
                    self.found.push(Found {
                        file,
                        other_names: Vec::new(),
                        ancestors: layer.named_ancestors(),
                        layer,
                    });
                }
                Err(OpenError::NotASnapshot { .. }) => self.other_entries += 1,
                Err(error) => self.unreadable.push(Unreadable {
                    file,
                    error: format!("{:#}", anyhow::Error::from(error)),
                }),
            }
        }
        Ok(())
    }

    fn report(self) -> TreeReport {
        let names = |files: &BTreeSet<usize>| -> Vec<String> {
            files
                .iter()
                .map(|at| self.found[*at].file.clone())
                .collect()
        };
        let mut by_id: HashMap<SnapshotId, Vec<usize>> = HashMap::new();
        for (at, found) in self.found.iter().enumerate() {
            by_id.entry(found.layer.id()).or_default().push(at);
        }
        let with_id = |id: &SnapshotId| by_id.get(id).map_or(&[][..], Vec::as_slice);
        // Files that need each file, itself left out, and the one that each is shown below.
        let mut needed_by = vec![BTreeSet::new(); self.found.len()];
        let mut parents = vec![None; self.found.len()];
        let mut missing: BTreeMap<String, Missing> = BTreeMap::new();
        for (at, found) in self.found.iter().enumerate() {
            let mut deepest = None;
            for wanted in &found.ancestors {
                let same_id = with_id(&wanted.id);
                let is_recorded = |at: &&usize| wanted.matches(&self.found[**at].layer);
                let mut holders = same_id.iter().filter(is_recorded).copied().peekable();
                if holders.peek().is_none() {
                    let id = wanted.id.to_string();
                    let replaced = same_id.first().map(|at| &self.found[*at]);
                    let entry = missing.entry(id.clone()).or_insert_with(|| Missing {
                        snapshot_id: id,
                        name: wanted.name.clone(),
                        replaced_by: replaced.map(|other| other.file.clone()),
                        needed_by: Vec::new(),
                    });
                    entry.needed_by.push(found.file.clone());
                }
                for holder in holders {
                    needed_by[holder].insert(at);
                    let depth = self.found[holder].ancestors.len();
                    if deepest.is_none_or(|(known, _)| depth > known) {
                        deepest = Some((depth, holder));
                    }
                }
            }
            parents[at] = deepest.map(|(_, holder)| holder);
        }
        let mut order = in_order(&parents);
        // Of files that need each other, which only hostile ones do, none is below a root.
        let listed: BTreeSet<usize> = order.iter().map(|(at, _)| *at).collect();
        order.extend(
            (0..self.found.len())
                .filter(|at| !listed.contains(at))
                .map(|at| (at, 0)),
        );
        let files = order.into_iter().map(|(at, depth)| {
            let found = &self.found[at];
            let is_copy =
                |other: &&usize| found.layer.claims_content_of(&self.found[**other].layer);
            let copies = with_id(&found.layer.id()).iter().filter(is_copy);
            let mut copies: BTreeSet<usize> = copies.copied().collect();
            copies.remove(&at);
            let bytes = |at: &usize| self.found[*at].layer.file_bytes();
            let none = BTreeSet::new();
            // With a copy left, nothing is lost: one of them must stay.
            let needed_by = if copies.first().is_none_or(|first| at < *first) {
                &needed_by[at]
            } else {
                &none
            };
            let dependents: u64 = needed_by.iter().map(bytes).sum();
            Node {
                file: found.file.clone(),
                other_names: found.other_names.clone(),
                snapshot_id: found.layer.id().to_string(),
                file_bytes: found.layer.file_bytes(),
                parent: parents[at].map(|parent| self.found[parent].file.clone()),
                ancestors: found
                    .ancestors
                    .iter()
                    .map(|ancestor| ancestor.id.to_string())
                    .collect(),
                needed_by: names(needed_by),
                bytes_with_dependents: found.layer.file_bytes() + dependents,
                copies: names(&copies),
                depth,
            }
        });
        TreeReport {
            files: files.collect(),
            missing: missing.into_values().collect(),
            unreadable: self.unreadable,
            other_entries: self.other_entries,
        }
    }
}

/// Returns the files, each followed by those below it, with their depths.
fn in_order(parents: &[Option<usize>]) -> Vec<(usize, usize)> {
    let mut children: HashMap<Option<usize>, Vec<usize>> = HashMap::new();
    for (at, parent) in parents.iter().enumerate() {
        children.entry(*parent).or_default().push(at);
    }
    // Each file has one parent, so none is listed twice.
    let mut order = Vec::with_capacity(parents.len());
    let mut below = |parent, depth, next: &mut Vec<(usize, usize)>| {
        let files = children.remove(&parent).unwrap_or_default();
        next.extend(files.into_iter().rev().map(|at| (at, depth)));
    };
    let mut next = Vec::new();
    below(None, 0, &mut next);
    while let Some((at, depth)) = next.pop() {
        order.push((at, depth));
        below(Some(at), depth + 1, &mut next);
    }
    order
}

impl TreeReport {
    /// Writes which files can be deleted.
    fn write_unneeded(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.files.is_empty() {
            return writeln!(f, "no snapshots here");
        }
        let unneeded = self.files.iter().filter(|node| node.needed_by.is_empty());
        let unneeded: Vec<&Node> = unneeded.collect();
        let bytes: u64 = unneeded.iter().map(|node| node.file_bytes).sum();
        let files = count(unneeded.len() as u64, "file");
        let bytes = BinaryBytes(bytes);
        write!(f, "no other needs {files} of {bytes}")?;
        for (number, node) in unneeded.iter().enumerate() {
            let separator = if number == 0 { ": " } else { ", " };
            write!(f, "{separator}{}", names::shown(&node.file))?;
        }
        if !self.unreadable.is_empty() {
            write!(f, "; what the unreadable files need is not known")?;
        }
        writeln!(f)
    }
}

impl fmt::Display for TreeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header([
            "file",
            "size",
            "with dependents",
            "needed by",
            "id",
        ]);
        for node in &self.files {
            let mut file = format!(
                "{}{}",
                "  ".repeat(node.depth.min(MAX_INDENT)),
                names::shown(&node.file)
            );
            if let Some(other) = node.other_names.first() {
                file.extend([" (also ", &names::shown(other), ")"]);
            }
            if let Some(copy) = node.copies.first() {
                file.extend([" (copy of ", &names::shown(copy), ")"]);
            }
            table.add_row([
                file,
                BinaryBytes(node.file_bytes).to_string(),
                BinaryBytes(node.bytes_with_dependents).to_string(),
                node.needed_by.len().to_string(),
                node.snapshot_id.clone(),
            ]);
        }
        for column in 1..=3 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        if !self.files.is_empty() {
            writeln!(f, "{}\n", table.trim_fmt())?;
        }
        self.write_unneeded(f)?;
        for missing in &self.missing {
            write!(f, "MISSING     {}", missing.snapshot_id)?;
            if !missing.name.is_empty() {
                write!(f, " (last known as {})", names::shown(&missing.name))?;
            }
            if let Some(other) = &missing.replaced_by {
                let other = names::shown(other);
                write!(f, ", whose id {other} has, which is another file")?;
            }
            let needed_by: Vec<_> = missing
                .needed_by
                .iter()
                .map(|file| names::shown(file))
                .collect();
            writeln!(f, ", needed by {}", needed_by.join(", "))?;
        }
        for unreadable in &self.unreadable {
            writeln!(f, "UNREADABLE  {}", unreadable.error)?;
        }
        match self.other_entries {
            0 => Ok(()),
            1 => writeln!(f, "1 other entry is not a snapshot"),
            others => writeln!(f, "{others} other entries are not snapshots"),
        }
    }
}
