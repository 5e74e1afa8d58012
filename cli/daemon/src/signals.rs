//! Signals of the daemon's processes.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};

/// Blocks `SIGXFSZ` in this thread and those that it starts, so that a write beyond `RLIMIT_FSIZE`
/// fails instead of killing the process. Memory files are files, too: a daemon with such a limit
/// refuses VMs, and does not die.
pub(crate) fn block_file_size_signal() -> Result<(), Errno> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGXFSZ);
    set.thread_block()
}
