//! Reads the owner's memory without a fault in the kernel: missing pages are requested first.
//!
//! A userfaultfd for user mode only doesn't block a system call at a missing page: the call fails
//! with EFAULT. Therefore a thread that reads by a system call queues a fault for the page, as if
//! it had touched it, and waits without holding a lock until the page is settled.

use std::ops::Range;
use std::time::Duration;

use crate::session::Session;
use crate::session::fault::outcome::InstallError;
use crate::session::platform::{Image, PAGE, PageNumber, Platform};
use crate::session::state::Status;

/// Interval at which a reader checks for what no notification announces: its page has moved, or the
/// session ends.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

impl<P: Platform, I: Image> Session<P, I> {
    /// Loads every page of `addresses`, up to the first that can't be loaded, and waits for it.
    pub(crate) fn load_for_reader(&self, addresses: Range<u64>) {
        let mut next = addresses.start & !(PAGE - 1);
        while next < addresses.end && !self.is_ending() {
            match self.status_at(next) {
                Some((_, Status::Poisoned)) => return,
                Some((page, Status::Absent)) => self.wait_for(next, page),
                Some((_, Status::Present | Status::Removed)) | None => next += PAGE,
            }
        }
    }

    /// Requests `page`, which is at `address`, as a fault does. Waits until it is settled or the
    /// owner has moved it away.
    fn wait_for(&self, address: u64, page: PageNumber) {
        let _reader = self.queue.reader();
        self.queue.push(address);
        self.platform.kick();
        loop {
            // Read before the check, so that an answer given after the check is not missed.
            let answers = *self.queue.answers();
            if self.is_ending() || self.status_at(address) != Some((page, Status::Absent)) {
                return;
            }
            self.queue.wait_for_answer(answers, POLL_INTERVAL);
        }
    }

    /// Installs the zeros that a fault on a discarded page at `address` would get.
    pub(crate) fn zero_for_reader(&self, address: u64) {
        let address = address & !(PAGE - 1);
        let mut tries = 0;
        while let Err(InstallError::Changing) = self.look_up(address) {
            if self.after_changing(&mut tries, address).is_err() {
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
