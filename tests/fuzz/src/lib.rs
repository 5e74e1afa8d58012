//! Code shared by the fuzz targets: mutations that get past the checksums, a naive reader to
//! compare with, and a watchdog that ends a hang.

pub mod chain;
pub mod reading;
pub mod restoring;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use snaprestore_fixtures::images::SplitMix;
use snaprestore_fixtures::pieces::{Piece, What, pieces, reseal};
use snapshot_format::layout::PAGE_SIZE;
use snapshot_format::{
    FrameDecoder, FrameRef, MemoryStore, OpenError, Page, ReadError, Reason, Snapshot,
};

/// Mutates a file and returns its new length. Most of the time it works as a hostile writer would:
/// it changes some numbers of the structure and recomputes all checksums. Otherwise it mutates as
/// the fuzzer does, with or without recomputed checksums.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut rng = SplitMix(seed.into());
    let all = pieces(&data[..size]);
    if all.is_empty() || rng.next() % 8 == 0 {
        let size = libfuzzer_sys::fuzzer_mutate(data, size, max_size);
        if rng.next() % 2 == 0 {
            reseal(&mut data[..size]);
        }
        return size;
    }
    for _ in 0..=rng.next() % 3 {
        let piece = &all[below(&mut rng, all.len())];
        let Some(at) = interesting(&mut rng, piece, size) else {
            continue;
        };
        let len = [1, 2, 4, 8][below(&mut rng, 4)].min(size - at);
        let mut word = [0; 8];
        word[..len].copy_from_slice(&data[at..at + len]);
        let old = u64::from_le_bytes(word);
        let other = &all[below(&mut rng, all.len())];
        let new = match rng.next() % 8 {
            0 => rng.next(),
            1 => 0,
            2 => u64::MAX,
            3 => old.wrapping_add(1 + rng.next() % 8),
            4 => old.wrapping_sub(1 + rng.next() % 8),
            5 => rng.next() % 1024,
            6 => other.bytes.start as u64,
            _ => old ^ (1 << (rng.next() % 64)),
        };
        data[at..at + len].copy_from_slice(&new.to_le_bytes()[..len]);
    }
    if rng.next() % 16 != 0 {
        reseal(&mut data[..size]);
    }
    size
}

fn below(rng: &mut SplitMix, end: usize) -> usize {
    usize::try_from(rng.next() % end.max(1) as u64).unwrap_or(0)
}

/// Returns a position in a piece, or in a reference to it, that is more than padding.
fn interesting(rng: &mut SplitMix, piece: &Piece, size: usize) -> Option<usize> {
    let bytes = match piece.what {
        What::Header => 8..64,
        What::Trailer if rng.next() % 2 == 0 => piece.bytes.start..piece.bytes.start + 200,
        What::Trailer => piece.bytes.start + 1524..piece.bytes.start + 1524 + 10 * 40,
        // Most frames are mostly payload: their head and their reference are worth more.
        What::Frame { .. } if rng.next() % 2 == 0 => piece.bytes.start..piece.bytes.start + 48,
        _ if rng.next() % 2 == 0 => piece.named_at..piece.named_at + 40,
        _ => piece.bytes.clone(),
    };
    let at = bytes.start + below(rng, bytes.len());
    (at < size).then_some(at)
}

/// Opens the snapshot in `bytes`.
pub fn open(bytes: &[u8]) -> Result<Snapshot, OpenError> {
    Snapshot::open(Arc::new(MemoryStore::new(bytes.to_vec())))
}

/// A naive reader that reads one page after the other and keeps whole frames.
pub struct Eager<'a> {
    snapshot: &'a Snapshot,
    decoder: FrameDecoder,
    steps: FrameDecoder,
    frames: HashMap<FrameRef, Option<Vec<u8>>>,
}

/// Result of the naive reader for a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// One word, repeated.
    Fill(u64),
    /// These bytes.
    Bytes(Vec<u8>),
    /// No trustworthy bytes.
    Nothing,
    /// These bytes, or none. They precede the point at which decoding of the frame fails, so a
    /// thread that waited for them may already have received them.
    Torn(Vec<u8>),
    /// No page has the number.
    Unused,
}

impl Found {
    /// Returns whether memory with these bytes is correct.
    pub fn is(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Fill(word) => bytes.chunks(8).all(|chunk| chunk == word.to_le_bytes()),
            Self::Bytes(right) | Self::Torn(right) => right == bytes,
            Self::Nothing | Self::Unused => false,
        }
    }
}

impl<'a> Eager<'a> {
    /// Creates a reader of `snapshot`.
    pub fn new(snapshot: &'a Snapshot) -> Self {
        Self {
            snapshot,
            decoder: FrameDecoder::new(),
            steps: FrameDecoder::in_steps(snapshot).unwrap_or_default(),
            frames: HashMap::new(),
        }
    }

    /// Returns the naive reader's result for `page`.
    pub fn page(&mut self, page: u64) -> Found {
        match self.snapshot.look_up(page, Reason::Demand) {
            Ok(Page::Fill(word)) => Found::Fill(word),
            Ok(Page::Unavailable) => Found::Nothing,
            Ok(Page::Unused) => Found::Unused,
            Ok(Page::Stored { frame, slot }) => {
                let (snapshot, decoder) = (self.snapshot, &mut self.decoder);
                // Hostile references to one place may differ: each is decoded for itself.
                if !self.frames.contains_key(&frame) {
                    let mut out = vec![0; frame.decoded_len()];
                    let good = match decoder.decode(snapshot, &frame, Reason::Demand, &mut out) {
                        Ok(listed) => {
                            for run in listed.runs() {
                                assert!(run.slot + run.count <= frame.slots());
                                let end = run.first_page + u64::from(run.count);
                                // Those of an ancestor's frame are numbers of that file.
                                assert!(end <= snapshot.page_slots() || frame.layer() > 0);
                            }
                            true
                        }
                        Err(error) => {
                            assert!(error.is_damage(), "{error}");
                            false
                        }
                    };
                    self.frames.insert(frame, good.then_some(out));
                }
                let from = usize::from(slot) * PAGE_SIZE;
                let decoded = self.frames.get(&frame).and_then(Option::as_ref);
                if let Some(frame) = decoded {
                    return Found::Bytes(frame[from..from + PAGE_SIZE].to_vec());
                }
                let mut out = vec![0; frame.decoded_len()];
                let first =
                    self.steps
                        .decode_first(snapshot, &frame, Reason::Demand, slot + 1, &mut out);
                match first {
                    Ok((_, ready)) if ready > slot => {
                        Found::Torn(out[from..from + PAGE_SIZE].to_vec())
                    }
                    _ => Found::Nothing,
                }
            }
            Err(error) => {
                only_damage(&error);
                Found::Nothing
            }
        }
    }
}

/// Asserts that an error is damage: a store in memory never fails, so anything unreadable is
/// damaged.
pub fn only_damage(error: &ReadError) {
    assert!(error.is_damage(), "{error}");
}

/// Longest time that one input may take, on a machine that is busy with other things too.
const LONGEST: Duration = Duration::from_secs(60);

/// Milliseconds from the start of the watch to the start of the current input, plus one; 0 between
/// inputs.
static SINCE: AtomicU64 = AtomicU64::new(0);

/// Runs `body`, and ends the process if it hangs. The fuzzer's own alarm is a signal, which a
/// thread that waits for a page in the kernel doesn't take.
pub fn watched(body: impl FnOnce()) {
    static START: Once = Once::new();
    static EPOCH: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let epoch = *EPOCH.get_or_init(Instant::now);
    let now = move || u64::try_from(epoch.elapsed().as_millis()).unwrap_or(u64::MAX) + 1;
    START.call_once(|| {
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let since = SINCE.load(Relaxed);
                if since != 0 && u128::from(now().saturating_sub(since)) > LONGEST.as_millis() {
                    eprintln!("the input under way hangs");
                    std::process::abort();
                }
            }
        });
    });
    SINCE.store(now(), Relaxed);
    body();
    SINCE.store(0, Relaxed);
}
