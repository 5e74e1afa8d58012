//! The verifier on the hand-made sample: it reports nothing for a good file, and everything that
//! only the verifier checks.

mod common;

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::Sample;
use snapshot_format::layout::SectionKind;
use snapshot_format::{
    FrameRef, MemoryStore, Page, Reason, RegionSpec, Report, Snapshot, Store, VerifyError,
    VerifyOptions, Writer, WriterOptions, verify,
};

fn report(sample: &Sample) -> Report {
    verify(sample.store(), VerifyOptions::default().threads(2)).expect("cannot verify the snapshot")
}

#[test]
fn good_file_has_no_problems() {
    for inline_regions in [true, false] {
        let sample = Sample::build(inline_regions);
        let report = report(&sample);
        assert_eq!(report.problems, []);
        assert!(report.ok());
        assert_eq!(report.frames_checked, 4);
        assert_eq!(report.pages_checked, 1525);
    }
}

#[test]
fn progress_callback_can_cancel() {
    let mut last = (0, 0);
    let options = VerifyOptions::default().progress(|progress| {
        assert!(progress.pages_done >= last.0);
        last = (progress.pages_done, progress.pages);
        ControlFlow::Continue(())
    });
    verify(Sample::new().store(), options).expect("cannot verify the snapshot");
    assert_eq!(last, (1525, 1525));

    let options = VerifyOptions::default().progress(|_| ControlFlow::Break(()));
    let cancelled = verify(Sample::new().store(), options);
    assert!(matches!(cancelled, Err(VerifyError::Cancelled)));
}

/// A store that fails to read a byte of the sample, as a broken disk does.
struct Failing {
    bytes: Vec<u8>,
    at: u64,
}

impl Store for Failing {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, _reason: Reason) -> io::Result<()> {
        if (offset..offset + buf.len() as u64).contains(&self.at) {
            return Err(io::Error::from_raw_os_error(5));
        }
        let from = usize::try_from(offset).expect("in memory");
        buf.copy_from_slice(&self.bytes[from..from + buf.len()]);
        Ok(())
    }

    fn name(&self) -> String {
        "failing".to_owned()
    }
}

#[test]
fn failing_store_is_not_damage() {
    let sample = Sample::new();
    for (what, at) in [
        ("header", 0),
        ("frame", sample.frames[1].start + 30),
        ("index block", sample.blocks[1].1.start),
        ("dictionary", sample.blobs[0].2.start),
        ("working set", sample.blobs[1].2.start),
        ("attachment", sample.blobs[3].2.start),
        ("properties", sample.section(SectionKind::Properties).start),
        ("digests", sample.section(SectionKind::BlockDigests).start),
        ("fill runs", sample.section(SectionKind::FillRuns).start),
        ("gap", sample.frames[0].end + 10),
    ] {
        let store = Arc::new(Failing {
            bytes: sample.bytes.clone(),
            at: at as u64,
        });
        let result = verify(store, VerifyOptions::default().threads(2));
        assert!(
            matches!(
                result,
                Err(VerifyError::Open(_) | VerifyError::Read(_) | VerifyError::Frame(_))
            ),
            "{what}: {result:?}"
        );
    }
}

#[test]
fn verifying_can_be_cancelled_within_an_attachment() {
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).expect("writer");
    writer
        .attach("long", &mut &vec![7; 10 << 20][..])
        .expect("cannot add the attachment");
    let (bytes, _) = writer.finish().expect("cannot finish the snapshot");
    let mut calls = 0;
    let options = VerifyOptions::default().progress(|_| {
        calls += 1;
        ControlFlow::Continue(())
    });
    let report =
        verify(Arc::new(MemoryStore::new(bytes)), options).expect("cannot verify the snapshot");
    assert!(report.ok());
    assert!(calls > 100, "{calls} calls for 160 pieces of 64 KiB");
}

/// A store that counts the reads of one offset.
struct Counting {
    inner: MemoryStore,
    at: u64,
    reads: AtomicU64,
}

impl Store for Counting {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, reason: Reason) -> io::Result<()> {
        if offset == self.at {
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
        self.inner.read_exact_at(buf, offset, reason)
    }

    fn name(&self) -> String {
        "counting".to_owned()
    }
}

/// Regression: a frame that pages all over the snapshot share was decoded once for every 2 GiB of
/// them.
#[test]
fn shared_frame_is_decoded_at_most_twice() {
    let mut writer = Writer::new(Vec::new(), WriterOptions::default()).expect("writer");
    writer
        .begin_region(&RegionSpec::default())
        .expect("cannot begin a region");
    let windows = 8;
    for _ in 0..windows {
        writer.write_pages(&common::pattern(1)).expect("a page");
        writer.write_fill((2 << 30) / 4096 - 1, 0).expect("a fill");
    }
    let (mut bytes, written) = writer.finish().expect("cannot finish the snapshot");
    assert_eq!(
        (written.summary.frames, written.summary.stored_pages),
        (1, 1)
    );
    let count = |bytes: &[u8], frame: FrameRef| {
        let store = Arc::new(Counting {
            inner: MemoryStore::new(bytes.to_vec()),
            at: frame.offset(),
            reads: AtomicU64::new(0),
        });
        let report =
            verify(store.clone(), VerifyOptions::default()).expect("cannot verify the snapshot");
        assert_eq!(report.frames_checked, 1);
        (report, store.reads.load(Ordering::Relaxed))
    };
    let snapshot = Snapshot::open(Arc::new(MemoryStore::new(bytes.clone())))
        .expect("cannot open the snapshot");
    let Page::Stored { frame, .. } = snapshot
        .look_up(0, Reason::Verify)
        .expect("cannot look up the page")
    else {
        panic!("page 0 is stored");
    };
    let (report, reads) = count(&bytes, frame);
    assert!(report.ok(), "{:?}", report.problems);
    assert_eq!(report.pages_checked, windows * (2 << 30) / 4096);
    assert_eq!(reads, 2);

    // A bad frame is checked once and is one problem.
    let at = usize::try_from(frame.offset()).expect("in memory");
    bytes[at + 40] ^= 1;
    let (report, reads) = count(&bytes, frame);
    assert_eq!(
        (report.problems.len(), report.more_problems, reads),
        (1, 0, 1)
    );
}
