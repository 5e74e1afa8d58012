//! Commands stopped by a signal: no incomplete file is left, whatever the moment.

use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use snapshot_format::trace::Touch;

use crate::common::{
    Folder, Run, command, finish, make_fifo, noise, run, wait_until, with_default_signals,
};
use crate::working_sets::trace_of;

/// Starts `create` from a pipe that has delivered some data and stays open.
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
    // More than the pipe holds: once it is written, the command is in the middle of it.
    let bytes = vec![7; 4 << 20];
    child.stdin.as_mut().unwrap().write_all(&bytes).unwrap();
    child
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

#[test]
fn interrupted_command_leaves_no_files() {
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGKILL,
    ] {
        let folder = Folder::new();
        let mut child = streaming(&folder, "s");
        send(&child, signal);
        // The command waits for input that never comes, and stops all the same.
        let input = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(input);
        assert_eq!(output.status.signal(), Some(signal as i32), "{output:?}");
        assert_eq!(folder.names(), [""; 0], "{signal}");
    }
}

#[test]
fn interrupted_command_leaves_the_old_target() {
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
fn signal_that_the_parent_ignored_stays_ignored() {
    // Signals are ignored as with `nohup`, and in background jobs of a script.
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
    make_fifo(&folder.file("in"));
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

/// Nobody reads, so that a write would block forever.
#[test]
fn one_signal_stops_a_write_blocked_on_its_reader() {
    let folder = Folder::new();
    folder.write("raw", &noise(4 << 20));
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    make_fifo(&folder.file("fifo"));
    let create = ["create", "raw", "-o", "-"];
    let extract = ["extract", "s", "-o", "-"];
    for (args, socket) in [
        (create, false),
        (create, true),
        (extract, false),
        (extract, true),
        (["create", "raw", "-o", "fifo"], false),
        (["extract", "s", "-o", "fifo"], false),
    ] {
        let (mut reader, writer): (Box<dyn Read>, OwnedFd) = if socket {
            let (reader, writer) = UnixStream::pair().unwrap();
            (Box::new(reader), writer.into())
        } else if args.contains(&"fifo") {
            // Opens both ends, so that it doesn't wait.
            let both = File::options()
                .read(true)
                .write(true)
                .open(folder.file("fifo"))
                .unwrap();
            (Box::new(both.try_clone().unwrap()), both.into())
        } else {
            let (reader, writer) = std::io::pipe().unwrap();
            (Box::new(reader), writer.into())
        };
        let mut child = with_default_signals(command(args))
            .current_dir(folder.path())
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Once some data has arrived, the rest is more than the pipe holds.
        reader.read_exact(&mut [0; 8]).unwrap();
        send(&child, Signal::SIGTERM);
        wait_until("it ends", || child.try_wait().unwrap().is_some());
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32), "{args:?}");
    }
    assert_eq!(folder.names(), ["fifo", "raw", "s"]);
}

/// Returns whether in pieces or at once, all data arrives.
#[test]
fn slow_readers_get_every_byte() {
    let folder = Folder::new();
    let bytes = noise(1 << 20);
    folder.write("raw", &bytes);
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    for socket in [false, true] {
        let (mut reader, writer): (Box<dyn Read>, OwnedFd) = if socket {
            let (reader, writer) = UnixStream::pair().unwrap();
            (Box::new(reader), writer.into())
        } else {
            let (reader, writer) = std::io::pipe().unwrap();
            (Box::new(reader), writer.into())
        };
        let mut extract = command(["extract", "s", "-o", "-", "-q"]);
        let child = extract.current_dir(folder.path()).stdout(writer).spawn();
        // Closes its copy of the writing end as well.
        drop(extract);
        let mut read = Vec::new();
        let mut piece = [0; 3001];
        loop {
            match reader.read(&mut piece).unwrap() {
                0 => break,
                len => read.extend_from_slice(&piece[..len]),
            }
        }
        finish(child.unwrap()).exits(0);
        assert!(read == bytes);
    }
}

/// Reading and merging the traces takes seconds at least.
#[test]
fn reading_and_merging_traces_can_be_interrupted() {
    let folder = Folder::new();
    folder.write("raw", &noise(1 << 20));
    run(&folder, &["create", "raw", "-o", "s"]).exits(0);
    let mut trace = trace_of(&folder, "s", &[0]);
    trace.page_slots = 1 << 23;
    let touch = trace.touches[0];
    let touches = (0..1 << 20).map(|page| Touch { page, ..touch });
    trace.touches = touches.collect();
    trace.write_path(folder.file("t"), false).unwrap();
    let traces = ["t"; 60];
    let merge = [&["trace", "merge", "-o", "new"], &traces[..]].concat();
    let traces = traces.map(|trace| ["--trace", trace]);
    let optimize = [&["optimize", "s", "-o", "new"], traces.as_flattened()].concat();
    let create = [&["create", "raw", "-o", "new"], traces.as_flattened()].concat();
    for args in [merge, optimize, create] {
        let child = with_default_signals(command(&args))
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_until("it works", || threads(&child).contains(&"work".to_owned()));
        send(&child, Signal::SIGINT);
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            output.status.signal(),
            Some(Signal::SIGINT as i32),
            "{output:?}"
        );
        assert_eq!(folder.names(), ["raw", "s", "t"], "{args:?}");
    }
}

/// Returns the names of the threads of a child.
fn threads(child: &Child) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let names = tasks.filter_map(|task| {
        let name = std::fs::read_to_string(task.ok()?.path().join("comm"));
        Some(name.ok()?.trim_end().to_owned())
    });
    names.collect()
}
