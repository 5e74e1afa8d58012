//! Waiting for messages, and being woken for another reason.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::uffd::Userfaultfd;

/// An eventfd: [`signal`](Self::signal) ends the waiting of every thread that waits on it, until it
/// is [cleared](Self::clear).
#[derive(Debug)]
pub struct Wakeup(EventFd);

impl Wakeup {
    /// Not signalled.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    /// Ends the waiting. Never blocks, and signalling twice is the same as once.
    pub fn signal(&self) {
        // EAGAIN means that the counter is at its maximum: it is signalled already. Nothing else
        // can fail on a descriptor that we hold.
        let _ = self.0.write(1);
    }

    /// Back to not signalled; answers whether it was.
    pub fn clear(&self) -> bool {
        self.0.read().is_ok()
    }
}

/// Why waiting ended; none of them after the timeout, or after a signal handler ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Messages can be read.
    pub messages: bool,
    /// The wakeup is signalled.
    pub woken: bool,
}

/// Waits until messages can be read, the wakeup is signalled, or the time is over (`None`: no
/// limit).
///
/// A userfaultfd without `O_NONBLOCK` answers `poll` with an error at once and for ever. The flag
/// can be lost when the open file is shared with another process; then it is set again here, and
/// waiting goes on.
pub fn wait(uffd: &Userfaultfd, wakeup: &Wakeup, timeout: Option<Duration>) -> io::Result<Ready> {
    let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
        // Rounded up, so that a short wait doesn't become a spin.
        let millis = timeout.as_nanos().div_ceil(1_000_000);
        PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
    });
    let mut repaired = false;
    loop {
        let mut fds = [
            PollFd::new(uffd.as_fd(), PollFlags::POLLIN),
            PollFd::new(wakeup.0.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(errno) => return Err(errno.into()),
        }
        let [messages, woken] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        if messages.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL) {
            if repaired {
                return Err(io::Error::other(
                    "poll reports an error on a userfaultfd that is non-blocking",
                ));
            }
            uffd.set_nonblocking()?;
            repaired = true;
            continue;
        }
        return Ok(Ready {
            messages: messages.contains(PollFlags::POLLIN),
            woken: woken.contains(PollFlags::POLLIN),
        });
    }
}
