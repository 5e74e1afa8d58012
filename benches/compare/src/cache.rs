//! Makes files warm or cold.
#![allow(unsafe_code, reason = "advice to the kernel")]

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use crate::BenchError;

/// Reads the whole file, so that it is in the page cache.
pub(crate) fn warm(path: &Path) -> Result<(), BenchError> {
    let named = || format!("{}: reading it to warm it up", path.display());
    let mut file = File::open(path).map_err(BenchError::io(named()))?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).map_err(BenchError::io(named()))? > 0 {}
    Ok(())
}

/// Drops the file from the page cache: all caches if that is permitted, otherwise this file's
/// pages, as far as the kernel follows the advice. Returns which.
pub(crate) fn cool(path: &Path) -> Result<&'static str, BenchError> {
    populate_own_code();
    let named = format!("{}: dropping it from the page cache", path.display());
    let file = File::open(path).map_err(BenchError::io(named))?;
    // SAFETY: the call is advice about an open file.
    unsafe {
        // Only clean pages can be dropped.
        libc::fdatasync(file.as_raw_fd());
        libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED);
    }
    if fs::write("/proc/sys/vm/drop_caches", "3").is_ok() {
        Ok("drop_caches")
    } else {
        Ok("POSIX_FADV_DONTNEED only: dropping all caches needs root")
    }
}

/// Maps all pages of the program and its libraries. Mapped pages aren't dropped, and otherwise the
/// time of a contender would include reading its code again.
fn populate_own_code() {
    const MADV_POPULATE_READ: i32 = 22;
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(access)) = (words.next(), words.next()) else {
            continue;
        };
        let of_file = words.nth(3).is_some_and(|name| name.starts_with('/'));
        let Some((from, to)) = range.split_once('-') else {
            continue;
        };
        let hex = |text| usize::from_str_radix(text, 16);
        if let (true, true, Ok(from), Ok(to)) =
            (of_file, access.starts_with('r'), hex(from), hex(to))
        {
            let address = std::ptr::with_exposed_provenance_mut(from);
            // SAFETY: populating for reading changes no content. Kernels before 5.14 refuse it, and
            // the measurement then includes some reading of code.
            let _ = unsafe { libc::madvise(address, to - from, MADV_POPULATE_READ) };
        }
    }
}
