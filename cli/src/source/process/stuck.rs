//! Finds out why a thread does not stop.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::unistd::Pid;

use super::hold::thread_state;
use crate::names;

/// A thread that does not stop, and the reason.
#[derive(Debug)]
pub(super) struct Stuck {
    pid: i32,
    tid: Pid,
    reason: StuckReason,
}

#[derive(Debug)]
enum StuckReason {
    /// The path of a frozen cgroup; may be any bytes.
    Frozen(Vec<u8>),
    /// A wait in the kernel, with the name of the function if it is known.
    Waits(Option<String>),
    /// No known reason: the thread should stop.
    Unknown,
}

/// Finds out why thread `tid` of process `pid` does not stop.
pub(super) fn why(pid: i32, tid: Pid) -> Stuck {
    let folder = format!("/proc/{pid}/task/{tid}");
    let waits_in = fs::read_to_string(format!("{folder}/wchan"))
        .ok()
        .filter(|name| !name.is_empty() && name != "0");
    let reason = if let Some(cgroup) = frozen_cgroup(&folder) {
        StuckReason::Frozen(cgroup)
    } else if thread_state(pid, tid) == Some('D') {
        StuckReason::Waits(waits_in)
    } else {
        StuckReason::Unknown
    };
    Stuck { pid, tid, reason }
}

impl Stuck {
    /// Returns whether waiting is pointless.
    pub(super) fn is_frozen(&self) -> bool {
        matches!(self.reason, StuckReason::Frozen(_))
    }
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, tid, reason } = self;
        match reason {
            StuckReason::Frozen(cgroup) => write!(
                f,
                "process {pid} is frozen, so it cannot be stopped (freezer.state of its cgroup \
                 {}, as docker pause sets it); thaw it, and try again",
                names::stored(cgroup)
            ),
            StuckReason::Waits(Some(function)) => {
                write!(
                    f,
                    "process {pid}: thread {tid} does not stop; it waits in the kernel, in \
                     {function}"
                )?;
                match hint(function) {
                    Some(hint) => write!(f, " ({hint})"),
                    None => Ok(()),
                }
            }
            StuckReason::Waits(None) => write!(
                f,
                "process {pid}: thread {tid} does not stop; it waits in the kernel (for a disk, a \
                 file server, or a child of vfork?)"
            ),
            StuckReason::Unknown => write!(f, "process {pid}: thread {tid} does not stop"),
        }
    }
}

/// Describes what a thread that waits in a function of the kernel is waiting for.
fn hint(function: &str) -> Option<&'static str> {
    const HINTS: [(&[&str], &str); 4] = [
        (
            &["kernel_clone", "do_fork", "vfork"],
            "for the child of its vfork, which has yet to start a program",
        ),
        (&["nfs", "rpc", "fuse", "cifs", "p9_"], "for a file server"),
        (
            &["userfault"],
            "for the process that answers its page faults",
        ),
        (
            &["io_schedule", "folio", "blk_", "jbd2", "submit_bio"],
            "for a disk",
        ),
    ];
    HINTS
        .iter()
        .find(|(parts, _)| parts.iter().any(|part| function.contains(part)))
        .map(|(_, hint)| *hint)
}

/// Returns the frozen cgroup of version 1 that holds the task of a folder in `/proc`. In version 2,
/// frozen threads can be traced.
fn frozen_cgroup(folder: &str) -> Option<Vec<u8>> {
    let groups = fs::read(format!("{folder}/cgroup")).ok()?;
    let mounts = fs::read("/proc/self/mountinfo").ok()?;
    // Names of other mounts may be any bytes.
    let mounts = String::from_utf8_lossy(&mounts);
    let group = freezer_group(&groups)?;
    let (root, point) = freezer_mount(&mounts)?;
    let within = group.strip_prefix(root.as_bytes()).unwrap_or(group);
    let slashes = within.iter().take_while(|&&byte| byte == b'/').count();
    let path = Path::new(point).join(OsStr::from_bytes(&within[slashes..]));
    let state = fs::read_to_string(path.join("freezer.state")).ok()?;
    (state.trim() != "THAWED").then(|| group.to_owned())
}

/// Returns the path in a line `number:controllers:path` of `/proc/PID/cgroup`.
fn freezer_group(groups: &[u8]) -> Option<&[u8]> {
    groups.split(|&byte| byte == b'\n').find_map(|line| {
        let mut fields = line.splitn(3, |&byte| byte == b':').skip(1);
        let mut controllers = fields.next()?.split(|&byte| byte == b',');
        controllers.any(|name| name == b"freezer").then_some(())?;
        fields.next()
    })
}

/// Returns the root and mount point of the freezer hierarchy, from `/proc/PID/mountinfo`.
fn freezer_mount(mounts: &str) -> Option<(&str, &str)> {
    mounts.lines().find_map(|line| {
        let (mount, about) = line.split_once(" - ")?;
        let mut about = about.split(' ');
        (about.next() == Some("cgroup")).then_some(())?;
        let mut options = about.nth(1)?.split(',');
        options.any(|name| name == "freezer").then_some(())?;
        let mut fields = mount.split(' ').skip(3);
        let root = fields.next()?;
        Some((root.trim_end_matches('/'), fields.next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freezer_of_a_container_is_found() {
        let groups = b"12:memory:/a\xff\n7:freezer:/docker/a\xff:c\n1:name=systemd:/x\n0::/y\n";
        assert_eq!(freezer_group(groups), Some(&b"/docker/a\xff:c"[..]));
        assert_eq!(freezer_group(b"0::/y\n"), None);
        let mounts = "\
30 25 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw
36 25 0:33 / /sys/fs/cgroup/memory rw shared:16 - cgroup cgroup rw,memory
41 25 0:38 /docker/abc /sys/fs/cgroup/freezer ro master:20 - cgroup cgroup rw,freezer
";
        let found = freezer_mount(mounts);
        assert_eq!(found, Some(("/docker/abc", "/sys/fs/cgroup/freezer")));
        assert_eq!(
            freezer_mount("36 25 0:33 / /x rw - ext4 /dev/vda rw\n"),
            None
        );
    }

    #[test]
    fn waits_are_explained() {
        let stuck = |reason| Stuck {
            pid: 7,
            tid: Pid::from_raw(8),
            reason,
        };
        let waits = |function: &str| stuck(StuckReason::Waits(Some(function.into()))).to_string();
        assert!(waits("kernel_clone").contains("kernel_clone (for the child of its vfork"));
        assert!(waits("rpc_wait_bit_killable").contains("file server"));
        assert!(waits("something_else").ends_with("in something_else"));
        let frozen = stuck(StuckReason::Frozen("/docker/abc".into()));
        assert!(frozen.is_frozen() && frozen.to_string().contains("cgroup /docker/abc"));
    }
}
