//! The limits of the daemon for everything that misbehaves: how often it may happen, within which
//! time, and the consequence.
//!
//! | event | how often | within | consequence | limit |
//! | --- | --- | --- | --- | --- |
//! | workers die while decoding a frame | 2 | ever | the frame is quarantined | [`QUARANTINE`] |
//! | a VM waits for a worker | once | `--stuck-after` | the worker is killed | |
//! | a killed worker does not exit | once | `--stuck-after` | its VMs are killed | |
//! | workers get stuck on one VM | 3 | see the limit | the VM is killed | [`stuck_workers`] |
//! | workers in a row fail to start | 20 | for 30 s | the daemon exits | [`FAILED_STARTS`] |
//! | a worker fails to start | each | | the next start waits longer | [`restart_delay`] |
//! | an upgrade is not ready | once | 20 s | its worker is killed | [`UPGRADE_TIMEOUT`] |
//! | a guardian is not ready | once | 20 s | nothing is stored | [`GUARDIAN_TIMEOUT`] |
//! | a guardian exits | each | | another one starts | |
//! | messages to the guardian are queued | 1 | | the operator is told, once | [`QUEUED_MESSAGES`] |
//! | a guardian does not read its last messages | once | 5 s | an error | [`FLUSH_TIMEOUT`] |
//! | a guardian cannot read a message | 100 in a row | | it kills the VMs | [`READ_RETRIES`] |
//! | accepting from a backlog fails | 100 | | its other peers stay alive | [`ACCEPT_RETRIES`] |
//! | refusals are logged | 100, then 10 a second | | others are counted | [`REFUSAL_LINES`] |
//! | refusals are in the summary | 100 | ever | others are only counted | [`REFUSAL_SUMMARIES`] |
//! | one place in the code logs | 10 | 1 s | other events are only counted | [`LOG_EVENTS`] |
//! | handshakes are incomplete | 256 at once | | further peers wait | [`HANDSHAKES`] |
//! | refused connections stay open | 64 at once | 1 s | their peers are killed | [`CLOSING`] |
//! | VMs of one process | 16 at once | | further ones are refused | [`VMS_PER_PROCESS`] |
//! | messages and clients wait for a worker | 64 at once | | no client is accepted | [`CLIENTS`] |
//!
//! The time limits of a handshake and of reading a page are settings of the service.

use std::time::{Duration, Instant};

/// Deaths of workers on one frame after which the frame counts as damaged.
pub(crate) const QUARANTINE: Limit = Limit::new(2, Forget::Never);
/// Workers in a row that exited before they were ready, or soon afterwards, after which the daemon
/// gives up. On an overloaded machine workers are slow, and may be killed early many times, so the
/// row also has to last for some time.
pub(crate) const FAILED_STARTS: Limit = Limit {
    lasting: Duration::from_secs(30),
    ..Limit::new(20, Forget::Never)
};
/// Log lines about refused connections, after which further ones are only counted.
pub(crate) const REFUSAL_LINES: Limit = Limit::new(100, Forget::PerSecond(10));
/// Refused connections in the summary, after which further ones are only counted.
pub(crate) const REFUSAL_SUMMARIES: Limit = Limit::new(100, Forget::Never);
/// Events logged by one place in the code, after which further ones are only counted.
pub(crate) const LOG_EVENTS: Limit = Limit::new(10, Forget::After(LOG_WINDOW));
/// Time for which the events of one place in the code are counted together.
pub(crate) const LOG_WINDOW: Duration = Duration::from_secs(1);
/// Failures to accept from the backlog of a socket, after which its other peers are left alive.
pub(crate) const ACCEPT_RETRIES: Limit = Limit::new(100, Forget::Never);
/// Failures in a row to read a message from the supervisor, after which a guardian kills the VMs as
/// if the supervisor had exited.
pub(crate) const READ_RETRIES: Limit = Limit::new(100, Forget::Never);

/// Incomplete handshakes, after which further peers wait in the kernel's queue.
pub(crate) const HANDSHAKES: Limit = Limit::at_once(256);
/// Refused connections with open descriptors, after which their peers are killed and nobody is
/// accepted.
pub(crate) const CLOSING: Limit = Limit::at_once(64);
/// VMs and handshakes of one process, after which further ones are refused. One is usual; the limit
/// reserves places for other processes.
pub(crate) const VMS_PER_PROCESS: Limit = Limit::at_once(16);
/// Messages and clients that wait for a worker, after which no further client is accepted.
pub(crate) const CLIENTS: Limit = Limit::at_once(64);
/// Messages queued for the guardian, after which the operator is told.
pub(crate) const QUEUED_MESSAGES: Limit = Limit::at_once(1);

/// Time in which the kernel closes the descriptors of a refused connection, unless their peer
/// delays it.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Minimum uptime of a worker that did not fail to start.
pub(crate) const MIN_UPTIME: Duration = Duration::from_secs(10);
/// Time limit for another program to become ready as a worker.
pub(crate) const UPGRADE_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit for a guardian to become ready: exec, and some writes to kernel files.
pub(crate) const GUARDIAN_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit for the guardian to read its last messages, and for the last files to be written.
pub(crate) const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns the limit of workers that get stuck on one VM in a row, at which the VM is killed. The
/// third worker does not decode the frames on which the first two died. A pause ends the row: a
/// worker that meets the same obstacle gets stuck again at once.
pub(crate) fn stuck_workers(stuck_after: Duration) -> Limit {
    Limit::new(3, Forget::AfterPause(stuck_after.saturating_mul(4)))
}

/// Returns the delay before a worker starts, after `failed` failed starts in a row. The first one
/// of a row is replaced at once, because VMs wait.
pub(crate) fn restart_delay(failed: u32) -> Duration {
    const STEP: Duration = Duration::from_millis(10);
    const MAX: Duration = Duration::from_secs(1);
    (STEP * failed.saturating_sub(1)).min(MAX)
}

/// A limit on how often something may happen, or how many of something may exist.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// Number at which the limit is reached.
    count: u32,
    /// The events that no longer count.
    forget: Forget,
    /// Minimum time since the first event.
    lasting: Duration,
}

/// The events that no longer count.
#[derive(Clone, Copy, Debug)]
enum Forget {
    /// None, until the counter is reset.
    Never,
    /// All, this time after the first one.
    After(Duration),
    /// All, after a longer pause than this.
    AfterPause(Duration),
    /// This number each second.
    PerSecond(u32),
}

impl Limit {
    const fn new(count: u32, forget: Forget) -> Self {
        Self {
            count,
            forget,
            lasting: Duration::ZERO,
        }
    }

    /// Creates a limit on how many of something may exist.
    const fn at_once(count: u32) -> Self {
        Self::new(count, Forget::Never)
    }

    /// Returns whether `number` of something is as many as are permitted.
    pub(crate) fn is_reached_by(&self, number: usize) -> bool {
        number >= self.count()
    }

    /// Returns the number at which the limit is reached.
    pub(crate) fn count(&self) -> usize {
        self.count as usize
    }

    /// Returns the minimum time since the first event.
    pub(crate) fn lasting(&self) -> Duration {
        self.lasting
    }
}

/// A counter of events that have a [`Limit`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counter {
    count: u32,
    /// Times of the first and the last event.
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Counter {
    /// Counts an event.
    pub(crate) fn count(&mut self, limit: &Limit, now: Instant) {
        self.forget(limit, now);
        self.count = self.count.saturating_add(1);
        self.first.get_or_insert(now);
        self.last = Some(now);
    }

    /// Counts an event unless the limit is reached. Returns whether it was counted.
    pub(crate) fn admit(&mut self, limit: &Limit, now: Instant) -> bool {
        self.forget(limit, now);
        let admitted = !self.is_reached(limit, now);
        if admitted {
            self.count(limit, now);
        }
        admitted
    }

    /// Returns whether the limit is reached.
    pub(crate) fn is_reached(&self, limit: &Limit, now: Instant) -> bool {
        let lasts = |first| now.saturating_duration_since(first) >= limit.lasting;
        self.count >= limit.count && self.first.is_none_or(lasts)
    }

    /// Forgets all events.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Returns the number of events.
    pub(crate) fn number(&self) -> u32 {
        self.count
    }

    /// Returns the time of the first event.
    pub(crate) fn since(&self) -> Option<Instant> {
        self.first
    }

    #[cfg(test)]
    pub(crate) fn set_since(&mut self, since: Instant) {
        self.first = Some(since);
    }

    /// Returns the time of the last event.
    pub(crate) fn last(&self) -> Option<Instant> {
        self.last
    }

    /// Forgets the events that no longer count.
    fn forget(&mut self, limit: &Limit, now: Instant) {
        let since = |time: Option<Instant>| {
            time.map_or(Duration::ZERO, |time| now.saturating_duration_since(time))
        };
        let is_over = match limit.forget {
            Forget::Never => false,
            Forget::After(window) => since(self.first) >= window,
            Forget::AfterPause(pause) => since(self.last) > pause,
            Forget::PerSecond(rate) => {
                let seconds = since(self.first).as_secs();
                let forgotten = u64::from(rate).saturating_mul(seconds);
                let forgotten = u32::try_from(forgotten).unwrap_or(u32::MAX);
                self.count = self.count.saturating_sub(forgotten);
                self.first = self.first.map(|first| first + Duration::from_secs(seconds));
                self.count == 0
            }
        };
        if is_over {
            self.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Returns how many of `events` at `now` are admitted.
    fn admitted(counter: &mut Counter, limit: &Limit, events: u32, now: Instant) -> usize {
        (0..events).filter(|_| counter.admit(limit, now)).count()
    }

    #[test]
    fn row_must_be_long_and_last_for_its_time() {
        let begun = Instant::now();
        let mut counter = Counter::default();
        for _ in 0..1000 {
            counter.count(&FAILED_STARTS, begun);
        }
        assert!(!counter.is_reached(&FAILED_STARTS, begun + FAILED_STARTS.lasting / 2));
        assert!(counter.is_reached(&FAILED_STARTS, begun + FAILED_STARTS.lasting));
        counter.reset();
        counter.count(&FAILED_STARTS, begun);
        assert!(!counter.is_reached(&FAILED_STARTS, begun + 10 * FAILED_STARTS.lasting));
    }

    #[test]
    fn pause_starts_a_new_row() {
        let (begun, limit) = (Instant::now(), stuck_workers(SECOND));
        let mut counter = Counter::default();
        for seconds in [0, 4, 9] {
            counter.count(&limit, begun + seconds * SECOND);
        }
        assert_eq!(counter.number(), 1);
        for seconds in [13, 17] {
            assert!(!counter.is_reached(&limit, begun));
            counter.count(&limit, begun + seconds * SECOND);
        }
        assert!(counter.is_reached(&limit, begun));
    }

    #[test]
    fn window_and_rate_admit_events_again() {
        let begun = Instant::now();
        let (mut window, mut rate) = (Counter::default(), Counter::default());
        for (seconds, of_window, of_rate) in [(0, 10, 100), (1, 10, 10), (3, 10, 20)] {
            let now = begun + seconds * SECOND;
            assert_eq!(admitted(&mut window, &LOG_EVENTS, 250, now), of_window);
            assert_eq!(admitted(&mut rate, &REFUSAL_LINES, 250, now), of_rate);
        }
        let later = begun + 1000 * SECOND;
        assert_eq!(admitted(&mut rate, &REFUSAL_LINES, 250, later), 100);
    }

    #[test]
    fn restart_delay_grows_to_one_second() {
        let delays = [0, 1, 2, 1000].map(restart_delay);
        let expected = [0, 0, 10, 1000].map(Duration::from_millis);
        assert_eq!(delays, expected);
    }
}
