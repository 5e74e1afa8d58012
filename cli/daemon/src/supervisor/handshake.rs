//! Connections with an incomplete handshake.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use snaprestore_engine::pager::firecracker::{Arriving, Handshake, HandshakeError};
use snaprestore_uffd::os::Peer;
use snaprestore_uffd::uffd::Closing;

/// Maximum number of pending handshakes; further peers wait in the kernel's queue.
pub(crate) const MAX_PENDING: usize = 256;

/// An incomplete handshake.
#[derive(Debug)]
pub(crate) struct PendingHandshake {
    /// The number of the future VM.
    pub(crate) id: u64,
    pub(crate) service: u64,
    pub(crate) peer: Peer,
    stream: UnixStream,
    arriving: Arriving,
    pub(crate) since: Instant,
    timeout: Duration,
}

/// The part of a handshake that has arrived, and the socket, which may hold more.
#[derive(Debug)]
pub(crate) struct UnreadData {
    _stream: UnixStream,
    _arriving: Arriving,
}

impl PendingHandshake {
    pub(crate) fn new(
        id: u64,
        service: u64,
        stream: UnixStream,
        peer: Peer,
        timeout: Duration,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            id,
            service,
            peer,
            stream,
            arriving: Arriving::default(),
            since: Instant::now(),
            timeout,
        })
    }

    pub(crate) fn into_unread(self) -> (Peer, UnreadData) {
        let unread = UnreadData {
            _stream: self.stream,
            _arriving: self.arriving,
        };
        (self.peer, unread)
    }

    /// Reads what has arrived. Returns `None` if the handshake is not complete.
    pub(crate) fn read(&mut self) -> Result<Option<Handshake>, HandshakeError> {
        match self.arriving.receive(self.stream.as_fd()) {
            Err(HandshakeError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(None)
            }
            other => other,
        }
    }

    /// Returns a watch that tells, after this is dropped, whether all descriptors sent by the peer
    /// are closed.
    pub(crate) fn closing(&self) -> Closing {
        self.arriving.closing()
    }

    /// Returns the error for refusing the handshake if it takes too long.
    pub(crate) fn overdue(&self) -> Option<HandshakeError> {
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
