//! Requests of operators and their replies, as used by the control socket, `ctl` and the metrics.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::config::{Service, ServiceError};
use crate::error::Chain;

/// The number of a VM, which is one session of a service. VMs are counted from 1 in the whole
/// daemon, and no number is used twice.
pub type VmId = u64;

/// Maximum number of ended VMs that are kept for operators.
pub(crate) const MAX_RECENT_VMS: usize = 100;

/// Reason why the daemon refuses a request, as text for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct RequestError(pub(crate) String);

impl RequestError {
    pub(crate) fn no_vm(id: VmId) -> Self {
        Self(format!("no VM {id}; `snaprestore ctl list` lists the VMs"))
    }

    pub(crate) fn no_service(name: &str) -> Self {
        Self(format!(
            "no service {name:?}; `snaprestore ctl list` lists the services"
        ))
    }
}

impl From<ServiceError> for RequestError {
    fn from(error: ServiceError) -> Self {
        Self(Chain(&error).to_string())
    }
}

pub(crate) type ApiResult<T> = Result<T, RequestError>;

/// Operations for operators. Each call is made by a thread of the caller, and may take as long as
/// the operation.
pub(crate) trait OperatorApi: Send + Sync {
    /// Serves one more snapshot. The service was [checked](Service::check) on its own, but not
    /// against the others.
    fn add(&self, service: Service) -> ApiResult<()>;
    /// Stops accepting VMs for a service; its current VMs are still served.
    fn remove(&self, name: &str) -> ApiResult<()>;
    fn list(&self) -> ApiResult<List>;
    /// Returns the statistics of one VM, or of all VMs being served. Those of an ended VM are
    /// available as long as the daemon remembers it.
    fn stats(&self, vm: Option<VmId>) -> ApiResult<Vec<VmStats>>;
    /// Installs all missing pages and releases the VMs. Returns when that is done, or has failed.
    fn complete(&self, which: VmSelector) -> ApiResult<Vec<Completed>>;
    /// Stops accepting VMs, completes the current ones, and makes the daemon exit afterwards.
    /// Returns when all are released.
    fn drain(&self) -> ApiResult<Vec<Completed>>;
    /// Replaces the worker by one of another program file, or of the same path if it was replaced.
    fn upgrade(&self, program: Option<PathBuf>) -> ApiResult<Upgraded>;
}

/// Selection of VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmSelector {
    Vm(VmId),
    All,
}

/// The services and VMs of a daemon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct List {
    /// The version of the program that replies.
    pub version: String,
    /// The PID of the daemon.
    pub pid: u32,
    /// Number of times that a new worker replaced one that had exited.
    pub worker_restarts: u64,
    /// Whether the daemon accepts no more VMs.
    pub draining: bool,
    /// The services.
    pub services: Vec<ServiceStatus>,
    /// The VMs being served and the last that have ended, ordered by number.
    pub vms: Vec<VmStatus>,
}

/// A service and the counts of its VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// The service.
    pub service: Service,
    /// Number of VMs being served.
    pub serving: u64,
    /// Number of VMs that have ended, in whatever way.
    pub ended: u64,
}

/// Status of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// The number of the VM.
    pub id: VmId,
    /// The name of its service.
    pub service: String,
    /// The PID of the process.
    pub pid: u32,
    /// The state of the VM.
    pub state: VmState,
    /// Reason why the VM was killed or refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Time since the VM connected, in milliseconds.
    pub age_ms: u64,
}

/// State of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The VM has connected and has not handed its memory over yet.
    Connecting,
    /// The VM's pages are installed when they are touched, or earlier.
    Serving,
    /// The daemon is installing all missing pages, and will then release the VM.
    Completing,
    /// The VM has all its memory, and was released.
    Complete,
    /// The process exited by itself.
    Exited,
    /// The process was killed, because a page of it could not be restored.
    Killed,
    /// The VM was not accepted.
    Refused,
}

impl VmState {
    pub(crate) const ALL: [Self; 7] = [
        Self::Connecting,
        Self::Serving,
        Self::Completing,
        Self::Complete,
        Self::Exited,
        Self::Killed,
        Self::Refused,
    ];

    /// Whether the VM has reached its final state.
    pub(crate) fn is_ended(self) -> bool {
        !matches!(self, Self::Connecting | Self::Serving | Self::Completing)
    }

    /// Returns the state's name in JSON and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Serving => "serving",
            Self::Completing => "completing",
            Self::Complete => "complete",
            Self::Exited => "exited",
            Self::Killed => "killed",
            Self::Refused => "refused",
        }
    }
}

/// Result of completing a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completed {
    /// The VM.
    pub vm: VmId,
    /// Whether the VM has all its memory and was released, or exited by itself meanwhile.
    pub done: bool,
    /// Reason why the VM was not completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The result of an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgraded {
    /// The version of the program that served until now.
    pub from: String,
    /// The version of the program that serves from now on.
    pub to: String,
}

/// Statistics of a VM's session. The counters restart at 0 when a new worker takes over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStats {
    /// The VM.
    #[serde(flatten)]
    pub vm: VmStatus,
    /// The session's statistics.
    #[serde(flatten)]
    pub session: SessionStats,
}

/// Statistics of a session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SessionStats {
    /// Number of pages of the memory, of 4 KiB.
    pub pages: u64,
    /// Number of pages that are neither present nor discarded nor poisoned yet.
    pub missing: u64,
    /// Number of faults read.
    pub faults: u64,
    /// Faults, by kind.
    pub fault_kinds: FaultKinds,
    /// Latency from reading a fault to resolving it.
    pub fault_us: Times,
    /// Latency, by source of the content.
    pub sources: Sources,
    /// Pages installed because of faults.
    pub demand: Pages,
    /// Pages installed by prefetch.
    pub prefetch: Pages,
    /// Number of pages poisoned because they could not be restored.
    pub poisoned: u64,
    /// Number of discards, unmappings and moves.
    pub discards: u64,
    /// Number of installs repeated because the mappings were changing.
    pub retries: u64,
    /// Installs that failed because memory was short, by the kind of memory.
    #[serde(default)]
    pub shortages: Shortages,
    /// Number of bytes of frames read from the snapshot.
    pub bytes_read: u64,
    /// Number of bytes decoded from frames.
    pub bytes_decoded: u64,
    /// Number of failures to load a page, whatever it was needed for.
    pub failures: u64,
}

/// Installs that failed because memory was short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortages {
    /// Number of shortages of memory in the machine or the VM's cgroup.
    pub memory: u64,
    /// Number of shortages in the pool of 2 MiB pages.
    #[serde(rename = "hugepages-2048kB")]
    pub huge_pages: u64,
}

/// Faults, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultKinds {
    /// Faults on a page that a frame holds.
    pub stored: u64,
    /// Faults on a page that repeats one word.
    pub fill: u64,
    /// Faults on a page that its owner has discarded.
    pub removed: u64,
    /// Faults on a page that was already present.
    pub present: u64,
    /// Faults on a poisoned page.
    pub poisoned: u64,
    /// Faults outside the memory that was handed over.
    pub outside: u64,
}

/// Latency of faults, by source of the content.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sources {
    /// Only a repeated word was needed.
    pub fill: Times,
    /// A frame was read and decoded.
    pub read: Times,
    /// The frame was already decoded.
    pub cached: Times,
    /// Another thread was loading the frame.
    pub waited: Times,
    /// No content was needed.
    pub none: Times,
}

/// Number of pages installed for one reason, by content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Pages from frames.
    pub copied: u64,
    /// Pages that repeat a word other than zero.
    pub filled: u64,
    /// Zero pages.
    pub zeroed: u64,
}

impl Pages {
    /// Returns the total number of pages.
    pub fn total(self) -> u64 {
        self.copied + self.filled + self.zeroed
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.copied += other.copied;
        self.filled += other.filled;
        self.zeroed += other.zeroed;
    }
}

impl From<snaprestore_engine::stats::PageCounts> for Pages {
    fn from(counts: snaprestore_engine::stats::PageCounts) -> Self {
        let snaprestore_engine::stats::PageCounts {
            copied,
            filled,
            zeroed,
        } = counts;
        Self {
            copied,
            filled,
            zeroed,
        }
    }
}

/// Durations in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Number of durations.
    pub count: u64,
    /// The median.
    pub p50: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The maximum.
    pub max: f64,
    /// The sum.
    pub sum: f64,
    /// The histogram's buckets that are not empty, for uses beyond percentiles. Each has the
    /// longest duration that falls into it, in nanoseconds, and a count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buckets: Vec<(u64, u64)>,
}

/// Converts a duration to microseconds, with one decimal.
#[expect(clippy::cast_precision_loss, reason = "one decimal of it is shown")]
fn micros(nanos: u64) -> f64 {
    (nanos as f64 / 100.0).round() / 10.0
}

impl Times {
    /// Creates the times from buckets in rising order. The last bucket may end above the longest
    /// duration.
    pub fn of(buckets: Vec<(u64, u64)>, sum: Duration, max: Duration) -> Self {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self::of_nanos(buckets, micros(nanos(sum)), nanos(max))
    }

    fn of_nanos(buckets: Vec<(u64, u64)>, sum: f64, max: u64) -> Self {
        let count = buckets.iter().map(|(_, count)| count).sum();
        let at = |percent: u64| {
            let rank = (u128::from(count) * u128::from(percent)).div_ceil(100);
            let mut seen = 0;
            let found = buckets.iter().find(|(_, count)| {
                seen += u128::from(*count);
                seen >= rank
            });
            micros(found.map_or(0, |(upper, _)| (*upper).min(max)))
        };
        Self {
            count,
            p50: at(50),
            p90: at(90),
            p99: at(99),
            max: micros(max),
            sum,
            buckets,
        }
    }

    /// Returns the durations recorded after `earlier`. The maximum is known only up to the size of
    /// its bucket.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut buckets = Vec::new();
        let mut before = earlier.buckets.iter().peekable();
        for (upper, count) in &self.buckets {
            while before.next_if(|(other, _)| other < upper).is_some() {}
            let had = before.next_if(|(other, _)| other == upper);
            let new = count.saturating_sub(had.map_or(0, |(_, count)| *count));
            if new > 0 {
                buckets.push((*upper, new));
            }
        }
        let longest = buckets.last().map_or(0, |(upper, _)| *upper);
        Self::of_nanos(buckets, (self.sum - earlier.sum).max(0.0), longest)
    }

    /// Adds the durations of `other`.
    pub(crate) fn add(&mut self, other: &Self) {
        let mut buckets = Vec::with_capacity(self.buckets.len().max(other.buckets.len()));
        let mut ours = self.buckets.iter().copied().peekable();
        let mut theirs = other.buckets.iter().copied().peekable();
        loop {
            let next = match (ours.peek(), theirs.peek()) {
                (None, None) => break,
                (Some((upper, _)), None) | (None, Some((upper, _))) => *upper,
                (Some((a, _)), Some((b, _))) => *a.min(b),
            };
            let mut count = 0;
            for side in [&mut ours, &mut theirs] {
                count += side.next_if(|(upper, _)| *upper == next).map_or(0, |b| b.1);
            }
            buckets.push((next, count));
        }
        let (sum, max) = (self.sum + other.sum, self.max.max(other.max));
        let longest = buckets.last().map_or(0, |(upper, _)| *upper);
        *self = Self::of_nanos(buckets, sum, longest);
        // The maximum is kept as given, and not as its bucket has it.
        self.max = max;
        for percentile in [&mut self.p50, &mut self.p90, &mut self.p99] {
            *percentile = percentile.min(max);
        }
    }
}

impl SessionStats {
    /// Returns all histograms.
    fn histograms(&mut self) -> [&mut Times; 6] {
        let Sources {
            fill,
            read,
            cached,
            waited,
            none,
        } = &mut self.sources;
        [&mut self.fault_us, fill, read, cached, waited, none]
    }

    /// Adds the statistics of another session.
    pub(crate) fn add(&mut self, other: &Self) {
        let mut other = other.clone();
        for (times, others) in self.histograms().into_iter().zip(other.histograms()) {
            times.add(others);
        }
        let (kinds, others) = (&mut self.fault_kinds, other.fault_kinds);
        for (number, other) in [
            (&mut kinds.stored, others.stored),
            (&mut kinds.fill, others.fill),
            (&mut kinds.removed, others.removed),
            (&mut kinds.present, others.present),
            (&mut kinds.poisoned, others.poisoned),
            (&mut kinds.outside, others.outside),
            (&mut self.pages, other.pages),
            (&mut self.missing, other.missing),
            (&mut self.faults, other.faults),
            (&mut self.poisoned, other.poisoned),
            (&mut self.discards, other.discards),
            (&mut self.retries, other.retries),
            (&mut self.shortages.memory, other.shortages.memory),
            (&mut self.shortages.huge_pages, other.shortages.huge_pages),
            (&mut self.bytes_read, other.bytes_read),
            (&mut self.bytes_decoded, other.bytes_decoded),
            (&mut self.failures, other.failures),
        ] {
            *number += other;
        }
        self.demand.add(other.demand);
        self.prefetch.add(other.prefetch);
    }

    /// Drops the buckets of the histograms, and keeps only the percentiles.
    pub(crate) fn drop_buckets(&mut self) {
        for times in self.histograms() {
            times.buckets = Vec::new();
        }
    }
}

impl From<&snaprestore_engine::stats::Durations> for Times {
    fn from(times: &snaprestore_engine::stats::Durations) -> Self {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let buckets = times.buckets.iter();
        let buckets = buckets.map(|(upper, count)| (nanos(*upper), *count));
        Self::of(buckets.collect(), times.sum, times.max)
    }
}

impl From<&snaprestore_engine::stats::Stats> for SessionStats {
    fn from(stats: &snaprestore_engine::stats::Stats) -> Self {
        Self {
            pages: stats.pages,
            missing: stats.missing,
            faults: stats.faults,
            fault_kinds: FaultKinds {
                stored: stats.fault_kinds.stored,
                fill: stats.fault_kinds.fill,
                removed: stats.fault_kinds.removed,
                present: stats.fault_kinds.present,
                poisoned: stats.fault_kinds.poisoned,
                outside: stats.fault_kinds.outside,
            },
            fault_us: (&stats.fault_times.all).into(),
            sources: Sources {
                fill: (&stats.fault_times.fill).into(),
                read: (&stats.fault_times.read).into(),
                cached: (&stats.fault_times.cached).into(),
                waited: (&stats.fault_times.another).into(),
                none: (&stats.fault_times.nowhere).into(),
            },
            demand: stats.demand.into(),
            prefetch: stats.prefetch.into(),
            poisoned: stats.poisoned,
            discards: stats.events,
            retries: stats.retries,
            shortages: Shortages {
                memory: stats.shortages,
                huge_pages: stats.huge_shortages,
            },
            bytes_read: stats.bytes_read,
            bytes_decoded: stats.bytes_decoded,
            failures: stats.failures,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(buckets: &[(u64, u64)]) -> Times {
        let max = buckets.last().map_or(0, |(upper, _)| *upper);
        let sum = buckets.iter().map(|(upper, count)| upper * count).sum();
        let nanos = Duration::from_nanos;
        Times::of(buckets.to_vec(), nanos(sum), nanos(max))
    }

    #[test]
    fn percentiles_are_those_of_the_buckets() {
        let times = times(&[(1000, 50), (2000, 40), (3000, 9), (9000, 1)]);
        assert_eq!(times.count, 100);
        let found = (times.p50, times.p90, times.p99, times.max);
        assert_eq!(found, (1.0, 2.0, 3.0, 9.0));
        assert!((times.sum - 166.0).abs() < 0.01, "{}", times.sum);
        let none = Times::of(Vec::new(), Duration::ZERO, Duration::ZERO);
        assert_eq!(none, Times::default());
    }

    #[test]
    fn the_longest_is_not_made_longer_by_its_bucket() {
        let times = Times::of(
            vec![(1000, 1)],
            Duration::from_nanos(900),
            Duration::from_nanos(900),
        );
        assert_eq!((times.p99, times.max), (0.9, 0.9));
    }

    #[test]
    fn what_came_since_is_the_difference() {
        let before = times(&[(1000, 5), (4000, 1)]);
        let after = times(&[(1000, 5), (2000, 7), (4000, 3), (5000, 1)]);
        let new = after.since(&before);
        assert_eq!(new.buckets, [(2000, 7), (4000, 2), (5000, 1)]);
        assert_eq!((new.count, new.p50, new.p99), (10, 2.0, 5.0));
        assert_eq!(after.since(&after).count, 0);
        // A new worker starts at 0.
        assert_eq!(before.since(&after).count, 0);
    }

    #[test]
    fn what_is_added_up_is_all_of_it() {
        let mut all = times(&[(1000, 5), (4000, 1)]);
        all.add(&times(&[(500, 1), (1000, 2), (9000, 3)]));
        assert_eq!(all.buckets, [(500, 1), (1000, 7), (4000, 1), (9000, 3)]);
        assert_eq!((all.count, all.max, all.p50), (12, 9.0, 1.0));
    }

    #[test]
    fn states_have_the_names_that_json_has() {
        for state in VmState::ALL {
            let json = serde_json::to_value(state).unwrap();
            assert_eq!(json, state.name());
        }
    }
}
