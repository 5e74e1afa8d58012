//! Files with the statistics of VMs that have ended, for `snaprestore report --run`.
//!
//! A thread of their own writes them, since a disk may not answer.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use snaprestore_engine::stats::RunRecord;
use snapshot_format::names::escape_path;

use crate::api::summary::VmLabel;
use crate::error::Chain;

/// Maximum number of records that wait to be written, of at most 160 KiB each.
const MAX_WAITING: usize = 64;

/// A folder with a file for each VM.
#[derive(Debug)]
pub(super) struct RunFiles {
    folder: PathBuf,
    waiting: SyncSender<(VmLabel, RunRecord)>,
    failed: Receiver<RunFileFailure>,
}

/// A record that could not be written.
#[derive(Debug)]
pub(super) struct RunFileFailure {
    pub(super) label: VmLabel,
    pub(super) why: String,
}

impl RunFiles {
    /// Starts the thread that writes the files.
    pub(super) fn start(folder: PathBuf) -> std::io::Result<Self> {
        let (waiting, records) = sync_channel::<(VmLabel, RunRecord)>(MAX_WAITING);
        let (failures, failed) = channel();
        let target = folder.clone();
        let body = move || {
            for (label, record) in records {
                let path = target.join(file_name(&label, SystemTime::now()));
                if let Err(error) = record.write_path(&path, false) {
                    let why = Chain(&error).to_string();
                    // Nobody reads it any more when the daemon has stopped.
                    let _ = failures.send(RunFileFailure { label, why });
                }
            }
        };
        std::thread::Builder::new()
            .name("runs".into())
            .spawn(body)?;
        Ok(Self {
            folder,
            waiting,
            failed,
        })
    }

    /// Hands the record of an ended VM to the thread. Returns an error if that is too far behind.
    pub(super) fn write(&self, label: VmLabel, record: RunRecord) -> Result<(), String> {
        self.waiting.try_send((label, record)).map_err(|_| {
            format!(
                "cannot write its statistics: {MAX_WAITING} others wait for {}; check that its \
                 disk answers",
                escape_path(&self.folder)
            )
        })
    }

    /// Returns the next failure, if there is one.
    pub(super) fn failure(&self) -> Option<RunFileFailure> {
        self.failed.try_recv().ok()
    }

    /// Waits until all records are written, at most for `timeout`. Returns the failures, and
    /// whether everything was written in time.
    pub(super) fn finish(self, timeout: Duration) -> (Vec<RunFileFailure>, bool) {
        drop(self.waiting);
        let mut failures = Vec::new();
        while let Ok(failure) = self.failed.recv_timeout(timeout) {
            failures.push(failure);
        }
        let done = matches!(self.failed.try_recv(), Err(TryRecvError::Disconnected));
        (failures, done)
    }

    /// Returns the folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Returns the name of a VM's file. The time tells runs of the daemon apart, which count their VMs
/// from 1.
fn file_name(label: &VmLabel, now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, VmLabel { id, service, .. }) = (since.as_secs(), label);
    format!("{service}-{id}-{seconds}.run.json")
}

#[cfg(test)]
mod tests {
    use snaprestore_engine::stats::{RUN_VERSION, Stats, Timeline};

    use super::*;

    fn record() -> RunRecord {
        RunRecord {
            run_version: RUN_VERSION,
            what: "a VM".into(),
            snapshot_id: "1".into(),
            content_digest: "2".into(),
            map_us: None,
            complete_us: None,
            pages_left_to_kernel: 0,
            statistics: Stats::default(),
            timeline: Timeline::default(),
        }
    }

    fn label(id: u64) -> VmLabel {
        VmLabel {
            id,
            pid: 7,
            service: "web".into(),
        }
    }

    #[test]
    fn ended_vms_have_files_and_failures_are_reported() {
        let folder = tempfile::tempdir().unwrap();
        let files = RunFiles::start(folder.path().into()).unwrap();
        files.write(label(3), record()).unwrap();
        files.write(label(4), record()).unwrap();
        let (failures, done) = files.finish(Duration::from_secs(60));
        assert!(failures.is_empty() && done, "{failures:?}");
        let names = std::fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert!(names[0].starts_with("web-3-") && names[1].starts_with("web-4-"));
        assert!(names[0].ends_with(".run.json"), "{names:?}");
        let text = std::fs::read(folder.path().join(&names[0])).unwrap();
        assert_eq!(
            serde_json::from_slice::<RunRecord>(&text).unwrap(),
            record()
        );

        let files = RunFiles::start(folder.path().join("none")).unwrap();
        files.write(label(5), record()).unwrap();
        let (failures, done) = files.finish(Duration::from_secs(60));
        assert!(done && failures.len() == 1, "{failures:?}");
        assert_eq!(failures[0].label.id, 5);
        assert!(failures[0].why.contains("does not exist"), "{failures:?}");
    }
}
