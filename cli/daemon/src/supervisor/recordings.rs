//! Recordings of the first touches of VMs.
//!
//! A recording exists only in the worker until it ends. Then the worker sends the trace in a memfd,
//! and a thread of the supervisor writes it to the folder of the service.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use snaprestore_engine::RecordingOptions;
use snapshot_format::FileError;
use snapshot_format::names::escape_path;
use snapshot_format::trace::{self, FILE_EXTENSION, Trace, TraceError};

use super::Supervisor;
use super::vm_files::VmFileName;
use crate::api::summary::VmLabel;
use crate::error::Chain;
use crate::ipc::TraceDestination;

/// Maximum size of a trace that a worker sends.
const MAX_TRACE_BYTES: u64 = trace::file_bytes(RecordingOptions::MAX_PAGES);

/// The recordings of a daemon.
#[derive(Debug, Default)]
pub(super) struct Recordings {
    /// Recordings that are in the worker, by VM and destination.
    running: BTreeMap<(u64, TraceDestination), VmLabel>,
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
    pub(super) fn begin(&mut self, label: VmLabel, destination: TraceDestination) {
        self.running.insert((label.id, destination), label);
    }

    /// Forgets a recording of the VM. Returns the label of the VM, if there was a recording.
    fn end(&mut self, id: u64, destination: TraceDestination) -> Option<VmLabel> {
        self.running.remove(&(id, destination))
    }
}

impl Supervisor {
    /// Handles the end of a recording: starts to write the trace, if there is one.
    pub(super) fn end_recording(
        &mut self,
        id: u64,
        destination: TraceDestination,
        result: Result<(), String>,
        memfd: Option<OwnedFd>,
    ) {
        let Some(label) = self.recordings.end(id, destination) else {
            return;
        };
        if let Err(why) = result {
            self.journal
                .vm_error(&label, format_args!("its recording is lost: {why}"));
            return;
        }
        if destination == TraceDestination::Operator {
            // The worker has sent the trace to the operator.
            return;
        }
        let service = self.vms.get(id).map(super::vm::VmRecord::service);
        let folder = service.and_then(|service| self.services.record_folder(service));
        let (folder, memfd) = match (folder, memfd) {
            (Some(folder), Some(memfd)) => (folder, memfd),
            (_, None) => {
                let what = "its recording is lost: the worker sent no trace";
                self.journal.vm_error(&label, what);
                return;
            }
            (None, _) => {
                let what = "its recording is lost: the VM had ended, or its service records no \
                            more, when the trace arrived";
                self.journal.vm_error(&label, what);
                return;
            }
        };
        let name = VmFileName::now(folder, &label, FILE_EXTENSION);
        let memfd = File::from(memfd);
        let lost = "its trace is not in the folder; as long as the VM is served, `ctl record VM \
                    stop` returns it";
        self.write_vm_file(&label, lost, move || {
            let written = write_trace(&memfd, &name);
            written.map(Some).map_err(|error| Chain(&error).to_string())
        });
    }

    /// Logs that an operator has not stopped the recording of a VM that ended.
    pub(super) fn log_unfetched_recording(&mut self, id: u64) {
        if let Some(label) = self.recordings.end(id, TraceDestination::Operator) {
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
fn write_trace(memfd: &File, name: &VmFileName) -> Result<String, WriteTraceError> {
    let read = || -> io::Result<Vec<u8>> {
        let metadata = memfd.metadata()?;
        let fits = metadata.is_file() && metadata.len() <= MAX_TRACE_BYTES;
        let len = usize::try_from(metadata.len()).ok().filter(|_| fits);
        let mut bytes = vec![0; len.ok_or(io::ErrorKind::FileTooLarge)?];
        memfd.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    let bytes = read().map_err(WriteTraceError::Read)?;
    let trace = Trace::from_bytes(&bytes).map_err(WriteTraceError::Invalid)?;
    let exists = |error: &TraceError| matches!(error, TraceError::File(FileError::Exists { .. }));
    let written = name.write(|path| trace.write_path(path, false), exists);
    let path = written.map_err(WriteTraceError::Write)?;
    Ok(format!(
        "recorded {} touches to {}; ended: {}",
        trace.touches.len(),
        escape_path(&path),
        trace.end
    ))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use snapshot_format::trace::TraceEnd;

    use super::*;

    fn label() -> VmLabel {
        VmLabel {
            id: 7,
            pid: 1,
            service: "default".into(),
        }
    }

    #[test]
    fn only_valid_traces_are_written_and_replace_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let name = VmFileName::now(folder.path(), &label(), FILE_EXTENSION);
        let write = |bytes: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            write_trace(&file, &name)
        };
        let written = || -> Vec<Trace> {
            let files = std::fs::read_dir(folder.path()).unwrap();
            let paths = files.map(|file| file.unwrap().path());
            paths.map(|path| Trace::read_path(path).unwrap()).collect()
        };
        let trace = Trace {
            content_digest: [7; 32],
            page_slots: 512,
            begun: SystemTime::UNIX_EPOCH,
            present_at_start: 0,
            end: TraceEnd::Settled,
            touches: Vec::new(),
        };
        let bytes = trace.to_bytes().unwrap();
        for bad in [&bytes[..bytes.len() - 1], b"", b"noise"] {
            assert!(matches!(write(bad), Err(WriteTraceError::Invalid(_))));
        }
        // A file that is longer than any trace of a worker is refused before it is read.
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(MAX_TRACE_BYTES + 1).unwrap();
        let refused = write_trace(&sparse, &name);
        assert!(matches!(refused, Err(WriteTraceError::Read(_))));
        assert!(written().is_empty());

        let told = write(&bytes).unwrap();
        assert!(told.starts_with("recorded 0 touches to "), "{told}");
        assert_eq!(written(), std::slice::from_ref(&trace));
        // A file of that name is not replaced.
        let other = Trace {
            page_slots: 1024,
            ..trace.clone()
        };
        write(&other.to_bytes().unwrap()).unwrap();
        let both = written();
        assert!(both.contains(&trace) && both.contains(&other) && both.len() == 2);
    }

    /// The trace for the folder may arrive after an operator has begun, or even ended, another
    /// recording of the VM.
    #[test]
    fn recordings_of_one_vm_may_overlap() {
        let mut recordings = Recordings::default();
        for destination in [TraceDestination::Folder, TraceDestination::Operator] {
            recordings.begin(label(), destination);
        }
        for destination in [TraceDestination::Operator, TraceDestination::Folder] {
            assert!(recordings.end(7, destination).is_some());
            assert!(recordings.end(7, destination).is_none());
        }
    }
}
