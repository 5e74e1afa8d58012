//! A restore that runs.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use snapshot_format::layout::PAGE_SIZE_U64;

use crate::runtime::{OnComplete, Runtime, Stats, Threads};
use crate::session::{Failure, Kernel, NoPoison, PAGE, Platform as _, Session, SnapshotImage};
use snaprestore_uffd::memory::{Advice, MemError, RawRegion, advise_at};
use snaprestore_uffd::memory::{ReadFault, read_checked};
use snaprestore_uffd::os::abort;
use snaprestore_uffd::to_usize;

use super::builder::without;
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
    pub(super) address: u64,
}

impl RestoredRegion {
    /// Its first byte in this process. Valid as long as the [`Restored`] lives, or the caller's
    /// mapping.
    ///
    /// Memory that the engine mapped is unmapped as a whole in the end. Who unmaps or moves a part
    /// of it before frees addresses that something else may be using by then: give memory of your
    /// own ([`Restore::region`](super::Restore::region)) for that.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(to_usize(self.address))
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
pub enum StopMode {
    /// Everything that is missing is installed first, and pages that were poisoned are brought after
    /// all, if they can be had by now.
    Complete,
    /// What is missing is poisoned: a touch is SIGBUS, a system call gets EFAULT. What is there
    /// stays. Kernels without `UFFDIO_POISON` (before 6.6) take access to it away: a touch is SIGSEGV.
    Inaccessible,
}

/// Why a restore was not completed, and goes on as before unless a variant says otherwise; or was
/// given up, but not exactly.
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
    /// It was given up, and the owner changed its memory at the same time, on a kernel that can't poison
    /// pages: what was discarded just then may be inaccessible.
    #[error(
        "the restore was given up while its memory changed, and this kernel can't poison pages (that needs Linux 6.6): \
         pages discarded meanwhile may be inaccessible as well as those that were missing. StopMode what uses the memory first"
    )]
    Changed,
    /// It was given up, and the missing pages were in too many pieces for a kernel that can't poison pages:
    /// all of the memory is inaccessible, also what was there.
    #[error(
        "the restore was given up, and all of its memory made inaccessible, present pages too: this kernel can't poison \
         pages (that needs Linux 6.6), and the missing ones were in more pieces than the process may have mappings. \
         Raise the limit (sysctl vm.max_map_count)"
    )]
    TooManyMappings(#[source] MemError),
    /// Called by a callback or the store, for which completing would wait.
    #[error("cannot complete a restore from one of its callbacks; call it from another thread")]
    InCallback,
    /// Called in a child that the process has forked.
    #[error("cannot stop a restore in a forked child; it is the parent's")]
    InChild,
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
    /// Called by a callback or the store, which may be what the page waits for.
    #[error("cannot read memory under restore from a callback; read it from another thread")]
    InCallback,
    /// The kernel refused for another reason.
    #[error(transparent)]
    Refused(ReadFault),
}

/// How much [`Restored::read_at`] has brought and reads at once.
const READ_PIECE: usize = 64 << 10;

/// How often a restore that is given up, on a kernel without poison, follows an owner that goes on
/// changing its mappings, and how long it waits in between.
const MAX_ROUNDS: u32 = 100;
const ROUND_INTERVAL: Duration = Duration::from_micros(100);

/// A restore that runs: the memory, and the engine's threads that fill it.
///
/// Dropping it stops the restore. Memory that the engine mapped is unmapped. Memory that was given
/// stays: what is missing is poisoned as by [`StopMode::Inaccessible`], and where that returns an error, a
/// drop logs it. A callback may drop it; a callback that does not return makes it take two seconds
/// (see [the module](super#callbacks)). In a forked child nothing is done: the restore is the
/// parent's.
pub struct Restored {
    pub(super) running: Arc<Runtime>,
    pub(super) threads: Threads,
    pub(super) regions: Vec<RestoredRegion>,
    pub(super) mapped: Duration,
    pub(super) user_mode_only: bool,
    /// Zero runs that were left to the kernel.
    pub(super) left: Vec<Range<u64>>,
    /// Whether it was given up.
    pub(super) over: bool,
    /// Pages that are left out of children in the end as well, in order.
    pub(super) kept: Arc<[Range<u64>]>,
    /// The memory of each region, which is mapped for as long as it is used. Dropped last.
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

/// What becomes of memory that is complete: it is the owner's alone, so children may have it but for
/// the pages that the owner has `kept` from them, and huge pages are worth having. `collapse` are the
/// runs that were never registered, if huge pages are wanted.
pub(super) fn on_complete(
    kept: Arc<[Range<u64>]>,
    collapse: Option<Vec<Range<u64>>>,
) -> OnComplete {
    Box::new(move |session| {
        let_children_have(session, &kept);
        if let Some(left) = &collapse {
            huge::collapse(session, left);
        }
    })
}

/// Lets children have the memory, where the owner has it now: at an address that it has unmapped there
/// may be something else.
fn let_children_have(session: &Session<Kernel, SnapshotImage>, kept: &[Range<u64>]) {
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
    /// The memory of each region of the snapshot.
    pub fn regions(&self) -> &[RestoredRegion] {
        &self.regions
    }

    /// The regions of address space 0, each with its address in the guest, in ascending order: for
    /// `snaprestore_uffd::memory::guest_memory` (feature `rust-vmm`).
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

    /// Whether every page is there (or was discarded, or poisoned) and the memory is unregistered.
    pub fn is_complete(&self) -> bool {
        self.running.is_complete()
    }

    /// Waits until the restore is complete, or prefetch is at its end without that: with
    /// [`Prefetch::All`](super::Prefetch::All) then some pages can't be restored, or there was no
    /// memory for them until the retry timeout was over, as [`failures`](Self::failures) says; with
    /// another prefetch the rest comes by touches only. While a touch waits for its page, or for a verdict
    /// about it, it isn't known which, and is waited for. True if it is complete.
    ///
    /// Doesn't wait when called by a callback, which would wait for itself.
    pub fn wait_complete(&self) -> bool {
        if self.running.session.threads.is_current() {
            return self.is_complete();
        }
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
        if self.running.session.threads.is_current() {
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
    /// then nothing is left to do.
    ///
    /// Under a KVM memslot call it only after the virtual CPUs have stopped: a guest must not touch
    /// memory that is poisoned or inaccessible.
    pub fn stop(&mut self, stop: StopMode) -> Result<(), StopError> {
        if self.running.is_of_parent() {
            return Err(StopError::InChild);
        }
        match stop {
            StopMode::Complete if self.running.session.threads.is_current() => {
                Err(StopError::InCallback)
            }
            StopMode::Complete => self.complete(),
            StopMode::Inaccessible => self.give_up(false),
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
        self.running.end_threads(&mut self.threads);
    }

    /// Ends the threads, sees to it that what is missing can't be read, and closes the userfaultfd.
    /// If all is `unmapped` next, what is there need not stay.
    fn give_up(&mut self, unmapped: bool) -> Result<(), StopError> {
        // Once given up, the memory may be unmapped and its addresses be something else's.
        if std::mem::replace(&mut self.over, true) {
            return Ok(());
        }
        self.running.session.end();
        self.join();
        if self.is_complete() {
            return Ok(());
        }
        let session = &self.running.session;
        let done = if unmapped && self.make_own_inaccessible() {
            session.let_go();
            Ok(())
        } else {
            session
                .give_up()
                .or_else(|NoPoison| self.give_up_without_poison())
        };
        session.platform.close();
        // What is there stays the owner's, and what isn't can't be touched by a child either.
        let_children_have(session, &self.kept);
        done
    }

    /// Takes every access away if all of the memory is the engine's, which nobody else unmaps or moves:
    /// one call for a region of any size. False if it isn't.
    fn make_own_inaccessible(&self) -> bool {
        let session = &self.running.session;
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

    /// As [`Session::give_up`], on a kernel that can't poison: by address, while the owner neither
    /// unmaps nor moves anything, which the contract of [`RawRegion::new`] says.
    fn give_up_without_poison(&self) -> Result<(), StopError> {
        let session = &self.running.session;
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
        session.let_go();
        done
    }

    fn make_all_inaccessible(&self) {
        let session = &self.running.session;
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
        if self.running.is_of_parent() {
            // Nothing of it exists here: no thread to wait for, and no memory to unmap.
            std::mem::forget(std::mem::take(&mut self.threads));
            std::mem::forget(std::mem::take(&mut self.memory));
            std::mem::forget(Arc::clone(&self.running));
            return;
        }
        if let Err(error) = self.give_up(true) {
            tracing::error!(%error, "a restore was dropped");
        }
    }
}
