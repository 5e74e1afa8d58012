//! Check that every byte of the file belongs to exactly one part, or is zero.

use super::{Check, VerifyError};
use crate::error::Part;
use crate::layout::{HEADER_BYTES, TRAILER_BYTES};
use crate::store::Reason;

/// Number of bytes of a gap that are read at a time.
const PIECE: usize = 256 << 10;

/// Byte ranges in use, in the order in which they were found.
#[derive(Debug, Default)]
pub(super) struct Extents {
    all: Vec<Extent>,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    offset: u64,
    len: u64,
    part: Part,
}

impl Extents {
    /// Adds a part that the reader found within the file's body. Empty parts occupy no bytes.
    pub(super) fn add(&mut self, part: Part, offset: u64, len: u64) {
        if len > 0 {
            self.all.push(Extent { offset, len, part });
        }
    }
}

impl Check<'_> {
    /// Reports overlaps, and bytes between the parts that are not zero.
    pub(super) fn gaps(&mut self) -> Result<(), VerifyError> {
        let body_end = self.snapshot.file_bytes() - TRAILER_BYTES as u64;
        let mut all = std::mem::take(&mut self.extents.all);
        all.sort_by_key(|extent| (extent.offset, extent.len));
        let mut done = HEADER_BYTES as u64;
        let mut last = Part::Header;
        for extent in all {
            if extent.offset < done {
                let detail = format!("{} and {last} share bytes", extent.part);
                self.report.add("overlap", extent.offset, detail);
            } else {
                self.gap(done, extent.offset)?;
            }
            let end = extent.offset + extent.len;
            if end > done {
                done = end;
                last = extent.part;
            }
        }
        self.gap(done, body_end)
    }

    fn gap(&mut self, from: u64, to: u64) -> Result<(), VerifyError> {
        // If a part could not be read, the parts that it points to look like a gap and are not one.
        if !self.complete || from == to {
            return Ok(());
        }
        let mut piece = vec![0; usize::try_from(to - from).map_or(PIECE, |len| len.min(PIECE))];
        let mut at = from;
        while at < to {
            let len = usize::try_from(to - at).map_or(PIECE, |len| len.min(PIECE));
            let piece = &mut piece[..len];
            let read = self
                .snapshot
                .own()
                .read(Part::Gap, piece, at, Reason::Verify);
            if let Err(error) = read {
                self.problem(error);
                return self.stop_if_failed();
            }
            if let Some(i) = piece.iter().position(|&byte| byte != 0) {
                let detail = format!("bytes {from}..{to} belong to nothing and are not zero");
                self.report.add(Part::Gap, at + i as u64, detail);
                return Ok(());
            }
            at += len as u64;
            self.report_progress()?;
        }
        Ok(())
    }
}
