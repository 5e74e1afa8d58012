//! Memory that nobody but its owner can read, not even the kernel.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

use nix::errno::Errno;

/// Creates an empty file of secret memory (`memfd_secret`, Linux 5.14). Fails with ENOSYS where the
/// kernel has none or it is switched off.
pub fn create_secret_memory() -> io::Result<OwnedFd> {
    // SAFETY: the call takes a number, and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel made this descriptor just now, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
