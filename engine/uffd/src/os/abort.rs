//! Aborting this process, with the reason on standard error.

use std::io::stderr;
use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

/// How long the line waits for room in standard error, in milliseconds.
const TIMEOUT_MS: u16 = 1000;

/// Aborts this process, because it would read wrong memory or wait for ever if it went on. Writes
/// one line that says why to standard error: not every program has a tracing subscriber.
///
/// The line goes straight to the descriptor. A thread that prints memory under restore holds the
/// lock of `std::io::stderr` while it waits for a page, perhaps for one of the calling thread.
pub fn abort(why: &str) -> ! {
    let why = why.replace(char::is_control, " ");
    let line =
        format!("snaprestore: aborting this process, whose memory cannot be restored: {why}\n");
    let stderr = stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    // Nobody may be reading a pipe that is full. Where polling is not permitted the line is tried.
    if poll(&mut fds, PollTimeout::from(TIMEOUT_MS)) != Ok(0) {
        // Nobody is left to tell that it failed.
        let _ = write(stderr.as_fd(), line.as_bytes());
    }
    tracing::error!(
        why = %why,
        "aborting this process, whose memory cannot be restored"
    );
    std::process::abort()
}
