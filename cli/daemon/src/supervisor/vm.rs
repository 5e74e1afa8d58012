//! The record of one VM: descriptors, heartbeat, and stored state.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use snaprestore_engine::pager::{OwnerRegion, Vitals};
use snaprestore_uffd::os::{Peer, kill_by_pidfd, open_page_map, pid_of};
use snaprestore_uffd::uffd::is_userfaultfd;

use crate::api::config::Service;
use crate::fd_store::backlog::BacklogPeer;
use crate::fd_store::{FdStore, OWNER, UFFD};
use crate::supervisor::handshake::{PendingHandshake, UnreadData};

/// Number of worker deaths on one frame after which the frame is quarantined: it counts as damaged.
const QUARANTINE_DEATHS: u32 = 2;

/// Number of workers in a row that get stuck on one VM before the VM is killed. The third one knows
/// the frames of the others.
const MAX_STUCK_WORKERS: u32 = 3;
/// Number of timeouts after which another stuck worker starts a new row.
const STUCK_WINDOW: u32 = 4;

/// The role under which the tables are stored.
const TABLES: &str = "tables";
/// The role of the page map of a VM with huge pages.
const PAGE_MAP: &str = "pagemap";
/// The role of the other facts about a VM.
const META: &str = "meta";

/// A VM, with everything about it that can't be created again.
#[derive(Debug)]
pub(crate) struct VmRecord {
    pub(crate) service: u64,
    pub(crate) peer: Peer,
    pub(crate) userfaultfd: OwnedFd,
    pub(crate) regions: Vec<OwnerRegion>,
    pub(crate) connected: Instant,
    page_map: Option<OwnedFd>,
    tables: Option<Tables>,
    /// Offsets of frames on which workers have died, and the number of deaths.
    suspects: BTreeMap<u64, u32>,
    /// Number of workers in a row that got stuck on this VM, and the time of the last.
    stuck: (u32, Option<Instant>),
    heartbeat: Heartbeat,
}

#[derive(Debug)]
struct Tables {
    memfd: OwnedFd,
    vitals: Vitals,
}

/// The worker's last signs of life, as seen by this VM.
#[derive(Debug)]
struct Heartbeat {
    /// Whether the worker serves the VM.
    served: bool,
    since: Instant,
    reads: (u64, Instant),
    beats: Vec<(u64, Instant)>,
}

impl Heartbeat {
    fn begin() -> Self {
        let now = Instant::now();
        Self {
            served: false,
            since: now,
            reads: (0, now),
            beats: Vec::new(),
        }
    }
}

impl VmRecord {
    pub(crate) fn new(
        service: u64,
        peer: Peer,
        userfaultfd: OwnedFd,
        regions: Vec<OwnerRegion>,
    ) -> Self {
        Self {
            service,
            peer,
            userfaultfd,
            regions,
            connected: Instant::now(),
            page_map: None,
            tables: None,
            suspects: BTreeMap::new(),
            stuck: (0, None),
            heartbeat: Heartbeat::begin(),
        }
    }

    /// Opens the page map if the VM has huge pages: a confined worker can't.
    pub(crate) fn open_page_map(&mut self) -> io::Result<()> {
        if self.page_map.is_some() || !self.regions.iter().any(OwnerRegion::is_huge) {
            return Ok(());
        }
        match open_page_map(self.peer.pidfd.as_fd()) {
            Ok(page_map) => self.page_map = Some(page_map),
            // The process has exited, which the worker will report.
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    pub(crate) fn has_page_map(&self) -> bool {
        self.page_map.is_some()
    }

    /// Keeps the tables created by the worker, before it has read any message.
    pub(crate) fn set_tables(&mut self, memfd: OwnedFd) -> Result<()> {
        let copy = memfd.try_clone().context("the tables of a VM")?;
        let vitals = Vitals::new(copy).context("the tables of a VM")?;
        self.tables = Some(Tables { memfd, vitals });
        Ok(())
    }

    /// Stores the VM with everything that the next supervisor needs.
    pub(crate) fn store(
        &self,
        id: u64,
        service: &Service,
        file: &str,
        fd_store: &mut FdStore,
    ) -> Result<()> {
        let name = &service.name;
        let meta = Meta {
            pid: self.peer.pid,
            uid: self.peer.uid,
            regions: self.regions.clone(),
            service: service.clone(),
            file: file.to_owned(),
        };
        let memfd = memfd_create(c"snaprestore vm", MFdFlags::MFD_CLOEXEC)?;
        let mut memfd = File::from(memfd);
        memfd.write_all(&serde_json::to_vec(&meta)?)?;
        let mut descriptors = vec![
            (UFFD, self.userfaultfd.as_fd()),
            (OWNER, self.peer.pidfd.as_fd()),
            (META, memfd.as_fd()),
        ];
        descriptors.extend(self.page_map.as_ref().map(|map| (PAGE_MAP, map.as_fd())));
        fd_store.store(&store_id(id), name, &descriptors)?;
        self.store_tables(id, name, fd_store)
    }

    /// Stores the tables, if there are any.
    pub(crate) fn store_tables(
        &self,
        id: u64,
        service: &str,
        fd_store: &mut FdStore,
    ) -> Result<()> {
        if let Some(tables) = &self.tables {
            fd_store.store(&store_id(id), service, &[(TABLES, tables.memfd.as_fd())])?;
        }
        Ok(())
    }

    /// Returns the descriptors that a worker needs.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut all = vec![self.userfaultfd.as_fd(), self.peer.pidfd.as_fd()];
        all.extend(self.page_map.as_ref().map(AsFd::as_fd));
        all.extend(self.tables.as_ref().map(|tables| tables.memfd.as_fd()));
        all
    }

    /// Returns the frames that must not be decoded.
    pub(crate) fn quarantined(&self) -> Vec<u64> {
        let quarantined = self
            .suspects
            .iter()
            .filter(|(_, deaths)| **deaths >= QUARANTINE_DEATHS);
        quarantined.map(|(frame, _)| *frame).collect()
    }

    /// Records the frames that a worker was decoding when it died by its own fault.
    pub(crate) fn blame_frames(&mut self) {
        for frame in self
            .tables
            .iter()
            .flat_map(|tables| tables.vitals.decoding())
        {
            *self.suspects.entry(frame).or_default() += 1;
        }
    }

    /// Counts a worker that is killed because it keeps this VM waiting.
    pub(crate) fn count_stuck(&mut self, timeout: Duration) {
        let (count, last) = &mut self.stuck;
        // In the same row, the next worker would have got stuck at once.
        if last.is_some_and(|last| last.elapsed() > STUCK_WINDOW * timeout) {
            *count = 0;
        }
        (*count, *last) = (*count + 1, Some(Instant::now()));
    }

    /// Whether the worker was killed for keeping this VM waiting, and has not exited yet.
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck
            .1
            .is_some_and(|last| last >= self.heartbeat.since)
    }

    /// Whether too many workers in a row got stuck on this VM.
    pub(crate) fn has_exhausted_workers(&self) -> bool {
        self.stuck.0 >= MAX_STUCK_WORKERS
    }

    /// Whether the worker is reading a frame for this VM.
    pub(crate) fn is_reading(&self) -> bool {
        let tables = self.tables.as_ref();
        tables.is_some_and(|tables| !tables.vitals.decoding().is_empty())
    }

    /// Restarts the heartbeat for a new worker.
    pub(crate) fn restart_heartbeat(&mut self) {
        self.heartbeat = Heartbeat::begin();
    }

    /// Records that the worker serves the VM.
    pub(crate) fn mark_served(&mut self) {
        self.heartbeat.served = true;
    }

    /// Updates the heartbeat. Returns whether the worker has neglected the VM for longer than
    /// `timeout`: it has not started to serve it, not read its messages, or not resolved its fault.
    pub(crate) fn check_neglected(&mut self, timeout: Duration) -> bool {
        let now = Instant::now();
        let late = |since: Instant| now.duration_since(since) >= timeout;
        let heartbeat = &mut self.heartbeat;
        let Some(tables) = self.tables.as_ref().filter(|_| heartbeat.served) else {
            return late(heartbeat.since);
        };
        let pulse = tables.vitals.pulse();
        if pulse.reads != heartbeat.reads.0 || !readable(self.userfaultfd.as_fd()) {
            heartbeat.reads = (pulse.reads, now);
        }
        heartbeat.beats.resize(pulse.heartbeats.len(), (0, now));
        for (seen, beats) in heartbeat.beats.iter_mut().zip(pulse.heartbeats) {
            if seen.0 != beats || beats.is_multiple_of(2) {
                *seen = (beats, now);
            }
        }
        late(heartbeat.reads.1) || heartbeat.beats.iter().any(|(_, since)| late(*since))
    }
}

/// A VM that is no longer served, and whose process may not have exited yet.
#[derive(Debug)]
pub(crate) struct ExitingVm {
    /// The number of the service; 0 if this daemon doesn't have it.
    pub(crate) service: u64,
    /// The name of the service, if known.
    pub(crate) service_name: String,
    pub(crate) pid: u32,
    pub(crate) connected: Instant,
    owner: OwnedFd,
    /// Descriptors to close after the process has exited, and not earlier: missing pages become
    /// zeros.
    held: Vec<OwnedFd>,
    /// Data of an incomplete handshake, closed at the same time.
    _unread: Option<UnreadData>,
}

impl ExitingVm {
    /// Kills the process.
    pub(crate) fn kill(&self) -> Result<(), Errno> {
        match kill_by_pidfd(self.owner()) {
            Err(Errno::ESRCH) => Ok(()),
            killed => killed,
        }
    }

    /// Creates an exiting VM from a pidfd, and descriptors to close after its exit.
    fn part(owner: OwnedFd, held: Vec<OwnedFd>) -> Self {
        Self {
            service: 0,
            service_name: String::new(),
            pid: pid_of(owner.as_fd()).unwrap_or(0),
            connected: Instant::now(),
            owner,
            held,
            _unread: None,
        }
    }

    pub(crate) fn owner(&self) -> BorrowedFd<'_> {
        self.owner.as_fd()
    }

    /// Stores the process, so that the guardian kills it and then closes its descriptors.
    pub(crate) fn store(&self, id: u64, fd_store: &mut FdStore) -> io::Result<()> {
        let userfaultfd = self.held.iter().find(|fd| is_userfaultfd(fd.as_fd()));
        let mut descriptors = vec![(OWNER, self.owner())];
        descriptors.extend(userfaultfd.map(|fd| (UFFD, fd.as_fd())));
        fd_store.store(&store_id(id), &self.service_name, &descriptors)
    }

    pub(crate) fn is_gone(&self) -> bool {
        readable(self.owner())
    }
}

impl From<VmRecord> for ExitingVm {
    fn from(vm: VmRecord) -> Self {
        Self {
            service: vm.service,
            pid: vm.peer.pid,
            connected: vm.connected,
            ..Self::part(vm.peer.pidfd, vec![vm.userfaultfd])
        }
    }
}

impl From<PendingHandshake> for ExitingVm {
    fn from(pending: PendingHandshake) -> Self {
        let (service, connected) = (pending.service, pending.since);
        let (peer, unread) = pending.into_unread();
        Self {
            service,
            pid: peer.pid,
            connected,
            _unread: Some(unread),
            ..Self::part(peer.pidfd, Vec::new())
        }
    }
}

impl From<BacklogPeer> for ExitingVm {
    fn from(BacklogPeer { peer, stream }: BacklogPeer) -> Self {
        Self {
            pid: peer.pid,
            ..Self::part(peer.pidfd, vec![stream.into()])
        }
    }
}

/// The description of a VM that is stored beside its descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    pid: u32,
    uid: u32,
    regions: Vec<OwnerRegion>,
    service: Service,
    /// The id under which the snapshot's open file is stored.
    file: String,
}

impl Meta {
    fn read(memfd: &OwnedFd) -> Result<Self> {
        let memfd = File::from(memfd.try_clone()?);
        let mut text = vec![0; usize::try_from(memfd.metadata()?.len())?];
        memfd.read_exact_at(&mut text, 0)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// A VM recovered from the store.
#[derive(Debug)]
pub(crate) enum StoredVm {
    /// A complete VM.
    Whole {
        /// The record, without a service yet.
        vm: Box<VmRecord>,
        service: Service,
        /// The id under which the snapshot's open file is stored.
        file: String,
    },
    /// A part of a VM, which is enough to kill it.
    Partial {
        vm: ExitingVm,
        /// Reason why it can't be served.
        why: String,
    },
}

impl StoredVm {
    /// Rebuilds a VM from the descriptors that were stored under one id.
    pub(crate) fn recover(descriptors: Vec<(String, OwnedFd)>) -> Result<Self> {
        let mut by_role: BTreeMap<_, _> = descriptors.into_iter().collect();
        let owner = by_role.remove(OWNER);
        let pidfd = owner.context("its pidfd is missing from the descriptor store")?;
        let part = |owner, held, why: anyhow::Error| Self::Partial {
            vm: ExitingVm::part(owner, held),
            why: format!("{why:#}"),
        };
        let meta = match by_role.get(META).map(Meta::read) {
            Some(Ok(meta)) if by_role.contains_key(UFFD) => meta,
            Some(Err(error)) => {
                let why = error.context("cannot parse its stored description");
                return Ok(part(pidfd, by_role.into_values().collect(), why));
            }
            _ => {
                let why = anyhow!("the previous supervisor died during its handshake");
                return Ok(part(pidfd, by_role.into_values().collect(), why));
            }
        };
        let peer = Peer {
            pid: meta.pid,
            uid: meta.uid,
            pidfd,
        };
        let userfaultfd = by_role.remove(UFFD).context("a userfaultfd")?;
        let mut vm = VmRecord::new(0, peer, userfaultfd, meta.regions);
        vm.page_map = by_role.remove(PAGE_MAP);
        let tables = by_role.remove(TABLES);
        match tables.map_or(Ok(()), |tables| vm.set_tables(tables)) {
            Ok(()) => Ok(Self::Whole {
                vm: Box::new(vm),
                service: meta.service,
                file: meta.file,
            }),
            Err(why) => Ok(part(vm.peer.pidfd, vec![vm.userfaultfd], why)),
        }
    }
}

/// Returns the id under which VM number `id` is stored.
pub(crate) fn store_id(id: u64) -> String {
    format!("vm-{id}")
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
        && fds[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLIN))
}
