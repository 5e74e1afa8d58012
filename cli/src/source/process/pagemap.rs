//! Which pages of a process exist: `/proc/PID/pagemap`, one word a page.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result};

use super::super::PAGE;

/// The page is in memory.
const PRESENT: u64 = 1 << 63;
/// The page is in swap.
const SWAPPED: u64 = 1 << 62;
/// Words read at once: 512 KiB of them describe 256 MiB.
const WORDS: usize = 64 << 10;

/// An opened `pagemap`.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens that of a process, whose folder in `/proc` is `folder`.
    pub(super) fn open(folder: &str) -> io::Result<Self> {
        File::open(format!("{folder}/pagemap")).map(|file| Self { file })
    }

    /// Calls `run` with the start, the number and the state (populated or never touched) of each
    /// run of pages, in order and without gaps.
    pub(super) fn runs(
        &self,
        start: u64,
        pages: u64,
        mut run: impl FnMut(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        let mut bytes = vec![0; 8 * WORDS.min(usize::try_from(pages)?)];
        let end = start + pages * PAGE;
        let mut at = start;
        // Where the current run began, and its state.
        let mut open: Option<(u64, bool)> = None;
        while at < end {
            let count = usize::try_from((end - at) / PAGE)?.min(WORDS);
            let bytes = &mut bytes[..8 * count];
            self.file
                .read_exact_at(bytes, at / PAGE * 8)
                .context("finding which pages exist")?;
            let (words, _) = bytes.as_chunks::<8>();
            for word in words {
                // The kernel writes its own byte order; only this machine reads it.
                #[expect(clippy::host_endian_bytes, reason = "a word from the kernel")]
                let populated = u64::from_ne_bytes(*word) & (PRESENT | SWAPPED) != 0;
                match open {
                    Some((_, state)) if state == populated => {}
                    Some((began, state)) => {
                        run(began, (at - began) / PAGE, state)?;
                        open = Some((at, populated));
                    }
                    None => open = Some((at, populated)),
                }
                at += PAGE;
            }
        }
        match open {
            Some((began, state)) => run(began, (end - began) / PAGE, state),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_pages_of_this_process_are_populated() {
        // A fresh mapping, large enough that the allocator doesn't fill it with anything.
        let mut memory = vec![0_u8; 16 << 20];
        let base = (memory.as_ptr() as u64).next_multiple_of(2 << 20);
        let index = usize::try_from(base - memory.as_ptr() as u64).unwrap();
        for page in [0, 1, 1000] {
            memory[index + page * 4096] = 1;
        }
        let mut runs = Vec::new();
        Pagemap::open("/proc/self")
            .unwrap()
            .runs(base, 2048, |start, pages, populated| {
                runs.push(((start - base) / PAGE, pages, populated));
                Ok(())
            })
            .unwrap();
        let state = |page: u64| {
            runs.iter()
                .find(|(start, pages, _)| (*start..start + pages).contains(&page))
                .unwrap()
                .2
        };
        assert!(state(0) && state(1) && state(1000), "{runs:?}");
        assert_eq!(runs.iter().map(|(_, pages, _)| pages).sum::<u64>(), 2048);
        std::hint::black_box(&memory);
    }
}
