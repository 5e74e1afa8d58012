//! The proof that memory is empty.
//!
//! A page that is present when its memory is registered never faults as missing: whatever it holds,
//! zeros mostly, would be taken for restored. So an in-process restore looks, after registering,
//! whether there is any.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::sys::pagemap::populated;
use crate::sys::{page_size, to_usize};

/// The first page of `[address, address + len)` of this process that holds anything (present,
/// swapped out, or marked as poisoned), by `PAGEMAP_SCAN` (6.7) or by reading `/proc/self/pagemap`.
pub fn first_populated(address: u64, len: u64) -> io::Result<Option<u64>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let end = address.checked_add(len).ok_or(Errno::EINVAL)?;
    // The first range that is found ends the search.
    let scanned = populated(&pagemap, address, end, |from, _| Err(Found::At(from)));
    match scanned {
        Ok(()) => Ok(None),
        Err(Found::At(address)) => Ok(Some(address)),
        Err(Found::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
            scan_file(&pagemap, address, end)
        }
        Err(Found::Error(error)) => Err(error),
    }
}

/// Why a scan was not carried to its end.
enum Found {
    At(u64),
    Error(io::Error),
}

impl From<io::Error> for Found {
    fn from(error: io::Error) -> Self {
        Self::Error(error)
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
