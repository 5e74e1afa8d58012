//! Handling of stuck workers: on a disk that doesn't answer, in a lock, or stopped by a signal.
//!
//! ```text
//!   a VM waits for --stuck-after          the worker is killed
//!     it exits                            another serves all VMs; a frame on which two got stuck
//!                                         is quarantined; a VM for which three got stuck in a row
//!                                         is killed
//!     it doesn't, for --stuck-after more  every VM is killed, since no other worker may read its
//!                                         messages; another worker serves new VMs, but not from
//!                                         the snapshots that this one waits for
//!       it exits at last                  those snapshots are served again
//! ```
//!
//! A process killed in an uninterruptible wait, such as for a network file system, exits when that
//! wait ends. Until then the kernel may be reading a message for it.

use std::collections::BTreeSet;
use std::mem;

use anyhow::Result;
use snapshot_format::names::escape_path;

use super::{Stopping, Supervisor};
use crate::api::summary::Ending;
use crate::supervisor::vm::VmRecord;
use crate::supervisor::worker_process::{ExitCause, WorkerProcess};

/// A worker that was killed and doesn't exit.
#[derive(Debug)]
pub(super) struct UnkillableWorker {
    worker: WorkerProcess,
    /// Services whose snapshots the worker waits for.
    hung: BTreeSet<u64>,
}

impl Supervisor {
    /// Kills a worker that keeps a VM waiting, and abandons it if it doesn't exit.
    pub(super) fn check_worker(&mut self) -> Result<()> {
        self.check_unkillable();
        let timeout = self.options.stuck_after;
        if let Some(killed) = self.worker.killed() {
            if killed.elapsed() >= timeout && self.stopping != Stopping::Killing {
                return self.abandon_worker();
            }
            return Ok(());
        }
        let mut stuck = self.worker.version.is_none() && self.worker.started.elapsed() >= timeout;
        for vm in self.vms.values_mut() {
            if vm.check_neglected(timeout) {
                vm.count_stuck(timeout);
                stuck = true;
            }
        }
        if stuck {
            self.worker.kill_stuck();
        }
        Ok(())
    }

    /// Kills VMs on which one worker after another gets stuck.
    pub(super) fn kill_vms_without_workers(&mut self) {
        let hopeless = self.vms.iter().filter(|(_, vm)| vm.has_exhausted_workers());
        let hopeless: Vec<u64> = hopeless.map(|(id, _)| *id).collect();
        for id in hopeless {
            let Some(vm) = self.vms.remove(&id) else {
                continue;
            };
            let service = vm.service;
            let what = self.snapshots(&BTreeSet::from([service]));
            let why =
                format!("{what}: several workers in a row hung while the VM waited for a page");
            self.drop_vm(id, vm, Ending::Killed, why);
            self.drop_service_if_unused(service);
        }
    }

    /// Abandons a worker that was killed and doesn't exit: kills all its VMs, and starts another
    /// worker.
    fn abandon_worker(&mut self) -> Result<()> {
        self.read_worker()?;
        let services = |of: fn(&VmRecord) -> bool| -> BTreeSet<u64> {
            let vms = self.vms.values().filter(|vm| of(vm));
            vms.map(|vm| vm.service).collect()
        };
        let mut hung = services(VmRecord::is_stuck);
        if hung.is_empty() {
            // The worker was killed for another reason, and hangs while it prefetches.
            hung = services(VmRecord::is_reading);
        }
        let why = format!(
            "its worker hangs reading {} and cannot be killed: {}",
            self.snapshots(&hung),
            self.worker.blocked_in()
        );
        let mut ended = Vec::new();
        for (id, vm) in mem::take(&mut self.vms) {
            ended.push(vm.service);
            self.drop_vm(id, vm, Ending::Killed, why.clone());
        }
        let death = ExitCause {
            description: "can't be killed".to_owned(),
            is_own_fault: true,
            stuck: true,
        };
        let next = self.next_worker(&death)?;
        let worker = mem::replace(&mut self.worker, next);
        self.unkillable.push(UnkillableWorker { worker, hung });
        for service in ended {
            self.drop_service_if_unused(service);
        }
        self.brief_worker();
        Ok(())
    }

    /// Checks whether abandoned workers have exited.
    fn check_unkillable(&mut self) {
        let ended: Vec<_> = self
            .unkillable
            .extract_if(.., |unkillable| unkillable.worker.is_gone())
            .collect();
        for UnkillableWorker { hung, .. } in ended {
            let what = self.snapshots(&hung);
            self.log(format_args!("{what}: readable again; new VMs are served"));
            for service in hung {
                self.drop_service_if_unused(service);
            }
        }
    }

    /// Whether an unkillable worker waits for the snapshot of a service; no new VM must be served
    /// from it.
    pub(super) fn is_hung(&self, service: u64) -> bool {
        self.unkillable
            .iter()
            .any(|unkillable| unkillable.hung.contains(&service))
    }

    fn snapshots(&self, services: &BTreeSet<u64>) -> String {
        let known = services.iter().filter_map(|key| self.services.get(key));
        let paths: BTreeSet<_> = known
            .map(|record| escape_path(&record.service.snapshot))
            .collect();
        let paths: Vec<_> = paths.into_iter().collect();
        if paths.is_empty() {
            return "an unknown file".to_owned();
        }
        paths.join(", ")
    }
}
