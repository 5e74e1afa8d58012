//! An open snapshot: look-ups of pages, and the locations of everything else.
//!
//! Opening reads the last 64 KiB of the file, which in an ordinary snapshot hold trailer, top table
//! and regions; any part of these that lies before takes one more read. Everything else is read at
//! the first request, checked, and kept. A look-up reads at most one index block, which carries
//! everything that is needed to find the frame; index blocks stay in a bounded cache.

mod blocks;
mod decoder;
mod opening;
mod tables;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use zstd::zstd_safe;

pub use self::decoder::FrameDecoder;
use self::opening::Tables;
use crate::error::{Defect, Flaw, OpenError, Part, ReadError};
use crate::index::{BlockRef, CheckedTop, IndexBlock, Top, TopTable};
use crate::layout::{HEADER_BYTES, PAGES_PER_BLOCK, PAGES_PER_BLOCK_U64};
use crate::names::escape_path;
use crate::open::{self, Ends};
use crate::sections::{self, Blob, Directory, Section};
use crate::store::{FileStore, Reason, Store};
use crate::types::{Region, SnapshotId, Summary};

/// The default of [`SnapshotOptions::max_top_bytes`]. The writer refuses to write what a reader
/// with it refuses to open.
pub(crate) const DEFAULT_MAX_TOP_BYTES: u64 = 256 << 20;

/// Options for opening a snapshot.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SnapshotOptions {
    /// Maximum number of bytes of index blocks that are kept in memory. A block takes 2 to 20 KiB
    /// and describes 2 MiB of the owner's memory.
    pub index_cache_bytes: u64,
    /// Maximum number of bytes of a top table that is read into memory: 12 for each MiB of the
    /// owner's memory, so the default of 256 MiB is enough for 21 TiB. A sparse file of any length
    /// costs nothing to make, so its claims must not decide how much is allocated.
    pub max_top_bytes: u64,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            index_cache_bytes: 8 << 20,
            max_top_bytes: DEFAULT_MAX_TOP_BYTES,
        }
    }
}

impl SnapshotOptions {
    /// Sets [`SnapshotOptions::index_cache_bytes`].
    #[must_use]
    pub fn index_cache_bytes(mut self, bytes: u64) -> Self {
        self.index_cache_bytes = bytes;
        self
    }

    /// Sets [`SnapshotOptions::max_top_bytes`].
    #[must_use]
    pub fn max_top_bytes(mut self, bytes: u64) -> Self {
        self.max_top_bytes = bytes;
        self
    }
}

/// An open snapshot. All methods can be called from many threads at once.
pub struct Snapshot {
    store: Arc<dyn Store>,
    name: String,
    ends: Ends,
    top: TopTable,
    regions: Vec<Region>,
    dictionaries: OnceLock<Vec<Dictionary>>,
    /// Decompressors for index blocks: as many as there were simultaneous look-ups.
    contexts: Mutex<Vec<zstd_safe::DCtx<'static>>>,
    blocks: Cache<u64, Arc<IndexBlock>, ByMemory>,
}

/// A dictionary of the file, and its prepared form once it was needed.
struct Dictionary {
    blob: Blob,
    prepared: OnceLock<Prepared>,
}

/// A dictionary that was read and checked.
struct Prepared {
    digested: zstd_safe::DDict<'static>,
    /// The dictionary's bytes, for contexts that digest them themselves.
    bytes: Vec<u8>,
}

#[derive(Clone)]
struct ByMemory;

impl Weighter<u64, Arc<IndexBlock>> for ByMemory {
    fn weight(&self, _block: &u64, index: &Arc<IndexBlock>) -> u64 {
        index.weight()
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("name", &self.name)
            .field("id", &self.ends.id)
            .field("blocks", &self.top.len())
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    /// Opens the snapshot in `store`.
    pub fn open(store: Arc<dyn Store>) -> Result<Self, OpenError> {
        Self::open_with(store, &SnapshotOptions::default())
    }

    /// Opens the regular file or block device at `path`.
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let store = FileStore::open(path).map_err(|source| OpenError::NoStore {
            file: escape_path(path),
            source,
        })?;
        Self::open(Arc::new(store))
    }

    /// Opens the snapshot in `store` with options.
    pub fn open_with(store: Arc<dyn Store>, options: &SnapshotOptions) -> Result<Self, OpenError> {
        let (ends, tail) = open::ends(&*store)?;
        let name = store.name();
        let tables = Tables {
            store: &*store,
            name: &name,
            ends: &ends,
            tail: &tail,
        };
        let (top, regions) = tables.read(options.max_top_bytes)?;
        let items = usize::try_from(options.index_cache_bytes / (4 << 10)).unwrap_or(usize::MAX);
        // The default is one shard for every quarter of a core. On a large machine that would split
        // the bound into pieces smaller than a few blocks.
        let cache = OptionsBuilder::new()
            .shards(8)
            .estimated_items_capacity(items.clamp(64, 1 << 20))
            .weight_capacity(options.index_cache_bytes)
            .build()
            .map_err(|error| OpenError::NoStore {
                file: name.clone(),
                source: io::Error::other(error.to_string()),
            })?;
        Ok(Self {
            store,
            name,
            ends,
            top,
            regions,
            dictionaries: OnceLock::new(),
            contexts: Mutex::new(Vec::new()),
            blocks: Cache::with_options(
                cache,
                ByMemory,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
        })
    }

    /// Returns the id of this layout of frames.
    pub fn id(&self) -> SnapshotId {
        self.ends.id
    }

    /// Returns the totals of the snapshot's content, as counted by its writer. `verify` counts
    /// again.
    pub fn summary(&self) -> &Summary {
        &self.ends.summary
    }

    /// Returns the length of the file, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.ends.file_bytes
    }

    /// Returns the version of the file's format.
    pub fn format_version(&self) -> u32 {
        self.ends.version
    }

    /// Returns the bits of [`crate::layout::optional`], and those that this version doesn't define.
    pub fn optional_features(&self) -> u64 {
        self.ends.optional_features
    }

    /// Returns the name of the snapshot in messages, which is the store's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the store that the snapshot is read from.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Returns the number of entries of the top table, which are the blocks of the page-number
    /// space.
    pub fn block_count(&self) -> u64 {
        self.top.len()
    }

    /// Returns the size of the page-number space, including the unused numbers at the ends of
    /// regions.
    pub fn page_slots(&self) -> u64 {
        self.top.len() * PAGES_PER_BLOCK_U64
    }

    /// Returns the regions, in the order of page numbers. They were read when the snapshot was
    /// opened.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Returns the top table's description of a block. The entry for a region's last block covers
    /// its used numbers only.
    ///
    /// # Panics
    ///
    /// If `block` is not below [`Snapshot::block_count`].
    pub fn top(&self, block: u64) -> Top {
        match self.top.get(block) {
            Some(CheckedTop::Fill(word)) => Top::Fill(word),
            Some(CheckedTop::Block(_)) => Top::Block,
            Some(CheckedTop::Unavailable) => Top::Unavailable,
            None => panic!("block {block} of {}", self.top.len()),
        }
    }

    /// Returns the location of a block's stored index block.
    pub(crate) fn block_ref(&self, block: u64) -> Option<BlockRef> {
        match self.top.get(block)? {
            CheckedTop::Block(index) => Some(index),
            CheckedTop::Fill(_) | CheckedTop::Unavailable => None,
        }
    }

    /// Returns the number of pages of a block: 512, or fewer at the end of a region.
    fn pages_of_block(&self, block: u64) -> usize {
        let first = block * PAGES_PER_BLOCK_U64;
        let region = sections::region_of(&self.regions, first);
        let pages = region.map_or(0, |region| region.first_page + region.pages - first);
        usize::try_from(pages).map_or(PAGES_PER_BLOCK, |pages| pages.min(PAGES_PER_BLOCK))
    }
}

/// Reading and checking, used by everything that follows.
impl Snapshot {
    pub(crate) fn directory(&self) -> &Directory {
        &self.ends.directory
    }

    /// Compares the header with the trailer: for the verifier.
    pub(crate) fn check_header(&self) -> Result<(), ReadError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read(Part::Header, &mut bytes, 0, Reason::Verify)?;
        open::check_header(&bytes, &self.ends)
            .map_err(|defect| self.damaged(Part::Header, Flaw::new(0, defect)))
    }

    pub(crate) fn read_section(&self, section: &Section, part: Part) -> Result<Vec<u8>, ReadError> {
        self.read_checked(part, section.offset, section.len, section.crc)
    }

    /// Reads bytes whose length was checked against a limit and the file.
    fn read_checked(
        &self,
        part: Part,
        offset: u64,
        len: u64,
        crc: u32,
    ) -> Result<Vec<u8>, ReadError> {
        let mut bytes = buffer(len).map_err(|source| ReadError::Io {
            file: self.name.clone(),
            part,
            offset,
            len,
            source,
        })?;
        self.read(part, &mut bytes, offset, Reason::Open)?;
        self.check_crc(part, offset, crc, crc32fast::hash(&bytes))?;
        Ok(bytes)
    }

    fn check_crc(
        &self,
        part: Part,
        offset: u64,
        stored: u32,
        computed: u32,
    ) -> Result<(), ReadError> {
        if stored == computed {
            return Ok(());
        }
        let defect = Defect::Checksum { stored, computed };
        Err(self.damaged(part, Flaw::new(offset, defect)))
    }

    pub(crate) fn read(
        &self,
        part: Part,
        buf: &mut [u8],
        offset: u64,
        reason: Reason,
    ) -> Result<(), ReadError> {
        self.store
            .read_exact_at(buf, offset, reason)
            .map_err(|source| ReadError::Io {
                file: self.name.clone(),
                part,
                offset,
                len: buf.len() as u64,
                source,
            })
    }

    fn damaged(&self, part: Part, flaw: Flaw) -> ReadError {
        ReadError::Damaged {
            file: self.name.clone(),
            part,
            offset: flaw.at,
            defect: flaw.defect,
        }
    }
}

/// Returns zeroed memory of `len` bytes, or an error if it cannot be allocated.
fn buffer(len: u64) -> io::Result<Vec<u8>> {
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(len)
        .map_err(|_| io::ErrorKind::OutOfMemory)?;
    bytes.resize(len, 0);
    Ok(bytes)
}

/// Does what the unstable `OnceLock::get_or_try_init` would do. Two threads may both run `make`;
/// one result is kept.
fn get_or_try<T>(
    cell: &OnceLock<T>,
    make: impl FnOnce() -> Result<T, ReadError>,
) -> Result<&T, ReadError> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = make()?;
    Ok(cell.get_or_init(|| value))
}
