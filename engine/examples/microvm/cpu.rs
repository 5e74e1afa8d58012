//! The state of a virtual CPU besides the guest's memory, and its representation in a snapshot.
//!
//! Each of KVM's structures becomes an attachment of the snapshot, with its layout in memory,
//! because the kernel's binary interface doesn't change. Attachments have checksums, as pages do.

use std::io::Write;

use anyhow::{Context as _, Result, anyhow, ensure};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use snapshot_format::{Snapshot, Writer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The model-specific registers that 64-bit code without a kernel can notice: TSC, PAT, SYSENTER's
/// three, STAR and its three, and the base of GS for the kernel. For a complete system, query
/// `KVM_GET_MSR_INDEX_LIST`.
const MSRS: [u32; 10] = [
    0x10,
    0x277,
    0x174,
    0x175,
    0x176,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
];

/// A size limit in bytes that no attachment reaches.
const LONGEST_ATTACHMENT: u64 = 64 << 10;

/// The state of a virtual CPU.
pub(crate) struct CpuState {
    /// The CPU features reported to the guest. A restored guest must find the same ones.
    cpuid: Vec<kvm_cpuid_entry2>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

impl CpuState {
    /// Reads the state of a CPU that isn't running, and has finished its last instruction.
    pub(crate) fn read(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self> {
        refuse_large_xsave(kvm)?;
        let asked: Vec<_> = MSRS
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..kvm_msr_entry::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&asked).map_err(|error| anyhow!("{error:?}"))?;
        let read = vcpu.get_msrs(&mut msrs).context("reading MSRs")?;
        all_msrs("read", read, &asked)?;
        Ok(Self {
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .context("reading the CPU's features")?
                .as_slice()
                .to_vec(),
            regs: vcpu.get_regs().context("reading registers")?,
            sregs: vcpu.get_sregs().context("reading system registers")?,
            xsave: vcpu.get_xsave().context("reading vector registers")?,
            xcrs: vcpu
                .get_xcrs()
                .context("reading extended control registers")?,
            debug_regs: vcpu.get_debug_regs().context("reading debug registers")?,
            msrs: msrs.as_slice().to_vec(),
            events: vcpu.get_vcpu_events().context("reading pending events")?,
            mp_state: vcpu
                .get_mp_state()
                .context("reading whether the CPU runs")?,
        })
    }

    /// Sets this state on a new CPU.
    ///
    /// The order matters: the features determine the permitted values of the rest, and pending
    /// events come last, because setting registers can cancel them.
    pub(crate) fn give_to(&self, kvm: &Kvm, vcpu: &VcpuFd) -> Result<()> {
        refuse_large_xsave(kvm)?;
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|error| anyhow!("{error:?}"))?;
        vcpu.set_cpuid2(&cpuid)
            .context("setting the CPU's features")?;
        vcpu.set_mp_state(self.mp_state)
            .context("setting whether the CPU runs")?;
        vcpu.set_regs(&self.regs).context("setting registers")?;
        vcpu.set_sregs(&self.sregs)
            .context("setting system registers")?;
        // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says, which was checked above to be at
        // most the size of the structure. It refuses invalid content.
        unsafe { vcpu.set_xsave(&self.xsave) }.context("setting vector registers")?;
        vcpu.set_xcrs(&self.xcrs)
            .context("setting extended control registers")?;
        vcpu.set_debug_regs(&self.debug_regs)
            .context("setting debug registers")?;
        let msrs = Msrs::from_entries(&self.msrs).map_err(|error| anyhow!("{error:?}"))?;
        let set = vcpu.set_msrs(&msrs).context("setting MSRs")?;
        all_msrs("set", set, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .context("setting pending events")
    }

    /// Adds the state to a snapshot.
    pub(crate) fn attach<W: Write>(&self, to: &mut Writer<W>) -> Result<()> {
        for (name, mut bytes) in [
            ("vm.cpuid", self.cpuid.as_bytes()),
            ("vm.regs", self.regs.as_bytes()),
            ("vm.sregs", self.sregs.as_bytes()),
            ("vm.xsave", self.xsave.as_bytes()),
            ("vm.xcrs", self.xcrs.as_bytes()),
            ("vm.debug-regs", self.debug_regs.as_bytes()),
            ("vm.msrs", self.msrs.as_bytes()),
            ("vm.events", self.events.as_bytes()),
            ("vm.mp-state", self.mp_state.as_bytes()),
        ] {
            to.attach(name, &mut bytes)?;
        }
        Ok(())
    }

    /// Returns the state that a snapshot contains.
    pub(crate) fn from_snapshot(snapshot: &Snapshot) -> Result<Self> {
        Ok(Self {
            cpuid: list(snapshot, "vm.cpuid")?,
            regs: one(snapshot, "vm.regs")?,
            sregs: one(snapshot, "vm.sregs")?,
            xsave: one(snapshot, "vm.xsave")?,
            xcrs: one(snapshot, "vm.xcrs")?,
            debug_regs: one(snapshot, "vm.debug-regs")?,
            msrs: list(snapshot, "vm.msrs")?,
            events: one(snapshot, "vm.events")?,
            mp_state: one(snapshot, "vm.mp-state")?,
        })
    }
}

/// Reads a structure from an attachment, which must have exactly its length.
fn one<T: FromBytes>(snapshot: &Snapshot, name: &str) -> Result<T> {
    let bytes = snapshot.attachment_bytes(name, LONGEST_ATTACHMENT)?;
    T::read_from_bytes(&bytes).map_err(|_| wrong_length(name, bytes.len(), size_of::<T>()))
}

/// Reads as many structures as the attachment contains.
fn list<T: FromBytes + Immutable>(snapshot: &Snapshot, name: &str) -> Result<Vec<T>> {
    let bytes = snapshot.attachment_bytes(name, LONGEST_ATTACHMENT)?;
    let parts = bytes.chunks(size_of::<T>());
    parts
        .map(|part| T::read_from_bytes(part))
        .collect::<Result<_, _>>()
        .map_err(|_| wrong_length(name, bytes.len(), size_of::<T>()))
}

fn wrong_length(name: &str, len: usize, size: usize) -> anyhow::Error {
    anyhow!("the attachment {name} has {len} bytes, and {size} are one item of it")
}

/// Checks that KVM accepted all registers; it stops at the first that it doesn't know.
fn all_msrs(done: &str, count: usize, wanted: &[kvm_msr_entry]) -> Result<()> {
    match wanted.get(count) {
        Some(refused) => Err(anyhow!("MSR {:#x} can't be {done}", refused.index)),
        None => Ok(()),
    }
}

/// Fails if the 4 KiB of `kvm_xsave` can't hold the vector registers, which happens only if a
/// process has requested the largest ones (AMX). This one hasn't.
fn refuse_large_xsave(kvm: &Kvm) -> Result<()> {
    let needed = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    ensure!(
        needed <= size_of::<kvm_xsave>(),
        "vector registers take {needed} bytes here, more than this launcher keeps"
    );
    Ok(())
}
