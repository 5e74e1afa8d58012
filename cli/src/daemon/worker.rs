//! The worker: everything but holding descriptors. It may be killed at any instant.
//!
//! ```text
//!   main thread        takes what the keeper sends; ends with the keeper
//!   one thread a VM    makes the tables and gives them to the keeper, resumes, waits for the end
//!                      of the VM and tells the keeper
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use snaprestore_engine::fail_point::{FailPoint, fail_point};
use snaprestore_engine::pager::{self, AttachError, Handover, OwnerRegion, Paged, Pager};
use snapshot_format::{FileStore, Snapshot};

use super::config::Service;
use super::report::{Ending, Vm};
use super::wire::{FromWorker, ToWorker, Wire};
use crate::args;
use crate::exit::Exit;

/// Runs in the process that the keeper has started, its socket being standard input.
pub(crate) fn run() -> Result<Exit> {
    // Whoever serves while the keeper's successor has another worker would read what is that one's.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("asking to end with the keeper")?;
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    arm();
    let worker = Arc::new(Worker {
        wire: Wire::new(socket),
        services: Mutex::default(),
        vms: Mutex::default(),
        draining: AtomicBool::new(false),
    });
    worker.wire.send(&FromWorker::Ready, &[])?;
    while let Some((message, descriptors)) = worker.wire.receive()? {
        worker.take(message, descriptors)?;
    }
    // The keeper is gone; what is open here must stay so until the VMs are, which is for somebody else
    // to see to.
    bail!("the keeper has gone away");
}

/// Has this process killed where the project's own tests want it.
fn arm() {
    #[cfg(feature = "fail-points")]
    if let Ok(place) = std::env::var(super::child::FAIL) {
        assert!(
            snaprestore_engine::fail_point::arm(&place),
            "{place}: no place to fail at"
        );
    }
}

/// What the threads share.
struct Worker {
    wire: Wire,
    services: Mutex<HashMap<u64, Arc<Open>>>,
    vms: Mutex<BTreeMap<u64, Arc<Paged>>>,
    draining: AtomicBool,
}

/// A snapshot, and how VMs are served from it.
struct Open {
    snapshot: Result<Arc<Snapshot>, String>,
    service: Service,
}

/// A VM that was handed over.
struct Arrived {
    id: u64,
    pid: u32,
    service: Arc<Open>,
    regions: Vec<OwnerRegion>,
    deadly: Vec<u64>,
    userfaultfd: OwnedFd,
    owner: OwnedFd,
    tables: Option<OwnedFd>,
}

impl Worker {
    /// Does what the keeper says.
    fn take(self: &Arc<Self>, message: ToWorker, descriptors: Vec<OwnedFd>) -> Result<()> {
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next();
        match message {
            ToWorker::Service { key, service } => {
                let file = next().context("a snapshot came without its file")?;
                let open = Arc::new(Open::new(file, service));
                lock(&self.services).insert(key, open);
            }
            ToWorker::Vm {
                id,
                service,
                pid,
                regions,
                deadly,
            } => {
                let service = lock(&self.services).get(&service).cloned();
                let arrived = Arrived {
                    id,
                    pid,
                    service: service.context("a VM came before its snapshot")?,
                    regions,
                    deadly,
                    userfaultfd: next().context("a VM came without its userfaultfd")?,
                    owner: next().context("a VM came without its pidfd")?,
                    tables: next(),
                };
                let worker = Arc::clone(self);
                let begun = std::thread::Builder::new()
                    .name("vm".into())
                    .spawn(move || worker.serve(arrived));
                begun.context("a thread for a VM")?;
            }
            ToWorker::Drain => {
                self.draining.store(true, SeqCst);
                for vm in lock(&self.vms).values() {
                    self.complete(vm)?;
                }
            }
        }
        Ok(())
    }

    /// Serves a VM to its end.
    fn serve(self: &Arc<Self>, arrived: Arrived) {
        let (id, pid) = (arrived.id, arrived.pid);
        fail_point(FailPoint::Received);
        let vm = match self.resume(arrived) {
            Ok(paged) => self.follow(id, pid, &paged),
            Err(error) if has_ended(&error) => Vm::new(pid, Ending::Exited, None),
            Err(error) => Vm::new(pid, Ending::Refused, Some(format!("{error:#}"))),
        };
        self.tell(&FromWorker::Ended { id, vm });
    }

    fn resume(&self, arrived: Arrived) -> Result<Arc<Paged>> {
        let id = arrived.id;
        let snapshot = match &arrived.service.snapshot {
            Ok(snapshot) => Arc::clone(snapshot),
            Err(error) => bail!("{error}"),
        };
        let pager = arrived.service.pager(snapshot);
        let tables = match arrived.tables {
            Some(tables) => tables,
            None => {
                let tables = pager.tables(&arrived.regions)?;
                fail_point(FailPoint::TablesMade);
                self.wire
                    .send(&FromWorker::Tables { id }, &[tables.as_fd()])?;
                fail_point(FailPoint::TablesGiven);
                tables
            }
        };
        let handover = Handover {
            userfaultfd: arrived.userfaultfd,
            owner: arrived.owner,
            regions: arrived.regions,
        };
        let paged = Arc::new(pager.resume(handover, tables, &arrived.deadly)?);
        lock(&self.vms).insert(id, Arc::clone(&paged));
        self.tell(&FromWorker::Served { id });
        if self.draining.load(SeqCst) {
            self.complete(&paged)?;
        }
        Ok(paged)
    }

    /// Waits for the end of a VM.
    fn follow(&self, id: u64, pid: u32, paged: &Paged) -> Vm {
        let (ending, reason) = match paged.wait() {
            pager::Ending::Complete => (Ending::Complete, None),
            pager::Ending::OwnerGone => (Ending::Exited, None),
            pager::Ending::Killed(why) => (Ending::Killed, Some(why)),
        };
        lock(&self.vms).remove(&id);
        Vm::new(pid, ending, reason).with(&paged.stats())
    }

    /// Has everything installed in a VM, in a thread of its own. A VM for which that can't be done is
    /// killed: nobody will serve it.
    fn complete(&self, vm: &Arc<Paged>) -> Result<()> {
        let vm = Arc::clone(vm);
        let begun = std::thread::Builder::new()
            .name("complete".into())
            .spawn(move || {
                if !vm.complete() && vm.ending().is_none() {
                    let first = vm.failures().into_iter().next();
                    let first = first.map(|failure| failure.to_string());
                    let first = first.unwrap_or_default();
                    vm.end(&format!("it can't be completed: {first}"));
                }
            });
        begun.context("a thread that completes a VM")?;
        Ok(())
    }

    /// Tells the keeper. If it is gone there is nobody to tell, and this process is about to end.
    fn tell(&self, message: &FromWorker) {
        let _ = self.wire.send(message, &[]);
    }
}

impl Open {
    fn new(file: OwnedFd, service: Service) -> Self {
        let store = FileStore::from_file(File::from(file), &service.snapshot);
        let snapshot = Snapshot::open(Arc::new(store));
        Self {
            snapshot: snapshot
                .map(Arc::new)
                .map_err(|error| format!("{:#}", anyhow::Error::from(error))),
            service,
        }
    }

    fn pager(&self, snapshot: Arc<Snapshot>) -> Pager {
        Pager::new(snapshot)
            .fault_threads(self.service.threads)
            .prefetch(match self.service.prefetch {
                args::Prefetch::Off => pager::Prefetch::Off,
                args::Prefetch::WorkingSet => pager::Prefetch::WorkingSet,
                args::Prefetch::All => pager::Prefetch::All,
            })
            .on_error(match self.service.on_error {
                args::OnError::Kill => pager::OnError::Kill,
                args::OnError::Poison => pager::OnError::Poison,
            })
    }
}

/// Whether a VM can't be served because its process has ended.
fn has_ended(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(AttachError::NotPermitted(Errno::ESRCH))
    )
}

/// A panic elsewhere leaves these maps whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
