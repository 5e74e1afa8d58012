//! Index blocks and look-ups.

use std::sync::{Arc, PoisonError};

use zstd::zstd_safe;

use super::Snapshot;
use super::decoder::one_zstd_frame;
use crate::error::{Defect, Flaw, Part, ReadError};
use crate::index::{BlockRef, CheckedTop, Files, IndexBlock, Page};
use crate::layout::{MAX_INDEX_BLOCK_BYTES, PAGES_PER_BLOCK_U64};
use crate::sections;
use crate::store::Reason;

impl Snapshot {
    /// Returns the index block of a block: from the cache, or read, checked and cached. A block
    /// whose pages are all alike has none in the file; the returned one then gives that content for
    /// every page.
    ///
    /// Threads that want the same block at the same time share one read, except that no thread
    /// waits for a read of [`Reason::Prefetch`].
    pub fn index_block(&self, block: u64, reason: Reason) -> Result<Arc<IndexBlock>, ReadError> {
        match self.top.get(block) {
            Some(CheckedTop::Block(index)) if reason == Reason::Prefetch => {
                if let Some(cached) = self.blocks.get(&block) {
                    return Ok(cached);
                }
                let loaded = Arc::new(self.load_block(block, index, reason)?);
                self.blocks.insert(block, Arc::clone(&loaded));
                Ok(loaded)
            }
            Some(CheckedTop::Block(index)) => self.blocks.get_or_insert_with(&block, || {
                self.load_block(block, index, reason).map(Arc::new)
            }),
            Some(_) => self.uncached_block(block, reason).map(Arc::new),
            None => Err(ReadError::NoSuchBlock {
                file: self.name().to_owned(),
                block,
                count: self.top.len(),
            }),
        }
    }

    /// Returns an index block as [`Snapshot::index_block`] does, but bypasses the cache in both
    /// directions. For a single pass over the whole index.
    pub fn uncached_block(&self, block: u64, reason: Reason) -> Result<IndexBlock, ReadError> {
        let alike = |page| Ok(IndexBlock::alike(page, self.pages_of_block(block)));
        match self.top.get(block) {
            Some(CheckedTop::Fill(word)) => alike(Page::Fill(word)),
            Some(CheckedTop::Unavailable) => alike(Page::Unavailable),
            Some(CheckedTop::Block(index)) => self.load_block(block, index, reason),
            None => Err(ReadError::NoSuchBlock {
                file: self.name().to_owned(),
                block,
                count: self.top.len(),
            }),
        }
    }

    /// Returns the content of a page. Numbers that don't belong to a page are [`Page::Unused`].
    pub fn look_up(&self, page: u64, reason: Reason) -> Result<Page, ReadError> {
        let block = page / PAGES_PER_BLOCK_U64;
        let alike = match self.top.get(block) {
            None => return Ok(Page::Unused),
            Some(CheckedTop::Fill(word)) => Page::Fill(word),
            Some(CheckedTop::Unavailable) => Page::Unavailable,
            Some(CheckedTop::Block(_)) => {
                // The remainder is below 512.
                let i = usize::try_from(page % PAGES_PER_BLOCK_U64).unwrap_or(usize::MAX);
                return Ok(self.index_block(block, reason)?.page(i));
            }
        };
        let used = sections::region_of(&self.regions, page).is_some();
        Ok(if used { alike } else { Page::Unused })
    }

    fn load_block(
        &self,
        block: u64,
        index: BlockRef,
        reason: Reason,
    ) -> Result<IndexBlock, ReadError> {
        let pages = self.pages_of_block(block);
        // The number was compared with that of the ancestors when the top table was read.
        let layer = &self.chain.layers[usize::from(index.layer)];
        let damaged = |defect| layer.damaged(Part::IndexBlock, Flaw::new(index.offset, defect));
        // Both lengths were compared with the limit when the top table was read.
        let mut stored = [0; MAX_INDEX_BLOCK_BYTES];
        let mut decoded = [0; MAX_INDEX_BLOCK_BYTES];
        let stored = &mut stored[..usize::from(index.stored_len)];
        let decoded = &mut decoded[..usize::from(index.decoded_len)];
        if !self.read_ahead_block(&index, stored) {
            layer.read(Part::IndexBlock, stored, index.offset, reason)?;
        }
        let computed = crc32fast::hash(stored);
        if computed != index.crc {
            return Err(damaged(Defect::Checksum {
                stored: index.crc,
                computed,
            }));
        }
        let bytes = if index.compressed {
            one_zstd_frame(stored).map_err(damaged)?;
            let len = self.decompress(decoded, stored).map_err(|reason| {
                damaged(Defect::Decode {
                    reason: reason.into(),
                })
            })?;
            if len != decoded.len() {
                return Err(damaged(Defect::value(
                    "decoded length of an index block",
                    index.decoded_len,
                    format!("{len}, what it decodes to"),
                )));
            }
            decoded
        } else {
            stored
        };
        let files = Files {
            holder: index.layer,
            listed: &self.chain.listed[usize::from(index.layer)],
            bodies: &self.chain.bodies,
        };
        let number = match index.layer {
            0 => block,
            _ => index.ancestor_block.into(),
        };
        let first_page = number * PAGES_PER_BLOCK_U64;
        IndexBlock::check(bytes, index.offset, first_page, pages, &files)
            .map_err(|flaw| layer.damaged(Part::IndexBlock, flaw))
    }

    fn decompress(&self, out: &mut [u8], from: &[u8]) -> Result<usize, &'static str> {
        let idle = self
            .contexts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let mut context = idle.unwrap_or_else(zstd_safe::DCtx::create);
        let result = context
            .decompress(out, from)
            .map_err(zstd_safe::get_error_name);
        self.contexts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(context);
        result
    }
}
