//! Sources of memory. Every source delivers its pages once, in order, to a [`Sink`].

mod elf_core;
mod extents;
mod file;
mod kinds;
mod process;
mod raw;
mod stdin;

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use snapshot_format::layout::{PAGE_SIZE, PAGE_SIZE_U64};

use crate::args::{self, Holes};
use crate::exit::Refusal;
use crate::names;
use crate::output::{Output, count};
use crate::signals::Cancel;
use crate::target;
use file::SourceFile;
use kinds::{Guess, guess};

pub(crate) use file::{Change, Stamp};
pub(crate) use kinds::is_firecracker_state;
pub(crate) use process::{HeldProcess, Place};
pub(crate) use raw::MERGE_A_DIFF;

/// Size of the pages in which sources are counted, in bytes.
pub(crate) const PAGE: u64 = PAGE_SIZE_U64;

/// Number of bytes read at once: long enough for the disk, short enough to react to Ctrl-C.
const CHUNK: usize = 1 << 20;

/// Minimum length of a run of pages without content that is left out: 64 GiB. Sanitizers and some
/// runtimes reserve terabytes, and a snapshot takes 64 bytes for each 2 MiB.
const VAST: u64 = (64 << 30) / PAGE;

/// A contiguous range of the owner's memory, as recorded in the snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    /// Start address in the owner's address space.
    pub(crate) start: u64,
    /// Protection and sharing, as flags of the format.
    pub(crate) flags: u32,
    /// Page size of the owner's mapping, as a power of two.
    pub(crate) page_shift: u32,
    /// The owner's name for the region; may be empty.
    pub(crate) name: String,
}

/// A receiver of memory, in order. Page counts are in pages of 4 KiB; `bytes` are whole pages.
pub(crate) trait Sink {
    /// Starts a region, to which everything belongs until the next call.
    fn region(&mut self, region: &Region) -> Result<()>;
    /// Takes pages with these contents.
    fn pages(&mut self, bytes: &[u8]) -> Result<()>;
    /// Takes zero pages.
    fn zeros(&mut self, pages: u64) -> Result<()>;
    /// Takes pages that could not be read.
    fn unavailable(&mut self, pages: u64) -> Result<()>;
    /// Takes pages that are as in the base at this place.
    fn as_in_base(&mut self, pages: u64) -> Result<()> {
        anyhow::bail!("{pages} pages are as in a base, and there is none")
    }
}

/// A way in which a source may have been read differently than intended. Whenever something is left
/// out or reinterpreted, there is a remark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Remark {
    /// Key of the snapshot's property that records the remark.
    pub(crate) key: &'static str,
    /// Value of that property.
    pub(crate) value: String,
    /// Sentence for people.
    pub(crate) text: String,
    /// Whether something is missing, so that the remark is also a warning.
    #[serde(skip)]
    pub(crate) warning: bool,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.warning { "WARNING" } else { "note" };
        writeln!(f, "{what:<11} {}", self.text)
    }
}

impl Remark {
    /// Returns the remark that [`VAST`] memory was left out, if any was; `what` names the memory
    /// and the reason.
    fn left_out(pages: u64, what: &str) -> Option<Self> {
        (pages > 0).then(|| Self {
            key: "source.left_out_bytes",
            value: (pages * PAGE).to_string(),
            text: format!("{} {what}; left out", count(pages, "page")),
            warning: true,
        })
    }
}

/// Amount of a source to sample.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampling {
    /// Maximum number of bytes in all.
    pub(crate) bytes: usize,
    /// Number of bytes at each place: the amount that will be compressed together.
    pub(crate) piece: usize,
}

impl Sampling {
    fn pieces(&self) -> u64 {
        (self.bytes / self.piece) as u64
    }
}

/// Pages from all over a source.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    /// Contents of the sampled pages that are not zero, one after the other.
    pub(crate) bytes: Vec<u8>,
    /// Number of bytes sampled.
    seen: u64,
    /// Number of bytes that could be sampled.
    all: u64,
}

impl Samples {
    /// Returns the estimated number of bytes of the source that are not in zero pages.
    pub(crate) fn expected_bytes(&self) -> u64 {
        let share = u128::from(self.all) * self.bytes.len() as u128;
        u64::try_from(share / u128::from(self.seen.max(1))).unwrap_or(u64::MAX)
    }

    /// Keeps the whole pages of `bytes` that are not zero.
    fn keep(&mut self, bytes: &[u8]) {
        self.seen += bytes.len() as u64;
        for page in bytes.chunks_exact(PAGE_SIZE) {
            if page.iter().any(|&byte| byte != 0) {
                self.bytes.extend_from_slice(page);
            }
        }
    }
}

/// A source of memory to pack.
pub(crate) trait Source {
    /// Describes the source in key-value pairs for the snapshot's properties.
    fn describe(&self) -> Vec<(String, String)>;
    /// Returns the number of pages to be delivered, if it is known beforehand.
    fn pages(&self) -> Option<u64>;
    /// Returns the number of page numbers that a snapshot of the source will have, if it is known
    /// beforehand.
    fn page_slots(&self) -> Option<u64> {
        None
    }
    /// Returns the maximum number of those pages whose bytes are delivered, if it is known.
    fn data_pages(&self) -> Option<u64> {
        self.pages()
    }
    /// Samples pages from all over the source to train a dictionary. Returns nothing if the source
    /// can only be read once, or is no larger than the sample.
    fn sample(&mut self, wanted: &Sampling) -> Result<Samples>;
    /// Starts reading what can't wait until the target is written to. Does nothing the second time.
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }
    /// Delivers everything to `sink`. Must be called only once.
    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()>;
    /// Returns the remarks, after everything was delivered.
    fn remarks(&self) -> Vec<Remark> {
        Vec::new()
    }
    /// Returns whether the source is a raw file that is mostly holes.
    fn is_mostly_holes(&self) -> bool {
        false
    }
    /// Returns how long a process was stopped to be read, if the source is one.
    fn held(&self) -> Option<Duration> {
        None
    }
}

/// Opens the source given to `create`.
pub(crate) fn open(
    create: &args::Create,
    output: Output,
    cancel: &Cancel,
) -> Result<Box<dyn Source>> {
    if let Some(pid) = create.pid {
        let target = (!target::is_stdout(&create.output)).then_some(create.output.as_path());
        let place = Place::beside(target);
        return Ok(Box::new(HeldProcess::hold(pid, &place, output, cancel)?));
    }
    let Some(path) = create.source.as_deref() else {
        return Err(Refusal::Usage("name a source, or a process with --pid".into()).into());
    };
    if path == Path::new("-") {
        // Standard input redirected from a file has holes and random access.
        if let Some(file) = file::stdin()? {
            return open_file(file, create, cancel);
        }
        refuse_diff_in(create, "a pipe")?;
        return Ok(Box::new(stdin::Stream::stdin(create.raw, cancel)?));
    }
    match file::open(path)? {
        file::Opened::Pipe(pipe) => {
            refuse_diff_in(create, "a pipe")?;
            let stream = stdin::Stream::pipe(path, pipe, create.raw, cancel);
            Ok(Box::new(stream))
        }
        file::Opened::File(file) => open_file(file, create, cancel),
    }
}

/// Refuses a source without holes if there is a base, unless it is known to be all of the memory.
fn refuse_diff_in(create: &args::Create, what: &str) -> Result<()> {
    if create.meaning_of_holes() == Holes::Zero {
        return Ok(());
    }
    let text = format!(
        "{what} has no holes, so a diff in it cannot be told from all of a memory; name the file \
         of the diff; if this is all of the memory: --holes zero"
    );
    Err(Refusal::Usage(text).into())
}

fn open_file(file: SourceFile, create: &args::Create, cancel: &Cancel) -> Result<Box<dyn Source>> {
    let guess = guess(&file.start()?);
    match guess {
        _ if create.raw => {}
        Guess::ElfCore => {
            if create.holes == Some(Holes::Base) {
                let path = names::path(file.path());
                let text = format!(
                    "{path}: is an ELF core, and no diff; leave --holes base out to compare all of \
                     it with the base"
                );
                return Err(Refusal::Usage(text).into());
            }
            let core = elf_core::ElfCore::open(file, create.incomplete, cancel)?;
            return Ok(Box::new(core));
        }
        Guess::Other(what) => {
            anyhow::bail!("{}: {}", names::path(file.path()), what.refusal());
        }
        Guess::Raw => {}
    }
    if file.is_device() {
        refuse_diff_in(create, "a block device")?;
    }
    let is_known = !matches!(guess, Guess::Raw);
    let holes = raw::HolesOf {
        meaning: create.meaning_of_holes(),
        is_stated: create.holes.is_some(),
    };
    let raw = raw::Raw::open(file, is_known, holes, cancel)?;
    Ok(Box::new(raw))
}

#[cfg(test)]
pub(crate) mod testing {
    //! A sink that records what it gets, for the tests of every source.

    use super::*;

    /// A delivery of a source.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) enum Piece {
        Pages(Vec<u8>),
        Zeros(u64),
        Unavailable(u64),
    }

    #[derive(Debug, Default)]
    pub(crate) struct Recorder {
        pub(crate) regions: Vec<(Region, Vec<Piece>)>,
    }

    impl Recorder {
        fn push(&mut self, piece: Piece) {
            let pieces = &mut self.regions.last_mut().expect("a region began").1;
            match (pieces.last_mut(), piece) {
                (Some(Piece::Pages(last)), Piece::Pages(more)) => last.extend(more),
                (Some(Piece::Zeros(last)), Piece::Zeros(more))
                | (Some(Piece::Unavailable(last)), Piece::Unavailable(more)) => *last += more,
                (_, piece) => pieces.push(piece),
            }
        }

        /// Returns the contents of a page of region `index`; `None` if the page is unavailable.
        pub(crate) fn page(&self, index: usize, mut page: u64) -> Option<Vec<u8>> {
            for piece in &self.regions[index].1 {
                let pages = match piece {
                    Piece::Pages(bytes) => bytes.len() as u64 / PAGE,
                    Piece::Zeros(pages) | Piece::Unavailable(pages) => *pages,
                };
                if page < pages {
                    return match piece {
                        Piece::Pages(bytes) => {
                            let at = usize::try_from(page).unwrap() * PAGE_SIZE;
                            Some(bytes[at..at + PAGE_SIZE].to_vec())
                        }
                        Piece::Zeros(_) => Some(vec![0; PAGE_SIZE]),
                        Piece::Unavailable(_) => None,
                    };
                }
                page -= pages;
            }
            panic!("region {index} has no such page");
        }
    }

    impl Sink for Recorder {
        fn region(&mut self, region: &Region) -> Result<()> {
            self.regions.push((region.clone(), Vec::new()));
            Ok(())
        }

        fn pages(&mut self, bytes: &[u8]) -> Result<()> {
            assert!(!bytes.is_empty() && bytes.len().is_multiple_of(PAGE_SIZE));
            self.push(Piece::Pages(bytes.to_vec()));
            Ok(())
        }

        fn zeros(&mut self, pages: u64) -> Result<()> {
            assert!(pages > 0);
            self.push(Piece::Zeros(pages));
            Ok(())
        }

        fn unavailable(&mut self, pages: u64) -> Result<()> {
            assert!(pages > 0);
            self.push(Piece::Unavailable(pages));
            Ok(())
        }
    }
}
