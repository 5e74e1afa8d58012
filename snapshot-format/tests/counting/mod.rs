//! A store that counts its reads.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use snapshot_format::{MemoryStore, Reason, Store};

/// Counts reads and bytes by reason.
pub(crate) struct Counting {
    inner: MemoryStore,
    reads: [AtomicU64; 4],
    bytes: [AtomicU64; 4],
}

impl Counting {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            inner: MemoryStore::new(bytes),
            reads: Default::default(),
            bytes: Default::default(),
        }
    }

    /// Returns the reads and bytes since the last call.
    pub(crate) fn take(&self, reason: Reason) -> (u64, u64) {
        let i = reason as usize;
        (
            self.reads[i].swap(0, Ordering::Relaxed),
            self.bytes[i].swap(0, Ordering::Relaxed),
        )
    }
}

impl Store for Counting {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, reason: Reason) -> io::Result<()> {
        self.reads[reason as usize].fetch_add(1, Ordering::Relaxed);
        self.bytes[reason as usize].fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.inner.read_exact_at(buf, offset, reason)
    }

    fn name(&self) -> String {
        self.inner.name()
    }
}
