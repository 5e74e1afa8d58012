//! What operators ask for, answered by the worker; what it can't do by itself it asks the keeper for.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use crate::api::config::Service;
use crate::api::summary::Ending;
use crate::api::types::{
    Answer, Completed, Desk, List, Listed, Refused, Upgraded, VmId, VmState, VmStats, Which,
};
use crate::ipc::{FromWorker, Request};
use crate::worker::{Served, Worker, lock};

/// How long the keeper may take for an answer. An upgrade waits for another program to start.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether a VM has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What the keeper was asked for and has not answered.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    waiting: Mutex<Waiting>,
    /// Whether another worker takes over as soon as the operator knows.
    leaves: AtomicBool,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    answers: HashMap<u64, Sender<Result<Option<Upgraded>, String>>>,
}

impl Asked {
    /// Takes an answer of the keeper's.
    pub(crate) fn answered(&self, number: u64, result: Result<Option<Upgraded>, String>) {
        if let Some(answer) = lock(&self.waiting).answers.remove(&number) {
            // Who asked may have gone away.
            let _ = answer.send(result);
        }
    }

    /// Whether another worker takes over.
    pub(crate) fn takes_leave(&self) -> bool {
        self.leaves.load(SeqCst)
    }
}

impl Worker {
    fn ask(&self, request: Request) -> Answer<Option<Upgraded>> {
        let (sender, answer) = channel();
        let number = {
            let mut waiting = lock(&self.asked.waiting);
            waiting.next += 1;
            let number = waiting.next;
            waiting.answers.insert(number, sender);
            number
        };
        self.tell(&FromWorker::Ask { number, request });
        match answer.recv_timeout(PATIENCE) {
            Ok(result) => result.map_err(Refused),
            Err(_) => Err(Refused("the keeper gives no answer".to_owned())),
        }
    }

    /// The VMs that are served, or the one that is meant.
    fn served(&self, which: Which) -> Vec<std::sync::Arc<Served>> {
        let vms = lock(&self.vms);
        match which {
            Which::All => vms.values().cloned().collect(),
            Which::Vm(id) => vms.get(&id).cloned().into_iter().collect(),
        }
    }

    /// What became of a VM that was to be completed and that is served no more, as long as it is remembered.
    fn became(&self, vm: VmId) -> Option<Completed> {
        let ended = lock(&self.ended);
        let stats = ended.iter().find(|stats| stats.vm.id == vm)?;
        Some(Completed {
            vm,
            done: !matches!(stats.vm.state, VmState::Killed | VmState::Refused),
            reason: stats.vm.reason.clone(),
        })
    }
}

impl Desk for Worker {
    fn add(&self, service: Service) -> Answer<()> {
        self.ask(Request::Add(service)).map(drop)
    }

    fn remove(&self, name: &str) -> Answer<()> {
        self.ask(Request::Remove(name.to_owned())).map(drop)
    }

    fn list(&self) -> Answer<List> {
        let facts = lock(&self.facts).clone();
        // Together: a VM that ends just now is among one of them.
        let (serving, mut vms) = {
            let vms = lock(&self.vms);
            let serving: Vec<VmStats> = vms.values().map(|vm| vm.stats()).collect();
            let ended = lock(&self.ended);
            let ended: Vec<_> = ended.iter().map(|vm| vm.vm.clone()).collect();
            (serving, ended)
        };
        let services = lock(&self.services);
        let listed = services.iter().map(|(key, open)| {
            let name = &open.service.name;
            let here = serving.iter().filter(|vm| &vm.vm.service == name);
            Listed {
                service: open.service.clone(),
                serving: here.count() as u64,
                ended: facts.ended.get(key).map_or(0, |ended| ended.values().sum()),
            }
        });
        vms.extend(serving.iter().map(|vm| vm.vm.clone()));
        vms.sort_unstable_by_key(|vm| vm.id);
        Ok(List {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: facts.keeper,
            worker_restarts: facts.worker_restarts,
            draining: facts.draining,
            services: listed.collect(),
            vms,
        })
    }

    fn stats(&self, vm: Option<VmId>) -> Answer<Vec<VmStats>> {
        let Some(id) = vm else {
            return Ok(lock(&self.vms).values().map(|vm| vm.stats()).collect());
        };
        if let Some(vm) = lock(&self.vms).get(&id) {
            return Ok(vec![vm.stats()]);
        }
        let ended = lock(&self.ended);
        let ended = ended.iter().find(|vm| vm.vm.id == id);
        ended
            .map(|vm| vec![vm.clone()])
            .ok_or_else(|| Refused::no_vm(id))
    }

    fn complete(&self, which: Which) -> Answer<Vec<Completed>> {
        let vms = self.served(which);
        if let (Which::Vm(id), []) = (which, &vms[..]) {
            // It may just have completed, or ended by itself.
            let became = self.became(id).ok_or_else(|| Refused::no_vm(id))?;
            return Ok(vec![became]);
        }
        Ok(std::thread::scope(|scope| {
            let begun: Vec<_> = vms
                .iter()
                .map(|vm| (vm.id, scope.spawn(|| vm.complete())))
                .collect();
            let done = begun.into_iter().map(|(vm, thread)| {
                let result = thread
                    .join()
                    .unwrap_or_else(|_| Err("its thread failed".to_owned()));
                Completed {
                    vm,
                    done: result.is_ok(),
                    reason: result.err(),
                }
            });
            done.collect()
        }))
    }

    fn drain(&self) -> Answer<Vec<Completed>> {
        let ids: Vec<u64> = lock(&self.vms).keys().copied().collect();
        self.ask(Request::Drain)?;
        while !lock(&self.vms).is_empty() {
            std::thread::sleep(LOOK_AGAIN);
        }
        let became = ids.into_iter().map(|vm| {
            self.became(vm).unwrap_or(Completed {
                vm,
                done: false,
                reason: Some("it is not known any more what became of it".to_owned()),
            })
        });
        Ok(became.collect())
    }

    fn upgrade(&self, program: Option<PathBuf>) -> Answer<Upgraded> {
        let upgraded = self.ask(Request::Upgrade(program))?;
        self.asked.leaves.store(true, SeqCst);
        upgraded.ok_or_else(|| Refused("the keeper doesn't say who takes over".to_owned()))
    }
}

impl From<Ending> for VmState {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Complete => Self::Complete,
            Ending::Exited => Self::Exited,
            Ending::Killed => Self::Killed,
            Ending::Refused => Self::Refused,
        }
    }
}
