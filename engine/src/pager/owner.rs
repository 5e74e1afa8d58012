//! The process that owns the memory, and its end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::session::{Failure, Fault, FaultOutcome, Guard};
use snaprestore_uffd::os::kill_by_pidfd;

/// The action taken when a page that the owner waits for can't be restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Kill the owner while it waits. Meant for the memory of a VM: under KVM emulation, any other
    /// outcome of the touch can read as zeros.
    #[default]
    Kill,
    /// Poison the page: an instruction that touches it gets SIGBUS, a system call EFAULT. Meant for
    /// owners that are not VMs.
    Poison,
}

/// An owner, identified by its pidfd.
#[derive(Debug)]
pub(super) struct Owner {
    pidfd: OwnedFd,
    /// The reason why it was killed, if it was.
    killed: Mutex<Option<String>>,
    gone: AtomicBool,
}

impl Owner {
    pub(super) fn new(pidfd: OwnedFd) -> Self {
        Self {
            pidfd,
            killed: Mutex::default(),
            gone: AtomicBool::new(false),
        }
    }

    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Returns the reason why it was killed, if it was.
    pub(super) fn killed(&self) -> Option<String> {
        let killed = self.killed.lock();
        killed.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Kills the owner. Its memory must not be served wrongly, and it must not wait forever.
    pub(super) fn kill(&self, why: &str) {
        let mut killed = self.killed.lock().unwrap_or_else(PoisonError::into_inner);
        if killed.is_some() {
            return;
        }
        match kill_by_pidfd(self.pidfd()) {
            Ok(()) => {
                // `Paged::ending` returns the reason.
                tracing::debug!(why, "killed the owner of the memory");
                *killed = Some(why.to_owned());
            }
            Err(Errno::ESRCH) => tracing::debug!(why, "the owner has already exited"),
            // This was permitted when the session began. The owner is left waiting: nobody answers
            // its faults, and the descriptor stays open.
            Err(errno) => tracing::error!(why, %errno, "cannot kill the owner of the memory"),
        }
    }

    /// Returns whether it has exited.
    pub(super) fn is_gone(&self) -> bool {
        if self.gone.load(Relaxed) {
            return true;
        }
        let gone = self.poll(PollTimeout::ZERO);
        self.gone.store(gone, Relaxed);
        gone
    }

    /// Waits until it has exited.
    pub(super) fn wait_gone(&self) {
        while !self.is_gone() {
            self.poll(PollTimeout::NONE);
        }
    }

    fn poll(&self, timeout: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.pidfd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, timeout), Ok(1..))
    }
}

/// The failure policy of a session for another process.
pub(super) struct OwnerGuard {
    pub(super) owner: Arc<Owner>,
    pub(super) on_error: OnError,
}

impl Guard for OwnerGuard {
    fn decide(&self, _: Fault, failure: &Failure) -> Option<FaultOutcome> {
        match self.on_error {
            OnError::Poison => None,
            OnError::Kill => {
                self.owner.kill(&failure.to_string());
                // Nobody answers the fault: the waiting process is about to be gone.
                Some(FaultOutcome::Dropped)
            }
        }
    }

    fn pending_decision(&self, _: Fault, _: u64) -> Option<FaultOutcome> {
        None
    }

    fn kill_owner(&self, why: &str) {
        self.owner.kill(why);
    }

    fn logs_kills(&self) -> bool {
        self.on_error == OnError::Kill
    }
}
