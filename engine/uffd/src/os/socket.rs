//! Unix sockets: descriptors that come with bytes, and the identity of the peer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};

use super::process::open_pidfd;

/// Maximum number of descriptors in one message. The kernel drops those beyond it.
const DESCRIPTORS: usize = 8;

/// The result of one read from a socket.
#[derive(Debug)]
pub struct Received {
    /// Number of bytes read into the buffer; 0 at the end.
    pub bytes: usize,
    /// Descriptors that came with the bytes, set to close-on-exec.
    pub descriptors: Vec<OwnedFd>,
    /// Whether there were more descriptors than there is room for, or than this process may open.
    pub truncated: bool,
}

/// Reads once from the connected Unix socket `socket`.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    // Aligned like a control message header.
    let mut control = [0_u64; 16];
    let mut slice = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let data = DESCRIPTORS * size_of::<RawFd>();
    // SAFETY: the call computes a length from a length.
    let room = unsafe { libc::CMSG_SPACE(u32::try_from(data).unwrap_or(0)) };
    debug_assert!(room as usize <= size_of_val(&control));
    // SAFETY: all fields are numbers and pointers, for which zero means none.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = room as usize;
    // SAFETY: the message points to a live buffer and to live, aligned room for control messages,
    // with their lengths.
    let bytes =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let bytes = Errno::result(bytes)?;
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has written whole control messages into the room, with their lengths;
    // these functions step from one to the next within `msg_controllen`.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: it is not null, so it is a whole header within the room.
        let found = unsafe { header.read() };
        if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: the calls compute a length, and an address after the header.
            let (empty, data) = unsafe { (libc::CMSG_LEN(0), libc::CMSG_DATA(header)) };
            let count = (found.cmsg_len - empty as usize) / size_of::<RawFd>();
            for index in 0..count {
                let mut number: RawFd = -1;
                let size = size_of::<RawFd>();
                // SAFETY: the data is `count` descriptors, which may be unaligned; one is copied
                // into a local variable.
                unsafe {
                    let from = data.add(index * size);
                    from.copy_to_nonoverlapping((&raw mut number).cast(), size);
                }
                // SAFETY: the kernel has just created it for this message, so nobody else owns it.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: as for the first header.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(Received {
        bytes: usize::try_from(bytes).unwrap_or(0),
        descriptors,
        truncated: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// The peer process of a socket.
#[derive(Debug)]
pub struct Peer {
    /// Its PID when it connected.
    pub pid: u32,
    /// The user ID of the process.
    pub uid: u32,
    /// A pidfd of the process.
    pub pidfd: OwnedFd,
}

/// Returns the PID and the user ID of the process that connected the Unix socket `socket`.
pub fn credentials_of(socket: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
    let pid = u32::try_from(credentials.pid()).map_err(|_| Errno::ESRCH)?;
    Ok((pid, credentials.uid()))
}

/// Returns the process that connected the Unix socket `socket`.
///
/// Linux 6.5 provides a pidfd of that very process. Before, the process is looked up by its PID,
/// which may have been reused meanwhile if the process has exited.
pub fn peer_of(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    let (pid, uid) = credentials_of(socket)?;
    let pidfd = match peer_pidfd(socket) {
        Ok(pidfd) => pidfd,
        Err(Errno::ENOPROTOOPT) => open_pidfd(pid)?,
        Err(errno) => return Err(errno.into()),
    };
    Ok(Peer { pid, uid, pidfd })
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
    // SAFETY: the kernel has just created this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
