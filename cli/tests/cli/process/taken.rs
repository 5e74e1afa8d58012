//! A process is taken as it is, in whatever state it is.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaprestore_fixtures::host::{ensure_python3, skipped};

use super::{assert_running, find, fuse, memory, opens, regions, skips_without_root};
use crate::common::{Folder, Run, command, number, remarks, run, wait_until};
use crate::owner::Owner;
use crate::process_memory::Puppet;

#[test]
fn live_process_is_packed_unchanged_and_continues() {
    let folder = Folder::new();
    let mut owner = Owner::start();
    let pid = owner.pid().to_string();
    let report = run(&folder, &["create", "--pid", &pid, "-o", "s", "--json"])
        .exits(0)
        .json();
    assert_running(&mut owner);
    run(&folder, &["verify", "s"]).exits(0);
    number(&report, "held_ms");

    let regions = regions(&folder, "s");
    let at = |name: &str| owner.place(name);
    assert!(memory(&folder, &regions, at("pattern"), 64 * 4096) == Owner::pattern());
    assert_eq!(memory(&folder, &regions, at("sparse"), 4), [1, 0, 0, 0]);
    // Memory that the process itself can no longer read.
    assert_eq!(memory(&folder, &regions, at("hidden"), 4096), [0x77; 4096]);
    assert_eq!(memory(&folder, &regions, at("shared"), 4096), [0x33; 4096]);
    assert_eq!(
        memory(&folder, &regions, at("untouched"), 4098)[4094..],
        [0x66, 0x66, 0, 0]
    );
    assert_eq!(find(&regions, at("reserved")), None, "nothing is reserved");
    // A terabyte of which one page was touched: the page is taken, and not 32 MiB of tables.
    assert_eq!(find(&regions, at("vast")), None, "vast and never touched");
    assert_eq!(memory(&folder, &regions, at("middle"), 4096), [0x55; 4096]);
    let stored = number(&report, "stored_bytes");
    assert!(number(&report, "file_bytes") - stored < 8 << 20, "{report}");

    let (_, sparse) = find(&regions, at("sparse")).unwrap();
    assert!(number(sparse, "bytes") >= 1 << 32);
    assert_eq!(sparse["protection"], "rw-p");
    let (_, shared) = find(&regions, at("shared")).unwrap();
    assert_eq!(shared["protection"], "rw-s");
    let (_, hidden) = find(&regions, at("hidden")).unwrap();
    assert_eq!(number(hidden, "start"), at("hidden"));
    let named = |part: &str| {
        regions
            .iter()
            .any(|r| r["name"].as_str().unwrap().contains(part))
    };
    assert!(named("[heap]") && named("[stack]") && named("libc") && named("[vdso]"));
    assert!(!named("[vsyscall]") && !named("[vvar"));

    // Pages past the end of a file can't be read and are unknown.
    assert_eq!(number(&report, "unavailable_pages"), 3);
    let keys: Vec<_> = remarks(&report).into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["source.beyond_file_bytes", "source.untouched_bytes"]);
    let (cut, region) = find(&regions, at("cut")).unwrap();
    assert!(number(region, "bytes") == 4 * 4096, "{region}");
    let cut = cut.to_string();
    run(&folder, &["extract", "s", "-o", "cut", "--region", &cut])
        .exits(1)
        .says(&["3 of pages"]);
    run(
        &folder,
        &[
            "extract",
            "s",
            "-o",
            "cut",
            "--region",
            &cut,
            "--unavailable",
            "zero",
        ],
    )
    .exits(0);
    assert_eq!(
        folder.read("cut"),
        [vec![0x44; 4096], vec![0; 3 * 4096]].concat()
    );
    let info = run(&folder, &["info", "s", "--json"]).json();
    assert_eq!(info["properties"]["source"], "process");
    assert_eq!(info["properties"]["source.pid"], pid.as_str());
}

#[test]
fn untouched_memory_stays_untouched() {
    for place in ["sparse", "untouched"] {
        stays_untouched(place);
    }
}

fn stays_untouched(place: &str) {
    let folder = Folder::new();
    let owner = Owner::start();
    let populated = || -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps", owner.pid())).unwrap();
        let start = format!("{:x}-", owner.place(place));
        let at = text.lines().skip_while(|line| !line.starts_with(&start));
        let rss = at
            .into_iter()
            .find_map(|line| line.strip_prefix("Rss:"))
            .unwrap();
        rss.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let before = populated();
    assert!(before < 4096, "{before} KiB");
    let pid = owner.pid().to_string();
    run(&folder, &["create", "--pid", &pid, "-o", "s"]).exits(0);
    // The memory has gigabytes, but neighbours may have touched a page of theirs meanwhile.
    assert!(
        populated() < before + 1024,
        "{} KiB, then {}",
        before,
        populated()
    );
}

/// An exiting process frees its memory some time before it has exited.
#[test]
fn exiting_process_is_not_a_kernel_thread() {
    let test = "exiting_process_is_not_a_kernel_thread";
    if skips_without_root(test) {
        return;
    }
    let mount = Folder::new();
    let program = fuse(&mount, "operation == FLUSH") + "files.add(b'data', b'')\n";
    let Some(mut server) = Puppet::start(test, &program, None) else {
        return;
    };
    // Closing the file needs an answer from the server.
    let program = opens(&server, &mount, "data");
    let Some(mut puppet) = Puppet::start(test, &program, None) else {
        return;
    };
    let pid = puppet.pid();
    puppet.end();
    let status = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    wait_until("it gives up its memory", || !status().contains("VmSize:"));
    let folder = Folder::new();
    let create = run(&folder, &["create", "--pid", &pid.to_string(), "-o", "s"]);
    let was_ending = !status().contains("VmSize:") && !status().contains("Z (zombie)");
    server.child.kill().unwrap();
    assert!(was_ending, "{}", status());
    create.exits(1).says(&["is ending", "memory is gone"]);
}

#[test]
fn process_that_runs_another_program_is_not_refused() {
    let folder = Folder::new();
    let mut restless = Owner::restless();
    let pid = restless.id().to_string();
    let mut taken = 0;
    for _ in 0..100 {
        let options = ["--force", "--dictionary", "off"];
        let args = ["create", "--pid", &pid, "-o", "s"];
        let create = command(args)
            .args(options)
            .current_dir(folder.path())
            .output();
        let create = Run::from(create.unwrap());
        // The process exists all the time, so it may be taken.
        if create.code == Some(0) {
            taken += 1;
        } else {
            assert!(
                create.err.contains("one program after the other"),
                "{create:?}"
            );
        }
    }
    restless.kill().unwrap();
    restless.wait().unwrap();
    assert!(taken > 0);
}

#[test]
fn stopped_job_is_packed_and_stays_stopped() {
    let folder = Folder::new();
    let mut owner = Owner::start();
    let pid = Pid::from_raw(owner.pid().cast_signed());
    kill(pid, Signal::SIGSTOP).unwrap();
    wait_until("the owner stops", || {
        owner.states().chars().all(|state| state == 'T')
    });
    run(&folder, &["create", "--pid", &pid.to_string(), "-o", "s"]).exits(0);
    assert!(
        owner.states().chars().all(|state| state == 'T'),
        "{}",
        owner.states()
    );
    kill(pid, Signal::SIGCONT).unwrap();
    assert_running(&mut owner);
}

#[test]
fn process_without_its_main_thread_is_packed() {
    let name = "process_without_its_main_thread_is_packed";
    let python = match ensure_python3() {
        Ok(python) => python,
        Err(why) => return skipped(name, &why),
    };
    let folder = Folder::new();
    // The bare system call ends one thread, not the process.
    let program = format!(
        "import ctypes, threading, time\n\
         libc = ctypes.CDLL(None)\n\
         rename = lambda: libc.prctl(15, b'\\xff) Z \\xd0', 0, 0, 0)\n\
         threading.Thread(target=lambda: (rename(), time.sleep(1000))).start()\n\
         libc.syscall({}, 0)",
        libc::SYS_exit
    );
    let mut child = std::process::Command::new(python)
        .args(["-c", &program])
        .spawn()
        .unwrap();
    let pid = child.id().to_string();
    wait_until("the main thread ends", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.contains(") Z ")
    });
    let taken = run(&folder, &["create", "--pid", &pid, "-o", "s"]);
    child.kill().unwrap();
    child.wait().unwrap();
    taken.exits(0);
    assert!(regions(&folder, "s").len() > 10);
}
