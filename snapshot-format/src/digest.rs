//! Digests of a snapshot. The content digest tells whether two snapshots hold the same memory,
//! however they store it; the state digest tells whether they also have the same regions and
//! attachments.
//!
//! The content digest is a tree of BLAKE3 hashes, fixed by page numbers and content alone:
//!
//! ```text
//! page   = content that is no fill: BLAKE3(4096 bytes)
//!          a repeated word:         BLAKE3("snaprestore fill" ++ word as 8 bytes LE)
//!          unavailable:             BLAKE3("snaprestore unavailable")
//! block  = BLAKE3("snaprestore block" ++ the digests of its 1 to 512 pages)
//! root   = BLAKE3("snaprestore content" ++ the digests of all blocks
//!                 ++ for each region: space as 4 bytes LE, start and pages as 8 bytes LE each
//!                 ++ number of regions as 8 bytes LE)
//! ```
//!
//! A page that repeats a word has the digest of the fill even if a file stores its bytes, so the
//! digest doesn't depend on how clever the writer was. Numbers past a region's end have no digest.
//! The blocks come before the regions because a writer learns the last length at the very end.
//!
//! ```text
//! state  = BLAKE3("snaprestore state" ++ root
//!                 ++ for each region: flags, page shift and length of the name as 4 bytes LE each,
//!                    the name
//!                 ++ number of regions as 8 bytes LE
//!                 ++ for each attachment, in the order of the names' bytes: length of the name as
//!                    4 bytes LE, the name, BLAKE3(the attachment)
//!                 ++ number of attachments as 8 bytes LE)
//! ```

use crate::layout::{PAGE_SIZE, PAGES_PER_BLOCK};
use crate::types::Region;

/// A BLAKE3 hash.
pub type Digest = [u8; 32];

/// Formats a digest as 64 lower-case hexadecimal digits.
pub fn hex(digest: &Digest) -> String {
    blake3::Hash::from(*digest).to_string()
}

const FILL: &[u8] = b"snaprestore fill";
const UNAVAILABLE: &[u8] = b"snaprestore unavailable";
const BLOCK: &[u8] = b"snaprestore block";
const CONTENT: &[u8] = b"snaprestore content";
const STATE: &[u8] = b"snaprestore state";

/// Returns the word that the whole of `page` repeats, if there is one.
///
/// `page` may have any length that is a multiple of 8; the empty slice repeats nothing.
pub fn fill_word(page: &[u8]) -> Option<u64> {
    let (words, rest) = page.as_chunks::<8>();
    let first = words.first()?;
    if !rest.is_empty() {
        return None;
    }
    // Most pages that are not fills differ within their first words. The comparison of a page with
    // itself, shifted by one word, is a `memcmp`.
    let same =
        words.get(1).is_none_or(|second| second == first) && page[..page.len() - 8] == page[8..];
    same.then(|| u64::from_le_bytes(*first))
}

/// Returns the digest of a page from its 4096 bytes, whether or not they are a fill.
pub fn page(bytes: &[u8]) -> Digest {
    debug_assert_eq!(bytes.len(), PAGE_SIZE);
    match fill_word(bytes) {
        Some(word) => fill(word),
        None => stored(bytes),
    }
}

/// Returns the digest of a page that is known not to be a fill. The writer has already checked;
/// [`page`] checks again.
pub fn stored(bytes: &[u8]) -> Digest {
    blake3::hash(bytes).into()
}

/// Returns the digest of a page that repeats `word`, computed without the page's bytes.
pub fn fill(word: u64) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(FILL).update(&word.to_le_bytes());
    hasher.finalize().into()
}

/// Returns the digest of a page that could not be read when the snapshot was taken.
pub fn unavailable() -> Digest {
    blake3::hash(UNAVAILABLE).into()
}

/// Returns the digest of a block from the digests of its pages, in order.
pub fn block(pages: &[Digest]) -> Digest {
    debug_assert!(!pages.is_empty() && pages.len() <= PAGES_PER_BLOCK);
    let mut hasher = blake3::Hasher::new();
    hasher.update(BLOCK).update(pages.as_flattened());
    hasher.finalize().into()
}

/// Cache of the digests of blocks whose pages are all alike: a terabyte of zeros costs the hashing
/// of one block.
#[derive(Debug, Default)]
pub struct UniformBlocks {
    last: Option<(Digest, usize, Digest)>,
}

impl UniformBlocks {
    /// Returns the digest of a block of `pages` pages that all have the digest `page`.
    pub fn digest(&mut self, page: Digest, pages: usize) -> Digest {
        match self.last {
            Some((same, count, digest)) if same == page && count == pages => digest,
            _ => {
                let mut all = [Digest::default(); PAGES_PER_BLOCK];
                let all = &mut all[..pages];
                all.fill(page);
                let digest = block(all);
                self.last = Some((page, pages, digest));
                digest
            }
        }
    }
}

/// Builds the root digest.
#[derive(Debug)]
pub struct ContentHasher {
    hasher: blake3::Hasher,
}

impl Default for ContentHasher {
    fn default() -> Self {
        Self::new()
    }
}

impl ContentHasher {
    /// Creates a hasher without blocks.
    pub fn new() -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(CONTENT);
        Self { hasher }
    }

    /// Adds the digest of the next block, in the order of page numbers.
    pub fn block(&mut self, digest: &Digest) {
        self.hasher.update(digest);
    }

    /// Adds the regions, each as (space, start, pages), and returns the root.
    pub fn finish(mut self, regions: impl IntoIterator<Item = (u32, u64, u64)>) -> Digest {
        let mut count = 0u64;
        for (space, start, pages) in regions {
            self.hasher
                .update(&space.to_le_bytes())
                .update(&start.to_le_bytes())
                .update(&pages.to_le_bytes());
            count += 1;
        }
        self.hasher.update(&count.to_le_bytes());
        self.hasher.finalize().into()
    }
}

/// Returns the digest of a snapshot's state: its content, the description of its regions, and its
/// attachments, each as name and BLAKE3 hash, in any order.
pub fn state(content: &Digest, regions: &[Region], attachments: &[(&str, Digest)]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(STATE).update(content);
    // Names are at most 4096 bytes long.
    let len = |name: &str| u32::try_from(name.len()).unwrap_or(u32::MAX).to_le_bytes();
    for region in regions {
        hasher
            .update(&region.flags.to_le_bytes())
            .update(&region.page_shift.to_le_bytes())
            .update(&len(&region.name))
            .update(region.name.as_bytes());
    }
    hasher.update(&(regions.len() as u64).to_le_bytes());
    let mut by_name: Vec<_> = attachments.iter().collect();
    by_name.sort_unstable_by_key(|(name, _)| *name);
    for (name, digest) in by_name {
        hasher
            .update(&len(name))
            .update(name.as_bytes())
            .update(digest);
    }
    hasher.update(&(attachments.len() as u64).to_le_bytes());
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_keeps_leading_zeros() {
        let mut digest = [0; 32];
        digest[30..].copy_from_slice(&[10, 255]);
        assert_eq!(hex(&digest), format!("{}0aff", "0".repeat(60)));
    }

    #[test]
    fn fills_are_found_and_only_fills() {
        let mut bytes = [0u8; PAGE_SIZE];
        assert_eq!(fill_word(&bytes), Some(0));
        for at in [0, 7, 8, 15, 16, 2048, PAGE_SIZE - 1] {
            bytes[at] ^= 1;
            assert_eq!(fill_word(&bytes), None, "byte {at} differs");
            bytes[at] ^= 1;
        }
        let word = 0x0102_0304_0506_0708_u64;
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        assert_eq!(fill_word(&bytes), Some(word));
        assert_eq!(page(&bytes), fill(word));
        assert_eq!(fill_word(&[]), None);
    }

    #[test]
    fn uniform_block_is_the_block_of_its_pages() {
        let mut uniform = UniformBlocks::default();
        for pages in [1, 3, 512, 512, 7] {
            assert_eq!(
                uniform.digest(fill(0), pages),
                block(&vec![fill(0); pages]),
                "{pages} pages"
            );
        }
        assert_eq!(uniform.digest(unavailable(), 7), block(&[unavailable(); 7]));
    }

    #[test]
    fn root_depends_on_blocks_and_regions() {
        let root = |blocks: &[Digest], regions: &[(u32, u64, u64)]| {
            let mut hasher = ContentHasher::new();
            for digest in blocks {
                hasher.block(digest);
            }
            hasher.finish(regions.iter().copied())
        };
        let base = root(&[fill(1), fill(2)], &[(0, 0, 1000)]);
        assert_ne!(base, root(&[fill(2), fill(1)], &[(0, 0, 1000)]));
        assert_ne!(base, root(&[fill(1), fill(2)], &[(1, 0, 1000)]));
        assert_ne!(base, root(&[fill(1), fill(2)], &[(0, 4096, 1000)]));
        assert_ne!(base, root(&[fill(1), fill(2)], &[(0, 0, 1001)]));
    }

    #[test]
    fn state_depends_on_flags_names_and_attachments() {
        let region = |flags, name: &str| Region {
            space: 0,
            flags,
            start: 0,
            pages: 1,
            first_page: 0,
            page_shift: 12,
            name: name.to_owned(),
        };
        let (ram, one, two) = ([region(3, "ram")], ("one", fill(1)), ("two", fill(2)));
        let base = state(&fill(0), &ram, &[one, two]);
        assert_eq!(base, state(&fill(0), &ram, &[two, one]), "in any order");
        for other in [
            state(&fill(9), &ram, &[one, two]),
            state(&fill(0), &[region(1, "ram")], &[one, two]),
            state(&fill(0), &[region(3, "rom")], &[one, two]),
            state(
                &fill(0),
                &[Region {
                    page_shift: 21,
                    ..region(3, "ram")
                }],
                &[one, two],
            ),
            state(&fill(0), &ram, &[one]),
            state(&fill(0), &ram, &[one, ("two", fill(3))]),
            state(&fill(0), &ram, &[one, ("tow", fill(2))]),
        ] {
            assert_ne!(base, other);
        }
    }
}
