//! Peers that have connected to a socket from which nobody accepts any more.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use snaprestore_uffd::os::{Peer, kill_by_pidfd, peer_of};

/// Retries of accept for want of memory or descriptors.
const ACCEPT_RETRIES: u32 = 100;

/// A peer that was killed.
#[derive(Debug)]
pub(crate) struct BacklogPeer {
    pub(crate) peer: Peer,
    /// The connection, in which its memory may lie: it must stay open until the peer has exited.
    pub(crate) stream: UnixStream,
}

/// Kills the peers that have sent something and wait in the queue of `listener`: their memory may
/// lie in it, and nobody will serve that. If `allowed` names users, peers of others are spared.
/// Nobody can connect afterwards.
pub(crate) fn kill_peers(
    listener: &UnixListener,
    service: &str,
    allowed: &[u32],
    say: impl FnMut(String),
) -> Vec<BacklogPeer> {
    let kill = |peer: &Peer| kill_by_pidfd(peer.pidfd.as_fd());
    kill_peers_with(kill, listener, service, allowed, say)
}

/// Does the work of [`kill_peers`], by `kill`.
fn kill_peers_with(
    mut kill: impl FnMut(&Peer) -> Result<(), Errno>,
    listener: &UnixListener,
    service: &str,
    allowed: &[u32],
    mut say: impl FnMut(String),
) -> Vec<BacklogPeer> {
    let mut killed = Vec::new();
    // What is in the queue already can be accepted all the same.
    let _ = shutdown(listener.as_raw_fd(), Shutdown::Read);
    let _ = listener.set_nonblocking(true);
    let mut failed = 0;
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
            // The queue is empty.
            Err(error)
                if [ErrorKind::InvalidInput, ErrorKind::WouldBlock].contains(&error.kind()) =>
            {
                return killed;
            }
            Err(error) if failed == ACCEPT_RETRIES => {
                say(format!(
                    "cannot accept a VMM that waits at service {service}: {error}"
                ));
                return killed;
            }
            Err(_) => {
                failed += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
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
        // It has ended.
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

/// Shuts the connection down for reading, and returns whether the peer has sent nothing: it only
/// looked whether a daemon is there, or is a VMM that was about to begin, and finds that it can't.
fn shut_down_and_check_empty(stream: &UnixStream) -> bool {
    // What it sends from now on fails; what it has sent can still be read.
    let _ = shutdown(stream.as_raw_fd(), Shutdown::Read);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags) == Ok(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A listener, its path, and the folder that it is in.
    fn listener() -> (UnixListener, std::path::PathBuf, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        (UnixListener::bind(&path).unwrap(), path, folder)
    }

    /// Returns how many peers would be killed. Kills nobody: the peer is this process.
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
    fn what_was_sent_before_is_found_and_nothing_can_follow() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(b"[").unwrap();
        assert!(!shut_down_and_check_empty(&here));
        let sent = there.write(b"[").unwrap_err();
        assert_eq!(sent.kind(), ErrorKind::BrokenPipe);
    }
}
