//! The verifier on the hand-made sample: nothing where nothing is wrong, and each thing that only
//! it looks for.

mod common;

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use common::Sample;
use snapshot_format::layout::SectionKind;
use snapshot_format::{
    MemoryStore, Reason, Report, Store, VerifyError, VerifyOptions, Writer, WriterOptions, verify,
};

fn report(sample: &Sample) -> Report {
    verify(sample.store(), VerifyOptions::default().threads(2)).expect("verify")
}

#[test]
fn a_good_file_has_no_problem() {
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
fn progress_is_told_and_can_cancel() {
    let mut last = (0, 0);
    let options = VerifyOptions::default().progress(|progress| {
        assert!(progress.pages_done >= last.0);
        last = (progress.pages_done, progress.pages);
        ControlFlow::Continue(())
    });
    verify(Sample::new().store(), options).expect("verify");
    assert_eq!(last, (1525, 1525));

    let options = VerifyOptions::default().progress(|_| ControlFlow::Break(()));
    let cancelled = verify(Sample::new().store(), options);
    assert!(matches!(cancelled, Err(VerifyError::Cancelled)));
}

/// Fails to read a byte of the sample, as a broken disk does.
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
fn a_store_that_fails_is_no_verdict_on_the_file() {
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
        .expect("attach");
    let (bytes, _) = writer.finish().expect("finish");
    let mut calls = 0;
    let options = VerifyOptions::default().progress(|_| {
        calls += 1;
        ControlFlow::Continue(())
    });
    let report = verify(Arc::new(MemoryStore::new(bytes)), options).expect("verify");
    assert!(report.ok());
    assert!(calls > 100, "{calls} calls for 160 pieces of 64 KiB");
}
