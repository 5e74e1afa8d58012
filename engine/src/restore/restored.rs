//! A running restore.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use snapshot_format::layout::PAGE_SIZE_U64;

use crate::runtime::{OnComplete, PausedBy, Runtime, Threads};
use crate::session::{Failure, Kernel, NoPoison, PAGE, Platform as _, Session, SnapshotImage};
use crate::stats::{RunRecord, Stats};
use crate::{RecordError, Recording, RecordingOptions};
use snaprestore_uffd::memory::{Advice, MemError, RawRegion, advise_at};
use snaprestore_uffd::memory::{ReadFault, read_checked};
use snaprestore_uffd::os::abort;
use snaprestore_uffd::to_usize;

use super::builder::without;
use super::huge;

/// A region whose memory is being restored.
#[derive(Clone, Debug)]
pub struct RestoredRegion {
    /// The region's name in the snapshot.
    pub name: String,
    /// The number of its address space: 0 for a VM.
    pub space: u32,
    /// Its address from the point of view of the snapshot's owner.
    pub start: u64,
    /// The number of its first page.
    pub first_page: u64,
    /// Its length in bytes.
    pub(super) len: u64,
    /// Its address in this process.
    pub(super) address: u64,
}

impl RestoredRegion {
    /// Returns a pointer to its first byte in this process. The pointer is valid as long as the
    /// [`Restored`], or the caller's mapping, lives.
    ///
    /// Memory that the engine mapped is unmapped as a whole in the end. If you unmap or move a part
    /// of it before, something else may be using those addresses by then. To do that, provide
    /// memory of your own ([`Restore::region`](super::Restore::region)).
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(to_usize(self.address))
    }

    /// Returns its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether it has no pages.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The way in which [`Restored::stop`] ends a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Install all missing pages first, and load poisoned pages after all if they are available by
    /// now.
    Complete,
    /// Poison missing pages: a touch gets SIGBUS, a system call EFAULT. Present pages stay. Kernels
    /// without `UFFDIO_POISON` (before 6.6) make missing pages inaccessible instead: a touch gets
    /// SIGSEGV.
    Inaccessible,
}

/// The reason why a restore was not completed, or was given up with a deviation. An incomplete
/// restore continues as before, unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// Some pages can't be restored; the first failure contains the reason.
    #[error("{count} failures, the first: {first}")]
    Incomplete {
        /// Number of failures.
        count: u64,
        /// The first failure.
        first: Box<Failure>,
    },
    /// Everything else is present and the restore has ended, but these pages stay poisoned.
    #[error("{pages} pages stay poisoned; the first failure: {first}")]
    Poisoned {
        /// Number of poisoned pages.
        pages: u64,
        /// The first failure that was kept.
        first: Box<Failure>,
    },
    /// The restore has already ended: the memory is no longer the engine's.
    #[error("the restore has ended already")]
    Over,
    /// The restore was given up while the owner changed its memory, on a kernel that can't poison
    /// pages. Pages discarded during that time may be inaccessible.
    #[error(
        "the restore was given up while its memory changed, and this kernel can't poison pages (that needs Linux 6.6): \
         pages discarded meanwhile may be inaccessible as well as those that were missing. Stop what uses the memory first"
    )]
    Changed,
    /// The restore was given up on a kernel that can't poison pages, and the missing pages were in
    /// too many pieces. All of the memory is inaccessible, including pages that were present.
    #[error(
        "the restore was given up, and all of its memory made inaccessible, present pages too: this kernel can't poison \
         pages (that needs Linux 6.6), and the missing ones were in more pieces than the process may have mappings. \
         Raise the limit (sysctl vm.max_map_count)"
    )]
    TooManyMappings(#[source] MemError),
    /// The call came from a callback or the store, and completing would wait for it.
    #[error("cannot complete a restore from one of its callbacks; call it from another thread")]
    InCallback,
    /// The call came from a forked child.
    #[error("cannot stop a restore in a forked child; it is the parent's")]
    InChild,
    /// The engine's threads could not load all pages, without any failure: the owner kept changing
    /// its memory.
    #[error("{missing} pages are still missing")]
    Missing {
        /// Number of missing pages.
        missing: u64,
    },
}

/// The reason why [`Restored::read_at`] could not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadAtError {
    /// The range is not inside the region, or there is no such region.
    #[error("{len} bytes at offset {offset:#x} are not in region {region}")]
    OutOfRegion {
        /// The requested region.
        region: usize,
        /// Offset in the region.
        offset: u64,
        /// Number of bytes requested.
        len: u64,
    },
    /// A page is poisoned, unmapped or inaccessible.
    #[error(
        "region {region} can't be read at offset {offset:#x}: the page is poisoned, inaccessible or unmapped"
    )]
    Unreadable {
        /// The region.
        region: usize,
        /// An offset in the first page that can't be read; everything before it was read.
        offset: u64,
    },
    /// The call came from a callback or the store, for which the page may be waiting.
    #[error("cannot read memory under restore from a callback; read it from another thread")]
    InCallback,
    /// The kernel refused for another reason.
    #[error(transparent)]
    Refused(ReadFault),
}

/// Number of bytes that [`Restored::read_at`] loads and reads at once.
const MAX_READ_PIECE: usize = 64 << 10;

/// How often giving up a restore on a kernel without poison retries while the owner keeps changing
/// its mappings, and the pause in between.
const MAX_ROUNDS: u32 = 100;
const ROUND_INTERVAL: Duration = Duration::from_micros(100);

/// A running restore: the memory, and the engine's threads that fill it.
///
/// Dropping it stops the restore. Memory that the engine mapped is unmapped. Memory that the caller
/// gave stays: missing pages are poisoned as by [`StopMode::Inaccessible`]; an error of that is
/// logged. A callback may drop it. A callback that does not return makes the drop take two seconds
/// (see [the module](super#callbacks)). In a forked child nothing is done, because the restore is
/// the parent's.
pub struct Restored {
    pub(super) runtime: Arc<Runtime>,
    pub(super) threads: Threads,
    pub(super) regions: Vec<RestoredRegion>,
    pub(super) mapped: Duration,
    pub(super) user_mode_only: bool,
    /// Zero runs that were left to the kernel.
    pub(super) left: Vec<Range<u64>>,
    /// Whether the restore was given up.
    pub(super) over: bool,
    /// Pages that stay left out of forked children in the end, in order.
    pub(super) kept: Arc<[Range<u64>]>,
    /// The memory of each region, which stays mapped as long as it is used. Dropped last.
    pub(super) memory: Vec<RawRegion>,
}

impl std::fmt::Debug for Restored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restored")
            .field("regions", &self.regions)
            .field("complete", &self.is_complete())
            .finish_non_exhaustive()
    }
}

/// Returns the action for complete memory. Only the owner uses it from then on, so forked children
/// may have it, except for the pages that the owner has `kept` from them, and huge pages pay off.
/// `collapse` are the runs that were never registered, if huge pages are wanted.
pub(super) fn on_complete(
    kept: Arc<[Range<u64>]>,
    collapse: Option<Vec<Range<u64>>>,
) -> OnComplete {
    Box::new(move |session| {
        inherit_in_children(session, &kept);
        if let Some(left) = &collapse {
            huge::collapse(session, left);
        }
    })
}

/// Makes forked children inherit the memory, at the addresses where the owner has it now. At an
/// address that the owner has unmapped there may be something else.
fn inherit_in_children(session: &Session<Kernel, SnapshotImage>, kept: &[Range<u64>]) {
    for extent in session.state.mapped() {
        for pages in without(extent.page_numbers(), kept) {
            let address = extent.address + (pages.start - extent.first_page) * PAGE;
            let len = (pages.end - pages.start) * PAGE;
            if let Err(error) = advise_at(Advice::DoFork, address, len) {
                tracing::debug!(%error, "letting children have memory again");
            }
        }
    }
}

impl Restored {
    /// Returns the memory of each region of the snapshot.
    pub fn regions(&self) -> &[RestoredRegion] {
        &self.regions
    }

    /// Returns the regions of address space 0 in ascending order, each with its guest address, as
    /// input for `snaprestore_uffd::memory::guest_memory` (feature `rust-vmm`).
    pub fn guest_regions(&self) -> Vec<(u64, &RawRegion)> {
        let mut regions: Vec<_> = self
            .regions
            .iter()
            .zip(&self.memory)
            .filter(|(region, _)| region.space == 0)
            .map(|(region, memory)| (region.start, memory))
            .collect();
        regions.sort_unstable_by_key(|(start, _)| *start);
        regions
    }

    /// Returns whether every page is present, removed or poisoned, and the memory is unregistered.
    pub fn is_complete(&self) -> bool {
        self.runtime.is_complete()
    }

    /// Waits until the restore is complete, or until prefetch has finished without completing it.
    /// Returns `true` if the restore is complete.
    ///
    /// With [`Prefetch::All`](crate::Prefetch::All), an incomplete restore means that some pages
    /// can't be restored, or that there was no memory for them until the retry timeout, as
    /// [`failures`](Self::failures) reports. With another prefetch, only touches load the remaining
    /// pages. While a touch waits for its page, or for a failure decision about it, the outcome is
    /// open, and the call keeps waiting.
    ///
    /// Doesn't wait when called by a callback, which would wait for itself.
    pub fn wait_complete(&self) -> bool {
        if self.runtime.session.threads.is_current() {
            return self.is_complete();
        }
        self.runtime.wait_complete()
    }

    /// Pauses prefetch until [`resume_prefetch`](Self::resume_prefetch). Touches load their pages
    /// as before. Each thread that prefetches finishes the frame that it is loading, perhaps after
    /// this has returned.
    ///
    /// [`wait_complete`](Self::wait_complete) keeps waiting while prefetch is paused. A stop by
    /// [`StopMode::Complete`] installs all pages nevertheless.
    pub fn pause_prefetch(&self) {
        self.runtime.pause_prefetch(PausedBy::Caller);
    }

    /// Continues prefetch after [`pause_prefetch`](Self::pause_prefetch). No effect if it was not
    /// paused.
    pub fn resume_prefetch(&self) {
        self.runtime.resume_prefetch(PausedBy::Caller);
    }

    /// Limits prefetch to this many bytes of memory per second from now on, on average, in place of
    /// [`Restore::prefetch_bandwidth`](super::Restore::prefetch_bandwidth). `None` removes the
    /// limit.
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
        Stats {
            mapped: self.mapped,
            left_to_kernel: self.left_pages(),
            ..self.runtime.stats()
        }
    }

    /// Returns the statistics so far as a record for `snaprestore report`. `what` describes the
    /// restore for people.
    pub fn run_record(&self, what: impl Into<String>) -> RunRecord {
        self.runtime.run_record(what.into(), self.stats())
    }

    /// Returns the number of pages in the regions that were left to the kernel. A run can extend
    /// over the gap that follows a region.
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

    /// Returns the failures of pages that could not be restored when they were wanted: the first
    /// thousand.
    pub fn failures(&self) -> Vec<Failure> {
        self.runtime.session.failures().0
    }

    /// Reads memory of region `region` from `offset` on. Missing pages are restored first, and
    /// counted like touches. A page that can't be read causes an error rather than a signal.
    pub fn read_at(
        &self,
        region: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), ReadAtError> {
        if self.runtime.session.threads.is_current() {
            return Err(ReadAtError::InCallback);
        }
        let len = buffer.len() as u64;
        let fits = |memory: &RawRegion| {
            offset
                .checked_add(len)
                .is_some_and(|end| end <= memory.len())
        };
        let memory = self.memory.get(region);
        let memory = memory
            .filter(|memory| fits(memory))
            .ok_or(ReadAtError::OutOfRegion {
                region,
                offset,
                len,
            })?;
        let base = memory.address();
        self.read_memory(base + offset, buffer)
            .map_err(|fault| match fault {
                ReadFault::Unreadable { address } => ReadAtError::Unreadable {
                    region,
                    offset: address - base,
                },
                other => ReadAtError::Refused(other),
            })
    }

    /// Reads in pieces, so that a page loaded for a read is rarely discarded again before it is
    /// read.
    fn read_memory(&self, start: u64, buffer: &mut [u8]) -> Result<(), ReadFault> {
        let session = &self.runtime.session;
        let mut at = start;
        for piece in buffer.chunks_mut(MAX_READ_PIECE) {
            let end = at + piece.len() as u64;
            session.load_for_reader(at..end);
            let mut read = read_checked(at, piece);
            // With another userfaultfd, the kernel requests pages that the owner has discarded.
            // With this one it doesn't.
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

    /// Returns whether only instructions of this process wait at a missing page. If so, a system
    /// call or virtual CPU that touches one before the restore is complete fails with EFAULT.
    /// [`read_at`](Self::read_at) works nevertheless.
    pub fn is_user_mode_only(&self) -> bool {
        self.user_mode_only
    }

    /// Ends the restore in the way given by `stop`. Has no effect on a complete restore, which has
    /// already ended.
    ///
    /// Under a KVM memslot, call it only after the virtual CPUs have stopped: a guest must not
    /// touch memory that is poisoned or inaccessible.
    pub fn stop(&mut self, stop: StopMode) -> Result<(), StopError> {
        if self.runtime.is_of_parent() {
            return Err(StopError::InChild);
        }
        match stop {
            StopMode::Complete if self.runtime.session.threads.is_current() => {
                Err(StopError::InCallback)
            }
            StopMode::Complete => self.complete(),
            StopMode::Inaccessible => self.give_up(false),
        }
    }

    /// Installs the missing pages, in this thread and those of the pool.
    fn complete(&mut self) -> Result<(), StopError> {
        if self.over && !self.is_complete() {
            return Err(StopError::Over);
        }
        if self.runtime.install_rest() {
            self.join();
        }
        let session = &self.runtime.session;
        let (failures, count) = session.failures();
        let first = failures.into_iter().next();
        if self.is_complete() {
            return match (session.state.count_poisoned(), first) {
                (0, _) => Ok(()),
                (pages, Some(first)) => Err(StopError::Poisoned {
                    pages,
                    first: Box::new(first),
                }),
                (missing, None) => Err(StopError::Missing { missing }),
            };
        }
        Err(match first {
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
        self.runtime.end_threads(&mut self.threads);
    }

    /// Ends the threads, makes missing pages unreadable, and closes the userfaultfd. If everything
    /// is about to be `unmapped`, present pages need not stay.
    fn give_up(&mut self, unmapped: bool) -> Result<(), StopError> {
        // Only once: after that, the memory may be unmapped and its addresses reused.
        if std::mem::replace(&mut self.over, true) {
            return Ok(());
        }
        self.runtime.session.end();
        self.join();
        if self.is_complete() {
            return Ok(());
        }
        let session = &self.runtime.session;
        let done = if unmapped && self.make_own_inaccessible() {
            session.release_memory();
            Ok(())
        } else {
            session
                .give_up()
                .or_else(|NoPoison| self.give_up_without_poison())
        };
        session.platform.close();
        // Present pages stay the owner's, and a child can't touch missing ones either.
        inherit_in_children(session, &self.kept);
        done
    }

    /// Makes all memory inaccessible if all of it is the engine's, which nobody else unmaps or
    /// moves: one call per region of any size. Returns `false` if it isn't.
    fn make_own_inaccessible(&self) -> bool {
        let session = &self.runtime.session;
        session.read_events(0);
        if !session.state.is_in_place() || !self.memory.iter().all(RawRegion::is_owned) {
            return false;
        }
        let mut made = self
            .memory
            .iter()
            .map(|memory| memory.make_inaccessible(0, memory.len()));
        made.all(|made| {
            made.inspect_err(|error| tracing::debug!(%error, "missing pages are poisoned"))
                .is_ok()
        })
    }

    /// Gives the session up like [`Session::give_up`], on a kernel that can't poison: by address.
    /// The contract of [`RawRegion::new`] guarantees that the owner neither unmaps nor moves
    /// anything meanwhile.
    fn give_up_without_poison(&self) -> Result<(), StopError> {
        let session = &self.runtime.session;
        session.read_events(0);
        let mut done = Ok(());
        for round in 0.. {
            let refused = session.missing().into_iter().find_map(|(address, pages)| {
                let made = session.platform.make_inaccessible(address, pages * PAGE);
                Some((address, made.err()?))
            });
            let changed = session.read_events(0) > 0
                || refused
                    .as_ref()
                    .is_some_and(|(address, _)| session.platform.is_changing(*address));
            if changed {
                done = Err(StopError::Changed);
            }
            match refused {
                _ if changed && round < MAX_ROUNDS => std::thread::sleep(ROUND_INTERVAL),
                Some((_, error)) => {
                    self.make_all_inaccessible();
                    done = Err(StopError::TooManyMappings(error));
                    break;
                }
                None => break,
            }
        }
        session.release_memory();
        done
    }

    fn make_all_inaccessible(&self) {
        let session = &self.runtime.session;
        for extent in session.state.mapped() {
            let made = session
                .platform
                .make_inaccessible(extent.address, extent.pages * PAGE);
            if let Err(error) = made {
                abort(&format!(
                    "cannot make incomplete memory inaccessible: {error}"
                ));
            }
        }
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if self.runtime.is_of_parent() {
            // In the child there is no thread to wait for and no memory to unmap.
            std::mem::forget(std::mem::take(&mut self.threads));
            std::mem::forget(std::mem::take(&mut self.memory));
            std::mem::forget(Arc::clone(&self.runtime));
            return;
        }
        if let Err(error) = self.give_up(true) {
            tracing::error!(%error, "a restore was dropped");
        }
    }
}
