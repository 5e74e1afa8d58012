//! From a snapshot to a running guest.

use std::path::Path;
use std::sync::Arc;
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
use crate::snapshot::{self, Base};
use crate::vm::{Stopped, Vm};

/// The memory of a guest that is being restored.
///
/// A virtual CPU may run on it at once: it waits at a missing page. The value also keeps the pages
/// arriving, so it must live as long as the VM.
pub(crate) trait ArrivingMemory {
    /// Returns the memory, in the regions of the snapshot.
    fn guest(&self) -> &GuestMemoryMmap;

    /// Returns a report of the restore, in lines for people.
    fn report(&self) -> String;
}

/// Runs the guest of `snapshot` in `memory` until it is finished. When it can be paused, it is
/// written to `child`, if one is wanted.
pub(crate) fn run(
    kvm: &Kvm,
    snapshot: &Arc<Snapshot>,
    memory: &dyn ArrivingMemory,
    child: Option<&Path>,
    begun: Instant,
) -> Result<()> {
    let state = CpuState::from_snapshot(snapshot)?;
    let mut vm = Vm::new(kvm, memory.guest(), child.is_some())?;
    state.give_to(kvm, &vm.vcpu)?;
    let ready = begun.elapsed();
    if let Some(child) = child {
        let stopped = vm.run()?;
        ensure!(stopped == Stopped::Paused, "the guest has not paused");
        // Only written pages are read, so pages that have not arrived yet need not.
        let base = Base {
            snapshot: Arc::clone(snapshot),
            written: vm.take_written()?,
        };
        let bytes = snapshot::write(child, kvm, &vm, memory.guest(), Some(&base))?;
        println!("child      {} KiB; the guest continues", bytes >> 10);
    }
    let stopped = vm.run_to_end()?;
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

/// Returns a line that is identical for two guests with the same outcome.
pub(crate) fn ending(stopped: Stopped, memory: &GuestMemoryMmap) -> Result<String> {
    let digest = digest::hex(&digest_of(memory)?);
    Ok(format!("ending     {stopped:?}, memory {digest}"))
}

/// Returns the digest of all memory, as snapshots have it. Touches every page.
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
