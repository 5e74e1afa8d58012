//! The VMs of a daemon, in all states from the connection to the exit of the process.
//!
//! Invariant: a record leaves this table only when nothing is stored under its id any more, or is
//! being removed.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;
use snaprestore_engine::pager::firecracker::HandshakeError;

use super::vm::{PartlyStored, VmRecord};
use crate::api::summary::VmLabel;
use crate::fd_store::FdStore;
use crate::policy;

/// The VMs of a daemon, by number.
#[derive(Debug)]
pub(super) struct Vms {
    records: BTreeMap<u64, VmRecord>,
    /// The number of the next VM.
    next: u64,
}

impl Vms {
    pub(super) fn new() -> Self {
        Self {
            records: BTreeMap::new(),
            next: 1,
        }
    }

    /// Returns a number that no VM of this daemon has had.
    pub(super) fn next_id(&mut self) -> u64 {
        let id = self.next;
        self.next += 1;
        id
    }

    /// Takes a number that an earlier supervisor has given to a VM.
    pub(super) fn take_id(&mut self, id: u64) {
        self.next = self.next.max(id.saturating_add(1));
    }

    pub(super) fn insert(&mut self, record: VmRecord) {
        self.records.insert(record.id(), record);
    }

    pub(super) fn get(&self, id: u64) -> Option<&VmRecord> {
        self.records.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut VmRecord> {
        self.records.get_mut(&id)
    }

    /// Takes a VM out of the table, in order to end it.
    pub(super) fn remove(&mut self, id: u64) -> Option<VmRecord> {
        self.records.remove(&id)
    }

    /// Takes a VM out of the table, in order to end it, if its memory was handed over.
    pub(super) fn take_active(&mut self, id: u64) -> Option<VmRecord> {
        self.get(id).filter(|record| record.is_active())?;
        self.remove(id)
    }

    /// Returns the numbers of the VMs with incomplete handshakes.
    pub(super) fn connecting(&self) -> Vec<u64> {
        self.ids(VmRecord::is_connecting)
    }

    /// Returns the numbers of the VMs that are, or will be, served.
    pub(super) fn active(&self) -> Vec<u64> {
        self.ids(VmRecord::is_active)
    }

    fn ids(&self, is_meant: impl Fn(&VmRecord) -> bool) -> Vec<u64> {
        let meant = self.records.values().filter(|record| is_meant(record));
        meant.map(VmRecord::id).collect()
    }

    /// Returns whether no VM is being, or about to be, served.
    pub(super) fn is_idle(&self) -> bool {
        let mut records = self.records.values();
        !records.any(|record| record.is_connecting() || record.is_active())
    }

    /// Returns the connections with incomplete handshakes, by VM.
    pub(super) fn connections(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        let records = self.records.values();
        records.filter_map(|record| Some((record.id(), record.connection()?)))
    }

    /// Returns whether the process of a VM has to be waited for.
    pub(super) fn has_exiting(&self) -> bool {
        self.records.values().any(VmRecord::is_exiting)
    }

    /// Returns the pidfds of exiting VMs.
    pub(super) fn exiting_pidfds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let exiting = self.records.values().filter(|record| record.is_exiting());
        exiting.map(VmRecord::pidfd)
    }

    /// Returns whether a VM of a service is being, or about to be, served.
    pub(super) fn uses(&self, service: u64) -> bool {
        let mut of_service = self.records.values().filter(|vm| vm.service() == service);
        of_service.any(|record| record.is_connecting() || record.is_active())
    }

    /// Returns whether the supervisor can accept more connections; others wait in the kernel's
    /// queue.
    pub(super) fn has_capacity(&self) -> bool {
        let (mut connecting, mut closing) = (0, 0);
        for record in self.records.values() {
            connecting += usize::from(record.is_connecting());
            closing += usize::from(record.closing_since().is_some());
        }
        !policy::HANDSHAKES.is_reached_by(connecting) && !policy::CLOSING.is_reached_by(closing)
    }

    /// Returns whether a process has as many VMs as it may have. A process of another PID namespace
    /// has no PID here.
    pub(super) fn is_process_full(&self, pid: u32) -> bool {
        let of_process = self.records.values().filter(|record| record.pid() == pid);
        pid != 0 && policy::VMS_PER_PROCESS.is_reached_by(of_process.count())
    }

    /// Returns the handshakes that take too long, with the errors for refusing them.
    pub(super) fn overdue(&self) -> Vec<(u64, HandshakeError)> {
        let records = self.records.values();
        records
            .filter_map(|record| Some((record.id(), record.overdue()?)))
            .collect()
    }

    /// Updates the heartbeats. Returns whether the worker keeps a VM waiting, and counts that.
    pub(super) fn check_neglected(&mut self, stuck_after: Duration) -> bool {
        let mut is_stuck = false;
        for record in self.records.values_mut() {
            if record.check_neglected(stuck_after) {
                record.count_stuck(stuck_after);
                is_stuck = true;
            }
        }
        is_stuck
    }

    /// Returns the services of the VMs that the worker keeps waiting; if there is none, it hangs
    /// while it prefetches, and they are those that it reads for.
    pub(super) fn hung_services(&self) -> BTreeSet<u64> {
        let services = |of: fn(&VmRecord) -> bool| -> BTreeSet<u64> {
            let vms = self.records.values().filter(|vm| of(vm));
            vms.map(VmRecord::service).collect()
        };
        let stuck = services(VmRecord::is_stuck);
        if stuck.is_empty() {
            return services(VmRecord::is_reading);
        }
        stuck
    }

    /// Returns the services and layers of the frames that the worker reads for VMs of `services`.
    pub(super) fn layers_being_read(&self, services: &BTreeSet<u64>) -> BTreeSet<(u64, u16)> {
        let vms = self.records.values();
        let vms = vms.filter(|vm| services.contains(&vm.service()));
        vms.flat_map(|vm| {
            let frames = vm.decoding().into_iter();
            frames.map(|frame| (vm.service(), frame.layer))
        })
        .collect()
    }

    /// Returns the VMs on which one worker after another gets stuck.
    pub(super) fn stuck_repeatedly(&self, stuck_after: Duration) -> Vec<u64> {
        self.ids(|record| record.has_exhausted_workers(stuck_after))
    }

    /// Blames the frames that a worker was decoding when it died.
    pub(super) fn blame_frames(&mut self) {
        self.records.values_mut().for_each(VmRecord::blame_frames);
    }

    /// Prepares the VMs for another worker.
    pub(super) fn detach(&mut self) {
        self.records.values_mut().for_each(VmRecord::detach);
    }

    /// Kills a VM, whose record stays until its process has exited. Returns its label, and the
    /// error if it can't be killed.
    pub(super) fn kill(&mut self, mut record: VmRecord) -> (VmLabel, Result<(), Errno>) {
        let killed = record.kill();
        let label = record.label();
        self.insert(record);
        (label, killed)
    }

    /// Takes the VMs whose processes have exited.
    pub(super) fn take_exited(&mut self) -> Vec<VmRecord> {
        let exited = self.ids(VmRecord::has_exited).into_iter();
        exited.filter_map(|id| self.records.remove(&id)).collect()
    }

    /// Forgets refused connections whose descriptors are closed. If too many stay open, kills their
    /// peers, which closes descriptors of a file system that the peer itself serves. If they stay
    /// open even then, the supervisor accepts nobody until that program exits: VMs that are being
    /// served need descriptors and threads as well.
    pub(super) fn check_closing(&mut self) {
        self.records.retain(|_, record| !record.is_closed());
        let closing = self.records.values().filter_map(|record| {
            let since = record.closing_since()?;
            Some((record, since))
        });
        if !policy::CLOSING.is_reached_by(closing.clone().count()) {
            return;
        }
        for (record, since) in closing {
            if since.elapsed() >= policy::CLOSE_TIMEOUT {
                let _ = record.kill_process();
            }
        }
    }

    /// Stores every VM again, in a store that has nothing yet. Returns those that are not stored as
    /// a whole.
    pub(super) fn store_again(&self, fd_store: &mut FdStore) -> Vec<(VmLabel, PartlyStored)> {
        let mut failed = Vec::new();
        for record in self.records.values() {
            if let Err(partly) = record.store(fd_store) {
                failed.push((record.label(), partly));
            }
        }
        failed
    }
}
