//! The record of a run: the statistics of one session as a file that `snaprestore report` reads.

use std::io::{self, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use snapshot_format::names::escape_path;
use snapshot_format::{FileError, Snapshot, SnapshotFile, digest};

use super::{Stats, Timeline, whole_micros};

/// The version of the file. Readers refuse others.
pub const RUN_VERSION: u32 = 1;

/// Statistics of one session, with the memory that it restored. The JSON object of
/// `restore --run-json` and `serve --run-json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The version of the object: [`RUN_VERSION`].
    pub run_version: u32,
    /// A description for people, such as the VM.
    pub what: String,
    /// ID of the snapshot, in hexadecimal digits.
    pub snapshot_id: String,
    /// Digest of the memory's content, in hexadecimal digits.
    pub content_digest: String,
    /// Microseconds from the start call to usable memory, if they are known.
    pub map_us: Option<u64>,
    /// Microseconds from the start call to complete memory, if it is complete.
    pub complete_us: Option<u64>,
    /// Number of zero pages that the kernel serves itself when they are touched.
    pub pages_left_to_kernel: u64,
    /// The statistics, with the buckets of their histograms.
    pub statistics: Stats,
    /// The course of the run.
    pub timeline: Timeline,
}

/// Why a record could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The file could not be created, or not be given its name.
    #[error("cannot write the statistics of the run")]
    File(#[from] FileError),
    /// The file could not be written.
    #[error("cannot write the statistics of the run to {file}")]
    Write {
        /// The path of the file, escaped.
        file: String,
        /// The error of the system call.
        source: io::Error,
    },
}

impl RunRecord {
    /// Creates the record of a session that restores `snapshot`.
    pub fn new(what: String, snapshot: &Snapshot, statistics: Stats, timeline: Timeline) -> Self {
        let mapped = Some(statistics.mapped).filter(|mapped| !mapped.is_zero());
        Self {
            run_version: RUN_VERSION,
            what,
            snapshot_id: snapshot.id().to_string(),
            content_digest: digest::hex(&snapshot.summary().content_digest),
            map_us: mapped.map(whole_micros),
            complete_us: statistics.complete.map(whole_micros),
            pages_left_to_kernel: statistics.left_to_kernel,
            statistics,
            timeline,
        }
    }

    /// Writes the JSON object to a file, which gets its name when all of it is on disk. With
    /// `force` it replaces a file that exists.
    pub fn write_path(&self, path: impl AsRef<Path>, force: bool) -> Result<(), RunError> {
        let path = path.as_ref();
        let failed = |source| RunError::Write {
            file: escape_path(path),
            source,
        };
        let text = serde_json::to_vec(self).map_err(|error| failed(error.into()))?;
        let mut file = SnapshotFile::create(path, force)?;
        file.write_all(&text).map_err(failed)?;
        Ok(file.commit()?)
    }
}
