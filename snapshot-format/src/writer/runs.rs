//! The longest runs of zero pages, found in one pass.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::layout::{MAX_FILL_RUNS, RawFillRun};

/// Collector of the [`MAX_FILL_RUNS`] longest runs; among equal ones, those that came first.
#[derive(Default)]
pub(super) struct ZeroRuns {
    /// The shortest kept run is on top, the last of equal ones.
    best: BinaryHeap<Reverse<(u64, Reverse<u64>)>>,
    /// Region, first page and pages of the run that may still grow.
    open: Option<(usize, u64, u64)>,
}

impl ZeroRuns {
    /// Adds zero pages; calls come in page order. Runs end with their region.
    pub(super) fn push(&mut self, region: usize, first_page: u64, pages: u64) {
        if let Some((open_region, first, len)) = &mut self.open
            && *open_region == region
            && *first + *len == first_page
        {
            *len += pages;
            return;
        }
        self.close();
        self.open = Some((region, first_page, pages));
    }

    fn close(&mut self) {
        if let Some((_, first, pages)) = self.open.take() {
            self.best.push(Reverse((pages, Reverse(first))));
            if self.best.len() > MAX_FILL_RUNS {
                self.best.pop();
            }
        }
    }

    /// Returns the runs, longest first.
    pub(super) fn finish(mut self) -> Vec<RawFillRun> {
        self.close();
        self.best
            .into_sorted_vec()
            .into_iter()
            .map(|Reverse((pages, Reverse(first)))| RawFillRun {
                first_page: first.into(),
                pages: pages.into(),
                word: 0.into(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(runs: &[RawFillRun]) -> Vec<(u64, u64)> {
        runs.iter()
            .map(|run| (run.first_page.get(), run.pages.get()))
            .collect()
    }

    #[test]
    fn adjacent_runs_join_within_a_region_only() {
        let mut runs = ZeroRuns::default();
        runs.push(0, 0, 10);
        runs.push(0, 10, 502);
        runs.push(1, 512, 4);
        runs.push(1, 520, 5);
        assert_eq!(plain(&runs.finish()), [(0, 512), (520, 5), (512, 4)]);
    }

    proptest! {
        #[test]
        fn longest_runs_are_kept(lens in prop::collection::vec(1u64..50, 0..300)) {
            let (mut runs, mut all, mut page) = (ZeroRuns::default(), Vec::new(), 0);
            for len in lens {
                runs.push(0, page, len);
                all.push((page, len));
                page += len + 1;
            }
            all.sort_by_key(|&(first, len)| (Reverse(len), first));
            all.truncate(MAX_FILL_RUNS);
            prop_assert_eq!(plain(&runs.finish()), all);
        }
    }
}
