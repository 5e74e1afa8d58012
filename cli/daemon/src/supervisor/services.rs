//! Services: their sockets, the admission of peers, and handshakes.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use snaprestore_engine::pager::AttachError;
use snaprestore_engine::pager::firecracker::{Handshake, HandshakeError};
use snaprestore_uffd::os::{Peer, credentials_of, kill_by_pidfd, peer_of};
use snaprestore_uffd::uffd::Closing;
use snapshot_format::names::escape_path;
use snapshot_format::{FileStore, Snapshot};

use super::workers::Outgoing;
use super::{Stopping, Supervisor};
use crate::api::config::{MetricsAddress, Service};
use crate::api::summary::{Ending, VmSummary};
use crate::api::types::RequestError;
use crate::ipc::{Endings, Endpoint};
use crate::supervisor::handshake::{self, PendingHandshake};
use crate::supervisor::listener::BoundSocket;
use crate::supervisor::vm::{ExitingVm, VmRecord};

/// Maximum number of VMs and handshakes of one process. One is usual; the limit reserves places for
/// other processes.
const MAX_PER_PROCESS: usize = 16;

/// Maximum number of refused connections with descriptors that are not closed yet.
const MAX_CLOSING: usize = 64;
/// Time in which the kernel closes such descriptors, unless their peer delays it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A refused connection whose descriptors may still be open.
#[derive(Debug)]
pub(super) struct ClosingConnection {
    peer: Peer,
    closing: Closing,
    since: Instant,
}

/// A service with its snapshot open.
pub(super) struct ServiceRecord {
    pub(super) service: Service,
    pub(super) file: OwnedFd,
    /// The id under which the file is stored.
    pub(super) store_id: String,
    pub(super) listener: Option<BoundSocket>,
    /// The id under which the listening socket is stored.
    pub(super) listener_store_id: Option<String>,
    /// Whether the service was removed; it is dropped with its last VM.
    pub(super) removed: bool,
    /// Counts of ended VMs.
    pub(super) ended: Endings,
}

/// A service being added by an operator, whose snapshot is not open yet.
#[derive(Debug)]
pub(super) struct OpeningService {
    /// The number of the operator's request.
    number: u64,
    service: Service,
    opened: Receiver<Result<OwnedFd>>,
    since: Instant,
}

impl Supervisor {
    /// Accepts clients at `address`.
    pub fn open(&mut self, endpoint: Endpoint, address: &MetricsAddress) -> Result<()> {
        let listener = match (endpoint, address) {
            (Endpoint::Control, MetricsAddress::Socket(path)) => BoundSocket::private(path)?,
            _ => BoundSocket::metrics(address)?,
        };
        self.endpoints.push((endpoint, listener));
        Ok(())
    }

    /// Starts listening for the VMs of a service.
    pub fn add(&mut self, service: Service) -> Result<()> {
        self.check_addable(&service)?;
        let timeout = self.options.stuck_after;
        let opened = start_opening(&service.snapshot)?;
        let file = opened.recv_timeout(timeout);
        let file = file.map_err(|_| timed_out(&service.snapshot, timeout))?;
        self.add_opened(service, file?)
    }

    /// Starts to add a service for an operator, and replies when its snapshot is open: a disk that
    /// doesn't answer must not block the supervisor.
    pub(super) fn start_adding(&mut self, number: u64, service: Service) -> Result<()> {
        self.check_addable(&service)?;
        self.opening.push(OpeningService {
            number,
            opened: start_opening(&service.snapshot)?,
            service,
            since: Instant::now(),
        });
        Ok(())
    }

    /// Adds the services whose snapshots are open by now, and replies to their operators.
    pub(super) fn check_opening(&mut self) {
        let timeout = self.options.stuck_after;
        for opening in std::mem::take(&mut self.opening) {
            let opened = opening.opened.try_recv();
            let result = match opened {
                _ if self.stopping != Stopping::No => Err(anyhow!("the daemon is shutting down")),
                Ok(file) => file.and_then(|file| self.add_opened(opening.service, file)),
                Err(TryRecvError::Empty) if opening.since.elapsed() < timeout => {
                    self.opening.push(opening);
                    continue;
                }
                Err(_) => Err(timed_out(&opening.service.snapshot, timeout)),
            };
            self.reply(opening.number, result);
        }
    }

    fn check_addable(&self, service: &Service) -> Result<()> {
        for record in self.services.values().filter(|record| !record.removed) {
            let (other, path) = (&record.service, escape_path(&service.socket));
            if other.name == service.name {
                bail!("service {:?} already exists", service.name);
            }
            if other.socket == service.socket && record.listener.is_some() {
                bail!("service {:?} already listens on {path}", other.name);
            }
        }
        Ok(())
    }

    fn add_opened(&mut self, service: Service, file: OwnedFd) -> Result<()> {
        // Another service may have been added meanwhile.
        self.check_addable(&service)?;
        let listener = self.listen(&service)?;
        let key = self.next.0;
        self.next.0 += 1;
        self.log(format_args!(
            "serving {} at {}",
            escape_path(&service.snapshot),
            escape_path(&service.socket)
        ));
        let store_id = format!("file-{}-{key}", std::process::id());
        let fds = [("snapshot", file.as_fd())];
        if let Err(error) = self.fd_store.store(&store_id, &service.name, &fds) {
            self.log_error(format_args!(
                "cannot store a snapshot's descriptor; its VMs are lost if this process dies: {error}"
            ));
        }
        let record = ServiceRecord {
            service,
            file,
            store_id,
            listener_store_id: listener.store_id(),
            listener: Some(listener),
            removed: false,
            ended: Endings::new(),
        };
        self.services.insert(key, record);
        self.store_listener(key);
        self.outgoing.push_back(Outgoing::Service(key));
        Ok(())
    }

    /// Listens on the socket of a service. Uses an inherited socket of the same path if there is
    /// one, since VMs may wait on it.
    fn listen(&mut self, service: &Service) -> Result<BoundSocket> {
        if let Some((id, listener)) = self.inherited.remove(&service.socket) {
            if listener.store_id().as_ref() == Some(&id) {
                service.share_socket()?;
                return Ok(listener);
            }
            self.kill_backlog(&id, &listener, &service.name, &service.allow_uid);
        }
        BoundSocket::bind_with(&service.socket, || service.share_socket())
    }

    /// Stores the listening socket of a service.
    pub(super) fn store_listener(&mut self, key: u64) {
        let Some(record) = self.services.get(&key) else {
            return;
        };
        if let (Some(id), Some(listener)) = (&record.listener_store_id, &record.listener) {
            let allowed = &record.service.allow_uid;
            let (name, fd) = (&record.service.name, listener.as_fd());
            let held = self.fd_store.store_listener(id, name, fd, allowed);
            if let Err(error) = held {
                self.log_error(format_args!(
                    "cannot store a socket; VMMs that wait there are lost if this process dies: {error}"
                ));
            }
        }
    }

    /// Stops listening for a service, and accepts the VMs that have connected already.
    pub(super) fn close(&mut self, key: u64) {
        let record = self.services.get_mut(&key);
        if let Some(listener) = record.and_then(|record| record.listener.as_mut()) {
            listener.close();
        }
        let most = self.handshakes.len() + handshake::MAX_PENDING;
        // Refused peers don't prevent those behind them from being accepted.
        while self.handshakes.len() < most && self.accept(key) {}
        let Some(record) = self.services.get_mut(&key) else {
            return;
        };
        let (name, allowed) = (
            record.service.name.clone(),
            record.service.allow_uid.clone(),
        );
        let store_id = record.listener_store_id.take().unwrap_or_default();
        if let Some(listener) = record.listener.take() {
            self.kill_backlog(&store_id, &listener, &name, &allowed);
        }
    }

    /// Kills the VMs that wait on inherited sockets that no service uses any more.
    pub(super) fn kill_inherited_backlogs(&mut self) {
        for (id, listener) in std::mem::take(&mut self.inherited).into_values() {
            self.kill_backlog(&id, &listener, "?", &[]);
        }
    }

    fn kill_backlog(
        &mut self,
        store_id: &str,
        listener: &BoundSocket,
        service: &str,
        allowed: &[u32],
    ) {
        for peer in listener.kill_backlog(service, allowed, |what| self.log_error(what)) {
            let id = self.next.1;
            self.next.1 += 1;
            self.store_owner(id, service, peer.peer.pidfd.as_fd());
            let mut vm = ExitingVm::from(peer);
            service.clone_into(&mut vm.service_name);
            self.await_exit(id, vm);
        }
        self.remove_stored(store_id);
    }

    pub(super) fn remove(&mut self, name: &str) -> Result<(), String> {
        let mut found = self.services.iter_mut();
        let named = found.find(|(_, record)| record.service.name == name && !record.removed);
        let Some((key, record)) = named else {
            return Err(RequestError::no_service(name).text);
        };
        let key = *key;
        record.removed = true;
        self.close(key);
        self.drop_service_if_unused(key);
        Ok(())
    }

    /// Counts an ended VM of a service.
    pub(super) fn count_ended(&mut self, key: u64, ending: Ending) {
        *self.ended.entry(ending).or_default() += 1;
        if let Some(record) = self.services.get_mut(&key) {
            *record.ended.entry(ending).or_default() += 1;
        }
    }

    /// Drops a service that was removed, once its last VM has ended.
    pub(super) fn drop_service_if_unused(&mut self, key: u64) {
        let is_removed = self.services.get(&key).is_some_and(|record| record.removed);
        let is_used = self.vms.values().any(|vm| vm.service == key)
            || self.handshakes.iter().any(|pending| pending.service == key)
            || self.is_hung(key);
        if is_removed && !is_used {
            self.drop_service(key);
        }
    }

    fn drop_service(&mut self, key: u64) {
        if let Some(record) = self.services.remove(&key) {
            // If this fails, systemd drops it when the service stops.
            let _ = self.fd_store.remove(&record.store_id);
        }
        self.outgoing.push_back(Outgoing::RemoveService(key));
    }

    /// Accepts one connection. Returns whether there was one.
    pub(super) fn accept(&mut self, key: u64) -> bool {
        let Some(record) = self.services.get(&key) else {
            return false;
        };
        let accepted = record.listener.as_ref().map(BoundSocket::accept);
        let stream = match accepted {
            Some(Ok(Some(stream))) => UnixStream::from(stream),
            Some(Err(error)) => {
                self.accept_failed(&error);
                return false;
            }
            Some(Ok(None)) | None => return false,
        };
        let timeout = Duration::from_secs(record.service.handshake_timeout);
        let name = record.service.name.clone();
        let id = self.next.1;
        self.next.1 += 1;
        let pid = credentials_of(stream.as_fd()).map_or(0, |(pid, _)| pid);
        let pending = admit(record, &stream).and_then(|peer| {
            self.check_process_limit(&peer)?;
            self.store_owner(id, &name, peer.pidfd.as_fd());
            PendingHandshake::new(id, key, stream, peer, timeout)
                .context("cannot prepare the handshake")
        });
        match pending {
            Ok(pending) => self.handshakes.push(pending),
            Err(error) => {
                self.remove_stored_vm(id);
                self.count_ended(key, Ending::Refused);
                let label = self.label(id, key, pid);
                self.log_refusal(&label, format_args!("refused: {error:#}"));
            }
        }
        true
    }

    /// Whether the supervisor can accept more connections; others wait in the kernel's queue.
    pub(super) fn has_capacity(&self) -> bool {
        self.handshakes.len() < handshake::MAX_PENDING && self.closing.len() < MAX_CLOSING
    }

    /// Forgets refused connections whose descriptors are closed. If too many stay open, kills their
    /// peers, which closes descriptors of a file system that the peer itself serves. If they stay
    /// open even then, the supervisor accepts nobody until that program exits: VMs that are being
    /// served need descriptors and threads as well.
    pub(super) fn check_closing(&mut self) {
        self.closing
            .retain(|connection| connection.closing.is_open());
        if self.closing.len() < MAX_CLOSING {
            return;
        }
        for ClosingConnection { peer, since, .. } in &self.closing {
            if since.elapsed() >= CLOSE_TIMEOUT {
                let _ = kill_by_pidfd(peer.pidfd.as_fd());
            }
        }
    }

    /// Checks the limit of VMs per process. A process of another PID namespace has no PID here.
    fn check_process_limit(&self, peer: &Peer) -> Result<()> {
        let pid = peer.pid;
        let pending = self.handshakes.iter().map(|pending| pending.peer.pid);
        let served = self.vms.values().map(|vm| vm.peer.pid);
        let exiting = self.exiting.values().map(|vm| vm.pid);
        let closing = self.closing.iter().map(|closing| closing.peer.pid);
        let peers = pending.chain(served).chain(exiting).chain(closing);
        if pid != 0 && peers.filter(|peer| *peer == pid).count() >= MAX_PER_PROCESS {
            bail!("its process already has {MAX_PER_PROCESS} VMs, the maximum");
        }
        Ok(())
    }

    /// Reads the next part of a handshake.
    pub(super) fn read_handshake(&mut self, at: usize) {
        match self.handshakes[at].read() {
            Ok(None) => {}
            Ok(Some(handshake)) => self.start_vm(at, handshake),
            Err(error) => self.refuse(at, &error),
        }
    }

    /// Refuses a handshake.
    pub(super) fn refuse(&mut self, at: usize, error: &HandshakeError) {
        let closing = self.handshakes[at].closing();
        let PendingHandshake {
            id, service, peer, ..
        } = self.handshakes.swap_remove(at);
        self.remove_stored_vm(id);
        let why = Some(error.to_string());
        let label = self.label(id, service, peer.pid);
        self.count_ended(service, Ending::Refused);
        self.record_refusal(VmSummary::new(label, Ending::Refused, why));
        self.closing.push(ClosingConnection {
            peer,
            closing,
            since: Instant::now(),
        });
        self.drop_service_if_unused(service);
    }

    fn start_vm(&mut self, at: usize, handshake: Handshake) {
        let PendingHandshake {
            id, service, peer, ..
        } = self.handshakes.swap_remove(at);
        let Handshake {
            userfaultfd,
            regions,
        } = handshake;
        let mut vm = VmRecord::new(service, peer, userfaultfd, regions);
        if self.is_hung(service) {
            let why = "cannot read its snapshot: a worker hangs reading it and cannot be killed";
            self.drop_vm(id, vm, Ending::Refused, why.to_owned());
            return self.drop_service_if_unused(service);
        }
        if let Err(error) = vm.open_page_map() {
            let why = anyhow::Error::from(AttachError::PageMap(error));
            self.drop_vm(id, vm, Ending::Refused, format!("{why:#}"));
            return self.drop_service_if_unused(service);
        }
        self.vms.insert(id, vm);
        self.store_vm(id);
        self.outgoing.push_back(Outgoing::Vm(id));
    }
}

/// Opens the file of a snapshot in a thread of its own, since the disk may not answer. A bad
/// snapshot is refused here, and not for each VM.
fn start_opening(path: &Path) -> Result<Receiver<Result<OwnedFd>>> {
    let open = |path: &Path| -> Result<OwnedFd> {
        drop(Snapshot::open_path(path)?);
        let store = FileStore::open(path).with_context(|| escape_path(path))?;
        Ok(store.into_file().into())
    };
    let (sender, opened) = channel();
    let path = path.to_owned();
    let thread = std::thread::Builder::new().name("open".into());
    thread.spawn(move || sender.send(open(&path)))?;
    Ok(opened)
}

fn timed_out(path: &Path, timeout: Duration) -> anyhow::Error {
    let path = escape_path(path);
    anyhow!("cannot read {path}: timed out after {timeout:?}")
}

/// Identifies the peer of a connection, and checks whether the service admits it.
fn admit(record: &ServiceRecord, stream: &UnixStream) -> Result<Peer> {
    let (pid, uid) = credentials_of(stream.as_fd()).context("cannot identify its process")?;
    let allowed = &record.service.allow_uid;
    if !allowed.is_empty() && !allowed.contains(&uid) {
        bail!("its user {uid} is not in --allow-uid");
    }
    if pid == 0 {
        bail!(
            "its process is in a PID namespace that this one can't see, and could not be killed after losing a page; run \
             `serve` in the VMM's PID namespace or one above it (in a container: the host's, `--pid=host`), and \
             kill this VMM, which blocks at its first page"
        );
    }
    peer_of(stream.as_fd()).context("cannot identify its process")
}
