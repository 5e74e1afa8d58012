//! Counterparts in the base: an address of the source corresponds to the page of the same address,
//! in a region of the same name. Regions may have grown, shrunk, merged or been split meanwhile.

use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{Region, Snapshot};

/// Regions of the base, by name and start.
#[derive(Debug, Default)]
pub(crate) struct Counterparts(Vec<Region>);

/// The counterpart of some pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counterpart {
    /// Page of the base that corresponds to the first of them, if there is one.
    pub(crate) page: Option<u64>,
    /// Number of pages that correspond to consecutive pages, or have no counterpart.
    pub(crate) pages: u64,
}

impl Counterparts {
    pub(crate) fn new(base: Option<&Snapshot>) -> Self {
        Self::of_regions(base.map_or(&[], |base| base.regions()))
    }

    fn of_regions(regions: &[Region]) -> Self {
        let mut regions: Vec<Region> = regions
            .iter()
            .filter(|region| region.space == 0 && region.pages > 0)
            .cloned()
            .collect();
        // The longest of several regions with the same start is found.
        regions.sort_by(|a, b| (&a.name, a.start, a.pages).cmp(&(&b.name, b.start, b.pages)));
        Self(regions)
    }

    /// Returns the counterpart of the pages from `address` on of a region with this name.
    pub(crate) fn of(&self, name: &str, address: u64) -> Counterpart {
        let place = (name, address);
        let next = self
            .0
            .partition_point(|region| (&*region.name, region.start) <= place);
        let before = next.checked_sub(1).map(|last| &self.0[last]);
        if let Some(region) = before.filter(|region| region.name == name) {
            let passed = (address - region.start) / PAGE_SIZE_U64;
            if passed < region.pages {
                return Counterpart {
                    page: Some(region.first_page + passed),
                    pages: region.pages - passed,
                };
            }
        }
        let after = self.0.get(next).filter(|region| region.name == name);
        let pages = after.map_or(u64::MAX, |region| (region.start - address) / PAGE_SIZE_U64);
        Counterpart { page: None, pages }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(name: &str, start: u64, pages: u64, first_page: u64) -> Region {
        Region {
            space: 0,
            flags: 0,
            start: start * PAGE_SIZE_U64,
            pages,
            first_page,
            page_shift: 12,
            name: name.into(),
        }
    }

    #[test]
    fn each_address_has_the_page_of_that_address_in_a_region_of_that_name() {
        let other_space = Region {
            space: 1,
            ..region("", 0, 1000, 9000)
        };
        // The last region ends where the address space ends.
        let last = (1 << 52) - 10;
        let regions = [
            region("[stack]", 100, 10, 0),
            region("", 100, 5, 512),
            region("", 100, 10, 1024),
            region("", 120, 5, 2048),
            region("", 125, 5, 2560),
            other_space,
            region("", last, 10, 4096),
        ];
        let all = Counterparts::of_regions(&regions);
        for (name, page, expected, pages) in [
            ("[stack]", 90, None, 10),
            ("[stack]", 100, Some(0), 10),
            ("[stack]", 109, Some(9), 1),
            ("[stack]", 110, None, u64::MAX),
            ("[heap]", 100, None, u64::MAX),
            ("", 0, None, 100),
            ("", 100, Some(1024), 10),
            ("", 110, None, 10),
            ("", 124, Some(2052), 1),
            ("", 125, Some(2560), 5),
            ("", 130, None, last - 130),
            ("", last + 3, Some(4099), 7),
        ] {
            let found = all.of(name, page * PAGE_SIZE_U64);
            let expected = Counterpart {
                page: expected,
                pages,
            };
            assert_eq!(found, expected, "{name} {page}");
        }
        assert_eq!(Counterparts::new(None).of("", 0).page, None);
    }
}
