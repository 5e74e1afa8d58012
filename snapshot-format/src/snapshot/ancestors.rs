//! Ancestors of a layered snapshot: how their files are found, recognized and opened.
//!
//! ```text
//! the list of the snapshot's own file      id, length and trailer hash of every file referred to
//! for each of them:
//!     find it                              by its id, under any name: see `LayerFolders`
//!     compare length and trailer           otherwise it was replaced
//!     page size of its header              must be ours
//!     translate its own list               layer n there is layer m here, or not among ours
//! ```
//!
//! All of them are open before the snapshot is, so a missing file is found before anything is
//! mapped, and a file that is renamed or deleted later stays readable.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::layer::Layer;
use crate::digest::Digest;
use crate::error::OpenError;
use crate::index::Body;
use crate::layout::PAGE_SIZE;
use crate::names::escape_path;
use crate::open;
use crate::store::FileStore;
use crate::types::SnapshotId;

/// The description of an ancestor in the file that refers to it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ancestor {
    /// Id of its file.
    pub id: SnapshotId,
    /// Length of its file, in bytes.
    pub file_bytes: u64,
    /// Hash of its trailer, if it was known.
    pub trailer_hash: Option<Digest>,
    /// Name under which the file was last known, escaped and without a folder; may be empty. Only
    /// a hint.
    pub name: String,
}

impl Ancestor {
    /// Returns how `layer` differs from the recorded file.
    fn difference(&self, layer: &Layer) -> Option<String> {
        if layer.id() != self.id {
            return Some(format!("its id is {}", layer.id()));
        }
        if layer.file_bytes() != self.file_bytes {
            let (there, recorded) = (layer.file_bytes(), self.file_bytes);
            return Some(format!("it has {there} bytes instead of {recorded}"));
        }
        let hash = self.trailer_hash?;
        (layer.ends().trailer_hash != hash).then(|| "its trailer is another one".to_owned())
    }

    /// Returns whether `layer` is the recorded file.
    pub fn matches(&self, layer: &Layer) -> bool {
        // A text for each file that is another one would be slow in a long chain.
        layer.id() == self.id && self.difference(layer).is_none()
    }

    /// Checks that `layer` is the recorded file.
    fn check(&self, layer: &Layer) -> Result<(), OpenError> {
        match self.difference(layer) {
            None => Ok(()),
            Some(difference) => Err(OpenError::AncestorReplaced {
                file: layer.name().to_owned(),
                id: self.id,
                difference,
            }),
        }
    }
}

/// A way to find the files of ancestors.
///
/// An implementation need not check what it finds. Opening compares each layer with the recorded
/// ID, length and trailer hash, and refuses another file.
///
/// # Example
///
/// Finds ancestors among snapshots that are open already:
///
/// ```
/// use std::path::Path;
/// use std::sync::Arc;
///
/// use snapshot_format::{Ancestor, Ancestors, Layer, OpenError};
/// # use snapshot_format::{
/// #     MemoryStore, RegionSpec, Snapshot, SnapshotOptions, Writer, WriterOptions,
/// # };
///
/// #[derive(Debug)]
/// struct OpenLayers(Vec<Arc<Layer>>);
///
/// impl Ancestors for OpenLayers {
///     fn find(
///         &self,
///         wanted: &Ancestor,
///         _beside: Option<&Path>,
///     ) -> Result<Option<Arc<Layer>>, OpenError> {
///         Ok(self.0.iter().find(|layer| wanted.matches(layer)).cloned())
///     }
/// }
/// # fn write(base: Option<Arc<Snapshot>>) -> Result<Vec<u8>, snapshot_format::WriteError> {
/// #     let base_page = base.as_ref().map(|base| base.regions()[0].first_page);
/// #     let mut writer = Writer::new(Vec::new(), WriterOptions { base, ..Default::default() })?;
/// #     writer.begin_region(&RegionSpec { base_page, ..RegionSpec::default() })?;
/// #     match base_page {
/// #         Some(_) => writer.write_from_base(1)?,
/// #         None => writer.write_pages(&b"stormy ".repeat(600)[..4096])?,
/// #     }
/// #     Ok(writer.finish()?.0)
/// # }
/// # let base = Arc::new(Snapshot::open(Arc::new(MemoryStore::new(write(None)?)))?);
/// # let child = write(Some(Arc::clone(&base)))?;
///
/// let layers = base.layer(0).into_iter().chain(base.ancestors()).cloned();
/// let options = SnapshotOptions::default().ancestors(Arc::new(OpenLayers(layers.collect())));
/// let child = Snapshot::open_with(Arc::new(MemoryStore::new(child)), &options)?;
/// assert_eq!(child.ancestors()[0].id(), base.id());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Ancestors: fmt::Debug + Send + Sync {
    /// Finds the file of an ancestor; returns `None` if there is none. `beside` is the folder of
    /// the file that refers to it, if known.
    fn find(
        &self,
        wanted: &Ancestor,
        beside: Option<&Path>,
    ) -> Result<Option<Arc<Layer>>, OpenError>;

    /// Returns the layer to use for the snapshot's own file. `own` was just opened from it. If
    /// another snapshot has the same file open, its layer can be returned instead, so that both
    /// share what is read from the file. Opening ignores a layer whose ID, length or trailer hash
    /// differ from those of `own`.
    fn share_own(&self, own: Arc<Layer>) -> Arc<Layer> {
        own
    }

    /// Returns the places that [`Ancestors::find`] searches, for messages.
    fn searched(&self, beside: Option<&Path>) -> Vec<String> {
        let _ = beside;
        Vec::new()
    }
}

/// Folders with ancestors. Files are recognized by their id, so they may have any name.
///
/// The folder of the referring file is searched first, then the given ones in order: first for the
/// last known name in each, then for a file with the wanted id. A file with a damaged header is
/// found by its length, and the id of its trailer.
#[derive(Debug, Default)]
pub struct LayerFolders {
    folders: Vec<PathBuf>,
    /// Content of each folder that was searched.
    known: Mutex<HashMap<PathBuf, KnownFolder>>,
}

/// The content of a folder.
#[derive(Debug)]
struct KnownFolder {
    files: Files,
    /// When the folder had changed last, and when it was read. Unknown if it can't be queried.
    times: Option<(SystemTime, SystemTime)>,
}

/// The regular files of a folder that may be snapshots.
#[derive(Debug, Default)]
struct Files {
    /// Those that begin like snapshots, by the id there.
    by_id: HashMap<SnapshotId, Vec<PathBuf>>,
    /// Those without an intact header, by their lengths.
    by_length: HashMap<u64, Vec<PathBuf>>,
}

/// Age above which a change of a folder is certainly not in the same tick of the file system's
/// clock as a later one.
const MAX_TICK: Duration = Duration::from_millis(100);

impl KnownFolder {
    fn read(folder: &Path) -> Self {
        let changed = last_change(folder);
        Self {
            times: changed.map(|changed| (changed, SystemTime::now())),
            files: Files::of(folder),
        }
    }

    /// Returns whether the folder has the same files as when it was read. Reading it for each of
    /// many missing files would take long.
    fn is_current(&self, folder: &Path) -> bool {
        self.times.is_some_and(|(changed, read)| {
            let age = read.duration_since(changed).unwrap_or_default();
            age > MAX_TICK && last_change(folder) == Some(changed)
        })
    }
}

fn last_change(folder: &Path) -> Option<SystemTime> {
    fs::metadata(folder)
        .and_then(|folder| folder.modified())
        .ok()
}

impl LayerFolders {
    /// Creates a resolver that searches these folders, besides that of the referring file.
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        Self {
            folders: folders.into_iter().collect(),
            known: Mutex::default(),
        }
    }

    fn all<'a>(&'a self, beside: Option<&'a Path>) -> impl Iterator<Item = &'a Path> {
        beside
            .into_iter()
            .chain(self.folders.iter().map(PathBuf::as_path))
    }

    /// Returns the files in `folder` that may be the wanted one. The folder is read the first time
    /// and, if `again` is set, when it has changed.
    fn candidates(&self, folder: &Path, wanted: &Ancestor, again: bool) -> Vec<(PathBuf, Hint)> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_enough = |known: &KnownFolder| !again || known.is_current(folder);
        if !known.get(folder).is_some_and(is_enough) {
            known.insert(folder.to_owned(), KnownFolder::read(folder));
        }
        let Some(KnownFolder { files, .. }) = known.get(folder) else {
            return Vec::new();
        };
        let by_id = files.by_id.get(&wanted.id).into_iter().flatten();
        let by_length = files
            .by_length
            .get(&wanted.file_bytes)
            .into_iter()
            .flatten();
        let by_id = by_id.map(|path| (path.clone(), Hint::Id));
        let by_length = by_length.map(|path| (path.clone(), Hint::Length));
        by_id.chain(by_length).collect()
    }
}

/// Why a file may be the wanted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hint {
    /// The file has the last known name.
    Name,
    /// Its header has the id.
    Id,
    /// Its header is damaged, or it is no snapshot, and it has the length.
    Length,
}

impl Files {
    fn of(folder: &Path) -> Self {
        let mut files = Self::default();
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            if !metadata.is_file() {
                continue;
            }
            let header = FileStore::open(&path)
                .ok()
                .and_then(|store| open::id_in_header(&store));
            let Some((id, is_intact)) = header else {
                continue;
            };
            if !is_intact {
                let same = files.by_length.entry(metadata.len());
                same.or_default().push(path.clone());
            }
            if let Some(id) = id {
                files.by_id.entry(id).or_default().push(path);
            }
        }
        // The order in which a folder lists its files means nothing.
        let lists = files.by_id.values_mut().chain(files.by_length.values_mut());
        lists.for_each(|paths| paths.sort());
        files
    }
}

/// Returns a name's path in `folder`, if the name is that of a file and not escaped. A file with an
/// escaped name is found by its id.
fn path_of(folder: &Path, name: &str) -> Option<PathBuf> {
    let plain = !matches!(name, "" | "." | "..") && !name.contains(['/', '\\']);
    plain.then(|| folder.join(name))
}

impl Ancestors for LayerFolders {
    fn find(
        &self,
        wanted: &Ancestor,
        beside: Option<&Path>,
    ) -> Result<Option<Arc<Layer>>, OpenError> {
        let mut refused = None;
        let mut found = |path: &Path, hint: Hint| {
            let layer = Layer::open_path(path);
            let is_other = match &layer {
                // A damaged header may have any id. Another file under the last known name is
                // reported.
                Ok(layer) => layer.id() != wanted.id && hint != Hint::Name,
                // Nothing, or a folder, has the last known name. Looking first would take a call
                // more.
                Err(_) if hint == Hint::Name => !path.is_file(),
                Err(_) => hint == Hint::Length,
            };
            if is_other {
                return None;
            }
            let checked = layer.and_then(|layer| wanted.check(&layer).map(|()| layer));
            match checked {
                Ok(layer) => Some(Arc::new(layer)),
                Err(error) => {
                    refused.get_or_insert(error);
                    None
                }
            }
        };
        for folder in self.all(beside) {
            let path = path_of(folder, &wanted.name);
            if let Some(layer) = path.and_then(|path| found(&path, Hint::Name)) {
                return Ok(Some(layer));
            }
        }
        for again in [false, true] {
            for folder in self.all(beside) {
                let mut files = self.candidates(folder, wanted, again).into_iter();
                if let Some(layer) = files.find_map(|(path, hint)| found(&path, hint)) {
                    return Ok(Some(layer));
                }
            }
        }
        refused.map_or(Ok(None), Err)
    }

    fn searched(&self, beside: Option<&Path>) -> Vec<String> {
        let shown = |folder: &Path| match fs::read_dir(folder) {
            Ok(_) => escape_path(folder),
            Err(error) => format!("{} ({error})", escape_path(folder)),
        };
        self.all(beside).map(shown).collect()
    }
}

/// A resolver that returns [stand-ins](Layer::absent) for files that another resolver does not
/// find, or finds unusable.
#[derive(Debug)]
pub struct AllowMissing(pub Arc<dyn Ancestors>);

impl Ancestors for AllowMissing {
    fn find(
        &self,
        wanted: &Ancestor,
        beside: Option<&Path>,
    ) -> Result<Option<Arc<Layer>>, OpenError> {
        let found = self.0.find(wanted, beside).ok().flatten();
        Ok(Some(
            found.unwrap_or_else(|| Arc::new(Layer::absent(wanted))),
        ))
    }

    fn searched(&self, beside: Option<&Path>) -> Vec<String> {
        self.0.searched(beside)
    }
}

/// The files of an open snapshot.
#[derive(Debug)]
pub(super) struct Chain {
    /// The snapshot's own file, followed by its ancestors in the order of its list.
    pub(super) layers: Vec<Arc<Layer>>,
    /// The layers that the list of each of these files names: see [`crate::index::Files::listed`].
    pub(super) listed: Vec<Box<[u16]>>,
    pub(super) bodies: Box<[Body]>,
}

impl Chain {
    /// Opens all ancestors of `own`.
    pub(super) fn open(own: Layer, ancestors: &dyn Ancestors) -> Result<Self, OpenError> {
        let own = Arc::new(own);
        let shared = ancestors.share_own(Arc::clone(&own));
        let is_same = shared.claims_content_of(&own);
        let mut layers = vec![if is_same { shared } else { Arc::clone(&own) }];
        let beside = own.store().folder();
        for wanted in own.listed_ancestors() {
            let layer = open_one(&own, wanted, ancestors, beside.as_deref())?;
            layers.push(layer);
        }
        // At most `MAX_ANCESTORS` of them.
        let by_id: HashMap<SnapshotId, u16> = layers
            .iter()
            .zip(0u16..)
            .map(|(layer, number)| (layer.id(), number))
            .collect();
        let listed = layers.iter().map(|layer| {
            let numbers = layer.listed_ancestors().iter();
            numbers
                .map(|ancestor| by_id.get(&ancestor.id).copied().unwrap_or(0))
                .collect()
        });
        Ok(Self {
            listed: listed.collect(),
            bodies: layers.iter().map(|layer| layer.ends().body).collect(),
            layers,
        })
    }
}

fn open_one(
    own: &Layer,
    wanted: &Ancestor,
    ancestors: &dyn Ancestors,
    beside: Option<&Path>,
) -> Result<Arc<Layer>, OpenError> {
    let unusable = |source: OpenError| OpenError::AncestorUnusable {
        file: own.name().to_owned(),
        id: wanted.id,
        source: Box::new(source),
    };
    let found = ancestors.find(wanted, beside).map_err(unusable)?;
    let Some(layer) = found else {
        return Err(OpenError::AncestorMissing {
            file: own.name().to_owned(),
            id: wanted.id,
            name: wanted.name.clone(),
            searched: ancestors.searched(beside),
        });
    };
    wanted.check(&layer).map_err(unusable)?;
    let mut listed = layer.listed_ancestors().iter();
    if listed.any(|ancestor| ancestor.id == own.id()) {
        return Err(OpenError::AncestorCycle {
            file: own.name().to_owned(),
            id: own.id(),
            ancestor: layer.name().to_owned(),
        });
    }
    if layer.is_absent() {
        return Ok(layer);
    }
    let page_size = open::header_page_size(layer.store()).map_err(unusable)?;
    match page_size {
        Some(page_size) if page_size as usize != PAGE_SIZE => {
            Err(unusable(OpenError::AncestorPageSize {
                file: layer.name().to_owned(),
                page_size,
            }))
        }
        Some(_) | None => Ok(layer),
    }
}

/// Returns the key of the property that keeps the last known name of an ancestor.
pub(crate) fn name_property(id: SnapshotId) -> String {
    format!("ancestor.{id}")
}
