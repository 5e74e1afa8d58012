//! What a session has done, for people and programs.

use std::time::Duration;

use crate::session::Percentiles;

/// Pages installed for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// From frames.
    pub copied: u64,
    /// Repeating a word other than zero.
    pub filled: u64,
    /// Zero.
    pub zeroed: u64,
}

/// What a restore has done so far.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// From the start call to usable memory.
    pub mapped: Duration,
    /// From the start call to the memory being complete, if it is.
    pub complete: Option<Duration>,
    /// Faults read, and pages that [`Restored::read_at`](crate::restore::Restored::read_at) asked for.
    pub faults: u64,
    /// From reading a fault to its answer.
    pub fault_time: Percentiles,
    /// Pages that faults brought in: the touched ones and those that came with them.
    pub demand: PageCounts,
    /// Pages that prefetch brought in.
    pub prefetch: PageCounts,
    /// Zero pages that the kernel serves itself when they are touched: they are in none of the
    /// other counts.
    pub left_to_kernel: u64,
    /// Pages poisoned.
    pub poisoned: u64,
    /// Events read: discards, unmappings, moves.
    pub events: u64,
    /// Installs that had to be repeated because the mappings were changing.
    pub retries: u64,
    /// Bytes of frames read from the snapshot.
    pub bytes_read: u64,
    /// Bytes decoded from frames.
    pub bytes_decoded: u64,
    /// Failures so far.
    pub failures: u64,
}
