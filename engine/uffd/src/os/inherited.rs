//! Descriptors inherited from the process that started this one.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;

/// Takes ownership of the descriptor `number`, which was open when this program was started, and
/// sets its close-on-exec flag.
///
/// Refuses standard input, output and error (EINVAL), a number that isn't open (EBADF), and a
/// descriptor that has the flag (EEXIST). Everything that this program opens is close-on-exec, like
/// everything that the standard library opens. Therefore a descriptor without the flag came from
/// outside, nobody here owns it, and it can be taken once.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if number <= libc::STDERR_FILENO {
        return Err(Errno::EINVAL.into());
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the call takes and returns numbers.
    let flags = Errno::result(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(Errno::EEXIST.into());
    }
    // SAFETY: the call takes numbers, and changes only the flag.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and had no close-on-exec flag until now, while everything that this
    // program owns has one; so nobody owns it, and the flag keeps it from being taken twice. If
    // something were opened without the flag by mistake, its owner and this one would both close
    // it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd as _, IntoRawFd as _};

    #[test]
    fn inherited_descriptor_is_taken_once() {
        let own = std::fs::File::open("/dev/null").unwrap();
        let error = |number| take_inherited(number).unwrap_err().raw_os_error();
        assert_eq!(error(own.as_raw_fd()), Some(libc::EEXIST));
        assert_eq!(error(1), Some(libc::EINVAL));
        assert_eq!(error(1_000_000), Some(libc::EBADF));
        let number = own.into_raw_fd();
        // SAFETY: this test owns the number.
        unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
        let taken = take_inherited(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert_eq!(error(number), Some(libc::EEXIST));
    }
}
