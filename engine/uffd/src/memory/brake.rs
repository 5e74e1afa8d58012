//! A brake that slows down threads that change mappings.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{Builder, JoinHandle};

use super::{Advice, Mapping, protect};
use crate::os::SignalsBlocked;
use crate::{page_size, to_usize};

/// Size in bytes of the memory whose protection is changed. At 20 ns per page, a change takes about
/// 0.3 ms: long enough for each waiting thread to run once.
const LEN: u64 = 64 << 20;

/// A brake that keeps the other threads of this process from changing their mappings most of the
/// time, until dropped. A thread changes the protection of its own memory over and over, so that
/// the kernel holds the lock of all mappings.
///
/// While a userfaultfd's owner waits for an event to be read, nothing can be installed. If many
/// threads discard memory without a pause, one of them is always waiting: each thread that was
/// released is back before the last one is through. With the brake, they all finish their discard,
/// and queue up at the lock before the next one. (Linux 6.18, two cores, 16 threads that discard
/// single pages: without the brake, 800,000 installs were tried in 5 s and none succeeded; with it,
/// 14,000 succeeded within 0.1 s.)
pub struct Brake {
    released: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Brake {
    /// Starts the brake.
    pub fn new() -> io::Result<Self> {
        let memory = Mapping::new(LEN).map_err(io::Error::other)?;
        memory
            .advise(Advice::NoHugePages)
            .map_err(io::Error::other)?;
        let released = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&released);
        // The thread inherits the signal mask, like every thread of the engine.
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
    // Zero pages: checking them takes the time, and they use no memory except for page tables.
    for offset in (0..LEN).step_by(to_usize(page_size())) {
        // SAFETY: the page is in the mapping, which is readable and nobody else's.
        unsafe { memory.as_ptr().add(to_usize(offset)).read_volatile() };
    }
    while !until.load(Relaxed) {
        for protection in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
            // SAFETY: the mapping is nobody else's, and this thread no longer accesses it.
            if let Err(error) = unsafe { protect(memory.address(), LEN, protection) } {
                tracing::debug!(%error, "holding up changes of mappings");
                return;
            }
        }
    }
}
