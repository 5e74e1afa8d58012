//! The journal: log lines, and the summaries of VMs that have ended.

use std::collections::VecDeque;
use std::fmt::Display;
use std::time::Instant;

use super::Console;
use crate::api::summary::{RunSummary, VmLabel, VmSummary};
use crate::api::types::{MAX_RECENT_VMS, VmState, VmStatus};
use crate::ipc::EndCounts;
use crate::policy::{self, Counter};

/// Maximum number of summaries of VMs to keep; further ones are only counted.
const MAX_SUMMARIES: usize = 10_000;

/// The journal of a daemon.
pub(super) struct Journal {
    /// Output for messages; without it, they are logged.
    console: Option<Box<dyn Console>>,
    /// Lines about refused connections, since a peer can make any number of them.
    refusal_lines: Counter,
    /// Number of such lines that were not logged, and the time of the last summary of them.
    suppressed: (u64, Instant),
    refusal_summaries: Counter,
    summaries: Vec<VmSummary>,
    /// Counts of ended VMs and refused connections of all services, including removed ones.
    ended: EndCounts,
    incomplete: u64,
    /// The VMs that ended last, for operators.
    recent: VecDeque<VmStatus>,
}

impl Journal {
    pub(super) fn new(console: Option<Box<dyn Console>>) -> Self {
        Self {
            console,
            refusal_lines: Counter::default(),
            suppressed: (0, Instant::now()),
            refusal_summaries: Counter::default(),
            summaries: Vec::new(),
            ended: EndCounts::new(),
            incomplete: 0,
            recent: VecDeque::new(),
        }
    }

    /// Logs an event.
    pub(super) fn info(&self, what: impl Display) {
        if let Some(console) = &self.console {
            console.info(&what);
        } else {
            tracing::info!("{what}");
        }
    }

    /// Logs an error.
    pub(super) fn error(&self, what: impl Display) {
        if let Some(console) = &self.console {
            console.error(&what);
        } else {
            tracing::error!("{what}");
        }
    }

    /// Logs `what` happens to a VM.
    pub(super) fn vm_info(&self, label: &VmLabel, what: impl Display) {
        match &self.console {
            Some(console) => console.info(&format_args!("{label}: {what}")),
            None => label.span().in_scope(|| tracing::info!("{what}")),
        }
    }

    /// Logs an error of a VM.
    pub(super) fn vm_error(&self, label: &VmLabel, what: impl Display) {
        match &self.console {
            Some(console) => console.error(&format_args!("{label}: {what}")),
            None => label.span().in_scope(|| tracing::error!("{what}")),
        }
    }

    /// Logs a refused connection, unless there are too many.
    pub(super) fn refusal(&mut self, label: &VmLabel, what: impl Display) {
        let now = Instant::now();
        if !self.refusal_lines.admit(&policy::REFUSAL_LINES, now) {
            self.suppressed.0 += 1;
            return;
        }
        match &self.console {
            Some(console) => console.error(&format_args!("{label}: {what}")),
            // Logged at a place of its own, so that these events don't suppress others.
            None => label.span().in_scope(|| tracing::error!("{what}")),
        }
    }

    /// Logs the number of refused connections that were not logged, once a second.
    pub(super) fn log_suppressed(&mut self) {
        if self.suppressed.1.elapsed() < super::POLL_INTERVAL {
            return;
        }
        let (suppressed, _) = std::mem::replace(&mut self.suppressed, (0, Instant::now()));
        if suppressed > 0 {
            self.error(format_args!("{suppressed} more connections were refused"));
        }
    }

    /// Logs how a VM ended, and keeps it for the summary and for operators. Returns its status for
    /// them.
    pub(super) fn record_end(&mut self, connected: Instant, summary: VmSummary) -> VmStatus {
        match summary.end.reason() {
            Some(_) => self.vm_error(&summary.label, &summary),
            None => self.vm_info(&summary.label, &summary),
        }
        let age = u64::try_from(connected.elapsed().as_millis());
        let status = VmStatus {
            id: summary.label.id,
            service: summary.label.service.clone(),
            pid: summary.label.pid,
            state: (&summary.end).into(),
            reason: summary.end.reason().map(str::to_owned),
            age_ms: age.unwrap_or(u64::MAX),
        };
        if self.recent.len() == MAX_RECENT_VMS {
            self.recent.pop_front();
        }
        self.recent.push_back(status.clone());
        self.keep(summary);
        status
    }

    /// Logs a refused handshake, and keeps it for the summary.
    pub(super) fn record_refusal(&mut self, summary: VmSummary) {
        self.refusal(&summary.label, &summary);
        let (counter, limit) = (&mut self.refusal_summaries, &policy::REFUSAL_SUMMARIES);
        if counter.admit(limit, Instant::now()) {
            self.keep(summary);
        }
    }

    fn keep(&mut self, summary: VmSummary) {
        if self.summaries.len() < MAX_SUMMARIES {
            self.summaries.push(summary);
        }
    }

    /// Counts an ended VM, or a refused connection.
    pub(super) fn count_ended(&mut self, state: VmState) {
        *self.ended.entry(state).or_default() += 1;
    }

    /// Counts a VM that was killed after the daemon was asked to stop.
    pub(super) fn count_incomplete(&mut self) {
        self.incomplete += 1;
    }

    /// Returns the VMs that ended last.
    pub(super) fn recent(&self) -> impl Iterator<Item = &VmStatus> {
        self.recent.iter()
    }

    /// Returns the summary of the run.
    pub(super) fn into_summary(self, worker_restarts: u64) -> RunSummary {
        let refused = self.ended.get(&VmState::Refused).copied().unwrap_or(0);
        RunSummary {
            served: self.ended.values().sum::<u64>() - refused,
            refused,
            incomplete: self.incomplete,
            worker_restarts,
            vms: self.summaries,
        }
    }
}
