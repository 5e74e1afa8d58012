//! Tables of blobs: dictionaries, working sets, attachments.

use std::collections::HashSet;

use super::{Names, Section, is_file_name};
use crate::error::{Defect, Flaw};
use crate::index::{Body, records};
use crate::layout::{self, MAX_DICTIONARY_BYTES, MAX_SECTION_BYTES, RawBlobEntry, SectionKind};

/// One blob of a table section, checked against the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) crc: u32,
    pub(crate) tag: u32,
    pub(crate) name: String,
}

/// Checks a table of blobs. Dictionaries have a number and no name, all others a name and no
/// number; neither appears twice.
pub(crate) fn blobs(
    bytes: &[u8],
    section: &Section,
    kind: SectionKind,
    body: Body,
) -> Result<Vec<Blob>, Flaw> {
    let split = usize::try_from(section.count).unwrap_or(usize::MAX) * size_of::<RawBlobEntry>();
    let (entries, area) = bytes.split_at(split.min(bytes.len()));
    let mut names = Names { area, used: 0 };
    let mut seen = HashSet::new();
    let mut blobs = Vec::new();
    for (number, raw) in records::<RawBlobEntry>(entries).iter().enumerate() {
        let at = section.offset + (number * size_of::<RawBlobEntry>()) as u64;
        let blob =
            check_blob(raw, kind, body, &mut names).map_err(|defect| Flaw::new(at, defect))?;
        if !seen.insert((blob.tag, blob.name.clone())) {
            let defect = Defect::Text {
                field: "name or number of a blob",
                detail: "appears twice".into(),
            };
            return Err(Flaw::new(at, defect));
        }
        blobs.push(blob);
    }
    names
        .end()
        .and_then(|()| check_together(&blobs, kind))
        .map_err(|defect| Flaw::new(section.offset, defect))?;
    Ok(blobs)
}

/// Checks that the blobs of one section do not overlap, and that all working sets together are
/// bounded. Without either check a small file could demand any amount of reading and memory.
fn check_together(blobs: &[Blob], kind: SectionKind) -> Result<(), Defect> {
    let mut by_offset: Vec<&Blob> = blobs.iter().filter(|blob| blob.len > 0).collect();
    by_offset.sort_by_key(|blob| blob.offset);
    for pair in by_offset.windows(2) {
        // Both lie within the file, so the sum doesn't overflow.
        if pair[0].offset + pair[0].len > pair[1].offset {
            return Err(Defect::Overlap {
                first: format!("the blob at byte {}", pair[0].offset),
                second: format!("the blob at byte {}", pair[1].offset),
            });
        }
    }
    // They don't overlap and lie within the file, so this sum doesn't overflow either.
    let total: u64 = blobs.iter().map(|blob| blob.len).sum();
    if kind == SectionKind::WorkingSets && total > MAX_SECTION_BYTES {
        return Err(Defect::TooLarge {
            field: "length of all working sets",
            value: total,
            limit: MAX_SECTION_BYTES,
        });
    }
    Ok(())
}

fn check_blob(
    raw: &RawBlobEntry,
    kind: SectionKind,
    body: Body,
    names: &mut Names<'_>,
) -> Result<Blob, Defect> {
    let (offset, len, tag) = (raw.offset.get(), raw.len.get(), raw.tag.get());
    body.check("blob", offset, len)?;
    let name = names.next(
        "name of a blob",
        raw.name_offset.get().into(),
        raw.name_len.get(),
    )?;
    if kind == SectionKind::Dictionaries {
        if tag == 0 || tag > u32::from(u16::MAX) {
            return Err(Defect::value("number of a dictionary", tag, "1 to 65535"));
        }
        if len == 0 || len > MAX_DICTIONARY_BYTES as u64 {
            return Err(Defect::TooLarge {
                field: "length of a dictionary",
                value: len,
                limit: MAX_DICTIONARY_BYTES as u64,
            });
        }
    } else {
        if tag != 0 {
            return Err(Defect::Reserved {
                field: "number of a named blob",
            });
        }
        if !is_file_name(name) {
            return Err(Defect::Text {
                field: "name of a blob",
                detail: "empty, . or .., or has a /".into(),
            });
        }
    }
    if kind == SectionKind::WorkingSets {
        let record = size_of::<layout::RawWorkingSetRun>() as u64;
        if !len.is_multiple_of(record) || len > MAX_SECTION_BYTES {
            return Err(Defect::value(
                "length of a working set",
                len,
                format!("a multiple of {record}, at most {MAX_SECTION_BYTES}"),
            ));
        }
    }
    Ok(Blob {
        offset,
        len,
        crc: raw.crc.get(),
        tag,
        name: name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_working_sets_together_are_bounded() {
        let blob = |number: u64| Blob {
            offset: 4096 + number * MAX_SECTION_BYTES,
            len: MAX_SECTION_BYTES - number,
            crc: 0,
            tag: 0,
            name: format!("set {number}"),
        };
        let blobs = [blob(0), blob(1)];
        assert_eq!(
            check_together(&blobs[..1], SectionKind::WorkingSets),
            Ok(())
        );
        assert_eq!(check_together(&blobs, SectionKind::Attachments), Ok(()));
        assert_eq!(
            check_together(&blobs, SectionKind::WorkingSets),
            Err(Defect::TooLarge {
                field: "length of all working sets",
                value: 2 * MAX_SECTION_BYTES - 1,
                limit: MAX_SECTION_BYTES,
            })
        );
    }
}
