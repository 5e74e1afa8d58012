//! VMMs that lie, stall and do what no VMM does, beside honest ones, none of which may notice.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};

use crate::footprint::{Footprint, IDLE_SOCKETS, process_with};
use crate::scene::{HANG_TIMEOUT, Scene, end_of, ends_within};

const PAGES: u64 = 1024;
/// Number of simultaneous liars.
const AT_ONCE: u64 = 3;
/// Time limit that only a liar exceeds that hangs or has stopped itself.
const LIARS_TIME: Duration = Duration::from_secs(2);
/// Time limit of liars whose behaviour was given by name.
const LIAR_TIMEOUT: Duration = Duration::from_secs(20);

/// A daemon, and its footprint when idle.
struct Watched {
    scene: Scene,
    control: PathBuf,
    raw: PathBuf,
    processes: Vec<(&'static str, Pid, Footprint)>,
}

impl Watched {
    fn new(options: &[&str]) -> Self {
        let mut scene = Scene::with_pages(PAGES, Shares::MIXED);
        let control = scene.folder.path().join("control");
        let raw = scene.folder.path().join("raw");
        let mark = scene.folder.path().display().to_string();
        let mut all = vec!["--handshake-timeout", "5", "--control"];
        all.push(control.to_str().expect("output is not UTF-8"));
        all.extend(options);
        scene.serve_with(&all, &[("SNAPRESTORE_TEST", &mark)]);
        let mut watched = Self {
            scene,
            control,
            raw,
            processes: Vec::new(),
        };
        let _ = watched.list();
        // This opens the snapshot.
        assert_eq!(watched.honest(&[]), Ok(()));
        let guardian = process_with(&format!("SNAPRESTORE_TEST={mark}"), "guardian");
        let worker = watched.scene.worker().expect("no worker runs");
        let named = [
            ("supervisor", watched.scene.supervisor()),
            ("worker", worker),
            ("guardian", guardian.expect("no guardian runs")),
        ];
        let idle = named.into_iter().zip(IDLE_SOCKETS);
        let idle =
            idle.map(|((name, pid), sockets)| (name, pid, Footprint::at_rest(name, pid, sockets)));
        watched.processes = idle.collect();
        watched
    }

    fn list(&self) -> Value {
        let mut ctl = snaprestore(["ctl", "list", "--json", "--control"]);
        Run::to_end(ctl.arg(&self.control)).exits(0).json()
    }

    /// Runs a liar to its end, or for a limited time. Returns its output.
    fn lie(&self, words: &[String]) -> String {
        let (mut liar, said) = self.liar(words);
        let by_seed = words.len() == 1;
        ends_within(&mut liar, if by_seed { LIARS_TIME } else { LIAR_TIMEOUT });
        end_group(liar);
        fs::read_to_string(&said).expect("what it said")
    }

    /// Starts a liar, and returns the path of the file with its output.
    fn liar(&self, words: &[String]) -> (Child, PathBuf) {
        let name = format!("said-{}", words.join("-"));
        let said = self.scene.folder.path().join(name);
        let mut liar = Command::new(env!("CARGO_BIN_EXE_lying-vmm"));
        liar.arg(self.scene.socket())
            .arg(&self.raw)
            .args(words)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&said).expect("a file"))
            .stderr(Stdio::null());
        (liar.spawn().expect("cannot start a liar"), said)
    }

    /// Runs an honest VM, which must read the right memory.
    fn honest(&self, options: &[&str]) -> Result<(), String> {
        let mut vmm = self.scene.vmm(options);
        let mut vmm = vmm
            .stdin(Stdio::null())
            .spawn()
            .expect("cannot start a VMM");
        if !ends_within(&mut vmm, HANG_TIMEOUT) {
            let _ = vmm.kill();
            return Err(format!("an honest VM waits: {options:?}"));
        }
        let run = Run::finish(vmm);
        let said = String::from_utf8_lossy(&run.out).into_owned();
        if run.code == Some(0) && said == format!("{PAGES} pages right\n") {
            return Ok(());
        }
        Err(format!(
            "an honest VM: {:?} {:?} {said}",
            run.code, run.signal
        ))
    }

    /// Asserts everything that a liar must leave unchanged.
    fn assert_unharmed(self, about: &str) {
        assert_eq!(self.honest(&[]), Ok(()), "{about}");
        let list = self.list();
        assert_eq!(list["worker_restarts"], 0, "{about}: {}", self.scene.said());
        for (name, pid, idle) in &self.processes {
            idle.comes_back(name, *pid, about);
        }
        let mut scene = self.scene;
        let _ = scene.stop();
    }
}

/// Kills the rest of its process group, including children.
fn end_group(mut leader: Child) {
    let group = Pid::from_raw(i32::try_from(leader.id()).expect("PID out of range"));
    let _ = killpg(group, Signal::SIGKILL);
    let _ = leader.wait();
}

/// Returns a number from the environment, which allows longer runs than the default.
fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect(name))
}

#[test]
fn random_liars_harm_only_themselves() {
    let first = number("SNAPRESTORE_LIES_SEED", 1);
    let count = number("SNAPRESTORE_LIES", 120);
    let watched = Watched::new(&["--prefetch", "off"]);
    let next = AtomicU64::new(first);
    let over = AtomicBool::new(false);
    let harm = Mutex::new(None::<String>);
    let harmed = || harm.lock().expect("another thread panicked").is_some();
    let running = Mutex::new(Vec::<u64>::new());
    let now = || running.lock().expect("another thread panicked").clone();
    std::thread::scope(|scope| {
        let liars: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                scope.spawn(|| {
                    while !harmed() {
                        let seed = next.fetch_add(1, SeqCst);
                        if seed >= first + count {
                            return;
                        }
                        running.lock().expect("another thread panicked").push(seed);
                        let _ = watched.lie(&[seed.to_string()]);
                        let mut running = running.lock().expect("another thread panicked");
                        running.retain(|other| *other != seed);
                    }
                })
            })
            .collect();
        for options in [
            &["--threads", "2", "--discard"][..],
            &["--split", "700", "--move", "--manner", "v1.7"],
        ] {
            let (watched, over, harm, now) = (&watched, &over, &harm, &now);
            scope.spawn(move || {
                while !over.load(SeqCst) {
                    if let Err(what) = watched.honest(options) {
                        let told = format!("{what}, beside the seeds {:?}", now());
                        *harm.lock().expect("another thread panicked") = Some(told);
                        return;
                    }
                }
            });
        }
        while liars.iter().any(|liar| !liar.is_finished()) {
            std::thread::sleep(Duration::from_millis(100));
        }
        over.store(true, SeqCst);
    });
    let harm = harm.into_inner().expect("another thread panicked");
    assert_eq!(harm, None, "{}", watched.scene.said());
    let told = format!("the seeds from {first} on, {count} of them");
    watched.assert_unharmed(&told);
}

/// Runs a liar of the given behaviour, with options for the daemon, and checks that it harms
/// nothing else.
fn leaves_others_alone(words: &[&str], options: &[&str]) {
    let watched = Watched::new(options);
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let said = watched.lie(&words);
    assert!(said.contains(&words[0]), "{said}");
    watched.assert_unharmed(&words.join(" "));
}

/// Regression: the supervisor could not pass so many regions to the worker, and gave up all its
/// VMs.
#[test]
fn thousands_of_regions_harm_no_other_vm() {
    leaves_others_alone(&["VeryManyRegions"], &[]);
    leaves_others_alone(&["ManyRegions", "Touch"], &[]);
}

/// Regression: a thread of the worker blocked forever in a read, with everything that it held, and
/// could not be stopped.
#[test]
fn blocking_userfaultfd_keeps_no_thread() {
    let watched = Watched::new(&["--prefetch", "off"]);
    let clear = ["ClearNonblocking"; 3];
    // Repeated, because a read is not always in progress at the right moment.
    for others in [["Touch", "Discard"], ["Touch", "Blocking"]].repeat(3) {
        let words = clear.iter().chain(&others).map(|word| (*word).to_owned());
        let _ = watched.lie(&words.collect::<Vec<_>>());
    }
    watched.assert_unharmed("cleared flags");
}

/// Regression: the userfaultfds of the children stayed open in the worker.
#[test]
fn reported_forks_leave_nothing_behind() {
    leaves_others_alone(&["Forks", "Fork", "Touch"], &[]);
}

/// Regression: the sessions of one process, each with its threads, were not limited.
#[test]
fn process_has_a_bounded_number_of_vms() {
    let watched = Watched::new(&["--prefetch", "off"]);
    // The liar must live until all connections have been made.
    let words = ["times=100", "Touch", "seconds=600"].map(str::to_owned);
    let (liar, _) = watched.liar(&words);
    watched.scene.wait_for("already has 16 VMs", 84);
    end_group(liar);
    watched.assert_unharmed("100 connections");
}

/// Regression: a worker was considered stuck, and killed, when one VM caused every install to be
/// repeated.
#[test]
fn storm_of_discards_is_not_a_stuck_worker() {
    let storm = [
        "DiscardStorm",
        "DiscardStorm",
        "DiscardStorm",
        "Touch",
        "seconds=9",
    ];
    leaves_others_alone(&storm, &["--prefetch", "off", "--stuck-after", "4"]);
}

/// Regression: the thread that closed the file waited for the liar and could not be killed, so the
/// worker could not be replaced.
#[test]
fn unclosable_file_delays_no_other_vm() {
    if !can_mount("unclosable_file_delays_no_other_vm") {
        return;
    }
    let watched = Watched::new(&["--prefetch", "off"]);
    let words = ["Fuse", "seconds=600"].map(str::to_owned);
    let (liar, _) = watched.liar(&words);
    watched.scene.wait_for("instead of a userfaultfd", 1);
    for _ in 0..3 {
        assert_eq!(watched.honest(&[]), Ok(()));
    }
    let _ = watched.list();
    end_group(liar);
    watched.assert_unharmed("a file that can't be closed");
}

/// Regression: each such file cost a thread and some descriptors, without a limit.
#[test]
fn unclosable_files_are_accepted_up_to_a_limit() {
    if !can_mount("unclosable_files_are_accepted_up_to_a_limit") {
        return;
    }
    let watched = Watched::new(&["--prefetch", "off"]);
    let words = ["Fuse", "times=40", "seconds=600"].map(str::to_owned);
    let (liar, _) = watched.liar(&words);
    watched.scene.wait_for("already has 16 VMs", 24);
    assert_eq!(
        watched
            .scene
            .said()
            .matches("instead of a userfaultfd")
            .count(),
        16
    );
    assert_eq!(watched.honest(&[]), Ok(()));
    end_group(liar);
    watched.assert_unharmed("files that can't be closed");
}

/// There are enough liars that none of them exceeds the limit per process.
#[test]
fn vm_behind_unclosable_files_is_served_later() {
    if !can_mount("vm_behind_unclosable_files_is_served_later") {
        return;
    }
    let watched = Watched::new(&["--prefetch", "off"]);
    let words = ["Fuse", "times=13", "seconds=600"].map(str::to_owned);
    let liars: Vec<_> = (0..5).map(|_| watched.liar(&words).0).collect();
    watched.scene.wait_for("instead of a userfaultfd", 64);
    let honest = watched.scene.vmm(&[]).spawn().expect("cannot start a VMM");
    liars.into_iter().for_each(end_group);
    let _ = end_of(honest).exits(0);
    watched.assert_unharmed("files that can't be closed");
}

fn can_mount(test: &str) -> bool {
    if let Err(error) = fs::File::options().write(true).open("/dev/fuse") {
        skipped(test, &format!("/dev/fuse: {error}"));
        return false;
    }
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skipped(test, &"it needs root, to mount a file system");
    }
    root
}
