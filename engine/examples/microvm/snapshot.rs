//! From a running guest to a file that contains it.

use std::io;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{RegionSpec, SnapshotFile, Writer, WriterOptions};
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

/// Starts a guest in `memory`, of `mib` MiB, and runs it until it has filled all of it.
pub(crate) fn run_until_filled<'memory>(
    kvm: &Kvm,
    memory: &'memory GuestMemoryMmap,
    mib: u64,
    seed: u64,
) -> Result<Vm<'memory>> {
    guest::load(memory)?;
    let mut vm = Vm::new(kvm, memory)?;
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

/// Writes a paused VM to `path`, which must not exist yet, and returns the file's length.
///
/// The file appears under its name when it is complete and on disk. A launcher with devices would
/// first stop them, so that nobody writes to the memory meanwhile, and attach their state as well.
pub(crate) fn write(path: &Path, kvm: &Kvm, vm: &Vm<'_>, memory: &GuestMemoryMmap) -> Result<u64> {
    let file = SnapshotFile::create(path, false)?;
    let mut writer = Writer::new(file, WriterOptions::default())?;
    for (number, region) in memory.iter().enumerate() {
        let mut at = region.start_addr();
        writer.begin_region(&RegionSpec {
            start: at.0,
            name: format!("ram{number}"),
            ..RegionSpec::default()
        })?;
        writer.read_pages(region.len() / PAGE_SIZE_U64, |room| {
            let read = memory.read_slice(room, at).map_err(io::Error::other);
            at = GuestAddress(at.0 + room.len() as u64);
            read
        })?;
    }
    CpuState::of(kvm, &vm.vcpu)?.attach(&mut writer)?;
    let (file, written) = writer.finish()?;
    file.commit()?;
    Ok(written.file_bytes)
}
