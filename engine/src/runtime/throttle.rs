//! The throttle of a session's prefetch: whether it may run now, and how fast.

use std::sync::atomic::{AtomicU64, Ordering::AcqRel, Ordering::Acquire};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::session_prefetch::Availability;

/// A party that can pause the prefetch of a session. Prefetch runs when none of them pauses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum PausedBy {
    /// The user of the library.
    Caller = 1 << 0,
    /// A recording of first touches.
    Recording = 1 << 1,
}

/// The throttle of one session. Every setting can change at any time.
pub(crate) struct Throttle {
    settings: Mutex<Settings>,
    /// Number of changes so far.
    changes: AtomicU64,
}

struct Settings {
    /// The parties that pause, as bits.
    paused: u8,
    /// Bandwidth limit in bytes per second.
    bandwidth: Option<u64>,
    /// The start of the time over which the bandwidth is averaged: the last change.
    since: Instant,
    /// Number of bytes that had been prefetched by then.
    loaded: u64,
}

impl Throttle {
    pub(super) fn new(bandwidth: Option<u64>) -> Self {
        Self {
            settings: Mutex::new(Settings {
                paused: 0,
                bandwidth,
                since: Instant::now(),
                loaded: 0,
            }),
            changes: AtomicU64::new(0),
        }
    }

    /// Sets whether `by` pauses prefetch, which has loaded `loaded` bytes so far.
    pub(super) fn set_paused(&self, by: PausedBy, paused: bool, loaded: u64) {
        self.change(loaded, |settings| {
            settings.paused &= !(by as u8);
            settings.paused |= u8::from(paused) * by as u8;
        });
    }

    /// Sets the bandwidth from now on, or removes the limit.
    pub(super) fn set_bandwidth(&self, bandwidth: Option<u64>, loaded: u64) {
        self.change(loaded, |settings| {
            settings.bandwidth = bandwidth.map(|bandwidth| bandwidth.max(1));
        });
    }

    /// Makes a change. Time before it, such as a pause, earns no bandwidth.
    fn change(&self, loaded: u64, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.settings();
        change(&mut settings);
        (settings.since, settings.loaded) = (Instant::now(), loaded);
        // Counted in the lock: a thread that has seen the count sees the change.
        self.changes.fetch_add(1, AcqRel);
    }

    /// Returns the number of changes so far. If it has changed, [`Throttle::availability`] has.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Acquire)
    }

    /// Returns when prefetch may continue after it has loaded `loaded` bytes: `None` means now.
    pub(super) fn availability(&self, loaded: impl FnOnce() -> u64) -> Option<Availability> {
        let settings = self.settings();
        if settings.paused != 0 {
            return Some(Availability::Paused);
        }
        let bandwidth = settings.bandwidth?;
        let loaded = loaded().saturating_sub(settings.loaded);
        let due = settings.since + Duration::from_nanos(nanos(loaded, bandwidth));
        (due > Instant::now()).then_some(Availability::Until(due))
    }

    /// Locks the settings, which are consistent after every statement.
    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns how many nanoseconds `bytes` take at `per_second` bytes per second.
fn nanos(bytes: u64, per_second: u64) -> u64 {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(per_second);
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_bandwidth_applies_from_the_change_on() {
        let throttle = Throttle::new(Some(1));
        assert_eq!(throttle.availability(|| 0), None);
        let slow = throttle.availability(|| 1 << 20);
        assert!(matches!(slow, Some(Availability::Until(_))), "{slow:?}");
        let changes = throttle.changes();
        throttle.set_bandwidth(Some(2), 1 << 20);
        assert_ne!(throttle.changes(), changes);
        assert_eq!(throttle.availability(|| 1 << 20), None);
        throttle.set_bandwidth(None, 1 << 20);
        assert_eq!(throttle.availability(|| u64::MAX), None);
    }

    #[test]
    fn pause_holds_whatever_the_bandwidth() {
        let throttle = Throttle::new(None);
        for _ in 0..2 {
            throttle.set_paused(PausedBy::Caller, true, 0);
            throttle.set_bandwidth(None, 0);
            assert_eq!(throttle.availability(|| 0), Some(Availability::Paused));
        }
        throttle.set_paused(PausedBy::Caller, false, 0);
        assert_eq!(throttle.availability(|| 0), None);
    }

    #[test]
    fn pause_of_one_party_outlasts_that_of_another() {
        let throttle = Throttle::new(None);
        let (caller, recording) = (PausedBy::Caller, PausedBy::Recording);
        for (first, second) in [(caller, recording), (recording, caller)] {
            throttle.set_paused(first, true, 0);
            throttle.set_paused(second, true, 0);
            throttle.set_paused(first, false, 0);
            assert_eq!(throttle.availability(|| 0), Some(Availability::Paused));
            throttle.set_paused(second, false, 0);
            assert_eq!(throttle.availability(|| 0), None);
        }
    }

    #[test]
    fn bandwidth_counts_time_and_bytes_since_the_last_change() {
        let throttle = Throttle::new(Some(2));
        std::thread::sleep(Duration::from_millis(2));
        let before = Instant::now();
        throttle.set_paused(PausedBy::Caller, true, 5000);
        throttle.set_paused(PausedBy::Caller, false, 5000);
        let after = Instant::now();
        let Some(Availability::Until(due)) = throttle.availability(|| 7000) else {
            panic!("not limited");
        };
        let time = Duration::from_secs(1000);
        assert!((before + time..=after + time).contains(&due));
    }
}
