//! File systems that are served by the process itself, or that do not answer.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{LONG, fuse, opens, skips_without_root};
use crate::common::{Folder, command, finish_within, wait_until, with_default_signals};
use crate::process_memory::{Puppet, remark, remarked};

#[test]
fn process_serving_the_output_is_packed() {
    let test = "process_serving_the_output_is_packed";
    if skips_without_root(test) {
        return;
    }
    let mount = Folder::new();
    let program = fuse(&mount, "False") + "noise = os.urandom(64 * MIB)\n";
    let Some(puppet) = Puppet::start(test, &program, None) else {
        return;
    };
    let folder = Folder::new();
    let pid = puppet.pid().to_string();
    // The path as other processes see it. Only the served files are beside it.
    let output = format!("/proc/{pid}/root{}/s", mount.path().display());
    for dictionary in ["train", "off"] {
        let options = ["--force", "--dictionary", dictionary, "--json"];
        let create = command(["create", "--pid", &pid, "-o", &output])
            .args(options)
            .env("TMPDIR", folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        finish_within(create, LONG).exits(0);
        assert!(!puppet.states().contains(['t', 'T']));
        let verify = command(["verify", &output]).stdout(Stdio::null()).spawn();
        finish_within(verify.unwrap(), LONG).exits(0);
    }
}

#[test]
fn mapped_files_served_by_the_process_are_unavailable() {
    let test = "mapped_files_served_by_the_process_are_unavailable";
    if skips_without_root(test) {
        return;
    }
    let mount = Folder::new();
    let program = fuse(&mount, "False")
        + "
files.add(b'data', bytes(64 * PAGE))
file = os.open(FOLDER + '/data', os.O_RDWR)
mapped('private', 16 * PAGE, 3, PRIVATE, file)
mapped('shared', 32 * PAGE, 3, SHARED, file)
os.close(file)
";
    let program = program.replace("FOLDER", &format!("{:?}", mount.path()));
    let Some(puppet) = Puppet::start(test, &program, None) else {
        return;
    };
    let folder = Folder::new();
    let create = command(["create", "--pid", &puppet.pid().to_string(), "-o", "s"])
        .arg("--json")
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let taken = finish_within(create.unwrap(), LONG).exits(0);
    assert_eq!(remarked(&folder, &taken), [remark("served", 48)]);
    assert!(taken.err.contains("may serve itself"), "{}", taken.err);
    assert!(!puppet.states().contains(['t', 'T']));
}

#[test]
fn first_signal_releases_the_process_while_a_read_blocks() {
    let test = "first_signal_releases_the_process_while_a_read_blocks";
    if skips_without_root(test) {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mount = Folder::new();
        let folder = Folder::new();
        let asked = folder.file("asked");
        let program = fuse(&mount, "operation == READ and open(ASKED, 'w')")
            .replace("ASKED", &format!("{asked:?}"))
            + "files.add(b'data', bytes(64 * PAGE))\n";
        let Some(mut server) = Puppet::start(test, &program, None) else {
            return;
        };
        let program =
            opens(&server, &mount, "data") + "mapped('data', 64 * PAGE, 3, SHARED, file)\n";
        let Some(puppet) = Puppet::start(test, &program, None) else {
            return;
        };
        let pid = puppet.pid().to_string();
        let create = with_default_signals(command(["create", "--pid", &pid, "-o", "s"]))
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_until("the file is read", || asked.exists());
        assert!(puppet.states().starts_with('t'), "it is held meanwhile");
        kill(Pid::from_raw(create.id().cast_signed()), signal).unwrap();
        wait_until("the process is let go", || !puppet.states().contains('t'));
        // Everyone who waits for an answer gets an error now.
        server.child.kill().unwrap();
        let mut create = create;
        let began = std::time::Instant::now();
        while create.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < LONG, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = create.wait().unwrap();
        assert_eq!(status.signal(), Some(signal as i32), "{status:?}");
        assert_eq!(folder.names(), ["asked"]);
    }
}
