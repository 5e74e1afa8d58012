//! The keeper: one thread that holds what can't be made again, and watches the worker.
//!
//! ```text
//!   loop: wait for any of
//!     a connection          who it is, and whether it may
//!     a handshake           whole: it becomes a VM, and the worker is told
//!     a word of the worker  tables to keep, a VM that ended
//!     the worker's end      take its last words, start another, tell it everything
//!     an owner's end        close what was its own
//!     a signal              no more VMs; the worker completes those that are there; asked again,
//!                           they are killed
//!     a second gone by      is the worker stuck, is a handshake overdue?
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use snaprestore_engine::pager::firecracker::{Handshake, HandshakeError};
use snaprestore_engine::sys::{Peer, peer_of};

use super::child::{Death, Worker};
use super::config::Service;
use super::listening::Listening;
use super::pending::{self, Pending};
use super::report::{Ending, Vm as Report};
use super::vms::Vm;
use super::wire::{FromWorker, ToWorker};
use crate::input;
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

/// How the daemon goes about it.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// How long a VM may wait for a worker that does nothing.
    pub(crate) stuck_after: Duration,
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
    outgoing: VecDeque<Outgoing>,
    services: BTreeMap<u64, Open>,
    vms: BTreeMap<u64, Vm>,
    next: u64,
    pending: Vec<Pending>,
    /// VMs that are no longer served, and whose processes have not ended yet.
    dying: Vec<Vm>,
    endings: Vec<Report>,
    ended: u64,
    stopping: Stopping,
}

/// A service that was opened.
struct Open {
    service: Service,
    file: OwnedFd,
    listening: Option<Listening>,
}

/// What waits to be sent to the worker. The descriptors are looked up when it is sent.
#[derive(Clone, Copy, Debug)]
enum Outgoing {
    Service(u64),
    Vm(u64),
    Drain,
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
        let worker = Worker::start(&program, 0)?;
        Ok(Self {
            options,
            output,
            cancel: cancel.clone(),
            program,
            worker,
            workers: 1,
            stillborn: 0,
            outgoing: VecDeque::new(),
            services: BTreeMap::new(),
            vms: BTreeMap::new(),
            next: 1,
            pending: Vec::new(),
            dying: Vec::new(),
            endings: Vec::new(),
            ended: 0,
            stopping: Stopping::No,
        })
    }

    /// Listens for the VMs of a service from now on.
    pub(crate) fn add(&mut self, service: Service) -> Result<()> {
        // What is no good snapshot is refused here, and not VM by VM.
        drop(input::open(&service.snapshot)?);
        let store = input::store(&service.snapshot)?;
        let file = store.file().try_clone().context("a snapshot's file")?;
        let listening = Some(Listening::bind(&service.socket)?);
        let key = self.number();
        let open = Open {
            service,
            file: file.into(),
            listening,
        };
        self.services.insert(key, open);
        self.outgoing.push_back(Outgoing::Service(key));
        Ok(())
    }

    /// Serves until asked to stop, and every VM has ended or was let go. What became of them, and how many
    /// there were.
    pub(crate) fn run(mut self) -> Result<(Vec<Report>, u64)> {
        let failed = loop {
            if let Err(error) = self.turn() {
                // VMs without a keeper would wait for ever.
                self.output.error(format_args!("{error:#}"));
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
            self.dying.retain(|vm| !vm.is_gone());
        }
        failed.map(|()| (self.endings, self.ended))
    }

    /// Waits for something, and does what follows.
    fn turn(&mut self) -> Result<()> {
        self.send()?;
        let tokens = self.tokens();
        let ready = self.wait_for_one(&tokens)?;
        // From the back: places in lists stay right.
        for token in ready.into_iter().rev() {
            match token {
                Token::Signal => self.stop(),
                Token::Wire => self.listen_to_worker()?,
                Token::Death => self.replace_worker()?,
                Token::Listening(key) => self.accept(key),
                Token::Pending(at) => self.shake_hands(at),
                Token::Dying => self.dying.retain(|vm| !vm.is_gone()),
            }
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
        self.watch_worker();
        Ok(())
    }

    fn tokens(&self) -> Vec<Token> {
        let mut tokens = vec![Token::Death, Token::Wire];
        if self.stopping == Stopping::No {
            tokens.push(Token::Signal);
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
                    for vm in &self.dying {
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
            Some(Ok(Some(stream))) => stream,
            Some(Err(error)) => {
                // Of one connection, or for want of descriptors: the others go on.
                self.output
                    .warn(format_args!("a connection could not be taken: {error}"));
                std::thread::sleep(Duration::from_millis(100));
                return;
            }
            Some(Ok(None)) | None => return,
        };
        match admit(open, &stream) {
            Ok(peer) => match Pending::new(
                key,
                stream,
                peer,
                Duration::from_secs(open.service.patience),
            ) {
                Ok(pending) => self.pending.push(pending),
                Err(error) => self
                    .output
                    .warn(format_args!("a VMM is not heard: {error}")),
            },
            Err(error) => self.output.warn(format_args!("{error:#}")),
        }
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
        let id = self.number();
        self.vms.insert(id, vm);
        self.outgoing.push_back(Outgoing::Vm(id));
    }

    /// Sends the worker what it is to know, until it has no room for more.
    fn send(&mut self) -> Result<()> {
        while let Some(next) = self.outgoing.front() {
            match self.send_one(*next) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // It has died; its successor is told everything.
                Err(error) if is_gone(&error) => return Ok(()),
                Err(error) => return Err(error).context("telling the worker"),
            }
            self.outgoing.pop_front();
        }
        Ok(())
    }

    fn send_one(&self, what: Outgoing) -> io::Result<()> {
        let wire = &self.worker.wire;
        match what {
            Outgoing::Service(key) => {
                let Some(open) = self.services.get(&key) else {
                    return Ok(());
                };
                let service = open.service.clone();
                let message = ToWorker::Service { key, service };
                wire.send(&message, &[open.file.as_fd()])
            }
            Outgoing::Vm(id) => {
                let Some(vm) = self.vms.get(&id) else {
                    return Ok(());
                };
                let message = ToWorker::Vm {
                    id,
                    service: vm.service,
                    pid: vm.peer.pid,
                    regions: vm.regions.clone(),
                    deadly: vm.deadly(),
                };
                wire.send(&message, &vm.descriptors())
            }
            Outgoing::Drain => wire.send(&ToWorker::Drain, &[]),
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
            FromWorker::Ready => self.worker.ready = true,
            FromWorker::Tables { id } => {
                let memfd = descriptors
                    .into_iter()
                    .next()
                    .context("tables without a memfd")?;
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.keep_tables(memfd)?;
                }
            }
            FromWorker::Served { id } => {
                if let Some(vm) = self.vms.get_mut(&id) {
                    vm.is_served();
                    let pid = vm.peer.pid;
                    self.output.say(format_args!("VM {pid}: served"));
                }
            }
            FromWorker::Ended { id, vm: report } => {
                let Some(vm) = self.vms.remove(&id) else {
                    return Ok(());
                };
                if report.ending == Ending::Refused {
                    self.kill(&vm);
                }
                if report.ending != Ending::Complete {
                    self.dying.push(vm);
                }
                self.note(report);
            }
        }
        Ok(())
    }

    /// The worker is gone: another goes on.
    fn replace_worker(&mut self) -> Result<()> {
        // Its last words count, and it says no more.
        self.listen_to_worker()?;
        let Death { how, of_itself } = self.worker.bury()?;
        let lived = self.worker.ready && self.worker.started.elapsed() >= LIVED;
        self.stillborn = match lived || !of_itself && self.worker.ready {
            true => 0,
            false => self.stillborn + 1,
        };
        if self.stopping == Stopping::Kills {
            return Ok(());
        }
        let vms = self.vms.len();
        self.output.error(format_args!(
            "the worker {how}; another goes on with {vms} VMs"
        ));
        if self.stillborn > MOST_STILLBORN {
            bail!("{MOST_STILLBORN} workers in a row have ended at once; the last {how}");
        }
        for vm in self.vms.values_mut() {
            if of_itself {
                vm.blame_frames();
            }
            vm.handed_over();
        }
        self.worker = Worker::start(&self.program, self.workers)?;
        self.workers += 1;
        let services = self.services.keys().map(|key| Outgoing::Service(*key));
        let vms = self.vms.keys().map(|id| Outgoing::Vm(*id));
        self.outgoing = services.chain(vms).collect();
        if self.stopping == Stopping::Drains {
            self.outgoing.push_back(Outgoing::Drain);
        }
        Ok(())
    }

    /// Kills a worker that keeps a VM waiting.
    fn watch_worker(&mut self) {
        let patience = self.options.stuck_after;
        let ready = self.worker.ready || self.worker.started.elapsed() < patience;
        let neglected = |vm: &mut Vm| vm.is_neglected(patience);
        if !ready || self.vms.values_mut().any(neglected) {
            self.worker.kill_stuck();
        }
    }

    /// Takes no more VMs, and lets those that are there go.
    fn stop(&mut self) {
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
        self.stopping = Stopping::Drains;
        self.outgoing.push_back(Outgoing::Drain);
    }

    /// Ends every VM: nobody will serve it.
    fn kill_all(&mut self, why: &str) {
        self.pending.clear();
        for (_, vm) in std::mem::take(&mut self.vms) {
            self.kill(&vm);
            let pid = vm.peer.pid;
            self.dying.push(vm);
            self.note(Report::new(pid, Ending::Killed, Some(why.to_owned())));
        }
    }

    fn kill(&self, vm: &Vm) {
        if let Err(errno) = vm.kill() {
            let pid = vm.peer.pid;
            self.output.error(format_args!(
                "VM {pid} can't be killed ({errno}), and waits for its next missing page for ever: end it"
            ));
        }
    }

    /// Tells what became of a VM, and keeps it for the report.
    fn note(&mut self, report: Report) {
        match report.reason {
            Some(_) => self.output.error(&report),
            None => self.output.say(&report),
        }
        self.ended += 1;
        if self.endings.len() < MOST_ENDINGS {
            self.endings.push(report);
        }
    }

    fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }
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
