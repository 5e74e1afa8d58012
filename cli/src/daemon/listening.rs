//! Sockets that are listened on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// A listening socket, whose name is removed when it is dropped.
#[derive(Debug)]
pub(super) struct Listening {
    listener: UnixListener,
    path: PathBuf,
    /// The name's device and inode, so that nobody else's is removed.
    file: Option<(u64, u64)>,
}

impl Listening {
    /// Listens at `path`, where nobody may.
    pub(super) fn bind(path: &Path) -> Result<Self> {
        let name = path.display();
        match UnixStream::connect(path) {
            Ok(_) => bail!("{name}: another process serves there"),
            // A socket that nobody listens at is left of a server that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(path);
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).with_context(|| {
            let hint = if path.exists() {
                "; remove it if nothing serves there any more"
            } else {
                ""
            };
            format!("{name}: can't be listened on{hint}")
        })?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            file: identity(path),
        })
    }

    /// The next connection. `None`: nobody waits.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if self.file.is_some() && identity(&self.path) == self.file {
            // Who has removed it meanwhile meant that.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}
