//! The interface to systemd as service manager: notifications, and its descriptor store.
//!
//! ```text
//!   FDSTORE=1, FDNAME=vm.ID.ROLE, FDPOLL=0 and a descriptor  ──▶  kept when the service exits
//!   FDSTOREREMOVE=1, FDNAME=vm.ID.ROLE                       ──▶  closed
//!   the next start of the service                            ◀──  LISTEN_FDS, LISTEN_FDNAMES
//! ```
//!
//! `FDPOLL=0` keeps systemd from closing a descriptor that reports an error or a hang-up, as the
//! pidfd of an exited process and a userfaultfd without `O_NONBLOCK` do.

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

/// Variables that systemd sets for a service, and that the service must not pass on to its own
/// processes.
pub(crate) const VARIABLES: [&str; 5] = [
    "NOTIFY_SOCKET",
    "FDSTORE",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
];

/// Time limit for a message to wait for room in the manager's queue.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// The first descriptor that a service inherits.
const FIRST_FD: RawFd = 3;
/// Upper limit of the number of inherited descriptors, more than any manager passes on.
const MAX_FDS: RawFd = 1 << 20;

/// A connection to the service manager.
#[derive(Debug)]
pub(crate) struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    /// Connects to the manager that has started this process. Returns `None` if there is none, or
    /// it takes no messages.
    pub(crate) fn from_env() -> Option<io::Result<Self>> {
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
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self { socket })
    }

    /// Sends `state`, which is lines such as `READY=1`.
    fn notify(&self, state: &str) -> io::Result<()> {
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

/// Sends `state` to the manager, if it has started this process.
pub(crate) fn notify(state: &str) {
    if let Some(Ok(manager)) = Manager::from_env() {
        // systemd notices by itself if this fails.
        let _ = manager.notify(state);
    }
}

/// Returns the number of descriptors that the manager stores for this service. systemd tells it
/// since v254; with an older one, the unit file has to set it: `Environment=FDSTORE=4096` beside
/// `FileDescriptorStoreMax=4096`.
pub(crate) fn capacity() -> usize {
    let size = env::var("FDSTORE").ok().and_then(|size| size.parse().ok());
    size.unwrap_or(0)
}

/// Descriptors that the manager passed to this process at its start.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Descriptors stored by an earlier run of this service, by id, each with its role.
    pub stored: BTreeMap<String, Vec<(String, OwnedFd)>>,
    /// All others, by name: listening sockets of a socket unit.
    pub others: Vec<(String, OwnedFd)>,
}

/// Takes the descriptors that the manager passed to this process; a second call finds none.
pub fn take_inherited_fds() -> Inherited {
    let number = |name| {
        env::var(name)
            .ok()
            .and_then(|text| text.parse::<u32>().ok())
    };
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Inherited::default();
    }
    let count = number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok());
    let names = env::var_os("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.to_string_lossy();
    let mut names = names.split(':');
    let mut inherited = Inherited::default();
    for fd in FIRST_FD..FIRST_FD + count.unwrap_or(0).min(MAX_FDS) {
        let name = names.next().unwrap_or_default();
        // A closed descriptor is skipped, and the other names keep their numbers.
        let Ok(fd) = take_inherited(fd) else { continue };
        match parse(name) {
            Some((id, role)) => {
                let of_id = inherited.stored.entry(id.to_owned()).or_default();
                of_id.push((role.to_owned(), fd));
            }
            None => inherited.others.push((name.to_owned(), fd)),
        }
    }
    inherited
}

/// Returns the name under which a descriptor is stored.
pub(crate) fn name(id: &str, role: &str) -> String {
    format!("vm.{id}.{role}")
}

fn parse(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("vm.")?.split_once('.')
}
