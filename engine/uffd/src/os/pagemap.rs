//! Search for the existing pages of a process without checking each page: `PAGEMAP_SCAN` (Linux
//! 6.7).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<PageRegion>() == 24);

mod request {
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, super::ScanArg);
}

/// The page is not write-protected by a userfaultfd (`PAGE_IS_WRITTEN`).
const WRITTEN: u64 = 1 << 1;
/// The page is in memory (`PAGE_IS_PRESENT`).
const PRESENT: u64 = 1 << 3;
/// The page is in swap, or a marker is in its place (`PAGE_IS_SWAPPED`).
const SWAPPED: u64 = 1 << 4;
/// The marker of a guard page is in its place (`PAGE_IS_GUARD`, Linux 6.16).
const GUARD: u64 = 1 << 8;
/// Maximum number of ranges that one call returns.
const RANGES: usize = 256;

/// An entry of a page table, as far as it tells where the page's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The page is in memory.
    Present,
    /// The page is in swap, or is poisoned, or is about to be moved.
    Swapped,
    /// Like [`Self::Swapped`], and a userfaultfd write-protects the page. In shared memory this is
    /// only a marker: the content is in the file.
    Protected,
    /// A guard page (`MADV_GUARD_INSTALL`): it has no content. Kernels before 6.16 report
    /// [`Self::Swapped`].
    Guard,
}

/// Calls `each` with the populated ranges of addresses from `start` to `end`, in memory or in swap,
/// in order. `pagemap` is an open `/proc/PID/pagemap`. Ranges may be adjacent.
///
/// An error of kind `Unsupported` means that the kernel doesn't know the call; no range was found
/// yet.
pub fn populated<E: From<io::Error>>(
    pagemap: &File,
    start: u64,
    end: u64,
    mut each: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    entries(pagemap, start, end, |from, to, _| each(from, to))
}

/// Works like [`populated`], and also tells the kinds of entries apart.
pub fn entries<E: From<io::Error>>(
    pagemap: &File,
    start: u64,
    end: u64,
    mut each: impl FnMut(u64, u64, Entry) -> Result<(), E>,
) -> Result<(), E> {
    let mut ranges = [PageRegion::default(); RANGES];
    let mut wanted = PRESENT | SWAPPED | WRITTEN | GUARD;
    let mut at = start;
    while at < end {
        let mut scan = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: at,
            end,
            vec: ranges.as_mut_ptr() as u64,
            vec_len: RANGES as u64,
            category_anyof_mask: PRESENT | SWAPPED,
            return_mask: wanted,
            ..ScanArg::default()
        };
        // SAFETY: the kernel reads and writes `scan`, and writes at most `vec_len` entries to
        // `ranges`; both are ours alone and outlive the call. It only inspects the pages, because
        // the flags that would write-protect them are zero. A file that is not a pagemap, or an
        // older kernel, returns ENOTTY.
        match unsafe { request::pagemap_scan(pagemap.as_raw_fd(), &raw mut scan) } {
            Ok(found) => {
                let found = usize::try_from(found).unwrap_or(0).min(RANGES);
                for range in &ranges[..found] {
                    each(range.start, range.end, entry(range.categories))?;
                }
                if scan.walk_end <= at {
                    return Err(io::Error::other("PAGEMAP_SCAN came to a halt").into());
                }
                at = scan.walk_end;
            }
            Err(Errno::EINTR) => {}
            // Linux 6.7 to 6.15.
            Err(Errno::EINVAL) if wanted & GUARD != 0 => wanted &= !GUARD,
            Err(Errno::ENOTTY) => {
                return Err(io::Error::from(io::ErrorKind::Unsupported).into());
            }
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
    }
    Ok(())
}

fn entry(categories: u64) -> Entry {
    if categories & GUARD != 0 {
        Entry::Guard
    } else if categories & PRESENT != 0 {
        Entry::Present
    } else if categories & WRITTEN != 0 {
        Entry::Swapped
    } else {
        Entry::Protected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_pages_are_found_among_a_terabyte() {
        let page = 4096;
        let bytes = 1 << 40;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
        let place = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        assert_ne!(place, libc::MAP_FAILED);
        // SAFETY: nobody else knows the mapping, and no huge pages are created in it.
        unsafe {
            libc::madvise(place, bytes, libc::MADV_NOHUGEPAGE);
            for at in [0, 1, 1000, bytes / page - 1] {
                place.cast::<u8>().add(at * page).write(1);
            }
        }
        let start = place as u64;
        let mut found = Vec::new();
        let scanned = populated(
            &File::open("/proc/self/pagemap").unwrap(),
            start,
            start + bytes as u64,
            |from, to| {
                let pages = (from - start) / page as u64..(to - start) / page as u64;
                found.extend(pages);
                Ok::<_, io::Error>(())
            },
        );
        // SAFETY: the mapping is ours and nothing refers to it any more.
        assert_eq!(unsafe { libc::munmap(place, bytes) }, 0);
        match scanned {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                assert!(found.is_empty(), "{found:?}");
            }
            scanned => {
                scanned.unwrap();
                assert_eq!(found, [0, 1, 1000, (bytes / page - 1) as u64]);
            }
        }
    }
}
