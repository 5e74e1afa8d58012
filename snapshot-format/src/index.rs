//! The index: a top table with an entry for each 512 pages, and the index blocks it points to.

use zerocopy::FromBytes;

use crate::error::{Defect, Flaw};
use crate::frame::FrameRef;
use crate::layout::{
    self, INDEX_MAGIC, MAX_INDEX_BLOCK_BYTES, RawIndexHeader, RawPageEntry, RawTopEntry, codec,
    page_kind, top_kind,
};

/// Content of one page of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// The page repeats this word; zero pages are fills of 0.
    Fill(u64),
    /// The page lies in a frame.
    Stored {
        /// The frame.
        frame: FrameRef,
        /// Its slot in the frame, below `frame.slots()`.
        slot: u16,
    },
    /// The page could not be read when the snapshot was taken; its content is not known.
    Unavailable,
    /// A number that no page has: past the end of its region.
    Unused,
}

/// Description of a block's 512 page numbers in the top table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Top {
    /// All pages repeat this word.
    Fill(u64),
    /// An index block describes each page.
    Block,
    /// No page could be read when the snapshot was taken.
    Unavailable,
}

/// Bytes of the file where frames, index blocks, blobs and sections may lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Body {
    pub(crate) from: u64,
    pub(crate) to: u64,
}

impl Body {
    /// Checks that `len` bytes from `offset` on lie within the body. After this, their end is below
    /// the file's length, and the sum of two such numbers cannot overflow.
    pub(crate) fn check(&self, field: &'static str, offset: u64, len: u64) -> Result<(), Defect> {
        let end = offset.checked_add(len);
        if offset < self.from || end.is_none_or(|end| end > self.to) {
            return Err(Defect::OutOfBounds {
                field,
                offset,
                len,
                from: self.from,
                to: self.to,
            });
        }
        Ok(())
    }
}

/// Files of a chain, as an index block that lies in one of them names them.
pub(crate) struct Files<'a> {
    /// Layer of the file that holds the index block.
    pub(crate) holder: u16,
    /// Layers of the ancestors that the holder lists, in its order; 0 for one that is not among the
    /// files of the open snapshot.
    pub(crate) listed: &'a [u16],
    /// Body of each file of the open snapshot.
    pub(crate) bodies: &'a [Body],
}

impl Files<'_> {
    /// Returns the layer that the holder calls `number`, and that file's body.
    pub(crate) fn resolve(&self, number: u16) -> Result<(u16, Body), Defect> {
        check_layer(number, self.listed.len() as u64)?;
        let layer = match number.checked_sub(1) {
            None => self.holder,
            Some(entry) => match self.listed[usize::from(entry)] {
                0 => {
                    let detail = format!(
                        "names layer {number}, which is not among the ancestors of the snapshot"
                    );
                    return Err(Defect::Text {
                        field: "layer",
                        detail: detail.into(),
                    });
                }
                layer => layer,
            },
        };
        Ok((layer, self.bodies[usize::from(layer)]))
    }
}

/// Location of an index block, checked against the file that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockRef {
    pub(crate) layer: u16,
    /// Number of the block in that file, if it is not the snapshot's own.
    pub(crate) ancestor_block: u32,
    pub(crate) offset: u64,
    pub(crate) stored_len: u16,
    pub(crate) decoded_len: u16,
    pub(crate) crc: u32,
    pub(crate) compressed: bool,
}

/// One entry of the top table, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckedTop {
    Fill(u64),
    Block(BlockRef),
    Unavailable,
}

/// The top table: its bytes as read, with every entry checked.
#[derive(Debug)]
pub(crate) struct TopTable {
    bytes: Vec<u8>,
}

impl TopTable {
    /// Checks every entry of a file with `ancestors` ancestors; `at` is the table's offset in the
    /// file. [`TopTable::check_ancestors`] must follow.
    pub(crate) fn check(bytes: Vec<u8>, at: u64, body: Body, ancestors: u64) -> Result<Self, Flaw> {
        let table = Self { bytes };
        table.check_each(at, |entry| check_top(entry, body, ancestors))?;
        Ok(table)
    }

    /// Checks that the index blocks in ancestors lie within their files; `bodies` are those of all
    /// layers.
    pub(crate) fn check_ancestors(&self, at: u64, bodies: &[Body]) -> Result<(), Flaw> {
        self.check_each(at, |entry| match usize::from(entry.layer.get()) {
            0 => Ok(()),
            layer => check_place(entry, bodies[layer]),
        })
    }

    fn check_each(
        &self,
        at: u64,
        check: impl Fn(&RawTopEntry) -> Result<(), Defect>,
    ) -> Result<(), Flaw> {
        for (number, entry) in records::<RawTopEntry>(&self.bytes).iter().enumerate() {
            check(entry).map_err(|defect| {
                Flaw::new(at + (number * size_of::<RawTopEntry>()) as u64, defect)
            })?;
        }
        Ok(())
    }

    pub(crate) fn len(&self) -> u64 {
        (self.bytes.len() / size_of::<RawTopEntry>()) as u64
    }

    pub(crate) fn get(&self, block: u64) -> Option<CheckedTop> {
        let entry = records::<RawTopEntry>(&self.bytes).get(usize::try_from(block).ok()?)?;
        Some(match entry.kind {
            top_kind::FILL => CheckedTop::Fill(entry.word_or_offset.get()),
            top_kind::BLOCK => CheckedTop::Block(BlockRef {
                layer: entry.layer.get(),
                ancestor_block: entry.ancestor_block.get(),
                offset: entry.word_or_offset.get(),
                stored_len: entry.stored_len.get(),
                decoded_len: entry.decoded_len.get(),
                crc: entry.crc.get(),
                compressed: entry.codec == codec::ZSTD,
            }),
            _ => CheckedTop::Unavailable,
        })
    }
}

/// Returns `bytes` as records; bytes at the end that are too few for a record are left out.
pub(crate) fn records<T>(bytes: &[u8]) -> &[T]
where
    T: FromBytes + zerocopy::Immutable + zerocopy::Unaligned + zerocopy::KnownLayout,
{
    let whole = bytes.len() / size_of::<T>();
    match <[T]>::ref_from_prefix_with_elems(bytes, whole) {
        Ok((records, _)) => records,
        // Alignment is 1 and the length fits, so there is no other case.
        Err(_) => &[],
    }
}

fn check_top(entry: &RawTopEntry, body: Body, ancestors: u64) -> Result<(), Defect> {
    let without_block = entry.codec == 0
        && entry.layer.get() == 0
        && entry.stored_len.get() == 0
        && entry.decoded_len.get() == 0
        && entry.crc.get() == 0
        && entry.ancestor_block.get() == 0;
    match entry.kind {
        top_kind::FILL if without_block => Ok(()),
        top_kind::UNAVAILABLE if without_block && entry.word_or_offset.get() == 0 => Ok(()),
        top_kind::FILL | top_kind::UNAVAILABLE => Err(Defect::Reserved {
            field: "what a top entry without an index block leaves unused",
        }),
        top_kind::BLOCK => check_block_entry(entry, body, ancestors),
        other => Err(Defect::value("kind of a top entry", other, "0, 1 or 2")),
    }
}

fn check_block_entry(entry: &RawTopEntry, body: Body, ancestors: u64) -> Result<(), Defect> {
    let (stored_len, decoded_len) = (entry.stored_len.get(), entry.decoded_len.get());
    check_layer(entry.layer.get(), ancestors)?;
    if entry.layer.get() == 0 && entry.ancestor_block.get() != 0 {
        return Err(Defect::Reserved {
            field: "ancestor block of a top entry with an index block of this file",
        });
    }
    for (field, value) in [
        ("stored length of an index block", stored_len),
        ("decoded length of an index block", decoded_len),
    ] {
        if usize::from(value) > MAX_INDEX_BLOCK_BYTES {
            return Err(Defect::TooLarge {
                field,
                value: value.into(),
                limit: MAX_INDEX_BLOCK_BYTES as u64,
            });
        }
    }
    if usize::from(decoded_len) < size_of::<RawIndexHeader>() {
        return Err(Defect::value(
            "decoded length of an index block",
            decoded_len,
            "at least the length of its header",
        ));
    }
    match entry.codec {
        codec::RAW if stored_len != decoded_len => {
            return Err(Defect::value(
                "stored length of a raw index block",
                stored_len,
                format!("its decoded length {decoded_len}"),
            ));
        }
        codec::ZSTD if stored_len == 0 => {
            return Err(Defect::value(
                "stored length of an index block",
                stored_len,
                "at least 1",
            ));
        }
        codec::RAW | codec::ZSTD => {}
        other => return Err(Defect::value("codec of an index block", other, "0 or 1")),
    }
    if entry.layer.get() == 0 {
        check_place(entry, body)?;
    }
    Ok(())
}

/// Checks that an index block lies within `body`, the body of its file.
fn check_place(entry: &RawTopEntry, body: Body) -> Result<(), Defect> {
    let (offset, len) = (entry.word_or_offset.get(), entry.stored_len.get());
    body.check("index block", offset, len.into())
}

/// Checks a layer in a file that lists `ancestors` ancestors; one without the feature has none.
fn check_layer(layer: u16, ancestors: u64) -> Result<(), Defect> {
    if u64::from(layer) <= ancestors {
        return Ok(());
    }
    let accepted = if ancestors == 0 {
        "0, as the file does not name the feature \"ancestors\"".to_owned()
    } else {
        format!("0 to {ancestors}, the number of ancestors")
    };
    Err(Defect::value("layer", layer, accepted))
}

/// One block of the index, checked: the content of each of up to 512 pages.
#[derive(Debug)]
pub struct IndexBlock {
    pages: Pages,
}

#[derive(Debug)]
enum Pages {
    /// All pages are alike, according to the top table.
    Alike { page: Page, count: usize },
    /// Each page has its own entry.
    Each {
        frames: Box<[FrameRef]>,
        fills: Box<[u64]>,
        entries: Box<[RawPageEntry]>,
    },
}

impl IndexBlock {
    pub(crate) fn alike(page: Page, count: usize) -> Self {
        Self {
            pages: Pages::Alike { page, count },
        }
    }

    /// Checks a decoded index block at offset `at` in its file, where its first page has the number
    /// `first_page`. Afterwards every frame that it names lies within the frame's file, and every
    /// slot and fill number is within its frame and table.
    pub(crate) fn check(
        bytes: &[u8],
        at: u64,
        first_page: u64,
        page_count: usize,
        named: &Files<'_>,
    ) -> Result<Self, Flaw> {
        Self::check_parts(bytes, first_page, page_count, named)
            .map_err(|defect| Flaw::new(at, defect))
    }

    fn check_parts(
        bytes: &[u8],
        first_page: u64,
        page_count: usize,
        named: &Files<'_>,
    ) -> Result<Self, Defect> {
        let Ok((header, rest)) = RawIndexHeader::ref_from_prefix(bytes) else {
            return Err(Defect::value(
                "decoded length of an index block",
                bytes.len() as u64,
                "at least the length of its header",
            ));
        };
        if header.magic.get() != INDEX_MAGIC {
            return Err(Defect::value(
                "magic of an index block",
                header.magic.get(),
                format!("{INDEX_MAGIC}"),
            ));
        }
        if header.reserved != [0; 6] || header.reserved2.get() != 0 {
            return Err(Defect::Reserved {
                field: "reserved bytes of an index block",
            });
        }
        if header.first_page.get() != first_page {
            return Err(Defect::value(
                "first page of an index block",
                header.first_page.get(),
                format!("{first_page}"),
            ));
        }
        if usize::from(header.page_count.get()) != page_count {
            return Err(Defect::value(
                "page count of an index block",
                header.page_count.get(),
                format!("{page_count}, as its region goes"),
            ));
        }
        let frame_bytes = usize::from(header.frame_count.get()) * size_of::<layout::RawFrameRef>();
        let fill_bytes = usize::from(header.fill_count.get()) * size_of::<u64>();
        let page_bytes = page_count * size_of::<RawPageEntry>();
        if rest.len() != frame_bytes + fill_bytes + page_bytes {
            return Err(Defect::value(
                "length of an index block",
                bytes.len() as u64,
                format!(
                    "{}, as its counts go",
                    size_of::<RawIndexHeader>() + frame_bytes + fill_bytes + page_bytes
                ),
            ));
        }
        let (frames, rest) = rest.split_at(frame_bytes);
        let (fills, entries) = rest.split_at(fill_bytes);
        let frames = records::<layout::RawFrameRef>(frames)
            .iter()
            .map(|raw| FrameRef::check(raw, named))
            .collect::<Result<Box<[_]>, _>>()?;
        let fills = records::<zerocopy::little_endian::U64>(fills)
            .iter()
            .map(|word| word.get())
            .collect::<Box<[_]>>();
        let entries = records::<RawPageEntry>(entries);
        for entry in entries {
            check_page(*entry, &frames, fills.len())?;
        }
        Ok(Self {
            pages: Pages::Each {
                frames,
                fills,
                entries: entries.into(),
            },
        })
    }

    /// Returns the number of pages described: 512, or fewer at the end of a region.
    pub fn page_count(&self) -> usize {
        match &self.pages {
            Pages::Alike { count, .. } => *count,
            Pages::Each { entries, .. } => entries.len(),
        }
    }

    /// Returns the content of the `i`-th page; [`Page::Unused`] past the end.
    pub fn page(&self, i: usize) -> Page {
        match &self.pages {
            Pages::Alike { page, count } if i < *count => *page,
            Pages::Alike { .. } => Page::Unused,
            Pages::Each {
                frames,
                fills,
                entries,
            } => match entries.get(i) {
                None => Page::Unused,
                Some(entry) => match entry.frame.get() {
                    page_kind::FILL => Page::Fill(fills[usize::from(entry.slot.get())]),
                    page_kind::UNAVAILABLE => Page::Unavailable,
                    frame => Page::Stored {
                        frame: frames[usize::from(frame)],
                        slot: entry.slot.get(),
                    },
                },
            },
        }
    }

    /// Returns the number of the `i`-th page's frame in [`IndexBlock::frames`], and its slot there.
    pub fn stored(&self, i: usize) -> Option<(usize, u16)> {
        match &self.pages {
            Pages::Alike { .. } => None,
            Pages::Each {
                frames, entries, ..
            } => {
                let entry = entries.get(i)?;
                let frame = usize::from(entry.frame.get());
                (frame < frames.len()).then(|| (frame, entry.slot.get()))
            }
        }
    }

    /// Returns the number of the `i`-th page's word in [`IndexBlock::fills`].
    pub(crate) fn fill_number(&self, i: usize) -> Option<usize> {
        match &self.pages {
            Pages::Alike { page, count } => {
                (i < *count && matches!(page, Page::Fill(_))).then_some(0)
            }
            Pages::Each { entries, .. } => {
                let entry = entries.get(i)?;
                (entry.frame.get() == page_kind::FILL).then(|| entry.slot.get().into())
            }
        }
    }

    /// Returns the frames that hold the pages, each once.
    pub fn frames(&self) -> &[FrameRef] {
        match &self.pages {
            Pages::Alike { .. } => &[],
            Pages::Each { frames, .. } => frames,
        }
    }

    /// Returns the words that the fill pages repeat.
    pub fn fills(&self) -> &[u64] {
        match &self.pages {
            Pages::Alike {
                page: Page::Fill(word),
                ..
            } => std::slice::from_ref(word),
            Pages::Alike { .. } => &[],
            Pages::Each { fills, .. } => fills,
        }
    }

    /// Returns the memory that the block takes, in bytes: the weight of a cached block.
    pub(crate) fn weight(&self) -> u64 {
        let parts = match &self.pages {
            Pages::Alike { .. } => 0,
            Pages::Each {
                frames,
                fills,
                entries,
            } => size_of_val(&**frames) + size_of_val(&**fills) + size_of_val(&**entries),
        };
        (size_of::<Self>() + parts) as u64
    }
}

fn check_page(entry: RawPageEntry, frames: &[FrameRef], fills: usize) -> Result<(), Defect> {
    let slot = entry.slot.get();
    match entry.frame.get() {
        page_kind::FILL if usize::from(slot) < fills => Ok(()),
        page_kind::FILL => Err(Defect::value(
            "fill number of a page",
            slot,
            format!("below {fills}"),
        )),
        page_kind::UNAVAILABLE if slot == 0 => Ok(()),
        page_kind::UNAVAILABLE => Err(Defect::Reserved {
            field: "slot of an unavailable page",
        }),
        frame => match frames.get(usize::from(frame)) {
            Some(known) if slot < known.slots() => Ok(()),
            Some(known) => Err(Defect::value(
                "slot of a page",
                slot,
                format!("below {}", known.slots()),
            )),
            None => Err(Defect::value(
                "frame number of a page",
                frame,
                format!("below {}", frames.len()),
            )),
        },
    }
}
