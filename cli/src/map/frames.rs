//! The frames that pages refer to: which slots have been seen, and how well frames compress.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use snapshot_format::{Codec, FrameRef};

/// Upper limits of the classes of ratios, in tenths: how many times smaller a frame record is than
/// its pages. The last class has no limit.
pub(crate) const RATIO_LIMITS: [u64; 11] = [11, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320];

/// Numbers and bytes of frames by their ratio.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ratios {
    /// Number of frames of each class, and the bytes that they take.
    pub(crate) classes: [(u64, u64); RATIO_LIMITS.len() + 1],
    /// Number of frames that are stored as they are.
    pub(crate) raw: u64,
    pub(crate) frames: u64,
    /// Bytes that the frames take, and that they decode to.
    pub(crate) stored_bytes: u64,
    pub(crate) decoded_bytes: u64,
}

impl Ratios {
    fn add(&mut self, frame: &FrameRef) {
        let (stored, decoded) = (u64::from(frame.stored_len()), frame.decoded_len() as u64);
        let is_below = |limit: &u64| decoded * 10 < stored * limit;
        let class = RATIO_LIMITS.iter().position(is_below);
        let class = &mut self.classes[class.unwrap_or(RATIO_LIMITS.len())];
        class.0 += 1;
        class.1 += stored;
        self.frames += 1;
        self.raw += u64::from(frame.codec() == Codec::Raw);
        self.stored_bytes += stored;
        self.decoded_bytes += decoded;
    }
}

/// The frames seen so far.
#[derive(Debug, Default)]
pub(super) struct Frames {
    /// Seen slots of each frame, by layer and offset; 64 in each entry, as most frames have fewer.
    seen: HashMap<(u16, u16, u64), u64>,
    pub(super) ratios: Ratios,
}

impl Frames {
    /// Records a page. Returns whether it is the first one in this slot of the frame.
    pub(super) fn is_first(&mut self, frame: &FrameRef, slot: u16) -> bool {
        if slot >= 64 {
            // The first entry says whether the frame is new.
            self.entry(frame, 0);
        }
        let bits = self.entry(frame, slot / 64);
        let bit = 1 << (slot % 64);
        let is_first = *bits & bit == 0;
        *bits |= bit;
        is_first
    }

    fn entry(&mut self, frame: &FrameRef, part: u16) -> &mut u64 {
        match self.seen.entry((frame.layer(), part, frame.offset())) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                if part == 0 {
                    self.ratios.add(frame);
                }
                entry.insert(0)
            }
        }
    }
}
