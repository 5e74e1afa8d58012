//! From a connection to a VM, and to its end.

use std::fmt::Display;
use std::time::Instant;

use snaprestore_engine::pager::SessionEnd;
use snaprestore_engine::pager::firecracker::HandshakeError;
use snapshot_format::names::escape_path;

use super::listener::BoundSocket;
use super::services::{Accepted, AddServiceError, AdmitError, StoredSocket};
use super::snapshot_files::SnapshotFiles;
use super::vm::{PartlyStored, VmRecord};
use super::{Outgoing, Stopping, Supervisor};
use crate::api::config::Service;
use crate::api::summary::{VmLabel, VmSummary};
use crate::api::types::{RequestError, VmState, VmStatus};
use crate::error::Chain;
use crate::fd_store::StoreError;
use crate::policy;

impl Supervisor {
    /// Adds a service whose snapshot is open.
    pub(super) fn add_opened(
        &mut self,
        service: Service,
        files: SnapshotFiles,
    ) -> Result<(), AddServiceError> {
        // Another service may have been added meanwhile.
        self.services.check_addable(&service)?;
        let socket = self.listen(&service)?;
        let layers = match files.ancestor_names().len() {
            0 => String::new(),
            ancestors => format!(" ({} layers)", ancestors + 1),
        };
        self.journal.info(format_args!(
            "serving {}{layers} at {}",
            escape_path(&service.snapshot),
            escape_path(&service.socket)
        ));
        let (key, warnings) = self
            .services
            .insert(service, files, socket, &mut self.fd_store);
        for warning in warnings {
            self.journal.error(warning);
        }
        self.workers.queue_service(key, &self.services);
        Ok(())
    }

    /// Listens on the socket of a service. Uses an inherited socket of the same path if there is
    /// one, since VMs may wait on it.
    fn listen(&mut self, service: &Service) -> Result<BoundSocket, AddServiceError> {
        if let Some(inherited) = self.services.take_inherited(&service.socket) {
            if inherited.is_current() {
                service.share_socket().map_err(super::ListenError::from)?;
                return Ok(inherited.socket);
            }
            self.kill_backlog(&inherited, &service.name, &service.allow_uid);
        }
        let socket = BoundSocket::bind_with(&service.socket, || service.share_socket());
        Ok(socket?)
    }

    /// Adds the services whose snapshots are open by now, and replies to their operators.
    pub(super) fn add_services_opened(&mut self) {
        for opened in self.services.take_opened(self.options.stuck_after) {
            let result = match opened.result {
                _ if self.stopping != Stopping::No => Err(AddServiceError::ShuttingDown),
                Ok((service, files)) => self.add_opened(service, files),
                Err(error) => Err(error),
            };
            self.workers
                .reply(opened.number, result.map_err(RequestError::from));
        }
    }

    /// Removes the service of this name: it accepts no more VMs.
    pub(super) fn remove_service(&mut self, name: &str) -> Result<(), RequestError> {
        let key = self.services.mark_removed(name);
        let key = key.ok_or_else(|| RequestError::no_service(name))?;
        self.close_service(key);
        self.drop_service_if_unused(key);
        Ok(())
    }

    /// Stops listening for a service, and accepts the VMs that have connected already.
    pub(super) fn close_service(&mut self, key: u64) {
        self.services.refuse_connections(key);
        let most = self.vms.connecting().len() + policy::HANDSHAKES.count();
        // Refused peers don't prevent those behind them from being accepted.
        while self.vms.connecting().len() < most && self.accept(key) {}
        if let Some((service, socket)) = self.services.take_listener(key) {
            self.kill_backlog(&socket, &service.name, &service.allow_uid);
        }
    }

    /// Drops a service that was removed, once its last VM has ended.
    pub(super) fn drop_service_if_unused(&mut self, key: u64) {
        let is_used = self.vms.uses(key) || self.workers.is_hung(key);
        if self.services.is_removed(key) && !is_used {
            self.services.drop(key, &mut self.fd_store);
            self.workers.queue(Outgoing::RemoveService(key));
        }
    }

    /// Kills the peers that wait to be accepted at a socket that nobody will accept from, and
    /// removes the socket from the store.
    pub(super) fn kill_backlog(&mut self, socket: &StoredSocket, service: &str, allowed: &[u32]) {
        let log = |what| self.journal.error(what);
        for peer in socket.socket.kill_backlog(service, allowed, log) {
            let id = self.vms.next_id();
            let record = VmRecord::killed_in_backlog(id, service, peer, &mut self.fd_store);
            self.vms.insert(record);
        }
        if let Some(id) = &socket.id
            && let Err(error) = self.fd_store.remove(id)
        {
            self.log_not_removed(id, &error);
        }
    }

    /// Accepts one connection. Returns whether there was one.
    pub(super) fn accept(&mut self, key: u64) -> bool {
        let accepted = match self.services.accept(key) {
            Ok(Some(accepted)) => accepted,
            Ok(None) => return false,
            Err(error) => {
                self.accept_failed(&error);
                return false;
            }
        };
        let id = self.vms.next_id();
        let label = VmLabel {
            id,
            pid: accepted.pid,
            service: accepted.snapshot.service.name.clone(),
        };
        match self.admit(id, key, accepted) {
            Ok(record) => self.vms.insert(record),
            Err(error) => {
                self.count_ended(key, VmState::Refused);
                let why = Chain(&error);
                self.journal.refusal(&label, format_args!("refused: {why}"));
            }
        }
        true
    }

    /// Begins the handshake with a peer, if it is admitted.
    fn admit(&mut self, id: u64, key: u64, accepted: Accepted) -> Result<VmRecord, AdmitError> {
        let peer = accepted.peer?;
        if self.vms.is_process_full(peer.pid) {
            let max = policy::VMS_PER_PROCESS.count();
            return Err(AdmitError::ProcessFull { max });
        }
        let (service, stream) = ((key, accepted.snapshot), accepted.stream);
        VmRecord::accept(id, service, peer, stream, &mut self.fd_store)
            .map_err(AdmitError::Handshake)
    }

    /// Reads the next part of a handshake.
    pub(super) fn read_handshake(&mut self, id: u64) {
        let Some(record) = self.vms.get_mut(id) else {
            return;
        };
        let handshake = match record.read_handshake() {
            Ok(Some(handshake)) => handshake,
            Ok(None) => return,
            Err(error) => return self.refuse(id, &error),
        };
        let stored = record.hand_over(handshake, &mut self.fd_store);
        let (label, service) = (record.label(), record.service());
        let refusal = match &stored {
            Err(error) => Some(Chain(error).to_string()),
            Ok(_) if self.workers.is_hung(service) => Some(
                "cannot read its snapshot: a worker hangs reading it and cannot be killed"
                    .to_owned(),
            ),
            Ok(_) => None,
        };
        if let Some(why) = refusal {
            return self.drop_active(id, SessionEnd::Refused(why));
        }
        if let Ok(Err(partly)) = stored {
            self.journal.vm_error(&label, partly);
        }
        self.workers.queue(Outgoing::Vm(id));
    }

    /// Refuses a handshake.
    pub(super) fn refuse(&mut self, id: u64, error: &HandshakeError) {
        let Some(record) = self.vms.get_mut(id) else {
            return;
        };
        let removed = record.refuse(&mut self.fd_store);
        let (label, service) = (record.label(), record.service());
        if let Err(error) = removed {
            self.log_not_removed(&label, &error);
        }
        self.count_ended(service, VmState::Refused);
        let why = Chain(error).to_string();
        let summary = VmSummary::new(label, SessionEnd::Refused(why));
        self.journal.record_refusal(summary);
        self.drop_service_if_unused(service);
    }

    /// Logs that a VM is not stored as a whole.
    pub(super) fn log_partly_stored(&self, label: &VmLabel, stored: Result<(), PartlyStored>) {
        if let Err(partly) = stored {
            self.journal.vm_error(label, partly);
        }
    }

    /// Logs that descriptors are still stored that are not needed any more.
    pub(super) fn log_not_removed(&self, what: impl Display, error: &StoreError) {
        let journal = &self.journal;
        journal.error(format_args!("cannot release {what}: {error}"));
    }

    /// Kills every VM, since nobody will serve it.
    pub(super) fn kill_all(&mut self, why: &str) {
        // A VM that is connecting may have sent all of its memory, and would wait for it.
        for id in [self.vms.connecting(), self.vms.active()].concat() {
            self.drop_active(id, SessionEnd::Killed(why.to_owned()));
        }
    }

    /// Kills a VM that is connecting or active, reports it, and drops its service if that was
    /// removed.
    pub(super) fn drop_active(&mut self, id: u64, end: SessionEnd) {
        let Some(record) = self.vms.remove(id) else {
            return;
        };
        let service = record.service();
        self.drop_vm(record, end);
        self.drop_service_if_unused(service);
    }

    /// Kills a VM that is not, or no longer, being served, and reports it.
    pub(super) fn drop_vm(&mut self, record: VmRecord, end: SessionEnd) {
        let (service, connected) = (record.service(), record.connected());
        if self.stopping != Stopping::No && matches!(end, SessionEnd::Killed(_)) {
            self.journal.count_incomplete();
        }
        let label = self.kill_vm(record);
        let status = self.record_end(service, connected, VmSummary::new(label, end));
        self.workers.queue(Outgoing::VmEnded(status));
    }

    /// Kills a VM without reporting it. Returns its label.
    pub(super) fn kill_vm(&mut self, record: VmRecord) -> VmLabel {
        let (label, killed) = self.vms.kill(record);
        if let Err(errno) = killed {
            self.journal.vm_error(
                &label,
                format_args!(
                    "cannot kill it ({errno}): it will block forever at its next missing page; kill it"
                ),
            );
        }
        label
    }

    /// Counts an ended VM, or a refused connection, of a service.
    fn count_ended(&mut self, service: u64, state: VmState) {
        self.services.count_ended(service, state);
        self.journal.count_ended(state);
    }

    /// Logs how a VM of a service ended, and counts it. Returns its status for operators.
    pub(super) fn record_end(
        &mut self,
        service: u64,
        connected: Instant,
        summary: VmSummary,
    ) -> VmStatus {
        self.count_ended(service, (&summary.end).into());
        self.journal.record_end(connected, summary)
    }

    /// Closes the descriptors of VMs whose processes have exited.
    pub(super) fn reap(&mut self) {
        for record in self.vms.take_exited() {
            let label = record.label();
            if let Err(error) = record.release_exited(&mut self.fd_store) {
                self.log_not_removed(&label, &error);
            }
        }
    }
}
