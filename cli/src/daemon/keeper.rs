//! The keeper: one thread that holds what can't be made again, and watches the worker.
//!
//! ```text
//!   loop: wait for any of
//!     a connection          who it is, and whether it may
//!     a handshake           whole: it becomes a VM, and the worker is told
//!     a word of the worker  tables to keep, a VM that ended
//!     the worker's end      take its last words, start another, tell it everything
//!     a visitor             the worker is told
//!     a successor's word    the worker is killed, and the successor is the worker
//!     news from outside     who holds what the keeper would take with it has gone away
//!     an owner's end        close what was its own
//!     a signal              no more VMs; the worker completes those that are there; asked again,
//!                           they are killed
//!     a second gone by      is the worker stuck, is a handshake overdue?
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use snaprestore_engine::pager::firecracker::{Handshake, HandshakeError};
use snaprestore_engine::sys::{Peer, peer_of};

use super::child::{Death, Worker};
use super::config::{MetricsAddress, Service};
use super::desk::{Refused, Upgraded};
use super::listening::Listening;
use super::outside::{News, Outside};
use super::pending::{self, Pending};
use super::report::{Ending, Vm as Report};
use super::systemd::{self, Manager};
use super::vms::{Held, Vm};
use super::wire::{Door, Facts, FromWorker, Request, ToWorker};
use crate::input;
use crate::log::LogFormat;
use crate::output::Output;
use crate::signals::Cancel;

/// How often it looks at what no descriptor tells.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Workers in a row that end before they are ready, or at once afterwards, until the daemon gives up.
const MOST_STILLBORN: u32 = 20;
/// A worker that has lived so long was not stillborn.
const LIVED: Duration = Duration::from_secs(10);
/// The most endings that are kept word for word; more are only counted.
const MOST_ENDINGS: usize = 10_000;
/// How long a program that is to take over may need until it is ready.
const SUCCESSION: Duration = Duration::from_secs(20);
/// How long a worker may go on that has a successor, for its last words to an operator, and one that has
/// nothing left to do.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Visitors that wait for a worker.
const MOST_VISITORS: usize = 64;
/// VMs and handshakes of one process, where one is usual: the rest of what can be had is for others.
const MOST_OF_A_PROCESS: usize = 16;

/// How the daemon goes about it.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// How long a VM may wait for a worker that does nothing.
    pub(crate) stuck_after: Duration,
    pub(crate) log_format: LogFormat,
    /// Whether the worker gives up what it doesn't need, and whom it becomes.
    pub(crate) confine: bool,
    pub(crate) user: Option<String>,
}

/// What became of all VMs.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The first of them.
    pub(crate) vms: Vec<Report>,
    /// How many there were.
    pub(crate) count: u64,
    /// Workers that took over from one that had died.
    pub(crate) worker_restarts: u64,
}

/// The keeper.
pub(crate) struct Keeper {
    options: Options,
    output: Output,
    cancel: Cancel,
    program: OsString,
    worker: Worker,
    /// Workers started, and how many in a row ended at once.
    workers: u64,
    stillborn: u32,
    restarts: u64,
    successor: Option<Successor>,
    outside: Outside,
    outgoing: VecDeque<Outgoing>,
    services: BTreeMap<u64, Open>,
    doors: Vec<(Door, Listening)>,
    vms: BTreeMap<u64, Vm>,
    /// The numbers of the next service and the next VM.
    next: (u64, u64),
    pending: Vec<Pending>,
    /// VMs that are no longer served, and whose processes have not ended yet.
    dying: BTreeMap<u64, Vm>,
    endings: Vec<Report>,
    ended: u64,
    stopping: Stopping,
}

/// A service that was opened.
struct Open {
    service: Service,
    file: OwnedFd,
    /// Under which id it is held outside.
    held_as: String,
    listening: Option<Listening>,
    /// Whether it is forgotten when its last VM has ended.
    removed: bool,
    /// VMs that have ended.
    ended: u64,
}

/// A worker that is to take over.
#[derive(Debug)]
struct Successor {
    worker: Worker,
    program: OsString,
    /// The operator's question.
    number: u64,
    /// Since when it has been ready.
    ready: Option<Instant>,
}

/// What waits to be sent to the worker. Descriptors that are kept are looked up when it is sent.
#[derive(Debug)]
enum Outgoing {
    Service(u64),
    Forget(u64),
    Vm(u64),
    Visitor(Door, OwnedFd),
    Answer(u64, Result<Option<Upgraded>, String>),
    Drain,
    Leave,
}

/// How far the daemon is with its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopping {
    No,
    /// The worker completes the VMs.
    Drains,
    /// They are being killed.
    Kills,
}

/// What a descriptor that is waited for is.
#[derive(Clone, Copy)]
enum Token {
    Signal,
    Wire,
    Death,
    Succession,
    Outside,
    Door(usize),
    Listening(u64),
    Pending(usize),
    Dying,
}

impl Keeper {
    /// Starts the worker.
    pub(crate) fn new(options: Options, output: Output, cancel: &Cancel) -> Result<Self> {
        raise_descriptor_limit();
        cancel.count_signals();
        let program = OsString::from("/proc/self/exe");
        let given = systemd::given();
        let outside = Outside::find(Path::new(&program), &given);
        let worker = Worker::start(&program, 0, &options)?;
        let mut keeper = Self {
            options,
            output,
            cancel: cancel.clone(),
            program,
            worker,
            workers: 1,
            stillborn: 0,
            restarts: 0,
            successor: None,
            outside,
            outgoing: VecDeque::new(),
            services: BTreeMap::new(),
            doors: Vec::new(),
            vms: BTreeMap::new(),
            next: (1, 1),
            pending: Vec::new(),
            dying: BTreeMap::new(),
            endings: Vec::new(),
            ended: 0,
            stopping: Stopping::No,
        };
        if let Some(warning) = keeper.outside.warning() {
            keeper.complain(warning);
        }
        keeper.go_on_with(given.held);
        Ok(keeper)
    }

    /// Takes back the VMs of a keeper that has died. Its worker died with it, or before this was started.
    fn go_on_with(&mut self, held: BTreeMap<String, Vec<(String, OwnedFd)>>) {
        let (vms, mut files): (Vec<_>, BTreeMap<_, _>) = {
            let (vms, files): (Vec<_>, Vec<_>) =
                held.into_iter().partition(|(id, _)| id.starts_with("vm-"));
            (vms, files.into_iter().collect())
        };
        for (id, descriptors) in vms {
            match Held::of(&id, descriptors) {
                Ok(held) => self.take_back(held, &mut files),
                Err(error) => {
                    self.complain(format_args!("{id} can't be served any more: {error:#}"));
                }
            }
        }
    }

    fn take_back(&mut self, held: Held, files: &mut BTreeMap<String, Vec<(String, OwnedFd)>>) {
        let Held {
            id,
            mut vm,
            service,
            file,
        } = held;
        let pid = vm.peer.pid;
        self.next.1 = self.next.1.max(id + 1);
        // All VMs of one snapshot.
        let known = self.services.iter().find(|(_, open)| open.held_as == file);
        let key = match (known.map(|(key, _)| *key), files.remove(&file)) {
            (Some(key), _) => Some(key),
            (None, Some(mut fds)) => fds.pop().map(|(_, file_fd)| {
                let key = self.next.0;
                self.next.0 += 1;
                let open = Open {
                    service,
                    file: file_fd,
                    held_as: file,
                    listening: None,
                    removed: true,
                    ended: 0,
                };
                self.services.insert(key, open);
                self.outgoing.push_back(Outgoing::Service(key));
                key
            }),
            (None, None) => None,
        };
        if let Some(key) = key {
            vm.service = key;
            self.vms.insert(id, vm);
            self.outgoing.push_back(Outgoing::Vm(id));
            self.say(format_args!("VM {pid}: taken back from systemd"));
        } else {
            self.kill(&vm);
            self.dying.insert(id, vm);
            let why = "its snapshot's open file was not held".to_owned();
            self.note(Report::new(pid, Ending::Killed, Some(why)));
        }
    }

    /// Has what a VM can't do without held outside.
    fn hold(&mut self, id: u64) {
        let Some(vm) = self.vms.get(&id) else { return };
        let Some(open) = self.services.get(&vm.service) else {
            return;
        };
        let outside = &mut self.outside;
        let held = vm.hold(id, &open.service, &open.held_as, outside);
        if let Err(error) = held {
            let pid = vm.peer.pid;
            self.held_by_nobody(pid, &error);
        }
    }

    fn held_by_nobody(&self, pid: u32, error: &anyhow::Error) {
        self.complain(format_args!(
            "VM {pid} is held by nobody else, and is lost with this process: {error:#}"
        ));
    }

    /// Nobody needs to hold a VM any more.
    fn release(&mut self, id: u64) {
        if let Err(error) = self.outside.release(&format!("vm-{id}")) {
            self.complain(format_args!("what was held of a VM is not let go: {error}"));
        }
    }

    fn hear_outside(&mut self) {
        for news in self.outside.news() {
            match news {
                News::NotHeld { id, why } => self.complain(format_args!(
                    "{id} is held by nobody else, and is lost with this process: {why}"
                )),
                News::Gone => {
                    self.complain("who held the VMs besides this process has ended; another does");
                    self.outside =
                        Outside::find(Path::new(&self.program), &systemd::Given::default());
                    let ids: Vec<u64> = self.vms.keys().chain(self.dying.keys()).copied().collect();
                    for id in ids {
                        self.hold(id);
                    }
                }
            }
        }
    }

    /// Closes what belonged to VMs whose processes have ended.
    fn bury(&mut self) {
        let gone = self.dying.iter().filter(|(_, vm)| vm.is_gone());
        let gone: Vec<u64> = gone.map(|(id, _)| *id).collect();
        for id in gone {
            self.dying.remove(&id);
            self.release(id);
        }
    }

    /// Lets visitors in.
    pub(crate) fn open(&mut self, door: Door, address: &MetricsAddress) -> Result<()> {
        let listening = match (door, address) {
            (Door::Control, MetricsAddress::Socket(path)) => Listening::private(path)?,
            _ => Listening::metrics(address)?,
        };
        self.doors.push((door, listening));
        Ok(())
    }

    /// Listens for the VMs of a service from now on.
    pub(crate) fn add(&mut self, service: Service) -> Result<()> {
        for open in self.services.values().filter(|open| !open.removed) {
            let (other, path) = (&open.service, service.socket.display());
            if other.name == service.name {
                bail!("there is a service {:?} already", service.name);
            }
            if other.socket == service.socket && open.listening.is_some() {
                bail!("service {:?} has the socket {path} already", other.name);
            }
        }
        // What is no good snapshot is refused here, and not VM by VM.
        drop(input::open(&service.snapshot)?);
        let store = input::store(&service.snapshot)?;
        let file = store.file().try_clone().context("a snapshot's file")?;
        let listening = Some(Listening::bind(&service.socket)?);
        let key = self.next.0;
        self.next.0 += 1;
        self.say(format_args!(
            "serving {} at {}",
            service.snapshot.display(),
            service.socket.display()
        ));
        let file = OwnedFd::from(file);
        let held_as = format!("file-{}-{key}", std::process::id());
        if let Err(error) = self.outside.hold(&held_as, &[("snapshot", file.as_fd())]) {
            self.complain(format_args!(
                "a snapshot's file is held by nobody else: {error}"
            ));
        }
        let open = Open {
            service,
            file,
            held_as,
            listening,
            removed: false,
            ended: 0,
        };
        self.services.insert(key, open);
        self.outgoing.push_back(Outgoing::Service(key));
        Ok(())
    }

    /// Serves until asked to stop, and every VM has ended or was let go.
    pub(crate) fn run(mut self) -> Result<Ended> {
        tell_manager("READY=1");
        let failed = loop {
            if let Err(error) = self.turn() {
                // VMs without a keeper would wait for ever.
                self.complain(format_args!("{error:#}"));
                self.kill_all("the daemon can't go on");
                if let Stopping::Kills = self.stopping {
                    break Err(error);
                }
                self.stopping = Stopping::Kills;
            }
            if self.stopping != Stopping::No && self.vms.is_empty() && self.pending.is_empty() {
                break Ok(());
            }
        };
        while !self.dying.is_empty() {
            self.wait_for_one(&[Token::Dying])?;
            self.bury();
        }
        self.let_worker_leave();
        failed.map(|()| Ended {
            vms: self.endings,
            count: self.ended,
            worker_restarts: self.restarts,
        })
    }

    /// Gives the worker time for its last words to an operator.
    fn let_worker_leave(&mut self) {
        self.outgoing.push_back(Outgoing::Leave);
        let until = Instant::now() + LAST_WORDS;
        while self.send().is_ok() && Instant::now() < until {
            let ready = self.wait_for_one(&[Token::Death, Token::Wire]);
            if ready.is_err() || self.listen_to_worker().is_err() || self.worker.is_gone() {
                return;
            }
        }
    }

    /// Waits for something, and does what follows.
    fn turn(&mut self) -> Result<()> {
        self.send()?;
        let tokens = self.tokens();
        let ready = self.wait_for_one(&tokens)?;
        // From the back: places in lists stay right.
        for token in ready.into_iter().rev() {
            match token {
                // It is looked at below, whenever it came.
                Token::Signal => {}
                Token::Wire => self.listen_to_worker()?,
                Token::Death => self.replace_worker()?,
                Token::Succession => self.listen_to_successor(),
                Token::Door(at) => self.let_in(at),
                Token::Listening(key) => self.accept(key),
                Token::Pending(at) => self.shake_hands(at),
                Token::Dying => self.bury(),
                Token::Outside => self.hear_outside(),
            }
        }
        if self.cancel.requested() {
            self.stop();
        }
        for at in (0..self.pending.len()).rev() {
            if let Some(error) = self.pending[at].overdue() {
                self.refuse(at, &error);
            }
        }
        if self.stopping == Stopping::Drains && self.cancel.signals() > 1 {
            self.kill_all("asked twice to stop");
            self.stopping = Stopping::Kills;
        }
        self.watch_succession();
        self.watch_worker();
        Ok(())
    }

    fn tokens(&self) -> Vec<Token> {
        let mut tokens = vec![Token::Death, Token::Wire, Token::Outside];
        if !self.cancel.requested() {
            tokens.push(Token::Signal);
        }
        if self.successor.is_some() {
            tokens.push(Token::Succession);
        }
        if self.outgoing.len() < MOST_VISITORS {
            tokens.extend((0..self.doors.len()).map(Token::Door));
        }
        if self.pending.len() < pending::MOST {
            let open = self
                .services
                .iter()
                .filter(|(_, open)| open.listening.is_some());
            tokens.extend(open.map(|(key, _)| Token::Listening(*key)));
        }
        tokens.extend((0..self.pending.len()).map(Token::Pending));
        if !self.dying.is_empty() {
            tokens.push(Token::Dying);
        }
        tokens
    }

    /// Waits until one of them is ready, or a while has gone by. Which are.
    fn wait_for_one(&self, tokens: &[Token]) -> Result<Vec<Token>> {
        let mut fds = Vec::with_capacity(tokens.len() + self.dying.len());
        let mut owners = Vec::with_capacity(fds.capacity());
        let mut add = |fd, token| {
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
            owners.push(token);
        };
        for token in tokens {
            match *token {
                Token::Signal => add(self.cancel.as_fd(), *token),
                Token::Wire => add(self.worker.wire.as_fd(), *token),
                Token::Death => add(self.worker.pidfd(), *token),
                Token::Succession => {
                    if let Some(successor) = &self.successor {
                        add(successor.worker.wire.as_fd(), *token);
                    }
                }
                Token::Outside => {
                    if let Some(outside) = self.outside.watched() {
                        add(outside, *token);
                    }
                }
                Token::Door(at) => add(self.doors[at].1.as_fd(), *token),
                Token::Listening(key) => {
                    let listening = self
                        .services
                        .get(&key)
                        .and_then(|open| open.listening.as_ref());
                    if let Some(listening) = listening {
                        add(listening.as_fd(), *token);
                    }
                }
                Token::Pending(at) => add(self.pending[at].as_fd(), *token),
                Token::Dying => {
                    for vm in self.dying.values() {
                        add(vm.peer.pidfd.as_fd(), *token);
                    }
                }
            }
        }
        // A worker that doesn't read is looked at again, and its wire tried again.
        let millis = if self.outgoing.is_empty() {
            LOOK_AGAIN.as_millis()
        } else {
            10
        };
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("waiting"),
        }
        let ready = fds.iter().zip(owners);
        let ready = ready.filter(|(fd, _)| fd.any().unwrap_or(true));
        Ok(ready.map(|(_, token)| token).collect())
    }

    /// Takes who has connected.
    fn accept(&mut self, key: u64) {
        let Some(open) = self.services.get(&key) else {
            return;
        };
        let accepted = open.listening.as_ref().map(Listening::accept);
        let stream = match accepted {
            Some(Ok(Some(stream))) => UnixStream::from(stream),
            Some(Err(error)) => return self.turned_away(&error),
            Some(Ok(None)) | None => return,
        };
        let patience = Duration::from_secs(open.service.patience);
        let pending = admit(open, &stream).and_then(|peer| {
            self.has_room_for(&peer)?;
            Pending::new(key, stream, peer, patience).context("a VMM is not heard")
        });
        match pending {
            Ok(pending) => self.pending.push(pending),
            Err(error) => self.complain(format_args!("{error:#}")),
        }
    }

    /// Whether so many of one process may be had. In another namespace processes have no number here.
    fn has_room_for(&self, peer: &Peer) -> Result<()> {
        let pid = peer.pid;
        let vms = self.vms.values().chain(self.dying.values());
        let peers = vms.map(|vm| &vm.peer);
        let peers = peers.chain(self.pending.iter().map(|pending| &pending.peer));
        if pid != 0 && peers.filter(|peer| peer.pid == pid).count() >= MOST_OF_A_PROCESS {
            bail!("VM {pid}: refused: its process has {MOST_OF_A_PROCESS} VMs already");
        }
        Ok(())
    }

    /// Takes a visitor to the worker.
    fn let_in(&mut self, at: usize) {
        let (door, listening) = &self.doors[at];
        match listening.accept() {
            Ok(Some(stream)) => self.outgoing.push_back(Outgoing::Visitor(*door, stream)),
            Ok(None) => {}
            Err(error) => self.turned_away(&error),
        }
    }

    /// Of one connection, or for want of descriptors: the others go on.
    fn turned_away(&self, error: &io::Error) {
        self.complain(format_args!("a connection could not be taken: {error}"));
        std::thread::sleep(Duration::from_millis(100));
    }

    /// Goes on with a handshake.
    fn shake_hands(&mut self, at: usize) {
        match self.pending[at].read() {
            Ok(None) => {}
            Ok(Some(handshake)) => self.begin(at, handshake),
            Err(error) => self.refuse(at, &error),
        }
    }

    /// A handshake that comes to nothing. Nobody was served.
    fn refuse(&mut self, at: usize, error: &HandshakeError) {
        let pid = self.pending.swap_remove(at).peer.pid;
        self.note(Report::new(pid, Ending::Refused, Some(error.to_string())));
    }

    fn begin(&mut self, at: usize, handshake: Handshake) {
        let Pending { service, peer, .. } = self.pending.swap_remove(at);
        let Handshake {
            userfaultfd,
            regions,
        } = handshake;
        let vm = Vm::new(service, peer, userfaultfd, regions);
        let id = self.next.1;
        self.next.1 += 1;
        self.vms.insert(id, vm);
        self.hold(id);
        self.outgoing.push_back(Outgoing::Vm(id));
    }

    /// Sends the worker what it is to know, until it has no room for more.
    fn send(&mut self) -> Result<()> {
        while let Some(next) = self.outgoing.pop_front() {
            match self.send_one(&next) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.outgoing.push_front(next);
                    return Ok(());
                }
                // It has died; its successor is told everything.
                Err(error) if is_gone(&error) => return Ok(()),
                Err(error) => return Err(error).context("telling the worker"),
            }
        }
        Ok(())
    }

    fn send_one(&self, what: &Outgoing) -> io::Result<()> {
        let wire = &self.worker.wire;
        match what {
            Outgoing::Service(key) => {
                let Some(open) = self.services.get(key) else {
                    return Ok(());
                };
                let (key, service) = (*key, open.service.clone());
                let message = ToWorker::Service { key, service };
                wire.send(&message, &[open.file.as_fd()])
            }
            Outgoing::Vm(id) => {
                let Some(vm) = self.vms.get(id) else {
                    return Ok(());
                };
                let age = vm.connected.elapsed().as_millis();
                let message = ToWorker::Vm {
                    id: *id,
                    service: vm.service,
                    pid: vm.peer.pid,
                    age_ms: u64::try_from(age).unwrap_or(u64::MAX),
                    regions: vm.regions.clone(),
                    deadly: vm.deadly(),
                };
                wire.send(&message, &vm.descriptors())
            }
            Outgoing::Visitor(door, stream) => {
                let (door, facts) = (*door, self.facts());
                wire.send(&ToWorker::Visitor { door, facts }, &[stream.as_fd()])
            }
            Outgoing::Answer(number, result) => {
                let (number, result) = (*number, result.clone());
                wire.send(&ToWorker::Answer { number, result }, &[])
            }
            Outgoing::Forget(key) => wire.send(&ToWorker::Forget { key: *key }, &[]),
            Outgoing::Drain => wire.send(&ToWorker::Drain, &[]),
            Outgoing::Leave => wire.send(&ToWorker::Leave, &[]),
        }
    }

    fn facts(&self) -> Facts {
        let ended = self.services.iter().map(|(key, open)| (*key, open.ended));
        Facts {
            keeper: std::process::id(),
            worker_restarts: self.restarts,
            draining: self.stopping != Stopping::No,
            ended: ended.collect(),
        }
    }

    /// Takes what the worker has said.
    fn listen_to_worker(&mut self) -> Result<()> {
        loop {
            match self.worker.wire.receive() {
                Ok(Some((message, descriptors))) => self.heard(message, descriptors)?,
                // Its death is noticed by itself.
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("listening to the worker"),
            }
        }
    }

    fn heard(&mut self, message: FromWorker, descriptors: Vec<OwnedFd>) -> Result<()> {
        match message {
            FromWorker::Ready { version } => self.worker.version = Some(version),
            FromWorker::Ask { number, request } => self.asked(number, request),
            // The operator knows: now it may go.
            FromWorker::Told => {
                if self
                    .successor
                    .as_ref()
                    .is_some_and(|next| next.ready.is_some())
                {
                    self.worker.kill();
                }
            }
            FromWorker::Tables { id } => {
                let memfd = descriptors
                    .into_iter()
                    .next()
                    .context("tables without a memfd")?;
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.keep_tables(memfd)?;
                    let (pid, held) = (vm.peer.pid, vm.hold_tables(id, &mut self.outside));
                    if let Err(error) = held {
                        // Without its tables a next keeper would not know what the VM has discarded.
                        self.release(id);
                        self.held_by_nobody(pid, &error);
                    }
                }
            }
            FromWorker::Served { id } => {
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.is_served();
                    let pid = vm.peer.pid;
                    self.say(format_args!("VM {pid}: served"));
                }
            }
            FromWorker::Ended { id, vm: report } => {
                let Some(vm) = self.vms.remove(&id) else {
                    return Ok(());
                };
                if report.ending == Ending::Refused {
                    self.kill(&vm);
                }
                self.count_ended(vm.service);
                if report.ending == Ending::Complete {
                    self.release(id);
                } else {
                    self.dying.insert(id, vm);
                }
                self.note(report);
            }
        }
        Ok(())
    }

    /// A VM of a service is no more. One that was removed goes with the last.
    fn count_ended(&mut self, key: u64) {
        let last = !self.vms.values().any(|vm| vm.service == key);
        if let Some(open) = self.services.get_mut(&key) {
            open.ended += 1;
            if last && open.removed {
                self.forget(key);
            }
        }
    }

    fn forget(&mut self, key: u64) {
        if let Some(open) = self.services.remove(&key) {
            // systemd lets it go with the service if it doesn't now.
            let _ = self.outside.release(&open.held_as);
        }
        self.outgoing.push_back(Outgoing::Forget(key));
    }

    /// Does what an operator wants and the worker can't do.
    fn asked(&mut self, number: u64, request: Request) {
        let result = match request {
            Request::Add(_) if self.stopping != Stopping::No => {
                Err("the daemon is about to end".to_owned())
            }
            Request::Add(service) => self.add(service).map_err(|error| format!("{error:#}")),
            Request::Remove(name) => self.remove(&name),
            Request::Drain => {
                self.stop();
                Ok(())
            }
            Request::Upgrade(program) => match self.prepare_upgrade(number, program) {
                // The answer comes when it is ready.
                Ok(()) => return,
                Err(error) => Err(format!("{error:#}")),
            },
        };
        let result = result.map(|()| None);
        self.outgoing.push_back(Outgoing::Answer(number, result));
    }

    fn remove(&mut self, name: &str) -> Result<(), String> {
        let found = self.services.iter_mut();
        let mut found = found.filter(|(_, open)| open.service.name == name && !open.removed);
        let Some((key, open)) = found.next() else {
            return Err(Refused::no_service(name).0);
        };
        let key = *key;
        (open.listening, open.removed) = (None, true);
        if !self.vms.values().any(|vm| vm.service == key)
            && !self.pending.iter().any(|pending| pending.service == key)
        {
            self.forget(key);
        }
        Ok(())
    }

    /// Starts the program that is to take over.
    fn prepare_upgrade(&mut self, number: u64, program: Option<PathBuf>) -> Result<()> {
        if self.successor.is_some() {
            bail!("another upgrade is under way");
        }
        let program = match program {
            Some(program) => program,
            None => own_path()?,
        };
        let program = program.into_os_string();
        let worker = Worker::start(&program, self.workers, &self.options)?;
        self.workers += 1;
        self.successor = Some(Successor {
            worker,
            program,
            number,
            ready: None,
        });
        Ok(())
    }

    /// Takes the first word of the worker that is to take over.
    fn listen_to_successor(&mut self) {
        let Some(successor) = &mut self.successor else {
            return;
        };
        match successor.worker.wire.receive() {
            Ok(Some((FromWorker::Ready { version }, _))) => {
                let upgraded = Upgraded {
                    from: self.worker.version.clone().unwrap_or_default(),
                    to: version.clone(),
                };
                successor.worker.version = Some(version);
                successor.ready = Some(Instant::now());
                let answer = Outgoing::Answer(successor.number, Ok(Some(upgraded)));
                self.outgoing.push_back(answer);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.give_up_upgrade("it ended, or says what no worker says"),
        }
    }

    fn give_up_upgrade(&mut self, why: &str) {
        if let Some(successor) = self.successor.take() {
            let program = successor.program.display().to_string();
            let answer = Err(format!(
                "{program}: can't take over: {why}; all goes on as before"
            ));
            self.outgoing
                .push_back(Outgoing::Answer(successor.number, answer));
        }
    }

    fn watch_succession(&mut self) {
        let Some(successor) = &self.successor else {
            return;
        };
        match successor.ready {
            None if successor.worker.started.elapsed() >= SUCCESSION => {
                self.give_up_upgrade("it takes too long to start");
            }
            Some(since) if since.elapsed() >= LAST_WORDS => self.worker.kill(),
            _ => {}
        }
    }

    /// The worker is gone: another goes on.
    fn replace_worker(&mut self) -> Result<()> {
        // Its last words count, and it says no more.
        self.listen_to_worker()?;
        let death = self.worker.bury()?;
        if self.stopping == Stopping::Kills {
            return Ok(());
        }
        self.worker = match self
            .successor
            .take_if(|successor| successor.ready.is_some())
        {
            Some(successor) => {
                let version = successor.worker.version.clone().unwrap_or_default();
                self.say(format_args!("a worker of version {version} takes over"));
                self.program = successor.program;
                successor.worker
            }
            None => self.start_another(&death)?,
        };
        for vm in self.vms.values_mut() {
            if death.of_itself {
                vm.blame_frames();
            }
            vm.handed_over();
        }
        let services = self.services.keys().map(|key| Outgoing::Service(*key));
        let vms = self.vms.keys().map(|id| Outgoing::Vm(*id));
        // Visitors of the dead one are lost, those who were not with it yet are not.
        let waiting = std::mem::take(&mut self.outgoing).into_iter();
        let waiting = waiting.filter(|outgoing| matches!(outgoing, Outgoing::Visitor(..)));
        self.outgoing = services.chain(vms).chain(waiting).collect();
        if self.stopping == Stopping::Drains {
            self.outgoing.push_back(Outgoing::Drain);
        }
        Ok(())
    }

    fn start_another(&mut self, death: &Death) -> Result<Worker> {
        let Death { how, of_itself } = death;
        let ready = self.worker.version.is_some();
        let lived = ready && (!of_itself || self.worker.started.elapsed() >= LIVED);
        self.stillborn = if lived { 0 } else { self.stillborn + 1 };
        let vms = self.vms.len();
        self.complain(format_args!(
            "the worker {how}; another goes on with {vms} VMs"
        ));
        if self.stillborn > MOST_STILLBORN {
            bail!("{MOST_STILLBORN} workers in a row have ended at once; the last {how}");
        }
        let worker = Worker::start(&self.program, self.workers, &self.options)?;
        self.workers += 1;
        self.restarts += 1;
        Ok(worker)
    }

    /// Kills a worker that keeps a VM waiting.
    fn watch_worker(&mut self) {
        let patience = self.options.stuck_after;
        let ready = self.worker.version.is_some() || self.worker.started.elapsed() < patience;
        let neglected = |vm: &mut Vm| vm.is_neglected(patience);
        if !ready || self.vms.values_mut().any(neglected) {
            self.worker.kill_stuck();
        }
    }

    /// Takes no more VMs, and lets those that are there go.
    fn stop(&mut self) {
        if self.stopping != Stopping::No {
            return;
        }
        // Who has connected already is served.
        let keys: Vec<u64> = self.services.keys().copied().collect();
        for key in keys {
            let before = self.pending.len();
            loop {
                let taken = self.pending.len();
                self.accept(key);
                if self.pending.len() == taken || self.pending.len() > before + pending::MOST {
                    break;
                }
            }
        }
        for open in self.services.values_mut() {
            open.listening = None;
        }
        tell_manager("STOPPING=1");
        self.stopping = Stopping::Drains;
        self.outgoing.push_back(Outgoing::Drain);
    }

    /// Ends every VM: nobody will serve it.
    fn kill_all(&mut self, why: &str) {
        self.pending.clear();
        for (id, vm) in std::mem::take(&mut self.vms) {
            self.kill(&vm);
            self.count_ended(vm.service);
            let pid = vm.peer.pid;
            self.dying.insert(id, vm);
            self.note(Report::new(pid, Ending::Killed, Some(why.to_owned())));
        }
    }

    fn kill(&self, vm: &Vm) {
        if let Err(errno) = vm.kill() {
            let pid = vm.peer.pid;
            self.complain(format_args!(
                "VM {pid} can't be killed ({errno}), and waits for its next missing page for ever: end it"
            ));
        }
    }

    /// Tells what became of a VM, and keeps it for the report.
    fn note(&mut self, report: Report) {
        match report.reason {
            Some(_) => self.complain(&report),
            None => self.say(&report),
        }
        self.ended += 1;
        if self.endings.len() < MOST_ENDINGS {
            self.endings.push(report);
        }
    }

    /// What goes on.
    fn say(&self, what: impl Display) {
        match self.options.log_format {
            LogFormat::Text => self.output.say(what),
            LogFormat::Json => tracing::info!("{what}"),
        }
    }

    /// What went wrong.
    fn complain(&self, what: impl Display) {
        match self.options.log_format {
            LogFormat::Text => self.output.error(what),
            LogFormat::Json => tracing::error!("{what}"),
        }
    }
}

/// Tells systemd, if it has started this process.
fn tell_manager(state: &str) {
    if let Some(Ok(manager)) = Manager::of_this_process() {
        // It finds out by itself if this goes wrong.
        let _ = manager.tell(state);
    }
}

/// Where this program is, or what has taken its place.
fn own_path() -> Result<PathBuf> {
    let path = std::env::current_exe().context("where this program is")?;
    let name = path.to_string_lossy().into_owned();
    // So the kernel calls a file that was replaced.
    Ok(name.strip_suffix(" (deleted)").map_or(path, PathBuf::from))
}

/// Who has connected, if it is to be served.
fn admit(open: &Open, stream: &UnixStream) -> Result<Peer> {
    let peer = peer_of(stream.as_fd()).context("a VMM that connected can't be identified")?;
    let allowed = &open.service.allow_uid;
    if !allowed.is_empty() && !allowed.contains(&peer.uid) {
        let Peer { pid, uid, .. } = peer;
        bail!("VM {pid}: refused: --allow-uid doesn't name its user {uid}");
    }
    Ok(peer)
}

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

/// Every VM takes some descriptors.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // With fewer it serves fewer.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
