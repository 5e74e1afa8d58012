//! Writes the trace of a recording as soon as it ends, or when the command does.

use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use snaprestore_engine::Recording;

use crate::output::Output;
use crate::signals::Cancel;
use crate::trace_file::{RecordingReport, TraceFile};

/// Interval at which the thread that writes checks whether the command was asked to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The thread that writes the trace of a recording.
pub(super) struct TraceWriter {
    recording: Recording,
    output: Output,
    thread: Option<JoinHandle<Result<RecordingReport>>>,
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

    /// Ends the recording: nothing is touched any more.
    pub(super) fn stop(&self) {
        self.recording.stop();
    }

    /// Ends the recording, and returns when the trace is written.
    pub(super) fn finish(mut self) -> Result<RecordingReport> {
        self.end().unwrap_or_else(|| unreachable!("it ends once"))
    }

    fn end(&mut self) -> Option<Result<RecordingReport>> {
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
