//! Sockets that are listened on.

use std::fs::{remove_file, symlink_metadata};
use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, listen, shutdown, socket,
};

use crate::api::config::MetricsAddress;
use crate::api::control;
use crate::fd_store::backlog::{self, Queued};
use snapshot_format::names::escape_path;

/// How long the guardian of a keeper that has died may have its sockets.
const LETTING_GO: Duration = Duration::from_secs(2);

/// A listening socket; the name that it has in the file system is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Listening {
    listener: Listener,
    name: Option<Name>,
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A path, and the device and inode that it had: nobody else's is removed.
#[derive(Debug)]
struct Name {
    path: PathBuf,
    file: (u64, u64),
}

impl Listening {
    /// Listens at `path`, where nobody may, for whoever may connect. Nobody can before `share` has set who.
    pub(crate) fn bind_with(path: &Path, share: impl FnOnce() -> Result<()>) -> Result<Self> {
        make_room(path)?;
        let bound = || -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            Ok(socket)
        };
        let socket = bound().with_context(|| {
            let hint = if path.exists() {
                "; remove it if nothing serves there any more"
            } else {
                ""
            };
            format!("{}: can't be listened on{hint}", escape_path(path))
        })?;
        // Removes the socket again if it can't be shared as wanted.
        let listening = Self::unix(socket.into(), path)?;
        share()?;
        listen(&listening, Backlog::MAXCONN)
            .with_context(|| format!("{}: can't be listened on", escape_path(path)))?;
        Ok(listening)
    }

    /// Goes on listening at a socket that an earlier keeper made, if its path is `path` and still means it; `held_as`
    /// is what that one had it held as.
    pub(crate) fn inherit(socket: OwnedFd, held_as: &str) -> Option<(PathBuf, Self)> {
        let listener = UnixListener::from(socket);
        let path = listener.local_addr().ok()?.as_pathname()?.to_owned();
        let mut listening = Self::unix(listener, &path).ok()?;
        if listening.held_as().as_deref() != Some(held_as) {
            listening.name = None;
        }
        Some((path, listening))
    }

    /// What it is to be held as, so that another keeper knows whether its path still means it; none if it doesn't, or
    /// if it has none.
    pub(crate) fn held_as(&self) -> Option<String> {
        let Name { path, file } = self.name.as_ref()?;
        let (device, inode) = file;
        (identity(path) == Some(*file)).then(|| format!("socket-{device:x}-{inode:x}"))
    }

    /// Nobody can connect any more; who has already can be accepted.
    pub(crate) fn close(&mut self) {
        // A keeper that goes on with the socket must not take it for one at which others come.
        self.remove_name();
        if let Listener::Unix(listener) = &self.listener {
            let _ = shutdown(listener.as_raw_fd(), Shutdown::Read);
        }
    }

    fn remove_name(&mut self) {
        if let Some(Name { path, file }) = self.name.take()
            && identity(&path) == Some(file)
        {
            // Who has removed it meanwhile meant that.
            let _ = remove_file(path);
        }
    }

    /// Ends who has connected and was not accepted; nobody can connect any more.
    pub(crate) fn end_queue(
        &self,
        service: &str,
        allowed: &[u32],
        say: impl FnMut(String),
    ) -> Vec<Queued> {
        match &self.listener {
            Listener::Unix(listener) => backlog::end(listener, service, allowed, say),
            Listener::Tcp(_) => Vec::new(),
        }
    }

    /// Listens for this user and root only.
    pub(crate) fn private(path: &Path) -> Result<Self> {
        make_room(path)?;
        Self::unix(control::listen_at(path)?, path)
    }

    /// Listens for who reads metrics.
    pub(crate) fn metrics(address: &MetricsAddress) -> Result<Self> {
        match address {
            MetricsAddress::Socket(path) => Self::bind_with(path, || Ok(())),
            MetricsAddress::Loopback(address) => {
                let listener = TcpListener::bind(address)
                    .with_context(|| format!("{address}: can't be listened on"))?;
                listener.set_nonblocking(true)?;
                Ok(Self {
                    listener: Listener::Tcp(listener),
                    name: None,
                })
            }
        }
    }

    fn unix(listener: UnixListener, path: &Path) -> Result<Self> {
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

    /// The next connection. `None`: nobody waits.
    pub(crate) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let accepted = match &self.listener {
            Listener::Unix(listener) => listener.accept().map(|(stream, _)| stream.into()),
            Listener::Tcp(listener) => listener.accept().map(|(stream, _)| stream.into()),
        };
        match accepted {
            Ok(stream) => Ok(Some(stream)),
            // The other of one that is closed.
            Err(error)
                if [ErrorKind::WouldBlock, ErrorKind::InvalidInput].contains(&error.kind()) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.listener {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.remove_name();
    }
}

/// Removes a socket that nobody listens at: it is left of a server that was killed. A guardian may need a moment to
/// let go of it.
fn make_room(path: &Path) -> Result<()> {
    let began = Instant::now();
    // Of another kind, so that it is found out whether somebody has the socket, and nobody has to accept this.
    let probe = UnixDatagram::unbound()?;
    loop {
        match probe.connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                // So it is for every file that can't be connected to, which may be anything.
                if symlink_metadata(path).is_ok_and(|file| !file.file_type().is_socket()) {
                    bail!(
                        "{}: can't be listened on, for a file that is no socket lies there; name another path, \
                         or remove it",
                        escape_path(path)
                    );
                }
                let _ = remove_file(path);
                return Ok(());
            }
            Err(error) if error.raw_os_error() != Some(Errno::EPROTOTYPE as i32) => return Ok(()),
            _ if began.elapsed() >= LETTING_GO => {
                bail!("{}: another process serves there", escape_path(path))
            }
            _ => std::thread::sleep(LETTING_GO / 100),
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
