//! What to restore, and how.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use snapshot_format::{ReadError, Region, Snapshot};

use crate::mem::{
    Advice, MappingOptions, MemError, RawRegion, first_populated, first_resident, first_unsuitable,
};
use crate::session::{Extent, Kernel, OnFailure, PAGE, Session, SnapshotImage, State, zero_runs};
use crate::sys::{
    Features, Ioctls, Mask, Modes, OpenError, OpenOptions, RegisterError, UserModeOnly, Userfaultfd,
};

use super::guard::{Asker, Owner};
use super::restored::{self, Restored, RestoredRegion};
use crate::running::{Body, Crew, Prefetch, Running, Shared, ThreadError, crew_options};

/// A restore into this process, being described.
#[must_use = "nothing happens before `start`"]
pub struct Restore {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) regions: BTreeMap<usize, RawRegion>,
    crew: Crew,
    pub(super) on_failure: OnFailure,
    pub(super) user_mode_only: bool,
    pub(super) leave_zero_runs: bool,
    pub(super) huge_pages: bool,
    pub(super) mask: Mask,
    pub(super) observer: Option<Box<dyn Fn(u64) + Send + Sync>>,
}

/// Why a restore did not start. Nothing is left mapped or running.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// This machine or process may not use userfaultfd as asked.
    #[error("userfaultfd can't be used")]
    Userfaultfd(#[from] OpenError),
    /// The snapshot could not be read.
    #[error("the snapshot can't be read")]
    Snapshot(#[from] ReadError),
    /// Memory could not be mapped or advised.
    #[error("memory for region {region} ({bytes} bytes) can't be prepared")]
    Memory {
        /// Number of the region.
        region: usize,
        /// Its length.
        bytes: u64,
        /// What the kernel said.
        source: MemError,
    },
    /// The caller's memory doesn't fit the region.
    #[error("the memory given for region {region} has {given} bytes, but the region has {needed}")]
    RegionLength {
        /// Number of the region.
        region: usize,
        /// What was given.
        given: u64,
        /// What the snapshot says.
        needed: u64,
    },
    /// The caller's memory is of a kind that can't be restored into: shared, of a file, or of huge
    /// pages.
    #[error(
        "the memory given for region {region} at {address:#x} is not private anonymous memory of 4 KiB pages"
    )]
    Unsuitable {
        /// Number of the region.
        region: usize,
        /// Where it isn't.
        address: u64,
    },
    /// The same memory was given for two regions.
    #[error("the memory given for region {region} at {address:#x} is given for another region too")]
    Overlap {
        /// Number of one of them.
        region: usize,
        /// Where it starts.
        address: u64,
    },
    /// Memory was given for a region that the snapshot doesn't have.
    #[error(
        "memory was given for region {region}, but the snapshot has {count} regions, numbered from 0"
    )]
    NoSuchRegion {
        /// Number given.
        region: usize,
        /// Regions of the snapshot.
        count: usize,
    },
    /// A range could not be registered.
    #[error("region {region} can't be registered with userfaultfd")]
    Register {
        /// Number of the region.
        region: usize,
        /// What the kernel said.
        source: RegisterError,
    },
    /// A page is there already, so it would not be restored.
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
    /// Whether the caller's memory is empty and of the right kind can't be seen.
    #[error(
        "that the memory given for region {region} is empty private memory can't be proved without {file}: mount /proc, \
         start while the process is dumpable (prctl PR_SET_DUMPABLE), or let the engine map the memory"
    )]
    Unproven {
        /// Number of the region.
        region: usize,
        /// The file that can't be read.
        file: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Bad pages were to be poisoned, which this kernel can't do.
    #[error(
        "pages can't be poisoned on this kernel (UFFDIO_POISON needs Linux 6.6): choose another way to treat failures"
    )]
    NoPoison,
    /// Memory for the session's tables or threads.
    #[error("{what} can't be made")]
    Resources {
        /// What.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl Restore {
    /// Restores `snapshot` into memory of this process: mapped by the engine, unless given by
    /// [`Restore::region`].
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self {
            snapshot,
            regions: BTreeMap::new(),
            crew: Crew::default(),
            on_failure: OnFailure::Poison,
            user_mode_only: false,
            leave_zero_runs: true,
            huge_pages: false,
            mask: Mask::NONE,
            observer: None,
        }
    }

    /// Restores region `index` into the caller's memory, which must have its length and be empty.
    pub fn region(mut self, index: usize, memory: RawRegion) -> Self {
        self.regions.insert(index, memory);
        self
    }

    crew_options!();

    /// What is done when a touched page can't be restored. Default [`OnFailure::Poison`]; for a
    /// VM's memory choose
    /// [`OnFailure::Abort`].
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.on_failure = on_failure;
        self
    }

    /// Permits a userfaultfd that serves faults of user code only, where another is not permitted.
    /// A system call or virtual CPU that touches a missing page then fails with EFAULT, other than
    /// [`Restored::read_at`]. [`Restored::is_user_mode_only`] tells which it is. Default: no.
    pub fn user_mode_only(mut self, permitted: bool) -> Self {
        self.user_mode_only = permitted;
        self
    }

    /// Whether the longest runs of zeros, in whole 2 MiB, are left to the kernel, which serves them
    /// at its own price. It happens in memory that the engine maps; in memory that is given with
    /// [`Restore::region`] everything is registered, since nothing would be heard of what is
    /// unmapped or moved in a range that isn't. Say no if memory will be moved by `mremap`, which
    /// can't move a range that is registered in parts. Default: yes.
    pub fn leave_zero_runs(mut self, leave: bool) -> Self {
        self.leave_zero_runs = leave;
        self
    }

    /// Has the kernel make huge pages of the memory when it is complete, wherever all of one is
    /// there (Linux 6.1; before, nothing is done). What was discarded, or left to the kernel, gets
    /// no memory by that. Default: no.
    pub fn huge_pages(mut self, advise: bool) -> Self {
        self.huge_pages = advise;
        self
    }

    /// Hides a part of the kernel, to try what an older one would do.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Called with the number of each page that a touch brought in, in that order, by the thread
    /// that served it: the working set of whoever runs. What it may do is said in
    /// [the module](super#callbacks).
    pub fn on_first_touch(mut self, observer: impl Fn(u64) + Send + Sync + 'static) -> Self {
        self.observer = Some(Box::new(observer));
        self
    }

    /// Maps what has to be mapped, registers it, starts the threads, and returns: the memory may be
    /// touched.
    pub fn start(mut self) -> Result<Restored, StartError> {
        let begun = Instant::now();
        self.watch_observer();
        let resources = |what| move |source| StartError::Resources { what, source };
        let snapshot = Arc::clone(&self.snapshot);
        let image =
            SnapshotImage::new(Arc::clone(&snapshot), self.crew.shared().frames(&snapshot))?;
        let needed = snapshot.regions()?;
        if let Some(index) = self.regions.keys().find(|index| **index >= needed.len()) {
            return Err(StartError::NoSuchRegion {
                region: *index,
                count: needed.len(),
            });
        }
        check_given(&self.regions)?;
        let regions = self.memory()?;
        // Dropped after all that is made below: the userfaultfd is closed by then.
        let mut in_children = LeftOutOfChildren::default();
        let permitted = if self.user_mode_only {
            UserModeOnly::IfNeeded
        } else {
            UserModeOnly::Never
        };
        let uffd = OpenOptions::new()
            .wanted(Features::THREAD_ID)
            .mask(self.mask)
            .user_mode_only(permitted)
            .open()?;
        let user_mode_only = uffd.is_user_mode_only();
        let extents: Vec<Extent> = regions
            .iter()
            .zip(needed)
            .map(|(memory, region)| Extent {
                address: memory.address(),
                pages: region.pages,
                first_page: region.first_page,
                large: false,
            })
            .filter(|extent| extent.pages > 0)
            .collect();
        let (state, ring) = State::new(snapshot.page_slots(), &extents, State::SPARE_PIECES)
            .map_err(resources("the session's tables"))?;
        let left = if self.leave_zero_runs {
            zero_runs(&snapshot)
        } else {
            Vec::new()
        };
        for (index, (memory, region)) in regions.iter().zip(needed).enumerate() {
            in_children.leave_out(index, memory, region)?;
            let left = if memory.is_owned() { &left[..] } else { &[] };
            self.register(&uffd, index, memory, region, left)?;
            for pages in within(region.page_numbers(), left) {
                state.leave_out(pages);
            }
        }
        let kernel = Kernel::new(uffd, ring).map_err(resources("the session's wake-up"))?;
        let asker = match &self.on_failure {
            OnFailure::Ask(callback) => Some(Asker::new(Arc::clone(callback))),
            OnFailure::Poison | OnFailure::Abort => None,
        };
        let owner = Owner::new(&self.on_failure, asker.as_ref());
        let session = Session::new(
            kernel,
            image,
            state,
            Box::new(owner),
            self.observer.take(),
            self.crew.decoders(),
        );
        session.threads.watch_faults();
        let named = regions
            .iter()
            .zip(needed)
            .map(|(memory, region)| RestoredRegion {
                name: region.name.clone(),
                space: region.space,
                start: region.start,
                first_page: region.first_page,
                len: region.bytes(),
                memory: memory.clone(),
            });
        let on_complete = restored::on_complete(self.huge_pages.then(|| left.clone()));
        let running = Running::new(session, begun, &self.crew, on_complete);
        let mapped = begun.elapsed();
        let running = Arc::new(running);
        self.crew.other = asker.map(|asker| {
            let ask: Body = Box::new(move |running| asker.run(&running.session));
            ("snap-ask", ask)
        });
        match self.crew.start(&running) {
            Ok(threads) => {
                in_children.keep();
                Ok(Restored {
                    running,
                    threads,
                    regions: named.collect(),
                    mapped,
                    user_mode_only,
                    left,
                    over: false,
                })
            }
            Err(ThreadError { what, source }) => Err(StartError::Resources { what, source }),
        }
    }

    /// While one fault thread is stuck in an observer that touches memory, another reads of it.
    fn watch_observer(&mut self) {
        if self.observer.is_some() {
            self.crew.fault_threads = self.crew.fault_threads.max(2);
        }
    }

    /// Registers the memory of one region, but for the runs that are left to the kernel, and proves
    /// that it is empty.
    fn register(
        &self,
        uffd: &Userfaultfd,
        index: usize,
        memory: &RawRegion,
        region: &Region,
        left: &[Range<u64>],
    ) -> Result<(), StartError> {
        if region.pages == 0 {
            return Ok(());
        }
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
            let poisons = matches!(self.on_failure, OnFailure::Poison | OnFailure::Ask(_));
            if poisons && !ioctls.contains(Ioctls::POISON) {
                return Err(StartError::NoPoison);
            }
        }
        let populated = first_populated(memory.address(), memory.len());
        let populated = populated.or_else(|source| {
            // Without /proc, or in a process that is not dumpable. Of memory that was mapped just
            // now less has to be known.
            if memory.is_owned() {
                tracing::debug!(%source, "the memory is looked at by mincore");
                first_resident(memory.address(), memory.len())
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

    /// The memory of each region: the caller's, or new.
    fn memory(&mut self) -> Result<Vec<RawRegion>, StartError> {
        let regions = self.snapshot.regions()?.iter().enumerate();
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

/// Memory that is left out of children until it is complete, or, if the restore doesn't start,
/// until this is dropped.
#[derive(Default)]
struct LeftOutOfChildren(Vec<RawRegion>);

impl LeftOutOfChildren {
    fn leave_out(
        &mut self,
        index: usize,
        memory: &RawRegion,
        region: &Region,
    ) -> Result<(), StartError> {
        if region.pages == 0 {
            return Ok(());
        }
        self.0.push(memory.clone());
        let advised = memory.advise(Advice::DontFork, 0, memory.len());
        advised.map_err(|source| StartError::Memory {
            region: index,
            bytes: memory.len(),
            source,
        })
    }

    /// The restore has started, and undoes it in the end.
    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for LeftOutOfChildren {
    fn drop(&mut self) {
        for memory in &self.0 {
            if let Err(error) = memory.advise(Advice::DoFork, 0, memory.len()) {
                tracing::debug!(%error, "letting children have memory again");
            }
        }
    }
}

/// Memory for a region, made here.
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

/// Memory that the caller gives is its own, each piece once: in shared memory and files there are
/// pages that raise no fault.
fn check_given(given: &BTreeMap<usize, RawRegion>) -> Result<(), StartError> {
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
    for (region, memory) in given {
        let unsuitable = first_unsuitable(memory.address(), memory.len());
        let unsuitable = unsuitable.map_err(|source| StartError::Unproven {
            region: *region,
            file: "/proc/self/maps",
            source,
        })?;
        if let Some(address) = unsuitable {
            return Err(StartError::Unsuitable {
                region: *region,
                address,
            });
        }
    }
    Ok(())
}

/// The parts of `pages` that are in one of `runs`.
fn within(pages: Range<u64>, runs: &[Range<u64>]) -> Vec<Range<u64>> {
    let cut = |run: &Range<u64>| run.start.max(pages.start)..run.end.min(pages.end);
    let mut parts: Vec<_> = runs
        .iter()
        .map(cut)
        .filter(|part| !part.is_empty())
        .collect();
    parts.sort_unstable_by_key(|part| part.start);
    parts
}

/// The parts of `pages` that are in none of `runs`.
fn without(pages: Range<u64>, runs: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut next = pages.start;
    for run in within(pages.clone(), runs) {
        if next < run.start {
            parts.push(next..run.start);
        }
        next = next.max(run.end);
    }
    if next < pages.end {
        parts.push(next..pages.end);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_split_a_region() {
        let runs = [600..700, 0..10, 1020..2000];
        assert_eq!(within(512..1024, &runs), [600..700, 1020..1024]);
        assert_eq!(without(512..1024, &runs), [512..600, 700..1020]);
        assert_eq!(without(600..700, &runs), []);
        assert!(without(0..10, &runs).is_empty());
    }
}
