//! Summaries of a run and of VMs that have ended, for people and programs.

use std::fmt;

use indicatif::HumanCount;
use serde::{Deserialize, Serialize};
use snaprestore_engine::pager::SessionEnd;
use snaprestore_engine::stats::{Stats, whole_micros};

use crate::api::types::VmState;
use crate::log::count;

/// The name of a VM in logs, messages and reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmLabel {
    /// The number of the VM.
    pub id: u64,
    /// The PID of the process.
    pub pid: u32,
    /// The name of its service.
    pub service: String,
}

impl VmLabel {
    /// Returns a span that adds the fields of this VM to all events in it.
    pub(crate) fn span(&self) -> tracing::Span {
        let Self { id, pid, service } = self;
        tracing::error_span!("vm", vm = id, pid, service)
    }
}

impl fmt::Display for VmLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, pid, service } = self;
        write!(f, "VM {id} (pid {pid}, service {service})")
    }
}

/// Summary of a daemon's run.
#[derive(Clone, Debug, Serialize)]
pub struct RunSummary {
    /// Number of VMs that were served.
    pub served: u64,
    /// Number of connections and VMs that were refused.
    pub refused: u64,
    /// Number of VMs that were killed after the daemon was asked to stop, before they had all their
    /// memory.
    pub incomplete: u64,
    /// Number of workers that replaced a dead one.
    pub worker_restarts: u64,
    /// Summaries of the first VMs.
    pub vms: Vec<VmSummary>,
}

impl fmt::Display for RunSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "served {}", count(self.served, "VM"))?;
        if self.refused > 0 {
            write!(f, "; refused {}", HumanCount(self.refused))?;
        }
        if self.incomplete > 0 {
            let killed = HumanCount(self.incomplete);
            write!(f, "; {killed} killed before their memory was complete")?;
        }
        writeln!(f)
    }
}

/// Summary of a VM that has ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmSummary {
    /// The VM.
    #[serde(flatten)]
    pub label: VmLabel,
    /// How the VM ended: the fields `ending` and `reason`.
    #[serde(flatten)]
    pub end: SessionEnd,
    faults: u64,
    fault_p50_us: u64,
    fault_p99_us: u64,
    /// Number of installed pages.
    pages: u64,
    /// Number of those pages that were installed before they were touched.
    prefetched: u64,
    discards: u64,
}

impl From<&SessionEnd> for VmState {
    fn from(end: &SessionEnd) -> Self {
        match end {
            SessionEnd::Complete => Self::Complete,
            SessionEnd::Exited => Self::Exited,
            SessionEnd::Killed(_) => Self::Killed,
            SessionEnd::Refused(_) => Self::Refused,
        }
    }
}

impl VmSummary {
    /// Creates the summary of a VM that was not served.
    pub(crate) fn new(label: VmLabel, end: SessionEnd) -> Self {
        Self {
            label,
            end,
            faults: 0,
            fault_p50_us: 0,
            fault_p99_us: 0,
            pages: 0,
            prefetched: 0,
            discards: 0,
        }
    }

    /// Adds the statistics of the VM's session.
    pub(crate) fn with(self, stats: &Stats) -> Self {
        Self {
            faults: stats.faults,
            fault_p50_us: whole_micros(stats.fault_time.p50),
            fault_p99_us: whole_micros(stats.fault_time.p99),
            pages: stats.demand.total() + stats.prefetch.total(),
            prefetched: stats.prefetch.total(),
            discards: stats.discards,
            ..self
        }
    }
}

/// Formats the part of a log line that follows the label.
impl fmt::Display for VmSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.end)?;
        if self.pages > 0 {
            write!(
                f,
                "; {} ({} us at p50, {} us p99), {} installed, {} of them before they were touched",
                count(self.faults, "fault"),
                self.fault_p50_us,
                self.fault_p99_us,
                count(self.pages, "page"),
                HumanCount(self.prefetched),
            )?;
        }
        Ok(())
    }
}
