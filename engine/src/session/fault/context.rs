//! Buffers and notes of a thread that loads pages.

use std::collections::VecDeque;

use snapshot_format::Reason;
use snapshot_format::layout::PAGE_SIZE;

use crate::session::content::snapshot::SnapshotImage;
use crate::session::failure::Failure;
use crate::session::platform::{Image, PageNumber, Run};
use crate::session::state::State;
use crate::session::state::address_map::{LARGE_BYTES, LARGE_PAGES, block_of};
use crate::session::stats::FaultTrace;
use snaprestore_uffd::to_usize;

/// Number of pages in the buffer from which fills other than zero are installed. (The model has no
/// fills and makes many buffers.)
pub(crate) const FILL_PAGES: usize = if cfg!(test) { 1 } else { 64 };
/// Maximum number of damaged frames that a thread remembers.
const MAX_BAD_FRAMES: usize = 64;
/// Maximum number of runs in a frame: each slot four times.
const MAX_RUNS: usize =
    snapshot_format::layout::MAX_FRAME_SLOTS * snapshot_format::layout::MAX_LISTED_PAGES_PER_SLOT;

/// Resources that a thread needs to serve a fault or to prefetch.
pub(crate) struct ThreadContext<I: Image> {
    pub(crate) decoder: I::Decoder,
    pub(crate) runs: Vec<Run>,
    fill: Vec<u8>,
    fill_word: u64,
    /// The number of the session's thread that uses this context.
    pub(crate) number: usize,
    /// Facts gathered about the fault that this thread is serving.
    pub(crate) trace: FaultTrace,
    /// Buffer in which a large page is assembled, in a session with large pages.
    pub(crate) assembly: Option<Assembly<I::Frame>>,
    /// Frames that prefetch could not use, the latest last; they are not read again for each page.
    bad: VecDeque<(I::Frame, Failure)>,
}

/// A source of contexts for threads that have something to do.
pub(crate) trait LendContext<I: Image> {
    /// Calls `work` with a context that no other thread uses meanwhile.
    fn with<T>(&self, work: impl FnOnce(&mut ThreadContext<I>) -> T) -> T;
}

/// The purpose of an install.
#[derive(Clone, Copy)]
pub(crate) struct Purpose {
    pub(crate) reason: Reason,
    /// The page that a thread is known to wait for.
    pub(crate) wanted: Option<PageNumber>,
}

impl Purpose {
    /// Returns the purpose of installing `page` and the pages installed with it.
    pub(crate) fn wanted(page: PageNumber, reason: Reason) -> Self {
        Self {
            reason,
            wanted: Some(page),
        }
    }

    /// Returns the purpose of pages that are installed along with others.
    pub(crate) fn along(reason: Reason) -> Self {
        Self {
            reason,
            wanted: None,
        }
    }
}

impl ThreadContext<SnapshotImage> {
    /// Returns whether the context was last lent to this session.
    pub(crate) fn was_lent_to(&self, image: &SnapshotImage) -> bool {
        image.was_used_by(&self.decoder)
    }

    /// Returns whether the context was last lent to a session of this snapshot.
    pub(crate) fn is_prepared(&self, image: &SnapshotImage) -> bool {
        image.is_prepared(&self.decoder)
    }

    /// Prepares the context for new work in this session.
    pub(crate) fn adopt(&mut self, image: &SnapshotImage) {
        image.adopt(&mut self.decoder);
        self.bad.clear();
    }
}

impl<I: Image> ThreadContext<I> {
    pub(crate) fn new(decoder: I::Decoder) -> Self {
        Self {
            decoder,
            number: usize::MAX,
            runs: Vec::with_capacity(MAX_RUNS),
            fill: vec![0; FILL_PAGES * PAGE_SIZE],
            fill_word: 0,
            trace: FaultTrace::default(),
            assembly: None,
            bad: VecDeque::new(),
        }
    }

    /// Allocates the buffer for large pages, if the session has any, before the first is wanted.
    pub(crate) fn prepare(&mut self, state: &State) {
        if state.has_large() && self.assembly.is_none() {
            self.assembly = Some(Assembly::new());
        }
    }

    /// Returns the failure of a frame that prefetch could not use.
    pub(crate) fn known_bad(&self, frame: &I::Frame) -> Option<&Failure> {
        let known = self.bad.iter().find(|(bad, _)| bad == frame);
        known.map(|(_, failure)| failure)
    }

    pub(crate) fn remember_bad(&mut self, frame: &I::Frame, failure: &Failure) {
        if self.bad.len() == MAX_BAD_FRAMES {
            self.bad.pop_front();
        }
        self.bad.push_back((*frame, failure.clone()));
    }

    /// Returns a buffer of pages that repeat `word`.
    pub(crate) fn filled(&mut self, word: u64) -> &[u8] {
        if self.fill_word != word {
            for chunk in self.fill.chunks_exact_mut(8) {
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            self.fill_word = word;
        }
        &self.fill
    }
}

/// A buffer in which a thread assembles a large page.
pub(crate) struct Assembly<F> {
    bytes: Vec<u8>,
    /// Pages whose content is in frames.
    pub(crate) stored: Vec<Part<F>>,
}

/// A page of a large page whose content is in a frame.
pub(crate) struct Part<F> {
    pub(crate) frame: F,
    pub(crate) slot: u16,
    pub(crate) page: PageNumber,
}

impl<F> Assembly<F> {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0; LARGE_BYTES],
            stored: Vec::with_capacity(to_usize(LARGE_PAGES)),
        }
    }

    /// Returns the bytes of `pages`, which must lie in one block.
    pub(crate) fn pages_mut(&mut self, pages: &std::ops::Range<PageNumber>) -> &mut [u8] {
        let start = block_of(pages.start).start;
        let within = |page: PageNumber| to_usize(page - start) * PAGE_SIZE;
        &mut self.bytes[within(pages.start)..within(pages.end)]
    }
}
