//! Huge pages for complete memory.
//!
//! `MADV_COLLAPSE` makes a huge page of whatever lies in its 2 MiB, and allocates zeros for missing
//! pages. Therefore it is used only where the session installed all 512 pages and all are present:
//! not where the owner has discarded one (a balloon wants that memory back), not where a zero run
//! was left to the kernel, and not where all pages are mapped zeros that take no memory. A single
//! zero page among others does get memory of its own, as it would by the first write to it.
//!
//! `MADV_HUGEPAGE` is not used at all. By itself it allocates nothing, but it permits khugepaged to
//! do so later: by default that fills up to 511 missing pages of 512. It also makes a touch of a
//! hole allocate 2 MiB. Applied to some ranges only, it would split the mapping at each of them.
//! Kernels before 6.1, without `MADV_COLLAPSE`, keep small pages.
//!
//! Discards by the owner between completion and the advice are not seen: those pages may be
//! allocated again.

use std::ops::Range;

use snapshot_format::Top;
use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use crate::session::{Kernel, PAGE, Session, SnapshotImage};
use snaprestore_uffd::memory::{Advice, HUGE_PAGE, advise_at};

/// Forms huge pages where they cost no additional memory. `left` are the runs that were never
/// registered.
pub(super) fn collapse(session: &Session<Kernel, SnapshotImage>, left: &[Range<u64>]) {
    for extent in session.state.map().extents() {
        let end = extent.address + extent.pages * PAGE;
        let mut address = extent.address.next_multiple_of(HUGE_PAGE);
        while address + HUGE_PAGE <= end {
            let first = extent.first_page + (address - extent.address) / PAGE;
            if is_there(session, left, first..first + HUGE_PAGE / PAGE)
                && let Err(error) = advise_at(Advice::Collapse, address, HUGE_PAGE)
            {
                tracing::debug!(%error, "making a huge page");
            }
            address += HUGE_PAGE;
        }
    }
}

fn is_there(
    session: &Session<Kernel, SnapshotImage>,
    left: &[Range<u64>],
    pages: Range<u64>,
) -> bool {
    let apart = |run: &Range<u64>| run.end <= pages.start || pages.end <= run.start;
    let mut blocks = pages.start / PAGES_PER_BLOCK_U64..pages.end.div_ceil(PAGES_PER_BLOCK_U64);
    // Runs left to the kernel are not looked up, because reading their states would allocate
    // memory.
    left.iter().all(apart)
        && session.state.all_present(pages.clone())
        && blocks.any(|block| session.image.snapshot().top(block) != Top::Fill(0))
}
