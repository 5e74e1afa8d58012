//! Which pages of a process exist: `/proc/PID/pagemap`.
//!
//! The kernel lists what is populated (Linux 6.7), which takes no time for what isn't; an older one
//! gives a word for each page.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result};
use snaprestore_engine::sys::pagemap;

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
        run: impl FnMut(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        let end = start + pages * PAGE;
        let mut runs = Runs {
            at: start,
            run,
            open: None,
        };
        let scanned = pagemap::populated(&self.file, start, end, |from, to| {
            runs.push(from, false)?;
            runs.push(to, true)
        });
        match scanned {
            Err(error) if is_unsupported(&error) => self.words(end, &mut runs)?,
            scanned => scanned.context("finding which pages exist")?,
        }
        runs.push(end, false)?;
        runs.finish()
    }

    /// As far as `end`, page by page.
    fn words<F: FnMut(u64, u64, bool) -> Result<()>>(
        &self,
        end: u64,
        runs: &mut Runs<F>,
    ) -> Result<()> {
        let left = usize::try_from((end - runs.at) / PAGE)?;
        let mut bytes = vec![0; 8 * WORDS.min(left)];
        while runs.at < end {
            let at = runs.at;
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
                runs.push(runs.at + PAGE, populated)?;
            }
        }
        Ok(())
    }
}

fn is_unsupported(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::Unsupported)
}

/// Joins what follows each other and is alike.
struct Runs<F> {
    /// Where what comes next begins.
    at: u64,
    run: F,
    /// Where the run that may still grow began, and its state.
    open: Option<(u64, bool)>,
}

impl<F: FnMut(u64, u64, bool) -> Result<()>> Runs<F> {
    /// Takes in what lies between the end of what came before and `to`.
    fn push(&mut self, to: u64, populated: bool) -> Result<()> {
        if to == self.at {
            return Ok(());
        }
        match self.open {
            Some((_, state)) if state == populated => {}
            _ => {
                self.finish()?;
                self.open = Some((self.at, populated));
            }
        }
        self.at = to;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        match self.open.take() {
            Some((began, state)) => (self.run)(began, (self.at - began) / PAGE, state),
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
        let pagemap = Pagemap::open("/proc/self").unwrap();
        pagemap
            .runs(base, 2048, |start, pages, populated| {
                runs.push(((start - base) / PAGE, pages, populated));
                Ok(())
            })
            .unwrap();
        let mut by_words = Vec::new();
        let mut joined = Runs {
            at: base,
            run: |start, pages, populated| {
                by_words.push(((start - base) / PAGE, pages, populated));
                Ok(())
            },
            open: None,
        };
        pagemap.words(base + 2048 * PAGE, &mut joined).unwrap();
        joined.finish().unwrap();
        assert_eq!(runs, by_words, "both ways tell the same");
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
