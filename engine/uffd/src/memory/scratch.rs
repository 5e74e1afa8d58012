//! Private memory to assemble pages in, whose pages can be moved into an owner's memory.

use super::{Advice, HUGE_PAGE, Mapping, MemError};
use crate::to_usize;

/// A buffer that is the source of [`move_`](crate::uffd::Userfaultfd::move_).
///
/// Unlike a [`Mapping`] it is never lent to a restore, so nothing can poison it or take access to
/// it away, and it can be written as bytes. It begins as zeros, as do pages that were moved away.
/// It is left out of forked children: a page that a child shares can't be moved.
#[derive(Debug)]
pub struct Scratch {
    mapping: Mapping,
}

impl Scratch {
    /// `len` bytes, whole pages, aligned to 2 MiB and in huge pages where the kernel has some.
    pub fn new(len: u64) -> Result<Self, MemError> {
        let mapping = Mapping::new(len)?;
        mapping.advise(Advice::DontFork)?;
        if len >= HUGE_PAGE {
            // Kernels without huge pages refuse; small ones do as well.
            let _ = mapping.advise(Advice::HugePages);
        }
        Ok(Self { mapping })
    }

    /// The content.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is ours alone, anonymous, readable and writable for its length; it is
        // not handed out, so its access rights stay, and no pointer to it exists but those borrowed
        // from `self`. Its pages change by `move_` only, which borrows `self` exclusively.
        // Anonymous memory is initialised: zeros.
        unsafe {
            std::slice::from_raw_parts_mut(self.mapping.as_ptr(), to_usize(self.mapping.len()))
        }
    }

    /// The first byte's address.
    pub fn address(&self) -> u64 {
        self.mapping.address()
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        self.mapping.len()
    }
}
