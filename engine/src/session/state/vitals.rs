//! The activity of a session's threads, as a supervisor observes it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use super::{DECODING, DECODING_LAYER, HEARTBEATS, MAX_THREADS, READS, State};
use crate::session::platform::FrameId;

/// A supervisor's view of the threads of a session whose state is in a memfd.
#[derive(Debug)]
pub struct Vitals {
    state: State,
}

/// The activity of the threads of a session up to one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Number of reads of messages.
    pub reads: u64,
    /// For each thread, the number of starts and ends of serving: odd while it serves.
    pub heartbeats: Vec<u64>,
}

impl Vitals {
    /// Opens the session state in `memfd`.
    pub fn new(memfd: OwnedFd) -> io::Result<Self> {
        let state = State::open(memfd)?.0;
        Ok(Self { state })
    }

    /// Returns the activity so far.
    pub fn pulse(&self) -> Pulse {
        let heartbeats = self.threads().map(|words| words[HEARTBEATS].load(Relaxed));
        Pulse {
            reads: self.state.words()[READS].load(Relaxed),
            heartbeats: heartbeats.collect(),
        }
    }

    /// Returns the frames that are being decoded. For a dead worker these are the frames on which
    /// it died.
    pub fn decoding(&self) -> Vec<FrameId> {
        let decoding = |words: &[AtomicU64]| {
            let offset = words[DECODING].load(Acquire).checked_sub(1)?;
            let layer = words[DECODING_LAYER].load(Relaxed);
            let layer = u16::try_from(layer).ok()?;
            Some(FrameId { layer, offset })
        };
        self.threads().filter_map(decoding).collect()
    }

    fn threads(&self) -> impl Iterator<Item = &[AtomicU64]> {
        (0..MAX_THREADS).filter_map(|thread| self.state.thread(thread))
    }
}
