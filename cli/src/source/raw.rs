//! A raw memory file: byte n of the file is byte n of the memory.

use anyhow::{Result, bail};
use indicatif::BinaryBytes;

use super::extents::Extents;
use super::file::SourceFile;
use super::{PAGE, Region, Remark, Samples, Sampling, Sink, Source};
use crate::args::Holes;
use crate::names;
use crate::signals::Cancel;

/// Advice on how to turn a diff into memory.
pub(crate) const MERGE_A_DIFF: &str = "merge it into its base first (Firecracker: snapshot-editor \
     edit-memory rebase --memory-path BASE --diff-path DIFF)";

/// A file or block device without structure.
#[derive(Debug)]
pub(crate) struct Raw {
    file: SourceFile,
    extents: Extents,
    hole_bytes: u64,
    /// Meaning of holes, if the user stated it.
    holes: Option<Holes>,
    /// Remark if the file changed while it was read.
    changed: Option<Remark>,
    cancel: Cancel,
}

impl Raw {
    /// Opens a file as memory. `is_known` tells that the file looks like another kind, so that an
    /// error does not suggest padding it.
    pub(crate) fn open(
        file: SourceFile,
        is_known: bool,
        holes: Option<Holes>,
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
        let extents = file.extents()?;
        Ok(Self {
            hole_bytes: extents.hole_bytes(),
            extents,
            file,
            holes,
            changed: None,
            cancel: cancel.clone(),
        })
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

    fn sample(&mut self, wanted: &Sampling) -> Result<Samples> {
        self.file.sample(&self.extents, wanted)
    }

    fn feed(&mut self, sink: &mut dyn Sink) -> Result<()> {
        sink.region(&region())?;
        self.file
            .feed(&self.extents, 0..self.file.len(), sink, &self.cancel)?;
        self.changed = self.file.check_unchanged()?;
        Ok(())
    }

    fn remarks(&self) -> Vec<Remark> {
        let read = format!("{} read as zeros from holes", BinaryBytes(self.hole_bytes));
        let holes = (self.hole_bytes > 0).then(|| Remark {
            key: "source.hole_bytes",
            value: self.hole_bytes.to_string(),
            text: match self.holes {
                Some(Holes::Zero) => format!("{read}, as --holes zero says"),
                None => format!(
                    "{read}; if the file is a diff, in which a hole means \"unchanged\", {MERGE_A_DIFF}"
                ),
            },
            warning: false,
        });
        holes.into_iter().chain(self.changed.clone()).collect()
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
        Raw::open(file, false, None, &Cancel::never())
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
