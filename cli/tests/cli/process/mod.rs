//! The memory of a live process, which continues whatever happens.

mod file_systems;
mod interrupted;
mod refused;
mod taken;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use snaprestore_fixtures::host::{Unavailable, skipped};

use crate::common::{Folder, command, number, run, wait_until, with_default_signals};
use crate::owner::Owner;
use crate::process_memory::Puppet;

/// Far more time than a command takes that doesn't wait for anything.
const LONG: Duration = Duration::from_secs(100);

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
    let (index, region) = find(regions, address).expect("region is missing");
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

/// Returns a program that opens the file `name` of a file system served by another process.
fn opens(server: &Puppet, mount: &Folder, name: &str) -> String {
    let mount = mount.path().display();
    let path = format!("/proc/{}/root{mount}/{name}", server.pid());
    format!("file = os.open({path:?}, os.O_RDWR)\n")
}
