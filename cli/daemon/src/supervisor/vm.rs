//! The record of one VM: its state, and the descriptors that are held and stored in that state.
//!
//! ```text
//!   accept                      hand_over               track               serve
//!     │                             │                     │                   │
//!     ▼                             ▼                     ▼                   ▼
//!   Connecting ─────────────▶ HandedOver ───────────▶ Tracked ──────────▶ Serving
//!     │      │                      │  ▲                │  ▲ ◀─── detach ──── │
//!     │      │                      │  └─── recover ────│──┘                  │
//!   refuse   └──────────────────────┴── kill, leave ────┴─────────────────────┤
//!     │                                   │                                   │
//!     ▼                                   ▼                                 release
//!   Closing                            Exiting ◀── backlog, recover           │
//!     │ closed                            │ exited                            ▼
//!     ▼                                   ▼                              all descriptors are
//!   dropped                            release                           closed and removed
//! ```
//!
//! | state | held here | stored under `vm-ID` |
//! | --- | --- | --- |
//! | `Connecting` | pidfd, connection, data that it has sent | pidfd |
//! | `HandedOver` | pidfd, userfaultfd, page map | the same, and the description |
//! | `Tracked`, `Serving` | the same, and the tables | the same, and the tables |
//! | `Exiting` | pidfd, and [`Held`] until the process has exited | the same as before |
//! | `Closing` | pidfd | nothing |
//!
//! A transition that adds descriptors stores them before it returns, and only then is anything sent
//! to a worker or read from a peer. So the next supervisor, or the guardian, knows every VM that
//! could lose memory. If not all descriptors of a VM can be stored, it is served all the same. Then
//! its pidfd alone is stored: if the supervisor dies, the VM is killed and does not wait forever.

mod stored;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use snaprestore_engine::pager::firecracker::{Handshake, HandshakeError};
use snaprestore_engine::pager::{AttachError, FrameId, OwnerRegion, Vitals};
use snaprestore_engine::stats::whole_millis;
use snaprestore_uffd::os::{Peer, kill_by_pidfd, open_page_map};
use snaprestore_uffd::uffd::{PendingClose, is_userfaultfd};

use self::stored::Description;
pub(super) use self::stored::StoredVm;
use super::handshake::PendingHandshake;
use crate::api::config::Service;
use crate::api::summary::VmLabel;
use crate::error::Chain;
use crate::fd_store::backlog::BacklogPeer;
use crate::fd_store::{FdStore, OWNER, StoreError, UFFD};
use crate::ipc::ToWorker;
use crate::policy::{self, Counter};

/// The role under which the tables are stored.
const TABLES: &str = "tables";
/// The role of the page map of a VM with huge pages.
const PAGE_MAP: &str = "pagemap";
/// The role of the description: the other facts about a VM.
const DESCRIPTION: &str = "meta";

/// The name of a service that this daemon doesn't have.
const UNKNOWN_SERVICE: &str = "?";

/// A VM, or a connection that may become one.
#[derive(Debug)]
pub(super) struct VmRecord {
    id: u64,
    /// The number of the service; 0 if this daemon doesn't have it.
    service: u64,
    service_name: String,
    peer: Peer,
    connected: Instant,
    state: State,
}

/// The state of a VM, with the descriptors that belong to it.
#[derive(Debug)]
enum State {
    /// The peer has connected, and its handshake is incomplete.
    Connecting {
        handshake: PendingHandshake,
        snapshot: SnapshotRef,
    },
    /// The VM has handed its memory over. A worker has yet to create its tables.
    HandedOver(Memory),
    /// The VM has tables. A worker has yet to serve it.
    Tracked(Memory, Tables),
    /// A worker serves the VM.
    Serving(Memory, Tables, Heartbeat),
    /// The VM is no longer served. Its process was killed or exits, but may not be gone yet.
    Exiting(Held),
    /// The connection was refused, and descriptors that the peer has sent may still be open.
    Closing {
        closing: PendingClose,
        since: Instant,
    },
    /// All descriptors but the pidfd are closed. The record is about to be dropped.
    Released,
}

/// The memory that a VM has handed over.
#[derive(Debug)]
struct Memory {
    userfaultfd: OwnedFd,
    regions: Vec<OwnerRegion>,
    page_map: Option<OwnedFd>,
    snapshot: SnapshotRef,
    /// Frames on which workers have died.
    suspects: BTreeMap<FrameId, Counter>,
    /// Workers in a row that got stuck on this VM.
    stuck: Counter,
    /// The time at which the present worker was started, or the memory handed over.
    since: Instant,
}

/// The snapshot that a VM is restored from, as the next supervisor finds it in the store.
#[derive(Clone, Debug)]
pub(super) struct SnapshotRef {
    pub(super) service: Arc<Service>,
    /// The id under which the snapshot's open files are stored.
    pub(super) file: Arc<str>,
    /// The names of its ancestors' files in messages, in the order of its list.
    pub(super) ancestors: Arc<[String]>,
}

/// The tables of a VM's session, which its worker and the supervisor share.
#[derive(Debug)]
struct Tables {
    memfd: OwnedFd,
    vitals: Vitals,
}

/// The last signs of life of the worker that serves a VM: counters, and when each last changed.
#[derive(Debug)]
struct Heartbeat {
    /// Reads of messages.
    reads: (u64, Instant),
    /// Starts and ends of serving, for each thread: odd while it serves.
    beats: Vec<(u64, Instant)>,
}

/// Descriptors to close after a process has exited, and not earlier: missing pages become zeros.
#[derive(Debug)]
enum Held {
    /// An incomplete handshake, whose data may contain the memory.
    Handshake { _handshake: PendingHandshake },
    /// The connection of a peer that was not accepted.
    Backlog { _stream: UnixStream },
    /// The userfaultfd and, after a recovery, everything else that was stored.
    Memory(Vec<OwnedFd>),
}

/// Reason why a VM is not stored as a whole. It is served all the same.
#[derive(Debug)]
pub(super) struct PartlyStored {
    is_owner_stored: bool,
    why: StoreVmError,
}

impl fmt::Display for PartlyStored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is = if self.is_owner_stored {
            "killed"
        } else {
            "lost"
        };
        let why = Chain(&self.why);
        write!(
            f,
            "cannot store all of its descriptors; it is {is} if this process dies: {why}"
        )
    }
}

/// Reason why a VM could not be stored.
#[derive(Debug, thiserror::Error)]
enum StoreVmError {
    #[error("cannot create its description")]
    Describe(#[source] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl VmRecord {
    /// Begins the handshake with a peer that has connected. Its pidfd is stored first, since the
    /// socket may already hold its memory. If that fails, it is reported when the peer hands its
    /// memory over.
    pub(super) fn accept(
        id: u64,
        (service, snapshot): (u64, SnapshotRef),
        peer: Peer,
        stream: UnixStream,
        fd_store: &mut FdStore,
    ) -> io::Result<Self> {
        let name = &snapshot.service.name;
        let timeout = Duration::from_secs(snapshot.service.handshake_timeout);
        let _ = fd_store.store(&store_id(id), name, &[(OWNER, peer.pidfd.as_fd())]);
        let handshake = PendingHandshake::new(stream, timeout).inspect_err(|_| {
            // If this fails, the peer is killed with the supervisor.
            let _ = fd_store.remove(&store_id(id));
        })?;
        Ok(Self {
            id,
            service,
            service_name: name.clone(),
            peer,
            connected: Instant::now(),
            state: State::Connecting {
                handshake,
                snapshot,
            },
        })
    }

    /// Creates the record of a peer that waited in the backlog of a socket and was killed.
    pub(super) fn killed_in_backlog(
        id: u64,
        service_name: &str,
        BacklogPeer { peer, stream }: BacklogPeer,
        fd_store: &mut FdStore,
    ) -> Self {
        // A failure is harmless: the process is dying already.
        let _ = fd_store.store(&store_id(id), service_name, &[(OWNER, peer.pidfd.as_fd())]);
        let held = Held::Backlog { _stream: stream };
        Self::exiting(id, service_name, peer, held)
    }

    fn exiting(id: u64, service_name: &str, peer: Peer, held: Held) -> Self {
        Self {
            id,
            service: 0,
            service_name: service_name.to_owned(),
            peer,
            connected: Instant::now(),
            state: State::Exiting(held),
        }
    }

    /// `Connecting` → `HandedOver`: keeps the memory of a complete handshake, and stores it. Fails
    /// if the VM can't be served; its process then has to be [killed](Self::kill).
    pub(super) fn hand_over(
        &mut self,
        handshake: Handshake,
        fd_store: &mut FdStore,
    ) -> Result<Result<(), PartlyStored>, AttachError> {
        let snapshot = match self.take_state() {
            State::Connecting { snapshot, .. } => snapshot,
            other => {
                self.state = other;
                return Ok(Ok(()));
            }
        };
        let memory = Memory::new(handshake.userfaultfd, handshake.regions, snapshot);
        self.state = State::HandedOver(memory);
        self.open_page_map()?;
        Ok(self.store(fd_store))
    }

    /// Opens the page map if the VM has huge pages: a confined worker can't.
    pub(super) fn open_page_map(&mut self) -> Result<(), AttachError> {
        let pidfd = self.peer.pidfd.as_fd();
        let Some(memory) = self.state.memory_mut() else {
            return Ok(());
        };
        if memory.page_map.is_some() || !memory.regions.iter().any(OwnerRegion::is_huge) {
            return Ok(());
        }
        match open_page_map(pidfd) {
            Ok(page_map) => memory.page_map = Some(page_map),
            // The process has exited, which the worker will report.
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {}
            Err(error) => return Err(AttachError::PageMap(error)),
        }
        Ok(())
    }

    /// `HandedOver` → `Tracked`: keeps and stores the tables that the worker has created. The
    /// worker sends them before it reads any message of the VM.
    pub(super) fn track(
        &mut self,
        memfd: OwnedFd,
        fd_store: &mut FdStore,
    ) -> io::Result<Result<(), PartlyStored>> {
        let tables = Tables::new(memfd)?;
        self.state = match self.take_state() {
            State::HandedOver(memory) | State::Tracked(memory, _) => State::Tracked(memory, tables),
            State::Serving(memory, _, heartbeat) => State::Serving(memory, tables, heartbeat),
            other => other,
        };
        let tables = self.state.tables().map(|tables| tables.memfd.as_fd());
        let Some(tables) = tables else {
            return Ok(Ok(()));
        };
        let stored = fd_store.store(&store_id(self.id), &self.service_name, &[(TABLES, tables)]);
        Ok(stored.map_err(|error| self.store_owner_only(error.into(), fd_store)))
    }

    /// `Tracked` → `Serving`: a worker serves the VM.
    pub(super) fn serve(&mut self) {
        self.state = match self.take_state() {
            State::Tracked(memory, tables) => {
                let heartbeat = Heartbeat::new(memory.since);
                State::Serving(memory, tables, heartbeat)
            }
            // Without tables, the worker could not be watched: it counts as not serving.
            other => other,
        };
    }

    /// `Serving` → `Tracked`: the worker is gone, and another one is about to start.
    pub(super) fn detach(&mut self) {
        self.state = match self.take_state() {
            State::Serving(memory, tables, _) => State::Tracked(memory, tables),
            other => other,
        };
        if let Some(memory) = self.state.memory_mut() {
            memory.since = Instant::now();
        }
    }

    /// Any state → `Exiting`: keeps only the descriptors that must stay open until the process has
    /// exited. They stay stored as they are.
    pub(super) fn await_exit(&mut self) {
        let held = match self.take_state() {
            State::Connecting { handshake, .. } => Held::Handshake {
                _handshake: handshake,
            },
            State::HandedOver(memory) | State::Tracked(memory, _) | State::Serving(memory, ..) => {
                Held::Memory(vec![memory.userfaultfd])
            }
            State::Exiting(held) => held,
            State::Closing { .. } | State::Released => Held::Memory(Vec::new()),
        };
        self.state = State::Exiting(held);
    }

    /// Any state → `Exiting`: kills the process. If that fails, the process blocks at its next
    /// missing page.
    pub(super) fn kill(&mut self) -> Result<(), Errno> {
        let killed = self.kill_process();
        self.await_exit();
        killed
    }

    /// Kills the process. Succeeds if it has exited already.
    pub(super) fn kill_process(&self) -> Result<(), Errno> {
        match kill_by_pidfd(self.pidfd()) {
            Err(Errno::ESRCH) => Ok(()),
            killed => killed,
        }
    }

    /// `Connecting` → `Closing`: closes the connection, and removes the pidfd from the store.
    pub(super) fn refuse(&mut self, fd_store: &mut FdStore) -> Result<(), StoreError> {
        if let State::Connecting { handshake, .. } = &self.state {
            self.state = State::Closing {
                closing: handshake.closing(),
                since: Instant::now(),
            };
        }
        fd_store.remove(&store_id(self.id))
    }

    /// `Exiting` → gone: closes the descriptors of a process that has exited, and then removes them
    /// from the store.
    pub(super) fn release_exited(mut self, fd_store: &mut FdStore) -> Result<(), StoreError> {
        self.state = State::Released;
        fd_store.remove(&store_id(self.id))
    }

    /// `Serving` → gone: removes a VM that has all its memory from the store, and then closes its
    /// descriptors.
    pub(super) fn release_complete(self, fd_store: &mut FdStore) -> Result<(), StoreError> {
        fd_store.remove(&store_id(self.id))
    }

    /// Stores all descriptors that belong to the VM's state. Fails if an active VM is not stored as
    /// a whole.
    pub(super) fn store(&self, fd_store: &mut FdStore) -> Result<(), PartlyStored> {
        let mut descriptors = vec![(OWNER, self.pidfd())];
        match &self.state {
            State::HandedOver(memory) | State::Tracked(memory, _) | State::Serving(memory, ..) => {
                let tables = self.state.tables();
                return self
                    .store_memory(memory, tables, fd_store)
                    .map_err(|error| self.store_owner_only(error, fd_store));
            }
            State::Exiting(Held::Memory(held)) => {
                let userfaultfd = held.iter().find(|fd| is_userfaultfd(fd.as_fd()));
                descriptors.extend(userfaultfd.map(|fd| (UFFD, fd.as_fd())));
            }
            State::Connecting { .. } | State::Exiting(_) => {}
            State::Closing { .. } | State::Released => return Ok(()),
        }
        // A failure is reported when the peer hands its memory over. An exiting process is dying.
        let _ = fd_store.store(&store_id(self.id), &self.service_name, &descriptors);
        Ok(())
    }

    /// Stores everything that the next supervisor needs to continue.
    fn store_memory(
        &self,
        memory: &Memory,
        tables: Option<&Tables>,
        fd_store: &mut FdStore,
    ) -> Result<(), StoreVmError> {
        let description = Description {
            pid: self.peer.pid,
            uid: self.peer.uid,
            regions: memory.regions.clone(),
            service: Service::clone(&memory.snapshot.service),
            file: memory.snapshot.file.to_string(),
            ancestors: memory.snapshot.ancestors.to_vec(),
        };
        let description = description.write().map_err(StoreVmError::Describe)?;
        let mut descriptors = vec![
            (UFFD, memory.userfaultfd.as_fd()),
            (OWNER, self.pidfd()),
            (DESCRIPTION, description.as_fd()),
        ];
        descriptors.extend(memory.page_map.as_ref().map(|map| (PAGE_MAP, map.as_fd())));
        fd_store.store(&store_id(self.id), &self.service_name, &descriptors)?;
        if let Some(tables) = tables {
            let tables = [(TABLES, tables.memfd.as_fd())];
            fd_store.store(&store_id(self.id), &self.service_name, &tables)?;
        }
        Ok(())
    }

    /// Stores only the pidfd, so that the next supervisor kills the VM. Without the tables, it
    /// would not know which pages the VM has discarded.
    fn store_owner_only(&self, why: StoreVmError, fd_store: &mut FdStore) -> PartlyStored {
        let id = store_id(self.id);
        // A part that could not be removed is no reason to store less.
        let _ = fd_store.remove(&id);
        let owner = fd_store.store(&id, &self.service_name, &[(OWNER, self.pidfd())]);
        PartlyStored {
            is_owner_stored: owner.is_ok(),
            why,
        }
    }

    /// Reads what has arrived of a handshake. Returns `None` if it is not complete, or the VM is
    /// not connecting any more.
    pub(super) fn read_handshake(&mut self) -> Result<Option<Handshake>, HandshakeError> {
        match &mut self.state {
            State::Connecting { handshake, .. } => handshake.read(),
            _ => Ok(None),
        }
    }

    /// Returns the error for refusing a handshake that takes too long.
    pub(super) fn overdue(&self) -> Option<HandshakeError> {
        match &self.state {
            State::Connecting { handshake, .. } => handshake.overdue(),
            _ => None,
        }
    }

    /// Assigns a recovered VM to a service of this daemon.
    pub(super) fn assign(&mut self, service: u64) {
        self.service = service;
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn service(&self) -> u64 {
        self.service
    }

    pub(super) fn pid(&self) -> u32 {
        self.peer.pid
    }

    pub(super) fn connected(&self) -> Instant {
        self.connected
    }

    pub(super) fn label(&self) -> VmLabel {
        VmLabel {
            id: self.id,
            pid: self.peer.pid,
            service: self.service_name.clone(),
        }
    }

    /// Returns the pidfd, which is readable when the process has exited.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.peer.pidfd.as_fd()
    }

    /// Returns the connection whose handshake is incomplete.
    pub(super) fn connection(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Connecting { handshake, .. } => Some(handshake.as_fd()),
            _ => None,
        }
    }

    pub(super) fn is_connecting(&self) -> bool {
        matches!(self.state, State::Connecting { .. })
    }

    /// Returns whether the VM has handed its memory over and is, or will be, served.
    pub(super) fn is_active(&self) -> bool {
        self.state.memory().is_some()
    }

    pub(super) fn is_exiting(&self) -> bool {
        matches!(self.state, State::Exiting(_))
    }

    /// Returns whether the process of an exiting VM is gone.
    pub(super) fn has_exited(&self) -> bool {
        self.is_exiting() && readable(self.pidfd())
    }

    /// Returns the time since which a refused connection is being closed.
    pub(super) fn closing_since(&self) -> Option<Instant> {
        match &self.state {
            State::Closing { since, .. } => Some(*since),
            _ => None,
        }
    }

    /// Returns whether all descriptors of a refused connection are closed.
    pub(super) fn is_closed(&self) -> bool {
        matches!(&self.state, State::Closing { closing, .. } if !closing.is_open())
    }

    /// Returns the message that passes the VM to a worker, with its descriptors.
    pub(super) fn message(&self) -> Option<(ToWorker, Vec<BorrowedFd<'_>>)> {
        let memory = self.state.memory()?;
        let message = ToWorker::Vm {
            id: self.id,
            service: self.service,
            pid: self.peer.pid,
            age_ms: whole_millis(self.connected.elapsed()),
            regions: memory.regions.clone(),
            page_map: memory.page_map.is_some(),
            quarantined: memory.quarantined(),
        };
        let mut descriptors = vec![memory.userfaultfd.as_fd(), self.pidfd()];
        descriptors.extend(memory.page_map.as_ref().map(AsFd::as_fd));
        descriptors.extend(self.state.tables().map(|tables| tables.memfd.as_fd()));
        Some((message, descriptors))
    }

    /// Records the frames that a worker was decoding when it died by its own fault.
    pub(super) fn blame_frames(&mut self) {
        let decoding = self.decoding();
        if let Some(memory) = self.state.memory_mut() {
            for frame in decoding {
                let deaths = memory.suspects.entry(frame).or_default();
                deaths.count(&policy::QUARANTINE, Instant::now());
            }
        }
    }

    /// Counts a worker that is killed because it keeps this VM waiting.
    pub(super) fn count_stuck(&mut self, stuck_after: Duration) {
        if let Some(memory) = self.state.memory_mut() {
            let limit = policy::stuck_workers(stuck_after);
            memory.stuck.count(&limit, Instant::now());
        }
    }

    /// Returns whether the worker was killed for keeping this VM waiting, and has not exited yet.
    pub(super) fn is_stuck(&self) -> bool {
        let memory = self.state.memory();
        memory.is_some_and(|memory| memory.stuck.last() >= Some(memory.since))
    }

    /// Returns whether too many workers in a row got stuck on this VM.
    pub(super) fn has_exhausted_workers(&self, stuck_after: Duration) -> bool {
        let limit = policy::stuck_workers(stuck_after);
        let memory = self.state.memory();
        memory.is_some_and(|memory| memory.stuck.is_reached(&limit, Instant::now()))
    }

    /// Returns whether the worker is reading a frame for this VM.
    pub(super) fn is_reading(&self) -> bool {
        !self.decoding().is_empty()
    }

    /// Returns the frames that the worker is reading or decoding for this VM.
    pub(super) fn decoding(&self) -> Vec<FrameId> {
        let tables = self.state.tables();
        tables.map_or_else(Vec::new, |tables| tables.vitals.decoding())
    }

    /// Updates the heartbeat. Returns whether the worker has neglected the VM for longer than
    /// `timeout`: it has not started to serve it, not read its messages, or not resolved its fault.
    pub(super) fn check_neglected(&mut self, timeout: Duration) -> bool {
        let now = Instant::now();
        let late = |since: Instant| now.duration_since(since) >= timeout;
        match &mut self.state {
            State::HandedOver(memory) | State::Tracked(memory, _) => late(memory.since),
            State::Serving(memory, tables, heartbeat) => {
                heartbeat.update(tables, memory.userfaultfd.as_fd(), now);
                late(heartbeat.reads.1) || heartbeat.beats.iter().any(|(_, since)| late(*since))
            }
            _ => false,
        }
    }

    /// Takes the state, in order to replace it by the next one.
    fn take_state(&mut self) -> State {
        mem::replace(&mut self.state, State::Released)
    }
}

impl State {
    fn memory(&self) -> Option<&Memory> {
        match self {
            Self::HandedOver(memory) | Self::Tracked(memory, _) | Self::Serving(memory, ..) => {
                Some(memory)
            }
            _ => None,
        }
    }

    fn memory_mut(&mut self) -> Option<&mut Memory> {
        match self {
            Self::HandedOver(memory) | Self::Tracked(memory, _) | Self::Serving(memory, ..) => {
                Some(memory)
            }
            _ => None,
        }
    }

    fn tables(&self) -> Option<&Tables> {
        match self {
            Self::Tracked(_, tables) | Self::Serving(_, tables, _) => Some(tables),
            _ => None,
        }
    }
}

impl Memory {
    fn new(userfaultfd: OwnedFd, regions: Vec<OwnerRegion>, snapshot: SnapshotRef) -> Self {
        Self {
            userfaultfd,
            regions,
            page_map: None,
            snapshot,
            suspects: BTreeMap::new(),
            stuck: Counter::default(),
            since: Instant::now(),
        }
    }

    /// Returns the frames that must not be decoded.
    fn quarantined(&self) -> Vec<FrameId> {
        let now = Instant::now();
        let suspects = self.suspects.iter();
        suspects
            .filter(|(_, deaths)| deaths.is_reached(&policy::QUARANTINE, now))
            .map(|(frame, _)| *frame)
            .collect()
    }
}

impl Tables {
    fn new(memfd: OwnedFd) -> io::Result<Self> {
        let vitals = Vitals::new(memfd.try_clone()?)?;
        Ok(Self { memfd, vitals })
    }
}

impl Heartbeat {
    fn new(since: Instant) -> Self {
        Self {
            reads: (0, since),
            beats: Vec::new(),
        }
    }

    /// Restarts the clock of each counter that has changed since the last time, or for which there
    /// is nothing to do.
    fn update(&mut self, tables: &Tables, userfaultfd: BorrowedFd<'_>, now: Instant) {
        let pulse = tables.vitals.pulse();
        if pulse.reads != self.reads.0 || !readable(userfaultfd) {
            self.reads = (pulse.reads, now);
        }
        self.beats.resize(pulse.heartbeats.len(), (0, now));
        for (seen, beats) in self.beats.iter_mut().zip(pulse.heartbeats) {
            if seen.0 != beats || beats.is_multiple_of(2) {
                *seen = (beats, now);
            }
        }
    }
}

/// Returns the label of a VM of which only the number is known.
pub(super) fn unknown_vm(id: u64) -> VmLabel {
    VmLabel {
        id,
        pid: 0,
        service: UNKNOWN_SERVICE.to_owned(),
    }
}

/// Returns the id under which VM number `id` is stored.
fn store_id(id: u64) -> String {
    format!("vm-{id}")
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
        && fds[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLIN))
}

#[cfg(test)]
mod tests;
