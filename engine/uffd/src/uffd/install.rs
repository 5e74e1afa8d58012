//! Installing pages into the owner's memory, with outcomes instead of error numbers.
//!
//! All installs have one shape: an ioctl over a range that proceeds page by page, stops at the
//! first page that it can't install, and reports the number of bytes done in a field of its
//! argument. The kernel returns EAGAIN both for "stopped in the middle" and for "did nothing
//! because the mapping is changing". In the second case, kernels before 6.15 don't write the field.
//! Therefore the field starts at 0, and only a positive value counts as progress.
//!
//! After [`Installed::Partial`], the same call on the rest returns why it stopped.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::features::Ioctls;
use super::userfaultfd::Userfaultfd;
use super::{abi, ioctls};

/// Whether an operation wakes the threads that wait in its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The operation wakes them at once.
    Now,
    /// [`Userfaultfd::wake`] is called later (`DONTWAKE`).
    Later,
}

/// The outcome of an install.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an install that isn't `Done` leaves somebody waiting"]
pub enum Installed {
    /// All pages are present.
    Done,
    /// The first `done` bytes are present, more than none and fewer than all. Try the rest to learn
    /// why it stopped.
    Partial {
        /// Number of bytes, in whole pages.
        done: u64,
    },
    /// The first page is already present. Nothing was done, and **nobody was woken**: the thread
    /// that installed the page with [`Wake::Later`] may not have woken its waiters yet.
    ///
    /// On hugetlbfs, Linux 6.18 also returns this when the page is absent and the pool is empty
    /// (where older kernels report no memory). A fault that returns to such a page after a wake
    /// therefore means [`NoMemory`](Self::NoMemory).
    Exists,
    /// Nothing was done: the owner is changing its mappings and waits until the event is read.
    Again,
    /// Nothing was done: the first page is not (or no longer) registered, or the range extends
    /// beyond the mapping in which it begins.
    Gone,
    /// The owner has exited.
    OwnerGone,
    /// Nothing was done: no memory, or the pool of huge pages is empty.
    NoMemory,
}

/// The outcome of a change of write protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a change that isn't `Done` has not happened"]
pub enum Protected {
    /// All of the range was changed.
    Done,
    /// Nothing was done: the owner is changing its mappings and waits until the event is read.
    Again,
    /// Part of the range is not (or no longer) registered for write protection.
    Gone,
    /// The owner has exited.
    OwnerGone,
}

/// An install operation, named in errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// `UFFDIO_COPY`
    Copy,
    /// `UFFDIO_ZEROPAGE`
    Zeropage,
    /// `UFFDIO_CONTINUE`
    Continue,
    /// `UFFDIO_POISON`
    Poison,
    /// `UFFDIO_WRITEPROTECT`
    WriteProtect,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Copy => "UFFDIO_COPY",
            Self::Zeropage => "UFFDIO_ZEROPAGE",
            Self::Continue => "UFFDIO_CONTINUE",
            Self::Poison => "UFFDIO_POISON",
            Self::WriteProtect => "UFFDIO_WRITEPROTECT",
        })
    }
}

/// The error for an install that failed in an unexpected way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    /// The kernel refused: EINVAL for an operation that the kernel or the kind of memory doesn't
    /// support, or for a range that isn't whole pages; EFAULT for an unreadable source.
    #[error("{op} of {len:#x} bytes at {address:#x} failed")]
    Refused {
        /// The operation.
        op: Op,
        /// Start of the range.
        address: u64,
        /// Length of the range in bytes.
        len: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// The range was never registered through this descriptor. The kernel was not asked.
    #[error(
        "{op} of {len:#x} bytes at {address:#x}: not memory that was registered through this userfaultfd"
    )]
    NotRegistered {
        /// The operation.
        op: Op,
        /// Start of the range.
        address: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// The kernel reported more bytes than requested, or success with fewer.
    #[error("{op} of {len:#x} bytes at {address:#x}: the kernel reports {reported} bytes")]
    Implausible {
        /// The operation.
        op: Op,
        /// Start of the range.
        address: u64,
        /// Length of the range in bytes.
        len: u64,
        /// The value that the kernel reported.
        reported: i64,
    },
}

/// A request, for checks and errors.
#[derive(Clone, Copy)]
struct Request {
    op: Op,
    address: u64,
    len: u64,
}

impl Request {
    /// Checks what the kernel doesn't check, and then calls the kernel. The list of grants stays
    /// locked until the kernel has answered.
    fn submit<T>(
        self,
        uffd: &Userfaultfd,
        ioctl: Ioctls,
        gone: T,
        call: impl FnOnce() -> Result<T, InstallError>,
    ) -> Result<T, InstallError> {
        if uffd.hides(ioctl) {
            return Err(self.refused(Errno::EINVAL));
        }
        let Self { op, address, len } = self;
        let end = address
            .checked_add(len)
            .ok_or_else(|| self.refused(Errno::EINVAL))?;
        match uffd.grants() {
            Some(grants) if grants.contains(address, end) => {
                let outcome = call();
                drop(grants);
                outcome
            }
            Some(grants) if grants.ever_contained(address, end) => Ok(gone),
            Some(_) => Err(InstallError::NotRegistered { op, address, len }),
            None => call(),
        }
    }

    fn refused(self, errno: Errno) -> InstallError {
        let Self { op, address, len } = self;
        InstallError::Refused {
            op,
            address,
            len,
            source: errno.into(),
        }
    }

    fn outcome(self, result: nix::Result<i32>, reported: i64) -> Result<Installed, InstallError> {
        let done = u64::try_from(reported).unwrap_or(0);
        let Self { op, address, len } = self;
        match result {
            Ok(_) if done == len => Ok(Installed::Done),
            Err(Errno::EAGAIN) if done == 0 => Ok(Installed::Again),
            Err(Errno::EAGAIN) if done < len => Ok(Installed::Partial { done }),
            Ok(_) | Err(Errno::EAGAIN) => Err(InstallError::Implausible {
                op,
                address,
                len,
                reported,
            }),
            Err(Errno::EEXIST) => Ok(Installed::Exists),
            Err(Errno::ENOENT) => Ok(Installed::Gone),
            Err(Errno::ESRCH) => Ok(Installed::OwnerGone),
            Err(Errno::ENOMEM) => Ok(Installed::NoMemory),
            Err(errno) => Err(self.refused(errno)),
        }
    }
}

impl Userfaultfd {
    /// Installs absent pages with `bytes`, whose length must be a multiple of the page size.
    ///
    /// Also replaces poisoned pages. The bytes should be in memory, in a private buffer: a source
    /// that must be waited for holds everybody up, and one that is itself missing under this
    /// userfaultfd waits forever, because reading messages and installing exclude each other.
    pub fn copy(&self, address: u64, bytes: &[u8], wake: Wake) -> Result<Installed, InstallError> {
        self.copy_with(address, bytes, mode(wake, abi::UFFDIO_COPY_MODE_DONTWAKE))
    }

    /// Installs pages like [`copy`](Self::copy), write-protected from the first moment, so that no
    /// write is missed.
    pub fn copy_protected(
        &self,
        address: u64,
        bytes: &[u8],
        wake: Wake,
    ) -> Result<Installed, InstallError> {
        let mode = mode(wake, abi::UFFDIO_COPY_MODE_DONTWAKE) | abi::UFFDIO_COPY_MODE_WP;
        self.copy_with(address, bytes, mode)
    }

    fn copy_with(&self, address: u64, bytes: &[u8], mode: u64) -> Result<Installed, InstallError> {
        let request = Request {
            op: Op::Copy,
            address,
            len: bytes.len() as u64,
        };
        request.submit(self, Ioctls::COPY, Installed::Gone, || {
            let src = bytes.as_ptr().expose_provenance() as u64;
            let mut argument = abi::uffdio_copy {
                dst: address,
                src,
                len: request.len,
                mode,
                copy: 0,
            };
            // SAFETY: `argument` is a live uffdio_copy, and `bytes` is readable for its length
            // during the call. Filling absent pages of [address, address + len) is allowed for the
            // three reasons given in the module `userfaultfd`; `submit` upholds the second. If the
            // kernel finds a page present or unregistered, it stops before that page.
            let result = unsafe { ioctls::copy(self.as_raw(), &raw mut argument) };
            request.outcome(result, argument.copy)
        })
    }

    /// Installs zero pages. Not for hugetlbfs, where the kernel returns EINVAL: copy zeros there.
    pub fn zeropage(&self, address: u64, len: u64, wake: Wake) -> Result<Installed, InstallError> {
        let request = Request {
            op: Op::Zeropage,
            address,
            len,
        };
        request.submit(self, Ioctls::ZEROPAGE, Installed::Gone, || {
            let mut argument = abi::uffdio_zeropage {
                range: request.range(),
                mode: mode(wake, abi::UFFDIO_ZEROPAGE_MODE_DONTWAKE),
                zeropage: 0,
            };
            // SAFETY: `argument` is a live uffdio_zeropage; the range is as in `copy`.
            let result = unsafe { ioctls::zeropage(self.as_raw(), &raw mut argument) };
            request.outcome(result, argument.zeropage)
        })
    }

    /// Installs pages that are already in the file behind a shared mapping (memory registered as
    /// [`Modes::MINOR`]).
    ///
    /// [`Modes::MINOR`]: super::Modes::MINOR
    pub fn continue_(&self, address: u64, len: u64, wake: Wake) -> Result<Installed, InstallError> {
        let request = Request {
            op: Op::Continue,
            address,
            len,
        };
        request.submit(self, Ioctls::CONTINUE, Installed::Gone, || {
            let mut argument = abi::uffdio_continue {
                range: request.range(),
                mode: mode(wake, abi::UFFDIO_CONTINUE_MODE_DONTWAKE),
                mapped: 0,
            };
            // SAFETY: `argument` is a live uffdio_continue; the range is as in `copy`. The content
            // that becomes visible is that of the file that the owner itself mapped there.
            let result = unsafe { ioctls::continue_(self.as_raw(), &raw mut argument) };
            request.outcome(result, argument.mapped)
        })
    }

    /// Makes absent pages raise SIGBUS for an instruction and EFAULT for a system call. Not for
    /// memory of a virtual machine, because a guest's access under KVM may read zeros instead.
    pub fn poison(&self, address: u64, len: u64, wake: Wake) -> Result<Installed, InstallError> {
        let request = Request {
            op: Op::Poison,
            address,
            len,
        };
        request.submit(self, Ioctls::POISON, Installed::Gone, || {
            let mut argument = abi::uffdio_poison {
                range: request.range(),
                mode: mode(wake, abi::UFFDIO_POISON_MODE_DONTWAKE),
                updated: 0,
            };
            // SAFETY: `argument` is a live uffdio_poison; the range is as in `copy`. Poison
            // replaces only absence, and an access to it is a signal or an error, never undefined
            // content.
            let result = unsafe { ioctls::poison(self.as_raw(), &raw mut argument) };
            request.outcome(result, argument.updated)
        })
    }

    /// Sets or clears write protection of a range that is registered as [`Modes::WRITE_PROTECT`].
    ///
    /// [`Modes::WRITE_PROTECT`]: super::Modes::WRITE_PROTECT
    pub fn write_protect(
        &self,
        address: u64,
        len: u64,
        protect: bool,
        wake: Wake,
    ) -> Result<Protected, InstallError> {
        let request = Request {
            op: Op::WriteProtect,
            address,
            len,
        };
        request.submit(self, Ioctls::WRITEPROTECT, Protected::Gone, || {
            // Protecting wakes nobody, and the kernel refuses DONTWAKE in combination with it.
            let mode = if protect {
                abi::UFFDIO_WRITEPROTECT_MODE_WP
            } else {
                mode(wake, abi::UFFDIO_WRITEPROTECT_MODE_DONTWAKE)
            };
            let mut argument = abi::uffdio_writeprotect {
                range: request.range(),
                mode,
            };
            // SAFETY: `argument` is a live uffdio_writeprotect; the range is as in `copy`. A
            // protected page keeps its content, and a write to it waits until the protection is
            // cleared.
            let result = unsafe { ioctls::writeprotect(self.as_raw(), &raw mut argument) };
            match result {
                Ok(_) => Ok(Protected::Done),
                Err(Errno::EAGAIN) => Ok(Protected::Again),
                Err(Errno::ENOENT) => Ok(Protected::Gone),
                Err(Errno::ESRCH) => Ok(Protected::OwnerGone),
                Err(errno) => Err(request.refused(errno)),
            }
        })
    }

    fn as_raw(&self) -> i32 {
        use std::os::fd::AsFd;
        self.as_fd().as_raw_fd()
    }
}

impl Request {
    fn range(self) -> abi::uffdio_range {
        abi::uffdio_range {
            start: self.address,
            len: self.len,
        }
    }
}

fn mode(wake: Wake, dont_wake: u64) -> u64 {
    match wake {
        Wake::Now => 0,
        Wake::Later => dont_wake,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request = Request {
        op: Op::Copy,
        address: 0x1000,
        len: 0x3000,
    };

    #[test]
    fn every_kernel_answer_maps_to_an_outcome() {
        let eagain = i64::from(libc::EAGAIN);
        let outcomes = [
            // Newer kernels write -EAGAIN when the mapping is changing, older ones write nothing.
            (Err(Errno::EAGAIN), -eagain, Installed::Again),
            (Err(Errno::EAGAIN), 0, Installed::Again),
            (
                Err(Errno::EAGAIN),
                0x1000,
                Installed::Partial { done: 0x1000 },
            ),
            (Ok(0), 0x3000, Installed::Done),
            // Other errors are reported twice, also in the field.
            (
                Err(Errno::EEXIST),
                -i64::from(libc::EEXIST),
                Installed::Exists,
            ),
            (
                Err(Errno::ENOENT),
                -i64::from(libc::ENOENT),
                Installed::Gone,
            ),
            (Err(Errno::ESRCH), 0, Installed::OwnerGone),
            (
                Err(Errno::ENOMEM),
                -i64::from(libc::ENOMEM),
                Installed::NoMemory,
            ),
        ];
        for (result, reported, expected) in outcomes {
            assert_eq!(
                REQUEST.outcome(result, reported).expect("an outcome"),
                expected
            );
        }
    }

    #[test]
    fn implausible_kernel_answer_is_an_error() {
        for (result, reported) in [
            (Ok(0), 0x1000),
            (Ok(0), -11),
            (Err(Errno::EAGAIN), 0x3000),
            (Err(Errno::EAGAIN), i64::MAX),
        ] {
            let error = REQUEST.outcome(result, reported).expect_err("implausible");
            assert!(matches!(error, InstallError::Implausible { .. }), "{error}");
        }
    }
}
