//! Proof that memory is empty.
//!
//! A page that is present when its memory is registered never raises a missing fault: its content,
//! mostly zeros, would pass for restored. Therefore an in-process restore checks after registering
//! whether there are any such pages.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::os::pagemap::populated;
use crate::{page_size, to_usize};

/// A view of which pages of this process hold anything: present, swapped out, or marked as
/// poisoned.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens the page map of this process.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Returns the first such page of `[address, address + len)`, by `PAGEMAP_SCAN` (6.7) or by
    /// reading the file.
    pub fn first_populated(&self, address: u64, len: u64) -> io::Result<Option<u64>> {
        let end = address.checked_add(len).ok_or(Errno::EINVAL)?;
        // The first range found ends the search.
        let scanned = populated(&self.0, address, end, |from, _| Err(Found::At(from)));
        match scanned {
            Ok(()) => Ok(None),
            Err(Found::At(address)) => Ok(Some(address)),
            Err(Found::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                scan_file(&self.0, address, end)
            }
            Err(Found::Error(error)) => Err(error),
        }
    }
}

/// Returns the first page of `[address, address + len)` of this process that holds anything
/// (present, swapped out, or marked as poisoned), by `PAGEMAP_SCAN` (6.7) or by reading
/// `/proc/self/pagemap`.
pub fn first_populated(address: u64, len: u64) -> io::Result<Option<u64>> {
    Pagemap::open()?.first_populated(address, len)
}

/// The reason why a scan stopped early.
enum Found {
    At(u64),
    Error(io::Error),
}

impl From<io::Error> for Found {
    fn from(error: io::Error) -> Self {
        Self::Error(error)
    }
}

/// Returns the first resident page by `mincore`, which needs no `/proc` and no permission. Only for
/// memory that was mapped just now and that nobody else knows of, because it doesn't see a page
/// that was swapped out.
///
/// That is sufficient proof for such memory. Only `mlockall(MCL_FUTURE)` could have filled it, at
/// the moment when it was mapped, but [`MappingOptions::map`](super::MappingOptions::map) first
/// maps without access, so that there is nothing to fill. Even if it had been filled, its pages
/// would have become resident some microseconds ago and been locked until just now; to be missed
/// here, each of them must have been written to swap in between.
pub fn first_resident(address: u64, len: u64) -> io::Result<Option<u64>> {
    let page = page_size();
    let mut resident = vec![0_u8; 64 << 10];
    let end = address.checked_add(len).ok_or(Errno::EINVAL)?;
    let mut at = address;
    while at < end {
        let pages = (end - at).div_ceil(page).min(resident.len() as u64);
        let pointer = std::ptr::with_exposed_provenance_mut(to_usize(at));
        // SAFETY: mincore only inspects the range, and writes one byte per page: `pages` is at most
        // the length of the buffer.
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

/// Returns the first populated page without `PAGEMAP_SCAN`, for kernels before 6.7. Slower: 8 bytes
/// are read per page.
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

/// Decodes a pagemap entry, which the kernel writes in the machine's own byte order.
#[expect(
    clippy::host_endian_bytes,
    reason = "the file is made by this machine's kernel"
)]
fn entry_of(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

/// The reason why the caller's memory can't be restored into.
#[derive(Debug)]
pub enum Unsuitable {
    /// The memory at this address is not private anonymous memory of small pages.
    Kind {
        /// Number of the range.
        range: usize,
        /// The address.
        address: u64,
    },
    /// The kind of memory can't be determined.
    Unproven(io::Error),
}

impl From<io::Error> for Unsuitable {
    fn from(error: io::Error) -> Self {
        Self::Unproven(error)
    }
}

/// Checks that `ranges`, which must be sorted and disjoint, are private anonymous memory of small
/// pages. Returns the parts of them that are already left out of children (`MADV_DONTFORK`).
///
/// Shared memory and files have pages that raise no missing fault, and huge pages can't be filled
/// in small pieces.
///
/// The check is one pass over `/proc/self/smaps`, up to the last of the ranges, however many they
/// are. The kernel walks every page table on the way, which takes up to 25 ms per GiB of resident
/// small pages at lower addresses (3 GiB: 73 ms; in huge pages 1 ms). Fresh memory mostly lies
/// below everything mapped earlier. `/proc/self/maps` is far cheaper, but doesn't show what
/// children inherit.
pub fn dont_fork_of(ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, Unsuitable> {
    let mut left_out: Vec<Range<u64>> = Vec::new();
    let Some(last) = ranges.last() else {
        return Ok(left_out);
    };
    let mut smaps = BufReader::with_capacity(SMAPS_READ, File::open(SMAPS)?);
    let mut line = String::new();
    // The first range that has not been seen entirely, and how far it has been seen.
    let (mut number, mut seen) = (0, 0);
    let mut mapping = 0..0;
    loop {
        line.clear();
        if smaps.read_line(&mut line)? == 0 {
            break;
        }
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_ascii_whitespace().any(|flag| flag == "dc") {
                let first = ranges.partition_point(|range| range.end <= mapping.start);
                let cut =
                    |range: &Range<u64>| range.start.max(mapping.start)..range.end.min(mapping.end);
                let parts = ranges[first..].iter().map(cut);
                left_out.extend(parts.take_while(|part| !part.is_empty()));
            }
            if mapping.end >= last.end {
                break;
            }
            continue;
        }
        let Some(found) = Mapped::parse(&line) else {
            continue;
        };
        mapping = found.addresses;
        while let Some(range) = ranges.get(number)
            && mapping.end > range.start.max(seen)
        {
            let next = range.start.max(seen);
            if mapping.start > next || !found.suitable {
                break;
            }
            seen = mapping.end;
            if mapping.end < range.end {
                break;
            }
            number += 1;
            seen = 0;
        }
        let begun = ranges.get(number).map(|range| range.start.max(seen));
        if begun.is_some_and(|next| next < mapping.end) {
            break;
        }
    }
    match ranges.get(number) {
        None => Ok(left_out),
        Some(range) => Err(Unsuitable::Kind {
            range: number,
            address: range.start.max(seen),
        }),
    }
}

/// Number of bytes read from the file at once: less than the kernel writes about one mapping, so
/// that it doesn't walk mappings after the last one that matters.
const SMAPS_READ: usize = 512;

/// The file that describes the mappings of this process.
pub const SMAPS: &str = "/proc/self/smaps";

/// The first line about a mapping.
struct Mapped {
    addresses: Range<u64>,
    /// Whether it is private anonymous memory; it may still have huge pages.
    suitable: bool,
}

impl Mapped {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (from, to) = fields.next()?.split_once('-')?;
        let parse = |hex: &str| u64::from_str_radix(hex, 16).ok();
        let addresses = parse(from)?..parse(to)?;
        let private = fields.next()?.ends_with('p');
        // Skips offset and device; then comes the inode, which is 0 for anonymous memory.
        let anonymous = fields.nth(2)? == "0";
        Some(Self {
            addresses,
            suitable: private && anonymous,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Mapping;

    #[test]
    fn resident_pages_are_found() {
        let page = page_size();
        // More than one call checks.
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
