//! Memory of the trial itself.
#![allow(unsafe_code, reason = "files are mapped, and memory is filled, here")]

use std::fs::File;
use std::io;

use memmap2::{MmapOptions, MmapRaw};

use crate::BenchError;
use crate::touch::Memory;

/// A private mapping, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapRaw,
}

impl Region {
    /// Maps empty anonymous memory.
    pub(crate) fn anonymous(bytes: u64) -> Result<Self, BenchError> {
        Self::new(bytes, options(bytes)?.map_anon())
    }

    /// Maps a file privately: changes stay in this process.
    pub(crate) fn of_file(file: &File, bytes: u64, writable: bool) -> Result<Self, BenchError> {
        let options = options(bytes)?;
        // SAFETY: the file is not truncated or written while a run lasts.
        unsafe {
            if writable {
                Self::new(bytes, options.map_copy(file))
            } else {
                Self::new(bytes, options.map_copy_read_only(file))
            }
        }
    }

    /// Maps a file for reading and populates all its pages.
    pub(crate) fn populated(file: &File, bytes: u64) -> Result<Self, BenchError> {
        let mut options = options(bytes)?;
        // SAFETY: as in `of_file`.
        let map = unsafe { options.populate().map_copy_read_only(file) };
        Self::new(bytes, map)
    }

    fn new(bytes: u64, map: io::Result<impl Into<MmapRaw>>) -> Result<Self, BenchError> {
        let map = map.map_err(BenchError::io(format!("mapping {bytes} bytes")))?;
        Ok(Self { map: map.into() })
    }

    pub(crate) fn memory(&self) -> Memory {
        // SAFETY: the mapping is private and stays until `self` is dropped. A caller that maps
        // without write access doesn't hand the memory out.
        unsafe { Memory::new(self.map.as_mut_ptr(), self.map.len() as u64) }
    }

    pub(crate) fn address(&self) -> u64 {
        self.map.as_mut_ptr().expose_provenance() as u64
    }

    /// Returns a pointer to the byte at `offset`, for filling or reading the memory.
    pub(crate) fn at(&self, offset: u64) -> *mut u8 {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        debug_assert!(offset <= self.map.len());
        self.map.as_mut_ptr().wrapping_add(offset)
    }

    /// Returns all of it, to be filled.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is readable and writable for its length, fresh anonymous memory reads
        // as zeros, and it is borrowed exclusively here: nothing touches it before it is handed
        // out.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr(), self.map.len()) }
    }
}

fn options(bytes: u64) -> Result<MmapOptions, BenchError> {
    let mut options = MmapOptions::new();
    options.len(to_usize(bytes)?).no_reserve_swap();
    Ok(options)
}

pub(crate) fn to_usize(bytes: u64) -> Result<usize, BenchError> {
    usize::try_from(bytes)
        .map_err(|_| BenchError::Invalid(format!("{bytes} bytes are too many for this machine")))
}
