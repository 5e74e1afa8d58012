//! The memory that it hands over, or pretends to have.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use snaprestore_uffd::memory::{MappingOptions, RawRegion};
use snaprestore_uffd::uffd::{Features, Modes, OpenOptions, Userfaultfd};

use crate::deeds::Deed;

pub(crate) const PAGE: u64 = 4096;

/// Difference between the memory and its description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    None,
    /// No memory is registered.
    NotRegistered,
    /// Only the first half is registered.
    HalfRegistered,
    /// Nothing is mapped at the address.
    NotMapped,
    /// Only half of the memory is mapped.
    HalfMapped,
    /// The memory is registered with another userfaultfd.
    OfAnother,
    /// Reads of the userfaultfd block.
    Blocking,
    /// Forks are reported, which takes a privileged VMM.
    Forks,
    /// All pages are present already.
    Present,
}

impl Lie {
    pub(crate) const ALL: &[Self] = &[
        Self::None,
        Self::NotRegistered,
        Self::HalfRegistered,
        Self::NotMapped,
        Self::HalfMapped,
        Self::OfAnother,
        Self::Blocking,
        Self::Forks,
        Self::Present,
    ];
}

/// Memory and its userfaultfd. Neither is ever released.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) address: u64,
    pub(crate) len: u64,
    uffd: &'static Userfaultfd,
}

impl Memory {
    pub(crate) fn new(len: u64, lie: Lie, deeds: &[Deed]) -> io::Result<Self> {
        let mut features = Features::EVENT_REMOVE;
        if deeds.iter().any(|deed| deed.wants_events()) {
            features |= Features::EVENT_REMAP | Features::EVENT_UNMAP;
        }
        let mut options = OpenOptions::new().required(features);
        if lie == Lie::Forks {
            options = options.wanted(Features::EVENT_FORK);
        }
        let uffd: &Userfaultfd = Box::leak(Box::new(options.open().map_err(io::Error::other)?));
        let (start, len) = MappingOptions::new()
            .map(len)
            .map_err(io::Error::other)?
            .into_raw();
        if lie == Lie::Present {
            for page in (0..len).step_by(4096) {
                // SAFETY: the page is in the mapping above, and nothing else uses it yet.
                unsafe {
                    start
                        .add(usize::try_from(page).unwrap_or(0))
                        .write_volatile(7);
                };
            }
        }
        // SAFETY: the memory is reached through raw pointers only, by accesses that are allowed to
        // fail.
        let region = unsafe { RawRegion::new(start, len) }.map_err(io::Error::other)?;
        let registered = match lie {
            Lie::NotRegistered => 0,
            Lie::HalfRegistered => len / 2,
            _ => len,
        };
        let mut by = uffd;
        if lie == Lie::OfAnother {
            let other = OpenOptions::new().required(features).open();
            by = Box::leak(Box::new(other.map_err(io::Error::other)?));
        }
        if registered > 0 {
            by.register(&region, 0, registered, Modes::MISSING)
                .map_err(io::Error::other)?;
        }
        let memory = Self {
            address: region.address(),
            len,
            uffd,
        };
        let unmapped = match lie {
            Lie::NotMapped => len,
            Lie::HalfMapped => len / 2,
            _ => 0,
        };
        if unmapped > 0 {
            memory.unmap(0, unmapped);
        }
        if lie == Lie::Blocking {
            memory.clear_nonblocking();
        }
        Ok(memory)
    }

    pub(crate) fn uffd(&self) -> BorrowedFd<'static> {
        self.uffd.as_fd()
    }

    pub(crate) fn number(&self) -> RawFd {
        self.uffd.as_fd().as_raw_fd()
    }

    /// Makes all reads blocking, including those of other processes that have the open file.
    pub(crate) fn clear_nonblocking(&self) {
        let _ = fcntl(self.uffd(), FcntlArg::F_SETFL(OFlag::empty()));
    }

    pub(crate) fn pages(&self) -> u64 {
        self.len / PAGE
    }

    pub(crate) fn pointer(&self, page: u64) -> *mut libc::c_void {
        let address = self.address + page * PAGE;
        std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
    }

    pub(crate) fn unmap(&self, from: u64, len: u64) {
        // SAFETY: nothing holds a reference into this memory; an access to it may kill the process,
        // which is allowed.
        unsafe { libc::munmap(self.pointer(from / PAGE), usize::try_from(len).unwrap_or(0)) };
    }

    pub(crate) fn unregister(&self, page: u64, pages: u64) {
        let _ = self
            .uffd
            .unregister(self.address + page * PAGE, pages * PAGE);
    }

    pub(crate) fn register_anew(&self, page: u64, pages: u64) {
        // SAFETY: as for the first registration.
        let _ = unsafe {
            self.uffd
                .register_address(self.address + page * PAGE, pages * PAGE, Modes::MISSING)
        };
    }

    pub(crate) fn wake_all(&self) {
        let _ = self.uffd.wake(self.address, self.len);
    }
}
