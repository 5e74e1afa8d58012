//! A raw memory file: byte n of the file is byte n of the memory.

use anyhow::{Result, bail};
use indicatif::BinaryBytes;

use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use super::extents::Extents;
use super::file::SourceFile;
use super::{PAGE, Region, Remark, Samples, Sampling, Sink, Source};
use crate::args::Holes;
use crate::names;
use crate::signals::Cancel;

/// Advice on how to turn a diff into memory.
pub(crate) const MERGE_A_DIFF: &str = "pack it with --base, or merge it into its base first \
     (Firecracker: snapshot-editor edit-memory rebase --memory-path BASE --diff-path DIFF)";

/// Meaning of the holes of a raw file.
#[derive(Clone, Copy, Debug)]
pub(super) struct HolesOf {
    pub(super) meaning: Holes,
    /// Whether the user stated it.
    pub(super) is_stated: bool,
}

/// A file or block device without structure.
#[derive(Debug)]
pub(crate) struct Raw {
    file: SourceFile,
    extents: Extents,
    hole_bytes: u64,
    holes: HolesOf,
    /// Size of the pieces in which the file system stores the file.
    piece_bytes: u64,
    /// Remark if the file changed while it was read.
    changed: Option<Remark>,
    cancel: Cancel,
}

impl Raw {
    /// Opens a file as memory. `is_known` tells that the file looks like another kind, so that an
    /// error does not suggest padding it.
    pub(super) fn open(
        file: SourceFile,
        is_known: bool,
        holes: HolesOf,
        cancel: &Cancel,
    ) -> Result<Self> {
        let name = names::path(file.path());
        if file.len() == 0 {
            bail!("{name}: is empty; there is no memory to pack");
        }
        if !file.len().is_multiple_of(PAGE) {
            let padding = if is_known {
                String::new()
            } else {
                format!("; if it should end in zeros: truncate --size=%{PAGE} on a copy")
            };
            bail!(
                "{name}: has {} bytes, which is no multiple of {PAGE}, so it is not all of a \
                 memory{padding}",
                file.len()
            );
        }
        let extents = match holes.meaning {
            Holes::Zero => file.extents()?,
            Holes::Base => file.exact_extents()?,
        };
        Ok(Self {
            hole_bytes: extents.hole_bytes(),
            extents,
            piece_bytes: file.piece_bytes()?,
            file,
            holes,
            changed: None,
            cancel: cancel.clone(),
        })
    }

    fn hole_remarks(&self) -> Vec<Remark> {
        if self.hole_bytes == 0 {
            return Vec::new();
        }
        let bytes = BinaryBytes(self.hole_bytes);
        let note = |key, value: u64, text| Remark {
            key,
            value: value.to_string(),
            text,
            warning: false,
        };
        if self.holes.meaning == Holes::Base {
            let advice = if self.holes.is_stated {
                ", as --holes base says"
            } else {
                "; if the file is all of the memory, holes are zeros: --holes zero"
            };
            let text = format!("{bytes} taken from the base for holes{advice}");
            let taken = note("source.base_hole_bytes", self.hole_bytes, text);
            let coarse = (self.piece_bytes > PAGE).then(|| Remark {
                warning: true,
                ..note(
                    "source.hole_granularity",
                    self.piece_bytes,
                    format!(
                        "{}: its file system may store it in pieces of {}; where the diff leaves \
                         out less, zeros take the place of the base's pages",
                        names::path(self.file.path()),
                        BinaryBytes(self.piece_bytes)
                    ),
                )
            });
            return [Some(taken), coarse].into_iter().flatten().collect();
        }
        let read = format!("{bytes} read as zeros from holes");
        let text = if self.holes.is_stated {
            format!("{read}, as --holes zero says")
        } else {
            format!(
                "{read}; if the file is a diff, in which a hole means \"unchanged\", {MERGE_A_DIFF}"
            )
        };
        vec![note("source.hole_bytes", self.hole_bytes, text)]
    }
}

/// Returns the single region of memory that has no addresses of its own.
pub(super) fn region() -> Region {
    Region {
        page_shift: 12,
        name: "memory".into(),
        ..Region::default()
    }
}

impl Source for Raw {
    fn describe(&self) -> Vec<(String, String)> {
        vec![
            ("source".into(), "raw".into()),
            ("source.path".into(), names::path(self.file.path())),
        ]
    }

    fn pages(&self) -> Option<u64> {
        Some(self.file.len() / PAGE)
    }

    fn page_slots(&self) -> Option<u64> {
        let pages = self.file.len() / PAGE;
        Some(pages.next_multiple_of(PAGES_PER_BLOCK_U64))
    }

    fn data_pages(&self) -> Option<u64> {
        Some(self.extents.data_pages())
    }

    fn sample(&mut self, wanted: &Sampling) -> Result<Samples> {
        self.file.sample(&self.extents, wanted)
    }

    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()> {
        sink.region(&region())?;
        self.file.feed(
            &self.extents,
            0..self.file.len(),
            self.holes.meaning,
            sink,
            &self.cancel,
        )?;
        self.changed = self.file.check_unchanged()?;
        Ok(())
    }

    fn remarks(&self) -> Vec<Remark> {
        let mut remarks = self.hole_remarks();
        remarks.extend(self.changed.clone());
        remarks
    }

    fn is_mostly_holes(&self) -> bool {
        self.hole_bytes > self.file.len() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::{Opened, open};
    use super::super::testing::{Piece, Recorder};
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    fn opened(path: &std::path::Path) -> Result<Raw> {
        let Opened::File(file) = open(path)? else {
            panic!("not a file");
        };
        let holes = HolesOf {
            meaning: Holes::Zero,
            is_stated: false,
        };
        Raw::open(file, false, holes, &Cancel::never())
    }

    #[test]
    fn data_and_holes_arrive_in_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        file.as_file().write_all_at(&[7; 4096], 4 << 20).unwrap();
        let mut sink = Recorder::default();
        let mut raw = opened(file.path()).unwrap();
        raw.feed(&mut sink).unwrap();
        assert!(raw.is_mostly_holes());
        assert_eq!(raw.remarks()[0].key, "source.hole_bytes");
        assert_eq!(raw.pages(), Some(2048));
        assert!(
            matches!(raw.data_pages(), Some(1..=1024)),
            "holes have no data"
        );
        assert_eq!(sink.regions.len(), 1);
        let zeros = &sink.regions[0].1;
        assert!(
            matches!(zeros[0], Piece::Zeros(pages) if pages > 900),
            "holes are not read"
        );
        assert_eq!(sink.page(0, 1023), Some(vec![0; 4096]));
        assert_eq!(sink.page(0, 1024), Some(vec![7; 4096]));
        assert_eq!(sink.page(0, 2047), Some(vec![0; 4096]));
    }

    #[test]
    fn half_a_page_is_refused() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 5000]).unwrap();
        let error = opened(file.path()).unwrap_err().to_string();
        assert!(
            error.contains("5000 bytes") && error.contains("truncate"),
            "{error}"
        );
    }

    #[test]
    fn source_that_shrinks_or_grows_is_an_error() {
        for (later, says) in [(4096, "to 4096 bytes"), (3 << 20, "to 3145728 bytes")] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&vec![1; 2 << 20]).unwrap();
            let mut raw = opened(file.path()).unwrap();
            file.as_file().set_len(later).unwrap();
            let error = raw.feed(&mut Recorder::default()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    /// Writes a byte until the file's times have advanced: a kernel's clock may be coarse.
    fn write_later(file: &std::fs::File) {
        let times = |file: &std::fs::File| {
            let metadata = file.metadata().unwrap();
            (metadata.ctime(), metadata.ctime_nsec())
        };
        let before = times(file);
        while times(file) == before {
            file.write_all_at(&[2], 0).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    #[test]
    fn write_while_reading_is_remarked_whatever_time_is_set() {
        for set_back in [false, true] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&[1; 8192]).unwrap();
            let written = file.as_file().metadata().unwrap().modified().unwrap();
            let mut raw = opened(file.path()).unwrap();
            write_later(file.as_file());
            if set_back {
                file.as_file().set_modified(written).unwrap();
            }
            raw.feed(&mut Recorder::default()).unwrap();
            let remarks = raw.remarks();
            assert_eq!(remarks.len(), 1);
            assert_eq!(remarks[0].key, "source.changed");
            assert_eq!(
                remarks[0].value,
                if set_back { "touched" } else { "written" }
            );
            assert!(remarks[0].warning);
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        let mut raw = opened(file.path()).unwrap();
        raw.feed(&mut Recorder::default()).unwrap();
        assert_eq!(raw.remarks(), []);
    }

    #[test]
    fn samples_are_spread_and_omit_zeros() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 30).unwrap();
        for byte in [100_u8, 112] {
            let bytes = vec![byte; 1 << 20];
            file.as_file()
                .write_all_at(&bytes, u64::from(byte) << 23)
                .unwrap();
        }
        let wanted = Sampling {
            bytes: 1 << 20,
            piece: 64 << 10,
        };
        let samples = opened(file.path()).unwrap().sample(&wanted).unwrap();
        // The two extents may be a little longer than what was written.
        assert!((2 << 20..3 << 20).contains(&samples.expected_bytes()));
        let samples = samples.bytes;
        assert!(samples.len() <= 1 << 20 && samples.len().is_multiple_of(4096));
        for byte in [100, 112] {
            assert!(samples.contains(&byte));
        }
        assert!(!samples.contains(&0));
    }
}
