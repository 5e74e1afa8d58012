//! Real memory for the tests, and the machine's requirements for it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use snaprestore_fixtures::guest::{self, GuestImage, GuestStates, Unavailable};
use snaprestore_fixtures::host::{find_program, skipped};
use snaprestore_fixtures::live::Live;
use snaprestore_uffd::uffd::{OpenError, OpenOptions};

use crate::compare::{PAGE, bytes_at};

/// Reports that a test can't run here and counts as skipped.
pub fn skip(test: &str, why: &str) {
    skipped(test, &why);
}

/// Returns the memory of a real guest. Returns `None` and reports it on a machine that cannot make
/// one; on any other machine, a failure to make a guest fails the test.
pub fn guest(test: &str) -> Option<GuestImage> {
    made(test, guest::memory())
}

/// Returns the states of a small working guest, as [`guest()`] returns the memory of a large one.
pub fn guest_states(test: &str) -> Option<GuestStates> {
    made(test, guest::states())
}

fn made<T>(test: &str, made: Result<T, Unavailable>) -> Option<T> {
    let lacks = if cfg!(not(target_arch = "x86_64")) {
        Some("the guest is a PC (x86-64), and this machine is none")
    } else if find_program("apt-get").is_none() || find_program("dpkg-deb").is_none() {
        Some("the guest is made of Debian packages, and this is no Debian system")
    } else if find_program("qemu-system-x86_64").is_none() && !nix::unistd::geteuid().is_root() {
        Some("QEMU is missing and only root can install it: apt-get install qemu-system-x86")
    } else {
        None
    };
    match (made, lacks) {
        (Ok(image), _) => Some(image),
        (Err(_), Some(lacks)) => {
            skip(test, lacks);
            None
        }
        (Err(why), None) => panic!("the guest's memory can't be made: {why}"),
    }
}

/// Returns a live process with about `mib` MiB of data, if this machine has Python or can install
/// it.
pub fn live(test: &str, mib: u32) -> Option<Live> {
    match Live::start(mib) {
        Ok(live) => Some(live),
        Err(why) if find_program("python3").is_none() => {
            skip(test, &why.to_string());
            None
        }
        Err(why) => panic!("the live process doesn't start: {why}"),
    }
}

/// Returns whether memory can be restored lazily on this machine; reports if not.
pub fn can_restore(test: &str) -> bool {
    match OpenOptions::new().open() {
        Ok(_) => true,
        Err(why @ (OpenError::NotPermitted { .. } | OpenError::NotSupported { .. })) => {
            skip(test, &why.to_string());
            false
        }
        Err(why) => panic!("userfaultfd: {why}"),
    }
}

/// Writes the part of the guest's memory with the most content to a file: `bytes` long, a
/// multiple of 1 MiB.
pub fn guest_piece(image: &GuestImage, bytes: u64, to: &Path) {
    const STEP: u64 = 1 << 20;
    let raw = File::open(&image.raw).expect("the guest's memory");
    let len = raw.metadata().expect("the guest's memory").len();
    // One page in eight of each MiB is enough to tell full from empty.
    let full: Vec<u64> = (0..len / STEP)
        .map(|mib| {
            (0..32)
                .filter(|eighth| {
                    let page = bytes_at(&raw, mib * STEP + eighth * 8 * PAGE as u64, PAGE);
                    page.iter().any(|byte| *byte != page[0])
                })
                .count() as u64
        })
        .collect();
    let window = usize::try_from(bytes / STEP).expect("a small piece");
    let (best, _) = full
        .windows(window)
        .map(|mibs| mibs.iter().sum::<u64>())
        .enumerate()
        .max_by_key(|(_, sum)| *sum)
        .expect("a piece no larger than the guest");
    let out = File::create(to).expect("a file for the piece");
    for mib in 0..bytes / STEP {
        let part = bytes_at(&raw, (best as u64 + mib) * STEP, 1 << 20);
        out.write_all_at(&part, mib * STEP).expect("writing");
    }
}
