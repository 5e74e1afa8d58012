//! The loop that touches memory: the same for every contender, and as short as possible.
//!
//! A read adds the byte, weighted by its position, to a sum that doesn't depend on the order. A
//! write stores a byte derived from its position, and the sum is computed afterwards, from the byte
//! beside it.
#![allow(
    unsafe_code,
    reason = "memory that arrives while it is touched is reached through raw pointers"
)]

use std::sync::Barrier;
use std::time::Instant;

use crate::PAGE;
use crate::workload::Access;

/// Memory of a contender: readable, and private to this process, for `len` bytes as long as its
/// owner lives.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    base: *mut u8,
    len: u64,
}

// SAFETY: the value is an address; `new`'s caller has promised which accesses are allowed there,
// from any thread.
unsafe impl Send for Memory {}
// SAFETY: as above; accesses are volatile and of single bytes.
unsafe impl Sync for Memory {}

/// Result of touching.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    /// Sum of the bytes read.
    pub sum: u64,
    /// Duration of each touch, in nanoseconds, if requested.
    pub nanos: Vec<u64>,
}

impl Memory {
    /// Wraps the memory at `base`.
    ///
    /// # Safety
    ///
    /// `len` bytes from `base` on are mapped, readable, and may be overwritten without harm, as
    /// long as the value is used. Bytes may arrive while they are read.
    pub unsafe fn new(base: *mut u8, len: u64) -> Self {
        Self { base, len }
    }

    /// Returns the address of the first byte.
    pub fn base(self) -> *mut u8 {
        self.base
    }

    /// Returns the length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "memory is never empty")]
    pub fn len(self) -> u64 {
        self.len
    }

    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "it is the body of the loop that is measured"
    )]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "addresses have 64 bits here"
    )]
    fn at(self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.len);
        self.base.wrapping_add(offset as usize)
    }

    fn read(self, offset: u64) -> u8 {
        assert!(offset < self.len, "{offset} is not in {} bytes", self.len);
        // SAFETY: the offset is inside the memory, which `new`'s caller has promised to be
        // readable.
        unsafe { self.at(offset).read_volatile() }
    }

    /// Touches every offset, in order, in this thread. The offsets must be inside: see
    /// [`Memory::holds`].
    fn run(self, offsets: &[u64], access: Access) -> u64 {
        let mut sum = 0_u64;
        match access {
            Access::Read => {
                for &offset in offsets {
                    // SAFETY: `touch` has checked that all offsets lie inside.
                    let byte = unsafe { self.at(offset).read_volatile() };
                    sum = sum.wrapping_add(u64::from(byte).wrapping_mul(offset));
                }
            }
            Access::Write => {
                for &offset in offsets {
                    // SAFETY: as above; `new`'s caller has promised that a write is harmless.
                    unsafe { self.at(offset).write_volatile(mark(offset)) };
                }
            }
        }
        sum
    }

    /// Touches as `run` does, and measures each touch.
    fn run_timed(self, offsets: &[u64], access: Access) -> Touched {
        let mut touched = Touched::default();
        // The vector's memory must not be allocated while the clock runs.
        touched.nanos.resize(offsets.len(), 1);
        touched.nanos.clear();
        for offset in offsets {
            let began = Instant::now();
            let sum = self.run(std::slice::from_ref(offset), access);
            let nanos = began.elapsed().as_nanos();
            touched.sum = touched.sum.wrapping_add(sum);
            touched.nanos.push(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
        touched
    }

    fn holds(self, offsets: &[u64]) -> bool {
        offsets.iter().all(|offset| *offset < self.len)
    }

    /// Touches every offset from `threads` threads, each with its own part of the order.
    ///
    /// # Panics
    ///
    /// If an offset is not inside.
    pub fn touch(self, offsets: &[u64], access: Access, threads: usize, timed: bool) -> Touched {
        assert!(self.holds(offsets), "a touch outside of the memory");
        let one = |part: &[u64]| {
            if timed {
                return self.run_timed(part, access);
            }
            let sum = self.run(part, access);
            Touched {
                sum,
                nanos: Vec::new(),
            }
        };
        if threads <= 1 || offsets.is_empty() {
            return one(offsets);
        }
        let parts = offsets.chunks(offsets.len().div_ceil(threads));
        let barrier = Barrier::new(parts.len());
        std::thread::scope(|scope| {
            let running: Vec<_> = parts
                .map(|part| {
                    scope.spawn(|| {
                        barrier.wait();
                        one(part)
                    })
                })
                .collect();
            running
                .into_iter()
                .fold(Touched::default(), |mut all, one| {
                    let one = one
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    all.sum = all.sum.wrapping_add(one.sum);
                    all.nanos.extend(one.nanos);
                    all
                })
        })
    }

    /// Returns the sum of the touched bytes. For reads it is the sum taken while reading. After
    /// writes it covers the bytes beside the written ones; returns none if a write is missing.
    pub fn sum_after(self, offsets: &[u64], access: Access, touched: &Touched) -> Option<u64> {
        if access == Access::Read {
            return Some(touched.sum);
        }
        let mut sum = 0_u64;
        for &offset in offsets {
            if self.read(offset) != mark(offset) {
                return None;
            }
            let beside = offset ^ 1;
            sum = sum.wrapping_add(u64::from(self.read(beside)).wrapping_mul(beside));
        }
        Some(sum)
    }

    /// Returns a checksum of every byte of every touched page, in the order of pages.
    ///
    /// # Panics
    ///
    /// If a page is not inside.
    pub fn checksum(self, offsets: &[u64]) -> u32 {
        let mut pages: Vec<u64> = offsets.iter().map(|offset| offset / PAGE).collect();
        pages.sort_unstable();
        let mut hasher = crc32fast::Hasher::new();
        let mut copy = [0; 4096];
        for page in pages {
            assert!((page + 1) * PAGE <= self.len, "page {page} is not inside");
            // SAFETY: the page is inside the memory, which `new`'s caller has promised to be
            // readable; no thread touches it any more, and the copy is ours.
            unsafe {
                std::ptr::copy_nonoverlapping(self.at(page * PAGE), copy.as_mut_ptr(), copy.len());
            }
            hasher.update(&copy);
        }
        hasher.finalize()
    }
}

/// Returns the byte that a write leaves at `offset`.
fn mark(offset: u64) -> u8 {
    (offset >> 12).to_le_bytes()[0] | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes: &mut [u8]) -> Memory {
        // SAFETY: the tests use it only while they hold the slice exclusively, and don't use the
        // slice meanwhile.
        unsafe { Memory::new(bytes.as_mut_ptr(), bytes.len() as u64) }
    }

    #[test]
    fn checksum_depends_on_bytes_and_places_only() {
        let mut bytes: Vec<u8> = (0..4 * 4096_u32)
            .map(|n| n.to_le_bytes()[0] ^ 0x5a)
            .collect();
        let memory = memory(&mut bytes);
        let offsets = [5, 4097, 9000, 13_000];
        let sum = memory.touch(&offsets, Access::Read, 1, false).sum;
        let backwards = [13_000, 9000, 4097, 5];
        assert_eq!(memory.touch(&backwards, Access::Read, 1, true).sum, sum);
        assert_eq!(memory.touch(&backwards, Access::Read, 3, false).sum, sum);
        assert_ne!(memory.touch(&offsets[1..], Access::Read, 1, false).sum, sum);
        assert_eq!(memory.touch(&offsets, Access::Read, 2, true).nanos.len(), 4);
    }

    #[test]
    fn writes_are_checked_and_their_neighbours_summed() {
        let mut bytes = vec![2; 2 * 4096];
        let memory = memory(&mut bytes);
        let offsets = [7, 5000];
        let none = Touched::default();
        assert_eq!(memory.sum_after(&offsets, Access::Write, &none), None);
        let touched = memory.touch(&offsets, Access::Write, 1, false);
        let sum = memory.sum_after(&offsets, Access::Write, &touched);
        assert_eq!(sum, Some(2 * 6 + 2 * 5001));
    }

    #[test]
    fn one_byte_anywhere_in_a_touched_page_changes_the_checksum() {
        let mut bytes = vec![0; 3 * 4096];
        let before = memory(&mut bytes).checksum(&[1, 9000]);
        bytes[5000] = 1;
        assert_eq!(memory(&mut bytes).checksum(&[9000, 1]), before);
        bytes[12_000] = 1;
        assert_ne!(memory(&mut bytes).checksum(&[1, 9000]), before);
    }
}
