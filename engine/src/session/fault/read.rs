//! Reading the owner's memory without a fault of the kernel's: what is missing is asked for first.
//!
//! A userfaultfd for user mode only doesn't stop a system call at a missing page: the call fails
//! with EFAULT. So who reads by a system call puts the page into the queue, as a fault would be,
//! and waits without holding anything until it is settled.

use std::ops::Range;
use std::time::Duration;

use crate::session::Session;
use crate::session::fault::Lookup;
use crate::session::platform::{Image, PAGE, PageNumber, Platform};
use crate::session::state::Status;

/// How often a reader looks at what no notification tells: that its page has moved, or that the
/// session ends.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

impl<P: Platform, I: Image> Session<P, I> {
    /// Has every page of `addresses` brought, up to the first that can't be, and waits for it.
    pub(crate) fn bring_for_reader(&self, addresses: Range<u64>) {
        let mut next = addresses.start & !(PAGE - 1);
        while next < addresses.end && !self.is_ending() {
            match self.status_at(next) {
                Some((_, Status::Poisoned)) => return,
                Some((page, Status::Absent)) => self.wait_for(next, page),
                Some((_, Status::Present | Status::Removed)) | None => next += PAGE,
            }
        }
    }

    /// Asks for `page`, which is at `address`, as a fault does, and waits until it is settled, or
    /// the owner has moved it away.
    fn wait_for(&self, address: u64, page: PageNumber) {
        let _reader = self.queue.reader();
        self.queue.push(address, 0);
        self.platform.kick();
        loop {
            // Counted before looking: an answer that is given after the look is not slept through.
            let answers = *self.queue.answers();
            if self.is_ending() || self.status_at(address) != Some((page, Status::Absent)) {
                return;
            }
            self.queue.wait_for_answer(answers, POLL_INTERVAL);
        }
    }

    /// Installs what a discarded page at `address` reads as. The kernel would, if it were asked by
    /// a fault.
    pub(crate) fn zero_for_reader(&self, address: u64) {
        let address = address & !(PAGE - 1);
        let mut tries = 0;
        while let Lookup::Again = self.look(address) {
            if self.after_again(&mut tries, address).is_err() {
                return;
            }
        }
    }

    fn status_at(&self, address: u64) -> Option<(PageNumber, Status)> {
        let _hold = self.platform.shared(address);
        let page = self.state.map().page_at(address)?;
        Some((page, self.state.status(page)))
    }
}
