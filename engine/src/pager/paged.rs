//! Attaches to an owner, and runs the session that follows.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{ReadError, Snapshot};

use super::handover::{self, Handover, HandoverError, OwnerRegion};
use super::owner::{OnError, Owner, OwnerGuard};
use crate::runtime::{PausedBy, Prefetch, Runtime, Shared, ThreadError, ThreadOptions, Threads};
use crate::session::{Extent, Failure, FrameId, Kernel, Session, SnapshotImage, State};
use crate::stats::{RunRecord, Stats};
use crate::{RecordError, Recording, RecordingOptions};
use snaprestore_uffd::memory::Ring;
use snaprestore_uffd::os::limits::Hint;
use snaprestore_uffd::os::{PageMap, may_kill, open_page_map};
use snaprestore_uffd::uffd::{AdoptError, Features, Ioctls, Userfaultfd};
use snaprestore_uffd::{PageSizeError, check_page_size};

/// A builder for a session that serves the memory of an owner.
#[must_use = "nothing happens before `attach`"]
pub struct Pager {
    snapshot: Arc<Snapshot>,
    threads: ThreadOptions,
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
    /// The owner has not registered memory that it handed over. It was killed: its registered pages
    /// would read as zeros from now on.
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

/// How a session ended, and why if it was not for the good.
///
/// As JSON it has the fields `ending` and, with a reason, `reason`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ending", content = "reason", rename_all = "lowercase")]
pub enum SessionEnd {
    /// Everything is present, and only the owner uses the memory.
    Complete,
    /// The owner has exited by itself.
    Exited,
    /// The owner was killed, for this reason.
    Killed(String),
    /// The session never began, for this reason; a front end reports it.
    Refused(String),
}

impl SessionEnd {
    /// Returns the reason why the owner was killed or refused.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Complete | Self::Exited => None,
            Self::Killed(why) | Self::Refused(why) => Some(why),
        }
    }
}

impl std::fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Complete => f.write_str("complete"),
            Self::Exited => f.write_str("exited"),
            Self::Killed(why) => write!(f, "killed: {why}"),
            Self::Refused(why) => write!(f, "refused: {why}"),
        }
    }
}

impl Pager {
    /// Creates a builder for a session that serves an owner from `snapshot`.
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            snapshot,
            threads: ThreadOptions::default(),
            on_error: OnError::Kill,
        }
    }

    /// Sets the number of threads that serve faults, at least 1. One thread serves one touching
    /// thread well. More help when many threads touch at once, or when the store is slow.
    /// Default: 2.
    pub fn fault_threads(mut self, threads: usize) -> Self {
        self.threads.fault_threads = threads.max(1);
        self
    }

    /// Sets the pages to load before they are touched. Default: [`Prefetch::Off`].
    pub fn prefetch(mut self, prefetch: Prefetch) -> Self {
        self.threads.prefetch = prefetch;
        self
    }

    /// Selects the working set to prefetch, like
    /// [`Restore::working_set`](crate::restore::Restore::working_set). Default: all of them.
    pub fn working_set(mut self, name: impl Into<String>) -> Self {
        self.threads.working_set = Some(name.into());
        self
    }

    /// Sets how many threads prefetch for this session at once, like
    /// [`Restore::prefetch_threads`](crate::restore::Restore::prefetch_threads). Default: one per
    /// core.
    pub fn prefetch_threads(mut self, threads: usize) -> Self {
        self.threads.prefetch_threads = threads.max(1);
        self
    }

    /// Limits prefetch to this many bytes of memory per second, on average. Default: no limit.
    pub fn prefetch_bandwidth(mut self, bytes_per_second: u64) -> Self {
        self.threads.prefetch_bandwidth = Some(bytes_per_second.max(1));
        self
    }

    /// Sets how long the read of an unreadable page is retried before it counts as failed, like
    /// [`Restore::retry_timeout`](crate::restore::Restore::retry_timeout). Default: 5 s.
    pub fn retry_timeout(mut self, timeout: Duration) -> Self {
        self.threads.retry_timeout = timeout;
        self
    }

    /// Sets the resources that the session shares with others of the same process, like
    /// [`Restore::shared`](crate::restore::Restore::shared). Default: the prefetch threads.
    pub fn shared(mut self, shared: &Shared) -> Self {
        self.threads.shared = OnceLock::from(shared.clone());
        self
    }

    /// Sets a hook that each thread of this session calls before it does anything else, like
    /// [`Restore::on_thread_start`](crate::restore::Restore::on_thread_start).
    pub fn on_thread_start(mut self, hook: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.threads.hook = Some(Arc::new(hook));
        self
    }

    /// Sets the action taken when a page that the owner waits for can't be restored. Default:
    /// [`OnError::Kill`].
    pub fn on_error(mut self, on_error: OnError) -> Self {
        self.on_error = on_error;
        self
    }

    /// Records first touches from the first one on, like
    /// [`Restore::record`](crate::restore::Restore::record). A session that is
    /// [resumed](Pager::resume) knows only the touches from then on. Default: no.
    pub fn record(mut self, options: RecordingOptions) -> Self {
        self.threads.record = Some(options);
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
    /// are frames that must not be decoded: [`Vitals::decoding`](super::Vitals::decoding) returns
    /// those on which a process died. The snapshot must have the same layers as before.
    ///
    /// If this fails, nobody serves the owner. The tables are unchanged, unless it was killed.
    pub fn resume(
        self,
        handover: Handover,
        tables: OwnedFd,
        quarantined: &[FrameId],
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
        Ok(handover::extents(regions, self.snapshot.regions())?)
    }

    fn serve(
        self,
        handover: Handover,
        (state, ring): (State, Ring),
        quarantined: &[FrameId],
        begun: Instant,
    ) -> Result<Paged, AttachError> {
        may_kill(handover.owner.as_fd()).map_err(AttachError::NotPermitted)?;
        self.threads.prepare(&self.snapshot)?;
        let frames = self.threads.shared().frames(&self.snapshot);
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
        let decoders = self.threads.decoders();
        let mut session = Session::new(kernel, image, state, Box::new(guard), None, decoders);
        session.quarantine(quarantined);
        session.recover();
        check_registered(&session).inspect_err(|_| {
            owner.kill("it hands over memory that is not registered");
            owner.wait_gone();
        })?;
        let runtime = Runtime::new(session, begun, &self.threads, Vec::new(), Box::new(|_| ()));
        let runtime = Arc::new(runtime);
        match self.threads.start(&runtime) {
            Ok(threads) => Ok(Paged {
                runtime,
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
    runtime: Arc<Runtime>,
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
    pub fn ending(&self) -> Option<SessionEnd> {
        if self.runtime.is_complete() {
            return Some(SessionEnd::Complete);
        }
        if !self.owner.is_gone() && !self.runtime.session.is_owner_gone() {
            return None;
        }
        let killed = self.owner.killed().map(SessionEnd::Killed);
        Some(killed.unwrap_or(SessionEnd::Exited))
    }

    /// Returns the pidfd of the owner, which becomes readable when the owner has exited.
    pub fn owner(&self) -> BorrowedFd<'_> {
        self.owner.pidfd()
    }

    /// Waits until the session has ended.
    pub fn wait(&self) -> SessionEnd {
        self.runtime.wait_served_out();
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
        self.runtime.wait_complete()
    }

    /// Installs the missing pages and releases the owner. Returns `false` if that fails; the
    /// session then continues as before, or has ended, as [`Paged::ending`] returns.
    pub fn complete(&self) -> bool {
        if self.runtime.install_rest() {
            self.wait();
        }
        self.runtime.is_complete()
    }

    /// Kills the owner for the given reason, unless it has exited: it must not be served any more.
    pub fn end(&self, why: &str) {
        if self.ending().is_none() {
            self.owner.kill(why);
        }
    }

    /// Pauses prefetch, like
    /// [`Restored::pause_prefetch`](crate::restore::Restored::pause_prefetch).
    /// [`Paged::complete`] installs all pages nevertheless.
    pub fn pause_prefetch(&self) {
        self.runtime.pause_prefetch(PausedBy::Caller);
    }

    /// Continues prefetch after [`Paged::pause_prefetch`]. No effect if it was not paused.
    pub fn resume_prefetch(&self) {
        self.runtime.resume_prefetch(PausedBy::Caller);
    }

    /// Limits prefetch to this many bytes of memory per second from now on, on average, in place of
    /// [`Pager::prefetch_bandwidth`]. `None` removes the limit.
    pub fn set_prefetch_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.runtime.set_prefetch_bandwidth(bytes_per_second);
    }

    /// Records first touches from now on. Fails if a recording is running, or if there is nothing
    /// left to record.
    pub fn record(&self, options: RecordingOptions) -> Result<Recording, RecordError> {
        self.runtime.record(options)
    }

    /// Returns the recording that began last, also after it has ended.
    pub fn recording(&self) -> Option<Recording> {
        self.runtime.recording()
    }

    /// Returns the statistics so far.
    pub fn stats(&self) -> Stats {
        self.runtime.stats()
    }

    /// Returns the statistics so far as a record for `snaprestore report`. `what` describes the
    /// session for people.
    pub fn run_record(&self, what: impl Into<String>) -> RunRecord {
        self.runtime.run_record(what.into(), self.stats())
    }

    /// Returns the failures of pages that could not be restored when they were wanted: the first
    /// thousand.
    pub fn failures(&self) -> Vec<Failure> {
        self.runtime.session.failures().0
    }
}

impl Drop for Paged {
    fn drop(&mut self) {
        if self.runtime.is_of_parent() {
            // A forked child: the session and the owner are the parent's.
            std::mem::forget(std::mem::take(&mut self.threads));
            std::mem::forget(Arc::clone(&self.runtime));
            return;
        }
        let session = &self.runtime.session;
        // A complete session stays complete, although its threads may not have reported it yet.
        if !session.is_complete() && self.ending().is_none() {
            self.owner.kill("its pager ends");
        }
        session.end();
        self.runtime.end_threads(&mut self.threads);
        if !session.is_complete() && !session.is_owner_gone() {
            // Missing pages become zeros when the descriptor closes, so nobody may be left to see
            // them.
            self.owner.wait_gone();
        }
        self.runtime.session.platform.close();
    }
}
