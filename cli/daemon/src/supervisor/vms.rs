//! VMs: held by others too, taken back from a keeper that has died, and ended.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use snaprestore_engine::pager::AttachError;

use super::services::Open;
use super::workers::Outgoing;
use super::{Keeper, Stopping};
use crate::api::config::Service;
use crate::api::summary::{Ending, Vm as Report, VmLabel};
use crate::fd_store::systemd;
use crate::fd_store::{News, OWNER, Outside, Pace};
use crate::ipc::Endings;
use crate::supervisor::listener::Listening;
use crate::supervisor::vm::{Dying, Held, Vm, held_as};

impl Keeper {
    /// Takes back what a keeper that has died had held. Its worker died with it, or before this was started.
    pub(super) fn go_on_with(&mut self, held: BTreeMap<String, Vec<(String, OwnedFd)>>) {
        let (mut files, mut vms) = (BTreeMap::new(), Vec::new());
        for (id, mut descriptors) in held {
            let number = id.strip_prefix("vm-").and_then(|id| id.parse().ok());
            if let Some(number) = number {
                vms.push((number, descriptors));
            } else if !id.starts_with("socket-") {
                files.insert(id, descriptors);
            } else if let Some((_, socket)) = descriptors.pop()
                && let Some((path, listening)) = Listening::inherit(socket, &id)
            {
                self.inherited.insert(path, (id, listening));
            }
        }
        for (id, descriptors) in vms {
            self.next.1 = self.next.1.max(id + 1);
            match Held::of(descriptors) {
                Ok(Held::Vm { vm, service, file }) => {
                    self.take_back(id, *vm, (service, file), &mut files);
                }
                Ok(Held::Part { vm, why }) => self.end(id, vm, Ending::Killed, why),
                Err(error) => {
                    let label = self.label(id, 0, 0);
                    self.complain_of(&label, format_args!("can't be served any more: {error:#}"));
                }
            }
        }
        for id in files.into_keys() {
            self.release_as(&id);
        }
    }

    fn take_back(
        &mut self,
        id: u64,
        mut vm: Vm,
        (service, file): (Service, String),
        files: &mut BTreeMap<String, Vec<(String, OwnedFd)>>,
    ) {
        let pid = vm.peer.pid;
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
                    listening_held_as: None,
                    removed: true,
                    ended: Endings::new(),
                };
                self.services.insert(key, open);
                self.outgoing.push_back(Outgoing::Service(key));
                key
            }),
            (None, None) => None,
        };
        let Some(key) = key else {
            let why = "its snapshot's open file was not held".to_owned();
            return self.end(id, vm, Ending::Killed, why);
        };
        vm.service = key;
        if let Err(error) = vm.open_page_map() {
            let why = anyhow::Error::from(AttachError::PageMap(error));
            return self.end(id, vm, Ending::Killed, format!("{why:#}"));
        }
        self.vms.insert(id, vm);
        self.outgoing.push_back(Outgoing::Vm(id));
        self.say_of(&self.label(id, key, pid), "taken back from systemd");
    }

    /// Has what a VM can't do without held outside.
    pub(super) fn hold(&mut self, id: u64) {
        let Some(vm) = self.vms.get(&id) else { return };
        let Some(open) = self.services.get(&vm.service) else {
            return;
        };
        let outside = &mut self.outside;
        let held = vm.hold(id, &open.service, &open.held_as, outside);
        if let Err(error) = held {
            self.hold_in_part(id, &error);
        }
    }

    /// Has a VM that can't be held outside with all that it needs held by its pidfd: a next keeper ends it. Without its
    /// tables that keeper would not know what the VM has discarded.
    pub(super) fn hold_in_part(&mut self, id: u64, why: &anyhow::Error) {
        self.release(id);
        let Some(vm) = self.vms.get(&id) else { return };
        let label = self.label(id, vm.service, vm.peer.pid);
        let owner = [(OWNER, vm.peer.pidfd.as_fd())];
        let owner = self.outside.hold(&held_as(id), &label.service, &owner);
        let is = match owner {
            Ok(()) => "ended",
            Err(_) => "lost",
        };
        self.complain_of(
            &label,
            format_args!(
                "can't be held with all that it needs, and is {is} with this process: {why:#}"
            ),
        );
    }

    /// Has who has connected held outside by its pidfd: its memory may lie in the socket already.
    pub(super) fn hold_owner(&mut self, id: u64, service: &str, owner: BorrowedFd<'_>) {
        // If it can't be, that is said when it is a VM.
        let _ = self.outside.hold(&held_as(id), service, &[(OWNER, owner)]);
    }

    /// The name of VM number `id`.
    pub(super) fn label(&self, id: u64, service: u64, pid: u32) -> VmLabel {
        let open = self.services.get(&service);
        VmLabel {
            id,
            pid,
            service: open.map_or_else(|| "?".to_owned(), |open| open.service.name.clone()),
        }
    }

    /// Nobody needs to hold a VM any more.
    pub(super) fn release(&mut self, id: u64) {
        self.release_as(&held_as(id));
    }

    pub(super) fn release_as(&mut self, id: &str) {
        if let Err(error) = self.outside.release(id) {
            self.complain(format_args!("{id} is not let go: {error}"));
        }
    }

    pub(super) fn hear_outside(&mut self) {
        for news in self.outside.news() {
            match news {
                News::NotHeld { id, why } => self.complain(format_args!(
                    "{id} is held by nobody else, and is lost with this process: {why}"
                )),
                News::Gone => {
                    self.outside =
                        Outside::find(Path::new(&self.program), &systemd::Given::default());
                    let ids: Vec<u64> = self.vms.keys().copied().collect();
                    for id in ids {
                        self.hold(id);
                    }
                    for pending in &self.pending {
                        let open = self.services.get(&pending.service);
                        let service = open.map_or("", |open| &open.service.name);
                        let owner = [(OWNER, pending.peer.pidfd.as_fd())];
                        let _ = self.outside.hold(&held_as(pending.id), service, &owner);
                    }
                    for (id, vm) in &self.dying {
                        let _ = vm.hold(*id, &mut self.outside);
                    }
                    let keys: Vec<u64> = self.services.keys().copied().collect();
                    for key in keys {
                        self.hold_listening(key);
                    }
                    self.complain(format_args!(
                        "the guardian exited; what it held is held now by: {}",
                        self.outside
                    ));
                    if let Some(warning) = self.outside.warning() {
                        self.complain(warning);
                    }
                }
            }
        }
    }

    /// Tells the guardian what it could not be told before.
    pub(super) fn catch_up_outside(&mut self) {
        match self.outside.catch_up() {
            Some(Pace::Lags(count)) => self.complain(format_args!(
                "{} reads nothing, and {count} messages wait for it: what they are about is lost if this process is \
                 killed meanwhile; they are sent when it goes on",
                self.outside
            )),
            Some(Pace::UpToDate) => self.say(format_args!(
                "{} has read all messages that had waited for it",
                self.outside
            )),
            None => {}
        }
    }

    /// Closes what belonged to VMs whose processes have ended.
    pub(super) fn bury(&mut self) {
        let gone = self.dying.iter().filter(|(_, vm)| vm.is_gone());
        let gone: Vec<u64> = gone.map(|(id, _)| *id).collect();
        for id in gone {
            self.dying.remove(&id);
            self.release(id);
        }
    }

    /// Ends every VM: nobody will serve it.
    pub(super) fn kill_all(&mut self, why: &str) {
        for pending in std::mem::take(&mut self.pending) {
            // It may have sent all of its memory, and would wait for it.
            let (id, service) = (pending.id, pending.service);
            self.end(id, pending, Ending::Killed, why.to_owned());
            self.forget_if_unused(service);
        }
        for (id, vm) in std::mem::take(&mut self.vms) {
            let service = vm.service;
            self.end(id, vm, Ending::Killed, why.to_owned());
            self.forget_if_unused(service);
        }
    }

    /// Ends a VM that is not, or no longer, among those that are served.
    pub(super) fn end(&mut self, id: u64, vm: impl Into<Dying>, ending: Ending, why: String) {
        let vm = vm.into();
        let (service, connected) = (vm.service, vm.connected);
        if self.stopping != Stopping::No && ending == Ending::Killed {
            self.incomplete += 1;
        }
        let label = self.kill(id, vm);
        let told = self.note(service, connected, Report::new(label, ending, Some(why)));
        self.outgoing.push_back(Outgoing::Ended(told));
    }

    /// The same, without a word. What it is called.
    pub(super) fn kill(&mut self, id: u64, vm: impl Into<Dying>) -> VmLabel {
        let vm = vm.into();
        let killed = vm.kill();
        let label = self.let_die(id, vm);
        if let Err(errno) = killed {
            self.complain_of(
                &label,
                format_args!(
                    "can't be killed ({errno}), and waits for its next missing page for ever: end it"
                ),
            );
        }
        label
    }

    /// Waits for the end of a VM that is served no more. What it is called.
    pub(super) fn let_die(&mut self, id: u64, vm: impl Into<Dying>) -> VmLabel {
        let mut vm = vm.into();
        let mut label = self.label(id, vm.service, vm.pid);
        if vm.service_name.is_empty() {
            vm.service_name.clone_from(&label.service);
        } else {
            label.service.clone_from(&vm.service_name);
        }
        self.dying.insert(id, vm);
        label
    }
}
