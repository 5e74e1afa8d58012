//! Services: what is served where, who may connect, and their handshakes.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use snaprestore_engine::pager::AttachError;
use snaprestore_engine::pager::firecracker::{Handshake, HandshakeError};
use snaprestore_engine::sys::{Peer, peer_of};

use super::Keeper;
use super::workers::Outgoing;
use crate::daemon::config::{MetricsAddress, Service};
use crate::daemon::desk::Refused;
use crate::daemon::listening::Listening;
use crate::daemon::pending::Pending;
use crate::daemon::report::{Ending, Vm as Report};
use crate::daemon::vms::Vm;
use crate::daemon::wire::Door;
use crate::input;

/// A service that was opened.
pub(super) struct Open {
    pub(super) service: Service,
    pub(super) file: OwnedFd,
    /// Under which id it is held outside.
    pub(super) held_as: String,
    pub(super) listening: Option<Listening>,
    /// Whether it is forgotten when its last VM has ended.
    pub(super) removed: bool,
    /// VMs that have ended.
    pub(super) ended: u64,
}

impl Keeper {
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

    pub(super) fn remove(&mut self, name: &str) -> Result<(), String> {
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

    /// A VM of a service is no more. One that was removed goes with the last.
    pub(super) fn count_ended(&mut self, key: u64) {
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

    /// Takes who has connected.
    pub(super) fn accept(&mut self, key: u64) {
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
            Pending::new(key, stream, peer, patience).context("a VMM is not heard")
        });
        match pending {
            Ok(pending) => self.pending.push(pending),
            Err(error) => self.complain(format_args!("{error:#}")),
        }
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
        let pid = self.pending.swap_remove(at).peer.pid;
        self.note(Report::new(pid, Ending::Refused, Some(error.to_string())));
    }

    fn begin(&mut self, at: usize, handshake: Handshake) {
        let Pending { service, peer, .. } = self.pending.swap_remove(at);
        let Handshake {
            userfaultfd,
            regions,
        } = handshake;
        let mut vm = Vm::new(service, peer, userfaultfd, regions);
        let id = self.next.1;
        self.next.1 += 1;
        if let Err(error) = vm.open_page_map() {
            let why = anyhow::Error::from(AttachError::PageMap(error));
            self.count_ended(service);
            return self.end(id, vm, Ending::Refused, format!("{why:#}"));
        }
        self.vms.insert(id, vm);
        self.hold(id);
        self.outgoing.push_back(Outgoing::Vm(id));
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
