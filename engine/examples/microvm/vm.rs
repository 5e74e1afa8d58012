//! A virtual machine on `/dev/kvm`: memory slots, one virtual CPU, a serial port.

use std::io::{self, Write as _};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _};

use crate::guest;

/// Address of three guest pages, in the gap, that KVM needs for itself on some processors.
const KVM_OWN_PAGES: usize = 0xfffb_d000;
/// Maximum length of a line of the guest's output, in bytes.
const LONGEST_LINE: usize = 256;

/// The reason why the guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// The guest may be snapshotted now.
    Paused,
    /// The guest has found everything unchanged.
    Good,
    /// The guest has found something wrong, and reported it.
    Bad,
}

/// A virtual machine on borrowed memory.
///
/// The memory may still be arriving: the virtual CPU waits in the kernel at a missing page, without
/// noticing.
pub(crate) struct Vm<'memory> {
    pub(crate) vcpu: VcpuFd,
    pub(crate) serial: Serial,
    machine: VmFd,
    memory: &'memory GuestMemoryMmap,
}

impl<'memory> Vm<'memory> {
    /// Creates a VM whose CPU is in the reset state. With `log_writes`, KVM keeps a log of the
    /// pages that the guest writes to, for [`Vm::take_written`].
    pub(crate) fn new(
        kvm: &Kvm,
        memory: &'memory GuestMemoryMmap,
        log_writes: bool,
    ) -> Result<Self> {
        let vm = kvm.create_vm().context("making a VM")?;
        vm.set_tss_address(KVM_OWN_PAGES)
            .context("giving KVM pages of its own")?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: if log_writes {
                    KVM_MEM_LOG_DIRTY_PAGES
                } else {
                    0
                },
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().expose_provenance() as u64,
            };
            // SAFETY: the region is mapped and writable as long as the memory lives, and its users
            // access it only by volatile accesses, so the guest may write to it at any time. The
            // guest runs only while `Vm` lives, which holds its only CPU and borrows the memory.
            // Regions don't overlap in the guest, because `vm-memory` refuses that. If the kernel
            // refuses the slot, nothing has changed.
            unsafe { vm.set_user_memory_region(slot) }.with_context(|| {
                format!("giving the VM its memory at {:#x}", slot.guest_phys_addr)
            })?;
        }
        let vcpu = vm.create_vcpu(0).context("making a virtual CPU")?;
        Ok(Self {
            vcpu,
            serial: Serial::default(),
            machine: vm,
            memory,
        })
    }

    /// Returns for each memory slot a bitmap of the pages that were written to since the last call,
    /// or since the VM was made.
    ///
    /// KVM logs writes of the guest and its own. Pages that arrive in a restore are not logged:
    /// they are what the snapshot has. A launcher must record its own writes; this one makes none
    /// after the first snapshot.
    pub(crate) fn take_written(&self) -> Result<Vec<Vec<u64>>> {
        let slots = (0..).zip(self.memory.iter());
        slots
            .map(|(slot, region)| {
                let bytes = usize::try_from(region.len())?;
                let log = self.machine.get_dirty_log(slot, bytes);
                log.context("asking KVM which pages were written to")
            })
            .collect()
    }

    /// Runs the guest to its end, past requests to pause it.
    pub(crate) fn run_to_end(&mut self) -> Result<Stopped> {
        loop {
            match self.run()? {
                Stopped::Paused => {}
                ended => return Ok(ended),
            }
        }
    }

    /// Runs the guest until it makes a request.
    pub(crate) fn run(&mut self) -> Result<Stopped> {
        loop {
            let request = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(guest::SERIAL_PORT, bytes)) => {
                    self.serial.write(bytes)?;
                    continue;
                }
                Ok(VcpuExit::IoOut(guest::REQUEST_PORT, &[request])) => request,
                // A triple fault, for example.
                Ok(exit) => bail!("the guest stopped unexpectedly: {exit:?}"),
                // A signal. The guest continues where it was.
                Err(error) if error.errno() == libc::EINTR => continue,
                // If a page can't be restored the process is aborted, so no such fault gets here.
                Err(error) => return Err(error).context("running the guest"),
            };
            let stopped = match request {
                guest::REQUEST_PAUSE => Stopped::Paused,
                guest::REQUEST_GOOD => Stopped::Good,
                guest::REQUEST_BAD => Stopped::Bad,
                other => bail!("the guest asks for {other}, which means nothing"),
            };
            self.finish_instruction()?;
            return Ok(stopped);
        }
    }

    /// Makes KVM finish the instruction that it left to us.
    ///
    /// KVM does so only when the CPU is run again. Registers that are read before may be those in
    /// the middle of an instruction, and a guest restored from them would repeat it, or worse.
    fn finish_instruction(&mut self) -> Result<()> {
        self.vcpu.set_kvm_immediate_exit(1);
        let exit = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        let finished = exit.as_ref().is_err_and(|e| e.errno() == libc::EINTR);
        ensure!(finished, "the guest went on instead of pausing: {exit:?}");
        Ok(())
    }
}

/// The guest's output, passed on line by line.
#[derive(Default)]
pub(crate) struct Serial {
    /// The time at which the first byte arrived.
    pub(crate) first: Option<Instant>,
    /// The lines so far.
    pub(crate) lines: Vec<String>,
    unfinished: Vec<u8>,
}

impl Serial {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.first.get_or_insert_with(Instant::now);
        for &byte in bytes {
            if byte != b'\n' {
                self.unfinished.push(byte);
            }
            // A guest can send endless output.
            if byte == b'\n' || self.unfinished.len() == LONGEST_LINE {
                let line = String::from_utf8_lossy(&self.unfinished).into_owned();
                self.unfinished.clear();
                writeln!(io::stdout(), "guest: {line}")
                    .context("passing on what the guest says")?;
                self.lines.push(line);
            }
        }
        Ok(())
    }
}
