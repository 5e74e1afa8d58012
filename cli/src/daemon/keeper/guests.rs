//! VMs: held by others too, taken back from a keeper that has died, and ended.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use snaprestore_engine::pager::AttachError;

use super::Keeper;
use super::services::Open;
use super::workers::Outgoing;
use crate::daemon::outside::{News, Outside};
use crate::daemon::report::{Ending, Vm as Report};
use crate::daemon::systemd;
use crate::daemon::vms::{Held, Vm};

impl Keeper {
    /// Takes back the VMs of a keeper that has died. Its worker died with it, or before this was started.
    pub(super) fn go_on_with(&mut self, held: BTreeMap<String, Vec<(String, OwnedFd)>>) {
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

    pub(super) fn take_back(
        &mut self,
        held: Held,
        files: &mut BTreeMap<String, Vec<(String, OwnedFd)>>,
    ) {
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
        self.say(format_args!("VM {pid}: taken back from systemd"));
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
            let pid = vm.peer.pid;
            self.complain(format_args!(
                "VM {pid} is held by nobody else, and is lost with this process: {error:#}"
            ));
        }
    }

    /// Nobody needs to hold a VM any more.
    pub(super) fn release(&mut self, id: u64) {
        if let Err(error) = self.outside.release(&format!("vm-{id}")) {
            self.complain(format_args!("what was held of a VM is not let go: {error}"));
        }
    }

    pub(super) fn hear_outside(&mut self) {
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
        self.pending.clear();
        for (id, vm) in std::mem::take(&mut self.vms) {
            self.count_ended(vm.service);
            self.end(id, vm, Ending::Killed, why.to_owned());
        }
    }

    /// Ends a VM that is not, or no longer, among those that are served.
    pub(super) fn end(&mut self, id: u64, vm: Vm, ending: Ending, why: String) {
        self.kill(&vm);
        let pid = vm.peer.pid;
        self.dying.insert(id, vm);
        self.note(Report::new(pid, ending, Some(why)));
    }

    pub(super) fn kill(&self, vm: &Vm) {
        if let Err(errno) = vm.kill() {
            let pid = vm.peer.pid;
            self.complain(format_args!(
                "VM {pid} can't be killed ({errno}), and waits for its next missing page for ever: end it"
            ));
        }
    }
}
