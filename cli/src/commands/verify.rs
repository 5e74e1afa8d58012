//! `snaprestore verify`: verifies every byte of a snapshot.

use std::fmt;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use indicatif::HumanCount;
use serde::Serialize;
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{
    Ancestors, FileStore, Layer, LayerFolders, OpenError, Snapshot, SnapshotOptions, Store,
    VerifyError, VerifyOptions,
};

use crate::args;
use crate::exit::Exit;
use crate::layers::{self, KnownLayers};
use crate::names;
use crate::output::{Output, count};
use crate::progress::Progress;
use crate::signals::Cancel;

/// Maximum number of problems listed for people.
const MAX_LISTED_PROBLEMS: usize = 20;

#[derive(Serialize)]
pub(crate) struct VerifyReport {
    /// Whether nothing is wrong with the file and, if they were checked, its ancestors.
    pub(crate) ok: bool,
    #[serde(flatten)]
    pub(crate) own: FileReport,
    /// Reports about the ancestors, if they were to be checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    chain: Option<Vec<AncestorReport>>,
    pub(crate) elapsed_ms: u64,
}

#[derive(Serialize)]
struct AncestorReport {
    ok: bool,
    /// The reason why only those parts were checked that the verified snapshot uses: a file that
    /// it does not need is missing or unusable.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_checked_alone: Option<UnneededFile>,
    #[serde(flatten)]
    report: FileReport,
}

/// An ancestor of an ancestor, without which that cannot be checked alone.
#[derive(Serialize)]
struct UnneededFile {
    snapshot_id: String,
    /// Name under which the file was last known; may be empty.
    name: String,
    reason: String,
}

/// Findings about one file.
#[derive(Serialize)]
pub(crate) struct FileReport {
    file: String,
    pub(crate) frames_checked: u64,
    pub(crate) pages_checked: u64,
    problems: Vec<Problem>,
    /// Number of problems beyond those listed.
    more_problems: u64,
    #[serde(skip)]
    not_a_snapshot: bool,
}

#[derive(Serialize)]
struct Problem {
    /// The ancestor that has the problem, unless it is the verified file.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    what: String,
    offset: u64,
    detail: String,
}

pub(crate) fn run(args: &args::Verify, output: Output, cancel: &Cancel) -> Result<Exit> {
    let report = check(args, output, cancel)?;
    output.report(&report)?;
    Ok(if report.ok { Exit::Done } else { Exit::Damaged })
}

/// Verifies a snapshot and returns a report.
pub(crate) fn check(args: &args::Verify, output: Output, cancel: &Cancel) -> Result<VerifyReport> {
    let began = Instant::now();
    let work = Work {
        threads: args.threads,
        output,
        cancel,
    };
    let store = FileStore::open_snapshot(&args.file)?;
    let beside = store.folder();
    let file = names::exact(&args.file);
    let own = work.check(file, store, layers::resolver(&args.layers, None)?)?;
    let chain = if args.chain {
        // An ancestor's ancestors may lie where this file's do.
        let resolver = layers::resolver(&args.layers, beside)?;
        Some(work.check_ancestors(args, &own, &resolver)?)
    } else {
        None
    };
    let mut ancestors = chain.iter().flatten();
    Ok(VerifyReport {
        ok: own.ok() && ancestors.all(|ancestor| ancestor.ok),
        own,
        chain,
        elapsed_ms: u64::try_from(began.elapsed().as_millis())?,
    })
}

/// Verifies a file that is written, and does not have its name `path` yet.
pub(crate) fn check_new(
    file: File,
    path: &Path,
    ancestors: Arc<dyn Ancestors>,
    threads: Option<usize>,
    (output, cancel): (Output, &Cancel),
) -> Result<()> {
    let work = Work {
        threads,
        output,
        cancel,
    };
    let store = Arc::new(FileStore::from_file(file, path));
    let report = work.check(names::exact(path), store, ancestors)?;
    let Some(problem) = report.problems.first() else {
        return Ok(());
    };
    bail!(
        "{}: not written: verifying the new file found: {} at byte {}: {}; run `snaprestore \
         verify` on the old one",
        names::path(path),
        problem.what,
        problem.offset,
        problem.detail
    )
}

/// A verification of one or several files.
struct Work<'a> {
    threads: Option<usize>,
    output: Output,
    cancel: &'a Cancel,
}

impl Work<'_> {
    fn check(
        &self,
        file: String,
        store: Arc<dyn Store>,
        ancestors: Arc<dyn Ancestors>,
    ) -> Result<FileReport> {
        let progress = Progress::bytes(self.output, "verifying", None);
        let mut options = VerifyOptions::default()
            .ancestors(ancestors)
            .progress(|at| {
                progress.set_total(at.pages * PAGE_SIZE_U64);
                progress.set(at.pages_done * PAGE_SIZE_U64);
                if self.cancel.requested() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
        if let Some(threads) = self.threads {
            options = options.threads(threads);
        }
        let name = store.name();
        let found = snapshot_format::verify(store, options).map_err(|error| match error {
            // These errors name the file themselves, and determine the exit code.
            VerifyError::Open(error) => anyhow::Error::from(error),
            VerifyError::Read(error) => error.into(),
            VerifyError::Frame(error) => error.into(),
            other => anyhow::Error::from(other).context(name),
        })?;
        Ok(FileReport {
            file,
            frames_checked: found.frames_checked,
            pages_checked: found.pages_checked,
            problems: found
                .problems
                .into_iter()
                .map(|problem| Problem {
                    file: problem.file,
                    what: problem.what,
                    offset: problem.offset,
                    detail: problem.detail,
                })
                .collect(),
            more_problems: found.more_problems,
            not_a_snapshot: found.not_a_snapshot,
        })
    }

    /// Checks all of the files of the ancestors.
    fn check_ancestors(
        &self,
        args: &args::Verify,
        own: &FileReport,
        resolver: &Arc<LayerFolders>,
    ) -> Result<Vec<AncestorReport>> {
        let snapshot = match layers::open(&args.file, &args.layers) {
            Ok(snapshot) => snapshot,
            // The damage is reported already.
            Err(error) if !own.ok() && Exit::from_error(&error) == Exit::Damaged => {
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        // Each of them is opened once, however many of the files need it.
        let open = KnownLayers::new(snapshot.ancestors().to_vec(), Some(Arc::clone(resolver)));
        let open: Arc<dyn Ancestors> = Arc::new(open);
        let ancestors = snapshot.ancestors().iter().map(|layer| {
            let file = layer.name().to_owned();
            let not_checked_alone = unneeded(layer, &snapshot, &open);
            let report = match not_checked_alone {
                Some(_) => FileReport::unchecked(file),
                None => self.check(file, layer.shared_store(), Arc::clone(&open))?,
            };
            Ok(AncestorReport {
                ok: report.ok(),
                not_checked_alone,
                report,
            })
        });
        ancestors.collect()
    }
}

/// Returns the file for lack of which `layer` cannot be opened alone, if it is one that `snapshot`
/// does not need.
fn unneeded(layer: &Layer, snapshot: &Snapshot, open: &Arc<dyn Ancestors>) -> Option<UnneededFile> {
    let options = SnapshotOptions::default().ancestors(Arc::clone(open));
    let (id, reason) = match Snapshot::open_with(layer.shared_store(), &options).err()? {
        OpenError::AncestorMissing { id, .. } => (id, "missing".to_owned()),
        OpenError::AncestorUnusable { id, source, .. } => (id, source.to_string()),
        _ => return None,
    };
    let mut needed = snapshot.ancestors().iter();
    if needed.any(|needed| needed.id() == id) {
        return None;
    }
    let mut named = layer.named_ancestors().into_iter();
    let name = named.find(|ancestor| ancestor.id == id);
    Some(UnneededFile {
        snapshot_id: id.to_string(),
        name: name.map_or_else(String::new, |ancestor| ancestor.name),
        reason,
    })
}

impl FileReport {
    /// Returns the report about a file of which nothing was checked alone.
    fn unchecked(file: String) -> Self {
        Self {
            file,
            frames_checked: 0,
            pages_checked: 0,
            problems: Vec::new(),
            more_problems: 0,
            not_a_snapshot: false,
        }
    }

    fn ok(&self) -> bool {
        self.problems.is_empty() && self.more_problems == 0
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, elapsed_ms: Option<u64>) -> fmt::Result {
        let file = names::shown(&self.file);
        if let (true, [problem]) = (self.not_a_snapshot, &self.problems[..]) {
            return writeln!(f, "{file}: {}", problem.detail);
        }
        let found = self.problems.len() as u64 + self.more_problems;
        if self.ok() {
            write!(f, "{file}: good")?;
        } else {
            write!(f, "{file}: DAMAGED, {}", count(found, "problem"))?;
        }
        let (pages, frames) = (self.pages_checked, self.frames_checked);
        let (pages, frames) = (count(pages, "page"), count(frames, "frame"));
        match elapsed_ms {
            Some(time) => writeln!(f, " ({pages}, {frames} checked in {time} ms)")?,
            None => writeln!(f, " ({pages}, {frames} checked)")?,
        }
        for problem in self.problems.iter().take(MAX_LISTED_PROBLEMS) {
            write!(f, "  {} at byte {}", problem.what, problem.offset)?;
            if let Some(file) = &problem.file {
                write!(f, " of {}", names::shown(file))?;
            }
            writeln!(f, ": {}", problem.detail)?;
        }
        let listed = self.problems.len().min(MAX_LISTED_PROBLEMS) as u64;
        if found > listed {
            writeln!(f, "  ... and {} more", HumanCount(found - listed))?;
        }
        Ok(())
    }
}

impl UnneededFile {
    /// Writes why `file` was not checked alone when `own` was verified.
    fn write(&self, f: &mut fmt::Formatter<'_>, file: &str, own: &str) -> fmt::Result {
        let Self {
            snapshot_id,
            name,
            reason,
        } = self;
        let name = match &name[..] {
            "" => String::new(),
            name => format!(" (last known as {})", names::shown(name)),
        };
        writeln!(
            f,
            "{file}: not checked beyond what {own} uses of it: its ancestor {snapshot_id}{name}, \
             which {own} does not need, cannot be used: {reason}"
        )
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.own.write(f, Some(self.elapsed_ms))?;
        for ancestor in self.chain.iter().flatten() {
            match &ancestor.not_checked_alone {
                Some(unneeded) => {
                    let (file, own) = (&ancestor.report.file, &self.own.file);
                    unneeded.write(f, &names::shown(file), &names::shown(own))?;
                }
                None => ancestor.report.write(f, None)?,
            }
        }
        Ok(())
    }
}
