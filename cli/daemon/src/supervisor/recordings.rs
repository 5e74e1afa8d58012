//! Recordings of the first touches of VMs.
//!
//! A recording exists only in the worker until it ends. Then the worker sends the trace in a memfd,
//! and a thread of the supervisor writes it to the folder of the service.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use snaprestore_engine::RecordingOptions;
use snapshot_format::names::escape_path;
use snapshot_format::trace::{FILE_EXTENSION, Trace, TraceError};

use super::Supervisor;
use super::vm_files::vm_file;
use crate::api::summary::VmLabel;
use crate::error::Chain;

/// Size of a trace without its touches, at most.
const MAX_HEADER_BYTES: u64 = 4096;
/// Size of a touch in a trace.
const TOUCH_BYTES: u64 = 16;

/// The recordings of a daemon.
#[derive(Debug, Default)]
pub(super) struct Recordings {
    /// VMs whose recording is in the worker.
    running: BTreeMap<u64, VmLabel>,
}

/// Why a trace was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteTraceError {
    #[error("cannot read the trace that the worker sent")]
    Read(#[source] io::Error),
    #[error("the trace that the worker sent is not valid")]
    Invalid(#[source] TraceError),
    #[error("cannot write the trace")]
    Write(#[source] TraceError),
}

impl Recordings {
    /// Notes that the VM is being recorded.
    pub(super) fn begin(&mut self, label: VmLabel) {
        self.running.insert(label.id, label);
    }
}

impl Supervisor {
    /// Handles the end of a recording: starts to write the trace, if there is one.
    pub(super) fn end_recording(
        &mut self,
        id: u64,
        result: Result<(), String>,
        memfd: Option<OwnedFd>,
    ) {
        let Some(label) = self.recordings.running.remove(&id) else {
            return;
        };
        if let Err(why) = result {
            self.journal
                .vm_error(&label, format_args!("its recording is lost: {why}"));
            return;
        }
        let service = self.vms.get(id).map(super::vm::VmRecord::service);
        let folder = service.and_then(|service| self.services.record_folder(service));
        let (Some(folder), Some(memfd)) = (folder, memfd) else {
            return;
        };
        let path = vm_file(folder, &label, FILE_EXTENSION);
        let memfd = File::from(memfd);
        self.write_vm_file(&label, "its recording is lost", move || {
            let written = write_trace(&memfd, &path);
            written.map(Some).map_err(|error| Chain(&error).to_string())
        });
    }

    /// Logs that an operator has not stopped the recording of a VM that ended.
    pub(super) fn log_unfetched_recording(&mut self, id: u64) {
        if let Some(label) = self.recordings.running.remove(&id) {
            let what = "its recording is lost: it was not stopped before the VM ended";
            self.journal.vm_error(&label, what);
        }
    }

    /// Logs the recordings that are lost with a worker.
    pub(super) fn log_lost_recordings(&mut self) {
        for label in std::mem::take(&mut self.recordings.running).into_values() {
            self.journal.vm_error(
                &label,
                "its recording is lost with the worker; the next worker does not continue it",
            );
        }
    }
}

/// Writes the trace in `memfd`, which a compromised worker may have sent, to a new file. Returns
/// the message about it.
fn write_trace(memfd: &File, path: &Path) -> Result<String, WriteTraceError> {
    let most = MAX_HEADER_BYTES + RecordingOptions::MAX_PAGES * TOUCH_BYTES;
    let read = || -> io::Result<Vec<u8>> {
        let metadata = memfd.metadata()?;
        let fits = metadata.is_file() && metadata.len() <= most;
        let len = usize::try_from(metadata.len()).ok().filter(|_| fits);
        let mut bytes = vec![0; len.ok_or(io::ErrorKind::FileTooLarge)?];
        memfd.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    let bytes = read().map_err(WriteTraceError::Read)?;
    let trace = Trace::from_bytes(&bytes).map_err(WriteTraceError::Invalid)?;
    trace
        .write_path(path, false)
        .map_err(WriteTraceError::Write)?;
    Ok(format!(
        "recorded {} touches to {}; ended: {}",
        trace.touches.len(),
        escape_path(path),
        trace.end
    ))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use snapshot_format::trace::TraceEnd;

    use super::*;

    #[test]
    fn only_valid_traces_are_written_and_replace_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1.trace");
        let write = |bytes: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            write_trace(&file, &path)
        };
        let trace = Trace {
            content_digest: [7; 32],
            page_slots: 512,
            begun: SystemTime::UNIX_EPOCH,
            present_at_start: 0,
            end: TraceEnd::Settled,
            touches: Vec::new(),
        };
        let bytes = trace.to_bytes();
        for bad in [&bytes[..bytes.len() - 1], b"", b"noise"] {
            assert!(matches!(write(bad), Err(WriteTraceError::Invalid(_))));
        }
        // A length that no trace of the worker has is refused before it is read.
        let sparse = tempfile::tempfile().unwrap();
        let most = MAX_HEADER_BYTES + RecordingOptions::MAX_PAGES * TOUCH_BYTES;
        sparse.set_len(most + 1).unwrap();
        let refused = write_trace(&sparse, &path);
        assert!(matches!(refused, Err(WriteTraceError::Read(_))));
        assert!(!path.exists());

        let told = write(&bytes).unwrap();
        assert!(told.starts_with("recorded 0 touches to "), "{told}");
        assert_eq!(Trace::read_path(&path).unwrap(), trace);
        let other = Trace {
            page_slots: 1024,
            ..trace.clone()
        };
        let refused = write(&other.to_bytes());
        assert!(matches!(refused, Err(WriteTraceError::Write(_))));
        assert_eq!(Trace::read_path(&path).unwrap(), trace);
    }
}
