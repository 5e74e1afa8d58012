//! Trace files that commands write, and their reports.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use indicatif::HumanCount;
use serde::Serialize;
use snaprestore_engine::stats::whole_millis;
use snapshot_format::trace::Trace;

use crate::names;
use crate::output::count;
use crate::target::{self, Target};

/// A trace file that has no name yet, so that a bad path is found before anything is recorded.
pub(crate) struct TraceFile {
    path: PathBuf,
    target: Target,
}

/// Report of a recording. The field names are part of the command's interface.
#[derive(Debug, Serialize)]
pub(crate) struct RecordingReport {
    file: String,
    touches: u64,
    /// Number of pages that were present before, whose touches were not seen.
    present_at_start: u64,
    end: &'static str,
    /// Human-readable reason for the end.
    #[serde(skip)]
    why: String,
    /// Time of the last touch.
    last_touch_ms: u64,
}

impl TraceFile {
    /// Creates the file. No file may have its name. No signal interrupts a write to it.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            target: Target::create_new(path)?,
        })
    }

    /// Writes the trace, and gives the file its name.
    pub(crate) fn write(mut self, trace: &Trace) -> Result<RecordingReport> {
        let named = || target::name(&self.path);
        let bytes = trace.to_bytes().with_context(named)?;
        self.target.write_all(&bytes).with_context(named)?;
        self.target.complete()?;
        let last = trace.touches.last().map_or(Duration::ZERO, |last| last.at);
        Ok(RecordingReport {
            file: if target::is_stdout(&self.path) {
                target::name(&self.path)
            } else {
                names::exact(&self.path)
            },
            touches: trace.touches.len() as u64,
            present_at_start: trace.present_at_start,
            end: trace.end.name(),
            why: trace.end.to_string(),
            last_touch_ms: whole_millis(last),
        })
    }
}

impl fmt::Display for RecordingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "recorded    {} to {}, the last touched after {} ms; ended: {}",
            count(self.touches, "page"),
            self.file,
            HumanCount(self.last_touch_ms),
            self.why
        )?;
        if self.present_at_start > 0 {
            let present = count(self.present_at_start, "page");
            write!(f, "; {present} not seen, because present before")?;
        }
        writeln!(f)
    }
}
