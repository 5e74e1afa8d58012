//! The supervisor's VMs: storing, recovering after a supervisor's death, and killing them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use snaprestore_engine::pager::AttachError;

use super::services::ServiceRecord;
use super::workers::Outgoing;
use super::{Stopping, Supervisor};
use crate::api::config::Service;
use crate::api::summary::{Ending, VmLabel, VmSummary};
use crate::fd_store::systemd;
use crate::fd_store::{FdStore, GuardianProgress, OWNER, StoreEvent};
use crate::ipc::Endings;
use crate::supervisor::listener::BoundSocket;
use crate::supervisor::vm::{ExitingVm, StoredVm, VmRecord, store_id};

impl Supervisor {
    /// Recovers everything that an earlier supervisor has stored. Its worker died with it, or
    /// before this process was started.
    pub(super) fn recover_stored(&mut self, held: BTreeMap<String, Vec<(String, OwnedFd)>>) {
        let (mut files, mut vms) = (BTreeMap::new(), Vec::new());
        for (id, mut descriptors) in held {
            let number = id.strip_prefix("vm-").and_then(|id| id.parse().ok());
            if let Some(number) = number {
                vms.push((number, descriptors));
            } else if !id.starts_with("socket-") {
                files.insert(id, descriptors);
            } else if let Some((_, socket)) = descriptors.pop()
                && let Some((path, listener)) = BoundSocket::inherit(socket, &id)
            {
                self.inherited.insert(path, (id, listener));
            }
        }
        for (id, descriptors) in vms {
            self.next.1 = self.next.1.max(id + 1);
            match StoredVm::recover(descriptors) {
                Ok(StoredVm::Whole { vm, service, file }) => {
                    self.recover_vm(id, *vm, (service, file), &mut files);
                }
                Ok(StoredVm::Partial { vm, why }) => self.drop_vm(id, vm, Ending::Killed, why),
                Err(error) => {
                    let label = self.label(id, 0, 0);
                    self.log_vm_error(&label, format_args!("cannot resume serving it: {error:#}"));
                }
            }
        }
        for id in files.into_keys() {
            self.remove_stored(&id);
        }
    }

    fn recover_vm(
        &mut self,
        id: u64,
        mut vm: VmRecord,
        (service, file): (Service, String),
        files: &mut BTreeMap<String, Vec<(String, OwnedFd)>>,
    ) {
        let pid = vm.peer.pid;
        // All VMs of one snapshot belong to one service.
        let known = self
            .services
            .iter()
            .find(|(_, record)| record.store_id == file);
        let key = match (known.map(|(key, _)| *key), files.remove(&file)) {
            (Some(key), _) => Some(key),
            (None, Some(mut fds)) => fds.pop().map(|(_, file_fd)| {
                let key = self.next.0;
                self.next.0 += 1;
                let record = ServiceRecord {
                    service,
                    file: file_fd,
                    store_id: file,
                    listener: None,
                    listener_store_id: None,
                    removed: true,
                    ended: Endings::new(),
                };
                self.services.insert(key, record);
                self.outgoing.push_back(Outgoing::Service(key));
                key
            }),
            (None, None) => None,
        };
        let Some(key) = key else {
            let why = "its snapshot's open file was not held".to_owned();
            return self.drop_vm(id, vm, Ending::Killed, why);
        };
        vm.service = key;
        if let Err(error) = vm.open_page_map() {
            let why = anyhow::Error::from(AttachError::PageMap(error));
            return self.drop_vm(id, vm, Ending::Killed, format!("{why:#}"));
        }
        self.vms.insert(id, vm);
        self.outgoing.push_back(Outgoing::Vm(id));
        self.log_vm(&self.label(id, key, pid), "taken back from systemd");
    }

    /// Stores a VM.
    pub(super) fn store_vm(&mut self, id: u64) {
        let Some(vm) = self.vms.get(&id) else { return };
        let Some(record) = self.services.get(&vm.service) else {
            return;
        };
        let fd_store = &mut self.fd_store;
        let held = vm.store(id, &record.service, &record.store_id, fd_store);
        if let Err(error) = held {
            self.store_owner_only(id, &error);
        }
    }

    /// Stores only the pidfd of a VM that can't be stored as a whole, so that the next supervisor
    /// kills it. Without the tables, it would not know which pages the VM has discarded.
    pub(super) fn store_owner_only(&mut self, id: u64, why: &anyhow::Error) {
        self.remove_stored_vm(id);
        let Some(vm) = self.vms.get(&id) else { return };
        let label = self.label(id, vm.service, vm.peer.pid);
        let owner = [(OWNER, vm.peer.pidfd.as_fd())];
        let owner = self.fd_store.store(&store_id(id), &label.service, &owner);
        let is = match owner {
            Ok(()) => "killed",
            Err(_) => "lost",
        };
        self.log_vm_error(
            &label,
            format_args!(
                "cannot store all of its descriptors; it is {is} if this process dies: {why:#}"
            ),
        );
    }

    /// Stores the pidfd of a peer that has connected, since the socket may already hold its memory.
    pub(super) fn store_owner(&mut self, id: u64, service: &str, owner: BorrowedFd<'_>) {
        // A failure is reported when the peer becomes a VM.
        let _ = self
            .fd_store
            .store(&store_id(id), service, &[(OWNER, owner)]);
    }

    /// Returns the label of VM number `id`.
    pub(super) fn label(&self, id: u64, service: u64, pid: u32) -> VmLabel {
        let record = self.services.get(&service);
        VmLabel {
            id,
            pid,
            service: record.map_or_else(|| "?".to_owned(), |record| record.service.name.clone()),
        }
    }

    /// Removes a VM from the store.
    pub(super) fn remove_stored_vm(&mut self, id: u64) {
        self.remove_stored(&store_id(id));
    }

    pub(super) fn remove_stored(&mut self, id: &str) {
        if let Err(error) = self.fd_store.remove(id) {
            self.log_error(format_args!("cannot release {id}: {error}"));
        }
    }

    pub(super) fn handle_store_events(&mut self) {
        for event in self.fd_store.events() {
            match event {
                StoreEvent::NotStored { id, why } => self.log_error(format_args!(
                    "cannot store {id}; it is lost if this process dies: {why}"
                )),
                StoreEvent::GuardianExited => {
                    self.fd_store =
                        FdStore::find(Path::new(&self.program), &systemd::Inherited::default());
                    let ids: Vec<u64> = self.vms.keys().copied().collect();
                    for id in ids {
                        self.store_vm(id);
                    }
                    for pending in &self.handshakes {
                        let record = self.services.get(&pending.service);
                        let service = record.map_or("", |record| &record.service.name);
                        let owner = [(OWNER, pending.peer.pidfd.as_fd())];
                        let _ = self.fd_store.store(&store_id(pending.id), service, &owner);
                    }
                    for (id, vm) in &self.exiting {
                        let _ = vm.store(*id, &mut self.fd_store);
                    }
                    let keys: Vec<u64> = self.services.keys().copied().collect();
                    for key in keys {
                        self.store_listener(key);
                    }
                    self.log_error(format_args!(
                        "the guardian exited; its descriptors are now held by: {}",
                        self.fd_store
                    ));
                    if let Some(warning) = self.fd_store.warning() {
                        self.log_error(warning);
                    }
                }
            }
        }
    }

    /// Sends the messages queued for the guardian.
    pub(super) fn flush_fd_store(&mut self) {
        match self.fd_store.send_queued() {
            Some(GuardianProgress::Lagging(count)) => self.log_error(format_args!(
                "{} is not reading: {count} messages are queued until it resumes; their VMs are lost if this process is \
                 killed before that",
                self.fd_store
            )),
            Some(GuardianProgress::CaughtUp) => self.log(format_args!(
                "{} has read all queued messages",
                self.fd_store
            )),
            None => {}
        }
    }

    /// Closes the descriptors of VMs whose processes have exited.
    pub(super) fn reap(&mut self) {
        let gone = self.exiting.iter().filter(|(_, vm)| vm.is_gone());
        let gone: Vec<u64> = gone.map(|(id, _)| *id).collect();
        for id in gone {
            self.exiting.remove(&id);
            self.remove_stored_vm(id);
        }
    }

    /// Kills every VM, since nobody will serve it.
    pub(super) fn kill_all(&mut self, why: &str) {
        for pending in std::mem::take(&mut self.handshakes) {
            // The VM may have sent all of its memory, and would wait for it.
            let (id, service) = (pending.id, pending.service);
            self.drop_vm(id, pending, Ending::Killed, why.to_owned());
            self.drop_service_if_unused(service);
        }
        for (id, vm) in std::mem::take(&mut self.vms) {
            let service = vm.service;
            self.drop_vm(id, vm, Ending::Killed, why.to_owned());
            self.drop_service_if_unused(service);
        }
    }

    /// Kills a VM that is not, or no longer, being served, and reports it.
    pub(super) fn drop_vm(
        &mut self,
        id: u64,
        vm: impl Into<ExitingVm>,
        ending: Ending,
        why: String,
    ) {
        let vm = vm.into();
        let (service, connected) = (vm.service, vm.connected);
        if self.stopping != Stopping::No && ending == Ending::Killed {
            self.incomplete += 1;
        }
        let label = self.kill_vm(id, vm);
        let told = self.record_end(service, connected, VmSummary::new(label, ending, Some(why)));
        self.outgoing.push_back(Outgoing::VmEnded(told));
    }

    /// Kills a VM without reporting it. Returns its label.
    pub(super) fn kill_vm(&mut self, id: u64, vm: impl Into<ExitingVm>) -> VmLabel {
        let vm = vm.into();
        let killed = vm.kill();
        let label = self.await_exit(id, vm);
        if let Err(errno) = killed {
            self.log_vm_error(
                &label,
                format_args!(
                    "cannot kill it ({errno}): it will block for ever at its next missing page; kill it"
                ),
            );
        }
        label
    }

    /// Keeps the descriptors of a VM until its process has exited. Returns its label.
    pub(super) fn await_exit(&mut self, id: u64, vm: impl Into<ExitingVm>) -> VmLabel {
        let mut vm = vm.into();
        let mut label = self.label(id, vm.service, vm.pid);
        if vm.service_name.is_empty() {
            vm.service_name.clone_from(&label.service);
        } else {
            label.service.clone_from(&vm.service_name);
        }
        self.exiting.insert(id, vm);
        label
    }
}
