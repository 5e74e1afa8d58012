//! Requests of operators and their replies, as used by the control socket, `ctl` and the metrics.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use snaprestore_engine::stats::Stats;
use snapshot_format::trace::Trace;

use crate::api::config::{Service, ServiceError};
use crate::error::Chain;

/// The number of a VM, which is one session of a service. VMs are counted from 1 in the whole
/// daemon, and no number is used twice.
pub type VmId = u64;

/// Maximum number of ended VMs that are kept for operators.
pub(crate) const MAX_RECENT_VMS: usize = 100;

/// Reason why the daemon refuses a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct RequestError {
    /// The reason, for the operator.
    pub text: String,
    /// Whether the file is not a usable snapshot: it is damaged, incomplete or no snapshot, or has
    /// a version or features that this program doesn't know.
    pub bad_snapshot: bool,
}

impl RequestError {
    pub(crate) fn no_vm(id: VmId) -> Self {
        format!("no VM {id}; `snaprestore ctl list` lists the VMs").into()
    }

    pub(crate) fn no_service(name: &str) -> Self {
        format!("no service {name:?}; `snaprestore ctl list` lists the services").into()
    }
}

impl From<String> for RequestError {
    fn from(text: String) -> Self {
        let bad_snapshot = false;
        Self { text, bad_snapshot }
    }
}

impl From<ServiceError> for RequestError {
    fn from(error: ServiceError) -> Self {
        Chain(&error).to_string().into()
    }
}

pub(crate) type ApiResult<T> = Result<T, RequestError>;

/// Operations for operators. Each call is made by a thread of the caller, and may take as long as
/// the operation.
pub(crate) trait OperatorApi: Send + Sync {
    /// Serves one more snapshot. The service was [checked](Service::check) on its own, but not
    /// against the others.
    fn add(&self, service: Service) -> ApiResult<()>;
    /// Stops accepting VMs for a service; its current VMs are still served.
    fn remove(&self, name: &str) -> ApiResult<()>;
    fn list(&self) -> ApiResult<List>;
    /// Returns the statistics of one VM, or of all VMs being served. Those of an ended VM are
    /// available as long as the daemon remembers it.
    fn stats(&self, vm: Option<VmId>) -> ApiResult<Vec<VmStats>>;
    /// Installs all missing pages and releases the VMs. Returns when that is done, or has failed.
    fn complete(&self, which: VmSelector) -> ApiResult<Vec<Completed>>;
    /// Begins to record the first touches of a VM.
    fn start_recording(&self, vm: VmId) -> ApiResult<()>;
    /// Ends the recording of a VM, unless it has ended by itself, and returns its trace. A second
    /// call returns the same trace, until another recording begins.
    fn stop_recording(&self, vm: VmId) -> ApiResult<Recorded>;
    /// Stops accepting VMs, completes the current ones, and makes the daemon exit afterwards.
    /// Returns when all are released.
    fn drain(&self) -> ApiResult<Vec<Completed>>;
    /// Replaces the worker by one of another program file, or of the same path if it was replaced.
    fn upgrade(&self, program: Option<PathBuf>) -> ApiResult<Upgraded>;
}

/// Selection of VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmSelector {
    Vm(VmId),
    All,
}

/// The services and VMs of a daemon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct List {
    /// The version of the program that replies.
    pub version: String,
    /// The PID of the daemon.
    pub pid: u32,
    /// Number of times that a new worker replaced one that had exited.
    pub worker_restarts: u64,
    /// Whether the daemon accepts no more VMs.
    pub draining: bool,
    /// The services.
    pub services: Vec<ServiceStatus>,
    /// The VMs being served and the last that have ended, ordered by number.
    pub vms: Vec<VmStatus>,
}

/// A service and the counts of its VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// The service.
    pub service: Service,
    /// Number of files of its snapshot: 1, and one for each ancestor.
    #[serde(default = "one_layer")]
    pub layers: u64,
    /// Number of VMs being served.
    pub serving: u64,
    /// Number of VMs that have ended, in whatever way.
    pub ended: u64,
}

fn one_layer() -> u64 {
    1
}

/// Status of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// The number of the VM.
    pub id: VmId,
    /// The name of its service.
    pub service: String,
    /// The PID of the process.
    pub pid: u32,
    /// The state of the VM.
    pub state: VmState,
    /// Reason why the VM was killed or refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Time since the VM connected, in milliseconds.
    pub age_ms: u64,
}

/// State of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The VM has connected and has not handed its memory over yet.
    Connecting,
    /// The VM's pages are installed when they are touched, or earlier.
    Serving,
    /// The daemon is installing all missing pages, and will then release the VM.
    Completing,
    /// The VM has all its memory, and was released.
    Complete,
    /// The process exited by itself.
    Exited,
    /// The process was killed, because a page of it could not be restored.
    Killed,
    /// The VM was not accepted.
    Refused,
}

impl VmState {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 7] = [
        Self::Connecting,
        Self::Serving,
        Self::Completing,
        Self::Complete,
        Self::Exited,
        Self::Killed,
        Self::Refused,
    ];

    /// Returns the state's name in JSON and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Serving => "serving",
            Self::Completing => "completing",
            Self::Complete => "complete",
            Self::Exited => "exited",
            Self::Killed => "killed",
            Self::Refused => "refused",
        }
    }
}

/// Result of completing a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completed {
    /// The VM.
    pub vm: VmId,
    /// Whether the VM has all its memory and was released, or exited by itself meanwhile.
    pub done: bool,
    /// Reason why the VM was not completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The result of a recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// The VM.
    pub vm: VmId,
    /// The bytes of the trace file, in hexadecimal.
    pub trace: String,
}

impl Recorded {
    pub(crate) fn new(vm: VmId, trace: &Trace) -> ApiResult<Self> {
        use std::fmt::Write as _;
        let bytes = trace.to_bytes().map_err(|error| error.to_string())?;
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            let _ = write!(text, "{byte:02x}");
        }
        Ok(Self { vm, trace: text })
    }

    /// Returns the trace, or `None` if the daemon sent something else.
    pub fn trace(&self) -> Option<Trace> {
        let digits = self.trace.as_bytes().chunks(2);
        let byte = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> = digits.map(byte).collect();
        Trace::from_bytes(&bytes?).ok()
    }
}

/// The result of an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgraded {
    /// The version of the program that served until now.
    pub from: String,
    /// The version of the program that serves from now on.
    pub to: String,
}

/// Statistics of a VM's session. The counters restart at 0 when a new worker takes over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStats {
    /// The VM.
    #[serde(flatten)]
    pub vm: VmStatus,
    /// The session's statistics.
    #[serde(flatten)]
    pub session: Stats,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_names_that_json_has() {
        for state in VmState::ALL {
            let json = serde_json::to_value(state).unwrap();
            assert_eq!(json, state.name());
        }
    }
}
