//! Several VMs of one snapshot served at once.
//!
//! One of them causes a storm of faults. How much do the others notice?
//!
//! ```text
//! serve ── seven calm VMMs: every few milliseconds a timed touch of an untouched page
//!      └── the eighth: nothing, or two threads that touch, discard and touch again as fast as
//!          they can, or two threads that only compute
//! ```
//!
//! The variant that computes shows the machine's share of the effect: its threads take processor
//! time from the others as well, independently of the server.
//!
//! In another variant the VMs are clones that start together and do the same: each reads the first
//! tenth of its memory, in the same shuffled order. The benchmark measures the time until the last
//! is done, with and without sharing decoded frames.
//!
//! [`working_set`](crate::working_set) has VMs that start together, too.
#![allow(unsafe_code, reason = "memory is given back to the kernel")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::contender::{Ours, Prefetch, Restored as _, SnapshotKind};
use crate::contenders::vmm;
use crate::prepare::Images;
use crate::rounds::{Sample, Samples};
use crate::server::Server;
use crate::stats::{Latencies, Spread, float};
use crate::touch::Memory;
use crate::trial::{Before, Outcome, Runner, Trial};
use crate::working_set::mean_ms;
use crate::workload::{Access, Order, Plan, read_pages};
use crate::{BenchError, PAGE};
use snaprestore_engine::stats::whole_micros;

/// Name of this comparison in the results.
pub const NAME: &str = "crowd";

/// VMs whose touches are timed.
const CALM: u64 = 7;
/// Touches of each.
const TOUCHES: u64 = 500;
/// The mean pause between two of them.
const PAUSE: Duration = Duration::from_millis(6);
/// Time allowed for a process to hand its memory over.
const GATHERING: Duration = Duration::from_millis(1500);
/// Duration of one storming VM, after which another takes its place, because by then its pages are
/// used up.
const STORM: Duration = Duration::from_millis(1200);
/// Pages that it touches before it discards them.
const GUST: usize = 64;
/// Threads of the storming VM.
const THREADS: usize = 2;
/// Clones that start together.
const CLONES: u64 = 4;
/// Each clone reads one part in this many of its memory.
const CLONES_READ: u64 = 10;
/// Name in the results of clones that share decoded frames.
pub const CLONES_SHARE: &str = "serve, four clones";
/// Name in the results of clones without shared frames.
pub const CLONES_ALONE: &str = "serve:frame-cache=0, four clones";

/// Behaviour of the eighth VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Eighth {
    /// There is no eighth VM.
    Absent,
    /// The VM faults and discards as fast as it can.
    Storms,
    /// The VM computes, and touches nothing.
    Computes,
}

impl Eighth {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Absent, Self::Storms, Self::Computes];

    /// Returns the name of this variant in the results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "serve, seven calm",
            Self::Storms => "serve, an eighth storms",
            Self::Computes => "serve, an eighth computes",
        }
    }
}

/// One of the processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Member {
    role: Role,
    /// Path of the server's socket.
    socket: PathBuf,
    bytes: u64,
    /// File of page numbers: a page of each frame, or the pages to read.
    pages: PathBuf,
    seed: u64,
    /// When it begins, in microseconds since 1970.
    begin: u64,
    /// Duration of its activity, in microseconds.
    micros: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Role {
    Calm,
    Storms,
    Computes,
    Reads,
    /// Reads the listed pages in their order.
    ReadsListed,
}

/// Files and programs shared by all crowds of a run.
struct Setting<'a> {
    images: &'a Images,
    runner: &'a Runner,
    snapshot: PathBuf,
    pages: PathBuf,
}

/// Runs all variants in turn: a round that doesn't count, then `rounds` that do.
pub fn compare(
    images: &mut Images,
    runner: &Runner,
    rounds: u32,
    into: &mut Samples,
) -> Result<(), BenchError> {
    let setting = Setting {
        snapshot: images.snapshot(&SnapshotKind::default())?,
        pages: images.page_of_each_frame(&SnapshotKind::default())?,
        images,
        runner,
    };
    for round in 0..=rounds {
        let mut add = |contender: &str, outcome| {
            into.samples.push(Sample {
                workload: NAME.into(),
                contender: contender.into(),
                round,
                outcome,
            });
        };
        for turn in 0..Eighth::ALL.len() {
            let eighth = Eighth::ALL[(turn + round as usize) % Eighth::ALL.len()];
            add(eighth.name(), setting.crowd(eighth, round)?);
        }
        for (name, frame_cache) in [(CLONES_SHARE, None), (CLONES_ALONE, Some(0))] {
            add(name, setting.clones(frame_cache)?);
        }
    }
    Ok(())
}

/// Runs `count` VMs of a snapshot that start together and read the listed pages, on a server that
/// prefetches working sets. The outcome's time is the mean of theirs.
pub(crate) fn at_once(
    images: &Images,
    runner: &Runner,
    snapshot: &Path,
    pages: &Path,
    count: u64,
) -> Result<Outcome, BenchError> {
    let setting = Setting {
        images,
        runner,
        snapshot: snapshot.to_owned(),
        pages: pages.to_owned(),
    };
    let options = Ours {
        prefetch: Prefetch::WorkingSet,
        ..Ours::default()
    };
    setting.together(count, Role::ReadsListed, &options, mean_ms)
}

/// Formats the latencies of the calm VMs, in microseconds: medians over the rounds.
pub fn table(samples: &Samples) -> String {
    let mut text = format!(
        "{:<26} {:>8} {:>8} {:>8} {:>8}\n",
        "one fault, us", "p50", "p90", "p99", "max"
    );
    for eighth in Eighth::ALL {
        let median = |of: fn(&Latencies) -> f64| {
            let times = samples.samples.iter().filter(|sample| {
                sample.round > 0 && sample.workload == NAME && sample.contender == eighth.name()
            });
            let times = times.filter_map(|sample| sample.outcome.latencies.as_ref().map(of));
            Spread::from_samples(times).map_or(f64::NAN, |spread| spread.median)
        };
        let [p50, p90, p99, max] = [
            median(|times| times.p50),
            median(|times| times.p90),
            median(|times| times.p99),
            median(|times| times.max),
        ];
        let _ = writeln!(
            text,
            "{:<26} {p50:>8.1} {p90:>8.1} {p99:>8.1} {max:>8.1}",
            eighth.name()
        );
    }
    let _ = writeln!(
        text,
        "\n{:<46} {:>8} {:>8}",
        "four clones read the same tenth", "ms", "CPU s"
    );
    for name in [CLONES_SHARE, CLONES_ALONE] {
        let median = |of: fn(&Outcome) -> f64| {
            let values = samples.values(NAME, name, of);
            Spread::from_samples(values).map_or(f64::NAN, |spread| spread.median)
        };
        let (total, cpu) = (median(|one| one.total_ms), median(|one| one.cpu_s));
        let _ = writeln!(text, "{name:<46} {total:>8.0} {cpu:>8.2}");
    }
    text
}

impl Setting<'_> {
    /// Runs one crowd on a server of its own. The latencies are those of all calm VMs together.
    fn crowd(&self, eighth: Eighth, round: u32) -> Result<Outcome, BenchError> {
        let server = self.server(&Ours::default())?;
        let length = PAUSE * u32::try_from(TOUCHES).unwrap_or(u32::MAX);
        let begin = now() + whole_micros(GATHERING);
        let end = begin + whole_micros(length);
        let seed = |number| u64::from(round) * 100 + number;
        let nanos = std::thread::scope(|scope| {
            let calm: Vec<_> = (0..CALM)
                .map(|number| {
                    let trial = self.member(&server, Role::Calm, seed(number), begin, length);
                    scope.spawn(move || self.runner.run(&trial))
                })
                .collect();
            let other = scope.spawn(|| -> Result<(), BenchError> {
                let role = match eighth {
                    Eighth::Absent => return Ok(()),
                    Eighth::Storms => Role::Storms,
                    Eighth::Computes => Role::Computes,
                };
                let (mut number, mut from) = (CALM, begin);
                while from < end {
                    let trial = self.member(&server, role, seed(number), from, STORM);
                    self.runner.run(&trial)?;
                    (number, from) = (number + 1, now());
                }
                Ok(())
            });
            let mut nanos = Vec::new();
            for calm in calm {
                let outcome = joined(calm)?;
                let times = outcome.facts["nanos"].as_array().into_iter().flatten();
                nanos.extend(times.filter_map(serde_json::Value::as_u64));
            }
            joined(other)?;
            Ok::<_, BenchError>(nanos)
        })?;
        Ok(Outcome {
            count: nanos.len() as u64,
            latencies: Latencies::from_nanos(nanos),
            facts: serde_json::json!({ "server": server.stop() }),
            ..Outcome::default()
        })
    }

    /// Runs clones that start together, on a server of their own. Its time is that of the last.
    fn clones(&self, frame_cache: Option<usize>) -> Result<Outcome, BenchError> {
        let options = Ours {
            frame_cache,
            ..Ours::default()
        };
        let last = |clones: &[Outcome]| {
            let times = clones.iter().map(|clone| clone.total_ms);
            times.fold(0.0, f64::max)
        };
        self.together(CLONES, Role::Reads, &options, last)
    }

    /// Runs VMs that start together and do the same, on a server of their own. `time` computes the
    /// outcome's time from theirs.
    fn together(
        &self,
        count: u64,
        role: Role,
        options: &Ours,
        time: impl Fn(&[Outcome]) -> f64,
    ) -> Result<Outcome, BenchError> {
        let server = self.server(options)?;
        let before = Before::served_by(&self.snapshot, Some(server.pid()));
        let begin = now() + whole_micros(GATHERING);
        let vms = std::thread::scope(|scope| {
            let vms: Vec<_> = (0..count)
                .map(|_| {
                    let trial = self.member(&server, role, 1, begin, Duration::ZERO);
                    scope.spawn(move || self.runner.run(&trial))
                })
                .collect();
            let vms = vms.into_iter().map(joined);
            vms.collect::<Result<Vec<_>, _>>()
        })?;
        if vms.iter().any(|vm| vm.sum != vms[0].sum) {
            return Err(BenchError::WrongBytes {
                workload: NAME.into(),
                contender: "one VM".into(),
                other: "another".into(),
            });
        }
        // Measured before the server exits.
        let used = before.outcome(&self.snapshot);
        Ok(Outcome {
            total_ms: time(&vms),
            sum: vms[0].sum,
            facts: serde_json::json!({ "server": server.stop() }),
            ..used
        })
    }

    fn server(&self, options: &Ours) -> Result<Server, BenchError> {
        Server::serve(self.images.program(), &self.snapshot, options)
    }

    fn member(
        &self,
        server: &Server,
        role: Role,
        seed: u64,
        begin: u64,
        length: Duration,
    ) -> Trial {
        Trial::Member(Member {
            role,
            socket: server.socket().to_owned(),
            bytes: self.images.bytes(),
            pages: self.pages.clone(),
            seed,
            begin,
            micros: whole_micros(length),
        })
    }
}

fn joined<T>(
    thread: std::thread::ScopedJoinHandle<'_, Result<T, BenchError>>,
) -> Result<T, BenchError> {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl Member {
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Runs one process of the crowd.
    pub(crate) fn run(&self) -> Result<Outcome, BenchError> {
        let mut outcome = Outcome::default();
        match self.role {
            Role::Calm => {
                let memory = vmm::start(&self.socket, self.bytes)?;
                let times = self.touch_calmly(memory.memory())?;
                outcome.facts = serde_json::json!({ "nanos": times });
            }
            Role::Storms => {
                let memory = vmm::start(&self.socket, self.bytes)?;
                let order = self.order(Order::Random, None);
                on_all_threads(|thread| self.storm(memory.memory(), &order, thread));
            }
            Role::Reads | Role::ReadsListed => {
                let offsets = if matches!(self.role, Role::Reads) {
                    let pages = self.bytes / PAGE / CLONES_READ;
                    Plan::new(pages, Order::Random, self.seed, 1.0, None, None).offsets
                } else {
                    self.order(Order::Trace, Some(read_pages(&self.pages)?))
                };
                self.wait();
                let memory = vmm::start(&self.socket, self.bytes)?;
                let touched = memory.memory().touch(&offsets, Access::Read, 1, false);
                let micros = now().saturating_sub(self.begin);
                outcome.total_ms = float(micros) / 1e3;
                outcome.sum = Some(touched.sum);
            }
            Role::Computes => on_all_threads(|_| {
                while !self.is_over() {
                    std::hint::spin_loop();
                }
            }),
        }
        Ok(outcome)
    }

    fn order(&self, order: Order, listed: Option<Vec<u64>>) -> Vec<u64> {
        Plan::new(self.bytes / PAGE, order, self.seed, 1.0, None, listed).offsets
    }

    /// Returns the duration of each touch, in nanoseconds.
    fn touch_calmly(&self, memory: Memory) -> Result<Vec<u64>, BenchError> {
        let offsets = self.order(Order::Frames, Some(read_pages(&self.pages)?));
        // Attaching is not measured here.
        let (first, rest) = offsets.split_at(1.min(offsets.len()));
        memory.touch(first, Access::Read, 1, false);
        self.wait();
        let mut times = Vec::new();
        for offset in rest.iter().take(usize::try_from(TOUCHES).unwrap_or(0)) {
            // A pause between half of the mean and one and a half of it, depending on the offset,
            // so that the VMs don't touch all at once.
            let part = u32::try_from(offset / PAGE % 1024).unwrap_or(0);
            std::thread::sleep(PAUSE / 2 + PAUSE * part / 1024);
            let touched = memory.touch(&[*offset], Access::Read, 1, true);
            times.extend(touched.nanos);
        }
        Ok(times)
    }

    /// Touches some pages, discards them one by one, touches them again and discards them again;
    /// then the next.
    fn storm(&self, memory: Memory, order: &[u64], thread: usize) {
        self.wait();
        let part = order.chunks(order.len().div_ceil(THREADS)).nth(thread);
        let mut gusts = part.unwrap_or_default().chunks(GUST).cycle();
        while !self.is_over() {
            let Some(gust) = gusts.next() else { return };
            for _ in 0..2 {
                memory.touch(gust, Access::Read, 1, false);
                for offset in gust {
                    discard(memory, *offset);
                }
            }
        }
    }

    fn wait(&self) {
        std::thread::sleep(Duration::from_micros(self.begin.saturating_sub(now())));
    }

    fn is_over(&self) -> bool {
        now() >= self.begin + self.micros
    }
}

fn on_all_threads(body: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let body = &body;
            scope.spawn(move || body(thread));
        }
    });
}

/// Gives the page at `offset` back to the kernel.
fn discard(memory: Memory, offset: u64) {
    let start = usize::try_from(offset & !(PAGE - 1)).unwrap_or(usize::MAX);
    let page = memory.base().wrapping_add(start).cast();
    // SAFETY: the offset is from a plan for this memory, so the page lies within it. No thread
    // relies on its content: the next one to touch it reads a byte and discards it.
    let _ = unsafe { libc::madvise(page, 4096, libc::MADV_DONTNEED) };
}

/// Returns microseconds since 1970, which are the same in all processes.
fn now() -> u64 {
    whole_micros(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default(),
    )
}
