//! An open snapshot: look-ups of pages, and the locations of everything else.
//!
//! Opening reads the last 64 KiB of the file, which in an ordinary snapshot hold trailer, top table
//! and regions; any part of these that lies before takes one more read. Everything else is read at
//! the first request, checked, and kept. A look-up reads at most one index block, which carries
//! everything that is needed to find the frame; index blocks stay in a bounded cache.

mod ancestors;
mod blocks;
mod decoder;
mod index_ahead;
mod layer;
mod opening;
mod tables;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use zstd::zstd_safe;

use self::ancestors::Chain;
pub(crate) use self::ancestors::name_property;
pub use self::ancestors::{AllowMissing, Ancestor, Ancestors, LayerFolders};
pub use self::decoder::{FrameDecoder, MAX_READ_AHEAD};
use self::index_ahead::IndexAhead;
pub use self::layer::Layer;
use self::opening::Tables;
use crate::error::{OpenError, Part, ReadError};
use crate::frame::FrameRef;
use crate::index::{BlockRef, CheckedTop, IndexBlock, Top, TopTable};
use crate::layout::{PAGES_PER_BLOCK, PAGES_PER_BLOCK_U64, SectionKind, TAIL_BYTES};
use crate::open;
use crate::sections;
use crate::store::{FileStore, Store};
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
    /// The resolver that finds the ancestors of a layered snapshot. By default, the folder of its
    /// file is searched.
    pub ancestors: Option<Arc<dyn Ancestors>>,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            index_cache_bytes: 8 << 20,
            max_top_bytes: DEFAULT_MAX_TOP_BYTES,
            ancestors: None,
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

    /// Sets [`SnapshotOptions::ancestors`].
    #[must_use]
    pub fn ancestors(mut self, ancestors: Arc<dyn Ancestors>) -> Self {
        self.ancestors = Some(ancestors);
        self
    }
}

/// An open snapshot, with the files of its ancestors if it is layered. All methods can be called
/// from many threads at once.
pub struct Snapshot {
    chain: Chain,
    top: TopTable,
    regions: Vec<Region>,
    /// Decompressors for index blocks: as many as there were simultaneous look-ups.
    contexts: Mutex<Vec<zstd_safe::DCtx<'static>>>,
    blocks: Cache<u64, Arc<IndexBlock>, ByMemory>,
    index_ahead: IndexAhead,
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
            .field("name", &self.name())
            .field("id", &self.id())
            .field("blocks", &self.top.len())
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    /// Opens the snapshot in `store`, and its ancestors if it is layered. They are looked for in
    /// the folder of the store's file. A store without one, such as a
    /// [`MemoryStore`](crate::MemoryStore), has no folder to search: open a child in it by
    /// [`Snapshot::open_with`], with [`SnapshotOptions::ancestors`].
    pub fn open(store: Arc<dyn Store>) -> Result<Self, OpenError> {
        Self::open_with(store, &SnapshotOptions::default())
    }

    /// Opens the regular file or block device at `path`, and its ancestors if it is layered. They
    /// are looked for in the folder of the file.
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::open(FileStore::open_snapshot(path.as_ref())?)
    }

    /// Opens the snapshot in `store` with options.
    pub fn open_with(store: Arc<dyn Store>, options: &SnapshotOptions) -> Result<Self, OpenError> {
        let (ends, tail) = open::ends(&*store, TAIL_BYTES)?;
        let mut own = Layer::new(store, ends);
        let tables = Tables {
            store: own.store(),
            name: own.name(),
            ends: own.ends(),
            tail: &tail,
        };
        // Everything that is wrong with the file itself is found before any other is looked for.
        let (top, regions) = tables.read(options.max_top_bytes)?;
        own.read_listed(&tail)?;
        let chain = open_chain(own, &top, options)?;
        let items = usize::try_from(options.index_cache_bytes / (4 << 10)).unwrap_or(usize::MAX);
        // The default is one shard for every quarter of a core. On a large machine that would split
        // the bound into pieces smaller than a few blocks.
        let cache = OptionsBuilder::new()
            .shards(8)
            .estimated_items_capacity(items.clamp(64, 1 << 20))
            .weight_capacity(options.index_cache_bytes)
            .build()
            .map_err(|error| OpenError::NoStore {
                file: chain.layers[0].name().to_owned(),
                source: io::Error::other(error.to_string()),
            })?;
        Ok(Self {
            chain,
            top,
            regions,
            contexts: Mutex::new(Vec::new()),
            blocks: Cache::with_options(
                cache,
                ByMemory,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
            index_ahead: IndexAhead::default(),
        })
    }

    /// Returns the id of this layout of frames.
    pub fn id(&self) -> SnapshotId {
        self.own().id()
    }

    /// Returns the totals of the snapshot's content, as counted by its writer. `verify` counts
    /// again.
    pub fn summary(&self) -> &Summary {
        &self.own().ends().summary
    }

    /// Returns the length of the file, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.own().file_bytes()
    }

    /// Returns the version of the file's format.
    pub fn format_version(&self) -> u32 {
        self.own().ends().version
    }

    /// Returns the bits of [`crate::layout::optional`], and those that this version doesn't define.
    pub fn optional_features(&self) -> u64 {
        self.own().ends().optional_features
    }

    /// Returns the name of the snapshot in messages, which is the store's name.
    pub fn name(&self) -> &str {
        self.own().name()
    }

    /// Returns the store that the snapshot is read from.
    pub fn store(&self) -> &dyn Store {
        self.own().store()
    }

    /// Returns the files of the ancestors, in the order of the snapshot's list; none if it is not
    /// layered.
    pub fn ancestors(&self) -> &[Arc<Layer>] {
        &self.chain.layers[1..]
    }

    /// Returns file number `layer` of the snapshot: its own file for 0, then its ancestors. See
    /// [`crate::FrameRef::layer`].
    pub fn layer(&self, layer: u16) -> Option<&Arc<Layer>> {
        self.chain.layers.get(usize::from(layer))
    }

    /// Tells the stores of all files that [reads follow no order](Store::expect_random_reads).
    pub fn expect_random_reads(&self) {
        for layer in &self.chain.layers {
            layer.store().expect_random_reads();
        }
    }

    /// Returns all files of the snapshot, its own first.
    pub(crate) fn layers(&self) -> &[Arc<Layer>] {
        &self.chain.layers
    }

    /// Returns the file that holds `frame`. A reference from another snapshot may name a layer that
    /// this one doesn't have; its checksum is then not that of the bytes in the own file.
    pub(crate) fn layer_of(&self, frame: &FrameRef) -> &Arc<Layer> {
        self.layer(frame.layer()).unwrap_or(&self.chain.layers[0])
    }

    /// Returns the name of the file of `layer`, if that is an ancestor.
    pub(crate) fn ancestor_name(&self, layer: u16) -> Option<&str> {
        let ancestor = self.layer(layer).filter(|_| layer > 0)?;
        Some(ancestor.name())
    }

    /// Returns the snapshot's own file.
    pub(crate) fn own(&self) -> &Layer {
        &self.chain.layers[0]
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
    pub(crate) fn pages_of_block(&self, block: u64) -> usize {
        let first = block * PAGES_PER_BLOCK_U64;
        let region = sections::region_of(&self.regions, first);
        let pages = region.map_or(0, |region| region.first_page + region.pages - first);
        usize::try_from(pages).map_or(PAGES_PER_BLOCK, |pages| pages.min(PAGES_PER_BLOCK))
    }
}

/// Opens the ancestors of `own`, and checks the entries of its top table that point to them.
fn open_chain(
    mut own: Layer,
    top: &TopTable,
    options: &SnapshotOptions,
) -> Result<Chain, OpenError> {
    let folders = LayerFolders::default();
    let ancestors = options.ancestors.as_deref().unwrap_or(&folders);
    if own.listed_ancestors().is_empty() {
        return Chain::open(own, ancestors);
    }
    // A hint: without it the ancestors are found by their ids.
    own.name_listed();
    let chain = Chain::open(own, ancestors)?;
    let own = &chain.layers[0];
    let at = own.ends().directory.get(SectionKind::Top);
    top.check_ancestors(at.map_or(0, |section| section.offset), &chain.bodies)
        .map_err(|flaw| OpenError::Damaged {
            file: own.name().to_owned(),
            part: Part::TOP,
            offset: flaw.at,
            defect: flaw.defect,
        })?;
    Ok(chain)
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
