//! What happens to a page whose content can't be had.

use std::fmt;
use std::sync::Arc;

/// A page that can't be restored, and why.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The file that was read.
    pub file: String,
    /// Where in it, in bytes; `None` if no frame or index block is to blame.
    pub offset: Option<u64>,
    /// The page that was wanted.
    pub page: u64,
    /// Its address in the owner, if it was known.
    pub address: Option<u64>,
    /// What is wrong.
    pub kind: FailureKind,
    /// What went wrong, in words.
    pub detail: String,
}

/// The sort of a [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureKind {
    /// The file is damaged: what it holds doesn't pass its checks.
    Damaged,
    /// The file could not be read, nor when it was read again until the retry timeout was over.
    Io,
    /// The page could not be read when the snapshot was taken.
    Unavailable,
    /// The kernel would not install the page.
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

/// What a callback decides about a failed page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureDecision {
    /// Try to read it again, after a pause: 1 ms after the first failure, twice as long each further
    /// time, and at most half a second.
    Retry,
    /// Poison it.
    Poison,
    /// End the owner.
    Abort,
}

/// What is done when a touched page can't be restored. It is never left to read as zeros, and the
/// toucher never waits for ever.
#[derive(Clone)]
pub enum FailurePolicy {
    /// The page is poisoned: an instruction that touches it gets SIGBUS, a system call EFAULT. For
    /// memory that only user code touches; under KVM poison can read as zeros.
    Poison,
    /// The process is ended. For the memory of a VM.
    Abort,
    /// The callback decides, on a thread of its own, while the fault waits. It is asked once about
    /// a page, however many wait for it, and again only if the page was tried again and still can't
    /// be had.
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
