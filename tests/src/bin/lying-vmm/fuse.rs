//! A file system with one file, which answers every request except the one for closing the file.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, IntoRawFd as _, RawFd};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

// From linux/fuse.h.
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
/// Error number for requests that are not implemented, negated as the FUSE protocol requires.
const ENOSYS: i32 = -38;

/// Returns an open file of a file system that a child serves until it exits. This process cannot
/// serve it, because its own exit would wait for itself.
pub(crate) fn file() -> io::Result<RawFd> {
    // The mount is visible to this process only, and disappears with it.
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let folder = std::env::temp_dir().join(format!("lying-vmm-{}", std::process::id()));
    fs::create_dir(&folder)?;
    let number = device.as_raw_fd();
    let options = format!("fd={number},rootmode=40000,user_id=0,group_id=0");
    let kind = Some("fuse");
    mount(
        kind,
        &folder,
        kind,
        MsFlags::empty(),
        Some(options.as_str()),
    )?;
    // SAFETY: the child allocates as well, but this process has one thread still.
    if unsafe { libc::fork() } == 0 {
        // SAFETY: takes numbers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        serve(device);
        std::process::exit(0);
    }
    drop(device);
    let file = File::open(folder.join("file"))?;
    umount2(&folder, MntFlags::MNT_DETACH)?;
    fs::remove_dir(&folder)?;
    Ok(file.into_raw_fd())
}

fn serve(mut device: File) {
    let mut request = vec![0; 1 << 17];
    while let Ok(read) = device.read(&mut request) {
        let word = |at: usize| {
            let bytes = request[..read].get(at..at + 8).unwrap_or(&[0; 8]);
            u64::from_le_bytes(bytes.try_into().unwrap_or_default())
        };
        // Length and kind of the request, a number for the answer, the file.
        let (asked, unique, node) = ((word(0) >> 32) as u32, word(8), word(16));
        let mut attributes = [0_u8; 88];
        attributes[0] = if node == 1 { 1 } else { 2 };
        let (answer, error) = match asked {
            FLUSH => continue,
            INIT => {
                let mut init = vec![0; 64];
                (init[0], init[4], init[8]) = (7, 31, 0);
                // Maximum size of a write, which must not be below a minimum.
                init[20..24].copy_from_slice(&4096_u32.to_le_bytes());
                (init, 0)
            }
            LOOKUP => {
                let mut entry = vec![0; 40];
                entry[0] = 2;
                attributes[0] = 2;
                attributes[60..64].copy_from_slice(&0o100_644_u32.to_le_bytes());
                entry.extend(attributes);
                (entry, 0)
            }
            GETATTR => {
                let mode: u32 = if node == 1 { 0o40_755 } else { 0o100_644 };
                attributes[60..64].copy_from_slice(&mode.to_le_bytes());
                ([&[0; 16][..], &attributes].concat(), 0)
            }
            OPEN => (vec![0; 16], 0),
            _ => (Vec::new(), ENOSYS),
        };
        let len = u32::try_from(16 + answer.len()).unwrap_or(0);
        let mut reply = len.to_le_bytes().to_vec();
        reply.extend(error.to_le_bytes());
        reply.extend(unique.to_le_bytes());
        reply.extend(answer);
        let _ = device.write(&reply);
    }
}
