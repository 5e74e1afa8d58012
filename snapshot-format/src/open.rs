//! From a store to checked ends: header, trailer and directory.
//!
//! The order of the checks decides what a broken file is called, so it is part of the format: see
//! "Opening" in `FORMAT.md`.

use zerocopy::FromBytes;

use crate::error::{Defect, OpenError, Part};
use crate::index::Body;
use crate::layout::{
    FORMAT_VERSION, HEADER_BYTES, HEADER_MAGIC, Header, MAX_SECTIONS, PAGE_SIZE, TRAILER_BYTES,
    TRAILER_MAGIC, Trailer, optional, required,
};
use crate::sections::Directory;
use crate::store::{Reason, Store};
use crate::types::{SnapshotId, Summary};

/// Features that this reader can do without harm. It knows what `ancestors` means and says so by
/// name, but can't yet read them.
const SUPPORTED: u64 = required::KNOWN & !required::ANCESTORS;

/// What the two ends of the file say, checked.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) id: SnapshotId,
    pub(crate) version: u32,
    pub(crate) optional_features: u64,
    pub(crate) file_bytes: u64,
    pub(crate) body: Body,
    pub(crate) summary: Summary,
    pub(crate) directory: Directory,
}

/// Reads and checks the ends of the file, with one read each.
pub(crate) fn ends(store: &dyn Store) -> Result<Ends, OpenError> {
    let file = || store.name();
    let file_bytes = store.len().map_err(|source| OpenError::NoStore {
        file: file(),
        source,
    })?;
    let mut buffer = [0; HEADER_BYTES];
    let there = usize::try_from(file_bytes).map_or(HEADER_BYTES, |len| len.min(HEADER_BYTES));
    let head = &mut buffer[..there];
    read(store, Part::Header, head, 0)?;
    let magic = &head[..there.min(HEADER_MAGIC.len())];
    if magic.is_empty() || !HEADER_MAGIC.starts_with(magic) {
        return Err(OpenError::NotASnapshot { file: file() });
    }
    if file_bytes < (HEADER_BYTES + TRAILER_BYTES) as u64 {
        return Err(OpenError::Incomplete {
            file: file(),
            file_bytes,
        });
    }
    let header = check_header(&file, head)?;

    let mut tail = [0; TRAILER_BYTES];
    let trailer_at = file_bytes - TRAILER_BYTES as u64;
    read(store, Part::Trailer, &mut tail, trailer_at)?;
    if !tail.ends_with(&TRAILER_MAGIC) {
        return Err(OpenError::Incomplete {
            file: file(),
            file_bytes,
        });
    }
    check_trailer(&file, &header, &tail, file_bytes)
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

/// Magic and checksum stand at the same place in every version, so that a flipped bit is damage
/// and only a whole header can name a version.
fn check_header(file: &dyn Fn() -> String, bytes: &[u8]) -> Result<Header, OpenError> {
    let damaged = |defect| damaged(file, Part::Header, 0, defect);
    let header = Header::read_from_bytes(bytes).map_err(|_| OpenError::Incomplete {
        file: file(),
        file_bytes: bytes.len() as u64,
    })?;
    let computed = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
    if computed != header.crc.get() {
        return Err(damaged(Defect::Checksum {
            stored: header.crc.get(),
            computed,
        }));
    }
    if header.version.get() != FORMAT_VERSION {
        return Err(OpenError::UnsupportedVersion {
            file: file(),
            version: header.version.get(),
            accepted: FORMAT_VERSION,
        });
    }
    check_features(file, header.required_features.get())?;
    if header.page_size.get() as usize != PAGE_SIZE {
        return Err(damaged(Defect::value(
            "page size",
            header.page_size.get(),
            format!("{PAGE_SIZE}"),
        )));
    }
    if header.reserved.iter().any(|&byte| byte != 0) {
        return Err(damaged(Defect::Reserved {
            field: "reserved bytes of the header",
        }));
    }
    Ok(header)
}

fn check_features(file: &dyn Fn() -> String, features: u64) -> Result<(), OpenError> {
    let refused = features & !SUPPORTED;
    if refused == 0 {
        return Ok(());
    }
    let names: Vec<String> = (0..u64::BITS)
        .map(|bit| (bit, 1 << bit))
        .filter(|(_, mask)| refused & mask != 0)
        .map(|(bit, mask)| {
            match required::NAMES.iter().find(|(known, _)| *known == mask) {
                // The one feature that is known and refused: say what the file lacks.
                Some((_, name)) => format!("{name} (the file needs its ancestors)"),
                None => format!("bit {bit}"),
            }
        })
        .collect();
    Err(OpenError::UnsupportedFeature {
        file: file(),
        names: names.join(", "),
    })
}

fn check_trailer(
    file: &dyn Fn() -> String,
    header: &Header,
    bytes: &[u8],
    file_bytes: u64,
) -> Result<Ends, OpenError> {
    let at = file_bytes - TRAILER_BYTES as u64;
    let damaged = |defect| damaged(file, Part::Trailer, at, defect);
    let trailer = Trailer::ref_from_bytes(bytes).map_err(|_| OpenError::Incomplete {
        file: file(),
        file_bytes,
    })?;
    let computed = crc32fast::hash(&bytes[..std::mem::offset_of!(Trailer, crc)]);
    if computed != trailer.crc.get() {
        return Err(damaged(Defect::Checksum {
            stored: trailer.crc.get(),
            computed,
        }));
    }
    if trailer.version.get() != header.version.get() {
        return Err(damaged(Defect::value(
            "version of the trailer",
            trailer.version.get(),
            format!("{}, as the header says", header.version),
        )));
    }
    if trailer.snapshot_id != header.snapshot_id {
        return Err(damaged(Defect::Text {
            field: "snapshot id of the trailer",
            detail: format!(
                "{}, but the header says {}",
                SnapshotId(trailer.snapshot_id),
                SnapshotId(header.snapshot_id)
            )
            .into(),
        }));
    }
    check_features(file, trailer.required_features.get())?;
    // Every feature that passed is supported, so there is none that only the header could name.
    let only_in_header = header.optional_features.get() & !trailer.optional_features.get()
        | header.required_features.get() & !trailer.required_features.get();
    if only_in_header != 0 {
        return Err(damaged(Defect::value(
            "features of the header",
            only_in_header,
            "features that the trailer names too",
        )));
    }
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
    let entries_at = at + std::mem::offset_of!(Trailer, sections) as u64;
    let directory =
        Directory::check(entries, entries_at, body).map_err(|flaw| OpenError::Damaged {
            file: file(),
            part: Part::Trailer,
            offset: flaw.at,
            defect: flaw.defect,
        })?;
    Ok(Ends {
        id: SnapshotId(header.snapshot_id),
        version: header.version.get(),
        optional_features: trailer.optional_features.get(),
        file_bytes,
        body,
        summary: Summary::from(&trailer.summary),
        directory,
    })
}
