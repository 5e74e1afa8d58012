//! Reading and decoding frames.
//!
//! ```text
//! decode(frame, out):
//!     read the whole record into this thread's buffer         one read, unless it was read ahead
//!     CRC-32 of the record = the one that the index recorded  before any byte of it is believed
//!     header agrees with the index; lengths add up
//!     page list: slots within the frame, pages within its file, at most 4 pages a slot
//!     payload is exactly one zstd frame                       none before, between or behind
//!     payload -> out, exactly slots * 4096 bytes
//! ```
//!
//! The payload can be decoded in two steps, the first of which ends when the requested page has
//! been decoded. zstd decodes block by block, and the writer gives a frame of 64 KiB and more at
//! least two.
//!
//! Nothing on this path allocates: the record buffer and the decompressors live as long as the
//! [`FrameDecoder`], a dictionary is prepared once per file: those of the snapshot's own file
//! before, that of an ancestor with the first frame that needs it.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Weak};

use zerocopy::FromBytes as _;
use zstd::zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use super::{Layer, Snapshot};
use crate::error::{Defect, FrameError, ReadError};
use crate::frame::{Codec, FrameRef, ListedPages, Parts};
use crate::layout::{MAX_FRAME_RECORD_BYTES, PAGE_SIZE, RawFrameHeader, RawPageRun};
use crate::store::Reason;
use crate::types::SnapshotId;

/// Maximum number of bytes of [`FrameDecoder::read_ahead`].
pub const MAX_READ_AHEAD: usize = 1 << 20;
/// Minimum number of pages of a frame that is decoded in steps. The writer gives such frames at
/// least two zstd blocks.
const MIN_STEPPED_PAGES: u16 = 16;
/// Dictionaries that a decoder prepares for decoding in steps.
const MAX_STREAMS: usize = 4;
/// Bytes that tell zstd how many it wants next.
const FRAME_HEADER_START: usize = 5;
/// The part of a zstd frame header's first byte that decides whether the frame is decoded in steps,
/// and how it must be: a single segment, no checksum. Levels 1 and 2 give long frames a window.
const DESCRIPTOR_MASK: u8 = 1 << 5 | 1 << 2;
const DESCRIPTOR: u8 = 1 << 5;
/// A zstd frame with a window of 128 KiB, which no block exceeds, and one byte in it. A context
/// that has decoded it has allocated what it will need.
const WARM_UP: [u8; 10] = [0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3, 0x0b, 0, 0, 0];

/// Reads and decodes frames. One for each thread; allocates all it needs when it is made.
pub struct FrameDecoder {
    records: Records,
    context: DCtx<'static>,
    /// Contexts for decoding in steps, one for each dictionary, with the dictionary's number and
    /// the layer of its file; number 0 means no dictionary, in any layer.
    streams: Vec<(StreamKey, DCtx<'static>)>,
    /// The snapshot whose dictionaries they have.
    streams_of: Option<SnapshotId>,
    partial: Option<PartialFrame>,
}

/// The number of a dictionary, and the layer of the file that has it.
type StreamKey = (u16, u16);
/// The key of the context without a dictionary.
const NO_DICTIONARY: StreamKey = (0, 0);

/// Frame records that were read.
struct Records {
    buffer: Box<[u8]>,
    /// The part of a file that was read ahead into the front of the buffer.
    ahead: Option<Ahead>,
    /// The place of the current record in the buffer.
    current: Range<usize>,
}

/// A part of a file.
struct Ahead {
    /// The open file. Its ID would not do: another file can have the same.
    layer: Weak<Layer>,
    offset: u64,
    len: usize,
}

impl Ahead {
    /// Returns the place of the record of `frame` in this part, if it lies there.
    fn place(&self, snapshot: &Snapshot, frame: &FrameRef) -> Option<Range<usize>> {
        let start = usize::try_from(frame.offset.checked_sub(self.offset)?).ok()?;
        let end = start.checked_add(frame.stored_len as usize)?;
        let layer = Arc::as_ptr(snapshot.layer_of(frame));
        (end <= self.len && self.layer.as_ptr() == layer).then_some(start..end)
    }
}

/// A frame that is decoded as far as it was asked for.
struct PartialFrame {
    frame: FrameRef,
    stream: usize,
    /// Bytes at the end of the record that aren't decoded.
    left: usize,
    /// Bytes that came out.
    decoded: usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameDecoder").finish_non_exhaustive()
    }
}

impl FrameDecoder {
    /// Allocates a buffer for the largest frame record, and a decompressor.
    pub fn new() -> Self {
        Self {
            records: Records {
                buffer: vec![0; MAX_FRAME_RECORD_BYTES].into(),
                ahead: None,
                current: 0..0,
            },
            context: DCtx::create(),
            streams: Vec::new(),
            streams_of: None,
            partial: None,
        }
    }

    /// Creates a decoder as [`FrameDecoder::new`] does, prepared to [decode in
    /// steps](Self::decode_first) the frames of `snapshot`.
    pub fn in_steps(snapshot: &Snapshot) -> Result<Self, ReadError> {
        let mut decoder = Self::new();
        decoder.prepare_for(snapshot)?;
        Ok(decoder)
    }

    /// Prepares the decoder to [decode in steps](Self::decode_first) the frames of `snapshot`. It
    /// discards the state of the previous snapshot, and the frame that was in progress. After an
    /// error it decodes frames as a whole. For the dictionary of an ancestor it is prepared when a
    /// frame first needs that.
    pub fn prepare_for(&mut self, snapshot: &Snapshot) -> Result<(), ReadError> {
        self.partial = None;
        self.streams_of = None;
        // The first context needs no dictionary.
        self.streams.retain(|(key, _)| *key == NO_DICTIONARY);
        if self.streams.is_empty() {
            self.add_stream(NO_DICTIONARY, &[]);
        }
        for (number, bytes) in snapshot.own().first_dictionaries(MAX_STREAMS)? {
            self.add_stream((number, 0), bytes);
        }
        self.streams_of = Some(snapshot.id());
        Ok(())
    }

    /// Adds a context for frames with the dictionary `bytes`. If it cannot be prepared, these
    /// frames are decoded as a whole.
    fn add_stream(&mut self, key: StreamKey, bytes: &[u8]) {
        let mut context = DCtx::create();
        let mut byte = [0_u8];
        let ready = context
            .set_parameter(DParameter::StableOutBuffer(true))
            .and_then(|_| context.load_dictionary(bytes))
            .and_then(|_| {
                let mut output = OutBuffer::around(&mut byte[..]);
                context.decompress_stream(&mut output, &mut InBuffer::around(&WARM_UP))
            });
        if ready == Ok(0) {
            self.streams.push((key, context));
        }
    }

    /// Reads the records from that of `first` to that of `last` at once, which must lie in this
    /// order in one file, at most [`MAX_READ_AHEAD`] bytes. Frames among them are decoded without
    /// another read, for [`Reason::Prefetch`] only, and until a record is read by itself. Every
    /// check of a frame is made when it is decoded.
    pub fn read_ahead(
        &mut self,
        snapshot: &Snapshot,
        first: &FrameRef,
        last: &FrameRef,
    ) -> Result<(), FrameError> {
        self.partial = None;
        let records = &mut self.records;
        records.ahead = None;
        let end = last.offset + u64::from(last.stored_len);
        let len = usize::try_from(end.saturating_sub(first.offset)).unwrap_or(usize::MAX);
        if len == 0 || len > MAX_READ_AHEAD || last.layer != first.layer {
            return Err(FrameError::Buffer {
                offset: first.offset,
                expected: MAX_READ_AHEAD,
                actual: len,
            });
        }
        read_from(
            &mut records.buffer[..len],
            snapshot.layer_of(first),
            first.offset,
            Reason::Prefetch,
        )?;
        records.ahead = Some(Ahead {
            layer: Arc::downgrade(snapshot.layer_of(first)),
            offset: first.offset,
            len,
        });
        Ok(())
    }

    /// Returns whether the record of `frame` was read ahead.
    pub fn is_ahead(&self, snapshot: &Snapshot, frame: &FrameRef) -> bool {
        let ahead = self.records.ahead.as_ref();
        ahead.is_some_and(|ahead| ahead.place(snapshot, frame).is_some())
    }

    /// Reads, checks and decodes `frame` into `out`, which has exactly [`FrameRef::decoded_len`]
    /// bytes. On an error the content of `out` is unspecified.
    ///
    /// Allocates nothing once the frame's dictionary is prepared, which [`Snapshot::prepare`] does
    /// for those of the snapshot's own file.
    pub fn decode<'a>(
        &'a mut self,
        snapshot: &Snapshot,
        frame: &FrameRef,
        reason: Reason,
        out: &mut [u8],
    ) -> Result<ListedPages<'a>, FrameError> {
        self.partial = None;
        let parts = self.records.read(snapshot, frame, reason, out.len())?;
        decode_whole(&mut self.context, snapshot, frame, parts.payload, out)?;
        Ok(parts.listed)
    }

    /// Reads and checks `frame` without decoding it: its checksum, its header and page list, and
    /// that the payload is one zstd frame. Returns the payload.
    pub(crate) fn check(
        &mut self,
        snapshot: &Snapshot,
        frame: &FrameRef,
        reason: Reason,
    ) -> Result<&[u8], FrameError> {
        self.partial = None;
        let room = frame.decoded_len();
        let parts = self.records.read(snapshot, frame, reason, room)?;
        Ok(parts.payload)
    }

    /// Returns the payload of `frame`, which must be the last one that [`FrameDecoder::decode`]
    /// has decoded: the bytes that follow the page list in its record.
    pub(crate) fn payload(&self, frame: &FrameRef) -> &[u8] {
        debug_assert_eq!(self.records.current.len(), frame.stored_len as usize);
        let record = self.records.current();
        let runs = RawFrameHeader::ref_from_prefix(record)
            .map_or(0, |(header, _)| usize::from(header.run_count.get()));
        &record[size_of::<RawFrameHeader>() + runs * size_of::<RawPageRun>()..]
    }

    /// Decodes `frame` as [`FrameDecoder::decode`] does, but may stop once the first `pages` pages
    /// are in `out`. Returns the frame's page list and the number of decoded pages. If that is less
    /// than the whole frame, [`FrameDecoder::decode_rest`] decodes the others.
    ///
    /// The decoded pages are correct even if the rest cannot be decoded, because the checksum of
    /// the whole record was verified first.
    pub fn decode_first<'a>(
        &'a mut self,
        snapshot: &Snapshot,
        frame: &FrameRef,
        reason: Reason,
        pages: u16,
        out: &mut [u8],
    ) -> Result<(ListedPages<'a>, u16), FrameError> {
        let Some(stream) = self.stream(snapshot, frame, pages) else {
            let listed = self.decode(snapshot, frame, reason, out)?;
            return Ok((listed, frame.slots));
        };
        self.partial = None;
        let parts = self.records.read(snapshot, frame, reason, out.len())?;
        let payload = parts.payload;
        if !is_stepwise(payload, out.len()) {
            let decoded = decode_whole(&mut self.context, snapshot, frame, payload, out);
            return decoded.map(|()| (parts.listed, frame.slots));
        }
        let context = &mut self.streams[stream].1;
        let mut partial = PartialFrame {
            frame: *frame,
            stream,
            left: payload.len(),
            decoded: 0,
        };
        // Whatever happened to the previous frame, this starts a new one.
        let reset = context.reset(ResetDirective::SessionOnly);
        reset
            .map_err(decode_defect)
            .and_then(|_| partial.advance(context, payload, out, usize::from(pages) * PAGE_SIZE))
            .map_err(|defect| damaged(snapshot, frame, defect))?;
        let ready = partial.decoded / PAGE_SIZE;
        if partial.left > 0 {
            self.partial = Some(partial);
        }
        // At most the slots of the frame, because `out` is no longer than the frame.
        Ok((parts.listed, u16::try_from(ready).unwrap_or(frame.slots)))
    }

    /// Decodes the part of `frame` that [`FrameDecoder::decode_first`] left, into the same `out`.
    /// If another frame was decoded in between, all of it is read and decoded again.
    pub fn decode_rest(
        &mut self,
        snapshot: &Snapshot,
        frame: &FrameRef,
        out: &mut [u8],
    ) -> Result<(), FrameError> {
        let partial = self
            .partial
            .take()
            .filter(|partial| partial.frame == *frame);
        let Some(mut partial) = partial.filter(|_| out.len() == frame.decoded_len()) else {
            return self.decode(snapshot, frame, Reason::Demand, out).map(drop);
        };
        let record = self.records.current();
        let payload = &record[record.len() - partial.left..];
        let context = &mut self.streams[partial.stream].1;
        partial
            .advance(context, payload, out, usize::MAX)
            .map_err(|defect| damaged(snapshot, frame, defect))
    }

    /// Returns the index of the context that can decode the first `pages` of `frame` in steps; none
    /// if the frame must be decoded as a whole anyway.
    fn stream(&mut self, snapshot: &Snapshot, frame: &FrameRef, pages: u16) -> Option<usize> {
        let key = match frame.codec {
            Codec::Zstd => NO_DICTIONARY,
            Codec::ZstdDictionary(number) => (number, frame.layer),
            Codec::Raw => return None,
        };
        if pages >= frame.slots
            || frame.slots < MIN_STEPPED_PAGES
            || self.streams_of != Some(snapshot.id())
        {
            return None;
        }
        let known = self.streams.iter().position(|(have, _)| *have == key);
        if known.is_some() || key == NO_DICTIONARY || self.streams.len() > MAX_STREAMS {
            return known;
        }
        // A dictionary that can't be used is reported when the frame is decoded as a whole.
        let bytes = snapshot.layer_of(frame).dictionary_bytes(key.0).ok()?;
        self.add_stream(key, bytes);
        self.streams.iter().position(|(have, _)| *have == key)
    }
}

impl PartialFrame {
    /// Decodes `payload`, the part that is left, until at least `enough` bytes are in `out` or the
    /// frame ends.
    fn advance(
        &mut self,
        context: &mut DCtx<'static>,
        payload: &[u8],
        out: &mut [u8],
        enough: usize,
    ) -> Result<(), Defect> {
        let room = out.len();
        let mut rest = payload;
        let mut wants = if enough < room {
            FRAME_HEADER_START
        } else {
            rest.len()
        };
        // After the last page, the end of the frame must still be checked.
        while self.decoded < enough.min(room) || !rest.is_empty() && self.decoded == room {
            let mut input = InBuffer::around(&rest[..wants.min(rest.len())]);
            let mut output = OutBuffer::around_pos(&mut *out, self.decoded);
            let left = context.decompress_stream(&mut output, &mut input);
            let (read, decoded) = (input.pos(), output.pos());
            let stuck = read == 0 && decoded == self.decoded;
            rest = &rest[read..];
            (self.left, self.decoded) = (rest.len(), decoded);
            // zstd returns the number of bytes that it wants next; 0 at the end of the frame.
            wants = left.map_err(decode_defect)?;
            if wants == 0 {
                return check_len(decoded, room);
            }
            if stuck || rest.is_empty() {
                let reason = Cow::Borrowed("the zstd frame doesn't end");
                return Err(Defect::Decode { reason });
            }
        }
        Ok(())
    }
}

impl Records {
    /// Reads the record of `frame`, unless it was read ahead, and uses it only if its checksum is
    /// right.
    fn read(
        &mut self,
        snapshot: &Snapshot,
        frame: &FrameRef,
        reason: Reason,
        room: usize,
    ) -> Result<Parts<'_>, FrameError> {
        if room != frame.decoded_len() {
            return Err(FrameError::Buffer {
                offset: frame.offset,
                expected: frame.decoded_len(),
                actual: room,
            });
        }
        let layer = snapshot.layer_of(frame);
        // Demand reads anew: the file may have been repaired.
        let ahead = self.ahead.as_ref().filter(|_| reason == Reason::Prefetch);
        let place = ahead.and_then(|ahead| ahead.place(snapshot, frame));
        self.current = if let Some(place) = place {
            place
        } else {
            self.ahead = None;
            // `FrameRef::check` has compared the length with the size of the buffer.
            let len = frame.stored_len as usize;
            read_from(&mut self.buffer[..len], layer, frame.offset, reason)?;
            0..len
        };
        let record = self.current();
        let (stored, computed) = (frame.crc, crc32fast::hash(record));
        if computed != stored {
            let defect = Defect::Checksum { stored, computed };
            return Err(damaged(snapshot, frame, defect));
        }
        Parts::check(record, frame, layer.page_slots())
            .and_then(|parts| {
                if frame.codec != Codec::Raw {
                    one_zstd_frame(parts.payload)?;
                }
                Ok(parts)
            })
            .map_err(|defect| damaged(snapshot, frame, defect))
    }

    /// Returns the record that was read last.
    fn current(&self) -> &[u8] {
        &self.buffer[self.current.clone()]
    }
}

/// Fills `buffer` from `offset` of the file of `layer` on.
fn read_from(
    buffer: &mut [u8],
    layer: &Layer,
    offset: u64,
    reason: Reason,
) -> Result<(), FrameError> {
    layer
        .store()
        .read_exact_at(buffer, offset, reason)
        .map_err(|source| FrameError::Io {
            file: layer.name().to_owned(),
            offset,
            len: buffer.len() as u64,
            source,
        })
}

/// Checks that `bytes` are exactly one zstd frame. zstd itself would decode several consecutive
/// frames, and would skip skippable ones.
pub(crate) fn one_zstd_frame(bytes: &[u8]) -> Result<(), Defect> {
    if zstd_safe::find_frame_compressed_size(bytes) == Ok(bytes.len()) {
        return Ok(());
    }
    let reason = Cow::Borrowed("not exactly one zstd frame");
    Err(Defect::Decode { reason })
}

fn decode_whole(
    context: &mut DCtx<'static>,
    snapshot: &Snapshot,
    frame: &FrameRef,
    payload: &[u8],
    out: &mut [u8],
) -> Result<(), FrameError> {
    let decoded = match frame.codec {
        Codec::Raw => {
            out.copy_from_slice(payload);
            Ok(out.len())
        }
        Codec::Zstd => context.decompress(out, payload),
        Codec::ZstdDictionary(number) => {
            let dictionary = snapshot
                .layer_of(frame)
                .dictionary(number)
                .map_err(|source| FrameError::Dictionary {
                    offset: frame.offset,
                    source: Box::new(source),
                })?;
            context.decompress_using_ddict(out, payload, dictionary)
        }
    };
    decoded
        .map_err(decode_defect)
        .and_then(|len| check_len(len, out.len()))
        .map_err(|defect| damaged(snapshot, frame, defect))
}

/// Returns whether `payload`, which is one zstd frame, has a header of the usual kind. If so,
/// decoding it in steps gives the same bytes as decoding it at once, or fails after the bytes that
/// were already decoded.
fn is_stepwise(payload: &[u8], len: usize) -> bool {
    payload.get(4).map(|first| first & DESCRIPTOR_MASK) == Some(DESCRIPTOR)
        && matches!(zstd_safe::get_frame_content_size(payload), Ok(Some(size)) if size == len as u64)
}

fn damaged(snapshot: &Snapshot, frame: &FrameRef, defect: Defect) -> FrameError {
    FrameError::Damaged {
        file: snapshot.layer_of(frame).name().to_owned(),
        offset: frame.offset,
        defect,
    }
}

fn decode_defect(code: zstd_safe::ErrorCode) -> Defect {
    Defect::Decode {
        reason: Cow::Borrowed(zstd_safe::get_error_name(code)),
    }
}

/// Checks that the decoded bytes fill the buffer exactly.
fn check_len(len: usize, expected: usize) -> Result<(), Defect> {
    if len == expected {
        return Ok(());
    }
    Err(Defect::value(
        "decoded length of a frame",
        len as u64,
        format!("{expected}"),
    ))
}
