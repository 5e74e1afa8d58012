//! Messages between supervisor and worker: one JSON object each, with descriptors attached.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use snaprestore_engine::pager::{FrameId, OwnerRegion};
use snaprestore_engine::stats::RunRecord;
use snaprestore_uffd::os::receive;

use crate::api::config::Service;
use crate::api::summary::VmSummary;
use crate::api::types::{self, Upgraded, VmState};

/// Maximum size of a message: the regions of a VM, at most a thousand, or the record of a run.
const MAX_MESSAGE_BYTES: usize = 160 << 10;

/// Variable that names the places at which the project's own tests kill workers: one for each
/// worker, in order of their start.
pub(crate) const FAIL: &str = "SNAPRESTORE_FAIL";

/// Messages from the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// Passes on the next ancestor of a snapshot that is about to be announced. Comes with its open
    /// file. A message for each, since one can't carry the descriptors of a long chain.
    Layer {
        /// The number of the service.
        key: u64,
        /// The name of the file in messages.
        name: String,
    },
    /// Announces a snapshot from which VMs may be restored. Comes with its open file; its ancestors
    /// have been passed on.
    Service {
        /// The number by which VMs refer to it.
        key: u64,
        /// Settings for serving its VMs, without those in `newer`.
        service: Service,
        /// The newer settings.
        #[serde(default)]
        newer: NewerSettings,
    },
    /// Passes on a VM to serve. Comes with its userfaultfd, its pidfd, its page map if it has huge
    /// pages, and its tables if there are any.
    Vm {
        /// The number of the VM.
        id: u64,
        /// The number of the service that it connected to.
        service: u64,
        /// The PID of the process.
        pid: u32,
        /// Time since it connected, in milliseconds.
        age_ms: u64,
        /// The regions of its memory.
        regions: Vec<OwnerRegion>,
        /// Whether its page map follows the pidfd.
        #[serde(default)]
        page_map: bool,
        /// Frames of the snapshot that must not be decoded.
        quarantined: Vec<FrameId>,
    },
    /// Ends a service: no more VMs will be restored from its snapshot, and all of them have ended.
    RemoveService {
        /// The number of the service.
        key: u64,
    },
    /// Passes on a client that has connected. Comes with the connection.
    Client {
        /// The endpoint of the client.
        endpoint: Endpoint,
        /// Facts that only the supervisor has.
        facts: Facts,
    },
    /// The reply to a request.
    Reply {
        /// The number of the request.
        number: u64,
        /// The result; for an upgrade, the new program, for most other requests nothing.
        result: Result<Option<Upgraded>, String>,
        /// Whether it failed because the file is not a usable snapshot.
        #[serde(default)]
        bad_snapshot: bool,
    },
    /// Reports a VM that ended while this worker was not serving it.
    VmEnded {
        /// Its last status.
        vm: types::VmStatus,
    },
    /// Makes the worker install all pages of every VM, and release the VMs.
    Drain,
    /// Makes the worker exit.
    Shutdown,
}

/// Settings of a service that programs from before working sets do not know. A worker of such a
/// program ignores this struct. If the settings were in [`Service`], the worker would refuse the
/// message and exit, and so would every worker after it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct NewerSettings {
    /// The value of [`Service::working_set`].
    working_set: Option<String>,
    /// The value of [`Service::record`].
    record: Option<PathBuf>,
    /// Makes the worker send the record of each session, if set.
    pub(crate) run_records: bool,
}

impl NewerSettings {
    /// Takes the newer settings out of a service.
    pub(crate) fn take_from(service: &mut Service, run_records: bool) -> Self {
        Self {
            working_set: service.working_set.take(),
            record: service.record.take(),
            run_records,
        }
    }

    /// Puts the settings back into the service that they were taken from.
    pub(crate) fn put_back(self, service: &mut Service) {
        service.working_set = self.working_set;
        service.record = self.record;
    }

    /// Returns the names of the settings in use, as in a configuration.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let all = [
            (self.working_set.is_some(), "working_set"),
            (self.record.is_some(), "record"),
            (self.run_records, "run_json"),
        ];
        let used = all.into_iter().filter(|(is_used, _)| *is_used);
        used.map(|(_, name)| name).collect()
    }
}

/// A socket for clients that are not VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Endpoint {
    /// The control socket.
    Control,
    /// The socket on which metrics are served.
    Metrics,
}

/// Facts that only the supervisor has, since workers come and go.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// The PID of the supervisor.
    pub(crate) supervisor: u32,
    /// Number of workers that replaced a dead one.
    pub(crate) worker_restarts: u64,
    pub(crate) draining: bool,
    /// Support of the supervisor for messages about recordings. An older one would exit.
    #[serde(default)]
    pub(crate) knows_recordings: bool,
    /// Counts of VMs that have ended, by service.
    pub(crate) ended: BTreeMap<u64, EndCounts>,
}

/// Counts of ended VMs by their final state.
pub(crate) type EndCounts = BTreeMap<VmState, u64>;

/// A request that a worker can't serve by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum SupervisorRequest {
    Add(Service),
    Remove(String),
    Drain,
    Upgrade(Option<PathBuf>),
}

/// Messages from the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromWorker {
    /// The worker has started, and reads messages.
    Ready {
        /// The version of its program.
        version: String,
        /// Support of its program for the newer settings of services.
        #[serde(default)]
        knows_newer: bool,
    },
    /// The worker can't confine itself, and exits.
    ConfineFailed {
        /// The reason.
        why: String,
    },
    /// An operator's request that only the supervisor can serve.
    Request {
        /// The number, which the reply repeats.
        number: u64,
        /// The request.
        request: SupervisorRequest,
    },
    /// The operator has been told that another worker takes over.
    Replied,
    /// The tables of a VM, before anything was read from it. Comes with their memfd.
    Tables {
        /// The number of the VM.
        id: u64,
    },
    /// A VM is served.
    Served {
        /// The number of the VM.
        id: u64,
    },
    /// The touches of a VM are recorded from now on. Only the worker has them.
    RecordingBegan {
        /// The number of the VM.
        id: u64,
        /// The destination of the trace.
        destination: TraceDestination,
    },
    /// A recording has ended. If its trace is for the folder, a memfd with the trace comes with the
    /// message.
    RecordingEnded {
        /// The number of the VM.
        id: u64,
        /// The destination of the trace.
        destination: TraceDestination,
        /// The outcome.
        result: Result<(), String>,
    },
    /// A VM is no longer served.
    VmEnded {
        /// The number of the VM.
        id: u64,
        /// The summary of the VM.
        vm: VmSummary,
        /// Whether it was killed instead of completed, after the daemon was asked to stop.
        #[serde(default)]
        incomplete: bool,
        /// The statistics of its session, if they are wanted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        run: Option<Box<RunRecord>>,
    },
}

/// The destination of the trace of a recording. A VM has at most one recording of each: while the
/// trace of one is on its way to the folder, an operator may begin another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TraceDestination {
    /// The folder of the service.
    Folder,
    /// The operator who stops the recording.
    Operator,
}

/// One end of the connection.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Creates the supervisor's end, which never blocks, and the worker's, which does.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        Ok((Self { socket: ours }, theirs))
    }

    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends one message. Fails with `WouldBlock` if the other end has not read the previous ones.
    pub(crate) fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        if text.len() > MAX_MESSAGE_BYTES {
            return Err(io::Error::from(Errno::EMSGSIZE));
        }
        let numbers: Vec<_> = descriptors.iter().map(BorrowedFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if numbers.is_empty() { &[][..] } else { &rights };
        let socket = self.socket.as_raw_fd();
        let bytes = [IoSlice::new(&text)];
        loop {
            match sendmsg::<()>(socket, &bytes, rights, MsgFlags::MSG_NOSIGNAL, None) {
                Err(Errno::EINTR) => {}
                sent => return Ok(sent.map(drop)?),
            }
        }
    }

    /// Receives one message. Returns `None` if the other end is closed.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut text = vec![0; MAX_MESSAGE_BYTES];
        let read = loop {
            match receive(self.socket.as_fd(), &mut text) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                read => break read?,
            }
        };
        if read.truncated {
            let message =
                "cannot receive a file descriptor: raise the limit of open files (LimitNOFILE=)";
            return Err(io::Error::other(message));
        }
        if read.bytes == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(&text[..read.bytes])?;
        Ok(Some((message, read.descriptors)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};
    use snaprestore_engine::pager::SessionEnd;
    use snaprestore_engine::stats::{
        Durations, FaultSources, MAX_TIMELINE_BUCKETS, RUN_VERSION, Stats, Timeline, TimelineBucket,
    };

    use super::*;
    use crate::api::summary::VmLabel;

    /// An older program refuses unknown settings in a service, and ignores `newer` beside it.
    #[test]
    fn newer_settings_are_passed_beside_the_service() {
        let whole: Service = serde_json::from_value(json!({
            "name": "web", "snapshot": "/web.snap", "socket": "/web.socket",
            "working_set": "boot", "record": "/traces",
        }))
        .unwrap();
        let mut service = whole.clone();
        let newer = NewerSettings::take_from(&mut service, true);
        assert_eq!(newer.names(), ["working_set", "record", "run_json"]);
        let message = ToWorker::Service {
            key: 1,
            service,
            newer,
        };
        let mut message = serde_json::to_value(message).unwrap();
        let settings = message["Service"]["service"].as_object().unwrap();
        let known = [
            "name",
            "snapshot",
            "socket",
            "prefetch",
            "on_error",
            "allow_uid",
            "threads",
            "patience",
            "retry_timeout",
        ];
        let unknown = settings.keys().find(|key| !known.contains(&key.as_str()));
        assert_eq!(unknown, None);
        let received = |message: &Value| {
            let message = serde_json::from_value(message.clone()).unwrap();
            let ToWorker::Service {
                mut service, newer, ..
            } = message
            else {
                panic!("{message:?}");
            };
            newer.put_back(&mut service);
            service
        };
        assert_eq!(received(&message), whole);
        // An older supervisor, and an older worker.
        message["Service"].as_object_mut().unwrap().remove("newer");
        assert_eq!(received(&message).record, None);
        let ready = json!({"Ready": {"version": "0.0.1"}});
        let ready = serde_json::from_value(ready).unwrap();
        assert!(matches!(
            ready,
            FromWorker::Ready {
                knows_newer: false,
                ..
            }
        ));
        let facts = json!({"supervisor": 1, "worker_restarts": 0, "draining": false, "ended": {}});
        let facts: Facts = serde_json::from_value(facts).unwrap();
        assert!(!facts.knows_recordings);
    }

    /// A histogram has 640 buckets, and a record has one for each source and their sum.
    #[test]
    fn largest_record_of_a_run_fits_a_message() {
        let buckets = (0..640).map(|n| (4_000_000_000_000 + n, 10_000_000));
        let times = Durations::new(buckets.collect(), Duration::MAX / 4, Duration::MAX / 4);
        let label = VmLabel {
            id: u64::MAX,
            pid: u32::MAX,
            service: "s".repeat(64),
        };
        let bucket = TimelineBucket {
            faults: 100_000_000,
            demand_pages: 100_000_000,
            prefetch_pages: 100_000_000,
            bytes_read: 100_000_000_000,
        };
        let record = RunRecord {
            run_version: RUN_VERSION,
            what: label.to_string(),
            snapshot_id: "0".repeat(32),
            content_digest: "0".repeat(64),
            map_us: Some(u64::MAX),
            complete_us: Some(u64::MAX),
            pages_left_to_kernel: u64::MAX,
            statistics: Stats {
                fault_time: times.clone(),
                sources: FaultSources {
                    read: times.clone(),
                    cached: times.clone(),
                    waited: times.clone(),
                    fill: times.clone(),
                    none: times,
                },
                ..Stats::default()
            },
            timeline: Timeline {
                bucket_us: u64::MAX,
                buckets: vec![bucket; MAX_TIMELINE_BUCKETS],
            },
        };
        let message = FromWorker::VmEnded {
            id: u64::MAX,
            vm: VmSummary::new(label, SessionEnd::Complete),
            incomplete: false,
            run: Some(Box::new(record)),
        };
        let bytes = serde_json::to_vec(&message).unwrap().len();
        assert!(bytes < MAX_MESSAGE_BYTES, "{bytes}");
    }
}
