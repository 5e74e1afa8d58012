//! `snaprestore serve`: the memory of VMs that run in other processes.
//!
//! ```text
//!   main thread        waits for connections; asked to stop, removes the socket and joins the others
//!   one thread a VM    handshake, attach, waits for the VM's end; asked to stop, completes it
//! ```

use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use indicatif::HumanCount;
use serde::Serialize;
use snaprestore_engine::pager::{self, Ending, Handover, Paged, Pager, firecracker};
use snaprestore_engine::sys::{Peer, peer_of};
use snapshot_format::Snapshot;

use crate::args;
use crate::exit::Exit;
use crate::input;
use crate::output::Output;
use crate::signals::Cancel;

/// What became of all VMs.
#[derive(Serialize)]
struct Report {
    snapshot: String,
    socket: String,
    vms: Vec<Vm>,
}

/// What became of one.
#[derive(Clone, Serialize)]
struct Vm {
    pid: u32,
    ending: &'static str,
    /// Why it was killed or refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    faults: u64,
    fault_p50_us: u64,
    fault_p99_us: u64,
    /// Pages that were installed.
    pages: u64,
    /// Of them before they were touched.
    prefetched: u64,
    discards: u64,
}

pub(crate) fn run(args: &args::Serve, output: Output, cancel: &Cancel) -> Result<Exit> {
    let snapshot = Arc::new(input::open(&args.snapshot)?);
    let socket = Socket::bind(&args.socket)?;
    output.warn(format_args!(
        "serving {} at {}",
        args.snapshot.display(),
        args.socket.display()
    ));
    let server = Arc::new(Server {
        snapshot,
        prefetch: args.prefetch,
        on_error: args.on_error,
        allowed: args.allow_uid.clone(),
        threads: args.threads,
        patience: Duration::from_secs(args.patience),
        output,
        cancel: cancel.clone(),
        ended: Mutex::default(),
    });
    let mut vms: Vec<JoinHandle<()>> = Vec::new();
    let waited = loop {
        // Fails when the command is asked to stop.
        if let Err(error) = cancel.wait_readable(socket.listener.as_fd()) {
            break error;
        }
        let (stream, _) = match socket.listener.accept() {
            Ok(connected) => connected,
            Err(error) => {
                // Of one connection, or for want of descriptors: the others go on.
                output.warn(format_args!("a connection could not be taken: {error}"));
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        vms.retain(|vm| !vm.is_finished());
        let Some(peer) = server.admit(&stream) else {
            continue;
        };
        let server = Arc::clone(&server);
        let vm = std::thread::Builder::new()
            .name("vm".into())
            .spawn(move || server.serve(&stream, peer));
        match vm {
            Ok(vm) => vms.push(vm),
            Err(error) => output.warn(format_args!("a VM can't be served: {error}")),
        }
    };
    drop(socket);
    for vm in vms {
        let _ = vm.join();
    }
    if !cancel.requested() {
        return Err(waited);
    }
    let vms = server
        .ended
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    output.report(&Report {
        snapshot: args.snapshot.display().to_string(),
        socket: args.socket.display().to_string(),
        vms,
    })?;
    Ok(Exit::Done)
}

/// A listening socket, removed when dropped.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn bind(path: &Path) -> Result<Self> {
        let name = path.display();
        match UnixStream::connect(path) {
            Ok(_) => bail!("{name}: another process serves there"),
            // A socket that nobody listens at is left of a server that was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(path);
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).with_context(|| {
            let hint = if path.exists() {
                "; remove it if nothing serves there any more"
            } else {
                ""
            };
            format!("{name}: can't be listened on{hint}")
        })?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Who has removed it before meant that.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What the threads share.
struct Server {
    snapshot: Arc<Snapshot>,
    prefetch: args::Prefetch,
    on_error: args::OnError,
    allowed: Vec<u32>,
    threads: usize,
    patience: Duration,
    output: Output,
    cancel: Cancel,
    ended: Mutex<Vec<Vm>>,
}

impl Server {
    /// Who has connected, if it is to be served.
    fn admit(&self, stream: &UnixStream) -> Option<Peer> {
        let peer = match peer_of(stream.as_fd()) {
            Ok(peer) => peer,
            Err(error) => {
                let message = format_args!("a VMM that connected can't be identified: {error}");
                self.output.warn(message);
                return None;
            }
        };
        if self.allowed.is_empty() || self.allowed.contains(&peer.uid) {
            return Some(peer);
        }
        let Peer { pid, uid, .. } = peer;
        let message = format_args!("VM {pid}: refused: --allow-uid doesn't name its user {uid}");
        self.output.warn(message);
        None
    }

    /// Serves the VM of one connection until its end.
    fn serve(&self, stream: &UnixStream, peer: Peer) {
        let pid = peer.pid;
        let vm = match self.attach(stream, peer) {
            Ok(paged) => {
                self.output.warn(format_args!("VM {pid}: served"));
                self.follow(pid, paged)
            }
            Err(error) => Vm {
                reason: Some(format!("{error:#}")),
                ..Vm::new(pid, "refused")
            },
        };
        match vm.reason {
            Some(_) => self.output.error(&vm),
            None => self.output.warn(&vm),
        }
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.push(vm);
    }

    fn attach(&self, stream: &UnixStream, peer: Peer) -> Result<Paged> {
        let handed = firecracker::handshake(stream, self.patience)?;
        let handover = Handover {
            userfaultfd: handed.userfaultfd,
            owner: peer.pidfd,
            regions: handed.regions,
        };
        let paged = Pager::new(Arc::clone(&self.snapshot))
            .fault_threads(self.threads)
            .prefetch(match self.prefetch {
                args::Prefetch::Off => pager::Prefetch::Off,
                args::Prefetch::WorkingSet => pager::Prefetch::WorkingSet,
                args::Prefetch::All => pager::Prefetch::All,
            })
            .on_error(match self.on_error {
                args::OnError::Kill => pager::OnError::Kill,
                args::OnError::Poison => pager::OnError::Poison,
            })
            .attach(handover)?;
        Ok(paged)
    }

    /// Waits for the end of the VM, or completes it when the command is asked to stop.
    fn follow(&self, pid: u32, mut paged: Paged) -> Vm {
        while self.cancel.wait_readable(paged.owner()).is_ok() && paged.ending().is_none() {}
        if paged.ending().is_none() && !paged.complete() && paged.ending().is_none() {
            let failures = paged.failures();
            let first = failures
                .first()
                .map(ToString::to_string)
                .unwrap_or_default();
            // Dropped below, which ends it: nobody would serve the rest.
            self.output
                .warn(format_args!("VM {pid} can't be completed: {first}"));
        }
        let stats = paged.stats();
        let (ending, reason) = match paged.ending() {
            Some(Ending::Complete) => ("complete", None),
            Some(Ending::OwnerGone) => ("exited", None),
            Some(Ending::Killed(why)) => ("killed", Some(why)),
            None => ("killed", Some("it could not be completed".into())),
        };
        let total = |counts: pager::PageCounts| counts.copied + counts.filled + counts.zeroed;
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Vm {
            reason,
            faults: stats.faults,
            fault_p50_us: micros(stats.fault_time.p50),
            fault_p99_us: micros(stats.fault_time.p99),
            pages: total(stats.demand) + total(stats.prefetch),
            prefetched: total(stats.prefetch),
            discards: stats.events,
            ..Vm::new(pid, ending)
        }
    }
}

impl Vm {
    fn new(pid: u32, ending: &'static str) -> Self {
        Self {
            pid,
            ending,
            reason: None,
            faults: 0,
            fault_p50_us: 0,
            fault_p99_us: 0,
            pages: 0,
            prefetched: 0,
            discards: 0,
        }
    }
}

impl fmt::Display for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM {}: {}", self.pid, self.ending)?;
        if let Some(reason) = &self.reason {
            write!(f, ": {reason}")?;
        }
        if self.pages > 0 {
            write!(
                f,
                "; {} faults ({} us at p50, {} us p99), {} pages installed, {} of them before they were touched",
                HumanCount(self.faults),
                self.fault_p50_us,
                self.fault_p99_us,
                HumanCount(self.pages),
                HumanCount(self.prefetched),
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "served {} VMs from {}", self.vms.len(), self.snapshot)
    }
}
