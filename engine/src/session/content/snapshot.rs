//! A snapshot as the content source of a session.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use snapshot_format::layout::{
    MAX_FILL_RUNS, MAX_FRAME_SLOTS, MAX_LISTED_PAGES_PER_SLOT, PAGE_SIZE, PAGES_PER_BLOCK_U64,
};
use snapshot_format::{
    FrameDecoder, FrameError, FrameRef, IndexBlock, MAX_READ_AHEAD, Page, ReadError, Reason,
    Snapshot, Top,
};

use crate::session::content::duplicates::Duplicates;
use crate::session::content::frame_cache::{CacheLookup, Decoded, FrameCache, SharedFrames};
use crate::session::failure::{Failure, FailureKind};
use crate::session::platform::{Content, FrameId, Image, PageNumber, Run};

/// Decoded bytes that each thread keeps for pages whose content is shared by many: their frame is
/// wanted repeatedly, and its list doesn't name all of them. More would not fit into the cache of a
/// core: with 2 MiB, a fault takes half as long again, and a restore decodes hardly less.
const MAX_KEPT_BYTES: usize = 512 << 10;

/// Decoded bytes that a session without shared frames keeps while a recording runs.
const MAX_RECORDING_BYTES: u64 = 512 << 20;
/// Maximum number of bytes between two frames that are read at once, such as an index block.
const MAX_READ_AHEAD_GAP: u64 = 16 << 10;

/// The number of the next session.
static SESSIONS: AtomicU64 = AtomicU64::new(1);

/// The content source of a session that restores a snapshot.
pub(crate) struct SnapshotImage {
    snapshot: Arc<Snapshot>,
    /// The number of the session, unique in this process.
    session: u64,
    duplicates: Duplicates,
    /// Frames that other sessions of the snapshot have decoded.
    shared: Option<Arc<SharedFrames>>,
    /// Frames that this session keeps while a recording runs, if it shares none.
    kept: RwLock<Option<Arc<SharedFrames>>>,
    bytes_read: AtomicU64,
    bytes_decoded: AtomicU64,
}

/// A decoder, and the frames that it decoded last.
pub(crate) struct Decoder {
    frames: FrameDecoder,
    /// The snapshot that the decoder is prepared for, identified by its address. No other object
    /// can get that address as long as it is referenced here.
    of: Weak<Snapshot>,
    /// The number of the session that the frames belong to.
    session: u64,
    /// Capacity of each of `kept`, in bytes.
    frame_bytes: usize,
    kept: Vec<Kept>,
    /// Index of the frame that was used last.
    last: usize,
    /// The frame in that place, if it is only partly decoded.
    begun: Option<FrameRef>,
    /// Whether the last frame was found decoded.
    cached: bool,
    clock: u64,
}

/// A decoded frame.
#[derive(Default)]
struct Kept {
    /// The frame, with everything that the index says about it: another index block of a hostile
    /// file may describe the same offset differently.
    frame: Option<FrameRef>,
    bytes: Vec<u8>,
    /// The bytes of a frame that another thread decoded.
    shared: Option<Arc<Decoded>>,
    /// Number of bytes of the frame, and number of those that are decoded.
    len: usize,
    ready: usize,
    /// The pages that the frame itself lists, in the numbers of its file.
    listed: Vec<Run>,
    /// The listed pages that the index confirmed, once it was consulted.
    runs: Vec<Run>,
    confirmed: bool,
    used: u64,
}

impl Kept {
    /// Stores the frame in the shared cache.
    fn share(&self, shared: &SharedFrames, look: CacheLookup<'_>, frame: &FrameRef) {
        shared.keep(look, frame, &self.bytes[..self.len], &self.listed);
    }

    /// Takes over a frame that another thread decoded.
    fn take(&mut self, frame: &FrameRef, decoded: Arc<Decoded>) {
        self.listed.extend_from_slice(decoded.listed());
        (self.frame, self.ready) = (Some(*frame), self.len);
        self.shared = Some(decoded);
    }
}

impl SnapshotImage {
    /// Reads the metadata that decoding the frames of `snapshot` requires.
    pub(crate) fn new(
        snapshot: Arc<Snapshot>,
        shared: Option<SharedFrames>,
    ) -> Result<Self, ReadError> {
        snapshot.prepare()?;
        Ok(Self {
            session: SESSIONS.fetch_add(1, Relaxed),
            duplicates: Duplicates::new(snapshot.block_count(), 1 + snapshot.ancestors().len()),
            snapshot,
            shared: shared.map(Arc::new),
            kept: RwLock::default(),
            bytes_read: AtomicU64::new(0),
            bytes_decoded: AtomicU64::new(0),
        })
    }

    /// Returns the number of bytes decoded from them so far.
    pub(crate) fn bytes_decoded(&self) -> u64 {
        self.bytes_decoded.load(Relaxed)
    }

    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Creates a decoder, which must [adopt](Self::adopt) a snapshot before use.
    pub(crate) fn decoder() -> Decoder {
        Decoder {
            frames: FrameDecoder::new(),
            of: Weak::new(),
            session: 0,
            frame_bytes: 0,
            kept: Vec::new(),
            last: 0,
            begun: None,
            cached: false,
            clock: 0,
        }
    }

    /// Returns whether `decoder` was last used for this session.
    pub(crate) fn was_used_by(&self, decoder: &Decoder) -> bool {
        decoder.session == self.session
    }

    /// Returns whether `decoder` is prepared for this snapshot.
    pub(crate) fn is_prepared(&self, decoder: &Decoder) -> bool {
        std::ptr::eq(decoder.of.as_ptr(), Arc::as_ptr(&self.snapshot))
    }

    /// Prepares `decoder` for this session. Frames of another session are forgotten.
    pub(crate) fn adopt(&self, decoder: &mut Decoder) {
        decoder.begun = None;
        if self.was_used_by(decoder) {
            return;
        }
        decoder.session = self.session;
        if !self.is_prepared(decoder) {
            decoder.of = Arc::downgrade(&self.snapshot);
            if let Err(error) = decoder.frames.prepare_for(&self.snapshot) {
                tracing::warn!(%error, "frames are decoded as a whole");
            }
        }
        let frame_bytes = usize::try_from(self.snapshot.summary().frame_bytes)
            .unwrap_or(usize::MAX)
            .clamp(PAGE_SIZE, MAX_FRAME_SLOTS * PAGE_SIZE);
        let count = (MAX_KEPT_BYTES / frame_bytes).clamp(1, 16);
        if decoder.frame_bytes != frame_bytes || decoder.kept.len() != count {
            decoder.kept.clear();
        }
        decoder.kept.resize_with(count, Kept::default);
        for kept in &mut decoder.kept {
            (kept.frame, kept.shared) = (None, None);
        }
        (decoder.frame_bytes, decoder.last) = (frame_bytes, 0);
    }

    /// Notes the pages of these index blocks that repeat earlier ones, until there is no more room.
    /// A block that can't be read now is reported when a page of it is wanted. `pause` is called
    /// before each read and returns whether to continue. Returns the number of the next block, if
    /// there may be more.
    pub(crate) fn note_duplicates(
        &self,
        blocks: Range<u64>,
        mut pause: impl FnMut() -> bool,
    ) -> Option<u64> {
        for number in blocks.clone() {
            if self.duplicates.is_full() || !pause() {
                return None;
            }
            if matches!(self.snapshot.top(number), Top::Block) {
                self.note_block(number, Reason::Prefetch);
            }
        }
        Some(blocks.end)
    }

    /// Leaves `pages`, those of working sets, out of the notes about duplicates.
    pub(crate) fn leave_out_of_notes(&self, pages: &[Range<PageNumber>]) {
        self.duplicates.leave_out(pages);
    }

    fn note_block(&self, number: u64, reason: Reason) {
        if self.duplicates.first_look(number)
            && let Ok(block) = self.snapshot.index_block(number, reason)
        {
            self.duplicates.note(number, &block);
        }
    }

    fn read_failure(&self, page: PageNumber, error: &ReadError) -> Failure {
        Failure {
            page,
            kind: kind(error.is_damage()),
            file: error.file().to_owned(),
            ..self.failure(message(error))
        }
    }

    /// Decodes the rest of the frame that was decoded last.
    fn decode_rest(&self, decoder: &mut Decoder, frame: &FrameRef) -> Result<(), Failure> {
        let kept = &mut decoder.kept[decoder.last];
        decoder
            .frames
            .decode_rest(&self.snapshot, frame, &mut kept.bytes[..kept.len])
            .map_err(|error| self.decode_failure(frame, &error))?;
        kept.ready = kept.len;
        kept.frame = Some(*frame);
        if let Some(frames) = self.frames() {
            kept.share(&frames, CacheLookup::Miss, frame);
        }
        Ok(())
    }

    /// Returns the frames that were decoded earlier, if any are kept.
    fn frames(&self) -> Option<Arc<SharedFrames>> {
        let kept = || {
            self.kept
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()
        };
        self.shared.clone().or_else(kept)
    }

    fn decode_failure(&self, frame: &FrameRef, error: &FrameError) -> Failure {
        Failure {
            kind: kind(error.is_damage()),
            ..self.frame_failure(frame, message(error))
        }
    }

    /// Appends the pages that lie in `frame` and are described by the index block of `page`.
    fn runs_beside(&self, page: PageNumber, frame: &FrameRef, reason: Reason, runs: &mut Vec<Run>) {
        let number = page / PAGES_PER_BLOCK_U64;
        // The block was read to find the page. If it can't be read again, its pages come later.
        let Ok(block) = self.snapshot.index_block(number, reason) else {
            return;
        };
        let Some(held) = block.frames().iter().position(|other| other == frame) else {
            return;
        };
        let mut open: Option<Run> = None;
        for (page, i) in (number * PAGES_PER_BLOCK_U64..).zip(0..block.page_count()) {
            let stored = block.stored(i).filter(|(frame, _)| *frame == held);
            match (&mut open, stored) {
                (Some(run), Some((_, slot))) if slot == run.slot + run.count => run.count += 1,
                (_, stored) => {
                    runs.extend(open.take());
                    let count = 1;
                    open = stored.map(|(_, slot)| Run { page, slot, count });
                }
            }
        }
        runs.extend(open);
    }

    /// Appends the part of `listed` that the index confirms, page by page, because the list is only
    /// a hint.
    fn confirm(
        &self,
        frame: &FrameRef,
        listed: Run,
        block: &mut Option<(u64, Arc<IndexBlock>)>,
        reason: Reason,
        runs: &mut Vec<Run>,
    ) -> Result<(), ReadError> {
        let mut open: Option<Run> = None;
        for (page, slot) in listed.pages().zip(listed.slot..) {
            let number = page / PAGES_PER_BLOCK_U64;
            let confirmed = number < self.snapshot.block_count()
                && matches!(self.snapshot.top(number), Top::Block)
                && {
                    if block.as_ref().is_none_or(|(have, _)| *have != number) {
                        let read = self.snapshot.index_block(number, reason);
                        // Runs that were confirmed so far are kept.
                        let read = read.inspect_err(|_| runs.extend(open.take()))?;
                        *block = Some((number, read));
                    }
                    let within = usize::try_from(page % PAGES_PER_BLOCK_U64).unwrap_or(0);
                    block.as_ref().is_some_and(|(_, block)| {
                        block.page(within)
                            == Page::Stored {
                                frame: *frame,
                                slot,
                            }
                    })
                };
            match &mut open {
                Some(run) if confirmed => run.count += 1,
                None if confirmed => {
                    open = Some(Run {
                        page,
                        slot,
                        count: 1,
                    });
                }
                _ => runs.extend(open.take()),
            }
        }
        runs.extend(open);
        Ok(())
    }
}

impl Image for SnapshotImage {
    type Frame = FrameRef;
    type Decoder = Decoder;

    fn id(&self, frame: &FrameRef) -> FrameId {
        FrameId {
            layer: frame.layer(),
            offset: frame.offset(),
        }
    }

    fn content(&self, page: PageNumber, reason: Reason) -> Result<Content<FrameRef>, Failure> {
        match self.snapshot.look_up(page, reason) {
            Ok(Page::Fill(word)) => Ok(Content::Fill(word)),
            Ok(Page::Stored { frame, slot }) => {
                self.note_block(page / PAGES_PER_BLOCK_U64, reason);
                Ok(Content::Stored(frame, slot))
            }
            // A session's pages belong to regions, so `Unused` does not occur.
            Ok(Page::Unavailable | Page::Unused) => Ok(Content::Unavailable),
            Err(error) => Err(self.read_failure(page, &error)),
        }
    }

    fn unavailable_until(&self, page: PageNumber) -> PageNumber {
        let block = page / PAGES_PER_BLOCK_U64;
        match self.snapshot.top(block) {
            Top::Unavailable => (block + 1) * PAGES_PER_BLOCK_U64,
            Top::Fill(_) | Top::Block => page,
        }
    }

    fn slots(&self, frame: &FrameRef) -> u16 {
        frame.slots()
    }

    fn read_ahead(&self, decoder: &mut Decoder, mut frames: impl Iterator<Item = FrameRef>) {
        let Some(first) = frames.next() else { return };
        let is_there = decoder.frames.is_ahead(&self.snapshot, &first)
            || decoder.kept.iter().any(|kept| kept.frame == Some(first))
            || self
                .shared
                .as_ref()
                .is_some_and(|shared| shared.has(&first));
        if is_there {
            return;
        }
        let mut last = first;
        for frame in frames.filter(|frame| *frame != first) {
            let end = last.offset() + u64::from(last.stored_len());
            let frame_end = frame.offset() + u64::from(frame.stored_len());
            if frame == last {
                continue;
            }
            if frame.layer() != first.layer()
                || frame.offset() < end
                || frame.offset() - end > MAX_READ_AHEAD_GAP
                || frame_end - first.offset() > MAX_READ_AHEAD as u64
            {
                break;
            }
            last = frame;
        }
        if last != first
            && let Err(error) = decoder.frames.read_ahead(&self.snapshot, &first, &last)
        {
            tracing::debug!(%error, "reading ahead");
        }
    }

    fn decode(
        &self,
        decoder: &mut Decoder,
        frame: &FrameRef,
        slots: u16,
        reason: Reason,
    ) -> Result<(), Failure> {
        decoder.clock += 1;
        if decoder.begun.take() == Some(*frame) {
            return self.decode_rest(decoder, frame);
        }
        // The summary's frame size is only the writer's promise. A larger frame is still valid, but
        // there is room for only one.
        if frame.decoded_len() > decoder.frame_bytes {
            decoder.frame_bytes = frame.decoded_len();
            decoder.kept.truncate(1);
        }
        let found = decoder
            .kept
            .iter()
            .position(|kept| kept.frame == Some(*frame));
        let oldest = || {
            let oldest = decoder
                .kept
                .iter()
                .enumerate()
                .min_by_key(|(_, kept)| kept.used);
            oldest.map_or(0, |(i, _)| i)
        };
        let i = found.unwrap_or_else(oldest);
        decoder.cached = found.is_some();
        decoder.last = i;
        let kept = &mut decoder.kept[i];
        kept.used = decoder.clock;
        if found.is_some() {
            return Ok(());
        }
        kept.frame = None;
        kept.shared = None;
        kept.confirmed = false;
        kept.listed.clear();
        kept.len = frame.decoded_len();
        let shared = self.frames();
        let shared = shared.as_deref();
        let look = shared.map_or(CacheLookup::Miss, |shared| shared.look(frame, reason));
        if let CacheLookup::Hit(decoded) = look {
            kept.take(frame, decoded);
            decoder.cached = true;
            return Ok(());
        }
        kept.bytes.resize(kept.bytes.len().max(kept.len), 0);
        let out = &mut kept.bytes[..kept.len];
        let (listed, ready) = decoder
            .frames
            .decode_first(&self.snapshot, frame, reason, slots, out)
            .map_err(|error| self.decode_failure(frame, &error))?;
        kept.listed.extend(listed.runs().map(|listed| Run {
            page: listed.first_page,
            slot: listed.slot,
            count: listed.count,
        }));
        kept.ready = usize::from(ready) * PAGE_SIZE;
        if kept.ready == kept.len {
            kept.frame = Some(*frame);
            if let Some(shared) = shared {
                kept.share(shared, look, frame);
            }
        } else {
            decoder.begun = Some(*frame);
        }
        self.bytes_read
            .fetch_add(u64::from(frame.stored_len()), Relaxed);
        self.bytes_decoded.fetch_add(kept.len as u64, Relaxed);
        Ok(())
    }

    fn keep_frames(&self, keep: bool) {
        if let Some(shared) = &self.shared {
            shared.keep_own(keep);
            return;
        }
        let frames = keep.then(|| {
            let cache = Arc::new(FrameCache::new(MAX_RECORDING_BYTES));
            let frames = SharedFrames::new(&cache, &self.snapshot);
            frames.keep_own(true);
            Arc::new(frames)
        });
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *kept, frames);
        drop(kept);
        drop(before);
    }

    fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Relaxed)
    }

    fn was_cached(&self, decoder: &Decoder) -> bool {
        decoder.cached
    }

    fn runs(
        &self,
        decoder: &mut Decoder,
        page: PageNumber,
        reason: Reason,
        runs: &mut Vec<Run>,
    ) -> usize {
        runs.clear();
        let kept = &mut decoder.kept[decoder.last];
        let Some(frame) = kept.frame else { return 0 };
        // The list of an ancestor's frame has page numbers of that file.
        let is_own = frame.layer() == 0;
        if is_own && !kept.confirmed {
            let mut block = None;
            kept.runs.clear();
            for listed in &kept.listed {
                // Confirmed pages come with the frame at no cost. A page that can't be confirmed is
                // no failure of the wanted page; it fails when it is wanted itself.
                let confirmed = self.confirm(&frame, *listed, &mut block, reason, &mut kept.runs);
                if let Err(error) = confirmed {
                    tracing::debug!(%error, page = listed.page, "a page that came with a frame is left");
                }
            }
            kept.confirmed = true;
        }
        if is_own {
            runs.extend_from_slice(&kept.runs);
        } else {
            self.runs_beside(page, &frame, reason, runs);
        }
        let own = runs.len();
        // Ten thousand pages may share one content, and a fault for the frame must not wait for all
        // of them.
        let most = usize::from(frame.slots()) * MAX_LISTED_PAGES_PER_SLOT;
        self.duplicates.take(&frame, most, runs);
        own
    }

    fn bytes<'a>(&self, decoder: &'a Decoder) -> &'a [u8] {
        let kept = &decoder.kept[decoder.last];
        let bytes = match &kept.shared {
            Some(shared) => shared.bytes(),
            None => &kept.bytes[..],
        };
        &bytes[..kept.ready]
    }

    fn failure(&self, detail: String) -> Failure {
        Failure {
            file: self.snapshot.name().to_owned(),
            offset: None,
            page: 0,
            address: None,
            kind: FailureKind::Io,
            detail,
        }
    }

    fn frame_failure(&self, frame: &FrameRef, detail: String) -> Failure {
        let failure = self.failure(detail);
        Failure {
            file: match self.snapshot.layer(frame.layer()) {
                Some(layer) => layer.name().to_owned(),
                None => failure.file,
            },
            offset: Some(frame.offset()),
            ..failure
        }
    }
}

fn kind(is_damage: bool) -> FailureKind {
    if is_damage {
        FailureKind::Damaged
    } else {
        FailureKind::Io
    }
}

/// Returns an error and its causes in one line.
fn message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Returns the longest runs of zero pages that consist of whole index blocks, at most
/// [`MAX_FILL_RUNS`]. They come from the top table, which is in memory. The file's list of fill
/// runs also has the pages at their ends, but reading and checking it takes longer than starting a
/// session.
pub(crate) fn zero_runs(snapshot: &Snapshot) -> Vec<Range<PageNumber>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for block in 0..snapshot.block_count() {
        match runs.last_mut() {
            _ if snapshot.top(block) != Top::Fill(0) => {}
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs.sort_by_key(|run| std::cmp::Reverse(run.end - run.start));
    runs.truncate(MAX_FILL_RUNS);
    let pages = |run: Range<u64>| run.start * PAGES_PER_BLOCK_U64..run.end * PAGES_PER_BLOCK_U64;
    runs.into_iter().map(pages).collect()
}
