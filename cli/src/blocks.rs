//! Reading a snapshot's memory from one end to the other, block by block of 512 pages, checked.

use anyhow::Result;
use snapshot_format::layout::{PAGE_SIZE, PAGES_PER_BLOCK};
use snapshot_format::{FrameDecoder, FrameRef, Page, Reason, Snapshot, Top};

/// Bytes of a whole block.
pub(crate) const BLOCK_BYTES: usize = PAGES_PER_BLOCK * PAGE_SIZE;

/// What a page of a block turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Zero; its bytes in the buffer are zero.
    Zero,
    /// Anything else; its bytes are in the buffer.
    Data,
    /// Not known; its bytes in the buffer are zero.
    Unavailable,
}

/// Decodes blocks: one for each thread.
pub(crate) struct BlockReader<'s> {
    snapshot: &'s Snapshot,
    decoder: FrameDecoder,
    frame: Vec<u8>,
    /// The frame whose pages `frame` holds: often the next block begins with the rest of it.
    decoded: Option<FrameRef>,
    bytes: Vec<u8>,
    kinds: Vec<Kind>,
    /// Frame, slot and page of the block's stored pages.
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

    /// The first `pages` pages of a block, and what each is.
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
        // Each frame is decoded once, whatever the order of its pages.
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
