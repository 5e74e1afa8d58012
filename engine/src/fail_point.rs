//! Fail points: places at which a test can kill the process.
//!
//! The promises about a process that dies hold for every instant. A test can't hit every instant by
//! chance, but it can hit each place at which the shared state is between two steps. Without the
//! feature `fail-points`, none of this is compiled.

/// Defines the fail points and their names.
macro_rules! fail_points {
    ($($(#[doc = $doc:literal])* $point:ident = $name:literal,)*) => {
        /// A place between two steps.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum FailPoint {
            $($(#[doc = $doc])* $point,)*
        }

        impl FailPoint {
            /// All fail points.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// Returns the name of the fail point.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

fail_points! {
    /// A session was handed to a process that has done nothing with it yet.
    Received = "received",
    /// The tables of a session were created, and nobody else has them yet.
    TablesMade = "tables-made",
    /// Another process has the tables of a session, and nothing was read yet.
    TablesGiven = "tables-given",
    /// The messages that a predecessor had read are being recorded.
    Replaying = "replaying",
    /// These messages are recorded.
    Replayed = "replayed",
    /// The ring of these messages is clear, and nobody was woken yet.
    ReplayCleared = "replay-cleared",
    /// All waiters were woken, and nothing was read yet.
    ReplayWoken = "replay-woken",
    /// Messages were read, and none is recorded yet.
    Read = "read",
    /// One message is recorded, perhaps not all.
    Recorded = "recorded",
    /// The spare copy of the address map is written but not valid yet.
    MapWritten = "map-written",
    /// The new copy is valid, and waiters at the old addresses were not woken yet.
    MapPublished = "map-published",
    /// All messages are recorded and still in the ring.
    AllRecorded = "all-recorded",
    /// The ring is clear, and the map still counts some of its messages as handled.
    RingCleared = "ring-cleared",
    /// A frame is about to be decoded.
    Decoding = "decoding",
    /// A page was installed into the owner's memory, but not marked yet.
    Installed = "installed",
    /// The page is marked, and its waiters were not woken yet.
    Marked = "marked",
    /// Every page is settled, and no memory was returned to the kernel yet.
    Settled = "settled",
    /// A range was returned to the kernel, perhaps not all.
    Unregistered = "unregistered",
    /// All ranges were returned, and nobody was notified yet.
    Complete = "complete",
}

#[cfg(feature = "fail-points")]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use nix::sys::signal::{Signal, raise};

    use super::FailPoint;

    static ARMED: OnceLock<Armed> = OnceLock::new();

    struct Armed {
        point: FailPoint,
        times: AtomicU64,
        crash: bool,
    }

    /// Arms the fail point described by `what`: `NAME:TIMES` kills the process when it reaches that
    /// place for the TIMES-th time, `NAME:TIMES:crash` crashes it. Returns `false` if there is no
    /// such place. Only the first call counts.
    pub fn arm(what: &str) -> bool {
        let mut parts = what.split(':');
        let name = parts.next().unwrap_or_default();
        let point = FailPoint::ALL.iter().find(|point| point.name() == name);
        let times = parts.next().unwrap_or("1").parse();
        let crash = parts.next().is_some();
        let (Some(point), Ok(times @ 1..)) = (point, times) else {
            return false;
        };
        ARMED.get_or_init(|| Armed {
            point: *point,
            times: AtomicU64::new(times),
            crash,
        });
        true
    }

    /// Kills the process if this fail point is armed.
    pub fn fail_point(point: FailPoint) {
        if let Some(armed) = ARMED.get()
            && armed.point == point
            && armed.times.fetch_sub(1, Relaxed) == 1
        {
            if armed.crash {
                std::process::abort();
            }
            // Nothing of this thread runs afterwards. A confined worker has no other way to kill
            // itself.
            let _ = raise(Signal::SIGKILL);
        }
    }
}

#[cfg(feature = "fail-points")]
pub use armed::{arm, fail_point};

/// Does nothing: the feature is off.
#[cfg(not(feature = "fail-points"))]
#[inline]
pub fn fail_point(_: FailPoint) {}
