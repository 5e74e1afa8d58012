//! ELF cores: of processes (gcore, the kernel) and of guests (QEMU's dump-guest-memory).
//!
//! The two differ in what an address means. A process's core lists virtual ranges; memory that it
//! names without having its bytes (mapped files left out by the dump filter) is unavailable: what
//! it was isn't known, and zeros would be a lie. QEMU's lists guest-physical ranges in `p_paddr`;
//! with the paging option one physical range appears once for each virtual mapping, and is taken
//! once.

use std::ops::Range;

use anyhow::{Context as _, Result, anyhow, bail};
use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader as _};
use object::{Endianness, ReadCache};

use snapshot_format::layout::region_flags;

use super::extents::Extents;
use super::file::SourceFile;
use super::{PAGE, Region, Samples, Sampling, Sink, Source};
use crate::output::Output;
use crate::signals::Cancel;

/// Most program headers that are read: regions are bounded by the format as well.
const MAX_SEGMENTS: u32 = 1 << 20;
/// Most bytes of notes that are read. A thread's registers take a few KiB.
const MAX_NOTE_BYTES: u64 = 256 << 20;

/// Where the kernel shows processes its entry for obsolete system calls: no memory of theirs.
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;

/// Whether a file that starts with `start` is a core.
pub(super) fn is_core(start: &[u8]) -> bool {
    let little = match start {
        [0x7f, b'E', b'L', b'F', _, data, ..] => *data != elf::ELFDATA2MSB.0,
        _ => return false,
    };
    let kind = match start.get(16..18) {
        Some(&[a, b]) if little => u16::from_le_bytes([a, b]),
        Some(&[a, b]) => u16::from_be_bytes([a, b]),
        _ => return false,
    };
    kind == elf::ET_CORE.0
}

/// An opened core whose segments were checked.
#[derive(Debug)]
pub(crate) struct ElfCore {
    file: SourceFile,
    extents: Extents,
    segments: Vec<Segment>,
    guest: bool,
    output: Output,
    cancel: Cancel,
}

/// Pages of one segment, all of which are in the file, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    /// Its program header.
    number: usize,
    start: u64,
    pages: u64,
    present: bool,
    offset: u64,
    /// Bytes in the file: fewer than the pages have, if the last one is not whole.
    file_bytes: u64,
    flags: u32,
    name: String,
}

impl Segment {
    fn end(&self) -> u64 {
        self.start + self.pages * PAGE
    }

    /// The part of it that lies in `range`.
    fn within(&self, range: Range<u64>) -> Option<Self> {
        let start = self.start.max(range.start);
        let end = self.end().min(range.end);
        let gone = start.saturating_sub(self.start);
        let pages = end.saturating_sub(start) / PAGE;
        (pages > 0).then(|| Self {
            start,
            pages,
            offset: self.offset + gone,
            file_bytes: self.file_bytes.saturating_sub(gone).min(pages * PAGE),
            ..self.clone()
        })
    }
}

/// A loadable segment as the file states it.
#[derive(Clone, Copy, Debug)]
struct Load {
    number: usize,
    vaddr: u64,
    paddr: u64,
    file_bytes: u64,
    memory_bytes: u64,
    offset: u64,
    flags: u32,
}

/// What the notes tell.
#[derive(Debug, Default)]
struct Notes {
    qemu: bool,
    /// Mapped files of a process, by address.
    files: Vec<(Range<u64>, String)>,
}

impl Notes {
    /// What the memory at an address is called.
    fn name(&self, address: u64) -> String {
        if self.qemu {
            return "memory".into();
        }
        let after = self
            .files
            .partition_point(|(range, _)| range.start <= address);
        after
            .checked_sub(1)
            .map(|index| &self.files[index])
            .filter(|(range, _)| address < range.end)
            .map(|(_, name)| name.clone())
            .unwrap_or_default()
    }
}

impl ElfCore {
    pub(crate) fn open(file: SourceFile, output: Output, cancel: &Cancel) -> Result<Self> {
        let (loads, notes) = parse(&file)
            .map_err(|error| anyhow!("{}: damaged ELF core: {error:#}", file.path().display()))?;
        let segments = plan(&loads, &notes, file.len())
            .with_context(|| format!("{}: ELF core", file.path().display()))?;
        if segments.is_empty() {
            bail!("{}: the ELF core holds no memory", file.path().display());
        }
        Ok(Self {
            extents: file.extents()?,
            file,
            segments,
            guest: notes.qemu,
            output,
            cancel: cancel.clone(),
        })
    }
}

fn parse(file: &SourceFile) -> Result<(Vec<Load>, Notes)> {
    let mut start = [0; 5];
    file.read(&mut start, 0)?;
    let cache = ReadCache::new(file.as_file());
    if start[4] == elf::ELFCLASS32.0 {
        parse_class::<FileHeader32<Endianness>>(&cache)
    } else {
        parse_class::<FileHeader64<Endianness>>(&cache)
    }
}

fn parse_class<Elf: FileHeader<Endian = Endianness>>(
    cache: &ReadCache<&std::fs::File>,
) -> Result<(Vec<Load>, Notes)> {
    let header = Elf::parse(cache)?;
    let endian = header.endian()?;
    let count = header.phnum(endian, cache)?;
    if count > MAX_SEGMENTS {
        bail!("{count} program headers; at most {MAX_SEGMENTS} are read");
    }
    let mut loads = Vec::new();
    let mut notes = Notes::default();
    let mut note_bytes = 0_u64;
    for (number, segment) in header.program_headers(endian, cache)?.iter().enumerate() {
        match segment.p_type(endian) {
            elf::PT_LOAD => loads.push(Load {
                number,
                vaddr: segment.p_vaddr(endian).into(),
                paddr: segment.p_paddr(endian).into(),
                file_bytes: segment.p_filesz(endian).into(),
                memory_bytes: segment.p_memsz(endian).into(),
                offset: segment.p_offset(endian).into(),
                flags: segment.p_flags(endian).0,
            }),
            elf::PT_NOTE => {
                note_bytes = note_bytes.saturating_add(segment.p_filesz(endian).into());
                if note_bytes > MAX_NOTE_BYTES {
                    bail!("more than {MAX_NOTE_BYTES} bytes of notes");
                }
                let Some(mut all) = segment.notes(endian, cache)? else {
                    continue;
                };
                while let Some(note) = all.next()? {
                    if note.name() == b"QEMU" {
                        notes.qemu = true;
                    } else if note.name() == b"CORE" && note.n_type(endian) == elf::NT_FILE {
                        notes.files = mapped_files::<Elf>(note.desc(), endian)?;
                    }
                }
            }
            _ => {}
        }
    }
    notes.files.sort_by_key(|(range, _)| range.start);
    Ok((loads, notes))
}

/// Reads `NT_FILE`: a count, the unit of the offsets, three words for each mapping, then the names.
fn mapped_files<Elf: FileHeader<Endian = Endianness>>(
    note: &[u8],
    endian: Endianness,
) -> Result<Vec<(Range<u64>, String)>> {
    let width = size_of::<Elf::Word>();
    let word = |index: usize| -> Result<u64> {
        let bytes = index
            .checked_mul(width)
            .and_then(|at| note.get(at..at.checked_add(width)?))
            .context("its list of mapped files is cut short")?;
        let mut wide = [0; 8];
        let little = endian == Endianness::Little;
        if little {
            wide[..width].copy_from_slice(bytes);
            Ok(u64::from_le_bytes(wide))
        } else {
            wide[8 - width..].copy_from_slice(bytes);
            Ok(u64::from_be_bytes(wide))
        }
    };
    let count = usize::try_from(word(0)?)?;
    // Each mapping has its three words in the note, so the count meets the note's size first.
    if count > note.len() / (3 * width) {
        bail!("its list of mapped files is cut short");
    }
    let names = note.get((2 + 3 * count) * width..).unwrap_or_default();
    let mut names = names.split(|&byte| byte == 0);
    (0..count)
        .map(|index| {
            let name = names
                .next()
                .context("its list of mapped files is cut short")?;
            let range = word(2 + 3 * index)?..word(3 + 3 * index)?;
            Ok((range, String::from_utf8_lossy(name).into_owned()))
        })
        .collect()
}

/// Checks the segments against the file, sorts them, and takes memory that several name only once:
/// from one that has its bytes, if there is one.
fn plan(loads: &[Load], notes: &Notes, file_len: u64) -> Result<Vec<Segment>> {
    let (mut present, mut absent) = (Vec::new(), Vec::new());
    let memory = |load: &&Load| load.memory_bytes > 0 && (notes.qemu || load.vaddr < VSYSCALL);
    for load in loads.iter().filter(memory) {
        let (first, rest) = check(load, notes, file_len)?;
        present.extend(first);
        absent.extend(rest);
    }
    let present = taken_once(present);
    let absent = taken_once(absent);
    let mut all = Vec::new();
    let mut next = 0;
    for segment in absent {
        // Both are sorted: what ends before this one ends before all later ones.
        while present
            .get(next)
            .is_some_and(|p: &Segment| p.end() <= segment.start)
        {
            next += 1;
        }
        let mut free = segment.start;
        for other in &present[next..] {
            if other.start >= segment.end() {
                break;
            }
            all.extend(segment.within(free..other.start));
            free = other.end();
        }
        all.extend(segment.within(free..segment.end()));
    }
    all.extend(present);
    all.sort_by_key(|segment| segment.start);
    for segment in &mut all {
        segment.name = notes.name(segment.start);
    }
    Ok(all)
}

/// Sorts segments and cuts off what an earlier one has.
fn taken_once(mut segments: Vec<Segment>) -> Vec<Segment> {
    segments.sort_by_key(|segment| segment.start);
    let mut taken: Vec<Segment> = Vec::new();
    for segment in segments {
        let free = taken.last().map_or(0, Segment::end);
        taken.extend(segment.within(free..segment.end()));
    }
    taken
}

/// The part of a segment that the file has, and the part that it hasn't.
fn check(load: &Load, notes: &Notes, file_len: u64) -> Result<(Option<Segment>, Option<Segment>)> {
    let number = load.number;
    let start = if notes.qemu { load.paddr } else { load.vaddr };
    if start % PAGE != 0 {
        bail!("segment {number} starts at {start:#x}, which is no multiple of {PAGE}");
    }
    let memory_end = start
        .checked_add(load.memory_bytes)
        .and_then(|end| end.checked_next_multiple_of(PAGE))
        .with_context(|| format!("segment {number} passes the end of the address space"))?;
    // Whatever a file has beyond a segment's memory is no memory.
    let file_bytes = load.file_bytes.min(load.memory_bytes);
    if load
        .offset
        .checked_add(file_bytes)
        .is_none_or(|end| end > file_len)
    {
        bail!(
            "segment {number} ({start:#x}) needs {file_bytes} bytes at offset {}, but the file has \
             only {file_len}: it was cut short (disk full, or `ulimit -c`?)",
            load.offset
        );
    }
    let pages = (memory_end - start) / PAGE;
    let present = if file_bytes == load.memory_bytes {
        // All there; what is missing to a whole page lies outside of the memory.
        pages
    } else {
        // A page of which only a part is known is not known.
        file_bytes / PAGE
    };
    let flags = if notes.qemu {
        0
    } else {
        let bit = |elf: u32, ours: u32| if load.flags & elf != 0 { ours } else { 0 };
        bit(elf::PF_R.0, region_flags::READ)
            | bit(elf::PF_W.0, region_flags::WRITE)
            | bit(elf::PF_X.0, region_flags::EXECUTE)
    };
    let whole = Segment {
        number,
        start,
        pages,
        present: true,
        offset: load.offset,
        file_bytes,
        flags,
        name: String::new(),
    };
    let known = start + present * PAGE;
    let missing = Segment {
        present: false,
        file_bytes: 0,
        ..whole.clone()
    };
    Ok((
        whole.within(start..known),
        missing.within(known..memory_end),
    ))
}

impl Source for ElfCore {
    fn describe(&self) -> Vec<(String, String)> {
        let kind = if self.guest {
            "elf core of a guest"
        } else {
            "elf core of a process"
        };
        vec![
            ("source".into(), kind.into()),
            ("source.path".into(), self.file.path().display().to_string()),
        ]
    }

    fn pages(&self) -> Option<u64> {
        Some(self.segments.iter().map(|segment| segment.pages).sum())
    }

    fn sample(&mut self, wanted: &Sampling) -> Result<Samples> {
        let mut samples = Samples {
            all: self.segments.iter().map(|segment| segment.file_bytes).sum(),
            ..Samples::default()
        };
        if samples.all <= wanted.bytes as u64 {
            return Ok(samples);
        }
        // Every so many pages of all segments, a piece.
        let step = (samples.all / PAGE / wanted.pieces().max(1)).max(1);
        let mut piece = vec![0; wanted.piece];
        let (mut next, mut before) = (0, 0);
        for segment in &self.segments {
            let pages = segment.file_bytes / PAGE;
            while next < before + pages {
                let page = next - before;
                let len = usize::try_from((pages - page) * PAGE)?.min(piece.len());
                self.file
                    .read(&mut piece[..len], segment.offset + page * PAGE)?;
                samples.keep(&piece[..len]);
                next += step;
            }
            before += pages;
        }
        Ok(samples)
    }

    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()> {
        // Pieces of one segment are one region; of a guest, all memory that touches: QEMU cuts it
        // up by the mappings of the moment.
        let mut last: Option<&Segment> = None;
        for segment in &self.segments {
            let goes_on = last.is_some_and(|last| {
                last.end() == segment.start && (self.guest || last.number == segment.number)
            });
            last = Some(segment);
            if !goes_on {
                sink.region(&Region {
                    start: segment.start,
                    flags: segment.flags,
                    page_shift: 12,
                    name: segment.name.clone(),
                })?;
            }
            if !segment.present {
                sink.unavailable(segment.pages)?;
                continue;
            }
            let whole = segment.file_bytes / PAGE * PAGE;
            if whole > 0 {
                let range = segment.offset..segment.offset + whole;
                self.file.feed(&self.extents, range, sink, &self.cancel)?;
            }
            if whole < segment.file_bytes {
                let mut page = vec![0; usize::try_from(PAGE)?];
                let rest = usize::try_from(segment.file_bytes - whole)?;
                self.file.read(&mut page[..rest], segment.offset + whole)?;
                sink.pages(&page)?;
            }
        }
        self.file.check_unchanged(self.output)
    }
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

    fn planned(loads: &[Load]) -> Vec<(u64, u64, bool, u64)> {
        plan(loads, &Notes::default(), 1 << 30)
            .unwrap()
            .iter()
            .map(|s| (s.start, s.pages, s.present, s.offset))
            .collect()
    }

    #[test]
    fn memory_named_twice_is_taken_once() {
        let loads = [
            load(0x5000, 0x3000, 0x3000, 0x9003),
            load(0x1000, 0x2000, 0x2000, 0x100),
            load(0x6000, 0x4000, 0x4000, 0x20000),
            load(0x1000, 0, 0x2000, 0),
        ];
        assert_eq!(
            planned(&loads),
            [
                (0x1000, 2, true, 0x100),
                (0x5000, 3, true, 0x9003),
                (0x8000, 2, true, 0x22000)
            ]
        );
    }

    #[test]
    fn what_was_not_dumped_is_not_present() {
        assert_eq!(planned(&[load(0, 0, 0x4000, 0)]), [(0, 4, false, 0)]);
        assert_eq!(
            planned(&[load(0, 0x1800, 0x4000, 7)]),
            [(0, 1, true, 7), (0x1000, 3, false, 0x1007)]
        );
        // All of the memory is there; it just doesn't fill its last page.
        assert_eq!(planned(&[load(0, 0x1800, 0x1800, 7)]), [(0, 2, true, 7)]);
        // More in the file than in memory.
        assert_eq!(planned(&[load(0, 0x3000, 0x1000, 7)]), [(0, 1, true, 7)]);
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
                (0, 2, false, 0),
                (0x2000, 1, true, 9),
                (0x3000, 1, false, 0x3000),
                (0x4000, 1, true, 99),
                (0x5000, 3, false, 0x5000),
            ]
        );
    }

    #[test]
    fn impossible_segments_are_refused() {
        for (bad, says) in [
            (load(0x10, 1, 1, 0), "no multiple"),
            (load(VSYSCALL - 0x1000, 0x1000, 1 << 40, 0), "address space"),
            (load(0, 0x1000, 0x1000, 1 << 30), "cut short"),
            (load(0, 0x1000, 0x1000, u64::MAX), "cut short"),
        ] {
            let error = plan(&[bad], &Notes::default(), 1 << 30).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn only_cores_are_cores() {
        let core = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0";
        assert!(is_core(core));
        assert!(!is_core(&core[..17]));
        let mut program = *core;
        program[16] = 2;
        assert!(!is_core(&program));
    }
}
