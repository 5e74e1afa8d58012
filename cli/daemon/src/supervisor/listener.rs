//! Listening sockets.

use std::fs::{remove_file, symlink_metadata};
use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, listen, shutdown, socket,
};
use snapshot_format::names::escape_path;

use crate::api::config::{MetricsAddress, ShareError};
use crate::api::control;
use crate::fd_store::backlog::{self, BacklogPeer};

/// Time limit for the guardian of a dead supervisor to close its sockets.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a daemon can't listen at an address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The socket could not be created or bound.
    #[error("cannot listen on {address}{}", if *.is_taken {
        " (remove the file if no process uses it any more)"
    } else {
        ""
    })]
    Failed {
        /// The path of the socket, escaped, or the address.
        address: String,
        /// Whether there is a file at the path.
        is_taken: bool,
        /// The error of the system call.
        source: io::Error,
    },
    /// The path is that of a file which is not a socket.
    #[error(
        "cannot listen on {path}: the file exists and is not a socket; remove it, or choose another path"
    )]
    NotASocket {
        /// The path, escaped.
        path: String,
    },
    /// Another process listens at the path.
    #[error("cannot listen on {path}: another process listens there")]
    InUse {
        /// The path, escaped.
        path: String,
    },
    /// The socket can't get the group or the mode that the service asks for.
    #[error(transparent)]
    Share(#[from] ShareError),
}

impl ListenError {
    fn failed(address: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Failed {
            address: address.into(),
            is_taken: false,
            source,
        }
    }
}

/// A listening socket. Its name in the file system is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    listener: Listener,
    name: Option<Name>,
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A path with its device and inode, so that no other process's file is removed.
#[derive(Debug)]
struct Name {
    path: PathBuf,
    file: (u64, u64),
}

impl BoundSocket {
    /// Listens on `path`. Nobody can connect before `share` has set the permissions.
    pub(crate) fn bind_with(
        path: &Path,
        share: impl FnOnce() -> Result<(), ShareError>,
    ) -> Result<Self, ListenError> {
        make_room(path)?;
        let bound = || -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            Ok(socket)
        };
        let socket = bound().map_err(|errno| ListenError::Failed {
            address: escape_path(path),
            is_taken: path.exists(),
            source: errno.into(),
        })?;
        // Dropping this removes the socket again if sharing fails.
        let socket = Self::unix(socket.into(), path);
        let socket = socket.map_err(ListenError::failed(escape_path(path)))?;
        share()?;
        listen(&socket, Backlog::MAXCONN)
            .map_err(|errno| ListenError::failed(escape_path(path))(errno.into()))?;
        Ok(socket)
    }

    /// Continues with a socket that an earlier supervisor has stored as `store_id`.
    pub(crate) fn inherit(socket: OwnedFd, store_id: &str) -> Option<(PathBuf, Self)> {
        let listener = UnixListener::from(socket);
        let path = listener.local_addr().ok()?.as_pathname()?.to_owned();
        let mut socket = Self::unix(listener, &path).ok()?;
        if socket.store_id().as_deref() != Some(store_id) {
            socket.name = None;
        }
        Some((path, socket))
    }

    /// Returns the id for storing the socket, by which another supervisor recognizes whether its
    /// path still refers to it. Returns `None` if it doesn't, or there is no path.
    pub(crate) fn store_id(&self) -> Option<String> {
        let Name { path, file } = self.name.as_ref()?;
        let (device, inode) = file;
        (identity(path) == Some(*file)).then(|| format!("socket-{device:x}-{inode:x}"))
    }

    /// Refuses new connections. Waiting ones can still be accepted.
    pub(crate) fn close(&mut self) {
        // A supervisor that inherits the socket must not mistake it for one that accepts
        // connections.
        self.remove_name();
        if let Listener::Unix(listener) = &self.listener {
            let _ = shutdown(listener.as_raw_fd(), Shutdown::Read);
        }
    }

    fn remove_name(&mut self) {
        if let Some(Name { path, file }) = self.name.take()
            && identity(&path) == Some(file)
        {
            // If another process removes it in between, that was intended.
            let _ = remove_file(path);
        }
    }

    /// Kills the peers that have connected and were not accepted, and refuses new connections.
    pub(crate) fn kill_backlog(
        &self,
        service: &str,
        allowed: &[u32],
        say: impl FnMut(String),
    ) -> Vec<BacklogPeer> {
        match &self.listener {
            Listener::Unix(listener) => backlog::kill_peers(listener, service, allowed, say),
            Listener::Tcp(_) => Vec::new(),
        }
    }

    /// Listens for connections of this user and root only.
    pub(crate) fn private(path: &Path) -> Result<Self, ListenError> {
        make_room(path)?;
        let socket = control::listen_at(path).and_then(|listener| Self::unix(listener, path));
        socket.map_err(ListenError::failed(escape_path(path)))
    }

    /// Listens for clients that read metrics.
    pub(crate) fn metrics(address: &MetricsAddress) -> Result<Self, ListenError> {
        match address {
            MetricsAddress::Socket(path) => Self::bind_with(path, || Ok(())),
            MetricsAddress::Loopback(address) => {
                let listener = TcpListener::bind(address)
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                    .map_err(ListenError::failed(address.to_string()))?;
                Ok(Self {
                    listener: Listener::Tcp(listener),
                    name: None,
                })
            }
        }
    }

    fn unix(listener: UnixListener, path: &Path) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let name = identity(path).map(|file| Name {
            path: path.to_owned(),
            file,
        });
        Ok(Self {
            listener: Listener::Unix(listener),
            name,
        })
    }

    /// Accepts the next connection. Returns `None` if nobody waits.
    pub(crate) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let accepted = match &self.listener {
            Listener::Unix(listener) => listener.accept().map(|(stream, _)| stream.into()),
            Listener::Tcp(listener) => listener.accept().map(|(stream, _)| stream.into()),
        };
        match accepted {
            Ok(stream) => Ok(Some(stream)),
            // The second error is that of a closed socket.
            Err(error)
                if [ErrorKind::WouldBlock, ErrorKind::InvalidInput].contains(&error.kind()) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for BoundSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.listener {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        self.remove_name();
    }
}

/// Removes a socket that nobody listens on, left by a killed server. A guardian may need a moment
/// to close it.
fn make_room(path: &Path) -> Result<(), ListenError> {
    let began = Instant::now();
    // The probe is of another socket type, which tells whether the socket is in use without a
    // connection that somebody has to accept.
    let probe = UnixDatagram::unbound().map_err(ListenError::failed(escape_path(path)))?;
    loop {
        match probe.connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                // This error occurs for any file that can't be connected to, whatever its type.
                if symlink_metadata(path).is_ok_and(|file| !file.file_type().is_socket()) {
                    return Err(ListenError::NotASocket {
                        path: escape_path(path),
                    });
                }
                let _ = remove_file(path);
                return Ok(());
            }
            Err(error) if error.raw_os_error() != Some(Errno::EPROTOTYPE as i32) => return Ok(()),
            _ if began.elapsed() >= RELEASE_TIMEOUT => {
                return Err(ListenError::InUse {
                    path: escape_path(path),
                });
            }
            _ => std::thread::sleep(RELEASE_TIMEOUT / 100),
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
