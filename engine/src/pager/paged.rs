//! Attaches to an owner, and runs the session that follows.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{ReadError, Snapshot};

use super::handover::{self, Handover, HandoverError, OwnerRegion};
use super::owner::{OnError, Owner, OwnerGuard};
use crate::runtime::{
    Prefetch, Runtime, Shared, ThreadError, ThreadOptions, Threads, crew_options,
};
use crate::session::{Extent, Failure, Kernel, Session, SnapshotImage, State};
use crate::stats::Stats;
use snaprestore_uffd::memory::Ring;
use snaprestore_uffd::os::limits::Hint;
use snaprestore_uffd::os::{PageMap, may_kill, open_page_map};
use snaprestore_uffd::uffd::{AdoptError, Features, Ioctls, Userfaultfd};
use snaprestore_uffd::{PageSizeError, check_page_size};

/// A builder for a session that serves the memory of an owner.
#[must_use = "nothing happens before `attach`"]
pub struct Pager {
    snapshot: Arc<Snapshot>,
    crew: ThreadOptions,
    on_error: OnError,
}

/// The reason why a session did not start. The userfaultfd is closed by then. An owner that has
/// kept a descriptor of its own, as Firecracker does, waits at its next missing page; the caller
/// must kill it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The kernel's page size is not that of a snapshot.
    #[error(transparent)]
    PageSize(#[from] PageSizeError),
    /// The regions don't fit the snapshot.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The descriptor is not a userfaultfd that can be served.
    #[error("cannot use the descriptor that was handed over")]
    Userfaultfd(#[from] AdoptError),
    /// The snapshot could not be read.
    #[error("cannot read the snapshot")]
    Snapshot(#[from] ReadError),
    /// The owner may not be killed, and so could be left waiting forever.
    #[error(
        "not permitted to kill the process that handed its memory over; run as its user, or with CAP_KILL"
    )]
    NotPermitted(#[source] Errno),
    /// The owner has pages of 2 MiB, and its page map, which shows the present ones, can't be read.
    #[error(
        "cannot read /proc/PID/pagemap of the process that handed its memory over, which 2 MiB pages require; run \
         as its user, or with CAP_SYS_PTRACE"
    )]
    PageMap(#[source] io::Error),
    /// The owner has not registered memory that it handed over.
    #[error(
        "the memory at {address:#x} is not registered with the userfaultfd that was handed over, so its missing pages \
         would read as zeros; register every region (UFFDIO_REGISTER, missing pages) before the handover"
    )]
    NotRegistered {
        /// The address in the owner.
        address: u64,
    },
    /// A thread, memory or descriptor for the session itself is not available. If the owner had
    /// been served already, it was killed.
    #[error("cannot create {what}{hint}")]
    Resources {
        /// The resource.
        what: &'static str,
        /// The limit that was reached, if known.
        hint: Hint,
        /// The kernel's error.
        source: io::Error,
    },
}

/// Name of the memory that holds the page states.
const TABLES: &str = "memory for the session's tables";

impl AttachError {
    fn resources(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Resources {
            what,
            hint: Hint::for_thread(&source),
            source,
        }
    }
}

/// The way in which a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Everything is present, and only the owner uses the memory.
    Complete,
    /// The owner has exited by itself.
    OwnerGone,
    /// The owner was killed, for this reason.
    Killed(String),
}

impl Pager {
    /// Creates a builder for a session that serves an owner from `snapshot`.
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            snapshot,
            crew: ThreadOptions::default(),
            on_error: OnError::Kill,
        }
    }

    crew_options!();

    /// Sets the action taken when a page that the owner waits for can't be restored. Default:
    /// [`OnError::Kill`].
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.on_error = on_error;
        self
    }

    /// Takes over the memory that was handed over, and serves it from now on.
    pub fn attach(self, handover: Handover) -> Result<Paged, AttachError> {
        let begun = Instant::now();
        let extents = self.extents(&handover.regions)?;
        let tables = State::new(self.snapshot.page_slots(), &extents, State::SPARE_PIECES);
        let tables = tables.map_err(AttachError::resources(TABLES))?;
        self.serve(handover, tables, &[], begun)
    }

    /// Creates the tables for a session with these regions, in a memfd that can neither shrink nor
    /// grow: the state that must outlive the serving process. They have room for an owner that
    /// moves its memory (`mremap`) into 4096 more pieces than it has regions; an owner that exceeds
    /// this is killed. [`Pager::resume`] starts a session with them, and continues it after the
    /// serving process is gone.
    pub fn tables(&self, regions: &[OwnerRegion]) -> Result<OwnedFd, AttachError> {
        let extents = self.extents(regions)?;
        let made = State::shared(self.snapshot.page_slots(), &extents, State::SPARE_PIECES)
            .and_then(|(state, _)| match state.memfd() {
                Some(memfd) => memfd.try_clone_to_owned(),
                None => Err(io::ErrorKind::Unsupported.into()),
            });
        made.map_err(AttachError::resources(TABLES))
    }

    /// Serves the memory that was handed over from now on, continuing from the state in `tables`.
    ///
    /// The previous serving process must be gone entirely, as its pidfd tells. Messages that it had
    /// read but not recorded are recorded, and waiting threads are made to fault again. The regions
    /// are those of the handover, whatever the owner has done with its memory since. `quarantined`
    /// are frames, by their offset in the file, that must not be decoded:
    /// [`Vitals::decoding`](super::Vitals::decoding) returns those on which a process died.
    ///
    /// If this fails, nobody serves the owner, and the tables are unchanged.
    pub fn resume(
        self,
        handover: Handover,
        tables: OwnedFd,
        quarantined: &[u64],
    ) -> Result<Paged, AttachError> {
        let begun = Instant::now();
        let tables = State::open(tables).map_err(AttachError::resources(TABLES))?;
        if tables.0.page_slots() != self.snapshot.page_slots() {
            let other = io::Error::other("they are those of another snapshot");
            return Err(AttachError::resources(TABLES)(other));
        }
        self.serve(handover, tables, quarantined, begun)
    }

    fn extents(&self, regions: &[OwnerRegion]) -> Result<Vec<Extent>, AttachError> {
        check_page_size()?;
        Ok(handover::extents(regions, self.snapshot.regions()?)?)
    }

    fn serve(
        self,
        handover: Handover,
        (state, ring): (State, Ring),
        quarantined: &[u64],
        begun: Instant,
    ) -> Result<Paged, AttachError> {
        may_kill(handover.owner.as_fd()).map_err(AttachError::NotPermitted)?;
        let frames = self.crew.shared().frames(&self.snapshot);
        let image = SnapshotImage::new(Arc::clone(&self.snapshot), frames)?;
        let page_map = match handover.page_map {
            _ if !state.has_large() => None,
            Some(given) => Some(given),
            None => Some(open_page_map(handover.owner.as_fd()).map_err(AttachError::PageMap)?),
        };
        // These sums were checked for overflow with the extents.
        let mut registered: Vec<_> = handover
            .regions
            .iter()
            .map(OwnerRegion::addresses)
            .collect();
        // The places to which the owner has moved its memory.
        registered.extend(state.map().extents().map(|extent| extent.addresses()));
        let (fd, none) = (handover.userfaultfd, Features::EMPTY);
        let uffd = Userfaultfd::adopt_foreign(fd, none, Ioctls::EMPTY, &registered)?;
        let kernel =
            Kernel::new(uffd, ring).map_err(AttachError::resources("a descriptor to wait on"))?;
        let kernel = kernel.with_page_map(page_map.map(PageMap::new));
        let owner = Arc::new(Owner::new(handover.owner));
        kernel
            .watch_owner(owner.pidfd())
            .map_err(AttachError::resources("a watch on the owner's pidfd"))?;
        let guard = OwnerGuard {
            owner: Arc::clone(&owner),
            on_error: self.on_error,
        };
        let decoders = self.crew.decoders();
        let mut session = Session::new(kernel, image, state, Box::new(guard), None, decoders);
        session.refuse(quarantined.iter().copied());
        session.recover();
        check_registered(&session)?;
        let running = Runtime::new(session, begun, &self.crew, Box::new(|_| ()));
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
                Err(AttachError::resources(what)(source))
            }
        }
    }
}

/// Checks that the ends of the memory are registered, as long as nothing is installed. Later, the
/// owner may have unmapped it, or the session may have unregistered it because it is complete.
fn check_registered(session: &Session<Kernel, SnapshotImage>) -> Result<(), AttachError> {
    let state = &session.state;
    let pages: u64 = state.map().extents().map(|extent| extent.pages).sum();
    if state.unsettled() != pages {
        return Ok(());
    }
    for Range { start, end } in state.map().extents().map(|extent| extent.addresses()) {
        for address in [start, end - PAGE_SIZE_U64] {
            if !session.platform.may_be_registered(address) {
                return Err(AttachError::NotRegistered { address });
            }
        }
    }
    Ok(())
}

/// A session that serves another process.
///
/// Dropping it before it has ended kills the owner and waits until the owner has exited. In a
/// forked child nothing is done.
pub struct Paged {
    running: Arc<Runtime>,
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
    /// Returns how the session ended, if it has.
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

    /// Returns the pidfd of the owner, which becomes readable when the owner has exited.
    pub fn owner(&self) -> BorrowedFd<'_> {
        self.owner.pidfd()
    }

    /// Waits until the session has ended.
    pub fn wait(&self) -> Ending {
        self.running.wait_served_out();
        loop {
            if let Some(ending) = self.ending() {
                return ending;
            }
            // The session could not continue, and the owner was killed.
            self.owner.wait_gone();
        }
    }

    /// Waits until prefetch has finished, or the session has ended. Returns `true` if everything is
    /// present.
    pub fn wait_complete(&self) -> bool {
        self.running.wait_complete()
    }

    /// Installs the missing pages and releases the owner. Returns `false` if that fails; the
    /// session then continues as before, or has ended, as [`Paged::ending`] returns.
    pub fn complete(&self) -> bool {
        if self.running.install_rest() {
            self.wait();
        }
        self.running.is_complete()
    }

    /// Kills the owner for the given reason, unless it has exited: it must not be served any more.
    pub fn end(&self, why: &str) {
        if self.ending().is_none() {
            self.owner.kill(why);
        }
    }

    /// Returns the statistics so far.
    pub fn stats(&self) -> Stats {
        self.running.stats()
    }

    /// Returns the failures of pages that could not be restored when they were wanted: the first
    /// thousand.
    pub fn failures(&self) -> Vec<Failure> {
        self.running.session.failures().0
    }
}

impl Drop for Paged {
    fn drop(&mut self) {
        if self.running.is_of_parent() {
            // A forked child: the session and the owner are the parent's.
            std::mem::forget(std::mem::take(&mut self.threads));
            std::mem::forget(Arc::clone(&self.running));
            return;
        }
        let session = &self.running.session;
        // A complete session stays complete, although its threads may not have reported it yet.
        if !session.is_complete() && self.ending().is_none() {
            self.owner.kill("its pager ends");
        }
        session.end();
        self.running.end_threads(&mut self.threads);
        if !session.is_complete() && !session.is_owner_gone() {
            // Missing pages become zeros when the descriptor closes, so nobody may be left to see
            // them.
            self.owner.wait_gone();
        }
        self.running.session.platform.close();
    }
}
