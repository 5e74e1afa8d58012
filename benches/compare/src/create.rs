//! Comparison of writing: `snaprestore create` with its defaults against `zstd -3 -T0` and fsync,
//! and the sizes of the files that they write.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use snapshot_format::Snapshot;

use crate::contender::SnapshotKind;
use crate::prepare::{Images, run};
use crate::rounds::{Sample, Samples};
use crate::trial::Outcome;
use crate::usage::{self, Who};
use crate::{BenchError, PAGE};

/// Name of this comparison in the results.
pub const NAME: &str = "create";
/// Name of the other contender in the results.
pub const ZSTD: &str = "zstd -3 -T0, fsync";
/// Name of our contender in the results.
pub const OURS: &str = "ours";

/// Sizes of files, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// The memory.
    pub raw: u64,
    /// The snapshot that `create` makes by default.
    pub snapshot: u64,
    /// Its frames, with their headers and lists of pages.
    pub frames: u64,
    /// Its dictionaries.
    pub dictionaries: u64,
    /// Everything else: index blocks, tables, header and trailer.
    pub index: u64,
    /// The raw image compressed by `zstd -3`, solid.
    pub solid: u64,
    /// Pages of the memory.
    pub pages: u64,
    /// Distinct pages stored.
    pub stored_pages: u64,
    /// Frames.
    pub frame_count: u64,
    /// Decoded size of a frame.
    pub frame_bytes: u64,
}

/// Returns the sizes of the files that are written with default options.
pub fn sizes(images: &mut Images) -> Result<Sizes, BenchError> {
    let solid = images.solid()?;
    let path = images.snapshot(&SnapshotKind::default())?;
    let failed = || format!("{}: reading its sizes", path.display());
    let snapshot = Snapshot::open_path(&path).map_err(BenchError::trial(failed()))?;
    let dictionaries = snapshot
        .dictionaries()
        .map_err(BenchError::trial(failed()))?;
    let summary = snapshot.summary();
    let dictionaries = dictionaries.iter().map(|dictionary| dictionary.bytes).sum();
    let size = |path: &Path| fs::metadata(path).map_err(BenchError::io(failed()));
    Ok(Sizes {
        raw: images.bytes(),
        snapshot: snapshot.file_bytes(),
        frames: summary.stored_bytes,
        dictionaries,
        index: snapshot.file_bytes() - summary.stored_bytes - dictionaries,
        solid: size(&solid)?.len(),
        pages: images.bytes() / PAGE,
        stored_pages: summary.stored_pages,
        frame_count: summary.frames,
        frame_bytes: summary.frame_bytes,
    })
}

/// Measures writing with both, in turn: a round that doesn't count, then `rounds` that do.
pub fn compare(images: &Images, rounds: u32, into: &mut Samples) -> Result<(), BenchError> {
    let (ours, theirs) = (
        images.folder().join("created.snap"),
        images.folder().join("created.zst"),
    );
    for round in 0..=rounds {
        let mut measure =
            |contender: &str, out: &Path, write: &dyn Fn() -> Result<(), BenchError>| {
                let _ = fs::remove_file(out);
                let (cpu, began) = (usage::cpu_seconds(Who::Children), Instant::now());
                write()?;
                let total = began.elapsed();
                let cpu_s = usage::cpu_seconds(Who::Children) - cpu;
                let bytes = fs::metadata(out)
                    .map_err(BenchError::io("the file that was written"))?
                    .len();
                let _ = fs::remove_file(out);
                into.samples.push(Sample {
                    workload: NAME.into(),
                    contender: contender.into(),
                    round,
                    outcome: Outcome {
                        total_ms: total.as_secs_f64() * 1e3,
                        cpu_s,
                        facts: serde_json::json!({ "file_bytes": bytes }),
                        ..Outcome::default()
                    },
                });
                Ok::<(), BenchError>(())
            };
        measure(OURS, &ours, &|| {
            images.create(&ours, &SnapshotKind::default())
        })?;
        measure(ZSTD, &theirs, &|| {
            run(Command::new("zstd")
                .args(["-3", "-T0", "-q", "-f"])
                .arg(images.raw()?)
                .arg("-o")
                .arg(&theirs))?;
            File::open(&theirs)
                .and_then(|file| file.sync_all())
                .map_err(BenchError::io("fsync of what zstd wrote"))
        })?;
    }
    Ok(())
}
