//! Cache of decoded frames that the sessions of one process share.
//!
//! ```text
//!   a thread's own frames ──not there──▶ shared frames ──not there──▶ read, check, decode
//!                                            ▲                               │
//!                                            └──────── a copy of it ◀────────┘
//! ```
//!
//! Frames are kept as long as there is room, whichever session decoded them and for whatever
//! reason. The exception is the first session of a snapshot as long as no other has used the
//! snapshot's own file: perhaps nobody ever wants its frames, and copying them costs a twentieth of
//! a restore. While the session records touches, it keeps them nevertheless. Frames of ancestors
//! are always kept: an ancestor exists for the sake of its children, and the session of another may
//! follow.
//!
//! Frames are keyed by the open layer that holds them, so that all snapshots with that layer share
//! them, and by everything that an index says about them: two files may claim the same ID, and one
//! of the claims may be false. The number of the layer differs from snapshot to snapshot, and is
//! not part of the key.
//!
//! A prefetcher that wants a frame that another is decoding waits briefly for it, because clones
//! that start together fetch the same frames at the same time. A fault doesn't wait: the wanted
//! page may be at the front of the frame.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use quick_cache::sync::{Cache, GuardResult, PlaceholderGuard};
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};
use snapshot_format::{FrameRef, Layer, Reason, Snapshot};

use crate::session::platform::Run;
use crate::stats::FrameCacheStats;

/// Number of parts of the cache that are locked and bounded separately. With more, the parts would
/// be too small for the largest frames.
const SHARDS: usize = 4;
/// Maximum number of idle buffers: more than the number of threads that decode at the same time on
/// most machines.
const MAX_IDLE: usize = 16;

/// Maximum time that a prefetcher waits for another one, which may be waiting for a disk.
const MAX_WAIT: Duration = Duration::from_millis(20);

/// A cache of decoded frames of any number of layers that evicts the least wanted ones.
pub(crate) struct FrameCache {
    frames: Frames,
    known: Mutex<KnownLayers>,
    counts: Counts,
    evictions: Arc<AtomicU64>,
    buffers: Arc<Buffers>,
}

/// Layers that the cached frames belong to.
#[derive(Default)]
struct KnownLayers {
    /// Layers by their address. No other object can get that address as long as they are listed
    /// here.
    by_place: BTreeMap<usize, Known>,
    /// The next number. No number is used twice.
    next: u64,
}

/// A layer, and how its frames are shared.
struct Known {
    layer: Weak<Layer>,
    shared: SharedLayer,
}

/// The number that keys the frames of a layer, and the number of sessions so far that use it.
#[derive(Clone)]
struct SharedLayer {
    number: u64,
    sessions: Arc<AtomicUsize>,
}

type Frames = Cache<Key, Arc<Decoded>, ByBytes, DefaultHashBuilder, Evicted>;
type Place<'a> = PlaceholderGuard<'a, Key, Arc<Decoded>, ByBytes, DefaultHashBuilder, Evicted>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The number of the layer in this cache.
    layer: u64,
    /// The frame in terms of its own file.
    frame: FrameRef,
}

/// A decoded frame.
pub(crate) struct Decoded {
    bytes: Vec<u8>,
    /// The pages that the frame itself lists, in the numbers of its file.
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

/// A pool of buffers of evicted frames, reused for new frames: returning memory to the kernel and
/// getting it back takes longer than decoding a frame.
#[derive(Debug, Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// Returns a buffer with this content.
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
        // Buffers of another size than is currently wanted go first.
        let oldest = (idle.len() == MAX_IDLE).then(|| idle.remove(0));
        idle.push(buffer);
        drop(idle);
        drop(oldest);
    }

    /// Locks the list, which is consistent after every statement.
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

/// A counter of evictions.
#[derive(Clone)]
pub(crate) struct Evicted(Arc<AtomicU64>);

impl Lifecycle<Key, Arc<Decoded>> for Evicted {
    /// A frame that is freed after the lock was released: usually one frame evicts one other.
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

impl FrameCache {
    /// Creates a cache of `bytes` in total.
    pub(crate) fn new(bytes: u64) -> Self {
        let evictions = Arc::default();
        // The index has room for a cache full of small frames, but not for one full of the
        // smallest.
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

    /// Drops the frames of layers that nobody has open any more.
    pub(crate) fn forget_closed(&self) {
        let mut known = self.known();
        // Collected in one pass; a layer that is closed meanwhile is forgotten the next time.
        let mut closed = BTreeSet::new();
        known.by_place.retain(|_, known| {
            let is_open = known.layer.strong_count() > 0;
            if !is_open {
                closed.insert(known.shared.number);
            }
            is_open
        });
        if !closed.is_empty() {
            self.frames.retain(|key, _| !closed.contains(&key.layer));
        }
    }

    /// Locks the table, which is consistent after every statement.
    fn known(&self) -> MutexGuard<'_, KnownLayers> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KnownLayers {
    /// Counts one more session that uses `layer`.
    fn add_session(&mut self, layer: &Arc<Layer>) -> SharedLayer {
        let place = Arc::as_ptr(layer).addr();
        let known = self.by_place.entry(place).or_insert_with(|| {
            self.next += 1;
            Known {
                layer: Arc::downgrade(layer),
                shared: SharedLayer {
                    number: self.next,
                    sessions: Arc::default(),
                },
            }
        });
        known.shared.sessions.fetch_add(1, Relaxed);
        known.shared.clone()
    }
}

/// The frames of one snapshot's layers, for a session that restores it.
pub(crate) struct SharedFrames {
    cache: Arc<FrameCache>,
    /// The snapshot's own file, then its ancestors.
    layers: Box<[SharedLayer]>,
}

/// The result of a look-up.
pub(crate) enum CacheLookup<'a> {
    /// The frame was found.
    Hit(Arc<Decoded>),
    /// Nothing was found, and this place is reserved for the frame: others that prefetch it wait
    /// until the place is filled or dropped.
    Reserved(Place<'a>),
    /// Nothing was found.
    Miss,
}

impl SharedFrames {
    pub(crate) fn new(cache: &Arc<FrameCache>, snapshot: &Arc<Snapshot>) -> Self {
        cache.forget_closed();
        let mut known = cache.known();
        let layers = (0..).map_while(|layer| snapshot.layer(layer));
        Self {
            cache: Arc::clone(cache),
            layers: layers.map(|layer| known.add_session(layer)).collect(),
        }
    }

    /// Sets whether frames of the snapshot's own file are kept although no other session uses it.
    pub(crate) fn keep_own(&self, keep: bool) {
        let Some(own) = self.layers.first() else {
            return;
        };
        // Counts as one more session.
        if keep {
            own.sessions.fetch_add(1, Relaxed);
        } else {
            own.sessions.fetch_sub(1, Relaxed);
        }
    }

    /// Returns the key of a frame of the session's snapshot. Returns `None` if the frame is not
    /// shared, since no other session has used the snapshot's own file.
    fn key(&self, frame: &FrameRef) -> Option<Key> {
        let layer = self.layers.get(usize::from(frame.layer()))?;
        let is_shared = frame.layer() > 0 || layer.sessions.load(Relaxed) > 1;
        is_shared.then(|| Key {
            layer: layer.number,
            frame: frame.in_own_file(),
        })
    }

    /// Looks up `frame`. A prefetcher waits for another thread that is loading it.
    pub(crate) fn look(&self, frame: &FrameRef, reason: Reason) -> CacheLookup<'_> {
        let Some(key) = self.key(frame) else {
            return CacheLookup::Miss;
        };
        let look = if reason == Reason::Demand {
            self.cache
                .frames
                .get(&key)
                .map_or(CacheLookup::Miss, CacheLookup::Hit)
        } else {
            match self.cache.frames.get_value_or_guard(&key, Some(MAX_WAIT)) {
                GuardResult::Value(decoded) => CacheLookup::Hit(decoded),
                GuardResult::Guard(place) => CacheLookup::Reserved(place),
                GuardResult::Timeout => CacheLookup::Miss,
            }
        };
        let count = match look {
            CacheLookup::Hit(_) => &self.cache.counts.hits,
            CacheLookup::Reserved(_) | CacheLookup::Miss => &self.cache.counts.misses,
        };
        count.fetch_add(1, Relaxed);
        look
    }

    /// Stores the frame that was not found, unless it has been stored meanwhile.
    pub(crate) fn keep(
        &self,
        look: CacheLookup<'_>,
        frame: &FrameRef,
        bytes: &[u8],
        listed: &[Run],
    ) {
        let frames = &self.cache.frames;
        let place = match look {
            CacheLookup::Hit(_) => return,
            CacheLookup::Reserved(place) => place,
            CacheLookup::Miss => {
                let Some(key) = self.key(frame) else { return };
                // Another thread that is decoding the frame is not waited for.
                match frames.get_value_or_guard(&key, Some(Duration::ZERO)) {
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
        // This fails if the cache was emptied meanwhile.
        let _ = place.insert(Arc::new(decoded));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_frame_does_not_get_large_buffer() {
        let buffers = Buffers::default();
        buffers.put(Vec::with_capacity(1 << 20));
        let small = buffers.with(&[1; 4096]);
        assert!(small.capacity() <= 2 * 4096 && small == [1; 4096]);
        let large = buffers.with(&vec![2; 600 << 10]);
        assert_eq!((large.capacity(), large.len()), (1 << 20, 600 << 10));
        assert!(buffers.lock().is_empty());
    }

    #[test]
    fn idle_buffers_are_bounded_and_the_latest() {
        let buffers = Buffers::default();
        for size in 1..=2 * MAX_IDLE {
            buffers.put(Vec::with_capacity(size << 12));
        }
        let idle = buffers.lock();
        assert_eq!(idle.len(), MAX_IDLE);
        assert!(idle.iter().all(|buffer| buffer.capacity() > MAX_IDLE << 12));
    }
}
