//! The sections that the trailer's directory points to, parsed and checked.

mod blobs;
mod memory;

use std::collections::HashSet;

use crate::error::{Defect, Flaw};
use crate::index::Body;
use crate::layout::{
    self, MAX_BLOBS, MAX_DICTIONARIES, MAX_FILL_RUNS, MAX_NAME_BYTES, MAX_PAGES, MAX_REGIONS,
    MAX_SECTION_BYTES, PAGES_PER_BLOCK_U64, RawBlobEntry, RawRegionEntry, RawSectionEntry,
    RawTopEntry, SectionKind,
};

pub(crate) use blobs::{Blob, blobs};
pub(crate) use memory::{fill_runs, region_of, regions, working_set};

/// Returns whether `text` has a character that a terminal or a log could interpret as more than
/// text.
pub(crate) fn has_control(text: &str) -> bool {
    text.bytes().any(|byte| byte < b' ' || byte == 0x7f)
}

/// Returns whether `name` is allowed for an attachment or a working set. It must be usable as the
/// name of a file in a folder, because the blob is extracted under it, without control characters
/// and at most 4096 bytes long.
pub fn is_blob_name(name: &str) -> bool {
    is_file_name(name) && !has_control(name) && name.len() <= MAX_NAME_BYTES
}

fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains('/')
}

/// One section, checked against the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Section {
    pub(crate) number: u32,
    pub(crate) crc: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) count: u64,
}

/// All sections of a file; kinds that this version doesn't define are kept for the verifier.
#[derive(Debug)]
pub(crate) struct Directory {
    sections: Vec<Section>,
}

impl Directory {
    /// Returns the directory of a file that is not there.
    pub(crate) fn empty() -> Self {
        Self {
            sections: Vec::new(),
        }
    }

    /// Checks the used entries of the directory, which is at offset `at` in the file.
    /// `layered` says whether the file has the feature `ANCESTORS`.
    pub(crate) fn check(
        entries: &[RawSectionEntry],
        at: u64,
        body: Body,
        layered: bool,
    ) -> Result<Self, Flaw> {
        let mut sections = Vec::with_capacity(entries.len());
        let mut seen = HashSet::new();
        for (number, raw) in entries.iter().enumerate() {
            let at = at + (number * size_of::<RawSectionEntry>()) as u64;
            let section = check_section(raw, body).map_err(|defect| Flaw::new(at, defect))?;
            if !seen.insert(section.number) {
                let defect =
                    Defect::value("kind of a section", section.number, "each kind only once");
                return Err(Flaw::new(at, defect));
            }
            sections.push(section);
        }
        let mut by_offset: Vec<&Section> = sections.iter().filter(|s| s.len > 0).collect();
        by_offset.sort_by_key(|section| section.offset);
        for pair in by_offset.windows(2) {
            if pair[0].offset + pair[0].len > pair[1].offset {
                let defect = Defect::Overlap {
                    first: format!("section of kind {}", pair[0].number),
                    second: format!("section of kind {}", pair[1].number),
                };
                return Err(Flaw::new(at, defect));
            }
        }
        let directory = Self { sections };
        for needed in [SectionKind::Regions, SectionKind::Top] {
            if directory.get(needed).is_none() {
                let what = format!("{}", crate::error::Part::Section(needed));
                return Err(Flaw::new(at, Defect::Missing { what: what.into() }));
            }
        }
        match directory.get(SectionKind::Ancestors) {
            Some(_) if !layered => {
                let defect = Defect::value(
                    "kind of a section",
                    SectionKind::Ancestors as u32,
                    "no ancestors, as the file does not name the feature \"ancestors\"",
                );
                return Err(Flaw::new(at, defect));
            }
            Some(section) if section.count == 0 => {
                let defect = Defect::value("count of the ancestor section", 0u32, "at least 1");
                return Err(Flaw::new(at, defect));
            }
            None if layered => {
                let what = format!("{}", crate::error::Part::Section(SectionKind::Ancestors));
                return Err(Flaw::new(at, Defect::Missing { what: what.into() }));
            }
            Some(_) | None => {}
        }
        Ok(directory)
    }

    pub(crate) fn get(&self, kind: SectionKind) -> Option<&Section> {
        self.sections.iter().find(|s| s.number == kind as u32)
    }

    pub(crate) fn all(&self) -> &[Section] {
        &self.sections
    }
}

fn check_section(raw: &RawSectionEntry, body: Body) -> Result<Section, Defect> {
    let section = Section {
        number: raw.kind.get(),
        crc: raw.crc.get(),
        offset: raw.offset.get(),
        len: raw.len.get(),
        count: raw.count.get(),
    };
    if section.number == 0 {
        return Err(Defect::value("kind of a section", 0u32, "at least 1"));
    }
    if raw.reserved.get() != 0 {
        return Err(Defect::Reserved {
            field: "reserved bytes of a section entry",
        });
    }
    body.check("section", section.offset, section.len)?;
    let Some(kind) = SectionKind::from_number(section.number) else {
        return Ok(section);
    };
    // Bytes of a record, whether names follow the records, most records, most bytes.
    let (record, names, max_count, max_bytes) = match kind {
        SectionKind::Regions => (
            size_of::<RawRegionEntry>(),
            true,
            MAX_REGIONS,
            MAX_SECTION_BYTES,
        ),
        SectionKind::Top => (
            size_of::<RawTopEntry>(),
            false,
            MAX_PAGES / PAGES_PER_BLOCK_U64,
            u64::MAX,
        ),
        SectionKind::FillRuns => (
            size_of::<layout::RawFillRun>(),
            false,
            MAX_FILL_RUNS as u64,
            u64::MAX,
        ),
        SectionKind::Dictionaries => (
            size_of::<RawBlobEntry>(),
            false,
            MAX_DICTIONARIES as u64,
            u64::MAX,
        ),
        SectionKind::WorkingSets | SectionKind::Attachments => (
            size_of::<RawBlobEntry>(),
            true,
            MAX_BLOBS as u64,
            MAX_SECTION_BYTES,
        ),
        // Lines of text, which are counted when the section is read.
        SectionKind::Properties => (0, true, u64::MAX, layout::MAX_PROPERTIES_BYTES),
        SectionKind::Ancestors => (
            size_of::<layout::RawAncestorEntry>(),
            false,
            layout::MAX_ANCESTORS as u64,
            u64::MAX,
        ),
        SectionKind::BlockDigests => (32, false, MAX_PAGES / PAGES_PER_BLOCK_U64, u64::MAX),
    };
    for (field, value, limit) in [
        ("count of a section", section.count, max_count),
        ("length of a section", section.len, max_bytes),
    ] {
        if value > limit {
            return Err(Defect::TooLarge {
                field,
                value,
                limit,
            });
        }
    }
    let records = section.count.saturating_mul(record as u64);
    if section.len < records || (!names && section.len != records) {
        return Err(Defect::value(
            "length of a section",
            section.len,
            format!(
                "{}{records} bytes for its {} records",
                if names { "at least " } else { "" },
                section.count
            ),
        ));
    }
    Ok(section)
}

/// Reads names in the order of their records: each begins where the one before ends, and the last
/// ends with the section. So no name is read twice, and their total length is that of the section
/// at most.
struct Names<'a> {
    area: &'a [u8],
    used: usize,
}

impl<'a> Names<'a> {
    fn next(&mut self, field: &'static str, offset: u64, len: u32) -> Result<&'a str, Defect> {
        let len = len as usize;
        if len > MAX_NAME_BYTES {
            return Err(Defect::TooLarge {
                field,
                value: len as u64,
                limit: MAX_NAME_BYTES as u64,
            });
        }
        if offset != self.used as u64 {
            return Err(Defect::value(
                "name offset",
                offset,
                format!("{}, where the name before ends", self.used),
            ));
        }
        let Some(bytes) = self.area.get(self.used..self.used + len) else {
            return Err(Defect::OutOfBounds {
                field,
                offset,
                len: len as u64,
                from: 0,
                to: self.area.len() as u64,
            });
        };
        self.used += len;
        let refused = |detail: &'static str| Defect::Text {
            field,
            detail: detail.into(),
        };
        let name = std::str::from_utf8(bytes).map_err(|_| refused("not UTF-8"))?;
        if has_control(name) {
            return Err(refused("has a control character"));
        }
        Ok(name)
    }

    fn end(&self) -> Result<(), Defect> {
        if self.used == self.area.len() {
            return Ok(());
        }
        Err(Defect::value(
            "length of the names",
            self.area.len() as u64,
            format!("{}, their sum", self.used),
        ))
    }
}

/// Checks the property section: lines `key=value`, keys sorted and each only once.
pub(crate) fn properties(bytes: &[u8], section: &Section) -> Result<Vec<(String, String)>, Flaw> {
    let flaw = |detail: &'static str| {
        let defect = Defect::Text {
            field: "properties",
            detail: detail.into(),
        };
        Flaw::new(section.offset, defect)
    };
    let text = std::str::from_utf8(bytes).map_err(|_| flaw("not UTF-8"))?;
    if !text.is_empty() && !text.ends_with('\n') {
        return Err(flaw("the last line has no end"));
    }
    let mut properties: Vec<(String, String)> = Vec::new();
    for line in text.split_terminator('\n') {
        let (key, value) = line.split_once('=').ok_or(flaw("a line without ="))?;
        if key.is_empty() {
            return Err(flaw("a line without a key"));
        }
        if has_control(line) {
            return Err(flaw("a line has a control character"));
        }
        if properties
            .last()
            .is_some_and(|(last, _)| last.as_str() >= key)
        {
            return Err(flaw("keys are not sorted, or one appears twice"));
        }
        properties.push((key.to_owned(), value.to_owned()));
    }
    if properties.len() as u64 != section.count {
        return Err(Flaw::new(
            section.offset,
            Defect::value(
                "count of the property section",
                section.count,
                format!("{}, its lines", properties.len()),
            ),
        ));
    }
    Ok(properties)
}
