//! Connections whose handshake has not come as a whole.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use snaprestore_engine::pager::firecracker::{Arriving, Handshake, HandshakeError};
use snaprestore_uffd::os::Peer;
use snaprestore_uffd::uffd::Closing;

/// The most of them at once; who connects then waits in the kernel's queue.
pub(crate) const MOST: usize = 256;

/// One that is being waited for.
#[derive(Debug)]
pub(crate) struct Pending {
    /// The number of the VM that it becomes.
    pub(crate) id: u64,
    pub(crate) service: u64,
    pub(crate) peer: Peer,
    stream: UnixStream,
    arriving: Arriving,
    pub(crate) since: Instant,
    patience: Duration,
}

/// What came of a handshake, and what may still lie in the socket.
#[derive(Debug)]
pub(crate) struct Unheard {
    _stream: UnixStream,
    _arriving: Arriving,
}

impl Pending {
    pub(crate) fn new(
        id: u64,
        service: u64,
        stream: UnixStream,
        peer: Peer,
        patience: Duration,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            id,
            service,
            peer,
            stream,
            arriving: Arriving::default(),
            since: Instant::now(),
            patience,
        })
    }

    pub(crate) fn into_unheard(self) -> (Peer, Unheard) {
        let unheard = Unheard {
            _stream: self.stream,
            _arriving: self.arriving,
        };
        (self.peer, unheard)
    }

    /// Reads what has come. `None`: more has to come.
    pub(crate) fn read(&mut self) -> Result<Option<Handshake>, HandshakeError> {
        match self.arriving.receive(self.stream.as_fd()) {
            Err(HandshakeError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(None)
            }
            other => other,
        }
    }

    /// What tells, after this was dropped, whether all that it had sent is closed.
    pub(crate) fn closing(&self) -> Closing {
        self.arriving.closing()
    }

    /// What it is refused for if it has taken too long.
    pub(crate) fn overdue(&self) -> Option<HandshakeError> {
        let late = self.since.elapsed() >= self.patience;
        late.then(|| HandshakeError::Silent {
            received: self.arriving.received(),
            patience: self.patience,
        })
    }
}

impl AsFd for Pending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
