//! Options of the writer.

use std::sync::Arc;
use zstd::zstd_safe;

use super::WriteError;
use crate::layout::{MAX_DICTIONARY_BYTES, MAX_FRAME_SLOTS, MAX_NAME_BYTES, PAGE_SIZE_U64};
use crate::snapshot::Snapshot;
use crate::types::SnapshotId;

/// Dictionary policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Dictionary {
    /// [Train](Self::Train) one if the frames are [small
    /// enough](crate::dictionary::is_worth_training) that it is worth the time.
    #[default]
    Auto,
    /// Use none.
    Off,
    /// Train one on the first frames (a part of the first 64 MiB of distinct pages) while they are
    /// being written, and use it for later frames if it pays on pages that it wasn't trained on.
    /// This works on a stream. A caller with random access to the source gets a better dictionary,
    /// from the first frame on, with [`crate::dictionary::train`].
    Train,
    /// Use this one.
    Use(Vec<u8>),
}

/// Options for writing a snapshot.
///
/// With the defaults a writer takes at most 128 MiB for any source up to 64 GiB. Larger frames,
/// higher levels and more threads cost more: each thread has a zstd context and a frame of its own.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// The zstd level.
    pub level: i32,
    /// Pages of a frame, 1 to 512: what a fault must decode at most.
    pub frame_pages: usize,
    /// See [`Dictionary`].
    pub dictionary: Dictionary,
    /// Threads that hash and compress. By default one for each processor, at most 8.
    pub threads: Option<usize>,
    /// Distinct pages up to which every repetition is found; beyond, old pages are forgotten.
    /// Costs 48 bytes each, but no more than for [`WriterOptions::expected_pages`].
    pub exact_distinct_pages: usize,
    /// Pages that will be written, those of the base left out, if known: decides how large a
    /// dictionary pays, and bounds the table of known pages. With more pages than expected, some
    /// repetitions may be stored again.
    pub expected_pages: Option<u64>,
    /// The snapshot's id; random by default. The same input, options and id give the same bytes.
    pub snapshot_id: Option<SnapshotId>,
    /// Properties to record, besides the writer's own.
    pub properties: Vec<(String, String)>,
    /// The base, of which the new snapshot becomes a child: only what differs is stored. See
    /// [`RegionSpec::base_page`]. A base takes up to 60 MiB more memory, for what is known of it.
    pub base: Option<Arc<Snapshot>>,
}

/// Frames of 128 KiB.
const DEFAULT_FRAME_PAGES: usize = 32;
/// More threads than this would wait for the one that orders the pages.
const MAX_DEFAULT_THREADS: usize = 8;
const MAX_THREADS: usize = 512;
/// Bounds of the table of known pages: 384 bytes to 1.5 GiB.
const EXACT_PAGES: std::ops::RangeInclusive<usize> = 8..=1 << 25;

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            level: 3,
            frame_pages: DEFAULT_FRAME_PAGES,
            dictionary: Dictionary::default(),
            threads: None,
            exact_distinct_pages: 1 << 20,
            expected_pages: None,
            snapshot_id: None,
            properties: Vec::new(),
            base: None,
        }
    }
}

impl WriterOptions {
    /// Returns the number of distinct pages for which the table of known pages is made. Its memory
    /// is touched all over, so a table that is too large takes time.
    pub(super) fn known_pages(&self) -> usize {
        let expected = self.expected_pages.unwrap_or(u64::MAX);
        let expected = usize::try_from(expected).unwrap_or(usize::MAX);
        self.exact_distinct_pages.min(expected)
    }

    /// Refuses invalid values.
    pub(super) fn check(&self) -> Result<(), WriteError> {
        let levels = zstd_safe::min_c_level()..=zstd_safe::max_c_level();
        if !levels.contains(&self.level) {
            return Err(WriteError::argument(
                "the compression level",
                self.level,
                "1 to 22, or below 0 for speed",
            ));
        }
        if !(1..=MAX_FRAME_SLOTS).contains(&self.frame_pages) {
            return Err(WriteError::argument(
                "the number of pages in a frame",
                self.frame_pages,
                "1 to 512",
            ));
        }
        if let Some(threads) = self.threads
            && !(1..=MAX_THREADS).contains(&threads)
        {
            return Err(WriteError::argument(
                "the number of threads",
                threads,
                "1 to 512",
            ));
        }
        if !EXACT_PAGES.contains(&self.exact_distinct_pages) {
            return Err(WriteError::argument(
                "the number of exactly known pages",
                self.exact_distinct_pages,
                "8 to 33554432",
            ));
        }
        if let Dictionary::Use(bytes) = &self.dictionary {
            if bytes.is_empty() {
                return Err(WriteError::argument(
                    "the dictionary's length",
                    0,
                    "1 byte to 1 MiB",
                ));
            }
            WriteError::limit(
                "the dictionary's length",
                bytes.len() as u64,
                MAX_DICTIONARY_BYTES as u64,
            )?;
        }
        Ok(())
    }

    /// Returns the properties that the writer records about itself.
    pub(super) fn own_properties(&self) -> Vec<(String, String)> {
        vec![
            (
                "writer".into(),
                concat!("snapshot-format ", env!("CARGO_PKG_VERSION")).into(),
            ),
            ("writer.level".into(), self.level.to_string()),
            ("writer.frame_pages".into(), self.frame_pages.to_string()),
        ]
    }

    /// Returns the number of threads: as configured, or a default that fits this machine.
    pub(super) fn thread_count(&self) -> usize {
        self.threads.unwrap_or_else(|| {
            std::thread::available_parallelism()
                .map_or(1, usize::from)
                .min(MAX_DEFAULT_THREADS)
        })
    }
}

/// One region of the snapshot. It has the pages that are written until the next one begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionSpec {
    /// Address space: 0 for a VM, one for each process of a tree.
    pub space: u32,
    /// Bits of [`crate::layout::region_flags`]; 0 if unknown.
    pub flags: u32,
    /// Address in the owner's terms, a multiple of 4096.
    pub start: u64,
    /// Page size of the owner's mapping as a power of two; 0 stands for 12 (4 KiB).
    pub page_shift: u32,
    /// The owner's name for the region; no control characters.
    pub name: String,
    /// Page of the base that corresponds to the region's first page, if there is a base and it has
    /// one: [`Region::first_page`](crate::Region::first_page) of the same region there, or a page
    /// in the middle of one. The pages after it correspond to those after it in the base, up to the
    /// end of the base's region. See also [`Writer::set_base_page`](crate::Writer::set_base_page).
    pub base_page: Option<u64>,
}

impl RegionSpec {
    /// Refuses values that the format can't hold.
    pub(super) fn check(&self) -> Result<(), WriteError> {
        if !self.start.is_multiple_of(PAGE_SIZE_U64) {
            return Err(WriteError::argument(
                "a region's start",
                format_args!("{:#x}", self.start),
                "multiples of 4096",
            ));
        }
        if !matches!(self.page_shift, 0 | 12..=40) {
            return Err(WriteError::argument(
                "a region's page size (log 2)",
                self.page_shift,
                "12 to 40",
            ));
        }
        if self.flags & !crate::layout::region_flags::KNOWN != 0 {
            return Err(WriteError::argument(
                "a region's flags",
                format_args!("{:#x}", self.flags),
                "read 1, write 2, execute 4, shared 0x100",
            ));
        }
        if crate::sections::has_control(&self.name) {
            return Err(WriteError::argument(
                "a region's name",
                format_args!("{:?}", self.name),
                "text without control characters",
            ));
        }
        WriteError::limit(
            "the length of a region's name",
            self.name.len() as u64,
            MAX_NAME_BYTES as u64,
        )
    }
}
