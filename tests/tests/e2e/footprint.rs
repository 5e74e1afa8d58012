//! What a process holds: descriptors, threads, memory.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

/// Only a leak takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a process holds that has nothing to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Footprint {
    /// Open descriptors, by what they are.
    pub(crate) descriptors: BTreeMap<String, usize>,
    pub(crate) threads: usize,
}

/// What it has mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    pub(crate) mappings: usize,
    /// Of them, parts of memfds.
    pub(crate) memfds: usize,
    /// Memory of its own that is there.
    pub(crate) anonymous_kib: u64,
}

impl Footprint {
    /// `None`: it has ended.
    pub(crate) fn of(process: Pid) -> Option<Self> {
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
        let threads = fs::read_dir(format!("/proc/{process}/task")).ok()?.count();
        Some(Self {
            descriptors,
            threads,
        })
    }

    /// What a process holds that has come to rest.
    pub(crate) fn settled(process: Pid) -> Self {
        let look = || Self::of(process).expect("it runs");
        let (mut last, mut same) = (look(), 0);
        while same < 20 {
            std::thread::sleep(Duration::from_millis(10));
            let now = look();
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
        last
    }

    /// What this one has that `other` hasn't.
    fn over(&self, other: &Self) -> Vec<String> {
        let mut over = Vec::new();
        for (kind, count) in &self.descriptors {
            let before = other.descriptors.get(kind).copied().unwrap_or(0);
            if *count > before {
                over.push(format!("{} of {kind}", count - before));
            }
        }
        if self.threads > other.threads {
            over.push(format!("{} threads", self.threads - other.threads));
        }
        over
    }

    /// Waits until the process holds what it held once; what it was asked for may have been answered before
    /// it has put everything away.
    #[track_caller]
    pub(crate) fn comes_back(&self, name: &str, process: Pid, about: &str) {
        let began = Instant::now();
        loop {
            let now = Self::of(process).unwrap_or_else(|| panic!("{about}: the {name} has ended"));
            if now == *self {
                return;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "{about}: the {name} has too much: {:?}, and too little: {:?}",
                now.over(self),
                self.over(&now)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Mapped {
    pub(crate) fn of(process: Pid) -> Self {
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
            anonymous_kib: anonymous.trim().parse().expect("a number"),
        }
    }
}

/// The process that has this in its environment and `word` among its arguments.
pub(crate) fn process_with(mark: &str, word: &str) -> Option<Pid> {
    let has = |pid: i32, name: &str, wanted: &str| {
        let text = fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        text.split(|byte| *byte == 0)
            .any(|part| part == wanted.as_bytes())
    };
    let mut pids = fs::read_dir("/proc")
        .expect("processes")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let found = pids.find(|pid| has(*pid, "environ", mark) && has(*pid, "cmdline", word));
    found.map(Pid::from_raw)
}
