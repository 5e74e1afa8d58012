//! Resources that the sessions of one process share.
//!
//! ```text
//!   session ─┐               ┌─ decoded frames, available to all of them
//!   session ─┼─ Shared ──────┼─ prefetch threads, which serve the sessions in turn
//!   session ─┘               └─ decoding contexts, as many as are in use at once
//! ```
//!
//! Each session nevertheless has fault threads of its own, so that an owner that faults, discards
//! or changes its mappings all the time delays only itself.

use std::sync::{Arc, LazyLock};

use snapshot_format::Snapshot;

use crate::session::{FrameCache, SharedFrames};
use crate::stats::FrameCacheStats;

use super::prefetcher::Pool;
use super::threads::Hook;

/// The default for sessions without an explicit `Shared`.
static OF_THE_PROCESS: LazyLock<Shared> = LazyLock::new(|| Shared::new(0));

/// Resources that the sessions of one process share: decoded frames and prefetch threads.
///
/// There are two prefetch threads per core. The thread that starts the first session with a
/// prefetch starts them, and they inherit its thread attributes. They exit with the last such
/// session.
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
    /// Creates shared resources that keep `frame_cache` bytes of decoded frames; 0 keeps none. A
    /// frame larger than a quarter of that is not kept. Each thread that is serving or prefetching
    /// may hold another 2 MiB, or 4 MiB with frames of 2 MiB. Of these, two idle ones per core, and
    /// two more, are kept as long as there is a session.
    ///
    /// Frames belong to the file that holds them: sessions of one snapshot share them, and sessions
    /// of snapshots that have a [`Layer`](snapshot_format::Layer) in common share those of the
    /// layer.
    pub fn new(frame_cache: u64) -> Self {
        let frames = (frame_cache > 0).then(|| Arc::new(FrameCache::new(frame_cache)));
        Self {
            frames,
            pool: Arc::new(Pool::new(None, true)),
        }
    }

    /// Sets a hook that each prefetch thread calls before it does anything else, like the hook of
    /// [`Restore::on_thread_start`](crate::restore::Restore::on_thread_start) in a session's own
    /// threads. Must be called before the first session uses `self`.
    #[must_use]
    pub fn on_thread_start(mut self, hook: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.pool = Arc::new(Pool::new(Some(Arc::new(hook)), true));
        self
    }

    /// Returns what all sessions of the process without an explicit `Shared` share.
    pub(super) fn of_the_process() -> Self {
        OF_THE_PROCESS.clone()
    }

    /// Creates resources for a session that shares nothing because it has a hook.
    pub(super) fn alone(hook: &Hook) -> Self {
        Self {
            frames: None,
            pool: Arc::new(Pool::new(Some(Arc::clone(hook)), false)),
        }
    }

    /// Returns statistics of the frame cache; all zero if there is none.
    pub fn frame_cache(&self) -> FrameCacheStats {
        let frames = self.frames.as_ref();
        frames.map(|frames| frames.stats()).unwrap_or_default()
    }

    /// Drops the frames of files that nobody has open any more. Starting a session does so,
    /// too.
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
