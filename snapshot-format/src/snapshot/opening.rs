//! The read of the top table, the third and last of opening.

use super::buffer;
use crate::error::{Defect, Flaw, OpenError, Part};
use crate::index::TopTable;
use crate::layout::{MAX_INLINE_REGION_BYTES, SectionKind};
use crate::open::Ends;
use crate::sections;
use crate::store::{Reason, Store};
use crate::types::Region;

/// The top table and, if they lie right before it, the regions, in one read.
pub(super) fn read_tables(
    store: &dyn Store,
    name: &str,
    ends: &Ends,
    most_top_bytes: u64,
) -> Result<(TopTable, Option<Vec<Region>>), OpenError> {
    let damaged = |part, flaw: Flaw| OpenError::Damaged {
        file: name.to_owned(),
        part,
        offset: flaw.at,
        defect: flaw.defect,
    };
    let missing = || {
        let what = Part::TOP.to_string().into();
        damaged(Part::Trailer, Flaw::new(0, Defect::Missing { what }))
    };
    let top = *ends.directory.get(SectionKind::Top).ok_or_else(missing)?;
    if top.len > most_top_bytes {
        return Err(OpenError::TopTooLarge {
            file: name.to_owned(),
            bytes: top.len,
            limit: most_top_bytes,
        });
    }
    let regions = ends.directory.get(SectionKind::Regions).filter(|regions| {
        regions.offset + regions.len == top.offset && regions.len <= MAX_INLINE_REGION_BYTES
    });
    let from = regions.map_or(top.offset, |regions| regions.offset);
    let failed = |source| OpenError::Io {
        file: name.to_owned(),
        part: Part::TOP,
        offset: from,
        len: top.offset + top.len - from,
        source,
    };
    let mut bytes = buffer(top.offset + top.len - from).map_err(failed)?;
    store
        .read_exact_at(&mut bytes, from, Reason::Open)
        .map_err(failed)?;
    // The regions are few bytes; the top table may be many and keeps its buffer.
    let region_bytes: Vec<u8> = match regions {
        Some(section) => bytes
            .drain(..usize::try_from(section.len).unwrap_or(0))
            .collect(),
        None => Vec::new(),
    };
    for (section, bytes, part) in [
        (regions, &region_bytes, Part::Section(SectionKind::Regions)),
        (Some(&top), &bytes, Part::TOP),
    ] {
        let Some(section) = section else { continue };
        let computed = crc32fast::hash(bytes);
        if computed != section.crc {
            let defect = Defect::Checksum {
                stored: section.crc,
                computed,
            };
            return Err(damaged(part, Flaw::new(section.offset, defect)));
        }
    }
    let top =
        TopTable::check(bytes, top.offset, ends.body).map_err(|flaw| damaged(Part::TOP, flaw))?;
    let regions = regions
        .map(|section| {
            sections::regions(&region_bytes, section, top.len(), ends.summary.pages)
                .map_err(|flaw| damaged(Part::Section(SectionKind::Regions), flaw))
        })
        .transpose()?;
    Ok((top, regions))
}
