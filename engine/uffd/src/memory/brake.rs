//! Slowing down those who change mappings.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{Builder, JoinHandle};

use super::{Advice, Mapping, protect};
use crate::os::SignalsBlocked;
use crate::{page_size, to_usize};

/// Bytes of the memory whose protection is changed. At 20 ns a page it takes some 0.3 ms: long enough for
/// each waiting thread to run once.
const LEN: u64 = 64 << 20;

/// Keeps the other threads of this process from changing their mappings most of the time, until
/// dropped: a thread changes the protection of memory of its own over and over, which has the kernel
/// hold the lock of all mappings.
///
/// While a userfaultfd's owner waits for an event to be read, nothing can be installed. Where many
/// threads discard memory without a pause, one of them waits always: each that was let go comes back
/// before the last has gone. Held up at the lock they have all gone, and none has come back. (Linux
/// 6.18, two cores, 16 threads that discard single pages: 800,000 installs were tried in 5 s without it,
/// and none succeeded; with it, 14,000 succeeded within 0.1 s.)
pub struct Brake {
    released: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Brake {
    /// Begins.
    pub fn new() -> io::Result<Self> {
        let memory = Mapping::new(LEN).map_err(io::Error::other)?;
        memory
            .advise(Advice::NoHugePages)
            .map_err(io::Error::other)?;
        let released = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&released);
        // The thread inherits the mask, as every thread of the engine does.
        let blocked = SignalsBlocked::now()?;
        let thread = Builder::new()
            .name("snap-brake".to_owned())
            .spawn(move || hold(&memory, &until))?;
        drop(blocked);
        Ok(Self {
            released,
            thread: Some(thread),
        })
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        self.released.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn hold(memory: &Mapping, until: &AtomicBool) {
    // Zero pages: what takes time is to look at them, and they take no memory but for page tables.
    for offset in (0..LEN).step_by(to_usize(page_size())) {
        // SAFETY: the page is in the mapping, which is readable and nobody else's.
        unsafe { memory.as_ptr().add(to_usize(offset)).read_volatile() };
    }
    while !until.load(Relaxed) {
        for protection in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
            // SAFETY: the mapping is nobody else's, and this thread doesn't access it any more.
            if let Err(error) = unsafe { protect(memory.address(), LEN, protection) } {
                tracing::debug!(%error, "holding up changes of mappings");
                return;
            }
        }
    }
}
