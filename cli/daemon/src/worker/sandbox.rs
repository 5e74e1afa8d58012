//! The sandbox: rights that the worker gives up before it serves.
//!
//! The worker parses untrusted data: snapshots, and requests for metrics. It gets everything that
//! it needs as a descriptor, so it can do without almost everything else:
//!
//! | what | how |
//! | --- | --- |
//! | another user (`--user`), no capability but `CAP_KILL` | setresuid, capset |
//! | no rights by exec, no reading of its memory by other processes of its user | prctl |
//! | no files but some to read (none by default); no TCP, no abstract sockets | Landlock |
//! | no system call but those of [`PERMITTED_CALLS`] and the engine's | seccomp |
//!
//! **Killing owners.** A VM whose page can't be restored is killed by the process that notices it.
//! That is the worker, so it keeps the right to signal the processes of other users. It can use
//! this right only on those whose pidfds it was given: the filter permits `pidfd_send_signal` with
//! SIGKILL and 0, but no other call that signals another process, nor one that creates a pidfd.
//!
//! **A call that is not permitted fails with EPERM**, and is logged by the kernel. Killing the
//! process would be stricter. But the calls of an honest worker change with its C library and
//! kernel, and a new call is nearly always one that may fail. If it were killed, the worker would
//! be restarted and make the call again, and after some rounds all VMs would be lost. Where the
//! call may not fail, the engine kills the VM and doesn't corrupt its memory. An attacker gains
//! nothing from an error. A worker that makes one of [`KILLING_CALLS`] must be compromised, and is
//! killed; the supervisor sees SIGSYS.

use std::fs;
use std::io;
use std::path::PathBuf;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, Scope, path_beneath_rules,
};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, User, setgroups, setresgid, setresuid};
use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde_json::{Value, json};
use snaprestore_engine::SYSTEM_CALLS;
use snaprestore_uffd::os::sandbox::{CAP_KILL, install_filter, keep_capabilities};
use snaprestore_uffd::uffd::abi;

use snapshot_format::names::escape_path;

/// The newest version of Landlock that this was tested with. An older kernel supports less.
const LANDLOCK: ABI = ABI::V7;

/// System calls that are permitted with any arguments, besides those of the engine's threads.
const PERMITTED_CALLS: &[&str] = &[
    // The C library: the number of cores bounds the arenas of its allocator.
    "sched_getaffinity",
    // Existing sockets: none can be created, bound or connected.
    "recvmsg",
    "sendmsg",
    "recvfrom",
    "sendto",
    "getsockopt",
    "setsockopt",
    "shutdown",
    // Waiting.
    "ppoll",
    "epoll_create1",
    "eventfd2",
    "restart_syscall",
    // Open files.
    "fstat",
    "lseek",
    "readv",
    "writev",
    "preadv",
    "preadv2",
    "fadvise64",
    "readahead",
    "readlinkat",
    // Memory, including memory shared with the supervisor.
    "memfd_create",
    "ftruncate",
    "fallocate",
    "mlock",
    "mlock2",
    "munlock",
    "mincore",
    "membarrier",
    // Threads. If clone3 is missing, the C library uses clone, whose flags a filter can check.
    "clone3",
    "gettid",
    "getpid",
    "rt_sigaction",
    "rt_sigreturn",
    "sched_getparam",
    "getrusage",
    "exit_group",
    #[cfg(target_arch = "x86_64")]
    "poll",
    #[cfg(target_arch = "x86_64")]
    "readlink",
];

/// System calls that kill the process: only an attacker has a use for them.
const KILLING_CALLS: &[&str] = &[
    "execve",
    "execveat",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "pidfd_getfd",
    "userfaultfd",
    "open_by_handle_at",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "setns",
    "unshare",
    "bpf",
    "perf_event_open",
    "io_uring_setup",
    "init_module",
    "finit_module",
    "delete_module",
    "kexec_load",
    "keyctl",
    "add_key",
    "request_key",
    "setuid",
    "setgid",
    "setresuid",
    "setresgid",
    "setgroups",
    "capset",
    "reboot",
];

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The user to become could not be looked up.
    #[error("cannot look up user {name}")]
    LookUp {
        /// The name or number.
        name: String,
        /// The error of the system call.
        source: Errno,
    },
    /// There is no such user.
    #[error("there is no user {name}")]
    NoUser {
        /// The name or number.
        name: String,
    },
    /// The process has threads, which would not be confined.
    #[error(
        "cannot sandbox a process with {threads} threads: the filter would cover one of them only"
    )]
    Threads {
        /// The number of threads.
        threads: usize,
    },
    /// A right could not be given up.
    #[error("cannot {action}")]
    GiveUp {
        /// The failed action.
        action: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// The process could not become another user.
    #[error("cannot switch to uid {uid}, gid {gid}")]
    Switch {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// The error of the system call.
        source: io::Error,
    },
    /// A file that may be read does not exist.
    #[error("{path}")]
    Readable {
        /// The path, escaped.
        path: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The access to files could not be restricted.
    #[error("cannot apply the Landlock rules")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter of system calls is wrong.
    #[error("cannot compile the seccomp filter")]
    Compile(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl SandboxError {
    fn give_up<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::GiveUp {
            action,
            source: source.into(),
        }
    }
}

/// Settings for confining a worker.
#[derive(Debug, Default)]
pub struct Confinement {
    /// Files, and folders with all their contents, that may be opened for reading.
    pub readable: Vec<PathBuf>,
    /// The user that the worker becomes.
    pub account: Option<Account>,
}

/// A user to become.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    uid: Uid,
    gid: Gid,
}

impl Account {
    /// Looks up a user by name or number.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such user, or it can't be looked up.
    pub fn find(name: &str) -> Result<Self, SandboxError> {
        let user = match name.parse() {
            Ok(uid) => User::from_uid(Uid::from_raw(uid)),
            Err(_) => User::from_name(name),
        };
        let name = name.to_owned();
        match user {
            Ok(Some(User { uid, gid, .. })) => Ok(Self { uid, gid }),
            Ok(None) => Err(SandboxError::NoUser { name }),
            Err(source) => Err(SandboxError::LookUp { name, source }),
        }
    }
}

/// The result of confining a process.
#[derive(Debug)]
pub struct Confined {
    /// The Landlock version in force, by its number in the kernel.
    pub landlock: Option<u32>,
    /// Warnings for the operator.
    pub warnings: Vec<String>,
}

/// Makes the kernel kill this process when the supervisor exits; otherwise it would read messages
/// that belong to the worker of the next supervisor.
pub(crate) fn exit_with_supervisor() -> Result<(), SandboxError> {
    let set = prctl::set_pdeathsig(Signal::SIGKILL);
    set.map_err(SandboxError::give_up("set the parent-death signal"))
}

/// Confines this process. It must have no other thread yet.
///
/// # Errors
///
/// Returns an error if a right can't be given up. The process may have given up others by then.
pub fn confine_worker(wanted: &Confinement) -> Result<Confined, SandboxError> {
    // If /proc is not visible, the caller has to be right.
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(SandboxError::Threads { threads });
    }
    raise_limits();
    // Compiled before anything is given up that compiling could need.
    let filters = filters(!wanted.readable.is_empty())?;
    become_user(wanted.account)?;
    // Becoming another user resets it, and the filter forbids setting it.
    exit_with_supervisor()?;
    prctl::set_dumpable(false).map_err(SandboxError::give_up("clear the dumpable flag"))?;
    prctl::set_no_new_privs().map_err(SandboxError::give_up("set no_new_privs"))?;
    let landlock = restrict_files(&wanted.readable)?;
    let mut warnings = Vec::new();
    if landlock.is_none() {
        let rest = if wanted.readable.is_empty() {
            "its seccomp filter denies opening files"
        } else {
            "it can read every file that its user can read"
        };
        warnings.push(format!(
            "no Landlock in this kernel: the worker runs without it; {rest}"
        ));
    }
    for filter in &filters {
        install_filter(filter).map_err(SandboxError::give_up("install the seccomp filter"))?;
    }
    Ok(Confined { landlock, warnings })
}

/// Raises the limits of descriptors and locked memory as far as possible; the rest stays.
fn raise_limits() {
    for resource in [Resource::RLIMIT_NOFILE, Resource::RLIMIT_MEMLOCK] {
        if let Ok((_, hard)) = getrlimit(resource) {
            let _ = setrlimit(resource, hard, hard);
        }
    }
    let all = nix::libc::RLIM_INFINITY;
    // The capability for it is dropped with the others.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, all, all);
}

fn become_user(account: Option<Account>) -> Result<(), SandboxError> {
    if let Some(Account { uid, gid }) = account {
        let change = || -> io::Result<()> {
            prctl::set_keepcaps(true)?;
            setgroups(&[])?;
            setresgid(gid, gid, gid)?;
            setresuid(uid, uid, uid)?;
            prctl::set_keepcaps(false)?;
            Ok(())
        };
        change().map_err(|source| SandboxError::Switch {
            uid: uid.as_raw(),
            gid: gid.as_raw(),
            source,
        })?;
    }
    keep_capabilities(&[CAP_KILL]).map_err(SandboxError::give_up("drop capabilities"))
}

fn restrict_files(readable: &[PathBuf]) -> Result<Option<u32>, SandboxError> {
    for path in readable {
        fs::metadata(path).map_err(|source| SandboxError::Readable {
            path: escape_path(path),
            source,
        })?;
    }
    let restrict = || -> Result<_, landlock::RulesetError> {
        Ruleset::default()
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::AbstractUnixSocket)?
            .create()?
            .add_rules(path_beneath_rules(
                readable,
                AccessFs::ReadFile | AccessFs::ReadDir,
            ))?
            .restrict_self()
    };
    let status = restrict()?;
    Ok(match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => {
            let number = effective_abi.min(LANDLOCK) as i32;
            u32::try_from(number).ok()
        }
        _ => None,
    })
}

/// Returns the filters in the order of their installation; the last one forbids the call that
/// installs more. If they disagree on a call, the strictest applies.
fn filters(opens_files: bool) -> Result<Vec<Vec<nix::libc::sock_filter>>, SandboxError> {
    let all: Vec<Value> = KILLING_CALLS
        .iter()
        .map(|call| json!({ "syscall": call }))
        .collect();
    let filters = [
        json!({ "mismatch_action": "allow", "match_action": "kill_process", "filter": all }),
        json!({ "mismatch_action": "allow", "match_action": { "errno": nix::libc::ENOSYS },
                "filter": [{ "syscall": "clone3" }] }),
        json!({ "mismatch_action": { "errno": nix::libc::EPERM }, "match_action": "allow",
                "filter": permitted(opens_files) }),
    ];
    let filters = filters.iter().map(compile);
    filters
        .collect::<Result<_, _>>()
        .map_err(SandboxError::Compile)
}

fn compile(
    filter: &Value,
) -> Result<Vec<nix::libc::sock_filter>, Box<dyn std::error::Error + Send + Sync>> {
    let arch: TargetArch = std::env::consts::ARCH.try_into()?;
    let json = json!({ "worker": filter }).to_string();
    let program = compile_from_json(json.as_bytes(), arch)?.remove("worker");
    let program: BpfProgram = program.ok_or("there is no filter")?;
    let instruction = |of: seccompiler::sock_filter| nix::libc::sock_filter {
        code: of.code,
        jt: of.jt,
        jf: of.jf,
        k: of.k,
    };
    Ok(program.into_iter().map(instruction).collect())
}

/// Returns the rules of the permitted calls, some of them only with certain arguments.
fn permitted(opens_files: bool) -> Vec<Value> {
    use nix::libc::{
        AT_EMPTY_PATH, CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID,
        CLONE_NEWUSER, CLONE_NEWUTS, CLONE_THREAD, CLONE_VM, F_ADD_SEALS, F_DUPFD_CLOEXEC,
        F_GET_SEALS, F_GETFD, F_GETFL, F_SETFD, F_SETFL, FIONBIO, O_ACCMODE, O_CREAT, O_TRUNC,
        PR_SET_NAME, PR_SET_VMA, PROT_EXEC, SIGKILL,
    };
    /// Calls in the engine's own list that get conditions below.
    const CONDITIONAL: &[&str] = &["ioctl", "fcntl", "mmap", "mprotect", "pidfd_send_signal"];
    // C's flags are ints, of which only the bits matter.
    let bits = |flags: i32| u64::from(flags.cast_unsigned());
    let is = |index: u8, value: u64| json!({ "index": index, "type": "dword", "op": "eq", "val": value });
    let masked = |index: u8, mask: u64, value: u64| json!({ "index": index, "type": "dword", "op": { "masked_eq": mask }, "val": value });
    let whole = |call: &&str| json!({ "syscall": call });
    let with = |call: &str, args: &[Value]| json!({ "syscall": call, "args": args });

    let engine = SYSTEM_CALLS
        .iter()
        .filter(|call| !CONDITIONAL.contains(call))
        .filter(|call| cfg!(target_arch = "x86_64") || **call != "epoll_wait");
    let mut rules: Vec<Value> = engine.chain(PERMITTED_CALLS).map(whole).collect();
    // Installing and releasing. The worker never creates a userfaultfd.
    let requests = [
        abi::UFFDIO_REGISTER,
        abi::UFFDIO_UNREGISTER,
        abi::UFFDIO_WAKE,
        abi::UFFDIO_COPY,
        abi::UFFDIO_ZEROPAGE,
        abi::UFFDIO_MOVE,
        abi::UFFDIO_WRITEPROTECT,
        abi::UFFDIO_CONTINUE,
        abi::UFFDIO_POISON,
        FIONBIO,
    ];
    rules.extend(requests.map(|request| with("ioctl", &[is(1, request)])));
    let commands = [
        F_GETFD,
        F_SETFD,
        F_GETFL,
        F_SETFL,
        F_DUPFD_CLOEXEC,
        F_ADD_SEALS,
        F_GET_SEALS,
    ];
    rules.extend(commands.map(|command| with("fcntl", &[is(1, bits(command))])));
    // No new executable memory.
    for call in ["mmap", "mprotect"] {
        rules.push(with(call, &[masked(2, bits(PROT_EXEC), 0)]));
    }
    // Threads, but neither processes nor namespaces.
    let thread = bits(CLONE_VM | CLONE_THREAD);
    let namespaces = bits(
        CLONE_NEWNS
            | CLONE_NEWCGROUP
            | CLONE_NEWUTS
            | CLONE_NEWIPC
            | CLONE_NEWUSER
            | CLONE_NEWPID
            | CLONE_NEWNET,
    );
    rules.push(with("clone", &[masked(0, thread | namespaces, thread)]));
    for option in [PR_SET_NAME, PR_SET_VMA] {
        rules.push(with("prctl", &[is(0, bits(option))]));
    }
    // Descriptors, but no paths.
    let empty_path = bits(AT_EMPTY_PATH);
    rules.push(with("newfstatat", &[masked(3, empty_path, empty_path)]));
    rules.push(with("statx", &[masked(2, empty_path, empty_path)]));
    if opens_files {
        let writing = bits(O_ACCMODE | O_CREAT | O_TRUNC);
        rules.push(with("openat", &[masked(2, writing, 0)]));
    }
    // Limits may only be read.
    rules.push(with(
        "prlimit64",
        &[
            is(0, 0),
            json!({ "index": 2, "type": "qword", "op": "eq", "val": 0 }),
        ],
    ));
    // Killing VMs, and itself.
    for signal in [0, SIGKILL] {
        rules.push(with("pidfd_send_signal", &[is(1, bits(signal))]));
    }
    rules.push(with("tgkill", &[is(0, u64::from(std::process::id()))]));
    rules
}
