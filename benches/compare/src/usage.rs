//! Resource use of a process: processor time, memory, reads from disk.
#![allow(
    unsafe_code,
    reason = "getrusage has no safe wrapper without another dependency"
)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::BenchError;

/// Processes whose processor time is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// All threads of this process.
    Own,
    /// Children that were waited for.
    Children,
}

/// Returns the processor time in seconds, of user code and of the kernel on its behalf.
pub(crate) fn cpu_seconds(who: Who) -> f64 {
    let who = match who {
        Who::Own => libc::RUSAGE_SELF,
        Who::Children => libc::RUSAGE_CHILDREN,
    };
    // SAFETY: all zeros is a valid rusage: it is made of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a live rusage that the kernel fills.
    let result = unsafe { libc::getrusage(who, &raw mut usage) };
    if result != 0 {
        return 0.0;
    }
    #[expect(clippy::cast_precision_loss, reason = "seconds of a measurement")]
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Returns the processor time of another process in seconds; none if it no longer exists.
pub(crate) fn cpu_seconds_of(pid: u32) -> f64 {
    let mut clock = 0;
    // SAFETY: `clock` is a live clockid_t that is filled.
    let found = unsafe { libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) };
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a live timespec that the kernel fills.
    if found != 0 || unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return 0.0;
    }
    #[expect(clippy::cast_precision_loss, reason = "seconds of a measurement")]
    let seconds = time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
    seconds
}

/// Returns a process and its descendants.
pub(crate) fn family(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(pid) = family.get(next) {
        next += 1;
        let threads = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten();
        let children: Vec<u32> = threads
            .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok())
            .flat_map(|pids| {
                let pids = pids.split_whitespace().map(str::parse);
                pids.filter_map(Result::ok).collect::<Vec<u32>>()
            })
            .collect();
        family.extend(children);
    }
    family
}

/// Memory of this process that it doesn't share with the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Anonymous and shared memory that is resident.
    pub(crate) resident: u64,
    /// Page tables.
    pub(crate) tables: u64,
}

impl Held {
    /// Returns the current use of this process.
    pub(crate) fn now() -> Self {
        Self::parse(&fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    /// Returns the current use of another process.
    pub(crate) fn of_process(pid: u32) -> Self {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default())
    }

    /// Returns the sum of both, in bytes.
    pub(crate) fn bytes(self) -> u64 {
        self.resident + self.tables
    }

    fn parse(status: &str) -> Self {
        Self {
            resident: kib(status, "RssAnon:") + kib(status, "RssShmem:"),
            tables: kib(status, "VmPTE:"),
        }
    }
}

/// Returns the value of a line `name: N kB` of /proc, in bytes.
fn kib(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// Returns the number of bytes that this process has read from disk.
pub(crate) fn disk_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/io").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("read_bytes: "))
        .and_then(|rest| rest.parse().ok())
        .unwrap_or(0)
}

/// Returns the number of bytes read, by any process, from the disk that holds `path`: loop devices
/// read in threads of the kernel.
pub(crate) fn device_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(metadata) = fs::metadata(path) else {
        return 0;
    };
    let device = metadata.dev();
    let name = format!(
        "/sys/dev/block/{}:{}/stat",
        libc::major(device),
        libc::minor(device)
    );
    let text = fs::read_to_string(name).unwrap_or_default();
    let sectors = text
        .split_whitespace()
        .nth(2)
        .and_then(|n| n.parse::<u64>().ok());
    sectors.unwrap_or(0) * 512
}

/// Returns the processor time of the whole machine in seconds, with the kernel's resolution of 10
/// ms.
pub(crate) fn machine_cpu_seconds() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let Some(line) = text.lines().next() else {
        return 0.0;
    };
    // user, nice, system, idle, iowait, irq, softirq
    let ticks: u64 = line
        .split_whitespace()
        .skip(1)
        .take(7)
        .enumerate()
        .filter(|(place, _)| !matches!(place, 3 | 4))
        .filter_map(|(_, text)| text.parse::<u64>().ok())
        .sum();
    crate::stats::float(ticks) / 100.0
}

/// Returns the anonymous memory of the mappings in `[start, start + len)`, and the size of the page
/// tables for it.
pub(crate) fn content(start: u64, len: u64) -> Result<Held, BenchError> {
    let maps = fs::read_to_string("/proc/self/smaps")
        .map_err(BenchError::io("reading /proc/self/smaps"))?;
    let resident = resident_in(&maps, start, start + len);
    Ok(Held {
        resident,
        tables: tables_in(start, len)?,
    })
}

/// Returns the anonymous memory of the mappings that lie in a range.
fn resident_in(smaps: &str, start: u64, end: u64) -> u64 {
    let mut inside = false;
    let mut sum = 0;
    for line in smaps.lines() {
        if let Some((from, to)) = mapping(line) {
            inside = from < end && start < to;
        } else if inside && line.starts_with("Anonymous:") {
            sum += kib(line, "Anonymous:");
        }
    }
    sum
}

/// Returns the addresses at the start of a line that begins a mapping.
fn mapping(line: &str) -> Option<(u64, u64)> {
    let (from, to) = line.split_whitespace().next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some((hex(from)?, hex(to)?))
}

/// Returns the bytes of page tables that the present pages of a range need: one table for each 2
/// MiB and one for each GiB.
fn tables_in(start: u64, len: u64) -> Result<u64, BenchError> {
    use std::os::unix::fs::FileExt as _;
    let failed = || BenchError::io("reading /proc/self/pagemap");
    let pagemap = fs::File::open("/proc/self/pagemap").map_err(failed())?;
    let (mut tables, mut last_gib) = (0, None);
    let mut entries = [0; 4096];
    let mut at = start & !0x1f_ffff;
    while at < start + len {
        pagemap
            .read_exact_at(&mut entries, at / 4096 * 8)
            .map_err(failed())?;
        // Bit 63: present; 62: swapped. Both need a table.
        let any = entries
            .as_chunks::<8>()
            .0
            .iter()
            .any(|entry| entry[7] & 0xc0 != 0);
        if any {
            tables += 4096;
            if last_gib.replace(at >> 30) != Some(at >> 30) {
                tables += 4096;
            }
        }
        at += 2 << 20;
    }
    Ok(tables)
}

/// Records the peak memory of this process.
pub(crate) struct Watcher {
    over: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts sampling, every 2 ms.
    pub(crate) fn start() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let most = Arc::new(AtomicU64::new(0));
        let (seen, stop) = (Arc::clone(&most), Arc::clone(&over));
        let watch = move || {
            while !stop.load(Relaxed) {
                seen.fetch_max(Held::now().bytes(), Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(watch);
        Self {
            over,
            most,
            thread: thread.ok(),
        }
    }

    /// Stops watching and returns the highest use that was seen, in bytes.
    pub(crate) fn stop(mut self) -> u64 {
        self.over.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.most.load(Relaxed).max(Held::now().bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_status() {
        let status =
            "VmPTE:\t      44 kB\nRssAnon:\t     100 kB\nRssFile:\t 9 kB\nRssShmem:\t       8 kB\n";
        let held = Held::parse(status);
        assert_eq!((held.resident, held.tables), (108 << 10, 44 << 10));
        assert!(Held::now().resident > 0);
    }

    #[test]
    fn anonymous_memory_is_counted_by_mapping() {
        let smaps = "1000-3000 rw-p 0 00:00 0\nRss: 8 kB\nAnonymous:   8 kB\nVmFlags: rd\n\
                     3000-5000 rw-p 0 00:00 0 [heap]\nAnonymous:   4 kB\n5000-6000 r--p 0 00:00 0\nAnonymous: 2 kB\n";
        assert_eq!(resident_in(smaps, 0x1000, 0x5000), 12 << 10);
        assert_eq!(resident_in(smaps, 0x5000, 0x6000), 2 << 10);
        assert_eq!(resident_in(smaps, 0x6000, 0x7000), 0);
    }

    #[test]
    fn child_process_is_counted_with_its_parent() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 60 & echo; while :; do :; done"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let mut found = family(pid);
        while cpu_seconds_of(pid) < 0.01 {}
        let held = Held::of_process(pid).bytes();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            family(std::process::id()).first() == Some(&std::process::id()),
            "a process is of its own family"
        );
        assert_eq!((found.len(), found.remove(0)), (2, pid));
        let sleeping = i32::try_from(found[0]).unwrap();
        // SAFETY: the call kills the process that the shell started here, which is not waited for.
        unsafe { libc::kill(sleeping, libc::SIGKILL) };
        assert!(held > 0);
    }

    #[test]
    fn busy_loop_costs_processor_time() {
        let before = cpu_seconds(Who::Own);
        let mut sum = 0_u64;
        while cpu_seconds(Who::Own) - before < 0.01 {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(sum > 0);
    }
}
