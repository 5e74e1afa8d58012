//! Building blocks of a checked snapshot, in plain numbers.

use std::fmt;

use crate::digest::Digest;
use crate::layout;

/// Id of one layout of frames: random, new for every file written. Two files with the same memory
/// have different ids and the same content digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// Creates an id that no other file has: 128 bits that the operating system gave the standard
    /// library as keys, mixed with the time and the process id, because a forked process has the
    /// same keys.
    pub(crate) fn random() -> Self {
        use std::hash::{BuildHasher, RandomState};

        let mut hasher = blake3::Hasher::new();
        for n in 0..4 {
            hasher.update(&RandomState::new().hash_one(n).to_le_bytes());
        }
        hasher.update(&std::process::id().to_le_bytes());
        if let Ok(now) = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
            hasher.update(&now.as_nanos().to_le_bytes());
        }
        let mut id = [0; 16];
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(id)
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotId({self})")
    }
}

/// Counts of a snapshot, over the pages of its regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Pages of all regions.
    pub pages: u64,
    /// Pages that are zero.
    pub zero_pages: u64,
    /// Pages that repeat an 8-byte word other than zero.
    pub fill_pages: u64,
    /// Distinct page contents in frames of this file.
    pub stored_pages: u64,
    /// Pages that share a stored page with an earlier page.
    pub duplicate_pages: u64,
    /// Pages that could not be read when the snapshot was taken.
    pub unavailable_pages: u64,
    /// Frames in this file.
    pub frames: u64,
    /// Decoded bytes of a full frame, as configured in the writer.
    pub frame_bytes: u64,
    /// Bytes of all frame records.
    pub stored_bytes: u64,
    /// Bytes of all index blocks in this file.
    pub index_bytes: u64,
    /// Digest of the content: see [`crate::digest`].
    pub content_digest: Digest,
    /// Digest of the content, the regions' descriptions, and the attachments: see
    /// [`crate::digest::state`].
    pub state_digest: Digest,
}

impl From<&layout::RawSummary> for Summary {
    fn from(raw: &layout::RawSummary) -> Self {
        Self {
            pages: raw.pages.get(),
            zero_pages: raw.zero_pages.get(),
            fill_pages: raw.fill_pages.get(),
            stored_pages: raw.stored_pages.get(),
            duplicate_pages: raw.duplicate_pages.get(),
            unavailable_pages: raw.unavailable_pages.get(),
            frames: raw.frames.get(),
            frame_bytes: raw.frame_bytes.get(),
            stored_bytes: raw.stored_bytes.get(),
            index_bytes: raw.index_bytes.get(),
            content_digest: raw.content_digest,
            state_digest: raw.state_digest,
        }
    }
}

impl From<&Summary> for layout::RawSummary {
    fn from(plain: &Summary) -> Self {
        Self {
            pages: plain.pages.into(),
            zero_pages: plain.zero_pages.into(),
            fill_pages: plain.fill_pages.into(),
            stored_pages: plain.stored_pages.into(),
            duplicate_pages: plain.duplicate_pages.into(),
            unavailable_pages: plain.unavailable_pages.into(),
            frames: plain.frames.into(),
            frame_bytes: plain.frame_bytes.into(),
            stored_bytes: plain.stored_bytes.into(),
            index_bytes: plain.index_bytes.into(),
            content_digest: plain.content_digest,
            state_digest: plain.state_digest,
        }
    }
}

/// One region: a contiguous range of the owner's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address space: 0 for a VM, one for each process of a tree.
    pub space: u32,
    /// Bits of [`layout::region_flags`]; 0 if unknown.
    pub flags: u32,
    /// Address in the owner's terms, a multiple of the page size.
    pub start: u64,
    /// Length in pages.
    pub pages: u64,
    /// Number of its first page, a multiple of 512.
    pub first_page: u64,
    /// Page size of the owner's mapping, as a power of two; a hint.
    pub page_shift: u32,
    /// The owner's name for the region, for people.
    pub name: String,
}

impl Region {
    /// Returns the length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * layout::PAGE_SIZE_U64
    }

    /// Returns the numbers of the region's pages.
    pub fn page_numbers(&self) -> std::ops::Range<u64> {
        self.first_page..self.first_page + self.pages
    }
}

/// A range of pages that all repeat one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillRun {
    /// First page.
    pub first_page: u64,
    /// Pages, at least 1.
    pub pages: u64,
    /// The word.
    pub word: u64,
}

/// Consecutive pages of a working set, which lists them in order of first touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingSetRun {
    /// First page.
    pub first_page: u64,
    /// Pages, at least 1.
    pub pages: u64,
}

/// Name and size of a working set: see `Snapshot::working_set`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    /// Its name, unique among the working sets.
    pub name: String,
    /// Number of its runs.
    pub runs: u64,
}

/// Name and size of an attachment: see `Snapshot::read_attachment`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its name, unique among the attachments.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Number and size of a dictionary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DictionaryInfo {
    /// The number that frames use.
    pub number: u16,
    /// Its length in bytes.
    pub bytes: u64,
}
