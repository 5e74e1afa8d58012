//! The control socket, through which operators talk to the daemon.
//!
//! ```text
//!   ctl ──▶ {"op":"complete","vm":3}\n          one JSON object a line, as many as wanted
//!       ◀── {"ok":[{"vm":3,"done":true}]}\n     or {"error":"there is no VM 3; ..."}\n
//! ```
//!
//! An error also has `"bad_snapshot":true` if the file of a service is not a usable snapshot.
//!
//! Only the daemon's own user and root may use it: the socket's mode ensures that, and the
//! credentials of the client are checked as well. A line that is too long, or takes too long, ends
//! the connection. A line that can't be parsed gets an error as its reply, and the next one is
//! read.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use snaprestore_uffd::os::credentials_of;
use snapshot_format::names::escape_path;

use crate::api::config::Service;
use crate::api::types::{
    ApiResult, Completed, List, OperatorApi, Recorded, RequestError, Upgraded, VmId, VmSelector,
    VmStats,
};

/// The default path of the control socket.
pub const DEFAULT_PATH: &str = "/run/snaprestore/control.socket";

/// The maximum size of a request: a service with paths and some thousand users.
const MAX_REQUEST_BYTES: usize = 64 << 10;
/// The maximum size of a reply: statistics of ten thousand VMs.
const MAX_REPLY_BYTES: usize = 256 << 20;
/// Time limit for a client to send a whole request, or to take a reply.
const IO_TIMEOUT: Duration = Duration::from_secs(30);

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Serves one more snapshot.
    Add {
        /// The service.
        service: Service,
    },
    /// Stops accepting VMs for a service.
    Remove {
        /// The name of the service.
        name: String,
    },
    /// Lists services and VMs; the reply is a [`List`].
    List {},
    /// Returns the statistics of VMs; the reply is a list of [`VmStats`].
    Stats {
        /// The VM; all VMs if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<VmId>,
        /// Whether to include the buckets of the histograms.
        #[serde(default)]
        buckets: bool,
    },
    /// Installs all missing pages of one VM, or of all, and releases them; the reply is a list of
    /// [`Completed`].
    Complete {
        /// The VM.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<VmId>,
        /// Whether to complete all VMs, which must be requested explicitly.
        #[serde(default)]
        all: bool,
    },
    /// Starts or stops a recording of the first touches of a VM. The reply to a stop is a
    /// [`Recorded`]; a repeated stop returns the same trace.
    Record {
        /// The VM.
        vm: VmId,
        /// Start or stop.
        action: RecordAction,
    },
    /// Completes all VMs and stops the daemon; the reply is a list of [`Completed`].
    Drain {},
    /// Replaces the worker by one of another program file; the reply is an [`Upgraded`].
    Upgrade {
        /// The program; if absent, the file that the daemon was started from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        program: Option<PathBuf>,
    },
}

/// An action of [`Request::Record`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordAction {
    /// Record from now on, until the recording ends by itself or is stopped
    Start,
    /// End the recording, if it has not ended, and write the trace
    Stop,
}

/// A reply: either `ok` or `error`.
#[derive(Debug, Serialize, Deserialize)]
struct Reply<T> {
    #[serde(skip_serializing_if = "Option::is_none")]
    ok: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Whether the request failed because a file is not a usable snapshot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    bad_snapshot: bool,
}

impl<T> From<ApiResult<T>> for Reply<T> {
    fn from(result: ApiResult<T>) -> Self {
        match result {
            Ok(said) => Self {
                ok: Some(said),
                error: None,
                bad_snapshot: false,
            },
            Err(RequestError { text, bad_snapshot }) => Self {
                ok: None,
                error: Some(text),
                bad_snapshot,
            },
        }
    }
}

impl Reply<()> {
    fn error(text: String) -> Self {
        Err(RequestError::from(text)).into()
    }
}

/// The body of a successful reply.
#[derive(Serialize)]
#[serde(untagged)]
enum ReplyBody {
    Nothing {},
    List(List),
    Stats(Vec<VmStats>),
    Completed(Vec<Completed>),
    Recorded(Recorded),
    Upgraded(Upgraded),
}

/// Creates the control socket at `path`, for the daemon's own user only. Nobody else can connect in
/// between.
pub(crate) fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // The socket's file gets this mode.
    fchmod(socket.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(128)?)?;
    Ok(socket.into())
}

/// Serves a connection to the control socket of a daemon of user `own` until the client hangs up.
pub(crate) fn serve(stream: &UnixStream, own: u32, api: &dyn OperatorApi) {
    if let Err(error) = serve_requests(stream, own, api) {
        tracing::debug!(%error, "closed a control connection");
    }
}

fn serve_requests(stream: &UnixStream, own: u32, api: &dyn OperatorApi) -> io::Result<()> {
    let mut lines = Lines::new(stream, MAX_REQUEST_BYTES);
    let (pid, uid) = credentials_of(stream.as_fd())?;
    if !may_use(uid, own) {
        tracing::warn!(pid, uid, "refused a control connection of another user");
        let text = format!("user {uid} may not control this daemon: only user {own} and root may");
        return send(stream, &Reply::error(text));
    }
    loop {
        let line = match lines.next(Some(Instant::now() + IO_TIMEOUT)) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(error) => {
                let _ = send(stream, &Reply::error(error.to_string()));
                return Err(error);
            }
        };
        let result = parse(line).and_then(|request| dispatch(api, request));
        send(stream, &Reply::from(result))?;
    }
}

/// Returns whether user `uid` may control a daemon of user `own`.
fn may_use(uid: u32, own: u32) -> bool {
    uid == own || uid == 0
}

fn parse(line: &[u8]) -> ApiResult<Request> {
    let request = serde_json::from_slice(line);
    request.map_err(|error| format!("invalid request: {error}").into())
}

/// Calls the API for a request.
fn dispatch(api: &dyn OperatorApi, request: Request) -> ApiResult<ReplyBody> {
    Ok(match request {
        Request::Add { service } => {
            service.check()?;
            api.add(service)?;
            ReplyBody::Nothing {}
        }
        Request::Remove { name } => {
            api.remove(&name)?;
            ReplyBody::Nothing {}
        }
        Request::List {} => ReplyBody::List(api.list()?),
        Request::Stats { vm, buckets } => {
            let mut all = api.stats(vm)?;
            if !buckets {
                for vm in &mut all {
                    vm.session.drop_buckets();
                }
            }
            ReplyBody::Stats(all)
        }
        Request::Complete { vm, all } => {
            let which = match (vm, all) {
                (Some(vm), false) => VmSelector::Vm(vm),
                (None, true) => VmSelector::All,
                _ => return Err("name one VM, or all of them".to_owned().into()),
            };
            ReplyBody::Completed(api.complete(which)?)
        }
        Request::Record { vm, action } => match action {
            RecordAction::Start => {
                api.start_recording(vm)?;
                ReplyBody::Nothing {}
            }
            RecordAction::Stop => ReplyBody::Recorded(api.stop_recording(vm)?),
        },
        Request::Drain {} => ReplyBody::Completed(api.drain()?),
        Request::Upgrade { program } => ReplyBody::Upgraded(api.upgrade(program)?),
    })
}

/// Writes one line. A client that doesn't read it in time is disconnected.
fn send(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let until = Instant::now() + IO_TIMEOUT;
    let mut rest = &line[..];
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left(until)?))?;
        match stream.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(done) => rest = &rest[done..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(with_message(error)),
        }
    }
    Ok(())
}

/// Returns the time left until `until`.
fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(with_message(io::ErrorKind::TimedOut.into()));
    }
    Ok(left)
}

fn with_message(error: io::Error) -> io::Error {
    // The kernel reports a timeout in either way.
    let kinds = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
    if kinds.contains(&error.kind()) {
        io::Error::new(io::ErrorKind::TimedOut, "timed out waiting for the peer")
    } else {
        error
    }
}

/// Lines of a stream, with a maximum length.
struct Lines<'a> {
    stream: &'a UnixStream,
    max_bytes: usize,
    buffer: Vec<u8>,
    /// End of the last returned line in the buffer.
    given: usize,
}

impl<'a> Lines<'a> {
    fn new(stream: &'a UnixStream, max_bytes: usize) -> Self {
        Self {
            stream,
            max_bytes,
            buffer: Vec::new(),
            given: 0,
        }
    }

    /// Reads the next line, without its end. Returns `None` at the end of the stream.
    fn next(&mut self, until: Option<Instant>) -> io::Result<Option<&[u8]>> {
        self.buffer.drain(..self.given);
        self.given = 0;
        let mut looked = 0;
        loop {
            if let Some(end) = self.buffer[looked..].iter().position(|byte| *byte == b'\n') {
                let end = looked + end;
                self.given = end + 1;
                return Ok(Some(&self.buffer[..end]));
            }
            looked = self.buffer.len();
            if looked >= self.max_bytes {
                let text = format!("a line is longer than {} bytes", self.max_bytes);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            self.stream.set_read_timeout(until.map(left).transpose()?)?;
            let mut chunk = [0; 16 << 10];
            let room = chunk.len().min(self.max_bytes - looked);
            match self.stream.read(&mut chunk[..room]) {
                Ok(0) if looked == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.buffer.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(with_message(error)),
            }
        }
    }
}

/// Reason why a daemon can't be controlled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The socket does not exist.
    #[error(
        "no daemon listens on {socket}: start `snaprestore serve --control {socket}`, or name its socket by --control \
         or SNAPRESTORE_CONTROL"
    )]
    NoDaemon {
        /// The path of the socket, escaped.
        socket: String,
    },
    /// Nothing listens on the socket.
    #[error("cannot connect to {socket}: the daemon exited, or this is not a control socket")]
    NotListening {
        /// The path of the socket, escaped.
        socket: String,
    },
    /// Another user runs the daemon.
    #[error("cannot connect to {socket}: only root and the daemon's user may")]
    NotPermitted {
        /// The path of the socket, escaped.
        socket: String,
    },
    /// Any other failure.
    #[error("cannot connect to {socket}")]
    Failed {
        /// The path of the socket, escaped.
        socket: String,
        /// The error of the system call.
        source: io::Error,
    },
}

/// Why a request got no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The request could not be sent.
    #[error("cannot send a request to {socket}")]
    Send {
        /// The path of the socket, escaped.
        socket: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// No reply was received in time, or it was too long.
    #[error("no reply from the daemon at {socket}")]
    Receive {
        /// The path of the socket, escaped.
        socket: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The daemon closed the connection.
    #[error("the daemon at {socket} closed the connection without a reply")]
    Closed {
        /// The path of the socket, escaped.
        socket: String,
    },
    /// The reply is not one that this version knows.
    #[error("cannot parse the reply from {socket}: the daemon may be of another version")]
    Parse {
        /// The path of the socket, escaped.
        socket: String,
        /// The place and kind of the error.
        source: serde_json::Error,
    },
    /// The reply has neither a result nor an error.
    #[error("the reply from {socket} has neither a result nor an error")]
    Empty {
        /// The path of the socket, escaped.
        socket: String,
    },
    /// The daemon refused the request.
    #[error(transparent)]
    Refused(#[from] RequestError),
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
}

impl Client {
    /// Connects to the daemon with the control socket at `path`.
    ///
    /// # Errors
    ///
    /// Returns the reason why no daemon can be reached there; see [`ConnectError`].
    pub fn connect(path: &Path) -> Result<Self, ConnectError> {
        let stream = UnixStream::connect(path).map_err(|source| {
            let socket = escape_path(path);
            match source.kind() {
                io::ErrorKind::NotFound => ConnectError::NoDaemon { socket },
                io::ErrorKind::ConnectionRefused => ConnectError::NotListening { socket },
                io::ErrorKind::PermissionDenied => ConnectError::NotPermitted { socket },
                _ => ConnectError::Failed { socket, source },
            }
        })?;
        Ok(Self {
            stream,
            path: path.to_owned(),
        })
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// Returns [`ClientError::Send`] if the daemon does not read the request within 30 s.
    pub fn send(&self, request: &Request) -> Result<(), ClientError> {
        match send(&self.stream, request) {
            // The daemon may have sent the reason before it hung up.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(source) => Err(ClientError::Send {
                socket: escape_path(&self.path),
                source,
            }),
            Ok(()) => Ok(()),
        }
    }

    /// Receives the reply. With `unlimited`, waits without a time limit, since some requests take
    /// long; else, for 30 s.
    ///
    /// # Errors
    ///
    /// Returns [`ClientError::Refused`] with the daemon's text if it refuses the request, and the
    /// other errors if there is no reply, or none that this version knows.
    pub fn receive<T: DeserializeOwned>(&self, unlimited: bool) -> Result<T, ClientError> {
        let socket = escape_path(&self.path);
        let until = (!unlimited).then(|| Instant::now() + IO_TIMEOUT);
        let mut lines = Lines::new(&self.stream, MAX_REPLY_BYTES);
        let line = match lines.next(until) {
            Ok(Some(line)) => line,
            Ok(None) => return Err(ClientError::Closed { socket }),
            // The daemon had not read the whole request.
            Err(source) if source.kind() == io::ErrorKind::ConnectionReset => {
                return Err(ClientError::Closed { socket });
            }
            Err(source) => return Err(ClientError::Receive { socket, source }),
        };
        let reply: Reply<T> = match serde_json::from_slice(line) {
            Ok(reply) => reply,
            Err(source) => return Err(ClientError::Parse { socket, source }),
        };
        let bad_snapshot = reply.bad_snapshot;
        match (reply.ok, reply.error) {
            (Some(said), _) => Ok(said),
            (None, Some(text)) => Err(ClientError::Refused(RequestError { text, bad_snapshot })),
            (None, None) => Err(ClientError::Empty { socket }),
        }
    }
}

#[cfg(test)]
mod tests;
