//! Index blocks on input: gathering pages, and determining the content of each page.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::WriteError;
use super::base::{Base, BaseFrame, BasePage, Kept};
use super::copy::CopiedFrame;
use super::dedup::Key;
use super::matching::BaseRun;
use super::workers::{Event, FreeList};
use crate::digest::{self, Digest};
use crate::layout::{PAGE_SIZE, PAGES_PER_BLOCK};

/// Buffer for the bytes of one index block. It returns to its pool when the last user drops it.
pub(super) struct BlockBuffer {
    bytes: Vec<u8>,
    home: Home,
}

/// The place to which a buffer returns.
enum Home {
    /// The caller's thread, which waits for it.
    Writer(Sender<Event>),
    /// The threads that copy a snapshot.
    Copiers(Arc<FreeList<Vec<u8>>>),
}

impl BlockBuffer {
    pub(super) fn new(bytes: Vec<u8>, home: Sender<Event>) -> Self {
        debug_assert_eq!(bytes.len(), PAGES_PER_BLOCK * PAGE_SIZE);
        Self {
            bytes,
            home: Home::Writer(home),
        }
    }

    /// Takes a buffer from `free`, or allocates one. A used one has the bytes of its last user.
    pub(super) fn of(free: &Arc<FreeList<Vec<u8>>>) -> Self {
        let idle = free.pop();
        Self {
            bytes: idle.unwrap_or_else(|| vec![0; PAGES_PER_BLOCK * PAGE_SIZE]),
            home: Home::Copiers(Arc::clone(free)),
        }
    }

    pub(super) fn page(&self, index: usize) -> &[u8] {
        &self.bytes[index * PAGE_SIZE..][..PAGE_SIZE]
    }

    /// Returns the bytes of `count` pages from page `first` on.
    pub(super) fn pages(&self, first: usize, count: usize) -> &[u8] {
        &self.bytes[first * PAGE_SIZE..][..count * PAGE_SIZE]
    }

    pub(super) fn pages_mut(&mut self, first: usize, count: usize) -> &mut [u8] {
        &mut self.bytes[first * PAGE_SIZE..][..count * PAGE_SIZE]
    }
}

impl Drop for BlockBuffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        match &self.home {
            // The receiver is gone if the writer itself was dropped.
            Home::Writer(home) => drop(home.send(Event::Buffer(bytes))),
            Home::Copiers(free) => free.push(bytes),
        }
    }
}

/// Content of pages that have no bytes of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alike {
    Fill(u64),
    Unavailable,
}

/// The caller's description of a page.
#[derive(Clone, Copy)]
pub(super) enum Given {
    /// A page whose bytes are in the buffer.
    Bytes,
    Alike(Alike),
    /// A page that is as in the base.
    Base,
}

/// Content of a page, as found by examining it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Alike(Alike),
    Data(Key),
    /// A page in a frame of the base or of one of its ancestors.
    Base(BasePage),
    /// A slot of the copied frame of this number.
    Copied(u32, u16),
}

/// The pages of an index block and the digest of their content.
#[derive(Default)]
pub(super) struct Examined {
    pub(super) pages: Vec<Seen>,
    pub(super) digest: Digest,
    /// The base's block, if this one is the same.
    pub(super) kept: Option<Kept>,
    /// Frames that the base's block names, if this one differs.
    pub(super) base_frames: Vec<BaseFrame>,
    /// Copied frames that no earlier block uses, in the order of their numbers.
    pub(super) copies: Vec<CopiedFrame>,
    /// Bytes of the pages that are not given by the caller.
    pub(super) buffer: Option<Arc<BlockBuffer>>,
}

impl Examined {
    /// Returns the common content of all pages, if they are all one fill or all unavailable.
    pub(super) fn uniform(&self) -> Option<Alike> {
        let Seen::Alike(first) = *self.pages.first()? else {
            return None;
        };
        let same = self.pages.iter().all(|&page| page == Seen::Alike(first));
        same.then_some(first)
    }
}

/// Examines every page: finds fills, and computes the digests of the others. Compares them with the
/// base, if there is one, and in it first with the pages that correspond.
///
/// # Panics
///
/// If a page was given as bytes and there is no buffer: bytes of the caller's would be lost.
pub(super) fn examine(
    given: &[Given],
    buffer: Option<&Arc<BlockBuffer>>,
    base: Option<&(Arc<Base>, Vec<BaseRun>)>,
) -> Result<Examined, WriteError> {
    match base {
        Some((base, base_runs)) => base.examine(given, buffer, base_runs),
        None => Ok(examine_pages(given, buffer, |_| {
            unreachable!("a writer without a base takes no page of it")
        })),
    }
}

/// Examines every page on its own; `of_base` returns what a page of the base is, and its digest.
pub(super) fn examine_pages(
    given: &[Given],
    buffer: Option<&Arc<BlockBuffer>>,
    of_base: impl Fn(usize) -> (Seen, Digest),
) -> Examined {
    let mut digests = Vec::with_capacity(given.len());
    let mut last_fill = None;
    let pages = given
        .iter()
        .enumerate()
        .map(|(index, given)| {
            let alike = match *given {
                Given::Alike(alike) => alike,
                Given::Base => {
                    let (seen, digest) = of_base(index);
                    digests.push(digest);
                    return seen;
                }
                Given::Bytes => {
                    let buffer = buffer.expect("pages given as bytes come with a buffer");
                    let bytes = buffer.page(index);
                    if let Some(word) = digest::fill_word(bytes) {
                        Alike::Fill(word)
                    } else {
                        let digest = digest::stored(bytes);
                        digests.push(digest);
                        return Seen::Data(key(&digest));
                    }
                }
            };
            // Fills come in runs.
            digests.push(match (alike, last_fill) {
                (Alike::Fill(word), Some((last, digest))) if word == last => digest,
                (Alike::Fill(word), _) => {
                    let digest = digest::fill(word);
                    last_fill = Some((word, digest));
                    digest
                }
                (Alike::Unavailable, _) => digest::unavailable(),
            });
            Seen::Alike(alike)
        })
        .collect();
    Examined {
        pages,
        digest: digest::block(&digests),
        ..Examined::default()
    }
}

/// Returns the first 128 bits of the digest.
pub(super) fn key(digest: &Digest) -> Key {
    let (words, _) = digest.as_chunks::<8>();
    [u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1])]
}

/// The index block that the caller is filling.
#[derive(Default)]
pub(super) struct Gather {
    pub(super) given: Vec<Given>,
    pub(super) buffer: Option<BlockBuffer>,
    /// Pages that correspond to pages of the base.
    pub(super) base_runs: Vec<BaseRun>,
}

impl Gather {
    /// Returns the number of pages that still fit.
    pub(super) fn room(&self) -> usize {
        PAGES_PER_BLOCK - self.given.len()
    }

    /// Adds `count` pages of which no bytes are needed, or which are in the buffer. The first of
    /// them correspond to `base_pages`.
    pub(super) fn push(&mut self, given: Given, count: usize, base_pages: &Range<u64>) {
        debug_assert!(count <= self.room());
        let at = self.given.len();
        let pages = base_pages.end.saturating_sub(base_pages.start);
        let with_counterpart = usize::try_from(pages).map_or(count, |pages| pages.min(count));
        if with_counterpart > 0 {
            BaseRun::append(&mut self.base_runs, at, with_counterpart, base_pages.start);
        }
        self.given.extend(std::iter::repeat_n(given, count));
    }
}
