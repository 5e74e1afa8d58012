//! The worker: everything but holding descriptors. It may be killed at any instant.
//!
//! ```text
//!   main thread            takes what the keeper sends; ends with the keeper
//!   one thread a VM        makes the tables and gives them to the keeper, resumes, waits for the end
//!                          of the VM and tells the keeper
//!   one thread a visitor   answers the control socket, or a scrape of the metrics
//! ```

mod metrics;
mod operator;
pub(crate) mod sandbox;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
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

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockaddrLike as _, SockaddrStorage, getsockname};
use nix::unistd::geteuid;
use snaprestore_engine::fail_point::{FailPoint, fail_point};
use snaprestore_engine::pager::{self, AttachError, Handover, OwnerRegion, Paged, Pager, Shared};
use snapshot_format::{FileStore, Snapshot};

use self::metrics::Book;
use crate::api::config::{self, Service};
use crate::api::control;
use crate::api::summary::{Ending, Vm, VmLabel};
use crate::api::types::{self, SessionStats, VmState, VmStats};
use crate::ipc::{Door, Facts, FromWorker, ToWorker, Wire};
use crate::log;
use crate::role::WorkerOptions;
use crate::supervisor::REMEMBERED;
use crate::worker::operator::Asked;
use crate::worker::sandbox::{Account, Confinement, confine_worker, end_with_keeper};

/// How often it is said how many events were not logged.
const SAY_SUPPRESSED: Duration = Duration::from_secs(5);
/// How long visitors may take for what they asked for when the worker is to leave.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Runs in the process that the keeper has started, its socket being standard input.
pub(crate) fn run(args: &WorkerOptions) -> Result<ExitCode> {
    let wire = Wire::new(std::io::stdin().as_fd().try_clone_to_owned()?);
    // What can't be asked for any more once this process is confined: the user of the daemon, and how many
    // cores its cgroup may use.
    let user = geteuid().as_raw();
    let cores = available_parallelism().map_or(1, NonZeroUsize::get);
    let shared = Shared::new(args.frame_cache << 20);
    let pool = HugePool::open();
    if let Err(error) = confine(args) {
        let why = format!("{error:#}");
        wire.send(&FromWorker::Unfit { why }, &[])?;
        return Ok(ExitCode::FAILURE);
    }
    arm();
    let worker = Arc::new(Worker::new(wire, user, cores, shared, pool));
    let format = args.log_format;
    worker.begin("log", move |_| {
        loop {
            std::thread::sleep(SAY_SUPPRESSED);
            log::say_suppressed(format);
        }
    })?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    worker.wire.send(&FromWorker::Ready { version }, &[])?;
    while let Some((message, descriptors)) = worker.wire.receive()? {
        if let ToWorker::Leave = message {
            worker.let_visitors_finish();
            return Ok(ExitCode::SUCCESS);
        }
        worker.take(message, descriptors)?;
    }
    // The keeper is gone; what is open here must stay so until the VMs are, which is for somebody else
    // to see to.
    bail!("the keeper has gone away");
}

/// Gives up what the worker doesn't need, if that is wanted. The process has no other thread yet.
fn confine(args: &WorkerOptions) -> Result<()> {
    if !args.confine {
        return end_with_keeper();
    }
    let account = args.user.as_deref().map(Account::find).transpose()?;
    let confined = confine_worker(&Confinement {
        readable: Vec::new(),
        account,
    });
    let confined = confined.context(
        "the process that serves the pages can't be confined, which --no-confine does without",
    )?;
    tracing::debug!(landlock = confined.landlock, "confined");
    for warning in confined.warnings {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// Has this process killed where the project's own tests want it.
fn arm() {
    #[cfg(feature = "fail-points")]
    if let Ok(place) = std::env::var(crate::supervisor::worker_process::FAIL) {
        assert!(
            snaprestore_engine::fail_point::arm(&place),
            "{place}: no place to fail at"
        );
    }
}

/// What the threads share.
pub(crate) struct Worker {
    pub(crate) wire: Wire,
    /// The user of the daemon.
    user: u32,
    cores: usize,
    pub(crate) services: Mutex<BTreeMap<u64, Arc<Open>>>,
    pub(crate) vms: Mutex<BTreeMap<u64, Arc<Served>>>,
    /// The last VMs that have ended.
    pub(crate) ended: Mutex<VecDeque<VmStats>>,
    pub(crate) asked: Asked,
    pub(crate) facts: Mutex<Facts>,
    book: Book,
    pool: Arc<HugePool>,
    shared: Shared,
    draining: AtomicBool,
    visitors: AtomicUsize,
}

/// A snapshot, and how VMs are served from it.
pub(crate) struct Open {
    pub(crate) service: Service,
    file: OwnedFd,
    /// Opened when a VM wants it: one whose disk doesn't answer keeps no others waiting.
    snapshot: Mutex<Option<Arc<Snapshot>>>,
}

/// A VM in this worker's hands.
pub(crate) struct Served {
    pub(crate) id: u64,
    pub(crate) pid: u32,
    pub(crate) service: Arc<Open>,
    /// When it connected.
    since: Instant,
    /// Not before its session is there.
    pub(crate) paged: OnceLock<Paged>,
    pub(crate) completing: AtomicBool,
    /// Whether the daemon was asked to stop while it was alive, and so is to complete it.
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

    /// What an operator is told when it has no page for a VM.
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
            _ => "how many pages it has is not known".to_owned(),
        };
        format!(
            "the pool hugepages-2048kB has no page of 2 MiB for it ({has}); raise vm.nr_hugepages, or the \
             hugetlb.2MB.max of its cgroup, and try again"
        )
    }
}

/// What an operator is told when there is no memory for the small pages of a VM.
const MEMORY_SHORTAGE: &str = "the kernel has no memory for it: the machine or the VM's cgroup (memory.max) is at its \
    limit";

/// What came with a VM.
struct Arrived {
    regions: Vec<OwnerRegion>,
    deadly: Vec<u64>,
    userfaultfd: OwnedFd,
    owner: OwnedFd,
    page_map: Option<OwnedFd>,
    tables: Option<OwnedFd>,
}

impl Worker {
    fn new(wire: Wire, user: u32, cores: usize, shared: Shared, pool: HugePool) -> Self {
        Self {
            pool: Arc::new(pool),
            wire,
            user,
            cores,
            shared,
            services: Mutex::default(),
            vms: Mutex::default(),
            ended: Mutex::default(),
            asked: Asked::default(),
            facts: Mutex::default(),
            book: Book::default(),
            draining: AtomicBool::new(false),
            visitors: AtomicUsize::new(0),
        }
    }

    /// Does what the keeper says.
    fn take(self: &Arc<Self>, message: ToWorker, descriptors: Vec<OwnedFd>) -> Result<()> {
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next();
        match message {
            ToWorker::Service { key, service } => {
                let file = next().context("a snapshot came without its file")?;
                lock(&self.services).insert(key, Arc::new(Open::new(file, service)));
            }
            ToWorker::Forget { key } => {
                if let Some(open) = lock(&self.services).remove(&key) {
                    self.book.forget(&open.service.name);
                }
                self.shared.forget_closed();
            }
            ToWorker::Vm {
                id,
                service,
                pid,
                age_ms,
                regions,
                page_map,
                deadly,
            } => {
                let service = lock(&self.services).get(&service).cloned();
                let now = Instant::now();
                let served = Arc::new(Served {
                    id,
                    pid,
                    service: service.context("a VM came before its snapshot")?,
                    since: now
                        .checked_sub(Duration::from_millis(age_ms))
                        .unwrap_or(now),
                    paged: OnceLock::new(),
                    completing: AtomicBool::new(false),
                    to_complete: AtomicBool::new(false),
                    pool: Arc::clone(&self.pool),
                });
                let arrived = Arrived {
                    regions,
                    deadly,
                    userfaultfd: next().context("a VM came without its userfaultfd")?,
                    owner: next().context("a VM came without its pidfd")?,
                    page_map: page_map.then(&mut next).flatten(),
                    tables: next(),
                };
                lock(&self.vms).insert(id, Arc::clone(&served));
                let label = served.label();
                let vm = Arc::clone(&served);
                let begun = self.begin("vm", move |worker| worker.serve(&vm, arrived));
                if let Err(error) = begun {
                    // It costs this one: those that are served have their threads.
                    let vm = Vm::new(label, Ending::Refused, Some(format!("{error:#}")));
                    self.ended(&served, vm);
                }
            }
            ToWorker::Ended { vm } => self.remember(VmStats {
                vm,
                session: SessionStats::default(),
            }),
            ToWorker::Visitor { door, facts } => {
                let stream = next().context("a visitor came without a connection")?;
                *lock(&self.facts) = facts;
                self.visitors.fetch_add(1, SeqCst);
                let begun = self.begin("visitor", move |worker| {
                    worker.receive(door, stream);
                    worker.visitors.fetch_sub(1, SeqCst);
                });
                if let Err(error) = begun {
                    self.visitors.fetch_sub(1, SeqCst);
                    tracing::warn!("a visitor is turned away: {error:#}");
                }
            }
            ToWorker::Answer { number, result } => self.asked.answered(number, result),
            ToWorker::Drain => {
                self.draining.store(true, SeqCst);
                let vms: Vec<_> = lock(&self.vms).values().cloned().collect();
                for vm in vms {
                    let own = Arc::clone(&vm);
                    if let Err(error) = self.begin("complete", move |_| own.complete_or_end()) {
                        // It costs this one.
                        vm.end(&format!("{error:#}"));
                    }
                }
            }
            ToWorker::Leave => {}
        }
        Ok(())
    }

    fn begin(
        self: &Arc<Self>,
        name: &str,
        body: impl FnOnce(&Self) + Send + 'static,
    ) -> Result<()> {
        let worker = Arc::clone(self);
        let begun = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || body(&worker));
        begun.with_context(|| format!("a thread ({name})"))?;
        Ok(())
    }

    /// Serves a VM to its end.
    fn serve(&self, served: &Served, arrived: Arrived) {
        // Whatever is logged of it says of which it is.
        let _of = served.label().span().entered();
        fail_point(FailPoint::Received);
        let label = served.label();
        let vm = match self.resume(served, arrived) {
            Ok(paged) => follow(label, paged),
            Err(error) if has_ended(&error) => Vm::new(label, Ending::Exited, None),
            Err(error) => Vm::new(label, Ending::Refused, Some(format!("{error:#}"))),
        };
        self.ended(served, vm);
    }

    /// A VM is served no more.
    fn ended(&self, served: &Served, vm: Vm) {
        let id = served.id;
        let mut stats = served.stats();
        stats.vm.state = vm.ending.into();
        stats.vm.reason.clone_from(&vm.reason);
        {
            // Who asks for it finds it among those that are served, or among those that have ended.
            let mut vms = lock(&self.vms);
            self.book.ended(&stats);
            stats.session.drop_buckets();
            self.remember(stats);
            vms.remove(&id);
        }
        let incomplete = vm.ending == Ending::Killed && served.to_complete.load(SeqCst);
        self.tell(&FromWorker::Ended { id, vm, incomplete });
    }

    /// Keeps what is known of a VM that has ended for who asks.
    fn remember(&self, stats: VmStats) {
        let mut ended = lock(&self.ended);
        if ended.len() == REMEMBERED {
            ended.pop_front();
        }
        ended.push_back(stats);
    }

    fn resume<'a>(&self, served: &'a Served, arrived: Arrived) -> Result<&'a Paged> {
        let id = served.id;
        let pager = served.service.pager(&self.shared)?;
        let pager = pager.prefetch_threads(self.cores);
        let tables = if let Some(tables) = arrived.tables {
            tables
        } else {
            let tables = pager.tables(&arrived.regions)?;
            fail_point(FailPoint::TablesMade);
            let message = FromWorker::Tables { id };
            self.wire.send(&message, &[tables.as_fd()])?;
            fail_point(FailPoint::TablesGiven);
            tables
        };
        let handover = Handover {
            userfaultfd: arrived.userfaultfd,
            owner: arrived.owner,
            regions: arrived.regions,
            page_map: arrived.page_map,
        };
        let session = pager.resume(handover, tables, &arrived.deadly)?;
        let session = served.paged.get_or_init(|| session);
        self.tell(&FromWorker::Served { id });
        if self.draining.load(SeqCst) {
            served.complete_or_end();
        }
        Ok(session)
    }

    /// Answers whoever has come.
    fn receive(&self, door: Door, stream: OwnedFd) {
        match door {
            Door::Control => {
                control::answer(&UnixStream::from(stream), self.user, self);
                if self.asked.takes_leave() {
                    self.tell(&FromWorker::Told);
                }
            }
            Door::Metrics if is_unix(&stream) => {
                metrics::scrape(UnixStream::from(stream), || self.metrics());
            }
            Door::Metrics => metrics::scrape(TcpStream::from(stream), || self.metrics()),
        }
    }

    fn metrics(&self) -> String {
        // With those that have ended, of which none may be among both.
        let (live, ended) = {
            let vms = lock(&self.vms);
            let live: Vec<_> = vms.values().map(|vm| vm.stats()).collect();
            (live, self.book.clone())
        };
        let facts = lock(&self.facts).clone();
        let services = lock(&self.services);
        let mut endings = BTreeMap::<String, BTreeMap<VmState, u64>>::new();
        for (key, open) in services.iter() {
            let of_service = endings.entry(open.service.name.clone()).or_default();
            for (ending, count) in facts.ended.get(key).into_iter().flatten() {
                *of_service.entry((*ending).into()).or_default() += count;
            }
        }
        let names = services.values().map(|open| open.service.name.clone());
        let daemon = metrics::DaemonStats {
            worker_restarts: facts.worker_restarts,
            draining: facts.draining,
            services: names.collect(),
            ended: endings,
            frame_cache: self.shared.frame_cache(),
        };
        drop(services);
        ended.render(&live, &daemon)
    }

    /// Waits a little for visitors who are being answered.
    fn let_visitors_finish(&self) {
        let began = Instant::now();
        while self.visitors.load(SeqCst) > 0 && began.elapsed() < LAST_WORDS {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Tells the keeper. If it is gone there is nobody to tell, and this process is about to end.
    pub(crate) fn tell(&self, message: &FromWorker) {
        let _ = self.wire.send(message, &[]);
    }
}

impl Open {
    fn new(file: OwnedFd, service: Service) -> Self {
        Self {
            file,
            service,
            snapshot: Mutex::default(),
        }
    }

    fn open(&self) -> Result<Arc<Snapshot>> {
        let file = self.file.try_clone().context("a snapshot's file")?;
        let store = FileStore::from_file(File::from(file), &self.service.snapshot);
        Ok(Arc::new(Snapshot::open(Arc::new(store))?))
    }

    /// For want of descriptors one VM is refused, and not all that come after it.
    fn snapshot(&self) -> Result<Arc<Snapshot>> {
        let mut snapshot = lock(&self.snapshot);
        let opened = match snapshot.take() {
            Some(snapshot) => snapshot,
            None => self.open()?,
        };
        Ok(Arc::clone(snapshot.insert(opened)))
    }

    fn pager(&self, shared: &Shared) -> Result<Pager> {
        Ok(Pager::new(self.snapshot()?)
            .shared(shared)
            .fault_threads(self.service.threads)
            .retry_timeout(Duration::from_secs(self.service.retry_timeout))
            .prefetch(match self.service.prefetch {
                config::Prefetch::Off => pager::Prefetch::Off,
                config::Prefetch::WorkingSet => pager::Prefetch::WorkingSet,
                config::Prefetch::All => pager::Prefetch::All,
            })
            .on_error(match self.service.on_error {
                config::OnError::Kill => pager::OnError::Kill,
                config::OnError::Poison => pager::OnError::Poison,
            }))
    }
}

impl Served {
    /// What it is called.
    pub(crate) fn label(&self) -> VmLabel {
        VmLabel {
            id: self.id,
            pid: self.pid,
            service: self.service.service.name.clone(),
        }
    }

    /// Installs what is missing and lets the VM go. Why that can't be done, if it can't.
    pub(crate) fn complete(&self) -> Result<(), String> {
        let _of = self.label().span().entered();
        let Some(paged) = self.paged.get() else {
            return Err("it is only just beginning to be served".to_owned());
        };
        self.completing.store(true, SeqCst);
        let before = paged.stats();
        let done = paged.complete() || paged.ending().is_some();
        self.completing.store(false, SeqCst);
        if done {
            return Ok(());
        }
        let after = paged.stats();
        if after.huge_shortages > before.huge_shortages {
            return Err(self.pool.shortage());
        }
        if after.shortages > before.shortages {
            return Err(MEMORY_SHORTAGE.to_owned());
        }
        let first = paged.failures().into_iter().next();
        Err(first.map_or_else(
            || "its memory keeps changing".to_owned(),
            |failure| failure.to_string(),
        ))
    }

    /// The same; a VM for which it can't be done is killed, since nobody will serve it.
    fn complete_or_end(&self) {
        let _of = self.label().span().entered();
        // One that has ended by now was not killed for want of this.
        let has_ended = self
            .paged
            .get()
            .is_some_and(|paged| paged.ending().is_some());
        self.to_complete.fetch_or(!has_ended, SeqCst);
        if let Err(why) = self.complete() {
            self.end(&why);
        }
    }

    /// Kills it if it is served; if it is about to be, its own thread completes it.
    fn end(&self, why: &str) {
        if let Some(paged) = self.paged.get() {
            paged.end(&format!("it can't be completed: {why}"));
        }
    }

    /// What is known of it now.
    pub(crate) fn stats(&self) -> VmStats {
        let paged = self.paged.get();
        let state = match paged {
            None => VmState::Connecting,
            Some(_) if self.completing.load(SeqCst) => VmState::Completing,
            Some(_) => VmState::Serving,
        };
        VmStats {
            vm: types::Vm {
                id: self.id,
                service: self.service.service.name.clone(),
                pid: self.pid,
                state,
                reason: None,
                age_ms: u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            },
            session: paged
                .map(|paged| (&paged.stats()).into())
                .unwrap_or_default(),
        }
    }
}

/// Waits for the end of a VM.
fn follow(label: VmLabel, paged: &Paged) -> Vm {
    let (ending, reason) = match paged.wait() {
        pager::Ending::Complete => (Ending::Complete, None),
        pager::Ending::OwnerGone => (Ending::Exited, None),
        pager::Ending::Killed(why) => (Ending::Killed, Some(why)),
    };
    Vm::new(label, ending, reason).with(&paged.stats())
}

/// Whether a VM can't be served because its process has ended.
fn has_ended(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(AttachError::NotPermitted(Errno::ESRCH))
    )
}

fn is_unix(socket: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd as _;
    let name = getsockname::<SockaddrStorage>(socket.as_raw_fd());
    name.is_ok_and(|name| name.family() == Some(AddressFamily::Unix))
}

/// A panic elsewhere leaves what is behind these locks whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
