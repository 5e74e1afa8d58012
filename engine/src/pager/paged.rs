//! Attaching to an owner, and the session that follows.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use snapshot_format::{ReadError, Snapshot};

use super::handover::{self, Handover, HandoverError, OwnerRegion};
use super::owner::{OnError, Owner, OwnerGuard};
use crate::running::{Crew, Prefetch, Running, Stats, ThreadError, Threads, crew_options};
use crate::session::{Failure, Kernel, Session, SnapshotImage, State};
use crate::sys::{AdoptError, Features, Ioctls, Userfaultfd, may_kill};

/// How the memory of an owner is served, being described.
#[must_use = "nothing happens before `attach`"]
pub struct Pager {
    snapshot: Arc<Snapshot>,
    crew: Crew,
    on_error: OnError,
}

/// Why a session did not start. The userfaultfd is closed by then. An owner that has kept a descriptor of
/// its own, as Firecracker does, waits at its next missing page, and is the caller's to end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The regions don't fit the snapshot.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The descriptor is no userfaultfd that can be served.
    #[error("the descriptor that was handed over can't be used")]
    Userfaultfd(#[from] AdoptError),
    /// The snapshot could not be read.
    #[error("the snapshot can't be read")]
    Snapshot(#[from] ReadError),
    /// The owner may not be killed, and so could be left waiting for ever.
    #[error("the process that handed its memory over may not be killed by this one")]
    NotPermitted(#[source] Errno),
    /// A thread, memory or descriptor for the session itself could not be had. The owner was killed if
    /// it had been served already.
    #[error("{what} can't be had")]
    Resources {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Everything is there, and the memory is the owner's alone.
    Complete,
    /// The owner has ended by itself.
    OwnerGone,
    /// The owner was killed, for this reason.
    Killed(String),
}

impl Pager {
    /// Serves an owner from `snapshot`.
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            snapshot,
            crew: Crew::default(),
            on_error: OnError::Kill,
        }
    }

    crew_options!();

    /// What is done when a page that the owner waits for can't be restored. Default
    /// [`OnError::Kill`].
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.on_error = on_error;
        self
    }

    /// Takes over the memory that was handed over, and serves it from now on.
    pub fn attach(self, handover: Handover) -> Result<Paged, AttachError> {
        let begun = Instant::now();
        let resources = |what| move |source| AttachError::Resources { what, source };
        may_kill(handover.owner.as_fd()).map_err(AttachError::NotPermitted)?;
        let image = SnapshotImage::new(Arc::clone(&self.snapshot))?;
        let extents = handover::extents(&handover.regions, self.snapshot.regions()?)?;
        // What doesn't overflow was checked with the extents.
        let registered: Vec<_> = handover
            .regions
            .iter()
            .map(OwnerRegion::addresses)
            .collect();
        let (fd, none) = (handover.userfaultfd, Features::EMPTY);
        let uffd = Userfaultfd::adopt_foreign(fd, none, Ioctls::EMPTY, &registered)?;
        let (state, ring) = State::new(self.snapshot.page_slots(), &extents, State::SPARE_PIECES)
            .map_err(resources("memory for the session's tables"))?;
        let kernel = Kernel::new(uffd, ring).map_err(resources("a descriptor to wait on"))?;
        let owner = Arc::new(Owner::new(handover.owner));
        kernel
            .watch_owner(owner.pidfd())
            .map_err(resources("a watch on the owner's pidfd"))?;
        let guard = OwnerGuard {
            owner: Arc::clone(&owner),
            on_error: self.on_error,
        };
        let session = Session::new(
            kernel,
            image,
            state,
            Box::new(guard),
            None,
            self.crew.decoders(),
        );
        let running = Running::new(session, begun, self.crew.fault_threads, Box::new(|_| ()));
        let running = Arc::new(running);
        match self.crew.start(&running) {
            Ok(threads) => Ok(Paged {
                running,
                threads,
                owner,
            }),
            Err(ThreadError { what, source }) => {
                owner.kill("its pager can't be started");
                owner.wait_gone();
                Err(AttachError::Resources { what, source })
            }
        }
    }
}

/// A session that serves another process.
///
/// Dropping it before it has ended kills the owner, and waits for its end.
pub struct Paged {
    running: Arc<Running>,
    threads: Threads,
    owner: Arc<Owner>,
}

impl std::fmt::Debug for Paged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paged")
            .field("ending", &self.ending())
            .finish_non_exhaustive()
    }
}

impl Paged {
    /// How it ended, if it has.
    pub fn ending(&self) -> Option<Ending> {
        if self.running.is_complete() {
            return Some(Ending::Complete);
        }
        if !self.owner.is_gone() && !self.running.session.is_owner_gone() {
            return None;
        }
        let killed = self.owner.killed().map(Ending::Killed);
        Some(killed.unwrap_or(Ending::OwnerGone))
    }

    /// The pidfd of the owner, which can be read when it has ended.
    pub fn owner(&self) -> BorrowedFd<'_> {
        self.owner.pidfd()
    }

    /// Waits until it has ended.
    pub fn wait(&mut self) -> Ending {
        loop {
            for thread in self.threads.drain(..) {
                // A thread that panics ends the process.
                let _ = thread.join();
            }
            if let Some(ending) = self.ending() {
                return ending;
            }
            // The session can't go on, and the owner was killed.
            self.owner.wait_gone();
        }
    }

    /// Waits until prefetch is at its end, or the session. True if everything is there.
    pub fn wait_complete(&self) -> bool {
        self.running.wait_complete()
    }

    /// Installs what is missing and lets the owner go. False if that can't be done; it goes on as
    /// before then, or has ended: [`Paged::ending`] tells.
    pub fn complete(&mut self) -> bool {
        if self.running.install_rest() {
            self.wait();
        }
        self.running.is_complete()
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        self.running.stats()
    }

    /// The pages that could not be restored when they were wanted, the first thousand of them.
    pub fn failures(&self) -> Vec<Failure> {
        self.running.session.failures().0
    }
}

impl Drop for Paged {
    fn drop(&mut self) {
        let session = &self.running.session;
        // What is complete is so for good, though its threads may be about to say it.
        if !session.is_complete() && self.ending().is_none() {
            self.owner.kill("its pager ends");
        }
        session.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        if !session.is_complete() && !session.is_owner_gone() {
            // What is missing becomes zeros when the descriptor closes: nobody may be left to see it.
            self.owner.wait_gone();
        }
        self.running.session.platform.close();
    }
}
