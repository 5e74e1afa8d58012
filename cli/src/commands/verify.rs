//! `snaprestore verify`: verifies every byte of a snapshot.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use indicatif::HumanCount;
use serde::Serialize;
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{FileStore, OpenError, VerifyError, VerifyOptions};

use crate::args;
use crate::exit::Exit;
use crate::names;
use crate::output::{Output, count};
use crate::progress::Progress;
use crate::signals::Cancel;

/// Maximum number of problems listed for people.
const LISTED_PROBLEMS: usize = 20;

#[derive(Serialize)]
pub(crate) struct VerifyReport {
    file: String,
    pub(crate) ok: bool,
    pub(crate) frames_checked: u64,
    pub(crate) pages_checked: u64,
    problems: Vec<Problem>,
    /// Number of problems beyond those listed.
    more_problems: u64,
    pub(crate) elapsed_ms: u64,
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
    let file = names::exact(&args.file);
    let store = FileStore::open(&args.file).map_err(|source| OpenError::NoStore {
        file: names::path(&args.file),
        source,
    })?;
    let progress = Progress::bytes(output, "verifying", None);
    let mut options = VerifyOptions::default().progress(|at| {
        progress.set_total(at.pages * PAGE_SIZE_U64);
        progress.set(at.pages_done * PAGE_SIZE_U64);
        if cancel.requested() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    if let Some(threads) = args.threads {
        options = options.threads(threads);
    }
    let found = snapshot_format::verify(Arc::new(store), options).map_err(|error| match error {
        // These errors name the file themselves, and determine the exit code.
        VerifyError::Open(error) => anyhow::Error::from(error),
        VerifyError::Read(error) => error.into(),
        VerifyError::Frame(error) => error.into(),
        other => anyhow::Error::from(other).context(names::path(&args.file)),
    })?;
    drop(progress);
    Ok(VerifyReport {
        ok: found.ok(),
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
        elapsed_ms: u64::try_from(began.elapsed().as_millis())?,
    })
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = names::shown(&self.file);
        if let (true, [problem]) = (self.not_a_snapshot, &self.problems[..]) {
            return writeln!(f, "{file}: {}", problem.detail);
        }
        let found = self.problems.len() as u64 + self.more_problems;
        if self.ok {
            write!(f, "{file}: good")?;
        } else {
            write!(f, "{file}: DAMAGED, {}", count(found, "problem"))?;
        }
        writeln!(
            f,
            " ({}, {} checked in {} ms)",
            count(self.pages_checked, "page"),
            count(self.frames_checked, "frame"),
            self.elapsed_ms
        )?;
        for problem in self.problems.iter().take(LISTED_PROBLEMS) {
            write!(f, "  {} at byte {}", problem.what, problem.offset)?;
            if let Some(file) = &problem.file {
                write!(f, " of {}", names::shown(file))?;
            }
            writeln!(f, ": {}", problem.detail)?;
        }
        let listed = self.problems.len().min(LISTED_PROBLEMS) as u64;
        if found > listed {
            writeln!(f, "  ... and {} more", HumanCount(found - listed))?;
        }
        Ok(())
    }
}
