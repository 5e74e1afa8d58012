//! Memory on loan to a restore.

use std::sync::Arc;

use super::{Mapping, MemError, protect};
use crate::page_size;

/// A stretch of this process's memory that a restore may fill.
///
/// The one `unsafe` step of restoring into one's own process is to make one of the caller's memory;
/// all that follows (registering, installing, giving up) is safe because of what was promised here.
/// The promise lasts as long as the value. So there is one value for it, and who has none can't reach
/// the memory any more:
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
    /// Memory of the caller's.
    ///
    /// # Safety
    ///
    /// As long as this value lives (a restore keeps what it was given), and until everything registered of it is unregistered or the userfaultfd
    /// is closed:
    ///
    /// - `[start, start + len)` is mapped in this process, and is this restore's to fill: a page
    ///   that isn't present may come to hold any bytes at any moment, may read as zeros after the
    ///   end, may raise SIGBUS, and a whole page may become inaccessible if the restore is given
    ///   up.
    /// - So it is accessed as plain bytes: through raw pointers, atomics or volatile accesses, or
    ///   through the kernel or a virtual CPU. No reference to a type with invalid values points
    ///   into it before it is complete.
    /// - It isn't unmapped or moved, unless
    ///   - the userfaultfd has [`Features::EVENTS`] on, as that of a restore always has, so that it
    ///     learns of that before the address can mean something else, or a restore of the memory is
    ///     complete or was stopped; and
    ///   - what comes to lie at these addresses may be read as bytes through the kernel, which
    ///     reading from a restore does, and be copied to children (`MADV_DOFORK`), which the end of a
    ///     restore sees to; and
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

    /// Memory of the engine's own, kept alive as long as this or a registration of it.
    ///
    /// Nobody else can have relied on its content: it was made empty, and is reachable through raw
    /// pointers only, whose users have to bear the same that [`new`](Self::new) demands.
    pub fn owned(mapping: Arc<Mapping>) -> Self {
        Self {
            address: mapping.address(),
            len: mapping.len(),
            keep: Some(mapping),
        }
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(crate::to_usize(self.address))
    }

    /// The first byte's address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Takes every access to `[offset, offset + len)` away: what touches it from now on gets
    /// SIGSEGV, or EFAULT. For what could not be restored, so that it never reads as zeros.
    pub fn make_inaccessible(&self, offset: u64, len: u64) -> Result<(), MemError> {
        let address = self.inside("making inaccessible", offset, len)?;
        // SAFETY: `new` names this among what the region's owner accepts.
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

    /// Whether the engine mapped it.
    pub fn is_owned(&self) -> bool {
        self.keep.is_some()
    }

    pub(crate) fn keep(&self) -> Option<Arc<Mapping>> {
        self.keep.clone()
    }
}
