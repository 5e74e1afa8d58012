//! Custody of the VMs' memory when the daemon dies. The daemon is a stand-in that has the memory
//! held and serves nothing, so every VM waits at its first page.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::{Mix, Shares};
use snaprestore_tests::program::{self, Run, snaprestore};
use tempfile::TempDir;

use crate::manager::FakeManager;

const PAGES: u64 = 512;
/// Time limit that only a hang exceeds.
const PATIENCE: Duration = Duration::from_secs(120);

/// A memory without a page of zeros, and its snapshot.
struct Scene {
    folder: TempDir,
}

/// A process whose output is read line by line.
struct Talker {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Scene {
    fn new() -> Self {
        let scene = Self {
            folder: TempDir::new().expect("a folder"),
        };
        let bytes = Mix::with_shares(PAGES, 5, Shares::RANDOM).bytes();
        fs::write(scene.path("raw"), bytes).expect("written");
        let (raw, snapshot) = (scene.path("raw"), scene.path("snap"));
        let args = [
            OsStr::new("create"),
            raw.as_ref(),
            "--output".as_ref(),
            snapshot.as_ref(),
        ];
        let _ = Run::of(&mut snaprestore(args)).exits(0);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The supervisor, in a process group of its own.
    fn supervisor(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stand-in-supervisor"));
        command.arg(program::program());
        command.arg(self.path("socket")).arg(self.path("snap"));
        for variable in ["NOTIFY_SOCKET", "FDSTORE", "LISTEN_FDS"] {
            command.env_remove(variable);
        }
        command.process_group(0);
        command
    }

    /// Starts a VM that has handed its memory over to the supervisor and waits at its first page.
    /// It keeps no descriptor: if no other process has one, it reads zeros.
    fn vm(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fake-vmm"));
        command.arg(self.path("socket")).arg(self.path("raw"));
        command
            .arg("--let-go")
            .stdout(Stdio::null())
            .spawn()
            .expect("a VM")
    }
}

impl Talker {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("started");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        let line = self.lines.next().expect("it says something");
        line.expect("text")
    }

    #[track_caller]
    fn says(&mut self, expected: &str) {
        assert_eq!(self.line(), expected);
    }

    fn ask(&mut self, what: &str) -> String {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        writeln!(stdin, "{what}").expect("asked");
        self.line()
    }

    /// Returns the process id of the guardian, as printed by the supervisor.
    fn guardian(&mut self) -> Pid {
        let line = self.line();
        let pid = line.strip_prefix("held by guardian ").expect(&line);
        Pid::from_raw(pid.parse().expect("a pid"))
    }

    fn kill_group(&mut self) {
        killpg(pid(&self.child), Signal::SIGKILL).expect("killed");
        self.child.wait().expect("its end");
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a pid"))
}

/// Returns whether a process runs. An exited process may not have been reaped, and does not count.
fn runs(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
    state.is_some_and(|state| state != b'Z')
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "waiting: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the VM whose memory the process `supervisor` holds waits for a page.
fn wait_for_fault(supervisor: Pid) {
    wait_until("the VM touches a page", || {
        let open = fs::read_dir(format!("/proc/{supervisor}/fdinfo")).expect("it lives");
        let mut infos = open.filter_map(|info| fs::read_to_string(info.ok()?.path()).ok());
        infos.any(|info| {
            let pending = info.lines().find_map(|line| line.strip_prefix("pending:"));
            pending.is_some_and(|count| count.trim() != "0")
        })
    });
}

/// Returns whether a guardian has lost its supervisor and waits in poll.
fn is_in_poll_without_supervisor(guardian: Pid) -> bool {
    let calls = [
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll,
        libc::SYS_ppoll,
    ];
    let call = fs::read_to_string(format!("/proc/{guardian}/syscall")).expect("it runs");
    let number = call
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok());
    let open = fs::read_dir(format!("/proc/{guardian}/fd")).expect("it runs");
    let mut links = open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    let has_socket = links.any(|link| link.to_string_lossy().starts_with("socket:"));
    !has_socket && number.is_some_and(|number: i64| calls.contains(&number))
}

/// Waits for a VM to exit.
fn end_of(vm: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("the VM's end", || {
        status = vm.try_wait().expect("asked");
        status.is_some()
    });
    status.expect("it has ended")
}

#[test]
fn a_supervisor_that_is_killed_with_its_group_takes_its_vms_along_and_they_never_read_zeros() {
    let scene = Scene::new();
    let mut supervisor = Talker::start(scene.supervisor());
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    let mut vm = scene.vm();
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    // Signals that terminate services, and those that a terminal sends.
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        kill(guardian, signal).expect("sent");
    }
    let link = |fd: &str| fs::read_link(format!("/proc/{guardian}/fd/{fd}")).expect("a link");
    for fd in ["0", "1", "2"] {
        assert_eq!(link(fd), Path::new("/dev/null"));
    }
    wait_until("the guardian holds it", || {
        let open = fs::read_dir(format!("/proc/{guardian}/fd")).expect("the guardian lives");
        open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
            .any(|link| link == Path::new("anon_inode:[userfaultfd]"))
    });
    supervisor.kill_group();
    let end = end_of(&mut vm);
    assert_eq!(end.signal(), Some(libc::SIGKILL), "{end}");
    wait_until("the guardian's end", || !runs(guardian));
}

/// Messages sent before the supervisor's death are read after it: a guardian that was stopped in
/// between finds both.
#[test]
fn a_supervisor_may_die_as_soon_as_it_has_had_a_vm_held() {
    let scene = Scene::new();
    let mut supervisor = Talker::start(scene.supervisor());
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    kill(guardian, Signal::SIGSTOP).expect("stopped");
    let mut vm = scene.vm();
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    supervisor.kill_group();
    assert!(vm.try_wait().expect("asked").is_none());
    kill(guardian, Signal::SIGCONT).expect("goes on");
    let end = end_of(&mut vm);
    assert_eq!(end.signal(), Some(libc::SIGKILL), "{end}");
    wait_until("the guardian's end", || !runs(guardian));
}

/// Shows that the other tests detect failures: without a guardian, such a VM reads zeros. Also, the
/// supervisor learns that it no longer has a guardian.
#[test]
fn without_a_guardian_the_vm_reads_zeros_and_the_supervisor_is_told() {
    let scene = Scene::new();
    let mut supervisor = Talker::start(scene.supervisor());
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    let mut vm = scene.vm();
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    kill(guardian, Signal::SIGKILL).expect("killed");
    assert_eq!(supervisor.ask("news"), "[GuardianExited]");
    supervisor.kill_group();
    assert_eq!(end_of(&mut vm).code(), Some(1));
}

#[test]
fn a_vm_that_was_released_is_not_killed() {
    let scene = Scene::new();
    let mut supervisor = Talker::start(scene.supervisor());
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    let mut vm = scene.vm();
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    assert_eq!(supervisor.ask("release"), "released");
    supervisor.kill_group();
    wait_until("the guardian's end", || !runs(guardian));
    // The release was requested by the test only, and no process serves the VM: it reads zeros and
    // exits by itself.
    assert_eq!(end_of(&mut vm).code(), Some(1));
}

/// The supervisor runs as nobody and the VM as root: the guardian can't kill the VM, and keeps
/// running so that the VM waits.
#[test]
fn a_vm_that_may_not_be_killed_waits_and_never_reads_zeros() {
    let test = "a_vm_that_may_not_be_killed_waits_and_never_reads_zeros";
    if !nix::unistd::geteuid().is_root() {
        return skipped(test, &"it needs root, to have a VM of another user");
    }
    let scene = Scene::new();
    let everybody = fs::Permissions::from_mode(0o777);
    fs::set_permissions(scene.folder.path(), everybody).expect("set");
    // A place where the user nobody may run them.
    let (supervisor, program) = (scene.path("supervisor"), scene.path("program"));
    fs::copy(env!("CARGO_BIN_EXE_stand-in-supervisor"), &supervisor).expect("copied");
    fs::copy(program::program(), &program).expect("copied");
    let mut command = Command::new(supervisor);
    command.arg(program).arg(scene.path("socket"));
    command.arg(scene.path("snap")).current_dir("/");
    command.process_group(0).uid(65534).gid(65534);
    let mut supervisor = Talker::start(command);
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    let mut vm = scene.vm();
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    supervisor.kill_group();
    // The guardian has read everything and tried to kill the VM; it waits for the VM's exit.
    wait_until("the guardian waits", || {
        is_in_poll_without_supervisor(guardian)
    });
    assert!(vm.try_wait().expect("asked").is_none(), "it waits");
    vm.kill().expect("killed");
    vm.wait().expect("its end");
    wait_until("the guardian's end", || !runs(guardian));
}

#[test]
fn a_guardian_leaves_the_cgroup_that_is_killed() {
    let test = "a_guardian_leaves_the_cgroup_that_is_killed";
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let root = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (point, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(point))
    });
    let Some(root) = root else {
        return skipped(test, &"there are no cgroups of version 2");
    };
    let outer = root.join(format!("snaprestore-test-{}", std::process::id()));
    let cgroup = outer.join("supervisor");
    if let Err(error) = fs::create_dir_all(&cgroup) {
        return skipped(test, &format!("no cgroup can be made: {error}"));
    }
    if !cgroup.join("cgroup.kill").exists() {
        let _ = fs::remove_dir(&cgroup).and_then(|()| fs::remove_dir(&outer));
        return skipped(test, &"the kernel can't kill cgroups (Linux 5.14)");
    }
    let scene = Scene::new();
    let supervisor = scene.supervisor();
    let mut inside = Command::new("sh");
    inside
        .args(["-c", "echo $$ > \"$0\"/cgroup.procs; exec \"$@\""])
        .arg(&cgroup)
        .arg(supervisor.get_program())
        .args(supervisor.get_args());
    let mut supervisor = Talker::start(inside);
    let guardian = supervisor.guardian();
    // The supervisor prints no warning.
    supervisor.says("listening");
    let mut vm = scene.vm();
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    let of = fs::read_to_string(format!("/proc/{guardian}/cgroup")).expect("its cgroup");
    assert!(!of.contains("/supervisor"), "{of}");
    fs::write(cgroup.join("cgroup.kill"), "1").expect("killed");
    let end = end_of(&mut vm);
    assert_eq!(end.signal(), Some(libc::SIGKILL), "{end}");
    wait_until("the guardian's end", || !runs(guardian));
    let _ = supervisor.child.wait();
    wait_until("the cgroup is empty", || fs::remove_dir(&cgroup).is_ok());
    let _ = fs::remove_dir(&outer);
}

#[test]
fn what_systemd_holds_is_served_by_the_next_supervisor() {
    let scene = Scene::new();
    let notify = scene.path("notify");
    let mut manager = FakeManager::at(&notify);
    let with_manager = |mut command: Command, room: &str| {
        command.env("NOTIFY_SOCKET", &notify).env("FDSTORE", room);
        command
    };
    let mut supervisor = Talker::start(with_manager(scene.supervisor(), "16"));
    supervisor.says("held by systemd, for 16 descriptors");
    supervisor.says("listening");
    let mut vm = scene.vm();
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    for _ in 0..3 {
        manager.take_one();
    }
    assert_eq!(
        manager.names(),
        ["vm.vm-1.uffd", "vm.vm-1.owner", "vm.vm-1.meta"]
    );
    supervisor.kill_group();
    assert!(vm.try_wait().expect("asked").is_none(), "it waits");

    let next = manager.start(&scene.supervisor());
    let mut supervisor = Talker::start(with_manager(next, "16"));
    supervisor.says("given some.socket");
    supervisor.says("held by systemd, for 16 descriptors");
    supervisor.says("given vm-1: uffd owner meta");
    assert_eq!(end_of(&mut vm).code(), Some(0), "every page is right");
    // Everything may have been restored before the VM exited.
    let ended = supervisor.line();
    assert!(
        ["ended: OwnerGone", "ended: Complete"].contains(&ended.as_str()),
        "{ended}"
    );
    supervisor.says("released vm-1");
    for _ in 0..3 {
        manager.take_one();
    }
    assert_eq!(manager.names(), [""; 0]);
}

#[test]
fn a_store_that_is_full_is_an_error() {
    let scene = Scene::new();
    let notify = OsString::from(scene.path("notify"));
    let _manager = FakeManager::at(Path::new(&notify));
    let mut command = scene.supervisor();
    command.env("NOTIFY_SOCKET", &notify).env("FDSTORE", "2");
    let mut supervisor = Talker::start(command);
    supervisor.says("held by systemd, for 2 descriptors");
    supervisor.says("listening");
    let mut vm = scene.vm();
    supervisor
        .says("not held: the descriptor store is full; raise FileDescriptorStoreMax= (now 2)");
    vm.kill().expect("killed");
    vm.wait().expect("its end");
}
