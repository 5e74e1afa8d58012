//! `snaprestore extract`: writes a snapshot's memory, or an attachment, to a plain file.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};
use indicatif::BinaryBytes;
use serde::Serialize;
use snapshot_format::layout::{PAGE_SIZE, PAGE_SIZE_U64, PAGES_PER_BLOCK_U64};
use snapshot_format::{Region, Snapshot};

use crate::args::{self, Unavailable};
use crate::blocks::{BlockReader, Kind};
use crate::exit::Exit;
use crate::facts::RegionFacts;
use crate::layers;
use crate::names;
use crate::output::{Output, count};
use crate::progress::Progress;
use crate::signals::Cancel;
use crate::target::{self, Target};

/// Maximum number of regions whose offsets are listed for people.
const MAX_LISTED_REGIONS: usize = 8;

/// Number of blocks that a thread takes at once: 32 MiB, so that few frames are decoded twice.
const BLOCKS_PER_BATCH: u64 = 16;

#[derive(Serialize)]
struct ExtractReport {
    file: String,
    output: String,
    /// Length of the output.
    bytes: u64,
    /// Bytes of the output that are not in holes.
    data_bytes: u64,
    /// Number of unavailable pages that were written as zeros.
    unavailable_pages: u64,
    /// The written regions with their offsets; `None` for an attachment, which has neither regions
    /// nor holes.
    #[serde(skip_serializing_if = "Option::is_none")]
    regions: Option<Vec<RegionFacts>>,
    elapsed_ms: u64,
    /// Name of the target in messages.
    #[serde(skip)]
    target: String,
}

impl fmt::Display for ExtractReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "wrote {} to {}{} in {} ms",
            BinaryBytes(self.bytes),
            self.target,
            if self.regions.is_none() {
                String::new()
            } else {
                format!(", {} of it data,", BinaryBytes(self.data_bytes))
            },
            self.elapsed_ms
        )?;
        if self.unavailable_pages > 0 {
            writeln!(
                f,
                "{} of it zeros in place of unknown content",
                count(self.unavailable_pages, "page")
            )?;
        }
        let regions = self.regions.as_deref().unwrap_or_default();
        if regions.iter().all(|region| region.offset == region.start) {
            return Ok(());
        }
        writeln!(f, "offsets are not addresses:")?;
        for region in regions.iter().take(MAX_LISTED_REGIONS) {
            let line = format!(
                "  at offset {:#x}: {} from address {:#x} on, {}",
                region.offset,
                BinaryBytes(region.bytes),
                region.start,
                names::shown(&region.name)
            );
            writeln!(f, "{}", line.trim_end_matches(", "))?;
        }
        let left = regions.len().saturating_sub(MAX_LISTED_REGIONS);
        if left > 0 {
            writeln!(f, "  ... and {left} more regions (all with --json)")?;
        }
        Ok(())
    }
}

/// The memory to write, and its places in the output.
struct Plan<'s> {
    snapshot: &'s Snapshot,
    file: String,
    target: String,
    /// The regions, in order, with the number of the first block of each, counted without gaps.
    pieces: Vec<Piece>,
    regions: Vec<&'s Region>,
    blocks: u64,
    pages: u64,
    unavailable: Unavailable,
}

struct Piece {
    /// Number of the piece's first block among those to write.
    from: u64,
    /// Number of that block in the snapshot.
    block: u64,
    pages: u64,
    /// Offset in the output.
    offset: u64,
}

/// Counts of written pages.
#[derive(Default)]
struct Written {
    data: AtomicU64,
    unavailable: AtomicU64,
}

pub(crate) fn run(args: &args::Extract, output: Output, cancel: &Cancel) -> Result<Exit> {
    let began = Instant::now();
    let to_stdout = target::is_stdout_without_json(&args.output, output)?;
    target::refuse_source(&args.output, &args.file)?;
    let snapshot = layers::open(&args.file, &args.layers)?;
    layers::refuse_ancestor(&args.output, &snapshot)?;
    layers::refuse_needed(&args.output, &args.layers)?;
    let mut report = ExtractReport {
        file: names::exact(&args.file),
        output: names::exact(&args.output),
        bytes: 0,
        data_bytes: 0,
        unavailable_pages: 0,
        regions: None,
        elapsed_ms: 0,
        target: target::name(&args.output),
    };
    if let Some(name) = &args.attachment {
        // Checks the name first, so that a wrong one leaves no file behind.
        let known = snapshot.attachments()?;
        if !known.iter().any(|attachment| attachment.name == *name) {
            let known: Vec<_> = known
                .into_iter()
                .map(|attachment| attachment.name)
                .collect();
            bail!(
                "{}: has no attachment {name:?}; it has: {}",
                names::path(&args.file),
                list(&known)
            );
        }
        let mut target = Target::create(&args.output, args.force, cancel)?;
        report.bytes = snapshot.read_attachment(name, &mut target)?;
        report.data_bytes = report.bytes;
        target.complete()?;
    } else {
        let plan = Plan::new(&snapshot, args, &names::path(&args.file))?;
        let written = Written::default();
        let mut target = Target::create(&args.output, args.force, cancel)?;
        let progress = Progress::bytes(output, "extracting", Some(plan.bytes()));
        let sparse = target.sparse(plan.bytes());
        if let Some(file) =
            sparse.with_context(|| format!("{}: setting its length", plan.target))?
        {
            plan.write_sparse(file, args.threads, &written, &progress, cancel)?;
        } else {
            plan.write_stream(&mut target, &written, &progress, cancel)?;
        }
        target.complete()?;
        drop(progress);
        report.bytes = plan.bytes();
        report.data_bytes = written.data.into_inner() * PAGE_SIZE_U64;
        report.unavailable_pages = written.unavailable.into_inner();
        report.regions = Some(RegionFacts::all(plan.regions));
    }
    report.elapsed_ms = u64::try_from(began.elapsed().as_millis())?;
    output.report_beside(to_stdout, &report)?;
    Ok(Exit::Done)
}

impl<'s> Plan<'s> {
    fn new(snapshot: &'s Snapshot, args: &args::Extract, file: &str) -> Result<Self> {
        let mut plan = Self {
            snapshot,
            file: file.to_owned(),
            target: target::name(&args.output),
            pieces: Vec::new(),
            regions: chosen(snapshot.regions(), &args.region)
                .with_context(|| format!("cannot choose the regions of {file}"))?,
            blocks: 0,
            pages: 0,
            unavailable: args.unavailable,
        };
        for region in &plan.regions {
            plan.pieces.push(Piece {
                from: plan.blocks,
                block: region.first_page / PAGES_PER_BLOCK_U64,
                pages: region.pages,
                offset: plan.pages * PAGE_SIZE_U64,
            });
            plan.blocks += region.pages.div_ceil(PAGES_PER_BLOCK_U64);
            plan.pages += region.pages;
        }
        let whole = args.region.is_empty();
        let missing = snapshot.summary().unavailable_pages;
        if whole && missing > 0 && plan.unavailable == Unavailable::Refuse {
            return Err(plan.refuse(&count(missing, "page")));
        }
        Ok(plan)
    }

    fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE_U64
    }

    fn refuse(&self, what: &str) -> anyhow::Error {
        anyhow!(
            "{}: {what} could not be read when the snapshot was taken, so what they held is not \
             known; --unavailable zero writes zeros in their place, --region picks other regions",
            self.file
        )
    }

    /// Returns the number in the snapshot, the page count and the output offset of a block to
    /// write.
    fn block(&self, number: u64) -> (u64, usize, u64) {
        let after = self.pieces.partition_point(|piece| piece.from <= number);
        let piece = &self.pieces[after - 1];
        let nth = number - piece.from;
        let done = nth * PAGES_PER_BLOCK_U64;
        let pages = (piece.pages - done).min(PAGES_PER_BLOCK_U64);
        (
            piece.block + nth,
            usize::try_from(pages).unwrap_or(0),
            piece.offset + done * PAGE_SIZE_U64,
        )
    }

    /// Writes data to its place and leaves holes elsewhere, from several threads.
    fn write_sparse(
        &self,
        file: &File,
        threads: Option<usize>,
        written: &Written,
        progress: &Progress,
        cancel: &Cancel,
    ) -> Result<()> {
        let threads = threads
            .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
            .unwrap_or(1)
            .min(usize::try_from(self.blocks.div_ceil(BLOCKS_PER_BATCH))?);
        let next = AtomicU64::new(0);
        let failed = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut reader = BlockReader::new(self.snapshot);
                    loop {
                        let from = next.fetch_add(BLOCKS_PER_BATCH, Ordering::Relaxed);
                        let numbers = from..self.blocks.min(from.saturating_add(BLOCKS_PER_BATCH));
                        if numbers.is_empty() {
                            return;
                        }
                        let result = self.write_blocks(
                            &mut reader,
                            numbers,
                            file,
                            written,
                            progress,
                            cancel,
                        );
                        if let Err(error) = result {
                            failed
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .get_or_insert(error);
                            next.store(self.blocks, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn write_blocks(
        &self,
        reader: &mut BlockReader<'_>,
        numbers: Range<u64>,
        file: &File,
        written: &Written,
        progress: &Progress,
        cancel: &Cancel,
    ) -> Result<()> {
        for number in numbers {
            cancel.check()?;
            let (block, pages, offset) = self.block(number);
            let (bytes, kinds) = reader.read(block, pages)?;
            self.count(kinds, block, written)?;
            let mut page = 0;
            for run in kinds.chunk_by(|a, b| (*a == Kind::Data) == (*b == Kind::Data)) {
                let from = page * PAGE_SIZE;
                if run[0] == Kind::Data {
                    let bytes = &bytes[from..from + run.len() * PAGE_SIZE];
                    file.write_all_at(bytes, offset + from as u64)
                        .with_context(|| self.target.clone())?;
                }
                page += run.len();
            }
            progress.advance(bytes.len() as u64);
        }
        Ok(())
    }

    /// Writes everything in order, to a target that can't have holes.
    fn write_stream(
        &self,
        target: &mut Target,
        written: &Written,
        progress: &Progress,
        cancel: &Cancel,
    ) -> Result<()> {
        let mut reader = BlockReader::new(self.snapshot);
        for number in 0..self.blocks {
            cancel.check()?;
            let (block, pages, _) = self.block(number);
            let (bytes, kinds) = reader.read(block, pages)?;
            self.count(kinds, block, written)?;
            target
                .write_all(bytes)
                .with_context(|| self.target.clone())?;
            progress.advance(bytes.len() as u64);
        }
        Ok(())
    }

    fn count(&self, kinds: &[Kind], block: u64, written: &Written) -> Result<()> {
        let of = |kind| kinds.iter().filter(|&&other| other == kind).count() as u64;
        let unavailable = of(Kind::Unavailable);
        if unavailable > 0 && self.unavailable == Unavailable::Refuse {
            let first = block * PAGES_PER_BLOCK_U64;
            let last = first + kinds.len() as u64 - 1;
            return Err(self.refuse(&format!("{unavailable} of pages {first} to {last}")));
        }
        written
            .unavailable
            .fetch_add(unavailable, Ordering::Relaxed);
        written.data.fetch_add(of(Kind::Data), Ordering::Relaxed);
        Ok(())
    }
}

/// Returns the requested regions in the order of the snapshot; all of them if none was named.
fn chosen<'r>(regions: &'r [Region], wanted: &[String]) -> Result<Vec<&'r Region>> {
    if wanted.is_empty() {
        return Ok(regions.iter().collect());
    }
    let mut take = vec![false; regions.len()];
    for wanted in wanted {
        // Accepts the name itself or its escaped form.
        let is_wanted = |name: &str| name == wanted || names::shown(name) == *wanted;
        let named = regions.iter().map(|region| is_wanted(&region.name));
        let mut found = false;
        for (take, named) in take.iter_mut().zip(named) {
            *take |= named;
            found |= named;
        }
        if !found {
            // A name takes precedence over a number.
            let number = wanted.parse::<usize>().ok();
            match number.and_then(|number| take.get_mut(number)) {
                Some(take) => *take = true,
                None => bail!(
                    "no region {wanted:?}; `snaprestore info` lists the names, and the numbers 0 to {}",
                    regions.len().saturating_sub(1)
                ),
            }
        }
    }
    let chosen = regions.iter().zip(take).filter(|(_, take)| *take);
    Ok(chosen.map(|(region, _)| region).collect())
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_chosen_by_name_or_number() {
        let region = |name: &str| Region {
            space: 0,
            flags: 0,
            start: 0,
            pages: 1,
            first_page: 0,
            page_shift: 12,
            name: name.into(),
        };
        let regions = [region("a"), region("b"), region("a"), region("0")];
        let chosen = |wanted: &[&str]| -> Option<Vec<usize>> {
            let wanted: Vec<String> = wanted.iter().map(|&name| name.into()).collect();
            let chosen = chosen(&regions, &wanted).ok()?;
            let number = |region: &Region| regions.iter().position(|r| std::ptr::eq(r, region));
            chosen.into_iter().map(number).collect()
        };
        assert_eq!(chosen(&[]), Some(vec![0, 1, 2, 3]));
        assert_eq!(chosen(&["a"]), Some(vec![0, 2]));
        assert_eq!(chosen(&["2", "b"]), Some(vec![1, 2]));
        assert_eq!(chosen(&["0"]), Some(vec![3]));
        assert_eq!(chosen(&["c"]), None);
        assert_eq!(chosen(&["4"]), None);
    }
}
