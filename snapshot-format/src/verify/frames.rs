//! Checks of a single frame, and the digests that are remembered of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::pages::Window;
use super::{Problem, VerifyError};
use crate::digest::{self, Digest};
use crate::error::{FrameError, Part};
use crate::frame::{FrameRef, ListedPages};
use crate::index::Page;
use crate::layout::{MAX_FRAME_SLOTS, PAGE_SIZE};
use crate::snapshot::{FrameDecoder, Snapshot};
use crate::store::Reason;

/// Layer and offset of a frame.
pub(super) type FrameKey = (u16, u64);

/// Returns what identifies a frame among all files.
pub(super) fn key(frame: &FrameRef) -> FrameKey {
    (frame.layer(), frame.offset())
}

/// Slots of a frame, one bit each. Those of most frames fit into one word.
pub(super) struct Slots {
    first: u64,
    more: Box<[u64]>,
}

impl Slots {
    pub(super) fn new(count: u16) -> Self {
        let words = usize::from(count).div_ceil(64);
        Self {
            first: 0,
            more: vec![0; words.saturating_sub(1)].into(),
        }
    }

    pub(super) fn add(&mut self, slot: u16) {
        let bit = 1 << (slot % 64);
        match usize::from(slot / 64).checked_sub(1) {
            None => self.first |= bit,
            Some(word) => self.more[word] |= bit,
        }
    }

    pub(super) fn contains(&self, slot: u16) -> bool {
        let word = usize::from(slot / 64).checked_sub(1);
        word.map_or(self.first, |word| self.more[word]) & 1 << (slot % 64) != 0
    }

    pub(super) fn len(&self) -> u64 {
        let words = std::iter::once(&self.first).chain(&self.more);
        words.map(|word| u64::from(word.count_ones())).sum()
    }
}

/// Maximum number of problems that one frame may add; the rest are counted.
const MAX_PROBLEMS_PER_FRAME: usize = 8;
/// A frame that a window needs, and its uses there.
pub(super) struct Wanted {
    pub(super) frame: FrameRef,
    /// Whether no earlier window needed it.
    pub(super) new: bool,
    /// Page of the window, and the slot that it lies in.
    pub(super) uses: Vec<(u32, u16)>,
}

/// Result of checking a frame.
#[derive(Default)]
pub(super) struct Seen {
    /// Digest of each slot; none if it could not be decoded.
    pub(super) digests: Option<Arc<[Digest]>>,
    pub(super) problems: Vec<Problem>,
    /// Slots that the frame's list names, if there is one that it doesn't.
    pub(super) listed: Option<Slots>,
    pub(super) more: u64,
    /// The store failed, which says nothing about the frame.
    pub(super) failed: Option<VerifyError>,
}

/// Decoders and buffers, as many as there are threads at work.
#[derive(Default)]
pub(super) struct Workers {
    idle: Mutex<Vec<(FrameDecoder, Box<[u8]>)>>,
}

impl Workers {
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut FrameDecoder, &mut [u8]) -> T) -> T {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let (mut decoder, mut out) = idle.unwrap_or_else(|| {
            (
                FrameDecoder::new(),
                vec![0; MAX_FRAME_SLOTS * PAGE_SIZE].into(),
            )
        });
        let result = work(&mut decoder, &mut out);
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((decoder, out));
        result
    }
}

/// Maximum number of remembered digests, 32 bytes each: for 4 GiB of content.
const MAX_REMEMBERED: usize = 1 << 20;
/// Memory overhead of an entry, expressed in digests.
const ENTRY: usize = 3;

/// Digests of frames that distant windows need, so that a frame shared by all windows isn't decoded
/// for each of them. Most frames are needed by one window only, so a frame is remembered when a
/// second window needs it. Nothing is evicted: frames that windows need in turns would evict each
/// other.
pub(super) struct Remembered {
    /// None for a bad frame.
    frames: HashMap<FrameKey, Option<Arc<[Digest]>>>,
    left: usize,
}

impl Default for Remembered {
    fn default() -> Self {
        Self {
            frames: HashMap::new(),
            left: MAX_REMEMBERED,
        }
    }
}

impl Remembered {
    pub(super) fn get(&self, wanted: &Wanted) -> Option<Seen> {
        let digests = self.frames.get(&key(&wanted.frame))?.clone();
        Some(Seen {
            digests,
            ..Seen::default()
        })
    }

    pub(super) fn keep(&mut self, wanted: &Wanted, digests: Option<Arc<[Digest]>>) {
        let key = key(&wanted.frame);
        let cost = digests.as_ref().map_or(0, |digests| digests.len()) + ENTRY;
        if wanted.new && digests.is_some() || self.frames.contains_key(&key) {
            return;
        }
        if let Some(left) = self.left.checked_sub(cost) {
            self.left = left;
            self.frames.insert(key, digests);
        }
    }
}

/// Checks everything about one frame.
pub(super) fn look_at(
    snapshot: &Snapshot,
    window: &Window,
    wanted: &Wanted,
    decoder: &mut FrameDecoder,
    out: &mut [u8],
) -> Seen {
    let frame = &wanted.frame;
    let out = &mut out[..frame.decoded_len()];
    let file = snapshot.ancestor_name(frame.layer());
    let mut seen = Seen::default();
    let listed = match decoder.decode(snapshot, frame, Reason::Verify, out) {
        Ok(listed) => listed,
        Err(error) if !error.is_damage() => {
            seen.failed = Some(error.into());
            return seen;
        }
        Err(error) => {
            // A frame that several windows need is reported once.
            if wanted.new {
                seen.add(file, Part::Frame.to_string(), frame, detail(&error));
            }
            return seen;
        }
    };
    let pages = out.chunks_exact(PAGE_SIZE);
    if !wanted.new {
        seen.digests = Some(pages.map(digest::page).collect());
        return seen;
    }
    let mut digests = Vec::with_capacity(pages.len());
    for (slot, page) in pages.enumerate() {
        if digest::fill_word(page).is_some() {
            let detail = format!("slot {slot} stores a fill");
            seen.add(file, Part::Frame.to_string(), frame, detail);
        }
        digests.push(digest::page(page));
    }
    seen.digests = Some(digests.into());
    // The list of another file's frame has that file's page numbers.
    if file.is_none() {
        check_list(snapshot, window, frame, listed, &mut seen);
    }
    seen
}

/// Compares the page list of a frame of the verified file with the index.
fn check_list(
    snapshot: &Snapshot,
    window: &Window,
    frame: &FrameRef,
    listed: ListedPages<'_>,
    seen: &mut Seen,
) {
    let mut slots = Slots::new(frame.slots());
    let mut pages: Vec<u64> = listed
        .runs()
        .flat_map(|run| run.first_page..run.first_page + u64::from(run.count))
        .collect();
    pages.sort_unstable();
    if let Some([page, _]) = pages.windows(2).find(|pair| pair[0] == pair[1]) {
        let detail = format!("page {page} is listed twice");
        seen.add(None, "page list".to_owned(), frame, detail);
    }
    for run in listed.runs() {
        for i in 0..run.count {
            let (page, slot) = (run.first_page + u64::from(i), run.slot + i);
            slots.add(slot);
            let indexed = match window.look_up(page) {
                Some(indexed) => indexed,
                None => match snapshot.look_up(page, Reason::Verify) {
                    Ok(indexed) => indexed,
                    // The index block's own problem is in the report already.
                    Err(error) if error.is_damage() => continue,
                    Err(error) => {
                        seen.failed = Some(error.into());
                        return;
                    }
                },
            };
            let here = Page::Stored {
                frame: *frame,
                slot,
            };
            if indexed != here {
                let detail = format!(
                    "page {page} is listed in slot {slot} of the frame, but its index entry \
                     points elsewhere"
                );
                seen.add(None, "page list".to_owned(), frame, detail);
            }
        }
    }
    if slots.len() < frame.slots().into() {
        seen.listed = Some(slots);
    }
}

impl Seen {
    fn add(&mut self, file: Option<&str>, what: String, frame: &FrameRef, detail: String) {
        if self.problems.len() < MAX_PROBLEMS_PER_FRAME {
            self.problems.push(Problem {
                file: file.map(ToOwned::to_owned),
                what,
                offset: frame.offset(),
                detail,
            });
        } else {
            self.more += 1;
        }
    }
}

fn detail(error: &FrameError) -> String {
    match error {
        FrameError::Damaged { defect, .. } => defect.to_string(),
        FrameError::Io { source, .. } => format!("cannot be read: {source}"),
        FrameError::Dictionary { source, .. } => format!("its dictionary: {source}"),
        other @ FrameError::Buffer { .. } => other.to_string(),
    }
}
