//! Memory and snapshots of it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, OnceLock};

use snaprestore_fixtures::guest;
use snaprestore_fixtures::images::Mix;
use snapshot_format::{
    Dictionary, FrameRef, MemoryStore, Page, Reason, RegionSpec, Snapshot, Writer, WriterOptions,
};

/// Offset in a guest of 1 GiB at which its programs have filled memory. The next constant is the
/// number of bytes taken from there.
const FROM: u64 = 512 << 20;
const BYTES: usize = 64 << 20;

/// Returns 64 MiB of memory.
pub(crate) fn memory() -> &'static [u8] {
    static MEMORY: OnceLock<Vec<u8>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let real = guest::memory().ok().and_then(|image| {
            let mut bytes = vec![0; BYTES];
            let file = File::open(image.raw).ok()?;
            file.read_exact_at(&mut bytes, FROM).ok()?;
            Some(bytes)
        });
        real.unwrap_or_else(|| Mix::new((BYTES / 4096) as u64, 1).bytes())
    })
}

/// Returns a snapshot of `bytes`, in memory.
pub(crate) fn snapshot(bytes: &[u8], frame_pages: usize, dictionary: Dictionary) -> Arc<Snapshot> {
    Arc::new(
        Snapshot::open(Arc::new(MemoryStore::new(written(
            bytes,
            frame_pages,
            dictionary,
        ))))
        .expect("cannot open the snapshot"),
    )
}

/// Returns the bytes of such a snapshot.
pub(crate) fn written(bytes: &[u8], frame_pages: usize, dictionary: Dictionary) -> Vec<u8> {
    let options = WriterOptions {
        frame_pages,
        dictionary,
        ..WriterOptions::default()
    };
    let mut writer = Writer::new(Vec::new(), options).expect("a writer");
    writer
        .begin_region(&RegionSpec::default())
        .expect("a region");
    writer.write_pages(bytes).expect("pages");
    writer.finish().expect("the end").0
}

/// Returns every frame once, with one of its pages.
pub(crate) fn frames(snapshot: &Snapshot) -> Vec<(FrameRef, u64)> {
    let mut frames: Vec<(FrameRef, u64)> = (0..snapshot.page_slots())
        .filter_map(|page| match snapshot.look_up(page, Reason::Verify) {
            Ok(Page::Stored { frame, .. }) => Some((frame, page)),
            _ => None,
        })
        .collect();
    frames.sort_by_key(|(frame, page)| (frame.offset(), *page));
    frames.dedup_by_key(|(frame, _)| frame.offset());
    frames
}

/// Returns incompressible bytes.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = vec![0; len];
    for word in bytes.as_chunks_mut::<8>().0 {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        *word = (state ^ (state >> 29)).to_le_bytes();
    }
    bytes
}
