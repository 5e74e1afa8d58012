//! Services: what is served where, who may connect, and their handshakes.

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

use super::workers::Outgoing;
use super::{Keeper, Stopping};
use crate::api::config::{MetricsAddress, Service};
use crate::api::summary::{Ending, Vm as Report};
use crate::api::types::Refused;
use crate::ipc::{Door, Endings};
use crate::supervisor::handshake::{self, Pending};
use crate::supervisor::listener::Listening;
use crate::supervisor::vm::{Dying, Vm};
use snapshot_format::names::escape_path;
use snapshot_format::{FileStore, Snapshot};

/// VMs and handshakes of one process, where one is usual: the rest of what can be had is for others.
const MOST_OF_A_PROCESS: usize = 16;

/// Refused connections at once whose descriptors are not closed yet.
const MOST_CLOSING: usize = 64;
/// How long that takes at most, unless somebody sees to it that it takes longer.
const CLOSES: Duration = Duration::from_secs(1);

/// Who was refused, and had sent what is not closed yet.
#[derive(Debug)]
pub(super) struct Unclosed {
    peer: Peer,
    closing: Closing,
    since: Instant,
}

/// A service that was opened.
pub(super) struct Open {
    pub(super) service: Service,
    pub(super) file: OwnedFd,
    /// Under which id it is held outside.
    pub(super) held_as: String,
    pub(super) listening: Option<Listening>,
    /// Under which id that is held outside.
    pub(super) listening_held_as: Option<String>,
    /// Whether it is forgotten when its last VM has ended.
    pub(super) removed: bool,
    /// VMs that have ended.
    pub(super) ended: Endings,
}

/// A service that an operator adds, whose snapshot is not open yet.
#[derive(Debug)]
pub(super) struct Opening {
    /// The operator's question.
    number: u64,
    service: Service,
    opened: Receiver<Result<OwnedFd>>,
    since: Instant,
}

impl Keeper {
    /// Lets visitors in.
    pub fn open(&mut self, door: Door, address: &MetricsAddress) -> Result<()> {
        let listening = match (door, address) {
            (Door::Control, MetricsAddress::Socket(path)) => Listening::private(path)?,
            _ => Listening::metrics(address)?,
        };
        self.doors.push((door, listening));
        Ok(())
    }

    /// Listens for the VMs of a service from now on.
    pub fn add(&mut self, service: Service) -> Result<()> {
        self.may_be_added(&service)?;
        let patience = self.options.stuck_after;
        let opened = begin_to_open(&service.snapshot)?;
        let file = opened.recv_timeout(patience);
        let file = file.map_err(|_| silent(&service.snapshot, patience))?;
        self.add_opened(service, file?)
    }

    /// The same for an operator, who is told when the snapshot is open: a disk that doesn't answer must not stop the
    /// keeper.
    pub(super) fn begin_to_add(&mut self, number: u64, service: Service) -> Result<()> {
        self.may_be_added(&service)?;
        self.opening.push(Opening {
            number,
            opened: begin_to_open(&service.snapshot)?,
            service,
            since: Instant::now(),
        });
        Ok(())
    }

    /// Goes on with what operators want to add.
    pub(super) fn watch_opening(&mut self) {
        let patience = self.options.stuck_after;
        for opening in std::mem::take(&mut self.opening) {
            let opened = opening.opened.try_recv();
            let result = match opened {
                _ if self.stopping != Stopping::No => Err(anyhow!("the daemon is about to end")),
                Ok(file) => file.and_then(|file| self.add_opened(opening.service, file)),
                Err(TryRecvError::Empty) if opening.since.elapsed() < patience => {
                    self.opening.push(opening);
                    continue;
                }
                Err(_) => Err(silent(&opening.service.snapshot, patience)),
            };
            self.answer(opening.number, result);
        }
    }

    fn may_be_added(&self, service: &Service) -> Result<()> {
        for open in self.services.values().filter(|open| !open.removed) {
            let (other, path) = (&open.service, escape_path(&service.socket));
            if other.name == service.name {
                bail!("there is a service {:?} already", service.name);
            }
            if other.socket == service.socket && open.listening.is_some() {
                bail!("service {:?} has the socket {path} already", other.name);
            }
        }
        Ok(())
    }

    fn add_opened(&mut self, service: Service, file: OwnedFd) -> Result<()> {
        // Another may have been added meanwhile.
        self.may_be_added(&service)?;
        let listening = self.listen(&service)?;
        let key = self.next.0;
        self.next.0 += 1;
        self.say(format_args!(
            "serving {} at {}",
            escape_path(&service.snapshot),
            escape_path(&service.socket)
        ));
        let held_as = format!("file-{}-{key}", std::process::id());
        let fds = [("snapshot", file.as_fd())];
        if let Err(error) = self.outside.hold(&held_as, &service.name, &fds) {
            self.complain(format_args!(
                "a snapshot's file is held by nobody else: {error}"
            ));
        }
        let open = Open {
            service,
            file,
            held_as,
            listening_held_as: listening.held_as(),
            listening: Some(listening),
            removed: false,
            ended: Endings::new(),
        };
        self.services.insert(key, open);
        self.hold_listening(key);
        self.outgoing.push_back(Outgoing::Service(key));
        Ok(())
    }

    /// Listens at the socket of a service; at that of a keeper that has died, if systemd has held it, where VMs may wait.
    fn listen(&mut self, service: &Service) -> Result<Listening> {
        if let Some((id, listening)) = self.inherited.remove(&service.socket) {
            if listening.held_as().as_ref() == Some(&id) {
                service.share_socket()?;
                return Ok(listening);
            }
            self.end_queue(&id, &listening, &service.name, &service.allow_uid);
        }
        Listening::bind_with(&service.socket, || service.share_socket())
    }

    /// Has the socket of a service held outside.
    pub(super) fn hold_listening(&mut self, key: u64) {
        let Some(open) = self.services.get(&key) else {
            return;
        };
        if let (Some(id), Some(listening)) = (&open.listening_held_as, &open.listening) {
            let allowed = &open.service.allow_uid;
            let (name, fd) = (&open.service.name, listening.as_fd());
            let held = self.outside.hold_listening(id, name, fd, allowed);
            if let Err(error) = held {
                self.complain(format_args!(
                    "a socket is held by nobody else: who waits there is lost with this process: {error}"
                ));
            }
        }
    }

    /// Nobody can connect to a service any more; who has already is heard.
    pub(super) fn close(&mut self, key: u64) {
        let listening = self.services.get_mut(&key);
        if let Some(listening) = listening.and_then(|open| open.listening.as_mut()) {
            listening.close();
        }
        let most = self.pending.len() + handshake::MOST;
        // Who is refused keeps nobody behind from being heard.
        while self.pending.len() < most && self.accept(key) {}
        let Some(open) = self.services.get_mut(&key) else {
            return;
        };
        let (name, allowed) = (open.service.name.clone(), open.service.allow_uid.clone());
        let held_as = open.listening_held_as.take().unwrap_or_default();
        if let Some(listening) = open.listening.take() {
            self.end_queue(&held_as, &listening, &name, &allowed);
        }
    }

    /// Ends who waits at sockets of a keeper that has died, at which nothing is served any more.
    pub(super) fn end_inherited(&mut self) {
        for (id, listening) in std::mem::take(&mut self.inherited).into_values() {
            self.end_queue(&id, &listening, "?", &[]);
        }
    }

    fn end_queue(&mut self, held_as: &str, listening: &Listening, service: &str, allowed: &[u32]) {
        for queued in listening.end_queue(service, allowed, |what| self.complain(what)) {
            let id = self.next.1;
            self.next.1 += 1;
            self.hold_owner(id, service, queued.peer.pidfd.as_fd());
            let mut vm = Dying::from(queued);
            service.clone_into(&mut vm.service_name);
            self.let_die(id, vm);
        }
        self.release_as(held_as);
    }

    pub(super) fn remove(&mut self, name: &str) -> Result<(), String> {
        let mut found = self.services.iter_mut();
        let named = found.find(|(_, open)| open.service.name == name && !open.removed);
        let Some((key, open)) = named else {
            return Err(Refused::no_service(name).0);
        };
        let key = *key;
        open.removed = true;
        self.close(key);
        self.forget_if_unused(key);
        Ok(())
    }

    /// A VM of a service is no more.
    pub(super) fn count_ended(&mut self, key: u64, ending: Ending) {
        if let Some(open) = self.services.get_mut(&key) {
            *open.ended.entry(ending).or_default() += 1;
        }
    }

    /// A service that was removed goes with its last VM.
    pub(super) fn forget_if_unused(&mut self, key: u64) {
        let is_removed = self.services.get(&key).is_some_and(|open| open.removed);
        let is_used = self.vms.values().any(|vm| vm.service == key)
            || self.pending.iter().any(|pending| pending.service == key)
            || self.is_hung(key);
        if is_removed && !is_used {
            self.forget(key);
        }
    }

    fn forget(&mut self, key: u64) {
        if let Some(open) = self.services.remove(&key) {
            // systemd lets it go with the service if it doesn't now.
            let _ = self.outside.release(&open.held_as);
        }
        self.outgoing.push_back(Outgoing::Forget(key));
    }

    /// Takes who has connected. Whether somebody had.
    pub(super) fn accept(&mut self, key: u64) -> bool {
        let Some(open) = self.services.get(&key) else {
            return false;
        };
        let accepted = open.listening.as_ref().map(Listening::accept);
        let stream = match accepted {
            Some(Ok(Some(stream))) => UnixStream::from(stream),
            Some(Err(error)) => {
                self.turned_away(&error);
                return false;
            }
            Some(Ok(None)) | None => return false,
        };
        let patience = Duration::from_secs(open.service.patience);
        let name = open.service.name.clone();
        let id = self.next.1;
        self.next.1 += 1;
        let pid = credentials_of(stream.as_fd()).map_or(0, |(pid, _)| pid);
        let pending = admit(open, &stream).and_then(|peer| {
            self.has_room_for(&peer)?;
            self.hold_owner(id, &name, peer.pidfd.as_fd());
            Pending::new(id, key, stream, peer, patience).context("a VMM is not heard")
        });
        match pending {
            Ok(pending) => self.pending.push(pending),
            Err(error) => {
                self.release(id);
                self.count_ended(key, Ending::Refused);
                let label = self.label(id, key, pid);
                self.refused(&label, format_args!("refused: {error:#}"));
            }
        }
        true
    }

    /// Whether more may be accepted; else they wait in the kernel's queue.
    pub(super) fn takes_more(&self) -> bool {
        self.pending.len() < handshake::MOST && self.unclosed.len() < MOST_CLOSING
    }

    /// Looks whose descriptors are closed. Who has those of too many kept open is killed: that closes them, if they are of a
    /// file system that is their program. If it doesn't, nobody is accepted until somebody ends that program: VMs that are
    /// served need descriptors and threads as well.
    pub(super) fn watch_unclosed(&mut self) {
        self.unclosed.retain(|unclosed| unclosed.closing.is_open());
        if self.unclosed.len() < MOST_CLOSING {
            return;
        }
        for Unclosed { peer, since, .. } in &self.unclosed {
            if since.elapsed() >= CLOSES {
                let _ = kill_by_pidfd(peer.pidfd.as_fd());
            }
        }
    }

    /// Whether so many of one process may be had. In another namespace processes have no number here.
    fn has_room_for(&self, peer: &Peer) -> Result<()> {
        let pid = peer.pid;
        let pending = self.pending.iter().map(|pending| pending.peer.pid);
        let served = self.vms.values().map(|vm| vm.peer.pid);
        let dying = self.dying.values().map(|vm| vm.pid);
        let unclosed = self.unclosed.iter().map(|unclosed| unclosed.peer.pid);
        let peers = pending.chain(served).chain(dying).chain(unclosed);
        if pid != 0 && peers.filter(|peer| *peer == pid).count() >= MOST_OF_A_PROCESS {
            bail!("its process has {MOST_OF_A_PROCESS} VMs already");
        }
        Ok(())
    }

    /// Goes on with a handshake.
    pub(super) fn shake_hands(&mut self, at: usize) {
        match self.pending[at].read() {
            Ok(None) => {}
            Ok(Some(handshake)) => self.begin(at, handshake),
            Err(error) => self.refuse(at, &error),
        }
    }

    /// A handshake that comes to nothing. Nobody was served.
    pub(super) fn refuse(&mut self, at: usize, error: &HandshakeError) {
        let closing = self.pending[at].closing();
        let Pending {
            id, service, peer, ..
        } = self.pending.swap_remove(at);
        self.release(id);
        let why = Some(error.to_string());
        let label = self.label(id, service, peer.pid);
        self.count_ended(service, Ending::Refused);
        self.note_refusal(Report::new(label, Ending::Refused, why));
        self.unclosed.push(Unclosed {
            peer,
            closing,
            since: Instant::now(),
        });
        self.forget_if_unused(service);
    }

    fn begin(&mut self, at: usize, handshake: Handshake) {
        let Pending {
            id, service, peer, ..
        } = self.pending.swap_remove(at);
        let Handshake {
            userfaultfd,
            regions,
        } = handshake;
        let mut vm = Vm::new(service, peer, userfaultfd, regions);
        if self.is_hung(service) {
            let why = "its snapshot can't be read: a worker that waits for it can't be killed";
            self.end(id, vm, Ending::Refused, why.to_owned());
            return self.forget_if_unused(service);
        }
        if let Err(error) = vm.open_page_map() {
            let why = anyhow::Error::from(AttachError::PageMap(error));
            self.end(id, vm, Ending::Refused, format!("{why:#}"));
            return self.forget_if_unused(service);
        }
        self.vms.insert(id, vm);
        self.hold(id);
        self.outgoing.push_back(Outgoing::Vm(id));
    }
}

/// Opens the file of a snapshot in a thread of its own, for the disk may not answer. What is no good one is refused here,
/// and not VM by VM.
fn begin_to_open(path: &Path) -> Result<Receiver<Result<OwnedFd>>> {
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

fn silent(path: &Path, patience: Duration) -> anyhow::Error {
    let path = escape_path(path);
    anyhow!("{path}: can't be read: nothing came for {patience:?}")
}

/// Who has connected, if it is to be served.
fn admit(open: &Open, stream: &UnixStream) -> Result<Peer> {
    let (pid, uid) = credentials_of(stream.as_fd()).context("it can't be identified")?;
    let allowed = &open.service.allow_uid;
    if !allowed.is_empty() && !allowed.contains(&uid) {
        bail!("--allow-uid doesn't name its user {uid}");
    }
    if pid == 0 {
        bail!(
            "its process is in a PID namespace that this one can't see, and so could not be killed if a page of it were \
             lost: run `serve` in the VMM's PID namespace or in one above it (in a container: with the host's, as \
             `--pid=host`), and end this VMM, which waits for its first page"
        );
    }
    peer_of(stream.as_fd()).context("it can't be identified")
}
