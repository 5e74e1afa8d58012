//! The verifier on the hand-made sample: nothing where nothing is wrong, and each thing that only
//! it looks for.

mod common;

use std::ops::ControlFlow;

use common::Sample;
use snapshot_format::{Report, VerifyError, VerifyOptions, verify};

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
