//! Reading messages and recording what they say.

use super::platform::{Event, Image, Platform, ReadFailed, Waited};
use super::stats::add;
use super::{Fault, Session};

/// Why an owner that tears its memory into very many pieces is ended.
const TOO_MANY_PIECES: &str = "the owner's munmap and mremap calls left its memory in more pieces than the session has room for";

impl<P: Platform, I: Image> Session<P, I> {
    /// The next fault to serve; waits for one. `None`: the session ends.
    ///
    /// What arrives ends the waiting of one thread, which reads it all; if that is more than one
    /// fault, it ends another's.
    pub(super) fn next_fault(&self) -> Option<Fault> {
        loop {
            if self.is_ending() {
                // One thread was woken for it: so is the next.
                self.platform.kick();
                return None;
            }
            if let Some(fault) = self.inbox.pop() {
                if !self.inbox.is_empty() {
                    self.platform.kick();
                }
                return Some(fault);
            }
            if self.finish_if_settled() {
                return None;
            }
            match self.platform.wait_readable() {
                Waited::Ready => {
                    self.read_events(0);
                }
                Waited::OwnerGone => self.owner_is_gone(),
                Waited::Failed => {
                    self.guard.end_owner("waiting for faults failed");
                    self.end();
                }
            }
        }
    }

    /// Reads messages and records them, all in one exclusive hold. Returns how many there were.
    pub(crate) fn read_events(&self, about: u64) -> usize {
        let mut hold = self.platform.exclusive(about);
        let read = self
            .platform
            .read(&mut hold, &mut |event| self.record(&event));
        read.unwrap_or_else(|ReadFailed| {
            self.guard.end_owner("reading faults failed");
            self.end();
            0
        })
    }

    /// Records one message. The caller holds the lock exclusively.
    fn record(&self, event: &Event) {
        if !matches!(event, Event::Fault { .. }) {
            add(&self.stats.events, 1);
        }
        match *event {
            Event::Fault { address, thread } => self.inbox.arrived(address, thread),
            Event::Remove { start, end } => {
                for pages in self.state.map().pages_in(start..end) {
                    self.state.mark_removed(pages);
                }
            }
            Event::Unmap { start, end } => {
                let removed = |pages| self.state.mark_removed(pages);
                if self.state.map().unmap(&(start..end), removed).is_err() {
                    self.guard.end_owner(TOO_MANY_PIECES);
                }
                self.platform.wake(start, end - start);
            }
            Event::Remap { from, to, len } => {
                let removed = |pages| self.state.mark_removed(pages);
                let old = from..from + len;
                if self.state.map().remap(&old, to, removed).is_err() {
                    self.guard.end_owner(TOO_MANY_PIECES);
                }
                self.platform.wake(from, len);
            }
            Event::Unexpected => {
                tracing::warn!("userfaultfd sent a message that was not asked for");
            }
        }
    }
}
