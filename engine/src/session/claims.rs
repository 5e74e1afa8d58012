//! Which frames are being decoded, so that no two threads decode the same one at once.
//!
//! A claim is a private note between the threads of one worker process: it dies with it, and the
//! kernel's EEXIST settles what two claims in two processes would have raced for.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What tells frames apart: where the record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FrameId(pub(crate) u64);

/// The frames that are claimed now: at most one for each thread, so a list is enough.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    held: Mutex<Held>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    frames: Vec<FrameId>,
    /// Threads that wait for a release: to announce one is a system call.
    waiting: usize,
}

/// A claim, released when dropped.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    claims: &'a Claims,
    frame: FrameId,
}

impl Claims {
    /// Room for `threads` claims without allocating.
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            held: Mutex::new(Held {
                frames: Vec::with_capacity(threads),
                waiting: 0,
            }),
            released: Condvar::new(),
        }
    }

    /// Claims `frame`, unless somebody has it.
    pub(crate) fn claim(&self, frame: FrameId) -> Option<Claim<'_>> {
        let mut held = self.lock();
        if held.frames.contains(&frame) {
            return None;
        }
        held.frames.push(frame);
        Some(Claim {
            claims: self,
            frame,
        })
    }

    /// Waits until nobody has claimed `frame`.
    pub(crate) fn wait(&self, frame: FrameId) {
        let mut held = self.lock();
        held.waiting += 1;
        while held.frames.contains(&frame) {
            held = self
                .released
                .wait(held)
                .unwrap_or_else(PoisonError::into_inner);
        }
        held.waiting -= 1;
    }

    /// All that are claimed, for telling two states apart.
    #[cfg(test)]
    pub(crate) fn frames(&self) -> Vec<FrameId> {
        let mut frames = self.lock().frames.clone();
        frames.sort_unstable_by_key(|frame| frame.0);
        frames
    }

    /// Whether somebody has claimed `frame`.
    #[cfg(test)]
    pub(crate) fn is_claimed(&self, frame: FrameId) -> bool {
        self.lock().frames.contains(&frame)
    }

    /// The list is whole after every statement, so a panic elsewhere leaves nothing to repair.
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.claims.lock();
        held.frames.retain(|frame| *frame != self.frame);
        if held.waiting > 0 {
            self.claims.released.notify_all();
        }
    }
}
