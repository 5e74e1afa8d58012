//! `snaprestore ctl top`: shows the current activity of the VMs.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::HumanCount;
use serde::Serialize;

use super::report::{plain, to_the_right};
use crate::args;
use crate::exit::Exit;
use crate::names;
use crate::output::{Output, count, micros, percent};
use snaprestore_daemon::api::control::{Client, ClientError, Request};
use snaprestore_daemon::api::types::{VmId, VmStats};
use snaprestore_engine::stats::Stats;

pub(super) fn run(
    args: &args::CtlTop,
    control: &Path,
    client: Client,
    output: Output,
) -> Result<Exit> {
    let interval = Duration::from_secs(args.interval);
    let once = args.once || output.json() || !io::stdout().is_terminal();
    let mut daemon = Daemon { client, control };
    let mut before = daemon.look()?;
    let mut first = true;
    loop {
        std::thread::sleep(interval);
        let now = daemon.look()?;
        let mut frame = Frame::between(&before, &now);
        if once {
            output.report(&frame)?;
            return Ok(Exit::Done);
        }
        frame.rows = Some(args.rows);
        let text = frame.to_string();
        output.data(redraw(&names::shown_lines(&text), first).as_bytes())?;
        (before, first) = (now, false);
    }
}

/// Connection to the daemon, which may be replaced during observation.
struct Daemon<'a> {
    client: Client,
    control: &'a Path,
}

/// Statistics at one moment.
struct Sample {
    at: Instant,
    vms: Vec<VmStats>,
}

impl Daemon<'_> {
    fn look(&mut self) -> Result<Sample> {
        let ask = |client: &Client| -> Result<Vec<VmStats>, ClientError> {
            let (vm, buckets) = (None, true);
            client.send(&Request::Stats { vm, buckets })?;
            client.receive(false)
        };
        let vms = if let Ok(vms) = ask(&self.client) {
            vms
        } else {
            self.client = Client::connect(self.control)?;
            ask(&self.client)?
        };
        let at = Instant::now();
        Ok(Sample { at, vms })
    }
}

/// Activity between two samples.
#[derive(Debug, Serialize)]
struct Frame {
    /// Time between the samples.
    seconds: f64,
    vms: Vec<Row>,
    /// Maximum number of rows to show, busiest VMs first.
    #[serde(skip)]
    rows: Option<usize>,
}

/// Activity of one VM, in rates per second.
#[derive(Debug, Serialize)]
struct Row {
    id: VmId,
    service: String,
    pid: u32,
    state: &'static str,
    faults: f64,
    /// 99th percentile of the faults between the samples; `None` if there were none.
    fault_p99_us: Option<f64>,
    demand_pages: f64,
    prefetch_pages: f64,
    discards: f64,
    /// Number of pages at the second sample.
    pages: u64,
    missing: u64,
    /// Number of failures since the VM connected or a new worker took it over.
    failures: u64,
}

impl Frame {
    fn between(before: &Sample, now: &Sample) -> Self {
        let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
        let mut vms: Vec<Row> = now
            .vms
            .iter()
            .map(|vm| {
                let earlier = before.vms.iter().find(|other| other.vm.id == vm.vm.id);
                Row::between(earlier.map(|other| &other.session), vm, seconds)
            })
            .collect();
        vms.sort_by(|a, b| b.faults.total_cmp(&a.faults).then(a.id.cmp(&b.id)));
        Self {
            seconds,
            vms,
            rows: None,
        }
    }
}

impl Row {
    fn between(before: Option<&Stats>, now: &VmStats, seconds: f64) -> Self {
        let none = Stats::default();
        // A new worker starts to count at 0.
        let before = before.filter(|before| before.faults <= now.session.faults);
        let before = before.unwrap_or(&none);
        let VmStats { vm, session } = now;
        let rate = |count: fn(&Stats) -> u64| {
            let new = count(session).saturating_sub(count(before));
            #[expect(clippy::cast_precision_loss, reason = "one decimal of it is shown")]
            let new = new as f64;
            if seconds > 0.0 { new / seconds } else { 0.0 }
        };
        let faults = session.fault_time.since(&before.fault_time);
        Self {
            id: vm.id,
            service: vm.service.clone(),
            pid: vm.pid,
            state: vm.state.name(),
            faults: rate(|s| s.faults),
            fault_p99_us: (faults.count > 0).then_some(micros(faults.p99)),
            demand_pages: rate(|s| s.demand.total()),
            prefetch_pages: rate(|s| s.prefetch.total()),
            discards: rate(|s| s.discards),
            pages: session.pages,
            missing: session.missing,
            failures: session.failures,
        }
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The sum of nothing is -0.
        let all = self.vms.iter().fold(0.0, |all, vm| all + vm.faults);
        let vms = count(self.vms.len() as u64, "VM");
        writeln!(
            f,
            "{vms}, {all:.0} faults/s in the last {:.1} s",
            self.seconds
        )?;
        if self.vms.is_empty() {
            return Ok(());
        }
        let mut table = plain([
            "VM",
            "SERVICE",
            "STATE",
            "FAULTS/s",
            "P99 us",
            "DEMAND/s",
            "PREFETCH/s",
            "MISSING",
            "THERE",
            "DISCARDS/s",
            "FAILURES",
        ]);
        let rows = self.rows.unwrap_or(usize::MAX);
        for vm in self.vms.iter().take(rows) {
            table.add_row([
                vm.id.to_string(),
                vm.service.clone(),
                vm.state.to_owned(),
                format!("{:.0}", vm.faults),
                vm.fault_p99_us.map_or("-".into(), |us| format!("{us:.1}")),
                format!("{:.0}", vm.demand_pages),
                format!("{:.0}", vm.prefetch_pages),
                HumanCount(vm.missing).to_string(),
                percent(vm.pages.saturating_sub(vm.missing), vm.pages),
                format!("{:.0}", vm.discards),
                vm.failures.to_string(),
            ]);
        }
        to_the_right(&mut table, &[0, 3, 4, 5, 6, 7, 8, 9, 10]);
        writeln!(f, "\n{}", table.trim_fmt())?;
        let left = self.vms.len().saturating_sub(rows);
        if left > 0 {
            writeln!(
                f,
                "... and {left} more with fewer faults (--rows shows more)"
            )?;
        }
        Ok(())
    }
}

/// Returns the output that draws `text` over the previous frame, line by line to avoid flicker.
fn redraw(text: &str, first: bool) -> String {
    let mut drawn = String::from(if first { "\x1b[2J\x1b[H" } else { "\x1b[H" });
    for line in text.lines() {
        let _ = writeln!(drawn, "{line}\x1b[K");
    }
    drawn.push_str("\x1b[J");
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;
    use snaprestore_daemon::api::types::{VmState, VmStatus};
    use snaprestore_engine::stats::{Durations, PageCounts};

    fn vm(id: VmId, faults: u64, slow: u64) -> VmStats {
        let nanos = Duration::from_nanos(2_000 * (faults - slow) + 50_000 * slow);
        let buckets = [(2_000, faults - slow), (50_000, slow)];
        let buckets = buckets.into_iter().filter(|(_, count)| *count > 0);
        VmStats {
            vm: VmStatus {
                id,
                service: "web".into(),
                pid: 7,
                state: VmState::Serving,
                reason: None,
                age_ms: 0,
            },
            session: Stats {
                pages: 1000,
                missing: 1000 - faults,
                faults,
                fault_time: Durations::new(buckets.collect(), nanos, Duration::from_micros(50)),
                demand: PageCounts {
                    copied: faults,
                    ..PageCounts::default()
                },
                ..Stats::default()
            },
        }
    }

    fn frame(before: Vec<VmStats>, after: Vec<VmStats>) -> Frame {
        let at = Instant::now();
        let sample = |after: u64, vms| Sample {
            at: at + Duration::from_secs(after),
            vms,
        };
        Frame::between(&sample(0, before), &sample(2, after))
    }

    #[test]
    fn rates_are_computed_since_the_previous_frame() {
        // All slow faults came before the first sample, so only new ones count.
        let before = vec![vm(1, 100, 100), vm(2, 10, 0)];
        let after = vec![vm(1, 110, 100), vm(2, 50, 1), vm(3, 8, 0), vm(4, 5, 0)];
        let frame = frame(before, after);
        let rows: Vec<_> = frame
            .vms
            .iter()
            .map(|vm| {
                (
                    vm.id,
                    vm.faults,
                    vm.fault_p99_us,
                    vm.demand_pages,
                    vm.missing,
                )
            })
            .collect();
        let expected = [
            (2, 20.0, Some(50.0), 20.0, 950),
            (1, 5.0, Some(2.0), 5.0, 890),
            // New VMs count from their start.
            (3, 4.0, Some(2.0), 4.0, 992),
            (4, 2.5, Some(2.0), 2.5, 995),
        ];
        assert_eq!(rows, expected);
    }

    #[test]
    fn vm_without_faults_shows_no_latency() {
        let frame = frame(
            vec![vm(1, 10, 0), vm(2, 20, 0)],
            vec![vm(1, 10, 0), vm(2, 6, 0)],
        );
        let [two, one] = &frame.vms[..] else {
            panic!("{frame:?}");
        };
        assert_eq!((one.id, one.faults, one.fault_p99_us), (1, 0.0, None));
        assert_eq!((two.id, two.faults, two.fault_p99_us), (2, 3.0, Some(2.0)));
        let text = frame.to_string();
        assert!(
            text.contains("2 VMs, 3 faults/s in the last 2.0 s"),
            "{text}"
        );
        assert!(text.contains("1.0 %") && text.contains(" -"), "{text}");
        let empty = super::Frame {
            vms: Vec::new(),
            ..frame
        };
        assert!(
            empty.to_string().starts_with("0 VMs, 0 faults/s"),
            "{empty}"
        );
    }

    #[test]
    fn small_terminal_shows_the_busiest_vms() {
        let mut frame = frame(Vec::new(), (1..=30).map(|id| vm(id, id, 0)).collect());
        frame.rows = Some(5);
        let text = frame.to_string();
        assert_eq!(text.lines().filter(|line| line.contains("web")).count(), 5);
        assert!(text.contains("and 25 more"), "{text}");
        let drawn = redraw(&text, false);
        assert!(
            drawn.starts_with("\x1b[H") && drawn.ends_with("\x1b[J"),
            "{drawn:?}"
        );
        assert_eq!(drawn.matches("\x1b[K\n").count(), text.lines().count());
    }
}
