//! What the session needs from outside: a kernel, threads, a content.
//!
//! The session is written against these traits, so that the same code runs on the real kernel and
//! on a model of it that tries every interleaving.

pub(crate) mod kernel;

use std::time::Duration;

use snapshot_format::Reason;

use crate::session::failure::Failure;
use crate::session::fault::in_flight::{FrameId, InFlight};
use snaprestore_uffd::uffd::Wake;

/// A page's number in the snapshot.
pub(crate) type PageNumber = u64;

/// Bytes of a page, as addresses count them.
pub(crate) const PAGE: u64 = snapshot_format::layout::PAGE_SIZE_U64;

/// What an install did. Addresses and lengths are the owner's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Installed {
    /// All of it.
    Done,
    /// The first bytes (a multiple of the page size, more than none); nothing is known of the rest.
    Partial(u64),
    /// A page is there already, at the first address.
    Exists,
    /// The mappings are changing: an event has to be read first. Nothing was installed.
    Again,
    /// Not wholly inside one registered mapping.
    Gone,
    /// The owner is gone.
    OwnerGone,
    /// The kernel had no memory; nothing was installed.
    NoMemory,
    /// The kernel refused with this errno, which no rule foresees.
    Refused(i32),
}

/// What the userfaultfd reports.
#[derive(Debug)]
pub(crate) enum Event {
    /// A thread waits for the page at `address`; its id, 0 if the kernel doesn't say.
    Fault { address: u64, thread: u32 },
    /// The range is being discarded: its pages are zero from now on.
    Remove { start: u64, end: u64 },
    /// The range is no longer mapped.
    Unmap { start: u64, end: u64 },
    /// The range moved.
    Remap { from: u64, to: u64, len: u64 },
    /// The owner forked, and its child's memory is registered as well.
    Fork,
    /// Something that was not asked for.
    Unexpected,
}

/// Why [`Platform::wait_readable`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// There may be something to read, it was kicked, or the time is over.
    Ready,
    /// The owner is gone.
    OwnerGone,
    /// Waiting is not possible.
    Failed,
}

/// Messages can't be read; the platform has logged why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadFailed;

/// The kernel and the threads under a session.
pub(crate) trait Platform: Sync {
    /// A shared hold of the install lock.
    type Shared<'a>
    where
        Self: 'a;
    /// An exclusive hold of the install lock.
    type Exclusive<'a>
    where
        Self: 'a;

    /// What a fault thread knows of whom it serves.
    type CoreFollower: Default;
    /// What keeps the owner from changing its mappings, until dropped.
    type Brake;

    /// The calling thread is about to serve a fault of `thread`, and may be better placed for it
    /// elsewhere. True if it is on that thread's core now.
    fn follow(&self, follower: &mut Self::CoreFollower, thread: u32) -> bool;
    /// Takes the install lock shared: for {look up; one ioctl}. `about` is the address or page
    /// number that the hold is about: it tells apart what two threads are doing.
    fn shared(&self, about: u64) -> Self::Shared<'_>;
    /// Takes the install lock exclusively: for {read; record; wake}. `about` as for
    /// [`Platform::shared`].
    fn exclusive(&self, about: u64) -> Self::Exclusive<'_>;
    /// Waits until there may be a message, [`Platform::kick`] was called, or `patience` is over.
    /// Several threads may wait, and what arrives ends the waiting of one: it has to read.
    fn wait_readable(&self, patience: Option<Duration>) -> Waited;
    /// Ends the current [`Platform::wait_readable`] of one thread, or the next.
    fn kick(&self);
    /// Waits until no fault has claimed `frame`.
    fn wait_unclaimed(&self, claims: &InFlight, frame: FrameId);
    /// Lets time pass after the `tries`-th install in a row that met a changing mapping with no
    /// event to read. False: it has been too long.
    fn back_off(&self, tries: u32) -> bool;

    /// Keeps the owner, which is this process, from changing its mappings as often as it would.
    fn brake(&self) -> Self::Brake;

    /// Reads up to 64 messages without waiting and gives each to `record`, in the kernel's order.
    /// Returns how many. If there may be more, one waiting ends for them.
    fn read(
        &self,
        hold: &mut Self::Exclusive<'_>,
        record: &mut dyn FnMut(Event),
    ) -> Result<usize, ReadFailed>;
    /// Gives what a predecessor has read, and may not have recorded, with its place in the batch.
    fn unrecorded(&self, hold: &mut Self::Exclusive<'_>, record: &mut dyn FnMut(usize, Event));
    /// Nobody shall find it again.
    fn forget(&self, hold: &mut Self::Exclusive<'_>);
    /// Copies `bytes` to missing pages from `address` on and wakes who waits for them, if it is to
    /// be now.
    fn copy(&self, address: u64, bytes: &[u8], wake: Wake) -> Installed;
    /// Maps zeros to missing pages; as [`Platform::copy`].
    fn zeropage(&self, address: u64, len: u64, wake: Wake) -> Installed;
    /// Marks missing pages as poisoned and wakes who waits for them.
    fn poison(&self, address: u64, len: u64) -> Installed;
    /// Whether there is a page at `address`, which an install of a large page said. Only the
    /// owner's page table tells: where there is none and no memory for one either, some kernels say
    /// the same.
    fn is_there(&self, address: u64) -> bool;
    /// Wakes who waits for a page in the range; each looks again.
    fn wake(&self, address: u64, len: u64);
    /// Wakes who waits for a page, wherever it is.
    fn wake_all(&self);
    /// Gives the range back to the kernel, which from now on answers a missing page with zeros, and
    /// wakes who waits in it. Nothing happens where nothing is registered any more. False if the
    /// kernel would not.
    fn unregister(&self, address: u64, len: u64) -> bool;
    /// Whether somebody waits, or is about to wait, for an event to be read. `address` was
    /// registered and isn't any more.
    fn is_changing(&self, address: u64) -> bool;
}

/// What one page of the snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content<F> {
    /// It repeats a word.
    Fill(u64),
    /// It is a slot of a frame.
    Stored(F, u16),
    /// It could not be read when the snapshot was taken.
    Unavailable,
}

/// Consecutive pages in consecutive slots of a decoded frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) page: PageNumber,
    pub(crate) slot: u16,
    pub(crate) count: u16,
}

/// The content that a session restores.
pub(crate) trait Image: Sync {
    /// Where a frame is.
    type Frame: Copy + PartialEq;
    /// Reads, checks and decodes frames; one for each thread, so that nothing is allocated later.
    type Decoder;

    /// What tells frames apart.
    fn id(&self, frame: &Self::Frame) -> FrameId;

    /// What `page` is.
    fn content(&self, page: PageNumber, reason: Reason) -> Result<Content<Self::Frame>, Failure>;

    /// The end of the pages, from `page` on, that are known to be unavailable without reading
    /// anything; `page` itself if there are none.
    fn unavailable_until(&self, page: PageNumber) -> PageNumber {
        page
    }

    /// How many pages `frame` stores.
    fn slots(&self, frame: &Self::Frame) -> u16;

    /// Reads and checks `frame`, and decodes it into the decoder's buffer: its first `slots` pages,
    /// or more. Goes on where the last call stopped if that was about the same frame.
    fn decode(
        &self,
        decoder: &mut Self::Decoder,
        frame: &Self::Frame,
        slots: u16,
        reason: Reason,
    ) -> Result<(), Failure>;

    /// Whether the last frame decoded lay there decoded, and was not read.
    fn was_cached(&self, _decoder: &Self::Decoder) -> bool {
        false
    }

    /// Writes to `runs`, as far as it has room, the pages that the last frame decoded holds, each
    /// confirmed by its own index entry.
    /// Returns how many of them, the first, are listed by the frame itself; the others repeat its
    /// content elsewhere.
    fn runs(&self, decoder: &mut Self::Decoder, reason: Reason, runs: &mut Vec<Run>) -> usize;

    /// The bytes of the last frame, as far as it is decoded.
    fn bytes<'a>(&self, decoder: &'a Self::Decoder) -> &'a [u8];

    /// A failure that names this snapshot.
    fn failure(&self, detail: String) -> Failure;
}
