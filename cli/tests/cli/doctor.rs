//! The report about this machine's requirements.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;

use snaprestore_fixtures::host::{Unavailable, skipped};

use crate::common::{Folder, Run, as_nobody, command, run, without_proc};
use crate::restore::possible;

#[test]
fn every_check_is_judged_and_the_exit_code_is_the_sum() {
    let folder = Folder::new();
    let doctor = run(&folder, &["doctor", "--json"]);
    let report = doctor.json();
    let checks = report["checks"].as_array().unwrap();
    let states: Vec<_> = checks
        .iter()
        .map(|check| check["state"].as_str().unwrap())
        .collect();
    assert!(
        states.len() > 10
            && states
                .iter()
                .all(|s| ["good", "limited", "missing"].contains(s))
    );
    let ok = !states.contains(&"missing");
    assert_eq!(report["ok"], ok);
    assert_eq!(doctor.code, Some(if ok { 0 } else { 4 }));
    let text = run(&folder, &["doctor"]).text();
    for name in [
        "kernel",
        "userfaultfd",
        "/dev/kvm",
        "huge pages",
        "open files",
    ] {
        assert!(text.contains(name), "{text}");
    }
}

#[test]
fn missing_proc_is_named() {
    let name = "missing_proc_is_named";
    if !nix::unistd::geteuid().is_root() {
        let why = "hiding /proc needs root".into();
        return skipped(name, &Unavailable { why });
    }
    let doctor = Run::to_end(&mut without_proc(command(["doctor", "--json"])));
    let report = doctor.json();
    let checks = report["checks"].as_array().unwrap();
    for name in ["/proc", "live processes"] {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        assert_eq!(check["state"], "limited", "{check}");
        let remedy = check["remedy"].as_str().unwrap();
        assert!(remedy.contains("mount -t proc"), "{remedy}");
    }
    let report = run(&Folder::new(), &["doctor", "--json"]).json();
    let mut checks = report["checks"].as_array().unwrap().iter();
    let check = checks.find(|check| check["name"] == "/proc").unwrap();
    assert_eq!(check["state"], "good");
}

#[test]
fn missing_rights_come_with_a_remedy() {
    let name = "missing_rights_come_with_a_remedy";
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let skip = |why: &str| skipped(name, &Unavailable { why: why.into() });
    if !nix::unistd::geteuid().is_root() {
        return skip("becoming another user needs root");
    }
    if !setting.is_ok_and(|setting| setting.trim() == "0") {
        return skip("vm.unprivileged_userfaultfd permits it to everyone here");
    }
    let folder = Folder::new();
    let doctor = as_nobody(&folder, &["doctor", "--json"]);
    let report = doctor.json();
    if report["ok"] == true && report["user_mode_only"] == false {
        return skip("/dev/userfaultfd is open to everyone here");
    }
    let checks = report["checks"].as_array().unwrap();
    let check = checks
        .iter()
        .find(|check| check["name"] == "userfaultfd")
        .unwrap();
    let remedy = check["remedy"].as_str().unwrap();
    if report["user_mode_only"] == true {
        // Restoring works, but not for VMs, and the verdict says so.
        assert_eq!((doctor.code, &report["ok"]), (Some(0), &true.into()));
        assert_eq!(check["state"], "limited");
        assert!(remedy.contains("for the memory of VMs"), "{remedy}");
        let text = as_nobody(&folder, &["doctor"]).exits(0).text();
        assert!(text.contains("user-mode faults only"), "{text}");
    } else {
        assert_eq!((doctor.code, &report["ok"]), (Some(4), &false.into()));
        assert_eq!(check["state"], "missing");
    }
    for way in [
        "/dev/userfaultfd",
        "vm.unprivileged_userfaultfd=1",
        "CAP_SYS_PTRACE",
    ] {
        assert!(remedy.contains(way), "{remedy}");
    }
}

/// Runs the command in `folder`, with an address space of at most `bytes`.
fn with_address_space(folder: &Folder, bytes: u64, args: &[&str]) -> Run {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    let set = move || {
        // SAFETY: setting a limit is a system call that only reads the struct, and may be made
        // between fork and exec.
        match unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let mut command = command(args);
    command.current_dir(folder.path());
    // SAFETY: the closure neither allocates nor takes a lock.
    unsafe { command.pre_exec(set) };
    Run::to_end(&mut command)
}

/// The kernel only reports that there is no memory, on a machine that has some.
#[test]
fn limit_on_the_address_space_is_named() {
    const LIMIT: u64 = 8 << 30;
    let folder = Folder::new();
    let raw = File::create(folder.file("raw")).unwrap();
    raw.set_len(2 * LIMIT).unwrap();
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let address_space = |doctor: &Run| {
        let report = doctor.json();
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == "address space");
        check.unwrap().clone()
    };
    let doctor = with_address_space(&folder, LIMIT, &["doctor", "--json"]);
    let check = address_space(&doctor);
    assert_eq!(check["state"], "limited", "{check}");
    let detail = check["detail"].as_str().unwrap();
    assert!(detail.contains("8.00 GiB (RLIMIT_AS)"), "{detail}");
    let remedy = check["remedy"].as_str().unwrap();
    assert!(remedy.contains("ulimit -v"), "{remedy}");
    let check = address_space(&run(&folder, &["doctor", "--json"]));
    assert_eq!(check["state"], "good", "{check}");

    if !possible(&folder, "limit_on_the_address_space_is_named") {
        return;
    }
    with_address_space(&folder, LIMIT, &["restore", "s"])
        .exits(1)
        .says(&["8192 MiB (RLIMIT_AS)", "ulimit -v"]);
    run(&folder, &["restore", "s", "--touch", "none"]).exits(0);
}
