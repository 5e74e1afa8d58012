//! Frames: pages that are stored and decoded together.
//!
//! ```text
//! decode(frame, out):
//!     read the whole record into this thread's buffer         one read
//!     CRC-32 of the record = the one that the index recorded  before any byte of it is believed
//!     header agrees with the index; lengths add up
//!     page list: slots within the frame, pages within the snapshot, at most 4 pages a slot
//!     payload -> out, exactly slots * 4096 bytes
//! ```
//!
//! Nothing on this path allocates: the record buffer and the decompressor live as long as the
//! [`FrameDecoder`], a dictionary is prepared once per snapshot.

use std::borrow::Cow;
use std::fmt;

use zerocopy::FromBytes;

use crate::error::{Defect, FrameError};
use crate::index::{Body, check_layer, records};
use crate::layout::{
    self, FRAME_MAGIC, FrameHeader, MAX_FRAME_RECORD_BYTES, MAX_FRAME_SLOTS,
    MAX_LISTED_PAGES_PER_SLOT, MIN_FRAME_RECORD_BYTES, PAGE_SIZE, PageRun, codec,
};
use crate::snapshot::Snapshot;
use crate::store::Reason;

/// Where a frame lies and how to read it, checked against the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameRef {
    offset: u64,
    stored_len: u32,
    crc: u32,
    slots: u16,
    codec: Codec,
}

/// How a frame's payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As it is.
    Raw,
    /// One zstd frame.
    Zstd,
    /// One zstd frame that needs the dictionary of this number.
    ZstdDictionary(u16),
}

impl Codec {
    fn check(codec: u8, dictionary: u16) -> Result<Self, Defect> {
        match (codec, dictionary) {
            (codec::RAW, 0) => Ok(Self::Raw),
            (codec::ZSTD, 0) => Ok(Self::Zstd),
            (codec::ZSTD_DICTIONARY, 1..) => Ok(Self::ZstdDictionary(dictionary)),
            (codec::RAW | codec::ZSTD, _) => Err(Defect::value(
                "dictionary of a frame",
                dictionary,
                "0, as its codec needs none",
            )),
            (codec::ZSTD_DICTIONARY, _) => Err(Defect::value(
                "dictionary of a frame",
                dictionary,
                "at least 1, as its codec needs one",
            )),
            _ => Err(Defect::value("codec of a frame", codec, "0, 1 or 2")),
        }
    }
}

impl FrameRef {
    pub(crate) fn check(raw: &layout::FrameRef, body: Body) -> Result<Self, Defect> {
        let (slots, stored_len) = (raw.slots.get(), raw.stored_len.get());
        if raw.reserved != 0 {
            return Err(Defect::Reserved {
                field: "reserved byte of a frame reference",
            });
        }
        check_layer(raw.layer.get())?;
        check_slots(slots)?;
        let codec = Codec::check(raw.codec, raw.dictionary.get())?;
        if stored_len as usize > MAX_FRAME_RECORD_BYTES {
            return Err(Defect::TooLarge {
                field: "stored length of a frame",
                value: stored_len.into(),
                limit: MAX_FRAME_RECORD_BYTES as u64,
            });
        }
        if (stored_len as usize) < MIN_FRAME_RECORD_BYTES {
            return Err(Defect::value(
                "stored length of a frame",
                stored_len,
                format!("at least {MIN_FRAME_RECORD_BYTES}"),
            ));
        }
        body.check("frame", raw.offset.get(), stored_len.into())?;
        Ok(Self {
            offset: raw.offset.get(),
            stored_len,
            crc: raw.crc.get(),
            slots,
            codec,
        })
    }

    /// First byte of the frame record in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the frame record.
    pub fn stored_len(&self) -> u32 {
        self.stored_len
    }

    /// Pages stored in the frame: 1 to 512.
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// Bytes that the frame decodes to.
    pub fn decoded_len(&self) -> usize {
        usize::from(self.slots) * PAGE_SIZE
    }

    /// How the payload is stored.
    pub fn codec(&self) -> Codec {
        self.codec
    }
}

fn check_slots(slots: u16) -> Result<(), Defect> {
    if slots == 0 || usize::from(slots) > MAX_FRAME_SLOTS {
        return Err(Defect::value(
            "slots of a frame",
            slots,
            format!("1 to {MAX_FRAME_SLOTS}"),
        ));
    }
    Ok(())
}

/// Consecutive pages that lie in consecutive slots of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedRun {
    /// First page.
    pub first_page: u64,
    /// Slot of the first page.
    pub slot: u16,
    /// Pages, at least 1.
    pub count: u16,
}

/// The pages that a frame says it holds. The index is the authority: a page is in the frame only
/// if its own entry says so.
#[derive(Clone, Copy, Debug)]
pub struct ListedPages<'a> {
    base_page: u64,
    runs: &'a [PageRun],
}

impl<'a> ListedPages<'a> {
    /// The runs, in the order of the file. Pages lie within the page-number space, slots within
    /// the frame.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = ListedRun> + use<'a> {
        let base_page = self.base_page;
        self.runs.iter().map(move |run| ListedRun {
            first_page: base_page + u64::from(run.page.get()),
            slot: run.slot.get(),
            count: run.count.get(),
        })
    }
}

/// Reads and decodes frames. One for each thread; allocates all it needs when it is made.
pub struct FrameDecoder {
    record: Box<[u8]>,
    context: zstd_safe::DCtx<'static>,
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
            record: vec![0; MAX_FRAME_RECORD_BYTES].into(),
            context: zstd_safe::DCtx::create(),
        }
    }

    /// Reads, checks and decodes `frame` into `out`, which has exactly
    /// [`FrameRef::decoded_len`] bytes. On an error the content of `out` means nothing.
    ///
    /// Allocates nothing once the frame's dictionary is prepared, which [`Snapshot::prepare`] does
    /// for all of them.
    pub fn decode<'a>(
        &'a mut self,
        snapshot: &Snapshot,
        frame: &FrameRef,
        reason: Reason,
        out: &mut [u8],
    ) -> Result<ListedPages<'a>, FrameError> {
        if out.len() != frame.decoded_len() {
            return Err(FrameError::Buffer {
                offset: frame.offset,
                expected: frame.decoded_len(),
                actual: out.len(),
            });
        }
        let damaged = |defect| FrameError::Damaged {
            file: snapshot.name().to_owned(),
            offset: frame.offset,
            defect,
        };
        // `FrameRef::check` has held the length against the size of the buffer.
        let record = &mut self.record[..frame.stored_len as usize];
        snapshot
            .store()
            .read_exact_at(record, frame.offset, reason)
            .map_err(|source| FrameError::Io {
                file: snapshot.name().to_owned(),
                offset: frame.offset,
                len: frame.stored_len.into(),
                source,
            })?;
        let computed = crc32fast::hash(record);
        if computed != frame.crc {
            return Err(damaged(Defect::Checksum {
                stored: frame.crc,
                computed,
            }));
        }
        let parts = Parts::check(record, frame, snapshot.page_slots()).map_err(damaged)?;
        let decoded = match frame.codec {
            Codec::Raw => {
                out.copy_from_slice(parts.payload);
                Ok(out.len())
            }
            Codec::Zstd => self.context.decompress(out, parts.payload),
            Codec::ZstdDictionary(number) => {
                let dictionary =
                    snapshot
                        .dictionary(number)
                        .map_err(|source| FrameError::Dictionary {
                            offset: frame.offset,
                            source: Box::new(source),
                        })?;
                self.context
                    .decompress_using_ddict(out, parts.payload, dictionary)
            }
        };
        match decoded {
            Ok(len) if len == out.len() => Ok(ListedPages {
                base_page: parts.base_page,
                runs: parts.runs,
            }),
            Ok(len) => Err(damaged(Defect::value(
                "decoded length of a frame",
                len as u64,
                format!("{}", out.len()),
            ))),
            Err(code) => Err(damaged(Defect::Decode {
                reason: Cow::Borrowed(zstd_safe::get_error_name(code)),
            })),
        }
    }

    /// The payload of the record that was decoded last: the verifier looks at it more closely.
    pub(crate) fn payload(&self, frame: &FrameRef, listed_runs: usize) -> &[u8] {
        let from = size_of::<FrameHeader>() + listed_runs * size_of::<PageRun>();
        &self.record[from..frame.stored_len as usize]
    }
}

/// A frame record, taken apart and checked.
struct Parts<'a> {
    base_page: u64,
    runs: &'a [PageRun],
    payload: &'a [u8],
}

impl<'a> Parts<'a> {
    fn check(record: &'a [u8], frame: &FrameRef, page_slots: u64) -> Result<Self, Defect> {
        let Ok((header, rest)) = FrameHeader::ref_from_prefix(record) else {
            return Err(Defect::value(
                "stored length of a frame",
                record.len() as u64,
                "more than the length of its header",
            ));
        };
        if header.magic.get() != FRAME_MAGIC {
            return Err(Defect::value(
                "magic of a frame",
                header.magic.get(),
                format!("{FRAME_MAGIC}"),
            ));
        }
        if header.reserved != 0 {
            return Err(Defect::Reserved {
                field: "reserved byte of a frame",
            });
        }
        if header.slots.get() != frame.slots {
            return Err(Defect::value(
                "slots of a frame",
                header.slots.get(),
                format!("{}, as the index says", frame.slots),
            ));
        }
        if Codec::check(header.codec, header.dictionary.get())? != frame.codec {
            return Err(Defect::value(
                "codec of a frame",
                header.codec,
                "the codec and dictionary that the index names",
            ));
        }
        let run_bytes = usize::from(header.run_count.get()) * size_of::<PageRun>();
        let payload_len = header.payload_len.get() as usize;
        if rest.len().checked_sub(run_bytes) != Some(payload_len) {
            return Err(Defect::value(
                "payload length of a frame",
                payload_len as u64,
                "what header and page list leave of the record",
            ));
        }
        let (runs, payload) = rest.split_at(run_bytes);
        if frame.codec == Codec::Raw && payload.len() != frame.decoded_len() {
            return Err(Defect::value(
                "payload length of a raw frame",
                payload_len as u64,
                format!("{}", frame.decoded_len()),
            ));
        }
        let base_page = header.base_page.get();
        let runs = records(runs);
        check_runs(runs, base_page, frame.slots, page_slots)?;
        Ok(Self {
            base_page,
            runs,
            payload,
        })
    }
}

fn check_runs(runs: &[PageRun], base_page: u64, slots: u16, page_slots: u64) -> Result<(), Defect> {
    let mut listed = 0;
    let mut lowest = u32::MAX;
    for run in runs {
        let (page, slot, count) = (run.page.get(), run.slot.get(), run.count.get());
        if count == 0 || u32::from(slot) + u32::from(count) > u32::from(slots) {
            return Err(Defect::OutOfBounds {
                field: "slots of a page run",
                offset: slot.into(),
                len: count.into(),
                from: 0,
                to: slots.into(),
            });
        }
        let end = base_page.checked_add(u64::from(page) + u64::from(count));
        if end.is_none_or(|end| end > page_slots) {
            return Err(Defect::OutOfBounds {
                field: "pages of a page run",
                offset: base_page.saturating_add(page.into()),
                len: count.into(),
                from: 0,
                to: page_slots,
            });
        }
        listed += usize::from(count);
        lowest = lowest.min(page);
    }
    let limit = usize::from(slots) * MAX_LISTED_PAGES_PER_SLOT;
    if listed > limit {
        return Err(Defect::TooLarge {
            field: "number of pages that a frame lists",
            value: listed as u64,
            limit: limit as u64,
        });
    }
    if lowest != 0 {
        return Err(Defect::value(
            "lowest page of a frame's list",
            lowest,
            "0, as the runs count from the lowest",
        ));
    }
    Ok(())
}
