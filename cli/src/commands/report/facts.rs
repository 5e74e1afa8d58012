//! The facts that a page shows: of the snapshot, of a trace, and of a run.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use snaprestore_engine::stats::{RUN_VERSION, RunRecord};
use snapshot_format::trace::{Trace, TraceEnd};
use snapshot_format::{FileStore, Region, Snapshot, digest};

use super::map::MAX_COLOURED_LAYERS;
use crate::args;
use crate::commands::info::InfoReport;
use crate::facts::RegionFacts;
use crate::map::{Group, Limits, MemoryMap, PageSet};
use crate::names;
use crate::output::count;
use crate::signals::Cancel;

/// Size of the map. A row of cells takes about 100 bytes for each view, a cell about 50.
const LIMITS: Limits = Limits {
    cells: 4000,
    groups: 200,
};
/// Maximum size of a file with a run: several times the largest possible one.
const MAX_RUN_BYTES: u64 = 4 << 20;
/// Maximum number of points of a curve.
const MAX_POINTS: usize = 200;
/// Size of the plot of touches by time and address.
pub(super) const PLOT_COLUMNS: usize = 96;
pub(super) const PLOT_ROWS: usize = 48;

/// All facts of a page.
pub(super) struct ReportFacts {
    pub(super) info: InfoReport,
    pub(super) map: MemoryMap,
    /// The file itself, and the ancestors that hold most pages.
    pub(super) shown_layers: Vec<u16>,
    pub(super) trace: Option<TouchFacts>,
    pub(super) run: Option<RunFacts>,
}

/// A run of a restore of the memory.
pub(super) struct RunFacts {
    pub(super) record: RunRecord,
    /// Reading of another file, with the same memory.
    pub(super) other_file: bool,
}

/// The working set over time.
pub(super) struct TouchFacts {
    pub(super) touches: u64,
    pub(super) present_at_start: u64,
    pub(super) end: TraceEnd,
    /// Time of the last touch.
    pub(super) span: Duration,
    /// Times with the number of pages touched until then.
    pub(super) curve: Vec<(Duration, u64)>,
    /// Number of first touches for each part of the time and each part of the memory. The rows go
    /// from low to high addresses.
    pub(super) plot: BTreeMap<(usize, usize), u64>,
}

impl ReportFacts {
    pub(super) fn gather(
        snapshot: &Snapshot,
        args: &args::Report,
        cancel: &Cancel,
    ) -> Result<Self> {
        // The small files first: what is wrong with them is known at once.
        let run = match &args.run {
            Some(path) => Some(read_run(path, snapshot)?),
            None => None,
        };
        let trace = match &args.trace {
            Some(path) => Some(read_trace(path, snapshot, cancel)?),
            None => None,
        };
        let hot = match &trace {
            Some(trace) => {
                let mut pages = PageSet::new(snapshot.page_slots());
                for touch in &trace.touches {
                    pages.insert(touch.page, 1);
                }
                pages
            }
            None => PageSet::of_working_sets(snapshot)?,
        };
        let map = MemoryMap::read(snapshot, &hot, LIMITS, cancel)?;
        let mut shown_layers: Vec<u16> = (1..).take(map.layers.len() - 1).collect();
        shown_layers.sort_by_key(|&layer| std::cmp::Reverse(map.layers[usize::from(layer)]));
        shown_layers.truncate(MAX_COLOURED_LAYERS);
        shown_layers.insert(0, 0);
        Ok(Self {
            info: InfoReport::of(snapshot, &args.file)?,
            map,
            shown_layers,
            trace: trace.map(|trace| TouchFacts::of(&trace, snapshot.regions())),
            run,
        })
    }

    /// Returns the region of a group that has one only.
    pub(super) fn single_region(&self, group: &Group) -> Option<&RegionFacts> {
        match group.regions[..] {
            [region] => self.info.facts.regions.get(region),
            _ => None,
        }
    }

    /// Returns the name of a group, which is not escaped.
    pub(super) fn group_name(&self, group: &Group) -> String {
        match self.single_region(group) {
            Some(region) => region_name(region, group.regions[0]),
            None => count(group.regions.len() as u64, "smaller region"),
        }
    }

    /// Returns the name of a layer, which is not escaped.
    pub(super) fn layer_name(&self, layer: u16) -> String {
        let ancestor = usize::from(layer).checked_sub(1);
        let ancestor = ancestor.and_then(|number| self.info.ancestors.get(number));
        let path = ancestor.map_or(&self.info.file, |ancestor| &ancestor.file);
        let name = Path::new(path).file_name().unwrap_or_default();
        format!("{layer}: {}", names::shown(&name.to_string_lossy()))
    }
}

/// Returns the name of a region, or its number if it has none. The text is not escaped.
pub(super) fn region_name(region: &RegionFacts, number: usize) -> String {
    match (&region.name[..], region.space) {
        ("", _) => format!("region {number}"),
        (name, 0) => name.to_owned(),
        (name, space) => format!("{name} (space {space})"),
    }
}

fn read_trace(path: &Path, snapshot: &Snapshot, cancel: &Cancel) -> Result<Trace> {
    let own = path.to_owned();
    let trace = cancel.unless_stopped(move || Trace::read_path(own))??;
    trace
        .check_matches(snapshot)
        .with_context(|| names::path(path))?;
    Ok(trace)
}

/// Reads the statistics of a run, and refuses those of other memory.
fn read_run(path: &Path, snapshot: &Snapshot) -> Result<RunFacts> {
    let named = || names::path(path);
    let file = FileStore::open(path).with_context(named)?.into_file();
    let mut text = Vec::new();
    let limited = file.take(MAX_RUN_BYTES + 1).read_to_end(&mut text);
    limited.with_context(named)?;
    if text.len() as u64 > MAX_RUN_BYTES {
        bail!(
            "{}: is too large for statistics of a run; name a file that --run-json has written",
            named()
        );
    }
    let wrong = "is no statistics of a run; name a file that `restore --run-json` or \
                 `serve --run-json` has written";
    let failed = || format!("{}: {wrong}", named());
    let value: serde_json::Value = serde_json::from_slice(&text).with_context(failed)?;
    match value["run_version"].as_u64() {
        Some(version) if version == u64::from(RUN_VERSION) => {}
        Some(version) => bail!(
            "{}: has version {version} of the statistics, and this program reads version \
             {RUN_VERSION} only; use the program that has written it",
            named()
        ),
        None => bail!("{}", failed()),
    }
    let record: RunRecord = serde_json::from_value(value).with_context(failed)?;
    let expected = digest::hex(&snapshot.summary().content_digest);
    if record.content_digest != expected {
        bail!(
            "{}: is of other memory: its content digest is {}, and that of {} is {expected}; name \
             a run of this snapshot",
            named(),
            names::shown(&record.content_digest),
            snapshot.name()
        );
    }
    Ok(RunFacts {
        other_file: record.snapshot_id != snapshot.id().to_string(),
        record,
    })
}

impl TouchFacts {
    fn of(trace: &Trace, regions: &[Region]) -> Self {
        let touches = &trace.touches;
        let span = touches.iter().map(|touch| touch.at).max();
        let span = span.unwrap_or_default();
        let mut before = Vec::with_capacity(regions.len());
        let mut pages = 0;
        for region in regions {
            before.push(pages);
            pages += region.pages;
        }
        // The position of a page among those of all regions.
        let position = |page: u64| {
            let region = regions.partition_point(|region| region.first_page <= page);
            let region = region.checked_sub(1)?;
            let within = page - regions[region].first_page;
            (within < regions[region].pages).then(|| before[region] + within)
        };
        let mut plot = BTreeMap::new();
        for touch in touches {
            let Some(position) = position(touch.page) else {
                continue;
            };
            let column = part(touch.at.as_micros(), span.as_micros(), PLOT_COLUMNS);
            let row = part(position.into(), pages.saturating_sub(1).into(), PLOT_ROWS);
            *plot.entry((column, row)).or_default() += 1;
        }
        let step = touches.len().div_ceil(MAX_POINTS).max(1);
        let mut curve = vec![(Duration::ZERO, 0)];
        let last = touches.len().saturating_sub(1);
        for (number, touch) in touches.iter().enumerate() {
            if number % step == step - 1 || number == last {
                curve.push((touch.at, number as u64 + 1));
            }
        }
        Self {
            touches: touches.len() as u64,
            present_at_start: trace.present_at_start,
            end: trace.end,
            span,
            curve,
            plot,
        }
    }
}

/// Returns which of `parts` equal parts of 0 to `max` a number is in.
fn part(number: u128, max: u128, parts: usize) -> usize {
    let part = number * parts as u128 / (max + 1);
    usize::try_from(part).map_or(parts - 1, |part| part.min(parts - 1))
}

#[cfg(test)]
mod tests {
    use snapshot_format::trace::{Touch, TouchReason};

    use super::*;

    #[test]
    fn touches_are_placed_by_time_and_address() {
        let region = |first_page, pages| Region {
            space: 0,
            flags: 0,
            start: first_page << 20,
            pages,
            first_page,
            page_shift: 12,
            name: String::new(),
        };
        let touch = |page, ms| Touch {
            page,
            at: Duration::from_millis(ms),
            reason: TouchReason::Demand,
        };
        let trace = Trace {
            content_digest: [0; 32],
            page_slots: 2048,
            begun: std::time::SystemTime::UNIX_EPOCH,
            present_at_start: 3,
            end: TraceEnd::Settled,
            // The number 600 is past the end of its region.
            touches: vec![
                touch(0, 0),
                touch(1123, 10),
                touch(600, 50),
                touch(512, 100),
            ],
        };
        let regions = [region(0, 100), region(512, 1), region(1024, 100)];
        let facts = TouchFacts::of(&trace, &regions);
        assert_eq!((facts.touches, facts.present_at_start), (4, 3));
        let ms = Duration::from_millis;
        let curve = [
            (ms(0), 0),
            (ms(0), 1),
            (ms(10), 2),
            (ms(50), 3),
            (ms(100), 4),
        ];
        assert_eq!(facts.curve, curve);
        // The page has position 100 of 201.
        let middle = 100 * PLOT_ROWS / 201;
        let plot = [
            ((0, 0), 1),
            ((9, PLOT_ROWS - 1), 1),
            ((PLOT_COLUMNS - 1, middle), 1),
        ];
        assert_eq!(facts.plot, BTreeMap::from(plot));
    }

    #[test]
    fn curve_is_bounded_and_ends_with_the_last_touch() {
        let trace = Trace {
            content_digest: [0; 32],
            page_slots: 1 << 20,
            begun: std::time::SystemTime::UNIX_EPOCH,
            present_at_start: 0,
            end: TraceEnd::Settled,
            touches: (0..100_001)
                .map(|n| Touch {
                    page: n,
                    at: Duration::from_micros(n),
                    reason: TouchReason::Demand,
                })
                .collect(),
        };
        let facts = TouchFacts::of(&trace, &[]);
        assert!(facts.curve.len() <= MAX_POINTS + 2, "{}", facts.curve.len());
        let last = (Duration::from_millis(100), 100_001);
        assert_eq!(facts.curve.last(), Some(&last));
        assert!(facts.plot.is_empty());
    }
}
