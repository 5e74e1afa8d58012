//! Dictionaries: training one, and measuring whether it pays.
//!
//! Small frames compress worse than a whole image because each starts without any history. A
//! dictionary provides some. It costs its own length in the file and some time for each frame, so
//! one is only used if it saves clearly more than that on pages that it wasn't made from.

use std::collections::HashSet;

use rayon::prelude::*;
use zstd::zstd_safe::{self, CCtx, CDict};

use crate::digest;
use crate::layout::PAGE_SIZE;

/// Dictionary sizes that are tried. The small one sometimes wins, because it leaves more of the
/// window to the frame.
const SIZES: [usize; 2] = [112 << 10, 16 << 10];
/// Maximum number of bytes that zstd trains on. This takes a quarter of a second; four times as
/// much takes three times as long and saved 0.1 % more.
const MAX_TRAINING_BYTES: usize = 2 << 20;
/// One in this many frames is held out from training and compressed to judge the dictionary.
const HELD_OUT: usize = 4;
/// Minimum number of bytes to learn from.
const MIN_BYTES: usize = 2 << 20;
/// Minimum share of the frames' bytes that a dictionary must save, because using it also costs
/// decoding time.
const MIN_SAVED_RATIO: f64 = 0.005;

/// Largest frames for which a dictionary is trained by default. In a real guest it saves 0.6 % of
/// frames of 64 KiB, and 0.5 % of those of 128 KiB, where training and using it takes 40 % longer.
const MAX_FRAME_BYTES: usize = 64 << 10;

/// Returns whether frames of `frame_pages` pages are small enough for a dictionary to be worth the
/// time to train it.
pub fn is_worth_training(frame_pages: usize) -> bool {
    frame_pages * PAGE_SIZE <= MAX_FRAME_BYTES
}

/// A dictionary that pays.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The dictionary.
    pub bytes: Vec<u8>,
    /// Share of the compressed bytes that it saved on pages that it wasn't trained on.
    pub saved_ratio: f64,
}

/// Trains a dictionary on `samples` for frames of `frame_pages` pages.
///
/// The samples are concatenated pages: runs of about `frame_pages` consecutive pages of the source,
/// best taken from all over it, 4 to 16 MiB in all. Fills and repetitions among them are left out.
/// `expected_bytes` is the number of bytes of other pages that will be compressed: a dictionary
/// pays only if its savings on them are at least twice its own length. Returns none if none pays.
///
/// Takes a few hundred milliseconds, on two threads of the rayon pool that it is called in.
pub fn train(
    samples: &[u8],
    frame_pages: usize,
    level: i32,
    expected_bytes: u64,
) -> Option<Trained> {
    let mut known = HashSet::new();
    let mut pages = Vec::with_capacity(samples.len());
    for page in samples.chunks_exact(PAGE_SIZE) {
        if digest::fill_word(page).is_none() && known.insert(digest::stored(page)) {
            pages.extend_from_slice(page);
        }
    }
    let frames: Vec<&[u8]> = pages.chunks(frame_pages.max(1) * PAGE_SIZE).collect();
    train_on_frames(&frames, level, expected_bytes)
}

/// Trains a dictionary as [`train`] does, on frames of distinct pages that are not fills.
pub(crate) fn train_on_frames(
    frames: &[&[u8]],
    level: i32,
    expected_bytes: u64,
) -> Option<Trained> {
    let total: usize = frames.iter().map(|frame| frame.len()).sum();
    if total < MIN_BYTES {
        return None;
    }
    let held_out: Vec<&[u8]> = frames
        .iter()
        .copied()
        .skip(HELD_OUT - 1)
        .step_by(HELD_OUT)
        .collect();
    let (samples, sizes) = training_set(frames);
    let plain = compressed_len(&held_out, |context, target, frame| {
        context.compress(target, frame, level)
    })?;
    let raw: usize = held_out.iter().map(|frame| frame.len()).sum();
    let expected = as_f64(expected_bytes) * plain / as_f64(raw as u64);

    let judged = SIZES.into_par_iter().filter_map(|size| {
        let mut bytes = vec![0; size];
        let len = zstd_safe::train_from_buffer(&mut bytes[..], &samples, &sizes).ok()?;
        bytes.truncate(len);
        let prepared = CDict::try_create(&bytes, level)?;
        let with = compressed_len(&held_out, |context, target, frame| {
            context.compress_using_cdict(target, frame, &prepared)
        })?;
        let saved_ratio = (plain - with) / plain;
        let gain = saved_ratio * expected - as_f64(len as u64);
        (saved_ratio >= MIN_SAVED_RATIO && gain >= as_f64(len as u64))
            .then_some((gain, Trained { bytes, saved_ratio }))
    });
    judged
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, trained)| trained)
}

/// Returns pages from all frames that aren't held out, evenly distributed and concatenated, and
/// their lengths.
fn training_set(frames: &[&[u8]]) -> (Vec<u8>, Vec<usize>) {
    let pages = || {
        let trained_on = frames
            .iter()
            .enumerate()
            .filter(|(index, _)| index % HELD_OUT != HELD_OUT - 1);
        trained_on.flat_map(|(_, frame)| frame.chunks(PAGE_SIZE))
    };
    let step = (pages().count() * PAGE_SIZE)
        .div_ceil(MAX_TRAINING_BYTES)
        .max(1);
    let mut samples = Vec::new();
    let mut sizes = Vec::new();
    for page in pages().step_by(step) {
        samples.extend_from_slice(page);
        sizes.push(page.len());
    }
    (samples, sizes)
}

/// Returns the size of all `frames` when each is compressed, or stored if that is shorter.
fn compressed_len(
    frames: &[&[u8]],
    compress: impl Fn(&mut CCtx<'static>, &mut [u8], &[u8]) -> zstd_safe::SafeResult + Sync,
) -> Option<f64> {
    let longest = frames.iter().map(|frame| frame.len()).max()?;
    let room = zstd_safe::compress_bound(longest);
    let total: Option<u64> = frames
        .par_chunks(frames.len().div_ceil(rayon::current_num_threads()))
        .map(|frames| {
            let (mut context, mut target) = (CCtx::try_create()?, vec![0; room]);
            let mut total = 0u64;
            for frame in frames {
                let len = compress(&mut context, &mut target, frame).ok()?;
                total += len.min(frame.len()) as u64;
            }
            Some(total)
        })
        .sum();
    total.map(as_f64)
}

/// Converts to `f64`. The loss of precision doesn't matter for an estimate.
#[allow(clippy::cast_precision_loss)]
fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}
