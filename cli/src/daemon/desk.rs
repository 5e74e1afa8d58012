//! What the daemon does for its operators, and what it tells them: the control socket, `ctl` and the
//! metrics all speak in these.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use snaprestore_engine::pager;

use super::config::Service;

/// The number of a VM: one session of a service. Counted through the whole daemon from 1, and never
/// given again.
pub(crate) type VmId = u64;

/// Why the daemon doesn't do what it was asked for, in words for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) String);

impl Refused {
    pub(crate) fn no_vm(id: VmId) -> Self {
        Self(format!(
            "there is no VM {id}; `ctl list` shows those that there are"
        ))
    }

    pub(crate) fn no_service(name: &str) -> Self {
        Self(format!(
            "there is no service {name:?}; `ctl list` shows those that there are"
        ))
    }
}

impl From<anyhow::Error> for Refused {
    fn from(error: anyhow::Error) -> Self {
        Self(format!("{error:#}"))
    }
}

pub(crate) type Answer<T> = Result<T, Refused>;

/// The daemon, to those who ask it for something. Each call is made by a thread of its caller's, and
/// may take as long as what was asked for.
pub(crate) trait Desk: Send + Sync {
    /// Serves one more snapshot. It was [checked](Service::check) by itself, not against the others.
    fn add(&self, service: Service) -> Answer<()>;
    /// Takes no more VMs for a service; those that it has go on.
    fn remove(&self, name: &str) -> Answer<()>;
    fn list(&self) -> Answer<List>;
    /// Of one VM, or of all that are served; one that has ended is told about as long as the daemon
    /// remembers it.
    fn stats(&self, vm: Option<VmId>) -> Answer<Vec<VmStats>>;
    /// Installs what is missing and lets the VMs go; returns when that is done, or can't be.
    fn complete(&self, which: Which) -> Answer<Vec<Completed>>;
    /// Takes no more VMs, completes those that there are, and has the daemon end after that; returns
    /// when all are let go.
    fn drain(&self) -> Answer<Vec<Completed>>;
    /// Goes on with another program file, or with the same one if it was replaced.
    fn upgrade(&self, program: Option<PathBuf>) -> Answer<Upgraded>;
}

/// Which VMs are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Vm(VmId),
    All,
}

/// What is served.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct List {
    /// The program that answers.
    pub(crate) version: String,
    /// Its process.
    pub(crate) pid: u32,
    /// How often another one took over from a worker that had ended.
    pub(crate) worker_restarts: u64,
    /// Whether it takes no more VMs.
    pub(crate) draining: bool,
    pub(crate) services: Vec<Listed>,
    /// Those that are served and the last that have ended, by their numbers.
    pub(crate) vms: Vec<Vm>,
}

/// A service and its VMs, counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    pub(crate) service: Service,
    /// VMs that are served now.
    pub(crate) serving: u64,
    /// VMs that have ended, in whatever way.
    pub(crate) ended: u64,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Vm {
    pub(crate) id: VmId,
    pub(crate) service: String,
    pub(crate) pid: u32,
    pub(crate) state: VmState,
    /// Why it was killed or refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// Since it connected.
    pub(crate) age_ms: u64,
}

/// How far a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum VmState {
    /// It has connected and has not handed its memory over yet.
    Connecting,
    /// Its pages come when they are touched, or before.
    Serving,
    /// Everything that is missing is being installed, and then it is let go.
    Completing,
    /// It has all its memory, and was let go.
    Complete,
    /// It ended by itself.
    Exited,
    /// It was killed, because a page of it could not be had.
    Killed,
    /// It was not taken.
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

    /// Whether nothing more will happen to it.
    pub(crate) fn is_ended(self) -> bool {
        !matches!(self, Self::Connecting | Self::Serving | Self::Completing)
    }

    /// As it is written in JSON and metrics.
    pub(crate) fn name(self) -> &'static str {
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

/// What became of a VM that was to be completed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Completed {
    pub(crate) vm: VmId,
    /// Whether it has all its memory and was let go, or ended by itself meanwhile.
    pub(crate) done: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
}

/// Who answers from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Upgraded {
    pub(crate) from: String,
    pub(crate) to: String,
}

/// What a VM's session has done. The counters begin at 0 again when a new worker takes it over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VmStats {
    #[serde(flatten)]
    pub(crate) vm: Vm,
    #[serde(flatten)]
    pub(crate) session: SessionStats,
}

/// The numbers of a session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SessionStats {
    /// Pages of its memory, of 4 KiB.
    pub(crate) pages: u64,
    /// Pages that are neither there nor discarded nor poisoned yet.
    pub(crate) missing: u64,
    /// Faults read.
    pub(crate) faults: u64,
    /// By what they met.
    pub(crate) fault_kinds: FaultKinds,
    /// From reading a fault to its answer.
    pub(crate) fault_us: Times,
    /// The same, by where the content came from.
    pub(crate) sources: Sources,
    /// Pages that faults brought in.
    pub(crate) demand: Pages,
    /// Pages that prefetch brought in.
    pub(crate) prefetch: Pages,
    pub(crate) poisoned: u64,
    /// Discards, unmappings and moves.
    pub(crate) discards: u64,
    /// Installs that had to be repeated because the mappings were changing.
    pub(crate) retries: u64,
    /// Installs that were given up for want of memory, by where it was to come from.
    #[serde(default)]
    pub(crate) shortages: Shortages,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_decoded: u64,
    /// Failures to have a page, for whatever reason it was wanted.
    pub(crate) failures: u64,
}

/// Installs that were given up for want of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shortages {
    /// Shortages of the machine's or the VM's cgroup's memory.
    pub(crate) memory: u64,
    /// Shortages of the pool of 2 MiB pages.
    #[serde(rename = "hugepages-2048kB")]
    pub(crate) huge_pages: u64,
}

/// Faults, by what they met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FaultKinds {
    /// A page that a frame holds.
    pub(crate) stored: u64,
    /// A page that repeats one word.
    pub(crate) fill: u64,
    /// A page that its owner has discarded.
    pub(crate) removed: u64,
    /// A page that was there by then.
    pub(crate) present: u64,
    /// A page that is poisoned.
    pub(crate) poisoned: u64,
    /// No page of the memory that was handed over.
    pub(crate) outside: u64,
}

/// How long faults took, by where the content came from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sources {
    /// No content was needed but a repeated word.
    pub(crate) fill: Times,
    /// A frame was read and decoded.
    pub(crate) read: Times,
    /// The frame was decoded already.
    pub(crate) cached: Times,
    /// Another thread was bringing it.
    pub(crate) waited: Times,
    /// Nothing had to be brought.
    pub(crate) none: Times,
}

/// Pages installed for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pages {
    /// From frames.
    pub(crate) copied: u64,
    /// Repeating a word other than zero.
    pub(crate) filled: u64,
    pub(crate) zeroed: u64,
}

impl Pages {
    pub(crate) fn total(self) -> u64 {
        self.copied + self.filled + self.zeroed
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.copied += other.copied;
        self.filled += other.filled;
        self.zeroed += other.zeroed;
    }
}

impl From<pager::PageCounts> for Pages {
    fn from(counts: pager::PageCounts) -> Self {
        let pager::PageCounts {
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
pub(crate) struct Times {
    pub(crate) count: u64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
    /// All of them together.
    pub(crate) sum: f64,
    /// What they were counted in, for who needs more than percentiles: each bucket that isn't empty,
    /// by the longest duration that falls into it, in nanoseconds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) buckets: Vec<(u64, u64)>,
}

/// A duration in microseconds, with one decimal.
#[expect(clippy::cast_precision_loss, reason = "one decimal of it is shown")]
fn micros(nanos: u64) -> f64 {
    (nanos as f64 / 100.0).round() / 10.0
}

impl Times {
    /// From buckets in rising order, of which the last may end above the longest duration.
    pub(crate) fn of(buckets: Vec<(u64, u64)>, sum: Duration, max: Duration) -> Self {
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

    /// Those that were recorded after `earlier`; of a longest one is known only in which bucket it
    /// fell.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
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

    /// Adds others to these.
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
        // As it was said, and not as its bucket has it.
        self.max = max;
        for percentile in [&mut self.p50, &mut self.p90, &mut self.p99] {
            *percentile = percentile.min(max);
        }
    }
}

impl SessionStats {
    /// Every histogram that it has.
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

    /// Adds the numbers of another session.
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

    /// Leaves only the percentiles of its histograms.
    pub(crate) fn drop_buckets(&mut self) {
        for times in self.histograms() {
            times.buckets = Vec::new();
        }
    }
}

impl From<&pager::Durations> for Times {
    fn from(times: &pager::Durations) -> Self {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let buckets = times.buckets.iter();
        let buckets = buckets.map(|(upper, count)| (nanos(*upper), *count));
        Self::of(buckets.collect(), times.sum, times.max)
    }
}

impl From<&pager::Stats> for SessionStats {
    fn from(stats: &pager::Stats) -> Self {
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
        // A new worker begins at 0.
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
