//! Opening the files that a command was told to read. Those that are read at any offset are regular
//! files or block devices; everything else is refused by name ([`FileStore::open`]).

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use snapshot_format::{FileStore, OpenError, Snapshot};

use crate::names;

/// Opens a snapshot.
pub(crate) fn open(path: &Path) -> Result<Snapshot> {
    Ok(Snapshot::open(Arc::new(store(path)?))?)
}

/// Opens the file at `path`, whatever is in it.
pub(crate) fn store(path: &Path) -> Result<FileStore> {
    let opened = FileStore::open(path).map_err(|source| OpenError::NoStore {
        file: names::path(path),
        source,
    });
    Ok(opened?)
}
