//! A userfaultfd: its ranges, and what applies to all operations.
//!
//! ```text
//!  OpenOptions::open ──┐                                 ┌─ read ──> messages        (message.rs)
//!  adopt (received) ───┼─> Userfaultfd ── register ──────┼─ copy, zeropage, ...      (install.rs)
//!  Forked::into ───────┘        │                        ├─ wake, probe
//!                               └── drop: closes         └─ unregister: absent = zero from then on
//! ```
//!
//! # Why installing is safe to call
//!
//! An install writes into memory that is given by a number. Nevertheless the functions are not
//! `unsafe`, for three reasons that must all hold:
//!
//! 1. It fills only *absent* pages. For a present page the kernel returns EEXIST and changes
//!    nothing, so no byte that any code has ever read or written changes.
//! 2. Absent pages are filled only where memory was registered through this object. Registering is
//!    the `unsafe` step: [`RawRegion`]'s contract says that the memory is plain bytes of any value
//!    until the restore is over. The kernel alone would also permit memory that other code
//!    registered with its own userfaultfd; the list in `grants.rs` doesn't.
//! 3. Memory of another process can't be made unsound by us. The process that handed over the
//!    descriptor has permitted changes to its memory. [`Userfaultfd::adopt`] is `unsafe` because it
//!    trusts that the descriptor is foreign and no detour to this process;
//!    [`Userfaultfd::adopt_foreign`] checks it.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::features::{Features, Ioctls};
use super::foreign::{USERFAULTFD, kind_of};
use super::grants::Grants;
use super::{abi, ioctls};
use crate::memory::{self, Mapping, MemError, RawRegion};
use crate::os::limits::Hint;

/// Sizes of address space that a process reserves to find out whether a userfaultfd is its own: a
/// large one, or a smaller one where address space is limited.
const RESERVED: [u64; 2] = [1 << 40, 1 << 30];
/// Held while the range is in use: another thread might reserve what one has just released.
static PROBE: Mutex<()> = Mutex::new(());

/// The kinds of faults that a registration reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Modes(u64);

impl Modes {
    /// Touches of absent pages.
    pub const MISSING: Self = Self(abi::UFFDIO_REGISTER_MODE_MISSING);
    /// Writes to write-protected pages.
    pub const WRITE_PROTECT: Self = Self(abi::UFFDIO_REGISTER_MODE_WP);
    /// Touches of pages that are in the file behind the mapping, but not mapped.
    pub const MINOR: Self = Self(abi::UFFDIO_REGISTER_MODE_MINOR);

    /// Returns the union of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns the kernel's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// A negotiated userfaultfd, closed exactly once, when this is dropped.
///
/// **When it is dropped, or the last descriptor of another process's userfaultfd closes, every page
/// still absent becomes zero** and waiting threads continue with zeros. Drop it only when nothing
/// is missing, or when nobody is left to see it.
///
/// All methods take `&self` and may be called from any thread. Keep it in an `Arc`, and join every
/// thread that uses it before dropping the last one: that keeps an operation from ever reaching a
/// reused descriptor number.
pub struct Userfaultfd {
    fd: OwnedFd,
    enabled: Features,
    available: Features,
    hidden: Ioctls,
    user_mode_only: bool,
    /// The memory that may be filled; `None` if the memory is another process's.
    grants: Option<RwLock<Grants>>,
}

impl Userfaultfd {
    pub(super) fn of_this_process(
        fd: OwnedFd,
        enabled: Features,
        available: Features,
        hidden: Ioctls,
        user_mode_only: bool,
    ) -> Self {
        let grants = Some(RwLock::new(Grants::default()));
        Self {
            fd,
            enabled,
            available,
            hidden,
            user_mode_only,
            grants,
        }
    }

    pub(super) fn of_another_process(fd: OwnedFd, enabled: Features, hidden: Ioctls) -> Self {
        Self {
            fd,
            enabled,
            available: enabled,
            hidden,
            user_mode_only: false,
            grants: None,
        }
    }

    /// Takes over a userfaultfd that came from another process, which has already negotiated it
    /// with `enabled`.
    ///
    /// Sets `O_NONBLOCK`, without which the kernel's `poll` reports an error forever; the flag
    /// belongs to the open file and is shared with the sender. Refuses a descriptor that is not a
    /// userfaultfd or has not been through `UFFDIO_API`.
    ///
    /// # Safety
    ///
    /// The memory behind the descriptor must be another process's. (If it is this process's, every
    /// range registered with any userfaultfd of this process must tolerate being filled with any
    /// bytes through the result.)
    pub unsafe fn adopt(
        fd: OwnedFd,
        enabled: Features,
        hidden: Ioctls,
    ) -> Result<Self, AdoptError> {
        let kind = kind_of(fd.as_fd()).map_err(AdoptError::Inspect)?;
        if kind != USERFAULTFD {
            let found = kind.to_string_lossy().into_owned();
            return Err(AdoptError::NotUserfaultfd { found });
        }
        set_nonblocking(fd.as_fd()).map_err(AdoptError::Inspect)?;
        let adopted = Self::of_another_process(fd, enabled, hidden);
        // Waking a page for which nobody waits changes nothing, and before negotiation every ioctl
        // but UFFDIO_API returns EINVAL. This low address passes the range check of every
        // architecture.
        adopted
            .wake(1 << 32, crate::page_size())
            .map_err(|_| AdoptError::NotNegotiated)?;
        Ok(adopted)
    }

    /// Takes over a userfaultfd like [`Userfaultfd::adopt`], after checking that the memory is
    /// another process's, so that the caller need not guarantee it.
    ///
    /// Unregistering what is not registered changes nothing, and the kernel returns EINVAL where
    /// nothing is mapped. Therefore places in a range that this process has just reserved are
    /// tried, except at the addresses of `registered`. If all of them are mapped in the address
    /// space of the descriptor, it belongs to this process: the range is so long that another
    /// process has nothing mapped in most of it. The exception is a child that was forked at this
    /// moment and has inherited the range, so the places are tried once more after the range was
    /// released.
    pub fn adopt_foreign(
        fd: OwnedFd,
        enabled: Features,
        hidden: Ioctls,
        registered: &[Range<u64>],
    ) -> Result<Self, AdoptError> {
        // SAFETY: nothing is filled through the result before the check below, and it is dropped if
        // the memory is this process's.
        let adopted = unsafe { Self::adopt(fd, enabled, hidden) }?;
        let _alone = PROBE.lock().unwrap_or_else(PoisonError::into_inner);
        let reserved = RESERVED
            .iter()
            .find_map(|len| Mapping::inaccessible(*len).ok());
        let reserved = reserved.ok_or_else(|| AdoptError::Inspect(Errno::ENOMEM.into()))?;
        let step = crate::to_usize(reserved.len() / 16);
        let places = (reserved.address()..).step_by(step).take(16);
        let places: Vec<u64> = places
            .filter(|at| !registered.iter().any(|range| range.contains(at)))
            .collect();
        let is_mapped = |at: &u64| {
            let answer = adopted.unregister(*at, crate::page_size());
            matches!(answer, Ok(Unregistered::Done))
        };
        let was_mapped = places.iter().all(is_mapped);
        drop(reserved);
        let is_foreign = !places.is_empty() && (!was_mapped || places.iter().all(is_mapped));
        if !is_foreign {
            return Err(AdoptError::OwnMemory);
        }
        Ok(adopted)
    }

    /// Returns the enabled features.
    pub fn features(&self) -> Features {
        self.enabled
    }

    /// Returns all features that the kernel has and no mask hides; for an adopted userfaultfd, the
    /// enabled ones.
    pub fn available(&self) -> Features {
        self.available
    }

    /// Returns whether faults of the kernel's own accesses fail with EFAULT instead of being
    /// reported.
    pub fn is_user_mode_only(&self) -> bool {
        self.user_mode_only
    }

    /// Returns whether the memory is this process's own.
    pub fn is_own_memory(&self) -> bool {
        self.grants.is_some()
    }

    /// Starts reporting faults of `[offset, offset + len)` of `region`, and permits filling it.
    ///
    /// Returns the ioctls that work there. The first fault may be read before this returns.
    pub fn register(
        &self,
        region: &RawRegion,
        offset: u64,
        len: u64,
        modes: Modes,
    ) -> Result<Ioctls, RegisterError> {
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= region.len());
        if !inside || self.grants.is_none() {
            return Err(RegisterError::OutOfRegion {
                offset,
                len,
                region: region.len(),
            });
        }
        let start = region.address() + offset;
        let mut grants = self.grants_mut();
        let answer = self.register_ioctl(start, len, modes)?;
        if let Some(grants) = grants.as_mut() {
            grants.add(start, start + len, region.keep());
        }
        Ok(answer)
    }

    /// Starts reporting faults of memory that is known only by its address in the owner.
    ///
    /// # Safety
    ///
    /// If the memory is this process's own, the range must satisfy what [`RawRegion::new`] demands.
    pub unsafe fn register_address(
        &self,
        start: u64,
        len: u64,
        modes: Modes,
    ) -> Result<Ioctls, RegisterError> {
        let mut grants = self.grants_mut();
        let answer = self.register_ioctl(start, len, modes)?;
        if let Some(grants) = grants.as_mut() {
            grants.add(start, start + len, None);
        }
        Ok(answer)
    }

    fn register_ioctl(&self, start: u64, len: u64, modes: Modes) -> Result<Ioctls, RegisterError> {
        let range = abi::uffdio_range { start, len };
        let mut argument = abi::uffdio_register {
            range,
            mode: modes.bits(),
            ioctls: 0,
        };
        // SAFETY: `argument` is a live uffdio_register, exclusively ours. The contract behind
        // `region`, or of `register_address`, accepts the effects of registering on the memory
        // (accesses wait, absent pages can be filled). If the range is not mapped or of an
        // unsuitable kind, the kernel refuses all of it.
        let result = unsafe { ioctls::register(self.fd.as_raw_fd(), &raw mut argument) };
        match result {
            Ok(_) => Ok(Ioctls::from_bits(argument.ioctls).without(self.hidden)),
            Err(errno) => Err(RegisterError::new(start, len, errno)),
        }
    }

    /// Stops reporting faults in `[start, start + len)` and wakes the threads that wait there.
    ///
    /// **Pages still absent are zero from then on.** No other function of this crate does that
    /// unless requested.
    pub fn unregister(&self, start: u64, len: u64) -> Result<Unregistered, RegisterError> {
        let mut grants = self.grants_mut();
        let mut range = abi::uffdio_range { start, len };
        // SAFETY: `range` is a live uffdio_range that the kernel only reads. Unregistering removes
        // no memory. It makes absent pages read as zeros, which are initialised bytes, as the
        // contract of registering permits.
        let result = unsafe { ioctls::unregister(self.fd.as_raw_fd(), &raw mut range) };
        let outcome = match result {
            Ok(_) => Unregistered::Done,
            // The kernel's answer if no mapping begins in the range.
            Err(Errno::EINVAL) if is_range(start, len) => Unregistered::Gone,
            // Without an owner the kernel returns ENOMEM here, which can also mean a lack of
            // memory.
            Err(Errno::ENOMEM) if matches!(self.probe(start), Ok(Presence::OwnerGone)) => {
                Unregistered::OwnerGone
            }
            Err(errno) => return Err(RegisterError::new(start, len, errno)),
        };
        if let Some(grants) = grants.as_mut() {
            grants.remove(start, start.saturating_add(len));
        }
        Ok(outcome)
    }

    /// Makes every thread that waits for a page of the range retry.
    ///
    /// If the page is still absent, the thread faults again, and the fault is reported again: a
    /// wake loses nothing, wherever it happens. The range need not be mapped.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = abi::uffdio_range { start, len };
        // SAFETY: `range` is a live uffdio_range that the kernel only reads. Waking makes waiting
        // threads repeat their access and touches no memory.
        unsafe { ioctls::wake(self.fd.as_raw_fd(), &raw mut range) }?;
        Ok(())
    }

    /// Determines whether the page at `address` could be installed at this moment, without
    /// installing anything.
    ///
    /// This is a COPY whose source can't be read, so that the kernel performs its checks and goes
    /// no further.
    pub fn probe(&self, address: u64) -> io::Result<Presence> {
        let mut argument = abi::uffdio_copy {
            dst: address & !(crate::page_size() - 1),
            src: memory::unreadable_page()?,
            len: crate::page_size(),
            mode: abi::UFFDIO_COPY_MODE_DONTWAKE,
            copy: 0,
        };
        // SAFETY: `argument` is a live uffdio_copy. The source is a page without access rights that
        // lives as long as the process, so the kernel has nothing to install, whatever the
        // destination is.
        let result = unsafe { ioctls::copy(self.fd.as_raw_fd(), &raw mut argument) };
        match result {
            Err(Errno::EAGAIN) => Ok(Presence::Changing),
            Err(Errno::ENOENT) => Ok(Presence::Gone),
            Err(Errno::ESRCH) => Ok(Presence::OwnerGone),
            // EFAULT: all checks passed and the source failed. EEXIST, EINVAL: already present, or
            // of another page size.
            Err(Errno::EFAULT | Errno::EEXIST | Errno::EINVAL) => Ok(Presence::Registered),
            Err(errno) => Err(errno.into()),
            Ok(_) => Err(io::Error::other(
                "the kernel copied a page without access rights",
            )),
        }
    }

    /// Sets `O_NONBLOCK` again. A process that shares the open file can have cleared it, and then
    /// `poll` reports an error forever.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        set_nonblocking(self.as_fd())
    }

    /// Makes a range that is registered through this descriptor inaccessible, wherever the owner
    /// has moved it since: a touch gets SIGSEGV, or EFAULT. For kernels that can't poison what
    /// could not be restored. The owner must not unmap or move any of it at the same time, as
    /// [`RawRegion::new`] says.
    pub fn make_inaccessible(&self, address: u64, len: u64) -> Result<(), MemError> {
        let doing = "making inaccessible";
        let end = address.checked_add(len);
        let is_granted = |end| match self.grants() {
            Some(grants) => grants.contains(address, end),
            None => false,
        };
        if !end.is_some_and(is_granted) {
            return Err(MemError::invalid(doing, address, len));
        }
        // SAFETY: the contract of `RawRegion::new` lists this among what the owner of the memory
        // accepts, and moving it doesn't end that. The owner has guaranteed not to unmap or move
        // any of it just now, so nothing else can be mapped there.
        unsafe { memory::protect(address, len, libc::PROT_NONE) }
    }

    pub(super) fn hides(&self, ioctl: Ioctls) -> bool {
        self.hidden.contains(ioctl)
    }

    pub(super) fn hidden(&self) -> Ioctls {
        self.hidden
    }

    /// Locks the list, which every install holds across check and ioctl; `None` if nothing is
    /// checked.
    pub(super) fn grants(&self) -> Option<RwLockReadGuard<'_, Grants>> {
        // The list is consistent between calls of its methods, which don't panic; poisoning carries
        // no information.
        self.grants
            .as_ref()
            .map(|grants| grants.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn grants_mut(&self) -> Option<RwLockWriteGuard<'_, Grants>> {
        self.grants
            .as_ref()
            .map(|grants| grants.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Userfaultfd {
    /// Unregisters this process's memory before the descriptor closes.
    ///
    /// Closing alone does that only if no forked child holds a copy of the descriptor. If one does,
    /// an event would no longer have a reader, and the munmap of a mapping that only the list keeps
    /// alive would wait for it forever.
    fn drop(&mut self) {
        let Some(grants) = self.grants_mut() else {
            return;
        };
        for (start, end) in grants.ranges() {
            let mut range = abi::uffdio_range {
                start,
                len: end - start,
            };
            // SAFETY: as in `unregister`. An error means that nothing is registered there, which is
            // the goal.
            let _ = unsafe { ioctls::unregister(self.fd.as_raw_fd(), &raw mut range) };
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Userfaultfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Userfaultfd")
            .field("fd", &self.fd.as_raw_fd())
            .field("features", &self.enabled)
            .field("own_memory", &self.grants.is_some())
            .finish_non_exhaustive()
    }
}

/// The result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The page is registered with a userfaultfd of its process.
    Registered,
    /// The page is not registered.
    Gone,
    /// The owner is discarding, moving or unmapping memory and waits for the event to be read.
    Changing,
    /// The owner has exited.
    OwnerGone,
}

/// The outcome of unregistering a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unregistered {
    /// The range is no longer registered.
    Done,
    /// Nothing is mapped there.
    Gone,
    /// The owner has exited.
    OwnerGone,
}

/// The reason why a range can't be registered or unregistered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The range is not inside its region, or the region is not memory of the owner.
    #[error(
        "cannot register {len:#x} bytes at offset {offset:#x} of a region of {region:#x} bytes"
    )]
    OutOfRegion {
        /// Requested offset.
        offset: u64,
        /// Requested length in bytes.
        len: u64,
        /// Length of the region in bytes.
        region: u64,
    },
    /// Another userfaultfd has registered it.
    #[error("the memory at {start:#x}, {len:#x} bytes, is registered with another userfaultfd")]
    Busy {
        /// Start of the range.
        start: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// The range is not whole pages, is not mapped, or is memory of a kind that the kernel doesn't
    /// register in this mode.
    #[error(
        "the memory at {start:#x}, {len:#x} bytes, cannot be registered: it must be whole pages, mapped, and anonymous, shared or hugetlbfs as the mode allows"
    )]
    Unsuitable {
        /// Start of the range.
        start: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// Any other error; ENOMEM means too many mappings (`vm.max_map_count`) or that the owner has
    /// exited.
    #[error("registering or unregistering {len:#x} bytes at {start:#x} failed{hint}")]
    Failed {
        /// Start of the range.
        start: u64,
        /// Length of the range in bytes.
        len: u64,
        /// The limit that was reached, if known.
        hint: Hint,
        /// The kernel's error.
        source: io::Error,
    },
}

impl RegisterError {
    fn new(start: u64, len: u64, errno: Errno) -> Self {
        match errno {
            Errno::EBUSY => Self::Busy { start, len },
            Errno::EINVAL => Self::Unsuitable { start, len },
            errno => {
                let source = errno.into();
                Self::Failed {
                    start,
                    len,
                    hint: Hint::for_mappings(&source),
                    source,
                }
            }
        }
    }
}

/// The reason why a received descriptor is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// The descriptor is something else.
    #[error("the received descriptor is {found}, not a userfaultfd")]
    NotUserfaultfd {
        /// The kernel's name for it.
        found: String,
    },
    /// The userfaultfd is for the memory of this process.
    #[error("the received userfaultfd is for the memory of this process")]
    OwnMemory,
    /// The sender hasn't negotiated it with the kernel yet.
    #[error("the received userfaultfd has not been through UFFDIO_API")]
    NotNegotiated,
    /// The descriptor could not be inspected, or not be made non-blocking.
    #[error("cannot inspect the received descriptor")]
    Inspect(#[source] io::Error),
}

fn is_range(start: u64, len: u64) -> bool {
    let page = crate::page_size();
    len > 0
        && start.is_multiple_of(page)
        && len.is_multiple_of(page)
        && start.checked_add(len).is_some()
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(())
}
