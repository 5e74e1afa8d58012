//! Shared block: a session's state in memory that another process can share and that outlives this
//! one.
//!
//! ```text
//!  0          2048            4096                     4096 + len
//!  ├── ring ──┼── (unused) ───┼── data: AtomicU64s ────┤
//! ```
//!
//! A block in a memfd is allocated and mapped in full from the start. An anonymous block, like any
//! memory of the process, is allocated when it is first used, so that a restore of much memory can
//! start at once.
//!
//! The ring is separate from the data because a message in it can carry a file descriptor: only the
//! kernel writes there, and only the holder of the one [`Ring`] makes it do so. In a memfd another
//! process could write there, too, so a descriptor number found there is never treated as one of
//! ours.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;

use crate::to_usize;

const HEAD: u64 = 4096;
const WORD: u64 = 8;

/// A block of zeroed shared memory.
#[derive(Debug)]
pub struct Block {
    start: NonNull<u8>,
    /// Length of the data in bytes, without the head.
    len: u64,
    memfd: Option<OwnedFd>,
}

// SAFETY: the value is an address, a length and a descriptor; the content is handed out only as
// atomics.
unsafe impl Send for Block {}
// SAFETY: as for Send.
unsafe impl Sync for Block {}

impl Block {
    /// Creates a block that is shared only with children of `fork`.
    pub fn anonymous(len: u64) -> io::Result<(Arc<Self>, Ring)> {
        Self::map(len, None)
    }

    /// Creates a block in a memfd that can neither shrink nor grow, to be passed to another
    /// process.
    pub fn memfd(name: &CStr, len: u64) -> io::Result<(Arc<Self>, Ring)> {
        let total = total(len)?;
        // SAFETY: `name` is a terminated string that the kernel copies.
        let number = Errno::result(unsafe {
            libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        })?;
        // SAFETY: the kernel has just created this descriptor, so nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let size = i64::try_from(total).map_err(|_| io::Error::from(Errno::EFBIG))?;
        // SAFETY: both take the descriptor and numbers. Allocating everything now turns a lack of
        // memory into an error here instead of SIGBUS at some later store.
        unsafe {
            Errno::result(libc::ftruncate(fd.as_raw_fd(), size))?;
            Errno::result(libc::fallocate(fd.as_raw_fd(), 0, 0, size))?;
            let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
            Errno::result(libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals))?;
        }
        Self::map(len, Some(fd))
    }

    /// Maps the block in a memfd that [`memfd`](Self::memfd) created, in this or another process,
    /// with its current content.
    pub fn from_memfd(fd: OwnedFd) -> io::Result<(Arc<Self>, Ring)> {
        // SAFETY: F_GET_SEALS takes no argument.
        let seals = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) })?;
        let needed = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        if seals & needed != needed {
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
        Self::map(len, Some(fd))
    }

    fn map(len: u64, memfd: Option<OwnedFd>) -> io::Result<(Arc<Self>, Ring)> {
        let total = to_usize(total(len)?);
        let (kind, number) = match &memfd {
            Some(fd) => (libc::MAP_POPULATE, fd.as_raw_fd()),
            None => (libc::MAP_ANONYMOUS, -1),
        };
        let flags = libc::MAP_SHARED | kind;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without an address the kernel picks memory that nothing else uses. The file, if
        // any, is sealed against shrinking, so every byte of the mapping stays backed.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), total, protection, flags, number, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(Errno::ENOMEM)?;
        let block = Arc::new(Self { start, len, memfd });
        let ring = Ring {
            block: Arc::clone(&block),
        };
        Ok((block, ring))
    }

    /// Returns the length of the data in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no data, only the ring.
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
        // SAFETY: HEAD + len bytes are mapped, readable and writable, as long as `self` lives, and
        // page-aligned; the assertion keeps the view inside and aligned. All views are of atomics,
        // in every process, so there is no data race, and every bit pattern is a u64.
        unsafe {
            let first = self.start.add(to_usize(HEAD + offset)).cast::<AtomicU64>();
            std::slice::from_raw_parts(first.as_ptr(), count)
        }
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
        // SAFETY: mlock changes only residence; the range is our mapping.
        let result = unsafe { libc::mlock(self.start.as_ptr().cast(), to_usize(HEAD + self.len)) };
        Errno::result(result)?;
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every view of it borrows from `self` or, in a Ring,
        // keeps it alive.
        unsafe { libc::munmap(self.start.as_ptr().cast(), to_usize(HEAD + self.len)) };
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
    pub const SLOT_BYTES: usize = 32;
    /// Size of all slots in bytes.
    pub const BYTES: usize = Self::SLOTS * Self::SLOT_BYTES;

    /// Whether no other process can write to it.
    pub fn is_private(&self) -> bool {
        self.block.memfd.is_none()
    }

    /// Creates a ring that nobody shares.
    pub fn private() -> io::Result<Self> {
        Ok(Block::anonymous(0)?.1)
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the head of a block is HEAD bytes, which is more than BYTES, and page-aligned;
        // the rest as in `Block::words`.
        unsafe {
            std::slice::from_raw_parts(
                self.block.start.cast::<AtomicU64>().as_ptr(),
                Self::BYTES / 8,
            )
        }
    }

    pub(crate) fn as_ptr(&mut self) -> *mut libc::c_void {
        self.block.start.as_ptr().cast()
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

    /// Whether it contains no message.
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
