//! The service manager, as far as it is systemd: what a service tells it, and its descriptor store.
//!
//! ```text
//!   FDSTORE=1, FDNAME=vm.ID.ROLE, FDPOLL=0 and a descriptor  ──▶  kept, whatever becomes of the service
//!   FDSTOREREMOVE=1, FDNAME=vm.ID.ROLE                       ──▶  closed
//!   the next start of the service                            ◀──  LISTEN_FDS, LISTEN_FDNAMES: all of them
//! ```
//!
//! `FDPOLL=0` keeps systemd from closing a descriptor that reports an error or a hang-up, as the pidfd of
//! a process that has ended does, and a userfaultfd without `O_NONBLOCK`.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use snaprestore_uffd::os::take_inherited;

/// What systemd sets for a service, and what it must not pass on to processes that it starts.
pub(crate) const VARIABLES: [&str; 5] = [
    "NOTIFY_SOCKET",
    "FDSTORE",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
];

/// How long a message waits for room in the manager's queue.
const PATIENCE: Duration = Duration::from_secs(5);
/// The first descriptor that a service is given.
const FIRST: RawFd = 3;
/// More than any manager passes on.
const MOST: RawFd = 1 << 20;

/// A connection to the service manager.
#[derive(Debug)]
pub(crate) struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    /// The manager that has started this process, if it wants to be told anything.
    pub(crate) fn of_this_process() -> Option<io::Result<Self>> {
        let address = env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())?;
        Some(Self::at(&address))
    }

    fn at(address: &OsStr) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        let address = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(address)?,
        };
        socket.connect_addr(&address)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket })
    }

    /// Tells it `state`: lines as `READY=1`.
    pub(crate) fn tell(&self, state: &str) -> io::Result<()> {
        self.send(state, &[])
    }

    pub(crate) fn store(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.send(
            &format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"),
            &[fd.as_raw_fd()],
        )
    }

    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    fn send(&self, state: &str, fds: &[RawFd]) -> io::Result<()> {
        let descriptors = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() {
            &[][..]
        } else {
            &descriptors
        };
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(state.as_bytes())],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }
}

/// How many descriptors the manager keeps for this service. systemd says so since v254; to an older
/// one the unit file has to say it: `Environment=FDSTORE=4096` beside `FileDescriptorStoreMax=4096`.
pub(crate) fn store_size() -> usize {
    let size = env::var("FDSTORE").ok().and_then(|size| size.parse().ok());
    size.unwrap_or(0)
}

/// What the manager gave this process at its start.
#[derive(Debug, Default)]
pub struct Given {
    /// What an earlier run of this service had held, by id, each with its role.
    pub held: BTreeMap<String, Vec<(String, OwnedFd)>>,
    /// Everything else, by name: listening sockets of a socket unit.
    pub others: Vec<(String, OwnedFd)>,
}

/// Takes what the manager gave this process; a second call finds nothing.
pub fn given() -> Given {
    let number = |name| {
        env::var(name)
            .ok()
            .and_then(|text| text.parse::<u32>().ok())
    };
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Given::default();
    }
    let count = number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok());
    let names = env::var_os("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.to_string_lossy();
    let mut names = names.split(':');
    let mut given = Given::default();
    for fd in FIRST..FIRST + count.unwrap_or(0).min(MOST) {
        let name = names.next().unwrap_or_default();
        // What isn't open can't be used, and the other names go on meaning the other numbers.
        let Ok(fd) = take_inherited(fd) else { continue };
        match parse(name) {
            Some((id, role)) => {
                let of_id = given.held.entry(id.to_owned()).or_default();
                of_id.push((role.to_owned(), fd));
            }
            None => given.others.push((name.to_owned(), fd)),
        }
    }
    given
}

/// The name under which a descriptor is stored.
pub(crate) fn name(id: &str, role: &str) -> String {
    format!("vm.{id}.{role}")
}

fn parse(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("vm.")?.split_once('.')
}
