//! Layered snapshots: writing a child of the guest's memory, and the chains that are restored.
//!
//! A *change* replaces a share of the pages, in runs of 1 to 16, by other pages of the guest in
//! which a few words differ. It is the same on every machine.
//!
//! | file | content |
//! | --- | --- |
//! | `0.snap` | the memory before any change |
//! | `1.snap`, `2.snap`, ... | children, each of the one before, written from diffs |
//! | `memory.raw` | the memory after all changes |
//! | `diff`, `only` | the last change, as a diff with holes, and as just its pages |

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::prepare::{Images, run};
use crate::report::{rows, short};
use crate::rounds::{Absent, Sample, Samples};
use crate::stats::{Spread, float};
use crate::trial::Outcome;
use crate::usage::{self, Who};
use crate::workload::{Access, Cache, Order, Workload, mixed};
use crate::{BenchError, PAGE, limits};

/// Name of the comparison of writing in the results.
pub const NAME: &str = "layers";
/// `create` of the memory before the change.
pub const FULL: &str = "create";
/// `create --base` from a diff; the changes lie in two fifths of the blocks.
pub const DIFF: &str = "create --base, diff";
/// `create --base` from a diff; the changes lie anywhere.
pub const SCATTERED: &str = "create --base, scattered diff";
/// `create --base` from the whole memory after the change.
pub const WITH_BASE: &str = "create --base, full image";
/// `create` of just the changed pages.
pub const ONLY: &str = "create, changed pages only";
/// Decoding and hashing of the changed blocks in the base, and nothing else.
pub const DECODE: &str = "limit:decode changed blocks";
/// `create` of the memory at the end of the long chain.
pub const LONG_FULL: &str = "create, end of the chain";
/// `flatten` of the long chain.
pub const FLATTEN: &str = "flatten";

/// Share of the pages that a child of two layers changes.
const CHILD_SHARE: f64 = 0.05;
/// The long chain: its layers, and the share of the pages that each of them changes.
const CHAIN_LAYERS: u32 = 64;
const CHAIN_SHARE: f64 = 0.01;
/// Pages of a block, which has one index block.
const BLOCK_PAGES: u64 = 512;
/// Bytes that a changed block may cost besides its pages.
const BYTES_A_BLOCK: u64 = 600;
/// Longest run of changed pages.
const MAX_RUN: u64 = 16;
/// Words that differ in a page.
const CHANGED_WORDS: u64 = 8;

/// Sizes of the files of a child, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildSizes {
    /// The child.
    pub child: u64,
    /// A plain snapshot of just the changed pages.
    pub only: u64,
    /// Number of changed pages.
    pub pages: u64,
    /// Number of blocks with a changed page.
    pub blocks: u64,
}

impl ChildSizes {
    /// Returns the child's size, less the allowance for each changed block, against that of a plain
    /// snapshot; and how it was computed.
    pub(crate) fn ratio(&self) -> (f64, String) {
        let allowed = BYTES_A_BLOCK * self.blocks;
        let ratio = float(self.child.saturating_sub(allowed)) / float(self.only);
        let from = format!(
            "({} bytes - {} blocks * {BYTES_A_BLOCK}) / {} bytes",
            self.child, self.blocks, self.only
        );
        (ratio, from)
    }
}

/// Kind of chain that a workload names as its image.
#[derive(Clone, Copy, Debug)]
pub struct ChainKind {
    layers: u32,
    share: f64,
}

impl ChainKind {
    /// Returns the chain of that name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "child" => Some(Self {
                layers: 2,
                share: CHILD_SHARE,
            }),
            "chain" => Some(Self {
                layers: CHAIN_LAYERS,
                share: CHAIN_SHARE,
            }),
            _ => None,
        }
    }
}

/// Makes a chain in `folder`: `raw` is the memory of its first layer. Returns images of the memory
/// at its end.
pub fn chain(
    kind: ChainKind,
    raw: &Path,
    folder: &Path,
    program: &Path,
) -> Result<Images, BenchError> {
    let series = Series::begin(raw, folder)?;
    create(program, raw, None, &series.layer(0))?;
    for number in 1..kind.layers {
        let change = Change::new(series.pages(), kind.share, number.into(), None);
        series.apply(&change)?;
        let base = series.layer(number - 1);
        create(program, &series.diff(), Some(&base), &series.layer(number))?;
    }
    let mut images = Images::new(&series.memory(), folder, program)?;
    images.use_chain(&series.layer(kind.layers - 1));
    Ok(images)
}

/// Pages that change.
struct Change {
    pages: BTreeSet<u64>,
    seed: u64,
}

impl Change {
    /// Chooses a share of `pages`, in `blocks` of their blocks or in all.
    fn new(pages: u64, share: f64, seed: u64, blocks: Option<u64>) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let all = pages.div_ceil(BLOCK_PAGES);
        let mut hot: Vec<u64> = (0..all).collect();
        if let Some(count) = blocks {
            while hot.len() as u64 > count.max(1) {
                let at = random.below(hot.len() as u64);
                hot.swap_remove(usize::try_from(at).unwrap_or(0));
            }
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part of a length is a length"
        )]
        let wanted = (float(pages) * share) as u64;
        let mut chosen = BTreeSet::new();
        while (chosen.len() as u64) < wanted {
            let at = random.below(hot.len() as u64);
            let block = hot[usize::try_from(at).unwrap_or(0)];
            let first = block * BLOCK_PAGES + random.below(BLOCK_PAGES);
            let end = first + 1 + random.below(MAX_RUN);
            let end = end.min((block + 1) * BLOCK_PAGES).min(pages);
            chosen.extend(first..end);
        }
        Self {
            pages: chosen,
            seed,
        }
    }

    fn blocks(&self) -> BTreeSet<u64> {
        self.pages.iter().map(|page| page / BLOCK_PAGES).collect()
    }
}

/// A sequence of numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mixed(self.0)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// The files of a chain that grows.
struct Series {
    source: File,
    folder: PathBuf,
    bytes: u64,
}

impl Series {
    fn begin(raw: &Path, folder: &Path) -> Result<Self, BenchError> {
        let named = || format!("{}: beginning a chain", folder.display());
        let source = File::open(raw).map_err(BenchError::io(named()))?;
        let bytes = source.metadata().map_err(BenchError::io(named()))?.len();
        let series = Self {
            source,
            folder: folder.to_owned(),
            bytes,
        };
        run(Command::new("cp")
            .arg("--sparse=auto")
            .arg(raw)
            .arg(series.memory()))?;
        Ok(series)
    }

    fn pages(&self) -> u64 {
        self.bytes / PAGE
    }

    fn layer(&self, number: u32) -> PathBuf {
        self.folder.join(format!("{number}.snap"))
    }

    fn memory(&self) -> PathBuf {
        self.folder.join("memory.raw")
    }

    fn diff(&self) -> PathBuf {
        self.folder.join("diff")
    }

    fn only(&self) -> PathBuf {
        self.folder.join("only")
    }

    /// Writes a change into the memory, as a diff, and alone.
    fn apply(&self, change: &Change) -> Result<(), BenchError> {
        let failed = || BenchError::io(format!("{}: writing a change", self.folder.display()));
        // A diff must not have the data of an earlier one.
        let _ = fs::remove_file(self.diff());
        let diff = File::create(self.diff()).map_err(failed())?;
        diff.set_len(self.bytes).map_err(failed())?;
        let memory = File::options()
            .write(true)
            .open(self.memory())
            .map_err(failed())?;
        let mut only = File::create(self.only()).map_err(failed())?;
        let mut random = Random(change.seed << 32);
        let mut bytes = vec![0; 4096];
        for page in &change.pages {
            loop {
                let from = random.below(self.pages()) * PAGE;
                self.source
                    .read_exact_at(&mut bytes, from)
                    .map_err(failed())?;
                if bytes.iter().any(|byte| *byte != 0) {
                    break;
                }
            }
            for _ in 0..CHANGED_WORDS {
                let word = usize::try_from(random.below(PAGE / 8)).unwrap_or(0);
                bytes[word * 8..][..8].copy_from_slice(&random.next().to_le_bytes());
            }
            diff.write_all_at(&bytes, page * PAGE).map_err(failed())?;
            memory.write_all_at(&bytes, page * PAGE).map_err(failed())?;
            only.write_all(&bytes).map_err(failed())?;
        }
        Ok(())
    }
}

/// Writes a snapshot; with a base, holes of `source` are as in the base.
fn create(
    program: &Path,
    source: &Path,
    base: Option<&Path>,
    out: &Path,
) -> Result<(), BenchError> {
    // The chain of an earlier run, which `--force` does not replace below its children.
    let _ = fs::remove_file(out);
    run(&mut create_command(program, source, base, out))
}

fn create_command(program: &Path, source: &Path, base: Option<&Path>, out: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["create", "--force", "--quiet", "--raw"]);
    command.arg(source).arg("-o").arg(out);
    if let Some(base) = base {
        command.arg("--base").arg(base);
    }
    command
}

/// Measures writing of children in turn with that of full snapshots: a round that doesn't count,
/// then `rounds` that do. Returns the sizes of a child.
pub fn compare(
    raw: &Path,
    chain: &mut Images,
    folder: &Path,
    program: &Path,
    rounds: u32,
    into: &mut Samples,
) -> Result<ChildSizes, BenchError> {
    let folder_of = |name: &str| {
        let folder = folder.join(name);
        let named = format!("{}: making the folder", folder.display());
        fs::create_dir_all(&folder)
            .map_err(BenchError::io(named))
            .map(|()| folder)
    };
    let series = Series::begin(raw, &folder_of("hot")?)?;
    let blocks = series.pages().div_ceil(BLOCK_PAGES);
    let change = Change::new(series.pages(), CHILD_SHARE, 1, Some(blocks * 2 / 5));
    series.apply(&change)?;
    let scattered = Series::begin(raw, &folder_of("scattered")?)?;
    let anywhere = Change::new(series.pages(), CHILD_SHARE, 1, None);
    scattered.apply(&anywhere)?;
    let base = series.layer(0);
    create(program, raw, None, &base)?;
    let long = chain.chain()?;
    let out = series.folder.join("out.snap");

    let with_base = {
        let mut command = create_command(program, &series.memory(), Some(&base), &out);
        command.args(["--holes", "zero"]);
        command
    };
    let mut flatten = Command::new(program);
    flatten.args(["flatten", "--force", "--quiet"]);
    flatten.arg(&long).arg("-o").arg(&out);
    let mut commands = vec![
        (FULL, create_command(program, raw, None, &out)),
        (
            DIFF,
            create_command(program, &series.diff(), Some(&base), &out),
        ),
        (
            SCATTERED,
            create_command(program, &scattered.diff(), Some(&base), &out),
        ),
        (WITH_BASE, with_base),
        (ONLY, create_command(program, &series.only(), None, &out)),
        (LONG_FULL, create_command(program, chain.raw()?, None, &out)),
        (FLATTEN, flatten),
    ];
    let mut sizes = ChildSizes {
        pages: change.pages.len() as u64,
        blocks: change.blocks().len() as u64,
        ..ChildSizes::default()
    };
    for round in 0..=rounds {
        let mut missing = None;
        for (name, command) in &mut commands {
            let _ = fs::remove_file(&out);
            let (cpu, began) = (usage::cpu_seconds(Who::Children), Instant::now());
            match run(command) {
                Err(BenchError::Trial { why, .. }) if *name == FLATTEN && round == 0 => {
                    missing = Some(why.lines().next().unwrap_or_default().to_owned());
                    continue;
                }
                result => result?,
            }
            let total = began.elapsed();
            let cpu_s = usage::cpu_seconds(Who::Children) - cpu;
            let file_bytes = fs::metadata(&out)
                .map_err(BenchError::io("the file that was written"))?
                .len();
            match *name {
                DIFF => sizes.child = file_bytes,
                ONLY => sizes.only = file_bytes,
                _ => {}
            }
            into.samples.push(Sample {
                workload: NAME.into(),
                contender: (*name).into(),
                round,
                outcome: Outcome {
                    total_ms: total.as_secs_f64() * 1e3,
                    cpu_s,
                    facts: serde_json::json!({ "file_bytes": file_bytes }),
                    ..Outcome::default()
                },
            });
        }
        let _ = fs::remove_file(&out);
        if let Some(why) = missing {
            commands.retain(|(name, _)| *name != FLATTEN);
            into.absent.push(Absent {
                workload: NAME.into(),
                contender: FLATTEN.into(),
                why,
            });
        }
        into.samples.push(Sample {
            workload: NAME.into(),
            contender: DECODE.into(),
            round,
            outcome: limits::digest_blocks(&base, &change.blocks())?,
        });
    }
    Ok(sizes)
}

/// Returns the comparison as a workload without touches, for tables and pictures.
pub fn workload() -> Workload {
    Workload {
        name: NAME.into(),
        title: "Write a child of 5 %, and flatten 64 layers, against full images, warm".into(),
        image: "guest".into(),
        order: Order::None,
        seed: 1,
        trace: None,
        share: 1.0,
        most_pages: None,
        access: Access::Read,
        threads: 1,
        cache: Cache::Warm,
        latencies: false,
        contenders: Vec::new(),
        limits: Vec::new(),
    }
}

/// Formats the results, with the sizes of the files.
pub fn table(samples: &Samples) -> String {
    let workload = workload();
    let mut text = format!(
        "{}\n {:<32} {:>9} {:>8} {:>8} {:>8} {:>10}\n",
        workload.title, "", "total ms", "min", "max", "CPU s", "MiB"
    );
    for row in rows(samples, &workload) {
        let bytes = samples.values(NAME, &row.contender, |outcome| {
            let bytes = &outcome.facts["file_bytes"];
            bytes.as_f64().unwrap_or(f64::NAN)
        });
        // A limit writes no file.
        let mib = Spread::from_samples(bytes.filter(|bytes| bytes.is_finite()));
        let mib = mib.map_or(String::new(), |bytes| {
            format!("{:.1}", bytes.median / 1_048_576.0)
        });
        let _ = writeln!(
            text,
            " {:<32} {:>9} {:>8} {:>8} {:>8.3} {mib:>10}",
            row.contender,
            short(row.total_ms.median),
            short(row.total_ms.min),
            short(row.total_ms.max),
            row.cpu_s,
        );
    }
    for absent in samples
        .absent
        .iter()
        .filter(|absent| absent.workload == NAME)
    {
        let _ = writeln!(text, " {}: not available: {}", absent.contender, absent.why);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_the_same_each_time_and_lie_where_they_may() {
        let change = |seed, blocks| Change::new(10_000, 0.05, seed, blocks);
        let hot = change(1, Some(3));
        assert_eq!(hot.pages, change(1, Some(3)).pages);
        assert_ne!(hot.pages, change(2, Some(3)).pages);
        assert!(hot.pages.len() >= 500 && hot.blocks().len() <= 3);
        let anywhere = change(1, None);
        assert!(anywhere.blocks().len() > 15);
        assert!(anywhere.pages.iter().all(|page| *page < 10_000));
    }

    #[test]
    fn change_is_written_as_memory_as_a_diff_and_alone() {
        let folder = tempfile::tempdir().unwrap();
        let raw = folder.path().join("raw");
        let before: Vec<u8> = (1..=64_u8).flat_map(|byte| vec![byte; 4096]).collect();
        fs::write(&raw, &before).unwrap();
        let series = Series::begin(&raw, folder.path()).unwrap();
        let change = Change::new(64, 0.2, 7, None);
        series.apply(&change).unwrap();
        let read = |path: PathBuf| fs::read(path).unwrap();
        let (memory, diff, only) = (
            read(series.memory()),
            read(series.diff()),
            read(series.only()),
        );
        assert_eq!(only.len() as u64, change.pages.len() as u64 * PAGE);
        let mut alone = only.chunks(4096);
        for (page, ((now, then), diff)) in (0..).zip(
            memory
                .chunks(4096)
                .zip(before.chunks(4096))
                .zip(diff.chunks(4096)),
        ) {
            if change.pages.contains(&page) {
                assert!(now != then && now == diff && Some(now) == alone.next());
            } else {
                assert!(now == then && diff.iter().all(|byte| *byte == 0));
            }
        }
    }
}
