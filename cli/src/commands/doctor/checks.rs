//! Evaluates the findings. The functions are pure, so that any machine can be simulated in tests.

use std::fs;
use std::io;
use std::path::Path;

use indicatif::{BinaryBytes, HumanCount};
use serde::Serialize;
use snaprestore_uffd::uffd::{Access, Features, KernelVersion, OpenError, Probe};
use snaprestore_uffd::uffd::{HugePool, Limit};

/// A requirement of restoring, and its state on this machine.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) state: State,
    pub(super) detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remedy: Option<String>,
}

/// Result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// The requirement is met.
    Good,
    /// Restoring works, but something is slower or unavailable.
    Limited,
    /// Restoring does not work.
    Missing,
}

/// Facts about the system beyond the engine's probe.
#[derive(Clone, Debug, Default)]
pub(super) struct Surroundings {
    /// Value of `kernel.yama.ptrace_scope`, if the kernel has it.
    pub(super) ptrace_scope: Option<String>,
    /// Whether no `/proc` of this PID namespace is mounted.
    pub(super) lacks_proc: bool,
}

impl Surroundings {
    pub(super) fn look() -> Self {
        Self {
            ptrace_scope: fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope")
                .ok()
                .map(|scope| scope.trim().to_owned()),
            lacks_proc: !Path::new("/proc/self/status").exists(),
        }
    }
}

fn good(name: &'static str, detail: impl Into<String>) -> Check {
    Check {
        name,
        state: State::Good,
        detail: detail.into(),
        remedy: None,
    }
}

fn limited(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check {
        name,
        state: State::Limited,
        detail: detail.into(),
        remedy: Some(remedy.into()),
    }
}

fn missing(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check {
        name,
        state: State::Missing,
        detail: detail.into(),
        remedy: Some(remedy.into()),
    }
}

/// Returns all checks, the decisive ones first.
pub(super) fn all(probe: &Probe, surroundings: &Surroundings) -> Vec<Check> {
    let mut checks = vec![kernel(probe), userfaultfd(probe)];
    checks.extend(ways(probe));
    checks.push(unprivileged(probe));
    checks.push(proc(surroundings));
    checks.extend(features(probe));
    checks.push(trace(probe, surroundings));
    checks.extend(limits(probe));
    checks.extend(huge_pages(probe));
    checks.push(kvm(&probe.kvm));
    checks
}

fn kernel(probe: &Probe) -> Check {
    let name = "kernel";
    let needed = KernelVersion::MINIMUM;
    match probe.kernel {
        Some(found) if found >= needed => good(name, format!("Linux {}", probe.kernel_release)),
        Some(_) => missing(
            name,
            format!("Linux {}", probe.kernel_release),
            format!("restoring lazily needs Linux {needed} or later"),
        ),
        None => limited(
            name,
            format!("cannot parse the version {:?}", probe.kernel_release),
            format!("restoring lazily needs Linux {needed} or later"),
        ),
    }
}

/// Checks whether the engine can open a userfaultfd for a restore; the error names a remedy.
fn userfaultfd(probe: &Probe) -> Check {
    let name = "userfaultfd";
    match &probe.open {
        Ok(()) => good(name, "pages can be installed when they are touched"),
        Err(error @ OpenError::NotPermitted { .. }) => {
            let remedy = "as root: chgrp and chmod /dev/userfaultfd for the group that restores, \
                          or sysctl vm.unprivileged_userfaultfd=1, or run with CAP_SYS_PTRACE; in \
                          a container, let its system call filter pass userfaultfd";
            if needs_user_mode_only(error) {
                limited(
                    name,
                    "user-mode faults only: enough for restore, demo and bench, but not for \
                     memory that system calls or virtual CPUs touch",
                    format!("for the memory of VMs: {remedy}"),
                )
            } else {
                missing(name, "not permitted to this process", remedy)
            }
        }
        Err(error) => missing(
            name,
            error.to_string(),
            "needs a kernel with CONFIG_USERFAULTFD and what is listed here",
        ),
    }
}

/// Returns whether a refused userfaultfd would be permitted for user-mode faults only.
pub(super) fn needs_user_mode_only(error: &OpenError) -> bool {
    matches!(
        error,
        OpenError::NotPermitted {
            user_mode_only_would_do: true,
            ..
        }
    )
}

/// Checks each way to open a userfaultfd. A failed one is no problem if another works.
fn ways(probe: &Probe) -> Vec<Check> {
    let any = probe.open.is_ok();
    probe
        .access
        .iter()
        .map(|way| {
            let name = match (way.access, way.user_mode_only) {
                (Access::Device, false) => "device",
                (Access::Syscall, false) => "system call",
                (Access::Device, true) => "device, user mode",
                (Access::Syscall, true) => "system call, user mode",
            };
            match &way.result {
                Ok(()) => good(name, "permitted"),
                Err(error) => Check {
                    remedy: (!any).then(|| remedy_of(way.access, error)),
                    ..limited(name, error.to_string(), "")
                },
            }
        })
        .collect()
}

fn remedy_of(access: Access, error: &io::Error) -> String {
    match (access, error.kind()) {
        (Access::Device, io::ErrorKind::NotFound) => {
            "needs Linux 6.1 or later, and the device in this container".into()
        }
        (Access::Device, _) => "as root: chgrp and chmod /dev/userfaultfd".into(),
        (Access::Syscall, _) => {
            "run with CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1".into()
        }
    }
}

fn unprivileged(probe: &Probe) -> Check {
    let name = "without privileges";
    let capable = probe.cap_sys_ptrace == Some(true);
    match probe.unprivileged_userfaultfd {
        Some(true) | None => good(name, "every user may make a userfaultfd"),
        Some(false) if capable => good(
            name,
            "only with privileges, which this process has (CAP_SYS_PTRACE)",
        ),
        Some(false) => limited(
            name,
            "vm.unprivileged_userfaultfd is 0, and this process has no CAP_SYS_PTRACE",
            "sysctl vm.unprivileged_userfaultfd=1 permits it to everyone",
        ),
    }
}

/// Features of newer kernels, and the effect of their absence.
const NEWER: [(Features, &str, &str); 5] = [
    (
        Features::POISON,
        "poison",
        "a page of a damaged frame kills the process instead of raising SIGBUS when touched",
    ),
    (
        Features::MOVE,
        "move",
        "pages are copied, and not moved into huge pages",
    ),
    (
        Features::MISSING_SHMEM,
        "shared memory",
        "shared memory cannot be restored lazily",
    ),
    (
        Features::MISSING_HUGETLBFS,
        "hugetlbfs",
        "memory on hugetlbfs cannot be restored lazily",
    ),
    (
        Features::MINOR_SHMEM,
        "minor faults",
        "memory shared between processes is not mapped from one copy",
    ),
];

fn features(probe: &Probe) -> Vec<Check> {
    let Some(found) = probe.features else {
        return Vec::new();
    };
    let mut checks = Vec::new();
    let lacking = Features::EVENTS.without(found);
    checks.push(if lacking.is_empty() {
        good("discarded memory", "reported, with moves and unmappings")
    } else {
        missing(
            "discarded memory",
            format!("not reported by this kernel: {lacking}"),
            "needs a kernel with these userfaultfd events",
        )
    });
    for (feature, name, without) in NEWER {
        let since = feature.iter().map(|entry| entry.since).next();
        checks.push(if found.contains(feature) {
            good(name, format!("available ({feature})"))
        } else {
            let since =
                since.map_or_else(String::new, |since| format!("needs Linux {since} or later"));
            limited(name, without, since)
        });
    }
    checks
}

/// Checks `/proc`, which all commands except `restore` and those for files need.
fn proc(surroundings: &Surroundings) -> Check {
    let name = "/proc";
    if surroundings.lacks_proc {
        limited(
            name,
            "none of this PID namespace is mounted: create --pid, serve, demo and bench don't work, \
             and limits and rights are not known",
            "mount -t proc proc /proc",
        )
    } else {
        good(name, "is mounted")
    }
}

/// Checks the permission to trace processes, which `create --pid` needs.
fn trace(probe: &Probe, surroundings: &Surroundings) -> Check {
    let name = "live processes";
    if surroundings.lacks_proc {
        return limited(
            name,
            "none can be packed without /proc",
            "mount -t proc proc /proc",
        );
    }
    if probe.cap_sys_ptrace == Some(true) {
        return good(name, "all can be snapshotted (CAP_SYS_PTRACE)");
    }
    match surroundings.ptrace_scope.as_deref() {
        None | Some("0") => good(name, "those of the same user can be snapshotted"),
        Some("3") => limited(
            name,
            "kernel.yama.ptrace_scope is 3: none can be snapshotted",
            "reboot without that setting: it can't be undone",
        ),
        Some(scope) => limited(
            name,
            format!("kernel.yama.ptrace_scope is {scope}: only with privileges"),
            "run as root, or sysctl kernel.yama.ptrace_scope=0",
        ),
    }
}

fn limits(probe: &Probe) -> Vec<Check> {
    /// Numbers of mappings and descriptors that restoring a process tree can need.
    const MANY_MAPS: u64 = 65530;
    const MANY_FILES: u64 = 1024;
    let mut checks = Vec::new();
    if let Some(limit) = probe.memlock {
        // Restoring locks no memory, but locked memory must be loaded all at once.
        checks.push(good(
            "locked memory",
            words(limit, |n| BinaryBytes(n).to_string()),
        ));
    }
    if let Some(limit) = probe.open_files {
        let detail = words(limit, |n| HumanCount(n).to_string());
        checks.push(match limit.soft {
            Some(soft) if soft < MANY_FILES => {
                limited("open files", detail, "raise it: ulimit -n 4096")
            }
            _ => good("open files", detail),
        });
    }
    if let Some(maps) = probe.max_map_count {
        let detail = format!("{} a process", HumanCount(maps));
        checks.push(if maps < MANY_MAPS {
            limited(
                "mappings",
                detail,
                format!("raise it: sysctl vm.max_map_count={MANY_MAPS}"),
            )
        } else {
            good("mappings", detail)
        });
    }
    if let Some(limit) = probe.address_space {
        let detail = words(limit, |n| BinaryBytes(n).to_string());
        checks.push(match limit.soft {
            Some(_) => limited(
                "address space",
                format!("{detail} (RLIMIT_AS): no more memory than that can be restored"),
                "raise it: ulimit -v unlimited",
            ),
            None => good("address space", detail),
        });
    }
    if let Some(limit) = probe.threads {
        checks.push(good(
            "threads",
            format!("{} a user", words(limit, |n| HumanCount(n).to_string())),
        ));
    }
    checks.extend(probe.overcommit.map(overcommit));
    checks
}

/// Checks `vm.overcommit_memory`.
fn overcommit(policy: u64) -> Check {
    let name = "overcommit";
    match policy {
        2 => limited(
            name,
            "vm.overcommit_memory is 2: mappings beyond the commit limit fail, even if never touched",
            "sysctl vm.overcommit_memory=0, or raise vm.overcommit_ratio",
        ),
        1 => good(name, "vm.overcommit_memory is 1: any amount can be mapped"),
        _ => good(
            name,
            format!(
                "vm.overcommit_memory is {policy}: only mappings that obviously cannot fit fail"
            ),
        ),
    }
}

/// Formats a limit for people.
fn words(limit: Limit, number: impl Fn(u64) -> String) -> String {
    let one = |limit: Option<u64>| limit.map_or_else(|| "unlimited".into(), &number);
    if limit.soft == limit.hard {
        one(limit.soft)
    } else {
        format!("{} (can be raised to {})", one(limit.soft), one(limit.hard))
    }
}

fn huge_pages(probe: &Probe) -> Vec<Check> {
    let mut checks = Vec::new();
    let name = "huge pages";
    checks.push(match probe.transparent_huge_pages.as_deref() {
        Some(enabled @ ("always" | "madvise")) => good(name, format!("transparent: {enabled}")),
        Some(other) => limited(
            name,
            format!("transparent: {other}"),
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        None => limited(
            name,
            "this kernel has no transparent ones",
            "needs CONFIG_TRANSPARENT_HUGEPAGE",
        ),
    });
    for pool in &probe.huge_pools {
        checks.push(pool_check(pool));
    }
    checks
}

fn pool_check(pool: &HugePool) -> Check {
    let name = "pool of huge pages";
    let size = BinaryBytes(pool.page_size);
    let detail = format!(
        "{size}: {} pages, {} free, {} reserved",
        pool.total, pool.free, pool.reserved
    );
    if pool.total + pool.overcommit > 0 {
        good(name, detail)
    } else {
        // Only a restore onto hugetlbfs needs huge pages, so their absence is not a problem.
        good(name, format!("{size}: none set aside (for hugetlbfs only)"))
    }
}

fn kvm(opened: &Result<(), io::Error>) -> Check {
    let name = "/dev/kvm";
    match opened {
        Ok(()) => good(name, "virtual machines can run here"),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => limited(
            name,
            error.to_string(),
            "join the group of /dev/kvm to run virtual machines (not needed for processes)",
        ),
        Err(error) => limited(
            name,
            error.to_string(),
            "needs hardware virtualisation, or nested virtualisation in a guest (not needed for processes)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snaprestore_uffd::uffd::Mask;

    fn find<'c>(checks: &'c [Check], name: &str) -> &'c Check {
        checks
            .iter()
            .find(|check| check.name == name)
            .unwrap_or_else(|| panic!("no {name} in {checks:?}"))
    }

    #[test]
    fn every_failed_check_names_a_remedy() {
        let versions = [(4, 14), (5, 7), (6, 1), (6, 18)];
        for (major, minor) in versions {
            let mask = Mask::kernel(KernelVersion::new(major, minor));
            let checks = all(&Probe::with_mask(mask), &Surroundings::default());
            for check in checks.iter().filter(|check| check.state != State::Good) {
                // An unavailable way is no problem while another is available.
                let is_way = check.name.starts_with("device") || check.name.starts_with("system");
                assert!(is_way || check.remedy.is_some(), "{check:?}");
            }
        }
    }

    #[test]
    fn old_kernel_error_names_the_needed_version() {
        let mask = Mask::kernel(KernelVersion::new(5, 4));
        let checks = all(&Probe::with_mask(mask), &Surroundings::default());
        let kernel = find(&checks, "kernel");
        assert_eq!(kernel.state, State::Missing);
        assert!(kernel.remedy.as_ref().unwrap().contains("5.7"));
        assert_eq!(find(&checks, "userfaultfd").state, State::Missing);
    }

    #[test]
    fn user_mode_only_is_enough_where_permitted() {
        let mut probe = Probe::take();
        for (would_do, state) in [(true, State::Limited), (false, State::Missing)] {
            probe.open = Err(OpenError::NotPermitted {
                tried: Vec::new(),
                user_mode_only_would_do: would_do,
            });
            let check = userfaultfd(&probe);
            assert_eq!(check.state, state);
            let remedy = check.remedy.unwrap();
            assert_eq!(
                remedy.contains("for the memory of VMs"),
                would_do,
                "{remedy}"
            );
            assert!(remedy.contains("vm.unprivileged_userfaultfd=1"), "{remedy}");
        }
    }

    #[test]
    fn missing_feature_names_the_first_kernel_with_it() {
        let probe = Probe::with_mask(Mask::kernel(KernelVersion::new(6, 1)));
        if probe.features.is_none() {
            // Without any way to open a userfaultfd, its features are unknown.
            assert!(features(&probe).is_empty());
            return;
        }
        // The probe reports the kernel's real features, so one is removed here.
        let checks = features(&Probe {
            features: Some(probe.features.unwrap().without(Features::POISON)),
            ..probe
        });
        let poison = find(&checks, "poison");
        assert_eq!(poison.state, State::Limited);
        assert!(poison.remedy.as_ref().unwrap().contains("6.6"));
    }

    #[test]
    fn small_limits_and_missing_rights_are_reported() {
        let mut probe = Probe::take();
        probe.cap_sys_ptrace = Some(false);
        probe.unprivileged_userfaultfd = Some(false);
        probe.open_files = Some(Limit {
            soft: Some(64),
            hard: Some(4096),
        });
        probe.max_map_count = Some(1000);
        probe.address_space = Some(Limit {
            soft: Some(1 << 30),
            hard: None,
        });
        probe.overcommit = Some(2);
        probe.transparent_huge_pages = Some("never".into());
        probe.kvm = Err(io::ErrorKind::PermissionDenied.into());
        let scope = |scope: &str| Surroundings {
            ptrace_scope: Some(scope.into()),
            lacks_proc: false,
        };
        let checks = all(&probe, &scope("1"));
        for name in [
            "without privileges",
            "live processes",
            "open files",
            "mappings",
            "address space",
            "overcommit",
            "huge pages",
            "/dev/kvm",
        ] {
            assert_eq!(find(&checks, name).state, State::Limited, "{name}");
        }
        assert!(
            find(&checks, "open files")
                .detail
                .contains("64 (can be raised to 4,096)")
        );
        assert_eq!(
            find(&all(&probe, &scope("0")), "live processes").state,
            State::Good
        );
    }
}
