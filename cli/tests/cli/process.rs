//! The memory of a live process, which continues whatever happens.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use snaprestore_fixtures::host::{Unavailable, ensure_python3, skipped};

use crate::common::{
    Folder, Run, as_nobody, command, finish, finish_within, number, program, remarks, run, states,
    wait_until, with_default_signals, without_proc,
};
use crate::owner::Owner;
use crate::process_memory::{Puppet, remark, remarked};

fn regions(folder: &Folder, snapshot: &str) -> Vec<Value> {
    let info = run(folder, &["info", snapshot, "--json"]).exits(0).json();
    info["regions"].as_array().unwrap().clone()
}

/// Returns the number and entry of the region that holds `address`.
fn find(regions: &[Value], address: u64) -> Option<(usize, &Value)> {
    regions.iter().enumerate().find(|(_, region)| {
        let start = number(region, "start");
        (start..start + number(region, "bytes")).contains(&address)
    })
}

/// Returns `len` bytes of the snapshot `s` at `address`; unknown pages are an error.
fn memory(folder: &Folder, regions: &[Value], address: u64, len: usize) -> Vec<u8> {
    let (index, region) = find(regions, address).expect("the region is there");
    let index = index.to_string();
    run(
        folder,
        &[
            "extract", "s", "-o", "region", "--force", "--region", &index,
        ],
    )
    .exits(0);
    let file = File::open(folder.file("region")).unwrap();
    let mut bytes = vec![0; len];
    let at = address - number(region, "start");
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, at).unwrap();
    bytes
}

/// Asserts that all of the owner's threads run.
fn assert_running(owner: &mut Owner) {
    let before = owner.rounds();
    wait_until("all threads of the owner run", || {
        owner
            .rounds()
            .iter()
            .zip(&before)
            .all(|(now, before)| now > before)
    });
    assert!(!owner.states().contains(['t', 'T']), "{}", owner.states());
}

/// Starts taking the owner's memory, and returns when all its threads are held. The output is a
/// pipe that nobody reads further, and no temporary file can be written.
fn held(folder: &Folder, owner: &Owner) -> (Child, ChildStdout) {
    let mut command = taking(folder, owner);
    let no_files = || {
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: setting a limit is a system call that only reads the struct, and may be made
        // between fork and exec.
        match unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const none) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure neither allocates nor takes a lock.
    unsafe { command.pre_exec(no_files) };
    let mut child = command.spawn().unwrap();
    let mut pipe = child.stdout.take().unwrap();
    // More than the header: pages are being read.
    pipe.read_exact(&mut [0; 8192]).unwrap();
    wait_until("the owner is held", || {
        let states = owner.states();
        states.len() > 8 && states.chars().all(|state| state == 't')
    });
    (child, pipe)
}

/// Returns a command that writes the owner's memory to a pipe, as a job of its own.
fn taking(folder: &Folder, owner: &Owner) -> Command {
    let pid = owner.pid().to_string();
    let mut command = with_default_signals(command(["create", "--pid", &pid, "-o", "-"]));
    command
        .current_dir(folder.path())
        .env("TMPDIR", folder.path())
        .process_group(0)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

#[test]
fn a_process_is_taken_as_it_is_and_goes_on() {
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

#[test]
fn a_killed_snaprestore_leaves_the_process_running() {
    let folder = Folder::new();
    let mut owner = Owner::large();
    let (mut child, _pipe) = held(&folder, &owner);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_running(&mut owner);
}

#[test]
fn an_interrupted_snaprestore_leaves_the_process_running() {
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
fn an_error_leaves_the_process_running() {
    let folder = Folder::new();
    let mut owner = Owner::large();
    // A reader that closes the pipe makes writing fail.
    let (child, pipe) = held(&folder, &owner);
    drop(pipe);
    finish(child).exits(1).says(&["Broken pipe"]);
    assert_running(&mut owner);
}

#[test]
fn a_process_that_is_killed_meanwhile_is_an_error() {
    let folder = Folder::new();
    let owner = Owner::large();
    let (child, mut pipe) = held(&folder, &owner);
    kill(Pid::from_raw(owner.pid().cast_signed()), Signal::SIGKILL).unwrap();
    std::io::copy(&mut pipe, &mut std::io::sink()).unwrap();
    finish(child).exits(1).says(&["ended while it was read"]);
}

#[test]
fn signals_that_arrive_meanwhile_are_not_lost() {
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
fn standard_signals_on_their_way_are_not_lost() {
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
fn ctrl_z_lets_the_process_go_before_it_stops() {
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

/// Returns a program that serves a FUSE file system (`fuse.py`) and does not answer requests that
/// match `silent`, a condition on `operation` and `name`.
fn fuse(mount: &Folder, silent: &str) -> String {
    format!(
        "{}\nfiles = FileSystem({:?}, lambda operation, name: {silent})\n",
        include_str!("fuse.py"),
        mount.path().to_str().unwrap(),
    )
}

/// Skips a test that needs root. Returns whether it did.
fn skips_without_root(test: &str) -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        let why = "mounting needs root".into();
        skipped(test, &Unavailable { why });
    }
    !is_root
}

/// Far more time than a command takes that doesn't wait for anything.
const LONG: Duration = Duration::from_secs(100);

#[test]
fn process_that_serves_the_output_is_taken() {
    let test = "process_that_serves_the_output_is_taken";
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
fn mapped_files_that_the_process_serves_are_unavailable() {
    let test = "mapped_files_that_the_process_serves_are_unavailable";
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

/// Returns a program that opens the file `name` of a file system served by another process.
fn opens(server: &Puppet, mount: &Folder, name: &str) -> String {
    let mount = mount.path().display();
    let path = format!("/proc/{}/root{mount}/{name}", server.pid());
    format!("file = os.open({path:?}, os.O_RDWR)\n")
}

#[test]
fn first_signal_lets_the_process_go_while_reading_waits_for_a_disk() {
    let test = "first_signal_lets_the_process_go_while_reading_waits_for_a_disk";
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

/// An exiting process frees its memory some time before it has exited.
#[test]
fn process_that_is_ending_is_no_thread_of_the_kernel() {
    let test = "process_that_is_ending_is_no_thread_of_the_kernel";
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
fn missing_proc_is_named_and_not_the_process() {
    let test = "missing_proc_is_named_and_not_the_process";
    if skips_without_root(test) {
        return;
    }
    let folder = Folder::new();
    let mut create = without_proc(command(["create", "--pid", "1", "-o", "s"]));
    Run::of(create.current_dir(folder.path()))
        .exits(1)
        .says(&["no /proc", "mount -t proc"]);
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
fn a_stopped_job_is_taken_and_stays_stopped() {
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
fn a_process_whose_main_thread_has_ended_is_taken_through_another() {
    let name = "a_process_whose_main_thread_has_ended_is_taken_through_another";
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

#[test]
fn processes_that_cannot_be_taken_are_named() {
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
fn a_process_of_somebody_else_exits_4_and_says_what_would_permit_it() {
    let name = "a_process_of_somebody_else_exits_4_and_says_what_would_permit_it";
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
