//! Waiting for messages, and being woken for another reason.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::userfaultfd::Userfaultfd;

/// What the messages of the userfaultfd and of the eventfd are told apart by.
const MESSAGES: u64 = 0;
const WOKEN: u64 = 1;
const OWNER: u64 = 2;

/// Threads whose waiting one message ends. The scheduler puts the first on a core that is idle,
/// which takes it 45-60 us in a virtual machine, and the second on the core of the thread that
/// faulted, which takes 6.
const WOKEN_AT_ONCE: usize = 2;

/// What threads wait on for the messages of one userfaultfd.
///
/// Any number of threads may wait, in two rows. What arrives ends the waiting of one thread of each
/// row, the one that came last, and does so once (epoll, edge-triggered): who returns has to read
/// until nothing is left, or [wake](Self::wake) another. What arrives while nobody of a row waits
/// ends its next waiting. With `poll` every message would wake every thread.
#[derive(Debug)]
pub struct Waiting {
    rows: [Row; WOKEN_AT_ONCE],
    wakeup: EventFd,
}

#[derive(Debug)]
struct Row {
    epoll: Epoll,
    /// Threads that wait, or are about to.
    len: AtomicUsize,
}

/// Why waiting ended; none of them after the timeout, or after a signal handler ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Messages can be read, or could a moment ago.
    pub messages: bool,
    /// [`Waiting::wake`] was called.
    pub woken: bool,
    /// The process of [`Waiting::watch`] has ended.
    pub owner_gone: bool,
}

impl Waiting {
    /// For the messages of `uffd`, a userfaultfd.
    pub fn new(uffd: &Userfaultfd) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wakeup = EventFd::from_value_and_flags(0, flags)?;
        let row = || -> io::Result<Row> {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            epoll.add(uffd.as_fd(), edge(MESSAGES))?;
            epoll.add(wakeup.as_fd(), edge(WOKEN))?;
            let len = AtomicUsize::new(0);
            Ok(Row { epoll, len })
        };
        let rows = [row()?, row()?];
        Ok(Self { rows, wakeup })
    }

    /// Ends the waiting of one thread of each row, or its next, when the process behind `pidfd` has
    /// ended.
    pub fn watch(&self, pidfd: BorrowedFd<'_>) -> io::Result<()> {
        for row in &self.rows {
            row.epoll.add(pidfd, edge(OWNER))?;
        }
        Ok(())
    }

    /// Ends the waiting of one thread of each row, or its next. Never blocks.
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
        let shortest = self.rows.iter().min_by_key(|row| row.len.load(Relaxed));
        let row = shortest.unwrap_or(&self.rows[0]);
        row.len.fetch_add(1, Relaxed);
        let mut events = [EpollEvent::empty(); 3];
        let waited = row.epoll.wait(&mut events, timeout);
        row.len.fetch_sub(1, Relaxed);
        let count = match waited {
            Ok(count) => count,
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(errno) => return Err(errno.into()),
        };
        let mut ready = Ready::default();
        for event in &events[..count] {
            match event.data() {
                WOKEN => ready.woken = true,
                OWNER => ready.owner_gone = true,
                _ => {}
            }
            if event.data() != MESSAGES {
                continue;
            }
            // With an error nothing is known of messages: whoever reads will see.
            ready.messages = true;
            if event.events().contains(EpollFlags::EPOLLERR) {
                uffd.set_nonblocking()?;
                // What can be read, or comes, is an edge from now on.
                for row in &self.rows {
                    row.epoll.modify(uffd.as_fd(), &mut edge(MESSAGES))?;
                }
            }
        }
        Ok(ready)
    }
}

fn edge(data: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, data)
}
