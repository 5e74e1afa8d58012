//! Reads and verifies a snapshot's memory from start to end, in blocks of 512 pages.

use anyhow::Result;
use snapshot_format::layout::{PAGE_SIZE, PAGES_PER_BLOCK};
use snapshot_format::{FrameDecoder, FrameRef, Page, Reason, Snapshot, Top};

/// Size of a full block in bytes.
pub(crate) const BLOCK_BYTES: usize = PAGES_PER_BLOCK * PAGE_SIZE;

/// Kind of content of a page in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A zero page; its bytes in the buffer are zero.
    Zero,
    /// Any other content; its bytes are in the buffer.
    Data,
    /// Unknown content; its bytes in the buffer are zero.
    Unavailable,
}

/// A decoder of blocks. Each thread needs its own.
pub(crate) struct BlockReader<'s> {
    snapshot: &'s Snapshot,
    decoder: FrameDecoder,
    frame: Vec<u8>,
    /// The frame whose pages `frame` holds. The next block often begins with the rest of it.
    decoded: Option<FrameRef>,
    bytes: Vec<u8>,
    kinds: Vec<Kind>,
    /// Frame, slot and page of each stored page of the block.
    stored: Vec<(usize, u16, usize)>,
}

impl<'s> BlockReader<'s> {
    pub(crate) fn new(snapshot: &'s Snapshot) -> Self {
        Self {
            snapshot,
            decoder: FrameDecoder::new(),
            frame: Vec::new(),
            decoded: None,
            bytes: vec![0; BLOCK_BYTES],
            kinds: Vec::with_capacity(PAGES_PER_BLOCK),
            stored: Vec::with_capacity(PAGES_PER_BLOCK),
        }
    }

    /// Returns the first `pages` pages of a block, and the kind of each.
    pub(crate) fn read(&mut self, block: u64, pages: usize) -> Result<(&[u8], &[Kind])> {
        let bytes = &mut self.bytes[..pages * PAGE_SIZE];
        bytes.fill(0);
        self.kinds.clear();
        self.kinds.resize(pages, Kind::Zero);
        match self.snapshot.top(block) {
            Top::Fill(0) => {}
            Top::Fill(word) => {
                fill(bytes, word);
                self.kinds.fill(Kind::Data);
            }
            Top::Unavailable => self.kinds.fill(Kind::Unavailable),
            Top::Block => self.read_indexed(block, pages)?,
        }
        Ok((&self.bytes[..pages * PAGE_SIZE], &self.kinds))
    }

    fn read_indexed(&mut self, block: u64, pages: usize) -> Result<()> {
        let index = self.snapshot.uncached_block(block, Reason::Verify)?;
        self.stored.clear();
        for page in 0..pages.min(index.page_count()) {
            let at = page * PAGE_SIZE..(page + 1) * PAGE_SIZE;
            if let Some((frame, slot)) = index.stored(page) {
                self.stored.push((frame, slot, page));
                self.kinds[page] = Kind::Data;
                continue;
            }
            match index.page(page) {
                Page::Fill(0) => {}
                Page::Fill(word) => {
                    fill(&mut self.bytes[at], word);
                    self.kinds[page] = Kind::Data;
                }
                Page::Stored { .. } | Page::Unavailable | Page::Unused => {
                    self.kinds[page] = Kind::Unavailable;
                }
            }
        }
        // Decodes each frame once, whatever the order of its pages.
        self.stored.sort_unstable();
        for &(frame, slot, page) in &self.stored {
            let frame = index.frames()[frame];
            if self.decoded != Some(frame) {
                self.decoded = None;
                self.frame.resize(frame.decoded_len(), 0);
                self.decoder
                    .decode(self.snapshot, &frame, Reason::Verify, &mut self.frame)?;
                self.decoded = Some(frame);
            }
            let from = usize::from(slot) * PAGE_SIZE;
            self.bytes[page * PAGE_SIZE..(page + 1) * PAGE_SIZE]
                .copy_from_slice(&self.frame[from..from + PAGE_SIZE]);
        }
        Ok(())
    }
}

fn fill(bytes: &mut [u8], word: u64) {
    let (words, _) = bytes.as_chunks_mut::<8>();
    words.fill(word.to_le_bytes());
}
