//! What a descriptor is that came from another process, found without trusting whoever sent it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use super::thread::SignalsBlocked;
use super::{abi, ioctls};

/// What the kernel calls a userfaultfd.
pub(super) const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// What the kernel calls the open file. Nothing is asked of whatever is behind it.
pub(super) fn kind_of(fd: BorrowedFd<'_>) -> io::Result<OsString> {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.into_os_string())
}

/// Whether `fd` is a userfaultfd.
pub fn is_userfaultfd(fd: BorrowedFd<'_>) -> bool {
    kind_of(fd).is_ok_and(|kind| kind == USERFAULTFD)
}

/// Descriptors that another process has sent, and of which nothing is known.
///
/// To close one can ask whoever is behind it: a file system that is a program (FUSE) is told, and need not
/// answer. The thread that closes waits then, can't be ended, and no more can its process. So those that are no
/// userfaultfds are closed by a thread of their own.
#[derive(Debug, Default)]
pub struct Untrusted(Vec<OwnedFd>);

impl Untrusted {
    /// Takes more of them.
    pub fn extend(&mut self, descriptors: Vec<OwnedFd>) {
        self.0.extend(descriptors);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Takes the first if it is a userfaultfd. Else says what it is, or nothing if there is none.
    pub fn take_userfaultfd(&mut self) -> Result<OwnedFd, Option<String>> {
        let first = self.0.first().ok_or(None)?;
        match kind_of(first.as_fd()) {
            Ok(kind) if kind == USERFAULTFD => Ok(self.0.remove(0)),
            Ok(kind) => Err(Some(kind.to_string_lossy().into_owned())),
            Err(error) => Err(Some(error.to_string())),
        }
    }
}

impl Drop for Untrusted {
    fn drop(&mut self) {
        let others = self.0.drain(..).filter(|fd| !is_userfaultfd(fd.as_fd()));
        let others: Vec<OwnedFd> = others.collect();
        if others.is_empty() {
            return;
        }
        let others = Arc::new(Mutex::new(others));
        let take = |others: &Mutex<Vec<OwnedFd>>| {
            std::mem::take(&mut *others.lock().unwrap_or_else(PoisonError::into_inner))
        };
        let theirs = Arc::clone(&others);
        // A signal is for a thread that can act on it.
        let _blocked = SignalsBlocked::now();
        let closing = Builder::new()
            .name("snap-close".into())
            .stack_size(64 << 10);
        if closing.spawn(move || drop(take(&theirs))).is_err() {
            // Better open for ever than a thread that waits for ever.
            std::mem::forget(take(&others));
        }
    }
}

/// Whether `fd` is a userfaultfd that reports forks, or with which nobody has negotiated yet, so that it can
/// still be made to.
///
/// The kernel puts the userfaultfd of each child into the table of whoever reads of the fork. A reader that dies at
/// any instant can't know whether it had taken it from there, so it stays there: to be refused by who
/// serves others as well. False too where `/proc` doesn't tell.
pub fn may_report_forks(fd: BorrowedFd<'_>) -> bool {
    if !is_userfaultfd(fd) {
        return false;
    }
    // What has been negotiated stays so: this comes before the look.
    let mut nowhere = abi::uffdio_range {
        start: 1 << 32,
        len: super::page_size(),
    };
    // SAFETY: `nowhere` is a live uffdio_range that the kernel only reads, and waking touches no memory.
    if unsafe { ioctls::wake(fd.as_raw_fd(), &raw mut nowhere) }.is_err() {
        return true;
    }
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
    let features = about.ok().and_then(|about| features_in(&about));
    features.is_some_and(|features| features & abi::UFFD_FEATURE_EVENT_FORK != 0)
}

/// The features that are on, of what `/proc` says of a userfaultfd.
fn features_in(about: &str) -> Option<u64> {
    let line = about.lines().find_map(|line| line.strip_prefix("API:"))?;
    let features = line.trim().split(':').nth(1)?;
    u64::from_str_radix(features, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::io::pipe;
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::sys::{Features, OpenOptions};

    #[test]
    fn who_may_report_forks_is_known() {
        let (pipe, _) = pipe().unwrap();
        assert!(!may_report_forks(pipe.as_fd()));
        let Ok(plain) = OpenOptions::new().wanted(Features::EVENTS).open() else {
            return;
        };
        assert!(!may_report_forks(plain.as_fd()));
        // That takes a privilege.
        let forks = OpenOptions::new()
            .wanted(Features::EVENT_FORK)
            .open()
            .unwrap();
        let reports = forks.features().contains(Features::EVENT_FORK);
        assert_eq!(may_report_forks(forks.as_fd()), reports);
    }

    #[test]
    fn features_are_found_in_what_the_kernel_says() {
        let about =
            "pos:\t0\nflags:\t00\npending:\t0\ntotal:\t1\nAPI:\taa:8000000a:80000000000001ff\n";
        assert_eq!(features_in(about), Some(0x8000_000a));
        assert_eq!(features_in("pos:\t0\n"), None);
    }
}
