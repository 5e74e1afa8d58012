//! What the engine's threads need of the system: no signals, and reads that fail in place of
//! killing.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use nix::errno::Errno;

/// All signals of the calling thread are blocked until this is dropped; threads started meanwhile
/// inherit that and keep it.
///
/// The kernel still delivers SIGKILL, SIGSTOP, and the signals that a thread's own instructions
/// cause.
#[derive(Debug)]
pub struct SignalsBlocked {
    before: libc::sigset_t,
    // The mask belongs to one thread, so the value must be dropped there.
    not_send: PhantomData<*const ()>,
}

impl SignalsBlocked {
    /// Blocks all signals of the calling thread.
    pub fn now() -> io::Result<Self> {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both pointers are to live, writable sigset_t; sigfillset initialises the first
        // before it is read, and pthread_sigmask initialises the second when it returns 0, which is
        // checked before it is taken.
        let before = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            match libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) {
                0 => before.assume_init(),
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
        };
        Ok(Self {
            before,
            not_send: PhantomData,
        })
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: `before` is the initialised mask that this thread had; it can't have changed
        // threads. The call fails for a bad first argument only.
        unsafe {
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.before,
                std::ptr::null_mut(),
            )
        };
    }
}

/// Returns freed memory to the system, which the C library may keep for use by threads to come.
pub(crate) fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Memory of this process that could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadFault {
    /// Poisoned, not mapped, or not readable. (Or absent, if the userfaultfd sees faults of user
    /// code only.)
    #[error("memory at {address:#x} cannot be read: poisoned, unmapped or without access")]
    Unreadable {
        /// In the first page that can't be read; everything before it was.
        address: u64,
    },
    /// The system call is not permitted, for example by a filter.
    #[error("process_vm_readv failed")]
    Failed(#[source] io::Error),
}

/// Reads memory of this process through the kernel: an error, not a signal, for what can't be read.
///
/// A page that is missing under a userfaultfd is waited for. The bytes may be changing at the same
/// time; what arrives then is some mixture, as it would be for another process.
pub fn read_checked(address: u64, buffer: &mut [u8]) -> Result<(), ReadFault> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        let local = libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
        let from = address.wrapping_add(done as u64);
        let remote = libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(super::to_usize(from)),
            iov_len: rest.len(),
        };
        // SAFETY: the kernel writes into `rest` only, which is exclusively ours for its length. The
        // remote address is data to it: it checks the mapping and access rights of every page and
        // answers EFAULT.
        let read = unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        };
        match Errno::result(read) {
            Ok(0) | Err(Errno::EFAULT) => return Err(ReadFault::Unreadable { address: from }),
            // A short read ends where a page could not be read; the next round says so.
            Ok(bytes) => done += usize::try_from(bytes).unwrap_or(0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(ReadFault::Failed(errno.into())),
        }
    }
    Ok(())
}
