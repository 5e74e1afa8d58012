//! Opening the snapshot that a command was told to read.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use snapshot_format::{FileStore, OpenError, Snapshot};

/// Opens a snapshot. A folder is called one, and not a damaged file.
pub(crate) fn open(path: &Path) -> Result<Snapshot> {
    Ok(Snapshot::open(Arc::new(store(path)?))?)
}

/// Opens the file at `path`, whatever is in it.
pub(crate) fn store(path: &Path) -> Result<FileStore> {
    if path.is_dir() {
        bail!("{}: is a folder; name a snapshot", path.display());
    }
    let opened = FileStore::open(path).map_err(|source| OpenError::NoStore {
        file: path.display().to_string(),
        source,
    });
    Ok(opened?)
}
