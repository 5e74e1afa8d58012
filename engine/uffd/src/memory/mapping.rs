//! Mappings that this crate owns.

use std::ptr::NonNull;

use super::{HUGE_PAGE, MemError, protect};
use crate::{page_size, to_usize};

/// Options for creating a [`Mapping`].
#[derive(Clone, Copy, Debug, Default)]
pub struct MappingOptions {
    congruent_to: u64,
    huge_pool: bool,
}

impl MappingOptions {
    /// Returns the default options: anonymous private memory, aligned to 2 MiB.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the start congruent to `owner_start` modulo 2 MiB, so that huge pages of the owner's
    /// address space are huge pages here.
    #[must_use]
    pub fn congruent_to(mut self, owner_start: u64) -> Self {
        self.congruent_to = owner_start;
        self
    }

    /// Uses pages of 2 MiB from the pool (`vm.nr_hugepages`), taken one by one as they are
    /// installed.
    #[must_use]
    pub fn huge_pool(mut self, huge_pool: bool) -> Self {
        self.huge_pool = huge_pool;
        self
    }

    /// Maps `len` bytes (whole pages), readable and writable, with no page present.
    ///
    /// This holds even if `mlockall(MCL_FUTURE)` is on, which fills new mappings with zeros at
    /// once: the memory is first mapped without access, so that there is nothing to fill, then
    /// unlocked, and only then made accessible.
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
            // SAFETY: MAP_FIXED replaces exactly the reservation that `mapping` owns and to which
            // nobody has a pointer.
            let placed = unsafe { libc::mmap(start.cast(), bytes, libc::PROT_NONE, flags, -1, 0) };
            if placed == libc::MAP_FAILED {
                let error = MemError::last("mapping huge pages for", mapping.address(), len);
                // A failed MAP_FIXED may have removed the reservation, and then the addresses may
                // belong to something else.
                std::mem::forget(mapping);
                return Err(error);
            }
        }
        // SAFETY: munlock changes only accounting. It fails for unmapped memory, but this is
        // mapped.
        if unsafe { libc::munlock(start.cast(), bytes) } != 0 {
            return Err(MemError::last("unlocking", mapping.address(), len));
        }
        // SAFETY: the memory is ours and gains access; nobody relied on its being inaccessible.
        unsafe { protect(mapping.address(), len, libc::PROT_READ | libc::PROT_WRITE)? };
        Ok(mapping)
    }
}

/// Anonymous private memory that this value owns: unmapped on drop.
///
/// With UNMAP events on, dropping it while it is registered waits until somebody reads the event. A
/// userfaultfd with which it is registered keeps it alive (see
/// [`RawRegion::owned`](super::RawRegion::owned)), so unregister it first.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: the value is an address and a length. The memory is accessed only through raw pointers,
// whose users must argue for each access, in whatever thread.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; no method accesses the content.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes aligned to 2 MiB, with no page present.
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
                // Addresses are passed to the kernel as numbers and come back as numbers.
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
        // Go back by one huge page if that is still inside: the reservation is one huge page longer
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
        // From here on `kept` unmaps its part if something fails; a head or tail that can't be
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

    /// Returns a pointer to the first byte. Its users must justify each access themselves.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Returns the address of the first byte, as the kernel sees it.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Returns the length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Gives the memory away: it is unmapped only if the receiver does so.
    pub fn into_raw(self) -> (*mut u8, u64) {
        let raw = (self.start.as_ptr(), self.len);
        std::mem::forget(self);
        raw
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: we mapped the range and gave it to nobody; pointers returned by `as_ptr` are
        // their users' responsibility. munmap of a mapped range fails only if it would split a
        // mapping beyond vm.max_map_count; then the memory stays mapped, which is harmless.
        let _ = unsafe { unmap(self.address(), self.len) };
    }
}

/// # Safety
///
/// The range must be the caller's own, with nobody left to access it.
unsafe fn unmap(address: u64, len: u64) -> Result<(), MemError> {
    let pointer = std::ptr::with_exposed_provenance_mut(to_usize(address));
    // SAFETY: guaranteed by the caller.
    let result = unsafe { libc::munmap(pointer, to_usize(len)) };
    if result == 0 {
        Ok(())
    } else {
        Err(MemError::last("unmapping", address, len))
    }
}
