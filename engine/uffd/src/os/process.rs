//! Other processes, by descriptors that keep referring to the same process when its PID is reused.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;

use crate::page_size;

/// Opens a pidfd of the process `pid`, which polls as readable when the process has exited (Linux
/// 5.3).
pub fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers, and touches none of our memory.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just created this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills the process behind `pidfd` (Linux 5.1). Fails with ESRCH if it has exited.
pub fn kill_by_pidfd(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    signal(pidfd, libc::SIGKILL)
}

/// Checks that this process may kill the one behind `pidfd`: EPERM if not, ESRCH if it has exited.
pub fn may_kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    signal(pidfd, 0)
}

fn signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the call takes numbers, and a null pointer where one is allowed; it touches none of
    // our memory.
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

/// Returns the PID of the process behind `pidfd`. Fails with ESRCH if it has exited.
pub fn pid_of(pidfd: BorrowedFd<'_>) -> io::Result<u32> {
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = about.lines().find_map(|line| line.strip_prefix("Pid:"));
    let pid = pid.and_then(|pid| pid.trim().parse().ok());
    pid.ok_or_else(|| Errno::ESRCH.into())
}

/// Opens the page map of the process behind `pidfd`, for the handover of a pager: its holder can
/// see which of the process's pages are present, without the permission that opening it requires.
///
/// That permission is the one that a debugger needs: the same user, or `CAP_SYS_PTRACE`. Fails with
/// ESRCH if the process has exited.
pub fn open_page_map(pidfd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let file = open_by_pid(pidfd, |pid| File::open(format!("/proc/{pid}/pagemap")))?;
    Ok(file.into())
}

/// Returns what `open` opens for the PID of the process behind `pidfd`. Fails with ESRCH if the PID
/// may have been reused meanwhile.
fn open_by_pid(
    pidfd: BorrowedFd<'_>,
    open: impl FnOnce(u32) -> io::Result<File>,
) -> io::Result<File> {
    let file = open(pid_of(pidfd)?);
    // If the process has not exited by now, the PID was still its own when the file was opened.
    may_kill(pidfd)?;
    file
}

/// The page table of another process, as far as `/proc` shows it: whether a page is present.
#[derive(Debug)]
pub struct PageMap {
    file: File,
}

impl PageMap {
    /// Creates a page map from a file opened by [`open_page_map`].
    pub fn new(file: OwnedFd) -> Self {
        Self { file: file.into() }
    }

    /// Returns whether there is a page at `address`, in memory or in swap.
    pub fn has(&self, address: u64) -> io::Result<bool> {
        const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
        let mut entry = [0; 8];
        self.file
            .read_exact_at(&mut entry, address / page_size() * 8)?;
        #[expect(clippy::host_endian_bytes, reason = "this machine's kernel makes it")]
        let entry = u64::from_ne_bytes(entry);
        Ok(entry & PRESENT_OR_SWAPPED != 0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::memory::Mapping;

    #[test]
    fn page_map_shows_present_pages() {
        let own = open_pidfd(std::process::id()).unwrap();
        let map = PageMap::new(open_page_map(own.as_fd()).unwrap());
        let memory = Mapping::new(4 * page_size()).unwrap();
        // SAFETY: the page is in the mapping, which is this test's alone.
        unsafe {
            memory
                .as_ptr()
                .add(crate::to_usize(page_size()))
                .write_volatile(1);
        };
        let there = (0..3).map(|i| map.has(memory.address() + i * page_size()).unwrap());
        assert_eq!(there.collect::<Vec<_>>(), [false, true, false]);
    }

    /// The process exits after its PID was read, and another process gets the PID before the page
    /// map is opened: here the test process itself.
    #[test]
    fn page_map_of_a_reused_pid_is_refused() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pidfd = open_pidfd(child.id()).unwrap();
        // A zombie still has its PID.
        let error = open_by_pid(pidfd.as_fd(), |pid| {
            assert_eq!(pid, child.id());
            child.wait()?;
            File::open("/proc/self/pagemap")
        })
        .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn exited_process_has_no_page_map() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pidfd = open_pidfd(child.id()).unwrap();
        child.wait().unwrap();
        let error = open_page_map(pidfd.as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
