//! Unix sockets: descriptors that come with bytes, and who is on the other end.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sockopt};

use super::process::open_pidfd;

/// The most descriptors that one message can carry (`SCM_MAX_FD`).
const MOST_DESCRIPTORS: usize = 253;

/// What one read from a socket gave.
#[derive(Debug)]
pub struct Received {
    /// Bytes read into the buffer; 0 at the end.
    pub bytes: usize,
    /// Descriptors that came along, closed on exec.
    pub descriptors: Vec<OwnedFd>,
}

/// Reads once from the connected Unix socket `socket`.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut slices = [IoSliceMut::new(buffer)];
    let mut room = nix::cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut room),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    // There is room for all that the kernel sends at once.
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel made these descriptors for this message just now, so nobody else
            // owns them.
            let owned = numbers
                .iter()
                .map(|number| unsafe { OwnedFd::from_raw_fd(*number) });
            descriptors.extend(owned);
        }
    }
    Ok(Received {
        bytes: message.bytes,
        descriptors,
    })
}

/// A process at the other end of a socket.
#[derive(Debug)]
pub struct Peer {
    /// Its id when it connected.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// A descriptor of it.
    pub pidfd: OwnedFd,
}

/// Who connected the Unix socket `socket`.
///
/// Linux 6.5 gives a pidfd of that very process. Before, its id is looked up, and may in the meantime
/// have become another's if the process has ended.
pub fn peer_of(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    let credentials = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)?;
    let pid = u32::try_from(credentials.pid()).map_err(|_| Errno::ESRCH)?;
    let pidfd = match peer_pidfd(socket) {
        Ok(pidfd) => pidfd,
        Err(Errno::ENOPROTOOPT) => open_pidfd(pid)?,
        Err(errno) => return Err(errno.into()),
    };
    Ok(Peer {
        pid,
        uid: credentials.uid(),
        pidfd,
    })
}

fn peer_pidfd(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mut fd: libc::c_int = -1;
    let mut len = libc::socklen_t::try_from(size_of_val(&fd)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both pointers are to live values, and `len` is the size of the first.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    Errno::result(result)?;
    // SAFETY: the kernel made this descriptor just now, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
