//! The handover by an owner, checked against the snapshot.

use std::ops::Range;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use snapshot_format::Region;
use snapshot_format::layout::PAGE_SIZE_U64;

use crate::session::{Extent, LARGE_PAGES};

/// Size of a large page in bytes: 2 MiB.
const LARGE_SIZE: u64 = LARGE_PAGES * PAGE_SIZE_U64;

/// The handover of an owner's memory.
#[derive(Debug)]
pub struct Handover {
    /// The owner's userfaultfd, negotiated, with all regions registered for missing pages.
    pub userfaultfd: OwnedFd,
    /// A pidfd of the owner.
    pub owner: OwnedFd,
    /// The owner's memory.
    pub regions: Vec<OwnerRegion>,
    /// The owner's page map, opened by [`open_page_map`](snaprestore_uffd::os::open_page_map), for
    /// a process that can't open it itself. It is required for pages of 2 MiB. If there are such
    /// pages and this is `None`, it is opened.
    pub page_map: Option<OwnedFd>,
}

/// A mapping of an owner, as described by Firecracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRegion {
    /// The address of its first byte in the owner.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The offset of its content in the memory of the snapshot, whose regions count as consecutive
    /// without gaps: the offset in a raw memory file.
    pub offset: u64,
    /// The page size of the mapping in bytes: 4096, or 2 MiB for private memory of hugetlbfs.
    pub page_size: u64,
}

/// The reason why a handover doesn't fit the snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// There are no regions.
    #[error("no region was handed over")]
    NoRegion,
    /// A number is not a multiple of the page size, or is zero, or the end is beyond 2^64.
    #[error("region {region} has {what} {value:#x}, which must be {expected}")]
    Value {
        /// Number of the region.
        region: usize,
        /// Name of the number.
        what: &'static str,
        /// The number.
        value: u64,
        /// Description of acceptable values.
        expected: &'static str,
    },
    /// Two regions share addresses or content.
    #[error("regions {one} and {other} overlap {what}")]
    Overlap {
        /// Number of one region.
        one: usize,
        /// Number of the other region.
        other: usize,
        /// The kind of thing that they share.
        what: &'static str,
    },
    /// A page of 2 MiB would consist of parts of two regions of the snapshot, or of parts of the 2
    /// MiB pages of its index.
    #[error(
        "region {region} has 2 MiB pages, but a region of the snapshot begins inside one, at offset {offset:#x}: \
         the snapshot was not taken from such pages"
    )]
    Straddles {
        /// Number of the region.
        region: usize,
        /// The start of that region, as an offset like the owner's.
        offset: u64,
    },
    /// The owner has more or less memory than the snapshot.
    #[error(
        "the owner has {owner} bytes of memory and the snapshot {snapshot}: the snapshot of another VM, or \
         another memory size"
    )]
    Size {
        /// Size of all regions in bytes.
        owner: u64,
        /// Size of the snapshot's memory in bytes.
        snapshot: u64,
    },
}

/// Returns where the owner has the pages of the snapshot.
pub(super) fn extents(
    regions: &[OwnerRegion],
    snapshot: &[Region],
) -> Result<Vec<Extent>, HandoverError> {
    if regions.is_empty() {
        return Err(HandoverError::NoRegion);
    }
    for (number, region) in regions.iter().enumerate() {
        region.check(number)?;
    }
    disjoint(regions, "in the owner", |region| {
        (region.address, region.len)
    })?;
    disjoint(regions, "in the snapshot", |region| {
        (region.offset, region.len)
    })?;
    // Disjoint ranges below 2^64 can't overflow the sum.
    let owner: u64 = regions.iter().map(|region| region.len).sum();
    let memory: u64 = snapshot.iter().map(Region::bytes).sum();
    let end = regions
        .iter()
        .map(|region| region.offset + region.len)
        .max();
    if owner != memory || end != Some(memory) {
        return Err(HandoverError::Size {
            owner,
            snapshot: memory,
        });
    }
    let mut extents = Vec::new();
    for (number, region) in regions.iter().enumerate() {
        let large = region.is_huge();
        let mut begins = 0;
        for of in snapshot {
            let ends = begins + of.bytes();
            let from = region.offset.max(begins);
            let to = (region.offset + region.len).min(ends);
            if from < to {
                let offset = from - begins;
                // An unaligned end needs no check: the next part would begin there.
                if large && (!from.is_multiple_of(LARGE_SIZE) || !offset.is_multiple_of(LARGE_SIZE))
                {
                    return Err(HandoverError::Straddles {
                        region: number,
                        offset: begins,
                    });
                }
                extents.push(Extent {
                    address: region.address + (from - region.offset),
                    pages: (to - from) / PAGE_SIZE_U64,
                    first_page: of.first_page + offset / PAGE_SIZE_U64,
                    large,
                });
            }
            begins = ends;
        }
    }
    Ok(extents)
}

impl OwnerRegion {
    /// Returns whether it has pages of 2 MiB.
    pub fn is_huge(&self) -> bool {
        self.page_size == LARGE_SIZE
    }

    /// Returns its addresses in the owner.
    pub(super) fn addresses(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.len)
    }

    fn check(&self, region: usize) -> Result<(), HandoverError> {
        let wrong = |what, value, expected| HandoverError::Value {
            region,
            what,
            value,
            expected,
        };
        if ![PAGE_SIZE_U64, LARGE_SIZE].contains(&self.page_size) {
            return Err(wrong("page size", self.page_size, "4096 or 2097152"));
        }
        let numbers = [
            ("address", self.address),
            ("length", self.len),
            ("offset", self.offset),
        ];
        for (what, value) in numbers {
            if !value.is_multiple_of(self.page_size) {
                return Err(wrong(what, value, "a multiple of the page size"));
            }
        }
        if self.len == 0 {
            return Err(wrong("length", 0, "more than 0"));
        }
        for (what, value) in [("address", self.address), ("offset", self.offset)] {
            if value.checked_add(self.len).is_none() {
                return Err(wrong(what, value, "such that the region ends below 2^64"));
            }
        }
        Ok(())
    }
}

fn disjoint(
    regions: &[OwnerRegion],
    what: &'static str,
    range: impl Fn(&OwnerRegion) -> (u64, u64),
) -> Result<(), HandoverError> {
    let mut sorted: Vec<_> = regions.iter().map(range).enumerate().collect();
    sorted.sort_unstable_by_key(|(_, (start, _))| *start);
    for pair in sorted.windows(2) {
        let [(one, (start, len)), (other, (next, _))] = [pair[0], pair[1]];
        if start + len > next {
            return Err(HandoverError::Overlap { one, other, what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_SIZE_U64;

    fn region(pages: u64, first_page: u64) -> Region {
        Region {
            space: 0,
            flags: 0,
            start: 0,
            pages,
            first_page,
            page_shift: 0,
            name: String::new(),
        }
    }

    fn owner_region(address: u64, len: u64, offset: u64) -> OwnerRegion {
        OwnerRegion {
            address: address * PAGE,
            len: len * PAGE,
            offset: offset * PAGE,
            page_size: PAGE,
        }
    }

    fn places(regions: &[OwnerRegion], snapshot: &[Region]) -> Vec<(u64, u64, u64)> {
        let extents = extents(regions, snapshot).expect("regions do not fit");
        let place = |extent: &Extent| (extent.address / PAGE, extent.pages, extent.first_page);
        extents.iter().map(place).collect()
    }

    #[test]
    fn regions_may_be_ordered_and_split_differently() {
        // The second one is at a lower address in the owner, as with Firecracker.
        let owner = [owner_region(5000, 3, 0), owner_region(100, 5, 3)];
        assert_eq!(places(&owner, &[region(8, 0)]), [(5000, 3, 0), (100, 5, 3)]);
        assert_eq!(
            places(&owner, &[region(2, 0), region(6, 512)]),
            [(5000, 2, 0), (5002, 1, 512), (100, 5, 513)]
        );
        let owner = [owner_region(100, 5, 3), owner_region(5000, 3, 0)];
        assert_eq!(
            places(&owner, &[region(3, 0), region(5, 512)]),
            [(100, 5, 512), (5000, 3, 0)]
        );
    }

    #[test]
    fn regions_that_do_not_fit_are_refused() {
        let snapshot = [region(8, 0)];
        let refused = |regions: &[OwnerRegion]| {
            let error = extents(regions, &snapshot).expect_err("it doesn't fit");
            error.to_string()
        };
        let larger = OwnerRegion {
            page_size: 1 << 30,
            ..owner_region(512, 8, 0)
        };
        let misplaced = OwnerRegion {
            page_size: LARGE_SIZE,
            ..owner_region(LARGE_PAGES + 1, 8, 0)
        };
        let odd = OwnerRegion {
            address: 12,
            ..owner_region(1, 8, 0)
        };
        let beyond = OwnerRegion {
            address: u64::MAX - PAGE + 1,
            ..owner_region(0, 8, 0)
        };
        let cases: [(&[OwnerRegion], &str); 10] = [
            (&[], "no region"),
            (
                &[larger],
                "page size 0x40000000, which must be 4096 or 2097152",
            ),
            (&[misplaced], "which must be a multiple of the page size"),
            (&[odd], "address 0xc, which must be a multiple"),
            (
                &[owner_region(1, 0, 0)],
                "length 0x0, which must be more than 0",
            ),
            (&[beyond], "ends below 2^64"),
            (
                &[owner_region(1, 4, 0), owner_region(4, 4, 4)],
                "overlap in the owner",
            ),
            (
                &[owner_region(1, 4, 0), owner_region(9, 4, 3)],
                "overlap in the snapshot",
            ),
            (
                &[owner_region(1, 7, 0)],
                "28672 bytes of memory and the snapshot 32768",
            ),
            (
                &[owner_region(1, 4, 0), owner_region(9, 4, 5)],
                "the snapshot of another VM",
            ),
        ];
        for (regions, expected) in cases {
            let message = refused(regions);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn large_page_across_snapshot_regions_is_refused() {
        let large = |address, len, offset| OwnerRegion {
            page_size: LARGE_SIZE,
            ..owner_region(
                address * LARGE_PAGES,
                len * LARGE_PAGES,
                offset * LARGE_PAGES,
            )
        };
        let owner = [large(7, 3, 0), large(3, 2, 3)];
        let two = [
            region(2 * LARGE_PAGES, 0),
            region(3 * LARGE_PAGES, 4 * LARGE_PAGES),
        ];
        let found = extents(&owner, &two).expect("regions do not fit");
        let place = |extent: &Extent| {
            assert!(extent.large);
            [extent.address / PAGE, extent.pages, extent.first_page].map(|n| n / LARGE_PAGES)
        };
        let found: Vec<_> = found.iter().map(place).collect();
        assert_eq!(found, [[7, 2, 0], [9, 1, 4], [3, 2, 5]]);
        let odd = [
            region(2 * LARGE_PAGES - 1, 0),
            region(3 * LARGE_PAGES + 1, 4 * LARGE_PAGES),
        ];
        let error = extents(&owner, &odd).expect_err("a page of both regions");
        assert!(
            matches!(error, HandoverError::Straddles { region: 0, offset }
                if offset == (2 * LARGE_PAGES - 1) * PAGE),
            "{error}"
        );
        // Small pages before it may be cut anywhere, but its page numbers must be aligned.
        let mixed = [owner_region(1000, LARGE_PAGES, 0), large(7, 4, 1)];
        let one = [region(5 * LARGE_PAGES, 0)];
        let sizes = extents(&mixed, &one).expect("regions do not fit");
        assert_eq!(
            sizes.iter().map(|e| e.large).collect::<Vec<_>>(),
            [false, true]
        );
        let odd = [region(1, 0), region(5 * LARGE_PAGES - 1, LARGE_PAGES)];
        let error = extents(&mixed, &odd).expect_err("numbers that don't fit");
        assert!(
            matches!(error, HandoverError::Straddles { region: 1, .. }),
            "{error}"
        );
    }
}
