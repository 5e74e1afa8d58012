//! Reads the kernel's messages.
//!
//! `read` *is* the acknowledgement: the owner's madvise, mremap or munmap proceeds as soon as the
//! kernel has delivered its message. Therefore messages are read straight into a [`Ring`], which
//! can lie in memory that outlives this process.
//!
//! The kernel delivers faults before any other message, whatever their order in time. Handle the
//! other messages first, and read until [`ReadOutcome::Empty`] before assuming that nothing is
//! pending.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::abi;
use super::features::{Features, Ioctls};
use super::userfaultfd::Userfaultfd;
use crate::memory::Ring;

/// The kind of access that caused a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultFlags {
    /// Whether the page was written.
    pub write: bool,
    /// Whether the page is present and write-protected.
    pub write_protect: bool,
    /// Whether the page is in the file behind the mapping, but not mapped.
    pub minor: bool,
}

/// A message of the userfaultfd.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for a page.
    Pagefault {
        /// Address of the page, or the exact address with [`Features::EXACT_ADDRESS`].
        address: u64,
        /// The kind of access.
        flags: FaultFlags,
        /// ID of the thread, with [`Features::THREAD_ID`].
        thread: Option<u32>,
    },
    /// The owner forked; its child's memory is registered with a userfaultfd of its own.
    Fork {
        /// The child's userfaultfd. Dropping it gives the child zeros for all absent pages.
        child: Forked,
    },
    /// The owner moved memory. An `Unmap` of the old range may follow.
    Remap {
        /// Old start.
        from: u64,
        /// New start.
        to: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The owner discards the content of a range, which stays registered.
    Remove {
        /// First byte.
        start: u64,
        /// End (exclusive).
        end: u64,
    },
    /// The owner unmapped a range.
    Unmap {
        /// First byte.
        start: u64,
        /// End (exclusive).
        end: u64,
    },
    /// A kind of message that this engine doesn't know.
    Unknown(u8),
}

/// The userfaultfd of an owner's child, as created by the kernel.
#[derive(Debug)]
pub struct Forked {
    fd: OwnedFd,
    features: Features,
    hidden: Ioctls,
}

impl Forked {
    /// Converts into a userfaultfd with the parent's features.
    pub fn into_userfaultfd(self) -> Userfaultfd {
        // A forked child has its own address space, so its memory is not this process's.
        Userfaultfd::of_another_process(self.fd, self.features, self.hidden)
    }
}

impl AsFd for Forked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The outcome of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// This many messages were appended. There may be more.
    Messages(usize),
    /// Nothing was pending at this moment. This is no end of input: more messages may follow.
    Empty,
}

/// The reason why reading failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The owner forked and this process has no descriptor left for the child's userfaultfd. The
    /// message stays pending, and the owner waits in `fork`.
    #[error(
        "no file descriptor is left for the userfaultfd of a forked child: raise RLIMIT_NOFILE"
    )]
    NoDescriptor(#[source] io::Error),
    /// Any other error.
    #[error("reading from a userfaultfd failed")]
    Failed(#[source] io::Error),
}

impl Userfaultfd {
    /// Reads up to 64 pending messages into `ring` and appends them, decoded, to `messages`.
    /// Doesn't wait.
    ///
    /// `ring` is zeroed first: messages of an earlier read that must not be lost have to be handled
    /// before. The ring is left as the kernel wrote it; call [`Ring::clear`] when everything in it
    /// has been recorded. No memory is allocated if `messages` has room for 64 more.
    pub fn read(
        &self,
        ring: &mut Ring,
        messages: &mut Vec<Message>,
    ) -> Result<ReadOutcome, ReadError> {
        let mut grants = self.grants_mut();
        ring.clear();
        let count = loop {
            match read_at_once(self.as_fd(), ring) {
                Ok(bytes) => break bytes / size_of::<abi::uffd_msg>(),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(ReadOutcome::Empty),
                Err(errno @ (Errno::EMFILE | Errno::ENFILE)) => {
                    return Err(ReadError::NoDescriptor(errno.into()));
                }
                Err(errno) => return Err(ReadError::Failed(errno.into())),
            }
        };
        let count = count.min(Ring::SLOTS);
        messages.reserve(count);
        let page = crate::page_size();
        for slot in 0..count {
            // SAFETY: the read above filled the slot, once, and only this place looks at it before
            // the next read, because `ring` is borrowed exclusively. Descriptors in a shared ring,
            // which others may have written, are not trusted.
            let message = unsafe { self.decode(ring.load(slot), ring.is_private()) };
            if let Some(grants) = grants.as_mut() {
                match &message {
                    Message::Pagefault { address, .. } => {
                        let start = address & !(page - 1);
                        grants.faulted(start, start + page);
                    }
                    Message::Remap { from, to, len } => grants.moved(*from, *to, *len),
                    Message::Unmap { start, end } => grants.remove(*start, *end),
                    Message::Fork { .. } | Message::Remove { .. } | Message::Unknown(_) => {}
                }
            }
            messages.push(message);
        }
        Ok(ReadOutcome::Messages(count))
    }

    /// # Safety
    ///
    /// If descriptors are `believed`, `words` must come from a read of this descriptor by the
    /// kernel in this process, and be decoded once: a fork message carries a descriptor that
    /// becomes ours here.
    unsafe fn decode(&self, words: [u64; 4], believed: bool) -> Message {
        match Raw::from_words(words) {
            Raw::Pagefault {
                address,
                flags,
                thread,
            } => {
                let thread = self
                    .features()
                    .contains(Features::THREAD_ID)
                    .then_some(thread);
                let flags = FaultFlags {
                    write: flags & abi::UFFD_PAGEFAULT_FLAG_WRITE != 0,
                    write_protect: flags & abi::UFFD_PAGEFAULT_FLAG_WP != 0,
                    minor: flags & abi::UFFD_PAGEFAULT_FLAG_MINOR != 0,
                };
                Message::Pagefault {
                    address,
                    flags,
                    thread,
                }
            }
            Raw::Fork { descriptor } => match i32::try_from(descriptor) {
                // The descriptor stays open until this process exits.
                Ok(_) if !believed => Message::Unknown(abi::UFFD_EVENT_FORK),
                Ok(number) => {
                    // SAFETY: the kernel put this new descriptor into our table for this message,
                    // and by this function's contract nobody else took it from there.
                    let fd = unsafe { OwnedFd::from_raw_fd(number) };
                    let child = Forked {
                        fd,
                        features: self.features(),
                        hidden: self.hidden(),
                    };
                    Message::Fork { child }
                }
                // No descriptor is negative; the kernel doesn't write such a message.
                Err(_) => Message::Unknown(abi::UFFD_EVENT_FORK),
            },
            Raw::Remap { from, to, len } => Message::Remap { from, to, len },
            Raw::Remove { start, end } => Message::Remove { start, end },
            Raw::Unmap { start, end } => Message::Unmap { start, end },
            Raw::Unknown(event) => Message::Unknown(event),
        }
    }
}

/// Reads the pending messages into `ring`. Fails with EAGAIN if there are none.
///
/// `O_NONBLOCK` belongs to the open file, and any process that shares the file can clear it at any
/// instant: a read would then wait, with the install lock held. Therefore each read itself requests
/// not to wait, which userfaultfds support since Linux 6.10. Before that, only the flag protects
/// against waiting.
fn read_at_once(uffd: BorrowedFd<'_>, ring: &mut Ring) -> nix::Result<usize> {
    let fd = uffd.as_raw_fd();
    let slice = libc::iovec {
        iov_base: ring.as_ptr(),
        iov_len: Ring::BYTES,
    };
    // SAFETY: the ring is Ring::BYTES of mapped, writable memory as long as `ring` lives. Others
    // may read it through atomics meanwhile; nobody holds a reference to plain bytes of it.
    let read = unsafe { libc::preadv2(fd, &raw const slice, 1, -1, libc::RWF_NOWAIT) };
    let read = match Errno::result(read) {
        // The answer of a kernel that doesn't know the call, the flag, or the flag for this kind of
        // file; or of a filter.
        Err(Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::EPERM) => {
            // SAFETY: as above.
            Errno::result(unsafe { libc::read(fd, ring.as_ptr(), Ring::BYTES) })
        }
        read => read,
    };
    read.map(|bytes| usize::try_from(bytes).unwrap_or(0))
}

/// A message as it is in a ring, owning nothing. For a successor that handles the messages that its
/// predecessor had read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raw {
    /// A thread waits for a page.
    Pagefault {
        /// The faulting address.
        address: u64,
        /// `UFFD_PAGEFAULT_FLAG_*`
        flags: u64,
        /// The thread's ID; 0 without [`Features::THREAD_ID`].
        thread: u32,
    },
    /// The owner forked.
    Fork {
        /// Number in the descriptor table of the process that read the message.
        descriptor: u32,
    },
    /// The owner moved memory.
    Remap {
        /// Old start.
        from: u64,
        /// New start.
        to: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The owner discards a range.
    Remove {
        /// First byte.
        start: u64,
        /// End (exclusive).
        end: u64,
    },
    /// The owner unmapped a range.
    Unmap {
        /// First byte.
        start: u64,
        /// End (exclusive).
        end: u64,
    },
    /// Another kind of message; 0 is a slot without a message.
    Unknown(u8),
}

impl Raw {
    /// Decodes the message in these 32 bytes.
    pub fn from_words(words: [u64; 4]) -> Self {
        let mut message = MaybeUninit::<abi::uffd_msg>::uninit();
        // SAFETY: both are 32 bytes (asserted in `abi.rs`), and every bit pattern is a uffd_msg,
        // because it consists only of integers.
        let message = unsafe {
            std::ptr::copy_nonoverlapping(words.as_ptr().cast(), message.as_mut_ptr(), 1);
            message.assume_init()
        };
        let arg = message.arg;
        // SAFETY: every member of the union consists of integers and is no longer than the union,
        // all of whose bytes are set.
        unsafe {
            match message.event {
                abi::UFFD_EVENT_PAGEFAULT => {
                    let abi::uffd_msg_pagefault {
                        flags,
                        address,
                        ptid,
                    } = arg.pagefault;
                    Self::Pagefault {
                        address,
                        flags,
                        thread: ptid,
                    }
                }
                abi::UFFD_EVENT_FORK => Self::Fork {
                    descriptor: arg.fork.ufd,
                },
                abi::UFFD_EVENT_REMAP => {
                    let abi::uffd_msg_remap { from, to, len } = arg.remap;
                    Self::Remap { from, to, len }
                }
                abi::UFFD_EVENT_REMOVE => {
                    let abi::uffd_msg_remove { start, end } = arg.remove;
                    Self::Remove { start, end }
                }
                abi::UFFD_EVENT_UNMAP => {
                    let abi::uffd_msg_remove { start, end } = arg.remove;
                    Self::Unmap { start, end }
                }
                event => Self::Unknown(event),
            }
        }
    }
}
