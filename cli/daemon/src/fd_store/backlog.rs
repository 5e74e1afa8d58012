//! Who has connected to a socket that nobody accepts from any more.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use snaprestore_uffd::os::{Peer, kill_by_pidfd, peer_of};

/// How often it is tried again to accept, for want of memory or descriptors.
const TRIES: u32 = 100;

/// Who was ended.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) peer: Peer,
    /// In it lies what they hand over, which must stay open until they have ended.
    pub(crate) stream: UnixStream,
}

/// Ends who has sent something and waits in the queue of `listener`: their memory may lie in it, and nobody will serve that.
/// Of the users `allowed` only, if some are named. Nobody can connect afterwards.
pub(crate) fn end(
    listener: &UnixListener,
    service: &str,
    allowed: &[u32],
    say: impl FnMut(String),
) -> Vec<Queued> {
    let kill = |peer: &Peer| kill_by_pidfd(peer.pidfd.as_fd());
    end_by(kill, listener, service, allowed, say)
}

/// The same, by `kill`.
fn end_by(
    mut kill: impl FnMut(&Peer) -> Result<(), Errno>,
    listener: &UnixListener,
    service: &str,
    allowed: &[u32],
    mut say: impl FnMut(String),
) -> Vec<Queued> {
    let mut ended = Vec::new();
    // What is in the queue already can be accepted all the same.
    let _ = shutdown(listener.as_raw_fd(), Shutdown::Read);
    let _ = listener.set_nonblocking(true);
    let mut failed = 0;
    loop {
        match listener.accept() {
            Ok((stream, _)) => match end_one(&mut kill, stream, allowed) {
                Ok(Some(queued)) => {
                    let pid = queued.peer.pid;
                    say(format!(
                        "process {pid} at service {service}: killed, for nobody takes the memory that it hands over"
                    ));
                    ended.push(queued);
                }
                Ok(None) => {}
                Err(error) => say(format!(
                    "who hands memory over at service {service} can't be killed ({error}), and waits at missing \
                     pages until somebody does"
                )),
            },
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The queue is empty.
            Err(error)
                if [ErrorKind::InvalidInput, ErrorKind::WouldBlock].contains(&error.kind()) =>
            {
                return ended;
            }
            Err(error) if failed == TRIES => {
                say(format!(
                    "who hands memory over at service {service} can't be accepted: {error}"
                ));
                return ended;
            }
            Err(_) => {
                failed += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn end_one(
    kill: &mut impl FnMut(&Peer) -> Result<(), Errno>,
    stream: UnixStream,
    allowed: &[u32],
) -> io::Result<Option<Queued>> {
    let peer = match peer_of(stream.as_fd()) {
        Ok(peer) => peer,
        // It has ended.
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    let is_stranger = !allowed.is_empty() && !allowed.contains(&peer.uid);
    if is_stranger || has_sent_nothing(&stream) {
        return Ok(None);
    }
    match kill(&peer) {
        Ok(()) => Ok(Some(Queued { peer, stream })),
        Err(Errno::ESRCH) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether it has sent nothing, and can't any more: somebody who looked whether a daemon is there, or a VMM that was about
/// to begin, and finds that it can't.
fn has_sent_nothing(stream: &UnixStream) -> bool {
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

    /// Ends the queue without killing anybody: who connects here is this process. How many it would have killed.
    fn killed(listener: &UnixListener, allowed: &[u32]) -> usize {
        let mut killed = 0;
        let kill = |_: &Peer| {
            killed += 1;
            Ok(())
        };
        let ended = end_by(kill, listener, "web", allowed, drop);
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
        assert!(!has_sent_nothing(&here));
        let sent = there.write(b"[").unwrap_err();
        assert_eq!(sent.kind(), ErrorKind::BrokenPipe);
    }
}
