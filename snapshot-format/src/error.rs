//! Errors of reading a snapshot, and how severe they are.
//!
//! Every operation has an enum of its own; each message names the file, the place and the accepted
//! values. `is_damage` distinguishes "this file is not, or no longer, a good snapshot" from "the
//! operation failed".

use std::borrow::Cow;
use std::fmt;
use std::io;

use crate::layout::SectionKind;
use crate::types::SnapshotId;

/// A part of the file, as named in messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Part {
    /// The first 4 KiB.
    Header,
    /// The last 4 KiB.
    Trailer,
    /// One of the sections, the top table included.
    Section(SectionKind),
    /// A section of a kind that this version doesn't define.
    UnknownSection(u32),
    /// An index block.
    IndexBlock,
    /// A frame record.
    Frame,
    /// A dictionary's bytes.
    Dictionary,
    /// A working set's runs.
    WorkingSet,
    /// An attachment's bytes.
    Attachment,
    /// Bytes that belong to nothing.
    Gap,
}

impl Part {
    pub(crate) const TOP: Self = Self::Section(SectionKind::Top);
    pub(crate) const REGIONS: Self = Self::Section(SectionKind::Regions);
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Header => "header",
            Self::Trailer => "trailer",
            Self::Section(SectionKind::Regions) => "region section",
            Self::Section(SectionKind::Top) => "top table",
            Self::Section(SectionKind::FillRuns) => "fill run section",
            Self::Section(SectionKind::Dictionaries) => "dictionary section",
            Self::Section(SectionKind::WorkingSets) => "working set section",
            Self::Section(SectionKind::Attachments) => "attachment section",
            Self::Section(SectionKind::Properties) => "property section",
            Self::Section(SectionKind::Ancestors) => "ancestor section",
            Self::Section(SectionKind::BlockDigests) => "block digest section",
            Self::UnknownSection(kind) => return write!(f, "section of kind {kind}"),
            Self::IndexBlock => "index block",
            Self::Frame => "frame",
            Self::Dictionary => "dictionary",
            Self::WorkingSet => "working set",
            Self::Attachment => "attachment",
            Self::Gap => "gap",
        };
        f.write_str(name)
    }
}

/// A defect in a part of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Defect {
    /// The bytes are not the ones that were written.
    #[error("checksum {computed:#010x} where {stored:#010x} is recorded")]
    Checksum {
        /// CRC-32 as recorded in the file.
        stored: u32,
        /// CRC-32 of the bytes as read.
        computed: u32,
    },
    /// A byte that must be zero is not.
    #[error("{field} must be zero")]
    Reserved {
        /// Name of the field.
        field: &'static str,
    },
    /// A field has a value that it can't have.
    #[error("{field} is {value}; accepted: {accepted}")]
    Value {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Description of the accepted values.
        accepted: Cow<'static, str>,
    },
    /// A length or count passes a named limit.
    #[error("{field} is {value}, more than the limit of {limit}")]
    TooLarge {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A range lies outside its bounds.
    #[error("{field}: {len} from {offset} on do not lie within {from}..{to}")]
    OutOfBounds {
        /// Description of the range.
        field: &'static str,
        /// Start of the range.
        offset: u64,
        /// Its length, in the units of `offset`.
        len: u64,
        /// Start of the allowed range.
        from: u64,
        /// End of the allowed range.
        to: u64,
    },
    /// Two parts claim the same bytes or numbers.
    #[error("{first} and {second} overlap")]
    Overlap {
        /// The first part.
        first: String,
        /// The second part.
        second: String,
    },
    /// A name, a text or another entry of a record is invalid.
    #[error("{field}: {detail}")]
    Text {
        /// Name of the field.
        field: &'static str,
        /// Description of the defect.
        detail: Cow<'static, str>,
    },
    /// The decompressor refused the bytes.
    #[error("cannot be decoded: {reason}")]
    Decode {
        /// The decompressor's error message.
        reason: Cow<'static, str>,
    },
    /// A part that must be there is missing.
    #[error("{what} is missing")]
    Missing {
        /// The part.
        what: Cow<'static, str>,
    },
}

impl Defect {
    pub(crate) fn value(
        field: &'static str,
        value: impl Into<u64>,
        accepted: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Value {
            field,
            value: value.into(),
            accepted: accepted.into(),
        }
    }
}

/// A defect and its offset: the result of the checks, before the reader adds file and part.
#[derive(Clone, Debug)]
pub(crate) struct Flaw {
    pub(crate) at: u64,
    pub(crate) defect: Defect,
}

impl Flaw {
    pub(crate) fn new(at: u64, defect: Defect) -> Self {
        Self { at, defect }
    }
}

/// A snapshot could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The store failed.
    #[error("{file}: cannot read {len} bytes of the {part} at byte {offset}")]
    Io {
        /// The store's name.
        file: String,
        /// Part that was being read.
        part: Part,
        /// Offset of the read, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// The store's error.
        source: io::Error,
    },
    /// The store could not be opened, or its length could not be determined.
    #[error("{file}: cannot be opened")]
    NoStore {
        /// The store's name.
        file: String,
        /// The store's error.
        source: io::Error,
    },
    /// The file doesn't begin as snapshots do.
    #[error(
        "{file}: not a snapshot: {}",
        match file_bytes {
            0 => "it is empty",
            _ => "it does not begin with the magic bytes of one",
        }
    )]
    NotASnapshot {
        /// The store's name.
        file: String,
        /// Its length.
        file_bytes: u64,
    },
    /// The file begins as a snapshot but has no trailer at its end.
    #[error(
        "{file}: incomplete snapshot: the {file_bytes} bytes do not end in a trailer; it was not \
         written to the end, or was cut off"
    )]
    Incomplete {
        /// The store's name.
        file: String,
        /// Its length.
        file_bytes: u64,
    },
    /// The file is a snapshot of another format version.
    #[error("{file}: format version {version} is not supported; accepted: {accepted}")]
    UnsupportedVersion {
        /// The store's name.
        file: String,
        /// Version of the file.
        version: u32,
        /// Version that this reader knows.
        accepted: u32,
    },
    /// The file can't be read correctly without features that this reader doesn't have.
    #[error("{file}: needs features that this reader does not support: {names}")]
    UnsupportedFeature {
        /// The store's name.
        file: String,
        /// The features' names, or bit numbers where no name is known.
        names: String,
    },
    /// No file of an ancestor was found.
    #[error(
        "{file}: is layered, and its ancestor {id}{} is missing; searched: {}",
        known_as(name),
        places(searched)
    )]
    AncestorMissing {
        /// The name of the snapshot's own file.
        file: String,
        /// Id of the ancestor.
        id: SnapshotId,
        /// Name under which its file was last known; may be empty.
        name: String,
        /// Folders that were searched.
        searched: Vec<String>,
    },
    /// The file of an ancestor can't be used.
    #[error("{file}: is layered, and its ancestor {id} cannot be used")]
    AncestorUnusable {
        /// The name of the snapshot's own file.
        file: String,
        /// Id of the ancestor.
        id: SnapshotId,
        /// The reason why the ancestor's file can't be used.
        source: Box<OpenError>,
    },
    /// The file is not the one that a child recorded as its ancestor.
    #[error("{file}: is not the file that was recorded as ancestor {id}: {difference}")]
    AncestorReplaced {
        /// The name of the file.
        file: String,
        /// Id of the wanted ancestor.
        id: SnapshotId,
        /// How the file differs.
        difference: String,
    },
    /// The file, an ancestor of another, has pages of another size.
    #[error(
        "{file}: has pages of {page_size} bytes; accepted: {}",
        crate::layout::PAGE_SIZE
    )]
    AncestorPageSize {
        /// The name of the file.
        file: String,
        /// The page size that its header names.
        page_size: u32,
    },
    /// The snapshot is its own ancestor.
    #[error("{file}: is its own ancestor: {ancestor} lists the id {id}")]
    AncestorCycle {
        /// The name of the snapshot's own file.
        file: String,
        /// Its id.
        id: SnapshotId,
        /// The name of the file that lists it.
        ancestor: String,
    },
    /// The file's top table is larger than the caller's limit.
    #[error(
        "{file}: its top table of {bytes} bytes is too large for the limit of {limit} bytes that \
         is set here (max_top_bytes)"
    )]
    TopTooLarge {
        /// The store's name.
        file: String,
        /// Length of the top table.
        bytes: u64,
        /// [`crate::SnapshotOptions::max_top_bytes`].
        limit: u64,
    },
    /// The file is a snapshot with a defect.
    #[error("{file}: damaged {part} at byte {offset}: {defect}")]
    Damaged {
        /// The store's name.
        file: String,
        /// The damaged part.
        part: Part,
        /// Offset of the damage, or of its start.
        offset: u64,
        /// The defect.
        defect: Defect,
    },
}

impl OpenError {
    /// Returns the name of the file that could not be opened.
    pub fn file(&self) -> &str {
        match self {
            Self::Io { file, .. }
            | Self::NoStore { file, .. }
            | Self::NotASnapshot { file, .. }
            | Self::Incomplete { file, .. }
            | Self::UnsupportedVersion { file, .. }
            | Self::UnsupportedFeature { file, .. }
            | Self::AncestorMissing { file, .. }
            | Self::AncestorUnusable { file, .. }
            | Self::AncestorReplaced { file, .. }
            | Self::AncestorPageSize { file, .. }
            | Self::AncestorCycle { file, .. }
            | Self::TopTooLarge { file, .. }
            | Self::Damaged { file, .. } => file,
        }
    }

    /// Returns whether the file, or an ancestor of it, is damaged, incomplete or not a snapshot;
    /// false if the operation failed for another reason.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Io { source, .. } => is_cut_off(source),
            Self::AncestorUnusable { source, .. } => source.is_damage(),
            Self::NoStore { .. }
            | Self::AncestorMissing { .. }
            | Self::AncestorReplaced { .. }
            | Self::AncestorPageSize { .. }
            | Self::TopTooLarge { .. }
            | Self::UnsupportedVersion { .. }
            | Self::UnsupportedFeature { .. } => false,
            Self::NotASnapshot { .. }
            | Self::Incomplete { .. }
            | Self::AncestorCycle { .. }
            | Self::Damaged { .. } => true,
        }
    }

    /// Returns whether this program can't use the file as a snapshot: it is damaged, or has a
    /// version or features that this program doesn't know.
    pub fn is_unusable(&self) -> bool {
        let is_newer = matches!(
            self,
            Self::UnsupportedVersion { .. } | Self::UnsupportedFeature { .. }
        );
        is_newer || self.is_damage()
    }

    /// Returns whether the file of an ancestor was not found where it was looked for. It may be in
    /// another folder.
    pub fn lacks_ancestor(&self) -> bool {
        match self {
            Self::AncestorMissing { .. } | Self::AncestorReplaced { .. } => true,
            Self::AncestorUnusable { source, .. } => source.lacks_ancestor(),
            _ => false,
        }
    }
}

/// Returns the last known name of an ancestor, for messages.
fn known_as(name: &str) -> String {
    match name {
        "" => String::new(),
        name => format!(" (last known as {name})"),
    }
}

/// Returns the folders that were searched, for messages.
fn places(searched: &[String]) -> String {
    match searched {
        [] => "no folder".to_owned(),
        searched => searched.join(", "),
    }
}

/// A part of an open snapshot could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The store failed.
    #[error("{file}: cannot read {len} bytes of the {part} at byte {offset}")]
    Io {
        /// The store's name.
        file: String,
        /// Part that was being read.
        part: Part,
        /// Offset of the read, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// The store's error.
        source: io::Error,
    },
    /// The part has a defect.
    #[error("{file}: damaged {part} at byte {offset}: {defect}")]
    Damaged {
        /// The store's name.
        file: String,
        /// The damaged part.
        part: Part,
        /// Offset of the damage, or of its start.
        offset: u64,
        /// The defect.
        defect: Defect,
    },
    /// The caller asked for a block that the snapshot doesn't have.
    #[error("{file}: has no block {block}, only {count}")]
    NoSuchBlock {
        /// The store's name.
        file: String,
        /// The block asked for.
        block: u64,
        /// Blocks in the snapshot.
        count: u64,
    },
    /// The caller asked for a name that the snapshot doesn't have.
    #[error("{file}: has no {part} named {name:?}; {}", existing(names))]
    NoSuchName {
        /// The store's name.
        file: String,
        /// Kind of part that was asked for.
        part: Part,
        /// The name asked for.
        name: String,
        /// The names that there are.
        names: Vec<String>,
    },
    /// The caller's writer failed.
    #[error("cannot write the {part} {name:?} of {file}")]
    Output {
        /// The store's name.
        file: String,
        /// Part that was being written out.
        part: Part,
        /// Its name.
        name: String,
        /// The writer's error.
        source: io::Error,
    },
}

/// Describes the names that a snapshot has, as far as they fit a message.
fn existing(names: &[String]) -> String {
    const MAX_NAMES: usize = 20;
    if names.is_empty() {
        return "there is none".to_owned();
    }
    let listed: Vec<_> = names
        .iter()
        .take(MAX_NAMES)
        .map(|n| format!("{n:?}"))
        .collect();
    let more = match names.len() - listed.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("there are: {}{more}", listed.join(", "))
}

impl ReadError {
    /// Returns the name of the file that could not be read: the snapshot's own, or an ancestor's.
    pub fn file(&self) -> &str {
        match self {
            Self::Io { file, .. }
            | Self::Damaged { file, .. }
            | Self::NoSuchBlock { file, .. }
            | Self::NoSuchName { file, .. }
            | Self::Output { file, .. } => file,
        }
    }

    /// Returns whether the file is damaged; false if the operation failed for another reason.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Io { source, .. } => is_cut_off(source),
            Self::Damaged { .. } => true,
            Self::NoSuchBlock { .. } | Self::NoSuchName { .. } | Self::Output { .. } => false,
        }
    }
}

/// A frame could not be read, checked or decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The store failed.
    #[error("{file}: cannot read the frame of {len} bytes at byte {offset}")]
    Io {
        /// The store's name.
        file: String,
        /// First byte of the frame record.
        offset: u64,
        /// Length of the frame record.
        len: u64,
        /// The store's error.
        source: io::Error,
    },
    /// The frame has a defect.
    #[error("{file}: damaged frame at byte {offset}: {defect}")]
    Damaged {
        /// The store's name.
        file: String,
        /// First byte of the frame record.
        offset: u64,
        /// The defect.
        defect: Defect,
    },
    /// The frame's dictionary could not be read.
    #[error("the frame at byte {offset} needs a dictionary that cannot be had")]
    Dictionary {
        /// First byte of the frame record.
        offset: u64,
        /// The reason why there is no dictionary.
        source: Box<ReadError>,
    },
    /// The caller's buffer has another length than the decoded frame.
    #[error("the frame at byte {offset} decodes to {expected} bytes, the buffer has {actual}")]
    Buffer {
        /// First byte of the frame record.
        offset: u64,
        /// Decoded length.
        expected: usize,
        /// The buffer's length.
        actual: usize,
    },
}

impl FrameError {
    /// Returns whether the file is damaged; false if the operation failed for another reason.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Io { source, .. } => is_cut_off(source),
            Self::Damaged { .. } => true,
            Self::Dictionary { source, .. } => source.is_damage(),
            Self::Buffer { .. } => false,
        }
    }

    /// Returns the offset of the frame record's first byte.
    pub fn offset(&self) -> u64 {
        match self {
            Self::Io { offset, .. }
            | Self::Damaged { offset, .. }
            | Self::Dictionary { offset, .. }
            | Self::Buffer { offset, .. } => *offset,
        }
    }
}

/// Returns whether the file was truncated after it was opened. All ranges were checked against its
/// length at that time, so a range that ends early means that the file has become shorter.
fn is_cut_off(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof
}
