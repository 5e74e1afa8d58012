//! Workers that get stuck: on a disk that doesn't answer, in a lock, or because somebody stopped them.
//!
//! ```text
//!   a VM waits for --stuck-after          the worker is killed
//!     it is gone                          another goes on with all VMs; a frame on which two got stuck counts as
//!                                         damaged; a VM for which three got stuck in a row is ended
//!     it isn't, for --stuck-after more    every VM is ended, since no other worker may read what is theirs; another
//!                                         serves those that come, but not from the snapshots that this one waits for
//!       it is gone at last                those snapshots are served again
//! ```
//!
//! A process that is killed in an uninterruptible wait, as for a network file system, ends when that wait does. Until
//! then the kernel may be reading a message for it.

use std::collections::BTreeSet;
use std::mem;

use anyhow::Result;

use super::{Keeper, Stopping};
use crate::api::summary::Ending;
use crate::supervisor::vm::Vm;
use crate::supervisor::worker_process::{Death, Worker};
use snapshot_format::names::escape_path;

/// A worker that was killed and doesn't end.
#[derive(Debug)]
pub(super) struct Undead {
    worker: Worker,
    /// Services whose snapshots it waits for.
    hung: BTreeSet<u64>,
}

impl Keeper {
    /// Kills a worker that keeps a VM waiting, and gives it up if it doesn't end.
    pub(super) fn watch_worker(&mut self) -> Result<()> {
        self.watch_undead();
        let patience = self.options.stuck_after;
        if let Some(killed) = self.worker.killed() {
            if killed.elapsed() >= patience && self.stopping != Stopping::Kills {
                return self.give_up_worker();
            }
            return Ok(());
        }
        let mut stuck = self.worker.version.is_none() && self.worker.started.elapsed() >= patience;
        for vm in self.vms.values_mut() {
            if vm.is_neglected(patience) {
                vm.count_stuck(patience);
                stuck = true;
            }
        }
        if stuck {
            self.worker.kill_stuck();
        }
        Ok(())
    }

    /// Ends VMs for which one worker after another gets stuck.
    pub(super) fn end_hopeless(&mut self) {
        let hopeless = self.vms.iter().filter(|(_, vm)| vm.is_hopeless());
        let hopeless: Vec<u64> = hopeless.map(|(id, _)| *id).collect();
        for id in hopeless {
            let Some(vm) = self.vms.remove(&id) else {
                continue;
            };
            let service = vm.service;
            let what = self.snapshots(&BTreeSet::from([service]));
            let why =
                format!("{what}: one worker after another got stuck while it waited for a page");
            self.end(id, vm, Ending::Killed, why);
            self.forget_if_unused(service);
        }
    }

    /// The worker was killed, and is still there: all that it had is ended, and another begins.
    fn give_up_worker(&mut self) -> Result<()> {
        self.listen_to_worker()?;
        let services = |of: fn(&Vm) -> bool| -> BTreeSet<u64> {
            let vms = self.vms.values().filter(|vm| of(vm));
            vms.map(|vm| vm.service).collect()
        };
        let mut hung = services(Vm::is_stuck);
        if hung.is_empty() {
            // It was killed for another reason, and what it fetched ahead is not there.
            hung = services(Vm::is_reading);
        }
        let why = format!(
            "its worker can't be killed while it waits for {}: {}",
            self.snapshots(&hung),
            self.worker.waits_for()
        );
        let mut ended = Vec::new();
        for (id, vm) in mem::take(&mut self.vms) {
            ended.push(vm.service);
            self.end(id, vm, Ending::Killed, why.clone());
        }
        let death = Death {
            how: "can't be killed".to_owned(),
            of_itself: true,
            stuck: true,
        };
        let next = self.next_worker(&death)?;
        let worker = mem::replace(&mut self.worker, next);
        self.undead.push(Undead { worker, hung });
        for service in ended {
            self.forget_if_unused(service);
        }
        self.introduce_worker();
        Ok(())
    }

    /// Looks whether workers that did not end have.
    fn watch_undead(&mut self) {
        let ended: Vec<_> = self
            .undead
            .extract_if(.., |undead| undead.worker.is_gone())
            .collect();
        for Undead { hung, .. } in ended {
            let what = self.snapshots(&hung);
            self.say(format_args!("{what}: answers again, and is served"));
            for service in hung {
                self.forget_if_unused(service);
            }
        }
    }

    /// Whether a worker waits for the snapshot of a service and can't be killed: nobody else is to begin.
    pub(super) fn is_hung(&self, service: u64) -> bool {
        self.undead
            .iter()
            .any(|undead| undead.hung.contains(&service))
    }

    fn snapshots(&self, services: &BTreeSet<u64>) -> String {
        let known = services.iter().filter_map(|key| self.services.get(key));
        let paths: BTreeSet<_> = known
            .map(|open| escape_path(&open.service.snapshot))
            .collect();
        let paths: Vec<_> = paths.into_iter().collect();
        if paths.is_empty() {
            return "something that doesn't answer".to_owned();
        }
        paths.join(", ")
    }
}
