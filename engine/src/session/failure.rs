//! Failure of a page whose content is unavailable, and the policies for it.

use std::fmt;
use std::sync::Arc;

/// A page that can't be restored, and the reason.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The file that was read.
    pub file: String,
    /// The offset in the file, in bytes; `None` if no frame or index block is to blame.
    pub offset: Option<u64>,
    /// The page that was wanted.
    pub page: u64,
    /// The page's address in the owner, if known.
    pub address: Option<u64>,
    /// The kind of failure.
    pub kind: FailureKind,
    /// A human-readable description of the failure.
    pub detail: String,
}

/// The kind of a [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureKind {
    /// The file is damaged: its content fails a check.
    Damaged,
    /// The file could not be read, even with retries until the retry timeout.
    Io,
    /// The page could not be read when the snapshot was taken.
    Unavailable,
    /// The kernel refused to install the page.
    Install,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: page {}", self.file, self.page)?;
        if let Some(address) = self.address {
            write!(f, " (address {address:#x})")?;
        }
        if let Some(offset) = self.offset {
            write!(f, ", at offset {offset}")?;
        }
        write!(f, ": {}", self.detail)
    }
}

/// A callback's decision about a failed page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureDecision {
    /// Retry the read after a pause: 1 ms after the first failure, doubled after each further one,
    /// and at most half a second.
    Retry,
    /// Poison the page.
    Poison,
    /// Kill the owner.
    Abort,
}

/// The action taken when a touched page can't be restored. The page never reads as zeros, and the
/// touching thread never waits forever.
#[derive(Clone)]
pub enum FailurePolicy {
    /// Poison the page: an instruction that touches it gets SIGBUS, a system call EFAULT. Meant for
    /// memory that only user code touches; under KVM, poison can read as zeros.
    Poison,
    /// Kill the process. Meant for the memory of a VM.
    Abort,
    /// Ask the callback, on a thread of its own, while the fault waits. It is called once per page,
    /// however many threads wait for the page, and again only if the page was retried and still
    /// can't be loaded.
    Ask(Arc<dyn Fn(&Failure) -> FailureDecision + Send + Sync>),
}

impl fmt::Debug for FailurePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Poison => "Poison",
            Self::Abort => "Abort",
            Self::Ask(_) => "Ask",
        })
    }
}
