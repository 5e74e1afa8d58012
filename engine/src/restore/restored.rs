//! A restore that runs.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use snapshot_format::layout::PAGE_SIZE_U64;

use crate::mem::{Advice, RawRegion, advise_at};
use crate::running::{OnComplete, Running, Stats, Threads};
use crate::session::{Extent, Failure, Kernel, PAGE, Platform as _, Session, SnapshotImage};
use crate::sys::{ReadFault, read_checked};

use super::huge;

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
    /// Everything that is missing is installed first, and pages that were poisoned are brought after
    /// all, if they can be had by now.
    Complete,
    /// What is missing becomes inaccessible: a touch is SIGSEGV, a system call gets EFAULT. What is
    /// there stays.
    Inaccessible,
    /// All of the memory goes back to the kernel. Its addresses stay reserved, without access,
    /// until the caller unmaps its own mappings and the [`Restored`] is dropped, so that nothing
    /// else comes to lie there.
    Unmap,
}

/// Why a restore was not completed. It goes on as before, unless a variant says otherwise.
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
    /// Everything else is there and the restore has ended, but these pages stay poisoned.
    #[error("{pages} pages stay poisoned; the first failure: {first}")]
    Poisoned {
        /// Pages.
        pages: u64,
        /// The first failure that was kept.
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

/// How much [`Restored::read_at`] has brought and reads at once.
const READ_PIECE: usize = 64 << 10;

/// How often a restore that is given up follows an owner that goes on changing its mappings.
const MOST_ROUNDS: u32 = 10_000;

/// A restore that runs: the memory, and the engine's threads that fill it.
///
/// Dropping it stops the restore as [`Stop::Inaccessible`] does; memory that the engine mapped is
/// unmapped then.
pub struct Restored {
    pub(super) running: Arc<Running>,
    pub(super) threads: Threads,
    pub(super) regions: Vec<RestoredRegion>,
    pub(super) mapped: Duration,
    pub(super) user_mode_only: bool,
    /// Zero runs that were left to the kernel.
    pub(super) left: Vec<Range<u64>>,
    /// Whether it was given up.
    pub(super) over: bool,
}

impl std::fmt::Debug for Restored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restored")
            .field("regions", &self.regions)
            .field("complete", &self.is_complete())
            .finish_non_exhaustive()
    }
}

/// What becomes of memory that is complete: it is the owner's alone, so children may have it, and
/// huge pages are worth having. `collapse` are the runs that were never registered, if huge pages
/// are wanted.
pub(super) fn on_complete(collapse: Option<Vec<Range<u64>>>) -> OnComplete {
    Box::new(move |session| {
        advise(session, Advice::DoFork);
        if let Some(left) = &collapse {
            huge::collapse(session, left);
        }
    })
}

fn advise(session: &Session<Kernel, SnapshotImage>, advice: Advice) {
    // Where the owner has it now: at an address that it has unmapped there may be something else.
    for Extent { address, pages, .. } in session.state.map().extents() {
        if let Err(error) = advise_at(advice, address, pages * PAGE) {
            tracing::debug!(%error, ?advice, "advice at the end of a restore");
        }
    }
}

impl Restored {
    /// The memory of each region of the snapshot.
    pub fn regions(&self) -> &[RestoredRegion] {
        &self.regions
    }

    /// Whether every page is there (or was discarded, or poisoned) and the memory is unregistered.
    pub fn is_complete(&self) -> bool {
        self.running.is_complete()
    }

    /// Waits until the restore is complete, or prefetch is at its end without that: with
    /// [`Prefetch::All`](super::Prefetch::All) then some pages can't be restored, or there was no
    /// memory for them until the retry timeout was over, as [`failures`](Self::failures) says; with
    /// another prefetch the rest comes by touches only. While a touch waits for its page, or for a verdict
    /// about it, it isn't known which, and is waited for. True if it is complete.
    pub fn wait_complete(&self) -> bool {
        self.running.wait_complete()
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        Stats {
            mapped: self.mapped,
            left_to_kernel: self.left_pages(),
            ..self.running.stats()
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

    /// The pages that could not be restored when they were wanted, the first thousand of them.
    pub fn failures(&self) -> Vec<Failure> {
        self.running.session.failures().0
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
        let memory = self.regions.get(region).map(|region| &region.memory);
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
        let session = &self.running.session;
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
        self.user_mode_only
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
                for extent in self.running.session.state.map().extents() {
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
        if self.running.install_rest() {
            self.join();
        }
        let session = &self.running.session;
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
        self.running.session.end();
        self.join();
        if self.is_complete() {
            return;
        }
        let session = &self.running.session;
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
        advise(&self.running.session, Advice::DoFork);
    }

    fn make_all_inaccessible(&self) {
        for extent in self.running.session.state.map().extents() {
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
