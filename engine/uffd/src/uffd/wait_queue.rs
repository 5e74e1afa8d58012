//! Waits for messages, or for a wake-up for another reason.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::userfaultfd::Userfaultfd;

/// Epoll data of the userfaultfd. The next two are those of the eventfd and of the owner's pidfd.
const MESSAGES: u64 = 0;
const WOKEN: u64 = 1;
const OWNER: u64 = 2;

/// Number of threads that one message wakes. The scheduler puts the first on an idle core, which
/// takes 45-60 us in a virtual machine, and the second on the core of the faulting thread, which
/// takes 6. The thread that runs first reads the message.
const WOKEN_AT_ONCE: usize = 2;

/// A wait queue for the messages of one userfaultfd.
///
/// Any number of threads may wait, in two rows, each with an epoll of its own. A message wakes one
/// thread of each row, the one that came last. It does so only once (edge-triggered): a woken
/// thread must read until nothing is left, or [wake](Self::wake) another. A message that arrives
/// while no thread of a row waits ends the row's next wait. With `poll`, every message would wake
/// every thread.
#[derive(Debug)]
pub struct WaitQueue {
    rows: [Row; WOKEN_AT_ONCE],
    wakeup: EventFd,
}

#[derive(Debug)]
struct Row {
    epoll: Epoll,
    /// Number of threads that wait, or are about to.
    len: AtomicUsize,
}

/// The reasons why a wait ended. None is set after the timeout, or after a signal handler ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Whether messages can be read, or could a moment ago.
    pub messages: bool,
    /// Whether [`WaitQueue::wake`] was called.
    pub woken: bool,
    /// Whether the process of [`WaitQueue::watch`] has exited.
    pub owner_gone: bool,
}

impl WaitQueue {
    /// Creates a wait queue for the messages of `uffd`.
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

    /// Makes the exit of the process behind `pidfd` wake one thread of each row, or end the row's
    /// next wait.
    pub fn watch(&self, pidfd: BorrowedFd<'_>) -> io::Result<()> {
        for row in &self.rows {
            row.epoll.add(pidfd, edge(OWNER))?;
        }
        Ok(())
    }

    /// Wakes one thread of each row, or ends the row's next wait. Never blocks.
    pub fn wake(&self) {
        // Every write is an edge, so the counter is never read, and 2^64 writes don't happen.
        // Nothing else can fail on a descriptor that we hold.
        let _ = self.wakeup.write(1);
    }

    /// Waits until messages can be read, [`wake`](Self::wake) is called, the watched process exits,
    /// or the time is over (`None`: no limit).
    ///
    /// Epoll reports an error for a userfaultfd without `O_NONBLOCK`, and no messages. Another
    /// process that shares the open file can clear the flag. This method then sets it again, and
    /// returns as if there were messages.
    /// `uffd` must be the one for which this queue was created.
    pub fn wait(&self, uffd: &Userfaultfd, timeout: Option<Duration>) -> io::Result<Readiness> {
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
            Err(Errno::EINTR) => return Ok(Readiness::default()),
            Err(errno) => return Err(errno.into()),
        };
        let mut ready = Readiness::default();
        for event in &events[..count] {
            match event.data() {
                WOKEN => ready.woken = true,
                OWNER => ready.owner_gone = true,
                _ => {}
            }
            if event.data() != MESSAGES {
                continue;
            }
            // An error says nothing about messages: a read will tell.
            ready.messages = true;
            if event.events().contains(EpollFlags::EPOLLERR) {
                uffd.set_nonblocking()?;
                // From now on, pending and new messages are edges.
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
