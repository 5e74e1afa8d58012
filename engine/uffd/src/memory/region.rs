//! Memory that is lent to a restore.

use std::sync::Arc;

use super::{Mapping, MemError, protect};
use crate::page_size;

/// A range of this process's memory that a restore may fill.
///
/// Creating one from the caller's memory is the only `unsafe` step of restoring into one's own
/// process. Everything that follows (registering, installing, giving up) is safe because of the
/// guarantees given here. They hold as long as the value lives. Therefore there is only one value
/// for the memory, and code without it can't reach the memory any more:
///
/// ```compile_fail,E0599
/// # fn again(memory: snaprestore_uffd::memory::RawRegion) {
/// let again = memory.clone();
/// # }
/// ```
///
#[derive(Debug)]
pub struct RawRegion {
    address: u64,
    len: u64,
    keep: Option<Arc<Mapping>>,
}

impl RawRegion {
    /// Creates a region of the caller's memory.
    ///
    /// # Safety
    ///
    /// As long as this value lives (a restore keeps the regions that it was given), and until
    /// everything registered of it is unregistered or the userfaultfd is closed:
    ///
    /// - `[start, start + len)` is mapped in this process, and this restore may fill it: an absent
    ///   page may change to any content at any moment, may read as zeros after the end, may raise
    ///   SIGBUS, and a whole page may become inaccessible if the restore is given up.
    /// - Therefore it is accessed as plain bytes: through raw pointers, atomics or volatile
    ///   accesses, or through the kernel or a virtual CPU. No reference to a type with invalid
    ///   values points into it before it is complete.
    /// - It isn't unmapped or moved, unless
    ///   - the userfaultfd has [`Features::EVENTS`] on, like that of every restore, so that it
    ///     learns of the change before the address can be reused, or a restore of the memory is
    ///     complete or was stopped; and
    ///   - whatever is mapped at these addresses later may be read as bytes through the kernel, as
    ///     reading from a restore does, and be copied to children (`MADV_DOFORK`), as the end of a
    ///     restore arranges; and
    ///   - on kernels without `UFFDIO_POISON` (before 6.6), it doesn't happen while the restore is
    ///     stopped or dropped.
    ///
    /// [`Features::EVENTS`]: crate::uffd::Features::EVENTS
    pub unsafe fn new(start: *mut u8, len: u64) -> Result<Self, MemError> {
        let address = start.expose_provenance() as u64;
        let page = page_size();
        let whole = address.is_multiple_of(page) && len.is_multiple_of(page) && len > 0;
        if !whole || address == 0 || address.checked_add(len).is_none() {
            return Err(MemError::invalid(
                "taking over, not in whole pages,",
                address,
                len,
            ));
        }
        Ok(Self {
            address,
            len,
            keep: None,
        })
    }

    /// Creates a region of the engine's own memory, which is kept alive as long as the region or a
    /// registration of it.
    ///
    /// Nobody else can have relied on its content: it was created empty, and is reachable only
    /// through raw pointers, whose users must accept what [`new`](Self::new) demands.
    pub fn owned(mapping: Arc<Mapping>) -> Self {
        Self {
            address: mapping.address(),
            len: mapping.len(),
            keep: Some(mapping),
        }
    }

    /// Returns a pointer to the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(crate::to_usize(self.address))
    }

    /// Returns the address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns the length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Makes `[offset, offset + len)` inaccessible: from now on a touch gets SIGSEGV, or EFAULT.
    /// For memory that could not be restored, so that it never reads as zeros.
    pub fn make_inaccessible(&self, offset: u64, len: u64) -> Result<(), MemError> {
        let address = self.inside("making inaccessible", offset, len)?;
        // SAFETY: the contract of `new` lists this among what the owner of the region accepts.
        unsafe { protect(address, len, libc::PROT_NONE) }
    }

    pub(super) fn inside(
        &self,
        doing: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<u64, MemError> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        end.map(|_| self.address + offset)
            .ok_or_else(|| MemError::invalid(doing, self.address.saturating_add(offset), len))
    }

    /// Returns whether the engine mapped the memory.
    pub fn is_owned(&self) -> bool {
        self.keep.is_some()
    }

    pub(crate) fn keep(&self) -> Option<Arc<Mapping>> {
        self.keep.clone()
    }
}
