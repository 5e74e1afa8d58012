//! From a snapshot to a guest that goes on.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use kvm_ioctls::Kvm;
use snapshot_format::Snapshot;
use snapshot_format::digest;
use snapshot_format::layout::{PAGE_SIZE, PAGES_PER_BLOCK};
use vm_memory::{
    Address as _, Bytes as _, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
};

use crate::cpu::CpuState;
use crate::vm::{Stopped, Vm};

/// The memory of a guest on its way out of a snapshot.
///
/// A virtual CPU may run on it at once: it waits where a page is missing. What keeps the pages
/// coming lives as long as this does, which must be as long as the VM.
pub(crate) trait ArrivingMemory {
    /// The memory, in the regions of the snapshot.
    fn guest(&self) -> &GuestMemoryMmap;

    /// How it came, in lines for people.
    fn report(&self) -> String;
}

/// Lets the guest of `snapshot` go on in `memory` until its end.
pub(crate) fn run(
    kvm: &Kvm,
    snapshot: &Snapshot,
    memory: &dyn ArrivingMemory,
    begun: Instant,
) -> Result<()> {
    let state = CpuState::from_snapshot(snapshot)?;
    let mut vm = Vm::new(kvm, memory.guest())?;
    state.give_to(kvm, &vm.vcpu)?;
    let ready = begun.elapsed();
    let stopped = vm.run()?;
    let ended = begun.elapsed();
    let first = vm.serial.first.map(|at| at - begun);
    // No virtual CPU is left that could touch the memory.
    drop(vm);

    println!("start      the guest runs after {ready:.1?}");
    if let Some(first) = first {
        println!("output     after {first:.1?}");
    }
    println!("end        after {ended:.1?}");
    println!("{}", memory.report());
    println!("{}", ending(stopped, memory.guest())?);
    ensure!(stopped == Stopped::Good, "the guest is not what it was");
    Ok(())
}

/// A line that is the same for two guests that ended alike.
pub(crate) fn ending(stopped: Stopped, memory: &GuestMemoryMmap) -> Result<String> {
    let mut line = format!("ending     {stopped:?}, memory ");
    for byte in digest_of(memory)? {
        write!(line, "{byte:02x}")?;
    }
    Ok(line)
}

/// The digest of all memory, as snapshots have it. Touches every page.
fn digest_of(memory: &GuestMemoryMmap) -> Result<digest::Digest> {
    let mut hasher = digest::ContentHasher::new();
    let mut bytes = vec![0; PAGES_PER_BLOCK * PAGE_SIZE];
    for region in memory.iter() {
        let pieces = (0..region.len()).step_by(bytes.len());
        for offset in pieces {
            let piece = usize::try_from(region.len() - offset)?.min(bytes.len());
            let bytes = &mut bytes[..piece];
            memory
                .read_slice(bytes, region.start_addr().unchecked_add(offset))
                .context("reading the guest's memory")?;
            let pages: Vec<_> = bytes.chunks(PAGE_SIZE).map(digest::page).collect();
            hasher.block(&digest::block(&pages));
        }
    }
    let regions = memory
        .iter()
        .map(|region| (0, region.start_addr().0, region.len() / PAGE_SIZE as u64));
    Ok(hasher.finish(regions))
}
