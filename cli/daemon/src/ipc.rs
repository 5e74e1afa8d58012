//! The messages between supervisor and worker: one JSON object each, with descriptors beside it.

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
use snaprestore_engine::pager::OwnerRegion;
use snaprestore_uffd::os::receive;

use crate::api::config::Service;
use crate::api::summary::{Ending, VmSummary};
use crate::api::types::{self, Upgraded};

/// The most bytes of a message: the regions of a VM, at most a thousand.
const MAX_MESSAGE_BYTES: usize = 160 << 10;

/// Names the places at which the project's own tests have workers killed: one for each worker, the
/// first first.
pub(crate) const FAIL: &str = "SNAPRESTORE_FAIL";

/// From the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// VMs may come that are restored from this snapshot. With its open file.
    Service {
        /// The number by which VMs name it.
        key: u64,
        /// How they are served.
        service: Service,
    },
    /// A VM is to be served. With its userfaultfd, its pidfd, its page map if it has huge pages,
    /// and its tables if it has some.
    Vm {
        /// Its number.
        id: u64,
        /// The service that it connected to.
        service: u64,
        /// Its process.
        pid: u32,
        /// How long ago it connected.
        age_ms: u64,
        /// Its memory.
        regions: Vec<OwnerRegion>,
        /// Whether its page map came, after the pidfd.
        #[serde(default)]
        page_map: bool,
        /// Frames of the snapshot that are not to be decoded.
        quarantined: Vec<u64>,
    },
    /// No more VMs will come that are restored from this snapshot, and all that did have ended.
    RemoveService {
        /// Which.
        key: u64,
    },
    /// A client has connected. With the connection.
    Client {
        /// The endpoint of the client.
        endpoint: Endpoint,
        /// Facts that only the supervisor knows.
        facts: Facts,
    },
    /// The reply to a request.
    Reply {
        /// Which.
        number: u64,
        /// Nothing more for most; who takes over, for an upgrade.
        result: Result<Option<Upgraded>, String>,
    },
    /// A VM has ended in other hands than this worker's.
    VmEnded {
        /// Its last status.
        vm: types::VmStatus,
    },
    /// The worker is to install all pages of every VM, and to let the VMs go.
    Drain,
    /// The worker is to exit.
    Shutdown,
}

/// A socket for clients that are no VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Endpoint {
    /// The control socket.
    Control,
    /// The socket at which metrics are read.
    Metrics,
}

/// Facts that only the supervisor knows, since workers come and go.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// Its process.
    pub(crate) supervisor: u32,
    /// Workers that took over from one that had died.
    pub(crate) worker_restarts: u64,
    pub(crate) draining: bool,
    /// VMs that have ended, by service.
    pub(crate) ended: BTreeMap<u64, Endings>,
}

/// How many VMs have ended in which way.
pub(crate) type Endings = BTreeMap<Ending, u64>;

/// A request that a worker can't serve by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum SupervisorRequest {
    Add(Service),
    Remove(String),
    Drain,
    Upgrade(Option<PathBuf>),
}

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromWorker {
    /// The worker has started, and reads messages.
    Ready {
        /// The version of its program.
        version: String,
    },
    /// The worker can't confine itself, and exits.
    ConfineFailed {
        /// Why.
        why: String,
    },
    /// An operator wants something that only the supervisor can do.
    Request {
        /// The number for the reply.
        number: u64,
        /// The request.
        request: SupervisorRequest,
    },
    /// The operator was told that another worker takes over.
    Replied,
    /// The tables of a VM, from which nothing was read yet. With their memfd.
    Tables {
        /// Whose.
        id: u64,
    },
    /// A VM is served.
    Served {
        /// Which.
        id: u64,
    },
    /// A VM is served no more.
    VmEnded {
        /// Which.
        id: u64,
        /// How it ended.
        vm: VmSummary,
        /// Whether it was killed although it was to be completed, since the daemon was asked to
        /// stop.
        #[serde(default)]
        incomplete: bool,
    },
}

/// One end of the connection.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// The supervisor's end, which never waits, and the worker's, which does.
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

    /// Sends one message. `WouldBlock`: the other end has not read what was sent before.
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

    /// Takes one message. `None`: the other end is gone.
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
