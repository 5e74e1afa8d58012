//! Memory that another process fills: this process maps it, and hands its userfaultfd to
//! `snaprestore serve` as Firecracker does.

use std::io::IoSlice;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use snaprestore_uffd::memory::RawRegion;
use snaprestore_uffd::uffd::{Features, Modes, OpenOptions, Userfaultfd};
use snapshot_format::Snapshot;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _};

use crate::restore::ArrivingMemory;

/// Memory whose pages another process provides.
pub(crate) struct HandedOver {
    memory: GuestMemoryMmap,
    // As long as this process holds it, missing pages are waited for, and never read as zeros, even
    // if the other process exits.
    _userfaultfd: Userfaultfd,
    // Closing it would tell the other process that this one has exited.
    _socket: UnixStream,
}

impl HandedOver {
    /// Maps and registers memory for the regions of `snapshot`, and hands it over to the process
    /// that listens at `socket`. The memory may be touched at once: a touch waits until it is
    /// served.
    pub(crate) fn start(snapshot: &Snapshot, socket: &Path) -> Result<Self> {
        let ranges = snapshot.regions().iter().map(|region| {
            let len = usize::try_from(region.bytes());
            (GuestAddress(region.start), len.expect("64 bits"))
        });
        let memory = GuestMemoryMmap::from_ranges(&ranges.collect::<Vec<_>>())
            .context("mapping the guest's memory")?;
        // A balloon's discards must be reported, or discarded pages would come back.
        let userfaultfd = OpenOptions::new().required(Features::EVENT_REMOVE).open()?;
        for region in memory.iter() {
            // SAFETY: the region was mapped just now and nothing has touched it. Its users access
            // it only by volatile accesses, and it lives as long as the userfaultfd beside it.
            let raw = unsafe { RawRegion::new(region.as_ptr(), region.len()) }?;
            userfaultfd.register(&raw, 0, region.len(), Modes::MISSING)?;
        }
        let socket = hand_over(&memory, &userfaultfd, socket)?;
        Ok(Self {
            memory,
            _userfaultfd: userfaultfd,
            _socket: socket,
        })
    }
}

/// Sends the regions in Firecracker's format, with the userfaultfd attached.
fn hand_over(
    memory: &GuestMemoryMmap,
    userfaultfd: &Userfaultfd,
    path: &Path,
) -> Result<UnixStream> {
    let mut offset = 0;
    let regions = memory.iter().map(|region| {
        let fields = json!({
            "base_host_virt_addr": region.as_ptr().expose_provenance(),
            "size": region.len(),
            "offset": offset,
            "page_size": 4096,
        });
        offset += region.len();
        fields
    });
    let message = regions.collect::<Value>().to_string();
    let socket = UnixStream::connect(path)
        .with_context(|| format!("{}: nobody serves there", path.display()))?;
    let descriptors = [userfaultfd.as_fd().as_raw_fd()];
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(message.as_bytes())],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::empty(),
        None,
    );
    sent.context("handing the memory over")?;
    Ok(socket)
}

impl ArrivingMemory for HandedOver {
    fn guest(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn report(&self) -> String {
        "memory     served by another process, which knows how it came".to_owned()
    }
}
