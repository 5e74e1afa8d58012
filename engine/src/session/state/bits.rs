//! Bitmaps with one bit per page, 64 pages to a word.

use std::ops::Range;

use crate::session::platform::PageNumber;

/// Returns the first page of `within` whose bit is set in the words returned by `word`.
pub(super) fn first_bit(
    within: Range<PageNumber>,
    word: impl Fn(usize) -> u64,
) -> Option<PageNumber> {
    masks(within).find_map(|(index, mask)| {
        let set = mask & word(index);
        (set != 0).then(|| index as u64 * 64 + u64::from(set.trailing_zeros()))
    })
}

/// Returns the index of the word with a page's bit, and the bit.
pub(super) fn place(page: PageNumber) -> (usize, u64) {
    (word_of(page), 1 << (page % 64))
}

/// Returns the index of the word with a page's bit. Page numbers fit, because the block that
/// contains the bits was allocated.
pub(super) fn word_of(page: PageNumber) -> usize {
    snaprestore_uffd::to_usize(page / 64)
}

/// Returns the words that contain the bits of `pages`, each with the mask of those bits.
pub(super) fn masks(pages: Range<PageNumber>) -> impl Iterator<Item = (usize, u64)> {
    let words = if pages.is_empty() {
        0..0
    } else {
        pages.start / 64..(pages.end - 1) / 64 + 1
    };
    words.map(move |word| {
        let low = pages.start.max(word * 64) - word * 64;
        let high = pages.end.min((word + 1) * 64) - word * 64;
        let ones = if high - low == 64 {
            u64::MAX
        } else {
            (1 << (high - low)) - 1
        };
        (word_of(word * 64), ones << low)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The masks of a range contain exactly the bits of its pages.
    #[test]
    fn masks_cover_exactly_the_pages() {
        for start in 0..140_u64 {
            for end in start..200 {
                let mut bits = [0_u64; 4];
                for (word, mask) in masks(start..end) {
                    bits[word] |= mask;
                }
                for page in 0..200_u64 {
                    let set = bits[word_of(page)] >> (page % 64) & 1 == 1;
                    assert_eq!(set, (start..end).contains(&page), "{start}..{end}: {page}");
                }
            }
        }
    }
}
