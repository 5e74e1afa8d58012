//! Pauses between retries of an operation that failed for a possibly temporary reason.

use std::time::{Duration, Instant};

/// The pause before the first retry; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_millis(512);

/// How long retries continue by default.
pub(crate) const RETRY_TIMEOUT: Duration = Duration::from_secs(5);

/// Consecutive failures of one page, or of a whole prefetch, since the last success.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Retries {
    /// The time of the first failure.
    since: Option<Instant>,
    count: u32,
}

impl Retries {
    /// Counts a failed attempt. Returns the pause before the next one, or `None` once `timeout` has
    /// passed since the first failure. The last retry happens at the end of the timeout.
    pub(crate) fn failed(&mut self, now: Instant, timeout: Duration) -> Option<Duration> {
        let since = *self.since.get_or_insert(now);
        let left = timeout.saturating_sub(now.saturating_duration_since(since));
        (!left.is_zero()).then(|| self.pause().min(left))
    }

    /// Returns the pause before the next attempt, regardless of the time passed.
    pub(crate) fn pause(&mut self) -> Duration {
        let factor = 1_u32.checked_shl(self.count).unwrap_or(u32::MAX);
        self.count = self.count.saturating_add(1);
        FIRST_PAUSE.saturating_mul(factor).min(MAX_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_half_a_second() {
        let mut retries = Retries::default();
        let pauses: Vec<_> = (0..12).map(|_| retries.pause().as_millis()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 512, 512]);
        retries.count = u32::MAX;
        assert_eq!(retries.pause(), MAX_PAUSE);
    }

    #[test]
    fn last_retry_is_at_end_of_timeout() {
        let (mut retries, mut now) = (Retries::default(), Instant::now());
        let (begun, timeout) = (now, Duration::from_millis(100));
        while let Some(pause) = retries.failed(now, timeout) {
            now += pause;
        }
        assert_eq!(now, begun + timeout);
        assert_eq!(retries.failed(now, timeout), None);
        assert_eq!(Retries::default().failed(now, Duration::ZERO), None);
    }
}
