//! What is told of connections that come to nothing: whoever may connect can make as many as it likes.

use std::time::{Duration, Instant};

/// Lines that are shown at once, and how many more a second afterwards.
const MOST_LINES: u32 = 100;
const LINES_A_SECOND: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);
/// The most that are kept for the report.
const MOST_KEPT: usize = 100;

#[derive(Debug)]
pub(crate) struct Refusals {
    lines: u32,
    since: Instant,
    untold: u64,
    kept: usize,
}

impl Refusals {
    pub(crate) fn new() -> Self {
        Self {
            lines: 0,
            since: Instant::now(),
            untold: 0,
            kept: 0,
        }
    }

    /// Whether the next is told in a line.
    pub(crate) fn is_shown(&mut self) -> bool {
        let shown = self.lines < MOST_LINES;
        if shown {
            self.lines += 1;
        } else {
            self.untold += 1;
        }
        shown
    }

    /// Whether the next is kept for the report.
    pub(crate) fn is_kept(&mut self) -> bool {
        self.kept += 1;
        self.kept <= MOST_KEPT
    }

    /// How many were not told, once a second.
    pub(crate) fn untold(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) < SECOND {
            return None;
        }
        self.since = now;
        self.lines = self.lines.saturating_sub(LINES_A_SECOND);
        let untold = std::mem::take(&mut self.untold);
        (untold > 0).then_some(untold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_told_and_the_others_counted() {
        let mut refusals = Refusals::new();
        let shown = |refusals: &mut Refusals| (0..250).filter(|_| refusals.is_shown()).count();
        assert_eq!(shown(&mut refusals), 100);
        let later = refusals.since + SECOND;
        assert_eq!(refusals.untold(refusals.since), None);
        assert_eq!(refusals.untold(later), Some(150));
        assert_eq!(shown(&mut refusals), 10);
        assert_eq!(refusals.untold(later + SECOND), Some(240));
        assert_eq!(refusals.untold(later + 2 * SECOND), None);
        assert_eq!((0..250).filter(|_| refusals.is_kept()).count(), 100);
    }
}
