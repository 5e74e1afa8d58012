//! The minimum of userfaultfd that is needed by a one-page-a-fault handler, a VMM that hands its
//! memory over, and the limit of copying, without any layer in between.
#![allow(unsafe_code, reason = "it talks to the kernel")]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use snaprestore_uffd::uffd::abi;

use crate::BenchError;

/// `_IO(0xaa, 0)` on /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOWR(0xaa, 0x03, struct uffdio_copy)`
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// `_IOWR(0xaa, 0x04, struct uffdio_zeropage)`
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

/// `UFFD_FEATURE_EVENT_REMOVE`
const EVENT_REMOVE: u64 = 1 << 3;

/// A userfaultfd.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
}

/// Outcome of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    Done,
    Exists,
}

impl Uffd {
    /// Opens a userfaultfd whose reads block, and that reports only faults.
    pub(crate) fn open() -> Result<Self, BenchError> {
        Self::with(0, 0)
    }

    /// Opens a userfaultfd as Firecracker does: reads don't block, and discards are reported.
    pub(crate) fn open_as_vmm() -> Result<Self, BenchError> {
        Self::with(libc::O_NONBLOCK, EVENT_REMOVE)
    }

    fn with(flags: i32, features: u64) -> Result<Self, BenchError> {
        let fd = new_descriptor(libc::O_CLOEXEC | flags)?;
        let mut api = abi::uffdio_api {
            api: 0xaa,
            features,
            ioctls: 0,
        };
        // SAFETY: `api` is a live uffdio_api that the kernel reads and fills.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        check(result, "UFFDIO_API")?;
        Ok(Self { fd })
    }

    /// Wraps another process's userfaultfd and makes its reads block; the owner doesn't read from
    /// it.
    pub(crate) fn received(fd: OwnedFd) -> Result<Self, BenchError> {
        // SAFETY: the call sets flags of an open descriptor.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, 0) };
        check(result, "F_SETFL")?;
        Ok(Self { fd })
    }

    pub(crate) fn register(&self, start: u64, len: u64) -> Result<(), BenchError> {
        let mut register = abi::uffdio_register {
            range: abi::uffdio_range { start, len },
            mode: 1,
            ioctls: 0,
        };
        // SAFETY: `register` is live; the range is anonymous memory of this process that is to be
        // filled.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        check(result, "UFFDIO_REGISTER")
    }

    /// Waits for a fault. Returns `None` if the descriptor can't be read.
    pub(crate) fn next_fault(&self) -> Option<u64> {
        // struct uffd_msg: the event's number first, the address of a fault at byte 16.
        let mut message = [0_u64; 4];
        loop {
            // SAFETY: `message` has room for the one message that the length permits.
            let len = unsafe { libc::read(self.fd.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
            match len {
                32 => return Some(message[2]),
                _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => return None,
            }
        }
    }

    /// Copies `len` bytes, which wakes the threads that wait for them.
    pub(crate) fn copy(&self, to: u64, from: *const u8, len: u64) -> io::Result<Copied> {
        let mut copy = abi::uffdio_copy {
            dst: to,
            src: from.expose_provenance() as u64,
            len,
            mode: 0,
            copy: 0,
        };
        // SAFETY: `copy` is live; the callers pass a source of `len` readable bytes that stays
        // mapped, and a destination that was registered, where only absent pages are filled.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
        outcome(result)
    }

    /// Installs zero pages.
    pub(crate) fn zero(&self, start: u64, len: u64) -> io::Result<Copied> {
        let mut zero = abi::uffdio_zeropage {
            range: abi::uffdio_range { start, len },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: `zero` is live; only absent pages of registered memory are filled.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero) };
        outcome(result)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn outcome(result: i32) -> io::Result<Copied> {
    if result == 0 {
        return Ok(Copied::Done);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EEXIST) {
        return Ok(Copied::Exists);
    }
    Err(error)
}

fn check(result: i32, what: &str) -> Result<(), BenchError> {
    if result == 0 {
        Ok(())
    } else {
        Err(BenchError::last(what))
    }
}

/// Opens a userfaultfd through the device, which needs the fewest rights, or else through the
/// system call.
fn new_descriptor(flags: i32) -> Result<OwnedFd, BenchError> {
    let raw = match File::open("/dev/userfaultfd") {
        // SAFETY: the argument is flags; the kernel gives a new descriptor or an error.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
        Err(_) => -1,
    };
    let raw = if raw >= 0 {
        raw
    } else {
        // SAFETY: as above.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        i32::try_from(fd).unwrap_or(-1)
    };
    if raw < 0 {
        let error = io::Error::last_os_error();
        return Err(BenchError::Unavailable(format!(
            "no userfaultfd ({error}); `snaprestore doctor` says what would permit one"
        )));
    }
    // SAFETY: the kernel has just returned this descriptor, and nothing else uses it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Binds this thread to a core.
pub(crate) fn pin_to(core: usize) {
    // SAFETY: all zeros is an empty set of cores.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is live, and CPU_SET checks the core against its size.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: the kernel reads `set`. If it refuses, the thread stays where the scheduler puts it.
    let _ = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
}

/// Returns the core that this thread runs on.
pub(crate) fn this_core() -> usize {
    // SAFETY: the call reads a number of the thread itself.
    let core = unsafe { libc::sched_getcpu() };
    usize::try_from(core).unwrap_or(0)
}
