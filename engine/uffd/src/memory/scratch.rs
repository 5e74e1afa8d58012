//! Private memory in which to assemble pages that can then be moved into an owner's memory.

use super::{Advice, HUGE_PAGE, Mapping, MemError};
use crate::to_usize;

/// A buffer that serves as the source of [`move_`](crate::uffd::Userfaultfd::move_).
///
/// Unlike a [`Mapping`], it is never lent to a restore, so nothing can poison it or make it
/// inaccessible, and it can be written as bytes. Initially it is zeros, as are pages that were
/// moved away. It is left out of forked children, because a page that a child shares can't be
/// moved.
#[derive(Debug)]
pub struct Scratch {
    mapping: Mapping,
}

impl Scratch {
    /// Maps `len` bytes (whole pages), aligned to 2 MiB and in huge pages if the kernel has any.
    pub fn new(len: u64) -> Result<Self, MemError> {
        let mapping = Mapping::new(len)?;
        mapping.advise(Advice::DontFork)?;
        if len >= HUGE_PAGE {
            // Kernels without huge pages refuse; small pages work as well.
            let _ = mapping.advise(Advice::HugePages);
        }
        Ok(Self { mapping })
    }

    /// Returns the content.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is ours alone, anonymous, readable and writable for its length. It is
        // not handed out, so its access rights stay, and the only pointers to it are borrowed from
        // `self`. Only `move_` changes its pages, and it borrows `self` exclusively. Anonymous
        // memory is initialised: zeros.
        unsafe {
            std::slice::from_raw_parts_mut(self.mapping.as_ptr(), to_usize(self.mapping.len()))
        }
    }

    /// Returns the address of the first byte.
    pub fn address(&self) -> u64 {
        self.mapping.address()
    }

    /// Returns the length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        self.mapping.len()
    }
}
