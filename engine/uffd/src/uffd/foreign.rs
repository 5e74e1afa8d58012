//! Descriptors from another process, identified without trusting the sender.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::Builder;

use super::{abi, ioctls};
use crate::os::SignalsBlocked;

/// The kernel's name for a userfaultfd.
pub(super) const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// Returns the kernel's name for the open file, without any request to whatever is behind it.
pub(super) fn kind_of(fd: BorrowedFd<'_>) -> io::Result<OsString> {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.into_os_string())
}

/// Returns whether `fd` is a userfaultfd.
pub fn is_userfaultfd(fd: BorrowedFd<'_>) -> bool {
    kind_of(fd).is_ok_and(|kind| kind == USERFAULTFD)
}

/// Untrusted descriptors that another process has sent.
///
/// Closing one can depend on another process: a file system that is a program (FUSE) is notified
/// and need not answer; for a userfaultfd, the kernel locks the memory of its process. The closing
/// thread then waits and can't be killed, and neither can its process. Therefore a separate thread
/// closes them. A process that takes many must check how many of these threads are still running:
/// [`Untrusted::closing`].
#[derive(Debug, Default)]
pub struct Untrusted {
    descriptors: Vec<OwnedFd>,
    open: Arc<()>,
}

/// A handle that tells whether dropped descriptors are closed.
#[derive(Clone, Debug)]
pub struct PendingClose(Weak<()>);

impl PendingClose {
    /// Returns whether the descriptors are not closed yet, or not even dropped.
    pub fn is_open(&self) -> bool {
        self.0.strong_count() > 0
    }
}

/// Dropped descriptors that no thread has begun to close.
static DROPPED: Mutex<Vec<(Vec<OwnedFd>, Arc<()>)>> = Mutex::new(Vec::new());

impl Untrusted {
    /// Adds more descriptors.
    pub fn extend(&mut self, descriptors: Vec<OwnedFd>) {
        self.descriptors.extend(descriptors);
    }

    /// Returns the number of descriptors.
    pub fn count(&self) -> usize {
        self.descriptors.len()
    }

    /// Returns a handle that tells, after the drop, whether all are closed.
    pub fn closing(&self) -> PendingClose {
        PendingClose(Arc::downgrade(&self.open))
    }

    /// Returns the first descriptor if it is a userfaultfd. Otherwise the error is its kernel name,
    /// or `None` if there is no descriptor.
    pub fn userfaultfd(&self) -> Result<BorrowedFd<'_>, Option<String>> {
        let first = self.descriptors.first().ok_or(None)?;
        match kind_of(first.as_fd()) {
            Ok(kind) if kind == USERFAULTFD => Ok(first.as_fd()),
            Ok(kind) => Err(Some(kind.to_string_lossy().into_owned())),
            Err(error) => Err(Some(error.to_string())),
        }
    }

    /// Removes and returns the first descriptor, which is to be kept.
    pub fn take_first(&mut self) -> Option<OwnedFd> {
        (!self.descriptors.is_empty()).then(|| self.descriptors.remove(0))
    }
}

impl Drop for Untrusted {
    fn drop(&mut self) {
        if self.descriptors.is_empty() {
            return;
        }
        let descriptors = std::mem::take(&mut self.descriptors);
        let dropped = || DROPPED.lock().unwrap_or_else(PoisonError::into_inner);
        dropped().push((descriptors, Arc::clone(&self.open)));
        // A signal should go to a thread that can act on it.
        let _blocked = SignalsBlocked::now();
        let closing = Builder::new()
            .name("snap-close".into())
            .stack_size(64 << 10);
        // If no thread can be started, better leave them open until the next attempt than block
        // this thread forever.
        let _ = closing.spawn(move || {
            loop {
                let next = dropped().pop();
                let Some((descriptors, _open)) = next else {
                    return;
                };
                drop(descriptors);
            }
        });
    }
}

/// Returns whether `fd` is a userfaultfd that reports forks, or that nobody has negotiated yet, so
/// that it can still be made to report them.
///
/// The kernel puts the userfaultfd of each child into the descriptor table of the process that
/// reads the fork message. A reader that dies at any instant can't know whether it had taken that
/// descriptor, so the descriptor stays there. A process that also serves others must therefore
/// refuse such a userfaultfd. Returns `false` as well if `/proc` doesn't show the features.
pub fn may_report_forks(fd: BorrowedFd<'_>) -> bool {
    if !is_userfaultfd(fd) {
        return false;
    }
    // Negotiated features never change, so negotiation is checked before they are read.
    let mut nowhere = abi::uffdio_range {
        start: 1 << 32,
        len: crate::page_size(),
    };
    // SAFETY: `nowhere` is a live uffdio_range that the kernel only reads, and waking touches no
    // memory.
    if unsafe { ioctls::wake(fd.as_raw_fd(), &raw mut nowhere) }.is_err() {
        return true;
    }
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
    let features = about.ok().and_then(|about| features_in(&about));
    features.is_some_and(|features| features & abi::UFFD_FEATURE_EVENT_FORK != 0)
}

/// Returns the enabled features from the text of `/proc` about a userfaultfd.
fn features_in(about: &str) -> Option<u64> {
    let line = about.lines().find_map(|line| line.strip_prefix("API:"))?;
    let features = line.trim().split(':').nth(1)?;
    u64::from_str_radix(features, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, pipe};
    use std::os::fd::AsFd as _;

    use snaprestore_fixtures::host::skipped;

    use super::*;
    use crate::uffd::{Features, OpenOptions};

    #[test]
    fn fork_reporting_descriptors_are_detected() {
        let (pipe, _) = pipe().unwrap();
        assert!(!may_report_forks(pipe.as_fd()));
        let plain = match OpenOptions::new().wanted(Features::EVENTS).open() {
            Ok(plain) => plain,
            Err(why) => return skipped("fork_reporting_descriptors_are_detected", &why),
        };
        assert!(!may_report_forks(plain.as_fd()));
        // Fork events require a privilege.
        let forks = OpenOptions::new()
            .wanted(Features::EVENT_FORK)
            .open()
            .unwrap();
        let reports = forks.features().contains(Features::EVENT_FORK);
        assert_eq!(may_report_forks(forks.as_fd()), reports);
    }

    #[test]
    fn dropped_descriptor_is_closed_by_another_thread() {
        let (mut pipe, end) = pipe().unwrap();
        let mut untrusted = Untrusted::default();
        untrusted.extend(vec![end.into()]);
        let closing = untrusted.closing();
        assert!(closing.is_open());
        drop(untrusted);
        assert_eq!(pipe.read(&mut [0]).unwrap(), 0);
        while closing.is_open() {
            std::thread::yield_now();
        }
        let none = Untrusted::default();
        let closing = none.closing();
        drop(none);
        assert!(!closing.is_open());
    }

    #[test]
    fn features_are_parsed_from_fdinfo() {
        let about =
            "pos:\t0\nflags:\t00\npending:\t0\ntotal:\t1\nAPI:\taa:8000000a:80000000000001ff\n";
        assert_eq!(features_in(about), Some(0x8000_000a));
        assert_eq!(features_in("pos:\t0\n"), None);
    }
}
