//! Limits the log lines about refused connections, since a peer can make any number of them.

use std::time::{Duration, Instant};

/// Maximum number of lines logged at once, and rate at which further ones are permitted.
const MAX_LINES: u32 = 100;
const LINES_PER_SECOND: u32 = 10;
const REFILL_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of refused connections in the summary.
const MAX_SUMMARIES: usize = 100;

/// A limiter of log lines and summaries.
#[derive(Debug)]
pub(crate) struct RefusalLog {
    lines: u32,
    since: Instant,
    suppressed: u64,
    in_summaries: usize,
}

impl RefusalLog {
    pub(crate) fn new() -> Self {
        Self {
            lines: 0,
            since: Instant::now(),
            suppressed: 0,
            in_summaries: 0,
        }
    }

    /// Admits the next line, or counts it as suppressed.
    pub(crate) fn admit_line(&mut self) -> bool {
        let shown = self.lines < MAX_LINES;
        if shown {
            self.lines += 1;
        } else {
            self.suppressed += 1;
        }
        shown
    }

    /// Admits the next refusal to the summary, if there is room.
    pub(crate) fn admit_to_summaries(&mut self) -> bool {
        self.in_summaries += 1;
        self.in_summaries <= MAX_SUMMARIES
    }

    /// Returns the number of suppressed lines, once a second.
    pub(crate) fn take_suppressed(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) < REFILL_INTERVAL {
            return None;
        }
        self.since = now;
        self.lines = self.lines.saturating_sub(LINES_PER_SECOND);
        let suppressed = std::mem::take(&mut self.suppressed);
        (suppressed > 0).then_some(suppressed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_told_and_the_others_counted() {
        let mut log = RefusalLog::new();
        let shown = |log: &mut RefusalLog| (0..250).filter(|_| log.admit_line()).count();
        assert_eq!(shown(&mut log), 100);
        let later = log.since + REFILL_INTERVAL;
        assert_eq!(log.take_suppressed(log.since), None);
        assert_eq!(log.take_suppressed(later), Some(150));
        assert_eq!(shown(&mut log), 10);
        assert_eq!(log.take_suppressed(later + REFILL_INTERVAL), Some(240));
        assert_eq!(log.take_suppressed(later + 2 * REFILL_INTERVAL), None);
        assert_eq!((0..250).filter(|_| log.admit_to_summaries()).count(), 100);
    }
}
