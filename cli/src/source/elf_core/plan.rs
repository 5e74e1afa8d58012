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
mod tests {
    use super::*;

    fn load(start: u64, file_bytes: u64, memory_bytes: u64, offset: u64) -> Load {
        Load {
            number: 0,
            vaddr: start,
            paddr: start,
            file_bytes,
            memory_bytes,
            offset,
            flags: 6,
        }
    }

    fn plan_of(loads: &[Load], kind: Kind, incomplete: bool) -> Result<Plan> {
        let notes = Notes {
            kind,
            ..Notes::default()
        };
        let mut plan = Plan::default();
        plan.make(loads, &notes, 1 << 30, incomplete)?;
        Ok(plan)
    }

    /// Returns the start, the page count, and the offset (if known) of each segment.
    fn planned(loads: &[Load]) -> Vec<(u64, u64, Option<u64>)> {
        let plan = plan_of(loads, Kind::Process, false).unwrap();
        let segments = plan.segments.iter().map(|segment| {
            let offset = match &segment.content {
                Content::At(offset) => Some(*offset),
                Content::Pieces(pieces) => Some(pieces[0].offset),
                Content::Unknown => None,
            };
            (segment.start, segment.pages, offset)
        });
        segments.collect()
    }

    #[test]
    fn memory_named_twice_is_taken_once_and_compared() {
        let loads = [
            load(0x5000, 0x3000, 0x3000, 0x9003),
            load(0x1000, 0x2000, 0x2000, 0x100),
            load(0x6000, 0x4000, 0x4000, 0x20000),
            load(0x1000, 0, 0x2000, 0),
        ];
        assert_eq!(
            planned(&loads),
            [
                (0x1000, 2, Some(0x100)),
                (0x5000, 3, Some(0x9003)),
                (0x8000, 2, Some(0x22000))
            ]
        );
        let plan = plan_of(&loads, Kind::Process, false).unwrap();
        assert_eq!(
            plan.overlaps,
            [Overlap {
                start: 0x6000,
                len: 0x2000,
                taken: (0, 0xa003),
                dropped: (0, 0x20000),
            }]
        );
        // Segments that name the same bytes of the file need no comparison.
        let loads = [
            load(0x1000, 0x4000, 0x4000, 0x100),
            load(0x2000, 0x4000, 0x4000, 0x1100),
            load(0x3000, 0x1000, 0x1000, 0x2100),
        ];
        assert_eq!(
            planned(&loads),
            [(0x1000, 4, Some(0x100)), (0x5000, 1, Some(0x4100))]
        );
        let plan = plan_of(&loads, Kind::Process, false).unwrap();
        assert_eq!(plan.overlaps, []);
    }

    #[test]
    fn overlaps_with_several_segments_are_all_found() {
        let loads = [
            load(0x1000, 0x2000, 0x2000, 0x100),
            load(0x2000, 0x2000, 0x2000, 0x10000),
            load(0x2800, 0x1000, 0x1000, 0x20000),
        ];
        let plan = plan_of(&loads, Kind::Process, false).unwrap();
        let overlaps: Vec<_> = plan.overlaps.iter().map(|o| (o.start, o.len)).collect();
        assert_eq!(
            overlaps,
            [(0x2000, 0x1000), (0x2800, 0x800), (0x3000, 0x800)]
        );
    }

    #[test]
    fn what_was_not_dumped_is_not_present() {
        assert_eq!(planned(&[load(0, 0, 0x4000, 0)]), [(0, 4, None)]);
        assert_eq!(
            planned(&[load(0, 0x1800, 0x4000, 7)]),
            [(0, 1, Some(7)), (0x1000, 1, None), (0x2000, 2, None)]
        );
        let plan = plan_of(&[load(0, 0x1800, 0x4000, 7)], Kind::Process, false).unwrap();
        assert_eq!(plan.partly_known.bytes, 0x800);
    }

    #[test]
    fn memory_is_no_longer_than_its_segment_says() {
        assert_eq!(planned(&[load(0, 0x3000, 0x1000, 7)]), [(0, 1, Some(7))]);
        let loads = [load(0, 0x3000, 0x1000, 7), load(0x5000, 0x100, 0, 7)];
        let plan = plan_of(&loads, Kind::Process, false).unwrap();
        assert_eq!(plan.segments.len(), 1);
        assert_eq!(plan.beyond.bytes, 0x2100);
        let remarks = plan.remarks();
        assert_eq!(remarks[0].key, "source.beyond_bytes");
        assert!(remarks[0].warning && remarks[0].text.contains("8,448 bytes"));
    }

    #[test]
    fn odd_pieces_become_whole_pages() {
        // All memory is present; it just doesn't fill its last page.
        assert_eq!(
            planned(&[load(0, 0x1800, 0x1800, 7)]),
            [(0, 1, Some(7)), (0x1000, 1, Some(0x1007))]
        );
        // Two segments meet inside a page, and one holds the middle of a page.
        let loads = [
            load(0x1080, 0x1000, 0x1000, 0x100),
            load(0x2080, 0xf80, 0xf80, 0x8000),
            load(0x5100, 0x10, 0x10, 0x9000),
        ];
        let plan = plan_of(&loads, Kind::Guest, false).unwrap();
        let pieces: Vec<_> = plan
            .segments
            .iter()
            .map(|segment| match &segment.content {
                Content::Pieces(pieces) => {
                    let pieces = pieces.iter().map(|p| (p.at, p.len, p.offset));
                    (segment.start, pieces.collect::<Vec<_>>())
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            pieces,
            [
                (0x1000, vec![(0x80, 0xf80, 0x100)]),
                (0x2000, vec![(0, 0x80, 0x1080), (0x80, 0xf80, 0x8000)]),
                (0x5000, vec![(0x100, 0x10, 0x9000)]),
            ]
        );
        assert_eq!(plan.filled.bytes, 0x80 + 0xff0);
        assert_eq!(plan.filled.first.as_deref(), Some("at 0x1000"));
        // The data is at the start, so the zeros follow it.
        let plan = plan_of(&[load(0x1000, 0x1800, 0x1800, 7)], Kind::Guest, false).unwrap();
        assert_eq!(plan.filled.first.as_deref(), Some("at 0x2800"));
    }

    #[test]
    fn bytes_that_one_segment_has_are_not_missed_for_another_that_has_none() {
        let loads = [
            load(0, 0, 0x8000, 0),
            load(0x2000, 0x1000, 0x1000, 9),
            load(0x4000, 0x1000, 0x2000, 99),
        ];
        assert_eq!(
            planned(&loads),
            [
                (0, 2, None),
                (0x2000, 1, Some(9)),
                (0x3000, 1, None),
                (0x4000, 1, Some(99)),
                (0x5000, 3, None),
            ]
        );
    }

    #[test]
    fn impossible_segments_are_refused() {
        for (bad, says) in [
            (load(VSYSCALL - 0x1000, 0x1000, 1 << 40, 0), "address space"),
            (load(u64::MAX, 0x1000, 0x1000, 0), "address space"),
            (load(0, 0x1000, 0x1000, 1 << 30), "--incomplete"),
            (load(0, 0x1000, 0x1000, u64::MAX), "--incomplete"),
        ] {
            let error = plan_of(&[bad], Kind::Process, false).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn of_a_core_that_was_cut_short_the_rest_is_unavailable() {
        let cut = load(0x1000, 0x4000, 0x4000, (1 << 30) - 0x2000);
        let plan = plan_of(&[cut], Kind::Process, true).unwrap();
        let pages: Vec<_> = plan
            .segments
            .iter()
            .map(|s| (s.start, s.pages, s.content == Content::Unknown))
            .collect();
        assert_eq!(pages, [(0x1000, 2, false), (0x3000, 2, true)]);
        assert_eq!(plan.cut.bytes, 0x2000);
    }

    #[test]
    fn addresses_are_taken_that_contradict_nothing() {
        let at = |vaddr, paddr, offset| Load {
            vaddr,
            paddr,
            ..load(0, 0x2000, 0x2000, offset)
        };
        // Several segments at one virtual address, or at the end of the address space.
        let physical = [at(0, 0, 0x1000), at(0, 0x10000, 0x3000)];
        let beyond = [at(u64::MAX, 0x1000, 0x1000), at(0x8000, 0x8000, 0x3000)];
        for (loads, of_virtual, says) in [
            (physical, Flaw::Contradict, "contradict each other"),
            (beyond, Flaw::PassEnd, "pass the end"),
        ] {
            assert_eq!(flaw(&loads, false), Some(of_virtual));
            assert_eq!(flaw(&loads, true), None);
            let plan = Plan {
                virtual_flaw: Some(of_virtual),
                ..Plan::default()
            };
            assert!(plan.remarks()[0].text.contains(says));
        }
        // A process, which has no physical addresses.
        let process = [at(0x1000, 0, 0x1000), at(0x8000, 0, 0x3000)];
        assert_eq!(flaw(&process, false), None);
        assert_eq!(flaw(&process, true), Some(Flaw::Contradict));
        // Two names for the same bytes of the file are no contradiction.
        let twice = [at(0x1000, 0, 0x1000), at(0x2000, 0, 0x2000)];
        assert_eq!(flaw(&twice, false), None);
    }

    #[test]
    fn memory_without_a_physical_address_is_left_out_with_a_warning() {
        let mapped = Load {
            paddr: u64::MAX,
            ..load(0x1000, 0x1000, 0x1000, 0)
        };
        let loads = [mapped, load(0x8000, 0x1000, 0x1000, 0x1000)];
        let plan = plan_of(&loads, Kind::Machine, false).unwrap();
        assert_eq!(plan.segments.len(), 1);
        assert_eq!(plan.unaddressed.bytes, 0x1000);
        assert!(plan.remarks()[0].text.contains("virtual address 0x1000"));
    }

    /// Checks that memory next to the page for obsolete system calls belongs to the process.
    #[test]
    fn only_the_page_for_obsolete_system_calls_is_no_memory() {
        let loads = [
            load(VSYSCALL, 0x1000, 0x1000, 0),
            load(VSYSCALL + 0x1000, 0x1000, 0x1000, 0x1000),
        ];
        assert_eq!(planned(&loads), [(VSYSCALL + 0x1000, 1, Some(0x1000))]);
        // A segment that begins there and is longer than the page.
        let longer = [load(VSYSCALL, 0x3000, 0x4000, 7)];
        assert_eq!(
            planned(&longer),
            [
                (VSYSCALL + 0x1000, 2, Some(0x1007)),
                (VSYSCALL + 0x3000, 1, None)
            ]
        );
    }

    #[test]
    fn vast_memory_without_bytes_is_left_out_and_told() {
        let vast = VAST * PAGE;
        let plan = |loads: &[Load], incomplete| plan_of(loads, Kind::Process, incomplete).unwrap();
        let some = load(0x1000, 0x1000, 0x2000, 7);
        let left_out = plan(&[some, load(0x10_0000, 0, vast, 0)], false);
        let starts: Vec<_> = left_out.segments.iter().map(|s| s.start).collect();
        assert_eq!(starts, [0x1000, 0x2000]);
        assert_eq!(
            (left_out.left_out_pages, left_out.absent.bytes),
            (VAST, 0x1000)
        );
        let remarks = left_out.remarks();
        assert_eq!(remarks[0].key, "source.absent_bytes");
        assert!(!remarks[0].warning && remarks[0].text.contains("at 0x2000"));
        assert_eq!(remarks[1].key, "source.left_out_bytes");
        assert_eq!(remarks[1].value, vast.to_string());
        assert!(remarks[1].warning);
        // With one page less, the memory is recorded as unavailable.
        let recorded = plan(&[some, load(0x10_0000, 0, vast - PAGE, 0)], false);
        assert_eq!((recorded.left_out_pages, recorded.segments.len()), (0, 3));
        // Memory that should be in the file keeps its place, however much of it is missing.
        let cut = plan(&[load(0x1000, vast, vast, (1 << 30) - PAGE)], true);
        assert_eq!((cut.left_out_pages, cut.absent.bytes), (0, 0));
        assert_eq!(cut.cut.bytes, vast - PAGE);
        assert_eq!(cut.segments.iter().map(|s| s.pages).sum::<u64>(), VAST);
        // A machine's core should contain all memory.
        let machine = plan_of(&[some], Kind::Machine, false).unwrap();
        assert!(machine.remarks()[0].warning);
    }
}
