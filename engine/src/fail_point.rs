//! Places where a test may have the process killed.
//!
//! What is promised about a process that dies is promised for every instant. A test can't hit every
//! instant by chance, but it can hit each place where the shared state is between two steps. Without the
//! feature `fail-points` nothing of it is compiled.

/// Defines the places and their names.
macro_rules! fail_points {
    ($($(#[doc = $doc:literal])* $point:ident = $name:literal,)*) => {
        /// A place between two steps.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum FailPoint {
            $($(#[doc = $doc])* $point,)*
        }

        impl FailPoint {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// What it is called.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

fail_points! {
    /// A session was handed to a process, which has done nothing with it.
    Received = "received",
    /// The tables of a session were made, and nobody else has them.
    TablesMade = "tables-made",
    /// The tables of a session are in another process's hands, and nothing was read.
    TablesGiven = "tables-given",
    /// What a predecessor had read is being recorded.
    Replaying = "replaying",
    /// It is recorded.
    Replayed = "replayed",
    /// The ring of it is clear, and nobody was woken.
    ReplayCleared = "replay-cleared",
    /// Everybody was woken, and nothing was read.
    ReplayWoken = "replay-woken",
    /// Messages were read, and none is recorded.
    Read = "read",
    /// One message is recorded, perhaps not all.
    Recorded = "recorded",
    /// The spare copy of the address map is written and not valid.
    MapWritten = "map-written",
    /// It is valid, and who waits at the old addresses was not woken.
    MapPublished = "map-published",
    /// All messages are recorded and lie in the ring.
    AllRecorded = "all-recorded",
    /// The ring is clear, and the map says that it has taken in some of it.
    RingCleared = "ring-cleared",
    /// A frame is about to be decoded.
    Decoding = "decoding",
    /// A page was put into the owner's memory, and not marked.
    Installed = "installed",
    /// It is marked, and who waits for it was not woken.
    Marked = "marked",
    /// Everything is there, and nothing was given back.
    Settled = "settled",
    /// A range was given back, perhaps not all.
    Unregistered = "unregistered",
    /// All was given back, and nobody told.
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

    /// Has the process killed when it comes to a place for the so-and-so-manieth time: `NAME:TIMES`, or
    /// crash there: `NAME:TIMES:crash`. False if that is no place. The first call counts.
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

    /// Has the process killed if this is the place.
    pub fn fail_point(point: FailPoint) {
        if let Some(armed) = ARMED.get()
            && armed.point == point
            && armed.times.fetch_sub(1, Relaxed) == 1
        {
            if armed.crash {
                std::process::abort();
            }
            // Nothing of this thread runs after it. It is the only way that a confined worker has.
            let _ = raise(Signal::SIGKILL);
        }
    }
}

#[cfg(feature = "fail-points")]
pub use armed::{arm, fail_point};

/// Nothing: the feature is off.
#[cfg(not(feature = "fail-points"))]
#[inline]
pub fn fail_point(_: FailPoint) {}
