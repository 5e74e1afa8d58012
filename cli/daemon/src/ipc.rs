//! What keeper and worker say to each other: one JSON object a message, descriptors beside it.

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
use crate::api::summary::{Ending, Vm};
use crate::api::types::{self, Upgraded};

/// The most bytes of a message: the regions of a VM, at most a thousand.
const MOST_BYTES: usize = 160 << 10;

/// From the keeper.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// VMs may come that are restored from this snapshot. With its open file.
    Service {
        /// What VMs name it by.
        key: u64,
        /// How they are served.
        service: Service,
    },
    /// A VM is to be served. With its userfaultfd, its pidfd, its page map if it has huge pages, and its
    /// tables if it has some.
    Vm {
        /// What it is known by.
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
        deadly: Vec<u64>,
    },
    /// No more VMs will come that are restored from this snapshot, and all that did have ended.
    Forget {
        /// Which.
        key: u64,
    },
    /// Somebody wants something. With the connection.
    Visitor {
        /// Where they came in.
        door: Door,
        /// What only the keeper knows.
        facts: Facts,
    },
    /// What became of a request.
    Answer {
        /// Which.
        number: u64,
        /// Nothing more for most; who takes over, for an upgrade.
        result: Result<Option<Upgraded>, String>,
    },
    /// A VM has ended in other hands than this worker's.
    Ended {
        /// What is told of it.
        vm: types::Vm,
    },
    /// Everything shall be installed in every VM, and the VMs let go.
    Drain,
    /// Nothing is left to do.
    Leave,
}

/// Where somebody can come in who is no VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Door {
    /// The control socket.
    Control,
    /// Where metrics are read.
    Metrics,
}

/// What only the keeper knows, since workers come and go.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// Its process.
    pub(crate) keeper: u32,
    /// Workers that took over from one that had died.
    pub(crate) worker_restarts: u64,
    pub(crate) draining: bool,
    /// VMs that have ended, by service.
    pub(crate) ended: BTreeMap<u64, Endings>,
}

/// How many VMs have ended in which way.
pub(crate) type Endings = BTreeMap<Ending, u64>;

/// What a worker can't do by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Add(Service),
    Remove(String),
    Drain,
    Upgrade(Option<PathBuf>),
}

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromWorker {
    /// It has started, and reads what it is told.
    Ready {
        /// Of its program.
        version: String,
    },
    /// It can't confine itself, and ends.
    Unfit {
        /// Why.
        why: String,
    },
    /// An operator wants something that only the keeper can do.
    Ask {
        /// For the answer.
        number: u64,
        /// What.
        request: Request,
    },
    /// The operator was told that another worker takes over.
    Told,
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
    Ended {
        /// Which.
        id: u64,
        /// How it ended.
        vm: Vm,
        /// Whether it was killed although it was to be completed, since the daemon was asked to stop.
        #[serde(default)]
        incomplete: bool,
    },
}

/// One end of the connection.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: OwnedFd,
}

impl Wire {
    /// The keeper's end, which never waits, and the worker's, which does.
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
        if text.len() > MOST_BYTES {
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
        let mut text = vec![0; MOST_BYTES];
        let read = loop {
            match receive(self.socket.as_fd(), &mut text) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                read => break read?,
            }
        };
        if read.truncated {
            let message = "a descriptor can't be taken over: raise the limit of open files";
            return Err(io::Error::other(message));
        }
        if read.bytes == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(&text[..read.bytes])?;
        Ok(Some((message, read.descriptors)))
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
