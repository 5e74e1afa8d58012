//! Results as a table for people.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use crate::rounds::Samples;
use crate::stats::{Spread, float};
use crate::trial::Outcome;
use crate::workload::Workload;

/// One line of the table of a workload.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Row {
    /// The contender.
    pub contender: String,
    /// Time from start to end, in milliseconds.
    pub total_ms: Spread,
    /// Time from start to usable memory, in milliseconds.
    pub start_ms: f64,
    /// Processor time of the process, in seconds.
    pub cpu_s: f64,
    /// Maximum memory beyond the restored content, in MiB.
    pub beyond_mib: f64,
    /// Read from disk, in MiB.
    pub disk_mib: f64,
    /// Median and 99th percentile of single touches, in microseconds, if measured.
    pub touch_us: Option<(f64, f64)>,
}

const MIB: f64 = 1_048_576.0;

/// Returns the table's lines, the fastest first.
pub fn rows(samples: &Samples, workload: &Workload) -> Vec<Row> {
    let name = &workload.name;
    let median = |contender: &str, value: fn(&Outcome) -> f64| {
        Spread::from_samples(samples.values(name, contender, value))
            .map_or(0.0, |spread| spread.median)
    };
    let mut rows: Vec<Row> = samples
        .contenders(name)
        .into_iter()
        .filter_map(|contender| {
            let total_ms =
                Spread::from_samples(samples.values(name, &contender, |outcome| outcome.total_ms))?;
            let latency = |value: fn(&crate::stats::Latencies) -> f64| {
                let all = samples.samples.iter().filter(|sample| {
                    sample.round > 0 && sample.workload == *name && sample.contender == contender
                });
                Spread::from_samples(
                    all.filter_map(|sample| sample.outcome.latencies.as_ref().map(value)),
                )
            };
            let touch_us = latency(|touch| touch.p50)
                .zip(latency(|touch| touch.p99))
                .map(|(p50, p99)| (p50.median, p99.median));
            Some(Row {
                start_ms: median(&contender, |outcome| outcome.start_us / 1e3),
                cpu_s: median(&contender, |outcome| outcome.cpu_s),
                beyond_mib: median(&contender, |outcome| float(outcome.beyond_bytes) / MIB),
                // An image behind a loop device is read by a thread of the kernel, so the device's
                // reads count. Other files are read by the process itself, and other activity on
                // the disk doesn't count.
                disk_mib: if ["squashfs", "erofs"]
                    .iter()
                    .any(|kind| contender.starts_with(kind))
                {
                    median(&contender, |outcome| float(outcome.device_bytes) / MIB)
                } else {
                    median(&contender, |outcome| float(outcome.disk_bytes) / MIB)
                },
                total_ms,
                touch_us,
                contender,
            })
        })
        .collect();
    rows.sort_by(|a, b| a.total_ms.median.total_cmp(&b.total_ms.median));
    rows
}

/// Formats the table of a workload, with the contenders that could not take part.
pub fn table(samples: &Samples, workload: &Workload) -> String {
    let rows = rows(samples, workload);
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut header = vec![
        "contender",
        "total ms",
        "min",
        "max",
        "start ms",
        "CPU s",
        "extra MiB",
        "disk MiB",
    ];
    let timed = rows.iter().any(|row| row.touch_us.is_some());
    if timed {
        header.extend(["touch us p50", "p99"]);
    }
    let columns = header.len();
    table.set_header(header);
    for row in rows {
        let total = row.total_ms;
        let mut cells = vec![
            row.contender,
            short(total.median),
            short(total.min),
            short(total.max),
            format!("{:.2}", row.start_ms),
            format!("{:.3}", row.cpu_s),
            format!("{:.1}", row.beyond_mib),
            format!("{:.0}", row.disk_mib),
        ];
        if let Some((p50, p99)) = row.touch_us {
            cells.extend([short(p50), short(p99)]);
        }
        table.add_row(cells);
    }
    for column in 1..columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = format!("{}\n{}\n", workload.title, table.trim_fmt());
    for absent in samples
        .absent
        .iter()
        .filter(|absent| absent.workload == workload.name)
    {
        let _ = writeln!(text, " {}: not available: {}", absent.contender, absent.why);
    }
    text
}

/// Formats three significant digits.
pub fn short(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}
