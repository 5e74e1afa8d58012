//! Diagnosis of the limit behind a refusal of the kernel, because ENOMEM and EAGAIN name none; and
//! the limit of descriptors.

use std::fmt;
use std::fs;
use std::io::{self, BufRead as _, BufReader};

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// Number of mappings that an operation may need at once; with fewer left, their number is the
/// limit.
const FEW_MAPPINGS: u64 = 4;

/// Raises this process's limit of open descriptors as far as it may.
pub fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // With the lower limit, less works, and says so.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// A description of the limit that an operation reached, if known. In messages it comes last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hint(Option<String>);

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(limit) => write!(f, "; {limit}"),
            None => Ok(()),
        }
    }
}

impl Hint {
    /// Finds the limit behind `error` of mapping, protecting or unmapping `bytes` bytes of this
    /// process.
    pub(crate) fn for_memory(error: &io::Error, bytes: u64) -> Self {
        let is_shortage = error.raw_os_error() == Some(Errno::ENOMEM as i32);
        Self(is_shortage.then(|| Facts::look().limit(bytes)).flatten())
    }

    /// Finds the limit behind `error` of splitting a mapping, which may be another process's.
    pub(crate) fn for_mappings(error: &io::Error) -> Self {
        if error.raw_os_error() != Some(Errno::ENOMEM as i32) {
            return Self(None);
        }
        let facts = Facts::look();
        let known = facts.limit(0);
        let guess = |most| {
            format!(
                "its process may have reached vm.max_map_count ({most} mappings); raise it: sysctl \
                 vm.max_map_count={}",
                2 * most
            )
        };
        Self(known.or_else(|| facts.max_mappings.map(guess)))
    }

    /// The limit behind `error` of writing to a file.
    pub fn for_file(error: &io::Error) -> Self {
        let is_too_large = error.raw_os_error() == Some(Errno::EFBIG as i32);
        Self(is_too_large.then(|| match soft(Resource::RLIMIT_FSIZE) {
            Some(most) => format!(
                "files that this process writes are limited to {most} bytes (RLIMIT_FSIZE); raise \
                 it: ulimit -f"
            ),
            None => "its file system permits no file of that length".into(),
        }))
    }

    /// Finds the limit behind `error` of starting a thread.
    pub fn for_thread(error: &io::Error) -> Self {
        if error.raw_os_error() != Some(Errno::EAGAIN as i32) {
            return Self::for_memory(error, 0);
        }
        let facts = Facts::look();
        let number = |limit: Option<u64>| limit.map_or("unlimited".into(), |n| n.to_string());
        Self(facts.limit(0).or_else(|| {
            Some(format!(
                "a limit on processes and threads was reached: that of the user (RLIMIT_NPROC: {}), \
                 of the cgroup (pids.max: {}), or of the machine (kernel.threads-max: {}); raise \
                 it",
                number(facts.threads),
                number(facts.cgroup_threads),
                number(facts.machine_threads),
            ))
        }))
    }
}

/// Limits on memory, and their current use, in bytes or pieces. `None` means unlimited or unknown.
#[derive(Clone, Debug, Default)]
struct Facts {
    mappings: Option<u64>,
    max_mappings: Option<u64>,
    address_space: u64,
    max_address_space: Option<u64>,
    data: u64,
    max_data: Option<u64>,
    /// `vm.overcommit_memory`.
    overcommit: Option<u64>,
    committed: u64,
    max_committed: Option<u64>,
    machine: Option<u64>,
    threads: Option<u64>,
    cgroup_threads: Option<u64>,
    machine_threads: Option<u64>,
}

impl Facts {
    fn look() -> Self {
        // The name of the program, which stands in there, is any bytes.
        let text = |path: &str| {
            let bytes = fs::read(path).ok()?;
            Some(String::from_utf8_lossy(&bytes).into_owned())
        };
        let number = |path: &str| text(path)?.trim().parse().ok();
        let status = text("/proc/self/status").unwrap_or_default();
        let machine = text("/proc/meminfo").unwrap_or_default();
        let total = kib(&machine, "MemTotal:").zip(kib(&machine, "SwapTotal:"));
        Self {
            mappings: count_mappings().ok(),
            max_mappings: number("/proc/sys/vm/max_map_count"),
            address_space: kib(&status, "VmSize:").unwrap_or(0),
            max_address_space: soft(Resource::RLIMIT_AS),
            data: kib(&status, "VmData:").unwrap_or(0),
            max_data: soft(Resource::RLIMIT_DATA),
            overcommit: number("/proc/sys/vm/overcommit_memory"),
            committed: kib(&machine, "Committed_AS:").unwrap_or(0),
            max_committed: kib(&machine, "CommitLimit:"),
            machine: total.map(|(memory, swap)| memory + swap),
            threads: soft(Resource::RLIMIT_NPROC),
            cgroup_threads: max_pids(),
            machine_threads: number("/proc/sys/kernel/threads-max"),
        }
    }

    /// Returns the limit that has no room for another `bytes` bytes.
    fn limit(&self, bytes: u64) -> Option<String> {
        let (mib, gib) = (|bytes: u64| bytes >> 20, |bytes: u64| bytes >> 30);
        if let (Some(mappings), Some(most)) = (self.mappings, self.max_mappings)
            && mappings + FEW_MAPPINGS > most
        {
            return Some(format!(
                "this process has {mappings} mappings, and vm.max_map_count is {most}; raise it: \
                 sysctl vm.max_map_count={}",
                2 * most
            ));
        }
        let limits = [
            (
                "address space",
                "RLIMIT_AS",
                "ulimit -v",
                self.address_space,
                self.max_address_space,
            ),
            ("data", "RLIMIT_DATA", "ulimit -d", self.data, self.max_data),
        ];
        for (what, name, command, used, most) in limits {
            if let Some(most) = most
                && used.saturating_add(bytes) > most
            {
                return Some(format!(
                    "the {what} of this process is limited to {} MiB ({name}), and {} MiB are used; \
                     raise it: {command}",
                    mib(most),
                    mib(used)
                ));
            }
        }
        match (self.overcommit, self.max_committed, self.machine) {
            (Some(2), Some(most), _) if self.committed.saturating_add(bytes) > most => {
                Some(format!(
                    "vm.overcommit_memory is 2, and of the commit limit of {} GiB, {} GiB are \
                     used; raise vm.overcommit_ratio, or: sysctl vm.overcommit_memory=0",
                    gib(most),
                    gib(self.committed)
                ))
            }
            (Some(0), _, Some(machine)) if bytes > machine => Some(format!(
                "it is more than the machine's memory and swap, {} GiB, which vm.overcommit_memory=0 \
                 refuses; sysctl vm.overcommit_memory=1 permits it",
                gib(machine)
            )),
            _ => None,
        }
    }
}

/// Counts the mappings of this process. A buffer for the whole file would need a mapping of its
/// own, which may not be available here.
fn count_mappings() -> io::Result<u64> {
    let maps = BufReader::with_capacity(4096, fs::File::open("/proc/self/maps")?);
    maps.split(b'\n')
        .try_fold(0, |count, line| line.map(|_| count + 1))
}

/// Returns the number of KiB after `name`, in bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number = line.trim().trim_end_matches("kB").trim();
    number.parse::<u64>().ok()?.checked_mul(1024)
}

fn soft(resource: Resource) -> Option<u64> {
    let (soft, _) = getrlimit(resource).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}

/// Returns `pids.max` of this process's cgroup, at its usual mount point.
fn max_pids() -> Option<u64> {
    let groups = fs::read("/proc/self/cgroup").ok()?;
    // Other hierarchies have names of any bytes.
    let groups = String::from_utf8_lossy(&groups);
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controller, path) = (fields.next()?, fields.next()?);
        let root = match controller {
            "" => "/sys/fs/cgroup",
            "pids" => "/sys/fs/cgroup/pids",
            _ => return None,
        };
        let max = fs::read_to_string(format!("{root}{path}/pids.max")).ok()?;
        max.trim().parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shortage() -> io::Error {
        Errno::ENOMEM.into()
    }

    #[test]
    fn each_limit_is_named_with_its_remedy() {
        let cases = [
            (
                Facts {
                    mappings: Some(65_528),
                    max_mappings: Some(65_530),
                    ..Facts::default()
                },
                ["65528 mappings", "vm.max_map_count=131060"],
            ),
            (
                Facts {
                    address_space: 3 << 30,
                    max_address_space: Some(4 << 30),
                    ..Facts::default()
                },
                ["RLIMIT_AS", "ulimit -v"],
            ),
            (
                Facts {
                    data: 3 << 30,
                    max_data: Some(4 << 30),
                    ..Facts::default()
                },
                ["RLIMIT_DATA", "ulimit -d"],
            ),
            (
                Facts {
                    overcommit: Some(2),
                    committed: 3 << 30,
                    max_committed: Some(4 << 30),
                    ..Facts::default()
                },
                ["vm.overcommit_memory is 2", "vm.overcommit_ratio"],
            ),
            (
                Facts {
                    overcommit: Some(0),
                    machine: Some(1 << 30),
                    ..Facts::default()
                },
                ["memory and swap, 1 GiB", "vm.overcommit_memory=1"],
            ),
        ];
        for (facts, parts) in cases {
            let limit = facts.limit(2 << 30).unwrap();
            for part in parts {
                assert!(limit.contains(part), "{limit}");
            }
        }
        assert_eq!(Facts::default().limit(u64::MAX), None);
    }

    #[test]
    fn other_errors_have_no_limit() {
        let refused = io::Error::from(Errno::EPERM);
        assert_eq!(Hint::for_memory(&refused, u64::MAX), Hint(None));
        assert_eq!(Hint::for_mappings(&refused).to_string(), "");
        assert_eq!(Hint::for_thread(&refused).to_string(), "");
        assert_eq!(Hint::for_file(&refused), Hint(None));
        let file = Hint::for_file(&Errno::EFBIG.into()).to_string();
        assert!(file.contains("file"), "{file}");
        let guess = Hint::for_mappings(&shortage()).to_string();
        assert!(guess.contains("vm.max_map_count"), "{guess}");
        let thread = Hint::for_thread(&Errno::EAGAIN.into()).to_string();
        assert!(thread.contains("pids.max"), "{thread}");
    }

    #[test]
    fn numbers_of_this_machine_are_found() {
        let facts = Facts::look();
        assert!(facts.mappings.is_some_and(|mappings| mappings > 5));
        assert!(facts.address_space > 1 << 20 && facts.data > 0);
        assert!(facts.max_mappings.is_some() && facts.machine.is_some());
        assert!(facts.overcommit.is_some() && facts.max_committed.is_some());
    }
}
