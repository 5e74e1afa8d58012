//! Commands that write children, killed before each of their steps on files.
//!
//! The command runs under ptrace. In one run after another it is killed at the entry of the first,
//! second, ... system call that changes a file or a name, until one run completes.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use snaprestore_fixtures::host::skipped;
use snaprestore_fixtures::images::Mix;

use crate::common::{Folder, command, noise, run};
use crate::working_sets::{scattered, write_trace};

const PAGE: usize = 4096;

/// System calls that change a file or a name. Most file systems need a few of them only.
const STEPS: &[i64] = &[
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
];

/// Makes a command stop for this thread when it executes its program.
fn trace(command: &mut Command) {
    // SAFETY: between fork and exec, the closure makes one system call and touches no memory.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
}

/// Returns whether this process may trace its children; reports if not.
pub(crate) fn can_trace(test: &str) -> bool {
    let mut command = command(["--version"]);
    trace(&mut command);
    command.stdout(Stdio::null());
    match command.spawn() {
        Ok(mut child) => {
            child.kill().unwrap();
            child.wait().unwrap();
            true
        }
        Err(why) => {
            skipped(test, &why);
            false
        }
    }
}

/// A decision about a command that is about to make a step.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Continue,
    Kill,
}

/// Runs a command that stops before each of its steps, to call `before` with the number of the
/// step, counted from 0. Returns its exit code, or `None` if it was killed.
#[expect(
    clippy::zombie_processes,
    reason = "waited for by its number, as a tracer does"
)]
pub(crate) fn run_in_steps(
    mut command: Command,
    mut before: impl FnMut(usize) -> Next,
) -> Option<i32> {
    trace(&mut command);
    let child = command.spawn().unwrap();
    let pid = Pid::from_raw(child.id().cast_signed());
    let stopped = waitpid(pid, None).unwrap();
    assert_eq!(stopped, WaitStatus::Stopped(pid, Signal::SIGTRAP));
    let options =
        Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).unwrap();
    ptrace::syscall(pid, None).unwrap();
    let mut seen = 0;
    loop {
        // Other tests have children of their own.
        let mine = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let (thread, signal) = match waitpid(Pid::from_raw(-1), Some(mine)).unwrap() {
            WaitStatus::Exited(which, code) if which == pid => return Some(code),
            WaitStatus::Signaled(which, signal, _) if which == pid => {
                assert_eq!(signal, Signal::SIGKILL);
                return None;
            }
            WaitStatus::PtraceSyscall(thread) => {
                if is_step(thread) {
                    if before(seen) == Next::Kill {
                        kill(pid, Signal::SIGKILL).unwrap();
                        continue;
                    }
                    seen += 1;
                }
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, ..) | WaitStatus::Stopped(thread, Signal::SIGSTOP) => {
                (thread, None)
            }
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            _ => continue,
        };
        // A thread that has just been killed is gone.
        let _ = ptrace::syscall(thread, signal);
    }
}

/// Returns whether a stopped thread is about to make one of [`STEPS`].
fn is_step(thread: Pid) -> bool {
    let Ok(info) = ptrace::syscall_info(thread) else {
        return false;
    };
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return false;
    }
    // SAFETY: the kernel has filled in the union's member that `op` names.
    let number = unsafe { info.u.entry.nr };
    STEPS.contains(&number.cast_signed())
}

/// A command, and the file that must be complete if it is killed after writing it.
struct Expected<'a> {
    args: &'a [&'a str],
    /// The file that it writes.
    target: &'a str,
    /// The memory that the file has when it is complete.
    memory: &'a [u8],
}

/// Kills a command at each of its steps. Afterwards the target is the old file or none, or a new
/// one that is complete; all other files are as they were, and nothing is in the way of another
/// run.
fn check(folder: &Folder, expected: &Expected<'_>) {
    let names = folder.names();
    let before: Vec<Vec<u8>> = names.iter().map(|name| folder.read(name)).collect();
    let old = names.iter().position(|name| name == expected.target);
    let (mut killed, mut replaced) = (0, 0);
    for step in 0.. {
        let mut command = command(expected.args);
        command.current_dir(folder.path());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let code = run_in_steps(command, |seen| {
            if seen == step {
                Next::Kill
            } else {
                Next::Continue
            }
        });
        let place = format!("{:?} at step {step}", expected.args);
        for name in folder.names() {
            let known = names.iter().position(|known| *known == name);
            if name == expected.target {
                let is_old = old.is_some_and(|old| folder.read(&name) == before[old]);
                if !is_old {
                    holds(folder, &name, expected.memory, &place);
                    replaced += 1;
                }
            } else if let Some(known) = known {
                assert!(
                    folder.read(&name) == before[known],
                    "{place}: {name} changed"
                );
            } else {
                // The moment between link and rename.
                let is_partial = name.starts_with(".snaprestore-") && name.ends_with(".partial");
                assert!(is_partial, "{place} left {name}");
                std::fs::remove_file(folder.file(&name)).unwrap();
            }
        }
        for name in &names {
            assert!(folder.file(name).exists(), "{place}: {name} is gone");
        }
        // As before, for the next run.
        if folder.file(expected.target).exists() {
            match old {
                Some(old) => folder.write(expected.target, &before[old]),
                None => std::fs::remove_file(folder.file(expected.target)).unwrap(),
            }
        }
        if let Some(code) = code {
            assert_eq!(code, 0, "{place}");
            break;
        }
        killed += 1;
    }
    assert!(killed >= 4, "{:?}: {killed} steps", expected.args);
    assert!(replaced >= 2, "the last steps come after the new name");
}

/// Asserts that a snapshot is complete, and holds `memory`.
#[track_caller]
fn holds(folder: &Folder, snapshot: &str, memory: &[u8], place: &str) {
    let verified = run(folder, &["verify", snapshot, "--chain"]);
    assert_eq!(verified.code, Some(0), "{place}: {}", verified.text());
    let extracted = run(folder, &["extract", snapshot, "-o", "-", "-q"]);
    assert!(extracted.out == memory, "{place}: other memory");
}

/// Creates `base.snap`, its child `old.snap`, and `diff`, a diff of the base; returns the base's
/// memory, and that with the diff.
fn chain(folder: &Folder) -> (Vec<u8>, Vec<u8>) {
    let base = Mix::new(4200, 3).bytes();
    folder.write("base.raw", &base);
    run(folder, &["create", "base.raw", "-o", "base.snap"]).exits(0);
    // More than the command's buffers hold.
    let new = noise(4000 * PAGE);
    let diff = std::fs::File::create(folder.file("diff")).unwrap();
    diff.set_len(base.len() as u64).unwrap();
    let mut memory = base.clone();
    for (first, pages) in [(3, 1), (100, 900), (1500, 2500)] {
        let range = first * PAGE..(first + pages) * PAGE;
        let new = &new[range.clone()];
        memory[range.clone()].copy_from_slice(new);
        std::os::unix::fs::FileExt::write_all_at(&diff, new, range.start as u64).unwrap();
    }
    let mut other = base.clone();
    other[5 * PAGE..6 * PAGE].fill(7);
    folder.write("other.raw", &other);
    let args = [
        "create",
        "other.raw",
        "--base",
        "base.snap",
        "-o",
        "old.snap",
    ];
    run(folder, &args).exits(0);
    (base, memory)
}

#[test]
fn killed_create_leaves_the_old_child_or_the_new_one() {
    if !can_trace("killed_create_leaves_the_old_child_or_the_new_one") {
        return;
    }
    let folder = Folder::new();
    let (_, memory) = chain(&folder);
    let create = [
        "create",
        "diff",
        "--base",
        "base.snap",
        "--threads",
        "1",
        "-o",
    ];
    check(
        &folder,
        &Expected {
            args: &[&create[..], &["new.snap"]].concat(),
            target: "new.snap",
            memory: &memory,
        },
    );
    check(
        &folder,
        &Expected {
            args: &[&create[..], &["old.snap", "--force"]].concat(),
            target: "old.snap",
            memory: &memory,
        },
    );
}

#[test]
fn killed_flatten_leaves_the_old_file_or_the_new_one() {
    if !can_trace("killed_flatten_leaves_the_old_file_or_the_new_one") {
        return;
    }
    let folder = Folder::new();
    let (_, memory) = chain(&folder);
    let create = ["create", "diff", "--base", "base.snap", "-o", "child.snap"];
    run(&folder, &create).exits(0);
    let flatten = ["flatten", "child.snap", "--threads", "1", "-o"];
    for more in [&["flat.snap"][..], &["old.snap", "--force"]] {
        check(
            &folder,
            &Expected {
                args: &[&flatten[..], more].concat(),
                target: more[0],
                memory: &memory,
            },
        );
    }
}

#[test]
fn killed_rebase_leaves_the_child_with_one_of_its_bases() {
    if !can_trace("killed_rebase_leaves_the_child_with_one_of_its_bases") {
        return;
    }
    let folder = Folder::new();
    chain(&folder);
    let memory = folder.read("other.raw");
    // The same memory as the base, repacked.
    let pack = [
        "create",
        "base.raw",
        "-o",
        "another.snap",
        "--frame-size",
        "64",
    ];
    run(&folder, &pack).exits(0);
    let rebase = [
        "rebase",
        "old.snap",
        "--base",
        "another.snap",
        "--threads",
        "1",
    ];
    check(
        &folder,
        &Expected {
            args: &rebase,
            target: "old.snap",
            memory: &memory,
        },
    );
    check(
        &folder,
        &Expected {
            args: &[&rebase[..], &["-o", "new.snap"]].concat(),
            target: "new.snap",
            memory: &memory,
        },
    );
}

#[test]
fn killed_optimize_leaves_the_old_file_or_the_new_one() {
    if !can_trace("killed_optimize_leaves_the_old_file_or_the_new_one") {
        return;
    }
    let folder = Folder::new();
    chain(&folder);
    let memory = folder.read("other.raw");
    write_trace(&folder, "a.trace", "old.snap", &scattered(4200));
    // A child, in place and under a new name.
    let optimize = [
        "optimize",
        "old.snap",
        "--trace",
        "a.trace",
        "--threads",
        "1",
        "-o",
    ];
    for target in ["old.snap", "new.snap"] {
        check(
            &folder,
            &Expected {
                args: &[&optimize[..], &[target]].concat(),
                target,
                memory: &memory,
            },
        );
    }
    let create = [
        "create",
        "other.raw",
        "--trace",
        "a.trace",
        "--threads",
        "1",
        "-o",
    ];
    check(
        &folder,
        &Expected {
            args: &[&create[..], &["flat.snap"]].concat(),
            target: "flat.snap",
            memory: &memory,
        },
    );
}
