//! The design of VMMs' example handlers, in a process of its own: it receives a userfaultfd over a
//! Unix socket and serves it from the mapped raw file.
//!
//! ```text
//! a page a fault:   loop: read one message (blocking) -> COPY of one page, which wakes
//! everything first: read one message (blocking) -> COPY of the whole memory
//! ```
//!
//! Firecracker has examples of both, which do more than they need: they poll before each read, and
//! map the raw file when the VMM has connected. Here the file is mapped, with all its pages, before
//! any connection, and reads block. So the handlers are as fast as their designs can be.
#![allow(unsafe_code, reason = "a trial that would wait forever is ended")]

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use snaprestore_engine::pager::firecracker::handshake;

use super::region::Region;
use crate::uffd::{Copied, Uffd, pin_to};
use crate::{BenchError, PAGE};

/// A handler that serves one VMM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outside {
    /// The raw file.
    pub file: PathBuf,
    /// Size of the memory, in bytes.
    pub bytes: u64,
    /// Path of the socket that it listens on.
    pub socket: PathBuf,
    /// The core that it stays on.
    pub core: Option<usize>,
    /// Whether the first fault installs everything.
    pub everything: bool,
    /// Whether the file is read, and mapped, before the VMM connects.
    pub populated: bool,
}

impl Outside {
    /// Serves until the descriptor can't be read any more, which is not before the process is
    /// killed.
    pub(crate) fn run(&self) -> Result<(), BenchError> {
        let named = || format!("{}: serving it", self.file.display());
        let file = File::open(&self.file).map_err(BenchError::io(named()))?;
        let source = if self.populated {
            Region::populated(&file, self.bytes)?
        } else {
            Region::of_file(&file, self.bytes, false)?
        };
        if let Some(core) = self.core {
            pin_to(core);
        }
        let listener = UnixListener::bind(&self.socket).map_err(BenchError::io(named()))?;
        let (stream, _) = listener.accept().map_err(BenchError::io(named()))?;
        let handed =
            handshake(&stream, Duration::from_secs(10)).map_err(BenchError::trial(named()))?;
        let uffd = Uffd::received(handed.userfaultfd)?;
        let Some(memory) = handed.regions.first() else {
            return Err(BenchError::Invalid(format!("{}: no region", named())));
        };
        while let Some(address) = uffd.next_fault() {
            let (offset, len) = if self.everything {
                (0, self.bytes)
            } else {
                ((address - memory.address) & !(PAGE - 1), PAGE)
            };
            match uffd.copy(memory.address + offset, source.at(offset), len) {
                // Another thread's fault on the same page was served before.
                Ok(Copied::Done | Copied::Exists) => {}
                Err(error) => {
                    end_trial();
                    return Err(BenchError::io(named())(error));
                }
            }
        }
        Ok(())
    }
}

/// Kills the process that started this one and waits for a page that will never come.
fn end_trial() {
    // SAFETY: the call sends a signal to the parent, which is alive: otherwise this process would
    // have been killed with it.
    unsafe { libc::kill(libc::getppid(), libc::SIGKILL) };
}
