//! Builder for a restore into this process.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use snapshot_format::{ReadError, Region, Snapshot};

use crate::session::{
    Extent, FailurePolicy, Kernel, PAGE, Session, SnapshotImage, State, zero_runs,
};
use snaprestore_uffd::memory::{
    Advice, Mapping, MappingOptions, MemError, Pagemap, RawRegion, SMAPS, Unsuitable, dont_fork_of,
    first_resident,
};
use snaprestore_uffd::os::limits::Hint;
use snaprestore_uffd::uffd::{
    Features, Ioctls, Mask, Modes, OpenError, OpenOptions, RegisterError, UserModeOnly, Userfaultfd,
};
use snaprestore_uffd::{PageSizeError, check_page_size};

use super::guard::{Asker, PolicyGuard};
use super::restored::{self, Restored, RestoredRegion};
use crate::RecordingOptions;
use crate::runtime::{Body, Prefetch, Runtime, Shared, ThreadError, ThreadOptions};

/// A builder for a restore into this process.
#[must_use = "nothing happens before `start`"]
pub struct Restore {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) regions: BTreeMap<usize, RawRegion>,
    threads: ThreadOptions,
    pub(super) on_failure: FailurePolicy,
    pub(super) user_mode_only: bool,
    pub(super) leave_zero_runs: bool,
    pub(super) huge_pages: bool,
    pub(super) mask: Mask,
    pub(super) observer: Option<Box<dyn Fn(u64) + Send + Sync>>,
}

/// The reason why a restore did not start. Nothing is left mapped or running.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// This machine or process may not use userfaultfd as requested.
    #[error("cannot use userfaultfd")]
    Userfaultfd(#[from] OpenError),
    /// The snapshot could not be read.
    #[error("cannot read the snapshot")]
    Snapshot(#[from] ReadError),
    /// Memory could not be mapped or advised.
    #[error("cannot prepare the memory of region {region} ({bytes} bytes)")]
    Memory {
        /// Number of the region.
        region: usize,
        /// Length of the region in bytes.
        bytes: u64,
        /// The kernel's error.
        source: MemError,
    },
    /// The length of the caller's memory differs from the region's.
    #[error("the memory given for region {region} has {given} bytes, but the region has {needed}")]
    RegionLength {
        /// Number of the region.
        region: usize,
        /// Length of the given memory in bytes.
        given: u64,
        /// Length of the region in the snapshot.
        needed: u64,
    },
    /// The caller's memory can't be restored into: it is shared, file-backed, or consists of huge
    /// pages.
    #[error(
        "the memory given for region {region} at {address:#x} is not private anonymous memory of 4 KiB pages"
    )]
    Unsuitable {
        /// Number of the region.
        region: usize,
        /// An address that is not such memory.
        address: u64,
    },
    /// Two regions were given the same memory.
    #[error("the memory given for region {region} at {address:#x} is given for another region too")]
    Overlap {
        /// Number of one of them.
        region: usize,
        /// The start of its memory.
        address: u64,
    },
    /// Memory was given for a region that the snapshot doesn't have.
    #[error(
        "memory was given for region {region}, but the snapshot has {count} regions, numbered from 0"
    )]
    NoSuchRegion {
        /// The given region number.
        region: usize,
        /// Number of regions in the snapshot.
        count: usize,
    },
    /// A region could not be registered.
    #[error("cannot register region {region} with userfaultfd")]
    Register {
        /// Number of the region.
        region: usize,
        /// The kernel's error.
        source: RegisterError,
    },
    /// A page is already present, so it would not be restored.
    #[error(
        "the memory for region {region} is not empty: a page is present at {address:#x}. Give fresh anonymous memory; \
         under mlockall(MCL_FUTURE) map it PROT_NONE, munlock it, and mprotect it before"
    )]
    NotEmpty {
        /// Number of the region.
        region: usize,
        /// The first page that is present.
        address: u64,
    },
    /// The kernel interface needed to prove that the caller's memory is empty and of the right kind
    /// is not available.
    #[error(
        "cannot prove without {file} that the memory given for region {region} is empty and private: mount /proc, \
         start while the process is dumpable (prctl PR_SET_DUMPABLE), or let the engine map the memory"
    )]
    Unproven {
        /// Number of the region.
        region: usize,
        /// The file that can't be read.
        file: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel's page size is not that of a snapshot.
    #[error(transparent)]
    PageSize(#[from] PageSizeError),
    /// The failure policy poisons pages, which this kernel can't do.
    #[error(
        "pages can't be poisoned on this kernel (UFFDIO_POISON needs Linux 6.6): choose another failure policy"
    )]
    NoPoison,
    /// A resource for the session's tables or threads is not available.
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

impl StartError {
    fn resources(what: &'static str, source: std::io::Error) -> Self {
        Self::Resources {
            what,
            hint: Hint::for_thread(&source),
            source,
        }
    }
}

impl Restore {
    /// Creates a builder that restores `snapshot` into memory of this process. The engine maps the
    /// memory, except for regions given by [`Restore::region`].
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            snapshot,
            regions: BTreeMap::new(),
            threads: ThreadOptions::default(),
            on_failure: FailurePolicy::Poison,
            user_mode_only: false,
            leave_zero_runs: true,
            huge_pages: false,
            mask: Mask::NONE,
            observer: None,
        }
    }

    /// Restores region `index` into the caller's memory, which must be empty and have the region's
    /// length. The [`Restored`] takes ownership of it:
    ///
    /// ```compile_fail,E0382
    /// # use snaprestore_engine::restore::Restore;
    /// # use snaprestore_uffd::memory::RawRegion;
    /// # fn again(restore: Restore, memory: RawRegion) {
    /// let restore = restore.region(0, memory);
    /// memory.make_inaccessible(0, 4096);
    /// # }
    /// ```
    ///
    /// Checking the kind of memory takes up to 25 ms per GiB of the process's resident small pages
    /// at lower addresses.
    pub fn region(mut self, index: usize, memory: RawRegion) -> Self {
        self.regions.insert(index, memory);
        self
    }

    /// Sets the number of threads that serve faults: at least 1, and at least 2 with a first-touch
    /// observer, so that a fault of the observer is noticed. One thread serves one touching thread
    /// well. More help when many threads touch at once, or when the store is slow. Default: 2.
    pub fn fault_threads(mut self, threads: usize) -> Self {
        self.threads.fault_threads = threads.max(1);
        self
    }

    /// Sets the pages to load before they are touched. Default: [`Prefetch::Off`].
    pub fn prefetch(mut self, prefetch: Prefetch) -> Self {
        self.threads.prefetch = prefetch;
        self
    }

    /// Selects the working set to prefetch, with [`Prefetch::WorkingSet`] and [`Prefetch::All`].
    /// The snapshot must have it. Default: all of them, in their order.
    pub fn working_set(mut self, name: impl Into<String>) -> Self {
        self.threads.working_set = Some(name.into());
        self
    }

    /// Sets how many threads prefetch for this session at once, from 1 to 64. They belong to
    /// [`Shared`], and are at most half as many as its first session started. Default: one per
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

    /// Sets how long the read of an unreadable page is retried before it counts as failed, with
    /// pauses that grow from 1 ms to half a second. Other faults are served meanwhile. Damaged data
    /// isn't read again. Prefetch that finds no memory retries for the same time. Default: 5 s.
    pub fn retry_timeout(mut self, timeout: Duration) -> Self {
        self.threads.retry_timeout = timeout;
        self
    }

    /// Sets the resources that the session shares with others of the same process. By default, all
    /// sessions without an explicit `Shared` share the prefetch threads, except those with a hook
    /// ([`on_thread_start`](Self::on_thread_start)).
    pub fn shared(mut self, shared: &Shared) -> Self {
        self.threads.shared = OnceLock::from(shared.clone());
        self
    }

    /// Sets a hook that each thread of this session calls before it does anything else, for
    /// instance to confine the thread, or to set its scheduling policy or cores. Signals are
    /// already blocked. The thread has the cores of the main thread and of the thread that starts
    /// it, and no real-time policy, whatever the latter has. The hook must return, and must not
    /// touch memory that is being restored. With a hook, the session gets prefetch threads of its
    /// own, unless it was given a [`Shared`](Self::shared): its threads serve several sessions, and
    /// call only the hook of [`Shared::on_thread_start`].
    pub fn on_thread_start(mut self, hook: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.threads.hook = Some(Arc::new(hook));
        self
    }

    /// Sets the action taken when a touched page can't be restored. Default:
    /// [`FailurePolicy::Poison`]. For a VM's memory choose [`FailurePolicy::Abort`].
    pub fn on_failure(mut self, on_failure: FailurePolicy) -> Self {
        self.on_failure = on_failure;
        self
    }

    /// Permits a userfaultfd that serves only faults of user code, if no other kind is permitted. A
    /// system call or virtual CPU that touches a missing page then fails with EFAULT, except
    /// [`Restored::read_at`]. [`Restored::is_user_mode_only`] returns which kind it is. Default:
    /// no.
    pub fn user_mode_only(mut self, permitted: bool) -> Self {
        self.user_mode_only = permitted;
        self
    }

    /// Sets whether the longest runs of zeros, in whole 2 MiB, are left to the kernel, which serves
    /// them at its own cost. This affects only memory that the engine maps. Memory given with
    /// [`Restore::region`] is registered completely, because an unregistered range reports no
    /// unmapping or move. Disable this if the memory will be moved by `mremap`, which can't move a
    /// partly registered range. With [`Prefetch::All`] they are mapped once the restore is
    /// complete, unless it is dropped before. Default: yes.
    pub fn leave_zero_runs(mut self, leave: bool) -> Self {
        self.leave_zero_runs = leave;
        self
    }

    /// Sets whether the kernel is asked to form huge pages when the memory is complete, wherever
    /// all small pages of one are present (Linux 6.1 or later; no effect before). Memory that was
    /// discarded, or left to the kernel, is not allocated by this. Default: no.
    pub fn huge_pages(mut self, advise: bool) -> Self {
        self.huge_pages = advise;
        self
    }

    /// Hides features of the kernel, to test the behavior on an older one.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Sets a callback that receives the number of each page that a touch loaded, in that order:
    /// the working set of the program. The thread that served the page calls it after the page is
    /// there, so touches that follow each other at once may be reported in another order. [The
    /// module](super#callbacks) describes what it may do.
    pub fn on_first_touch(mut self, observer: impl Fn(u64) + Send + Sync + 'static) -> Self {
        self.observer = Some(Box::new(observer));
        self
    }

    /// Records first touches from the first one on. [`Restored::recording`] returns the recording,
    /// and [`Recording`](crate::Recording) describes what it sees. Default: no.
    pub fn record(mut self, options: RecordingOptions) -> Self {
        self.threads.record = Some(options);
        self
    }

    /// Maps the memory that the caller did not give, registers it and starts the threads. When this
    /// returns, the memory may be touched.
    pub fn start(mut self) -> Result<Restored, StartError> {
        let begun = Instant::now();
        check_page_size()?;
        self.watch_observer();
        let resources = |what| move |source| StartError::resources(what, source);
        let snapshot = Arc::clone(&self.snapshot);
        self.threads.prepare(&snapshot)?;
        let needed = snapshot.regions();
        if let Some(index) = self.regions.keys().find(|index| **index >= needed.len()) {
            return Err(StartError::NoSuchRegion {
                region: *index,
                count: needed.len(),
            });
        }
        let dont_fork = check_given(&self.regions)?;
        let regions = self.memory()?;
        check_heap(self.threads.threads())?;
        let image = SnapshotImage::new(
            Arc::clone(&snapshot),
            self.threads.shared().frames(&snapshot),
        )?;
        // Dropped after everything that is created below, when the userfaultfd is already closed.
        let mut in_children = LeftOutOfChildren::default();
        let uffd = self.open_userfaultfd()?;
        let user_mode_only = uffd.is_user_mode_only();
        let extents = extents(&regions, needed);
        let (state, ring) = State::new(snapshot.page_slots(), &extents, State::SPARE_PIECES)
            .map_err(resources("the session's tables"))?;
        let mut left = if self.leave_zero_runs {
            zero_runs(&snapshot)
        } else {
            Vec::new()
        };
        left.sort_unstable_by_key(|run| run.start);
        let pagemap = Pagemap::open();
        let mut by_address: Vec<_> = regions.iter().zip(needed).enumerate().collect();
        // In order of addresses, so that lists of the ranges grow at their end.
        by_address.sort_unstable_by_key(|(_, (memory, _))| memory.address());
        let mut kept = Vec::new();
        let mut zeros = Vec::new();
        for (index, (memory, region)) in by_address {
            if region.pages == 0 {
                continue;
            }
            kept.extend(in_children.leave_out(index, memory, region, &dont_fork)?);
            let left = if memory.is_owned() { &left[..] } else { &[] };
            self.register(&uffd, index, memory, region, left)?;
            prove_empty(pagemap.as_ref(), index, memory)?;
            for pages in within(region.page_numbers(), left) {
                let address = |page| memory.address() + (page - region.first_page) * PAGE;
                zeros.push(address(pages.start)..address(pages.end));
                state.leave_to_kernel(pages);
            }
        }
        kept.sort_unstable_by_key(|pages| pages.start);
        let kernel = Kernel::new(uffd, ring).map_err(resources("the session's wake-up"))?;
        let asker = match &self.on_failure {
            FailurePolicy::Ask(callback) => Some(Asker::new(Arc::clone(callback))),
            FailurePolicy::Poison | FailurePolicy::Abort => None,
        };
        let owner = PolicyGuard::new(&self.on_failure, asker.as_ref());
        let session = Session::new(
            kernel,
            image,
            state,
            Box::new(owner),
            self.observer.take(),
            self.threads.decoders(),
        );
        session.threads.watch_faults();
        let named = named(&regions, needed);
        let kept: Arc<[Range<u64>]> = kept.into();
        let collapse = self.huge_pages.then(|| left.clone());
        let on_complete = restored::on_complete(Arc::clone(&kept), collapse);
        if self.threads.prefetch != Prefetch::All {
            zeros.clear();
        }
        let runtime = Runtime::new(session, begun, &self.threads, zeros, on_complete);
        let mapped = begun.elapsed();
        let runtime = Arc::new(runtime);
        self.threads.other = asker.map(|asker| {
            let ask: Body = Box::new(move |runtime| asker.run(&runtime.session));
            ("snap-ask", ask)
        });
        match self.threads.start(&runtime) {
            Ok(threads) => {
                in_children.keep();
                Ok(Restored {
                    runtime,
                    threads,
                    regions: named,
                    mapped,
                    user_mode_only,
                    left,
                    over: false,
                    kept,
                    memory: regions,
                })
            }
            Err(ThreadError { what, source }) => Err(StartError::resources(what, source)),
        }
    }

    /// Adds a second fault thread if there is an observer: if one thread is stuck in an observer
    /// that touches the memory, the other reads its fault.
    fn watch_observer(&mut self) {
        if self.observer.is_some() {
            self.threads.fault_threads = self.threads.fault_threads.max(2);
        }
    }

    fn open_userfaultfd(&self) -> Result<Userfaultfd, OpenError> {
        let permitted = if self.user_mode_only {
            UserModeOnly::IfNeeded
        } else {
            UserModeOnly::Never
        };
        OpenOptions::new()
            .wanted(Features::THREAD_ID)
            .mask(self.mask)
            .user_mode_only(permitted)
            .open()
    }

    /// Registers the memory of one region, except for the runs that are left to the kernel.
    fn register(
        &self,
        uffd: &Userfaultfd,
        index: usize,
        memory: &RawRegion,
        region: &Region,
        left: &[Range<u64>],
    ) -> Result<(), StartError> {
        for pages in without(region.page_numbers(), left) {
            let offset = (pages.start - region.first_page) * PAGE;
            let len = (pages.end - pages.start) * PAGE;
            let ioctls = uffd
                .register(memory, offset, len, Modes::MISSING)
                .map_err(|source| StartError::Register {
                    region: index,
                    source,
                })?;
            if !ioctls.contains(Ioctls::COPY.union(Ioctls::ZEROPAGE)) {
                return Err(StartError::Unsuitable {
                    region: index,
                    address: memory.address() + offset,
                });
            }
            let poisons = matches!(
                self.on_failure,
                FailurePolicy::Poison | FailurePolicy::Ask(_)
            );
            if poisons && !ioctls.contains(Ioctls::POISON) {
                return Err(StartError::NoPoison);
            }
        }
        Ok(())
    }

    /// Returns the memory of each region: the caller's, or newly mapped.
    fn memory(&mut self) -> Result<Vec<RawRegion>, StartError> {
        let regions = self.snapshot.regions().iter().enumerate();
        regions
            .map(|(index, region)| match self.regions.remove(&index) {
                Some(memory) if memory.len() == region.bytes() => Ok(memory),
                // A region without pages still gets an address.
                None if region.pages == 0 => new_memory(index, region.start, PAGE),
                Some(memory) => Err(StartError::RegionLength {
                    region: index,
                    given: memory.len(),
                    needed: region.bytes(),
                }),
                None => new_memory(index, region.start, region.bytes()),
            })
            .collect()
    }
}

/// Returns where the pages of the regions are.
fn extents(regions: &[RawRegion], needed: &[Region]) -> Vec<Extent> {
    let extents = regions.iter().zip(needed).map(|(memory, region)| Extent {
        address: memory.address(),
        pages: region.pages,
        first_page: region.first_page,
        large: false,
    });
    extents.filter(|extent| extent.pages > 0).collect()
}

/// Returns the regions as their users see them.
fn named(regions: &[RawRegion], needed: &[Region]) -> Vec<RestoredRegion> {
    let named = regions.iter().zip(needed);
    named
        .map(|(memory, region)| RestoredRegion {
            name: region.name.clone(),
            space: region.space,
            start: region.start,
            first_page: region.first_page,
            len: region.bytes(),
            address: memory.address(),
        })
        .collect()
}

/// Proves that the registered memory of one region is empty.
fn prove_empty(
    pagemap: Result<&Pagemap, &io::Error>,
    index: usize,
    memory: &RawRegion,
) -> Result<(), StartError> {
    let (address, len) = (memory.address(), memory.len());
    let populated = match pagemap {
        Ok(pagemap) => pagemap.first_populated(address, len),
        Err(error) => Err(copy_of(error)),
    };
    let populated = populated.or_else(|source| {
        // Without /proc, or in a process that is not dumpable. Memory that the engine has just
        // mapped needs fewer checks.
        if memory.is_owned() {
            tracing::debug!(%source, "the memory is looked at by mincore");
            first_resident(address, len)
        } else {
            Err(source)
        }
    });
    let populated = populated.map_err(|source| StartError::Unproven {
        region: index,
        file: "/proc/self/pagemap",
        source,
    })?;
    match populated {
        Some(address) => Err(StartError::NotEmpty {
            region: index,
            address,
        }),
        None => Ok(()),
    }
}

/// Copies an error, because it can't be cloned and may be needed for each region.
fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => error.kind().into(),
    }
}

/// Memory that is left out of forked children until it is complete or, if the restore doesn't
/// start, until this is dropped.
#[derive(Default)]
struct LeftOutOfChildren<'a>(Vec<(&'a RawRegion, Range<u64>)>);

impl<'a> LeftOutOfChildren<'a> {
    /// Leaves the memory of a region out of forked children. `dont_fork` are the addresses that the
    /// caller has already left out. Returns the pages at these addresses, which must stay left out
    /// in the end.
    fn leave_out(
        &mut self,
        index: usize,
        memory: &'a RawRegion,
        region: &Region,
        dont_fork: &[Range<u64>],
    ) -> Result<impl Iterator<Item = Range<u64>>, StartError> {
        let start = memory.address();
        let all = start..start + memory.len();
        for part in without(all.clone(), dont_fork) {
            let (offset, len) = (part.start - start, part.end - part.start);
            self.0.push((memory, offset..offset + len));
            let advised = memory.advise(Advice::DontFork, offset, len);
            advised.map_err(|source| StartError::Memory {
                region: index,
                bytes: len,
                source,
            })?;
        }
        let page = |address: u64| region.first_page + (address - start) / PAGE;
        let pages = |part: Range<u64>| page(part.start)..page(part.end);
        let kept: Vec<_> = within(all, dont_fork).into_iter().map(pages).collect();
        Ok(kept.into_iter())
    }

    /// Keeps the memory left out: the restore has started, and undoes it in the end.
    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for LeftOutOfChildren<'_> {
    fn drop(&mut self) {
        for (memory, part) in &self.0 {
            let len = part.end - part.start;
            if let Err(error) = memory.advise(Advice::DoFork, part.start, len) {
                tracing::debug!(%error, "letting children have memory again");
            }
        }
    }
}

/// Heap reserve for a session's tables, and for the stack and buffers of each thread.
const HEAP: u64 = 8 << 20;
const HEAP_PER_THREAD: u64 = 6 << 20;

/// Checks that the heap has room for the allocations that follow. A failing allocation aborts the
/// process, so in a process with a memory limit the shortage is detected here, where it is an
/// error.
fn check_heap(threads: usize) -> Result<(), StartError> {
    let bytes = HEAP + threads as u64 * HEAP_PER_THREAD;
    match Mapping::new(bytes) {
        Ok(_) => Ok(()),
        Err(source) => Err(StartError::resources(
            "room for the session's tables and threads (see RLIMIT_DATA and RLIMIT_AS)",
            io::Error::other(source),
        )),
    }
}

/// Maps memory for a region.
fn new_memory(region: usize, start: u64, bytes: u64) -> Result<RawRegion, StartError> {
    MappingOptions::new()
        .congruent_to(start)
        .map(bytes)
        .map(|mapping| RawRegion::owned(Arc::new(mapping)))
        .map_err(|source| StartError::Memory {
            region,
            bytes,
            source,
        })
}

/// Checks that the caller's memory is private and that no piece is given twice: shared memory and
/// files contain pages that raise no fault. Returns the addresses that are already left out of
/// forked children, in order.
fn check_given(given: &BTreeMap<usize, RawRegion>) -> Result<Vec<Range<u64>>, StartError> {
    let mut by_address: Vec<_> = given.iter().collect();
    by_address.sort_by_key(|(_, memory)| memory.address());
    for pair in by_address.windows(2) {
        let [(_, low), (region, high)] = pair else {
            continue;
        };
        if low.address() + low.len() > high.address() {
            return Err(StartError::Overlap {
                region: **region,
                address: high.address(),
            });
        }
    }
    let ranges: Vec<_> = by_address
        .iter()
        .map(|(_, memory)| memory.address()..memory.address() + memory.len())
        .collect();
    dont_fork_of(&ranges).map_err(|unsuitable| match unsuitable {
        Unsuitable::Kind { range, address } => StartError::Unsuitable {
            region: *by_address[range].0,
            address,
        },
        Unsuitable::Unproven(source) => StartError::Unproven {
            region: given.keys().next().copied().unwrap_or_default(),
            file: SMAPS,
            source,
        },
    })
}

/// Returns the parts of `range` that are inside one of `runs`, which must be sorted and disjoint.
fn within(range: Range<u64>, runs: &[Range<u64>]) -> Vec<Range<u64>> {
    let first = runs.partition_point(|run| run.end <= range.start);
    let cut = |run: &Range<u64>| run.start.max(range.start)..run.end.min(range.end);
    let parts = runs[first..].iter().map(cut);
    parts.take_while(|part| !part.is_empty()).collect()
}

/// Returns the parts of `range` that are outside all `runs`, which must be sorted and disjoint.
pub(super) fn without(range: Range<u64>, runs: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut next = range.start;
    for run in within(range.clone(), runs) {
        if next < run.start {
            parts.push(next..run.start);
        }
        next = next.max(run.end);
    }
    if next < range.end {
        parts.push(next..range.end);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_runs_split_a_region() {
        let runs = [0..10, 600..700, 1020..2000];
        assert_eq!(within(512..1024, &runs), [600..700, 1020..1024]);
        assert_eq!(without(512..1024, &runs), [512..600, 700..1020]);
        assert_eq!(without(600..700, &runs), []);
        assert!(without(0..10, &runs).is_empty());
    }
}
