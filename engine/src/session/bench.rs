//! Page states for benchmarks. Not part of the interface.

use std::io;
use std::ops::Range;

use super::{Extent, State};

/// The page states of one region.
#[derive(Debug)]
pub struct PageStates(State);

impl PageStates {
    /// Creates the states of `pages` pages, all absent.
    pub fn new(pages: u64) -> io::Result<Self> {
        let extent = Extent {
            address: 1 << 40,
            pages,
            first_page: 0,
            large: false,
        };
        State::new(pages, &[extent], 0).map(|(state, _)| Self(state))
    }

    /// Marks pages as present.
    pub fn mark_present(&self, pages: Range<u64>) {
        self.0.mark_present(pages);
    }

    /// Returns whether a page must be installed.
    pub fn is_absent(&self, page: u64) -> bool {
        self.0.status(page) == crate::session::state::Status::Absent
    }

    /// Returns the first range of pages that must be installed.
    pub fn absent_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        self.0.absent_in(within)
    }

    /// Returns the number of pages that must be installed.
    pub fn recount(&self) -> u64 {
        self.0.recount()
    }
}
