//! References to frames, and frame records: their checks. `snapshot::decoder` decodes them.

use zerocopy::FromBytes;

use crate::error::Defect;
use crate::index::{Files, records};
use crate::layout::{
    self, FRAME_MAGIC, MAX_FRAME_RECORD_BYTES, MAX_FRAME_SLOTS, MAX_LISTED_PAGES_PER_SLOT,
    MIN_FRAME_RECORD_BYTES, PAGE_SIZE, RawFrameHeader, RawPageRun, codec,
};

/// Location and encoding of a frame, checked against the file that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameRef {
    pub(crate) layer: u16,
    pub(crate) offset: u64,
    pub(crate) stored_len: u32,
    pub(crate) crc: u32,
    pub(crate) slots: u16,
    pub(crate) codec: Codec,
}

/// Encoding of a frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Stored without compression.
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
    pub(crate) fn check(raw: &layout::RawFrameRef, files: &Files<'_>) -> Result<Self, Defect> {
        let (slots, stored_len) = (raw.slots.get(), raw.stored_len.get());
        if raw.reserved != 0 {
            return Err(Defect::Reserved {
                field: "reserved byte of a frame reference",
            });
        }
        let (layer, body) = files.resolve(raw.layer.get())?;
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
            layer,
            offset: raw.offset.get(),
            stored_len,
            crc: raw.crc.get(),
            slots,
            codec,
        })
    }

    /// Returns the reference of a file that has the frame's file as `layer`.
    pub(crate) fn to_raw(self, layer: u16) -> layout::RawFrameRef {
        let (codec, dictionary) = match self.codec {
            Codec::Raw => (codec::RAW, 0),
            Codec::Zstd => (codec::ZSTD, 0),
            Codec::ZstdDictionary(number) => (codec::ZSTD_DICTIONARY, number),
        };
        layout::RawFrameRef {
            offset: self.offset.into(),
            stored_len: self.stored_len.into(),
            crc: self.crc.into(),
            slots: self.slots.into(),
            layer: layer.into(),
            dictionary: dictionary.into(),
            codec,
            reserved: 0,
        }
    }

    /// Returns the number of the file that holds the frame, among the files of the open snapshot:
    /// 0 for the snapshot's own file, `n` for the `n`th of [`crate::Snapshot::ancestors`].
    ///
    /// The page list of a frame in another file has the page numbers of that file.
    pub fn layer(&self) -> u16 {
        self.layer
    }

    /// Returns the reference as the file that holds the frame would have it: equal for all
    /// snapshots of which that file is a layer, whatever its number there.
    #[must_use]
    pub fn in_own_file(self) -> Self {
        Self { layer: 0, ..self }
    }

    /// Returns the offset of the frame record's first byte in the file that holds it.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the length of the frame record, in bytes.
    pub fn stored_len(&self) -> u32 {
        self.stored_len
    }

    /// Returns the number of pages stored in the frame: 1 to 512.
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// Returns the number of bytes that the frame decodes to.
    pub fn decoded_len(&self) -> usize {
        usize::from(self.slots) * PAGE_SIZE
    }

    /// Returns the encoding of the payload.
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

/// Pages that a frame claims to hold. The index is the authority: a page is in the frame only if
/// its own entry says so.
#[derive(Clone, Copy, Debug)]
pub struct ListedPages<'a> {
    base_page: u64,
    runs: &'a [RawPageRun],
}

impl<'a> ListedPages<'a> {
    /// Returns the runs, in the order of the file. Pages lie within the page-number space, slots
    /// within the frame.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = ListedRun> + use<'a> {
        let base_page = self.base_page;
        self.runs.iter().map(move |run| ListedRun {
            first_page: base_page + u64::from(run.page.get()),
            slot: run.slot.get(),
            count: run.count.get(),
        })
    }
}

/// A frame record, split into its checked parts.
pub(crate) struct Parts<'a> {
    pub(crate) listed: ListedPages<'a>,
    pub(crate) payload: &'a [u8],
}

impl<'a> Parts<'a> {
    pub(crate) fn check(
        record: &'a [u8],
        frame: &FrameRef,
        page_slots: u64,
    ) -> Result<Self, Defect> {
        let Ok((header, rest)) = RawFrameHeader::ref_from_prefix(record) else {
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
        let run_bytes = usize::from(header.run_count.get()) * size_of::<RawPageRun>();
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
            listed: ListedPages { base_page, runs },
            payload,
        })
    }
}

fn check_runs(
    runs: &[RawPageRun],
    base_page: u64,
    slots: u16,
    page_slots: u64,
) -> Result<(), Defect> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The limit applies to all listed pages together: one slot may have most of them.
    #[test]
    fn page_list_is_bounded_in_total() {
        let list = |named: u32| -> Vec<RawPageRun> {
            (0..named)
                .map(|page| RawPageRun {
                    page: page.into(),
                    slot: 1.into(),
                    count: 1.into(),
                })
                .collect()
        };
        assert_eq!(check_runs(&list(8), 0, 2, 512), Ok(()));
        let too_many = check_runs(&list(9), 0, 2, 512);
        assert!(
            matches!(
                too_many,
                Err(Defect::TooLarge {
                    value: 9,
                    limit: 8,
                    ..
                })
            ),
            "{too_many:?}"
        );
    }

    /// Unused numbers are page numbers, too, but the number after the last one is not.
    #[test]
    fn page_list_ends_with_the_page_numbers() {
        let run = |count: u16| {
            [RawPageRun {
                page: 0.into(),
                slot: 0.into(),
                count: count.into(),
            }]
        };
        assert_eq!(check_runs(&run(2), 510, 4, 512), Ok(()));
        let beyond = check_runs(&run(3), 510, 4, 512);
        assert!(
            matches!(beyond, Err(Defect::OutOfBounds { .. })),
            "{beyond:?}"
        );
    }
}
