//! Recording of first touches.
//!
//! ```text
//!   record ──▶ running ── each fault: its page, once; only that page is installed
//!                 │
//!                 ▼ stopped, settled, a limit, session complete, or the owner is gone
//!               ended ──▶ the session installs whole frames again, and prefetch continues
//! ```
//!
//! While a recording runs, a fault installs its page and nothing else, so that a touch of any other
//! page faults, too. The frame is decoded as a whole nevertheless, and kept
//! ([`Image::keep_frames`]): the fault of a neighbour decodes nothing.
//!
//! A touch is recorded before its page is installed. Until then, the thread that touched the page
//! cannot touch another one, so the order is exact for each thread of the owner, however many
//! threads serve faults.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use snapshot_format::layout::MAX_TRACE_TOUCHES;
use snapshot_format::trace::{Touch, TouchReason, TraceEnd};

use crate::session::Session;
use crate::session::platform::{Image, PageNumber, Platform};
use crate::session::state::Status;
use snaprestore_uffd::to_usize;

/// The share of the touches that may come in the second half of a settled recording: one in this
/// many.
const SETTLED_SHARE: usize = 20;

/// Maximum interval at which waiters check whether a recording is due: the first touch of one that
/// may settle makes it due earlier.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// Time of a limit that no clock can express.
const FAR_FUTURE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Limits at which a recording of first touches ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordingOptions {
    /// The maximum time from the first touch on: an owner may wait before it does anything.
    /// Default: 10 s.
    pub max_time: Duration,
    /// The maximum number of pages. A recording takes 32 bytes of memory for each, and one bit for
    /// each page of the snapshot. Default: a quarter of the pages of the snapshot, and at most
    /// [`RecordingOptions::MAX_PAGES`]. An owner that touches more has no working set.
    pub max_pages: Option<u64>,
    /// The time from the first touch on after which a recording ends as soon as it has settled:
    /// when at most one twentieth of its touches came in the second half of its time. `None` never
    /// settles. Default: 3 s, so that an early pause of two seconds does not end the recording.
    pub settled_after: Option<Duration>,
}

impl RecordingOptions {
    /// The maximum number of pages by default: 1 GiB of touched memory.
    pub const MAX_PAGES: u64 = 1 << 18;

    /// Returns the maximum number of pages of a snapshot with this many pages.
    fn limit(&self, pages: u64) -> u64 {
        let default = || (pages / 4).clamp(1, Self::MAX_PAGES);
        self.max_pages
            .unwrap_or_else(default)
            .min(MAX_TRACE_TOUCHES)
    }
}

impl Default for RecordingOptions {
    fn default() -> Self {
        Self {
            max_time: Duration::from_secs(10),
            max_pages: None,
            settled_after: Some(Duration::from_secs(3)),
        }
    }
}

/// The recordings of a session, of which one runs at a time.
#[derive(Default)]
pub(crate) struct TouchRecorder {
    /// Set while one runs. Checked by each fault.
    running: AtomicBool,
    latest: Mutex<Option<Arc<TouchLog>>>,
}

impl TouchRecorder {
    /// Returns the recording that began last, whether it runs or has ended.
    pub(crate) fn latest(&self) -> Option<Arc<TouchLog>> {
        self.lock().clone()
    }

    /// Returns the recording that runs.
    fn current(&self) -> Option<Arc<TouchLog>> {
        self.is_running().then(|| self.latest()).flatten()
    }

    /// Returns whether a recording runs.
    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<TouchLog>>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A callback for the end of a recording.
pub(crate) type OnEnd = Box<dyn FnOnce() + Send>;

/// A recording: its limits, and the touches so far.
pub(crate) struct TouchLog {
    options: RecordingOptions,
    begun: Instant,
    begun_at: SystemTime,
    logged: Mutex<LoggedTouches>,
    ended: Condvar,
}

/// The touches of a recording, and its state.
#[derive(Default)]
struct LoggedTouches {
    /// One bit for each page, until the recording ends.
    seen: Vec<u64>,
    touches: Vec<Touch>,
    /// Number of pages that were present when the recording began.
    present: u64,
    /// Number of pages that had been installed when it began; once it has ended, of those that were
    /// installed meanwhile.
    installed: u64,
    end: Option<TraceEnd>,
    on_end: Option<OnEnd>,
}

/// The result of a recording.
#[derive(Clone, Debug)]
pub(crate) struct RecordedTouches {
    pub(crate) begun: SystemTime,
    pub(crate) touches: Vec<Touch>,
    /// Number of pages whose touches could not be seen.
    pub(crate) present: u64,
    pub(crate) end: TraceEnd,
}

impl TouchLog {
    /// Returns whether the recording has not ended. A recording that is due ends with the next
    /// [`Session::check_recording`].
    pub(crate) fn is_running(&self) -> bool {
        self.lock().end.is_none()
    }

    /// Waits until the recording has ended, or until `until`.
    pub(crate) fn wait(&self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let running = |logged: &mut LoggedTouches| logged.end.is_none();
        let waited = self.ended.wait_timeout_while(self.lock(), left, running);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns when the recording ends if no other page is touched until then, and why.
    fn due(&self, logged: &LoggedTouches) -> (Instant, TraceEnd) {
        let RecordingOptions {
            max_time,
            settled_after,
            ..
        } = self.options;
        let Some(first) = logged.touches.first().map(|touch| touch.at) else {
            return (self.begun + FAR_FUTURE, TraceEnd::TimeLimit);
        };
        let settled = settled_after.map(|least| {
            // The last touch before those that may come in the second half.
            let count = logged.touches.len() - logged.touches.len() / SETTLED_SHARE;
            let last = logged.touches[count - 1].at;
            least.max(2 * last.saturating_sub(first))
        });
        let (after, end) = match settled {
            Some(settled) if settled < max_time => (settled, TraceEnd::Settled),
            _ => (max_time, TraceEnd::TimeLimit),
        };
        let due = self.begun.checked_add(first.saturating_add(after));
        (due.unwrap_or_else(|| self.begun + FAR_FUTURE), end)
    }

    /// Locks the state, which is consistent after every statement.
    fn lock(&self) -> MutexGuard<'_, LoggedTouches> {
        self.logged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LoggedTouches {
    /// Records the first touch of `page`.
    fn add(&mut self, page: PageNumber, at: Duration, reason: TouchReason) {
        let (word, bit) = (to_usize(page / 64), 1 << (page % 64));
        let Some(seen) = self.seen.get_mut(word).filter(|seen| **seen & bit == 0) else {
            return;
        };
        *seen |= bit;
        self.touches.push(Touch { page, at, reason });
    }
}

impl<P: Platform, I: Image> Session<P, I> {
    /// Begins a recording. `on_end` is called when it ends, by any thread, unless another has begun
    /// by then. Returns `None` if a recording runs, or if the session is ending.
    pub(crate) fn begin_recording(
        &self,
        options: RecordingOptions,
        on_end: OnEnd,
    ) -> Option<Arc<TouchLog>> {
        let mut latest = self.recorder.lock();
        if latest.as_ref().is_some_and(|log| log.is_running()) || self.is_ending() {
            return None;
        }
        let log = Arc::new(TouchLog {
            options,
            begun: Instant::now(),
            begun_at: SystemTime::now(),
            logged: Mutex::new(LoggedTouches {
                seen: vec![0; to_usize(self.state.page_slots().div_ceil(64))],
                on_end: Some(on_end),
                ..LoggedTouches::default()
            }),
            ended: Condvar::new(),
        });
        self.image.keep_frames(true);
        // Faults wait for the lock, so that none is recorded before the pages are counted.
        let mut logged = log.lock();
        *latest = Some(Arc::clone(&log));
        self.recorder.running.store(true, Relaxed);
        drop(latest);
        // A page that is installed in between counts twice, rather than not at all.
        logged.installed = self.installed();
        logged.present = self.state.count_present();
        drop(logged);
        if self.is_ending() {
            self.end_recording(TraceEnd::Stopped);
        }
        Some(log)
    }

    /// Ends the recording that runs, if there is one.
    pub(crate) fn end_recording(&self, end: TraceEnd) {
        if let Some(log) = self.recorder.current() {
            self.end_log(&log, end);
        }
    }

    /// Ends `log`, unless it has ended.
    pub(crate) fn end_log(&self, log: &TouchLog, end: TraceEnd) {
        let mut logged = log.lock();
        if logged.end.is_some() {
            return;
        }
        logged.end = Some(end);
        logged.seen = Vec::new();
        logged.installed = self.installed().saturating_sub(logged.installed);
        let on_end = logged.on_end.take();
        self.recorder.running.store(false, Relaxed);
        drop(logged);
        log.ended.notify_all();
        // Another recording that has begun meanwhile needs the frames, and prefetch to wait.
        let latest = self.recorder.lock();
        if latest.as_ref().is_some_and(|log| log.is_running()) {
            return;
        }
        self.image.keep_frames(false);
        if let Some(on_end) = on_end {
            on_end();
        }
    }

    /// Ends the recording that runs if it is due. Otherwise returns when to check again, or `None`
    /// if there is none.
    pub(crate) fn check_recording(&self) -> Option<Instant> {
        let log = self.recorder.current()?;
        let (due, end) = log.due(&log.lock());
        let now = Instant::now();
        if due > now {
            return Some(due.min(now + CHECK_INTERVAL));
        }
        self.end_log(&log, end);
        None
    }

    /// Records a fault, read at `at`, on `pages`, of which those that are absent belong to the
    /// snapshot. Returns whether only the wanted page is to be installed.
    pub(super) fn record_fault(&self, pages: Range<PageNumber>, at: Instant) -> bool {
        self.record_touch(pages, at, TouchReason::Demand)
    }

    /// Records a fault, read at `at`, on a page that was installed since.
    pub(super) fn record_present(&self, page: PageNumber, at: Instant) {
        self.record_touch(page..page + 1, at, TouchReason::Present);
    }

    fn record_touch(&self, pages: Range<PageNumber>, at: Instant, reason: TouchReason) -> bool {
        if self.check_recording().is_none() {
            return false;
        }
        let Some(log) = self.recorder.current() else {
            return false;
        };
        let mut logged = log.lock();
        let most = log.options.limit(self.state.page_slots());
        // A touch before the recording began belongs to its start.
        let at = at.saturating_duration_since(log.begun);
        for page in pages {
            let wanted =
                reason == TouchReason::Present || self.state.status(page) == Status::Absent;
            if wanted && logged.end.is_none() && (logged.touches.len() as u64) < most {
                logged.add(page, at, reason);
            }
        }
        let is_full = logged.touches.len() as u64 >= most;
        drop(logged);
        if is_full {
            self.end_log(&log, TraceEnd::PageLimit);
        }
        !is_full
    }

    /// Returns the touches in `log`. Poisoned pages are left out.
    pub(crate) fn recorded_touches(&self, log: &TouchLog) -> RecordedTouches {
        let logged = log.lock();
        let mut touches = logged.touches.clone();
        let installed = match logged.end {
            Some(_) => logged.installed,
            None => self.installed().saturating_sub(logged.installed),
        };
        let (present, end) = (logged.present, logged.end.unwrap_or(TraceEnd::Stopped));
        drop(logged);
        // A page is marked as present only after its waiter was woken, so it may look absent.
        touches.retain(|touch| self.state.status(touch.page) != Status::Poisoned);
        // Threads that serve faults at the same time record them in any order.
        touches.sort_by_key(|touch| touch.at);
        let is_demand = |touch: &&Touch| touch.reason == TouchReason::Demand;
        let seen = touches.iter().filter(is_demand).count() as u64;
        RecordedTouches {
            begun: log.begun_at,
            touches,
            present: present + installed.saturating_sub(seen),
            end,
        }
    }

    /// Returns the number of pages installed so far.
    fn installed(&self) -> u64 {
        self.stats.demand.load().total() + self.stats.prefetch.load().total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns when a recording with touches at these times is due, and why. All times are
    /// milliseconds since the recording began.
    fn due(options: RecordingOptions, touches: impl IntoIterator<Item = u64>) -> (u128, TraceEnd) {
        let touch = |(page, at)| Touch {
            page,
            at: Duration::from_millis(at),
            reason: TouchReason::Demand,
        };
        let log = TouchLog {
            options,
            begun: Instant::now(),
            begun_at: SystemTime::now(),
            logged: Mutex::new(LoggedTouches {
                touches: (0..).zip(touches).map(touch).collect(),
                ..LoggedTouches::default()
            }),
            ended: Condvar::new(),
        };
        let (due, end) = log.due(&log.lock());
        ((due - log.begun).as_millis(), end)
    }

    #[test]
    fn recording_settles_if_second_half_has_a_twentieth() {
        let options = RecordingOptions::default();
        // With 19 touches from 5 s to 7 s, one more may come in the second half.
        let early = || (0..19).map(|n| 5000 + n * 2000 / 18);
        assert_eq!(due(options, early()), (9000, TraceEnd::Settled));
        let one_late = early().chain([8900]);
        assert_eq!(due(options, one_late), (9000, TraceEnd::Settled));
        // With two, the first of them must lie in the first half.
        let two_late = early().chain([8000, 8900]);
        assert_eq!(due(options, two_late), (11000, TraceEnd::Settled));
        // Of 40 touches, two may be late.
        let long = (0..38).map(|n| 5000 + n * 2000 / 37).chain([8000, 8900]);
        assert_eq!(due(options, long), (9000, TraceEnd::Settled));
    }

    #[test]
    fn recording_settles_after_its_minimum_time_at_the_earliest() {
        let options = RecordingOptions::default();
        assert_eq!(due(options, [5000]), (8000, TraceEnd::Settled));
        assert_eq!(due(options, 300..340), (3300, TraceEnd::Settled));
    }

    /// With less than three seconds, the second half would be lost.
    #[test]
    fn pause_of_two_seconds_does_not_settle_a_recording() {
        let options = RecordingOptions::default();
        let touches: Vec<u64> = (0..100).map(|n| n * 5 + n / 50 * 2000).collect();
        let (before, all) = (touches[..50].to_vec(), touches.clone());
        assert_eq!(due(options, before), (3000, TraceEnd::Settled));
        assert!(touches[50] < 3000);
        assert_eq!(due(options, all), (2 * 2470, TraceEnd::Settled));
    }

    #[test]
    fn time_limit_counts_from_the_first_touch() {
        let unsettled = RecordingOptions {
            settled_after: None,
            ..RecordingOptions::default()
        };
        assert_eq!(due(unsettled, [5000, 5001]), (15000, TraceEnd::TimeLimit));
        // The limit comes before the rate can settle.
        let options = RecordingOptions::default();
        let slow = || (0..20).map(|n| 5000 + n * 300);
        assert_eq!(due(options, slow()), (15000, TraceEnd::TimeLimit));
        let none = due(options, []).0;
        assert_eq!(none, FAR_FUTURE.as_millis());
    }

    #[test]
    fn page_limit_is_a_quarter_of_the_pages_by_default() {
        let options = RecordingOptions::default();
        for (pages, limit) in [(0, 1), (4096, 1024), (1 << 30, 1 << 18)] {
            assert_eq!(options.limit(pages), limit, "{pages} pages");
        }
        let most = RecordingOptions {
            max_pages: Some(u64::MAX),
            ..options
        };
        assert_eq!(most.limit(4096), MAX_TRACE_TOUCHES);
    }
}
