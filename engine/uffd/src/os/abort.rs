//! Aborting this process, with the reason on standard error.

use std::io::stderr;
use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

/// Maximum time in milliseconds that the line waits for room in standard error.
const TIMEOUT_MS: u16 = 1000;

/// Aborts this process, because it would read wrong memory or wait forever if it continued. Writes
/// one line with the reason to standard error, because not every program has a tracing subscriber.
///
/// The line goes straight to the descriptor. A thread that prints memory under restore holds the
/// lock of `std::io::stderr` while it waits for a page, perhaps for one that the calling thread
/// should serve.
pub fn abort(why: &str) -> ! {
    let why = why.replace(char::is_control, " ");
    let line =
        format!("snaprestore: aborting this process, whose memory cannot be restored: {why}\n");
    let stderr = stderr();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    // Nobody may be reading a pipe that is full. If polling is not permitted, the write is tried
    // anyway.
    if poll(&mut fds, PollTimeout::from(TIMEOUT_MS)) != Ok(0) {
        // Nobody is left to receive an error.
        let _ = write(stderr.as_fd(), line.as_bytes());
    }
    tracing::error!(
        why = %why,
        "aborting this process, whose memory cannot be restored"
    );
    std::process::abort()
}
