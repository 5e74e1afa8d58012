//! The VMs that the keeper holds.

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
use crate::fd_store::backlog::Queued;
use crate::fd_store::{OWNER, Outside, UFFD};
use crate::supervisor::handshake::{Pending, Unheard};

/// Deaths of workers on one frame after which it counts as damaged.
const DEADLY: u32 = 2;

/// Workers that get stuck for one VM in a row after which it is ended: the third knows which frames the others were at.
const HOPELESS: u32 = 3;
/// As many times the patience later it is another row.
const IN_A_ROW: u32 = 4;

/// The role under which the tables are held outside.
const TABLES: &str = "tables";
/// The role of the page map of one that has huge pages.
const PAGE_MAP: &str = "pagemap";
/// The role of what else has to be known of a VM.
const META: &str = "meta";

/// All that can't be made again of one.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) service: u64,
    pub(crate) peer: Peer,
    pub(crate) userfaultfd: OwnedFd,
    pub(crate) regions: Vec<OwnerRegion>,
    pub(crate) connected: Instant,
    page_map: Option<OwnedFd>,
    tables: Option<Tables>,
    /// Frames on which workers have died, by their offset, and how often.
    suspects: BTreeMap<u64, u32>,
    /// Workers in a row that got stuck while it waited, and when the last did.
    stuck: (u32, Option<Instant>),
    watch: Watch,
}

#[derive(Debug)]
struct Tables {
    memfd: OwnedFd,
    vitals: Vitals,
}

/// Since when nothing has changed that ought to.
#[derive(Debug)]
struct Watch {
    /// Whether the worker has it in hand.
    served: bool,
    since: Instant,
    reads: (u64, Instant),
    turns: Vec<(u64, Instant)>,
}

impl Watch {
    fn begin() -> Self {
        let now = Instant::now();
        Self {
            served: false,
            since: now,
            reads: (0, now),
            turns: Vec::new(),
        }
    }
}

impl Vm {
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
            watch: Watch::begin(),
        }
    }

    /// Opens its page map if it has huge pages: a confined worker can't.
    pub(crate) fn open_page_map(&mut self) -> io::Result<()> {
        if self.page_map.is_some() || !self.regions.iter().any(OwnerRegion::is_huge) {
            return Ok(());
        }
        match open_page_map(self.peer.pidfd.as_fd()) {
            Ok(page_map) => self.page_map = Some(page_map),
            // It has ended, as its worker will tell.
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    pub(crate) fn has_page_map(&self) -> bool {
        self.page_map.is_some()
    }

    /// Takes the tables that the worker made, before it has read anything.
    pub(crate) fn keep_tables(&mut self, memfd: OwnedFd) -> Result<()> {
        let copy = memfd.try_clone().context("the tables of a VM")?;
        let vitals = Vitals::new(copy).context("the tables of a VM")?;
        self.tables = Some(Tables { memfd, vitals });
        Ok(())
    }

    /// Has it held outside, with what its next keeper needs to know.
    pub(crate) fn hold(
        &self,
        id: u64,
        service: &Service,
        file: &str,
        outside: &mut Outside,
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
        outside.hold(&held_as(id), name, &descriptors)?;
        self.hold_tables(id, name, outside)
    }

    /// Has its tables held outside, if it has some.
    pub(crate) fn hold_tables(&self, id: u64, service: &str, outside: &mut Outside) -> Result<()> {
        if let Some(tables) = &self.tables {
            outside.hold(&held_as(id), service, &[(TABLES, tables.memfd.as_fd())])?;
        }
        Ok(())
    }

    /// What a worker needs to serve it.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut all = vec![self.userfaultfd.as_fd(), self.peer.pidfd.as_fd()];
        all.extend(self.page_map.as_ref().map(AsFd::as_fd));
        all.extend(self.tables.as_ref().map(|tables| tables.memfd.as_fd()));
        all
    }

    /// Frames that are not to be decoded.
    pub(crate) fn deadly(&self) -> Vec<u64> {
        let deadly = self
            .suspects
            .iter()
            .filter(|(_, deaths)| **deaths >= DEADLY);
        deadly.map(|(frame, _)| *frame).collect()
    }

    /// Its worker has died of itself: notes on which frames.
    pub(crate) fn blame_frames(&mut self) {
        for frame in self
            .tables
            .iter()
            .flat_map(|tables| tables.vitals.decoding())
        {
            *self.suspects.entry(frame).or_default() += 1;
        }
    }

    /// Its worker is killed for keeping it waiting.
    pub(crate) fn count_stuck(&mut self, patience: Duration) {
        let (count, last) = &mut self.stuck;
        // The next one would get stuck at once.
        if last.is_some_and(|last| last.elapsed() > IN_A_ROW * patience) {
            *count = 0;
        }
        (*count, *last) = (*count + 1, Some(Instant::now()));
    }

    /// Whether its worker was killed for keeping it waiting, and has not ended yet.
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck.1.is_some_and(|last| last >= self.watch.since)
    }

    /// Whether no worker can serve it.
    pub(crate) fn is_hopeless(&self) -> bool {
        self.stuck.0 >= HOPELESS
    }

    /// Whether its worker reads a frame for it.
    pub(crate) fn is_reading(&self) -> bool {
        let tables = self.tables.as_ref();
        tables.is_some_and(|tables| !tables.vitals.decoding().is_empty())
    }

    /// A new worker is to serve it.
    pub(crate) fn handed_over(&mut self) {
        self.watch = Watch::begin();
    }

    /// The worker has it in hand.
    pub(crate) fn is_served(&mut self) {
        self.watch.served = true;
    }

    /// Whether it waits for something that its worker has not done for so long: begun to serve it, read
    /// its messages, answered its fault.
    pub(crate) fn is_neglected(&mut self, patience: Duration) -> bool {
        let now = Instant::now();
        let late = |since: Instant| now.duration_since(since) >= patience;
        let watch = &mut self.watch;
        let Some(tables) = self.tables.as_ref().filter(|_| watch.served) else {
            return late(watch.since);
        };
        let pulse = tables.vitals.pulse();
        if pulse.reads != watch.reads.0 || !readable(self.userfaultfd.as_fd()) {
            watch.reads = (pulse.reads, now);
        }
        watch.turns.resize(pulse.turns.len(), (0, now));
        for (seen, turns) in watch.turns.iter_mut().zip(pulse.turns) {
            if seen.0 != turns || turns.is_multiple_of(2) {
                *seen = (turns, now);
            }
        }
        late(watch.reads.1) || watch.turns.iter().any(|(_, since)| late(*since))
    }
}

/// A VM that is served no more, and whose process may not have ended yet.
#[derive(Debug)]
pub(crate) struct Dying {
    /// The number of its service; 0 if it has none here.
    pub(crate) service: u64,
    /// The name of its service, as far as it is known.
    pub(crate) service_name: String,
    pub(crate) pid: u32,
    pub(crate) connected: Instant,
    owner: OwnedFd,
    /// Closed when it has ended and not before, since what is missing becomes zeros.
    held: Vec<OwnedFd>,
    /// The same, of one whose handshake had not come as a whole.
    _unheard: Option<Unheard>,
}

impl Dying {
    /// Kills it. What the kernel says if that isn't permitted.
    pub(crate) fn kill(&self) -> Result<(), Errno> {
        match kill_by_pidfd(self.owner()) {
            Err(Errno::ESRCH) => Ok(()),
            killed => killed,
        }
    }

    /// One of which only a pidfd is known.
    fn part(owner: OwnedFd, held: Vec<OwnedFd>) -> Self {
        Self {
            service: 0,
            service_name: String::new(),
            pid: pid_of(owner.as_fd()).unwrap_or(0),
            connected: Instant::now(),
            owner,
            held,
            _unheard: None,
        }
    }

    pub(crate) fn owner(&self) -> BorrowedFd<'_> {
        self.owner.as_fd()
    }

    /// Has it held outside, by who ends it and then closes what it has.
    pub(crate) fn hold(&self, id: u64, outside: &mut Outside) -> io::Result<()> {
        let userfaultfd = self.held.iter().find(|fd| is_userfaultfd(fd.as_fd()));
        let mut descriptors = vec![(OWNER, self.owner())];
        descriptors.extend(userfaultfd.map(|fd| (UFFD, fd.as_fd())));
        outside.hold(&held_as(id), &self.service_name, &descriptors)
    }

    pub(crate) fn is_gone(&self) -> bool {
        readable(self.owner())
    }
}

impl From<Vm> for Dying {
    fn from(vm: Vm) -> Self {
        Self {
            service: vm.service,
            pid: vm.peer.pid,
            connected: vm.connected,
            ..Self::part(vm.peer.pidfd, vec![vm.userfaultfd])
        }
    }
}

impl From<Pending> for Dying {
    fn from(pending: Pending) -> Self {
        let (service, connected) = (pending.service, pending.since);
        let (peer, unheard) = pending.into_unheard();
        Self {
            service,
            pid: peer.pid,
            connected,
            _unheard: Some(unheard),
            ..Self::part(peer.pidfd, Vec::new())
        }
    }
}

impl From<Queued> for Dying {
    fn from(Queued { peer, stream }: Queued) -> Self {
        Self {
            pid: peer.pid,
            ..Self::part(peer.pidfd, vec![stream.into()])
        }
    }
}

/// What has to be known of a VM besides its descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    pid: u32,
    uid: u32,
    regions: Vec<OwnerRegion>,
    service: Service,
    /// The id under which its snapshot's open file is held.
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

/// A VM that was held outside.
#[derive(Debug)]
pub(crate) enum Held {
    /// As a whole.
    Vm {
        /// Of no service yet.
        vm: Box<Vm>,
        service: Service,
        /// The id under which its snapshot's open file is held.
        file: String,
    },
    /// In part, which is good for ending it only.
    Part {
        vm: Dying,
        /// Why it can't be served.
        why: String,
    },
}

impl Held {
    /// From what was held under one id.
    pub(crate) fn of(descriptors: Vec<(String, OwnedFd)>) -> Result<Self> {
        let mut by_role: BTreeMap<_, _> = descriptors.into_iter().collect();
        let owner = by_role.remove(OWNER);
        let pidfd = owner.context("it came back without its pidfd")?;
        let part = |owner, held, why: anyhow::Error| Self::Part {
            vm: Dying::part(owner, held),
            why: format!("{why:#}"),
        };
        let meta = match by_role.get(META).map(Meta::read) {
            Some(Ok(meta)) if by_role.contains_key(UFFD) => meta,
            Some(Err(error)) => {
                let why = error.context("its description can't be read");
                return Ok(part(pidfd, by_role.into_values().collect(), why));
            }
            _ => {
                let why = anyhow!("it was handing its memory over when the last keeper died");
                return Ok(part(pidfd, by_role.into_values().collect(), why));
            }
        };
        let peer = Peer {
            pid: meta.pid,
            uid: meta.uid,
            pidfd,
        };
        let userfaultfd = by_role.remove(UFFD).context("a userfaultfd")?;
        let mut vm = Vm::new(0, peer, userfaultfd, meta.regions);
        vm.page_map = by_role.remove(PAGE_MAP);
        let tables = by_role.remove(TABLES);
        match tables.map_or(Ok(()), |tables| vm.keep_tables(tables)) {
            Ok(()) => Ok(Self::Vm {
                vm: Box::new(vm),
                service: meta.service,
                file: meta.file,
            }),
            Err(why) => Ok(part(vm.peer.pidfd, vec![vm.userfaultfd], why)),
        }
    }
}

/// Under which id what belongs to VM number `id` is held outside.
pub(crate) fn held_as(id: u64) -> String {
    format!("vm-{id}")
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
        && fds[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLIN))
}
