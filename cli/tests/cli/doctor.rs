//! What this machine permits.

use snaprestore_fixtures::host::{Unavailable, skipped};

use crate::common::{Folder, Run, as_nobody, command, run, without_proc};

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
    let doctor = Run::of(&mut without_proc(command(["doctor", "--json"])));
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
fn without_rights_it_says_what_would_give_them() {
    let name = "without_rights_it_says_what_would_give_them";
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
        // Restoring works, but not for VMs: then that is the verdict.
        assert_eq!((doctor.code, &report["ok"]), (Some(0), &true.into()));
        assert_eq!(check["state"], "limited");
        assert!(remedy.contains("for the memory of VMs"), "{remedy}");
        let text = as_nobody(&folder, &["doctor"]).exits(0).text();
        assert!(text.contains("only for user mode"), "{text}");
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
