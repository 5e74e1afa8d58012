//! Memory of the trial itself.
#![allow(unsafe_code, reason = "mappings are made and unmapped here")]

use std::fs::File;
use std::os::fd::AsRawFd as _;

use crate::BenchError;
use crate::touch::Memory;

/// A private mapping, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Region {
    memory: Memory,
}

impl Region {
    /// Maps empty anonymous memory.
    pub(crate) fn anonymous(bytes: u64) -> Result<Self, BenchError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    }

    /// Maps a file privately: changes stay in this process.
    pub(crate) fn of_file(file: &File, bytes: u64, writable: bool) -> Result<Self, BenchError> {
        let write = if writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        Self::map(bytes, libc::PROT_READ | write, flags, file.as_raw_fd())
    }

    /// Maps a file for reading and populates all its pages.
    pub(crate) fn populated(file: &File, bytes: u64) -> Result<Self, BenchError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_POPULATE;
        Self::map(bytes, libc::PROT_READ, flags, file.as_raw_fd())
    }

    fn map(bytes: u64, access: i32, flags: i32, fd: i32) -> Result<Self, BenchError> {
        let len = to_usize(bytes)?;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(BenchError::last(format!("mapping {bytes} bytes")));
        }
        // SAFETY: the mapping is private and stays until `self` is dropped; the files behind it are
        // not truncated while a run lasts. A caller that maps without write access doesn't hand the
        // memory out.
        let memory = unsafe { Memory::new(base.cast(), bytes) };
        Ok(Self { memory })
    }

    pub(crate) fn memory(&self) -> Memory {
        self.memory
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.base().expose_provenance() as u64
    }

    /// Returns a pointer to the byte at `offset`, for filling or reading the memory.
    pub(crate) fn at(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset <= self.memory.len());
        self.memory
            .base()
            .wrapping_add(usize::try_from(offset).unwrap_or(usize::MAX))
    }

    /// Returns all of it, to be filled.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = usize::try_from(self.memory.len()).unwrap_or(0);
        // SAFETY: the mapping is readable and writable for its length, fresh anonymous memory reads
        // as zeros, and it is borrowed exclusively here: nothing touches it before it is handed
        // out.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base(), len) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let len = usize::try_from(self.memory.len()).unwrap_or(0);
        // SAFETY: the mapping is ours; the users of its memory have borrowed or copied only
        // addresses, and the trial that used them is over. An error would leave it mapped, which is
        // harmless.
        let _ = unsafe { libc::munmap(self.memory.base().cast(), len) };
    }
}

pub(crate) fn to_usize(bytes: u64) -> Result<usize, BenchError> {
    usize::try_from(bytes)
        .map_err(|_| BenchError::Invalid(format!("{bytes} bytes are too many for this machine")))
}
