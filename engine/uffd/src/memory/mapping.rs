//! Mappings that are ours.

use std::ptr::NonNull;

use super::{HUGE_PAGE, MemError, protect};
use crate::{page_size, to_usize};

/// How a [`Mapping`] is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct MappingOptions {
    congruent_to: u64,
    huge_pool: bool,
}

impl MappingOptions {
    /// Anonymous private memory, aligned to 2 MiB.
    pub fn new() -> Self {
        Self::default()
    }

    /// The start is equal to `owner_start` modulo 2 MiB, so that huge pages of the owner's address
    /// space are huge pages here.
    #[must_use]
    pub fn congruent_to(mut self, owner_start: u64) -> Self {
        self.congruent_to = owner_start;
        self
    }

    /// Pages of 2 MiB from the pool (`vm.nr_hugepages`), taken one by one as they are installed.
    #[must_use]
    pub fn huge_pool(mut self, huge_pool: bool) -> Self {
        self.huge_pool = huge_pool;
        self
    }

    /// Maps `len` bytes, readable and writable, with no page present: `len` is in whole pages.
    ///
    /// Also where `mlockall(MCL_FUTURE)` is on, which fills new mappings with zeros at once: the
    /// memory is first mapped without access, so that there is nothing to fill, unlocked, and only
    /// then made accessible.
    pub fn map(self, len: u64) -> Result<Mapping, MemError> {
        let page = if self.huge_pool {
            HUGE_PAGE
        } else {
            page_size()
        };
        if len == 0 || !len.is_multiple_of(page) {
            return Err(MemError::invalid("mapping", 0, len));
        }
        let offset = if self.huge_pool {
            0
        } else {
            self.congruent_to % HUGE_PAGE
        };
        if !offset.is_multiple_of(page_size()) {
            return Err(MemError::invalid(
                "mapping, at an address that is not a page's,",
                self.congruent_to,
                len,
            ));
        }
        let reserved_len = len
            .checked_add(HUGE_PAGE)
            .ok_or_else(|| MemError::invalid("mapping", 0, len))?;
        let reserved = Mapping::reserve(reserved_len)?;
        let mapping = reserved.trim(offset, len)?;
        let (start, bytes) = (mapping.start.as_ptr(), to_usize(len));
        if self.huge_pool {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let flags = flags | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB | libc::MAP_FIXED;
            // SAFETY: MAP_FIXED replaces exactly the reservation that `mapping` owns and nobody has
            // a pointer into.
            let placed = unsafe { libc::mmap(start.cast(), bytes, libc::PROT_NONE, flags, -1, 0) };
            if placed == libc::MAP_FAILED {
                let error = MemError::last("mapping huge pages for", mapping.address(), len);
                // A failed MAP_FIXED may have removed the reservation, and then the addresses can
                // be somebody else's.
                std::mem::forget(mapping);
                return Err(error);
            }
        }
        // SAFETY: munlock changes accounting only. It fails for memory that isn't mapped, which
        // this is.
        if unsafe { libc::munlock(start.cast(), bytes) } != 0 {
            return Err(MemError::last("unlocking", mapping.address(), len));
        }
        // SAFETY: the memory is ours and gains access; nobody relied on its having none.
        unsafe { protect(mapping.address(), len, libc::PROT_READ | libc::PROT_WRITE)? };
        Ok(mapping)
    }
}

/// Anonymous private memory that this value owns: unmapped on drop.
///
/// With UNMAP events on, dropping it while it is registered waits until somebody reads the event. A
/// userfaultfd that it is registered with keeps it alive (see
/// [`RawRegion::owned`](super::RawRegion::owned)), so unregister first.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: the value is an address and a length; what is at the address is reached through raw
// pointers only, whose users have to argue for each access, in whatever thread.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; no method accesses the content.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes aligned to 2 MiB, with no page present.
    pub fn new(len: u64) -> Result<Self, MemError> {
        MappingOptions::new().map(len)
    }

    pub(crate) fn inaccessible(len: u64) -> Result<Self, MemError> {
        Self::reserve(len)
    }

    fn reserve(len: u64) -> Result<Self, MemError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: without an address and without MAP_FIXED the kernel picks memory that nothing
        // else uses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                to_usize(len),
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => {
                // Addresses are handed to the kernel as numbers and come back as such.
                start.as_ptr().expose_provenance();
                Ok(Self { start, len })
            }
            _ => Err(MemError::last("mapping", 0, len)),
        }
    }

    /// Keeps `len` bytes at the first address that is `offset` modulo 2 MiB, and unmaps the rest.
    fn trim(self, offset: u64, len: u64) -> Result<Self, MemError> {
        let address = self.address();
        let aligned = address.next_multiple_of(HUGE_PAGE) + offset;
        // One huge page back if that still lies inside: the reservation is one huge page longer
        // than `len`.
        let start = if aligned - HUGE_PAGE >= address {
            aligned - HUGE_PAGE
        } else {
            aligned
        };
        let (head, tail) = (start - address, address + self.len - (start + len));
        let kept = Self {
            // SAFETY: head + len + tail is the length of the reservation, so the result is inside
            // it.
            start: unsafe { self.start.add(to_usize(head)) },
            len,
        };
        let end = start + len;
        std::mem::forget(self);
        // From here `kept` unmaps its part if something fails; a head or tail that can't be
        // unmapped stays reserved.
        for (address, len) in [(address, head), (end, tail)] {
            if len > 0 {
                // SAFETY: head and tail are parts of the reservation that nothing else owns since
                // `self` was forgotten.
                unsafe { unmap(address, len)? };
            }
        }
        Ok(kept)
    }

    /// The first byte. Reading and writing through it is up to the user's own argument.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The first byte's address, as the kernel sees it.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Gives the memory away: nobody unmaps it unless the receiver does.
    pub fn into_raw(self) -> (*mut u8, u64) {
        let raw = (self.start.as_ptr(), self.len);
        std::mem::forget(self);
        raw
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us and given to nobody; pointers handed out by `as_ptr`
        // are their users' responsibility. munmap of a mapped range fails only if it would split a
        // mapping beyond vm.max_map_count; then the memory stays mapped, which harms nobody.
        let _ = unsafe { unmap(self.address(), self.len) };
    }
}

/// # Safety
///
/// The range must be the caller's own, with nobody left to access it.
unsafe fn unmap(address: u64, len: u64) -> Result<(), MemError> {
    let pointer = std::ptr::with_exposed_provenance_mut(to_usize(address));
    // SAFETY: the caller's promise.
    let result = unsafe { libc::munmap(pointer, to_usize(len)) };
    if result == 0 {
        Ok(())
    } else {
        Err(MemError::last("unmapping", address, len))
    }
}
