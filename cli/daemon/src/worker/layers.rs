//! The files of snapshots, as the supervisor has passed them.
//!
//! ```text
//!   service a ── own file ──┐                     ┌── layer ──┐
//!             ── base ──────┤ the same file?      │           ├── decoded frames
//!   service b ── own file ──┤ device, inode, and  ├── layer ──┤   of each layer
//!             ── base ──────┘ its trailer         └───────────┘
//! ```
//!
//! Snapshots of several services often have files in common: children of one base, or one snapshot
//! at the sockets of many jails. Such a file is one open layer in the worker, so that all of them
//! share its decoded frames. A file's own claim to be another is not believed: the kernel has to
//! say so, too.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use snapshot_format::{
    Ancestor, Ancestors, FileStore, Layer, OpenError, Snapshot, SnapshotOptions,
};

use super::lock;

/// The open layers of all snapshots of this worker. The number of an inode is not reused as long as
/// its layer is open.
#[derive(Debug, Default)]
pub(super) struct OpenLayers(Mutex<LayersByFile>);

/// Layers by the device and inode of their files.
type LayersByFile = HashMap<(u64, u64), Vec<Weak<Layer>>>;

impl OpenLayers {
    /// Returns the layer of the same file that another snapshot has open, or this one.
    fn share(&self, layer: Arc<Layer>) -> Arc<Layer> {
        let file = layer.store().as_file();
        let Some(Ok(metadata)) = file.map(std::fs::File::metadata) else {
            return layer;
        };
        let mut layers = lock(&self.0);
        let here = layers.entry((metadata.dev(), metadata.ino())).or_default();
        here.retain(|layer| layer.strong_count() > 0);
        let mut open = here.iter().filter_map(Weak::upgrade);
        // A file that was written anew in place is another one.
        if let Some(known) = open.find(|known| known.claims_content_of(&layer)) {
            return known;
        }
        here.push(Arc::downgrade(&layer));
        layer
    }

    /// Forgets layers that no snapshot has open any more.
    pub(super) fn forget_closed(&self) {
        lock(&self.0).retain(|_, layers| {
            layers.retain(|layer| layer.strong_count() > 0);
            !layers.is_empty()
        });
    }
}

/// The files of a snapshot that is not open yet.
#[derive(Debug)]
pub(super) struct PassedFiles {
    own: Arc<FileStore>,
    /// The files of its ancestors, in the order of its list.
    ancestors: Vec<Arc<FileStore>>,
    layers: Arc<OpenLayers>,
}

impl PassedFiles {
    pub(super) fn new(
        own: FileStore,
        ancestors: Vec<Arc<FileStore>>,
        layers: &Arc<OpenLayers>,
    ) -> Self {
        Self {
            own: Arc::new(own),
            ancestors,
            layers: Arc::clone(layers),
        }
    }

    /// Returns the number of files.
    pub(super) fn count(&self) -> u64 {
        1 + self.ancestors.len() as u64
    }

    /// Opens the snapshot.
    pub(super) fn open(&self) -> Result<Snapshot, OpenError> {
        let ancestors = PassedAncestors {
            files: self.ancestors.clone(),
            open: Mutex::default(),
            layers: Arc::clone(&self.layers),
        };
        let options = SnapshotOptions::default().ancestors(Arc::new(ancestors));
        Snapshot::open_with(Arc::clone(&self.own) as _, &options)
    }
}

/// A resolver that finds ancestors among the passed files: this process can open no others.
#[derive(Debug)]
struct PassedAncestors {
    files: Vec<Arc<FileStore>>,
    /// Layers of the first of these files.
    open: Mutex<Vec<Arc<Layer>>>,
    layers: Arc<OpenLayers>,
}

impl Ancestors for PassedAncestors {
    fn find(&self, wanted: &Ancestor, _: Option<&Path>) -> Result<Option<Arc<Layer>>, OpenError> {
        let mut open = lock(&self.open);
        loop {
            // The files come in the order in which they are wanted, so it is the last one.
            let found = open.iter().rev().find(|layer| layer.id() == wanted.id);
            if let Some(layer) = found {
                return Ok(Some(Arc::clone(layer)));
            }
            let Some(file) = self.files.get(open.len()) else {
                return Ok(None);
            };
            let layer = Layer::open(Arc::clone(file) as _)?;
            open.push(self.layers.share(Arc::new(layer)));
        }
    }

    fn share_own(&self, own: Arc<Layer>) -> Arc<Layer> {
        self.layers.share(own)
    }

    fn searched(&self, _: Option<&Path>) -> Vec<String> {
        vec!["the files that the supervisor has open".to_owned()]
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use snapshot_format::{LayerFolders, RegionSpec, Writer, WriterOptions};

    use super::*;

    const PAGES: usize = 1024;

    /// Writes a snapshot whose page `changed` differs from the others.
    fn write(path: &Path, changed: usize, base: Option<&Path>) {
        let base = base.map(|base| Arc::new(Snapshot::open_path(base).unwrap()));
        let region = RegionSpec {
            base_page: base.is_some().then_some(0),
            ..RegionSpec::default()
        };
        let options = WriterOptions {
            base,
            ..WriterOptions::default()
        };
        let mut bytes: Vec<u8> = (0..PAGES * 4096)
            .map(|i| (i / 7 + i / 4096).to_le_bytes()[0])
            .collect();
        bytes[changed * 4096] ^= 1;
        let mut writer = Writer::new(Vec::new(), options).unwrap();
        writer.begin_region(&region).unwrap();
        writer.write_pages(&bytes).unwrap();
        fs::write(path, writer.finish().unwrap().0).unwrap();
    }

    /// Opens a snapshot by new descriptors of its files.
    fn open(layers: &Arc<OpenLayers>, own: &Path, ancestors: &[&Path]) -> Snapshot {
        let file = |path: &Path| FileStore::named(File::open(path).unwrap(), "passed");
        let ancestors = ancestors.iter().map(|path| Arc::new(file(path)));
        let files = PassedFiles::new(file(own), ancestors.collect(), layers);
        files.open().unwrap()
    }

    #[test]
    fn same_file_is_one_layer_and_a_copy_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (base, copy) = (path("base"), path("copy"));
        let (one, two, three) = (path("one"), path("two"), path("three"));
        write(&base, 0, None);
        fs::copy(&base, &copy).unwrap();
        write(&one, 1, Some(&base));
        write(&two, 2, Some(&base));
        let layers = Arc::default();
        let is_shared = |a: &Snapshot, b: &Snapshot, numbers: (u16, u16)| {
            Arc::ptr_eq(a.layer(numbers.0).unwrap(), b.layer(numbers.1).unwrap())
        };
        let first = open(&layers, &one, &[&base]);
        let second = open(&layers, &two, &[&base]);
        assert!(is_shared(&first, &second, (1, 1)));
        assert!(!is_shared(&first, &second, (0, 0)));
        assert!(
            is_shared(&first, &open(&layers, &base, &[]), (1, 0)),
            "served itself"
        );
        assert!(is_shared(&first, &open(&layers, &one, &[&base]), (0, 0)));
        assert!(!is_shared(&first, &open(&layers, &two, &[&copy]), (1, 1)));

        // The file of the same inode is another snapshot now.
        write(&base, 3, None);
        write(&three, 4, Some(&base));
        let third = open(&layers, &three, &[&base]);
        assert!(!is_shared(&first, &third, (1, 1)));
        drop(third);

        layers.forget_closed();
        assert_eq!(lock(&layers.0).values().map(Vec::len).sum::<usize>(), 3);
        drop((first, second));
        layers.forget_closed();
        assert!(lock(&layers.0).is_empty());
    }

    #[test]
    fn ancestor_that_was_not_passed_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let (base, child) = (folder.path().join("base"), folder.path().join("child"));
        write(&base, 0, None);
        write(&child, 1, Some(&base));
        let own = FileStore::open(&child).unwrap();
        // It lies beside the child, where only a process that may open files looks.
        Snapshot::open_with(
            FileStore::open_snapshot(&child).unwrap(),
            &SnapshotOptions::default().ancestors(Arc::new(LayerFolders::default())),
        )
        .unwrap();
        let files = PassedFiles::new(own, Vec::new(), &Arc::default());
        let error = files.open().unwrap_err();
        assert!(
            matches!(error, OpenError::AncestorMissing { .. }),
            "{error}"
        );
    }
}
