//! Services: their snapshots and the sockets to which VMs connect.
//!
//! Invariant: the files of a service's snapshot and its listening socket are stored before a VM can
//! connect to it, and stay stored until its last VM has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use snaprestore_uffd::os::{Peer, credentials_of, peer_of};
use snapshot_format::names::escape_path;
use snapshot_format::{OpenError, ReadError};

use super::listener::{BoundSocket, ListenError};
use super::snapshot_files::SnapshotFiles;
use super::vm::SnapshotRef;
use crate::api::config::{Service, check_output_folder};
use crate::api::types::{RequestError, VmState};
use crate::error::Chain;
use crate::fd_store::FdStore;
use crate::ipc::{EndCounts, NewerSettings, ToWorker};

/// Why a service can't be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddServiceError {
    /// Another service has the name.
    #[error("service {name:?} already exists")]
    Exists {
        /// The name.
        name: String,
    },
    /// Another service listens on the socket.
    #[error("service {name:?} already listens on {socket}")]
    SocketInUse {
        /// The name of the other service.
        name: String,
        /// The path of the socket, escaped.
        socket: String,
    },
    /// The snapshot can't be used.
    #[error("cannot open the snapshot")]
    Snapshot(#[from] OpenError),
    /// The snapshot lacks the working set of the service, or its working sets can't be read.
    #[error("cannot use the working set")]
    WorkingSet(#[from] ReadError),
    /// A descriptor of the snapshot could not be kept, or no thread could be started to open it.
    #[error("cannot open {snapshot}")]
    Open {
        /// The path of the snapshot, escaped.
        snapshot: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The snapshot's disk does not answer.
    #[error("cannot read {snapshot}: timed out after {timeout:?}")]
    TimedOut {
        /// The path of the snapshot, escaped.
        snapshot: String,
        /// The time limit.
        timeout: Duration,
    },
    /// The folder for recordings can't be used.
    #[error("cannot record to {folder}: create the folder, make it writable, or correct `record`")]
    RecordFolder {
        /// The path of the folder, escaped.
        folder: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The socket can't be created.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The daemon accepts no more VMs.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

impl From<AddServiceError> for RequestError {
    fn from(error: AddServiceError) -> Self {
        let mut text = Chain(&error).to_string();
        let AddServiceError::Snapshot(cause) = &error else {
            return Self::from(text);
        };
        if cause.lacks_ancestor() {
            text.push_str(
                "; copy the file beside the snapshot, or add its folder to `layers` of the \
                 daemon's configuration (or serve's --layers DIR)",
            );
        }
        Self {
            bad_snapshot: cause.is_unusable(),
            text,
        }
    }
}

/// Why a peer is not admitted.
#[derive(Debug, thiserror::Error)]
pub(super) enum AdmitError {
    #[error("cannot identify its process")]
    Unidentified(#[source] io::Error),
    #[error("its user {uid} is not in --allow-uid")]
    NotAllowed { uid: u32 },
    #[error(
        "its process is in a PID namespace that this one can't see, and could not be killed after losing a page; run \
         `serve` in the VMM's PID namespace or one above it (in a container: the host's, `--pid=host`), and \
         kill this VMM, which blocks at its first page"
    )]
    OtherNamespace,
    #[error("its process already has {max} VMs, the maximum")]
    ProcessFull { max: usize },
    #[error("cannot prepare the handshake")]
    Handshake(#[source] io::Error),
}

/// The services of a daemon.
#[derive(Debug)]
pub(super) struct Services {
    records: BTreeMap<u64, ServiceRecord>,
    /// The number of the next service.
    next: u64,
    opening: Vec<OpeningService>,
    /// Sockets of a dead supervisor, by path.
    inherited: BTreeMap<PathBuf, StoredSocket>,
}

/// A service with its snapshot open.
#[derive(Debug)]
struct ServiceRecord {
    snapshot: SnapshotRef,
    files: SnapshotFiles,
    /// The socket to which VMs connect, until the service is closed.
    listener: Option<StoredSocket>,
    /// Whether the service was removed; it is dropped with its last VM.
    removed: bool,
    ended: EndCounts,
}

/// A listening socket, with the id under which it is stored.
#[derive(Debug)]
pub(super) struct StoredSocket {
    pub(super) socket: BoundSocket,
    /// `None` if its path refers to another file.
    pub(super) id: Option<String>,
}

/// A service being added by an operator, whose snapshot is not open yet.
#[derive(Debug)]
struct OpeningService {
    /// The number of the operator's request.
    number: u64,
    service: Service,
    opened: Receiver<Result<SnapshotFiles, AddServiceError>>,
    since: Instant,
}

/// A service whose snapshot was opened, or could not be.
#[derive(Debug)]
pub(super) struct Opened {
    /// The number of the operator's request.
    pub(super) number: u64,
    pub(super) result: Result<(Service, SnapshotFiles), AddServiceError>,
}

/// A connection, and what is known about its peer.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) stream: UnixStream,
    /// The PID of the peer; 0 if it is unknown.
    pub(super) pid: u32,
    pub(super) snapshot: SnapshotRef,
    /// The peer, if the service admits it.
    pub(super) peer: Result<Peer, AdmitError>,
}

impl Services {
    pub(super) fn new() -> Self {
        Self {
            records: BTreeMap::new(),
            next: 1,
            opening: Vec::new(),
            inherited: BTreeMap::new(),
        }
    }

    /// Checks that no other service has the name or the socket.
    pub(super) fn check_addable(&self, service: &Service) -> Result<(), AddServiceError> {
        for record in self.records.values().filter(|record| !record.removed) {
            let other = &record.snapshot.service;
            if other.name == service.name {
                let name = service.name.clone();
                return Err(AddServiceError::Exists { name });
            }
            if other.socket == service.socket && record.listener.is_some() {
                return Err(AddServiceError::SocketInUse {
                    name: other.name.clone(),
                    socket: escape_path(&service.socket),
                });
            }
        }
        Ok(())
    }

    /// Starts to add a service for an operator: a disk that doesn't answer must not block the
    /// supervisor.
    pub(super) fn start_opening(
        &mut self,
        number: u64,
        service: Service,
        folders: &[PathBuf],
    ) -> Result<(), AddServiceError> {
        self.check_addable(&service)?;
        self.opening.push(OpeningService {
            number,
            opened: start_opening(&service, folders)?,
            service,
            since: Instant::now(),
        });
        Ok(())
    }

    /// Returns the services whose snapshots are open by now, or not in time.
    pub(super) fn take_opened(&mut self, timeout: Duration) -> Vec<Opened> {
        let mut done = Vec::new();
        for opening in std::mem::take(&mut self.opening) {
            let result = match opening.opened.try_recv() {
                Ok(opened) => opened.map(|files| (opening.service, files)),
                Err(TryRecvError::Empty) if opening.since.elapsed() < timeout => {
                    self.opening.push(opening);
                    continue;
                }
                Err(_) => Err(timed_out(&opening.service.snapshot, timeout)),
            };
            done.push(Opened {
                number: opening.number,
                result,
            });
        }
        done
    }

    /// Forgets the services being added: their operators can no longer be answered.
    pub(super) fn cancel_opening(&mut self) {
        self.opening.clear();
    }

    /// Returns whether a snapshot is being opened.
    pub(super) fn is_opening(&self) -> bool {
        !self.opening.is_empty()
    }

    /// Adds a service, and stores its snapshot and its socket. Returns its number, and warnings.
    pub(super) fn insert(
        &mut self,
        service: Service,
        files: SnapshotFiles,
        socket: BoundSocket,
        fd_store: &mut FdStore,
    ) -> (u64, Vec<String>) {
        let key = self.next_key();
        let store_id = format!("file-{}-{key}", std::process::id());
        let mut warnings = Vec::new();
        if let Err(error) = files.store(&store_id, &service.name, fd_store) {
            warnings.push(format!(
                "cannot store the descriptors of {}; its VMs are lost if this process dies: {error}",
                escape_path(&service.snapshot)
            ));
        }
        let record = ServiceRecord {
            snapshot: SnapshotRef {
                service: Arc::new(service),
                file: store_id.into(),
                ancestors: Arc::clone(files.ancestor_names()),
            },
            files,
            listener: Some(StoredSocket {
                id: socket.store_id(),
                socket,
            }),
            removed: false,
            ended: EndCounts::new(),
        };
        warnings.extend(record.store_listener(fd_store));
        self.records.insert(key, record);
        (key, warnings)
    }

    /// Returns the number of the service that the VMs of a stored snapshot belong to, and whether
    /// it is new: the first of these VMs brings what was `stored` of the snapshot. The service
    /// accepts no VMs. Returns `None` if a file of the snapshot is missing.
    pub(super) fn recover(
        &mut self,
        snapshot: SnapshotRef,
        stored: Option<Vec<(String, OwnedFd)>>,
    ) -> Option<(u64, bool)> {
        // All VMs of one snapshot belong to one service.
        let mut records = self.records.iter();
        let known = records.find(|(_, record)| record.snapshot.file == snapshot.file);
        if let Some((key, _)) = known {
            return Some((*key, false));
        }
        let files = SnapshotFiles::recover(stored?, &snapshot.ancestors)?;
        let key = self.next_key();
        let record = ServiceRecord {
            snapshot,
            files,
            listener: None,
            removed: true,
            ended: EndCounts::new(),
        };
        self.records.insert(key, record);
        Some((key, true))
    }

    fn next_key(&mut self) -> u64 {
        let key = self.next;
        self.next += 1;
        key
    }

    /// Keeps a socket that an earlier supervisor has stored as `id`, for the service that will use
    /// it.
    pub(super) fn inherit(&mut self, id: String, socket: OwnedFd) {
        if let Some((path, socket)) = BoundSocket::inherit(socket, &id) {
            let id = Some(id);
            self.inherited.insert(path, StoredSocket { socket, id });
        }
    }

    /// Takes the inherited socket at `path`: VMs may wait on it.
    pub(super) fn take_inherited(&mut self, path: &Path) -> Option<StoredSocket> {
        self.inherited.remove(path)
    }

    /// Takes the inherited sockets that no service uses.
    pub(super) fn take_all_inherited(&mut self) -> Vec<StoredSocket> {
        let inherited = std::mem::take(&mut self.inherited);
        inherited.into_values().collect()
    }

    /// Stores the listening sockets again. Returns warnings.
    pub(super) fn store_again(&self, fd_store: &mut FdStore) -> Vec<String> {
        let records = self.records.values();
        records
            .filter_map(|record| record.store_listener(fd_store))
            .collect()
    }

    /// Returns the sockets to which VMs can connect, by service.
    pub(super) fn listeners(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        self.records.iter().filter_map(|(key, record)| {
            let listener = record.listener.as_ref()?;
            Some((*key, listener.socket.as_fd()))
        })
    }

    /// Accepts one connection, and identifies its peer. Returns `None` if nobody waits.
    pub(super) fn accept(&self, key: u64) -> io::Result<Option<Accepted>> {
        let Some(record) = self.records.get(&key) else {
            return Ok(None);
        };
        let Some(listener) = &record.listener else {
            return Ok(None);
        };
        let Some(stream) = listener.socket.accept()? else {
            return Ok(None);
        };
        let stream = UnixStream::from(stream);
        let pid = credentials_of(stream.as_fd()).map_or(0, |(pid, _)| pid);
        Ok(Some(Accepted {
            peer: admit(&record.snapshot.service, &stream),
            pid,
            stream,
            snapshot: record.snapshot.clone(),
        }))
    }

    /// Refuses new connections to a service. Waiting ones can still be accepted.
    pub(super) fn refuse_connections(&mut self, key: u64) {
        let record = self.records.get_mut(&key);
        if let Some(listener) = record.and_then(|record| record.listener.as_mut()) {
            listener.socket.close();
        }
    }

    /// Takes the socket of a service, with the service.
    pub(super) fn take_listener(&mut self, key: u64) -> Option<(Arc<Service>, StoredSocket)> {
        let record = self.records.get_mut(&key)?;
        let listener = record.listener.take()?;
        Some((Arc::clone(&record.snapshot.service), listener))
    }

    /// Marks the service of this name as removed, and returns its number.
    pub(super) fn mark_removed(&mut self, name: &str) -> Option<u64> {
        let mut records = self.records.iter_mut();
        let (key, record) =
            records.find(|(_, record)| record.snapshot.service.name == name && !record.removed)?;
        record.removed = true;
        Some(*key)
    }

    /// Returns whether a removed service waits for its last VM to end.
    pub(super) fn is_removed(&self, key: u64) -> bool {
        self.records.get(&key).is_some_and(|record| record.removed)
    }

    /// Drops a service, and removes its snapshot from the store.
    pub(super) fn drop(&mut self, key: u64, fd_store: &mut FdStore) {
        if let Some(record) = self.records.remove(&key) {
            // If this fails, systemd drops it when the service stops.
            let _ = fd_store.remove(&record.snapshot.file);
        }
    }

    /// Counts an ended VM of a service.
    pub(super) fn count_ended(&mut self, key: u64, state: VmState) {
        if let Some(record) = self.records.get_mut(&key) {
            *record.ended.entry(state).or_default() += 1;
        }
    }

    /// Returns the counts of ended VMs.
    pub(super) fn ended(&self) -> BTreeMap<u64, EndCounts> {
        let records = self.records.iter();
        records
            .map(|(key, record)| (*key, record.ended.clone()))
            .collect()
    }

    /// Returns the numbers of the services.
    pub(super) fn keys(&self) -> Vec<u64> {
        self.records.keys().copied().collect()
    }

    /// Returns the folder in which a service wants the recordings of its VMs.
    pub(super) fn record_folder(&self, key: u64) -> Option<&Path> {
        let record = self.records.get(&key)?;
        record.snapshot.service.record.as_deref()
    }

    /// Returns the number of ancestors of a service's snapshot.
    pub(super) fn ancestors(&self, key: u64) -> usize {
        let record = self.records.get(&key);
        record.map_or(0, |record| record.files.ancestor_names().len())
    }

    /// Returns the message that passes a service to a worker, with the file of its snapshot.
    pub(super) fn message(
        &self,
        key: u64,
        run_records: bool,
    ) -> Option<(ToWorker, BorrowedFd<'_>)> {
        let record = self.records.get(&key)?;
        let mut service = Service::clone(&record.snapshot.service);
        let newer = NewerSettings::take_from(&mut service, run_records);
        let message = ToWorker::Service {
            key,
            service,
            newer,
        };
        Some((message, record.files.own()))
    }

    /// Returns the names of the [newer settings](NewerSettings) that are in use, each once.
    pub(super) fn newer_settings(&self, run_records: bool) -> Vec<&'static str> {
        let services = self.records.values().map(|record| {
            let mut service = Service::clone(&record.snapshot.service);
            NewerSettings::take_from(&mut service, run_records).names()
        });
        let names: BTreeSet<_> = services.flatten().collect();
        names.into_iter().collect()
    }

    /// Returns the message that passes an ancestor of a service's snapshot to a worker, with its
    /// file.
    pub(super) fn layer_message(
        &self,
        key: u64,
        number: usize,
    ) -> Option<(ToWorker, BorrowedFd<'_>)> {
        let (name, file) = self.records.get(&key)?.files.ancestor(number)?;
        let name = name.to_owned();
        Some((ToWorker::Layer { key, name }, file))
    }

    /// Names files of services by the numbers of their layers; 0 is the snapshot itself.
    pub(super) fn files(&self, layers: &BTreeSet<(u64, u16)>) -> String {
        let known = layers.iter().filter_map(|(key, layer)| {
            let record = self.records.get(key)?;
            match usize::from(*layer).checked_sub(1) {
                None => Some(escape_path(&record.snapshot.service.snapshot)),
                Some(ancestor) => record.files.ancestor_names().get(ancestor).cloned(),
            }
        });
        let names: BTreeSet<_> = known.collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }

    /// Names the snapshots of these services.
    pub(super) fn snapshots(&self, services: &BTreeSet<u64>) -> String {
        let known = services.iter().filter_map(|key| self.records.get(key));
        let paths: BTreeSet<_> = known
            .map(|record| escape_path(&record.snapshot.service.snapshot))
            .collect();
        let paths: Vec<_> = paths.into_iter().collect();
        if paths.is_empty() {
            return "an unknown file".to_owned();
        }
        paths.join(", ")
    }
}

impl ServiceRecord {
    /// Stores the listening socket. Returns a warning if that fails.
    fn store_listener(&self, fd_store: &mut FdStore) -> Option<String> {
        let StoredSocket { socket, id } = self.listener.as_ref()?;
        let service = &self.snapshot.service;
        let stored = fd_store.store_listener(
            id.as_ref()?,
            &service.name,
            socket.as_fd(),
            &service.allow_uid,
        );
        let error = stored.err()?;
        Some(format!(
            "cannot store a socket; VMMs that wait there are lost if this process dies: {error}"
        ))
    }
}

impl StoredSocket {
    /// Returns whether its path still refers to it, so that a service can continue with it.
    pub(super) fn is_current(&self) -> bool {
        self.id.is_some() && self.socket.store_id() == self.id
    }
}

/// Opens the files of a service's snapshot, and waits for their disks at most for `timeout`.
/// Ancestors are looked for beside the snapshot and in `folders`.
pub(super) fn open(
    service: &Service,
    folders: &[PathBuf],
    timeout: Duration,
) -> Result<SnapshotFiles, AddServiceError> {
    let opened = start_opening(service, folders)?.recv_timeout(timeout);
    opened.map_err(|_| timed_out(&service.snapshot, timeout))?
}

/// Opens the files of a service's snapshot in a thread of its own, since a disk may not answer. A
/// bad snapshot is refused here, and not for each VM.
fn start_opening(
    service: &Service,
    folders: &[PathBuf],
) -> Result<Receiver<Result<SnapshotFiles, AddServiceError>>, AddServiceError> {
    let (sender, opened) = channel();
    let (path, record) = (service.snapshot.clone(), service.record.clone());
    let (folders, working_set) = (folders.to_vec(), service.working_set.clone());
    let open = move || {
        if let Some(folder) = &record {
            check_output_folder(folder).map_err(|source| AddServiceError::RecordFolder {
                folder: escape_path(folder),
                source,
            })?;
        }
        SnapshotFiles::open(&path, folders, working_set.as_deref())
    };
    let thread = std::thread::Builder::new().name("open".into());
    let started = thread.spawn(move || sender.send(open()));
    started.map_err(|source| AddServiceError::Open {
        snapshot: escape_path(&service.snapshot),
        source,
    })?;
    Ok(opened)
}

fn timed_out(path: &Path, timeout: Duration) -> AddServiceError {
    AddServiceError::TimedOut {
        snapshot: escape_path(path),
        timeout,
    }
}

/// Identifies the peer of a connection, and checks whether the service admits it.
fn admit(service: &Service, stream: &UnixStream) -> Result<Peer, AdmitError> {
    let (pid, uid) = credentials_of(stream.as_fd()).map_err(AdmitError::Unidentified)?;
    let allowed = &service.allow_uid;
    if !allowed.is_empty() && !allowed.contains(&uid) {
        return Err(AdmitError::NotAllowed { uid });
    }
    if pid == 0 {
        return Err(AdmitError::OtherNamespace);
    }
    peer_of(stream.as_fd()).map_err(AdmitError::Unidentified)
}
