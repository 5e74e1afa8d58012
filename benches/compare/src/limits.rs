//! Costs of the parts of a restore by themselves: no restore of the same snapshot can be faster
//! than decoding its frames and copying its pages.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use snapshot_format::layout::PAGE_SIZE;
use snapshot_format::{FrameDecoder, FrameRef, Page, Reason, Snapshot, digest};

use crate::contenders::Region;
use crate::stats::Latencies;
use crate::trial::{Before, Outcome, open_snapshot};
use crate::uffd::Uffd;
use crate::workload::{Order, Plan};
use crate::{BenchError, PAGE, cache};

/// Maximum number of bytes of one COPY: as many as a restore installs at once.
const MAX_COPY: u64 = 256 << 10;

/// Parts of a snapshot that have to be decoded and copied.
struct Contents {
    snapshot: Snapshot,
    /// Every frame once, in the order of the file.
    frames: Vec<FrameRef>,
    /// A page of each frame, in the order of the frames.
    first_pages: Vec<u64>,
    /// Stored pages, as runs of page numbers: a shared page as often as it occurs.
    runs: Vec<(u64, u64)>,
}

impl Contents {
    fn read(path: &Path) -> Result<Self, BenchError> {
        let failed = || format!("{}: reading its index", path.display());
        let snapshot = open_snapshot(path).map_err(BenchError::trial(failed()))?;
        snapshot.prepare().map_err(BenchError::trial(failed()))?;
        let mut frames = BTreeMap::new();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for block in 0..snapshot.block_count() {
            let index = snapshot
                .uncached_block(block, Reason::Verify)
                .map_err(BenchError::trial(failed()))?;
            for (i, page) in (0..index.page_count()).zip(block * 512..) {
                let Page::Stored { frame, .. } = index.page(i) else {
                    continue;
                };
                let key = (frame.layer(), frame.offset());
                frames.entry(key).or_insert((frame, page));
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == page => *count += 1,
                    _ => runs.push((page, 1)),
                }
            }
        }
        let (frames, first_pages) = frames.into_values().unzip();
        Ok(Self {
            snapshot,
            frames,
            first_pages,
            runs,
        })
    }
}

/// Returns one page of each frame of a snapshot: touching them in any order causes one fault per
/// frame.
pub(crate) fn page_of_each_frame(path: &Path) -> Result<Vec<u64>, BenchError> {
    Ok(Contents::read(path)?.first_pages)
}

/// Runs `work` for 0 to `count` on `threads` threads, each with a state of its own.
fn on_all<S>(
    count: usize,
    threads: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<(), BenchError> + Sync,
) -> Result<(), BenchError> {
    let next = AtomicUsize::new(0);
    let one = || {
        let mut state = state();
        loop {
            let item = next.fetch_add(1, Relaxed);
            if item >= count {
                return Ok(());
            }
            work(&mut state, item)?;
        }
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        running.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// Decodes every frame once.
pub(crate) fn decode(path: &Path, threads: usize) -> Result<Outcome, BenchError> {
    let contents = Contents::read(path)?;
    cache::warm(path)?;
    let largest = contents.frames.iter().map(FrameRef::decoded_len).max();
    let state = || (FrameDecoder::new(), vec![0; largest.unwrap_or(0)]);
    let before = Before::now(path);
    let began = Instant::now();
    on_all(
        contents.frames.len(),
        threads,
        state,
        |(decoder, buffer), item| {
            let frame = &contents.frames[item];
            let out = &mut buffer[..frame.decoded_len()];
            decoder
                .decode(&contents.snapshot, frame, Reason::Prefetch, out)
                .map(|_| ())
                .map_err(BenchError::trial("decoding a frame"))
        },
    )?;
    let total = began.elapsed();
    let mut outcome = before.outcome(path);
    outcome.total_ms = total.as_secs_f64() * 1e3;
    outcome.count = contents.frames.len() as u64;
    Ok(outcome)
}

/// Decodes every frame that the index of these blocks names once, and computes the digests of its
/// pages, on all cores.
pub(crate) fn digest_blocks(path: &Path, blocks: &BTreeSet<u64>) -> Result<Outcome, BenchError> {
    let failed = || format!("{}: decoding blocks", path.display());
    let snapshot = open_snapshot(path).map_err(BenchError::trial(failed()))?;
    cache::warm(path)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let before = Before::now(path);
    let began = Instant::now();
    let mut frames = BTreeMap::new();
    for block in blocks {
        let index = snapshot
            .uncached_block(*block, Reason::Prefetch)
            .map_err(BenchError::trial(failed()))?;
        let named = index.frames().iter();
        frames.extend(named.map(|frame| ((frame.layer(), frame.offset()), *frame)));
    }
    let frames: Vec<FrameRef> = frames.into_values().collect();
    let largest = frames.iter().map(FrameRef::decoded_len).max();
    let state = || (FrameDecoder::new(), vec![0; largest.unwrap_or(0)]);
    on_all(frames.len(), threads, state, |(decoder, buffer), item| {
        let out = &mut buffer[..frames[item].decoded_len()];
        decoder
            .decode(&snapshot, &frames[item], Reason::Prefetch, out)
            .map_err(BenchError::trial(failed()))?;
        for page in out.chunks_exact(PAGE_SIZE) {
            std::hint::black_box(digest::page(page));
        }
        Ok(())
    })?;
    let total = began.elapsed();
    let mut outcome = before.outcome(path);
    outcome.total_ms = total.as_secs_f64() * 1e3;
    outcome.count = frames.len() as u64;
    Ok(outcome)
}

/// Decodes the frames that hold the pages of the working sets, and copies these pages to their
/// places. The frames' stored bytes are among the facts.
pub(crate) fn working_set(path: &Path, threads: usize) -> Result<Outcome, BenchError> {
    let failed = || format!("{}: reading its working sets", path.display());
    let snapshot = open_snapshot(path).map_err(BenchError::trial(failed()))?;
    snapshot.prepare().map_err(BenchError::trial(failed()))?;
    cache::warm(path)?;
    let mut frames = BTreeMap::<_, (FrameRef, Vec<(u64, u16)>)>::new();
    for set in snapshot
        .working_sets()
        .map_err(BenchError::trial(failed()))?
    {
        let runs = snapshot
            .working_set(&set.name)
            .map_err(BenchError::trial(failed()))?;
        for number in runs
            .iter()
            .flat_map(|run| run.first_page..run.first_page + run.pages)
        {
            let page = snapshot
                .look_up(number, Reason::Prefetch)
                .map_err(BenchError::trial(failed()))?;
            if let Page::Stored { frame, slot } = page {
                let frames = frames.entry((frame.layer(), frame.offset()));
                frames
                    .or_insert_with(|| (frame, Vec::new()))
                    .1
                    .push((number, slot));
            }
        }
    }
    let mut frames: Vec<_> = frames.into_values().collect();
    let mut count = 0;
    for (_, pages) in &mut frames {
        pages.sort_unstable();
        pages.dedup();
        count += pages.len() as u64;
    }
    let stored: u64 = frames
        .iter()
        .map(|(frame, _)| u64::from(frame.stored_len()))
        .sum();
    let largest = frames.iter().map(|(frame, _)| frame.decoded_len()).max();
    let state = || (FrameDecoder::new(), vec![0; largest.unwrap_or(0)]);
    let before = Before::now(path);
    let began = Instant::now();
    let bytes = snapshot.page_slots() * PAGE;
    let region = Region::anonymous(bytes)?;
    let uffd = Uffd::open()?;
    uffd.register(region.address(), bytes)?;
    on_all(frames.len(), threads, state, |(decoder, buffer), item| {
        let (frame, pages) = &frames[item];
        let out = &mut buffer[..frame.decoded_len()];
        decoder
            .decode(&snapshot, frame, Reason::Prefetch, out)
            .map_err(BenchError::trial(failed()))?;
        let consecutive = |a: &(u64, u16), b: &(u64, u16)| (b.0, b.1) == (a.0 + 1, a.1 + 1);
        for run in pages.chunk_by(consecutive) {
            let (page, slot) = run[0];
            let from = &out[usize::from(slot) * PAGE_SIZE..];
            uffd.copy(
                region.address() + page * PAGE,
                from.as_ptr(),
                run.len() as u64 * PAGE,
            )
            .map_err(BenchError::io("UFFDIO_COPY"))?;
        }
        Ok(())
    })?;
    let total = began.elapsed();
    let mut outcome = before.outcome(path);
    outcome.total_ms = total.as_secs_f64() * 1e3;
    outcome.count = count;
    outcome.facts = serde_json::json!({ "stored_bytes": stored, "frames": frames.len() });
    Ok(outcome)
}

/// Returns the stored pages of a snapshot, by number.
pub(crate) fn stored_pages(path: &Path) -> Result<Vec<u64>, BenchError> {
    let runs = Contents::read(path)?.runs;
    Ok(runs
        .iter()
        .flat_map(|(first, count)| *first..first + count)
        .collect())
}

/// Decodes frames one by one in the order of a shuffle, each timed.
pub(crate) fn decode_each(path: &Path, most: u64, seed: u64) -> Result<Outcome, BenchError> {
    let contents = Contents::read(path)?;
    cache::warm(path)?;
    let count = contents.frames.len() as u64;
    // The plan's offsets lie in the pages that stand for the frames.
    let plan = Plan::new(count, Order::Random, seed, 1.0, Some(most), None);
    let largest = contents.frames.iter().map(FrameRef::decoded_len).max();
    let (mut decoder, mut buffer) = (FrameDecoder::new(), vec![1; largest.unwrap_or(0)]);
    let mut nanos = Vec::with_capacity(plan.offsets.len());
    let before = Before::now(path);
    let all = Instant::now();
    for offset in &plan.offsets {
        let number = usize::try_from(offset / PAGE).unwrap_or(usize::MAX);
        let frame = &contents.frames[number];
        let began = Instant::now();
        decoder
            .decode(
                &contents.snapshot,
                frame,
                Reason::Demand,
                &mut buffer[..frame.decoded_len()],
            )
            .map_err(BenchError::trial("decoding a frame"))?;
        nanos.push(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    let total = all.elapsed();
    let mut outcome = before.outcome(path);
    outcome.total_ms = total.as_secs_f64() * 1e3;
    outcome.count = nanos.len() as u64;
    outcome.latencies = Latencies::from_nanos(nanos);
    Ok(outcome)
}

/// Copies the same number of bytes to the same places as a restore does, from a buffer that stays
/// in the processor's cache.
pub(crate) fn copy(path: &Path, threads: usize) -> Result<Outcome, BenchError> {
    let contents = Contents::read(path)?;
    let mut pieces = Vec::new();
    for (first, count) in &contents.runs {
        let (mut at, end) = (first * PAGE, (first + count) * PAGE);
        while at < end {
            let len = MAX_COPY.min(end - at);
            pieces.push((at, len));
            at += len;
        }
    }
    let bytes = contents.snapshot.page_slots() * PAGE;
    let state = || vec![0x5a_u8; usize::try_from(MAX_COPY).unwrap_or(0)];
    let before = Before::now(path);
    let began = Instant::now();
    let region = Region::anonymous(bytes)?;
    let uffd = Uffd::open()?;
    uffd.register(region.address(), bytes)?;
    on_all(pieces.len(), threads, state, |buffer, item| {
        let (offset, len) = pieces[item];
        uffd.copy(region.address() + offset, buffer.as_ptr(), len)
            .map(|_| ())
            .map_err(BenchError::io("UFFDIO_COPY"))
    })?;
    let total = began.elapsed();
    let mut outcome = before.outcome(path);
    outcome.total_ms = total.as_secs_f64() * 1e3;
    outcome.count = contents.runs.iter().map(|(_, count)| count).sum();
    Ok(outcome)
}
