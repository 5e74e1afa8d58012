//! The real platform: a userfaultfd and the threads of this process.

use std::os::fd::BorrowedFd;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use crate::fail_point::{FailPoint, fail_point};
use snaprestore_uffd::memory::{Brake, MemError, Ring};
use snaprestore_uffd::os::PageMap;
use snaprestore_uffd::uffd::abi::UFFD_EVENT_FORK;
use snaprestore_uffd::uffd::{
    self, InstallError, Message, Presence, Raw, Readiness, Userfaultfd, WaitQueue, Wake,
};

use crate::session::platform::{Event, FrameId, Installed, PAGE, Platform, ReadFailed, Waited};

/// Maximum number of consecutive installs that meet a changing mapping with no event to read: an
/// owner that forks or unmaps a huge mapping spends a while between the start of the change and its
/// event.
const MAX_RETRIES: u32 = 4000;
/// Range of addresses in which the memory of a process can lie: above what is never mapped, below
/// the end of the smallest address space of a 64-bit process with four levels of page tables.
const EVERYWHERE: (u64, u64) = (1 << 20, (1 << 47) - PAGE);
/// The longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_millis(5);

/// A userfaultfd as the platform of a session.
pub(crate) struct Kernel {
    /// The userfaultfd; `None` once the session is over and missing pages are no longer installed.
    uffd: RwLock<Option<Userfaultfd>>,
    wait_queue: WaitQueue,
    /// The owner's page map, which tells the pages that the owner has.
    page_map: Option<PageMap>,
    /// The install lock. An exclusive hold includes the ring into which messages are read.
    install: RwLock<Reader>,
}

/// Resources needed to read messages.
pub(crate) struct Reader {
    ring: Ring,
    messages: Vec<Message>,
}

impl Kernel {
    pub(crate) fn new(uffd: Userfaultfd, ring: Ring) -> std::io::Result<Self> {
        Ok(Self {
            wait_queue: WaitQueue::new(&uffd)?,
            page_map: None,
            uffd: RwLock::new(Some(uffd)),
            install: RwLock::new(Reader {
                ring,
                messages: Vec::with_capacity(Ring::SLOTS),
            }),
        })
    }

    /// Makes the platform consult the owner's page map, if the owner has large pages.
    pub(crate) fn with_page_map(self, page_map: Option<PageMap>) -> Self {
        Self { page_map, ..self }
    }

    /// Ends the session when the process behind `pidfd` has exited.
    pub(crate) fn watch_owner(&self, pidfd: BorrowedFd<'_>) -> std::io::Result<()> {
        self.wait_queue.watch(pidfd)
    }

    /// Returns whether the page at `address` may be registered. Returns `false` only if the kernel
    /// would never report a fault there, and no change of the mappings waits to be read.
    pub(crate) fn may_be_registered(&self, address: u64) -> bool {
        self.with(true, |uffd| {
            !matches!(uffd.probe(address), Ok(Presence::Gone))
        })
    }

    /// Closes the userfaultfd. Missing pages that are still registered then read as zeros, so no
    /// page that anybody can touch may be missing. Threads that serve faults must be gone.
    pub(crate) fn close(&self) {
        self.uffd
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Blocks every access to memory of the owner that can't be restored any more, for kernels that
    /// can't poison it.
    pub(crate) fn make_inaccessible(&self, address: u64, len: u64) -> Result<(), MemError> {
        self.with(Ok(()), |uffd| uffd.make_inaccessible(address, len))
    }

    /// Issues an ioctl, unless the session is over.
    fn with<T>(&self, over: T, ioctl: impl FnOnce(&Userfaultfd) -> T) -> T {
        let uffd = self.uffd.read().unwrap_or_else(PoisonError::into_inner);
        uffd.as_ref().map_or(over, ioctl)
    }

    fn install(
        &self,
        ioctl: impl FnOnce(&Userfaultfd) -> Result<uffd::Installed, InstallError>,
    ) -> Installed {
        self.with(Installed::Gone, |uffd| outcome(ioctl(uffd)))
    }
}

/// Converts the outcome of an install for the session.
fn outcome(result: Result<uffd::Installed, InstallError>) -> Installed {
    match result {
        Ok(uffd::Installed::Done) => Installed::Done,
        Ok(uffd::Installed::Partial { done }) => Installed::Partial(done),
        Ok(uffd::Installed::Exists) => Installed::Exists,
        Ok(uffd::Installed::Again) => Installed::Again,
        Ok(uffd::Installed::Gone) | Err(InstallError::NotRegistered { .. }) => Installed::Gone,
        Ok(uffd::Installed::OwnerGone) => Installed::OwnerGone,
        Ok(uffd::Installed::NoMemory) => Installed::NoMemory,
        Err(InstallError::Refused { source, .. }) => {
            Installed::Refused(source.raw_os_error().unwrap_or(libc::EIO))
        }
        Err(_) => Installed::Refused(libc::EIO),
    }
}

impl Platform for Kernel {
    type Shared<'a> = RwLockReadGuard<'a, Reader>;
    type Exclusive<'a> = RwLockWriteGuard<'a, Reader>;
    type Brake = Option<Brake>;

    // A panic while the lock is held leaves the ring as the kernel wrote it and everything else
    // consistent.
    fn shared(&self, _about: u64) -> Self::Shared<'_> {
        self.install.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self, _about: u64) -> Self::Exclusive<'_> {
        self.install.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_readable(&self, timeout: Option<Duration>) -> Waited {
        let wait = |uffd: &Userfaultfd| self.wait_queue.wait(uffd, timeout);
        match self.with(Ok(Readiness::default()), wait) {
            Ok(ready) if ready.owner_gone => Waited::OwnerGone,
            Ok(_) => Waited::Ready,
            Err(error) => {
                tracing::error!(%error, "waiting for faults failed");
                Waited::Failed
            }
        }
    }

    fn kick(&self) {
        self.wait_queue.wake();
    }

    fn wait_in_flight(&self, _frame: FrameId, wait: impl FnOnce()) {
        wait();
    }

    fn back_off(&self, tries: u32) -> bool {
        let pause = Duration::from_micros(20) * tries.min(1000);
        std::thread::sleep(pause.min(MAX_PAUSE));
        tries < MAX_RETRIES
    }

    fn brake(&self) -> Option<Brake> {
        Brake::new()
            .inspect_err(|error| tracing::debug!(%error, "the owner can't be held up"))
            .ok()
    }

    fn read(
        &self,
        hold: &mut Self::Exclusive<'_>,
        record: &mut dyn FnMut(Event),
    ) -> Result<usize, ReadFailed> {
        let Reader { ring, messages } = &mut **hold;
        messages.clear();
        self.with(Ok(()), |uffd| match uffd.read(ring, messages) {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::error!(%error, "reading faults failed");
                Err(ReadFailed)
            }
        })?;
        let count = messages.len();
        for message in messages.drain(..) {
            record(match message {
                Message::Pagefault {
                    address, thread, ..
                } => Event::Fault {
                    address,
                    thread: thread.unwrap_or(0),
                },
                Message::Remove { start, end } => Event::Remove { start, end },
                Message::Unmap { start, end } => Event::Unmap { start, end },
                Message::Remap { from, to, len } => Event::Remap { from, to, len },
                Message::Fork { .. } | Message::Unknown(UFFD_EVENT_FORK) => Event::Fork,
                Message::Unknown(_) => Event::Unexpected,
            });
        }
        fail_point(FailPoint::AllRecorded);
        ring.clear();
        if count == Ring::SLOTS {
            self.wait_queue.wake();
        }
        Ok(count)
    }

    fn unrecorded(&self, hold: &mut Self::Exclusive<'_>, record: &mut dyn FnMut(usize, Event)) {
        // A reader clears a ring from the front, so only the first slots may be empty.
        for slot in 0..Ring::SLOTS {
            let event = match Raw::from_words(hold.ring.load(slot)) {
                Raw::Unknown(0) => continue,
                Raw::Pagefault { address, .. } => Event::Fault { address, thread: 0 },
                Raw::Remove { start, end } => Event::Remove { start, end },
                Raw::Unmap { start, end } => Event::Unmap { start, end },
                Raw::Remap { from, to, len } => Event::Remap { from, to, len },
                Raw::Fork { .. } => Event::Fork,
                Raw::Unknown(_) => Event::Unexpected,
            };
            record(slot, event);
        }
    }

    fn forget(&self, hold: &mut Self::Exclusive<'_>) {
        hold.ring.clear();
    }

    fn copy(&self, address: u64, bytes: &[u8]) -> Installed {
        self.install(|uffd| uffd.copy(address, bytes, Wake::Now))
    }

    fn zeropage(&self, address: u64, len: u64) -> Installed {
        self.install(|uffd| uffd.zeropage(address, len, Wake::Now))
    }

    fn poison(&self, address: u64, len: u64) -> Installed {
        self.install(|uffd| uffd.poison(address, len, Wake::Now))
    }

    fn is_there(&self, address: u64) -> bool {
        let Some(page_map) = &self.page_map else {
            return true;
        };
        // If it counts as missing, the install is retried for a while; it must never count as
        // present.
        page_map.has(address).unwrap_or_else(|error| {
            tracing::warn!(%error, address, "cannot read the owner's page map");
            false
        })
    }

    fn wake(&self, address: u64, len: u64) {
        self.with((), |uffd| {
            if let Err(error) = uffd.wake(address, len) {
                tracing::error!(%error, address, len, "waking failed");
            }
        });
    }

    fn wake_all(&self) {
        self.with((), |uffd| {
            let (start, end) = EVERYWHERE;
            // In a smaller address space the kernel refuses the range; known ranges were already
            // woken.
            if let Err(error) = uffd.wake(start, end - start) {
                tracing::debug!(%error, "waking everywhere");
            }
        });
    }

    fn unregister(&self, address: u64, len: u64) -> bool {
        // Memory that the owner has unmapped meanwhile is no longer registered either.
        self.with(true, |uffd| match uffd.unregister(address, len) {
            Ok(_) => true,
            Err(error) => {
                tracing::error!(%error, address, len, "unregistering failed");
                false
            }
        })
    }

    fn is_changing(&self, address: u64) -> bool {
        self.with(false, |uffd| {
            matches!(uffd.probe(address), Ok(Presence::Changing))
        })
    }
}
