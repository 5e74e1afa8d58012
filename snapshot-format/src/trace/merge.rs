//! Merging and comparing traces.

use std::collections::HashMap;
use std::time::Duration;

use super::{Touch, TouchReason, Trace, TraceEnd, TraceError};

/// Options of [`merge`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeOptions {
    /// The share of the traces, 0 to 1, that a page must be in. A page must always be in one of
    /// them.
    pub min_share: f64,
}

impl Default for MergeOptions {
    /// At least half of the traces.
    fn default() -> Self {
        Self { min_share: 0.5 }
    }
}

impl MergeOptions {
    /// Returns the number of traces, at least 1, that a page must be in, of `traces`.
    fn required(self, traces: usize) -> usize {
        (1..=traces)
            .find(|count| share(*count, traces) >= self.min_share)
            .unwrap_or(traces.max(1))
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole as f64
}

/// Merges traces: returns the pages that are in enough of them, ordered by their median rank.
///
/// The rank of a page is its place in a trace. The median is over the traces that have the page. Of
/// two pages of the same median, the one of the lower number comes first.
pub fn merge(traces: &[Trace], options: &MergeOptions) -> Vec<u64> {
    let merged = merged_ranks(traces, *options);
    merged.into_iter().map(|page| page.number).collect()
}

/// A page of several traces.
struct MergedPage {
    number: u64,
    /// Twice the median of its ranks.
    rank: u64,
    at: Duration,
    reason: TouchReason,
}

fn merged_ranks(traces: &[Trace], options: MergeOptions) -> Vec<MergedPage> {
    let mut touches: HashMap<u64, Vec<(u64, Touch)>> = HashMap::new();
    for trace in traces {
        for (rank, touch) in (0..).zip(&trace.touches) {
            touches.entry(touch.page).or_default().push((rank, *touch));
        }
    }
    let required = options.required(traces.len());
    let mut pages: Vec<MergedPage> = touches
        .into_iter()
        .filter(|(_, touches)| touches.len() >= required)
        .map(|(number, mut touches)| {
            touches.sort_unstable_by_key(|(rank, _)| *rank);
            let (low, high) = (
                touches[(touches.len() - 1) / 2].0,
                touches[touches.len() / 2].0,
            );
            touches.sort_unstable_by_key(|(_, touch)| touch.at);
            let (_, median) = touches[(touches.len() - 1) / 2];
            let demanded = touches
                .iter()
                .any(|(_, touch)| touch.reason == TouchReason::Demand);
            MergedPage {
                number,
                rank: low + high,
                at: median.at,
                reason: if demanded {
                    TouchReason::Demand
                } else {
                    TouchReason::Present
                },
            }
        })
        .collect();
    pages.sort_unstable_by_key(|page| (page.rank, page.number));
    pages
}

impl Trace {
    /// Merges traces of the same content into one, with the pages and the order of [`merge`] and
    /// the median times. Traces of different content are an error.
    pub fn merged(traces: &[Self], options: &MergeOptions) -> Result<Self, TraceError> {
        let first = traces.first().ok_or(TraceError::NoTraces)?;
        for trace in &traces[1..] {
            trace.check_same_memory(first, "the first trace")?;
        }
        let pages = merged_ranks(traces, *options);
        let touch = |page: MergedPage| Touch {
            page: page.number,
            at: page.at,
            reason: page.reason,
        };
        Ok(Self {
            begun: traces
                .iter()
                .map(|trace| trace.begun)
                .min()
                .unwrap_or(first.begun),
            // A page that was present in one of them may be missing for this reason.
            present_at_start: traces
                .iter()
                .map(|trace| trace.present_at_start)
                .max()
                .unwrap_or(0),
            end: TraceEnd::Merged,
            touches: pages.into_iter().map(touch).collect(),
            ..*first
        })
    }
}

/// The similarity of two lists of pages: a prediction, such as a working set or an earlier trace,
/// and what was touched.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// Number of pages in both.
    pub common: u64,
    /// Number of pages in the prediction only.
    pub only_a: u64,
    /// Number of touched pages that were not predicted.
    pub only_b: u64,
    /// The share of the prediction that was touched, 0 to 1. None if nothing is predicted.
    pub precision: Option<f64>,
    /// The share of the touched pages that was predicted, 0 to 1. None if nothing is touched.
    pub recall: Option<f64>,
    /// Spearman's rank correlation of the pages in both: 1 if their order is the same, 0 if the
    /// orders have nothing to do with each other, -1 if one is the other reversed. None for fewer
    /// than two pages.
    pub order: Option<f64>,
}

/// Compares a prediction `a` with the pages `b` that were touched, both in order of first touch. If
/// a page comes more than once, its first place counts.
pub fn compare(a: &[u64], b: &[u64]) -> Comparison {
    let (a, b) = (first_places(a), first_places(b));
    let mut ranks: Vec<(u64, u64)> = a
        .iter()
        .filter_map(|(page, in_a)| Some((*in_a, *b.get(page)?)))
        .collect();
    let common = ranks.len();
    let part = |whole: usize| (whole > 0).then(|| share(common, whole));
    Comparison {
        common: common as u64,
        only_a: (a.len() - common) as u64,
        only_b: (b.len() - common) as u64,
        precision: part(a.len()),
        recall: part(b.len()),
        order: rank_correlation(&mut ranks),
    }
}

/// Returns the place of each page.
fn first_places(pages: &[u64]) -> HashMap<u64, u64> {
    let mut places = HashMap::new();
    for (place, page) in (0..).zip(pages) {
        places.entry(*page).or_insert(place);
    }
    places
}

/// Returns Spearman's rank correlation of pairs of distinct places.
#[expect(clippy::cast_precision_loss, reason = "a correlation needs no 53 bits")]
fn rank_correlation(places: &mut [(u64, u64)]) -> Option<f64> {
    if places.len() < 2 {
        return None;
    }
    // Places among the common pages only: ranks without gaps, and without ties.
    places.sort_unstable_by_key(|(_, b)| *b);
    for (rank, place) in (0..).zip(&mut *places) {
        place.1 = rank;
    }
    places.sort_unstable_by_key(|(a, _)| *a);
    let squares: u128 = (0_u64..)
        .zip(&*places)
        .map(|(a, (_, b))| u128::from(a.abs_diff(*b)).pow(2))
        .sum();
    let n = places.len() as f64;
    Some(1.0 - 6.0 * squares as f64 / (n * (n * n - 1.0)))
}
