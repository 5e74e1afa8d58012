//! The worker: does everything except holding descriptors. It may be killed at any instant.
//!
//! ```text
//!   main thread            reads the supervisor's messages; exits with the supervisor
//!   one thread per VM      makes the tables and sends them to the supervisor, resumes, waits for
//!                          the end of the VM and notifies the supervisor
//!   one thread per client  serves the control socket, or a scrape of the metrics
//! ```

mod layers;
mod metrics;
mod operator;
pub(crate) mod sandbox;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Write as _};
use std::net::TcpStream;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockaddrLike as _, SockaddrStorage, getsockname};
use nix::unistd::geteuid;
use snaprestore_engine::fail_point::{FailPoint, fail_point};
use snaprestore_engine::pager::{
    self, AttachError, FrameId, Handover, OwnerRegion, Paged, Pager, SessionEnd,
};
use snaprestore_engine::stats::{Stats, whole_millis};
use snaprestore_engine::{Recording, RecordingOptions, Shared};
use snapshot_format::{FileStore, OpenError, Snapshot};

use self::layers::{OpenLayers, PassedFiles};
use self::metrics::Totals;
use self::operator::PendingRequests;
use self::sandbox::{Account, Confinement, SandboxError, confine_worker, exit_with_supervisor};
use crate::api::config::{self, Service};
use crate::api::control;
use crate::api::summary::{VmLabel, VmSummary};
use crate::api::types::{self, MAX_RECENT_VMS, RequestError, VmState, VmStats};
use crate::error::Chain;
use crate::ipc::{Channel, Endpoint, Facts, FromWorker, NewerSettings, ToWorker, TraceDestination};
use crate::log::{self, LogFormat};

/// Interval at which suppressed events are logged.
const SUPPRESSED_INTERVAL: Duration = Duration::from_secs(5);
/// Time limit for clients to finish when the worker shuts down.
const CLIENTS_TIMEOUT: Duration = Duration::from_secs(2);

/// The options of a worker.
#[derive(Debug, clap::Args)]
pub(crate) struct WorkerOptions {
    /// Give up what isn't needed
    #[arg(long)]
    confine: bool,
    /// User to become
    #[arg(long)]
    user: Option<String>,
    /// Decoded frames that sessions share, in MiB
    #[arg(long)]
    frame_cache: u64,
    /// How events are logged
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// Why a worker can't continue. The supervisor starts another one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The socket to the supervisor can't be used.
    #[error("cannot talk to the supervisor")]
    Channel(#[from] io::Error),
    /// A message of the supervisor came without a descriptor, or before another message.
    #[error("unexpected message from the supervisor: {what}")]
    Message {
        /// The missing part.
        what: &'static str,
    },
    /// A thread could not be started.
    #[error("cannot start the thread {name}")]
    Thread {
        /// The name of the thread.
        name: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The supervisor exited.
    #[error("the supervisor exited")]
    SupervisorExited,
}

/// Why a VM can't be served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("cannot open the snapshot")]
    Snapshot(#[from] OpenError),
    #[error("cannot send the tables of the session to the supervisor")]
    Tables(#[source] io::Error),
    #[error(transparent)]
    Attach(#[from] AttachError),
}

impl ServeError {
    /// Returns whether the process of the VM has exited.
    fn is_exit(&self) -> bool {
        matches!(self, Self::Attach(AttachError::NotPermitted(Errno::ESRCH)))
    }
}

/// Why a worker could not be confined as its options want.
#[derive(Debug, thiserror::Error)]
enum ConfineError {
    #[error("cannot sandbox the worker (pass --no-confine to run without a sandbox)")]
    Sandbox(#[source] SandboxError),
    #[error(transparent)]
    Other(#[from] SandboxError),
}

/// Runs the process that the supervisor has started, with the supervisor's socket as standard
/// input.
pub(crate) fn run(args: &WorkerOptions) -> Result<ExitCode, WorkerError> {
    let channel = Channel::new(std::io::stdin().as_fd().try_clone_to_owned()?);
    // Values that can't be queried any more after this process is confined: the daemon's user, and
    // the number of cores that its cgroup may use.
    let user = geteuid().as_raw();
    let cores = available_parallelism().map_or(1, NonZeroUsize::get);
    let shared = Shared::new(args.frame_cache << 20);
    let pool = HugePool::open();
    if let Err(error) = confine(args) {
        let why = Chain(&error).to_string();
        channel.send(&FromWorker::ConfineFailed { why }, &[])?;
        return Ok(ExitCode::FAILURE);
    }
    arm();
    let worker = Arc::new(Worker::new(channel, user, cores, shared, pool));
    let format = args.log_format;
    worker.spawn("log", move |_| {
        loop {
            std::thread::sleep(SUPPRESSED_INTERVAL);
            log::log_suppressed(format);
        }
    })?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let ready = FromWorker::Ready {
        version,
        knows_newer: true,
    };
    worker.channel.send(&ready, &[])?;
    while let Some((message, descriptors)) = worker.channel.receive()? {
        if let ToWorker::Shutdown = message {
            worker.let_clients_finish();
            return Ok(ExitCode::SUCCESS);
        }
        worker.handle(message, descriptors)?;
    }
    // The supervisor is gone. The descriptors here must stay open until the VMs are gone, which the
    // guardian or systemd takes care of.
    Err(WorkerError::SupervisorExited)
}

/// Confines the worker, if requested. The process has no other thread yet.
fn confine(args: &WorkerOptions) -> Result<(), ConfineError> {
    if !args.confine {
        return Ok(exit_with_supervisor()?);
    }
    let account = args.user.as_deref().map(Account::find).transpose()?;
    let confined = confine_worker(&Confinement {
        readable: Vec::new(),
        account,
    });
    let confined = confined.map_err(ConfineError::Sandbox)?;
    tracing::debug!(landlock = confined.landlock, "confined");
    for warning in confined.warnings {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// Arms the fail point at which the project's own tests kill this process.
fn arm() {
    #[cfg(feature = "fail-points")]
    if let Ok(place) = std::env::var(crate::ipc::FAIL) {
        assert!(
            snaprestore_engine::fail_point::arm(&place),
            "{place}: no place to fail at"
        );
    }
}

/// State shared by the threads.
pub(crate) struct Worker {
    pub(crate) channel: Channel,
    /// The daemon's user.
    user: u32,
    cores: usize,
    pub(crate) services: Mutex<BTreeMap<u64, Arc<OpenService>>>,
    /// Ancestors of snapshots that have not been announced yet, by service.
    ancestors: Mutex<BTreeMap<u64, Vec<Arc<FileStore>>>>,
    layers: Arc<OpenLayers>,
    pub(crate) vms: Mutex<BTreeMap<u64, Arc<ServedVm>>>,
    /// The VMs that ended last.
    pub(crate) ended: Mutex<VecDeque<VmStats>>,
    pub(crate) requests: PendingRequests,
    pub(crate) facts: Mutex<Facts>,
    totals: Totals,
    pool: Arc<HugePool>,
    shared: Shared,
    draining: AtomicBool,
    clients: AtomicUsize,
}

/// A snapshot, and the settings for serving VMs from it.
pub(crate) struct OpenService {
    pub(crate) service: Service,
    /// Number of files of the snapshot.
    pub(crate) layers: u64,
    /// Sends the records of sessions to the supervisor, if set.
    run_records: bool,
    snapshot: Mutex<ServedSnapshot>,
}

/// A snapshot, which is opened when a VM needs it, so that a disk that doesn't answer blocks no
/// other VMs.
enum ServedSnapshot {
    Passed(PassedFiles),
    Open(Arc<Snapshot>),
}

/// A VM served by this worker.
pub(crate) struct ServedVm {
    pub(crate) id: u64,
    pub(crate) pid: u32,
    pub(crate) service: Arc<OpenService>,
    /// Time at which it connected.
    since: Instant,
    /// Set once its session exists.
    pub(crate) paged: OnceLock<Paged>,
    /// The recording that an operator has started and not stopped.
    pub(crate) recording: Mutex<Option<Recording>>,
    pub(crate) completing: AtomicBool,
    /// Whether the daemon was asked to stop while the VM was alive, so that it must be completed.
    to_complete: AtomicBool,
    pool: Arc<HugePool>,
}

/// The machine's pool of 2 MiB pages. Its files are opened before this process is confined.
#[derive(Debug, Default)]
struct HugePool {
    free: Option<File>,
    total: Option<File>,
}

impl HugePool {
    fn open() -> Self {
        let file = |name: &str| {
            File::open(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}")).ok()
        };
        Self {
            free: file("free_hugepages"),
            total: file("nr_hugepages"),
        }
    }

    /// Describes an empty pool to an operator.
    fn shortage(&self) -> String {
        let number = |file: &Option<File>| {
            let mut text = [0; 32];
            let read = file.as_ref()?.read_at(&mut text, 0).ok()?;
            std::str::from_utf8(&text[..read]).ok()?.trim().parse().ok()
        };
        let has = match (number(&self.free), number(&self.total)) {
            (Some(free), Some(total)) => {
                let (free, total): (u64, u64) = (free, total);
                format!("{free} of {total} pages are free")
            }
            _ => "its page counts are unknown".to_owned(),
        };
        format!(
            "no free page in the pool hugepages-2048kB ({has}); raise vm.nr_hugepages, or hugetlb.2MB.max \
             of the VM's cgroup, and retry"
        )
    }
}

/// The message to an operator when there is no memory for a VM's small pages.
const MEMORY_SHORTAGE: &str = "out of memory: the machine or the VM's cgroup (memory.max) is at its limit; free \
    memory or raise the limit, and retry";

/// Descriptors and description of a VM that has arrived.
struct ReceivedVm {
    regions: Vec<OwnerRegion>,
    quarantined: Vec<FrameId>,
    userfaultfd: OwnedFd,
    owner: OwnedFd,
    page_map: Option<OwnedFd>,
    tables: Option<OwnedFd>,
}

impl Worker {
    fn new(channel: Channel, user: u32, cores: usize, shared: Shared, pool: HugePool) -> Self {
        Self {
            pool: Arc::new(pool),
            channel,
            user,
            cores,
            shared,
            services: Mutex::default(),
            ancestors: Mutex::default(),
            layers: Arc::default(),
            vms: Mutex::default(),
            ended: Mutex::default(),
            requests: PendingRequests::default(),
            facts: Mutex::default(),
            totals: Totals::default(),
            draining: AtomicBool::new(false),
            clients: AtomicUsize::new(0),
        }
    }

    /// Handles a message of the supervisor.
    fn handle(
        self: &Arc<Self>,
        message: ToWorker,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), WorkerError> {
        let missing = |what| move || WorkerError::Message { what };
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next();
        match message {
            ToWorker::Layer { key, name } => {
                let file = next().ok_or_else(missing("an ancestor without its file"))?;
                let file = Arc::new(FileStore::named(File::from(file), name));
                lock(&self.ancestors).entry(key).or_default().push(file);
            }
            ToWorker::Service {
                key,
                service,
                newer,
            } => {
                let file = next().ok_or_else(missing("a snapshot without its file"))?;
                self.add_service(key, service, newer, file);
            }
            ToWorker::RemoveService { key } => self.remove_service(key),
            ToWorker::Vm {
                id,
                service,
                pid,
                age_ms,
                regions,
                page_map,
                quarantined,
            } => {
                let service = lock(&self.services).get(&service).cloned();
                let now = Instant::now();
                let served = Arc::new(ServedVm {
                    id,
                    pid,
                    service: service.ok_or_else(missing("a VM before its snapshot"))?,
                    since: now
                        .checked_sub(Duration::from_millis(age_ms))
                        .unwrap_or(now),
                    paged: OnceLock::new(),
                    recording: Mutex::default(),
                    completing: AtomicBool::new(false),
                    to_complete: AtomicBool::new(false),
                    pool: Arc::clone(&self.pool),
                });
                let arrived = ReceivedVm {
                    regions,
                    quarantined,
                    userfaultfd: next().ok_or_else(missing("a VM without its userfaultfd"))?,
                    owner: next().ok_or_else(missing("a VM without its pidfd"))?,
                    page_map: page_map.then(&mut next).flatten(),
                    tables: next(),
                };
                lock(&self.vms).insert(id, Arc::clone(&served));
                let label = served.label();
                let vm = Arc::clone(&served);
                let begun = self.spawn("vm", move |worker| worker.serve(&vm, arrived));
                if let Err(error) = begun {
                    // Only this VM is lost: those that are served have their threads.
                    let vm = VmSummary::new(label, SessionEnd::Refused(Chain(&error).to_string()));
                    self.record_end(&served, vm);
                }
            }
            ToWorker::VmEnded { vm } => self.remember(VmStats {
                vm,
                session: Stats::default(),
            }),
            ToWorker::Client { endpoint, facts } => {
                let stream = next().ok_or_else(missing("a client without its connection"))?;
                *lock(&self.facts) = facts;
                self.clients.fetch_add(1, SeqCst);
                let begun = self.spawn("client", move |worker| {
                    worker.serve_client(endpoint, stream);
                    worker.clients.fetch_sub(1, SeqCst);
                });
                if let Err(error) = begun {
                    self.clients.fetch_sub(1, SeqCst);
                    let why = Chain(&error);
                    tracing::warn!("cannot handle a control or metrics connection: {why}");
                }
            }
            ToWorker::Reply {
                number,
                result,
                bad_snapshot,
            } => {
                let result = result.map_err(|text| RequestError { text, bad_snapshot });
                self.requests.resolve(number, result);
            }
            ToWorker::Drain => {
                self.draining.store(true, SeqCst);
                let vms: Vec<_> = lock(&self.vms).values().cloned().collect();
                for vm in vms {
                    let own = Arc::clone(&vm);
                    if let Err(error) = self.spawn("complete", move |_| own.complete_or_kill()) {
                        // Only this VM is lost.
                        vm.kill(&Chain(&error).to_string());
                    }
                }
            }
            ToWorker::Shutdown => {}
        }
        Ok(())
    }

    /// Adds a service, whose snapshot's ancestors were passed before.
    fn add_service(&self, key: u64, mut service: Service, newer: NewerSettings, file: OwnedFd) {
        let run_records = newer.run_records;
        newer.put_back(&mut service);
        let own = FileStore::from_file(File::from(file), &service.snapshot);
        let ancestors = lock(&self.ancestors).remove(&key).unwrap_or_default();
        let files = PassedFiles::new(own, ancestors, &self.layers);
        lock(&self.services).insert(key, Arc::new(OpenService::new(files, service, run_records)));
    }

    fn remove_service(&self, key: u64) {
        if let Some(open) = lock(&self.services).remove(&key) {
            self.totals.forget(&open.service.name);
        }
        // The service may have been removed before it was announced.
        lock(&self.ancestors).remove(&key);
        self.layers.forget_closed();
        self.shared.forget_closed();
    }

    fn spawn(
        self: &Arc<Self>,
        name: &str,
        body: impl FnOnce(&Self) + Send + 'static,
    ) -> Result<(), WorkerError> {
        let worker = Arc::clone(self);
        let begun = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || body(&worker));
        begun.map(drop).map_err(|source| WorkerError::Thread {
            name: name.to_owned(),
            source,
        })
    }

    /// Serves a VM to its end.
    fn serve(&self, served: &ServedVm, arrived: ReceivedVm) {
        // All log lines about the VM name it.
        let _of = served.label().span().entered();
        fail_point(FailPoint::Received);
        let label = served.label();
        let vm = match self.resume(served, arrived) {
            Ok((paged, recording)) => {
                if let Some(recording) = recording {
                    self.deliver_recording(served.id, &recording);
                }
                wait_for_end(label, paged)
            }
            Err(error) if error.is_exit() => VmSummary::new(label, SessionEnd::Exited),
            Err(error) => VmSummary::new(label, SessionEnd::Refused(Chain(&error).to_string())),
        };
        self.record_end(served, vm);
    }

    /// Records that a VM has ended, and notifies the supervisor.
    fn record_end(&self, served: &ServedVm, vm: VmSummary) {
        let id = served.id;
        let mut stats = served.stats();
        stats.vm.state = (&vm.end).into();
        stats.vm.reason = vm.end.reason().map(str::to_owned);
        {
            // Operators find it either among the VMs being served, or among those that have ended.
            let mut vms = lock(&self.vms);
            self.totals.add(&stats);
            stats.session.drop_buckets();
            self.remember(stats);
            vms.remove(&id);
        }
        let incomplete = matches!(vm.end, SessionEnd::Killed(_)) && served.to_complete.load(SeqCst);
        let paged = served.paged.get().filter(|_| served.service.run_records);
        let run = paged.map(|paged| Box::new(paged.run_record(served.label().to_string())));
        self.notify(&FromWorker::VmEnded {
            id,
            vm,
            incomplete,
            run,
        });
    }

    /// Keeps the statistics of an ended VM for operators.
    fn remember(&self, stats: VmStats) {
        let mut ended = lock(&self.ended);
        if ended.len() == MAX_RECENT_VMS {
            ended.pop_front();
        }
        ended.push_back(stats);
    }

    /// Begins to serve a VM. Returns its session, and its recording for the folder of the service.
    fn resume<'a>(
        &self,
        served: &'a ServedVm,
        arrived: ReceivedVm,
    ) -> Result<(&'a Paged, Option<Recording>), ServeError> {
        let id = served.id;
        let pager = served.service.pager(&self.shared)?;
        let pager = pager.prefetch_threads(self.cores);
        let mut pager = pager;
        let tables = if let Some(tables) = arrived.tables {
            // Another worker has served it before: the first touches are gone.
            tables
        } else {
            if served.service.service.record.is_some() {
                pager = pager.record(RecordingOptions::default());
            }
            let tables = pager.tables(&arrived.regions)?;
            fail_point(FailPoint::TablesMade);
            let message = FromWorker::Tables { id };
            let sent = self.channel.send(&message, &[tables.as_fd()]);
            sent.map_err(ServeError::Tables)?;
            fail_point(FailPoint::TablesGiven);
            tables
        };
        let handover = Handover {
            userfaultfd: arrived.userfaultfd,
            owner: arrived.owner,
            regions: arrived.regions,
            page_map: arrived.page_map,
        };
        let session = pager.resume(handover, tables, &arrived.quarantined)?;
        // Taken before operators find the session, because they may begin another recording.
        let recording = session.recording();
        let session = served.paged.get_or_init(|| session);
        if recording.is_some() {
            let destination = TraceDestination::Folder;
            self.notify(&FromWorker::RecordingBegan { id, destination });
        }
        self.notify(&FromWorker::Served { id });
        if self.draining.load(SeqCst) {
            served.complete_or_kill();
        }
        Ok((session, recording))
    }

    /// Waits for the end of a recording that began with the session, and sends its trace to the
    /// supervisor, which writes it to the folder of the service.
    fn deliver_recording(&self, id: u64, recording: &Recording) {
        while !recording.wait(Duration::MAX) {}
        let ended = |result| FromWorker::RecordingEnded {
            id,
            destination: TraceDestination::Folder,
            result,
        };
        let bytes = recording.stop().to_bytes().map_err(io::Error::other);
        let sent = bytes
            .and_then(|bytes| memfd_with(&bytes))
            .and_then(|memfd| self.channel.send(&ended(Ok(())), &[memfd.as_fd()]));
        if let Err(error) = sent {
            let why = format!("cannot send its trace to the supervisor: {error}");
            self.notify(&ended(Err(why)));
        }
    }

    /// Serves a client of the control socket or of the metrics.
    fn serve_client(&self, endpoint: Endpoint, stream: OwnedFd) {
        match endpoint {
            Endpoint::Control => {
                control::serve(&UnixStream::from(stream), self.user, self);
                if self.requests.is_replaced() {
                    self.notify(&FromWorker::Replied);
                }
            }
            Endpoint::Metrics if is_unix(&stream) => {
                metrics::scrape(UnixStream::from(stream), || self.metrics());
            }
            Endpoint::Metrics => metrics::scrape(TcpStream::from(stream), || self.metrics()),
        }
    }

    fn metrics(&self) -> String {
        // Includes those that have ended; no VM may be in both lists.
        let (live, ended) = {
            let vms = lock(&self.vms);
            let live: Vec<_> = vms.values().map(|vm| vm.stats()).collect();
            (live, self.totals.clone())
        };
        let facts = lock(&self.facts).clone();
        let services = lock(&self.services);
        let mut endings = BTreeMap::<String, BTreeMap<VmState, u64>>::new();
        for (key, open) in services.iter() {
            let of_service = endings.entry(open.service.name.clone()).or_default();
            for (state, count) in facts.ended.get(key).into_iter().flatten() {
                *of_service.entry(*state).or_default() += count;
            }
        }
        let daemon = metrics::DaemonStats {
            worker_restarts: facts.worker_restarts,
            draining: facts.draining,
            ended: endings,
            frame_cache: self.shared.frame_cache(),
        };
        drop(services);
        ended.render(&live, &daemon)
    }

    /// Waits a little for clients that are still being served.
    fn let_clients_finish(&self) {
        let began = Instant::now();
        while self.clients.load(SeqCst) > 0 && began.elapsed() < CLIENTS_TIMEOUT {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Notifies the supervisor. If that is gone, this process is about to exit.
    pub(crate) fn notify(&self, message: &FromWorker) {
        let _ = self.channel.send(message, &[]);
    }
}

impl OpenService {
    fn new(files: PassedFiles, service: Service, run_records: bool) -> Self {
        Self {
            service,
            run_records,
            layers: files.count(),
            snapshot: Mutex::new(ServedSnapshot::Passed(files)),
        }
    }

    /// Opens the snapshot if it is not open. A failure costs one VM, and not all that follow.
    fn snapshot(&self) -> Result<Arc<Snapshot>, ServeError> {
        let mut snapshot = lock(&self.snapshot);
        let opened = match &*snapshot {
            ServedSnapshot::Passed(files) => Arc::new(files.open()?),
            ServedSnapshot::Open(snapshot) => return Ok(Arc::clone(snapshot)),
        };
        // Closes the files of which another snapshot had a layer open.
        *snapshot = ServedSnapshot::Open(Arc::clone(&opened));
        Ok(opened)
    }

    fn pager(&self, shared: &Shared) -> Result<Pager, ServeError> {
        let mut pager = Pager::new(self.snapshot()?);
        if let Some(name) = &self.service.working_set {
            pager = pager.working_set(name);
        }
        Ok(pager
            .shared(shared)
            .fault_threads(self.service.threads)
            .retry_timeout(Duration::from_secs(self.service.retry_timeout))
            .prefetch(match self.service.prefetch {
                config::Prefetch::Off => snaprestore_engine::Prefetch::Off,
                config::Prefetch::WorkingSet => snaprestore_engine::Prefetch::WorkingSet,
                config::Prefetch::All => snaprestore_engine::Prefetch::All,
            })
            .on_error(match self.service.on_error {
                config::FailurePolicy::Kill => pager::OnError::Kill,
                config::FailurePolicy::Poison => pager::OnError::Poison,
            }))
    }
}

impl ServedVm {
    /// Returns the VM's label.
    pub(crate) fn label(&self) -> VmLabel {
        VmLabel {
            id: self.id,
            pid: self.pid,
            service: self.service.service.name.clone(),
        }
    }

    /// Installs all missing pages and releases the VM.
    pub(crate) fn complete(&self) -> Result<(), String> {
        let _of = self.label().span().entered();
        let Some(paged) = self.paged.get() else {
            return Err("the VM is still being set up; retry".to_owned());
        };
        self.completing.store(true, SeqCst);
        let before = paged.stats();
        let done = paged.complete() || paged.ending().is_some();
        self.completing.store(false, SeqCst);
        if done {
            return Ok(());
        }
        let after = paged.stats();
        if after.shortages.huge_pages > before.shortages.huge_pages {
            return Err(self.pool.shortage());
        }
        if after.shortages.memory > before.shortages.memory {
            return Err(MEMORY_SHORTAGE.to_owned());
        }
        let first = paged.failures().into_iter().next();
        Err(first.map_or_else(
            || "its mappings keep changing; retry".to_owned(),
            |failure| failure.to_string(),
        ))
    }

    /// Completes the VM; kills it if that fails, since nobody will serve it.
    fn complete_or_kill(&self) {
        let _of = self.label().span().entered();
        // A VM that has already ended was not killed because of this.
        let has_ended = self
            .paged
            .get()
            .is_some_and(|paged| paged.ending().is_some());
        self.to_complete.fetch_or(!has_ended, SeqCst);
        if let Err(why) = self.complete() {
            self.kill(&why);
        }
    }

    /// Kills the VM if it is served; if it is about to be, its own thread completes it.
    fn kill(&self, why: &str) {
        if let Some(paged) = self.paged.get() {
            paged.end(&format!("cannot install its missing pages: {why}"));
        }
    }

    /// Returns the VM's statistics.
    pub(crate) fn stats(&self) -> VmStats {
        let paged = self.paged.get();
        let state = match paged {
            None => VmState::Connecting,
            Some(_) if self.completing.load(SeqCst) => VmState::Completing,
            Some(_) => VmState::Serving,
        };
        VmStats {
            vm: types::VmStatus {
                id: self.id,
                service: self.service.service.name.clone(),
                pid: self.pid,
                state,
                reason: None,
                age_ms: whole_millis(self.since.elapsed()),
            },
            session: paged.map(Paged::stats).unwrap_or_default(),
        }
    }
}

/// Returns a memfd with this content.
fn memfd_with(bytes: &[u8]) -> io::Result<OwnedFd> {
    let memfd = memfd_create(c"snaprestore trace", MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(memfd);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// Waits for the end of a VM.
fn wait_for_end(label: VmLabel, paged: &Paged) -> VmSummary {
    let end = paged.wait();
    VmSummary::new(label, end).with(&paged.stats())
}

fn is_unix(socket: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd as _;
    let name = getsockname::<SockaddrStorage>(socket.as_raw_fd());
    name.is_ok_and(|name| name.family() == Some(AddressFamily::Unix))
}

/// Locks, also after a panic elsewhere, which leaves the content consistent.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
