//! Giving a session up: poisons every missing page, wherever the owner has it.
//!
//! ```text
//! give_up, when no thread serves any more:
//!   for the absent pages, from the first to the last:
//!     hold the lock shared:
//!       look up where the owner has them now
//!       one POISON for all consecutive ones, up to 1 GiB
//!     EAGAIN: read events, then continue at the same page
//!     EEXIST: a page is present: mark it, continue after it
//!   unregister, wake, read events until none can be pending
//! ```
//!
//! The kernel keeps the poison when the userfaultfd is closed: a touch gets SIGBUS and a system
//! call EFAULT, never zeros. Nothing relies on an address alone: POISON changes absent pages that
//! are registered, and none while the owner changes its mappings, so it can't reach what another
//! thread has mapped where the owner has just unmapped something.
//!
//! # An owner that discards without a pause
//!
//! The kernel refuses POISON while a discard waits for its event to be read. If many threads
//! discard without a pause, one of them is always waiting, so after some refusals they are held up
//! ([`Platform::brake`]). The first call that succeeds then makes the next ones likely to succeed:
//! the kernel checks for a change once, at the start of a call (Linux 6.9), and holds up further
//! changes until the call returns. A refused call is retried at the same page: starting over at the
//! first page would never reach the last.

use snapshot_format::Reason;

use crate::session::Session;
use crate::session::fault::context::Purpose;
use crate::session::fault::install::Source;
use crate::session::fault::outcome::InstallError;
use crate::session::platform::{Image, Platform};

/// The error for a kernel that can't poison pages. Nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoPoison;

impl<P: Platform, I: Image> Session<P, I> {
    /// Poisons the missing pages and returns the memory to the kernel. The session must have been
    /// ended, and none of its threads may still run.
    pub(crate) fn give_up(&self) -> Result<(), NoPoison> {
        let all = 0..self.state.page_slots();
        match self.install(all, Source::Poison, Purpose::along(Reason::Demand)) {
            Ok(_) | Err(InstallError::OwnerGone) => {}
            Err(InstallError::Refused(libc::EINVAL)) => return Err(NoPoison),
            // Closing would turn missing pages into zeros, and not closing would leave threads that
            // touch them waiting forever.
            Err(error) => self.guard.kill_owner(&format!(
                "cannot poison its missing pages: {}",
                self.install_failure(0, error).detail
            )),
        }
        self.release_memory();
        Ok(())
    }
}
