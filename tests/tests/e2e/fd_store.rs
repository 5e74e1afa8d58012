//! Custody of the VMs' memory when the daemon dies. The daemon is a stand-in that has the memory
//! held and serves nothing, so every VM waits at its first page.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::Shares;
use snaprestore_tests::program;

use crate::manager::FakeManager;
use crate::scene::{HANG_TIMEOUT, Scene, within};

const PAGES: u64 = 512;

/// A process whose output is read line by line.
struct Talker {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

/// Creates a memory without a page of zeros, and its snapshot.
fn scene() -> Scene {
    Scene::with_pages(PAGES, Shares::RANDOM)
}

/// Returns the command of the supervisor, in a process group of its own.
fn stand_in(scene: &Scene) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stand-in-supervisor"));
    command.arg(program::program());
    command.arg(scene.socket()).arg(&scene.snapshot);
    for variable in ["NOTIFY_SOCKET", "FDSTORE", "LISTEN_FDS"] {
        command.env_remove(variable);
    }
    command.process_group(0);
    command
}

/// Starts a VM that has handed its memory over to the supervisor and waits at its first page. It
/// keeps no descriptor: if no other process has one, it reads zeros.
fn waiting_vm(scene: &Scene) -> Child {
    let mut command = scene.vmm(&["--let-go"]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::inherit());
    command.spawn().expect("cannot start a VM")
}

impl Talker {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("cannot start the process");
        let lines = BufReader::new(child.stdout.take().expect("no pipe to the child")).lines();
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        let line = self.lines.next().expect("process printed nothing");
        line.expect("output is not UTF-8")
    }

    #[track_caller]
    fn says(&mut self, expected: &str) {
        assert_eq!(self.line(), expected);
    }

    fn ask(&mut self, what: &str) -> String {
        let stdin = self.child.stdin.as_mut().expect("no pipe to the child");
        writeln!(stdin, "{what}").expect("cannot reach the process");
        self.line()
    }

    /// Returns the process id of the guardian, as printed by the supervisor.
    fn guardian(&mut self) -> Pid {
        let line = self.line();
        let pid = line.strip_prefix("held by guardian ").expect(&line);
        Pid::from_raw(pid.parse().expect("PID out of range"))
    }

    fn kill_group(&mut self) {
        killpg(pid(&self.child), Signal::SIGKILL).expect("cannot kill the process");
        self.child.wait().expect("cannot wait for the process");
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("PID out of range"))
}

/// Returns whether a process runs. An exited process may not have been reaped, and does not count.
fn runs(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
    state.is_some_and(|state| state != b'Z')
}

#[track_caller]
fn wait_until(what: &str, done: impl FnMut() -> bool) {
    assert!(within(HANG_TIMEOUT, done), "timed out: {what}");
}

/// Waits until the VM whose memory the process `supervisor` holds waits for a page.
fn wait_for_fault(supervisor: Pid) {
    wait_until("the VM touches a page", || {
        let open = fs::read_dir(format!("/proc/{supervisor}/fdinfo"))
            .expect("process exited unexpectedly");
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
    let call = fs::read_to_string(format!("/proc/{guardian}/syscall"))
        .expect("process exited unexpectedly");
    let number = call
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok());
    let open = fs::read_dir(format!("/proc/{guardian}/fd")).expect("process exited unexpectedly");
    let mut links = open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    let has_socket = links.any(|link| link.to_string_lossy().starts_with("socket:"));
    !has_socket && number.is_some_and(|number: i64| calls.contains(&number))
}

/// Waits for a VM to exit.
fn end_of(vm: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("the VM exits", || {
        status = vm.try_wait().expect("cannot reach the process");
        status.is_some()
    });
    status.expect("process has not exited")
}

#[test]
fn killed_process_group_kills_vms_before_zeros_appear() {
    let scene = scene();
    let mut supervisor = Talker::start(stand_in(&scene));
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    let mut vm = waiting_vm(&scene);
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    // Signals that terminate services, and those that a terminal sends.
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        kill(guardian, signal).expect("cannot send the signal");
    }
    let link = |fd: &str| {
        fs::read_link(format!("/proc/{guardian}/fd/{fd}")).expect("cannot read the link")
    };
    for fd in ["0", "1", "2"] {
        assert_eq!(link(fd), Path::new("/dev/null"));
    }
    wait_until("the guardian holds it", || {
        let open =
            fs::read_dir(format!("/proc/{guardian}/fd")).expect("guardian exited unexpectedly");
        open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
            .any(|link| link == Path::new("anon_inode:[userfaultfd]"))
    });
    supervisor.kill_group();
    let end = end_of(&mut vm);
    assert_eq!(end.signal(), Some(libc::SIGKILL), "{end}");
    wait_until("the guardian exits", || !runs(guardian));
}

/// Messages sent before the supervisor's death are read after it: a guardian that was stopped in
/// between finds both.
#[test]
fn stopped_guardian_kills_stored_vm_when_it_resumes() {
    let scene = scene();
    let mut supervisor = Talker::start(stand_in(&scene));
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    kill(guardian, Signal::SIGSTOP).expect("cannot stop the process");
    let mut vm = waiting_vm(&scene);
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    supervisor.kill_group();
    assert!(vm.try_wait().expect("cannot reach the process").is_none());
    kill(guardian, Signal::SIGCONT).expect("cannot continue the process");
    let end = end_of(&mut vm);
    assert_eq!(end.signal(), Some(libc::SIGKILL), "{end}");
    wait_until("the guardian exits", || !runs(guardian));
}

/// Shows that the other tests detect failures: without a guardian, such a VM reads zeros. Also, the
/// supervisor learns that it no longer has a guardian.
#[test]
fn lost_guardian_is_reported_and_vm_reads_zeros() {
    let scene = scene();
    let mut supervisor = Talker::start(stand_in(&scene));
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    let mut vm = waiting_vm(&scene);
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    kill(guardian, Signal::SIGKILL).expect("cannot kill the process");
    assert_eq!(supervisor.ask("news"), "[GuardianExited]");
    supervisor.kill_group();
    assert_eq!(end_of(&mut vm).code(), Some(1));
}

#[test]
fn released_vm_is_not_killed() {
    let scene = scene();
    let mut supervisor = Talker::start(stand_in(&scene));
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    let mut vm = waiting_vm(&scene);
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    assert_eq!(supervisor.ask("release"), "released");
    supervisor.kill_group();
    wait_until("the guardian exits", || !runs(guardian));
    // The release was requested by the test only, and no process serves the VM: it reads zeros and
    // exits by itself.
    assert_eq!(end_of(&mut vm).code(), Some(1));
}

/// The supervisor runs as nobody and the VM as root: the guardian can't kill the VM, and keeps
/// running so that the VM waits.
#[test]
fn unkillable_vm_waits_and_never_reads_zeros() {
    let test = "unkillable_vm_waits_and_never_reads_zeros";
    if !nix::unistd::geteuid().is_root() {
        return skipped(test, &"it needs root, to have a VM of another user");
    }
    let scene = scene();
    scene.share_folder(0o777);
    // A place where the user nobody may run them.
    let (supervisor, program) = (scene.path("supervisor"), scene.path("program"));
    fs::copy(env!("CARGO_BIN_EXE_stand-in-supervisor"), &supervisor)
        .expect("cannot copy the program");
    fs::copy(program::program(), &program).expect("cannot copy the program");
    let mut command = Command::new(supervisor);
    command.arg(program).arg(scene.socket());
    command.arg(&scene.snapshot).current_dir("/");
    command.process_group(0).uid(65534).gid(65534);
    let mut supervisor = Talker::start(command);
    let guardian = supervisor.guardian();
    supervisor.says("listening");
    let mut vm = waiting_vm(&scene);
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    supervisor.kill_group();
    // The guardian has read everything and tried to kill the VM; it waits for the VM's exit.
    wait_until("the guardian waits", || {
        is_in_poll_without_supervisor(guardian)
    });
    assert!(
        vm.try_wait().expect("cannot reach the process").is_none(),
        "it waits"
    );
    vm.kill().expect("cannot kill the process");
    vm.wait().expect("cannot wait for the process");
    wait_until("the guardian exits", || !runs(guardian));
}

#[test]
fn guardian_leaves_the_cgroup_that_is_killed() {
    let test = "guardian_leaves_the_cgroup_that_is_killed";
    let mounts = fs::read_to_string("/proc/self/mounts").expect("cannot read the mounts");
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
    let scene = scene();
    let supervisor = stand_in(&scene);
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
    let mut vm = waiting_vm(&scene);
    supervisor.says("held");
    wait_for_fault(pid(&supervisor.child));
    let of = fs::read_to_string(format!("/proc/{guardian}/cgroup"))
        .expect("cannot read the cgroup of the guardian");
    assert!(!of.contains("/supervisor"), "{of}");
    fs::write(cgroup.join("cgroup.kill"), "1").expect("cannot kill the process");
    let end = end_of(&mut vm);
    assert_eq!(end.signal(), Some(libc::SIGKILL), "{end}");
    wait_until("the guardian exits", || !runs(guardian));
    let _ = supervisor.child.wait();
    wait_until("the cgroup is empty", || fs::remove_dir(&cgroup).is_ok());
    let _ = fs::remove_dir(&outer);
}

#[test]
fn stored_vm_is_served_by_the_next_supervisor() {
    let scene = scene();
    let notify = scene.path("notify");
    let mut manager = FakeManager::at(&notify);
    let with_manager = |mut command: Command, room: &str| {
        command.env("NOTIFY_SOCKET", &notify).env("FDSTORE", room);
        command
    };
    let mut supervisor = Talker::start(with_manager(stand_in(&scene), "16"));
    supervisor.says("held by systemd, for 16 descriptors");
    supervisor.says("listening");
    let mut vm = waiting_vm(&scene);
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
    assert!(
        vm.try_wait().expect("cannot reach the process").is_none(),
        "it waits"
    );

    let next = manager.start(&stand_in(&scene));
    let mut supervisor = Talker::start(with_manager(next, "16"));
    supervisor.says("given some.socket");
    supervisor.says("held by systemd, for 16 descriptors");
    supervisor.says("given vm-1: uffd owner meta");
    assert_eq!(end_of(&mut vm).code(), Some(0), "every page is right");
    // Everything may have been restored before the VM exited.
    let ended = supervisor.line();
    assert!(
        ["ended: Exited", "ended: Complete"].contains(&ended.as_str()),
        "{ended}"
    );
    supervisor.says("released vm-1");
    for _ in 0..3 {
        manager.take_one();
    }
    assert_eq!(manager.names(), [""; 0]);
}

#[test]
fn full_descriptor_store_is_an_error() {
    let scene = scene();
    let notify = OsString::from(scene.path("notify"));
    let _manager = FakeManager::at(Path::new(&notify));
    let mut command = stand_in(&scene);
    command.env("NOTIFY_SOCKET", &notify).env("FDSTORE", "2");
    let mut supervisor = Talker::start(command);
    supervisor.says("held by systemd, for 2 descriptors");
    supervisor.says("listening");
    let mut vm = waiting_vm(&scene);
    supervisor
        .says("not held: the descriptor store is full; raise FileDescriptorStoreMax= (now 2)");
    vm.kill().expect("cannot kill the process");
    vm.wait().expect("cannot wait for the process");
}
