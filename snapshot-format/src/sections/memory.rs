//! Sections that name pages: regions, fill runs and working sets.

use super::{Names, Section};
use crate::error::{Defect, Flaw};
use crate::index::records;
use crate::layout::{
    self, MAX_PAGES, PAGE_SIZE_U64, PAGES_PER_BLOCK_U64, RawRegionEntry, region_flags,
};
use crate::types::{FillRun, Region, WorkingSetRun};

/// Checks the region section: the regions are in the order of page numbers, each begins at the
/// first index block that the one before doesn't use, and their total size agrees with the top
/// table and the summary.
pub(crate) fn regions(
    bytes: &[u8],
    section: &Section,
    blocks: u64,
    pages: u64,
) -> Result<Vec<Region>, Flaw> {
    // `check_section` has verified that the records exist.
    let split = usize::try_from(section.count).unwrap_or(usize::MAX) * size_of::<RawRegionEntry>();
    let (entries, area) = bytes.split_at(split.min(bytes.len()));
    let mut names = Names { area, used: 0 };
    let mut regions = Vec::new();
    let mut next_page = 0;
    let mut total = 0;
    for (number, raw) in records::<RawRegionEntry>(entries).iter().enumerate() {
        let at = section.offset + (number * size_of::<RawRegionEntry>()) as u64;
        let region =
            check_region(raw, next_page, &mut names).map_err(|defect| Flaw::new(at, defect))?;
        // Both are at most `MAX_PAGES` plus a block, as `check_region` has verified.
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
    raw: &RawRegionEntry,
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
    // The last byte must have an address; a region may end where the address space ends.
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
        // Hints that this version doesn't know are dropped.
        flags: raw.flags.get() & region_flags::KNOWN,
        start,
        pages,
        first_page: next_page,
        page_shift,
        name: name.to_owned(),
    })
}

/// Returns the region that `page` belongs to, if any; `regions` are in the order of page numbers.
pub(crate) fn region_of(regions: &[Region], page: u64) -> Option<&Region> {
    let after = regions.partition_point(|region| region.first_page <= page);
    let region = &regions[after.checked_sub(1)?];
    (page < region.first_page + region.pages).then_some(region)
}

/// Checks the fill runs: longest first, without overlaps, each within one region.
pub(crate) fn fill_runs(
    bytes: &[u8],
    section: &Section,
    regions: &[Region],
) -> Result<Vec<FillRun>, Flaw> {
    let mut runs: Vec<FillRun> = Vec::new();
    for (number, raw) in records::<layout::RawFillRun>(bytes).iter().enumerate() {
        let run = FillRun {
            first_page: raw.first_page.get(),
            pages: raw.pages.get(),
            word: raw.word.get(),
        };
        let at = section.offset + (number * size_of::<layout::RawFillRun>()) as u64;
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

/// Checks the runs of a working set, which is at offset `at` in the file. A run may cross from one
/// region into the next, and then names unused numbers.
pub(crate) fn working_set(
    bytes: &[u8],
    at: u64,
    page_slots: u64,
) -> Result<Vec<WorkingSetRun>, Flaw> {
    let mut runs = Vec::new();
    let mut total = 0;
    for (number, raw) in records::<layout::RawWorkingSetRun>(bytes)
        .iter()
        .enumerate()
    {
        let at = at + (number * size_of::<layout::RawWorkingSetRun>()) as u64;
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
        // Neither is above `MAX_PAGES`. The sum bounds the work of a caller that visits every page.
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
