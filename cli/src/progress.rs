//! A bar on a terminal, and nothing elsewhere. A job in the background leaves the terminal to the one
//! in the foreground.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::unistd::{getpgrp, tcgetpgrp};

use crate::output::Output;

/// Shows how far a command is.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Whether it may ever be drawn.
    wanted: bool,
    /// Whether it is drawn now.
    drawn: AtomicBool,
}

impl Progress {
    /// A bar over `total` bytes, or a counter if the total isn't known.
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

    /// Draws from now on if this is a job in the foreground, and no more otherwise.
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

    /// For a total that is known only later.
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

/// Whether standard error is a terminal that this job may draw on. A terminal that doesn't control
/// jobs is open to all.
fn is_in_foreground() -> bool {
    tcgetpgrp(io::stderr()).map_or(true, |group| group == getpgrp())
}
