//! Decoded frames that the sessions of one process share.
//!
//! ```text
//!   a thread's own frames ──not there──▶ shared frames ──not there──▶ read, check, decode
//!                                            ▲                               │
//!                                            └──────── a copy of it ◀────────┘
//! ```
//!
//! Frames are kept as long as there is room, whoever decoded them and for whatever reason, but for those of a snapshot's
//! first session as long as it is the only one there has been: nobody may ever want them, and the copies cost a twentieth of
//! a restore. They are found by the open snapshot and all that its index says of them: two files may call themselves by the
//! same id, and one of them may lie.
//!
//! A prefetcher that wants what another is decoding waits for it a little: clones that start together fetch the same
//! frames at the same time. A fault doesn't wait: what it wants may be at the front of the frame.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use quick_cache::sync::{Cache, GuardResult, PlaceholderGuard};
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};
use snapshot_format::{FrameRef, Reason, Snapshot};

use crate::session::platform::Run;

/// Parts of the cache that are locked and bounded for themselves. More would be too small for the largest frames.
const SHARDS: usize = 4;
/// Buffers that wait for a frame: more than threads decode at the same time on most machines.
const MAX_IDLE: usize = 16;

/// How long who fetches ahead waits for another, which may be waiting for a disk.
const MAX_WAIT: Duration = Duration::from_millis(20);

/// Decoded frames of any number of snapshots, of which those that are wanted least give way.
pub(crate) struct FrameCache {
    frames: Frames,
    known: Mutex<KnownSnapshots>,
    counts: Counts,
    evictions: Arc<AtomicU64>,
    buffers: Arc<Buffers>,
}

/// The snapshots that frames are of.
#[derive(Default)]
struct KnownSnapshots {
    /// By their places in memory. Nothing else comes to lie there as long as they are known here.
    by_place: BTreeMap<usize, Known>,
    /// The number of the next. None is given twice.
    next: u64,
}

/// A snapshot, the number by which its frames are found, and how many sessions of it there have been.
struct Known {
    snapshot: Weak<Snapshot>,
    number: u64,
    sessions: Arc<AtomicUsize>,
}

type Frames = Cache<Key, Arc<Decoded>, ByBytes, DefaultHashBuilder, Evicted>;
type Place<'a> = PlaceholderGuard<'a, Key, Arc<Decoded>, ByBytes, DefaultHashBuilder, Evicted>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    snapshot: u64,
    frame: FrameRef,
}

/// A decoded frame.
pub(crate) struct Decoded {
    bytes: Vec<u8>,
    /// The frame's own list of its pages.
    listed: Box<[Run]>,
    buffers: Arc<Buffers>,
}

impl Decoded {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn listed(&self) -> &[Run] {
        &self.listed
    }
}

impl Drop for Decoded {
    fn drop(&mut self) {
        self.buffers.put(std::mem::take(&mut self.bytes));
    }
}

/// Buffers of frames that gave way, for those to which they did: to have the kernel take memory back and give it anew
/// takes longer than to decode a frame.
#[derive(Debug, Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// A buffer with this content.
    fn with(&self, bytes: &[u8]) -> Vec<u8> {
        let fits = |buffer: &Vec<u8>| (bytes.len()..=2 * bytes.len()).contains(&buffer.capacity());
        let mut idle = self.lock();
        let found = idle.iter().position(fits);
        let found = found.map(|place| idle.swap_remove(place));
        drop(idle);
        let mut buffer = found.unwrap_or_else(|| Vec::with_capacity(bytes.len()));
        buffer.clear();
        buffer.extend_from_slice(bytes);
        buffer
    }

    fn put(&self, buffer: Vec<u8>) {
        let mut idle = self.lock();
        // Those of another size than is wanted now go first.
        let oldest = (idle.len() == MAX_IDLE).then(|| idle.remove(0));
        idle.push(buffer);
        drop(idle);
        drop(oldest);
    }

    /// The list is whole after every statement.
    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone)]
pub(crate) struct ByBytes;

impl Weighter<Key, Arc<Decoded>> for ByBytes {
    fn weight(&self, _: &Key, frame: &Arc<Decoded>) -> u64 {
        (frame.bytes.capacity() + size_of_val(&*frame.listed) + size_of::<(Key, Decoded)>()) as u64
    }
}

/// Counts what gives way.
#[derive(Clone)]
pub(crate) struct Evicted(Arc<AtomicU64>);

impl Lifecycle<Key, Arc<Decoded>> for Evicted {
    /// What is freed after the lock was let go: mostly one frame gives way to another.
    type RequestState = Option<Arc<Decoded>>;

    fn on_evict(&self, freed: &mut Self::RequestState, _: Key, frame: Arc<Decoded>) {
        self.0.fetch_add(1, Relaxed);
        *freed = Some(frame);
    }
}

#[derive(Debug, Default)]
struct Counts {
    hits: AtomicU64,
    misses: AtomicU64,
}

/// What a cache of decoded frames holds, and what it was good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrameCacheStats {
    /// Frames that were wanted and were there.
    pub hits: u64,
    /// Frames that were wanted and were not there.
    pub misses: u64,
    /// Frames that gave way to others.
    pub evictions: u64,
    /// Frames that are there now.
    pub frames: u64,
    /// Bytes that they take.
    pub bytes: u64,
}

impl FrameCache {
    /// Room for frames of `bytes` together.
    pub(crate) fn new(bytes: u64) -> Self {
        let evictions = Arc::default();
        // Room for the index of a cache full of small frames, but not for the smallest.
        let items = usize::try_from(bytes / (64 << 10)).unwrap_or(usize::MAX);
        let options = OptionsBuilder::new()
            .shards(SHARDS)
            .estimated_items_capacity(items.clamp(64, 1 << 20))
            .weight_capacity(bytes)
            .build()
            .unwrap_or_else(|_| unreachable!("both capacities are given"));
        Self {
            frames: Cache::with_options(
                options,
                ByBytes,
                DefaultHashBuilder::default(),
                Evicted(Arc::clone(&evictions)),
            ),
            known: Mutex::default(),
            counts: Counts::default(),
            evictions,
            buffers: Arc::default(),
        }
    }

    pub(crate) fn stats(&self) -> FrameCacheStats {
        FrameCacheStats {
            hits: self.counts.hits.load(Relaxed),
            misses: self.counts.misses.load(Relaxed),
            evictions: self.evictions.load(Relaxed),
            frames: self.frames.len() as u64,
            bytes: self.frames.weight(),
        }
    }

    /// Drops the frames of snapshots that nobody has open any more.
    pub(crate) fn forget_closed(&self) {
        let mut known = self.known();
        // Looked at once: one that is closed in between is forgotten the next time.
        let mut closed = Vec::new();
        known.by_place.retain(|_, known| {
            let is_open = known.snapshot.strong_count() > 0;
            if !is_open {
                closed.push(known.number);
            }
            is_open
        });
        if !closed.is_empty() {
            self.frames.retain(|key, _| !closed.contains(&key.snapshot));
        }
    }

    /// The table is whole after every statement.
    fn known(&self) -> MutexGuard<'_, KnownSnapshots> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The frames of one snapshot, for a session of it.
pub(crate) struct SharedFrames {
    cache: Arc<FrameCache>,
    snapshot: u64,
    sessions: Arc<AtomicUsize>,
}

/// What was found.
pub(crate) enum Look<'a> {
    /// The frame.
    Found(Arc<Decoded>),
    /// Nothing, but a place for it: whoever else fetches it waits until that is filled, or dropped.
    Place(Place<'a>),
    /// Nothing.
    Nothing,
}

impl SharedFrames {
    pub(crate) fn new(cache: &Arc<FrameCache>, snapshot: &Arc<Snapshot>) -> Self {
        cache.forget_closed();
        let known = &mut *cache.known();
        let place = Arc::as_ptr(snapshot).addr();
        let here = known.by_place.entry(place).or_insert_with(|| {
            known.next += 1;
            Known {
                snapshot: Arc::downgrade(snapshot),
                number: known.next,
                sessions: Arc::default(),
            }
        });
        here.sessions.fetch_add(1, Relaxed);
        Self {
            cache: Arc::clone(cache),
            snapshot: here.number,
            sessions: Arc::clone(&here.sessions),
        }
    }

    fn key(&self, frame: &FrameRef) -> Key {
        Key {
            snapshot: self.snapshot,
            frame: *frame,
        }
    }

    /// Whether there is anybody to share with.
    fn is_alone(&self) -> bool {
        self.sessions.load(Relaxed) < 2
    }

    /// Looks for `frame`. Who fetches ahead waits for whoever does the same.
    pub(crate) fn look(&self, frame: &FrameRef, reason: Reason) -> Look<'_> {
        if self.is_alone() {
            return Look::Nothing;
        }
        let key = self.key(frame);
        let look = if reason == Reason::Demand {
            self.cache
                .frames
                .get(&key)
                .map_or(Look::Nothing, Look::Found)
        } else {
            match self.cache.frames.get_value_or_guard(&key, Some(MAX_WAIT)) {
                GuardResult::Value(decoded) => Look::Found(decoded),
                GuardResult::Guard(place) => Look::Place(place),
                GuardResult::Timeout => Look::Nothing,
            }
        };
        let count = match look {
            Look::Found(_) => &self.cache.counts.hits,
            Look::Place(_) | Look::Nothing => &self.cache.counts.misses,
        };
        count.fetch_add(1, Relaxed);
        look
    }

    /// Keeps what was not found, unless it is there by now.
    pub(crate) fn keep(&self, look: Look<'_>, frame: &FrameRef, bytes: &[u8], listed: &[Run]) {
        let frames = &self.cache.frames;
        let place = match look {
            Look::Found(_) => return,
            Look::Nothing if self.is_alone() => return,
            Look::Place(place) => place,
            // What another is decoding is not waited for.
            Look::Nothing => {
                match frames.get_value_or_guard(&self.key(frame), Some(Duration::ZERO)) {
                    GuardResult::Guard(place) => place,
                    GuardResult::Value(_) | GuardResult::Timeout => return,
                }
            }
        };
        let buffers = &self.cache.buffers;
        let decoded = Decoded {
            bytes: buffers.with(bytes),
            listed: listed.into(),
            buffers: Arc::clone(buffers),
        };
        // It may be gone, if the cache was emptied meanwhile.
        let _ = place.insert(Arc::new(decoded));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_frame_does_not_take_the_buffer_of_a_large_one() {
        let buffers = Buffers::default();
        buffers.put(Vec::with_capacity(1 << 20));
        let small = buffers.with(&[1; 4096]);
        assert!(small.capacity() <= 2 * 4096 && small == [1; 4096]);
        let large = buffers.with(&vec![2; 600 << 10]);
        assert_eq!((large.capacity(), large.len()), (1 << 20, 600 << 10));
        assert!(buffers.lock().is_empty());
    }

    #[test]
    fn the_buffers_that_wait_are_few_and_the_latest() {
        let buffers = Buffers::default();
        for size in 1..=2 * MAX_IDLE {
            buffers.put(Vec::with_capacity(size << 12));
        }
        let idle = buffers.lock();
        assert_eq!(idle.len(), MAX_IDLE);
        assert!(idle.iter().all(|buffer| buffer.capacity() > MAX_IDLE << 12));
    }
}
