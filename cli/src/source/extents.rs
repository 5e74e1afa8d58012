//! Finds the parts of a sparse file that hold data.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use nix::unistd::{Whence, lseek};

use super::PAGE;

/// Maximum number of extents to keep; beyond it, holes between data are read as data.
const MAX_EXTENTS: u64 = 1 << 19;
/// Minimum length of a hole that is skipped. A seek for each shorter one would cost more than
/// reading it. All of them are counted as holes.
const MIN_HOLE: u64 = 64 << 10;
/// Maximum number of extents of a diff, of which no hole may be left out: 256 MiB of memory, and at
/// least 128 GiB of a guest's.
const MAX_EXACT_EXTENTS: usize = 1 << 24;

/// Number of extents that file systems locate without a block of their own, and the most bytes that
/// each further one takes there. Holes of a file that has more allocated are not trusted.
const EXTENTS_ASIDE: u64 = 4;
const BYTES_PER_EXTENT_ASIDE: u64 = 64;

/// The data of a file, as sorted byte ranges that don't touch.
#[derive(Debug)]
pub(crate) struct Extents {
    data: Vec<Range<u64>>,
    /// Number of bytes in whole pages without data, including holes that are read.
    hole_bytes: u64,
}

/// A run of whole pages, as byte offsets from the start of the walked range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stretch {
    /// Data, which has to be read.
    Data(Range<u64>),
    /// A hole, which is known to be zero.
    Hole(Range<u64>),
}

impl Extents {
    /// Finds the data of `file` with `SEEK_DATA` and `SEEK_HOLE`. If the file or device doesn't
    /// support them, all of it is data. Memory use is bounded: if there are many short holes, only
    /// the longer ones are kept.
    ///
    /// A hole is read as zeros, so a file system that reports a hole where there is data would
    /// cause data loss. The file systems of `knows_its_cache` consider pages in the page cache that
    /// are not yet on disk. On any other one, the file is synced before its holes are queried (a
    /// FUSE server may not know about pages written through a mapping), and the answer is not
    /// trusted if the file has more allocated than the reported data needs.
    pub(crate) fn find(file: &File, len: u64) -> io::Result<Self> {
        let min_hole = MIN_HOLE.max(len / MAX_EXTENTS);
        let walked = Walked::all(file, len, min_hole)?;
        if walked.bytes >= len || knows_its_cache(file) {
            return Ok(walked.extents);
        }
        if file.sync_data().is_err() {
            return Ok(Self::dense(len));
        }
        let walked = Walked::all(file, len, min_hole)?;
        let allocated = file.metadata()?.blocks().saturating_mul(512);
        if allocated > walked.allocated_at_most() {
            return Ok(Self::dense(len));
        }
        Ok(walked.extents)
    }

    /// Finds the data of a diff, with every hole, however short: what is read as zeros there would
    /// replace the base's content. Returns nothing if the file system doesn't tell the holes
    /// reliably, or if there are too many.
    pub(crate) fn exact(file: &File, len: u64) -> io::Result<Option<Self>> {
        let is_known = knows_its_cache(file);
        if !is_known {
            file.sync_data()?;
        }
        let walked = Walked::all(file, len, 1)?;
        let allocated = file.metadata()?.blocks().saturating_mul(512);
        // A file system that knows no holes reports none, and stores all of a file without any.
        let is_reliable = if walked.bytes >= len {
            is_known || allocated >= len
        } else {
            is_known || allocated <= walked.allocated_at_most()
        };
        let is_short = walked.extents.data.len() <= MAX_EXACT_EXTENTS;
        Ok((is_reliable && is_short).then_some(walked.extents))
    }

    /// Returns the extents of a file without holes.
    #[expect(
        clippy::single_range_in_vec_init,
        reason = "one extent, not many numbers"
    )]
    pub(crate) fn dense(len: u64) -> Self {
        Self {
            data: vec![0..len],
            hole_bytes: 0,
        }
    }

    /// Returns the number of bytes in whole pages of the file that are holes, however short.
    pub(crate) fn hole_bytes(&self) -> u64 {
        self.hole_bytes
    }

    /// Returns the number of pages of the file in which data lies.
    pub(crate) fn data_pages(&self) -> u64 {
        let pages = |range: &Range<u64>| range.end.div_ceil(PAGE) - range.start / PAGE;
        self.data.iter().map(pages).sum()
    }

    /// Returns the number of bytes of data.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.data.iter().map(|range| range.end - range.start).sum()
    }

    /// Walks `range` of the file in whole pages counted from its start, which need not be aligned
    /// in the file. A page is a hole only if no byte of it is data. The length of `range` must be a
    /// multiple of the page size.
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
            // Extents that share a page were rounded to overlap.
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

    /// Returns the offset of the byte that follows `position` bytes of data.
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

/// The extents of a file as its file system reports them.
struct Walked {
    extents: Extents,
    /// Number of bytes of data, without the short holes between.
    bytes: u64,
    /// Number of extents before those separated by short holes were joined.
    count: u64,
}

impl Walked {
    /// Walks a file; data is joined across holes that are shorter than `min_hole`.
    fn all(file: &File, len: u64, min_hole: u64) -> io::Result<Self> {
        let mut data: Vec<Range<u64>> = Vec::new();
        let (mut bytes, mut count) = (0, 0);
        // Bytes of the pages with data, and the end of the last of them.
        let (mut data_bytes, mut data_end) = (0, 0);
        let mut at = 0;
        while at < len {
            let start = match seek(file, at, Whence::SeekData) {
                Ok(start) => start.min(len),
                // Only a hole follows, up to the end.
                Err(Errno::ENXIO) => break,
                Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS) if data.is_empty() => {
                    return Ok(Self {
                        extents: Extents::dense(len),
                        bytes: len,
                        count: 1,
                    });
                }
                Err(error) => return Err(error.into()),
            };
            if start == len {
                break;
            }
            let end = match seek(file, start, Whence::SeekHole) {
                Ok(end) => end.min(len),
                // The file became shorter; reading it will fail.
                Err(Errno::ENXIO) => len,
                Err(error) => return Err(error.into()),
            };
            bytes += end.saturating_sub(start);
            count += 1;
            let first_page = data_end.max(start / PAGE * PAGE);
            data_end = data_end.max(end.next_multiple_of(PAGE));
            data_bytes += data_end - first_page;
            let is_full = data.len() > MAX_EXACT_EXTENTS;
            match data.last_mut() {
                Some(last) if start - last.end < min_hole => last.end = end,
                _ if is_full => {}
                _ => data.push(start..end),
            }
            at = end.max(start + 1);
        }
        Ok(Self {
            extents: Extents {
                data,
                hole_bytes: len.saturating_sub(data_bytes),
            },
            bytes,
            count,
        })
    }

    /// Returns the maximum disk usage of the file if everything else is holes.
    fn allocated_at_most(&self) -> u64 {
        let aside = if self.count > EXTENTS_ASIDE {
            PAGE + self.count * BYTES_PER_EXTENT_ASIDE
        } else {
            0
        };
        self.bytes.next_multiple_of(PAGE).saturating_add(aside)
    }
}

/// Returns whether the file is on one of the kernel's own file systems that check the page cache
/// before they report a hole.
fn knows_its_cache(file: &File) -> bool {
    let known = [
        BTRFS_SUPER_MAGIC,
        EXT4_SUPER_MAGIC,
        TMPFS_MAGIC,
        XFS_SUPER_MAGIC,
    ];
    fstatfs(file).is_ok_and(|system| known.contains(&system.filesystem_type()))
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
    fn page_with_one_byte_of_data_is_data() {
        let extents = Extents {
            data: vec![5000..5001, 8191..8193, 40960..45056],
            hole_bytes: 0,
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
            hole_bytes: 0,
        };
        // The range begins 100 bytes into the file, so its second page holds byte 4196.
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
        let extents = Extents::find(&file, 64 << 20).unwrap();
        let data: u64 = walk(&extents, 0..64 << 20)
            .iter()
            .map(|stretch| match stretch {
                Stretch::Data(range) => range.end - range.start,
                Stretch::Hole(_) => 0,
            })
            .sum();
        assert!((4096..1 << 20).contains(&data), "{data}");
        assert_eq!(extents.hole_bytes(), (64 << 20) - data);
        let at = extents.nth_data_byte(0).unwrap();
        assert!(at <= 32 << 20 && 32 << 20 < at + data);
        assert_eq!(extents.nth_data_byte(data), None);
    }

    #[test]
    fn short_holes_are_read_and_counted() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        for place in (0..8 << 20).step_by(32 << 10) {
            file.write_all_at(&[1; 4096], place).unwrap();
        }
        let extents = Extents::find(&file, 8 << 20).unwrap();
        // Everything except the hole behind the last page is read as data.
        let walked = walk(&extents, 0..8 << 20);
        assert!(matches!(&walked[0], Stretch::Data(range) if range.end > 7 << 20));
        assert_eq!(extents.hole_bytes(), (8 << 20) / 8 * 7);
    }

    #[test]
    fn every_hole_of_a_diff_is_found() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        for place in (0..8 << 20).step_by(8 << 10) {
            file.write_all_at(&[1; 4096], place).unwrap();
        }
        let extents = Extents::exact(&file, 8 << 20).unwrap();
        let extents = extents.expect("a file system that tells its holes");
        assert_eq!(extents.hole_bytes(), 4 << 20);
        let walked = walk(&extents, 0..8 << 20);
        assert_eq!(walked.len(), 2048);
        for (stretch, at) in walked.into_iter().zip((0..).step_by(4096)) {
            let expected = if at % 8192 == 0 {
                Stretch::Data(at..at + 4096)
            } else {
                Stretch::Hole(at..at + 4096)
            };
            assert_eq!(stretch, expected);
        }
        // A file without holes is all of a memory.
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        let extents = Extents::exact(&file, 8192).unwrap().unwrap();
        assert_eq!(extents.hole_bytes(), 0);
    }

    #[test]
    fn one_allocated_page_beyond_the_data_is_too_much() {
        let most = |bytes, count| {
            let extents = Extents::dense(0);
            let walked = Walked {
                extents,
                bytes,
                count,
            };
            walked.allocated_at_most()
        };
        assert_eq!(most(0, 0), 0);
        assert_eq!(most(5000, 2), 8192);
        // The extent tree of a file in a thousand pieces, as ext4 stores it.
        assert!(most(4096 * 1000, 1000) >= 4096 * 1000 + 4 * 4096);
    }
}
