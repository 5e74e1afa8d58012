//! Advice to the kernel that does not change the content of memory.

use super::{Mapping, MemError, RawRegion};
use crate::to_usize;

/// A kind of advice about memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Use transparent huge pages where a whole one fits.
    HugePages,
    /// Use small pages only.
    NoHugePages,
    /// Make huge pages of the small pages that are present, now (6.1). EINVAL means that no huge
    /// page could be made, EAGAIN and ENOMEM that it may work later.
    Collapse,
    /// Map the missing pages for reading, now (5.14): those of anonymous memory share the kernel's
    /// zero page, and take page tables only.
    PopulateRead,
    /// Leave the memory out of children made by `fork`.
    DontFork,
    /// Copy the memory into children, as usual.
    DoFork,
}

impl Advice {
    fn number(self) -> i32 {
        match self {
            Self::HugePages => libc::MADV_HUGEPAGE,
            Self::NoHugePages => libc::MADV_NOHUGEPAGE,
            Self::Collapse => libc::MADV_COLLAPSE,
            Self::PopulateRead => libc::MADV_POPULATE_READ,
            Self::DontFork => libc::MADV_DONTFORK,
            Self::DoFork => libc::MADV_DOFORK,
        }
    }
}

impl RawRegion {
    /// Gives advice about `[offset, offset + len)`.
    pub fn advise(&self, advice: Advice, offset: u64, len: u64) -> Result<(), MemError> {
        let address = self.inside("advising about", offset, len)?;
        advise(advice, address, len)
    }
}

impl Mapping {
    pub(super) fn advise(&self, advice: Advice) -> Result<(), MemError> {
        advise(advice, self.address(), self.len())
    }
}

/// Gives advice about memory at an address from a session's map, which follows the owner's moves.
pub fn advise_at(advice: Advice, address: u64, len: u64) -> Result<(), MemError> {
    advise(advice, address, len)
}

fn advise(advice: Advice, address: u64, len: u64) -> Result<(), MemError> {
    let pointer = std::ptr::with_exposed_provenance_mut(to_usize(address));
    // SAFETY: no advice in the enum changes the content that this process sees, nor its access
    // rights. Unmapped memory is refused with ENOMEM.
    let result = unsafe { libc::madvise(pointer, to_usize(len), advice.number()) };
    if result == 0 {
        Ok(())
    } else {
        Err(MemError::last("advising about", address, len))
    }
}
