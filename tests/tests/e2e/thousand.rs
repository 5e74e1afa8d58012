//! A daemon that has served a thousand VMs holds no more than one that has served none.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program::{Run, snaprestore};

use crate::footprint::{Footprint, IDLE_SOCKETS, Mapped, process_with};
use crate::scene::Scene;

const PAGES: u64 = 256;
const SESSIONS: usize = 1000;
/// Number of VMs after which all memory that is kept for reuse has been allocated.
const WARM: usize = 150;
/// Number of simultaneous VMs.
const AT_ONCE: usize = 4;
/// Number of workers that are killed.
const KILLS: usize = 5;
/// Settings that return freed memory to the kernel instead of keeping it between live allocations.
/// Growth is then memory that was not freed.
const STRICT_HEAP: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "16384"),
    ("MALLOC_TRIM_THRESHOLD_", "16384"),
];
/// Maximum growth of the memory of supervisor, worker and guardian, in KiB. The supervisor keeps
/// the summaries of the first ten thousand VMs. The worker's heap has holes, up to 3 MiB whatever
/// the number of VMs. So the test detects leaks of more than half a KiB per VM in the supervisor, 7
/// KiB in the worker and 80 bytes in the guardian.
const MORE_KIB: [u64; 3] = [425, 6000, 64];
/// Additional mappings allowed, because the stacks of exited threads are kept for reuse.
const MORE_MAPPINGS: usize = 40;

/// Way in which a VM ends.
#[derive(Clone, Copy)]
enum End {
    /// The VM exits after it has touched everything.
    Complete,
    /// The VM exits by itself before it has all of its memory.
    Early,
    /// The VM is killed by SIGKILL before it has all of its memory.
    Killed,
    /// The memory has another size than the snapshot, so the daemon kills the VM.
    Misfit,
    /// The VM closes its socket in the middle of its message.
    HangsUp,
}

impl End {
    const ALL: [Self; 5] = [
        Self::Complete,
        Self::Early,
        Self::Killed,
        Self::Misfit,
        Self::HangsUp,
    ];

    /// Runs one VM, and checks that it read the right memory.
    fn run(self, scene: &Scene, misfit: &std::path::Path) {
        let touch = (PAGES / 3).to_string();
        let mut vmm = match self {
            Self::Complete => scene.vmm(&["--discard"]),
            Self::Early => scene.vmm(&["--only", &touch]),
            Self::Killed => scene.vmm(&["--only", &touch, "--die"]),
            Self::Misfit => scene.vmm_of(misfit, &[]),
            Self::HangsUp => scene.vmm(&["--send", "half", "--hang-up"]),
        };
        let run = Run::to_end(&mut vmm);
        match self {
            Self::Complete => expect(run, &format!("{PAGES} pages right\n")),
            Self::Early => expect(run, &format!("{touch} pages right\n")),
            Self::HangsUp => expect(run, "hung up\n"),
            Self::Killed => {
                assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
                assert_eq!(run.out, format!("{touch} pages right\n").as_bytes());
            }
            Self::Misfit => {
                assert_eq!(run.signal, Some(libc::SIGKILL), "{}", run.err);
                assert_eq!(run.out, b"");
            }
        }
    }
}

fn expect(run: Run, said: &str) {
    assert_eq!(String::from_utf8_lossy(&run.exits(0).out), said);
}

/// The processes of a daemon that must remain when the VMs are gone.
struct Daemon {
    names: [&'static str; 3],
    processes: [Pid; 3],
    idle: [Footprint; 3],
}

impl Daemon {
    /// Records the footprints before all VMs but one.
    fn new(scene: &Scene, mark: &str) -> Self {
        let guardian = process_with(mark, "guardian").expect("no guardian runs");
        let worker = scene.worker().expect("no worker runs");
        let processes = [scene.supervisor(), worker, guardian];
        let names = ["supervisor", "worker", "guardian"];
        let idle = std::array::from_fn(|at| {
            Footprint::at_rest(names[at], processes[at], IDLE_SOCKETS[at])
        });
        Self {
            names,
            processes,
            idle,
        }
    }

    /// Waits until every VM is gone and each process holds what it held before the first.
    fn is_idle(&self) {
        for (at, idle) in self.idle.iter().enumerate() {
            idle.comes_back(self.names[at], self.processes[at], "without VMs");
        }
    }

    fn mapped(&self) -> [Mapped; 3] {
        self.processes.map(Mapped::read)
    }

    /// Asserts that its mappings have not grown beyond `before`, except for the allowed number of
    /// KiB.
    fn has_mapped_no_more_than(&self, before: &[Mapped; 3]) {
        for (at, now) in self.mapped().into_iter().enumerate() {
            let (name, before) = (self.names[at], before[at]);
            let told = format!("the {name} had {before:?} mapped, and then {now:?}");
            assert_eq!(now.memfds, before.memfds, "{told}");
            assert!(now.mappings <= before.mappings + MORE_MAPPINGS, "{told}");
            assert!(
                now.anonymous_kib <= before.anonymous_kib + MORE_KIB[at],
                "{told}"
            );
        }
    }
}

/// Runs `count` VMs, and calls `meanwhile` repeatedly until they have exited.
fn run_vms(scene: &Scene, misfit: &std::path::Path, count: usize, mut meanwhile: impl FnMut()) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, SeqCst);
                        if number >= count {
                            break;
                        }
                        End::ALL[number % End::ALL.len()].run(scene, misfit);
                    }
                })
            })
            .collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            meanwhile();
        }
    });
}

#[test]
fn thousand_vms_leave_nothing_behind() {
    let mut scene = Scene::with_pages(PAGES, Shares::MIXED);
    let misfit = scene.folder.path().join("misfit");
    std::fs::write(&misfit, vec![0; 7 * 4096]).expect("cannot write the file");
    let control = scene.folder.path().join("control");
    let mark = scene.folder.path().display().to_string();
    let options = ["--prefetch", "all", "--control"];
    let options = [
        &options[..],
        &[control.to_str().expect("output is not UTF-8")],
    ]
    .concat();
    let mut environment = STRICT_HEAP.to_vec();
    environment.push(("SNAPRESTORE_TEST", &mark));
    scene.serve_with(&options, &environment);
    let restarts = || {
        let mut ctl = snaprestore(["ctl", "list", "--json", "--control"]);
        let list = Run::to_end(ctl.arg(&control)).exits(0).json();
        list["worker_restarts"]
            .as_u64()
            .expect("number out of range")
    };
    assert_eq!(restarts(), 0);

    // The worker opens the snapshot when the first VM needs it.
    End::Early.run(&scene, &misfit);
    let mut daemon = Daemon::new(&scene, &format!("SNAPRESTORE_TEST={mark}"));
    let idle = || std::thread::sleep(Duration::from_millis(20));
    run_vms(&scene, &misfit, WARM, idle);
    daemon.is_idle();
    let warm = daemon.mapped();
    run_vms(&scene, &misfit, SESSIONS - WARM, idle);
    daemon.is_idle();
    daemon.has_mapped_no_more_than(&warm);
    assert_eq!(restarts(), 0);

    // Workers that die while serving VMs leave nothing behind in the supervisor either, and the
    // last worker is like the first.
    let mut kills = 0;
    run_vms(&scene, &misfit, WARM, || {
        std::thread::sleep(Duration::from_millis(50));
        if let Some(worker) = scene.worker().filter(|_| kills < KILLS) {
            let _ = kill(worker, Signal::SIGKILL);
            kills += 1;
        }
    });
    assert!(kills > 0);
    assert!(restarts() > 0);
    daemon.processes[1] = scene.worker().expect("no worker runs");
    daemon.is_idle();

    let mut counts = BTreeMap::<String, usize>::new();
    for vm in scene.stop() {
        let ending = vm["ending"]
            .as_str()
            .expect("output is not UTF-8")
            .to_owned();
        *counts.entry(ending).or_default() += 1;
    }
    let each = (SESSIONS + WARM) / End::ALL.len();
    // Only the first hundred bad handshakes are reported.
    assert_eq!(counts["refused"], each + each.min(100), "{counts:?}");
    let served = counts["exited"] + counts.get("complete").copied().unwrap_or(0);
    assert_eq!(served, 3 * each + 1, "{counts:?}");
}
