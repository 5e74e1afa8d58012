//! The confined part of a daemon's worker: takes one VM's memory, drops its privileges, serves the
//! VM to its end, and then attempts something forbidden.
//!
//! ```text
//! confined-worker SOCKET SNAPSHOT [--user NAME] [--readable FOLDER] [--then WHAT]
//! ```
#![allow(clippy::print_stdout, reason = "it is a program")]

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::getppid;
use snaprestore_daemon::parts::{Account, Confinement, confine_worker};
use snaprestore_engine::Prefetch;
use snaprestore_engine::pager::{Handover, Pager, firecracker};
use snaprestore_uffd::os::{open_pidfd, peer_of};
use snapshot_format::{FileStore, Snapshot};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().context("no socket")?;
    let snapshot = args.next().context("no snapshot")?;
    let mut wanted = Confinement::default();
    let mut then = None;
    while let Some(option) = args.next() {
        let value = args.next().context("no value")?;
        match option.as_str() {
            "--user" => wanted.account = Some(Account::find(&value)?),
            "--readable" => wanted.readable.push(PathBuf::from(value)),
            "--then" => then = Some(value),
            _ => bail!("{option}"),
        }
    }
    let listener = UnixListener::bind(socket)?;
    println!("listening");
    let (stream, _) = listener.accept()?;
    let handed = firecracker::handshake(&stream, Duration::from_secs(60))?;
    let peer = peer_of(stream.as_fd())?;
    let store = FileStore::open(&snapshot)?;

    let confined = confine_worker(&wanted)?;
    println!("landlock {}", confined.landlock.unwrap_or(0));
    for warning in confined.warnings {
        println!("warning: {warning}");
    }

    let snapshot = Arc::new(Snapshot::open(Arc::new(store))?);
    let handover = Handover {
        userfaultfd: handed.userfaultfd,
        owner: peer.pidfd,
        regions: handed.regions,
        page_map: None,
    };
    let paged = Pager::new(snapshot)
        .fault_threads(2)
        .prefetch(Prefetch::All)
        .attach(handover)?;
    println!("ended: {:?}", paged.wait());
    let failures = paged.failures();
    println!("{} failures", failures.len());
    drop(paged);
    if let Some(then) = then {
        println!("{then}: {}", outcome(&then, &wanted));
    }
    Ok(())
}

/// Attempts a forbidden operation and returns the result: the number of the error.
fn outcome(what: &str, wanted: &Confinement) -> String {
    let result = match what {
        "open" => File::open("/etc/passwd").map(drop),
        "read" => std::fs::read_dir(&wanted.readable[0]).map(drop),
        "write" => File::create(wanted.readable[0].join("new")).map(drop),
        "socket" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "connect" => std::os::unix::net::UnixStream::connect("/dev/log").map(drop),
        "fork" => Command::new("/bin/true").status().map(drop),
        "kill" => kill(getppid(), Signal::SIGUSR1).map_err(Into::into),
        "pidfd" => open_pidfd(1).map(drop),
        "stat" => std::fs::metadata(Path::new("/etc/passwd")).map(drop),
        "exec" => Err(Command::new("/bin/true").exec()),
        "userfaultfd" => snaprestore_uffd::uffd::OpenOptions::new()
            .open()
            .map(drop)
            .map_err(std::io::Error::other),
        _ => unreachable!("{what}"),
    };
    match result {
        Ok(()) => "done".into(),
        Err(error) => format!("{:?}", error.raw_os_error()),
    }
}
