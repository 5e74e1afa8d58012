//! Opening of snapshots with the files of their ancestors.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use snapshot_format::{
    AllowMissing, Ancestor, Ancestors, FileStore, Layer, LayerFolders, OpenError, Snapshot,
    SnapshotId, SnapshotOptions,
};

use crate::args;
use crate::exit::Refusal;
use crate::names;
use crate::output::count;
use crate::source::Remark;
use crate::target::{self, Target};

/// The environment variable with folders of ancestors, separated by colons.
const FOLDERS_VARIABLE: &str = "SNAPRESTORE_LAYERS";

/// Returns the folders to search for ancestors, besides those of the snapshots: of the options,
/// then `configured` ones, then of the environment.
pub(crate) fn folders(layers: &args::Layers, configured: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut folders = layers.folders.clone();
    folders.extend_from_slice(configured);
    for folder in &folders {
        let named = || format!("{}: cannot search it for layers", names::path(folder));
        if !folder.metadata().with_context(named)?.is_dir() {
            let folder = names::path(folder);
            return Err(Refusal::Usage(format!("--layers {folder}: is not a folder")).into());
        }
    }
    let more = std::env::var_os(FOLDERS_VARIABLE).unwrap_or_default();
    folders.extend(std::env::split_paths(&more).filter(|path| !path.as_os_str().is_empty()));
    Ok(folders)
}

/// Returns the resolver of ancestors; `first` is a folder that is searched before all others.
pub(crate) fn resolver(layers: &args::Layers, first: Option<PathBuf>) -> Result<Arc<LayerFolders>> {
    let all = first.into_iter().chain(folders(layers, &[])?);
    Ok(Arc::new(LayerFolders::new(all)))
}

/// Opens a snapshot and all its ancestors.
pub(crate) fn open(path: &Path, layers: &args::Layers) -> Result<Snapshot> {
    let options = SnapshotOptions::default().ancestors(resolver(layers, None)?);
    Ok(Snapshot::open_with(
        FileStore::open_snapshot(path)?,
        &options,
    )?)
}

/// Opens a snapshot with those of its ancestors that can be found and used.
pub(crate) fn open_alone(path: &Path, layers: &args::Layers) -> Result<Snapshot> {
    let resolver = AllowMissing(resolver(layers, None)?);
    let options = SnapshotOptions::default().ancestors(Arc::new(resolver));
    Ok(Snapshot::open_with(
        FileStore::open_snapshot(path)?,
        &options,
    )?)
}

/// Opens a file that has no name yet, but whose ancestors are `base` and those of it.
pub(crate) fn open_child(file: File, path: &Path, base: &Snapshot) -> Result<Snapshot> {
    let layers = (0..).map_while(|number| base.layer(number).cloned());
    let layers = KnownLayers::new(layers.collect(), None);
    let options = SnapshotOptions::default().ancestors(Arc::new(layers));
    let store = Arc::new(FileStore::from_file(file, path));
    Ok(Snapshot::open_with(store, &options)?)
}

/// Files that are open already, and folders in which others are looked for.
#[derive(Debug)]
pub(crate) struct KnownLayers {
    layers: HashMap<SnapshotId, Arc<Layer>>,
    folders: Option<Arc<LayerFolders>>,
}

impl KnownLayers {
    pub(crate) fn new(layers: Vec<Arc<Layer>>, folders: Option<Arc<LayerFolders>>) -> Self {
        let layers = layers.into_iter().map(|layer| (layer.id(), layer));
        Self {
            layers: layers.collect(),
            folders,
        }
    }
}

impl Ancestors for KnownLayers {
    fn find(
        &self,
        wanted: &Ancestor,
        beside: Option<&Path>,
    ) -> Result<Option<Arc<Layer>>, OpenError> {
        let layer = self.layers.get(&wanted.id);
        match (layer.filter(|layer| wanted.matches(layer)), &self.folders) {
            (Some(layer), _) => Ok(Some(Arc::clone(layer))),
            (None, Some(folders)) => folders.find(wanted, beside),
            (None, None) => Ok(None),
        }
    }

    fn searched(&self, beside: Option<&Path>) -> Vec<String> {
        let folders = self.folders.as_ref();
        folders.map_or_else(Vec::new, |folders| folders.searched(beside))
    }
}

/// Refuses a target that would replace a snapshot which others need: those in its folder, and in
/// the folders of `layers`.
pub(crate) fn refuse_needed(target: &Path, layers: &args::Layers) -> Result<()> {
    if target::is_stdout(target) || !target.is_file() {
        return Ok(());
    }
    let Ok(there) = Layer::open_path(target) else {
        return Ok(());
    };
    // Writing through a symbolic link replaces the file that it names.
    let real = target.canonicalize().map(|real| folder_of(&real)).ok();
    let all = std::iter::once(folder_of(target)).chain(real);
    for folder in all.chain(folders(layers, &[])?) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(other) = Layer::open_path(&path) else {
                continue;
            };
            let mut listed = other.listed_ancestors().iter();
            if listed.any(|ancestor| ancestor.id == there.id()) {
                return Err(Refusal::Usage(format!(
                    "{}: is an ancestor of {}, which would be lost with it; name another file to \
                     write (`rebase` moves that snapshot to another base of the same memory)",
                    names::path(target),
                    names::path(&path)
                ))
                .into());
            }
        }
    }
    Ok(())
}

/// Returns an error if the file of an open snapshot has been replaced since, by `rebase` for
/// example: a child of it would need a file that is gone, and a command that replaces it would undo
/// the other.
pub(crate) fn check_unchanged(path: &Path, snapshot: &Snapshot) -> Result<()> {
    let there = Layer::open_path(path)?;
    if snapshot
        .layer(0)
        .is_some_and(|own| own.claims_content_of(&there))
    {
        return Ok(());
    }
    bail!(
        "{}: was replaced while the new file was made of what was there before; repeat the command",
        names::path(path)
    )
}

/// Returns the ancestors listed in a snapshot, to be named `target`, that commands would not find
/// without `--layers`. The snapshot's file has no name yet.
fn not_beside(file: File, target: &Path) -> Result<Vec<Ancestor>> {
    let resolver = resolver(&args::Layers::default(), None)?;
    let layer = Layer::open(Arc::new(FileStore::from_file(file, target)))?;
    let beside = folder_of(target);
    let mut ancestors = layer.named_ancestors();
    ancestors.retain(|wanted| !matches!(resolver.find(wanted, Some(&beside)), Ok(Some(_))));
    Ok(ancestors)
}

/// Returns a remark if ancestors of a new snapshot, to be named `output`, are not in its folder.
pub(crate) fn remark_away(target: &mut Target, output: &Path) -> Result<Option<Remark>> {
    let Some(file) = target.open_again()? else {
        return Ok(None);
    };
    let away = not_beside(file, output)?;
    Ok(away.first().map(|first| Remark {
        key: "base.elsewhere",
        value: away.len().to_string(),
        text: format!(
            "the new snapshot has {} in other folders (the first was {}): pass --layers DIR to the \
             commands that read it, or move the files into one folder",
            count(away.len() as u64, "ancestor"),
            names::shown(&first.name)
        ),
        warning: false,
    }))
}

/// Returns the folder that a file of this name is in.
fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Refuses a target that would replace an ancestor of `snapshot`, which would then be lost.
pub(crate) fn refuse_ancestor(target: &Path, snapshot: &Snapshot) -> Result<()> {
    if snapshot.ancestors().is_empty() || target::is_stdout(target) || !target.is_file() {
        return Ok(());
    }
    let Ok(there) = Layer::open_path(target) else {
        return Ok(());
    };
    if snapshot
        .ancestors()
        .iter()
        .any(|layer| layer.id() == there.id())
    {
        return Err(Refusal::Usage(format!(
            "{}: is an ancestor of {}, which would be lost with it; name another file to write",
            names::path(target),
            snapshot.name()
        ))
        .into());
    }
    Ok(())
}
