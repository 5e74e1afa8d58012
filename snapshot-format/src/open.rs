//! From a store to the checked trailer and directory, read from the last 64 KiB of the file.
//!
//! The order of the checks decides how a broken file is classified, so it is part of the format:
//! see "Opening" in `FORMAT.md`. The header is read only to classify a file without a trailer, and
//! by the verifier.

use zerocopy::FromBytes;

use crate::digest::Digest;
use crate::error::{Defect, OpenError, Part};
use crate::index::Body;
use crate::layout::{
    FORMAT_VERSION, HEADER_BYTES, HEADER_MAGIC, MAX_SECTIONS, PAGE_SIZE, RawHeader, RawTrailer,
    SectionKind, TRAILER_BYTES, TRAILER_MAGIC, optional, required,
};
use crate::sections::Directory;
use crate::store::{Reason, Store};
use crate::types::{SnapshotId, Summary};

/// Features that this reader supports.
const SUPPORTED: u64 = required::KNOWN;

/// Checked content of the trailer.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) id: SnapshotId,
    pub(crate) version: u32,
    pub(crate) required_features: u64,
    pub(crate) optional_features: u64,
    pub(crate) file_bytes: u64,
    pub(crate) body: Body,
    pub(crate) summary: Summary,
    pub(crate) directory: Directory,
    /// Hash of the whole trailer, by which a child recognizes the file.
    pub(crate) trailer_hash: Digest,
}

impl Ends {
    /// Returns what is known of a file that is missing.
    pub(crate) fn absent(id: SnapshotId, file_bytes: u64, trailer_hash: Option<Digest>) -> Self {
        Self {
            id,
            version: FORMAT_VERSION,
            required_features: 0,
            optional_features: 0,
            file_bytes,
            body: Body {
                from: HEADER_BYTES as u64,
                to: file_bytes.saturating_sub(TRAILER_BYTES as u64),
            },
            summary: Summary::default(),
            directory: Directory::empty(),
            trailer_hash: trailer_hash.unwrap_or_default(),
        }
    }

    /// Returns the number of ancestors that the file lists.
    pub(crate) fn ancestor_count(&self) -> u64 {
        let section = self.directory.get(SectionKind::Ancestors);
        section.map_or(0, |section| section.count)
    }
}

/// The end of a file, or all of a shorter one.
pub(crate) struct Tail {
    start: u64,
    bytes: Vec<u8>,
}

impl Tail {
    fn read(store: &dyn Store, file_bytes: u64, most: usize) -> Result<Self, OpenError> {
        let len = usize::try_from(file_bytes).map_or(most, |len| len.min(most));
        let start = file_bytes - len as u64;
        let mut bytes = vec![0; len];
        read(store, Part::Trailer, &mut bytes, start)?;
        Ok(Self { start, bytes })
    }

    /// Fills `buf` with the file's bytes from `offset` on, and reads only those that lie before the
    /// tail from the store.
    pub(crate) fn read_exact_at(
        &self,
        store: &dyn Store,
        part: Part,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<(), OpenError> {
        let before = self.start.saturating_sub(offset);
        let before = usize::try_from(before).map_or(buf.len(), |before| before.min(buf.len()));
        let (before, within) = buf.split_at_mut(before);
        if !before.is_empty() {
            read(store, part, before, offset)?;
        }
        if !within.is_empty() {
            // Both are offsets within the file, and the tail is in memory.
            let from = usize::try_from(offset.max(self.start) - self.start).unwrap_or(0);
            within.copy_from_slice(&self.bytes[from..from + within.len()]);
        }
        Ok(())
    }
}

/// Checks the end of the file, of which it reads at most `tail_bytes`, in one read. They have room
/// for the trailer.
pub(crate) fn ends(store: &dyn Store, tail_bytes: usize) -> Result<(Ends, Tail), OpenError> {
    let file = || store.name();
    let file_bytes = store.len().map_err(|source| OpenError::NoStore {
        file: file(),
        source,
    })?;
    let tail = Tail::read(store, file_bytes, tail_bytes)?;
    if !tail.bytes.ends_with(&TRAILER_MAGIC) || file_bytes < (HEADER_BYTES + TRAILER_BYTES) as u64 {
        return Err(without_trailer(store, file_bytes));
    }
    let trailer = &tail.bytes[tail.bytes.len() - TRAILER_BYTES..];
    Ok((check_trailer(&file, trailer, file_bytes)?, tail))
}

/// Classifies a file that doesn't end in a trailer, by its header, since there is nothing else to
/// go by.
fn without_trailer(store: &dyn Store, file_bytes: u64) -> OpenError {
    let file = || store.name();
    let incomplete = OpenError::Incomplete {
        file: file(),
        file_bytes,
    };
    let mut buffer = [0; HEADER_BYTES];
    let there = usize::try_from(file_bytes).map_or(HEADER_BYTES, |len| len.min(HEADER_BYTES));
    let head = &mut buffer[..there];
    if let Err(error) = read(store, Part::Header, head, 0) {
        return error;
    }
    let magic = &head[..there.min(HEADER_MAGIC.len())];
    if magic.is_empty() || !HEADER_MAGIC.starts_with(magic) {
        return OpenError::NotASnapshot {
            file: file(),
            file_bytes,
        };
    }
    let Ok(header) = RawHeader::ref_from_bytes(head) else {
        return incomplete;
    };
    if let Err(defect) = check_header_crc(header, head) {
        return damaged(&file, Part::Header, 0, defect);
    }
    check_version(&file, header.version.get())
        .and_then(|()| check_features(&file, header.required_features.get()))
        .err()
        .unwrap_or(incomplete)
}

fn read(store: &dyn Store, part: Part, buf: &mut [u8], offset: u64) -> Result<(), OpenError> {
    store
        .read_exact_at(buf, offset, Reason::Open)
        .map_err(|source| OpenError::Io {
            file: store.name(),
            part,
            offset,
            len: buf.len() as u64,
            source,
        })
}

fn damaged(file: &dyn Fn() -> String, part: Part, offset: u64, defect: Defect) -> OpenError {
    OpenError::Damaged {
        file: file(),
        part,
        offset,
        defect,
    }
}

fn check_header_crc(header: &RawHeader, bytes: &[u8]) -> Result<(), Defect> {
    let computed = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
    let stored = header.crc.get();
    if computed == stored {
        return Ok(());
    }
    Err(Defect::Checksum { stored, computed })
}

/// Returns the page size that the header of `store` names. Nothing if the header can't be trusted:
/// a reader ignores a damaged one.
pub(crate) fn header_page_size(store: &dyn Store) -> Result<Option<u32>, OpenError> {
    let mut bytes = [0; HEADER_BYTES];
    read(store, Part::Header, &mut bytes, 0)?;
    let header = RawHeader::ref_from_bytes(&bytes).ok();
    let header = header.filter(|header| {
        bytes.starts_with(&HEADER_MAGIC) && check_header_crc(header, &bytes).is_ok()
    });
    Ok(header.map(|header| header.page_size.get()))
}

/// Returns the snapshot ID in the header of a file, if the file begins like a snapshot, and whether
/// the header is intact. Only a hint: the trailer decides. Returns nothing for a file that is
/// shorter than a header.
pub(crate) fn id_in_header(store: &dyn Store) -> Option<(Option<SnapshotId>, bool)> {
    let mut bytes = [0; HEADER_BYTES];
    store.read_exact_at(&mut bytes, 0, Reason::Open).ok()?;
    let header = RawHeader::ref_from_bytes(&bytes).ok()?;
    if !bytes.starts_with(&HEADER_MAGIC) {
        return Some((None, false));
    }
    let is_intact = check_header_crc(header, &bytes).is_ok();
    Some((Some(SnapshotId(header.snapshot_id)), is_intact))
}

/// Compares the header, the first bytes of the file, with the trailer: for the verifier.
pub(crate) fn check_header(bytes: &[u8; HEADER_BYTES], ends: &Ends) -> Result<(), Defect> {
    if !bytes.starts_with(&HEADER_MAGIC) {
        let detail = "not the magic bytes of a snapshot".into();
        return Err(Defect::Text {
            field: "first bytes of the file",
            detail,
        });
    }
    let Ok(header) = RawHeader::ref_from_bytes(bytes) else {
        let what = "header".into();
        return Err(Defect::Missing { what });
    };
    check_header_crc(header, bytes)?;
    if header.version.get() != ends.version {
        return Err(Defect::value(
            "version of the header",
            header.version.get(),
            format!("{}, as the trailer says", ends.version),
        ));
    }
    if header.page_size.get() as usize != PAGE_SIZE {
        return Err(Defect::value(
            "page size",
            header.page_size.get(),
            format!("{PAGE_SIZE}"),
        ));
    }
    let only_here = header.optional_features.get() & !ends.optional_features
        | header.required_features.get() & !ends.required_features;
    if only_here != 0 {
        return Err(Defect::value(
            "features of the header",
            only_here,
            "features that the trailer names too",
        ));
    }
    if header.snapshot_id != ends.id.0 {
        return Err(Defect::Text {
            field: "snapshot id of the header",
            detail: format!(
                "{}, but the trailer says {}",
                SnapshotId(header.snapshot_id),
                ends.id
            )
            .into(),
        });
    }
    if header.reserved.iter().any(|&byte| byte != 0) {
        return Err(Defect::Reserved {
            field: "reserved bytes of the header",
        });
    }
    Ok(())
}

fn check_version(file: &dyn Fn() -> String, version: u32) -> Result<(), OpenError> {
    if version == FORMAT_VERSION {
        return Ok(());
    }
    Err(OpenError::UnsupportedVersion {
        file: file(),
        version,
        accepted: FORMAT_VERSION,
    })
}

fn check_features(file: &dyn Fn() -> String, features: u64) -> Result<(), OpenError> {
    let refused = features & !SUPPORTED;
    if refused == 0 {
        return Ok(());
    }
    let names: Vec<String> = (0..u64::BITS)
        .map(|bit| (bit, 1 << bit))
        .filter(|(_, mask)| refused & mask != 0)
        .map(
            |(bit, mask)| match required::NAMES.iter().find(|(known, _)| *known == mask) {
                Some((_, name)) => (*name).to_owned(),
                None => format!("bit {bit}"),
            },
        )
        .collect();
    Err(OpenError::UnsupportedFeature {
        file: file(),
        names: names.join(", "),
    })
}

/// Checks a trailer. Version, checksum and magic are at the same place in every version, so a
/// flipped bit is reported as damage and only an intact trailer can name a version.
fn check_trailer(
    file: &dyn Fn() -> String,
    bytes: &[u8],
    file_bytes: u64,
) -> Result<Ends, OpenError> {
    let at = file_bytes - TRAILER_BYTES as u64;
    let damaged = |defect| damaged(file, Part::Trailer, at, defect);
    let trailer = RawTrailer::ref_from_bytes(bytes).map_err(|_| OpenError::Incomplete {
        file: file(),
        file_bytes,
    })?;
    let computed = crc32fast::hash(&bytes[..std::mem::offset_of!(RawTrailer, crc)]);
    if computed != trailer.crc.get() {
        return Err(damaged(Defect::Checksum {
            stored: trailer.crc.get(),
            computed,
        }));
    }
    check_version(file, trailer.version.get())?;
    check_features(file, trailer.required_features.get())?;
    if trailer.file_bytes.get() != file_bytes {
        return Err(damaged(Defect::value(
            "length of the file as recorded",
            trailer.file_bytes.get(),
            format!("{file_bytes}, its length"),
        )));
    }
    let used = trailer.section_count.get() as usize;
    if used > MAX_SECTIONS {
        return Err(damaged(Defect::TooLarge {
            field: "number of sections",
            value: used as u64,
            limit: MAX_SECTIONS as u64,
        }));
    }
    let (entries, unused) = trailer.sections.split_at(used);
    let strong_hashes = trailer.optional_features.get() & optional::STRONG_HASHES != 0;
    if !strong_hashes && trailer.strong_root != [0; 32] {
        return Err(damaged(Defect::Reserved {
            field: "root of the strong hashes, which the file does not have,",
        }));
    }
    if trailer.reserved.iter().any(|&byte| byte != 0)
        || zerocopy::IntoBytes::as_bytes(unused)
            .iter()
            .any(|&byte| byte != 0)
    {
        return Err(damaged(Defect::Reserved {
            field: "reserved bytes of the trailer",
        }));
    }
    let body = Body {
        from: HEADER_BYTES as u64,
        to: at,
    };
    let entries_at = at + std::mem::offset_of!(RawTrailer, sections) as u64;
    let layered = trailer.required_features.get() & required::ANCESTORS != 0;
    let directory = Directory::check(entries, entries_at, body, layered).map_err(|flaw| {
        OpenError::Damaged {
            file: file(),
            part: Part::Trailer,
            offset: flaw.at,
            defect: flaw.defect,
        }
    })?;
    Ok(Ends {
        id: SnapshotId(trailer.snapshot_id),
        version: trailer.version.get(),
        required_features: trailer.required_features.get(),
        optional_features: trailer.optional_features.get(),
        file_bytes,
        body,
        summary: Summary::from(&trailer.summary),
        directory,
        trailer_hash: blake3::hash(bytes).into(),
    })
}
