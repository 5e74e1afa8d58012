//! The report of a restore, including what could not be restored.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount};
use serde::{Serialize, Serializer};
use snaprestore_engine::stats::{Durations, Stats, whole_micros, whole_millis};
use snaprestore_engine::{Failure, FailureKind};
use snapshot_format::{Page, ReadError, Reason, Snapshot};

use super::touch::Touched;
use crate::exit::Exit;
use crate::output::{count, micros};
use crate::trace_file::RecordingReport;

/// Maximum number of bad places listed for people.
const MAX_LISTED: usize = 20;

/// Report of a restore. The field names are part of the command's interface.
#[derive(Debug, Serialize)]
pub(crate) struct RestoreReport {
    pub(super) file: String,
    pub(super) pages: u64,
    /// Number of pages with unknown content, which were not touched.
    pub(super) unavailable_pages: u64,
    map_us: u64,
    first_page_us: Option<u64>,
    touch_ms: Option<u64>,
    /// Number of pages that were touched, in that time.
    touched_pages: u64,
    /// Time until all memory was present; `None` if pages are bad or unknown.
    complete_ms: Option<u64>,
    /// Number of pages that were needed but could not be restored.
    bad_pages: u64,
    faults: u64,
    fault_us: Durations,
    pages_copied: u64,
    pages_zeroed: u64,
    /// Number of zero pages that the kernel serves itself.
    pages_left_to_kernel: u64,
    prefetched_pages: u64,
    bytes_read: u64,
    bytes_decoded: u64,
    pub(crate) checked_pages: u64,
    pub(crate) mismatches: u64,
    /// Numbers of the first pages that differed.
    mismatched: Vec<u64>,
    failures: Vec<Bad>,
    /// The trace that was recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) trace: Option<RecordingReport>,
    /// The reasons why the trace or the statistics could not be written.
    #[serde(serialize_with = "texts", skip_serializing_if = "Vec::is_empty")]
    pub(super) unwritten: Vec<anyhow::Error>,
}

/// A place in the file that could not be used, and the pages affected by it.
#[derive(Debug, Serialize)]
struct Bad {
    file: String,
    /// Offset of the frame or index block, if one is to blame.
    offset: Option<u64>,
    damaged: bool,
    /// First and last number of each run of pages.
    pages: Vec<(u64, u64)>,
    detail: String,
}

impl RestoreReport {
    pub(super) fn new(
        file: String,
        snapshot: &Snapshot,
        stats: &Stats,
        failures: &[Failure],
        touched: Option<(&Touched, Duration)>,
    ) -> Self {
        let none = Touched::default();
        let found = touched.map_or(&none, |(touched, _)| touched);
        let bad = bad_places(snapshot, failures, &found.bad);
        let bad_pages = bad
            .iter()
            .flat_map(|bad| &bad.pages)
            .map(|(first, last)| last - first + 1)
            .sum();
        let mut fault_us = stats.fault_time.clone();
        fault_us.drop_buckets();
        Self {
            file,
            pages: snapshot.summary().pages,
            unavailable_pages: snapshot.summary().unavailable_pages,
            map_us: whole_micros(stats.mapped),
            first_page_us: found.first_page.map(whole_micros),
            touch_ms: touched.map(|(_, took)| whole_millis(took)),
            touched_pages: found.pages,
            // The engine counts a poisoned page as settled, but its memory is not restored.
            complete_ms: stats.complete.filter(|_| bad_pages == 0).map(whole_millis),
            bad_pages,
            faults: stats.faults,
            fault_us,
            pages_copied: [stats.demand, stats.prefetch]
                .iter()
                .map(|pages| pages.copied + pages.filled)
                .sum(),
            pages_zeroed: stats.demand.zeroed + stats.prefetch.zeroed,
            pages_left_to_kernel: stats.left_to_kernel,
            prefetched_pages: stats.prefetch.total(),
            bytes_read: stats.bytes_read,
            bytes_decoded: stats.bytes_decoded,
            checked_pages: found.checked_pages,
            mismatches: found.mismatches,
            mismatched: found.mismatched.clone(),
            failures: bad,
            trace: None,
            unwritten: Vec::new(),
        }
    }

    /// Returns the number of pages whose content the snapshot has.
    pub(crate) fn known_pages(&self) -> u64 {
        self.pages - self.unavailable_pages
    }

    /// Formats the recorded numbers of pages that differed.
    fn listed(&self) -> String {
        let numbers: Vec<_> = self.mismatched.iter().map(u64::to_string).collect();
        let noun = if self.mismatches == 1 {
            "page"
        } else {
            "pages"
        };
        let more = if self.mismatches > numbers.len() as u64 {
            ", ..."
        } else {
            ""
        };
        format!("{noun} {}{more}", numbers.join(", "))
    }

    /// Returns the exit code: a damaged file takes precedence over a failed operation.
    pub(crate) fn exit(&self) -> Exit {
        if self.failures.iter().any(|bad| bad.damaged) {
            Exit::Damaged
        } else if self.mismatches > 0 || !self.failures.is_empty() {
            Exit::Failed
        } else {
            Exit::Done
        }
    }
}

/// Serializes errors as texts with their sources.
#[expect(clippy::ptr_arg, reason = "serde passes a reference to the field")]
fn texts<S: Serializer>(errors: &Vec<anyhow::Error>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(errors.iter().map(|error| format!("{error:#}")))
}

/// Groups the pages that could not be restored by the place that is to blame.
fn bad_places(snapshot: &Snapshot, failures: &[Failure], touched: &[u64]) -> Vec<Bad> {
    type Affected = (Vec<u64>, bool, String);
    let mut places: BTreeMap<(String, Option<u64>), Affected> = BTreeMap::new();
    // Pages that were unavailable when the snapshot was taken are no failure of the restore.
    let failures = failures
        .iter()
        .filter(|failure| failure.kind != FailureKind::Unavailable);
    for failure in failures {
        let damaged = failure.kind == FailureKind::Damaged;
        places
            .entry((failure.file.clone(), failure.offset))
            .or_insert_with(|| {
                let detail = without_place(&failure.detail, &failure.file, failure.offset);
                (Vec::new(), damaged, detail)
            })
            .0
            .push(failure.page);
    }
    // The engine records the first failures only; the place of any other is looked up by its page.
    for &page in touched {
        let (place, damaged, detail) = blame(snapshot, page);
        places
            .entry(place)
            .or_insert_with(|| (Vec::new(), damaged, detail))
            .0
            .push(page);
    }
    places
        .into_iter()
        .map(|((file, offset), (pages, damaged, detail))| Bad {
            file,
            offset,
            damaged,
            pages: runs(pages),
            detail,
        })
        .collect()
}

/// Returns the file and the offset that are to blame for a page, whether there is damage, and what
/// is wrong.
fn blame(snapshot: &Snapshot, page: u64) -> ((String, Option<u64>), bool, String) {
    let own = snapshot.name();
    match snapshot.look_up(page, Reason::Verify) {
        Ok(Page::Stored { frame, .. }) => {
            let layer = snapshot.layer(frame.layer());
            let file = layer.map_or(own, |layer| layer.name()).to_owned();
            let detail = "its frame could not be restored";
            ((file, Some(frame.offset())), true, detail.into())
        }
        Ok(_) => {
            let detail = "the page could not be installed";
            ((own.to_owned(), None), false, detail.into())
        }
        Err(error) => {
            let (file, offset) = match &error {
                ReadError::Damaged { file, offset, .. } | ReadError::Io { file, offset, .. } => {
                    (&file[..], Some(*offset))
                }
                _ => (own, None),
            };
            let detail = without_place(&error.to_string(), file, offset);
            ((file.to_owned(), offset), error.is_damage(), detail)
        }
    }
}

/// Returns an error's text without the file and offset, which the report shows separately.
fn without_place(text: &str, file: &str, offset: Option<u64>) -> String {
    let rest = text
        .strip_prefix(file)
        .and_then(|rest| rest.strip_prefix(": "));
    let text = rest.unwrap_or(text);
    match offset {
        Some(offset) => text.replacen(&format!(" at byte {offset}:"), ":", 1),
        None => text.to_owned(),
    }
}

/// Returns the first and last number of each run of consecutive numbers.
fn runs(mut numbers: Vec<u64>) -> Vec<(u64, u64)> {
    numbers.sort_unstable();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if number <= *last + 1 => *last = number,
            _ => runs.push((number, number)),
        }
    }
    runs
}

impl fmt::Display for RestoreReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mapped      after {} us", HumanCount(self.map_us))?;
        if let Some(first) = self.first_page_us {
            writeln!(f, "first page  after {} us", HumanCount(first))?;
        }
        if let Some(touch) = self.touch_ms {
            writeln!(
                f,
                "touched     {} in {} ms",
                count(self.touched_pages, "page"),
                HumanCount(touch)
            )?;
        }
        match self.complete_ms {
            Some(complete) => writeln!(f, "complete    after {} ms", HumanCount(complete))?,
            None if self.bad_pages > 0 => writeln!(
                f,
                "complete    except {}",
                count(self.bad_pages, "bad page")
            )?,
            None if self.touch_ms.is_some() && self.unavailable_pages > 0 => writeln!(
                f,
                "complete    except {} of unknown content",
                count(self.unavailable_pages, "page")
            )?,
            None => writeln!(
                f,
                "complete    no: not every page was touched or prefetched"
            )?,
        }
        if self.faults > 0 {
            writeln!(
                f,
                "faults      {}; {} us at p50, {} p90, {} p99, {} at most",
                HumanCount(self.faults),
                micros(self.fault_us.p50),
                micros(self.fault_us.p90),
                micros(self.fault_us.p99),
                micros(self.fault_us.max)
            )?;
        }
        writeln!(
            f,
            "installed   {} copied, {} zeroed, {} of them by prefetch; {} left to the kernel",
            count(self.pages_copied, "page"),
            HumanCount(self.pages_zeroed),
            HumanCount(self.prefetched_pages),
            count(self.pages_left_to_kernel, "zero page")
        )?;
        writeln!(
            f,
            "read        {}, decoded to {}",
            BinaryBytes(self.bytes_read),
            BinaryBytes(self.bytes_decoded)
        )?;
        if let Some(trace) = &self.trace {
            write!(f, "{trace}")?;
        }
        if self.checked_pages > 0 {
            writeln!(
                f,
                "checked     {}: {}",
                count(self.checked_pages, "page"),
                match self.mismatches {
                    0 => "all equal".to_owned(),
                    differ => format!("{} DIFFER: {}", HumanCount(differ), self.listed()),
                }
            )?;
        }
        for bad in self.failures.iter().take(MAX_LISTED) {
            writeln!(f, "{bad}")?;
        }
        if self.failures.len() > MAX_LISTED {
            writeln!(
                f,
                "... and {} more bad places",
                self.failures.len() - MAX_LISTED
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BAD         {}", self.file)?;
        if let Some(offset) = self.offset {
            write!(f, ", at byte {offset}")?;
        }
        write!(f, ": {}; pages ", self.detail)?;
        for (number, (first, last)) in self.pages.iter().take(MAX_LISTED).enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        if self.pages.len() > MAX_LISTED {
            write!(f, ", ...")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_reported_in_runs() {
        assert_eq!(runs(vec![]), []);
        assert_eq!(runs(vec![5, 3, 4, 4, 9]), [(3, 5), (9, 9)]);
    }

    #[test]
    fn repeated_place_is_reported_once() {
        let told = |text, offset| without_place(text, "s: t", offset);
        assert_eq!(
            told("s: t: damaged frame at byte 40: wrong", Some(40)),
            "damaged frame: wrong"
        );
        assert_eq!(
            told("its frame could not be restored", Some(40)),
            "its frame could not be restored"
        );
    }
}
