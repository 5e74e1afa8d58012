//! A snapshot of much memory that is quick to make: every page is stored, and the same pages
//! repeat.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use snapshot_format::{Dictionary, RegionSpec, Writer, WriterOptions};

use crate::{BenchError, PAGE};

/// Writes a snapshot of `pages` pages, of which the first `distinct` differ from each other and the
/// others repeat them.
pub fn write(out: &Path, pages: u64, distinct: u64) -> Result<(), BenchError> {
    let failed = || format!("{}: writing", out.display());
    let file = File::create(out).map_err(BenchError::io(failed()))?;
    let options = WriterOptions {
        dictionary: Dictionary::Off,
        expected_pages: Some(pages),
        ..WriterOptions::default()
    };
    let mut writer =
        Writer::new(BufWriter::new(file), options).map_err(BenchError::trial(failed()))?;
    let region = RegionSpec {
        name: "wide".into(),
        ..RegionSpec::default()
    };
    writer
        .begin_region(&region)
        .map_err(BenchError::trial(failed()))?;
    let mut number = 0_u64;
    writer
        .read_pages(pages, |room| {
            for page in room.chunks_exact_mut(usize::try_from(PAGE).unwrap_or(4096)) {
                fill(page, number % distinct);
                number += 1;
            }
            Ok(())
        })
        .map_err(BenchError::trial(failed()))?;
    let (file, _) = writer.finish().map_err(BenchError::trial(failed()))?;
    let file = file
        .into_inner()
        .map_err(|error| BenchError::io(failed())(error.into_error()))?;
    file.sync_all().map_err(BenchError::io(failed()))
}

/// Fills a page so that it is not a fill and equals no other.
fn fill(page: &mut [u8], number: u64) {
    for (place, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = (number << 16 | place as u64 & 0x3f).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot_format::Snapshot;

    #[test]
    fn duplicate_pages_are_stored_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wide.snap");
        write(&path, 4096, 1024).unwrap();
        let snapshot = Snapshot::open_path(&path).unwrap();
        let summary = snapshot.summary();
        assert_eq!((summary.pages, summary.stored_pages), (4096, 1024));
        assert_eq!(
            (
                summary.duplicate_pages,
                summary.zero_pages,
                summary.fill_pages
            ),
            (3072, 0, 0)
        );
    }
}
