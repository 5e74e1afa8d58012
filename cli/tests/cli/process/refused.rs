//! Processes that cannot be taken, and what the error names.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaprestore_fixtures::host::{Unavailable, skipped};

use super::{assert_running, skips_without_root};
use crate::common::{Folder, Run, as_nobody, command, finish, run, wait_until, without_proc};
use crate::owner::Owner;

#[test]
fn missing_proc_is_named_and_not_the_process() {
    let test = "missing_proc_is_named_and_not_the_process";
    if skips_without_root(test) {
        return;
    }
    let folder = Folder::new();
    let mut create = without_proc(command(["create", "--pid", "1", "-o", "s"]));
    Run::to_end(create.current_dir(folder.path()))
        .exits(1)
        .says(&["no /proc", "mount -t proc"]);
}

#[test]
fn thread_that_does_not_stop_is_named_while_the_others_run() {
    use std::io::{BufRead as _, BufReader};
    let folder = Folder::new();
    let mut owner = Owner::vfork();
    let child_of_owner = i32::try_from(owner.place("child")).unwrap();
    let mut child = command(["create", "--pid", &owner.pid().to_string(), "-o", "s"])
        .current_dir(folder.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    stderr.read_line(&mut said).unwrap();
    assert!(
        said.contains("does not stop; it waits in the kernel"),
        "{said}"
    );
    // The command retries for seconds, and the process runs in between.
    assert_running(&mut owner);
    assert!(child.try_wait().unwrap().is_none(), "it goes on trying");
    kill(Pid::from_raw(child_of_owner), Signal::SIGKILL).unwrap();
    finish(child).exits(0);
    assert_running(&mut owner);
}

#[test]
fn frozen_process_is_refused_at_once() {
    let name = "frozen_process_is_refused_at_once";
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let freezer = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let point = fields.next()?;
        let is_freezer = fields.next()? == "cgroup" && fields.next()?.contains("freezer");
        is_freezer.then_some(point)
    });
    let Some(freezer) = freezer else {
        let why = "no freezer of cgroup version 1 is mounted".into();
        return skipped(name, &Unavailable { why });
    };
    let group = std::path::Path::new(freezer).join(format!("snaprestore-{}", std::process::id()));
    if let Err(error) = std::fs::create_dir(&group) {
        let why = format!("{}: {error}", group.display());
        return skipped(name, &Unavailable { why });
    }
    let folder = Folder::new();
    let mut owner = Owner::small();
    let pid = owner.pid().to_string();
    let set = |file: &str, value: &str| std::fs::write(group.join(file), value).unwrap();
    set("cgroup.procs", &pid);
    set("freezer.state", "FROZEN");
    wait_until("the owner is frozen", || {
        std::fs::read_to_string(group.join("freezer.state")).unwrap() == "FROZEN\n"
    });
    let began = std::time::Instant::now();
    let refused = run(&folder, &["create", "--pid", &pid, "-o", "s"]);
    let took = began.elapsed();
    set("freezer.state", "THAWED");
    let is_running = owner.rounds().len() > 1;
    std::fs::write(std::path::Path::new(freezer).join("cgroup.procs"), &pid).unwrap();
    std::fs::remove_dir(&group).unwrap();
    refused.exits(1).says(&["is frozen", "snaprestore-"]);
    assert!(is_running && took.as_secs() < 9, "{took:?}");
    assert_running(&mut owner);
}

#[test]
fn refused_processes_are_named_with_a_reason() {
    let folder = Folder::new();
    let owner = Owner::start();
    let thread = std::fs::read_dir(format!("/proc/{}/task", owner.pid()))
        .unwrap()
        .map(|task| task.unwrap().file_name().into_string().unwrap())
        .find(|tid| *tid != owner.pid().to_string())
        .unwrap();
    let mut zombie = command(["--version"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("a child has ended", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", zombie.id())).unwrap();
        stat.contains(") Z ")
    });
    for (pid, says) in [
        ("2000000000", "there is no process"),
        ("0", "there is no process"),
        (thread.as_str(), &format!("--pid {}", owner.pid())),
        (&zombie.id().to_string(), "has ended"),
    ] {
        run(&folder, &["create", "--pid", pid, "-o", "s"])
            .exits(1)
            .says(&[pid, says]);
    }
    zombie.wait().unwrap();
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|name| name == "kthreadd\n") {
        run(&folder, &["create", "--pid", "2", "-o", "s"])
            .exits(1)
            .says(&["kernel thread"]);
    }
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn process_of_another_user_exits_4_with_a_remedy() {
    let name = "process_of_another_user_exits_4_with_a_remedy";
    if !nix::unistd::geteuid().is_root() {
        let why = "becoming another user needs root".into();
        return skipped(name, &Unavailable { why });
    }
    let folder = Folder::new();
    let mut owner = Owner::start();
    let pid = owner.pid().to_string();
    let refused = as_nobody(&folder, &["create", "--pid", &pid, "-o", "s"]);
    refused
        .exits(4)
        .says(&[&pid, "run as root", "CAP_SYS_PTRACE"]);
    assert_eq!(folder.names(), ["snaprestore"]);
    assert_running(&mut owner);
}
