//! Restoring a file, of which nothing may hang or bring wrong bytes.
//!
//! A file that opens is restored if it has at most [`MAX_PAGES`] pages; a few hundred bytes can
//! promise terabytes.

use std::io::Write as _;
use std::sync::Arc;

use snaprestore_engine::Prefetch;
use snaprestore_engine::restore::{FailurePolicy, ReadAtError, Restore, Restored, StartError};
use snaprestore_fixtures::images::SplitMix;
use snapshot_format::layout::PAGE_SIZE;
use snapshot_format::{Region, Snapshot, Top};

use crate::{Eager, Found, only_damage};

/// Pages of a snapshot that is restored: 32 MiB.
const MAX_PAGES: u64 = 8192;
/// Regions of such a snapshot.
const MAX_REGIONS: usize = 16;
/// Step between touched pages in blocks whose pages are all alike: one page in this many.
const STEP: usize = 61;

/// Restores a snapshot, and compares every touched page with the naive reader's result. All choices
/// follow from `bytes`, the input.
pub fn restore_and_compare(snapshot: Snapshot, bytes: &[u8]) {
    let snapshot = Arc::new(snapshot);
    let regions = snapshot.regions().to_vec();
    if snapshot.page_slots() > MAX_PAGES || regions.len() > MAX_REGIONS {
        return;
    }
    // The choices follow from the content, so that an input does the same each time.
    let mut rng = SplitMix(bytes.iter().fold(bytes.len() as u64, |sum, byte| {
        sum.wrapping_mul(0x100_0000_01b3) ^ u64::from(*byte)
    }));
    let prefetch = match rng.next() % 4 {
        0 => Prefetch::All,
        1 => Prefetch::WorkingSet,
        _ => Prefetch::Off,
    };
    let everything = prefetch == Prefetch::All;
    let started = Restore::new(Arc::clone(&snapshot))
        .fault_threads(1 + usize::from(rng.next().is_multiple_of(2)))
        .prefetch(prefetch)
        .prefetch_threads(1)
        .leave_zero_runs(!rng.next().is_multiple_of(4))
        .on_failure(FailurePolicy::Poison)
        .start();
    let restored = match started {
        Ok(restored) => restored,
        Err(StartError::Snapshot(error)) => return only_damage(&error),
        Err(error @ (StartError::Userfaultfd(_) | StartError::NoPoison)) => skipped(&error),
        Err(error) => panic!("{error}"),
    };
    let mut touches = touches(&snapshot, &regions);
    // Shuffled, because any order must work.
    for last in (1..touches.len()).rev() {
        let other = usize::try_from(rng.next() % (last as u64 + 1)).unwrap_or(0);
        touches.swap(last, other);
    }
    let mut eager = Eager::new(&snapshot);
    for (region, page) in touches {
        compare(&restored, &mut eager, region, &regions[region], page);
    }
    if everything {
        restored.wait_complete();
    }
}

/// Returns region and page number of each touch: every page of blocks with an index, and some of
/// the others.
fn touches(snapshot: &Snapshot, regions: &[Region]) -> Vec<(usize, u64)> {
    let mut touches = Vec::new();
    for (index, region) in regions.iter().enumerate() {
        let mut page = region.first_page;
        let end = region.page_numbers().end;
        while page < end {
            let block_end = (page + 512).min(end);
            let step = match snapshot.top(page / 512) {
                Top::Block => 1,
                Top::Fill(_) | Top::Unavailable => STEP,
            };
            touches.extend((page..block_end).step_by(step).map(|page| (index, page)));
            page = block_end;
        }
    }
    touches
}

fn compare(restored: &Restored, eager: &mut Eager<'_>, index: usize, region: &Region, page: u64) {
    let mut memory = [0x5a; PAGE_SIZE];
    let offset = (page - region.first_page) * PAGE_SIZE as u64;
    let right = eager.page(page);
    match restored.read_at(index, offset, &mut memory) {
        Ok(()) => assert!(
            right.is(&memory),
            "page {page} was restored wrong, where the file has {}",
            match right {
                Found::Fill(word) => format!("a fill of {word:#x}"),
                Found::Bytes(_) | Found::Torn(_) => "other bytes".to_owned(),
                Found::Nothing | Found::Unused => "nothing".to_owned(),
            }
        ),
        Err(ReadAtError::Unreadable { .. }) => {
            assert!(
                matches!(right, Found::Nothing | Found::Torn(_)),
                "page {page} is good and was not restored"
            );
        }
        Err(error) => panic!("{error}"),
    }
}

/// Exits without the fuzzer taking this for a crash.
fn skipped(reason: &StartError) -> ! {
    let _ = writeln!(std::io::stdout(), "SKIPPED fuzz restore: {reason}");
    // SAFETY: `_exit` ends the process without running anything of it; nothing is left that could
    // be unsound.
    unsafe { libc::_exit(0) }
}
