//! Other processes, by descriptors that go on meaning the same process when its id is used again.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// A pidfd of the process `pid`, which polls as readable when the process has ended (Linux 5.3).
pub fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers, and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel made this descriptor just now, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills the process behind `pidfd` (Linux 5.1). ESRCH: it has ended.
pub fn kill_by_pidfd(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    signal(pidfd, libc::SIGKILL)
}

/// Whether the process behind `pidfd` may be killed: EPERM if not, ESRCH if it has ended.
pub fn may_kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    signal(pidfd, 0)
}

fn signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the call takes numbers, and a null pointer where it may stand; it touches no memory of
    // ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            no_info,
            0,
        )
    };
    Errno::result(result).map(drop)
}
