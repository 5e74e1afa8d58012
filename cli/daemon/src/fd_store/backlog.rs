//! Peers in the backlog of a socket that nobody accepts from any more.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use snaprestore_uffd::os::{Peer, kill_by_pidfd, peer_of};

use crate::policy::{ACCEPT_RETRIES, Counter};

/// Pause before accept is retried when memory or descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// A peer that was killed.
#[derive(Debug)]
pub(crate) struct BacklogPeer {
    pub(crate) peer: Peer,
    /// The connection, which may hold its memory: it must stay open until the peer has exited.
    pub(crate) stream: UnixStream,
}

/// Kills the peers in the backlog of `listener` that have sent data: it may contain their memory,
/// which nobody will serve. If `allowed` names users, peers of other users are spared. Nobody can
/// connect afterwards.
pub(crate) fn kill_peers(
    listener: &UnixListener,
    service: &str,
    allowed: &[u32],
    say: impl FnMut(String),
) -> Vec<BacklogPeer> {
    let kill = |peer: &Peer| kill_by_pidfd(peer.pidfd.as_fd());
    kill_peers_with(kill, listener, service, allowed, say)
}

/// Implements [`kill_peers`]; kills with `kill`.
fn kill_peers_with(
    mut kill: impl FnMut(&Peer) -> Result<(), Errno>,
    listener: &UnixListener,
    service: &str,
    allowed: &[u32],
    mut say: impl FnMut(String),
) -> Vec<BacklogPeer> {
    let mut killed = Vec::new();
    // Connections in the backlog can still be accepted.
    let _ = shutdown(listener.as_raw_fd(), Shutdown::Read);
    let _ = listener.set_nonblocking(true);
    let mut failed = Counter::default();
    loop {
        match listener.accept() {
            Ok((stream, _)) => match kill_peer(&mut kill, stream, allowed) {
                Ok(Some(peer)) => {
                    let pid = peer.peer.pid;
                    say(format!(
                        "process {pid} at service {service}: killed: no daemon accepts its memory"
                    ));
                    killed.push(peer);
                }
                Ok(None) => {}
                Err(error) => say(format!(
                    "cannot kill a VMM that waits at service {service} ({error}): it blocks at missing \
                     pages until it is killed"
                )),
            },
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The backlog is empty.
            Err(error)
                if [ErrorKind::InvalidInput, ErrorKind::WouldBlock].contains(&error.kind()) =>
            {
                return killed;
            }
            Err(error) if !failed.admit(&ACCEPT_RETRIES, Instant::now()) => {
                say(format!(
                    "cannot accept a VMM that waits at service {service}: {error}"
                ));
                return killed;
            }
            Err(_) => std::thread::sleep(ACCEPT_PAUSE),
        }
    }
}

fn kill_peer(
    kill: &mut impl FnMut(&Peer) -> Result<(), Errno>,
    stream: UnixStream,
    allowed: &[u32],
) -> io::Result<Option<BacklogPeer>> {
    let peer = match peer_of(stream.as_fd()) {
        Ok(peer) => peer,
        // The peer has exited.
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    let is_stranger = !allowed.is_empty() && !allowed.contains(&peer.uid);
    if is_stranger || shut_down_and_check_empty(&stream) {
        return Ok(None);
    }
    match kill(&peer) {
        Ok(()) => Ok(Some(BacklogPeer { peer, stream })),
        Err(Errno::ESRCH) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Shuts the connection down for reading, and returns whether the peer has sent nothing. Such a
/// peer only checked whether a daemon is there, or is a VMM about to begin that now gets an error.
fn shut_down_and_check_empty(stream: &UnixStream) -> bool {
    // The peer's further writes fail; what it has already sent can still be read.
    let _ = shutdown(stream.as_raw_fd(), Shutdown::Read);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags) == Ok(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Returns a listener, its path, and the folder that it is in.
    fn listener() -> (UnixListener, std::path::PathBuf, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        (UnixListener::bind(&path).unwrap(), path, folder)
    }

    /// Returns the number of peers that would be killed. Kills none, since the peer is this
    /// process.
    fn killed(listener: &UnixListener, allowed: &[u32]) -> usize {
        let mut killed = 0;
        let kill = |_: &Peer| {
            killed += 1;
            Ok(())
        };
        let ended = kill_peers_with(kill, listener, "web", allowed, drop);
        assert_eq!(ended.len(), killed);
        killed
    }

    #[test]
    fn backlog_peer_without_data_is_not_killed() {
        let (listener, path, _folder) = listener();
        let mut waits = UnixStream::connect(&path).unwrap();
        drop(UnixStream::connect(&path).unwrap());
        assert_eq!(killed(&listener, &[]), 0);
        let sent = waits.write(b"[").unwrap_err();
        assert_eq!(sent.kind(), ErrorKind::BrokenPipe);
        UnixStream::connect(&path).unwrap_err();
    }

    #[test]
    fn backlog_peer_of_an_allowed_user_is_killed() {
        let own = nix::unistd::geteuid().as_raw();
        for (allowed, expected) in [(&[][..], 1), (&[own], 1), (&[own + 1], 0)] {
            let (listener, path, _folder) = listener();
            let mut peer = UnixStream::connect(&path).unwrap();
            peer.write_all(b"[").unwrap();
            assert_eq!(killed(&listener, allowed), expected, "{allowed:?}");
        }
    }

    #[test]
    fn data_sent_before_shutdown_is_found() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(b"[").unwrap();
        assert!(!shut_down_and_check_empty(&here));
        let sent = there.write(b"[").unwrap_err();
        assert_eq!(sent.kind(), ErrorKind::BrokenPipe);
    }
}
