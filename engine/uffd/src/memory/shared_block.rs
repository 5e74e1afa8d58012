//! A session's state in memory that another process can share and that outlives this one.
//!
//! ```text
//!  0          2048            4096                     4096 + len
//!  ├── ring ──┼── (unused) ───┼── data: AtomicU64s ────┤
//! ```
//!
//! A block in a memfd is backed and mapped in full from the start; an anonymous one, as any memory
//! of the process, when it is first used, which is what lets a restore of much memory start at
//! once.
//!
//! The ring is apart from the data because a message in it can carry a file descriptor: only the
//! kernel writes there, and only the holder of the one [`Ring`] has it written. In a memfd another
//! process could write there too, so a descriptor's number found there is never taken for one of ours.

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

/// Zeroed shared memory.
#[derive(Debug)]
pub struct Block {
    start: NonNull<u8>,
    /// Of the data, without the head.
    len: u64,
    memfd: Option<OwnedFd>,
}

// SAFETY: an address, a length and a descriptor; the content is handed out as atomics only.
unsafe impl Send for Block {}
// SAFETY: as for Send.
unsafe impl Sync for Block {}

impl Block {
    /// Shared with children of `fork` only.
    pub fn anonymous(len: u64) -> io::Result<(Arc<Self>, Ring)> {
        Self::map(len, None)
    }

    /// In a memfd that can neither shrink nor grow, to be handed to another process.
    pub fn memfd(name: &CStr, len: u64) -> io::Result<(Arc<Self>, Ring)> {
        let total = total(len)?;
        // SAFETY: `name` is a terminated string that the kernel copies.
        let number = Errno::result(unsafe {
            libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        })?;
        // SAFETY: the kernel made this descriptor just now, so nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let size = i64::try_from(total).map_err(|_| io::Error::from(Errno::EFBIG))?;
        // SAFETY: both take the descriptor and numbers. Allocating all of it now makes a full
        // machine an error here in place of SIGBUS at some later store.
        unsafe {
            Errno::result(libc::ftruncate(fd.as_raw_fd(), size))?;
            Errno::result(libc::fallocate(fd.as_raw_fd(), 0, 0, size))?;
            let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
            Errno::result(libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals))?;
        }
        Self::map(len, Some(fd))
    }

    /// The block in a memfd that [`memfd`](Self::memfd) made, here or in another process, its content
    /// as it is.
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

    /// Bytes of data.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no data, only the ring.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The descriptor to hand to another process, if there is one.
    pub fn as_memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// `count` words of data from `offset` bytes on.
    ///
    /// # Panics
    ///
    /// If they aren't inside the data, or `offset` isn't a multiple of 8.
    pub fn words(&self, offset: u64, count: usize) -> &[AtomicU64] {
        let bytes = (count as u64).checked_mul(WORD);
        let end = bytes.and_then(|bytes| offset.checked_add(bytes));
        assert!(
            offset.is_multiple_of(WORD) && end.is_some_and(|end| end <= self.len),
            "{count} words at {offset} of a block of {} bytes",
            self.len
        );
        // SAFETY: HEAD + len bytes are mapped, readable and writable, as long as `self`, and
        // page-aligned; the assertion keeps the view inside and aligned. All views are of atomics,
        // in every process, so there is no data race, and every bit pattern is a u64.
        unsafe {
            let first = self.start.add(to_usize(HEAD + offset)).cast::<AtomicU64>();
            std::slice::from_raw_parts(first.as_ptr(), count)
        }
    }

    /// The word at `offset` bytes.
    ///
    /// # Panics
    ///
    /// As [`words`](Self::words).
    pub fn word(&self, offset: u64) -> &AtomicU64 {
        &self.words(offset, 1)[0]
    }

    /// Keeps the block in memory (mlock), so that no store into it waits for a disk. Limited by
    /// `RLIMIT_MEMLOCK`.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: mlock changes residence only; the range is our mapping.
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

/// Where the kernel writes messages: the head of a block. There is one for each time that a block
/// is mapped.
#[derive(Debug)]
pub struct Ring {
    block: Arc<Block>,
}

impl Ring {
    /// Messages that fit.
    pub const SLOTS: usize = 64;
    /// Bytes of one, `struct uffd_msg`.
    pub const SLOT_BYTES: usize = 32;
    /// Their size together.
    pub const BYTES: usize = Self::SLOTS * Self::SLOT_BYTES;

    /// Whether no other process can write to it.
    pub fn is_private(&self) -> bool {
        self.block.memfd.is_none()
    }

    /// A ring that nobody shares.
    pub fn private() -> io::Result<Self> {
        Ok(Block::anonymous(0)?.1)
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the head of a block is HEAD bytes, more than BYTES, and page-aligned; the rest as
        // in `Block::words`.
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

    /// The 32 bytes of a slot; [`Raw::from_words`](crate::uffd::Raw::from_words) tells what
    /// they mean.
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    pub fn load(&self, slot: usize) -> [u64; 4] {
        assert!(slot < Self::SLOTS, "slot {slot} of {}", Self::SLOTS);
        let words = &self.words()[slot * 4..][..4];
        std::array::from_fn(|at| words[at].load(Ordering::Relaxed))
    }

    /// Whether no message is in it.
    pub fn is_clear(&self) -> bool {
        self.words()
            .iter()
            .all(|word| word.load(Ordering::Acquire) == 0)
    }

    /// Zeroes it. Every store made before, such as the record of what the messages said, is seen by
    /// whoever finds the ring clear.
    pub fn clear(&mut self) {
        for word in self.words() {
            word.store(0, Ordering::Release);
        }
    }
}

const _: () = assert!(Ring::BYTES as u64 <= HEAD);
