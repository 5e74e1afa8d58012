//! Reading what the kernel reports.
//!
//! `read` *is* the acknowledgement: the owner's madvise, mremap or munmap goes on as soon as the
//! kernel has handed its message out. So messages are read straight into a [`Ring`], which can lie
//! in memory that outlives this process.
//!
//! The kernel hands out faults before any other message, whatever their order in time. Apply what
//! isn't a fault first, and read until [`ReadOutcome::Empty`] before trusting that nothing is
//! pending.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::abi;
use super::features::{Features, Ioctls};
use super::userfaultfd::Userfaultfd;
use crate::memory::Ring;

/// How a page was touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultFlags {
    /// By a write.
    pub write: bool,
    /// It is present and write-protected.
    pub write_protect: bool,
    /// It is in the file behind the mapping, but not mapped.
    pub minor: bool,
}

/// One message.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for a page.
    Pagefault {
        /// Of the page, or the exact one with [`Features::EXACT_ADDRESS`].
        address: u64,
        /// How it was touched.
        flags: FaultFlags,
        /// Who touched it, with [`Features::THREAD_ID`].
        thread: Option<u32>,
    },
    /// The owner forked; its child's memory is registered with a userfaultfd of its own.
    Fork {
        /// Dropping it gives the child zeros for everything that was absent.
        child: Forked,
    },
    /// The owner moved memory. An `Unmap` of the old range may follow.
    Remap {
        /// Old start.
        from: u64,
        /// New start.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// The owner discards the content of a range, which stays registered.
    Remove {
        /// First byte.
        start: u64,
        /// Beyond the last.
        end: u64,
    },
    /// The owner unmapped a range.
    Unmap {
        /// First byte.
        start: u64,
        /// Beyond the last.
        end: u64,
    },
    /// A kind that this engine doesn't know.
    Unknown(u8),
}

/// The userfaultfd of an owner's child, as the kernel made it.
#[derive(Debug)]
pub struct Forked {
    fd: OwnedFd,
    features: Features,
    hidden: Ioctls,
}

impl Forked {
    /// The userfaultfd, with the parent's features.
    pub fn into_userfaultfd(self) -> Userfaultfd {
        // A forked child has an address space of its own, so its memory is not this process's.
        Userfaultfd::of_another_process(self.fd, self.features, self.hidden)
    }
}

impl AsFd for Forked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a read came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// So many messages were appended. There may be more.
    Messages(usize),
    /// Nothing was pending at this moment. It is not the end: there is none.
    Empty,
}

/// Why reading failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The owner forked and this process has no descriptor left for the child's userfaultfd. The
    /// message stays pending, and the owner waits in `fork`.
    #[error(
        "no file descriptor is left for the userfaultfd of a forked child: raise RLIMIT_NOFILE"
    )]
    NoDescriptor(#[source] io::Error),
    /// Anything else.
    #[error("reading from a userfaultfd failed")]
    Failed(#[source] io::Error),
}

impl Userfaultfd {
    /// Reads up to 64 pending messages into `ring` and appends them, decoded, to `messages`.
    /// Doesn't wait.
    ///
    /// `ring` is zeroed first: a message of an earlier read that must not be lost has to be dealt
    /// with before. It is left as the kernel wrote it; call [`Ring::clear`] when everything in it
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
            // SAFETY: the slot was filled by the read above, once, and this is the only place that
            // looks at it before the next read: `ring` is borrowed exclusively. What others may have
            // written to a shared one is not believed of descriptors.
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
    /// If descriptors are believed, `words` must come from the kernel by a read of this descriptor in
    /// this process, and be decoded once: a fork message carries a descriptor that becomes ours here.
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
                // It stays open until this process ends.
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

/// Reads what is there into `ring`; EAGAIN if nothing is.
///
/// `O_NONBLOCK` belongs to the open file, and who shares it can clear it at any instant: a read would wait then,
/// with the install lock held. So each read says by itself that it shall not wait, which userfaultfds understand since
/// Linux 6.10. Before, the flag is all that there is.
fn read_at_once(uffd: BorrowedFd<'_>, ring: &mut Ring) -> nix::Result<usize> {
    let fd = uffd.as_raw_fd();
    let slice = libc::iovec {
        iov_base: ring.as_ptr(),
        iov_len: Ring::BYTES,
    };
    // SAFETY: the ring is Ring::BYTES of mapped, writable memory for as long as `ring` lives. Others may look at
    // it through atomics meanwhile; nobody holds a reference to plain bytes of it.
    let read = unsafe { libc::preadv2(fd, &raw const slice, 1, -1, libc::RWF_NOWAIT) };
    let read = match Errno::result(read) {
        // What a kernel says that doesn't know the call, the flag, or the flag for this kind of file; or a filter.
        Err(Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::EPERM) => {
            // SAFETY: as above.
            Errno::result(unsafe { libc::read(fd, ring.as_ptr(), Ring::BYTES) })
        }
        read => read,
    };
    read.map(|bytes| usize::try_from(bytes).unwrap_or(0))
}

/// A message as it lies in a ring, owning nothing. For a successor that deals with what its
/// predecessor had read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raw {
    /// A thread waits for a page.
    Pagefault {
        /// Where.
        address: u64,
        /// `UFFD_PAGEFAULT_FLAG_*`
        flags: u64,
        /// 0 without [`Features::THREAD_ID`].
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
        /// Bytes.
        len: u64,
    },
    /// The owner discards a range.
    Remove {
        /// First byte.
        start: u64,
        /// Beyond the last.
        end: u64,
    },
    /// The owner unmapped a range.
    Unmap {
        /// First byte.
        start: u64,
        /// Beyond the last.
        end: u64,
    },
    /// Another kind; 0 is a slot without a message.
    Unknown(u8),
}

impl Raw {
    /// The message in these 32 bytes.
    pub fn from_words(words: [u64; 4]) -> Self {
        let mut message = MaybeUninit::<abi::uffd_msg>::uninit();
        // SAFETY: both are 32 bytes (asserted in `abi.rs`), and every bit pattern is a uffd_msg: it
        // has integers only.
        let message = unsafe {
            std::ptr::copy_nonoverlapping(words.as_ptr().cast(), message.as_mut_ptr(), 1);
            message.assume_init()
        };
        let arg = message.arg;
        // SAFETY: every member of the union is made of integers and no longer than it, and all its
        // bytes are set.
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
