//! The guardian: a process that outlives the supervisor, and then kills its VMs.
//!
//! ```text
//!   supervisor                                    guardian, in a session and a cgroup of its own
//!     snaprestore guardian, standard input  ──▶   starts itself again and exits: nobody's child
//!     is one end of a socket (seqpacket)          blocks signals, leaves the cgroup
//!                                           ◀──   ready 2 PID left|stays WHY
//!     hold ID SERVICE, with the owner's
//!     pidfd and its userfaultfds            ──▶   keeps them
//!                                           ◀──   lost ID WHY, if it can't
//!     hold ID SERVICE, with the pidfd of
//!     a peer before its handshake           ──▶   keeps it; another `hold ID` takes its place
//!     listen ID SERVICE UID,UID, with a
//!     listening socket                      ──▶   keeps it
//!     release ID                            ──▶   closes what it keeps under that name
//!     dies, or closes the socket            ──▶   kills the peers in the queues of sockets; kills
//!                                                 each owner, waits for its exit, closes its
//!                                                 userfaultfds; exits
//! ```
//!
//! The guardian reads everything that the supervisor has sent before it sees the end of the socket.
//! All signals are blocked, so only SIGKILL can kill a guardian before its supervisor, which then
//! sees the end of the socket. Otherwise the guardian sleeps in `poll`. If it may not kill an
//! owner, it reports that to the system's log, and keeps the userfaultfds open until the owner has
//! exited: a VM that waits forever is bad, one that reads zeros is worse.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use nix::unistd::{dup2_stdin, setsid};
use snaprestore_uffd::os::{Received, kill_by_pidfd, pid_of, receive, take_inherited};
use snapshot_format::names::escape_path;

use super::{backlog, cgroup, systemd};
use crate::fd_store::StoreEvent;
use crate::policy::{self, Counter};

/// The hidden subcommand, and the option of the process that stays.
pub(crate) const COMMAND: &str = "guardian";
const STAY: &str = "--stay";

/// The maximum size of a message.
pub(crate) const MAX_MESSAGE_BYTES: usize = 4096;
/// Milliseconds to wait for room in the socket.
pub(crate) const SEND_TIMEOUT_MS: u8 = 200;

/// The supervisor's end of the connection to a guardian.
#[derive(Debug)]
pub(crate) struct Guardian {
    socket: OwnedFd,
    pid: String,
    cgroup_error: Option<String>,
}

impl Guardian {
    /// Starts a guardian from `program`, and waits until it is ready.
    pub(crate) fn start(program: &Path) -> io::Result<Self> {
        let (socket, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let mut command = Command::new(program);
        let status = command
            .arg0("snaprestore")
            .arg(COMMAND)
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        // The command holds the guardian's end; the guardian's exit is visible only after it is
        // closed.
        drop(command);
        if !status.success() {
            return Err(io::Error::other(format!(
                "{}: {status}",
                escape_path(program)
            )));
        }
        let mut guardian = Self {
            socket,
            pid: String::new(),
            cgroup_error: None,
        };
        let ready = guardian.first_message()?;
        match ready.splitn(5, ' ').collect::<Vec<_>>()[..] {
            ["ready", "2", pid, "left"] => pid.clone_into(&mut guardian.pid),
            ["ready", "2", pid, "stays", why] => {
                pid.clone_into(&mut guardian.pid);
                guardian.cgroup_error = Some(why.to_owned());
            }
            _ => return Err(io::Error::new(ErrorKind::InvalidData, ready)),
        }
        Ok(guardian)
    }

    /// Creates the supervisor's end of `socket`, whose other end a test reads.
    #[cfg(test)]
    pub(crate) fn at(socket: OwnedFd) -> Self {
        Self {
            socket,
            pid: String::new(),
            cgroup_error: None,
        }
    }

    fn first_message(&self) -> io::Result<String> {
        let deadline = Instant::now() + policy::GUARDIAN_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, left) {
                Ok(0) => return Err(ErrorKind::TimedOut.into()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => {
                    let mut buffer = [0; MAX_MESSAGE_BYTES];
                    let Received { bytes, .. } = receive(self.socket.as_fd(), &mut buffer)?;
                    if bytes == 0 {
                        return Err(ErrorKind::UnexpectedEof.into());
                    }
                    return Ok(String::from_utf8_lossy(&buffer[..bytes]).into_owned());
                }
            }
        }
    }

    /// Returns the guardian's PID as it reported it; empty if it was resumed.
    pub(crate) fn pid(&self) -> &str {
        &self.pid
    }

    /// Returns the reason why the guardian is in the supervisor's cgroup, if it is.
    pub(crate) fn cgroup_error(&self) -> Option<&str> {
        self.cgroup_error.as_deref()
    }

    /// Sends one message with these descriptors. Waits up to `wait` milliseconds for room in the
    /// socket.
    pub(crate) fn send(&self, text: &str, fds: &[BorrowedFd<'_>], wait: u8) -> io::Result<()> {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &control };
        send(self.as_fd(), text, control, wait)
    }

    pub(crate) fn events(&self) -> Vec<StoreEvent> {
        let mut events = Vec::new();
        loop {
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..)) {
                return events;
            }
            let mut buffer = [0; MAX_MESSAGE_BYTES];
            let bytes = match receive(self.as_fd(), &mut buffer) {
                Ok(received) => received.bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            if bytes == 0 {
                events.push(StoreEvent::GuardianExited);
                return events;
            }
            let message = String::from_utf8_lossy(&buffer[..bytes]);
            let mut words = message.splitn(3, ' ');
            if let (Some("lost"), Some(id), Some(why)) = (words.next(), words.next(), words.next())
            {
                events.push(StoreEvent::NotStored {
                    id: id.to_owned(),
                    why: why.to_owned(),
                });
            }
        }
    }
}

impl AsFd for Guardian {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends a message. Waits at most `wait` milliseconds for room: an end that doesn't read must not
/// block the other.
fn send(
    socket: BorrowedFd<'_>,
    text: &str,
    control: &[ControlMessage<'_>],
    wait: u8,
) -> io::Result<()> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let text = [IoSlice::new(text.as_bytes())];
    let once = || sendmsg::<()>(socket.as_raw_fd(), &text, control, flags, None);
    let sent = once().or_else(|errno| {
        if errno != Errno::EAGAIN || wait == 0 {
            return Err(errno);
        }
        poll(&mut [PollFd::new(socket, PollFlags::POLLOUT)], wait)?;
        once()
    });
    sent.map(drop).map_err(io::Error::from)
}

/// Runs the hidden subcommand `guardian`. The process that the supervisor starts only starts
/// another one, which nobody has to wait for and which is in none of the supervisor's groups.
pub(crate) fn run(stays: bool) -> ExitCode {
    let result = if stays { stay() } else { start_detached() };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(&format!("cannot start: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn start_detached() -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    for variable in systemd::VARIABLES {
        command.env_remove(variable);
    }
    command
        .arg0("snaprestore")
        .args([COMMAND, STAY])
        .current_dir("/")
        .spawn()?;
    Ok(())
}

fn stay() -> io::Result<()> {
    SigSet::all().thread_block()?;
    setsid()?;
    let _ = prctl::set_name(c"snap-guardian");
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    close_inherited();
    dup2_stdin(fs::File::open("/dev/null")?)?;
    // Makes this the last process for the OOM killer to choose, and raises its limit of
    // descriptors; both as far as permitted.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    snaprestore_uffd::os::limits::raise_descriptor_limit();
    let place = match cgroup::leave() {
        Ok(()) => "left".to_owned(),
        Err(error) => format!("stays {error}"),
    };
    // If the supervisor is already gone, the end of the socket reports that below.
    let _ = send(
        socket.as_fd(),
        &format!("ready 2 {} {place}", std::process::id()),
        &[],
        SEND_TIMEOUT_MS,
    );
    let (mut vms, listeners) = guard(&socket);
    // Closing the socket shows observers that everything was read.
    drop(socket);
    for GuardedListener {
        listener,
        service,
        allowed,
    } in listeners
    {
        let ended = backlog::kill_peers(&listener, &service, &allowed, |what| log(&what));
        vms.extend(ended.into_iter().map(|peer| GuardedVm {
            name: format!("process {} at service {service}", peer.peer.pid),
            owner: peer.peer.pidfd,
            _descriptors: vec![peer.stream.into()],
        }));
    }
    kill_all(vms);
    Ok(())
}

/// Closes inherited descriptors that the supervisor doesn't know about: one could be a terminal, or
/// a pipe whose reader waits for its last writer.
fn close_inherited() {
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten();
    let numbers = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for number in numbers.collect::<Vec<_>>() {
        drop(take_inherited(number));
    }
}

/// The descriptors of one VM.
#[derive(Debug)]
struct GuardedVm {
    /// Name of the VM in the log.
    name: String,
    owner: OwnedFd,
    /// Closed after the owner has exited, never before.
    _descriptors: Vec<OwnedFd>,
}

/// A listening socket, and the users who may connect to it; if empty, all.
#[derive(Debug)]
struct GuardedListener {
    listener: UnixListener,
    service: String,
    allowed: Vec<u32>,
}

/// Handles the supervisor's messages until it is gone. Returns everything that is guarded then.
fn guard(socket: &OwnedFd) -> (Vec<GuardedVm>, Vec<GuardedListener>) {
    let mut vms = BTreeMap::<String, GuardedVm>::new();
    let mut listeners = BTreeMap::<String, GuardedListener>::new();
    let mut errors = Counter::default();
    loop {
        let mut buffer = [0; MAX_MESSAGE_BYTES];
        let received = match receive(socket.as_fd(), &mut buffer) {
            Ok(received) => received,
            // If the supervisor died with unread messages, one read fails, and the messages that it
            // sent follow. If memory is short, a retry succeeds a moment later.
            Err(_) if errors.admit(&policy::READ_RETRIES, Instant::now()) => {
                std::thread::sleep(Duration::from_millis(errors.number().into()));
                continue;
            }
            Err(error) => {
                log(&format!("lost the connection to the supervisor: {error}"));
                break;
            }
        };
        if received.bytes == 0 {
            break;
        }
        errors.reset();
        let message = String::from_utf8_lossy(&buffer[..received.bytes]).into_owned();
        match message.split_once(' ') {
            Some(("hold", rest)) => {
                let (id, service) = rest.split_once(' ').unwrap_or((rest, ""));
                match guarded_vm(id, service, received) {
                    Ok(vm) => {
                        vms.insert(id.to_owned(), vm);
                    }
                    Err(why) => send_lost(socket, id, why),
                }
            }
            Some(("listen", rest)) => {
                let mut parts = rest.splitn(3, ' ').map(str::to_owned);
                let mut part = || parts.next().unwrap_or_default();
                let (id, service, uids) = (part(), part(), part());
                match guarded_listener(service, &uids, received) {
                    Ok(listener) => {
                        listeners.insert(id, listener);
                    }
                    Err(why) => send_lost(socket, &id, why),
                }
            }
            Some(("release", id)) => {
                vms.remove(id);
                listeners.remove(id);
            }
            _ => log(&format!("unknown message from the supervisor: {message:?}")),
        }
    }
    (
        vms.into_values().collect(),
        listeners.into_values().collect(),
    )
}

/// Tells the supervisor that a descriptor set is not stored.
fn send_lost(socket: &OwnedFd, id: &str, why: &str) {
    let _ = send(
        socket.as_fd(),
        &format!("lost {id} {why}"),
        &[],
        SEND_TIMEOUT_MS,
    );
}

fn guarded_listener(
    service: String,
    uids: &str,
    received: Received,
) -> Result<GuardedListener, &'static str> {
    let mut fds = received.descriptors.into_iter();
    let fd = fds
        .next()
        .ok_or("out of file descriptors; raise LimitNOFILE=")?;
    let allowed = uids.split(',').filter(|uid| !uid.is_empty());
    let allowed: Result<_, _> = allowed.map(str::parse).collect();
    Ok(GuardedListener {
        listener: fd.into(),
        service,
        allowed: allowed.map_err(|_| "invalid list of allowed users")?,
    })
}

fn guarded_vm(id: &str, service: &str, received: Received) -> Result<GuardedVm, &'static str> {
    if received.truncated {
        return Err("out of file descriptors; raise LimitNOFILE=");
    }
    let mut fds = received.descriptors.into_iter();
    let owner = fds.next().ok_or("the message carried no descriptors")?;
    let pid = pid_of(owner.as_fd()).unwrap_or(0);
    let number = id.strip_prefix("vm-").unwrap_or(id);
    Ok(GuardedVm {
        name: format!("VM {number} (pid {pid}, service {service})"),
        owner,
        _descriptors: fds.collect(),
    })
}

/// Kills the owners, and closes the descriptors of each after it has exited.
fn kill_all(mut vms: Vec<GuardedVm>) {
    for vm in &vms {
        match kill_by_pidfd(vm.owner.as_fd()) {
            Ok(()) => log(&format!(
                "{}: killed: serve exited, and no process serves its memory",
                vm.name
            )),
            Err(Errno::ESRCH) => {}
            Err(error) => log(&format!(
                "{}: cannot kill it ({error}): it blocks at missing pages until it is killed",
                vm.name
            )),
        }
    }
    while !vms.is_empty() {
        let _ = poll(&mut owners(&vms), PollTimeout::NONE);
        vms.retain(|vm| {
            let one = std::slice::from_ref(vm);
            !matches!(poll(&mut owners(one), PollTimeout::ZERO), Ok(1..))
        });
    }
}

fn owners(vms: &[GuardedVm]) -> Vec<PollFd<'_>> {
    let fds = vms.iter().map(|vm| vm.owner.as_fd());
    fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect()
}

/// Writes to the system's log, if there is one; a guardian has no other output.
fn log(text: &str) {
    // Facility daemon, severity error.
    let line = format!("<27>snaprestore-guardian[{}]: {text}", std::process::id());
    if let Ok(socket) = UnixDatagram::unbound() {
        let _ = socket.set_nonblocking(true);
        let _ = socket.send_to(line.as_bytes(), "/dev/log");
    }
}
