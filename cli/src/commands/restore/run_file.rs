//! The file for the statistics of a restore.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use snaprestore_engine::stats::RunRecord;
use snapshot_format::SnapshotFile;

use crate::names;

/// First part of the messages about the file.
const CANNOT_WRITE: &str = "cannot write the statistics of the run";

/// A file for statistics, checked before the restore, so that a bad path is found at once.
pub(super) struct RunFile {
    path: PathBuf,
    /// A pipe or device that is open already. A regular file is created when it is written, so that
    /// a command killed by a signal leaves nothing behind.
    open: Option<SnapshotFile>,
}

impl RunFile {
    /// Opens the file, or checks that it can be created.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = SnapshotFile::create(path, true).context(CANNOT_WRITE)?;
        Ok(Self {
            path: path.to_owned(),
            open: Some(file).filter(|file| !file.is_regular()),
        })
    }

    /// Writes the statistics, and gives the file its name.
    pub(super) fn write(self, record: &RunRecord) -> Result<()> {
        let text = serde_json::to_vec(record)?;
        let created = self
            .open
            .map_or_else(|| SnapshotFile::create(&self.path, true), Ok);
        let mut file = created.context(CANNOT_WRITE)?;
        let named = || format!("{CANNOT_WRITE} to {}", names::path(&self.path));
        file.write_all(&text).with_context(named)?;
        file.commit().context(CANNOT_WRITE)
    }
}
