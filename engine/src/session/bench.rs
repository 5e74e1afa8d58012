//! The page states for whoever measures them. No part of the interface.

use std::io;
use std::ops::Range;

use super::{Extent, State};

/// The states of the pages of one region.
#[derive(Debug)]
pub struct PageStates(State);

impl PageStates {
    /// All absent.
    pub fn new(pages: u64) -> io::Result<Self> {
        let extent = Extent {
            address: 1 << 40,
            pages,
            first_page: 0,
            large: false,
        };
        State::new(pages, &[extent], 0).map(|(state, _)| Self(state))
    }

    /// Records pages that are there.
    pub fn mark_present(&self, pages: Range<u64>) {
        self.0.mark_present(pages);
    }

    /// Whether a page has to be installed.
    pub fn is_absent(&self, page: u64) -> bool {
        self.0.status(page) == crate::session::state::Status::Absent
    }

    /// The first range of pages that have to be installed.
    pub fn absent_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        self.0.absent_in(within)
    }

    /// How many pages have to be installed.
    pub fn recount(&self) -> u64 {
        self.0.recount()
    }
}
