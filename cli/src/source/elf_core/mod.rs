//! ELF cores of processes (gcore, the kernel) and of whole machines (QEMU's dump-guest-memory,
//! VirtualBox's dumpvmcore, a crashed kernel's vmcore).
//!
//! The two differ in the meaning of an address. A process's core lists virtual ranges. Memory that
//! it names without having the bytes (mapped files left out by the dump filter) is unavailable: its
//! content is unknown, and zeros would be wrong. 64 GiB or more of it in a row, as sanitizers
//! reserve, are left out.
//!
//! A machine's core lists physical ranges in `p_paddr`, and its `p_vaddr` may hold anything: with
//! QEMU's paging option, one physical range appears once for each virtual mapping. A note tells the
//! two kinds apart. Without one, physical addresses are used if they are consistent and the virtual
//! ones contradict each other or pass the end of the address space.
//!
//! ```text
//! program headers -> spans of bytes -> overlaps are compared, each byte is taken once
//!                                   -> whole pages, and pages put together from odd pieces
//! ```
//!
//! Nothing is left out without a remark. If two segments hold different bytes for the same memory,
//! that is an error.

mod headers;
mod plan;

use anyhow::{Context as _, Result, anyhow, bail};
use object::elf;

use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use super::extents::Extents;
use super::file::SourceFile;
use super::{CHUNK, PAGE, Region, Remark, Samples, Sampling, Sink, Source};
use crate::args::Holes;
use crate::names;
use crate::output::count;
use crate::signals::Cancel;

use headers::{Kind, parse};
use plan::{Content, Overlap, Plan, Segment, flaw};

/// Returns whether a file that starts with `start` is a core.
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

/// An opened core with checked segments.
#[derive(Debug)]
pub(crate) struct ElfCore {
    file: SourceFile,
    extents: Extents,
    segments: Vec<Segment>,
    kind: Kind,
    remarks: Vec<Remark>,
    cancel: Cancel,
}

impl ElfCore {
    pub(crate) fn open(file: SourceFile, incomplete: bool, cancel: &Cancel) -> Result<Self> {
        let named = || names::path(file.path());
        let (loads, mut notes) =
            parse(&file).map_err(|error| anyhow!("{}: damaged ELF core: {error:#}", named()))?;
        let of_core = || format!("{}: ELF core", named());
        let mut plan = Plan::default();
        if notes.kind == Kind::Process && flaw(&loads, true).is_none() {
            plan.virtual_flaw = flaw(&loads, false);
            if plan.virtual_flaw.is_some() {
                notes.kind = Kind::Machine;
            }
        }
        plan.make(&loads, &notes, file.len(), incomplete)
            .with_context(of_core)?;
        if plan.segments.is_empty() {
            let why = plan.remarks().into_iter().map(|remark| remark.text);
            let why: Vec<_> = std::iter::once("the ELF core holds no memory".into())
                .chain(why)
                .collect();
            bail!("{}: {}", named(), why.join("; "));
        }
        compare(&file, &plan.overlaps, cancel).with_context(of_core)?;
        Ok(Self {
            extents: file.extents()?,
            file,
            remarks: plan.remarks(),
            segments: plan.segments,
            kind: notes.kind,
            cancel: cancel.clone(),
        })
    }

    /// Returns the segments in order, each with whether it begins a region. In a process's core,
    /// the pieces of one segment form one region. In a machine's core, all adjacent memory does,
    /// because QEMU splits it by the mappings at the time of the dump.
    fn in_regions(&self) -> impl Iterator<Item = (&Segment, bool)> {
        let before = std::iter::once(None).chain(self.segments.iter().map(Some));
        self.segments.iter().zip(before).map(|(segment, before)| {
            let continues = before.is_some_and(|last| {
                last.end() == segment.start
                    && (self.kind.is_physical() || last.number == segment.number)
            });
            (segment, !continues)
        })
    }
}

/// Checks that memory held by two segments is the same in both.
fn compare(file: &SourceFile, overlaps: &[Overlap], cancel: &Cancel) -> Result<()> {
    // Segments that don't share bytes of the file hold no more bytes than the file.
    let twice = overlaps.iter().map(|overlap| u128::from(overlap.len));
    if twice.sum::<u128>() > u128::from(file.len()) {
        bail!("its segments hold more bytes at addresses of others than the file has");
    }
    let (mut one, mut other) = (vec![0; CHUNK], vec![0; CHUNK]);
    for overlap in overlaps {
        let mut done = 0;
        while done < overlap.len {
            cancel.check()?;
            let len = usize::try_from((overlap.len - done).min(CHUNK as u64))?;
            let (one, other) = (&mut one[..len], &mut other[..len]);
            file.read(one, overlap.taken.1 + done)?;
            file.read(other, overlap.dropped.1 + done)?;
            if let Some(at) = one.iter().zip(other.iter()).position(|(a, b)| a != b) {
                bail!(
                    "segments {} and {} both hold the {} from {:#x} on, and differ at {:#x}: the \
                     dump contradicts itself, so take another; --raw packs the file as it is",
                    overlap.taken.0,
                    overlap.dropped.0,
                    count(overlap.len, "byte"),
                    overlap.start,
                    overlap.start + done + at as u64
                );
            }
            done += len as u64;
        }
    }
    Ok(())
}

impl Source for ElfCore {
    fn describe(&self) -> Vec<(String, String)> {
        let kind = match self.kind {
            Kind::Process => "elf core of a process",
            Kind::Guest => "elf core of a guest",
            Kind::Machine => "elf core of a machine",
        };
        vec![
            ("source".into(), kind.into()),
            ("source.path".into(), names::path(self.file.path())),
        ]
    }

    fn pages(&self) -> Option<u64> {
        Some(self.segments.iter().map(|segment| segment.pages).sum())
    }

    fn page_slots(&self) -> Option<u64> {
        let (mut slots, mut region) = (0_u64, 0_u64);
        for (segment, begins_region) in self.in_regions() {
            if begins_region {
                slots += std::mem::take(&mut region).next_multiple_of(PAGES_PER_BLOCK_U64);
            }
            region += segment.pages;
        }
        Some(slots + region.next_multiple_of(PAGES_PER_BLOCK_U64))
    }

    fn sample(&mut self, wanted: &Sampling) -> Result<Samples> {
        // Pages put together from pieces are too few to matter.
        let known = || {
            self.segments.iter().filter_map(|segment| {
                if let Content::At(offset) = segment.content {
                    Some((segment.pages, offset))
                } else {
                    None
                }
            })
        };
        let mut samples = Samples {
            all: known().map(|(pages, _)| pages * PAGE).sum(),
            ..Samples::default()
        };
        if samples.all <= wanted.bytes as u64 {
            return Ok(samples);
        }
        // Takes one piece at regular intervals over the pages of all segments.
        let step = (samples.all / PAGE / wanted.pieces().max(1)).max(1);
        let mut piece = vec![0; wanted.piece];
        let (mut next, mut before) = (0, 0);
        for (pages, offset) in known() {
            while next < before + pages {
                let page = next - before;
                let len = usize::try_from((pages - page) * PAGE)?.min(piece.len());
                self.file.read(&mut piece[..len], offset + page * PAGE)?;
                samples.keep(&piece[..len]);
                next += step;
            }
            before += pages;
        }
        Ok(samples)
    }

    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()> {
        for (segment, begins_region) in self.in_regions() {
            if begins_region {
                sink.region(&Region {
                    start: segment.start,
                    flags: segment.flags,
                    page_shift: 12,
                    name: segment.name.clone(),
                })?;
            }
            match &segment.content {
                Content::Unknown => sink.unavailable(segment.pages)?,
                Content::At(offset) => {
                    let range = *offset..*offset + segment.pages * PAGE;
                    self.file
                        .feed(&self.extents, range, Holes::Zero, sink, &self.cancel)?;
                }
                Content::Pieces(pieces) => {
                    let mut page = vec![0; usize::try_from(PAGE)?];
                    for piece in pieces {
                        let at = usize::try_from(piece.at)?;
                        let len = usize::try_from(piece.len)?;
                        self.file.read(&mut page[at..at + len], piece.offset)?;
                    }
                    sink.pages(&page)?;
                }
            }
        }
        self.remarks.extend(self.file.check_unchanged()?);
        Ok(())
    }

    fn remarks(&self) -> Vec<Remark> {
        self.remarks.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_elf_cores_are_recognised() {
        let core = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0";
        assert!(is_core(core));
        assert!(!is_core(&core[..17]));
        let mut program = *core;
        program[16] = 2;
        assert!(!is_core(&program));
    }
}
