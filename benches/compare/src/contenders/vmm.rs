//! The VMM of a trial, which is the trial's own process: maps memory, opens a userfaultfd and hands
//! both over as Firecracker does, then touches.
//!
//! ```text
//! mmap -> userfaultfd, REGISTER -> connect -> JSON array of the region, with the descriptor
//!      -> touches
//! ```
//!
//! Like Firecracker, the VMM does not wait for an answer; its first touch does.
#![allow(unsafe_code, reason = "a descriptor goes along with bytes")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::region::Region;
use crate::contender::Restored;
use crate::touch::Memory;
use crate::uffd::Uffd;
use crate::{BenchError, PAGE};

pub(crate) struct Vmm {
    region: Region,
    /// Time from the first system call until connecting, and until the memory was handed over.
    connecting: Duration,
    handed_over: Duration,
    /// Both stay open as long as the VM runs.
    _uffd: Uffd,
    _socket: UnixStream,
}

/// Hands `bytes` of memory over to the process that listens at `socket`.
pub(crate) fn start(socket: &Path, bytes: u64) -> Result<Vmm, BenchError> {
    let began = Instant::now();
    let region = Region::anonymous(bytes)?;
    let uffd = Uffd::open_as_vmm()?;
    uffd.register(region.address(), bytes)?;
    let connecting = began.elapsed();
    let named = || format!("{}: handing memory over", socket.display());
    let socket = UnixStream::connect(socket).map_err(BenchError::io(named()))?;
    let message = json!([{
        "base_host_virt_addr": region.address(),
        "size": bytes,
        "offset": 0,
        "page_size": PAGE,
        // The value is in bytes, whatever the name says.
        "page_size_kib": PAGE,
    }]);
    send(&socket, message.to_string().as_bytes(), uffd.as_fd()).map_err(BenchError::io(named()))?;
    Ok(Vmm {
        region,
        connecting,
        handed_over: began.elapsed(),
        _uffd: uffd,
        _socket: socket,
    })
}

/// Sends bytes and a descriptor as one message.
fn send(socket: &UnixStream, bytes: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let number: RawFd = descriptor.as_raw_fd();
    // Aligned like the header of a control message, and larger than one with a descriptor.
    let mut control = [0_u64; 8];
    let mut slice = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all fields are numbers and pointers, for which zero means none.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: it computes a length from a length: 24 bytes of the 64.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as usize;
    // SAFETY: the room holds a header and a descriptor, so the first header lies in it, and the
    // data behind it.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header)
            .cast::<RawFd>()
            .write_unaligned(number);
    }
    const { assert!(size_of::<RawFd>() == 4) };
    // SAFETY: the message points to live bytes and control data, with their lengths; the kernel
    // only reads them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    match usize::try_from(sent) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent < bytes.len() => Err(io::ErrorKind::WriteZero.into()),
        Ok(_) => Ok(()),
    }
}

impl Restored for Vmm {
    fn memory(&self) -> Memory {
        self.region.memory()
    }

    fn complete(&mut self) -> Result<(), BenchError> {
        Err(BenchError::Unavailable(
            "a VMM isn't told when all of its memory is there".into(),
        ))
    }

    fn facts(&self) -> serde_json::Value {
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        json!({
            "connecting_us": micros(self.connecting),
            "handed_over_us": micros(self.handed_over),
        })
    }
}
