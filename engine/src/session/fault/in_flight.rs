//! Which frames are being brought, so that no two threads read and decode the same one at once.
//!
//! Demand waits for demand only. A prefetcher's read may take seconds, at a store that puts
//! prefetch last: a fault that wants the same frame reads it for itself, and claims it beside the
//! prefetcher.
//!
//! | wanted for | nobody has it | prefetch has it | demand has it |
//! | --- | --- | --- | --- |
//! | demand | claim | claim | wait |
//! | prefetch | claim | leave | leave |
//!
//! A claim is a private note between the threads of one worker process: it dies with it, and the
//! kernel's EEXIST settles what two claims in two processes would have raced for.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use snapshot_format::Reason;

/// What tells frames apart: where the record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FrameId(pub(crate) u64);

/// The frames that are claimed now: at most one for each thread, so a list is enough.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    held: Mutex<HoldOutcome>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct HoldOutcome {
    frames: Vec<(FrameId, Reason)>,
    /// Threads that wait for a release: to announce one is a system call.
    waiting: usize,
}

/// A claim, released when dropped.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    claims: &'a InFlight,
    frame: (FrameId, Reason),
}

impl InFlight {
    /// Room for `threads` claims without allocating.
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            held: Mutex::new(HoldOutcome {
                frames: Vec::with_capacity(threads),
                waiting: 0,
            }),
            released: Condvar::new(),
        }
    }

    /// Claims `frame` for `reason`, unless another claim is in the way.
    pub(crate) fn claim(&self, frame: FrameId, reason: Reason) -> Option<Claim<'_>> {
        let mut held = self.lock();
        let is_in_the_way = |(other, by): &(FrameId, Reason)| {
            *other == frame && (reason != Reason::Demand || *by == Reason::Demand)
        };
        if held.frames.iter().any(is_in_the_way) {
            return None;
        }
        let frame = (frame, reason);
        held.frames.push(frame);
        Some(Claim {
            claims: self,
            frame,
        })
    }

    /// Waits until no fault has claimed `frame`.
    pub(crate) fn wait(&self, frame: FrameId) {
        let mut held = self.lock();
        held.waiting += 1;
        while held.frames.contains(&(frame, Reason::Demand)) {
            held = self
                .released
                .wait(held)
                .unwrap_or_else(PoisonError::into_inner);
        }
        held.waiting -= 1;
    }

    /// All that are claimed, for telling two states apart.
    #[cfg(test)]
    pub(crate) fn frames(&self) -> Vec<(FrameId, Reason)> {
        let mut frames = self.lock().frames.clone();
        frames.sort_unstable_by_key(|(frame, reason)| (frame.0, *reason != Reason::Demand));
        frames
    }

    /// Whether a fault has claimed `frame`.
    #[cfg(test)]
    pub(crate) fn is_claimed(&self, frame: FrameId) -> bool {
        self.lock().frames.contains(&(frame, Reason::Demand))
    }

    /// The list is whole after every statement, so a panic elsewhere leaves nothing to repair.
    fn lock(&self) -> MutexGuard<'_, HoldOutcome> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.claims.lock();
        held.frames.retain(|frame| *frame != self.frame);
        if self.frame.1 == Reason::Demand && held.waiting > 0 {
            self.claims.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Reason::{Demand, Prefetch};

    #[test]
    fn demand_passes_prefetch_and_nothing_else_passes() {
        let claims = InFlight::new(4);
        let frame = FrameId(7);
        let fetching = claims.claim(frame, Prefetch).unwrap();
        assert!(claims.claim(frame, Prefetch).is_none());
        // Returns at once.
        claims.wait(frame);
        let serving = claims.claim(frame, Demand).unwrap();
        assert!(claims.claim(frame, Demand).is_none());
        drop(fetching);
        assert!(claims.claim(frame, Prefetch).is_none());
        drop(serving);
        assert!(claims.claim(frame, Prefetch).is_some());
        assert!(claims.claim(FrameId(8), Demand).is_some());
        assert!(claims.lock().frames.is_empty());
    }
}
