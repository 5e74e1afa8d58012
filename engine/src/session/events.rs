//! Reads userfaultfd messages and records them.

use crate::fail_point::{FailPoint, fail_point};
use crate::session::Session;
use crate::session::platform::{Event, Image, PAGE, Platform, ReadFailed};
use crate::session::stats::add;

/// Reason for killing an owner that forks with fork events enabled.
const FORKED: &str = "it forked, and nobody serves its child";

impl<P: Platform, I: Image> Session<P, I> {
    /// Reads messages and records them, all in one exclusive hold. Returns the number of messages.
    pub(crate) fn read_events(&self, about: u64) -> usize {
        let mut hold = self.platform.exclusive(about);
        self.state.count_read();
        let mut slot = 0;
        let read = self.platform.read(&mut hold, &mut |event| {
            if slot == 0 {
                fail_point(FailPoint::Read);
            }
            self.record(slot, &event);
            fail_point(FailPoint::Recorded);
            slot += 1;
        });
        fail_point(FailPoint::RingCleared);
        // Not earlier: until now the messages could still be found again.
        self.state.map().end_batch();
        read.unwrap_or_else(|ReadFailed| {
            self.guard.kill_owner("reading faults failed");
            self.end();
            0
        })
    }

    /// Takes over from a worker that died: records the messages that it had read but perhaps not
    /// recorded, and makes all waiting threads fault again. Must be called before anything else is
    /// done with the session. Repeating it, even after a worker was killed during recovery, gives
    /// the same result.
    ///
    /// The messages of a batch up to the last one that changed the address map were already
    /// handled. They must not be handled again, because the addresses of a discard may belong to
    /// other pages by now. After that message the map is unchanged, and recording a message twice
    /// has no further effect.
    pub(crate) fn recover(&self) {
        let mut hold = self.platform.exclusive(0);
        let handled = self.state.map().handled();
        self.platform.unrecorded(&mut hold, &mut |slot, event| {
            match event {
                // The woken thread faults again.
                Event::Fault { .. } => {}
                Event::Unmap { start, end } if slot < handled => {
                    self.platform.wake(start, end - start);
                }
                Event::Remap { from, len, .. } if slot < handled => {
                    self.platform.wake(from, len);
                }
                _ if slot < handled => {}
                event => self.record(slot, &event),
            }
            fail_point(FailPoint::Replaying);
        });
        fail_point(FailPoint::Replayed);
        self.platform.forget(&mut hold);
        self.state.map().end_batch();
        fail_point(FailPoint::ReplayCleared);
        self.state.recover();
        for extent in self.state.map().extents() {
            self.platform.wake(extent.address, extent.pages * PAGE);
        }
        self.platform.wake_all();
        fail_point(FailPoint::ReplayWoken);
    }

    /// Records one message, which is in `slot` of its batch. The caller must hold the lock
    /// exclusively.
    fn record(&self, slot: usize, event: &Event) {
        if !matches!(event, Event::Fault { .. }) {
            add(&self.stats.discards, 1);
        }
        match *event {
            Event::Fault { address, thread } => {
                if let Some(name) = self.threads.faulting(thread) {
                    self.guard.kill_owner(&format!(
                        "engine thread {name} touched {address:#x}, which it restores and would \
                         wait for: a callback, the store or the tracing subscriber must not touch \
                         memory that is being restored"
                    ));
                }
                self.queue.push(address);
            }
            Event::Remove { start, end } => {
                for pages in self.state.map().pages_in(start..end) {
                    self.state.mark_removed(pages);
                }
            }
            Event::Unmap { start, end } => {
                for pages in self.state.map().pages_in(start..end) {
                    self.state.mark_unmapped(pages);
                }
                self.platform.wake(start, end - start);
            }
            Event::Remap { from, to, len } => {
                let removed = |pages| self.state.mark_removed(pages);
                let old = from..from + len;
                if self.state.map().remap(slot, &old, to, removed).is_err() {
                    self.guard.kill_owner(&format!(
                        "the owner's mremap calls split its memory into more than {} pieces, the limit of a session",
                        self.state.max_pieces(),
                    ));
                }
                self.platform.wake(from, len);
            }
            Event::Fork => self.guard.kill_owner(FORKED),
            Event::Unexpected => {
                tracing::warn!("ignored an unexpected userfaultfd message");
            }
        }
    }
}
