//! What the sessions of one process share.
//!
//! ```text
//!   session ─┐                        ┌─ frames that one has decoded are there for all
//!   session ─┼─ Shared ───────────────┼─ threads that fetch ahead, in turn for each
//!   session ─┘                        └─ what is needed to decode, as much as is in use at once
//! ```
//!
//! Each session has fault threads of its own all the same, so that an owner that faults, discards or
//! changes its mappings all the time holds up nobody but itself.

use std::sync::{Arc, LazyLock};

use snapshot_format::Snapshot;

use crate::session::{FrameCache, FrameCacheStats, SharedFrames};

use super::prefetcher::Pool;
use super::threads::Hook;

/// For sessions that were given none.
static OF_THE_PROCESS: LazyLock<Shared> = LazyLock::new(|| Shared::new(0));

/// What the sessions of one process share: decoded frames, and the threads that fetch ahead.
///
/// The threads, two for each core, are started when the first session wants something fetched, by the
/// thread that starts that session, and inherit what threads inherit from it. They end with the last
/// such session.
#[derive(Clone)]
pub struct Shared {
    frames: Option<Arc<FrameCache>>,
    pool: Arc<Pool>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("frame_cache", &self.frame_cache())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Keeps decoded frames of `frame_cache` bytes together; 0 keeps none. A frame larger than a quarter of it
    /// is not kept. Each thread that is serving or fetching may hold 3 MiB beyond that, and two for each
    /// core are kept as long as there is a session.
    pub fn new(frame_cache: u64) -> Self {
        let frames = (frame_cache > 0).then(|| Arc::new(FrameCache::new(frame_cache)));
        Self {
            frames,
            pool: Arc::new(Pool::new(None, true)),
        }
    }

    /// Called in each thread that fetches ahead before it does anything, as the hook of
    /// [`Restore::on_thread_start`](crate::restore::Restore::on_thread_start) is in a session's own.
    /// To be said before the first session has it.
    #[must_use]
    pub fn on_thread_start(mut self, hook: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.pool = Arc::new(Pool::new(Some(Arc::new(hook)), true));
        self
    }

    /// What all sessions of the process share that were given nothing else.
    pub(super) fn of_the_process() -> Self {
        OF_THE_PROCESS.clone()
    }

    /// For a session that shares nothing, because of its hook.
    pub(super) fn alone(hook: &Hook) -> Self {
        Self {
            frames: None,
            pool: Arc::new(Pool::new(Some(Arc::clone(hook)), false)),
        }
    }

    /// What the cache of frames holds, and what it was good for. All zero if there is none.
    pub fn frame_cache(&self) -> FrameCacheStats {
        let frames = self.frames.as_ref();
        frames.map(|frames| frames.stats()).unwrap_or_default()
    }

    /// Drops the frames of snapshots that nobody has open any more; a new session does the same.
    pub fn forget_closed(&self) {
        if let Some(frames) = &self.frames {
            frames.forget_closed();
        }
    }

    pub(crate) fn frames(&self, snapshot: &Arc<Snapshot>) -> Option<SharedFrames> {
        let frames = self.frames.as_ref()?;
        Some(SharedFrames::new(frames, snapshot))
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}
