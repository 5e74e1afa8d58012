//! Orders in which pages are touched.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::touch::Pages;
use crate::names;

/// Maximum length of a line of a list of pages.
const MAX_LINE_BYTES: u64 = 4096;
/// Maximum number of lines of a list of pages: 256 GiB have as many pages.
const MAX_LINES: u64 = 1 << 26;

/// An order of pages.
#[derive(Debug)]
pub(super) enum Order {
    /// All pages below a count, from the first.
    Sequential(u64),
    /// All pages below a count, each exactly once, without a table.
    Random(Shuffle),
    /// These pages.
    Listed(Vec<u64>),
}

/// A permutation of four Feistel rounds. Numbers outside the count are permuted again until they
/// fall inside, which takes fewer than four passes on average.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shuffle {
    count: u64,
    half_bits: u32,
    seed: u64,
}

impl Order {
    pub(super) fn random(count: u64, seed: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        Self::Random(Shuffle {
            count,
            half_bits: bits.div_ceil(2).max(1),
            seed,
        })
    }

    /// Reads a list of page numbers, one per line. Empty lines and lines that start with `#` are
    /// ignored.
    pub(super) fn listed(path: &Path, pages: &Pages) -> Result<Self> {
        let named = || names::path(path);
        let mut file = BufReader::new(File::open(path).with_context(named)?);
        let (mut listed, mut bytes) = (Vec::new(), Vec::new());
        for line in 1.. {
            bytes.clear();
            let read = (&mut file)
                .take(MAX_LINE_BYTES + 1)
                .read_until(b'\n', &mut bytes);
            if read.with_context(named)? == 0 {
                break;
            }
            if bytes.len() as u64 > MAX_LINE_BYTES || line > MAX_LINES {
                bail!(
                    "{}, line {line}: not a list of pages, which has at most {MAX_LINES} lines of \
                     at most {MAX_LINE_BYTES} bytes",
                    named()
                );
            }
            let text = String::from_utf8_lossy(&bytes);
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let Ok(number) = text.parse() else {
                bail!("{}, line {line}: {text:?} is not a page number", named());
            };
            let Some(page) = pages.with_number(number) else {
                bail!(
                    "{}, line {line}: the snapshot has no page {number}",
                    named()
                );
            };
            listed.push(page);
        }
        Ok(Self::Listed(listed))
    }

    /// Returns the number of touches.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Sequential(count) => *count,
            Self::Random(shuffle) => shuffle.count,
            Self::Listed(pages) => pages.len() as u64,
        }
    }

    /// Returns the page at `position`, which must be below the length.
    pub(super) fn at(&self, position: u64) -> u64 {
        match self {
            Self::Sequential(_) => position,
            Self::Random(shuffle) => shuffle.at(position),
            #[expect(clippy::cast_possible_truncation)] // Less than the length of a vector.
            Self::Listed(pages) => pages[position as usize],
        }
    }
}

impl Shuffle {
    fn at(&self, position: u64) -> u64 {
        let mut number = self.mix(position);
        while number >= self.count {
            number = self.mix(number);
        }
        number
    }

    fn mix(&self, number: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (number >> self.half_bits, number & mask);
        for round in 0..4_u64 {
            let key = self
                .seed
                .wrapping_add(round.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            (left, right) = (right, left ^ (scramble(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// Applies the finishing steps of splitmix64.
fn scramble(mut number: u64) -> u64 {
    number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_contains_every_number_once() {
        for count in [1_u64, 2, 3, 7, 64, 1000, 4097] {
            for seed in [0, 1, 0xdead_beef] {
                let order = Order::random(count, seed);
                let mut numbers: Vec<u64> = (0..count).map(|position| order.at(position)).collect();
                numbers.sort_unstable();
                assert!(numbers.into_iter().eq(0..count), "{count} {seed}");
            }
        }
    }

    #[test]
    fn different_seeds_give_different_orders_without_runs() {
        let order = |seed| -> Vec<u64> {
            let order = Order::random(10_000, seed);
            (0..10_000).map(|position| order.at(position)).collect()
        };
        assert_ne!(order(1), order(2));
        let neighbours = order(1)
            .windows(2)
            .filter(|pair| pair[1] == pair[0] + 1)
            .count();
        assert!(neighbours < 10, "{neighbours}");
    }
}
