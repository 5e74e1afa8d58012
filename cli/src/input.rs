//! Opens the input files of commands. Files that need random access must be regular files or block
//! devices; [`FileStore::open`] refuses everything else and names its kind.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use snapshot_format::{FileStore, OpenError, Snapshot};

use crate::names;

/// Opens a snapshot for reading.
pub(crate) fn open(path: &Path) -> Result<Snapshot> {
    Ok(Snapshot::open(Arc::new(store(path)?))?)
}

/// Opens the file at `path`, whatever its content.
pub(crate) fn store(path: &Path) -> Result<FileStore> {
    let opened = FileStore::open(path).map_err(|source| OpenError::NoStore {
        file: names::path(path),
        source,
    });
    Ok(opened?)
}
