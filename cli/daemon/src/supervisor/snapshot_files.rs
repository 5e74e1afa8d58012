//! The open files of a service's snapshot: its own, and those of its ancestors.
//!
//! ```text
//!   open        find the ancestors, check the chain        keep a descriptor of every file
//!   store       under the id of the service's snapshot     `snapshot`, `layer-1`, `layer-2`, ...
//!   pass on     to each worker, which looks up nothing by path
//! ```
//!
//! Later, a path may name another file or none; a descriptor stays what it is.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snapshot_format::names::escape_path;
use snapshot_format::{FileStore, Layer, LayerFolders, Snapshot, SnapshotOptions};

use super::services::AddServiceError;
use crate::fd_store::{FdStore, StoreError};

/// The role under which the snapshot's own file is stored.
const OWN: &str = "snapshot";

/// The open files of a snapshot.
#[derive(Debug)]
pub(super) struct SnapshotFiles {
    own: OwnedFd,
    /// The files of its ancestors, in the order of its list.
    ancestors: Vec<OwnedFd>,
    /// Their names in messages.
    names: Arc<[String]>,
}

impl SnapshotFiles {
    /// Opens the snapshot at `path`, with its ancestors, which are looked for beside it and in
    /// `folders`. The snapshot must have the working set, if one is given.
    pub(super) fn open(
        path: &Path,
        folders: Vec<PathBuf>,
        working_set: Option<&str>,
    ) -> Result<Self, AddServiceError> {
        let ancestors = Arc::new(LayerFolders::new(folders));
        let options = SnapshotOptions::default().ancestors(ancestors);
        let snapshot = Snapshot::open_with(FileStore::open_snapshot(path)?, &options)?;
        if let Some(name) = working_set {
            snapshot.check_working_set(name)?;
        }
        let descriptor = |layer: &Arc<Layer>| {
            let file = layer.store().as_file().ok_or_else(not_a_file)?;
            Ok(file.try_clone()?.into())
        };
        let failed = |source| AddServiceError::Open {
            snapshot: escape_path(path),
            source,
        };
        // The snapshot itself is always the first.
        let mut layers = (0..).map_while(|layer| snapshot.layer(layer));
        let own = layers.next().map(descriptor);
        let own = own.unwrap_or_else(|| Err(not_a_file())).map_err(failed)?;
        let names = snapshot.ancestors().iter();
        Ok(Self {
            own,
            ancestors: layers
                .map(descriptor)
                .collect::<Result<_, _>>()
                .map_err(failed)?,
            names: names.map(|layer| layer.name().to_owned()).collect(),
        })
    }

    /// Collects the files of a snapshot from what was stored. Returns `None` if one is missing.
    pub(super) fn recover(stored: Vec<(String, OwnedFd)>, names: &Arc<[String]>) -> Option<Self> {
        let mut by_role: BTreeMap<_, _> = stored.into_iter().collect();
        let own = by_role.remove(OWN)?;
        let ancestors = (0..names.len()).map(|number| by_role.remove(&role_of(number)));
        Some(Self {
            own,
            ancestors: ancestors.collect::<Option<_>>()?,
            names: Arc::clone(names),
        })
    }

    /// Stores all files under `id`, or none: a part of them is of no use.
    pub(super) fn store(
        &self,
        id: &str,
        service: &str,
        fd_store: &mut FdStore,
    ) -> Result<(), StoreError> {
        let roles: Vec<_> = (0..self.ancestors.len()).map(role_of).collect();
        let ancestors = self.ancestors.iter().map(OwnedFd::as_fd);
        let mut files = vec![(OWN, self.own())];
        files.extend(roles.iter().map(String::as_str).zip(ancestors));
        fd_store.store(id, service, &files).inspect_err(|_| {
            // If this fails, systemd drops them when the service stops.
            let _ = fd_store.remove(id);
        })
    }

    /// Returns the snapshot's own file.
    pub(super) fn own(&self) -> BorrowedFd<'_> {
        self.own.as_fd()
    }

    /// Returns the names of the ancestors' files in messages.
    pub(super) fn ancestor_names(&self) -> &Arc<[String]> {
        &self.names
    }

    /// Returns the name and the file of an ancestor, counted from 0 in the order of the list.
    pub(super) fn ancestor(&self, number: usize) -> Option<(&str, BorrowedFd<'_>)> {
        let (name, file) = (self.names.get(number)?, self.ancestors.get(number)?);
        Some((name, file.as_fd()))
    }
}

/// Returns the role under which an ancestor's file is stored.
fn role_of(number: usize) -> String {
    format!("layer-{}", number + 1)
}

fn not_a_file() -> std::io::Error {
    std::io::Error::other("it has no descriptor")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_chain_is_recovered() {
        let names: Arc<[String]> = ["/a", "/b"].map(str::to_owned).into();
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let stored = |roles: &[&str]| {
            let roles = roles.iter().map(|role| ((*role).to_owned(), null()));
            SnapshotFiles::recover(roles.collect(), &names)
        };
        let files = stored(&["layer-2", "snapshot", "layer-1"]).unwrap();
        assert_eq!(files.ancestor(0).unwrap().0, "/a");
        assert!(files.ancestor(1).is_some() && files.ancestor(2).is_none());
        for part in [
            &["snapshot", "layer-1"][..],
            &["snapshot", "layer-2"],
            &["layer-1", "layer-2"],
        ] {
            assert!(stored(part).is_none(), "{part:?}");
        }
    }
}
