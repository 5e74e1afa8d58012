//! Outcomes along the fault path.
//!
//! | step | outcome |
//! | --- | --- |
//! | look up | [`Lookup`] or [`InstallError`] |
//! | load | whether this thread installed the page, or [`LoadError`] |
//! | install | [`Installed`] of the kernel, or [`InstallError`] |
//! | failure policy, resolve | [`FaultOutcome`] |
//!
//! [`Installed`]: crate::session::platform::Installed

use std::fmt;
use std::ops::Range;

use crate::session::failure::Failure;
use crate::session::platform::PageNumber;
use crate::session::stats::FaultKind;

/// The result of looking up the page of a fault.
pub(crate) enum Lookup {
    /// The fault was answered: the state of the page required no load.
    Answered {
        kind: FaultKind,
        /// The page that is there, unless the fault means that it was discarded.
        present: Option<PageNumber>,
    },
    /// The page must be loaded.
    Absent {
        /// The page, or all pages of the large page that contains it.
        pages: Range<PageNumber>,
        large: bool,
    },
}

/// The reason why a page was not loaded.
pub(crate) enum LoadError {
    /// Its content is unavailable.
    Content(Failure),
    /// The page could not be installed.
    Install(InstallError),
}

impl From<Failure> for LoadError {
    fn from(failure: Failure) -> Self {
        Self::Content(failure)
    }
}

impl From<InstallError> for LoadError {
    fn from(error: InstallError) -> Self {
        Self::Install(error)
    }
}

/// The reason why an attempt to install failed, or why it was given up after many retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InstallError {
    /// The mappings are changing: an event must be read first. Retried for some seconds.
    Changing,
    /// The kernel had no memory. Retried for a while.
    NoMemory {
        /// Whether the memory is needed for a large page.
        large: bool,
    },
    /// The owner is gone.
    OwnerGone,
    /// The kernel refused with this errno.
    Refused(i32),
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Changing => f.write_str("the owner's mappings kept changing without an event"),
            Self::NoMemory { large: true } => f.write_str(
                "no free page in the pool hugepages-2048kB; raise vm.nr_hugepages, or hugetlb.2MB.max of the owner's \
                 cgroup",
            ),
            Self::NoMemory { large: false } => f.write_str(
                "out of memory; the machine or the owner's cgroup (memory.max) is at its limit",
            ),
            Self::OwnerGone => f.write_str("the owner of the memory has exited"),
            Self::Refused(errno) => {
                let error = std::io::Error::from_raw_os_error(*errno);
                write!(f, "the kernel refused to install it: {error}")
            }
        }
    }
}

/// The outcome of serving a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultOutcome {
    /// The fault was answered.
    Resolved,
    /// The fault is served again after a pause, or the guard keeps it and later has it served again
    /// or poisoned.
    Deferred,
    /// The fault is not answered: the owner is gone or being killed, or the session is ending. Or
    /// another fault for the same address is pending, and its answer covers this one.
    Dropped,
}

/// The outcome of a prefetch, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prefetched {
    /// Pages that this thread loaded, including those that came with them.
    pub(crate) loaded: u64,
    /// Pages left absent because another thread was loading them. Try them again.
    pub(crate) busy: u64,
    /// Pages left absent because there was no memory for the first of them.
    pub(crate) no_memory: u64,
    /// Pages left absent because the first of them could not be read, although it may be later.
    pub(crate) unread: u64,
    /// After `unread`: the first of the untried pages that may be in another frame. Otherwise the
    /// first page that is left because the call was told not to continue.
    pub(crate) rest: Option<PageNumber>,
    /// Pages left absent because they can't be restored, which was reported.
    pub(crate) failed: u64,
    /// Whether the kernel refused to install a page, which was reported. Don't continue.
    pub(crate) refused: bool,
}

impl Prefetched {
    /// Adds the outcome of another call.
    pub(crate) fn add(&mut self, other: Self) {
        self.loaded += other.loaded;
        self.busy += other.busy;
        self.no_memory += other.no_memory;
        self.unread += other.unread;
        self.failed += other.failed;
    }
}
