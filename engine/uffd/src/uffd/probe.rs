//! Capabilities and permissions of this machine, as plain values.
//!
//! Nothing here fails: what can't be determined is `None` or carries its error, because the purpose
//! is to explain why other things fail.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::features::{Features, Ioctls, KernelVersion, Mask};
use super::open::{Access, OpenError, OpenOptions, UserModeOnly};
use super::userfaultfd::{Modes, Userfaultfd};
use crate::memory::{Mapping, RawRegion};

/// The result of trying one way to open a userfaultfd.
#[derive(Debug)]
pub struct AccessProbe {
    /// The way that was tried.
    pub access: Access,
    /// Whether only faults of user code were requested.
    pub user_mode_only: bool,
    /// The kernel's answer.
    pub result: Result<(), io::Error>,
}

/// A resource limit in bytes or pieces; `None` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The limit in force.
    pub soft: Option<u64>,
    /// The maximum to which this process may raise it.
    pub hard: Option<u64>,
}

/// The pool of one size of huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePool {
    /// Page size in bytes.
    pub page_size: u64,
    /// Number of pages in the pool.
    pub total: u64,
    /// Number of pages not in use.
    pub free: u64,
    /// Number of pages that are reserved for mappings and not yet in use.
    pub reserved: u64,
    /// Number of additional pages that the kernel may allocate on demand.
    pub overcommit: u64,
}

/// Everything that decides whether and how memory can be restored lazily on this machine.
#[derive(Debug)]
pub struct Probe {
    /// `uname -r`.
    pub kernel_release: String,
    /// The parsed release.
    pub kernel: Option<KernelVersion>,
    /// Every way, in the order in which they are tried.
    pub access: Vec<AccessProbe>,
    /// The result of opening as the engine does; its error names the remedy.
    pub open: Result<(), OpenError>,
    /// The features of the kernel, if any way works.
    pub features: Option<Features>,
    /// The ioctls that work on anonymous memory, plus CONTINUE if it works on shared memory; if any
    /// way works.
    pub ioctls: Option<Ioctls>,
    /// `vm.unprivileged_userfaultfd`; `None` on kernels before 5.2.
    pub unprivileged_userfaultfd: Option<bool>,
    /// Whether this process has `CAP_SYS_PTRACE` in effect.
    pub cap_sys_ptrace: Option<bool>,
    /// `RLIMIT_MEMLOCK`, in bytes.
    pub memlock: Option<Limit>,
    /// `RLIMIT_NOFILE`, in descriptors.
    pub open_files: Option<Limit>,
    /// `vm.max_map_count`.
    pub max_map_count: Option<u64>,
    /// `RLIMIT_AS`, in bytes.
    pub address_space: Option<Limit>,
    /// `RLIMIT_NPROC`, in processes and threads of the user.
    pub threads: Option<Limit>,
    /// `vm.overcommit_memory`: 0 refuses what can't possibly fit, 1 refuses nothing, 2 refuses
    /// everything beyond a limit.
    pub overcommit: Option<u64>,
    /// The pools of huge pages, by size.
    pub huge_pools: Vec<HugePool>,
    /// `/sys/kernel/mm/transparent_hugepage/enabled`: `always`, `madvise` or `never`.
    pub transparent_huge_pages: Option<String>,
    /// The corresponding setting for shared memory.
    pub shared_transparent_huge_pages: Option<String>,
    /// Whether `/dev/kvm` can be opened for reading and writing.
    pub kvm: Result<(), io::Error>,
}

impl Probe {
    /// Probes this machine.
    pub fn take() -> Self {
        Self::with_mask(Mask::NONE)
    }

    /// Probes this machine, with some features of the kernel hidden.
    pub fn with_mask(mask: Mask) -> Self {
        let ways = [
            (Access::Device, false),
            (Access::Syscall, false),
            (Access::Device, true),
            (Access::Syscall, true),
        ];
        let access = ways.map(|(access, user_mode_only)| AccessProbe {
            access,
            user_mode_only,
            result: super::open::new_descriptor(access, user_mode_only)
                .map(drop)
                .map_err(io::Error::from),
        });
        let options = OpenOptions::new().mask(mask);
        let opened = options
            .clone()
            .required(Features::EMPTY)
            .wanted(Features::PAGEFAULT_FLAG_WP)
            .user_mode_only(UserModeOnly::IfNeeded)
            .open()
            .ok();
        let release = nix::sys::utsname::uname().ok();
        let release = release.map(|names| names.release().to_string_lossy().into_owned());
        let kernel_release = release.unwrap_or_default();
        Self {
            kernel: mask.kernel.or_else(|| kernel_release.parse().ok()),
            kernel_release,
            access: access.into(),
            open: options.open().map(drop),
            features: opened.as_ref().map(Userfaultfd::available),
            ioctls: opened.as_ref().and_then(|uffd| range_ioctls(uffd, mask)),
            unprivileged_userfaultfd: number("/proc/sys/vm/unprivileged_userfaultfd")
                .map(|value| value != 0),
            cap_sys_ptrace: cap_sys_ptrace(),
            memlock: limit(Resource::RLIMIT_MEMLOCK),
            open_files: limit(Resource::RLIMIT_NOFILE),
            max_map_count: number("/proc/sys/vm/max_map_count"),
            address_space: limit(Resource::RLIMIT_AS),
            threads: limit(Resource::RLIMIT_NPROC),
            overcommit: number("/proc/sys/vm/overcommit_memory"),
            huge_pools: huge_pools(),
            transparent_huge_pages: choice("/sys/kernel/mm/transparent_hugepage/enabled"),
            shared_transparent_huge_pages: choice(
                "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
            ),
            kvm: fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .map(drop),
        }
    }
}

fn range_ioctls(uffd: &Userfaultfd, mask: Mask) -> Option<Ioctls> {
    let mapping = Mapping::new(crate::page_size()).ok()?;
    let region = RawRegion::owned(Arc::new(mapping));
    let modes = if uffd.features().contains(Features::PAGEFAULT_FLAG_WP) {
        Modes::MISSING.and(Modes::WRITE_PROTECT)
    } else {
        Modes::MISSING
    };
    let mut ioctls = uffd.register(&region, 0, region.len(), modes).ok()?;
    if uffd.available().contains(Features::MINOR_SHMEM) {
        ioctls |= Ioctls::CONTINUE.without(mask.ioctls);
    }
    Some(ioctls)
}

fn text(path: impl AsRef<Path>) -> Option<String> {
    // The name of the program, which stands in its status, is any bytes.
    let bytes = fs::read(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn number(path: impl AsRef<Path>) -> Option<u64> {
    text(path)?.trim().parse().ok()
}

/// Returns the word in brackets, as in `always [madvise] never`.
fn choice(path: &str) -> Option<String> {
    let text = text(path)?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn cap_sys_ptrace() -> Option<bool> {
    const CAP_SYS_PTRACE: u32 = 19;
    let status = text("/proc/self/status")?;
    let set = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    let bits = u64::from_str_radix(set.trim(), 16).ok()?;
    Some(bits >> CAP_SYS_PTRACE & 1 == 1)
}

fn limit(resource: Resource) -> Option<Limit> {
    let (soft, hard) = getrlimit(resource).ok()?;
    let finite = |value| (value != RLIM_INFINITY).then_some(value);
    Some(Limit {
        soft: finite(soft),
        hard: finite(hard),
    })
}

fn huge_pools() -> Vec<HugePool> {
    let folders = fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten()
        .flatten();
    let mut pools: Vec<_> = folders
        .filter_map(|folder| huge_pool(&folder.path()))
        .collect();
    pools.sort_by_key(|pool| pool.page_size);
    pools
}

fn huge_pool(folder: &Path) -> Option<HugePool> {
    let name = folder.file_name()?.to_str()?;
    let kilobytes: u64 = name
        .strip_prefix("hugepages-")?
        .strip_suffix("kB")?
        .parse()
        .ok()?;
    Some(HugePool {
        page_size: kilobytes.checked_mul(1024)?,
        total: number(folder.join("nr_hugepages"))?,
        free: number(folder.join("free_hugepages"))?,
        reserved: number(folder.join("resv_hugepages"))?,
        overcommit: number(folder.join("nr_overcommit_hugepages"))?,
    })
}
