//! The program headers and notes of a core, as stated in the file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use anyhow::{Context as _, Result, bail};
use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader as _};
use object::{Endianness, ReadCache};

use super::super::PAGE;
use super::super::file::SourceFile;
use crate::names;

/// Maximum number of program headers to read; the format bounds the number of regions as well.
const MAX_SEGMENTS: u32 = 1 << 20;
/// Maximum number of bytes of notes to read. The registers of a thread take a few KiB.
const MAX_NOTE_BYTES: u64 = 256 << 20;
/// Index of the byte with the format version in the file's identification.
const EI_VERSION: u64 = 6;

/// Kind of memory that a core holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    #[default]
    Process,
    /// Memory of a virtual machine, according to a note of its VMM.
    Guest,
    /// Memory of a physical machine, according to a note of its kernel or to its addresses.
    Machine,
}

impl Kind {
    /// Returns whether the memory is addressed by `p_paddr`.
    pub(super) fn is_physical(self) -> bool {
        self != Self::Process
    }
}

/// A loadable segment as stated in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) number: usize,
    pub(super) vaddr: u64,
    pub(super) paddr: u64,
    pub(super) file_bytes: u64,
    pub(super) memory_bytes: u64,
    pub(super) offset: u64,
    pub(super) flags: u32,
}

impl Load {
    pub(super) fn start(&self, physical: bool) -> u64 {
        if physical { self.paddr } else { self.vaddr }
    }

    /// Returns the segment without its first page.
    pub(super) fn without_first_page(&self) -> Self {
        Self {
            vaddr: self.vaddr.saturating_add(PAGE),
            paddr: self.paddr.saturating_add(PAGE),
            file_bytes: self.file_bytes.saturating_sub(PAGE),
            memory_bytes: self.memory_bytes.saturating_sub(PAGE),
            offset: self.offset.saturating_add(PAGE),
            ..*self
        }
    }

    /// Returns the number of bytes of its memory that the file should contain.
    pub(super) fn known_bytes(&self) -> u64 {
        self.file_bytes.min(self.memory_bytes)
    }
}

/// Contents of the notes.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) kind: Kind,
    /// Mapped files of a process, by address range.
    pub(super) files: Vec<(Range<u64>, String)>,
}

impl Notes {
    /// Returns the name of the memory at an address; empty if it has none.
    pub(super) fn name(&self, address: u64) -> String {
        if self.kind.is_physical() {
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

/// A file whose identification is presented with the current format version, which VirtualBox
/// leaves out.
struct Versioned<'a>(&'a File);

impl Read for Versioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let from = self.0.stream_position()?;
        let count = self.0.read(buffer)?;
        let at = EI_VERSION.checked_sub(from).map(usize::try_from);
        if let Some(Ok(at)) = at
            && let Some(version @ 0) = buffer[..count].get_mut(at)
        {
            *version = elf::EV_CURRENT.0;
        }
        Ok(count)
    }
}

impl Seek for Versioned<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

/// Reads the program headers and notes of a core.
pub(super) fn parse(file: &SourceFile) -> Result<(Vec<Load>, Notes)> {
    let mut start = [0; 5];
    file.read(&mut start, 0)?;
    let cache = ReadCache::new(Versioned(file.as_file()));
    if start[4] == elf::ELFCLASS32.0 {
        parse_class::<FileHeader32<Endianness>>(&cache)
    } else {
        parse_class::<FileHeader64<Endianness>>(&cache)
    }
}

fn parse_class<Elf: FileHeader<Endian = Endianness>>(
    cache: &ReadCache<Versioned<'_>>,
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
                    if matches!(note.name(), b"QEMU" | b"VBCORE") {
                        notes.kind = Kind::Guest;
                    } else if note.name() == b"VMCOREINFO" && notes.kind == Kind::Process {
                        notes.kind = Kind::Machine;
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

/// Parses `NT_FILE`: a count, the unit of the offsets, three words for each mapping, then the
/// names.
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
    // Each mapping takes three words of the note, so the note's size limits the count.
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
            Ok((range, names::stored(name)))
        })
        .collect()
}
