//! Recordings of first touches, as callers have them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshot_format::trace::{Trace, TraceEnd};

use super::{PausedBy, Runtime};
use crate::session::{RecordingOptions, TouchLog};

/// The reason why no recording began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A recording of the session is running.
    #[error("a recording is running already")]
    Running,
    /// The session has ended, or all pages are present: no touch can be seen any more.
    #[error("all pages are present, or nobody serves them any more: there is nothing to record")]
    Over,
}

/// A recording of first touches, which may have ended.
///
/// While it runs, a fault installs only the page that was touched, and the prefetch of the session
/// is paused, so that every first touch of a page is seen:
///
/// - a touch of a page that was present when the recording began is not seen. The
///   [number](Trace::present_at_start) of such pages is in the trace.
/// - a touch of a zero page is recorded, unless the page belongs to a run that is left to the
///   kernel ([`Restore::leave_zero_runs`](crate::restore::Restore::leave_zero_runs)).
/// - a touch of a 2 MiB page is recorded as 512 touches, since the kernel does not report which
///   part was touched.
/// - a page that the owner has discarded is no page of the snapshot: its touches are not recorded.
/// - a page that is poisoned because it could not be restored is not in the trace.
///
/// Two pages that one thread touches are in the order of the touches. For pages touched by
/// different threads, it is the order in which the kernel reported the faults.
///
/// The recording ends by itself as [`RecordingOptions`] describes, when all pages are present, or
/// with the session. From then on the session works as if nothing had been recorded. Dropping the
/// value does not end it.
#[derive(Clone)]
pub struct Recording {
    runtime: Arc<Runtime>,
    log: Arc<TouchLog>,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording")
            .field("running", &self.is_running())
            .finish_non_exhaustive()
    }
}

impl Recording {
    /// Returns whether the recording has not ended.
    pub fn is_running(&self) -> bool {
        if !self.runtime.is_of_parent() {
            self.runtime.session.check_recording();
        }
        self.log.is_running()
    }

    /// Waits until the recording has ended, at most for `timeout`. Returns whether it has.
    pub fn wait(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout);
        loop {
            let due = self.runtime.session.check_recording();
            let due = due.filter(|_| self.log.is_running());
            let Some(due) = due else { return true };
            if until.is_some_and(|until| until <= Instant::now()) {
                return false;
            }
            self.log.wait(until.map_or(due, |until| until.min(due)));
        }
    }

    /// Ends the recording, unless it has ended by itself, and returns its trace.
    pub fn stop(&self) -> Trace {
        let session = &self.runtime.session;
        session.check_recording();
        session.end_log(&self.log, TraceEnd::Stopped);
        let recorded = session.recorded_touches(&self.log);
        let snapshot = session.image.snapshot();
        Trace {
            content_digest: snapshot.summary().content_digest,
            page_slots: snapshot.page_slots(),
            begun: recorded.begun,
            // A page that was installed as the recording began may be counted twice.
            present_at_start: recorded.present.min(snapshot.page_slots()),
            end: recorded.end,
            touches: recorded.touches,
        }
    }
}

impl Runtime {
    /// Begins a recording.
    pub(crate) fn record(
        self: &Arc<Self>,
        options: RecordingOptions,
    ) -> Result<Recording, RecordError> {
        let runtime = Arc::downgrade(self);
        let on_end = Box::new(move || {
            if let Some(runtime) = runtime.upgrade() {
                runtime.resume_prefetch(PausedBy::Recording);
            }
        });
        let session = &self.session;
        session.check_recording();
        if session.is_ending() {
            return Err(RecordError::Over);
        }
        let log = session.begin_recording(options, on_end);
        let log = log.ok_or(RecordError::Running)?;
        self.pause_prefetch(PausedBy::Recording);
        if !log.is_running() {
            self.resume_prefetch(PausedBy::Recording);
        }
        Ok(Recording {
            runtime: Arc::clone(self),
            log,
        })
    }

    /// Returns the recording that began last.
    pub(crate) fn recording(self: &Arc<Self>) -> Option<Recording> {
        Some(Recording {
            log: self.session.recorder.latest()?,
            runtime: Arc::clone(self),
        })
    }
}
