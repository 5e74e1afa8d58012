//! The sections: what the trailer's directory points to, taken apart and checked.

use std::collections::HashSet;

use crate::error::{Defect, Flaw};
use crate::index::{Body, records};
use crate::layout::{
    self, BlobEntry, MAX_BLOBS, MAX_DICTIONARIES, MAX_DICTIONARY_BYTES, MAX_FILL_RUNS,
    MAX_NAME_BYTES, MAX_PAGES, MAX_REGIONS, MAX_SECTION_BYTES, PAGE_SIZE_U64, PAGES_PER_BLOCK_U64,
    RegionEntry, SectionEntry, SectionKind, TopEntry, region_flags,
};
use crate::types::{FillRun, Region, WorkingSetRun};

/// Whether `text` has a character that a terminal or a log could take for more than text.
pub(crate) fn has_control(text: &str) -> bool {
    text.bytes().any(|byte| byte < b' ' || byte == 0x7f)
}

/// Whether `name` can be the name of a file in a folder: what blobs are called, because that is
/// where they are extracted to.
pub(crate) fn is_file_name(name: &str) -> bool {
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
    /// Checks the used entries of the directory, which lies in the file at `at`.
    pub(crate) fn check(entries: &[SectionEntry], at: u64, body: Body) -> Result<Self, Flaw> {
        let mut sections = Vec::with_capacity(entries.len());
        let mut seen = HashSet::new();
        for (number, raw) in entries.iter().enumerate() {
            let at = at + (number * size_of::<SectionEntry>()) as u64;
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
        if directory.get(SectionKind::Ancestors).is_some() {
            let defect = Defect::value(
                "kind of a section",
                SectionKind::Ancestors as u32,
                "no ancestors, as the file does not name the feature \"ancestors\"",
            );
            return Err(Flaw::new(at, defect));
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

fn check_section(raw: &SectionEntry, body: Body) -> Result<Section, Defect> {
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
            size_of::<RegionEntry>(),
            true,
            MAX_REGIONS,
            MAX_SECTION_BYTES,
        ),
        SectionKind::Top => (
            size_of::<TopEntry>(),
            false,
            MAX_PAGES / PAGES_PER_BLOCK_U64,
            u64::MAX,
        ),
        SectionKind::FillRuns => (
            size_of::<layout::FillRun>(),
            false,
            MAX_FILL_RUNS as u64,
            u64::MAX,
        ),
        SectionKind::Dictionaries => (
            size_of::<BlobEntry>(),
            false,
            MAX_DICTIONARIES as u64,
            u64::MAX,
        ),
        SectionKind::WorkingSets | SectionKind::Attachments => (
            size_of::<BlobEntry>(),
            true,
            MAX_BLOBS as u64,
            MAX_SECTION_BYTES,
        ),
        // Lines of text: at least a byte for the key, the equals sign and the end of the line.
        SectionKind::Properties => (3, true, u64::MAX, layout::MAX_PROPERTIES_BYTES),
        SectionKind::Ancestors => (
            size_of::<layout::AncestorEntry>(),
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

/// Takes names in the order of their records: each begins where the one before ends, and the last
/// ends with the section. So no name is read twice, and their sum is no longer than the section.
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

/// Checks the region section: regions in the order of page numbers, each beginning at the first
/// index block that the one before doesn't use, and together as large as top table and summary say.
pub(crate) fn regions(
    bytes: &[u8],
    section: &Section,
    blocks: u64,
    pages: u64,
) -> Result<Vec<Region>, Flaw> {
    // `check_section` has made sure that the records are there.
    let split = usize::try_from(section.count).unwrap_or(usize::MAX) * size_of::<RegionEntry>();
    let (entries, area) = bytes.split_at(split.min(bytes.len()));
    let mut names = Names { area, used: 0 };
    let mut regions = Vec::new();
    let mut next_page = 0;
    let mut total = 0;
    for (number, raw) in records::<RegionEntry>(entries).iter().enumerate() {
        let at = section.offset + (number * size_of::<RegionEntry>()) as u64;
        let region =
            check_region(raw, next_page, &mut names).map_err(|defect| Flaw::new(at, defect))?;
        // Both are at most `MAX_PAGES` plus a block: `check_region` has looked.
        next_page = (region.first_page + region.pages).next_multiple_of(PAGES_PER_BLOCK_U64);
        total += region.pages;
        regions.push(region);
    }
    let ends = || {
        names.end()?;
        if next_page != blocks * PAGES_PER_BLOCK_U64 {
            return Err(Defect::value(
                "number of index blocks of all regions",
                next_page / PAGES_PER_BLOCK_U64,
                format!("{blocks}, the entries of the top table"),
            ));
        }
        if total != pages {
            return Err(Defect::value(
                "pages of all regions",
                total,
                format!("{pages}, as the summary says"),
            ));
        }
        Ok(())
    };
    ends().map_err(|defect| Flaw::new(section.offset, defect))?;
    Ok(regions)
}

fn check_region(
    raw: &RegionEntry,
    next_page: u64,
    names: &mut Names<'_>,
) -> Result<Region, Defect> {
    let (start, pages) = (raw.start.get(), raw.pages.get());
    if raw.reserved.get() != 0 {
        return Err(Defect::Reserved {
            field: "reserved bytes of a region",
        });
    }
    let unknown = raw.flags.get() & !(region_flags::KNOWN | region_flags::HINTS);
    if unknown != 0 {
        return Err(Defect::value(
            "flags of a region",
            raw.flags.get(),
            "bits 0, 1, 2, 8 and 16 to 31",
        ));
    }
    if raw.first_page.get() != next_page {
        return Err(Defect::value(
            "first page of a region",
            raw.first_page.get(),
            format!("{next_page}"),
        ));
    }
    if next_page
        .checked_add(pages)
        .is_none_or(|end| end > MAX_PAGES)
    {
        return Err(Defect::TooLarge {
            field: "pages of a region",
            value: pages,
            limit: MAX_PAGES.saturating_sub(next_page),
        });
    }
    // The last byte's address must be a number; a region may end where the numbers do.
    let room = u64::MAX - start;
    if !start.is_multiple_of(PAGE_SIZE_U64) || (pages > 0 && pages * PAGE_SIZE_U64 - 1 > room) {
        return Err(Defect::value(
            "start of a region",
            start,
            "a multiple of 4096 with room for the pages below 2^64",
        ));
    }
    let page_shift = raw.page_shift.get();
    if !(12..=40).contains(&page_shift) {
        return Err(Defect::value(
            "page shift of a region",
            page_shift,
            "12 to 40",
        ));
    }
    let name = names.next(
        "name of a region",
        raw.name_offset.get(),
        raw.name_len.get(),
    )?;
    Ok(Region {
        space: raw.space.get(),
        // Hints that this version doesn't know are left out.
        flags: raw.flags.get() & region_flags::KNOWN,
        start,
        pages,
        first_page: next_page,
        page_shift,
        name: name.to_owned(),
    })
}

/// The region that `page` belongs to, if any; `regions` are in the order of page numbers.
pub(crate) fn region_of(regions: &[Region], page: u64) -> Option<&Region> {
    let after = regions.partition_point(|region| region.first_page <= page);
    let region = &regions[after.checked_sub(1)?];
    (page < region.first_page + region.pages).then_some(region)
}

/// Checks the fill runs: longest first, apart from each other, each within one region.
pub(crate) fn fill_runs(
    bytes: &[u8],
    section: &Section,
    regions: &[Region],
) -> Result<Vec<FillRun>, Flaw> {
    let mut runs: Vec<FillRun> = Vec::new();
    for (number, raw) in records::<layout::FillRun>(bytes).iter().enumerate() {
        let run = FillRun {
            first_page: raw.first_page.get(),
            pages: raw.pages.get(),
            word: raw.word.get(),
        };
        let at = section.offset + (number * size_of::<layout::FillRun>()) as u64;
        let longest = runs.last().map_or(u64::MAX, |last| last.pages);
        check_fill_run(run, longest, regions).map_err(|defect| Flaw::new(at, defect))?;
        runs.push(run);
    }
    let mut in_order = runs.clone();
    in_order.sort_by_key(|run| run.first_page);
    for pair in in_order.windows(2) {
        if pair[0].first_page + pair[0].pages > pair[1].first_page {
            let defect = Defect::Overlap {
                first: format!("fill run at page {}", pair[0].first_page),
                second: format!("fill run at page {}", pair[1].first_page),
            };
            return Err(Flaw::new(section.offset, defect));
        }
    }
    Ok(runs)
}

fn check_fill_run(run: FillRun, longest: u64, regions: &[Region]) -> Result<(), Defect> {
    if run.pages == 0 || run.pages > longest {
        return Err(Defect::value(
            "pages of a fill run",
            run.pages,
            "at least 1 and no more than the run before",
        ));
    }
    let region = region_of(regions, run.first_page);
    let (from, to) = region.map_or((0, 0), |r| (r.first_page, r.first_page + r.pages));
    if run
        .first_page
        .checked_add(run.pages)
        .is_none_or(|end| end > to)
    {
        return Err(Defect::OutOfBounds {
            field: "pages of a fill run",
            offset: run.first_page,
            len: run.pages,
            from,
            to,
        });
    }
    Ok(())
}

/// One blob of a table section, checked against the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) crc: u32,
    pub(crate) tag: u32,
    pub(crate) name: String,
}

/// Checks a table of blobs. Dictionaries have a number and no name, all others a name and no
/// number; neither appears twice.
pub(crate) fn blobs(
    bytes: &[u8],
    section: &Section,
    kind: SectionKind,
    body: Body,
) -> Result<Vec<Blob>, Flaw> {
    let split = usize::try_from(section.count).unwrap_or(usize::MAX) * size_of::<BlobEntry>();
    let (entries, area) = bytes.split_at(split.min(bytes.len()));
    let mut names = Names { area, used: 0 };
    let mut seen = HashSet::new();
    let mut blobs = Vec::new();
    for (number, raw) in records::<BlobEntry>(entries).iter().enumerate() {
        let at = section.offset + (number * size_of::<BlobEntry>()) as u64;
        let blob =
            check_blob(raw, kind, body, &mut names).map_err(|defect| Flaw::new(at, defect))?;
        if !seen.insert((blob.tag, blob.name.clone())) {
            let defect = Defect::Text {
                field: "name or number of a blob",
                detail: "appears twice".into(),
            };
            return Err(Flaw::new(at, defect));
        }
        blobs.push(blob);
    }
    names
        .end()
        .and_then(|()| check_together(&blobs, kind))
        .map_err(|defect| Flaw::new(section.offset, defect))?;
    Ok(blobs)
}

/// That the blobs of one section lie apart, and that all working sets together are bounded: without
/// either a small file could ask for any amount of reading and memory.
fn check_together(blobs: &[Blob], kind: SectionKind) -> Result<(), Defect> {
    let mut by_offset: Vec<&Blob> = blobs.iter().filter(|blob| blob.len > 0).collect();
    by_offset.sort_by_key(|blob| blob.offset);
    for pair in by_offset.windows(2) {
        // Both lie within the file, so the sum is a number.
        if pair[0].offset + pair[0].len > pair[1].offset {
            return Err(Defect::Overlap {
                first: format!("the blob at byte {}", pair[0].offset),
                second: format!("the blob at byte {}", pair[1].offset),
            });
        }
    }
    // They lie apart within the file, so this sum is a number, too.
    let total: u64 = blobs.iter().map(|blob| blob.len).sum();
    if kind == SectionKind::WorkingSets && total > MAX_SECTION_BYTES {
        return Err(Defect::TooLarge {
            field: "length of all working sets",
            value: total,
            limit: MAX_SECTION_BYTES,
        });
    }
    Ok(())
}

fn check_blob(
    raw: &BlobEntry,
    kind: SectionKind,
    body: Body,
    names: &mut Names<'_>,
) -> Result<Blob, Defect> {
    let (offset, len, tag) = (raw.offset.get(), raw.len.get(), raw.tag.get());
    body.check("blob", offset, len)?;
    let name = names.next(
        "name of a blob",
        raw.name_offset.get().into(),
        raw.name_len.get(),
    )?;
    if kind == SectionKind::Dictionaries {
        if tag == 0 || tag > u32::from(u16::MAX) {
            return Err(Defect::value("number of a dictionary", tag, "1 to 65535"));
        }
        if len == 0 || len > MAX_DICTIONARY_BYTES as u64 {
            return Err(Defect::TooLarge {
                field: "length of a dictionary",
                value: len,
                limit: MAX_DICTIONARY_BYTES as u64,
            });
        }
    } else {
        if tag != 0 {
            return Err(Defect::Reserved {
                field: "number of a named blob",
            });
        }
        if !is_file_name(name) {
            return Err(Defect::Text {
                field: "name of a blob",
                detail: "empty, . or .., or has a /".into(),
            });
        }
    }
    if kind == SectionKind::WorkingSets {
        let record = size_of::<layout::WorkingSetRun>() as u64;
        if !len.is_multiple_of(record) || len > MAX_SECTION_BYTES {
            return Err(Defect::value(
                "length of a working set",
                len,
                format!("a multiple of {record}, at most {MAX_SECTION_BYTES}"),
            ));
        }
    }
    Ok(Blob {
        offset,
        len,
        crc: raw.crc.get(),
        tag,
        name: name.to_owned(),
    })
}

/// Checks the runs of a working set, which lies in the file at `at`. A run may cross from one
/// region into the next, and then names numbers that no page has.
pub(crate) fn working_set(
    bytes: &[u8],
    at: u64,
    page_slots: u64,
) -> Result<Vec<WorkingSetRun>, Flaw> {
    let mut runs = Vec::new();
    let mut total = 0;
    for (number, raw) in records::<layout::WorkingSetRun>(bytes).iter().enumerate() {
        let at = at + (number * size_of::<layout::WorkingSetRun>()) as u64;
        let run = WorkingSetRun {
            first_page: raw.first_page.get(),
            pages: raw.pages.get(),
        };
        let end = run.first_page.checked_add(run.pages);
        if run.pages == 0 || end.is_none_or(|end| end > page_slots) {
            let defect = Defect::OutOfBounds {
                field: "pages of a working set's run",
                offset: run.first_page,
                len: run.pages,
                from: 0,
                to: page_slots,
            };
            return Err(Flaw::new(at, defect));
        }
        // Neither is above `MAX_PAGES`. The sum bounds the work of whoever goes through the pages.
        total += run.pages;
        if total > page_slots {
            let defect = Defect::TooLarge {
                field: "number of pages of a working set",
                value: total,
                limit: page_slots,
            };
            return Err(Flaw::new(at, defect));
        }
        runs.push(run);
    }
    Ok(runs)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_working_sets_together_are_bounded() {
        let blob = |number: u64| Blob {
            offset: 4096 + number * MAX_SECTION_BYTES,
            len: MAX_SECTION_BYTES - number,
            crc: 0,
            tag: 0,
            name: format!("set {number}"),
        };
        let blobs = [blob(0), blob(1)];
        assert_eq!(
            check_together(&blobs[..1], SectionKind::WorkingSets),
            Ok(())
        );
        assert_eq!(check_together(&blobs, SectionKind::Attachments), Ok(()));
        assert_eq!(
            check_together(&blobs, SectionKind::WorkingSets),
            Err(Defect::TooLarge {
                field: "length of all working sets",
                value: 2 * MAX_SECTION_BYTES - 1,
                limit: MAX_SECTION_BYTES,
            })
        );
    }
}
