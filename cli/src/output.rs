//! Output of commands: a report on standard output, as text for people or as one JSON object;
//! warnings and errors on standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;
use snaprestore_daemon::Console;
use snaprestore_uffd::os::limits::Hint;

use crate::args::Common;
use crate::exit::{Exit, layers_remedy};
use crate::names;

pub(crate) use snaprestore_daemon::log::count;

/// A command's result: people read its `Display`, and `--json` prints its `Serialize`.
pub(crate) trait Report: Display + Serialize {}
impl<T: Display + Serialize> Report for T {}

/// Whether the JSON object was already written to standard output: a reader must not find a second.
static HAS_OBJECT: AtomicBool = AtomicBool::new(false);

/// The object that `--json` prints instead of a result when the command fails.
#[derive(Serialize)]
struct Failure<'a> {
    error: &'a str,
    exit_code: i32,
}

/// The output options that the user chose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub(crate) fn new(common: Common) -> Self {
        Self {
            json: common.json,
            quiet: common.quiet,
        }
    }

    pub(crate) fn json(self) -> bool {
        self.json
    }

    /// Returns whether progress may be drawn: only on a terminal, without `--quiet` and `--json`.
    pub(crate) fn shows_progress(self) -> bool {
        !self.quiet && !self.json && io::stderr().is_terminal()
    }

    /// Prints the command's result. `--quiet` suppresses the text but not the JSON.
    pub(crate) fn report(self, report: &impl Report) -> Result<()> {
        if self.json {
            let mut text = serde_json::to_string_pretty(report)?;
            text.push('\n');
            HAS_OBJECT.store(true, Ordering::SeqCst);
            self.data(text.as_bytes())
        } else if self.quiet {
            Ok(())
        } else {
            self.data(names::shown_lines(&report.to_string()).as_bytes())
        }
    }

    /// Prints the result of a command that writes data: on standard error if the data themselves
    /// went to standard output.
    pub(crate) fn report_beside(self, data_to_stdout: bool, report: &impl Report) -> Result<()> {
        if !data_to_stdout {
            return self.report(report);
        }
        if !self.quiet {
            to_stderr(&report.to_string());
        }
        Ok(())
    }

    /// Writes to standard output, whatever the options. If the reader has closed the pipe, it has
    /// seen what it wanted (`snaprestore info x | head -3`), so this succeeds.
    #[expect(clippy::unused_self, reason = "the one door for standard output")]
    pub(crate) fn data(self, bytes: &[u8]) -> Result<()> {
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.context("cannot write to standard output"),
        }
    }

    /// Prints a warning; the command continues.
    pub(crate) fn warn(self, message: impl Display) {
        if !self.quiet {
            to_stderr(&format!("snaprestore: {message}\n"));
        }
    }

    /// Prints an error with its causes and returns the exit code.
    pub(crate) fn fail(self, error: &anyhow::Error) -> Exit {
        self.failed(&text_of(error), failed(error) as i32);
        Exit::from_error(error)
    }

    /// Prints the JSON object of a failure if `--json` was given and no object was printed yet.
    pub(crate) fn failed(self, error: &str, exit_code: i32) {
        if !self.json || HAS_OBJECT.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Ok(mut text) = serde_json::to_string_pretty(&Failure { error, exit_code }) {
            text.push('\n');
            // The error is printed on standard error too, and determines the exit code.
            let _ = self.data(text.as_bytes());
        }
    }
}

impl Console for Output {
    fn info(&self, message: &dyn Display) {
        self.warn(message);
    }

    fn error(&self, message: &dyn Display) {
        to_stderr(&format!("snaprestore: {message}\n"));
    }
}

/// Prints an error with its causes, whatever the options, and returns the exit code.
pub(crate) fn failed(error: &anyhow::Error) -> Exit {
    to_stderr(&format!("snaprestore: {}\n", text_of(error)));
    Exit::from_error(error)
}

/// Formats an error with its causes, with the limit that a write has met, and with the remedy for
/// an incomplete chain.
fn text_of(error: &anyhow::Error) -> String {
    let io_error = error.chain().find_map(|cause| cause.downcast_ref());
    let hint = io_error.map(Hint::for_file).unwrap_or_default();
    let remedy = layers_remedy(error);
    format!("{error:#}{hint}{remedy}")
}

/// Writes text for people. Errors are ignored: standard error may be closed.
pub(crate) fn to_stderr(text: &str) {
    let _ = io::stderr()
        .lock()
        .write_all(names::shown_lines(text).as_bytes());
}

/// Converts a duration to microseconds with one decimal.
pub(crate) fn micros(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e7).round() / 10.0
}

/// Formats a part of a whole in percent, as `12.3 %`.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    // Page counts are far below 2^52, so f64 is exact.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a percentage with one decimal is shown"
    )]
    let share = part as f64 * 100.0 / whole as f64;
    format!("{share:.1} %")
}

/// Formats how many times smaller `small` is than `large`, as `4.2`.
pub(crate) fn ratio(large: u64, small: u64) -> String {
    if small == 0 {
        return "-".into();
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "a ratio with one decimal is shown"
    )]
    let ratio = large as f64 / small as f64;
    format!("{ratio:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_a_tenth_of_a_microsecond() {
        assert_eq!(micros(Duration::from_nanos(3_749)).to_string(), "3.7");
    }

    #[test]
    fn shares_and_ratios_of_nothing_are_not_numbers() {
        assert_eq!(percent(1, 8), "12.5 %");
        assert_eq!(percent(0, 0), "-");
        assert_eq!(ratio(10, 4), "2.5");
        assert_eq!(ratio(10, 0), "-");
    }
}
