//! The division of regions into groups and cells.

use std::cmp::Reverse;

use super::{Cell, Group, to_index};

/// The size of a map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum number of cells, at least the number of groups.
    pub(crate) cells: u64,
    /// Maximum number of groups, at least 2.
    pub(crate) groups: usize,
}

/// Returns the number of pages of a cell, and the groups with empty cells. The largest regions have
/// groups of their own; the last group has the others, if there are too many.
pub(super) fn plan(regions: &[u64], limits: Limits) -> (u64, Vec<Group>) {
    let alone = if regions.len() <= limits.groups {
        regions.len()
    } else {
        limits.groups - 1
    };
    let mut by_size: Vec<usize> = (0..regions.len()).collect();
    by_size.sort_by_key(|&region| Reverse(regions[region]));
    let (large, small) = by_size.split_at(alone);
    let mut large = large.to_vec();
    large.sort_unstable();
    let mut groups: Vec<Vec<usize>> = large.into_iter().map(|region| vec![region]).collect();
    if !small.is_empty() {
        let mut small = small.to_vec();
        small.sort_unstable();
        groups.push(small);
    }
    let groups = groups.into_iter().map(|of_group| {
        let pages = of_group.iter().map(|&region| regions[region]).sum();
        (of_group, pages)
    });
    let groups: Vec<(Vec<usize>, u64)> = groups.collect();
    let mut cell_pages = 1_u64;
    let cells = |cell_pages: u64| -> u64 {
        let cells = groups.iter().map(|(_, pages)| pages.div_ceil(cell_pages));
        cells.sum()
    };
    while cells(cell_pages) > limits.cells && cell_pages < 1 << 62 {
        cell_pages *= 2;
    }
    let groups = groups.into_iter().map(|(regions, pages)| Group {
        regions,
        pages,
        cells: vec![Cell::default(); to_index(pages.div_ceil(cell_pages))],
    });
    (cell_pages, groups.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(plan: &(u64, Vec<Group>)) -> (u64, Vec<(Vec<usize>, usize)>) {
        let groups = plan.1.iter();
        let groups = groups.map(|group| (group.regions.clone(), group.cells.len()));
        (plan.0, groups.collect())
    }

    #[test]
    fn small_regions_share_the_last_group() {
        let limits = Limits {
            cells: 1000,
            groups: 3,
        };
        let found = sizes(&plan(&[1, 700, 2, 900, 3], limits));
        let expected = vec![(vec![1], 350), (vec![3], 450), (vec![0, 2, 4], 3)];
        assert_eq!(found, (2, expected));
        let found = sizes(&plan(&[1, 1, 1], limits));
        let expected = vec![(vec![0], 1), (vec![1], 1), (vec![2], 1)];
        assert_eq!(found, (1, expected));
        assert_eq!(sizes(&plan(&[], limits)), (1, vec![]));
    }

    #[test]
    fn cells_are_bounded_for_any_memory() {
        let limits = Limits {
            cells: 4000,
            groups: 200,
        };
        let many: Vec<u64> = (0..20_000).map(|n| 1 + n % 7).collect();
        for regions in [&many[..], &[64 << 18], &[1 << 50, 1], &[1 << 40; 150]] {
            let (cell_pages, groups) = plan(regions, limits);
            let cells: usize = groups.iter().map(|group| group.cells.len()).sum();
            assert!(cells <= 4000 && groups.len() <= 200, "{cells}");
            assert!(cells >= 1000 || cell_pages == 1, "{cells}");
        }
    }
}
