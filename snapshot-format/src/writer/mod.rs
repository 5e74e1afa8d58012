//! Writes a snapshot in one pass.
//!
//! ```text
//! write_pages --> gather 512 pages --> pool: fills, digests --> in page order: share, fill frames
//! write_fill  --> whole blocks: O(1) each ------------------>       |              ^
//!                                                                   v              | in order
//!                                              pool: compress frame, checksum --> write
//! ```
//!
//! With a base, the pool also compares each block with the base's: see `base`. Blocks that are the
//! same get the base's index block, and pages that are known there get its frames.
//!
//! The caller's thread gathers, orders and writes; the pool hashes and compresses. All of it is
//! bounded: blocks by the number of buffers, frames by the number under way, index blocks by
//! sealing frames early. See `sequence` for the order of what is written.

mod base;
mod block;
mod copy;
mod dedup;
mod error;
mod extras;
mod frame;
mod index;
mod matching;
mod options;
mod output;
mod rewrite;
mod runs;
mod sections;
mod sequence;
mod training;
mod workers;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

pub use base::BaseDamage;
pub use error::WriteError;
pub use options::{Dictionary, RegionSpec, WriterOptions};
pub use rewrite::{
    DEFAULT_WORKING_SET, OptimizeOptions, Optimized, RewriteOptions, Rewritten, WorkingSetStats,
    flatten, optimize, rebase,
};

use self::base::{Base, UsedLayers};
use self::block::{Alike, BlockBuffer, Gather, Given};
use self::extras::Properties;
use self::output::Output;
use self::sections::Blob;
use self::sequence::Stage;
use self::training::Training;
use self::workers::Workers;
use crate::layout::{
    MAX_PAGES, MAX_SECTION_BYTES, PAGE_SIZE, PAGE_SIZE_U64, PAGES_PER_BLOCK_U64, RawTopEntry,
};
use crate::snapshot::DEFAULT_MAX_TOP_BYTES;
use crate::types::{Region, SnapshotId, Summary};

/// Progress of a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pages that have been taken in and ordered.
    pub pages_done: u64,
    /// Bytes of the file so far.
    pub bytes_written: u64,
}

/// Result of writing a snapshot.
#[derive(Clone, Debug)]
pub struct Written {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// Counts and content digest.
    pub summary: Summary,
    /// Length of the file.
    pub file_bytes: u64,
    /// The regions, with their page numbers.
    pub regions: Vec<Region>,
    /// Number of pages whose content lies in files of ancestors.
    pub ancestor_pages: u64,
    /// Length of the dictionaries, or 0.
    pub dictionary_bytes: u64,
}

type ProgressCallback = Box<dyn FnMut(&Progress) -> ControlFlow<()> + Send>;

/// One or several blocks on their way to the ordering stage.
enum QueueEntry {
    /// Being examined by the pool.
    Block {
        region: usize,
        buffer: Option<Arc<BlockBuffer>>,
    },
    /// Blocks whose pages are all alike.
    Uniform {
        region: usize,
        alike: Alike,
        blocks: usize,
        pages: u64,
    },
}

/// Length of the queue above which the writer waits for the first entry. Blocks with bytes are
/// already bounded by their buffers.
const MAX_QUEUED: usize = 64;
/// Its length for blocks of a snapshot that is copied, which bring bytes of their own.
const MAX_QUEUED_COPIES: usize = 16;

/// Writes one snapshot to `W`, which may be a pipe.
///
/// ```
/// use snapshot_format::{RegionSpec, Writer, WriterOptions};
///
/// let mut writer = Writer::new(Vec::new(), WriterOptions::default())?;
/// writer.begin_region(&RegionSpec { name: "ram".into(), ..RegionSpec::default() })?;
/// writer.write_pages(&[7; 8192])?;
/// writer.write_fill(1 << 20, 0)?;
/// let (file, written) = writer.finish()?;
/// assert_eq!(written.file_bytes, file.len() as u64);
/// assert_eq!(written.summary.pages, 2 + (1 << 20));
/// # Ok::<(), snapshot_format::WriteError>(())
/// ```
pub struct Writer<W: Write> {
    stage: Stage<W>,
    gather: Gather,
    queue: VecDeque<QueueEntry>,
    base: Option<Arc<Base>>,
    /// Pages of one region of the base that correspond to the next pages; none if none was named.
    base_pages: Option<Range<u64>>,
    regions: Vec<Region>,
    /// Bytes that the regions will take in the file.
    region_bytes: u64,
    /// First free page number, rounded up to the end of a block.
    next_page: u64,
    id: SnapshotId,
    optional_features: u64,
    properties: Properties,
    attachments: Vec<Blob>,
    working_sets: Vec<Blob>,
    progress: Option<ProgressCallback>,
    stopped: bool,
    /// Whether the blocks are those of a snapshot that is copied.
    copies: bool,
    /// Whether the last region takes no more pages.
    region_ended: bool,
}

impl<W: Write> Writer<W> {
    /// Starts a snapshot: writes its header and starts the threads.
    pub fn new(out: W, options: WriterOptions) -> Result<Self, WriteError> {
        options.check()?;
        let id = options.snapshot_id.unwrap_or_else(SnapshotId::random);
        let frame_pages = options.frame_pages;
        let mut properties = Properties::default();
        for (key, value) in options.own_properties().iter().chain(&options.properties) {
            properties.set(key, value)?;
        }
        let mut workers = Workers::start(options.thread_count(), frame_pages, options.level)?;
        let trains = crate::dictionary::is_worth_training(frame_pages);
        let training = match &options.dictionary {
            Dictionary::Auto if !trains => None,
            Dictionary::Auto | Dictionary::Train => Some(Training::new(
                options.level,
                frame_pages,
                options.expected_pages,
            )),
            Dictionary::Use(bytes) => {
                workers.use_dictionary(bytes)?;
                None
            }
            Dictionary::Off => None,
        };
        let mut out = Output::new(out);
        sections::write_header(&mut out, id, 0)?;
        let mut stage = Stage::new(out, workers, frame_pages, options.known_pages(), training);
        if let Dictionary::Use(bytes) = options.dictionary {
            stage.dictionaries.push(bytes);
        }
        let base = options.base.map(Base::new).transpose()?.map(Arc::new);
        if let Some(base) = &base {
            stage.layers = UsedLayers::new(Arc::clone(base));
        }
        Ok(Self {
            stage,
            gather: Gather::default(),
            queue: VecDeque::new(),
            base,
            base_pages: None,
            regions: Vec::new(),
            region_bytes: 0,
            next_page: 0,
            id,
            optional_features: 0,
            properties,
            attachments: Vec::new(),
            working_sets: Vec::new(),
            progress: None,
            stopped: false,
            copies: false,
            region_ended: false,
        })
    }

    /// Calls `callback` now and then, on the thread that writes. [`ControlFlow::Break`] makes the
    /// call in progress fail with [`WriteError::Cancelled`].
    pub fn on_progress(
        &mut self,
        callback: impl FnMut(&Progress) -> ControlFlow<()> + Send + 'static,
    ) {
        self.progress = Some(Box::new(callback));
    }

    /// Begins the next region; the pages written from now on belong to it.
    pub fn begin_region(&mut self, region: &RegionSpec) -> Result<(), WriteError> {
        self.guarded(|writer| {
            region.check()?;
            sections::check_region_count(writer.regions.len() + 1)?;
            let bytes = writer.region_bytes + sections::region_bytes(&region.name);
            WriteError::limit("the size of the regions", bytes, MAX_SECTION_BYTES)?;
            let base_pages = writer.base_pages_from(region.base_page)?;
            writer.end_region()?;
            writer.region_ended = false;
            writer.base_pages = base_pages;
            writer.region_bytes = bytes;
            writer.regions.push(Region {
                space: region.space,
                flags: region.flags,
                start: region.start,
                pages: 0,
                first_page: writer.next_page,
                page_shift: if region.page_shift == 0 {
                    12
                } else {
                    region.page_shift
                },
                name: region.name.clone(),
            });
            Ok(())
        })
    }

    /// Sets the page of the base that corresponds to the next page of the region, as
    /// [`RegionSpec::base_page`] does for its first page: for a region whose parts lie in several
    /// regions of the base.
    pub fn set_base_page(&mut self, page: Option<u64>) -> Result<(), WriteError> {
        self.guarded(|writer| {
            writer.base_pages = writer.base_pages_from(page)?;
            Ok(())
        })
    }

    /// Returns the pages of the base from `page` on, up to the end of its region.
    fn base_pages_from(&self, page: Option<u64>) -> Result<Option<Range<u64>>, WriteError> {
        let Some(page) = page else { return Ok(None) };
        let Some(base) = &self.base else {
            return Err(WriteError::argument(
                "a region's page of the base",
                "given",
                "none, as the writer has no base",
            ));
        };
        Ok(Some(base.pages_from(page)))
    }

    /// Writes the next pages of the region; `bytes` is a multiple of 4096 long.
    pub fn write_pages(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.guarded(|writer| {
            if !bytes.len().is_multiple_of(PAGE_SIZE) {
                return Err(WriteError::argument(
                    "the length of pages",
                    bytes.len(),
                    "multiples of 4096",
                ));
            }
            let mut rest = bytes;
            writer.write_from((bytes.len() / PAGE_SIZE) as u64, |room| {
                let (now, later) = rest.split_at(room.len());
                room.copy_from_slice(now);
                rest = later;
                Ok(())
            })
        })
    }

    /// Writes the next `pages` pages of the region, which `read` stores directly in their place: it
    /// is called with room for some of them at a time. This saves a copy.
    pub fn read_pages(
        &mut self,
        pages: u64,
        mut read: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        self.guarded(|writer| {
            writer.write_from(pages, |room| read(room).map_err(WriteError::Source))
        })
    }

    fn write_from(
        &mut self,
        pages: u64,
        mut fill: impl FnMut(&mut [u8]) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        self.extend_region(pages)?;
        let mut left = pages;
        while left > 0 {
            if self.gather.buffer.is_none() {
                self.gather.buffer = Some(self.wait_for_buffer()?);
            }
            let count = self
                .gather
                .room()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            let at = self.gather.given.len();
            if let Some(buffer) = &mut self.gather.buffer {
                fill(buffer.pages_mut(at, count))?;
            }
            self.push(Given::Bytes, count);
            left -= count as u64;
            self.end_full_block()?;
        }
        Ok(())
    }

    /// Writes the next `pages` pages of the region, which all repeat `word`. Costs nothing that
    /// depends on the number of pages but 56 bytes of memory for each 2 MiB.
    pub fn write_fill(&mut self, pages: u64, word: u64) -> Result<(), WriteError> {
        self.guarded(|writer| writer.write_alike(pages, Alike::Fill(word)))
    }

    /// Records that the next `pages` pages of the region could not be read.
    pub fn write_unavailable(&mut self, pages: u64) -> Result<(), WriteError> {
        self.guarded(|writer| writer.write_alike(pages, Alike::Unavailable))
    }

    /// Writes the next `pages` pages of the region, which are as in the base at the corresponding
    /// place: see [`RegionSpec::base_page`]. They must belong to one region of the base.
    pub fn write_from_base(&mut self, pages: u64) -> Result<(), WriteError> {
        self.guarded(|writer| {
            let Some(base) = writer.base.clone() else {
                return Err(WriteError::argument(
                    "the base of pages that are as in it",
                    "none",
                    "a snapshot (WriterOptions::base)",
                ));
            };
            let Some(there) = writer.base_pages.clone() else {
                return Err(WriteError::argument(
                    "the base's page that corresponds",
                    "none",
                    "a page of the base (RegionSpec::base_page, Writer::set_base_page)",
                ));
            };
            let most = there.end.saturating_sub(there.start);
            if pages > most {
                let first = there.start;
                return Err(WriteError::argument(
                    "the number of pages as in the base",
                    format_args!(
                        "{pages} from its page {first} on, where its region has {most} more"
                    ),
                    "pages of one region of the base",
                ));
            }
            writer.extend_region(pages)?;
            let mut left = pages;
            while left > 0 {
                let passed = writer.write_uniform_from_base(&base, left)?;
                if passed > 0 {
                    left -= passed;
                    continue;
                }
                let room = writer.gather.room();
                let count = usize::try_from(left).map_or(room, |left| left.min(room));
                writer.push(Given::Base, count);
                left -= count as u64;
                writer.end_full_block()?;
            }
            Ok(())
        })
    }

    /// Writes the next blocks of the base, up to `most` pages, if their pages are all alike.
    /// Returns the number of pages.
    fn write_uniform_from_base(&mut self, base: &Base, most: u64) -> Result<u64, WriteError> {
        let page = self.base_pages.as_ref().map_or(0, |pages| pages.start);
        if !self.gather.given.is_empty() || !page.is_multiple_of(PAGES_PER_BLOCK_U64) {
            return Ok(0);
        }
        let (block, most) = (page / PAGES_PER_BLOCK_U64, most / PAGES_PER_BLOCK_U64);
        let Some((alike, blocks)) = base.uniform_run(block, most) else {
            return Ok(0);
        };
        self.write_uniform(alike, blocks)
    }

    /// Writes whole blocks whose pages are all alike. Returns the number of pages.
    fn write_uniform(&mut self, alike: Alike, blocks: u64) -> Result<u64, WriteError> {
        let pages = blocks * PAGES_PER_BLOCK_U64;
        self.pass_base_pages(pages);
        self.enqueue(QueueEntry::Uniform {
            region: self.regions.len() - 1,
            alike,
            blocks: usize::try_from(blocks).map_err(|_| WriteError::Stopped)?,
            pages,
        })?;
        Ok(pages)
    }

    /// Adds pages to the block that is being filled.
    fn push(&mut self, given: Given, count: usize) {
        let none = 0..0;
        let base_pages = self.base_pages.as_ref().unwrap_or(&none);
        self.gather.push(given, count, base_pages);
        self.pass_base_pages(count as u64);
    }

    /// Passes over the pages of the base that correspond to the next `pages` pages.
    fn pass_base_pages(&mut self, pages: u64) {
        if let Some(there) = &mut self.base_pages {
            there.start = there.start.saturating_add(pages).min(there.end);
        }
    }

    /// Ends the last region, and waits until all pages are compared with the base. Returns damage
    /// that was found in blocks of the base whose counterparts were given as bytes alone: these are
    /// stored whole. Other blocks with damage are errors.
    pub fn base_damage(&mut self) -> Result<Option<BaseDamage>, WriteError> {
        self.guarded(|writer| {
            writer.end_region()?;
            writer.region_ended = true;
            writer.settle()?;
            Ok(writer.base.as_ref().and_then(|base| base.damage()))
        })
    }

    fn write_alike(&mut self, pages: u64, alike: Alike) -> Result<(), WriteError> {
        self.extend_region(pages)?;
        let mut left = pages;
        if !self.gather.given.is_empty() {
            let room = self.gather.room();
            let count = usize::try_from(left).map_or(room, |left| left.min(room));
            self.push(Given::Alike(alike), count);
            left -= count as u64;
            self.end_full_block()?;
        }
        let blocks = left / PAGES_PER_BLOCK_U64;
        if blocks > 0 {
            left -= self.write_uniform(alike, blocks)?;
        }
        if left > 0 {
            let count = usize::try_from(left).expect("less than a block");
            self.push(Given::Alike(alike), count);
        }
        Ok(())
    }

    /// Runs `call` unless an earlier one failed.
    fn guarded<T>(
        &mut self,
        call: impl FnOnce(&mut Self) -> Result<T, WriteError>,
    ) -> Result<T, WriteError> {
        if self.stopped {
            return Err(WriteError::Stopped);
        }
        let result = call(self);
        self.stopped = result.is_err();
        result
    }

    fn extend_region(&mut self, pages: u64) -> Result<(), WriteError> {
        let Some(region) = self.regions.last_mut().filter(|_| !self.region_ended) else {
            return Err(WriteError::argument(
                "the region of the pages",
                "none",
                "a region that was begun",
            ));
        };
        let len = region.pages.saturating_add(pages);
        WriteError::limit(
            "the number of pages",
            region.first_page.saturating_add(len),
            MAX_PAGES,
        )?;
        let blocks = (region.first_page + len).div_ceil(PAGES_PER_BLOCK_U64);
        let bytes = blocks * size_of::<RawTopEntry>() as u64;
        if bytes > DEFAULT_MAX_TOP_BYTES {
            return Err(WriteError::TopTooLarge {
                bytes,
                limit: DEFAULT_MAX_TOP_BYTES,
            });
        }
        // Below the limit the product can't overflow. A region may end where the address space
        // ends.
        let most = u64::MAX - region.start;
        WriteError::limit(
            "a region's length in bytes",
            (len * PAGE_SIZE_U64).saturating_sub(1),
            most,
        )?;
        region.pages = len;
        Ok(())
    }

    fn end_region(&mut self) -> Result<(), WriteError> {
        self.end_block()?;
        if let Some(region) = self.regions.last() {
            let blocks = region.pages.div_ceil(PAGES_PER_BLOCK_U64);
            self.next_page = region.first_page + blocks * PAGES_PER_BLOCK_U64;
        }
        Ok(())
    }

    fn end_full_block(&mut self) -> Result<(), WriteError> {
        if self.gather.room() == 0 {
            self.end_block()
        } else {
            Ok(())
        }
    }

    fn end_block(&mut self) -> Result<(), WriteError> {
        let Gather {
            given,
            buffer,
            base_runs,
        } = std::mem::take(&mut self.gather);
        if given.is_empty() {
            return Ok(());
        }
        let region = self.regions.len() - 1;
        let buffer = buffer.map(Arc::new);
        let base = self.base.clone().map(|base| (base, base_runs));
        self.stage.workers.examine(given, buffer.clone(), base);
        self.enqueue(QueueEntry::Block { region, buffer })
    }

    fn enqueue(&mut self, queued: QueueEntry) -> Result<(), WriteError> {
        self.queue.push_back(queued);
        self.advance()?;
        let most = if self.copies {
            MAX_QUEUED_COPIES
        } else {
            MAX_QUEUED
        };
        while self.queue.len() > most {
            self.stage.workers.wait()?;
            self.advance()?;
        }
        Ok(())
    }

    /// Does all work that is possible without waiting.
    fn advance(&mut self) -> Result<(), WriteError> {
        self.stage.workers.poll()?;
        self.stage.write_ready()?;
        let mut any = false;
        while let Some(first) = self.queue.pop_front() {
            match first {
                QueueEntry::Uniform {
                    region,
                    alike,
                    blocks,
                    pages,
                } => {
                    self.stage.push_uniform(region, alike, blocks, pages);
                }
                QueueEntry::Block { region, buffer } => {
                    let Some(examined) = self.stage.workers.pop_examined() else {
                        self.queue.push_front(QueueEntry::Block { region, buffer });
                        break;
                    };
                    self.stage.push_block(region, examined, buffer)?;
                }
            }
            any = true;
        }
        if any { self.report() } else { Ok(()) }
    }

    fn wait_for_buffer(&mut self) -> Result<BlockBuffer, WriteError> {
        loop {
            if let Some(buffer) = self.stage.workers.buffer() {
                return Ok(buffer);
            }
            self.stage.workers.wait()?;
            self.advance()?;
        }
    }

    /// Waits until all complete blocks are ordered and all sealed frames are written.
    fn settle(&mut self) -> Result<(), WriteError> {
        self.advance()?;
        while !self.queue.is_empty() {
            self.stage.workers.wait()?;
            self.advance()?;
        }
        self.stage.settle()
    }

    fn report(&mut self) -> Result<(), WriteError> {
        let Some(callback) = &mut self.progress else {
            return Ok(());
        };
        let progress = Progress {
            pages_done: self.stage.summary.pages,
            bytes_written: self.stage.out.offset(),
        };
        match callback(&progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(WriteError::Cancelled),
        }
    }
}
