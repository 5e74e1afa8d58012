//! Pauses between two tries of what failed for a reason that may pass.

use std::time::{Duration, Instant};

/// The pause before the first retry; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_millis(512);

/// How long retries go on, unless the session is told otherwise.
pub(crate) const RETRY_TIMEOUT: Duration = Duration::from_secs(5);

/// The retries of one page, or of a whole prefetch, since they last succeeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Retries {
    /// When the first try failed.
    since: Option<Instant>,
    count: u32,
}

impl Retries {
    /// Counts a try that failed. Returns how long to wait before the next, or `None` once
    /// `timeout` has passed since the first: the last retry is made at its end.
    pub(crate) fn failed(&mut self, now: Instant, timeout: Duration) -> Option<Duration> {
        let since = *self.since.get_or_insert(now);
        let left = timeout.saturating_sub(now.saturating_duration_since(since));
        (!left.is_zero()).then(|| self.pause().min(left))
    }

    /// Returns how long to wait before the next try, whatever time has passed.
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
    fn the_last_retry_is_at_the_end_of_the_timeout() {
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
