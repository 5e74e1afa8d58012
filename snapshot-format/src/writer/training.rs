//! Training of a dictionary while a stream is being written.
//!
//! ```text
//! frames   0 ........... 64 MiB ............ 128 MiB ............
//!          one in 16 is  | training on the   | the dictionary, if
//!          copied        | side              | it pays
//! ```
//!
//! Nothing is held back: the first frames do without. The frame from which on the dictionary is
//! used is fixed, so that the file doesn't depend on how long the training takes.

use super::frame::Sealed;
use crate::layout::PAGE_SIZE_U64;
use crate::types::Summary;

/// Pages that are copied to train and to judge: 4 MiB.
const SAMPLE_PAGES: usize = 1024;
/// One in this many frames is copied.
const SAMPLE_EVERY: u64 = 16;
/// Pages after which the dictionary is used, as a multiple of those after which it is trained.
const USE_AFTER: u64 = 2;
/// Assumed length of a source of unknown length, as a multiple of the pages so far.
const UNKNOWN_SOURCE_FACTOR: u64 = 8;

pub(super) struct Training {
    pub(super) level: i32,
    expected_pages: Option<u64>,
    samples: Vec<Vec<u8>>,
    /// Frame that starts the training.
    start: u64,
}

/// Action to take at a frame.
pub(super) enum Step {
    Go,
    /// Train on these frames.
    Start(Vec<Vec<u8>>),
    /// Wait for the training, and use its result.
    Decide,
}

impl Training {
    pub(super) fn new(level: i32, frame_pages: usize, expected_pages: Option<u64>) -> Self {
        let frames = SAMPLE_PAGES.div_ceil(frame_pages) as u64;
        Self {
            level,
            expected_pages,
            samples: Vec::new(),
            start: frames * SAMPLE_EVERY,
        }
    }

    /// Processes the next frame, and returns the action to take.
    pub(super) fn step(&mut self, sealed: &Sealed) -> Step {
        let number = sealed.number;
        if number == self.start {
            return Step::Start(std::mem::take(&mut self.samples));
        }
        if number == self.start * USE_AFTER {
            return Step::Decide;
        }
        if number < self.start && number.is_multiple_of(SAMPLE_EVERY) {
            let mut gathered = Vec::new();
            let bytes = sealed.bytes(&mut gathered);
            self.samples.push(bytes.to_vec());
        }
        Step::Go
    }

    /// Returns the expected number of bytes of distinct pages in the whole source, extrapolated
    /// from the pages so far.
    pub(super) fn expected_bytes(&self, so_far: &Summary) -> u64 {
        let stored = so_far.stored_pages;
        let pages = match self.expected_pages {
            Some(pages) => {
                let scaled = u128::from(stored) * u128::from(pages.max(so_far.pages))
                    / u128::from(so_far.pages.max(1));
                u64::try_from(scaled).unwrap_or(u64::MAX)
            }
            None => stored.saturating_mul(UNKNOWN_SOURCE_FACTOR),
        };
        // The frames so far don't use the dictionary.
        pages.saturating_sub(stored).saturating_mul(PAGE_SIZE_U64)
    }
}
