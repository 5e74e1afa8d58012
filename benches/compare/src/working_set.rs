//! The pages that an owner needs first, and how it touches them.
//!
//! A *working set* of a tenth of the stored pages, in runs of 1 to 4 anywhere, is recorded in a
//! random order. An owner then touches its pages in another random order, and among them a tenth as
//! many others, also from runs of 1 to 4. All of it is the same on every machine.
//!
//! | file | content |
//! | --- | --- |
//! | `recorded.trace` | the recording, for `snaprestore optimize` |
//! | `touches.pages` | what the owner touches, in this order |
//! | `others.pages` | every stored page that is not in the working set |

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use snapshot_format::trace::{Touch, TouchReason, Trace, TraceEnd};

use crate::contender::SnapshotKind;
use crate::prepare::{Images, run};
use crate::rounds::{Sample, Samples};
use crate::stats::{Spread, float};
use crate::trial::{Outcome, Runner, open_snapshot};
use crate::usage::{self, Who};
use crate::workload::{mixed, shuffle};
use crate::{BenchError, crowd, limits};

/// Name of the comparison of VMs and of `optimize` in the results.
pub const NAME: &str = "working-set";
/// `optimize` of the guest's snapshot.
pub const OPTIMIZE: &str = "optimize";
/// One VM that touches its working set.
pub const ONE_VM: &str = "serve, one VM";
/// Several that do it at once: the mean of their times.
pub const EIGHT_VMS: &str = "serve, eight VMs";

/// VMs that start at once.
const VMS: u64 = 8;
/// One page in this many is in the working set, and among those touched one in this many is not.
const SHARE: usize = 10;
/// Longest run of pages of a working set.
const MAX_RUN: u64 = 4;
/// Time between two touches of the recording.
const INTERVAL: Duration = Duration::from_micros(20);

/// Files about a working set.
#[derive(Clone, Debug)]
pub struct WorkingSetFiles {
    /// The recording.
    pub trace: PathBuf,
    /// The pages that are touched, in order.
    pub touches: PathBuf,
    /// The stored pages outside of it.
    pub others: PathBuf,
}

impl WorkingSetFiles {
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self {
            trace: folder.join("recorded.trace"),
            touches: folder.join("touches.pages"),
            others: folder.join("others.pages"),
        }
    }

    /// Chooses a working set of a snapshot and writes the files.
    pub(crate) fn write(&self, snapshot: &Path) -> Result<(), BenchError> {
        let stored = limits::stored_pages(snapshot)?;
        let chosen = Choice::new(&stored);
        let failed = |path: &Path| BenchError::io(format!("{}: writing", path.display()));
        for (path, pages) in [
            (&self.touches, &chosen.touches),
            (&self.others, &chosen.others),
        ] {
            let mut text = String::new();
            for page in pages {
                let _ = writeln!(text, "{page}");
            }
            fs::write(path, text).map_err(failed(path))?;
        }
        let named = || format!("{}: recording it", self.trace.display());
        let opened = open_snapshot(snapshot).map_err(BenchError::trial(named()))?;
        let touches = chosen.recorded.iter().zip(0..);
        let trace = Trace {
            content_digest: opened.summary().content_digest,
            page_slots: opened.page_slots(),
            begun: std::time::UNIX_EPOCH,
            present_at_start: 0,
            end: TraceEnd::Settled,
            touches: touches
                .map(|(page, nth)| Touch {
                    page: *page,
                    at: INTERVAL * nth,
                    reason: TouchReason::Demand,
                })
                .collect(),
        };
        let bytes = trace.to_bytes().map_err(io::Error::other);
        let written = bytes.and_then(|bytes| fs::write(&self.trace, bytes));
        written.map_err(failed(&self.trace))
    }
}

/// A working set of some stored pages.
struct Choice {
    recorded: Vec<u64>,
    touches: Vec<u64>,
    others: Vec<u64>,
}

impl Choice {
    fn new(stored: &[u64]) -> Self {
        let known: BTreeSet<u64> = stored.iter().copied().collect();
        let mut firsts = stored.to_vec();
        shuffle(&mut firsts, 1);
        let mut firsts = firsts.into_iter();
        let mut choose = |count: usize, allowed: &BTreeSet<u64>| {
            let mut chosen = BTreeSet::new();
            while chosen.len() < count
                && let Some(first) = firsts.next()
            {
                let run = first..=first + mixed(first) % MAX_RUN;
                chosen.extend(run.take_while(|page| allowed.contains(page)));
            }
            chosen
        };
        let chosen = choose(stored.len() / SHARE, &known);
        let others: BTreeSet<u64> = known.difference(&chosen).copied().collect();
        let mut recorded: Vec<u64> = chosen.iter().copied().collect();
        shuffle(&mut recorded, 2);
        let strangers = choose(recorded.len() / SHARE, &others).into_iter();
        let strangers: Vec<u64> = strangers.take(recorded.len() / SHARE).collect();
        let mut touches = [recorded.as_slice(), &strangers].concat();
        shuffle(&mut touches, 3);
        Self {
            recorded,
            touches,
            others: others.into_iter().collect(),
        }
    }
}

/// Measures `optimize`, and several VMs that touch their working sets at once against one: a round
/// that doesn't count, then `rounds` that do.
pub fn compare(
    images: &mut Images,
    runner: &Runner,
    rounds: u32,
    into: &mut Samples,
) -> Result<(), BenchError> {
    let plain = images.snapshot(&SnapshotKind::default())?;
    let optimized = images.snapshot(&SnapshotKind {
        optimized: true,
        ..SnapshotKind::default()
    })?;
    let files = images.working_set()?;
    let bytes_of = |path: &Path| {
        let named = format!("{}: looking for it", path.display());
        fs::metadata(path)
            .map(|metadata| metadata.len())
            .map_err(BenchError::io(named))
    };
    let out = images.folder().join("out.snap");
    let mut optimize = Command::new(images.program());
    optimize.arg("optimize").arg(&plain).arg("-o").arg(&out);
    optimize.args(["--force", "--quiet", "--trace"]);
    optimize.arg(&files.trace);
    for round in 0..=rounds {
        let mut add = |contender: &str, outcome| {
            into.samples.push(Sample {
                workload: NAME.into(),
                contender: contender.into(),
                round,
                outcome,
            });
        };
        let (cpu, began) = (usage::cpu_seconds(Who::Children), Instant::now());
        run(&mut optimize)?;
        let total = began.elapsed();
        let facts =
            serde_json::json!({ "file_bytes": bytes_of(&out)?, "plain_bytes": bytes_of(&plain)? });
        add(
            OPTIMIZE,
            Outcome {
                total_ms: total.as_secs_f64() * 1e3,
                cpu_s: usage::cpu_seconds(Who::Children) - cpu,
                facts,
                ..Outcome::default()
            },
        );
        for (name, vms) in [(ONE_VM, 1), (EIGHT_VMS, VMS)] {
            let outcome = crowd::at_once(images, runner, &optimized, &files.touches, vms)?;
            add(name, outcome);
        }
    }
    let _ = fs::remove_file(out);
    Ok(())
}

/// Returns the size of the optimized file against that of the plain one.
pub(crate) fn size_ratio(samples: &Samples) -> Option<(f64, String)> {
    let fact = |name: &'static str| {
        let values = samples.values(NAME, OPTIMIZE, move |outcome| {
            outcome.facts[name].as_f64().unwrap_or(f64::NAN)
        });
        Spread::from_samples(values).map(|spread| spread.median)
    };
    let (optimized, plain) = (fact("file_bytes")?, fact("plain_bytes")?);
    let from = format!("{optimized:.0} / {plain:.0} bytes");
    Some((optimized / plain, from))
}

/// Formats the times of `optimize` and of the VMs.
pub fn table(samples: &Samples) -> String {
    let mut text = format!("{:<22} {:>8} {:>8}\n", "", "ms", "CPU s");
    for name in [OPTIMIZE, ONE_VM, EIGHT_VMS] {
        let median = |of: fn(&Outcome) -> f64| {
            let spread = Spread::from_samples(samples.values(NAME, name, of));
            spread.map_or(f64::NAN, |spread| spread.median)
        };
        let (total, cpu) = (median(|one| one.total_ms), median(|one| one.cpu_s));
        let _ = writeln!(text, "{name:<22} {total:>8.1} {cpu:>8.2}");
    }
    text
}

/// Returns the mean time of VMs.
pub(crate) fn mean_ms(vms: &[Outcome]) -> f64 {
    vms.iter().map(|vm| vm.total_ms).sum::<f64>() / float(vms.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn working_set_is_a_tenth_and_is_touched_in_another_order() {
        let stored: Vec<u64> = (0..50_000).filter(|page| page % 5 != 0).collect();
        let choice = Choice::new(&stored);
        assert!((4000..4004).contains(&choice.recorded.len()));
        let set: BTreeSet<u64> = choice.recorded.iter().copied().collect();
        let touched: BTreeSet<u64> = choice.touches.iter().copied().collect();
        assert_eq!(set.len(), choice.recorded.len());
        assert_eq!(touched.len(), choice.touches.len());
        assert!(set.is_subset(&touched));
        assert_eq!(touched.len() - set.len(), set.len() / SHARE);
        assert!(choice.others.iter().all(|page| !set.contains(page)));
        assert_eq!(choice.others.len() + set.len(), stored.len());
        let hot = choice.touches.iter().filter(|page| set.contains(page));
        assert_ne!(hot.copied().collect::<Vec<u64>>(), choice.recorded);
        // Stored pages only.
        assert!(touched.iter().all(|page| page % 5 != 0));
        assert_eq!(Choice::new(&stored).touches, choice.touches);
    }
}
