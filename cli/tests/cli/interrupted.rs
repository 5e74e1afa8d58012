//! Stopped by a signal: no half file, whatever the moment.

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{Folder, Run, command, finish, wait_until, with_default_signals};

/// `create` from a pipe that has delivered something and goes on.
fn streaming(folder: &Folder, target: &str) -> Child {
    let mut child = with_default_signals(command([
        "create",
        "-",
        "-o",
        target,
        "--force",
        "--dictionary",
        "off",
    ]))
    .current_dir(folder.path())
    .stdin(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    // More than the pipe holds: when it is written, the command is in the middle of it.
    let bytes = vec![7; 4 << 20];
    child.stdin.as_mut().unwrap().write_all(&bytes).unwrap();
    child
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

#[test]
fn a_signal_ends_it_without_a_trace() {
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGKILL,
    ] {
        let folder = Folder::new();
        let mut child = streaming(&folder, "s");
        send(&child, signal);
        // It waits for input that never comes, and ends all the same.
        let input = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(input);
        assert_eq!(output.status.signal(), Some(signal as i32), "{output:?}");
        assert_eq!(folder.names(), [""; 0], "{signal}");
    }
}

#[test]
fn an_interrupted_command_leaves_the_old_target() {
    let folder = Folder::new();
    folder.write("s", b"precious");
    let mut child = streaming(&folder, "s");
    send(&child, Signal::SIGINT);
    let input = child.stdin.take();
    let run: Run = finish(child);
    drop(input);
    assert_eq!(run.code, None);
    assert!(run.err.contains("interrupted"), "{}", run.err);
    assert_eq!(folder.read("s"), b"precious");
    assert_eq!(folder.names(), ["s"]);
}

#[test]
fn a_signal_that_the_parent_ignored_stays_ignored() {
    // As `nohup`, and as jobs in the background of a script.
    let folder = Folder::new();
    let mut child = std::process::Command::new("/bin/sh")
        .args([
            "-c",
            "trap '' INT HUP; exec \"$0\" create - -o s -q --dictionary off",
        ])
        .arg(crate::common::program())
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let input = child.stdin.as_mut().unwrap();
    input.write_all(&vec![7; 4 << 20]).unwrap();
    send(&child, Signal::SIGINT);
    send(&child, Signal::SIGHUP);
    child
        .stdin
        .as_mut()
        .unwrap()
        .write_all(&vec![7; 4 << 20])
        .unwrap();
    finish(child).exits(0);
    assert_eq!(folder.names(), ["s"]);
}

#[test]
fn waiting_for_a_pipe_can_be_interrupted() {
    let folder = Folder::new();
    crate::common::make_fifo(&folder.file("in"));
    let mut child = with_default_signals(command(["create", "in", "-o", "s"]))
        .current_dir(folder.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("it waits", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        stat.contains(") S ") && std::fs::read_link(format!("/proc/{}/exe", child.id())).is_ok()
    });
    send(&child, Signal::SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(Signal::SIGTERM as i32));
    assert_eq!(folder.names(), ["in"]);
}
