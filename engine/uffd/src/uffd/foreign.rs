//! What a descriptor is that came from another process, found without trusting whoever sent it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::Builder;

use super::{abi, ioctls};
use crate::os::SignalsBlocked;

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
/// answer; of a userfaultfd the memory is locked. The thread that closes waits then, can't be ended, and no more can its
/// process. So they are closed by a thread of their own, and whoever takes many has to look how many of those are
/// still at it: [`Untrusted::closing`].
#[derive(Debug, Default)]
pub struct Untrusted {
    descriptors: Vec<OwnedFd>,
    open: Arc<()>,
}

/// Tells whether descriptors that were dropped are closed.
#[derive(Clone, Debug)]
pub struct Closing(Weak<()>);

impl Closing {
    /// Whether they are not, or are not even dropped.
    pub fn is_open(&self) -> bool {
        self.0.strong_count() > 0
    }
}

/// What has been dropped and no thread has begun to close.
static DROPPED: Mutex<Vec<(Vec<OwnedFd>, Arc<()>)>> = Mutex::new(Vec::new());

impl Untrusted {
    /// Takes more of them.
    pub fn extend(&mut self, descriptors: Vec<OwnedFd>) {
        self.descriptors.extend(descriptors);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.descriptors.len()
    }

    /// What tells afterwards whether all are closed.
    pub fn closing(&self) -> Closing {
        Closing(Arc::downgrade(&self.open))
    }

    /// The first, if it is a userfaultfd. Else says what it is, or nothing if there is none.
    pub fn userfaultfd(&self) -> Result<BorrowedFd<'_>, Option<String>> {
        let first = self.descriptors.first().ok_or(None)?;
        match kind_of(first.as_fd()) {
            Ok(kind) if kind == USERFAULTFD => Ok(first.as_fd()),
            Ok(kind) => Err(Some(kind.to_string_lossy().into_owned())),
            Err(error) => Err(Some(error.to_string())),
        }
    }

    /// Takes the first, which is to be kept.
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
        // A signal is for a thread that can act on it.
        let _blocked = SignalsBlocked::now();
        let closing = Builder::new()
            .name("snap-close".into())
            .stack_size(64 << 10);
        // Better open until the next can begin than a thread that waits for ever.
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
        len: crate::page_size(),
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
    use std::io::{Read as _, pipe};
    use std::os::fd::AsFd as _;

    use snaprestore_fixtures::host::skipped;

    use super::*;
    use crate::uffd::{Features, OpenOptions};

    #[test]
    fn who_may_report_forks_is_known() {
        let (pipe, _) = pipe().unwrap();
        assert!(!may_report_forks(pipe.as_fd()));
        let plain = match OpenOptions::new().wanted(Features::EVENTS).open() {
            Ok(plain) => plain,
            Err(why) => return skipped("who_may_report_forks_is_known", &why),
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
    fn what_is_dropped_is_closed_by_another_thread() {
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
    fn features_are_found_in_what_the_kernel_says() {
        let about =
            "pos:\t0\nflags:\t00\npending:\t0\ntotal:\t1\nAPI:\taa:8000000a:80000000000001ff\n";
        assert_eq!(features_in(about), Some(0x8000_000a));
        assert_eq!(features_in("pos:\t0\n"), None);
    }
}
