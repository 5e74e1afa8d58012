//! A daemon's supervisor as far as other processes can tell: takes one VM's memory, stores it with
//! a guardian or a service manager, and serves nothing.
//!
//! ```text
//! stand-in-supervisor PROGRAM SOCKET SNAPSHOT
//! ```
//!
//! `PROGRAM` is the `snaprestore` whose guardian is used. The program prints which process holds
//! the memory, takes a VM at `SOCKET`, and runs the commands that it reads line by line: `release`,
//! `news`. Started again by a service manager that passes it the stored descriptors, it serves the
//! VM from `SNAPSHOT`.
#![allow(clippy::print_stdout, reason = "it is a program")]

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use snaprestore_daemon::parts::{FdStore, OWNER, UFFD, take_inherited_fds};
use snaprestore_engine::pager::{Handover, OwnerRegion, Pager, firecracker};
use snaprestore_uffd::os::peer_of;
use snapshot_format::Snapshot;

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [program, socket, snapshot] = &args[..] else {
        anyhow::bail!("usage: stand-in-supervisor PROGRAM SOCKET SNAPSHOT");
    };
    let inherited = take_inherited_fds();
    let mut store = FdStore::find(Path::new(program), &inherited);
    for (name, _) in &inherited.others {
        println!("given {name}");
    }
    println!("held by {store}");
    if let Some(warning) = store.warning() {
        println!("warning: {warning}");
    }
    if let Some((id, fds)) = inherited.stored.into_iter().next() {
        let roles: Vec<_> = fds.iter().map(|(role, _)| role.as_str()).collect();
        println!("given {id}: {}", roles.join(" "));
        go_on(fds, Path::new(snapshot))?;
        store.remove(&id)?;
        println!("released {id}");
        return Ok(());
    }
    let listener = UnixListener::bind(socket)?;
    println!("listening");
    let (stream, _) = listener.accept()?;
    let handed = firecracker::handshake(&stream, Duration::from_secs(60))?;
    let peer = peer_of(stream.as_fd())?;
    let meta = meta(&handed.regions)?;
    let fds = [
        (UFFD, handed.userfaultfd.as_fd()),
        (OWNER, peer.pidfd.as_fd()),
        ("meta", meta.as_fd()),
    ];
    match store.store("vm-1", "some", &fds) {
        Ok(()) => println!("held"),
        Err(error) => println!("not held: {error}"),
    }
    for line in io::stdin().lines() {
        match line?.as_str() {
            "release" => {
                store.remove("vm-1")?;
                println!("released");
            }
            "news" => {
                let mut events = store.events();
                while events.is_empty() {
                    std::thread::sleep(Duration::from_millis(5));
                    events = store.events();
                }
                println!("{events:?}");
            }
            other => anyhow::bail!("{other:?}"),
        }
    }
    Ok(())
}

fn meta(regions: &[OwnerRegion]) -> Result<File> {
    let region =
        |region: &OwnerRegion| json!([region.address, region.len, region.offset, region.page_size]);
    let regions: Value = regions.iter().map(region).collect();
    let mut file = tempfile::tempfile()?;
    file.write_all(regions.to_string().as_bytes())?;
    Ok(file)
}

/// Serves the VM whose descriptors were passed back, until it exits.
fn go_on(fds: Vec<(String, OwnedFd)>, snapshot: &Path) -> Result<()> {
    let (mut userfaultfd, mut owner, mut regions) = (None, None, Vec::new());
    for (role, fd) in fds {
        match role.as_str() {
            UFFD => userfaultfd = Some(fd),
            OWNER => owner = Some(fd),
            _ => {
                let (mut file, mut text) = (File::from(fd), String::new());
                file.rewind()?;
                file.read_to_string(&mut text)?;
                let numbers: Vec<[u64; 4]> = serde_json::from_str(&text)?;
                let region = |[address, len, offset, page_size]: [u64; 4]| OwnerRegion {
                    address,
                    len,
                    offset,
                    page_size,
                };
                regions = numbers.into_iter().map(region).collect();
            }
        }
    }
    let handover = Handover {
        userfaultfd: userfaultfd.context("no userfaultfd")?,
        owner: owner.context("no owner")?,
        regions,
        page_map: None,
    };
    let snapshot = Arc::new(Snapshot::open_path(snapshot)?);
    let paged = Pager::new(snapshot).attach(handover)?;
    println!("ended: {:?}", paged.wait());
    Ok(())
}
