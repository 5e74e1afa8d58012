//! Recordings of the first touches of VMs.
//!
//! A recording exists only in the worker until it ends. Then the worker sends the trace in a memfd,
//! and a thread of the supervisor writes it to the folder of the service: a disk may not answer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use snaprestore_engine::RecordingOptions;
use snapshot_format::names::escape_path;
use snapshot_format::trace::{FILE_EXTENSION, Trace, TraceError};

use super::Supervisor;
use crate::api::summary::VmLabel;
use crate::error::Chain;

/// Time limit for traces to be written when the daemon exits.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which it checks that.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Size of a trace without its touches, at most.
const MAX_HEADER_BYTES: u64 = 4096;
/// Size of a touch in a trace.
const TOUCH_BYTES: u64 = 16;

/// The recordings of a daemon.
#[derive(Debug, Default)]
pub(super) struct Recordings {
    /// VMs whose recording is in the worker.
    running: BTreeMap<u64, VmLabel>,
    /// Traces that are being written.
    writing: Vec<(VmLabel, JoinHandle<Result<String, WriteTraceError>>)>,
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

    /// Returns whether a trace is being written.
    pub(super) fn is_writing(&self) -> bool {
        !self.writing.is_empty()
    }

    /// Removes and returns the traces that were written, or could not be.
    fn take_written(&mut self) -> Vec<(VmLabel, Result<String, WriteTraceError>)> {
        let done = self
            .writing
            .extract_if(.., |(_, thread)| thread.is_finished());
        let panicked = |_| {
            Err(WriteTraceError::Read(io::Error::other(
                "the thread panicked",
            )))
        };
        done.map(|(label, thread)| (label, thread.join().unwrap_or_else(panicked)))
            .collect()
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
        let path = trace_path(folder, &label);
        let thread = std::thread::Builder::new().name("trace".into());
        match thread.spawn(move || write_trace(&File::from(memfd), &path)) {
            Ok(thread) => self.recordings.writing.push((label, thread)),
            Err(error) => self.journal.vm_error(
                &label,
                format_args!("its recording is lost: cannot start a thread: {error}"),
            ),
        }
    }

    /// Logs the traces that were written, or could not be.
    pub(super) fn log_written_traces(&mut self) {
        for (label, written) in self.recordings.take_written() {
            match written {
                Ok(what) => self.journal.vm_info(&label, what),
                Err(error) => self.journal.vm_error(
                    &label,
                    format_args!("its recording is lost: {}", Chain(&error)),
                ),
            }
        }
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

    /// Waits until all traces are written.
    pub(super) fn finish_traces(&mut self) {
        let begun = Instant::now();
        while self.recordings.is_writing() && begun.elapsed() < WRITE_TIMEOUT {
            std::thread::sleep(POLL_INTERVAL);
            self.log_written_traces();
        }
        for (label, _) in std::mem::take(&mut self.recordings.writing) {
            let what = "its recording is lost: the disk did not take the trace in time";
            self.journal.vm_error(&label, what);
        }
    }
}

/// Returns the path for the trace of a VM. VMs are numbered anew by each daemon, so it has the
/// time, too.
fn trace_path(folder: &Path, label: &VmLabel) -> PathBuf {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs());
    let VmLabel { id, service, .. } = label;
    folder.join(format!("{service}-{id}-{seconds}.{FILE_EXTENSION}"))
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
