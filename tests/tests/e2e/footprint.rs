//! Resources of a process: descriptors, threads, memory.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::scene::HANG_TIMEOUT;

/// Number of sockets of an idle supervisor, worker and guardian, for a daemon with one service and
/// a control socket. The supervisor listens on both and is connected to the other two. The worker
/// has its end twice, once as standard input. The guardian holds the service's socket.
pub(crate) const IDLE_SOCKETS: [usize; 3] = [4, 2, 2];

/// Descriptors and threads of an idle process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Footprint {
    /// Open descriptors, by kind.
    pub(crate) descriptors: BTreeMap<String, usize>,
    /// Threads, by name.
    pub(crate) threads: BTreeMap<String, usize>,
}

/// Mappings and memory of a process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    pub(crate) mappings: usize,
    /// Mappings of memfds among them.
    pub(crate) memfds: usize,
    /// Resident anonymous memory, in KiB.
    pub(crate) anonymous_kib: u64,
}

impl Footprint {
    /// Reads the footprint of a process; `None` if it has exited.
    pub(crate) fn read(process: Pid) -> Option<Self> {
        let mut descriptors = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{process}/fd")).ok()? {
            let Ok(link) = fs::read_link(entry.ok()?.path()) else {
                continue;
            };
            let link = link.to_string_lossy().into_owned();
            // Sockets and pipes have numbers.
            let kind = match link.split_once(":[") {
                Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
                _ => link,
            };
            *descriptors.entry(kind).or_default() += 1;
        }
        let mut threads = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{process}/task")).ok()? {
            let Ok(name) = fs::read_to_string(task.ok()?.path().join("comm")) else {
                continue;
            };
            *threads.entry(name.trim_end().to_owned()).or_default() += 1;
        }
        Some(Self {
            descriptors,
            threads,
        })
    }

    /// Waits until a process is idle and returns its footprint. It is idle when it holds nothing of
    /// a VM or of a client and has `sockets` sockets: until then it may not have read all messages.
    #[track_caller]
    pub(crate) fn at_rest(name: &str, process: Pid, sockets: usize) -> Self {
        let began = Instant::now();
        loop {
            let now = Self::read(process).unwrap_or_else(|| panic!("the {name} has ended"));
            if now.is_at_rest() && now.descriptors.get("socket") == Some(&sockets) {
                return now;
            }
            let told = "does not come to rest";
            assert!(began.elapsed() < HANG_TIMEOUT, "the {name} {told}: {now:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns whether it holds nothing of a VM or of a client.
    fn is_at_rest(&self) -> bool {
        let of_vm = |kind: &String| kind.contains("[userfaultfd]") || kind.contains("memfd:");
        let busy = |name: &String| {
            let names = [
                "vm",
                "client",
                "complete",
                "snap-fault",
                "snap-feed",
                "open",
            ];
            names.iter().any(|busy| name.starts_with(busy))
        };
        !self.descriptors.keys().any(of_vm) && !self.threads.keys().any(busy)
    }

    /// Returns everything that this footprint has beyond `other`.
    fn over(&self, other: &Self) -> Vec<String> {
        let mut over = Vec::new();
        let kinds = [
            (&self.descriptors, &other.descriptors, ""),
            (&self.threads, &other.threads, "thread "),
        ];
        for (ours, others, what) in kinds {
            for (kind, count) in ours {
                let before = others.get(kind).copied().unwrap_or(0);
                if *count > before {
                    over.push(format!("{} of {what}{kind}", count - before));
                }
            }
        }
        over
    }

    /// Waits until the process's footprint is what it was before. A request may have been answered
    /// before the process has released all its resources.
    #[track_caller]
    pub(crate) fn comes_back(&self, name: &str, process: Pid, about: &str) {
        let began = Instant::now();
        loop {
            let now =
                Self::read(process).unwrap_or_else(|| panic!("{about}: the {name} has ended"));
            if now == *self {
                return;
            }
            assert!(
                began.elapsed() < HANG_TIMEOUT,
                "{about}: the {name} has too much: {:?}, and too little: {:?}",
                now.over(self),
                self.over(&now)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Mapped {
    pub(crate) fn read(process: Pid) -> Self {
        let read = |name: &str| {
            fs::read_to_string(format!("/proc/{process}/{name}"))
                .unwrap_or_else(|error| panic!("{name} of {process}: {error}"))
        };
        let maps = read("maps");
        let memory = read("smaps_rollup");
        let anonymous = memory
            .lines()
            .find_map(|line| line.strip_prefix("Anonymous:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB"))
            .expect("a number of kB");
        Self {
            mappings: maps.lines().count(),
            memfds: maps.matches("/memfd:").count(),
            anonymous_kib: anonymous.trim().parse().expect("number out of range"),
        }
    }
}

/// Returns the process that has `mark` in its environment and `word` among its arguments.
pub(crate) fn process_with(mark: &str, word: &str) -> Option<Pid> {
    let has = |pid: i32, name: &str, wanted: &str| {
        let text = fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        text.split(|byte| *byte == 0)
            .any(|part| part == wanted.as_bytes())
    };
    let mut pids = fs::read_dir("/proc")
        .expect("cannot list the processes")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let found = pids.find(|pid| has(*pid, "environ", mark) && has(*pid, "cmdline", word));
    found.map(Pid::from_raw)
}
