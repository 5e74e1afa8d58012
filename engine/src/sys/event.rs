//! Waiting for messages, and being woken for another reason.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::uffd::Userfaultfd;

/// What the messages of the userfaultfd and of the eventfd are told apart by.
const MESSAGES: u64 = 0;
const WOKEN: u64 = 1;

/// What threads wait on for the messages of one userfaultfd.
///
/// Any number of threads may wait. What arrives ends the waiting of one of them, the one that came
/// last, and does so once (epoll, edge-triggered): who returns has to read until nothing is left,
/// or [wake](Self::wake) another. What arrives while nobody waits ends the next waiting. With
/// `poll` every message would wake every thread.
#[derive(Debug)]
pub struct Waiting {
    epoll: Epoll,
    wakeup: EventFd,
}

/// Why waiting ended; none of them after the timeout, or after a signal handler ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Messages can be read, or could a moment ago.
    pub messages: bool,
    /// [`Waiting::wake`] was called.
    pub woken: bool,
}

impl Waiting {
    /// For the messages of `uffd`.
    pub fn new(uffd: &Userfaultfd) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wakeup = EventFd::from_value_and_flags(0, flags)?;
        epoll.add(uffd.as_fd(), edge(MESSAGES))?;
        epoll.add(wakeup.as_fd(), edge(WOKEN))?;
        Ok(Self { epoll, wakeup })
    }

    /// Ends the waiting of one thread, or the next. Never blocks.
    pub fn wake(&self) {
        // Every write is an edge, so the counter is never read, and 2^64 writes don't happen.
        // Nothing else can fail on a descriptor that we hold.
        let _ = self.wakeup.write(1);
    }

    /// Waits until messages can be read, somebody calls [`Waiting::wake`], or the time is over
    /// (`None`: no limit).
    ///
    /// A userfaultfd without `O_NONBLOCK` reports an error for ever. The flag can be lost when the
    /// open file is shared with another process; then it is set again here, and waiting goes on.
    /// `uffd` is the one that this was made for.
    pub fn wait(&self, uffd: &Userfaultfd, timeout: Option<Duration>) -> io::Result<Ready> {
        let timeout = timeout.map_or(EpollTimeout::NONE, |timeout| {
            // Rounded up, so that a short wait doesn't become a spin.
            let millis = timeout.as_nanos().div_ceil(1_000_000);
            EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::MAX)
        });
        let mut events = [EpollEvent::empty(); 2];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(errno) => return Err(errno.into()),
        };
        let mut ready = Ready::default();
        for event in &events[..count] {
            if event.data() == WOKEN {
                ready.woken = true;
                continue;
            }
            // With an error nothing is known of messages: whoever reads will see.
            ready.messages = true;
            if event.events().contains(EpollFlags::EPOLLERR) {
                uffd.set_nonblocking()?;
                // What can be read, or comes, is an edge from now on.
                self.epoll.modify(uffd.as_fd(), &mut edge(MESSAGES))?;
            }
        }
        Ok(ready)
    }
}

fn edge(data: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, data)
}
