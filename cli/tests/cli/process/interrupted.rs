//! The process continues whatever happens to the command, and loses no signal.

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snaprestore_fixtures::host::{ensure_python3, skipped};

use super::{LONG, assert_running, held, memory, regions, taking};
use crate::common::{Folder, finish, finish_within, program, run, states, wait_until};
use crate::owner::Owner;

#[test]
fn killed_snaprestore_leaves_the_process_running() {
    let folder = Folder::new();
    let mut owner = Owner::large();
    let (mut child, _pipe) = held(&folder, &owner);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_running(&mut owner);
}

#[test]
fn interrupted_snaprestore_leaves_the_process_running() {
    let folder = Folder::new();
    let mut owner = Owner::large();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (child, mut pipe) = held(&folder, &owner);
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        // The command keeps writing until it sees the request, so somebody must read.
        std::io::copy(&mut pipe, &mut std::io::sink()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(signal as i32), "{output:?}");
        assert_running(&mut owner);
    }
}

#[test]
fn error_leaves_the_process_running() {
    let folder = Folder::new();
    let mut owner = Owner::large();
    // A reader that closes the pipe makes writing fail.
    let (child, pipe) = held(&folder, &owner);
    drop(pipe);
    finish(child).exits(1).says(&["Broken pipe"]);
    assert_running(&mut owner);
}

#[test]
fn process_killed_while_read_is_an_error() {
    let folder = Folder::new();
    let owner = Owner::large();
    let (child, mut pipe) = held(&folder, &owner);
    kill(Pid::from_raw(owner.pid().cast_signed()), Signal::SIGKILL).unwrap();
    std::io::copy(&mut pipe, &mut std::io::sink()).unwrap();
    finish(child).exits(1).says(&["ended while it was read"]);
}

#[test]
fn signals_to_a_held_process_are_not_lost() {
    let folder = Folder::new();
    let mut owner = Owner::start();
    let pid = owner.pid();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Each real-time signal is queued and counted, unlike others.
                // SAFETY: `kill` touches no memory of this process.
                let result = unsafe { libc::kill(pid.cast_signed(), libc::SIGRTMIN()) };
                sent += u64::from(result == 0);
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
            sent
        });
        for _ in 0..20 {
            let pid = pid.to_string();
            run(
                &folder,
                &[
                    "create",
                    "--pid",
                    &pid,
                    "-o",
                    "s",
                    "--force",
                    "--dictionary",
                    "off",
                ],
            )
            .exits(0);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        sender.join().unwrap()
    });
    assert!(sent > 100, "{sent}");
    wait_until("all signals are counted", || owner.signals() >= sent);
    assert_eq!(owner.signals(), sent);
    assert_running(&mut owner);
}

/// The signal isn't counted, but is sent again only after it has arrived. Most of the time one is
/// pending, also when the threads are asked to stop.
#[test]
fn pending_standard_signals_are_not_lost() {
    let folder = Folder::new();
    let mut owner = Owner::small();
    let pid = Pid::from_raw(owner.pid().cast_signed());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let owner = &owner;
        let stop = &stop;
        let sender = scope.spawn(move || {
            let mut sent = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                kill(pid, Signal::SIGUSR1).unwrap();
                sent += 1;
                let began = std::time::Instant::now();
                while owner.user_signals() < sent {
                    let waited = began.elapsed().as_secs();
                    assert!(waited < 60, "signal {sent} was lost");
                }
            }
            sent
        });
        for _ in 0..100 {
            if sender.is_finished() {
                break;
            }
            let pid = pid.to_string();
            run(&folder, &["create", "--pid", &pid, "-o", "s", "--force"]).exits(0);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let sent = sender.join().unwrap();
        assert!(sent > 100, "{sent}");
    });
    assert_running(&mut owner);
}

#[test]
fn process_runs_again_once_its_memory_is_read() {
    let folder = Folder::new();
    let mut owner = Owner::large();
    let mut child = taking(&folder, &owner).spawn().unwrap();
    let mut pipe = child.stdout.take().unwrap();
    let mut begin = vec![0; 1 << 20];
    pipe.read_exact(&mut begin).unwrap();
    // Nobody takes the rest for now; it is more than fits into memory and is not compressed yet.
    wait_until("no thread is stopped", || !owner.states().contains('t'));
    assert_running(&mut owner);
    assert!(child.try_wait().unwrap().is_none(), "it waits for us");
    let mut snapshot = begin;
    pipe.read_to_end(&mut snapshot).unwrap();
    finish(child).exits(0);
    folder.write("s", &snapshot);
    run(&folder, &["verify", "s"]).exits(0);
    let regions = regions(&folder, "s");
    let pattern = memory(&folder, &regions, owner.place("pattern"), 64 * 4096);
    assert!(pattern == Owner::pattern());
    assert_eq!(folder.names(), ["region", "s"], "nothing else is left");
}

#[test]
fn ctrl_z_releases_the_process_before_stopping() {
    let folder = Folder::new();
    let mut owner = Owner::large();
    // The kernel sends the other signals to a background job that uses its terminal.
    for signal in [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU] {
        let (child, mut pipe) = held(&folder, &owner);
        let taker = Pid::from_raw(child.id().cast_signed());
        kill(taker, signal).unwrap();
        wait_until("it stops", || states(child.id()).starts_with('T'));
        assert_running(&mut owner);
        kill(taker, Signal::SIGCONT).unwrap();
        std::io::copy(&mut pipe, &mut std::io::sink()).unwrap();
        let said = finish(child).exits(1).err;
        let plain = format!(
            "snaprestore: released process {} because Ctrl-Z stopped this command before it had \
             read all memory; run it again\n",
            owner.pid()
        );
        assert_eq!(said, plain);
        assert_running(&mut owner);
    }
}

/// Runs `create` as a job of a terminal on which background jobs may not write (`stty tostop`).
/// Prints the terminal's output, and exits with the job's code, or with 99 if the job is stopped.
const JOB: &str = r"
import os, pty, signal, sys, termios
where, program, *args = sys.argv[1:]
child, terminal = pty.fork()
if child == 0:
    settings = termios.tcgetattr(0)
    settings[3] |= termios.TOSTOP
    termios.tcsetattr(0, termios.TCSANOW, settings)
    job = os.fork()
    if job == 0:
        if where == 'background':
            os.setpgid(0, 0)
        for number in (signal.SIGTTOU, signal.SIGTTIN, signal.SIGTSTP):
            signal.signal(number, signal.SIG_DFL)
        os.execv(program, [program, *args])
    _, status = os.waitpid(job, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(job, signal.SIGKILL)
        os._exit(99)
    os._exit(os.waitstatus_to_exitcode(status) & 127)
while True:
    try:
        shown = os.read(terminal, 4096)
    except OSError:
        break
    sys.stdout.buffer.write(shown)
    sys.stdout.flush()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
";

#[test]
fn job_in_the_background_is_not_stopped_by_its_messages() {
    let test = "job_in_the_background_is_not_stopped_by_its_messages";
    let python = match ensure_python3() {
        Ok(python) => python,
        Err(why) => return skipped(test, &why),
    };
    let folder = Folder::new();
    let mut owner = Owner::large();
    let pid = owner.pid().to_string();
    for (place, draws) in [("foreground", true), ("background", false)] {
        let job = Command::new(&python)
            .args(["-c", JOB, place])
            .arg(program())
            .args(["create", "--pid", &pid, "-o", "s", "--force"])
            .current_dir(folder.path())
            .env("TERM", "xterm")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let job = finish_within(job, LONG).exits(0);
        assert_eq!(job.text().contains("packing"), draws, "{}", job.text());
        assert!(job.text().contains("was held for"), "{}", job.text());
        assert_running(&mut owner);
    }
}
