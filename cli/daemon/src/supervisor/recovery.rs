//! Recovery: of VMs after the death of a supervisor, and of custody after the death of a guardian.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use snaprestore_engine::pager::SessionEnd;

use super::vm::{SnapshotRef, StoredVm, VmRecord, unknown_vm};
use super::{Outgoing, Supervisor};
use crate::error::Chain;
use crate::fd_store::systemd::Inherited;
use crate::fd_store::{FdStore, StoreEvent};

/// Stored descriptors by id, each with its role.
type Stored = BTreeMap<String, Vec<(String, OwnedFd)>>;

impl Supervisor {
    /// Recovers everything that an earlier supervisor has stored. Its worker died with it, or
    /// before this process was started.
    pub(super) fn recover_stored(&mut self, stored: Stored) {
        let (mut files, mut vms) = (Stored::new(), Vec::new());
        for (id, mut descriptors) in stored {
            let number = id.strip_prefix("vm-").and_then(|id| id.parse().ok());
            if let Some(number) = number {
                vms.push((number, descriptors));
            } else if !id.starts_with("socket-") {
                files.insert(id, descriptors);
            } else if let Some((_, socket)) = descriptors.pop() {
                self.services.inherit(id, socket);
            }
        }
        for (id, descriptors) in vms {
            self.vms.take_id(id);
            match StoredVm::recover(id, descriptors) {
                Ok(StoredVm::Whole(record, snapshot)) => {
                    let stored = files.remove(&*snapshot.file);
                    self.recover_vm(record, snapshot, stored);
                }
                Ok(StoredVm::Partial(record, why)) => {
                    self.drop_vm(record, SessionEnd::Killed(Chain(&why).to_string()));
                }
                Err(error) => {
                    let why = Chain(&error);
                    self.journal.vm_error(
                        &unknown_vm(id),
                        format_args!("cannot resume serving it: {why}"),
                    );
                }
            }
        }
        for id in files.into_keys() {
            if let Err(error) = self.fd_store.remove(&id) {
                self.log_not_removed(&id, &error);
            }
        }
    }

    fn recover_vm(
        &mut self,
        mut record: VmRecord,
        snapshot: SnapshotRef,
        stored: Option<Vec<(String, OwnedFd)>>,
    ) {
        let Some((service, is_new)) = self.services.recover(snapshot, stored) else {
            let why = "not all open files of its snapshot were held".to_owned();
            return self.drop_vm(record, SessionEnd::Killed(why));
        };
        if is_new {
            self.workers.queue_service(service, &self.services);
        }
        record.assign(service);
        if let Err(error) = record.open_page_map() {
            return self.drop_vm(record, SessionEnd::Killed(Chain(&error).to_string()));
        }
        let (id, label) = (record.id(), record.label());
        self.vms.insert(record);
        self.workers.queue(Outgoing::Vm(id));
        self.journal.vm_info(&label, "taken back from systemd");
    }

    /// Handles what has happened to the store.
    pub(super) fn handle_store_events(&mut self) {
        for event in self.fd_store.events() {
            match event {
                StoreEvent::NotStored { id, why } => self.journal.error(format_args!(
                    "cannot store {id}; it is lost if this process dies: {why}"
                )),
                StoreEvent::GuardianExited => self.replace_guardian(),
            }
        }
    }

    /// Starts another guardian, and stores everything again.
    fn replace_guardian(&mut self) {
        self.fd_store = FdStore::find(self.workers.program(), &Inherited::default());
        for (label, partly) in self.vms.store_again(&mut self.fd_store) {
            self.journal.vm_error(&label, partly);
        }
        for warning in self.services.store_again(&mut self.fd_store) {
            self.journal.error(warning);
        }
        self.journal.error(format_args!(
            "the guardian exited; its descriptors are now held by: {}",
            self.fd_store
        ));
        if let Some(warning) = self.fd_store.warning() {
            self.journal.error(warning);
        }
    }
}
