//! Index blocks that are read together, before they are used.
//!
//! The index blocks of a working set are small and many, and lie together in an optimized file:
//! one by one, each would cost a read of a cold disk or a request to a store.

use std::sync::{Arc, PoisonError, RwLock};

use super::Snapshot;
use crate::index::{BlockRef, CheckedTop};
use crate::store::Reason;

/// Maximum number of bytes of one read.
const MAX_READ: u64 = 1 << 20;
/// Maximum number of bytes of all reads.
const MAX_BYTES: u64 = 8 << 20;
/// Maximum number of unused bytes between two index blocks that are read together.
const MAX_GAP: u64 = 4 << 10;

/// Parts of files that hold index blocks, in ascending order.
#[derive(Default)]
pub(super) struct IndexAhead(RwLock<Arc<[Piece]>>);

struct Piece {
    layer: u16,
    offset: u64,
    bytes: Box<[u8]>,
}

impl IndexAhead {
    /// Copies the stored bytes of an index block, whose checksum the caller must compare. Returns
    /// `false` if they were not read ahead.
    pub(super) fn copy(&self, index: &BlockRef, stored: &mut [u8]) -> bool {
        let pieces = Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner));
        let place = (index.layer, index.offset);
        let behind = pieces.partition_point(|piece| (piece.layer, piece.offset) <= place);
        let Some(piece) = behind.checked_sub(1).and_then(|i| pieces.get(i)) else {
            return false;
        };
        let start = usize::try_from(index.offset - piece.offset).unwrap_or(usize::MAX);
        let bytes = piece
            .bytes
            .get(start..)
            .and_then(|rest| rest.get(..stored.len()));
        match bytes.filter(|_| piece.layer == index.layer) {
            Some(bytes) => {
                stored.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }

    fn replace(&self, pieces: Vec<Piece>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = pieces.into();
    }
}

impl Snapshot {
    /// Reads the index blocks of `blocks` ahead, as far as they lie together in their files, with
    /// few reads of at most 1 MiB. At most 8 MiB are kept, until
    /// [`Snapshot::forget_index_ahead`]. Each block is checked when it is used. Nothing needs
    /// this call: a block that could not be read ahead is read when it is used.
    pub fn read_index_ahead(&self, blocks: impl IntoIterator<Item = u64>) {
        let wanted = blocks
            .into_iter()
            .filter_map(|block| match self.top.get(block) {
                Some(CheckedTop::Block(index)) if !self.blocks.contains_key(&block) => Some(index),
                _ => None,
            });
        let place = |index: &BlockRef| (index.layer, index.offset);
        let mut wanted: Vec<_> = wanted.collect();
        wanted.sort_unstable_by_key(place);
        wanted.dedup_by_key(|index| place(index));
        let mut pieces = Vec::new();
        let mut budget = MAX_BYTES;
        let mut rest = &wanted[..];
        while let Some(first) = rest.first() {
            let mut end = first.offset;
            let together = rest.iter().take_while(|index| {
                let next_end = index.offset + u64::from(index.stored_len);
                let fits = index.layer == first.layer
                    && index.offset <= end + MAX_GAP
                    && next_end - first.offset <= MAX_READ.min(budget);
                end = if fits { next_end.max(end) } else { end };
                fits
            });
            let count = together.count();
            // A block alone is read when it is used.
            if count > 1 {
                let mut bytes = vec![0; usize::try_from(end - first.offset).unwrap_or(0)];
                let store = self.chain.layers[usize::from(first.layer)].store();
                if store
                    .read_exact_at(&mut bytes, first.offset, Reason::Prefetch)
                    .is_ok()
                {
                    budget -= bytes.len() as u64;
                    pieces.push(Piece {
                        layer: first.layer,
                        offset: first.offset,
                        bytes: bytes.into(),
                    });
                }
            }
            rest = &rest[count.max(1)..];
        }
        if !pieces.is_empty() {
            self.index_ahead.replace(pieces);
        }
    }

    /// Drops what [`Snapshot::read_index_ahead`] has read.
    pub fn forget_index_ahead(&self) {
        self.index_ahead.replace(Vec::new());
    }

    /// Fills `stored` with the bytes of an index block that were read ahead, if they have the right
    /// checksum.
    pub(super) fn read_ahead_block(&self, index: &BlockRef, stored: &mut [u8]) -> bool {
        self.index_ahead.copy(index, stored) && crc32fast::hash(stored) == index.crc
    }
}
