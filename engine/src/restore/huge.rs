//! Huge pages for memory that is complete.
//!
//! `MADV_COLLAPSE` makes a huge page of whatever lies in its 2 MiB: where a page is missing it
//! allocates zeros. So it is asked for only where all 512 pages were installed by the session and
//! are there: not where the owner has discarded one (a balloon wants that memory back), nor where a
//! zero run was left to the kernel, nor where all is zeros that are mapped but take no memory. A
//! single zero page among others does get memory of its own, as it would by the first write to it.
//!
//! `MADV_HUGEPAGE` is not given at all. It allocates nothing by itself, but it has khugepaged do so
//! later: by default that fills up to 511 missing pages of 512; and it has a touch of a hole
//! allocate 2 MiB. Given to some ranges only it would split the mapping at each of them. Kernels
//! without `MADV_COLLAPSE`, before 6.1, keep small pages.
//!
//! What the owner discards between completion and the advice is not known: those pages may be given
//! memory again.

use std::ops::Range;

use snapshot_format::Top;
use snapshot_format::layout::PAGES_PER_BLOCK_U64;

use crate::session::{Kernel, PAGE, Session, SnapshotImage};
use snaprestore_uffd::memory::{Advice, HUGE_PAGE, advise_at};

/// Makes huge pages where they cost no memory. `left` are runs that were never registered.
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
    // What is left to the kernel is not looked up: its states take no memory.
    left.iter().all(apart)
        && session.state.all_present(pages.clone())
        && blocks.any(|block| session.image.snapshot().top(block) != Top::Fill(0))
}
