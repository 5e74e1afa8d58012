//! A progress bar on a terminal, and nothing elsewhere. A background job leaves the terminal to the
//! foreground job.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::unistd::{getpgrp, tcgetpgrp};

use crate::output::Output;

/// A progress bar of a command.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Whether the bar may ever be drawn.
    wanted: bool,
    /// Whether the bar is currently drawn.
    drawn: AtomicBool,
}

impl Progress {
    /// Returns a bar over `total` bytes, or a counter if the total isn't known.
    pub(crate) fn bytes(output: Output, what: &'static str, total: Option<u64>) -> Self {
        if !output.shows_progress() {
            return Self {
                bar: ProgressBar::hidden(),
                wanted: false,
                drawn: AtomicBool::new(false),
            };
        }
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{msg} [{bar:40}] {binary_bytes} / {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
            ),
            None => (
                ProgressBar::no_length(),
                "{msg} {spinner} {binary_bytes}, {binary_bytes_per_sec}",
            ),
        };
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        Self {
            bar: bar.with_style(style).with_message(what),
            wanted: true,
            drawn: AtomicBool::new(true),
        }
    }

    /// Shows the bar if this is a foreground job, and hides it otherwise.
    fn follow_job(&self) {
        if !self.wanted {
            return;
        }
        let draws = is_in_foreground();
        if self.drawn.swap(draws, Ordering::Relaxed) != draws {
            self.bar.set_draw_target(if draws {
                ProgressDrawTarget::stderr()
            } else {
                ProgressDrawTarget::hidden()
            });
        }
    }

    pub(crate) fn advance(&self, bytes: u64) {
        self.follow_job();
        self.bar.inc(bytes);
    }

    /// Sets a total that becomes known only later.
    pub(crate) fn set_total(&self, bytes: u64) {
        if self.bar.length() != Some(bytes) {
            self.follow_job();
            self.bar.set_length(bytes);
        }
    }

    pub(crate) fn set(&self, bytes: u64) {
        self.follow_job();
        self.bar.set_position(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.follow_job();
        self.bar.finish_and_clear();
    }
}

/// Returns whether standard error is a terminal that this job may draw on. Any job may draw on a
/// terminal without job control.
fn is_in_foreground() -> bool {
    tcgetpgrp(io::stderr()).map_or(true, |group| group == getpgrp())
}
