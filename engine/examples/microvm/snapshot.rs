//! From a running guest to a file that contains it, or what has changed since another file.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{RegionSpec, Snapshot, SnapshotFile, Writer, WriterOptions};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
};

use crate::cpu::CpuState;
use crate::guest;
use crate::vm::{Stopped, Vm};

/// Maps empty memory for a new guest.
pub(crate) fn new_memory(mib: u64) -> Result<GuestMemoryMmap> {
    GuestMemoryMmap::from_ranges(&guest::layout(mib)?).context("mapping the guest's memory")
}

/// Starts a guest in `memory`, of `mib` MiB, and runs it until it has filled all of it. See
/// [`Vm::new`] about `log_writes`.
pub(crate) fn run_until_filled<'memory>(
    kvm: &Kvm,
    memory: &'memory GuestMemoryMmap,
    mib: u64,
    seed: u64,
    log_writes: bool,
) -> Result<Vm<'memory>> {
    guest::load(memory)?;
    let mut vm = Vm::new(kvm, memory, log_writes)?;
    let features = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let features = features.context("asking what features the CPU can have")?;
    vm.vcpu
        .set_cpuid2(&features)
        .context("setting the CPU's features")?;
    let mut sregs = vm.vcpu.get_sregs().context("reading system registers")?;
    guest::enter_long_mode(&mut sregs);
    vm.vcpu
        .set_sregs(&sregs)
        .context("setting system registers")?;
    let regs = guest::start_registers(guest::layout(mib)?, seed);
    vm.vcpu.set_regs(&regs).context("setting registers")?;
    let stopped = vm.run()?;
    ensure!(stopped == Stopped::Paused, "the guest has not paused");
    Ok(vm)
}

/// The snapshot that a VM's memory was taken into or restored from, and what it wrote since.
pub(crate) struct Base {
    pub(crate) snapshot: Arc<Snapshot>,
    /// A bitmap of the written pages of each region.
    pub(crate) written: Vec<Vec<u64>>,
}

/// Writes a paused VM to `path`, which must not exist yet, and returns the file's length. With a
/// base, the file becomes a child of that snapshot: pages that were not written to since are
/// neither read nor stored.
///
/// The file appears under its name when it is complete and on disk. A launcher with devices would
/// first stop them, so that nobody writes to the memory meanwhile, and attach their state as well.
pub(crate) fn write(
    path: &Path,
    kvm: &Kvm,
    vm: &Vm<'_>,
    memory: &GuestMemoryMmap,
    base: Option<&Base>,
) -> Result<u64> {
    let file = SnapshotFile::create(path, false)?;
    let options = WriterOptions {
        base: base.map(|base| Arc::clone(&base.snapshot)),
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(file, options)?;
    for (number, region) in memory.iter().enumerate() {
        let start = region.start_addr();
        let pages = region.len() / PAGE_SIZE_U64;
        // The base has the same regions, in the same order.
        let before = base.map(|base| &base.snapshot.regions()[number]);
        writer.begin_region(&RegionSpec {
            start: start.0,
            name: format!("ram{number}"),
            base_page: before.map(|before| before.first_page),
            ..RegionSpec::default()
        })?;
        let runs = match base {
            Some(base) => runs(&base.written[number], pages),
            None => vec![(true, 0..pages)],
        };
        for (is_written, run) in runs {
            let count = run.end - run.start;
            if !is_written {
                writer.write_from_base(count)?;
                continue;
            }
            let mut at = GuestAddress(start.0 + run.start * PAGE_SIZE_U64);
            writer.read_pages(count, |room| {
                let read = memory.read_slice(room, at).map_err(io::Error::other);
                at = GuestAddress(at.0 + room.len() as u64);
                read
            })?;
        }
    }
    CpuState::read(kvm, &vm.vcpu)?.attach(&mut writer)?;
    let (file, written) = writer.finish()?;
    file.commit()?;
    Ok(written.file_bytes)
}

/// Splits the pages of a region into runs of pages that were written to, and that were not.
fn runs(written: &[u64], pages: u64) -> Vec<(bool, Range<u64>)> {
    let bits = written
        .iter()
        .flat_map(|word| (0..64).map(move |bit| word >> bit & 1 != 0));
    let mut runs: Vec<(bool, Range<u64>)> = Vec::new();
    for (page, is_written) in (0..pages).zip(bits) {
        match runs.last_mut() {
            Some((last, run)) if *last == is_written => run.end = page + 1,
            _ => runs.push((is_written, page..page + 1)),
        }
    }
    runs
}
