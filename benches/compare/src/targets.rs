//! Performance targets of this project, computed from the raw results of a run.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::create::{self, Sizes};
use crate::crowd::{self, Eighth};
use crate::layers::{self, ChildSizes};
use crate::report::short;
use crate::rounds::Samples;
use crate::stats::{Latencies, Spread, float};
use crate::trial::Outcome;
use crate::working_set;

/// One performance target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Its number, with a letter if a row has several.
    pub number: String,
    /// Description of the comparison.
    pub what: String,
    /// Measured value, if there is one.
    pub value: Option<f64>,
    /// Highest value that meets the target.
    pub limit: f64,
    /// Unit of both; empty for a ratio.
    pub unit: String,
    /// The medians that it is computed from.
    pub from: String,
}

impl Target {
    /// Returns whether it was measured and is met.
    pub fn is_met(&self) -> bool {
        self.value.is_some_and(|value| value <= self.limit)
    }
}

/// Medians by workload and contender.
struct Medians<'a>(&'a Samples);

/// A value and its origin.
type Found = Option<(f64, String)>;

impl Medians<'_> {
    fn of(&self, workload: &str, contender: &str, value: fn(&Outcome) -> f64) -> Option<f64> {
        Spread::from_samples(self.0.values(workload, contender, value)).map(|spread| spread.median)
    }

    fn total(&self, workload: &str, contender: &str) -> Option<f64> {
        self.of(workload, contender, |outcome| outcome.total_ms)
    }

    /// Returns the fastest of several contenders.
    fn best(&self, workload: &str, contenders: &[&str]) -> Option<(f64, String)> {
        contenders
            .iter()
            .filter_map(|name| Some((self.total(workload, name)?, (*name).to_owned())))
            .min_by(|a, b| a.0.total_cmp(&b.0))
    }

    fn against_best(&self, workload: &str, ours: &str, others: &[&str]) -> Found {
        let mine = self.total(workload, ours)?;
        let (best, who) = self.best(workload, others)?;
        Some((
            mine / best,
            format!("{} ms / {who} {} ms", short(mine), short(best)),
        ))
    }

    /// Returns the median over the rounds of a percentile of single touches.
    fn latency(&self, workload: &str, contender: &str, of: fn(&Latencies) -> f64) -> Option<f64> {
        let samples = self.0.samples.iter().filter(|sample| {
            sample.round > 0 && sample.workload == workload && sample.contender == contender
        });
        let values = samples.filter_map(|sample| sample.outcome.latencies.as_ref().map(of));
        Spread::from_samples(values).map(|spread| spread.median)
    }

    /// Compares the better of `ours` with the better of the handlers plus a decode. One contender
    /// of each group keeps the touching thread on one core.
    fn fault(&self, workload: &str, ours: &[&str], of: fn(&Latencies) -> f64) -> Found {
        let best = |names: &[&str]| {
            let latencies = names
                .iter()
                .filter_map(|name| self.latency(workload, name, of));
            latencies.min_by(f64::total_cmp)
        };
        let (mine, handler) = (best(ours)?, best(&HANDLERS)?);
        let decode = self.latency(workload, "limit:decode-each", of)?;
        let from = format!(
            "{} us / (handler {} us + decode {} us)",
            short(mine),
            short(handler),
            short(decode)
        );
        Some((mine / (handler + decode), from))
    }

    /// Returns the largest value over the rounds, in MiB.
    fn max_beyond(&self, workload: &str, contender: &str) -> Found {
        let values = self
            .0
            .values(workload, contender, |outcome| float(outcome.beyond_bytes));
        let spread = Spread::from_samples(values)?;
        Some((
            spread.max / 1_048_576.0,
            format!("the largest of {} runs", spread.count),
        ))
    }

    fn start(&self, workload: &str) -> Found {
        let started = |outcome: &Outcome| {
            let micros = &outcome.facts["start_us"];
            micros.as_f64().unwrap_or(f64::NAN) / 1e3
        };
        self.fresh(workload, "ours", started)
    }

    /// Returns the time from the first system call of a VMM until its first page is there.
    fn first_page(&self, contender: &str) -> Found {
        self.fresh("vmm-start", contender, |outcome| outcome.total_ms)
    }

    /// Returns the median of a time in milliseconds over the processes, of which each is one trial.
    fn fresh(&self, workload: &str, contender: &str, ms: fn(&Outcome) -> f64) -> Found {
        let spread = Spread::from_samples(self.0.values(workload, contender, ms))?;
        let from = format!(
            "median of {} fresh processes, {} to {} ms",
            spread.count,
            short(spread.min),
            short(spread.max)
        );
        Some((spread.median, from))
    }

    /// Returns the slowdown of a crowd's calm VMs by the one that storms.
    fn stormed(&self) -> Found {
        let p99 = |eighth: Eighth| self.latency(crowd::NAME, eighth.name(), |times| times.p99);
        let (alone, stormed) = (p99(Eighth::Absent)?, p99(Eighth::Storms)?);
        let from = format!("{} us / {} us", short(stormed), short(alone));
        Some((stormed / alone, from))
    }

    /// Returns the start through the long chain, less the allowance for each layer.
    fn layered_start(&self) -> Found {
        let start = |contender| self.of("chain-start", contender, |outcome| outcome.start_us);
        let (mine, flat) = (start(LAYERED)?, start("ours")?);
        let from = format!("({} us - 64 * 20 us) / {} us", short(mine), short(flat));
        Some(((mine - 64.0 * 20.0) / flat, from))
    }

    /// Returns the bytes that replaying a working set read from the disk, against its stored size.
    fn read_for_working_set(&self) -> Found {
        let read = self.of("working-set-replay-cold", HOT, |outcome| {
            float(outcome.device_bytes)
        })?;
        let stored = self.of("working-set-replay", "limit:working-set", |outcome| {
            outcome.facts["stored_bytes"].as_f64().unwrap_or(f64::NAN)
        })?;
        Some((read / stored, format!("{read:.0} / {stored:.0} bytes")))
    }

    fn layered_fault(&self, of: fn(&Latencies) -> f64) -> Found {
        let time = |contender| self.latency("chain-faults", contender, of);
        let (mine, flat) = (time(LAYERED)?, time("ours")?);
        let from = format!("{} us / {} us", short(mine), short(flat));
        Some((mine / flat, from))
    }

    fn complete(&self, value: fn(&Outcome) -> f64, unit: &str) -> Found {
        let mine = self.of("complete", OURS_ALL, value)?;
        let decode = self.of("complete", "limit:decode", value)?;
        let copy = self.of("complete", "limit:copy", value)?;
        let from = format!(
            "{} {unit} / (decode {} {unit} + copy {} {unit})",
            short(mine),
            short(decode),
            short(copy)
        );
        Some((mine / (decode + copy), from))
    }
}

const OURS_ALL: &str = "ours:prefetch=all";
const HOT: &str = "ours:prefetch=working-set,optimized=yes";
const SERVE_HOT: &str = "serve:prefetch=working-set,optimized=yes";
const LAYERED: &str = "ours:layered=yes";
const LAYERED_ALL: &str = "ours:prefetch=all,layered=yes";
const SERVE_ALL: &str = "serve:prefetch=all";
const HANDLERS: [&str; 2] = ["handler", "handler-pinned"];
const COLD: [&str; 4] = ["mmap", "squashfs-64k", "squashfs-128k", "erofs"];

/// Returns all targets, met or not.
#[expect(clippy::too_many_lines, reason = "it is a table")]
pub fn all(
    samples: &Samples,
    sizes: Option<&Sizes>,
    child_sizes: Option<&ChildSizes>,
) -> Vec<Target> {
    let medians = Medians(samples);
    let mut targets = Vec::new();
    let mut add = |number: &str, what: &str, limit: f64, unit: &str, found: Found| {
        let (value, from) = match found {
            Some((value, from)) if value.is_finite() => (Some(value), from),
            _ => (None, "not measured in this run".into()),
        };
        targets.push(Target {
            number: number.into(),
            what: what.into(),
            value,
            limit,
            unit: unit.into(),
            from,
        });
    };
    let p50 = |latencies: &Latencies| latencies.p50;
    let p99 = |latencies: &Latencies| latencies.p99;
    let size = sizes.map(|sizes| {
        let from = format!("{} / {} bytes", sizes.snapshot, sizes.solid);
        (float(sizes.snapshot) / float(sizes.solid), from)
    });
    let share = sizes.map(|sizes| {
        let from = format!("{} of {} bytes", sizes.index, sizes.snapshot);
        (float(sizes.index) / float(sizes.snapshot) * 100.0, from)
    });
    let written = medians.against_best(create::NAME, create::OURS, &[create::ZSTD]);

    add(
        "1",
        "file size, against zstd -3 of the whole image",
        1.0,
        "",
        size,
    );
    add(
        "2",
        "create, against zstd -3 -T0 and fsync",
        1.0,
        "",
        written,
    );
    add("3a", "start call, 1 GiB", 1.0, "ms", medians.start("start"));
    add(
        "3b",
        "start call, 64 GiB with every page stored",
        1.0,
        "ms",
        medians.start("start-64g"),
    );
    let reads = |ours| medians.against_best("random-reads", ours, &HANDLERS);
    let writes = medians.against_best("random-writes", OURS_ALL, &HANDLERS);
    add(
        "4a",
        "random reads, prefetch all, against a handler",
        0.12,
        "",
        reads(OURS_ALL),
    );
    add(
        "4b",
        "random writes, prefetch all, against a handler",
        0.20,
        "",
        writes,
    );
    add(
        "5",
        "random reads, no prefetch, against a handler",
        0.25,
        "",
        reads("ours"),
    );
    let cold = medians.against_best("cold-reads", OURS_ALL, &COLD);
    add(
        "6",
        "random reads, cold, against mmap, squashfs and erofs",
        0.5,
        "",
        cold,
    );
    let complete = medians.complete(|outcome| outcome.total_ms, "ms");
    add(
        "7",
        "complete restore, against decode and copy alone",
        1.2,
        "",
        complete,
    );
    let fault = |workload, ours, of| medians.fault(workload, ours, of);
    let small: &[&str] = &["ours:frame=16", "ours:pinned=yes,frame=16"];
    let large: &[&str] = &["ours:frame=64", "ours:pinned=yes,frame=64"];
    add(
        "8a",
        "one fault, p50, 16 KiB frames, against handler + decode",
        1.25,
        "",
        fault("faults-16k", small, p50),
    );
    add(
        "8b",
        "one fault, p50, 64 KiB frames, against handler + decode",
        1.25,
        "",
        fault("faults-64k", large, p50),
    );
    let default = medians
        .latency("faults", "ours", p50)
        .map(|micros| (micros, String::from("frames of the default size")));
    add("8c", "one fault, p50, default frames", 250.0, "us", default);
    add(
        "9a",
        "one fault, p99, 16 KiB frames, against handler + decode",
        1.5,
        "",
        fault("faults-16k", small, p99),
    );
    add(
        "9b",
        "one fault, p99, 64 KiB frames, against handler + decode",
        1.5,
        "",
        fault("faults-64k", large, p99),
    );
    let cpu = medians.complete(|outcome| outcome.cpu_s, "s");
    add(
        "10",
        "CPU of a complete restore, against the sum of both alone",
        1.25,
        "",
        cpu,
    );
    add(
        "11a",
        "memory beyond the pages, 1 GiB complete",
        24.0,
        "MiB",
        medians.max_beyond("complete", OURS_ALL),
    );
    add(
        "11b",
        "memory beyond the pages, 64 GiB, touched here and there",
        48.0,
        "MiB",
        medians.max_beyond("memory-64g", "ours"),
    );
    add("12", "index and tables, of the file", 0.5, "%", share);
    add(
        "13a",
        "serve: a VMM's first system call to its first page",
        5.0,
        "ms",
        medians.first_page("serve"),
    );
    add(
        "13b",
        "serve, prefetch all: a VMM's first system call to its first page",
        5.0,
        "ms",
        medians.first_page(SERVE_ALL),
    );
    let pinned = ["vmm-handler-pinned"];
    add(
        "14",
        "serve: random reads, prefetch all, against a pinned handler process",
        0.15,
        "",
        medians.against_best("vmm-random-reads", SERVE_ALL, &pinned),
    );
    add(
        "15",
        "serve: one fault, p99, seven VMs while an eighth storms, against without it",
        3.0,
        "",
        medians.stormed(),
    );
    let written = |ours, full| medians.against_best(layers::NAME, ours, &[full]);
    add(
        "16",
        "create from a diff of 5 %, against a full create",
        0.12,
        "",
        written(layers::DIFF, layers::FULL),
    );
    add(
        "17",
        "create from a full image with a base, against a full create",
        0.60,
        "",
        written(layers::WITH_BASE, layers::FULL),
    );
    add(
        "18",
        "size of that child less 600 bytes a changed block, against its pages alone",
        1.05,
        "",
        child_sizes.map(ChildSizes::ratio),
    );
    add(
        "19",
        "start through 64 layers less 20 us a layer, against flat",
        2.0,
        "",
        medians.layered_start(),
    );
    add(
        "20a",
        "one fault through 64 layers, p50, against flat",
        1.10,
        "",
        medians.layered_fault(p50),
    );
    add(
        "20b",
        "one fault through 64 layers, p99, against flat",
        1.25,
        "",
        medians.layered_fault(p99),
    );
    add(
        "21",
        "complete restore through 64 layers of 1 %, against flat",
        1.35,
        "",
        medians.against_best("chain-complete", LAYERED_ALL, &[OURS_ALL]),
    );
    add(
        "22",
        "random reads of everything, child of 5 %, prefetch all, against flat",
        1.05,
        "",
        medians.against_best("child-random-reads", LAYERED_ALL, &[OURS_ALL]),
    );
    add(
        "23",
        "flattening 64 layers, against create of the full image",
        0.60,
        "",
        written(layers::FLATTEN, layers::LONG_FULL),
    );
    let hot = |workload, ours, other| medians.against_best(workload, ours, &[other]);
    add(
        "24a",
        "touching a working set, warm, against the same without one",
        0.25,
        "",
        hot("working-set-reads", HOT, "ours"),
    );
    add(
        "24b",
        "touching a working set, cold, against the same without one",
        0.15,
        "",
        hot("working-set-cold-reads", HOT, "ours"),
    );
    add(
        "25a",
        "touching a working set, cold reads, against a mapped raw file",
        0.4,
        "",
        hot("working-set-cold-reads", HOT, "mmap"),
    );
    add(
        "25b",
        "touching a working set, cold writes, against a mapped raw file",
        0.4,
        "",
        hot("working-set-cold-writes", HOT, "mmap"),
    );
    add(
        "25c",
        "touching a working set, warm writes, against a mapped raw file",
        1.0,
        "",
        hot("working-set-writes", HOT, "mmap"),
    );
    add(
        "26",
        "bytes read to replay a working set, against its stored size",
        1.2,
        "",
        medians.read_for_working_set(),
    );
    add(
        "27",
        "replay of a working set, against decode and copy of its pages alone",
        1.2,
        "",
        hot("working-set-replay", HOT, "limit:working-set"),
    );
    add(
        "28",
        "serve: touching a working set, against in-process",
        1.3,
        "",
        hot("working-set-reads", SERVE_HOT, HOT),
    );
    add(
        "29",
        "serve: eight VMs touch their working sets at once, each against one alone",
        2.5,
        "",
        hot(
            working_set::NAME,
            working_set::EIGHT_VMS,
            working_set::ONE_VM,
        ),
    );
    add(
        "30",
        "size of an optimized file, against the plain one",
        1.03,
        "",
        working_set::size_ratio(samples),
    );
    add(
        "31",
        "random reads, two thirds are zero, prefetch all, against a pinned handler",
        0.14,
        "",
        hot("roomy-random-reads", OURS_ALL, "handler-pinned"),
    );
    add(
        "32",
        "reading everything but the working set that was prefetched, against no prefetch",
        1.05,
        "",
        hot("working-set-wrong", HOT, "ours"),
    );
    targets
}

/// Formats the targets as a table in Markdown.
pub fn table(targets: &[Target]) -> String {
    let mut text = String::from(
        "| # | what | measured | at most | met | from |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for target in targets {
        let Target {
            number,
            what,
            limit,
            unit,
            from,
            ..
        } = target;
        let value = target
            .value
            .map_or_else(|| "-".into(), |value| format!("{value:.3} {unit}"));
        let met = match target.value {
            None => "?",
            Some(_) if target.is_met() => "yes",
            Some(_) => "NO",
        };
        let limit = format!("{limit} {unit}");
        let _ = writeln!(
            text,
            "| {number} | {what} | {} | {} | {met} | {from} |",
            value.trim(),
            limit.trim()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounds::Sample;

    fn sample(workload: &str, contender: &str, round: u32, outcome: Outcome) -> Sample {
        Sample {
            workload: workload.into(),
            contender: contender.into(),
            round,
            outcome,
        }
    }

    fn total(total_ms: f64) -> Outcome {
        Outcome {
            total_ms,
            ..Outcome::default()
        }
    }

    fn find<'a>(targets: &'a [Target], number: &str) -> &'a Target {
        targets
            .iter()
            .find(|target| target.number == number)
            .unwrap()
    }

    #[test]
    fn best_other_counts_and_proof_round_does_not() {
        let samples = Samples {
            samples: vec![
                sample("random-reads", "handler", 1, total(1000.0)),
                sample("random-reads", "handler-pinned", 0, total(1.0)),
                sample("random-reads", "handler-pinned", 1, total(100.0)),
                sample("random-reads", OURS_ALL, 1, total(13.0)),
                sample("random-reads", "ours", 1, total(25.0)),
            ],
            absent: Vec::new(),
        };
        let targets = all(&samples, None, None);
        let all_fetched = find(&targets, "4a");
        assert!((all_fetched.value.unwrap() - 0.13).abs() < 1e-9 && !all_fetched.is_met());
        assert!(find(&targets, "5").is_met());
        assert_eq!(find(&targets, "4b").value, None);
        assert!(!find(&targets, "4b").is_met());
        assert!(table(&targets).contains(
            "| 4a | random reads, prefetch all, against a handler | 0.130 | 0.12 | NO |"
        ));
    }

    #[test]
    fn allowances_for_layers_are_subtracted() {
        let started = |start_us| Outcome {
            start_us,
            ..Outcome::default()
        };
        let samples = Samples {
            samples: vec![
                sample("chain-start", "ours", 1, started(600.0)),
                sample("chain-start", LAYERED, 1, started(1280.0 + 900.0)),
            ],
            absent: Vec::new(),
        };
        let sizes = ChildSizes {
            child: 4_000_000 + 10 * 600,
            only: 4_000_000,
            pages: 2000,
            blocks: 10,
        };
        let targets = all(&samples, None, Some(&sizes));
        assert!((find(&targets, "18").value.unwrap() - 1.0).abs() < 1e-9);
        assert!((find(&targets, "19").value.unwrap() - 1.5).abs() < 1e-9);
        assert_eq!(find(&targets, "16").value, None);
    }

    #[test]
    fn serve_is_compared_with_the_pinned_handler() {
        let samples = Samples {
            samples: vec![
                sample("vmm-random-reads", "vmm-handler", 1, total(100.0)),
                sample("vmm-random-reads", "vmm-handler-pinned", 1, total(200.0)),
                sample("vmm-random-reads", SERVE_ALL, 1, total(40.0)),
                sample("vmm-start", "serve", 1, total(4.0)),
                sample("vmm-start", SERVE_ALL, 1, total(6.0)),
            ],
            absent: Vec::new(),
        };
        let targets = all(&samples, None, None);
        assert!((find(&targets, "14").value.unwrap() - 0.2).abs() < 1e-9);
        assert!(!find(&targets, "14").is_met());
        assert!(find(&targets, "13a").is_met() && !find(&targets, "13b").is_met());
    }

    #[test]
    fn fault_is_compared_with_handler_plus_decode() {
        let timed = |p50, p99| Outcome {
            latencies: Some(Latencies {
                p50,
                p99,
                ..Latencies::default()
            }),
            ..Outcome::default()
        };
        let samples = Samples {
            samples: vec![
                sample(
                    "faults-16k",
                    "ours:pinned=yes,frame=16",
                    1,
                    timed(30.0, 90.0),
                ),
                sample("faults-16k", "handler", 1, timed(60.0, 40.0)),
                sample("faults-16k", "handler-pinned", 1, timed(10.0, 50.0)),
                sample("faults-16k", "limit:decode-each", 1, timed(20.0, 20.0)),
            ],
            absent: Vec::new(),
        };
        let targets = all(&samples, None, None);
        assert!((find(&targets, "8a").value.unwrap() - 1.0).abs() < 1e-9);
        assert!((find(&targets, "9a").value.unwrap() - 1.5).abs() < 1e-9);
    }
}
