//! A connection with an incomplete handshake.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use snaprestore_engine::pager::firecracker::{Arriving, Handshake, HandshakeError};
use snaprestore_uffd::uffd::PendingClose;

/// An incomplete handshake.
#[derive(Debug)]
pub(super) struct PendingHandshake {
    stream: UnixStream,
    arriving: Arriving,
    since: Instant,
    timeout: Duration,
}

impl PendingHandshake {
    pub(super) fn new(stream: UnixStream, timeout: Duration) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            arriving: Arriving::default(),
            since: Instant::now(),
            timeout,
        })
    }

    /// Reads what has arrived. Returns `None` if the handshake is not complete.
    pub(super) fn read(&mut self) -> Result<Option<Handshake>, HandshakeError> {
        match self.arriving.receive(self.stream.as_fd()) {
            Err(HandshakeError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(None)
            }
            other => other,
        }
    }

    /// Returns a watch that tells, after this is dropped, whether all descriptors sent by the peer
    /// are closed.
    pub(super) fn closing(&self) -> PendingClose {
        self.arriving.closing()
    }

    /// Returns the error for refusing the handshake if it takes too long.
    pub(super) fn overdue(&self) -> Option<HandshakeError> {
        let late = self.since.elapsed() >= self.timeout;
        late.then(|| HandshakeError::Silent {
            received: self.arriving.received(),
            patience: self.timeout,
        })
    }
}

impl AsFd for PendingHandshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
