//! The map of `info --map`: one character for a number of pages.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _};

use anyhow::Result;
use indicatif::BinaryBytes;
use snapshot_format::layout::PAGE_SIZE_U64;
use snapshot_format::{Region, Snapshot};

use crate::map::{Counts, Group, Limits, MemoryMap, PageSet};
use crate::names;
use crate::output::count;
use crate::signals::Cancel;

/// Width of a map that is not shown on a terminal.
const PLAIN_COLUMNS: u64 = 80;
/// Maximum number of lines of characters, besides one more for each group.
const MAX_LINES: u64 = 16;
/// Maximum number of groups.
const MAX_GROUPS: usize = 24;
/// Columns of the addresses.
const MARGIN: u64 = 18;
/// The share of hot pages from which a cell counts as partly hot: one in this many. Working sets
/// are spread out, so that half of the pages of a cell are rarely hot.
const PARTLY_HOT_SHARE: u64 = 16;

/// The characters of a map, each with its meaning.
struct Alphabet {
    zero: char,
    fill: char,
    duplicate: char,
    ancestor: char,
    stored: char,
    unavailable: char,
    hot: char,
    partly_hot: char,
}

const UNICODE: Alphabet = Alphabet {
    zero: '\u{b7}',
    fill: '\u{2591}',
    duplicate: '\u{2592}',
    ancestor: '\u{2593}',
    stored: '\u{2588}',
    unavailable: '\u{d7}',
    hot: '\u{25c6}',
    partly_hot: '\u{25c7}',
};

const ASCII: Alphabet = Alphabet {
    zero: '.',
    fill: '-',
    duplicate: '=',
    ancestor: '%',
    stored: '#',
    unavailable: 'x',
    hot: '@',
    partly_hot: '+',
};

/// A map for people.
pub(super) struct Drawing {
    map: MemoryMap,
    regions: Vec<Region>,
    columns: u64,
    alphabet: &'static Alphabet,
}

impl Drawing {
    /// Reads the index of a snapshot, for the width of the terminal.
    pub(super) fn of(snapshot: &Snapshot, cancel: &Cancel) -> Result<Self> {
        let terminal = io::stdout().is_terminal();
        let width = terminal_size::terminal_size_of(io::stdout()).filter(|_| terminal);
        let width = width.map_or(PLAIN_COLUMNS, |(width, _)| u64::from(width.0));
        let columns = width.saturating_sub(MARGIN).clamp(16, 256);
        let limits = Limits {
            cells: MAX_LINES * columns,
            groups: MAX_GROUPS,
        };
        let hot = PageSet::of_working_sets(snapshot)?;
        Ok(Self {
            map: MemoryMap::read(snapshot, &hot, limits, cancel)?,
            regions: snapshot.regions().to_vec(),
            columns,
            alphabet: if terminal && is_utf8() {
                &UNICODE
            } else {
                &ASCII
            },
        })
    }

    fn write_group(&self, f: &mut fmt::Formatter<'_>, group: &Group) -> fmt::Result {
        let alone = match group.regions[..] {
            [region] => Some(&self.regions[region]),
            _ => None,
        };
        match alone {
            Some(region) if region.name.is_empty() => {}
            Some(region) => writeln!(f, "{}", names::shown(&region.name))?,
            None => writeln!(f, "{} smaller regions", group.regions.len())?,
        }
        let columns = usize::try_from(self.columns).unwrap_or(usize::MAX);
        let bytes = self.columns * self.map.cell_pages * PAGE_SIZE_U64;
        for (line, cells) in (0..).zip(group.cells.chunks(columns)) {
            let address = alone.map(|region| region.start.saturating_add(line * bytes));
            let address = address.map(|address| format!("{address:#x}"));
            let mut text = String::new();
            for cell in cells {
                text.push(self.alphabet.of(&cell.counts));
            }
            writeln!(f, "{:>16}  {text}", address.unwrap_or_default())?;
        }
        Ok(())
    }
}

impl Alphabet {
    /// Returns the character for a cell: `hot` if at least half of its pages are hot, `partly_hot`
    /// if at least one in [`PARTLY_HOT_SHARE`] is, and otherwise that for most of its pages.
    fn of(&self, counts: &Counts) -> char {
        if counts.hot * 2 >= counts.pages() && counts.hot > 0 {
            return self.hot;
        }
        if counts.hot * PARTLY_HOT_SHARE >= counts.pages() && counts.hot > 0 {
            return self.partly_hot;
        }
        let kinds = [
            (counts.zero, self.zero),
            (counts.fill, self.fill),
            (counts.duplicate, self.duplicate),
            (counts.ancestor, self.ancestor),
            (counts.stored, self.stored),
            (counts.unavailable, self.unavailable),
        ];
        let most = kinds.into_iter().max_by_key(|(pages, _)| *pages);
        most.map_or(' ', |(_, character)| character)
    }
}

/// Returns whether the locale has UTF-8. Without any setting it is that of C.
fn is_utf8() -> bool {
    let settings = ["LC_ALL", "LC_CTYPE", "LANG"];
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = settings.into_iter().find_map(set).unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

impl fmt::Display for Drawing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { map, alphabet, .. } = self;
        let (mut legend, mut len) = (String::new(), 0);
        let mut add = |character: char, pages: u64, what: &str| {
            if pages == 0 {
                return;
            }
            let needs = 4 + what.len() as u64;
            if len + needs > self.columns + 2 {
                let _ = write!(legend, "\n{:>16}", "");
                len = 0;
            }
            let _ = write!(legend, "  {character} {what}");
            len += needs;
        };
        add(alphabet.zero, map.total.zero, "zero");
        add(alphabet.fill, map.total.fill, "other fill");
        add(alphabet.stored, map.total.stored, "stored");
        add(alphabet.duplicate, map.total.duplicate, "duplicate");
        add(alphabet.ancestor, map.total.ancestor, "in ancestors");
        add(alphabet.unavailable, map.total.unavailable, "unavailable");
        add(alphabet.hot, map.total.hot, "working set");
        add(alphabet.partly_hot, map.total.hot, "partly working set");
        writeln!(
            f,
            "map         each character is {} ({})",
            count(map.cell_pages, "page"),
            BinaryBytes(map.cell_pages * PAGE_SIZE_U64)
        )?;
        writeln!(f, "{:>16}{legend}", "")?;
        for group in &map.groups {
            self.write_group(f, group)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn character_shows_hot_pages_and_otherwise_most() {
        let mut counts = Counts {
            zero: 30,
            stored: 50,
            ..Counts::default()
        };
        for (hot, character) in [(0, '#'), (4, '#'), (5, '+'), (39, '+'), (40, '@')] {
            counts.hot = hot;
            assert_eq!(ASCII.of(&counts), character, "{hot}");
        }
        counts = Counts {
            duplicate: 1,
            ..Counts::default()
        };
        assert_eq!((ASCII.of(&counts), UNICODE.of(&counts)), ('=', '\u{2592}'));
    }
}
