//! Interfaces that the session needs from outside: a kernel, threads and a content source.
//!
//! The session is generic over these traits, so that the same code runs on the real kernel and
//! on a model of it that tries every interleaving.

pub(crate) mod kernel;

use std::time::Duration;

use snapshot_format::Reason;

use crate::session::failure::Failure;

/// A page's number in the snapshot.
pub(crate) type PageNumber = u64;

/// Size of a page in bytes, in the unit of addresses.
pub(crate) const PAGE: u64 = snapshot_format::layout::PAGE_SIZE_U64;

/// The outcome of an install. Addresses and lengths are the owner's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Installed {
    /// Everything was installed.
    Done,
    /// The first bytes were installed (a non-zero multiple of the page size); the state of the rest
    /// is unknown.
    Partial(u64),
    /// A page already exists at the first address.
    Exists,
    /// The mappings are changing: an event must be read first. Nothing was installed.
    Again,
    /// The range is not wholly inside one registered mapping.
    Gone,
    /// The owner is gone.
    OwnerGone,
    /// The kernel had no memory; nothing was installed.
    NoMemory,
    /// The kernel refused with an unexpected errno.
    Refused(i32),
}

/// A message of the userfaultfd.
#[derive(Debug)]
pub(crate) enum Event {
    /// A thread waits for the page at `address`. `thread` is its ID, or 0 if the kernel doesn't
    /// report it.
    Fault { address: u64, thread: u32 },
    /// The range is being discarded: its pages are zero from now on.
    Remove { start: u64, end: u64 },
    /// The range is no longer mapped.
    Unmap { start: u64, end: u64 },
    /// The range moved.
    Remap { from: u64, to: u64, len: u64 },
    /// The owner forked, and its child's memory is registered as well.
    Fork,
    /// An event that was not requested.
    Unexpected,
}

/// The reason why [`Platform::wait_readable`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// There may be something to read, it was kicked, or the time is over.
    Ready,
    /// The owner is gone.
    OwnerGone,
    /// Waiting failed.
    Failed,
}

/// The error for messages that can't be read; the platform has logged the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadFailed;

/// The kernel and the threads on which a session runs.
pub(crate) trait Platform: Sync {
    /// A shared hold of the install lock.
    type Shared<'a>
    where
        Self: 'a;
    /// An exclusive hold of the install lock.
    type Exclusive<'a>
    where
        Self: 'a;

    /// A guard that keeps the owner from changing its mappings until dropped.
    type Brake;

    /// Takes the install lock shared, to look up a state and issue one ioctl. `about` is the
    /// address or page number that the hold concerns; it distinguishes the actions of two threads.
    fn shared(&self, about: u64) -> Self::Shared<'_>;
    /// Takes the install lock exclusively, to read, record and wake. `about` as in
    /// [`Platform::shared`].
    fn exclusive(&self, about: u64) -> Self::Exclusive<'_>;
    /// Waits until there may be a message, [`Platform::kick`] was called, or `timeout` has passed.
    /// If several threads wait, a message wakes only one or two of them, one of which must read it.
    fn wait_readable(&self, timeout: Option<Duration>) -> Waited;
    /// Makes the current [`Platform::wait_readable`] of one or two threads return, or the next one.
    fn kick(&self);
    /// Calls `wait`, which returns when no fault is loading `frame` any more.
    fn wait_in_flight(&self, frame: FrameId, wait: impl FnOnce());
    /// Waits after the `tries`-th consecutive install that met a changing mapping with no event to
    /// read. Returns `false` if this has taken too long.
    fn back_off(&self, tries: u32) -> bool;

    /// Slows down the owner, which is this process, in changing its mappings.
    fn brake(&self) -> Self::Brake;

    /// Reads up to 64 messages without waiting and passes each to `record`, in the kernel's order.
    /// Returns the number of messages. If there may be more, a waiting thread is woken for them.
    fn read(
        &self,
        hold: &mut Self::Exclusive<'_>,
        record: &mut dyn FnMut(Event),
    ) -> Result<usize, ReadFailed>;
    /// Passes the messages that a predecessor has read but perhaps not recorded to `record`, each
    /// with its position in the batch.
    fn unrecorded(&self, hold: &mut Self::Exclusive<'_>, record: &mut dyn FnMut(usize, Event));
    /// Discards these messages, so that nobody finds them again.
    fn forget(&self, hold: &mut Self::Exclusive<'_>);
    /// Copies `bytes` to missing pages from `address` on, and wakes their waiters.
    fn copy(&self, address: u64, bytes: &[u8]) -> Installed;
    /// Maps zeros to missing pages; otherwise like [`Platform::copy`].
    fn zeropage(&self, address: u64, len: u64) -> Installed;
    /// Marks missing pages as poisoned and wakes their waiters.
    fn poison(&self, address: u64, len: u64) -> Installed;
    /// Returns whether there is a page at `address`, as an install of a large page reported. Only
    /// the owner's page table is reliable: some kernels report the same when there is neither a
    /// page nor memory for one.
    fn is_there(&self, address: u64) -> bool;
    /// Wakes the threads that wait for a page in the range; each then faults again.
    fn wake(&self, address: u64, len: u64);
    /// Wakes all threads that wait for a page, wherever it is.
    fn wake_all(&self);
    /// Returns the range to the kernel, which from now on answers a missing page with zeros, and
    /// wakes the threads that wait in it. Has no effect on parts that are no longer registered.
    /// Returns `false` if the kernel refused.
    fn unregister(&self, address: u64, len: u64) -> bool;
    /// Returns whether a thread waits, or is about to wait, for an event to be read. `address` was
    /// registered and no longer is.
    fn is_changing(&self, address: u64) -> bool;
}

/// The identity of a frame: the file that holds it, and its place there.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct FrameId {
    /// The number of the file among those of the snapshot: 0 for its own file, `n` for the `n`th
    /// of its ancestors.
    pub layer: u16,
    /// The offset of the frame record in that file.
    pub offset: u64,
}

/// The content of one page of the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content<F> {
    /// The page repeats a word.
    Fill(u64),
    /// The page is in a slot of a frame.
    Stored(F, u16),
    /// The page could not be read when the snapshot was taken.
    Unavailable,
}

/// A run of consecutive pages in consecutive slots of a decoded frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) page: PageNumber,
    pub(crate) slot: u16,
    pub(crate) count: u16,
}

impl Run {
    /// Returns the page numbers of this run.
    pub(crate) fn pages(&self) -> std::ops::Range<PageNumber> {
        self.page..self.page + u64::from(self.count)
    }
}

/// The content source of a session.
pub(crate) trait Image: Sync {
    /// A reference to a frame.
    type Frame: Copy + PartialEq;
    /// A decoder that reads, checks and decodes frames; one per thread, so that nothing is
    /// allocated later.
    type Decoder;

    /// Returns the identity of a frame.
    fn id(&self, frame: &Self::Frame) -> FrameId;

    /// Returns the content of `page`.
    fn content(&self, page: PageNumber, reason: Reason) -> Result<Content<Self::Frame>, Failure>;

    /// Returns the end of the pages, from `page` on, that are known to be unavailable without
    /// reading anything, or `page` itself if there are none.
    fn unavailable_until(&self, page: PageNumber) -> PageNumber {
        page
    }

    /// Returns the number of pages that `frame` stores.
    fn slots(&self, frame: &Self::Frame) -> u16;

    /// Reads the first of `frames`, which a prefetch is about to decode, and those of the following
    /// that lie behind it in the file, with one large read. Nothing needs that, and an error is
    /// reported when the frame is decoded.
    fn read_ahead(&self, _decoder: &mut Self::Decoder, _frames: impl Iterator<Item = Self::Frame>) {
    }

    /// Reads and checks `frame`, and decodes at least its first `slots` pages into the decoder's
    /// buffer. Continues where the last call stopped if that was for the same frame.
    fn decode(
        &self,
        decoder: &mut Self::Decoder,
        frame: &Self::Frame,
        slots: u16,
        reason: Reason,
    ) -> Result<(), Failure>;

    /// Returns the number of bytes of frame records read so far.
    fn bytes_read(&self) -> u64 {
        0
    }

    /// Returns whether the last frame decoded was already there, so that it was not read.
    fn was_cached(&self, _decoder: &Self::Decoder) -> bool {
        false
    }

    /// Sets whether decoded frames are kept, because more faults for each of them will follow.
    fn keep_frames(&self, _keep: bool) {}

    /// Writes the pages that the last decoded frame holds to `runs`, as far as it has room. Each is
    /// confirmed by its own index entry. Returns how many runs at the front are those that the
    /// frame was made of, as far as is known, or that lie near `page`, for which it was decoded;
    /// the others repeat its content elsewhere.
    fn runs(
        &self,
        decoder: &mut Self::Decoder,
        page: PageNumber,
        reason: Reason,
        runs: &mut Vec<Run>,
    ) -> usize;

    /// Returns the bytes of the last frame, as far as it is decoded.
    fn bytes<'a>(&self, decoder: &'a Self::Decoder) -> &'a [u8];

    /// Returns a failure that names this snapshot.
    fn failure(&self, detail: String) -> Failure;

    /// Returns a failure that names the file of `frame`, and its place there.
    fn frame_failure(&self, frame: &Self::Frame, detail: String) -> Failure {
        Failure {
            offset: Some(self.id(frame).offset),
            ..self.failure(detail)
        }
    }
}
