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
//!
//! The loop is here; `services` are what VMs connect to, `vms` the VMs that have, `workers` is the worker
//! and what it is told, `stuck` what follows when it is stuck, `upgrade` a worker of another program that is to take over.

mod handshake;
mod listener;
mod refusal_log;
mod services;
mod stuck;
mod upgrade;
mod vm;
mod vms;
pub(crate) mod worker_process;
mod workers;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt::Display;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use self::services::{Open, Opening, Unclosed};
use self::stuck::Undead;
use self::upgrade::Successor;
use self::workers::{Outgoing, Stillborn};
use crate::api::summary::{Vm as Report, VmLabel};
use crate::api::types;
use crate::fd_store::Outside;
use crate::fd_store::systemd::{self, Manager};
use crate::ipc::Door;
use crate::log::LogFormat;
use crate::supervisor::handshake::Pending;
use crate::supervisor::listener::Listening;
use crate::supervisor::refusal_log::Refusals;
use crate::supervisor::vm::{Dying, Vm};
use crate::supervisor::worker_process::Worker;

/// How often it looks at what no descriptor tells.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The most endings that are kept word for word; more are only counted.
const MOST_ENDINGS: usize = 10_000;
/// VMs that have ended and that operators may still ask for.
pub(super) const REMEMBERED: usize = 100;
/// How long a guardian may take for its last messages.
const LAST_MESSAGES: Duration = Duration::from_secs(5);
/// Visitors that wait for a worker.
const MOST_VISITORS: usize = 64;

/// How the daemon goes about it.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a VM may wait for a worker that does nothing.
    pub stuck_after: Duration,
    /// Decoded frames that VMs of one snapshot share, in MiB.
    pub frame_cache: u64,
    /// The format of log lines.
    pub log_format: LogFormat,
    /// Whether the worker gives up what it doesn't need.
    pub confine: bool,
    /// The user that the confined worker becomes, by name or number.
    pub user: Option<String>,
}

/// Where messages for people go while the log format is [`LogFormat::Text`].
pub trait Console {
    /// Shows what is going on.
    fn say(&self, message: &dyn Display);
    /// Shows what went wrong.
    fn error(&self, message: &dyn Display);
}

/// Requests to stop, as a process gets them by signals. The descriptor is readable once there is one.
pub trait StopRequests: AsFd {
    /// How many there were: after the first the VMs are completed, after the second killed.
    fn count(&self) -> u32;
}

/// What became of all VMs.
#[derive(Debug)]
pub struct Ended {
    /// The first of them.
    pub vms: Vec<Report>,
    /// How many there were.
    pub count: u64,
    /// VMs that were killed after the daemon was asked to stop, and so before they had all of their memory.
    pub incomplete: u64,
    /// Workers that took over from one that had died.
    pub worker_restarts: u64,
}

/// The keeper.
pub struct Keeper {
    options: Options,
    /// Messages are logged if there is none.
    console: Option<Box<dyn Console>>,
    stop_requests: Box<dyn StopRequests>,
    program: OsString,
    worker: Worker,
    undead: Vec<Undead>,
    /// Workers started, and those in a row that ended at once.
    workers: u64,
    stillborn: Stillborn,
    restarts: u64,
    successor: Option<Successor>,
    outside: Outside,
    outgoing: VecDeque<Outgoing>,
    services: BTreeMap<u64, Open>,
    opening: Vec<Opening>,
    doors: Vec<(Door, Listening)>,
    vms: BTreeMap<u64, Vm>,
    /// The numbers of the next service and the next VM.
    next: (u64, u64),
    pending: Vec<Pending>,
    unclosed: Vec<Unclosed>,
    /// Sockets of a keeper that has died, by their paths, and what they are held as.
    inherited: BTreeMap<PathBuf, (String, Listening)>,
    /// VMs that are no longer served, and whose processes have not ended yet.
    dying: BTreeMap<u64, Dying>,
    endings: Vec<Report>,
    ended: u64,
    incomplete: u64,
    /// The last that have ended, for operators.
    recent: VecDeque<types::Vm>,
    refusals: Refusals,
    stopping: Stopping,
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
    pub fn new(
        options: Options,
        console: Option<Box<dyn Console>>,
        stop_requests: Box<dyn StopRequests>,
    ) -> Result<Self> {
        raise_descriptor_limit();
        let program = OsString::from("/proc/self/exe");
        let given = systemd::given();
        let outside = Outside::find(Path::new(&program), &given);
        let worker = Worker::start(&program, 0, &options)?;
        let mut keeper = Self {
            options,
            console,
            stop_requests,
            program,
            worker,
            undead: Vec::new(),
            workers: 1,
            stillborn: Stillborn::default(),
            restarts: 0,
            successor: None,
            outside,
            outgoing: VecDeque::new(),
            services: BTreeMap::new(),
            opening: Vec::new(),
            doors: Vec::new(),
            vms: BTreeMap::new(),
            next: (1, 1),
            pending: Vec::new(),
            unclosed: Vec::new(),
            inherited: BTreeMap::new(),
            dying: BTreeMap::new(),
            endings: Vec::new(),
            ended: 0,
            incomplete: 0,
            recent: VecDeque::new(),
            refusals: Refusals::new(),
            stopping: Stopping::No,
        };
        if let Some(warning) = keeper.outside.warning() {
            keeper.complain(warning);
        }
        keeper.go_on_with(given.held);
        Ok(keeper)
    }

    /// Serves until asked to stop, and every VM has ended or was let go.
    pub fn run(mut self) -> Result<Ended> {
        tell_manager("READY=1");
        self.end_inherited();
        let mut outcome = Ok(());
        loop {
            let turn = self.turn();
            let fails_again = turn.is_err() && self.stopping == Stopping::Kills;
            if let Err(error) = &turn {
                // VMs without a keeper would wait for ever.
                self.kill_all(&format!("the daemon can't go on: {error:#}"));
                self.stopping = Stopping::Kills;
            }
            outcome = outcome.and(turn);
            let is_empty = self.vms.is_empty() && self.pending.is_empty();
            if fails_again || self.stopping != Stopping::No && is_empty {
                break;
            }
        }
        while !self.dying.is_empty() {
            self.wait_for_one(&[Token::Dying])?;
            self.bury();
        }
        self.let_worker_leave();
        if !self.outside.settle(LAST_MESSAGES) {
            self.complain(format_args!(
                "{} reads nothing, and takes VMs that were let go for such that are served: kill it (SIGKILL), or it \
                 kills them when it goes on",
                self.outside
            ));
        }
        outcome.map(|()| Ended {
            vms: self.endings,
            count: self.ended,
            incomplete: self.incomplete,
            worker_restarts: self.restarts,
        })
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
                Token::Listening(key) => {
                    self.accept(key);
                }
                Token::Pending(at) => self.shake_hands(at),
                Token::Dying => self.bury(),
                Token::Outside => self.hear_outside(),
            }
        }
        if self.stop_requests.count() > 0 {
            self.stop();
        }
        for at in (0..self.pending.len()).rev() {
            if let Some(error) = self.pending[at].overdue() {
                self.refuse(at, &error);
            }
        }
        if self.stopping == Stopping::Drains && self.stop_requests.count() > 1 {
            self.kill_all("asked twice to stop");
            self.stopping = Stopping::Kills;
        }
        self.catch_up_outside();
        self.watch_unclosed();
        self.watch_opening();
        if let Some(untold) = self.refusals.untold(Instant::now()) {
            self.complain(format_args!("{untold} more connections were refused"));
        }
        self.watch_succession();
        self.watch_worker()
    }

    fn tokens(&self) -> Vec<Token> {
        let mut tokens = vec![Token::Death, Token::Wire, Token::Outside];
        if self.stop_requests.count() == 0 {
            tokens.push(Token::Signal);
        }
        if self.successor.is_some() {
            tokens.push(Token::Succession);
        }
        if self.outgoing.len() < MOST_VISITORS {
            tokens.extend((0..self.doors.len()).map(Token::Door));
        }
        if self.takes_more() {
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
                Token::Signal => add(self.stop_requests.as_fd(), *token),
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
                        add(vm.owner(), *token);
                    }
                }
            }
        }
        // A worker that doesn't read is looked at again, and its wire tried again; so is a file that is being opened.
        let millis = if self.outgoing.is_empty() && self.opening.is_empty() {
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

    /// Takes no more VMs, and lets those that are there go.
    fn stop(&mut self) {
        if self.stopping != Stopping::No {
            return;
        }
        let keys: Vec<u64> = self.services.keys().copied().collect();
        for key in keys {
            self.close(key);
        }
        tell_manager("STOPPING=1");
        self.stopping = Stopping::Drains;
        self.outgoing.push_back(Outgoing::Drain);
    }

    /// Tells what became of a VM of a service, and keeps it for the report and for operators, who are told what is
    /// returned.
    fn note(&mut self, service: u64, connected: Instant, report: Report) -> types::Vm {
        match report.reason {
            Some(_) => self.complain_of(&report.label, &report),
            None => self.say_of(&report.label, &report),
        }
        self.ended += 1;
        self.count_ended(service, report.ending);
        let age = u64::try_from(connected.elapsed().as_millis());
        let told = types::Vm {
            id: report.label.id,
            service: report.label.service.clone(),
            pid: report.label.pid,
            state: report.ending.into(),
            reason: report.reason.clone(),
            age_ms: age.unwrap_or(u64::MAX),
        };
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(told.clone());
        if self.endings.len() < MOST_ENDINGS {
            self.endings.push(report);
        }
        told
    }

    /// Tells of a connection that comes to nothing, unless there are too many.
    fn refused(&mut self, label: &VmLabel, what: impl Display) {
        if !self.refusals.is_shown() {
            return;
        }
        match &self.console {
            Some(console) => console.error(&format_args!("{label}: {what}")),
            // A place of its own: these keep nothing else from being logged.
            None => label.span().in_scope(|| tracing::error!("{what}")),
        }
    }

    /// The same of one whose handshake was bad, for the report.
    fn note_refusal(&mut self, report: Report) {
        self.refused(&report.label, &report);
        self.ended += 1;
        if self.refusals.is_kept() && self.endings.len() < MOST_ENDINGS {
            self.endings.push(report);
        }
    }

    /// What goes on.
    fn say(&self, what: impl Display) {
        match &self.console {
            Some(console) => console.say(&what),
            None => tracing::info!("{what}"),
        }
    }

    /// Logs `what` happens to a VM.
    fn say_of(&self, label: &VmLabel, what: impl Display) {
        match &self.console {
            Some(console) => console.say(&format_args!("{label}: {what}")),
            None => label.span().in_scope(|| tracing::info!("{what}")),
        }
    }

    /// What went wrong with a VM.
    fn complain_of(&self, label: &VmLabel, what: impl Display) {
        match &self.console {
            Some(console) => console.error(&format_args!("{label}: {what}")),
            None => label.span().in_scope(|| tracing::error!("{what}")),
        }
    }

    /// What went wrong.
    fn complain(&self, what: impl Display) {
        match &self.console {
            Some(console) => console.error(&what),
            None => tracing::error!("{what}"),
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

/// Every VM takes some descriptors.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // With fewer it serves fewer.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
