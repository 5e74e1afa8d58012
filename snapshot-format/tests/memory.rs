//! A writer's memory is bounded for any source: 128 MiB with default options and the maximum number
//! of threads that these ever start. Each source is written in a process of its own, whose peak is
//! measured. 64 GiB of distinct pages take five minutes, so they are written on demand only:
//!
//! 64 GiB of which every page is new take five minutes, so they are written on demand only:
//!
//! ```text
//! DISTINCT_GIB=64 cargo test --release -p snapshot-format --test memory distinct_8 -- --nocapture
//! ```
//!
//! Two processors took 280 s; the peak was 111 MiB.

// The peaks are the interesting output of these tests.
#![allow(clippy::print_stdout)]

use std::io::{self, Write as _};
use std::process::Command;

use snapshot_format::layout::PAGE_SIZE;
use snapshot_format::{RegionSpec, Summary, WriteError, Writer, WriterOptions};

const MAX_BYTES: u64 = 128 << 20;
/// Maximum number of threads that a writer starts by default.
const THREADS: usize = 8;
const PAGES_PER_GIB: u64 = 1 << 18;
const CHILD: &str = "SNAPSHOT_MEMORY_TEST";

/// Makes pages faster than they are written, by stamping the pages of a ready-made block.
struct Source {
    block: Vec<u8>,
    /// Number of stamps used.
    next: u64,
}

impl Source {
    fn new() -> Self {
        let mut state = 1u64;
        let block = (0..512 * PAGE_SIZE)
            .map(|at| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                // Some noise, some text, some zeros in each page.
                match at % PAGE_SIZE / 1024 {
                    0 => state.to_be_bytes()[0],
                    1 | 2 => b"the quick brown fox jumps over it"[at % 33],
                    _ => 0,
                }
            })
            .collect();
        Self { block, next: 0 }
    }

    fn stamp(&mut self, page: usize, stamp: u64) {
        self.block[page * PAGE_SIZE..][..8].copy_from_slice(&stamp.to_le_bytes());
    }

    /// Returns a block of 512 pages with distinct content. Page `n` of block `b` gets the stamp
    /// `512 b + n + 1`; writing that stamp there again repeats the content.
    fn distinct(&mut self) -> &[u8] {
        for page in 0..512 {
            self.next += 1;
            self.stamp(page, self.next);
        }
        &self.block
    }
}

type Sink = Writer<io::Sink>;

/// Writes pages that are all new.
fn distinct(writer: &mut Sink, pages: u64) -> Result<(), WriteError> {
    let mut source = Source::new();
    (0..pages / 512).try_for_each(|_| writer.write_pages(source.distinct()))
}

/// Writes a frame for each page, with more frames than are kept for sharing. Some pages of each
/// block are repeated shortly after and must be found up to the end.
fn repeated(writer: &mut Sink, pages: u64) -> Result<(), WriteError> {
    let mut source = Source::new();
    for _ in 0..pages / 576 {
        writer.write_pages(source.distinct())?;
        writer.write_pages(&source.block[..64 * PAGE_SIZE])?;
    }
    Ok(())
}

/// Writes data, zeros given as bytes, copies of near and far blocks, and single fills.
fn mixed(writer: &mut Sink, pages: u64) -> Result<(), WriteError> {
    let mut source = Source::new();
    let zeros = vec![0; 512 * PAGE_SIZE];
    for block in 0..pages / 512 {
        match block % 8 {
            0..3 => writer.write_pages(source.distinct())?,
            3 => {
                // Pages that were written long ago, taken from different places.
                for page in 0..512 {
                    let earlier = (block * 7919 + page as u64 * 104_729) % (source.next / 512);
                    source.stamp(page, earlier * 512 + page as u64 + 1);
                }
                writer.write_pages(&source.block)?;
            }
            4 => {
                for page in 0..512 {
                    writer.write_fill(1, block * 512 + page)?;
                }
            }
            _ => writer.write_pages(&zeros)?,
        }
    }
    Ok(())
}

/// Writes holes, with 3 GiB of data between them.
fn sparse(writer: &mut Sink, pages: u64) -> Result<(), WriteError> {
    let mut source = Source::new();
    let data = 3 * PAGES_PER_GIB / 512;
    let hole = pages / data - 512;
    for _ in 0..data {
        writer.write_pages(source.distinct())?;
        writer.write_fill(hole, 0)?;
    }
    Ok(())
}

/// Writes one new page and holes in every index block, so that index blocks wait for frames that
/// fill slowly.
fn scattered(writer: &mut Sink, pages: u64) -> Result<(), WriteError> {
    let mut source = Source::new();
    let mut left = Vec::new();
    for _ in 0..pages / 512 {
        if left.is_empty() {
            left = source
                .distinct()
                .chunks(PAGE_SIZE)
                .map(<[u8]>::to_vec)
                .collect();
        }
        writer.write_pages(&left.pop().unwrap_or_default())?;
        writer.write_fill(200, 0)?;
        writer.write_unavailable(11)?;
        writer.write_fill(300, u64::from_le_bytes(*b"repeated"))?;
    }
    Ok(())
}

/// Writes one new page in every index block; the others are copies out of many frames.
fn duplicates(writer: &mut Sink, pages: u64) -> Result<(), WriteError> {
    let mut source = Source::new();
    let frames = 4096;
    (0..frames * 32 / 512).try_for_each(|_| writer.write_pages(source.distinct()))?;
    let new = source.next + 1;
    for block in 0..(pages - frames * 32) / 512 {
        for page in 0..511 {
            let earlier = (block * 31 + page as u64 * 7) % (frames * 32 / 512);
            source.stamp(page, earlier * 512 + page as u64 + 1);
        }
        source.stamp(511, new + block);
        writer.write_pages(&source.block)?;
    }
    Ok(())
}

/// Runs `test` in a process of its own, which writes a source, and checks the peak and the counts.
fn in_child(
    test: &str,
    gib: u64,
    write: impl FnOnce(&mut Sink, u64) -> Result<(), WriteError>,
    check: impl FnOnce(&Summary),
) {
    in_child_with(WriterOptions::default(), test, gib, write, check);
}

/// Runs a case as [`in_child`] does, with other options.
fn in_child_with(
    options: WriterOptions,
    test: &str,
    gib: u64,
    write: impl FnOnce(&mut Sink, u64) -> Result<(), WriteError>,
    check: impl FnOnce(&Summary),
) {
    let pages = gib * PAGES_PER_GIB;
    if std::env::var_os(CHILD).is_none() {
        let output =
            Command::new(std::env::current_exe().expect("cannot find the test's own path"))
                .args(["--exact", test, "--nocapture"])
                .env(CHILD, "1")
                .output()
                .expect("a process of its own");
        assert!(output.status.success(), "{test}: {output:?}");
        // The rest is the output of a test harness, and would be counted. Written past this
        // harness, which swallows a `println!`.
        let said = String::from_utf8_lossy(&output.stdout);
        let peak = said.lines().find(|line| line.contains(": peak "));
        writeln!(io::stdout(), "{}", peak.expect("what was measured")).expect("standard output");
        return;
    }
    let options = WriterOptions {
        threads: Some(THREADS),
        expected_pages: Some(pages),
        ..options
    };
    let mut writer = Writer::new(io::sink(), options).expect("a writer");
    writer
        .begin_region(&RegionSpec::default())
        .expect("a region");
    write(&mut writer, pages).expect("pages");
    let (_, written) = writer.finish().expect("the end");
    let peak = peak_bytes();
    println!(
        "{test}: {gib} GiB, {} stored pages, file of {} MiB: peak {} MiB",
        written.summary.stored_pages,
        written.file_bytes >> 20,
        peak >> 20
    );
    check(&written.summary);
    assert!(peak <= MAX_BYTES, "{peak} bytes");
}

/// Returns `VmHWM` of this process, in bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc/self/status");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("VmHWM");
    let kib: u64 = line
        .trim()
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .expect("not a number");
    kib << 10
}

#[test]
fn distinct_1() {
    in_child("distinct_1", 1, distinct, |summary| {
        assert_eq!(summary.stored_pages, PAGES_PER_GIB);
    });
}

#[test]
fn distinct_8() {
    let gib = std::env::var("DISTINCT_GIB").map_or(8, |gib| gib.parse().expect("not a number"));
    in_child("distinct_8", gib, distinct, |summary| {
        assert_eq!(summary.stored_pages, gib * PAGES_PER_GIB);
    });
}

/// Regression: frames of one page ran out of numbers that can be shared, and beyond the first 2^20
/// no repetition was found any more.
#[test]
fn repeated_5() {
    let options = WriterOptions {
        frame_pages: 1,
        ..WriterOptions::default()
    };
    let blocks = 5 * PAGES_PER_GIB / 576;
    in_child_with(options, "repeated_5", 5, repeated, |summary| {
        assert!(summary.frames > 1 << 20);
        assert_eq!(summary.stored_pages, blocks * 512);
        assert_eq!(summary.duplicate_pages, blocks * 64);
    });
}

#[test]
fn mixed_8() {
    in_child("mixed_8", 8, mixed, |summary| {
        assert!(
            summary.duplicate_pages > PAGES_PER_GIB / 2 && summary.fill_pages > PAGES_PER_GIB / 2
        );
    });
}

#[test]
fn sparse_64() {
    in_child("sparse_64", 64, sparse, |summary| {
        assert!(summary.zero_pages > 60 * PAGES_PER_GIB);
        assert!(summary.stored_pages > 2 * PAGES_PER_GIB);
    });
}

#[test]
fn scattered_64() {
    in_child("scattered_64", 64, scattered, |summary| {
        assert_eq!(summary.stored_pages, 64 * PAGES_PER_GIB / 512);
    });
}

#[test]
fn duplicates_4() {
    in_child("duplicates_4", 4, duplicates, |summary| {
        assert!(summary.duplicate_pages > 3 * PAGES_PER_GIB, "{summary:?}");
    });
}
