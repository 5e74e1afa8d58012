//! The regions and the top table, which lie in the tail of an ordinary snapshot.

use super::buffer;
use crate::error::{Defect, Flaw, OpenError, Part};
use crate::index::TopTable;
use crate::layout::SectionKind;
use crate::open::{Ends, Tail};
use crate::sections::{self, Section};
use crate::store::Store;
use crate::types::Region;

/// Source of the tables.
pub(super) struct Tables<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) name: &'a str,
    pub(super) ends: &'a Ends,
    pub(super) tail: &'a Tail,
}

impl Tables<'_> {
    /// Returns the top table and the regions, from the tail if it contains them. If the regions end
    /// where the top table begins, the rest takes one more read.
    pub(super) fn read(&self, max_top_bytes: u64) -> Result<(TopTable, Vec<Region>), OpenError> {
        let top = self.section(SectionKind::Top)?;
        let regions = self.section(SectionKind::Regions)?;
        if top.len > max_top_bytes {
            return Err(OpenError::TopTooLarge {
                file: self.name.to_owned(),
                bytes: top.len,
                limit: max_top_bytes,
            });
        }
        let (region_bytes, top_bytes) = if regions.offset + regions.len == top.offset {
            let mut both = self.bytes(Part::TOP, regions.offset, regions.len + top.len)?;
            // The regions are few bytes and are copied; the top table may be large and keeps its
            // buffer.
            let regions = usize::try_from(regions.len).unwrap_or(both.len());
            (both.drain(..regions).collect(), both)
        } else {
            let top = self.bytes(Part::TOP, top.offset, top.len)?;
            let regions = self.bytes(Part::REGIONS, regions.offset, regions.len)?;
            (regions, top)
        };
        self.check_crc(Part::TOP, top, &top_bytes)?;
        let table = TopTable::check(
            top_bytes,
            top.offset,
            self.ends.body,
            self.ends.ancestor_count(),
        )
        .map_err(|flaw| self.damaged(Part::TOP, flaw))?;
        self.check_crc(Part::REGIONS, regions, &region_bytes)?;
        let pages = self.ends.summary.pages;
        let regions = sections::regions(&region_bytes, regions, table.len(), pages)
            .map_err(|flaw| self.damaged(Part::REGIONS, flaw))?;
        Ok((table, regions))
    }

    fn section(&self, kind: SectionKind) -> Result<&Section, OpenError> {
        self.ends.directory.get(kind).ok_or_else(|| {
            let what = Part::Section(kind).to_string().into();
            self.damaged(Part::Trailer, Flaw::new(0, Defect::Missing { what }))
        })
    }

    fn bytes(&self, part: Part, offset: u64, len: u64) -> Result<Vec<u8>, OpenError> {
        let mut bytes = buffer(len).map_err(|source| OpenError::Io {
            file: self.name.to_owned(),
            part,
            offset,
            len,
            source,
        })?;
        self.tail
            .read_exact_at(self.store, part, &mut bytes, offset)?;
        Ok(bytes)
    }

    fn check_crc(&self, part: Part, section: &Section, bytes: &[u8]) -> Result<(), OpenError> {
        let computed = crc32fast::hash(bytes);
        if computed == section.crc {
            return Ok(());
        }
        let defect = Defect::Checksum {
            stored: section.crc,
            computed,
        };
        Err(self.damaged(part, Flaw::new(section.offset, defect)))
    }

    fn damaged(&self, part: Part, flaw: Flaw) -> OpenError {
        OpenError::Damaged {
            file: self.name.to_owned(),
            part,
            offset: flaw.at,
            defect: flaw.defect,
        }
    }
}
