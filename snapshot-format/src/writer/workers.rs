//! The threads of the pool, and the messages between them and the caller's thread.
//!
//! ```text
//! caller's thread                         pool
//!   examine(pages)  ------------------->  fills, digests
//!   pop_examined()  <-- Event::Examined
//!   build(frame)    ------------------->  gather, compress, checksum
//!   pop_built()     <-- Event::Built
//!   buffer()        <-- Event::Buffer     last user of a block's bytes drops them
//! ```
//!
//! Both kinds of work are handed out in order and handed back in order. The work in progress is
//! bounded by the caller: by the number of buffers, and by [`Workers::frames_full`].

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};
use zstd::zstd_safe::CDict;

use super::WriteError;
use super::base::Base;
use super::block::{BlockBuffer, Examined, Given, examine};
use super::copy::CopySource;
use super::frame::{Built, Compression, Scratch, Sealed, build, record_room};
use super::matching::BaseRun;
use crate::dictionary::{Trained, train_on_frames};
use crate::layout::{PAGE_SIZE, PAGES_PER_BLOCK};

/// Number of the only dictionary that a writer uses.
pub(super) const DICTIONARY_NUMBER: u16 = 1;
/// Maximum number of bytes of frames in progress.
const MAX_FRAME_BYTES_IN_PROGRESS: usize = 4 << 20;

/// Message from a thread of the pool.
pub(super) enum Event {
    Examined(u64, Result<Examined, WriteError>),
    Built(Result<Built, WriteError>),
    Buffer(Vec<u8>),
    Trained(Verdict),
    Panicked,
}

/// Result of training a dictionary.
pub(super) enum Verdict {
    Pays(Trained),
    Useless,
}

/// Items that arrive in another order than they are needed in.
struct Reorder<T> {
    first: u64,
    items: VecDeque<Option<T>>,
}

impl<T> Reorder<T> {
    fn new() -> Self {
        Self {
            first: 0,
            items: VecDeque::new(),
        }
    }

    /// Reserves and returns the number of one more item that will come back.
    fn expect(&mut self) -> u64 {
        self.items.push_back(None);
        self.first + self.items.len() as u64 - 1
    }

    fn put(&mut self, number: u64, item: T) {
        let index = usize::try_from(number - self.first).expect("an index of what is under way");
        self.items[index] = Some(item);
    }

    fn pop(&mut self) -> Option<T> {
        let item = self.items.front_mut()?.take()?;
        self.items.pop_front();
        self.first += 1;
        Some(item)
    }
}

/// Items that threads take, use, and put back for the next user.
pub(super) struct FreeList<T>(Mutex<Vec<T>>);

impl<T> Default for FreeList<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> FreeList<T> {
    pub(super) fn pop(&self) -> Option<T> {
        self.lock().pop()
    }

    pub(super) fn push(&self, item: T) {
        self.lock().push(item);
    }

    /// Locks the list, which is consistent after every statement.
    fn lock(&self) -> MutexGuard<'_, Vec<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Buffers for frame records. Fresh memory costs more than the copy of a frame.
pub(super) struct RecordBuffers {
    idle: FreeList<Vec<u8>>,
    room: usize,
}

impl RecordBuffers {
    /// Returns a buffer of at least `len` bytes, and with room for any frame that is built.
    pub(super) fn get(&self, len: usize) -> Vec<u8> {
        let mut record = self.idle.pop().unwrap_or_else(|| vec![0; self.room]);
        if record.len() < len {
            record.resize(len, 0);
        }
        record
    }
}

/// State shared by the threads.
struct Shared {
    scratch: FreeList<Scratch>,
    record_buffers: Arc<RecordBuffers>,
}

pub(super) struct Workers {
    pool: ThreadPool,
    shared: Arc<Shared>,
    compression: Arc<Compression>,
    sender: Sender<Event>,
    receiver: Receiver<Event>,
    examined: Reorder<Examined>,
    built: Reorder<Built>,
    verdict: Option<Verdict>,
    max_frames: usize,
    free: Vec<Vec<u8>>,
    /// Number of buffers that may still be allocated.
    buffers_left: usize,
    /// Buffers of one frame, to be reused.
    spare: Vec<Vec<u8>>,
    frame_bytes: usize,
}

impl Workers {
    pub(super) fn start(
        threads: usize,
        frame_pages: usize,
        level: i32,
    ) -> Result<Self, WriteError> {
        let (sender, receiver) = channel();
        let panicked = sender.clone();
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("snap-write-{index}"))
            .panic_handler(move |_| {
                let _ = panicked.send(Event::Panicked);
            })
            .build()
            .map_err(WriteError::Threads)?;
        let frame_bytes = frame_pages * PAGE_SIZE;
        Ok(Self {
            pool,
            shared: Arc::new(Shared {
                scratch: FreeList::default(),
                record_buffers: Arc::new(RecordBuffers {
                    idle: FreeList::default(),
                    room: record_room(frame_pages),
                }),
            }),
            compression: Arc::new(Compression::new(level, frame_pages)),
            sender,
            receiver,
            examined: Reorder::new(),
            built: Reorder::new(),
            verdict: None,
            max_frames: (MAX_FRAME_BYTES_IN_PROGRESS / frame_bytes).max(threads + 2),
            free: Vec::new(),
            // One is filled, one is sequenced, and each thread has one; a few more keep the
            // threads busy while the caller reads.
            buffers_left: (threads + 2).max(8),
            spare: Vec::new(),
            frame_bytes,
        })
    }

    /// Starts to train a dictionary on frames, for a source of `expected_bytes`.
    pub(super) fn train(&self, frames: Vec<Vec<u8>>, level: i32, expected_bytes: u64) {
        let sender = self.sender.clone();
        self.pool.spawn_fifo(move || {
            let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
            let verdict = train_on_frames(&frames, level, expected_bytes)
                .map_or(Verdict::Useless, Verdict::Pays);
            let _ = sender.send(Event::Trained(verdict));
        });
    }

    /// Returns the result of [`Workers::train`], once it is done.
    pub(super) fn pop_verdict(&mut self) -> Option<Verdict> {
        self.verdict.take()
    }

    /// Makes frames that are handed out from now on use the dictionary `bytes`.
    pub(super) fn use_dictionary(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        // A context would accept a damaged dictionary, and fail at the first frame.
        if CDict::try_create(bytes, self.compression.level()).is_none() {
            let expected = "what zstd's trainer makes";
            return Err(WriteError::argument("the dictionary", "damaged", expected));
        }
        self.compression = Arc::new(self.compression.with(DICTIONARY_NUMBER, bytes));
        Ok(())
    }

    /// Returns a buffer for a block's bytes, if one is free.
    pub(super) fn buffer(&mut self) -> Option<BlockBuffer> {
        let bytes = self.free.pop().or_else(|| {
            self.buffers_left = self.buffers_left.checked_sub(1)?;
            Some(vec![0; PAGES_PER_BLOCK * PAGE_SIZE])
        })?;
        Some(BlockBuffer::new(bytes, self.sender.clone()))
    }

    /// Returns a buffer with room for one frame's pages.
    pub(super) fn spare(&mut self) -> Vec<u8> {
        self.spare
            .pop()
            .unwrap_or_else(|| Vec::with_capacity(self.frame_bytes))
    }

    /// Hands a block to the pool to be examined. `base` is the base, and the pages that correspond
    /// to pages of it.
    pub(super) fn examine(
        &mut self,
        given: Vec<Given>,
        buffer: Option<Arc<BlockBuffer>>,
        base: Option<(Arc<Base>, Vec<BaseRun>)>,
    ) {
        let number = self.examined.expect();
        let sender = self.sender.clone();
        self.pool.spawn_fifo(move || {
            let examined = examine(&given, buffer.as_ref(), base.as_ref());
            drop(buffer);
            // The receiver is gone if the writer itself was dropped.
            let _ = sender.send(Event::Examined(number, examined));
        });
    }

    /// Hands a block of a snapshot that is copied to the pool.
    pub(super) fn examine_copied(&mut self, source: Arc<CopySource>, block: u64) {
        let number = self.examined.expect();
        let sender = self.sender.clone();
        self.pool.spawn_fifo(move || {
            let _ = sender.send(Event::Examined(number, source.examine(block)));
        });
    }

    /// Returns the buffers for records.
    pub(super) fn record_buffers(&self) -> &Arc<RecordBuffers> {
        &self.shared.record_buffers
    }

    /// Returns the threads of the pool.
    pub(super) fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Returns the next block in the order of [`Workers::examine`], if it is done.
    pub(super) fn pop_examined(&mut self) -> Option<Examined> {
        self.examined.pop()
    }

    /// Returns whether no more frames should be handed out for now.
    pub(super) fn frames_full(&self) -> bool {
        self.built.items.len() >= self.max_frames
    }

    /// Returns whether any frames are in progress.
    pub(super) fn frames_under_way(&self) -> bool {
        !self.built.items.is_empty()
    }

    /// Hands a frame to the pool to be built. Frames come in the order of their numbers.
    pub(super) fn build(&mut self, sealed: Sealed) {
        let number = self.built.expect();
        let (sender, shared) = (self.sender.clone(), Arc::clone(&self.shared));
        let compression = Arc::clone(&self.compression);
        self.pool.spawn_fifo(move || {
            let mut scratch = shared.scratch.pop().unwrap_or_else(Scratch::new);
            let record = shared.record_buffers.get(0);
            let built = build(sealed, &compression, &mut scratch, record)
                .map(|built| Built { number, ..built });
            shared.scratch.push(scratch);
            let _ = sender.send(Event::Built(built));
        });
    }

    /// Adds a frame that is built already, after those that were handed to the pool.
    pub(super) fn add_built(&mut self, built: Built) {
        let number = self.built.expect();
        self.built.put(number, Built { number, ..built });
    }

    /// Returns the next frame in the order of [`Workers::build`], if it is done.
    pub(super) fn pop_built(&mut self) -> Option<Built> {
        self.built.pop()
    }

    /// Takes back the buffers of a frame that is written.
    pub(super) fn recycle(&mut self, record: Vec<u8>, spare: Vec<u8>) {
        self.shared.record_buffers.idle.push(record);
        if spare.capacity() > 0 {
            self.spare.push(spare);
        }
    }

    /// Receives the messages of the threads.
    pub(super) fn poll(&mut self) -> Result<(), WriteError> {
        loop {
            match self.receiver.try_recv() {
                Ok(event) => self.accept(event)?,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Waits for a message of a thread. Some work must be in progress.
    pub(super) fn wait(&mut self) -> Result<(), WriteError> {
        // The workers hold a sender, so the channel can't be closed.
        let event = self.receiver.recv().map_err(|_| WriteError::Panicked)?;
        self.accept(event)?;
        self.poll()
    }

    fn accept(&mut self, event: Event) -> Result<(), WriteError> {
        match event {
            Event::Examined(number, examined) => self.examined.put(number, examined?),
            Event::Built(built) => {
                let built = built?;
                self.built.put(built.number, built);
            }
            Event::Buffer(bytes) => self.free.push(bytes),
            Event::Trained(verdict) => self.verdict = Some(verdict),
            Event::Panicked => return Err(WriteError::Panicked),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Regression: pages given as bytes without a buffer were recorded as unavailable.
    #[test]
    fn lost_bytes_are_an_error() {
        let mut workers = Workers::start(1, 1, 1).expect("threads");
        workers.examine(vec![Given::Bytes], None, None);
        assert!(matches!(workers.wait(), Err(WriteError::Panicked)));
    }
}
