//! Frames in flight: prevents two threads from reading and decoding the same frame at once.
//!
//! Demand waits only for demand. A prefetcher's read may take seconds, at a store that gives
//! prefetch the lowest priority: a fault that wants the same frame reads it itself, and claims it
//! beside the prefetcher.
//!
//! | wanted for | nobody has it | prefetch has it | demand has it |
//! | --- | --- | --- | --- |
//! | demand | claim | claim | wait |
//! | prefetch | claim | leave | leave |
//!
//! A claim is private to the threads of one worker process and dies with it. If workers in two
//! processes load the same frame, the kernel's EEXIST settles the race.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use snapshot_format::Reason;

use crate::session::platform::FrameId;

/// Frames that are claimed now: at most one per thread, so a list is enough.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    held: Mutex<ClaimList>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct ClaimList {
    frames: Vec<(FrameId, Reason)>,
    /// Number of threads that wait for a release; announcing a release costs a system call.
    waiting: usize,
}

/// A claim on a frame, released when dropped.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    in_flight: &'a InFlight,
    frame: (FrameId, Reason),
}

impl InFlight {
    /// Creates a list with room for `threads` claims without further allocation.
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            held: Mutex::new(ClaimList {
                frames: Vec::with_capacity(threads),
                waiting: 0,
            }),
            released: Condvar::new(),
        }
    }

    /// Claims `frame` for `reason`. Returns `None` if another claim blocks this one.
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
            in_flight: self,
            frame,
        })
    }

    /// Waits until no fault holds a claim on `frame`.
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

    /// Returns all claimed frames, to tell two states of the model apart.
    #[cfg(test)]
    pub(crate) fn frames(&self) -> Vec<(FrameId, Reason)> {
        let mut frames = self.lock().frames.clone();
        frames.sort_unstable_by_key(|(frame, reason)| (*frame, *reason != Reason::Demand));
        frames
    }

    /// Returns whether a fault holds a claim on `frame`.
    #[cfg(test)]
    pub(crate) fn is_claimed(&self, frame: FrameId) -> bool {
        self.lock().frames.contains(&(frame, Reason::Demand))
    }

    /// Locks the list. It is consistent after every statement, so a panic elsewhere leaves nothing
    /// to repair.
    fn lock(&self) -> MutexGuard<'_, ClaimList> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.in_flight.lock();
        held.frames.retain(|frame| *frame != self.frame);
        if self.frame.1 == Reason::Demand && held.waiting > 0 {
            self.in_flight.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Reason::{Demand, Prefetch};

    #[test]
    fn only_demand_passes_a_prefetch_claim() {
        let in_flight = InFlight::new(4);
        let at = |offset| FrameId { layer: 0, offset };
        let frame = at(7);
        let fetching = in_flight.claim(frame, Prefetch).unwrap();
        assert!(in_flight.claim(frame, Prefetch).is_none());
        // Returns at once.
        in_flight.wait(frame);
        let serving = in_flight.claim(frame, Demand).unwrap();
        assert!(in_flight.claim(frame, Demand).is_none());
        drop(fetching);
        assert!(in_flight.claim(frame, Prefetch).is_none());
        drop(serving);
        assert!(in_flight.claim(frame, Prefetch).is_some());
        assert!(in_flight.claim(at(8), Demand).is_some());
        assert!(in_flight.lock().frames.is_empty());
    }
}
