//! The proof that memory is empty.
//!
//! A page that is present when its memory is registered never faults as missing: whatever it holds,
//! zeros mostly, would be taken for restored. So an in-process restore looks, after registering,
//! whether there is any.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::ioctl_readwrite;

use crate::sys::{page_size, to_usize};

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

#[repr(C)]
#[derive(Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
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

const _: () = assert!(size_of::<PageRegion>() == 24 && size_of::<PmScanArg>() == 96);

ioctl_readwrite!(pagemap_scan, b'f', 16, PmScanArg);

/// The first page of `[address, address + len)` of this process that holds anything (present,
/// swapped out, or marked as poisoned), by `PAGEMAP_SCAN` (6.7) or by reading `/proc/self/pagemap`.
pub fn first_populated(address: u64, len: u64) -> io::Result<Option<u64>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let end = address.checked_add(len).ok_or(Errno::EINVAL)?;
    let mut found = PageRegion::default();
    let mut argument = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start: address,
        end,
        vec: (&raw mut found).expose_provenance() as u64,
        vec_len: 1,
        max_pages: 1,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..PmScanArg::default()
    };
    // SAFETY: `argument` is a live pm_scan_arg that says its own size, and `found` is the one
    // page_region that `vec` and `vec_len` promise; both are exclusively ours. Without flags the
    // call only looks. A kernel without it answers ENOTTY.
    match unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut argument) } {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(found.start)),
        Err(Errno::ENOTTY | Errno::EINVAL) => scan_file(&pagemap, address, end),
        Err(errno) => Err(errno.into()),
    }
}

/// The same by `mincore`, which needs no `/proc` and no permission, for memory that was mapped just
/// now and that nobody else knows of. It doesn't see a page that was swapped out.
///
/// That is proof enough for such memory: what could have filled it is `mlockall(MCL_FUTURE)`, at
/// the moment when it was mapped. [`MappingOptions::map`](super::MappingOptions::map) maps without
/// access first, so that there is nothing to fill. Were it filled all the same, its pages would
/// have become resident some microseconds ago and be locked until they were unlocked just now; to
/// be missed here, each of them must have been written to swap in between.
pub(crate) fn first_resident(address: u64, len: u64) -> io::Result<Option<u64>> {
    let page = page_size();
    let mut resident = vec![0_u8; 64 << 10];
    let end = address.checked_add(len).ok_or(Errno::EINVAL)?;
    let mut at = address;
    while at < end {
        let pages = (end - at).div_ceil(page).min(resident.len() as u64);
        let pointer = std::ptr::with_exposed_provenance_mut(to_usize(at));
        // SAFETY: mincore only looks at the range, and writes one byte for each of its pages:
        // `pages` is at most the length of the buffer.
        let result =
            unsafe { libc::mincore(pointer, to_usize(pages * page), resident.as_mut_ptr()) };
        Errno::result(result)?;
        let seen = &resident[..to_usize(pages)];
        if let Some(index) = seen.iter().position(|state| state & 1 != 0) {
            return Ok(Some(at + index as u64 * page));
        }
        at += pages * page;
    }
    Ok(None)
}

/// The same without `PAGEMAP_SCAN`, for kernels before 6.7: slower, 8 bytes read for each page.
pub fn first_populated_by_pagemap(address: u64, len: u64) -> io::Result<Option<u64>> {
    let end = address.checked_add(len).ok_or(Errno::EINVAL)?;
    scan_file(&File::open("/proc/self/pagemap")?, address, end)
}

fn scan_file(pagemap: &File, address: u64, end: u64) -> io::Result<Option<u64>> {
    const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
    let page = page_size();
    let mut buffer = vec![0; 64 << 10];
    let mut at = address;
    while at < end {
        let pages = (end - at).div_ceil(page).min(buffer.len() as u64 / 8);
        let bytes = &mut buffer[..to_usize(pages * 8)];
        pagemap.read_exact_at(bytes, at / page * 8)?;
        let entries = bytes.chunks_exact(8).map(|entry| {
            let word = <[u8; 8]>::try_from(entry).map_or(u64::MAX, entry_of);
            word & PRESENT_OR_SWAPPED != 0
        });
        for (index, populated) in (0..).zip(entries) {
            if populated {
                return Ok(Some(at + index * page));
            }
        }
        at += pages * page;
    }
    Ok(None)
}

/// The kernel writes the entries of pagemap in the machine's own byte order.
#[expect(
    clippy::host_endian_bytes,
    reason = "the file is made by this machine's kernel"
)]
fn entry_of(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

/// The first address of the range that is not private anonymous memory of small pages, by
/// `/proc/self/maps`.
///
/// Shared memory and files have pages that raise no missing fault, and huge pages can't be filled
/// in small ones.
pub fn first_unsuitable(address: u64, len: u64) -> io::Result<Option<u64>> {
    let end = address.saturating_add(len);
    let mut next = address;
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let mut fields = line.split_ascii_whitespace();
        let bounds = fields.next().and_then(|bounds| bounds.split_once('-'));
        let parse = |hex: &str| u64::from_str_radix(hex, 16).ok();
        let Some((from, to)) = bounds.and_then(|(from, to)| Some((parse(from)?, parse(to)?)))
        else {
            continue;
        };
        if to <= next {
            continue;
        }
        if from > next || next >= end {
            break;
        }
        let private = fields.next().is_some_and(|mode| mode.ends_with('p'));
        // Offset and device, then the inode: 0 for anonymous memory.
        let anonymous = fields.nth(2) == Some("0");
        if !private || !anonymous {
            return Ok(Some(next));
        }
        next = to;
    }
    Ok((next < end).then_some(next))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Mapping;

    #[test]
    fn resident_pages_are_found() {
        let page = page_size();
        // More than one call looks at.
        let len = 70_000 * page;
        let memory = Mapping::new(len).unwrap();
        assert_eq!(first_resident(memory.address(), len).unwrap(), None);
        for there in [69_999, 65_536, 3, 0] {
            // SAFETY: the page is in the mapping, which is ours alone.
            unsafe {
                memory
                    .as_ptr()
                    .add(to_usize(there * page))
                    .write_volatile(1);
            }
            let found = first_resident(memory.address(), len).unwrap();
            assert_eq!(found, Some(memory.address() + there * page));
        }
    }
}
