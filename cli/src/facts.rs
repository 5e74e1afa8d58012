//! The contents of a snapshot as `create` and `info` report them.

use std::fmt;

use indicatif::{BinaryBytes, HumanCount};
use serde::Serialize;
use snapshot_format::layout::{FORMAT_VERSION, PAGE_SIZE_U64};
use snapshot_format::{Region, Snapshot, SnapshotId, Summary, Written, digest};

use crate::output::{count, percent, ratio};

/// The figures of a snapshot. The field names are part of the command's interface.
#[derive(Debug, Serialize)]
pub(crate) struct Facts {
    pub(crate) snapshot_id: String,
    format_version: u32,
    content_digest: String,
    state_digest: String,
    page_size: u64,
    pub(crate) pages: u64,
    pub(crate) zero_pages: u64,
    fill_pages: u64,
    pub(crate) stored_pages: u64,
    pub(crate) duplicate_pages: u64,
    unavailable_pages: u64,
    /// Number of pages whose content lies in files of ancestors.
    pub(crate) ancestor_pages: u64,
    frames: u64,
    frame_bytes: u64,
    pub(crate) logical_bytes: u64,
    stored_bytes: u64,
    index_bytes: u64,
    pub(crate) file_bytes: u64,
    pub(crate) regions: Vec<RegionFacts>,
}

/// The facts of one region, with its length in bytes and its start as an address.
#[derive(Debug, Serialize)]
pub(crate) struct RegionFacts {
    pub(crate) name: String,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    /// Offset of the region in the output of `extract`.
    pub(crate) offset: u64,
    pub(crate) space: u32,
    /// Protection as in `/proc/PID/maps`; empty if unknown.
    pub(crate) protection: String,
    pub(crate) page_bytes: u64,
}

impl RegionFacts {
    /// Returns the facts of regions that are written one after another.
    pub(crate) fn all<'r>(regions: impl IntoIterator<Item = &'r Region>) -> Vec<Self> {
        let mut offset = 0;
        let placed = |region: &Region| {
            let facts = Self::new(region, offset);
            offset += facts.bytes;
            facts
        };
        regions.into_iter().map(placed).collect()
    }

    fn new(region: &Region, offset: u64) -> Self {
        Self {
            name: region.name.clone(),
            start: region.start,
            bytes: region.bytes(),
            offset,
            space: region.space,
            protection: protection(region.flags),
            page_bytes: 1 << region.page_shift.min(63),
        }
    }
}

/// Returns the number of pages that the counts of a layered snapshot leave to its ancestors; 0 if
/// it is not layered.
fn in_ancestors(summary: &Summary) -> u64 {
    let own = [
        summary.zero_pages,
        summary.fill_pages,
        summary.stored_pages,
        summary.duplicate_pages,
        summary.unavailable_pages,
    ];
    summary.pages.saturating_sub(own.iter().sum())
}

fn protection(flags: u32) -> String {
    use snapshot_format::layout::region_flags::{EXECUTE, READ, SHARED, WRITE};
    if flags == 0 {
        return String::new();
    }
    let bit = |bit, letter| if flags & bit == 0 { '-' } else { letter };
    [
        bit(READ, 'r'),
        bit(WRITE, 'w'),
        bit(EXECUTE, 'x'),
        if flags & SHARED == 0 { 'p' } else { 's' },
    ]
    .iter()
    .collect()
}

impl Facts {
    /// Returns the facts of a snapshot that has just been written.
    fn written(id: SnapshotId, summary: &Summary, file_bytes: u64, regions: &[Region]) -> Self {
        Self {
            snapshot_id: id.to_string(),
            format_version: FORMAT_VERSION,
            content_digest: digest::hex(&summary.content_digest),
            state_digest: digest::hex(&summary.state_digest),
            page_size: PAGE_SIZE_U64,
            pages: summary.pages,
            zero_pages: summary.zero_pages,
            fill_pages: summary.fill_pages,
            stored_pages: summary.stored_pages,
            duplicate_pages: summary.duplicate_pages,
            unavailable_pages: summary.unavailable_pages,
            ancestor_pages: in_ancestors(summary),
            frames: summary.frames,
            frame_bytes: summary.frame_bytes,
            logical_bytes: summary.pages * PAGE_SIZE_U64,
            stored_bytes: summary.stored_bytes,
            index_bytes: summary.index_bytes,
            file_bytes,
            regions: RegionFacts::all(regions),
        }
    }

    /// Returns the facts of a snapshot that a writer has just written.
    pub(crate) fn of_written(written: &Written) -> Self {
        Self {
            // Slots that no page uses are no reason to count others twice.
            ancestor_pages: written.ancestor_pages,
            ..Self::written(
                written.id,
                &written.summary,
                written.file_bytes,
                &written.regions,
            )
        }
    }

    /// Returns the facts of an open snapshot.
    pub(crate) fn of(snapshot: &Snapshot) -> Self {
        Self {
            format_version: snapshot.format_version(),
            ..Self::written(
                snapshot.id(),
                snapshot.summary(),
                snapshot.file_bytes(),
                snapshot.regions(),
            )
        }
    }
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |bytes| BinaryBytes(bytes).to_string();
        writeln!(
            f,
            "memory      {} in {} pages of {} KiB, {}",
            bytes(self.logical_bytes),
            HumanCount(self.pages),
            self.page_size >> 10,
            count(self.regions.len() as u64, "region")
        )?;
        writeln!(
            f,
            "file        {} ({} times smaller than the memory)",
            bytes(self.file_bytes),
            ratio(self.logical_bytes, self.file_bytes)
        )?;
        let lines = [
            ("zero", self.zero_pages),
            ("fill", self.fill_pages),
            ("duplicate", self.duplicate_pages),
            ("stored", self.stored_pages),
            ("ancestors", self.ancestor_pages),
            ("unavailable", self.unavailable_pages),
        ];
        for (what, pages) in lines {
            if pages > 0 || !matches!(what, "ancestors" | "unavailable") {
                writeln!(
                    f,
                    "{what:<11} {:>13} pages {:>7}",
                    HumanCount(pages).to_string(),
                    percent(pages, self.pages)
                )?;
            }
        }
        writeln!(
            f,
            "frames      {} of up to {}; {} stored, {} of index",
            HumanCount(self.frames),
            bytes(self.frame_bytes),
            bytes(self.stored_bytes),
            bytes(self.index_bytes)
        )?;
        writeln!(
            f,
            "identity    {} (format {})",
            self.snapshot_id, self.format_version
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protection_reads_as_in_maps() {
        assert_eq!(protection(0), "");
        assert_eq!(protection(3), "rw-p");
        assert_eq!(protection(0x105), "r-xs");
        assert_eq!(protection(0x100), "---s");
    }
}
