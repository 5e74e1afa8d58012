//! The design of VMMs' example handlers: one thread copies one page of the mapped raw file for each
//! fault.
//!
//! ```text
//! loop: read one message (blocking)
//!       -> COPY of one page from the mapping of the raw file, which wakes the faulting thread
//! ```
//!
//! This is as fast as the design can be: reads block, so there is no poll before each read; it
//! keeps no state; it asks for no events. On the core of the faulting thread it answers eight times
//! sooner than on another core, because no thread has to be woken on a sleeping core.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;

use super::region::Region;
use crate::contender::Restored;
use crate::touch::Memory;
use crate::uffd::{Copied, Uffd, pin_to};
use crate::workload::Access;
use crate::{BenchError, PAGE};

pub(crate) struct Handler {
    region: Arc<Region>,
    /// A page whose fault tells the handler to exit.
    bell: Region,
    over: Arc<AtomicBool>,
    faults: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the handler on `core`; with none, the scheduler may place it anywhere.
pub(crate) fn start(file: &Path, bytes: u64, core: Option<usize>) -> Result<Handler, BenchError> {
    let named = format!("{}: opening", file.display());
    let file = File::open(file).map_err(BenchError::io(named))?;
    let source = Region::of_file(&file, bytes, false)?;
    let region = Arc::new(Region::anonymous(bytes)?);
    let uffd = Arc::new(Uffd::open()?);
    uffd.register(region.address(), bytes)?;
    let bell = Region::anonymous(PAGE)?;
    uffd.register(bell.address(), PAGE)?;
    let over = Arc::new(AtomicBool::new(false));
    let faults = Arc::new(AtomicU64::new(0));
    let thread = {
        let (region, uffd) = (Arc::clone(&region), Arc::clone(&uffd));
        let (over, faults) = (Arc::clone(&over), Arc::clone(&faults));
        let serve = move || {
            if let Some(core) = core {
                pin_to(core);
            }
            serve(&uffd, &region, &source, &over, &faults);
        };
        std::thread::Builder::new()
            .name("handler".into())
            .spawn(serve)
            .map_err(BenchError::io("starting the handler"))?
    };
    Ok(Handler {
        region,
        bell,
        over,
        faults,
        thread: Some(thread),
    })
}

fn serve(uffd: &Uffd, region: &Region, source: &Region, over: &AtomicBool, faults: &AtomicU64) {
    while let Some(address) = uffd.next_fault() {
        if over.load(Relaxed) {
            // The thread that touches the bell waits for its page.
            let _ = uffd.zero(address & !(PAGE - 1), PAGE);
            return;
        }
        let offset = (address - region.address()) & !(PAGE - 1);
        faults.fetch_add(1, Relaxed);
        match uffd.copy(region.address() + offset, source.at(offset), PAGE) {
            // Another thread's fault on the same page was served before.
            Ok(Copied::Done | Copied::Exists) => {}
            // There is nobody to report to, and the touching thread would wait forever.
            Err(_) => std::process::abort(),
        }
    }
}

impl Restored for Handler {
    fn memory(&self) -> Memory {
        self.region.memory()
    }

    fn complete(&mut self) -> Result<(), BenchError> {
        Err(BenchError::Unavailable(
            "a handler restores what is touched, and nothing else".into(),
        ))
    }

    fn facts(&self) -> serde_json::Value {
        serde_json::json!({ "faults": self.faults.load(Relaxed) })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // The handler blocks in a read that returns only for a fault, so one is caused on a page
        // reserved for this.
        self.over.store(true, Relaxed);
        let bell = self.bell.memory();
        bell.touch(&[0], Access::Read, 1, false);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
