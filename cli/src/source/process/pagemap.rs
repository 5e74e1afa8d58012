//! The populated pages of a process, from `/proc/PID/pagemap`.
//!
//! Since Linux 6.7, the kernel lists what is populated, which takes no time for what isn't. An
//! older one returns a word for each page. `smaps` doesn't count markers, so a poisoned page may
//! lie in a mapping without any populated page.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result};
use snaprestore_uffd::os::pagemap;
use snaprestore_uffd::os::pagemap::Entry;

use super::super::PAGE;
use super::VAST;
use super::maps::Mapping;

/// Bit of a page that is in memory.
const PRESENT: u64 = 1 << 63;
/// Bit of a page that is in swap or replaced by a marker.
const SWAPPED: u64 = 1 << 62;
/// Bit of a page with the marker of a guard page (Linux 6.15).
const GUARD: u64 = 1 << 58;
/// Bit of a page that a userfaultfd write-protects.
const PROTECTED: u64 = 1 << 57;
/// Number of words read at once: 512 KiB of them describe 256 MiB.
const WORDS: usize = 64 << 10;

/// An opened `pagemap`.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the `pagemap` of a process from its folder in `/proc`.
    pub(super) fn open(folder: &str) -> io::Result<Self> {
        File::open(format!("{folder}/pagemap")).map(|file| Self { file })
    }

    /// Calls `run` with the start, the number and the state of each run of pages of `mapping`, in
    /// order and without gaps. The state is true if the page must be read from the process: its
    /// content is the process's own or in swap, or a marker makes it unreadable. Otherwise the page
    /// was never touched, or its content is in a file.
    pub(super) fn runs(
        &self,
        mapping: &Mapping,
        mut run: impl FnMut(u64, u64, bool) -> Result<()>,
    ) -> Result<()> {
        let (start, end) = (mapping.start, mapping.end);
        let is_own = |entry| match entry {
            Entry::Present | Entry::Swapped => true,
            // Swapped pages of shared memory aren't listed in page tables.
            Entry::Protected => !mapping.shared,
            Entry::Guard => false,
        };
        let mut runs = Runs {
            at: start,
            run: &mut run,
            open: None,
        };
        let mut ended = false;
        let scanned = pagemap::entries(&self.file, start, end, |from, to, entry| {
            let pushed = runs.push(from, false);
            let pushed = pushed.and_then(|()| runs.push(to, is_own(entry)));
            ended = pushed.is_err();
            pushed
        });
        match scanned {
            // An error of `run`, which has nothing to do with the page table.
            Err(error) if ended => return Err(error),
            Err(error) if is_unsupported(&error) => {
                // Reading gigabytes of words would give the same result: vast memory that smaps
                // reports as untouched is left out in any case.
                let is_vast = (end - start) / PAGE >= VAST;
                if !(is_vast
                    && mapping
                        .details
                        .is_some_and(|details| details.populated == 0))
                {
                    self.words(end, &is_own, &mut runs)?;
                }
            }
            scanned => scanned.context("finding which pages exist")?,
        }
        runs.push(end, false)?;
        runs.finish()
    }

    /// Returns whether no page of `mapping` has content of its own.
    pub(super) fn is_untouched(&self, mapping: &Mapping) -> bool {
        let mut untouched = true;
        let looked = self.runs(mapping, |_, _, own| {
            untouched &= !own;
            Ok(())
        });
        looked.is_ok() && untouched
    }

    /// Returns whether the page at `address` is a guard page. For kernels that can't list them.
    pub(super) fn is_guard(&self, address: u64) -> bool {
        let mut word = [0; 8];
        let read = self.file.read_exact_at(&mut word, address / PAGE * 8);
        read.is_ok() && to_entry(word) == Some(Entry::Guard)
    }

    /// Reads the words page by page, up to `end`.
    fn words<F: FnMut(u64, u64, bool) -> Result<()>>(
        &self,
        end: u64,
        is_own: &impl Fn(Entry) -> bool,
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
                runs.push(runs.at + PAGE, to_entry(*word).is_some_and(is_own))?;
            }
        }
        Ok(())
    }
}

fn to_entry(word: [u8; 8]) -> Option<Entry> {
    // The kernel uses its own byte order, and only this machine reads the word.
    #[expect(clippy::host_endian_bytes, reason = "a word from the kernel")]
    let word = u64::from_ne_bytes(word);
    if word & PRESENT != 0 {
        Some(Entry::Present)
    } else if word & SWAPPED == 0 {
        None
    } else if word & GUARD != 0 {
        Some(Entry::Guard)
    } else if word & PROTECTED != 0 {
        Some(Entry::Protected)
    } else {
        Some(Entry::Swapped)
    }
}

fn is_unsupported(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::Unsupported)
}

/// Joins adjacent runs that have the same state.
struct Runs<F> {
    /// Start of the next run.
    at: u64,
    run: F,
    /// Start and state of the last run, which may still grow.
    open: Option<(u64, bool)>,
}

impl<F: FnMut(u64, u64, bool) -> Result<()>> Runs<F> {
    /// Adds the pages from the end of the previous run to `to`.
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

    /// Checks the words that kernels return that can't list pages.
    #[test]
    fn pagemap_words_distinguish_content_from_markers() {
        #[expect(clippy::host_endian_bytes, reason = "a word as the kernel has it")]
        let entry = |word: u64| to_entry(word.to_ne_bytes());
        // The lowest bits are a page frame number, and the meaning of bit 55 doesn't matter here.
        let other = 1 << 55 | 0x1234;
        assert_eq!(entry(other), None);
        for (bits, expected) in [
            (1 << 63, Entry::Present),
            (1 << 63 | 1 << 57, Entry::Present),
            (1 << 62, Entry::Swapped),
            (1 << 62 | 1 << 57, Entry::Protected),
            (1 << 62 | 1 << 58, Entry::Guard),
        ] {
            assert_eq!(entry(bits | other), Some(expected), "{bits:#x}");
        }
    }

    #[test]
    fn touched_pages_of_this_process_are_populated() {
        // A fresh mapping, large enough that the allocator doesn't write to it.
        let mut memory = vec![0_u8; 16 << 20];
        let base = (memory.as_ptr() as u64).next_multiple_of(2 << 20);
        let index = usize::try_from(base - memory.as_ptr() as u64).unwrap();
        for page in [0, 1, 1000] {
            memory[index + page * 4096] = 1;
        }
        let mut runs = Vec::new();
        let pagemap = Pagemap::open("/proc/self").unwrap();
        let mapping = Mapping {
            start: base,
            end: base + 2048 * PAGE,
            ..Mapping::default()
        };
        pagemap
            .runs(&mapping, |start, pages, populated| {
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
        pagemap
            .words(base + 2048 * PAGE, &|_| true, &mut joined)
            .unwrap();
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
