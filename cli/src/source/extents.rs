//! Which parts of a sparse file hold data.

use std::fs::File;
use std::io;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::PAGE;

/// Most extents that are kept; beyond it, holes between data are read as data.
const MAX_EXTENTS: u64 = 1 << 19;
/// Holes shorter than this are read: finding out costs more than reading them.
const MIN_HOLE: u64 = 64 << 10;

/// The data of a file, as sorted byte ranges that don't touch.
#[derive(Debug)]
pub(crate) struct Extents {
    data: Vec<Range<u64>>,
}

/// A stretch of whole pages, counted in bytes from the start of the walked range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stretch {
    /// To be read.
    Data(Range<u64>),
    /// Known to be zero.
    Hole(Range<u64>),
}

impl Extents {
    /// Asks the file system once, by `SEEK_DATA` and `SEEK_HOLE`; a file or device that doesn't
    /// know is all data. Memory is bounded, because of many short holes only the longer ones are
    /// kept.
    pub(crate) fn of(file: &File, len: u64) -> io::Result<Self> {
        let min_hole = MIN_HOLE.max(len / MAX_EXTENTS);
        let mut data: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while at < len {
            let start = match seek(file, at, Whence::SeekData) {
                Ok(start) => start.min(len),
                // Nothing but a hole up to the end.
                Err(Errno::ENXIO) => break,
                Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS) if data.is_empty() => {
                    return Ok(Self::dense(len));
                }
                Err(error) => return Err(error.into()),
            };
            if start == len {
                break;
            }
            let end = match seek(file, start, Whence::SeekHole) {
                Ok(end) => end.min(len),
                // The file became shorter; whoever reads it will find out.
                Err(Errno::ENXIO) => len,
                Err(error) => return Err(error.into()),
            };
            match data.last_mut() {
                Some(last) if start - last.end < min_hole => last.end = end,
                _ => data.push(start..end),
            }
            at = end.max(start + 1);
        }
        Ok(Self { data })
    }

    /// A file without holes.
    #[expect(
        clippy::single_range_in_vec_init,
        reason = "one extent, not many numbers"
    )]
    pub(crate) fn dense(len: u64) -> Self {
        Self { data: vec![0..len] }
    }

    /// Bytes of data.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.data.iter().map(|range| range.end - range.start).sum()
    }

    /// Walks `range` of the file in whole pages counted from its start, wherever that lies: a page
    /// is a hole only if no byte of it is data. The length of `range` is a multiple of the page
    /// size.
    pub(crate) fn stretches(&self, range: Range<u64>) -> impl Iterator<Item = Stretch> {
        let len = range.end - range.start;
        let first = self.data.partition_point(|data| data.end <= range.start);
        let mut data = self.data[first..]
            .iter()
            .take_while({
                let end = range.end;
                move |data| data.start < end
            })
            .map(move |data| {
                let start = data.start.saturating_sub(range.start) / PAGE * PAGE;
                let end = (data.end - range.start).min(len).next_multiple_of(PAGE);
                start..end
            })
            .peekable();
        let mut at = 0;
        std::iter::from_fn(move || {
            if at >= len {
                return None;
            }
            // Extents that meet in one page were rounded into each other.
            while data.next_if(|next| next.end <= at).is_some() {}
            let stretch = match data.peek() {
                Some(next) if next.start <= at => Stretch::Data(at..next.end),
                Some(next) => Stretch::Hole(at..next.start),
                None => Stretch::Hole(at..len),
            };
            at = match &stretch {
                Stretch::Data(range) | Stretch::Hole(range) => range.end,
            };
            Some(stretch)
        })
    }

    /// Where the byte lies that has `position` bytes of data before it.
    pub(crate) fn nth_data_byte(&self, mut position: u64) -> Option<u64> {
        for range in &self.data {
            let len = range.end - range.start;
            if position < len {
                return Some(range.start + position);
            }
            position -= len;
        }
        None
    }
}

fn seek(file: &File, from: u64, whence: Whence) -> Result<u64, Errno> {
    let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
    let found = lseek(file, from, whence)?;
    u64::try_from(found).map_err(|_| Errno::EOVERFLOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    fn walk(extents: &Extents, range: Range<u64>) -> Vec<Stretch> {
        extents.stretches(range).collect()
    }

    #[test]
    fn a_page_with_one_byte_of_data_is_data() {
        let extents = Extents {
            data: vec![5000..5001, 8191..8193, 40960..45056],
        };
        assert_eq!(
            walk(&extents, 0..49152),
            [
                Stretch::Hole(0..4096),
                Stretch::Data(4096..8192),
                Stretch::Data(8192..12288),
                Stretch::Hole(12288..40960),
                Stretch::Data(40960..45056),
                Stretch::Hole(45056..49152),
            ]
        );
    }

    #[test]
    fn pages_are_counted_from_the_start_of_the_range() {
        let extents = Extents {
            data: vec![0..100, 4196..4197, 100_000..200_000],
        };
        // The range begins 100 bytes into the file: its second page holds byte 4196.
        assert_eq!(
            walk(&extents, 100..100 + 3 * 4096),
            [
                Stretch::Hole(0..4096),
                Stretch::Data(4096..8192),
                Stretch::Hole(8192..12288),
            ]
        );
        assert_eq!(
            walk(&extents, 99_000..99_000 + 2 * 4096),
            [Stretch::Data(0..8192)]
        );
    }

    #[test]
    fn holes_of_a_real_file_are_found() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; 4096], 32 << 20).unwrap();
        let extents = Extents::of(&file, 64 << 20).unwrap();
        let data: u64 = walk(&extents, 0..64 << 20)
            .iter()
            .map(|stretch| match stretch {
                Stretch::Data(range) => range.end - range.start,
                Stretch::Hole(_) => 0,
            })
            .sum();
        assert!((4096..1 << 20).contains(&data), "{data}");
        let at = extents.nth_data_byte(0).unwrap();
        assert!(at <= 32 << 20 && 32 << 20 < at + data);
        assert_eq!(extents.nth_data_byte(data), None);
    }
}
