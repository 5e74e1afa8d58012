//! Workloads: the pages to touch, their order and the kind of access; and the plan that follows
//! from it.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::contender::{Contender, SnapshotKind};
use crate::{BenchError, PAGE};

/// The order of touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// No page is touched: the trial ends when all memory is restored.
    None,
    /// From the first page to the last.
    Sequential,
    /// Each page once, shuffled.
    #[default]
    Random,
    /// One page of each frame of the first snapshot among the contenders, shuffled: each touch is a
    /// fault on a frame that has not been decoded.
    Frames,
    /// The page numbers of a file, one a line.
    Trace,
    /// The pages of the image's working set, in another order than they were recorded in, and a
    /// tenth as many others among them.
    WorkingSet,
    /// Every stored page outside of the image's working set, shuffled.
    Others,
}

/// Kind of access of a touch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Reads a byte.
    #[default]
    Read,
    /// Writes a byte.
    Write,
}

/// State of the page cache for the contenders' files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// The contender's file is in the page cache.
    #[default]
    Warm,
    /// Nothing of it is cached, as far as this process can achieve that.
    Cold,
}

/// One comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Its name, usable in a file name.
    pub name: String,
    /// Description of the workload, for people.
    pub title: String,
    /// The image: `guest` for the memory of a real guest, `roomy` for twice as much memory of which
    /// the other half is empty, `child` or `chain` for the memory at the end of a short or long
    /// chain of snapshots of it, or the path of a raw file.
    #[serde(default = "guest")]
    pub image: String,
    /// The order of touches.
    #[serde(default)]
    pub order: Order,
    /// Seed of the shuffle.
    #[serde(default = "one")]
    pub seed: u64,
    /// File of page numbers, for [`Order::Trace`].
    #[serde(default)]
    pub trace: Option<PathBuf>,
    /// Part of the pages that is touched, from the start of the order.
    #[serde(default = "all")]
    pub share: f64,
    /// Maximum number of touched pages.
    #[serde(default)]
    pub most_pages: Option<u64>,
    /// Kind of access of a touch.
    #[serde(default)]
    pub access: Access,
    /// Number of touching threads, each with its own part of the order.
    #[serde(default = "one_thread")]
    pub threads: usize,
    /// State of the page cache for the contenders' files.
    #[serde(default)]
    pub cache: Cache,
    /// Whether each touch is measured by itself. Reading the clock takes time, so the total time of
    /// such a run means nothing.
    #[serde(default)]
    pub latencies: bool,
    /// Contenders that take part.
    pub contenders: Vec<Contender>,
    /// Limits to measure as well, on the first snapshot among the contenders.
    #[serde(default)]
    pub limits: Vec<Limit>,
}

/// Limit: the cost of a part of a restore by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// Every frame decoded once, on all cores.
    Decode,
    /// Every frame that the end of the image's chain uses decoded once, on all cores.
    DecodeChain,
    /// Every stored page copied to its place, on all cores.
    Copy,
    /// Frames decoded one by one, each timed.
    DecodeEach,
    /// The frames of the working set decoded and its pages copied, on all cores.
    WorkingSet,
}

impl Limit {
    /// Returns the name that stands for the limit among the contenders.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decode => "limit:decode",
            Self::DecodeChain => "limit:decode-chain",
            Self::Copy => "limit:copy",
            Self::DecodeEach => "limit:decode-each",
            Self::WorkingSet => "limit:working-set",
        }
    }
}

fn guest() -> String {
    "guest".into()
}

fn one() -> u64 {
    1
}

fn all() -> f64 {
    1.0
}

fn one_thread() -> usize {
    1
}

impl Workload {
    /// Returns the kind of the first snapshot among the contenders.
    pub fn snapshot(&self) -> SnapshotKind {
        let ours = self
            .contenders
            .iter()
            .find_map(|contender| match contender {
                Contender::Ours(ours) | Contender::Serve(ours) => Some(ours.snapshot.clone()),
                _ => None,
            });
        ours.unwrap_or_default()
    }

    /// Refuses invalid workloads.
    pub fn check(&self) -> Result<(), BenchError> {
        let invalid = |why: &str| Err(BenchError::Invalid(format!("{}: {why}", self.name)));
        if !(self.share > 0.0 && self.share <= 1.0) {
            return invalid("`share` must be above 0 and at most 1");
        }
        if !(1..=512).contains(&self.threads) {
            return invalid("`threads` must be 1 to 512");
        }
        if self.contenders.is_empty() {
            return invalid("there are no contenders");
        }
        if (self.order == Order::Trace) != self.trace.is_some() {
            return invalid("`trace` names a file if, and only if, `order` is \"trace\"");
        }
        Ok(())
    }
}

/// Offsets of a trial's touches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Offsets in memory, in the order of touch: one byte of each page, at varying positions.
    pub offsets: Vec<u64>,
}

impl Plan {
    /// Creates the plan for memory of `pages` pages. `listed` has the pages for orders that come
    /// from a file.
    pub fn new(
        pages: u64,
        order: Order,
        seed: u64,
        share: f64,
        most_pages: Option<u64>,
        listed: Option<Vec<u64>>,
    ) -> Self {
        let mut chosen: Vec<u64> = match (order, listed) {
            (Order::None, _) => Vec::new(),
            (Order::Frames | Order::Trace | Order::WorkingSet | Order::Others, listed) => {
                listed.unwrap_or_default()
            }
            (Order::Sequential | Order::Random, _) => (0..pages).collect(),
        };
        chosen.retain(|page| *page < pages);
        if matches!(order, Order::Random | Order::Frames | Order::Others) {
            shuffle(&mut chosen, seed);
        }
        let wanted = share_of(chosen.len(), share);
        let most = most_pages.map_or(usize::MAX, |most| {
            usize::try_from(most).unwrap_or(usize::MAX)
        });
        chosen.truncate(wanted.min(most));
        Self {
            offsets: chosen
                .into_iter()
                .map(|page| page * PAGE + mixed(page) % PAGE)
                .collect(),
        }
    }
}

/// Reads page numbers, one a line.
pub fn read_pages(path: &Path) -> Result<Vec<u64>, BenchError> {
    let named = format!("{}: reading the page numbers", path.display());
    let text = fs::read_to_string(path).map_err(BenchError::io(named))?;
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            line.parse().map_err(|_| {
                let path = path.display();
                BenchError::Invalid(format!("{path}: {line:?} is no page number"))
            })
        })
        .collect()
}

/// Returns a share of `count`, at least one if `count` isn't zero.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a part of a length is a length"
)]
fn share_of(count: usize, share: f64) -> usize {
    let part = (crate::stats::float(count as u64) * share).round() as usize;
    part.clamp(count.min(1), count)
}

/// Shuffles by the Fisher-Yates algorithm; the same seed gives the same order on every machine.
pub(crate) fn shuffle<T>(items: &mut [T], seed: u64) {
    for last in (1..items.len()).rev() {
        let random = mixed(
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(last as u64),
        );
        let place = usize::try_from(random % (last as u64 + 1)).unwrap_or(0);
        items.swap(last, place);
    }
}

/// Returns a number that looks random and depends on `number` alone (the finisher of splitmix64).
pub(crate) fn mixed(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(plan: &Plan) -> Vec<u64> {
        plan.offsets.iter().map(|offset| offset / PAGE).collect()
    }

    #[test]
    fn every_order_touches_every_page_once() {
        for order in [Order::Sequential, Order::Random] {
            let mut touched = pages(&Plan::new(1000, order, 5, 1.0, None, None));
            assert_eq!(order == Order::Sequential, touched.is_sorted());
            touched.sort_unstable();
            assert_eq!(touched, (0..1000).collect::<Vec<_>>());
        }
    }

    #[test]
    fn same_seed_gives_the_same_order() {
        let plan = |seed| Plan::new(1000, Order::Random, seed, 1.0, None, None);
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
    }

    #[test]
    fn share_takes_the_start_of_the_order() {
        let plan = |share, most| pages(&Plan::new(1000, Order::Random, 1, share, most, None));
        let whole = plan(1.0, None);
        assert_eq!(plan(0.25, None), whole[..250]);
        assert_eq!(plan(0.25, Some(10)), whole[..10]);
        assert_eq!(plan(0.000_01, None), whole[..1]);
    }

    #[test]
    fn workload_files_are_valid() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../workloads");
        let mut count = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let text = fs::read_to_string(&path).unwrap();
            let workload: Workload = toml::from_str(&text).unwrap();
            workload.check().unwrap();
            assert_eq!(path.file_stem().unwrap(), workload.name.as_str());
            // A workload read back from the results equals the one that was run.
            let json = serde_json::to_string(&workload).unwrap();
            assert_eq!(serde_json::from_str::<Workload>(&json).unwrap(), workload);
            count += 1;
        }
        assert!(count >= 10, "{count} files");
    }

    #[test]
    fn pages_outside_the_image_are_not_touched() {
        let plan = Plan::new(10, Order::Trace, 1, 1.0, None, Some(vec![3, 10, 2, 99]));
        assert_eq!(pages(&plan), [3, 2]);
        assert!(
            Plan::new(10, Order::None, 1, 1.0, None, None)
                .offsets
                .is_empty()
        );
    }
}
