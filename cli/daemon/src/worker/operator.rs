//! Requests of operators. The worker answers them, and passes on to the supervisor those it can't.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use snaprestore_engine::{RecordError, RecordingOptions};

use super::{ServedVm, Worker, lock};
use crate::api::config::Service;
use crate::api::types::{
    ApiResult, Completed, List, OperatorApi, Recorded, RequestError, ServiceStatus, Upgraded, VmId,
    VmSelector, VmState, VmStats,
};
use crate::ipc::{FromWorker, SupervisorRequest, TraceDestination};

/// Time limit for the supervisor to answer. An upgrade waits for another program to start.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval at which a drain checks whether all VMs have ended.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Requests that the supervisor has not answered yet.
#[derive(Debug, Default)]
pub(crate) struct PendingRequests {
    pending: Mutex<Pending>,
    /// Whether another worker takes over as soon as the operator has been told.
    replaced: AtomicBool,
}

#[derive(Debug, Default)]
struct Pending {
    next: u64,
    replies: HashMap<u64, Sender<ApiResult<Option<Upgraded>>>>,
}

impl PendingRequests {
    /// Passes on an answer of the supervisor.
    pub(crate) fn resolve(&self, number: u64, result: ApiResult<Option<Upgraded>>) {
        if let Some(answer) = lock(&self.pending).replies.remove(&number) {
            // The operator may have disconnected.
            let _ = answer.send(result);
        }
    }

    /// Returns whether another worker takes over.
    pub(crate) fn is_replaced(&self) -> bool {
        self.replaced.load(SeqCst)
    }
}

impl Worker {
    fn ask(&self, request: SupervisorRequest) -> ApiResult<Option<Upgraded>> {
        let (sender, answer) = channel();
        let number = {
            let mut pending = lock(&self.requests.pending);
            pending.next += 1;
            let number = pending.next;
            pending.replies.insert(number, sender);
            number
        };
        self.notify(&FromWorker::Request { number, request });
        match answer.recv_timeout(REPLY_TIMEOUT) {
            Ok(result) => result,
            Err(_) => Err("the supervisor did not reply in time".to_owned().into()),
        }
    }

    /// Returns the selected VMs that are being served.
    fn served(&self, which: VmSelector) -> Vec<Arc<ServedVm>> {
        let vms = lock(&self.vms);
        match which {
            VmSelector::All => vms.values().cloned().collect(),
            VmSelector::Vm(id) => vms.get(&id).cloned().into_iter().collect(),
        }
    }

    /// Returns a VM that is served, for a request about its recording.
    fn recordable(&self, vm: VmId) -> ApiResult<Arc<ServedVm>> {
        if let Some(served) = self.served(VmSelector::Vm(vm)).pop() {
            return Ok(served);
        }
        if lock(&self.ended).iter().any(|stats| stats.vm.id == vm) {
            return Err(format!(
                "VM {vm} is no longer served, and cannot be recorded; `serve --record DIR` writes \
                 the traces of all VMs"
            )
            .into());
        }
        Err(RequestError::no_vm(vm))
    }

    /// Returns the result for a VM that was to be completed and is no longer served, as long as it
    /// is remembered.
    fn completion(&self, vm: VmId) -> Option<Completed> {
        let ended = lock(&self.ended);
        let stats = ended.iter().find(|stats| stats.vm.id == vm)?;
        Some(Completed {
            vm,
            done: !matches!(stats.vm.state, VmState::Killed | VmState::Refused),
            reason: stats.vm.reason.clone(),
        })
    }
}

/// Returns the error for a VM whose session does not exist yet.
fn being_set_up() -> RequestError {
    "the VM is still being set up; retry".to_owned().into()
}

impl OperatorApi for Worker {
    fn add(&self, service: Service) -> ApiResult<()> {
        self.ask(SupervisorRequest::Add(service)).map(drop)
    }

    fn remove(&self, name: &str) -> ApiResult<()> {
        self.ask(SupervisorRequest::Remove(name.to_owned()))
            .map(drop)
    }

    fn list(&self) -> ApiResult<List> {
        let facts = lock(&self.facts).clone();
        // Locked together, so that a VM that ends now is in exactly one of them.
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
            ServiceStatus {
                service: open.service.clone(),
                layers: open.layers,
                serving: here.count() as u64,
                ended: facts.ended.get(key).map_or(0, |ended| ended.values().sum()),
            }
        });
        vms.extend(serving.iter().map(|vm| vm.vm.clone()));
        vms.sort_unstable_by_key(|vm| vm.id);
        Ok(List {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: facts.supervisor,
            worker_restarts: facts.worker_restarts,
            draining: facts.draining,
            services: listed.collect(),
            vms,
        })
    }

    fn stats(&self, vm: Option<VmId>) -> ApiResult<Vec<VmStats>> {
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
            .ok_or_else(|| RequestError::no_vm(id))
    }

    fn complete(&self, which: VmSelector) -> ApiResult<Vec<Completed>> {
        let vms = self.served(which);
        if let (VmSelector::Vm(id), []) = (which, &vms[..]) {
            // It may just have been completed, or have exited by itself.
            let completed = self.completion(id).ok_or_else(|| RequestError::no_vm(id))?;
            return Ok(vec![completed]);
        }
        Ok(std::thread::scope(|scope| {
            let begun: Vec<_> = vms
                .iter()
                .map(|vm| (vm.id, scope.spawn(|| vm.complete())))
                .collect();
            let done = begun.into_iter().map(|(vm, thread)| {
                let result = thread
                    .join()
                    .unwrap_or_else(|_| Err("the thread that completes it panicked".to_owned()));
                Completed {
                    vm,
                    done: result.is_ok(),
                    reason: result.err(),
                }
            });
            done.collect()
        }))
    }

    fn start_recording(&self, vm: VmId) -> ApiResult<()> {
        if !lock(&self.facts).knows_recordings {
            let text = "the supervisor is of an older program, which cannot record VMs; start the \
                        daemon again with a newer program";
            return Err(text.to_owned().into());
        }
        let served = self.recordable(vm)?;
        let paged = served.paged.get().ok_or_else(being_set_up)?;
        let mut recording = lock(&served.recording);
        if recording.is_some() {
            return Err(format!(
                "VM {vm} has a recording already; `snaprestore ctl record {vm} stop -o TRACE` ends it"
            )
            .into());
        }
        let begun = paged.record(RecordingOptions::default());
        *recording = Some(begun.map_err(|error| match error {
            RecordError::Running => {
                let text = format!("VM {vm} is being recorded already, for its service's folder");
                RequestError::from(text)
            }
            error => format!("cannot record VM {vm}: {error}").into(),
        })?);
        self.notify(&FromWorker::RecordingBegan {
            id: vm,
            destination: TraceDestination::Operator,
        });
        Ok(())
    }

    fn stop_recording(&self, vm: VmId) -> ApiResult<Recorded> {
        let served = self.recordable(vm)?;
        let paged = served.paged.get().ok_or_else(being_set_up)?;
        // Locked until the message is sent, so that the supervisor gets the messages in order.
        let mut recording = lock(&served.recording);
        if let Some(recording) = recording.take() {
            let recorded = Recorded::new(vm, &recording.stop());
            self.notify(&FromWorker::RecordingEnded {
                id: vm,
                destination: TraceDestination::Operator,
                result: Ok(()),
            });
            return recorded;
        }
        // A stopped recording is kept until another one begins, because the operator may have
        // failed to write its trace. The trace for the folder of the service is returned, too.
        match paged.recording() {
            Some(recording) => Recorded::new(vm, &recording.stop()),
            None => Err(format!(
                "VM {vm} has no recording (it is lost with the worker that made it); `snaprestore \
                 ctl record {vm} start` starts one"
            )
            .into()),
        }
    }

    fn drain(&self) -> ApiResult<Vec<Completed>> {
        let ids: Vec<u64> = lock(&self.vms).keys().copied().collect();
        self.ask(SupervisorRequest::Drain)?;
        while !lock(&self.vms).is_empty() {
            std::thread::sleep(POLL_INTERVAL);
        }
        let completed = ids.into_iter().map(|vm| {
            self.completion(vm).unwrap_or(Completed {
                vm,
                done: false,
                reason: Some("its outcome is no longer known".to_owned()),
            })
        });
        Ok(completed.collect())
    }

    fn upgrade(&self, program: Option<PathBuf>) -> ApiResult<Upgraded> {
        let upgraded = self.ask(SupervisorRequest::Upgrade(program))?;
        self.requests.replaced.store(true, SeqCst);
        upgraded.ok_or_else(|| {
            "the supervisor did not name the new version"
                .to_owned()
                .into()
        })
    }
}
