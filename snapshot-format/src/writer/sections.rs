//! The end of the file: tables of blobs, sections and the trailer.

use std::io::Write;

use zerocopy::{FromZeros, IntoBytes};

use super::WriteError;
use super::output::Output;
use crate::digest::Digest;
use crate::layout::{
    FORMAT_VERSION, HEADER_MAGIC, MAX_BLOBS, MAX_REGIONS, MAX_SECTIONS, PAGE_SIZE, RawBlobEntry,
    RawHeader, RawRegionEntry, RawSectionEntry, RawTrailer, SectionKind, TRAILER_BYTES,
    TRAILER_MAGIC,
};
use crate::sections::{has_control, is_blob_name};
use crate::types::{Region, SnapshotId, Summary};

/// Writes the first 4 KiB.
pub(super) fn write_header<W: Write>(
    out: &mut Output<W>,
    id: SnapshotId,
    optional_features: u64,
) -> Result<(), WriteError> {
    let mut header = RawHeader::new_zeroed();
    header.magic = HEADER_MAGIC;
    header.version = FORMAT_VERSION.into();
    header.page_size = u32::try_from(PAGE_SIZE).expect("4096").into();
    header.optional_features = optional_features.into();
    header.snapshot_id = id.0;
    let crc = crc32fast::hash(&header.as_bytes()[..size_of::<RawHeader>() - 4]);
    header.crc = crc.into();
    out.write("the header", header.as_bytes())
}

/// Location of one blob.
pub(super) struct Blob {
    pub(super) name: String,
    /// Number of a dictionary, otherwise 0.
    pub(super) tag: u32,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) crc: u32,
    pub(super) digest: Digest,
}

/// A blob that is being written.
pub(super) struct BlobWriter {
    blob: Blob,
    crc: crc32fast::Hasher,
    digest: blake3::Hasher,
}

impl BlobWriter {
    pub(super) fn new<W: Write>(out: &Output<W>, name: &str, tag: u32) -> Self {
        let blob = Blob {
            name: name.to_owned(),
            tag,
            offset: out.offset(),
            len: 0,
            crc: 0,
            digest: Digest::default(),
        };
        Self {
            blob,
            crc: crc32fast::Hasher::new(),
            digest: blake3::Hasher::new(),
        }
    }

    pub(super) fn write<W: Write>(
        &mut self,
        out: &mut Output<W>,
        what: &'static str,
        bytes: &[u8],
    ) -> Result<(), WriteError> {
        self.crc.update(bytes);
        self.digest.update(bytes);
        self.blob.len += bytes.len() as u64;
        out.write(what, bytes)
    }

    /// Returns the number of bytes written so far.
    pub(super) fn len(&self) -> u64 {
        self.blob.len
    }

    pub(super) fn finish(self) -> Blob {
        Blob {
            crc: self.crc.finalize(),
            digest: self.digest.finalize().into(),
            ..self.blob
        }
    }
}

/// Checks the name of one more blob, and that one more is allowed. This also keeps the section
/// within its limit in bytes: 4096 names of 4096 bytes are far below it.
pub(super) fn check_blob_name(
    what: &'static str,
    number: &'static str,
    name: &str,
    present: &[Blob],
) -> Result<(), WriteError> {
    if !is_blob_name(name) {
        return Err(WriteError::argument(
            what,
            format_args!("{name:?}"),
            "1 to 4096 bytes without '/' and control characters, not \".\" or \"..\"",
        ));
    }
    if present.iter().any(|blob| blob.name == name) {
        return Err(WriteError::argument(
            what,
            format_args!("{name:?}"),
            "each name once",
        ));
    }
    WriteError::limit(number, present.len() as u64 + 1, MAX_BLOBS as u64)
}

/// Writes sections and records their locations.
#[derive(Default)]
pub(super) struct Sections {
    entries: Vec<RawSectionEntry>,
}

impl Sections {
    /// Writes one section from the parts that it consists of.
    pub(super) fn write<W: Write>(
        &mut self,
        out: &mut Output<W>,
        kind: SectionKind,
        count: u64,
        parts: &[&[u8]],
    ) -> Result<(), WriteError> {
        let offset = out.offset();
        let mut hasher = crc32fast::Hasher::new();
        for part in parts {
            hasher.update(part);
            out.write("a section", part)?;
        }
        self.entries.push(RawSectionEntry {
            kind: (kind as u32).into(),
            crc: hasher.finalize().into(),
            offset: offset.into(),
            len: (out.offset() - offset).into(),
            count: count.into(),
            reserved: 0.into(),
        });
        Ok(())
    }

    /// Writes a section of blobs, unless there are none.
    pub(super) fn write_blobs<W: Write>(
        &mut self,
        out: &mut Output<W>,
        kind: SectionKind,
        blobs: &[Blob],
    ) -> Result<(), WriteError> {
        if blobs.is_empty() {
            return Ok(());
        }
        let mut names = String::new();
        let mut entries = Vec::with_capacity(blobs.len());
        for blob in blobs {
            entries.push(RawBlobEntry {
                offset: blob.offset.into(),
                len: blob.len.into(),
                crc: blob.crc.into(),
                tag: blob.tag.into(),
                name_offset: name_len(names.len()).into(),
                name_len: name_len(blob.name.len()).into(),
            });
            names.push_str(&blob.name);
        }
        self.write(
            out,
            kind,
            blobs.len() as u64,
            &[entries.as_bytes(), names.as_bytes()],
        )
    }

    /// Writes the regions.
    pub(super) fn write_regions<W: Write>(
        &mut self,
        out: &mut Output<W>,
        regions: &[Region],
    ) -> Result<(), WriteError> {
        let mut names = String::new();
        let mut entries = Vec::with_capacity(regions.len());
        for region in regions {
            entries.push(RawRegionEntry {
                space: region.space.into(),
                flags: region.flags.into(),
                start: region.start.into(),
                pages: region.pages.into(),
                first_page: region.first_page.into(),
                page_shift: region.page_shift.into(),
                name_len: name_len(region.name.len()).into(),
                name_offset: (names.len() as u64).into(),
                reserved: 0.into(),
                unused: 0.into(),
            });
            names.push_str(&region.name);
        }
        self.write(
            out,
            SectionKind::Regions,
            regions.len() as u64,
            &[entries.as_bytes(), names.as_bytes()],
        )
    }

    /// Writes the trailer and returns the length of the file.
    pub(super) fn finish<W: Write>(
        self,
        out: &mut Output<W>,
        id: SnapshotId,
        [required_features, optional_features]: [u64; 2],
        summary: &Summary,
    ) -> Result<u64, WriteError> {
        debug_assert!(self.entries.len() <= MAX_SECTIONS);
        let mut trailer = RawTrailer::new_zeroed();
        let file_bytes = out.offset() + TRAILER_BYTES as u64;
        trailer.version = FORMAT_VERSION.into();
        trailer.section_count = u32::try_from(self.entries.len())
            .expect("at most 64")
            .into();
        trailer.required_features = required_features.into();
        trailer.optional_features = optional_features.into();
        trailer.snapshot_id = id.0;
        trailer.file_bytes = file_bytes.into();
        trailer.summary = summary.into();
        trailer.sections[..self.entries.len()].copy_from_slice(&self.entries);
        trailer.magic = TRAILER_MAGIC;
        let before_crc = size_of::<RawTrailer>() - 12;
        trailer.crc = crc32fast::hash(&trailer.as_bytes()[..before_crc]).into();
        out.write("the trailer", trailer.as_bytes())?;
        Ok(file_bytes)
    }
}

fn name_len(len: usize) -> u32 {
    u32::try_from(len).expect("4096 names of 4096 bytes at most")
}

/// Checks the number of regions.
pub(super) fn check_region_count(count: usize) -> Result<(), WriteError> {
    WriteError::limit("the number of regions", count as u64, MAX_REGIONS)
}

/// Returns the number of bytes that a region of this name takes in the region section.
pub(super) fn region_bytes(name: &str) -> u64 {
    (size_of::<RawRegionEntry>() + name.len()) as u64
}

/// Checks one property.
pub(super) fn check_property(key: &str, value: &str) -> Result<(), WriteError> {
    if key.is_empty() || key.contains('=') || has_control(key) {
        return Err(WriteError::argument(
            "a property's key",
            format_args!("{key:?}"),
            "1 character or more, without '=' and control characters",
        ));
    }
    if has_control(value) {
        return Err(WriteError::argument(
            "a property's value",
            format_args!("{value:?}"),
            "text without control characters",
        ));
    }
    Ok(())
}
