//! Where memory comes from. Every source walks its pages once, in order, into a [`Sink`].

mod elf_core;
mod extents;
mod file;
mod kinds;
mod process;
mod raw;
mod stdin;

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use snapshot_format::layout::{PAGE_SIZE, PAGE_SIZE_U64};

use crate::args;
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

/// Bytes of a page: what sources are counted in.
pub(crate) const PAGE: u64 = PAGE_SIZE_U64;

/// Bytes read at once: long enough for the disk, short enough to notice Ctrl-C.
const CHUNK: usize = 1 << 20;

/// Pages of nothing, so many in a row or more, are left out: 64 GiB. Sanitizers and some runtimes
/// set terabytes aside as if to use them, and a snapshot has 64 bytes for each 2 MiB.
const VAST: u64 = (64 << 30) / PAGE;

/// A contiguous range of the owner's memory, as it goes into the snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    /// Address in the owner's terms.
    pub(crate) start: u64,
    /// Protection and sharing, in the bits of the format.
    pub(crate) flags: u32,
    /// Page size of the owner's mapping, as a power of two.
    pub(crate) page_shift: u32,
    /// What the owner calls it; may be empty.
    pub(crate) name: String,
}

/// Takes memory in order. Page counts are of 4 KiB; `bytes` are whole pages.
pub(crate) trait Sink {
    /// What follows, until the next call, belongs to this region.
    fn region(&mut self, region: &Region) -> Result<()>;
    /// Pages with these contents.
    fn pages(&mut self, bytes: &[u8]) -> Result<()>;
    /// Zero pages.
    fn zeros(&mut self, pages: u64) -> Result<()>;
    /// Pages that could not be read.
    fn unavailable(&mut self, pages: u64) -> Result<()>;
}

/// How a source was taken, where that may not be how it was meant. Nothing is left out, and nothing
/// taken for something else, without one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Remark {
    /// Key of the snapshot's property that records it.
    pub(crate) key: &'static str,
    /// Value of that property.
    pub(crate) value: String,
    /// Sentence for people.
    pub(crate) text: String,
    /// Whether something is missing: then it is a warning too.
    #[serde(skip)]
    pub(crate) warning: bool,
}

impl Remark {
    /// Tells that [`VAST`] memory was left out; `what` says which memory, and why.
    fn left_out(pages: u64, what: &str) -> Option<Self> {
        (pages > 0).then(|| Self {
            key: "source.left_out_bytes",
            value: (pages * PAGE).to_string(),
            text: format!("{} {what}; left out", count(pages, "page")),
            warning: true,
        })
    }
}

/// How much of a source to look at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampling {
    /// At most so much in all.
    pub(crate) bytes: usize,
    /// So much at each place: what will be compressed together.
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
    /// Those that weren't zero, one after the other.
    pub(crate) bytes: Vec<u8>,
    /// Bytes that were looked at.
    seen: u64,
    /// Bytes that there are to look at.
    all: u64,
}

impl Samples {
    /// Bytes of the source that aren't zero, by what was seen.
    pub(crate) fn expected_bytes(&self) -> u64 {
        let share = u128::from(self.all) * self.bytes.len() as u128;
        u64::try_from(share / u128::from(self.seen.max(1))).unwrap_or(u64::MAX)
    }

    /// Takes the whole pages of `bytes` that aren't zero throughout.
    fn keep(&mut self, bytes: &[u8]) {
        self.seen += bytes.len() as u64;
        for page in bytes.chunks_exact(PAGE_SIZE) {
            if page.iter().any(|&byte| byte != 0) {
                self.bytes.extend_from_slice(page);
            }
        }
    }
}

/// Memory to pack.
pub(crate) trait Source {
    /// What it is, for the snapshot's properties: key and value.
    fn describe(&self) -> Vec<(String, String)>;
    /// Pages that it will deliver, if that is known beforehand.
    fn pages(&self) -> Option<u64>;
    /// Some pages from all over it, for training a dictionary. Nothing if it can only be read
    /// once, or has no more than that.
    fn sample(&mut self, wanted: &Sampling) -> Result<Samples>;
    /// Begins to read what can't wait until the target is written to. Does nothing the second time.
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }
    /// Delivers everything to `sink`, once.
    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()>;
    /// How it was taken, once it has been delivered.
    fn remarks(&self) -> Vec<Remark> {
        Vec::new()
    }
    /// Whether it is a raw file most of which are holes.
    fn is_mostly_holes(&self) -> bool {
        false
    }
    /// How long a process was stopped to read it.
    fn held(&self) -> Option<Duration> {
        None
    }
}

/// Opens what `create` was told to read.
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
        // A file that is redirected has holes, and can be read at any place.
        return match file::stdin()? {
            Some(file) => open_file(file, create, cancel),
            None => Ok(Box::new(stdin::Stream::stdin(create.raw, cancel)?)),
        };
    }
    match file::open(path)? {
        file::Opened::Pipe(pipe) => Ok(Box::new(stdin::Stream::pipe(
            path, pipe, create.raw, cancel,
        ))),
        file::Opened::File(file) => open_file(file, create, cancel),
    }
}

fn open_file(file: SourceFile, create: &args::Create, cancel: &Cancel) -> Result<Box<dyn Source>> {
    let guess = guess(&file.start()?);
    match guess {
        _ if create.raw => {}
        Guess::ElfCore => {
            let core = elf_core::ElfCore::open(file, create.incomplete, cancel)?;
            return Ok(Box::new(core));
        }
        Guess::Other(what) => {
            anyhow::bail!("{}: {}", names::path(file.path()), what.refusal());
        }
        Guess::Raw => {}
    }
    let is_known = !matches!(guess, Guess::Raw);
    let raw = raw::Raw::open(file, is_known, create.holes, cancel)?;
    Ok(Box::new(raw))
}

#[cfg(test)]
pub(crate) mod testing {
    //! A sink that remembers, for the tests of every source.

    use super::*;

    /// What a source delivered.
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

        /// The contents of region `index`; `None` where a page is unavailable.
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
