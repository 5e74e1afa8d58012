//! Writes the trace of a recording as soon as it ends, or when the command does.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;
use snaprestore_engine::Recording;
use snapshot_format::SnapshotFile;
use snapshot_format::trace::Trace;

use crate::names;
use crate::output::Output;
use crate::signals::Cancel;

/// Interval at which the thread that writes checks whether the command was asked to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A trace file that has no name yet, so that a bad path is found before anything is recorded.
pub(super) struct TraceFile {
    path: PathBuf,
    file: SnapshotFile,
}

/// The thread that writes the trace of a recording.
pub(super) struct TraceWriter {
    recording: Recording,
    output: Output,
    thread: Option<JoinHandle<Result<TraceReport>>>,
}

/// Report of a recording. The field names are part of the command's interface.
#[derive(Debug, Serialize)]
pub(super) struct TraceReport {
    pub(super) file: String,
    pub(super) touches: u64,
    /// Number of pages that were present before, whose touches were not seen.
    pub(super) present_at_start: u64,
    pub(super) end: &'static str,
    /// Human-readable reason for the end.
    #[serde(skip)]
    pub(super) why: String,
    /// Time of the last touch.
    pub(super) last_touch_ms: u64,
}

impl TraceFile {
    /// Creates the file. No file may have its name.
    pub(super) fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: SnapshotFile::create(path, false)?,
        })
    }

    fn write(mut self, trace: &Trace) -> Result<TraceReport> {
        let named = || names::path(&self.path);
        self.file.write_all(&trace.to_bytes()).with_context(named)?;
        self.file.commit()?;
        let last = trace.touches.last().map_or(Duration::ZERO, |last| last.at);
        Ok(TraceReport {
            file: names::exact(&self.path),
            touches: trace.touches.len() as u64,
            present_at_start: trace.present_at_start,
            end: trace.end.name(),
            why: trace.end.to_string(),
            last_touch_ms: u64::try_from(last.as_millis()).unwrap_or(u64::MAX),
        })
    }
}

impl TraceWriter {
    /// Starts the thread. If the command is asked to stop before the recording has ended, the
    /// thread writes the trace and ends the process.
    pub(super) fn start(
        recording: Recording,
        file: TraceFile,
        output: Output,
        cancel: &Cancel,
    ) -> Result<Self> {
        let (own, cancel) = (recording.clone(), cancel.clone());
        let thread = std::thread::Builder::new()
            .name("trace".into())
            .spawn(move || {
                while !own.wait(POLL_INTERVAL) && !cancel.requested() {}
                let written = file.write(&own.stop());
                // Nothing is left to be written.
                cancel.end_at_once();
                if cancel.requested() {
                    cancel.die();
                }
                written
            })
            .context("starting the thread that writes the trace")?;
        Ok(Self {
            recording,
            output,
            thread: Some(thread),
        })
    }

    /// Ends the recording, and returns when the trace is written.
    pub(super) fn finish(mut self) -> Result<TraceReport> {
        self.end().unwrap_or_else(|| unreachable!("it ends once"))
    }

    fn end(&mut self) -> Option<Result<TraceReport>> {
        let thread = self.thread.take()?;
        self.recording.stop();
        match thread.join() {
            Ok(written) => Some(written),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// A command that fails writes what was recorded nevertheless.
impl Drop for TraceWriter {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.end() {
            self.output.fail(&error);
        }
    }
}
