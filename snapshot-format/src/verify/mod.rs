//! The verifier, which reads a whole file and reports everything that is wrong with it.
//!
//! ```text
//! trailer, directory, top table, regions     as a reader opens them
//! header                                     against the trailer
//! every section and blob                     checksum, then content
//! for each window of 1024 blocks (2 GiB of the owner's memory):
//!     its index blocks, in parallel          checksum, structure, counts, nothing unused
//!     every frame that they name, in parallel
//!         checksum, header, decode           for the first window that needs it, and the second
//!         page list against the index        the first time: listed pages point here, every slot
//!                                            is listed, no slot is a fill
//!     digests of pages -> of blocks -> of the content
//! every byte of the file                     belongs to exactly one thing, or is zero
//! summary, with its digests                  as counted
//! fill runs                                  as the index says
//! ```
//!
//! Of the ancestors of a layered snapshot, the index blocks and frames that its pages use are
//! checked like its own, except for page lists. Nothing else in them is checked.
//!
//! A frame that several windows need is decoded at most twice: after that its digests are
//! remembered. There is room for the digests of a million slots, which is 4 GiB of content shared
//! by windows; beyond it, a frame is decoded once for each window that needs it.
//!
//! Maximum memory: 100 MiB with frames of 32 pages (160 MiB more if each page is a frame of its
//! own), 4 MiB for each thread, the top table, the longest of the sections and working sets (each
//! is read whole, and has at most 256 MiB), and 150 bytes for each frame and index block of the
//! file. Measured with 4 GiB of pages that all differ: 36 MiB in frames of 32 pages, 238 MiB in a
//! million frames of one.

mod extents;
mod frames;
mod pages;

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::digest::{self, Digest};
use crate::error::{FrameError, OpenError, Part, ReadError};
use crate::layout::SectionKind;
use crate::snapshot::{Ancestors, Snapshot, SnapshotOptions};
use crate::store::{Reason, Store};
use crate::types::Summary;

/// Maximum number of problems that a report lists; more are only counted.
pub const MAX_PROBLEMS: usize = 1000;

/// Progress of the verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyProgress {
    /// Pages of the blocks that are done.
    pub pages_done: u64,
    /// Pages of the snapshot, as its summary says.
    pub pages: u64,
    /// Frames checked.
    pub frames_done: u64,
}

/// A callback that [`verify`] calls now and then, on the thread of its caller. `Break` cancels.
pub type VerifyCallback<'a> = Box<dyn FnMut(VerifyProgress) -> ControlFlow<()> + 'a>;

/// Options for verifying.
#[derive(Default)]
#[non_exhaustive]
pub struct VerifyOptions<'a> {
    /// Threads that decode; all cores if not set.
    pub threads: Option<usize>,
    /// Callback for the progress.
    pub progress: Option<VerifyCallback<'a>>,
    /// See [`SnapshotOptions::max_top_bytes`].
    pub max_top_bytes: Option<u64>,
    /// See [`SnapshotOptions::ancestors`].
    pub ancestors: Option<Arc<dyn Ancestors>>,
}

impl fmt::Debug for VerifyOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyOptions")
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl<'a> VerifyOptions<'a> {
    /// Sets [`VerifyOptions::threads`].
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sets [`VerifyOptions::max_top_bytes`].
    #[must_use]
    pub fn max_top_bytes(mut self, bytes: u64) -> Self {
        self.max_top_bytes = Some(bytes);
        self
    }

    /// Sets [`VerifyOptions::ancestors`].
    #[must_use]
    pub fn ancestors(mut self, ancestors: Arc<dyn Ancestors>) -> Self {
        self.ancestors = Some(ancestors);
        self
    }

    /// Sets [`VerifyOptions::progress`].
    #[must_use]
    pub fn progress(
        mut self,
        callback: impl FnMut(VerifyProgress) -> ControlFlow<()> + 'a,
    ) -> Self {
        self.progress = Some(Box::new(callback));
        self
    }
}

/// One problem of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the ancestor's file that has the problem; none if it is the verified file.
    pub file: Option<String>,
    /// The kind of the problem, in a word or two: a [`Part`], or `digest`, `summary`, `page list`,
    /// `overlap`.
    pub what: String,
    /// Offset of the problem in the file, or of its start.
    pub offset: u64,
    /// Description of the problem.
    pub detail: String,
}

/// Result of a verification.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Frames that were read and checked, good or bad.
    pub frames_checked: u64,
    /// Pages whose content is as the file promises.
    pub pages_checked: u64,
    /// Problems found, at most [`MAX_PROBLEMS`].
    pub problems: Vec<Problem>,
    /// Problems beyond those listed.
    pub more_problems: u64,
    /// Whether the file doesn't begin as snapshots do, and so is something else rather than
    /// damaged.
    pub not_a_snapshot: bool,
}

impl Report {
    /// Returns whether no problem was found.
    pub fn ok(&self) -> bool {
        self.problems.is_empty() && self.more_problems == 0
    }

    fn add(&mut self, what: impl fmt::Display, offset: u64, detail: impl Into<String>) {
        self.add_problem(Problem {
            file: None,
            what: what.to_string(),
            offset,
            detail: detail.into(),
        });
    }

    fn add_problem(&mut self, problem: Problem) {
        // A problem that several checks come across, such as in a section that is read twice, is
        // reported once.
        if self.problems.contains(&problem) {
            return;
        }
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        } else {
            self.more_problems += 1;
        }
    }

    /// Adds the error of reading a part of the file called `own`, or of an ancestor.
    fn add_error(&mut self, error: &ReadError, own: &str) {
        let (what, offset, detail) = match error {
            ReadError::Damaged {
                part,
                offset,
                defect,
                ..
            } => (part.to_string(), *offset, defect.to_string()),
            ReadError::Io {
                part,
                offset,
                source,
                ..
            } => (
                part.to_string(),
                *offset,
                format!("cannot be read: {source}"),
            ),
            other => ("file".to_owned(), 0, other.to_string()),
        };
        let file = error.file();
        self.add_problem(Problem {
            file: (file != own).then(|| file.to_owned()),
            what,
            offset,
            detail,
        });
    }
}

/// The file could not be verified at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The file can't be opened for a reason other than damage.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A part of the file could not be read, although the file may be intact.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A frame could not be read, although the file may be intact.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The progress callback requested it.
    #[error("verifying was cancelled")]
    Cancelled,
    /// The threads could not be started.
    #[error("cannot start threads to verify with")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// Checks everything in `store`. Damage is not an error but a problem in the report, even if the
/// file's trailer is broken and nothing else can be checked.
pub fn verify(store: Arc<dyn Store>, options: VerifyOptions<'_>) -> Result<Report, VerifyError> {
    let mut report = Report::default();
    let mut how = SnapshotOptions::default();
    if let Some(bytes) = options.max_top_bytes {
        how = how.max_top_bytes(bytes);
    }
    how.ancestors = options.ancestors;
    let snapshot = match Snapshot::open_with(store, &how) {
        Ok(snapshot) => snapshot,
        Err(error) if error.is_damage() => {
            add_open_error(&mut report, &error, None);
            return Ok(report);
        }
        Err(error) => return Err(error.into()),
    };
    let mut pool = rayon::ThreadPoolBuilder::new().thread_name(|i| format!("verify-{i}"));
    if let Some(threads) = options.threads {
        pool = pool.num_threads(threads.max(1));
    }
    let mut check = Check {
        snapshot: &snapshot,
        pool: pool.build()?,
        report,
        progress: options.progress,
        counted: Summary::default(),
        extents: extents::Extents::default(),
        own_pages: 0,
        attachments: Vec::new(),
        complete: true,
        failed: None,
        pages_done: 0,
    };
    check.header();
    check.sections()?;
    check.pages()?;
    check.fill_runs();
    check.gaps()?;
    check.summary();
    check.stop_if_failed()?;
    Ok(check.report)
}

/// Adds the damage that opening a file found; `ancestor` is its name if it is not the verified one.
fn add_open_error(report: &mut Report, error: &OpenError, ancestor: Option<&str>) {
    let (part, offset, detail) = match error {
        OpenError::Damaged {
            part,
            offset,
            defect,
            ..
        } => (*part, *offset, defect.to_string()),
        OpenError::Io {
            part,
            offset,
            source,
            ..
        } => (*part, *offset, format!("cannot be read: {source}")),
        OpenError::Incomplete { file, file_bytes } => {
            (Part::Trailer, *file_bytes, without_name(error, file))
        }
        OpenError::NotASnapshot { file, .. } => {
            report.not_a_snapshot = ancestor.is_none();
            (Part::Header, 0, without_name(error, file))
        }
        OpenError::AncestorUnusable { id, source, .. } => {
            let first = report.problems.len();
            add_open_error(report, source, Some(source.file()));
            for problem in &mut report.problems[first..] {
                problem.detail = format!("{}; it is wanted as ancestor {id}", problem.detail);
            }
            return;
        }
        OpenError::AncestorCycle { file, .. } => {
            let part = Part::Section(SectionKind::Ancestors);
            (part, 0, without_name(error, file))
        }
        other => (Part::Header, 0, other.to_string()),
    };
    report.add_problem(Problem {
        file: ancestor.map(ToOwned::to_owned),
        what: part.to_string(),
        offset,
        detail,
    });
}

/// Formats an error without the file's name, which the caller that asked for the report knows.
fn without_name(error: &OpenError, file: &str) -> String {
    let text = error.to_string();
    match text
        .strip_prefix(file)
        .and_then(|rest| rest.strip_prefix(": "))
    {
        Some(rest) => rest.to_owned(),
        None => text,
    }
}

/// A verification in progress.
struct Check<'a> {
    snapshot: &'a Snapshot,
    pool: rayon::ThreadPool,
    report: Report,
    progress: Option<VerifyCallback<'a>>,
    /// The summary as it should be.
    counted: Summary,
    extents: extents::Extents,
    /// Pages whose frame lies in the file itself.
    own_pages: u64,
    /// Names and digests of the attachments that were read.
    attachments: Vec<(String, Digest)>,
    /// Whether everything so far was readable. If so, bytes that remain unexplained are a problem
    /// of their own, and the counts are worth comparing.
    complete: bool,
    /// The error that makes a verdict impossible: the store failed, which says nothing about the
    /// file.
    failed: Option<VerifyError>,
    pages_done: u64,
}

impl Check<'_> {
    fn stop_if_failed(&mut self) -> Result<(), VerifyError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn report_progress(&mut self) -> Result<(), VerifyError> {
        self.stop_if_failed()?;
        let Some(callback) = &mut self.progress else {
            return Ok(());
        };
        let progress = VerifyProgress {
            pages_done: self.pages_done,
            pages: self.snapshot.summary().pages,
            frames_done: self.report.frames_checked,
        };
        match callback(progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(VerifyError::Cancelled),
        }
    }

    /// Records the result of reading a part.
    fn note<T>(&mut self, result: Result<T, ReadError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.complete = false;
                self.problem(error);
                None
            }
        }
    }

    /// Records damage as a problem; any other error ends the verification.
    fn problem(&mut self, error: ReadError) {
        if error.is_damage() {
            self.report.add_error(&error, self.snapshot.name());
        } else {
            self.failed.get_or_insert(error.into());
        }
    }

    /// Checks the header, which nothing else depends on.
    fn header(&mut self) {
        if let Err(error) = self.snapshot.own().check_header() {
            self.problem(error);
        }
    }

    /// Checks every section and everything that it points to, except the index.
    fn sections(&mut self) -> Result<(), VerifyError> {
        let own = self.snapshot.own();
        for section in own.ends().directory.all() {
            let kind = SectionKind::from_number(section.number);
            let part = kind.map_or(Part::UnknownSection(section.number), Part::Section);
            self.extents.add(part, section.offset, section.len);
            match kind {
                // Read and checked when the snapshot was opened.
                Some(SectionKind::Top | SectionKind::Regions) => {}
                Some(SectionKind::Properties) => {
                    self.note(own.properties());
                }
                Some(
                    kind @ (SectionKind::Dictionaries
                    | SectionKind::WorkingSets
                    | SectionKind::Attachments),
                ) => self.blobs(kind)?,
                // The content of these sections is compared with the pages later.
                Some(
                    SectionKind::FillRuns | SectionKind::BlockDigests | SectionKind::Ancestors,
                )
                | None => {
                    let checked = own.check_section(section, part);
                    self.note(checked);
                }
            }
            self.report_progress()?;
        }
        Ok(())
    }

    fn blobs(&mut self, kind: SectionKind) -> Result<(), VerifyError> {
        let snapshot = self.snapshot;
        let own = snapshot.own();
        let Some(blobs) = self.note(own.blobs(kind)) else {
            return Ok(());
        };
        for blob in blobs {
            let (part, result) = match kind {
                SectionKind::Dictionaries => {
                    let number = u16::try_from(blob.tag).unwrap_or(0);
                    (Part::Dictionary, own.dictionary(number).map(|_| ()))
                }
                SectionKind::WorkingSets => {
                    let runs = snapshot.working_set_runs(&blob);
                    (Part::WorkingSet, runs.map(|_| ()))
                }
                // An attachment may have any length, so progress is reported while it is checked.
                _ => {
                    let part = Part::Attachment;
                    let mut hasher = blake3::Hasher::new();
                    let checked = own.check_blob(part, &blob, Reason::Verify, |bytes| {
                        hasher.update(bytes);
                        self.report_progress()
                    });
                    match checked {
                        Ok(()) => {
                            let digest = hasher.finalize().into();
                            self.attachments.push((blob.name.clone(), digest));
                            (part, Ok(()))
                        }
                        Err(VerifyError::Read(error)) => (part, Err(error)),
                        Err(other) => return Err(other),
                    }
                }
            };
            self.extents.add(part, blob.offset, blob.len);
            self.note(result);
            self.report_progress()?;
        }
        Ok(())
    }

    /// Checks that the pages of every fill run repeat its word; the reader compares them.
    fn fill_runs(&mut self) {
        // If the section is damaged, only a wrong checksum has been reported so far. Nothing but
        // the runs depends on it, so all else can still be compared.
        if let Err(error) = self.snapshot.fill_runs() {
            self.problem(error);
        }
    }

    /// Compares the summary with the verifier's own counts.
    fn summary(&mut self) {
        if !self.complete {
            return;
        }
        let stated = *self.snapshot.summary();
        let counted = &self.counted;
        let trailer = self.snapshot.file_bytes() - crate::layout::TRAILER_BYTES as u64;
        let fields = [
            ("pages", stated.pages, counted.pages),
            ("zero_pages", stated.zero_pages, counted.zero_pages),
            ("fill_pages", stated.fill_pages, counted.fill_pages),
            ("stored_pages", stated.stored_pages, counted.stored_pages),
            (
                "duplicate_pages",
                stated.duplicate_pages,
                counted.duplicate_pages,
            ),
            (
                "unavailable_pages",
                stated.unavailable_pages,
                counted.unavailable_pages,
            ),
            ("frames", stated.frames, counted.frames),
            ("stored_bytes", stated.stored_bytes, counted.stored_bytes),
            ("index_bytes", stated.index_bytes, counted.index_bytes),
        ];
        let most = (crate::layout::MAX_FRAME_SLOTS * crate::layout::PAGE_SIZE) as u64;
        if !stated
            .frame_bytes
            .is_multiple_of(crate::layout::PAGE_SIZE_U64)
            || stated.frame_bytes > most
        {
            let detail = format!(
                "frame_bytes is {}, not a multiple of 4096 up to {most}",
                stated.frame_bytes
            );
            self.report.add("summary", trailer, detail);
        }
        for (field, stated, counted) in fields {
            if stated != counted {
                let detail = format!("{field} is {stated}, but there are {counted}");
                self.report.add("summary", trailer, detail);
            }
        }
        let regions = self.snapshot.regions();
        let attachments: Vec<_> = self
            .attachments
            .iter()
            .map(|(name, digest)| (&name[..], *digest))
            .collect();
        let state = digest::state(&counted.content_digest, regions, &attachments);
        for (what, stated, counted) in [
            ("content", stated.content_digest, counted.content_digest),
            ("state", stated.state_digest, state),
        ] {
            if stated != counted {
                self.report.add(
                    "digest",
                    trailer,
                    format!(
                        "the {what}'s digest is {}, recorded is {}",
                        blake3::Hash::from(counted),
                        blake3::Hash::from(stated)
                    ),
                );
            }
        }
    }
}
