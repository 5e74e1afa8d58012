//! A process with unusual memory for the tests that snapshot a live process. It is this test
//! program, started again.

use std::collections::HashMap;
use std::ffi::c_void;
use std::io::{BufRead as _, BufReader, Write as _};
use std::num::NonZeroUsize;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};

use crate::common::states;

/// Variable that makes this program the owner.
const ROLE: &str = "SNAPRESTORE_TEST_OWNER";
/// Number of threads besides the main one.
const THREADS: usize = 8;

/// The started process. It exits when this is dropped, or when the test ends.
pub(crate) struct Owner {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<std::process::ChildStdout>,
    places: HashMap<String, u64>,
}

impl Owner {
    pub(crate) fn start() -> Self {
        Self::in_role("all")
    }

    /// Starts an owner without vast mappings, which gcore would write out in full.
    pub(crate) fn small() -> Self {
        Self::in_role("small")
    }

    /// Starts an owner with more noise than a writer may have in memory: it can't be read to the
    /// end while nobody takes the output.
    pub(crate) fn large() -> Self {
        Self::in_role("large")
    }

    /// Starts a small owner with a thread that waits in the kernel for the process
    /// `place("child")`.
    pub(crate) fn vfork() -> Self {
        Self::in_role("vfork")
    }

    /// Starts a process that only runs this program again, from one of its threads after the other.
    pub(crate) fn restless() -> Child {
        command("restless").stdout(Stdio::null()).spawn().unwrap()
    }

    fn in_role(role: &str) -> Self {
        let mut child = command(role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut owner = Self {
            commands: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()),
            child,
            places: HashMap::new(),
        };
        loop {
            let line = owner.answer();
            match line.split_once(' ') {
                None => break,
                Some((name, place)) => {
                    owner.places.insert(name.into(), place.parse().unwrap());
                }
            }
        }
        owner
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the address of the memory that the owner calls `name`.
    pub(crate) fn place(&self, name: &str) -> u64 {
        self.places[name]
    }

    /// Returns the content of the place `pattern`.
    pub(crate) fn pattern() -> Vec<u8> {
        (0..64_u8).flat_map(|page| [page ^ 0x5a; 4096]).collect()
    }

    /// Queries the iterations of each thread. The owner answers only while it runs.
    pub(crate) fn rounds(&mut self) -> Vec<u64> {
        self.ask("rounds")
            .split(' ')
            .map(|count| count.parse().unwrap())
            .collect()
    }

    /// Returns the number of SIGUSR1 received, read from the owner's memory, even while it is
    /// stopped.
    pub(crate) fn user_signals(&self) -> u64 {
        let memory = std::fs::File::open(format!("/proc/{}/mem", self.pid())).unwrap();
        let mut count = [0; 8];
        let place = self.place("user_signals");
        std::os::unix::fs::FileExt::read_exact_at(&memory, &mut count, place).unwrap();
        u64::from_le_bytes(count)
    }

    /// Queries the number of real-time signals received.
    pub(crate) fn signals(&mut self) -> u64 {
        self.ask("signals").parse().unwrap()
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.commands, "{what}").unwrap();
        self.answer()
    }

    /// Returns the next line of the owner; the test harness prints some of its own.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(
                self.answers.read_line(&mut line).unwrap() > 0,
                "the owner ended"
            );
            if let Some((_, answer)) = line.split_once("owner: ") {
                return answer.trim_end().to_owned();
            }
        }
    }

    /// Returns the state letters of all its threads.
    pub(crate) fn states(&self) -> String {
        states(self.pid())
    }
}

/// Returns the command that starts this program as an owner.
fn command(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "owner::owner_process",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(ROLE, role);
    command
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn map(bytes: usize, protection: ProtFlags, flags: MapFlags) -> NonNull<c_void> {
    let length = NonZeroUsize::new(bytes).unwrap();
    // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
    unsafe { mmap_anonymous(None, length, protection, flags) }.unwrap()
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);
static USER_SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_signal(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn count_user_signal(_: i32) {
    USER_SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Starts a child for which the calling thread waits in the kernel, as after `vfork`, until the
/// child is killed. Reports its process id first.
fn wait_for_a_child(tell: impl Fn(i32)) {
    let mut told = [0; 2];
    // SAFETY: the kernel writes two descriptors to the array.
    assert_eq!(unsafe { libc::pipe(told.as_mut_ptr()) }, 0);
    let [read, write] = told;
    let teller = std::thread::spawn(move || {
        let mut pid = [0; 4];
        // SAFETY: the kernel writes at most four bytes to the array.
        let count = unsafe { libc::read(read, pid.as_mut_ptr().cast(), 4) };
        assert_eq!(count, 4);
        i32::from_le_bytes(pid)
    });
    std::thread::spawn(move || {
        let flags = libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: without a stack and without CLONE_VM it is a fork: the child has memory of its
        // own, in which it does nothing but system calls.
        unsafe {
            if libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                let pid = libc::getpid().to_le_bytes();
                libc::write(write, pid.as_ptr().cast(), 4);
                loop {
                    libc::pause();
                }
            }
        }
    });
    tell(teller.join().unwrap());
}

#[expect(
    clippy::print_stdout,
    reason = "the answers to the test that started this process"
)]
fn tell(text: &str) {
    println!("owner: {text}");
}

/// Runs the owner if this was started by a test; otherwise not a test.
#[test]
fn owner_process() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    if role == "restless" {
        use std::os::unix::process::CommandExt as _;
        // A thread other than the main one takes its place. The kernel kills the threads beside it.
        for _ in 0..3 {
            std::thread::spawn(|| {
                loop {
                    std::thread::sleep(std::time::Duration::from_micros(50));
                }
            });
        }
        let error = std::thread::spawn(|| command("restless").exec()).join();
        panic!("{error:?}");
    }
    let is_small = matches!(role.as_str(), "small" | "vfork");
    let vast = |bytes| if is_small { 1 << 20 } else { bytes };
    let read_write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let private = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    let tell_place = |name: &str, place: NonNull<c_void>| {
        tell(&format!("{name} {}", place.as_ptr() as u64));
    };
    let fill = |place: NonNull<c_void>, bytes: &[u8]| {
        // SAFETY: every mapping below is longer than what is written to it, and nobody else
        // knows it yet.
        unsafe {
            place
                .cast::<u8>()
                .as_ptr()
                .copy_from(bytes.as_ptr(), bytes.len());
        };
    };

    let pattern = map(64 * 4096, read_write, private);
    fill(pattern, &Owner::pattern());
    tell_place("pattern", pattern);

    if role == "large" {
        let noise = map(160 << 20, read_write, private);
        fill(noise, &crate::common::noise(160 << 20));
    }

    // Large memory of which little was touched.
    let sparse = map(vast(1 << 32), read_write, private);
    fill(sparse, &[1]);
    tell_place("sparse", sparse);

    // Address space that is only reserved, and a page that is no longer readable.
    tell_place(
        "reserved",
        map(vast(1 << 40), ProtFlags::PROT_NONE, private),
    );
    let hidden = map(3 * 4096, read_write, private);
    fill(hidden, &[0x77; 4096]);
    // SAFETY: the range is a mapping of ours that nothing uses.
    unsafe { nix::sys::mman::mprotect(hidden, 3 * 4096, ProtFlags::PROT_NONE) }.unwrap();
    tell_place("hidden", hidden);

    // Reserved as sanitizers do, with one page touched in its middle. Neighbours of another kind
    // keep it a mapping of its own.
    let vast_memory = map(vast(1 << 40), read_write, private);
    // SAFETY: half of the mapping's length lies within it, at the begin of a page.
    let middle = unsafe { vast_memory.byte_add(vast(1 << 40) / 2) };
    fill(middle, &[0x55; 4096]);
    tell_place("vast", vast_memory);
    tell_place("middle", middle);

    let shared = map(8 << 20, read_write, MapFlags::MAP_SHARED);
    fill(shared, &[0x33; 4096]);
    tell_place("shared", shared);

    // Shared memory of which little was touched.
    let untouched = map(vast(1 << 30), read_write, MapFlags::MAP_SHARED);
    fill(untouched, &[0x66; 4096]);
    tell_place("untouched", untouched);

    // A file that became shorter than its mapping.
    let shrunk = tempfile::tempfile().unwrap();
    shrunk.set_len(4 * 4096).unwrap();
    let length = NonZeroUsize::new(4 * 4096).unwrap();
    // SAFETY: a fresh mapping replaces nothing; what is cut off below is not touched afterwards.
    let cut = unsafe { mmap(None, length, read_write, MapFlags::MAP_SHARED, &shrunk, 0) }.unwrap();
    fill(cut, &[0x44; 4096]);
    shrunk.set_len(4096).unwrap();
    tell_place("cut", cut);

    // SAFETY: the handler only counts.
    unsafe {
        let handler = count_signal as extern "C" fn(i32) as libc::sighandler_t;
        libc::signal(libc::SIGRTMIN(), handler);
        let handler = count_user_signal as extern "C" fn(i32) as libc::sighandler_t;
        libc::signal(libc::SIGUSR1, handler);
    }
    tell(&format!("user_signals {}", USER_SIGNALS.as_ptr() as u64));
    if role == "vfork" {
        wait_for_a_child(|pid| tell(&format!("child {pid}")));
    }

    let rounds: &'static [AtomicU64] = Vec::leak((0..THREADS).map(|_| AtomicU64::new(0)).collect());
    for round in rounds {
        std::thread::spawn(move || {
            loop {
                round.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
    }
    tell("ready");
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "rounds" => {
                let counts: Vec<_> = rounds
                    .iter()
                    .map(|round| round.load(Ordering::Relaxed).to_string())
                    .collect();
                tell(&counts.join(" "));
            }
            "signals" => tell(&SIGNALS.load(Ordering::Relaxed).to_string()),
            other => panic!("{other:?}"),
        }
    }
}
