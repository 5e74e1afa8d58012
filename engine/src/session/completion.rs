//! Completion: every page is settled, and the kernel gets the memory back.
//!
//! ```text
//!   last page settled ──▶ wake_if_settled: a thread that waits for messages checks
//!                         complete_if_settled: recount under the exclusive lock
//!                           ──▶ release_memory: UNREGISTER, WAKE, read events until none is left
//!                           ──▶ complete: the threads return from serve
//! ```

use std::sync::atomic::Ordering::Relaxed;

use snapshot_format::trace::TraceEnd;

use crate::fail_point::{FailPoint, fail_point};
use crate::session::Session;
use crate::session::platform::{Image, PAGE, Platform};

impl<P: Platform, I: Image> Session<P, I> {
    /// Returns whether every page is present, removed or poisoned, and the kernel has the memory
    /// back.
    pub(crate) fn is_complete(&self) -> bool {
        self.phase.complete.load(Relaxed)
    }

    /// Makes a thread that waits for messages check whether the session is complete, because no
    /// further message may arrive.
    pub(crate) fn wake_if_settled(&self) {
        if self.state.may_be_settled() {
            self.platform.kick();
        }
    }

    /// Completes the session if every page is settled. Returns `true` if it did.
    ///
    /// From then on the kernel may answer faults by itself: a page that is still missing was
    /// discarded. A thread whose discard waits for its event to be read must not wait forever, so
    /// events are read until none can be pending.
    pub(crate) fn complete_if_settled(&self) -> bool {
        if !self.state.may_be_settled() || self.phase.finishing.swap(true, Relaxed) {
            return false;
        }
        let hold = self.platform.exclusive(0);
        if self.state.recount() > 0 {
            self.phase.finishing.store(false, Relaxed);
            return false;
        }
        drop(hold);
        fail_point(FailPoint::Settled);
        self.release_memory();
        fail_point(FailPoint::Complete);
        self.phase.complete.store(true, Relaxed);
        self.end_recording(TraceEnd::Completed);
        self.end();
        true
    }

    /// Returns the memory to the kernel: unregisters it, wakes waiting threads, and reads events
    /// until none can be pending.
    pub(crate) fn release_memory(&self) {
        let extents = self.state.mapped();
        // In reverse order, so that a list of the ranges shrinks at its end.
        for extent in extents.iter().rev() {
            let (address, len) = (extent.address, extent.pages * PAGE);
            if !self.platform.unregister(address, len) {
                // The owner would block forever at the first page that it discards.
                self.guard
                    .kill_owner("its memory can't be given back to the kernel");
            }
            fail_point(FailPoint::Unregistered);
        }
        // The kernel wakes the waiters of a range before it unregisters the range (seen with 6.18).
        // A thread that faults in between waits where nobody reads any more. Closing the
        // userfaultfd would wake it too, but not while the owner holds a descriptor of its own.
        for extent in &extents {
            self.platform.wake(extent.address, extent.pages * PAGE);
        }
        let mut tries = 0;
        while let Some(extent) = extents.first() {
            self.read_events(0);
            if !self.platform.is_changing(extent.address) || !self.platform.back_off(tries) {
                break;
            }
            tries += 1;
        }
    }
}
