//! Endpoints: the sockets for operators and for readers of metrics.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use super::listener::{BoundSocket, ListenError};
use crate::api::config::MetricsAddress;
use crate::ipc::Endpoint;

/// The endpoints of a daemon.
#[derive(Debug, Default)]
pub(super) struct Endpoints {
    sockets: Vec<(Endpoint, BoundSocket)>,
}

impl Endpoints {
    /// Listens for clients at `address`.
    pub(super) fn open(
        &mut self,
        endpoint: Endpoint,
        address: &MetricsAddress,
    ) -> Result<(), ListenError> {
        let socket = match (endpoint, address) {
            (Endpoint::Control, MetricsAddress::Socket(path)) => BoundSocket::private(path)?,
            _ => BoundSocket::metrics(address)?,
        };
        self.sockets.push((endpoint, socket));
        Ok(())
    }

    /// Returns the sockets, by number.
    pub(super) fn sockets(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let sockets = self.sockets.iter().enumerate();
        sockets.map(|(at, (_, socket))| (at, socket.as_fd()))
    }

    /// Accepts a client at socket number `at`. Returns `None` if nobody waits.
    pub(super) fn accept(&self, at: usize) -> io::Result<Option<(Endpoint, OwnedFd)>> {
        let Some((endpoint, socket)) = self.sockets.get(at) else {
            return Ok(None);
        };
        let client = socket.accept()?;
        Ok(client.map(|client| (*endpoint, client)))
    }
}
