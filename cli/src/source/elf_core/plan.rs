//! Which bytes of a core are which pages: each byte of memory is taken once.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context as _, Result, bail};
use indicatif::HumanCount;
use object::elf;

use snapshot_format::layout::region_flags;

use super::super::{PAGE, Remark};
use super::headers::{Kind, Load, Notes};

/// Most places at which segments overlap that are looked at.
const MAX_OVERLAPS: u64 = 16 << 20;
/// Where the kernel shows processes its entry for obsolete system calls: no memory of theirs.
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;

/// Pages of one segment that are known in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Its program header.
    pub(super) number: usize,
    pub(super) start: u64,
    pub(super) pages: u64,
    pub(super) content: Content,
    pub(super) flags: u32,
    pub(super) name: String,
}

/// Where the bytes of pages are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// In the file, from this offset on.
    At(u64),
    /// One page, put together from parts of the file; what is between them is no memory.
    Pieces(Vec<Piece>),
    /// Nowhere.
    Unknown,
}

/// Part of a page.
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

/// Bytes of memory that one segment names, all of which are in the file, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) number: usize,
    pub(super) start: u64,
    pub(super) end: u64,
    /// Offset of its first byte in the file.
    pub(super) offset: u64,
    pub(super) flags: u32,
}

impl Span {
    pub(super) fn offset_of(&self, address: u64) -> u64 {
        self.offset.wrapping_add(address - self.start)
    }

    /// The part of it that lies in `range`.
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

/// Memory that two segments hold, in different places of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Overlap {
    pub(super) start: u64,
    pub(super) len: u64,
    /// Segments and offsets.
    pub(super) taken: (usize, u64),
    pub(super) dropped: (usize, u64),
}

/// Whether the addresses of one kind can be those of the segments: they stay within the address
/// space, and no two segments hold the same memory in different places of the file.
pub(super) fn is_usable(loads: &[Load], physical: bool) -> bool {
    let mut spans = Vec::new();
    for load in loads.iter().filter(|load| load.known_bytes() > 0) {
        let start = load.start(physical);
        let Some(end) = start.checked_add(load.known_bytes()) else {
            return false;
        };
        spans.push((start, end, load.offset.wrapping_sub(start)));
    }
    spans.sort_unstable();
    let mut last: Option<(u64, u64)> = None;
    for (start, end, place) in spans {
        match &mut last {
            Some((taken, of)) if start < *taken => {
                if *of != place {
                    return false;
                }
                *taken = end.max(*taken);
            }
            _ => last = Some((end, place)),
        }
    }
    true
}

/// What is taken of a core, and what isn't.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) segments: Vec<Segment>,
    pub(super) overlaps: Vec<Overlap>,
    /// Virtual addresses contradict each other, so physical ones are taken.
    pub(super) contradicting: bool,
    beyond: Counted,
    unaddressed: Counted,
    cut: Counted,
    partly_known: Counted,
    filled: Counted,
}

/// Bytes, and where the first of them are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    bytes: u64,
    first: Option<String>,
}

impl Counted {
    fn add(&mut self, bytes: u64, place: impl FnOnce() -> String) {
        self.bytes += bytes;
        self.first.get_or_insert_with(place);
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
    /// Takes each byte of memory once: from a segment that has it, if there is one.
    pub(super) fn make(
        &mut self,
        loads: &[Load],
        notes: &Notes,
        file_len: u64,
        incomplete: bool,
    ) -> Result<()> {
        let (mut present, mut absent) = (Vec::new(), Vec::new());
        for load in loads {
            let spans = self.spans(load, notes.kind, file_len, incomplete)?;
            present.extend(spans.0);
            absent.extend(spans.1);
        }
        let (present, overlaps) = taken_once(present)?;
        self.overlaps = overlaps;
        let (absent, _) = taken_once(absent)?;
        let absent = without(absent, &present);
        self.cut_into_pages(&present, &absent);
        for segment in &mut self.segments {
            segment.name = notes.name(segment.start);
        }
        Ok(())
    }

    /// The bytes of a segment that the file has, and those that it hasn't.
    fn spans(
        &mut self,
        load: &Load,
        kind: Kind,
        file_len: u64,
        incomplete: bool,
    ) -> Result<(Option<Span>, Option<Span>)> {
        let (number, start) = (load.number, load.start(kind.is_physical()));
        if !kind.is_physical() && start == VSYSCALL {
            return Ok((None, None));
        }
        let known = load.known_bytes();
        if load.file_bytes > known {
            let beyond = load.file_bytes - known;
            self.beyond.add(beyond, || format!("of segment {number}"));
        }
        if load.memory_bytes == 0 {
            return Ok((None, None));
        }
        // What the kernel has mapped elsewhere, or what is no RAM, has all bits set.
        if kind.is_physical() && (start == u64::MAX || start == u64::from(u32::MAX)) {
            if known > 0 {
                let place = || format!("of segment {number}, virtual address {:#x}", load.vaddr);
                self.unaddressed.add(known, place);
            }
            return Ok((None, None));
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
        Ok((
            whole.within(start..start + there),
            whole.within(start + there..end),
        ))
    }

    /// Makes whole pages of spans that are sorted and disjoint.
    fn cut_into_pages(&mut self, present: &[Span], absent: &[Span]) {
        let mut odd: BTreeMap<u64, Odd> = BTreeMap::new();
        for (spans, known) in [(present, true), (absent, false)] {
            for span in spans {
                let whole = span.start.next_multiple_of(PAGE)..span.end / PAGE * PAGE;
                if let Some(whole) = span.within(whole.clone()) {
                    self.segments.push(Segment {
                        number: span.number,
                        start: whole.start,
                        pages: (whole.end - whole.start) / PAGE,
                        content: if known {
                            Content::At(whole.offset)
                        } else {
                            Content::Unknown
                        },
                        flags: span.flags,
                        name: String::new(),
                    });
                }
                // Before the first whole page and behind the last, which may be one page.
                let head = span.within(0..whole.start);
                let tail = span.within(whole.end.max(whole.start)..u64::MAX);
                for part in head.iter().chain(&tail) {
                    let page = part.start / PAGE * PAGE;
                    odd.entry(page).or_default().add(part, known, page);
                }
            }
        }
        for (start, page) in odd {
            let known: u64 = page.pieces.iter().map(|piece| piece.len).sum();
            let place = || format!("at {:#x}", start + page.pieces.first().map_or(0, |p| p.at));
            let content = if page.unknown {
                if known > 0 {
                    self.partly_known.add(known, place);
                }
                Content::Unknown
            } else {
                if known < PAGE {
                    self.filled.add(PAGE - known, place);
                }
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
        let physical = self.contradicting.then(|| Remark {
            key: "source.addresses",
            value: "physical".into(),
            text: "physical addresses are taken, because virtual ones contradict each other".into(),
            warning: false,
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
        ];
        physical
            .into_iter()
            .chain(counted.into_iter().flatten())
            .collect()
    }
}

/// A page of which a segment has a part.
#[derive(Default)]
struct Odd {
    number: usize,
    flags: u32,
    pieces: Vec<Piece>,
    /// Whether a segment names a part without having its bytes.
    unknown: bool,
}

impl Odd {
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

/// Sorts spans and cuts off what an earlier one has.
fn taken_once(mut spans: Vec<Span>) -> Result<(Vec<Span>, Vec<Overlap>)> {
    spans.sort_by_key(|span| span.start);
    let mut taken: Vec<Span> = Vec::new();
    let mut overlaps = Vec::new();
    let mut looked_at = 0;
    for span in spans {
        let free = taken.last().map_or(0, |last| last.end);
        // Whatever lies between its start and `free` is taken, because no earlier one starts later.
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

/// The parts of sorted spans that lie in none of `others`, which are sorted and disjoint, too.
fn without(spans: Vec<Span>, others: &[Span]) -> Vec<Span> {
    let mut left = Vec::new();
    let mut next = 0;
    for span in spans {
        // What ends before this one ends before all later ones.
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

    /// Start, pages, and offset if they are known, of each segment.
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
        // One place of the file under several names needs no comparison.
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
        // All of the memory is there; it just doesn't fill its last page.
        assert_eq!(
            planned(&[load(0, 0x1800, 0x1800, 7)]),
            [(0, 1, Some(7)), (0x1000, 1, Some(0x1007))]
        );
        // Two segments that meet inside of a page, and one that has a page's middle.
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
        assert_eq!(plan.filled.first.as_deref(), Some("at 0x1080"));
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
        for loads in [physical, beyond] {
            assert!(!is_usable(&loads, false) && is_usable(&loads, true));
        }
        // A process, which has no physical addresses.
        let process = [at(0x1000, 0, 0x1000), at(0x8000, 0, 0x3000)];
        assert!(is_usable(&process, false) && !is_usable(&process, true));
        // One place of the file under two names contradicts nothing.
        let twice = [at(0x1000, 0, 0x1000), at(0x2000, 0, 0x2000)];
        assert!(is_usable(&twice, false));
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

    /// What lies near the page for obsolete system calls is memory of the process.
    #[test]
    fn only_the_page_for_obsolete_system_calls_is_no_memory() {
        let loads = [
            load(VSYSCALL, 0x1000, 0x1000, 0),
            load(VSYSCALL + 0x1000, 0x1000, 0x1000, 0x1000),
        ];
        assert_eq!(planned(&loads), [(VSYSCALL + 0x1000, 1, Some(0x1000))]);
    }
}
