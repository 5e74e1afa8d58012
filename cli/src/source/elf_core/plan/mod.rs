//! Maps the bytes of a core to pages; each byte of memory is taken once.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context as _, Result, bail};
use indicatif::HumanCount;
use object::elf;

use snapshot_format::layout::region_flags;

use super::super::{PAGE, Remark, VAST};
use super::headers::{Kind, Load, Notes};

/// Maximum number of overlaps between segments that are compared.
const MAX_OVERLAPS: u64 = 16 << 20;
/// Address at which the kernel shows its entry for obsolete system calls to processes. The page is
/// not part of their memory.
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;

/// Pages of one segment whose contents are stored in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Number of the program header.
    pub(super) number: usize,
    pub(super) start: u64,
    pub(super) pages: u64,
    pub(super) content: Content,
    pub(super) flags: u32,
    pub(super) name: String,
}

/// Location of the contents of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The file, starting at this offset.
    At(u64),
    /// One page, put together from parts of the file; what is between them is no memory.
    Pieces(Vec<Piece>),
    /// Unknown: the file does not have them.
    Unknown,
}

/// A part of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Offset in the page.
    pub(super) at: u64,
    pub(super) len: u64,
    /// Offset in the file.
    pub(super) offset: u64,
}

impl Segment {
    pub(super) fn end(&self) -> u64 {
        self.start + self.pages * PAGE
    }
}

/// Bytes of memory that one segment names. Either all or none of them are in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) number: usize,
    pub(super) start: u64,
    pub(super) end: u64,
    /// Offset of the first byte in the file.
    pub(super) offset: u64,
    pub(super) flags: u32,
}

impl Span {
    pub(super) fn offset_of(&self, address: u64) -> u64 {
        self.offset.wrapping_add(address - self.start)
    }

    /// Returns the part of the span that lies in `range`.
    pub(super) fn within(&self, range: Range<u64>) -> Option<Self> {
        let start = self.start.max(range.start);
        let end = self.end.min(range.end);
        (start < end).then(|| Self {
            start,
            end,
            offset: self.offset_of(start),
            ..self.clone()
        })
    }
}

/// Memory that two segments hold at different places of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Overlap {
    pub(super) start: u64,
    pub(super) len: u64,
    /// Number of the segment and offset in the file.
    pub(super) taken: (usize, u64),
    pub(super) dropped: (usize, u64),
}

/// Reason why the addresses of one kind can't be the segments' real ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// A segment passes the end of the address space.
    PassEnd,
    /// Two segments hold the same memory at different places of the file.
    Contradict,
}

/// Returns the flaw of the addresses of one kind, if there is one.
pub(super) fn flaw(loads: &[Load], physical: bool) -> Option<Flaw> {
    let mut spans = Vec::new();
    for load in loads.iter().filter(|load| load.known_bytes() > 0) {
        let start = load.start(physical);
        let Some(end) = start.checked_add(load.known_bytes()) else {
            return Some(Flaw::PassEnd);
        };
        spans.push((start, end, load.offset.wrapping_sub(start)));
    }
    spans.sort_unstable();
    let mut last: Option<(u64, u64)> = None;
    for (start, end, place) in spans {
        match &mut last {
            Some((taken, of)) if start < *taken => {
                if *of != place {
                    return Some(Flaw::Contradict);
                }
                *taken = end.max(*taken);
            }
            _ => last = Some((end, place)),
        }
    }
    None
}

/// The parts of a core that go into the snapshot, and counts of those that don't.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) segments: Vec<Segment>,
    pub(super) overlaps: Vec<Overlap>,
    /// Flaw of the virtual addresses, if the physical ones are used because of it.
    pub(super) virtual_flaw: Option<Flaw>,
    /// Whether all memory is that of a process, whose dumps leave much out.
    is_process: bool,
    beyond: Counted,
    unaddressed: Counted,
    cut: Counted,
    absent: Counted,
    /// Number of pages that the dump lacks and that were left out because they are so many in a
    /// row.
    left_out_pages: u64,
    partly_known: Counted,
    filled: Counted,
}

/// Number of bytes, and the place of the first of them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    bytes: u64,
    first: Option<String>,
}

impl Counted {
    fn add(&mut self, bytes: u64, place: impl FnOnce() -> String) {
        if bytes > 0 {
            self.bytes += bytes;
            self.first.get_or_insert_with(place);
        }
    }

    fn remark(&self, key: &'static str, what: &str) -> Option<Remark> {
        let first = self.first.as_ref()?;
        Some(Remark {
            key,
            value: self.bytes.to_string(),
            text: format!(
                "{} bytes {what} (the first {first})",
                HumanCount(self.bytes)
            ),
            warning: true,
        })
    }
}

impl Plan {
    /// Takes each byte of memory once, from a segment that has it, if there is one.
    pub(super) fn make(
        &mut self,
        loads: &[Load],
        notes: &Notes,
        file_len: u64,
        incomplete: bool,
    ) -> Result<()> {
        let (mut present, mut cut, mut absent) = (Vec::new(), Vec::new(), Vec::new());
        for load in loads {
            let spans = self.spans(load, notes.kind, file_len, incomplete)?;
            let Some(spans) = spans else {
                continue;
            };
            present.extend(spans.present);
            cut.extend(spans.cut);
            absent.extend(spans.absent);
        }
        let (present, overlaps) = taken_once(present)?;
        self.overlaps = overlaps;
        let (cut, _) = taken_once(cut)?;
        let cut = without(cut, &present);
        let (absent, _) = taken_once(absent)?;
        let absent = without(without(absent, &present), &cut);
        self.is_process = !notes.kind.is_physical();
        self.cut_into_pages(&present, &cut, &absent);
        for segment in &mut self.segments {
            segment.name = notes.name(segment.start);
        }
        Ok(())
    }

    /// Returns the bytes of a segment that are in the file, and those that are not; nothing for a
    /// segment that is not memory.
    fn spans(
        &mut self,
        load: &Load,
        kind: Kind,
        file_len: u64,
        incomplete: bool,
    ) -> Result<Option<Spans>> {
        let load = if !kind.is_physical() && load.vaddr == VSYSCALL {
            &load.without_first_page()
        } else {
            load
        };
        let (number, start) = (load.number, load.start(kind.is_physical()));
        let known = load.known_bytes();
        if load.file_bytes > known {
            let beyond = load.file_bytes - known;
            self.beyond.add(beyond, || format!("of segment {number}"));
        }
        if load.memory_bytes == 0 {
            return Ok(None);
        }
        // The kernel sets all bits of the address of memory that it has mapped elsewhere, and of
        // what is not RAM.
        if kind.is_physical() && (start == u64::MAX || start == u64::from(u32::MAX)) {
            if known > 0 {
                let place = || format!("of segment {number}, virtual address {:#x}", load.vaddr);
                self.unaddressed.add(known, place);
            }
            return Ok(None);
        }
        let end = start
            .checked_add(load.memory_bytes)
            .filter(|end| end.checked_next_multiple_of(PAGE).is_some())
            .with_context(|| format!("segment {number} passes the end of the address space"))?;
        let there = file_len.saturating_sub(load.offset).min(known);
        if there < known {
            if !incomplete {
                bail!(
                    "segment {number} ({start:#x}) needs {known} bytes at offset {}, but the file \
                     has only {file_len}: it was cut short (disk full, or `ulimit -c`?); \
                     --incomplete takes what is there",
                    load.offset
                );
            }
            self.cut
                .add(known - there, || format!("at {:#x}", start + there));
        }
        let bit = |elf: u32, ours: u32| if load.flags & elf != 0 { ours } else { 0 };
        let flags = if kind.is_physical() {
            0
        } else {
            bit(elf::PF_R.0, region_flags::READ)
                | bit(elf::PF_W.0, region_flags::WRITE)
                | bit(elf::PF_X.0, region_flags::EXECUTE)
        };
        let whole = Span {
            number,
            start,
            end,
            offset: load.offset,
            flags,
        };
        Ok(Some(Spans {
            present: whole.within(start..start + there),
            cut: whole.within(start + there..start + known),
            absent: whole.within(start + known..end),
        }))
    }

    /// Builds whole pages from spans that are sorted and disjoint.
    fn cut_into_pages(&mut self, present: &[Span], cut: &[Span], absent: &[Span]) {
        let mut odd: BTreeMap<u64, Odd> = BTreeMap::new();
        let spans = (present.iter().map(|span| (span, true, false)))
            .chain(cut.iter().map(|span| (span, false, false)))
            .chain(absent.iter().map(|span| (span, false, true)));
        for (span, known, is_absent) in spans {
            let whole = span.start.next_multiple_of(PAGE)..span.end / PAGE * PAGE;
            let pages = whole.end.saturating_sub(whole.start) / PAGE;
            let is_left_out = is_absent && pages >= VAST;
            if is_absent {
                let bytes = span.end - span.start;
                let left_out = if is_left_out { pages } else { 0 };
                self.left_out_pages += left_out;
                self.absent
                    .add(bytes - left_out * PAGE, || format!("at {:#x}", span.start));
            }
            if !is_left_out && let Some(whole) = span.within(whole.clone()) {
                self.segments.push(Segment {
                    number: span.number,
                    start: whole.start,
                    pages,
                    content: if known {
                        Content::At(whole.offset)
                    } else {
                        Content::Unknown
                    },
                    flags: span.flags,
                    name: String::new(),
                });
            }
            // The parts before the first and after the last whole page; both may lie in one page.
            let head = span.within(0..whole.start);
            let tail = span.within(whole.end.max(whole.start)..u64::MAX);
            for part in head.iter().chain(&tail) {
                let page = part.start / PAGE * PAGE;
                odd.entry(page).or_default().add(part, known, page);
            }
        }
        for (start, page) in odd {
            let known: u64 = page.pieces.iter().map(|piece| piece.len).sum();
            let content = if page.unknown {
                let first = page.pieces.first().map_or(0, |piece| piece.at);
                self.partly_known
                    .add(known, || format!("at {:#x}", start + first));
                Content::Unknown
            } else {
                self.filled.add(PAGE - known, || {
                    format!("at {:#x}", start + page.first_gap())
                });
                Content::Pieces(page.pieces)
            };
            self.segments.push(Segment {
                number: page.number,
                start,
                pages: 1,
                content,
                flags: page.flags,
                name: String::new(),
            });
        }
        self.segments.sort_by_key(|segment| segment.start);
    }

    pub(super) fn remarks(&self) -> Vec<Remark> {
        let physical = self.virtual_flaw.map(|flaw| Remark {
            key: "source.addresses",
            value: "physical".into(),
            text: format!(
                "physical addresses are taken, because virtual ones {}",
                match flaw {
                    Flaw::PassEnd => "pass the end of the address space",
                    Flaw::Contradict => "contradict each other",
                }
            ),
            warning: false,
        });
        let absent = self.absent.remark(
            "source.absent_bytes",
            "of its memory are not in the dump (dumps of processes leave mapped files out); recorded \
             as unavailable",
        );
        // Every process dump by the kernel lacks some memory.
        let absent = absent.map(|remark| Remark {
            warning: !self.is_process,
            ..remark
        });
        let counted = [
            self.cut.remark(
                "source.cut_bytes",
                "are missing, because the file was cut short; recorded as unavailable",
            ),
            self.beyond.remark(
                "source.beyond_bytes",
                "lie in the file beyond the memory of their segments; left out",
            ),
            self.unaddressed.remark(
                "source.unaddressed_bytes",
                "have no physical address; left out",
            ),
            self.partly_known.remark(
                "source.partly_known_bytes",
                "belong to pages of which the dump lacks the rest; left out, the pages are recorded \
                 as unavailable",
            ),
            self.filled.remark(
                "source.filled_bytes",
                "belong to no memory, but to pages of which a part is memory; zeros were put there",
            ),
            absent,
            Remark::left_out(
                self.left_out_pages,
                "of its memory are not in the dump (64 GiB or more in a row, as sanitizers set aside)",
            ),
        ];
        physical
            .into_iter()
            .chain(counted.into_iter().flatten())
            .collect()
    }
}

/// The bytes of one segment, grouped by what the file has of them.
struct Spans {
    present: Option<Span>,
    /// Missing because the file is truncated.
    cut: Option<Span>,
    /// Never written to the file.
    absent: Option<Span>,
}

/// A page of which segments hold only parts.
#[derive(Default)]
struct Odd {
    number: usize,
    flags: u32,
    pieces: Vec<Piece>,
    /// Whether a segment names a part without having its bytes.
    unknown: bool,
}

impl Odd {
    /// Returns the offset of the first byte that no piece covers. The pieces are sorted.
    fn first_gap(&self) -> u64 {
        self.pieces.iter().fold(0, |end, piece| {
            if piece.at == end {
                end + piece.len
            } else {
                end
            }
        })
    }

    fn add(&mut self, part: &Span, known: bool, page: u64) {
        if self.pieces.is_empty() && !self.unknown {
            (self.number, self.flags) = (part.number, part.flags);
        }
        if known {
            self.pieces.push(Piece {
                at: part.start - page,
                len: part.end - part.start,
                offset: part.offset,
            });
        } else {
            self.unknown = true;
        }
    }
}

/// Sorts spans and removes from each what an earlier one has. Returns the overlaps as well.
fn taken_once(mut spans: Vec<Span>) -> Result<(Vec<Span>, Vec<Overlap>)> {
    spans.sort_by_key(|span| span.start);
    let mut taken: Vec<Span> = Vec::new();
    let mut overlaps = Vec::new();
    let mut looked_at = 0;
    for span in spans {
        let free = taken.last().map_or(0, |last| last.end);
        // Everything between the span's start and `free` is taken, because no earlier span starts
        // later.
        let first = taken.partition_point(|other| other.end <= span.start);
        for other in &taken[first..] {
            let Some(twice) = span.within(other.start..other.end) else {
                break;
            };
            looked_at += 1;
            if looked_at > MAX_OVERLAPS {
                bail!("its segments overlap in more than {MAX_OVERLAPS} places");
            }
            let offset = other.offset_of(twice.start);
            if offset != twice.offset {
                overlaps.push(Overlap {
                    start: twice.start,
                    len: twice.end - twice.start,
                    taken: (other.number, offset),
                    dropped: (span.number, twice.offset),
                });
            }
        }
        taken.extend(span.within(free..u64::MAX));
    }
    Ok((taken, overlaps))
}

/// Returns the parts of sorted spans that lie in none of `others`, which are sorted and disjoint.
fn without(spans: Vec<Span>, others: &[Span]) -> Vec<Span> {
    let mut left = Vec::new();
    let mut next = 0;
    for span in spans {
        // A span that ends before this one ends before all later ones too.
        while others.get(next).is_some_and(|o| o.end <= span.start) {
            next += 1;
        }
        let mut free = span.start;
        for other in &others[next..] {
            if other.start >= span.end {
                break;
            }
            left.extend(span.within(free..other.start));
            free = other.end;
        }
        left.extend(span.within(free..span.end));
    }
    left
}

#[cfg(test)]
mod tests;
