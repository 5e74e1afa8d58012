//! The daemon's responses, rendered for people and programs.

use std::fmt;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{BinaryBytes, HumanCount};
use serde::Serialize;

use crate::names;
use crate::output::{count, micros, percent};
use snaprestore_daemon::api::types::{Completed, List, Upgraded, VmStats, VmStatus};
use snaprestore_engine::stats::{Durations, FaultSources};

/// Report of an added or removed service.
#[derive(Serialize)]
pub(super) struct ServiceReport {
    service: String,
    #[serde(skip)]
    what: &'static str,
}

impl ServiceReport {
    pub(super) fn added(service: String) -> Self {
        let what = "is served";
        Self { service, what }
    }

    pub(super) fn removed(service: String) -> Self {
        let what = "accepts no more VMs; its current VMs are still served";
        Self { service, what }
    }
}

impl fmt::Display for ServiceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.service, self.what)
    }
}

/// Report of a recording that has begun.
#[derive(Serialize)]
pub(super) struct RecordReport {
    pub(super) vm: u64,
}

impl fmt::Display for RecordReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "VM {} is being recorded", self.vm)
    }
}

/// Report of an upgrade to another program.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct UpgradeReport(pub(super) Upgraded);

impl fmt::Display for UpgradeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Upgraded { from, to } = &self.0;
        writeln!(f, "upgraded from {from} to {to}")
    }
}

/// Report of the services and VMs.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct ListReport(pub(super) List);

impl fmt::Display for ListReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = &self.0;
        write!(f, "snaprestore {}, process {}", list.version, list.pid)?;
        if list.worker_restarts > 0 {
            write!(f, ", {}", count(list.worker_restarts, "worker restart"))?;
        }
        if list.draining {
            write!(f, ", draining")?;
        }
        writeln!(f)?;
        if list.services.is_empty() {
            writeln!(f, "no services; add one with `snaprestore ctl add`")?;
        } else {
            let mut table = plain([
                "SERVICE", "SERVING", "ENDED", "LAYERS", "SNAPSHOT", "SOCKET",
            ]);
            for listed in &list.services {
                table.add_row([
                    listed.service.name.clone(),
                    listed.serving.to_string(),
                    listed.ended.to_string(),
                    listed.layers.to_string(),
                    names::path(&listed.service.snapshot),
                    names::path(&listed.service.socket),
                ]);
            }
            to_the_right(&mut table, &[1, 2, 3]);
            writeln!(f, "\n{}", table.trim_fmt())?;
        }
        if !list.vms.is_empty() {
            // The longest column is the last one, so that it shifts no other column.
            let mut table = plain(["VM", "SERVICE", "PID", "STATE", "AGE", "REASON"]);
            for vm in &list.vms {
                table.add_row([
                    vm.id.to_string(),
                    vm.service.clone(),
                    vm.pid.to_string(),
                    vm.state.name().to_owned(),
                    age(vm.age_ms),
                    reason(vm),
                ]);
            }
            to_the_right(&mut table, &[0, 2, 4]);
            writeln!(f, "\n{}", table.trim_fmt())?;
        }
        Ok(())
    }
}

/// Returns why a VM was killed or refused, in one line, since parts of it come from file names.
fn reason(vm: &VmStatus) -> String {
    let reason = vm.reason.as_deref().unwrap_or_default();
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    reason.chars().map(plain).collect()
}

/// Formats a duration for people.
fn age(millis: u64) -> String {
    let (seconds, tenths) = (millis / 1000, millis / 100 % 10);
    match seconds {
        0..60 => format!("{seconds}.{tenths} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Report of the sessions' statistics.
#[derive(Serialize)]
pub(super) struct StatsReport {
    pub(super) vms: Vec<VmStats>,
}

impl fmt::Display for StatsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.vms.is_empty() {
            return writeln!(f, "no VM is served");
        }
        for (i, vm) in self.vms.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            one(f, vm)?;
        }
        Ok(())
    }
}

/// Formats the statistics of one VM.
fn one(f: &mut fmt::Formatter<'_>, stats: &VmStats) -> fmt::Result {
    let (vm, s) = (&stats.vm, &stats.session);
    let (id, service, pid) = (vm.id, &vm.service, vm.pid);
    let age = age(vm.age_ms);
    writeln!(
        f,
        "VM {id} (pid {pid}, service {service}), for {age}: {}",
        vm.state.name()
    )?;
    if vm.reason.is_some() {
        writeln!(f, "reason      {}", reason(vm))?;
    }
    writeln!(
        f,
        "memory      {}, {} missing; {} done",
        count(s.pages, "page"),
        HumanCount(s.missing),
        percent(s.pages.saturating_sub(s.missing), s.pages)
    )?;
    let kinds = s.fault_kinds;
    writeln!(
        f,
        "faults      {}: {} on stored pages, {} fills, {} removed, {} present, {} poisoned, {} outside",
        HumanCount(s.faults),
        HumanCount(kinds.stored),
        HumanCount(kinds.fill),
        HumanCount(kinds.removed),
        HumanCount(kinds.present),
        HumanCount(kinds.poisoned),
        HumanCount(kinds.outside)
    )?;
    writeln!(f, "latency     {}", Latency(&s.fault_time))?;
    for ((name, _), times) in FaultSources::LABELS.iter().zip(s.sources.values()) {
        if times.count > 0 {
            let number = HumanCount(times.count);
            writeln!(f, "  {name:<8}  {}; {number}", Latency(times))?;
        }
    }
    writeln!(
        f,
        "installed   {} pages by faults, {} by prefetch",
        HumanCount(s.demand.total()),
        HumanCount(s.prefetch.total())
    )?;
    writeln!(
        f,
        "read        {}, decoded to {}",
        BinaryBytes(s.bytes_read),
        BinaryBytes(s.bytes_decoded)
    )?;
    writeln!(
        f,
        "events      {}, {}, {}, {}",
        count(s.discards, "discard"),
        count(s.retries, "retried install"),
        count(s.failures, "failure"),
        count(s.poisoned, "poisoned page")
    )?;
    for (source, times) in [
        ("memory", s.shortages.memory),
        ("pool hugepages-2048kB", s.shortages.huge_pages),
    ] {
        if times > 0 {
            let installs = count(times, "install");
            writeln!(f, "shortage    {source}: {installs} given up")?;
        }
    }
    Ok(())
}

/// Latency percentiles, formatted in one line.
struct Latency<'a>(&'a Durations);

impl fmt::Display for Latency<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = self.0;
        if times.count == 0 {
            return f.write_str("-");
        }
        write!(
            f,
            "{:.1} us at p50, {:.1} p90, {:.1} p99, {:.1} at most",
            micros(times.p50),
            micros(times.p90),
            micros(times.p99),
            micros(times.max)
        )
    }
}

/// Report of the VMs that were to be released.
#[derive(Serialize)]
pub(super) struct CompleteReport {
    pub(super) vms: Vec<Completed>,
}

impl fmt::Display for CompleteReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.vms.is_empty() {
            return writeln!(f, "no VM left to complete");
        }
        for vm in &self.vms {
            let id = vm.vm;
            match (&vm.reason, vm.done) {
                (_, true) => writeln!(f, "VM {id} no longer needs the daemon")?,
                (Some(reason), false) => writeln!(f, "cannot complete VM {id}: {reason}")?,
                (None, false) => writeln!(f, "cannot complete VM {id}")?,
            }
        }
        Ok(())
    }
}

/// Returns a table without borders.
pub(super) fn plain<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// Aligns columns of numbers to the right.
pub(super) fn to_the_right(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snaprestore_daemon::api::types::VmState;

    #[test]
    fn long_reasons_move_no_column() {
        let vm = |id: u64, reason: Option<&str>| VmStatus {
            id,
            service: "web".into(),
            pid: 1000 + u32::try_from(id).unwrap(),
            state: VmState::Killed,
            reason: reason.map(str::to_owned),
            age_ms: 1000,
        };
        let list = List {
            vms: vec![
                vm(1, None),
                vm(2, Some(&"a page is damaged\n".repeat(30))),
                vm(100, Some("short")),
            ],
            ..List::default()
        };
        let text = ListReport(list).to_string();
        let table = text.lines().skip_while(|line| !line.contains("STATE"));
        let table: Vec<_> = table.collect();
        assert_eq!(table.len(), 4, "{text}");
        let end = table[0].find("AGE").unwrap() + 3;
        for row in &table[1..] {
            assert!(
                row.get(..end).is_some_and(|row| row.ends_with("1.0 s")),
                "{text}"
            );
        }
    }

    #[test]
    fn ages_have_at_most_two_units() {
        for (millis, text) in [
            (0, "0.0 s"),
            (1_950, "1.9 s"),
            (61_000, "1 min 1 s"),
            (3_600_000, "1 h 0 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(age(millis), text);
        }
    }
}
