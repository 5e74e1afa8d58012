//! A restore that runs.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::AcqRel, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use snapshot_format::Reason;
use snapshot_format::layout::PAGE_SIZE_U64;

use crate::mem::{Advice, RawRegion, advise_at};
use crate::session::{
    Extent, Failure, Kernel, PAGE, Percentiles, Platform as _, PrefetchStop, Session, SnapshotImage,
};
use crate::sys::{ReadFault, read_checked};

use super::huge;
use super::threads::Threads;

/// Memory that is being restored.
#[derive(Clone, Debug)]
pub struct RestoredRegion {
    /// The region's name in the snapshot.
    pub name: String,
    /// Its address space: 0 for a VM.
    pub space: u32,
    /// Its address in the owner's terms.
    pub start: u64,
    /// The number of its first page.
    pub first_page: u64,
    /// Its length in bytes.
    pub(super) len: u64,
    /// Where it is in this process.
    pub(super) memory: RawRegion,
}

impl RestoredRegion {
    /// Its first byte in this process. Valid as long as the [`Restored`] lives, or the caller's
    /// mapping.
    ///
    /// Memory that the engine mapped is unmapped as a whole in the end. Who unmaps or moves a part
    /// of it before frees addresses that something else may be using by then: give memory of your
    /// own ([`Restore::region`](super::Restore::region)) for that.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    #[cfg(feature = "rust-vmm")]
    pub(crate) fn memory(&self) -> &RawRegion {
        &self.memory
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// How [`Restored::stop`] ends a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Everything that is missing is installed first.
    Complete,
    /// What is missing becomes inaccessible: a touch is SIGSEGV, a system call gets EFAULT. What is
    /// there stays.
    Inaccessible,
    /// All of the memory goes back to the kernel. Its addresses stay reserved, without access,
    /// until the caller unmaps its own mappings and the [`Restored`] is dropped, so that nothing
    /// else comes to lie there.
    Unmap,
}

/// Why a restore was not completed. It goes on as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// Some pages can't be restored; the first failure tells why.
    #[error("{count} failures, the first: {first}")]
    Incomplete {
        /// Failures.
        count: u64,
        /// The first of them.
        first: Box<Failure>,
    },
    /// It has ended already: the memory is no longer the engine's.
    #[error("the restore has ended already")]
    Over,
    /// The engine's threads could not bring all pages, and saw no failure: the owner kept changing
    /// its memory.
    #[error("{missing} pages are still missing")]
    Missing {
        /// Pages.
        missing: u64,
    },
}

/// Why [`Restored::read_at`] could not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadAtError {
    /// The range is not in the region, or there is no such region.
    #[error("{len} bytes at offset {offset:#x} are not in region {region}")]
    OutOfRegion {
        /// The region asked for.
        region: usize,
        /// Where in it.
        offset: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// A page is poisoned, unmapped or inaccessible.
    #[error(
        "region {region} can't be read at offset {offset:#x}: the page is poisoned, inaccessible or unmapped"
    )]
    Unreadable {
        /// The region.
        region: usize,
        /// In the first page that can't be read; everything before it was.
        offset: u64,
    },
    /// The kernel refused for another reason.
    #[error(transparent)]
    Refused(ReadFault),
}

/// Pages installed for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// From frames.
    pub copied: u64,
    /// Repeating a word other than zero.
    pub filled: u64,
    /// Zero.
    pub zeroed: u64,
}

/// What a restore has done so far.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// From the start call to usable memory.
    pub mapped: Duration,
    /// From the start call to the memory being complete, if it is.
    pub complete: Option<Duration>,
    /// Faults read, and pages that [`Restored::read_at`] asked for.
    pub faults: u64,
    /// From reading a fault to its answer.
    pub fault_time: Percentiles,
    /// Pages that faults brought in: the touched ones and those that came with them.
    pub demand: PageCounts,
    /// Pages that prefetch brought in.
    pub prefetch: PageCounts,
    /// Zero pages that the kernel serves itself when they are touched: they are in none of the
    /// other counts.
    pub left_to_kernel: u64,
    /// Pages poisoned.
    pub poisoned: u64,
    /// Events read: discards, unmappings, moves.
    pub events: u64,
    /// Installs that had to be repeated because the mappings were changing.
    pub retries: u64,
    /// Bytes of frames read from the snapshot.
    pub bytes_read: u64,
    /// Bytes decoded from frames.
    pub bytes_decoded: u64,
    /// Failures so far.
    pub failures: u64,
}

/// How often [`Stop::Complete`] looks for pages that are left without a failure.
const MOST_TRIES: u32 = 10_000;

/// How much [`Restored::read_at`] has brought and reads at once.
const READ_PIECE: usize = 64 << 10;

/// How often a waiter looks at what no notification tells.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How often a restore that is given up follows an owner that goes on changing its mappings.
const MOST_ROUNDS: u32 = 10_000;

/// What the engine's threads and the handle share.
pub(super) struct Inner {
    pub(super) session: Session<Kernel, SnapshotImage>,
    regions: Vec<RestoredRegion>,
    begun: Instant,
    mapped: Duration,
    huge_pages: bool,
    user_mode_only: bool,
    /// Zero runs that were left to the kernel.
    left: Vec<Range<u64>>,
    fault_threads: AtomicUsize,
    complete_nanos: AtomicU64,
    progress: Mutex<Progress>,
    changed: Condvar,
}

/// What a waiter waits for.
#[derive(Debug, Default)]
struct Progress {
    served_out: bool,
    prefetched: bool,
}

impl Inner {
    pub(super) fn new(
        session: Session<Kernel, SnapshotImage>,
        regions: Vec<RestoredRegion>,
        begun: Instant,
        huge_pages: bool,
        user_mode_only: bool,
        left: Vec<Range<u64>>,
        fault_threads: usize,
    ) -> Self {
        Self {
            session,
            regions,
            begun,
            mapped: begun.elapsed(),
            huge_pages,
            user_mode_only,
            left,
            fault_threads: AtomicUsize::new(fault_threads),
            complete_nanos: AtomicU64::new(0),
            progress: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Pages of the regions that were left to the kernel. A run can reach over the gap that
    /// follows a region.
    fn left_pages(&self) -> u64 {
        let of = |region: &RestoredRegion| -> u64 {
            let end = region.first_page + region.len / PAGE_SIZE_U64;
            let part = |run: &Range<u64>| {
                run.end
                    .min(end)
                    .saturating_sub(run.start.max(region.first_page))
            };
            self.left.iter().map(part).sum()
        };
        self.regions.iter().map(of).sum()
    }

    /// The last fault thread closes a complete session.
    pub(super) fn fault_thread_ends(&self) {
        if self.fault_threads.fetch_sub(1, AcqRel) > 1 {
            return;
        }
        if self.session.is_complete() {
            self.session.platform.close();
            let nanos = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.release_memory();
            self.complete_nanos.store(nanos.max(1), Relaxed);
        }
        self.update(|progress| progress.served_out = true);
    }

    /// The memory is the owner's alone: children may have it, and huge pages are worth having.
    fn release_memory(&self) {
        self.advise(Advice::DoFork);
        if self.huge_pages {
            huge::collapse(&self.session, &self.left);
        }
    }

    fn advise(&self, advice: Advice) {
        // Where the owner has it now: at an address that it has unmapped there may be something
        // else.
        for Extent { address, pages, .. } in self.session.state.map().extents() {
            if let Err(error) = advise_at(advice, address, pages * PAGE) {
                tracing::debug!(%error, ?advice, "advice at the end of a restore");
            }
        }
    }

    pub(super) fn prefetch_ended(&self) {
        self.update(|progress| progress.prefetched = true);
    }

    fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

/// A restore that runs: the memory, and the engine's threads that fill it.
///
/// Dropping it stops the restore as [`Stop::Inaccessible`] does; memory that the engine mapped is
/// unmapped then.
pub struct Restored {
    inner: Arc<Inner>,
    threads: Threads,
    /// Whether it was given up.
    over: bool,
}

impl std::fmt::Debug for Restored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restored")
            .field("regions", &self.inner.regions)
            .field("complete", &self.is_complete())
            .finish_non_exhaustive()
    }
}

impl Restored {
    pub(super) fn new(inner: Arc<Inner>, threads: Threads) -> Self {
        Self {
            inner,
            threads,
            over: false,
        }
    }

    /// The memory of each region of the snapshot.
    pub fn regions(&self) -> &[RestoredRegion] {
        &self.inner.regions
    }

    /// Whether every page is there (or was discarded, or poisoned) and the memory is unregistered.
    pub fn is_complete(&self) -> bool {
        self.inner.complete_nanos.load(Relaxed) != 0
    }

    /// Waits until the restore is complete, or prefetch is at its end without that: with
    /// [`Prefetch::All`](super::Prefetch::All) then some pages can't be restored; with another
    /// prefetch the rest comes by touches only. While a touch waits for its page, or for a verdict
    /// about it, it isn't known which, and is waited for. True if it is complete.
    pub fn wait_complete(&self) -> bool {
        let mut progress = self
            .inner
            .progress
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Whether all pages may be settled is not told by a notification, so it is looked at now
        // and then.
        while !progress.served_out && (!progress.prefetched || self.may_complete_yet()) {
            let waited = self.inner.changed.wait_timeout(progress, LOOK_AGAIN);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(progress);
        self.is_complete()
    }

    /// Whether the last pages may be there, or be on their way: a page is marked only after its
    /// toucher was woken, and only then is its fault no longer open. So faults are looked at first.
    fn may_complete_yet(&self) -> bool {
        let session = &self.inner.session;
        session.inbox.has_open() || session.state.may_be_settled()
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        let inner = &*self.inner;
        let stats = &inner.session.stats;
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        let pages = |pages: &crate::session::Pages| PageCounts {
            copied: read(&pages.copied),
            filled: read(&pages.filled),
            zeroed: read(&pages.zeroed),
        };
        let complete = read(&inner.complete_nanos);
        Stats {
            mapped: inner.mapped,
            complete: (complete != 0).then(|| Duration::from_nanos(complete)),
            faults: read(&stats.faults),
            fault_time: stats.fault_time.percentiles(),
            demand: pages(&stats.demand),
            prefetch: pages(&stats.prefetch),
            left_to_kernel: inner.left_pages(),
            poisoned: read(&stats.poisoned),
            events: read(&stats.events),
            retries: read(&stats.retries),
            bytes_read: inner.session.image.bytes_read(),
            bytes_decoded: inner.session.image.bytes_decoded(),
            failures: inner.session.failures().1,
        }
    }

    /// The pages that could not be restored when they were wanted, the first thousand of them.
    pub fn failures(&self) -> Vec<Failure> {
        self.inner.session.failures().0
    }

    /// Reads memory of region `region` from `offset` bytes on. What is missing is restored first,
    /// as for a touch, and counted as one. An error, and not a signal, for a page that can't be
    /// read.
    pub fn read_at(
        &self,
        region: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), ReadAtError> {
        let len = buffer.len() as u64;
        let fits = |memory: &RawRegion| {
            offset
                .checked_add(len)
                .is_some_and(|end| end <= memory.len())
        };
        let memory = self.inner.regions.get(region).map(|region| &region.memory);
        let memory = memory
            .filter(|memory| fits(memory))
            .ok_or(ReadAtError::OutOfRegion {
                region,
                offset,
                len,
            })?;
        let start = memory.address() + offset;
        self.read_memory(start, buffer)
            .map_err(|fault| match fault {
                ReadFault::Unreadable { address } => ReadAtError::Unreadable {
                    region,
                    offset: address - memory.address(),
                },
                other => ReadAtError::Refused(other),
            })
    }

    /// Reads in pieces, so that what was brought for one is hardly ever discarded again before it
    /// is read.
    fn read_memory(&self, start: u64, buffer: &mut [u8]) -> Result<(), ReadFault> {
        let session = &self.inner.session;
        let mut at = start;
        for piece in buffer.chunks_mut(READ_PIECE) {
            let end = at + piece.len() as u64;
            session.bring_for_reader(at..end);
            let mut read = read_checked(at, piece);
            // With another userfaultfd the kernel asks for what the owner has discarded. This one's
            // doesn't.
            let mut zeroed = None;
            while let Err(ReadFault::Unreadable { address }) = read {
                if !self.is_user_mode_only() || zeroed == Some(address) {
                    break;
                }
                zeroed = Some(address);
                session.zero_for_reader(address);
                read = read_checked(at, piece);
            }
            read?;
            at = end;
        }
        Ok(())
    }

    /// Whether only instructions of this process are stopped at a missing page: a system call, or a
    /// virtual CPU, that touches one before the restore is complete fails with EFAULT.
    /// [`read_at`](Self::read_at) works all the same.
    pub fn is_user_mode_only(&self) -> bool {
        self.inner.user_mode_only
    }

    /// Ends the restore in the way that `stop` says. A restore that is complete has ended already:
    /// then nothing is left to do for [`Stop::Complete`] and [`Stop::Inaccessible`], and the memory
    /// is no longer the engine's to
    /// [`Stop::Unmap`].
    ///
    /// Under a KVM memslot call it only after the virtual CPUs have stopped: a guest must not touch
    /// memory that becomes inaccessible.
    pub fn stop(&mut self, stop: Stop) -> Result<(), StopError> {
        match stop {
            Stop::Complete => self.complete(),
            Stop::Inaccessible => {
                self.give_up();
                Ok(())
            }
            Stop::Unmap if self.over || self.is_complete() => Err(StopError::Over),
            Stop::Unmap => {
                self.give_up();
                if self.is_complete() {
                    return Err(StopError::Over);
                }
                for extent in self.inner.session.state.map().extents() {
                    let len = extent.pages * PAGE;
                    if let Err(error) = Kernel::give_back(extent.address, len) {
                        tracing::warn!(%error, "giving memory back");
                    }
                }
                Ok(())
            }
        }
    }

    /// Installs what is missing, in this thread.
    fn complete(&mut self) -> Result<(), StopError> {
        if self.over && !self.is_complete() {
            return Err(StopError::Over);
        }
        let session = &self.inner.session;
        let mut worker = crate::session::Worker::new(session.image.decoder(Reason::Prefetch));
        for _ in 0..MOST_TRIES {
            let pages = 0..session.image.snapshot().page_slots();
            match session.prefetch(&mut worker, pages, || ()) {
                // What somebody else is bringing, prefetch or a fault thread, is there soon.
                Ok(left) if left.busy > 0 => std::thread::sleep(Duration::from_millis(1)),
                Ok(left) if left.failed == 0 => {
                    session.kick();
                    self.join();
                    break;
                }
                Err(PrefetchStop::Ending) => {
                    self.join();
                    break;
                }
                Ok(_) | Err(PrefetchStop::Kernel) => break,
            }
        }
        if self.is_complete() {
            return Ok(());
        }
        let session = &self.inner.session;
        let (failures, count) = session.failures();
        Err(match failures.into_iter().next() {
            Some(first) => StopError::Incomplete {
                count,
                first: Box::new(first),
            },
            None => StopError::Missing {
                missing: session.missing().iter().map(|(_, pages)| pages).sum(),
            },
        })
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A thread that panics ends the process.
            let _ = thread.join();
        }
    }

    /// Makes what is missing inaccessible, ends the threads and closes the userfaultfd.
    fn give_up(&mut self) {
        // Once given up, the memory may be unmapped and its addresses be something else's.
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        self.inner.session.end();
        self.join();
        if self.is_complete() {
            return;
        }
        let session = &self.inner.session;
        for round in 0.. {
            // The owner may have unmapped and moved memory when nobody read its events any more.
            // What is missing is wherever it is now; at the old addresses there may be nothing, or
            // memory that isn't ours.
            while session.read_events(0) > 0 {}
            let refused = session.missing().into_iter().find_map(|(address, pages)| {
                let made = Kernel::make_inaccessible(address, pages * PAGE);
                Some((address, made.err()?))
            });
            let changed = session.read_events(0) > 0
                || refused
                    .as_ref()
                    .is_some_and(|(address, _)| session.platform.is_changing(*address));
            match refused {
                _ if changed && round < MOST_ROUNDS => {
                    std::thread::sleep(Duration::from_micros(100));
                }
                Some((address, error)) => {
                    // The mappings may be in too many pieces for one more: then the whole memory
                    // goes.
                    tracing::warn!(%error, address, "making missing pages inaccessible");
                    self.make_all_inaccessible();
                    break;
                }
                None => break,
            }
        }
        session.platform.close();
        // What is there stays the owner's, and what isn't can't be touched by a child either.
        self.inner.advise(Advice::DoFork);
    }

    fn make_all_inaccessible(&self) {
        for extent in self.inner.session.state.map().extents() {
            if let Err(error) = Kernel::make_inaccessible(extent.address, extent.pages * PAGE) {
                tracing::error!(%error, "memory that is incomplete can't be made inaccessible: the process is ended");
                std::process::abort();
            }
        }
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        self.give_up();
    }
}
