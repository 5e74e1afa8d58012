//! Shared block: a session's state in memory that another process can share and that outlives this
//! one.
//!
//! ```text
//!  0          2048            4096                     4096 + len
//!  ├── ring ──┼── (unused) ───┼── data: AtomicU64s ────┤
//! ```
//!
//! A block in a memfd is allocated and mapped in full from the start. A private block, like any
//! memory of the process, is allocated when it is first used, so that a restore of much memory can
//! start at once.
//!
//! The ring is separate from the data because a message in it can carry a file descriptor: only the
//! kernel writes there, and only the holder of the one [`Ring`] makes it do so. In a memfd another
//! process could write there, too, so a descriptor number found there is never treated as one of
//! ours.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::to_usize;

const HEAD: u64 = 4096;
const WORD: u64 = 8;
/// The seals without which a mapping of a memfd could lose its pages.
const FIXED_SIZE: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW);

/// A block of zeroed memory, whose content is handed out only as atomics.
#[derive(Debug)]
pub struct Block {
    /// The head and the data.
    map: MmapRaw,
    /// Length of the data in bytes, without the head.
    len: u64,
    memfd: Option<OwnedFd>,
}

impl Block {
    /// Creates a block that no other process shares. A child of `fork` gets a copy.
    pub fn private(len: u64) -> io::Result<(Arc<Self>, Ring)> {
        let map = MmapOptions::new().len(to_usize(total(len)?)).map_anon()?;
        // A huge page would be zeroed as a whole in the middle of a fault. Kernels without huge
        // pages refuse the advice.
        let _ = map.advise(Advice::NoHugePage);
        Ok(Self::new(map.into(), len, None))
    }

    /// Creates a block in a memfd that can neither shrink nor grow, to be passed to another
    /// process.
    pub fn memfd(name: &CStr, len: u64) -> io::Result<(Arc<Self>, Ring)> {
        let size = i64::try_from(total(len)?).map_err(|_| Errno::EFBIG)?;
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&fd, size)?;
        // Allocating everything now turns a lack of memory into an error here instead of SIGBUS at
        // some later store.
        fallocate(&fd, FallocateFlags::empty(), 0, size)?;
        fcntl(
            &fd,
            FcntlArg::F_ADD_SEALS(FIXED_SIZE | SealFlag::F_SEAL_SEAL),
        )?;
        Self::map(fd, len)
    }

    /// Maps the block in a memfd that [`memfd`](Self::memfd) created, in this or another process,
    /// with its current content.
    pub fn from_memfd(fd: OwnedFd) -> io::Result<(Arc<Self>, Ring)> {
        let seals = SealFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(FIXED_SIZE) {
            let message = "the block's memfd is not sealed against shrinking and growing";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let file = std::fs::File::from(fd);
        let size = file.metadata()?.len();
        let fd = OwnedFd::from(file);
        let len = size.checked_sub(HEAD);
        let len = len
            .filter(|len| len.is_multiple_of(WORD))
            .ok_or(Errno::EINVAL)?;
        Self::map(fd, len)
    }

    /// Maps the whole memfd, whose pages are allocated and which is sealed against shrinking.
    fn map(memfd: OwnedFd, len: u64) -> io::Result<(Arc<Self>, Ring)> {
        let mut options = MmapOptions::new();
        let map = options
            .len(to_usize(total(len)?))
            .populate()
            .map_raw(&memfd)?;
        Ok(Self::new(map, len, Some(memfd)))
    }

    fn new(map: MmapRaw, len: u64, memfd: Option<OwnedFd>) -> (Arc<Self>, Ring) {
        let block = Arc::new(Self { map, len, memfd });
        let ring = Ring {
            block: Arc::clone(&block),
        };
        (block, ring)
    }

    /// Returns the length of the data in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether there is no data, only the ring.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the descriptor to pass to another process, if there is one.
    pub fn as_memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// Returns `count` words of data from `offset` bytes on.
    ///
    /// # Panics
    ///
    /// Panics if they aren't inside the data, or if `offset` isn't a multiple of 8.
    pub fn words(&self, offset: u64, count: usize) -> &[AtomicU64] {
        let bytes = (count as u64).checked_mul(WORD);
        let end = bytes.and_then(|bytes| offset.checked_add(bytes));
        assert!(
            offset.is_multiple_of(WORD) && end.is_some_and(|end| end <= self.len),
            "{count} words at {offset} of a block of {} bytes",
            self.len
        );
        // SAFETY: the assertion keeps the view inside the data and aligned.
        unsafe { self.view(HEAD + offset, count) }
    }

    /// # Safety
    ///
    /// `at` is a multiple of 8, and the `count` words from there on lie inside the head and the
    /// data.
    unsafe fn view(&self, at: u64, count: usize) -> &[AtomicU64] {
        let first = self.map.as_mut_ptr().wrapping_add(to_usize(at));
        // SAFETY: HEAD + len bytes are mapped, readable and writable, as long as `self` lives, and
        // page-aligned; a memfd is sealed, so they stay backed. The caller keeps the view inside
        // and aligned. All views are of atomics, in every process, so there is no data race, and
        // every bit pattern is a u64.
        unsafe { std::slice::from_raw_parts(first.cast::<libc::c_void>().cast(), count) }
    }

    /// Returns the word at `offset` bytes.
    ///
    /// # Panics
    ///
    /// Panics in the same cases as [`words`](Self::words).
    pub fn word(&self, offset: u64) -> &AtomicU64 {
        &self.words(offset, 1)[0]
    }

    /// Locks the block in memory (mlock), so that no store into it waits for a disk. Limited by
    /// `RLIMIT_MEMLOCK`.
    pub fn lock(&self) -> io::Result<()> {
        self.map.lock()
    }
}

fn total(len: u64) -> io::Result<u64> {
    let whole = len.is_multiple_of(WORD).then_some(len);
    let total = whole
        .and_then(|len| len.checked_add(HEAD))
        .filter(|total| *total < 1 << 46);
    Ok(total.ok_or(Errno::EINVAL)?)
}

/// The buffer into which the kernel writes messages: the head of a block. Each mapping of a block
/// has exactly one.
#[derive(Debug)]
pub struct Ring {
    block: Arc<Block>,
}

impl Ring {
    /// Number of messages that fit.
    pub const SLOTS: usize = 64;
    /// Size of a message, `struct uffd_msg`, in bytes.
    const SLOT_BYTES: usize = 32;
    /// Size of all slots in bytes.
    pub const BYTES: usize = Self::SLOTS * Self::SLOT_BYTES;

    /// Returns whether no other process can write to it.
    pub(crate) fn is_private(&self) -> bool {
        self.block.memfd.is_none()
    }

    /// Creates a ring that nobody shares.
    pub fn private() -> io::Result<Self> {
        Ok(Block::private(0)?.1)
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the head of a block is HEAD bytes, which is more than BYTES.
        unsafe { self.block.view(0, Self::BYTES / 8) }
    }

    pub(crate) fn as_ptr(&mut self) -> *mut libc::c_void {
        self.block.map.as_mut_ptr().cast()
    }

    /// Returns the 32 bytes of a slot, which [`Raw::from_words`](crate::uffd::Raw::from_words)
    /// decodes.
    ///
    /// # Panics
    ///
    /// Panics if there is no such slot.
    pub fn load(&self, slot: usize) -> [u64; 4] {
        assert!(slot < Self::SLOTS, "slot {slot} of {}", Self::SLOTS);
        let words = &self.words()[slot * 4..][..4];
        std::array::from_fn(|at| words[at].load(Ordering::Relaxed))
    }

    /// Returns whether it contains no message.
    pub fn is_clear(&self) -> bool {
        self.words()
            .iter()
            .all(|word| word.load(Ordering::Acquire) == 0)
    }

    /// Zeroes the ring. Whoever finds the ring clear also sees every store made before, such as the
    /// record of its messages.
    pub fn clear(&mut self) {
        for word in self.words() {
            word.store(0, Ordering::Release);
        }
    }
}

const _: () = assert!(Ring::BYTES as u64 <= HEAD);
