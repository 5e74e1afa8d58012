//! The guardian: a process that outlives the keeper, and ends its VMs then.
//!
//! ```text
//!   keeper                                        guardian, in a session and a cgroup of its own
//!     snaprestore guardian, standard input     ──▶  starts itself again and exits: nobody's child
//!     is one end of a socket (seqpacket)            blocks signals, leaves the cgroup
//!                      ready 2 PID left|stays WHY ◀──
//!     hold ID SERVICE, with the owner's pidfd and
//!     its userfaultfds                         ──▶  keeps them
//!                                  lost ID WHY ◀──  or can't
//!     hold ID SERVICE, with the pidfd of one who is
//!     about to hand its memory over            ──▶  the same; another `hold ID` takes its place
//!     listen ID SERVICE UID,UID, with a listening
//!     socket                                   ──▶  keeps it
//!     release ID                               ──▶  closes what it keeps under that name
//!     dies, or closes the socket               ──▶  kills who is in the queue of a listening socket; kills each
//!                                                   owner, waits for its end, closes its userfaultfds; exits
//! ```
//!
//! What the keeper has sent before it dies is read before the end of the socket is. All signals are blocked, so only
//! SIGKILL ends a guardian before its keeper; the keeper sees the end of the socket then. It sleeps in `poll`
//! otherwise. An owner that it may not kill it reports to the system's log, and keeps its userfaultfds open
//! until that owner has ended: a VM that waits for ever is bad, one that reads zeros is worse.

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
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use nix::unistd::{dup2_stdin, setsid};
use snaprestore_uffd::os::{Received, kill_by_pidfd, pid_of, receive, take_inherited};

use super::{backlog, cgroup, systemd};
use crate::fd_store::News;
use snapshot_format::names::escape_path;

/// The hidden command, and the option of the process that stays.
pub(crate) const COMMAND: &str = "guardian";
const STAY: &str = "--stay";

/// How long a guardian may take to be ready: exec, and some writes to files of the kernel.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest message.
const MESSAGE: usize = 4096;
/// Milliseconds that the other end may need until it reads.
pub(crate) const A_MOMENT: u8 = 200;

/// The keeper's end.
#[derive(Debug)]
pub(crate) struct Guardian {
    socket: OwnedFd,
    pid: String,
    stays: Option<String>,
}

impl Guardian {
    /// Starts one from `program`, and waits until it is ready.
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
        // Holds the guardian's end; without it the end of the guardian can be seen.
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
            stays: None,
        };
        let ready = guardian.first_message()?;
        match ready.splitn(5, ' ').collect::<Vec<_>>()[..] {
            ["ready", "2", pid, "left"] => pid.clone_into(&mut guardian.pid),
            ["ready", "2", pid, "stays", why] => {
                pid.clone_into(&mut guardian.pid);
                guardian.stays = Some(why.to_owned());
            }
            _ => return Err(io::Error::new(ErrorKind::InvalidData, ready)),
        }
        Ok(guardian)
    }

    /// The keeper's end of `socket`, whose other end a test reads.
    #[cfg(test)]
    pub(crate) fn at(socket: OwnedFd) -> Self {
        Self {
            socket,
            pid: String::new(),
            stays: None,
        }
    }

    fn first_message(&self) -> io::Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, left) {
                Ok(0) => return Err(ErrorKind::TimedOut.into()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => {
                    let mut buffer = [0; MESSAGE];
                    let Received { bytes, .. } = receive(self.socket.as_fd(), &mut buffer)?;
                    if bytes == 0 {
                        return Err(ErrorKind::UnexpectedEof.into());
                    }
                    return Ok(String::from_utf8_lossy(&buffer[..bytes]).into_owned());
                }
            }
        }
    }

    /// Its process id, as it told it; empty of one that was resumed.
    pub(crate) fn pid(&self) -> &str {
        &self.pid
    }

    /// Why it is in the keeper's cgroup, if it is.
    pub(crate) fn stays(&self) -> Option<&str> {
        self.stays.as_deref()
    }

    /// Sends one message with these descriptors, and waits up to `wait` milliseconds until the guardian has room for
    /// it.
    pub(crate) fn tell(&self, text: &str, fds: &[BorrowedFd<'_>], wait: u8) -> io::Result<()> {
        if text.len() > MESSAGE {
            let why = "too many users are allowed to connect";
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &control };
        send(self.as_fd(), text, control, wait)
    }

    pub(crate) fn news(&self) -> Vec<News> {
        let mut news = Vec::new();
        loop {
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..)) {
                return news;
            }
            let mut buffer = [0; MESSAGE];
            let bytes = match receive(self.as_fd(), &mut buffer) {
                Ok(received) => received.bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            if bytes == 0 {
                news.push(News::Gone);
                return news;
            }
            let message = String::from_utf8_lossy(&buffer[..bytes]);
            let mut words = message.splitn(3, ' ');
            if let (Some("lost"), Some(id), Some(why)) = (words.next(), words.next(), words.next())
            {
                news.push(News::NotHeld {
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

/// Sends a message, and waits at most `wait` milliseconds for room: an end that reads nothing must not stop the other.
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

/// The hidden command `guardian`. The process that the keeper starts only starts another, which nobody has to
/// wait for and no group of the keeper's contains.
pub(crate) fn run(stays: bool) -> ExitCode {
    let result = if stays { stay() } else { start_again() };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(&format!("could not begin: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn start_again() -> io::Result<()> {
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
    // Of all processes the last to be chosen, and able to hold as much as may be; both as far as permitted.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let place = match cgroup::leave() {
        Ok(()) => "left".to_owned(),
        Err(error) => format!("stays {error}"),
    };
    // If the keeper is gone already, the end of the socket says so below.
    let _ = send(
        socket.as_fd(),
        &format!("ready 2 {} {place}", std::process::id()),
        &[],
        A_MOMENT,
    );
    let (mut wards, queues) = guard(&socket);
    // Who looks on sees by this that all was read.
    drop(socket);
    for Queue {
        listener,
        service,
        allowed,
    } in queues
    {
        let ended = backlog::end(&listener, &service, &allowed, |what| log(&what));
        wards.extend(ended.into_iter().map(|queued| Ward {
            name: format!("process {} at service {service}", queued.peer.pid),
            owner: queued.peer.pidfd,
            _held: vec![queued.stream.into()],
        }));
    }
    end_all(wards);
    Ok(())
}

/// Closes what the keeper was started with and knows nothing of: it could be a terminal, or a pipe whose other end
/// waits for its last writer.
fn close_inherited() {
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten();
    let numbers = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for number in numbers.collect::<Vec<_>>() {
        drop(take_inherited(number));
    }
}

/// What is held of one VM.
#[derive(Debug)]
struct Ward {
    /// The name that the log uses for it.
    name: String,
    owner: OwnedFd,
    /// Closed when the owner has ended, never before.
    _held: Vec<OwnedFd>,
}

/// A listening socket, and whose users may connect there: all, if none is named.
#[derive(Debug)]
struct Queue {
    listener: UnixListener,
    service: String,
    allowed: Vec<u32>,
}

/// Takes what the keeper sends, to its end. Gives what was held then.
fn guard(socket: &OwnedFd) -> (Vec<Ward>, Vec<Queue>) {
    let mut wards = BTreeMap::<String, Ward>::new();
    let mut queues = BTreeMap::<String, Queue>::new();
    let mut errors = 0;
    loop {
        let mut buffer = [0; MESSAGE];
        let received = match receive(socket.as_fd(), &mut buffer) {
            Ok(received) => received,
            // A keeper that died before it had read everything is an error once, and what it sent comes
            // afterwards. For want of memory: again in a moment.
            Err(_) if errors < 100 => {
                errors += 1;
                std::thread::sleep(Duration::from_millis(errors));
                continue;
            }
            Err(error) => {
                log(&format!("the keeper can't be heard any more: {error}"));
                break;
            }
        };
        if received.bytes == 0 {
            break;
        }
        errors = 0;
        let message = String::from_utf8_lossy(&buffer[..received.bytes]).into_owned();
        match message.split_once(' ') {
            Some(("hold", rest)) => {
                let (id, service) = rest.split_once(' ').unwrap_or((rest, ""));
                match ward(id, service, received) {
                    Ok(ward) => {
                        wards.insert(id.to_owned(), ward);
                    }
                    Err(why) => tell_lost(socket, id, why),
                }
            }
            Some(("listen", rest)) => {
                let mut parts = rest.splitn(3, ' ').map(str::to_owned);
                let mut part = || parts.next().unwrap_or_default();
                let (id, service, uids) = (part(), part(), part());
                match queue_of(service, &uids, received) {
                    Ok(queue) => {
                        queues.insert(id, queue);
                    }
                    Err(why) => tell_lost(socket, &id, why),
                }
            }
            Some(("release", id)) => {
                wards.remove(id);
                queues.remove(id);
            }
            _ => log(&format!("the keeper has sent {message:?}")),
        }
    }
    (
        wards.into_values().collect(),
        queues.into_values().collect(),
    )
}

/// Tells the keeper that something is not held.
fn tell_lost(socket: &OwnedFd, id: &str, why: &str) {
    let _ = send(socket.as_fd(), &format!("lost {id} {why}"), &[], A_MOMENT);
}

fn queue_of(service: String, uids: &str, received: Received) -> Result<Queue, &'static str> {
    let mut fds = received.descriptors.into_iter();
    let fd = fds.next().ok_or("it may have no more descriptors open")?;
    let allowed = uids.split(',').filter(|uid| !uid.is_empty());
    let allowed: Result<_, _> = allowed.map(str::parse).collect();
    Ok(Queue {
        listener: fd.into(),
        service,
        allowed: allowed.map_err(|_| "its users are not understood")?,
    })
}

fn ward(id: &str, service: &str, received: Received) -> Result<Ward, &'static str> {
    if received.truncated {
        return Err("it may have no more descriptors open");
    }
    let mut fds = received.descriptors.into_iter();
    let owner = fds.next().ok_or("it came without descriptors")?;
    let pid = pid_of(owner.as_fd()).unwrap_or(0);
    let number = id.strip_prefix("vm-").unwrap_or(id);
    Ok(Ward {
        name: format!("VM {number} (pid {pid}, service {service})"),
        owner,
        _held: fds.collect(),
    })
}

/// Kills the owners, and lets go of each when it has ended.
fn end_all(mut wards: Vec<Ward>) {
    for ward in &wards {
        match kill_by_pidfd(ward.owner.as_fd()) {
            Ok(()) => log(&format!(
                "{}: killed, for nobody serves its memory",
                ward.name
            )),
            Err(Errno::ESRCH) => {}
            Err(error) => log(&format!(
                "{}: it may not be killed ({error}), and waits at missing pages until somebody does",
                ward.name
            )),
        }
    }
    while !wards.is_empty() {
        let _ = poll(&mut owners(&wards), PollTimeout::NONE);
        wards.retain(|ward| {
            let one = std::slice::from_ref(ward);
            !matches!(poll(&mut owners(one), PollTimeout::ZERO), Ok(1..))
        });
    }
}

fn owners(wards: &[Ward]) -> Vec<PollFd<'_>> {
    let fds = wards.iter().map(|ward| ward.owner.as_fd());
    fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect()
}

/// Tells the system's log, if there is one: a guardian has no other place to write to.
fn log(text: &str) {
    // Facility daemon, severity error.
    let line = format!("<27>snaprestore-guardian[{}]: {text}", std::process::id());
    if let Ok(socket) = UnixDatagram::unbound() {
        let _ = socket.set_nonblocking(true);
        let _ = socket.send_to(line.as_bytes(), "/dev/log");
    }
}
